"""A tile of many rows for calls that have few: a prompt of any length may be a single token.

    alloc c: [6, 16] register             if i*6 + 1 < n:
    for k: unroll j in 6:                     (as on the left)
        c[j, :] += a[i*6 + j, k]*b[k, :]  ->  else:
    unroll j in 6:                                alloc c: [6, 16] register
        if i*6 + j < n:                           for k: c[0, :] += a[i*6, k]*b[k, :]
            r[i*6 + j, :] = c[j, :]               r[i*6, :] = c[0, :]

Only tiles that may lack all rows but the first from the start (n may be 1) get the second form: it
is a second copy of their code. Each element is summed as before.
"""

from __future__ import annotations

from minicompiler.ir.arith import Arith
from minicompiler.ir.expr import (
    FALSE,
    ONE,
    TRUE,
    ZERO,
    Binary,
    Expr,
    Load,
    Var,
    conjuncts,
    const_int,
    free_vars,
    substitute,
    walk,
)
from minicompiler.ir.tir import (
    UNROLL,
    Alloc,
    Buffer,
    For,
    If,
    Prefetch,
    PrimFunc,
    Scope,
    Stmt,
    Store,
    map_statements,
    seq,
    statements,
    stores,
    sub_statements,
    substitute_stmt,
)

from .blocks import arith_of_loops


def few_rows(func: PrimFunc, ctx: object = None) -> PrimFunc:
    """Register tiles whose later rows may all be missing get a second form, of one row."""
    if not func.dims:
        return func
    arith = arith_of_loops(func)

    def one(s: Stmt) -> Stmt | None:
        if not isinstance(s, Alloc) or s.buffer.scope is not Scope.REGISTER:
            return None
        rows = _row_loops(s)
        second = _second_row(s, rows, arith) if rows else None
        if second is None:
            return None
        return If(second, s, _first_row(s, rows))

    return func.with_(phases=tuple(map_statements(p, one) for p in func.phases))


def _row_loops(tile: Alloc) -> set[For]:
    """The loops that run over all rows of a tile, each access of which is in one of them."""
    size = const_int(tile.buffer.shape[0]) if len(tile.buffer.shape) == 2 else None
    if size is None or size < 2:
        return set()
    loops = {
        x.var: x
        for x in statements(tile.body)
        if isinstance(x, For) and x.kind is UNROLL and const_int(x.extent) == size
    }
    places = [at[0] for at in _accesses(tile.body, tile.buffer)]
    if any(p not in loops for p in places):
        return set()
    return {loops[p] for p in places if isinstance(p, Var)}


def _accesses(s: Stmt, buffer: Buffer) -> list[tuple[Expr, ...]]:
    found = []
    for st in stores(s):
        if st.buffer is buffer:
            found.append(st.indices)
        for e in (st.value, *st.indices):
            found += [x.indices for x in walk(e) if type(x) is Load and x.buffer is buffer]
    return found


def _second_row(tile: Alloc, rows: set[For], arith: Arith) -> Expr | None:
    """The condition under which the second row is there, if without it no later one is stored."""
    guards: set[Expr] = set()
    for loop in rows:
        for guard in _guards(loop.body, tile.buffer, TRUE):
            own = [c for c in conjuncts(guard) if loop.var in free_vars(c)]
            if len(own) != 1 or not _falls(own[0], loop.var, arith):
                return None
            guards.add(arith.simplify(substitute(own[0], {loop.var: ONE})))
    if len(guards) != 1:
        return None
    (second,) = guards
    if free_vars(second) & {x.var for x in statements(tile.body) if isinstance(x, For)}:
        return None  # it is not the same for all of a row
    start: dict[Expr, Expr] = {v: ZERO for v in free_vars(second) if v in arith.ranges}
    first_tile = arith.simplify(substitute(second, start))
    return second if first_tile not in (TRUE, FALSE) else None


def _guards(s: Stmt, tile: Buffer, guard: Expr) -> list[Expr]:
    """The conditions of the stores to other buffers."""
    if isinstance(s, Store):
        return [] if s.buffer is tile else [guard]
    if isinstance(s, If):
        if s.orelse is not None:
            return [TRUE]
        guard = s.cond if guard is TRUE else guard & s.cond
    return [g for x in sub_statements(s) for g in _guards(x, tile, guard)]


def _falls(cond: Expr, row: Var, arith: Arith) -> bool:
    """True for a comparison which, where it does not hold for a row, holds for none behind it."""
    if type(cond) is not Binary or cond.op not in ("lt", "le"):
        return False
    line = arith.poly(cond.b - cond.a)
    return line.get((row,), 0) < 0 and not any(
        row in free_vars(v) for k in line for v in k if k != (row,)
    )


def _first_row(tile: Alloc, rows: set[For]) -> Stmt:
    """The tile with its first row alone, and without hints: the few instructions of a row leave
    the processor room to load far ahead by itself."""

    def one(s: Stmt) -> Stmt | None:
        if isinstance(s, For) and s in rows:
            return substitute_stmt(s.body, {s.var: ZERO})
        return seq(()) if isinstance(s, Prefetch) else None

    return map_statements(tile, one)
