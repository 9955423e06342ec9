"""The primitive `cut`: one loop becomes two nests, of which each knows on which side it lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minicompiler.ir.arith import Arith
from minicompiler.ir.expr import (
    ZERO,
    Binary,
    Expr,
    Load,
    Select,
    all_of,
    conjuncts,
    rewrite,
    select,
    substitute,
    wrap,
)
from minicompiler.ir.tir import (
    SERIAL,
    Alloc,
    Block,
    Buffer,
    For,
    Seq,
    Stmt,
    Store,
    map_exprs,
    map_statements,
    statements,
    substitute_stmt,
)

from . import analysis
from .loops import keep_order

if TYPE_CHECKING:
    from .schedule import Schedule


def cut(s: Schedule, name: str, at: int, multiple: bool = False) -> tuple[str, str]:
    """The first `at` iterations, and a second nest for the others; for at < 0, the last `-at`.
    multiple: as many as there are in multiples of `at`, and the fewer than `at` others.

        for i in 100:                             ->   for i in 3:
            C[i] = select(i < 3, 0, D[i])                  C[i] = 0
                                                       for i_t in 97:
                                                           C[i_t + 3] = D[i_t + 3]

    Its loops and blocks end in `_t`. One of the nests may turn out to be empty where the extent is
    not known. What the values of blocks choose by position is chosen where one of them lies on one
    side.
    """
    loop, _ = s.loop(name)
    if loop.kind is not SERIAL:
        s.refuse(f"loop {name} is marked {loop.kind.value} already", loop, "cut before mark")
    keep_order(s, loop)
    analysis.refuse_parallel_below(s, loop)
    arith = analysis.arith_of(s.func)
    extent = arith.simplify(loop.extent)
    if multiple and at < 1:
        s.refuse(f"there are no multiples of {at} iterations", loop)
    first = extent // at * at if multiple else wrap(at) if at >= 0 else extent + at
    first = arith.simplify(first)
    behind = arith.simplify(extent - first)
    if first is ZERO or behind is ZERO or not all(arith.holds(n >= ZERO) for n in (first, behind)):
        s.refuse(f"{at} is not known to lie inside the extent {extent}", loop)
    rest = s.fresh_var(name + "_t")
    body = substitute_stmt(renamed(s, loop.body, "t"), {loop.var: first + rest})
    nests = loop.with_(extent=first), For(rest, behind, SERIAL, body)
    s.swap(loop, Seq(nests))
    arith = analysis.arith_of(s.func)

    def one(x: Stmt) -> Stmt | None:
        return _chosen(x, arith) if isinstance(x, Block) else None

    for nest in nests:
        s.swap(nest, map_statements(nest, one))
    return name, rest.name


def _chosen(block: Block, arith: Arith) -> Block | None:
    """A block without the choices and conditions that are the same for all its elements."""
    values = analysis.values_of(block)

    def holds(c: Expr) -> bool | None:
        return arith.prove(substitute(c, values))

    def one(e: Expr) -> Expr | None:
        if type(e) is Select:
            known = {c: holds(c) for c in conjuncts(e.cond)}
            if False in known.values():
                return e.b
            left = [c for c, true in known.items() if not true]
            return select(all_of(left), e.a, e.b) if len(left) < len(known) else None
        if type(e) is Binary and e.op in ("min", "max") and e.dtype.is_int:
            less = holds(e.a <= e.b)
            return None if less is None else e.a if less == (e.op == "min") else e.b
        return None

    value = rewrite(block.body.value, one)
    asked = conjuncts(block.where)
    where = [c for c in asked if holds(c) is not True]
    if value is block.body.value and len(where) == len(asked):
        return None
    return block.with_(where=all_of(where), body=block.body.with_(value=value))


def renamed(s: Schedule, body: Stmt, suffix: str) -> Stmt:
    """A copy with fresh loop, block and buffer names, which end in `_suffix`."""
    mapping: dict[Expr, Expr] = {}
    copies: dict[Buffer, Buffer] = {}
    for x in statements(body):
        if isinstance(x, For):
            mapping[x.var] = s.fresh_var(f"{x.var.name}_{suffix}")
        elif isinstance(x, Alloc):
            copies[x.buffer] = x.buffer.with_(name=s.fresh(f"{x.buffer.name}_{suffix}"))

    def load(e: Expr) -> Expr | None:
        made = copies.get(e.buffer) if type(e) is Load else None
        return None if made is None else Load(made, e.indices, e.mask)  # type: ignore[attr-defined]

    def store(x: Store) -> Store:
        return x.with_(buffer=copies.get(x.buffer, x.buffer))

    def one(x: Stmt) -> Stmt | None:
        if isinstance(x, For):
            return x.with_(var=mapping[x.var])
        if isinstance(x, Alloc):
            return x.with_(buffer=copies[x.buffer])
        if isinstance(x, Block):
            init = None if x.init is None else store(x.init)
            name = s.fresh(f"{x.name}_{suffix}")
            return x.with_(name=name, init=init, body=store(x.body))
        return None

    copied = substitute_stmt(map_statements(body, one), mapping)
    return map_exprs(copied, lambda e: rewrite(e, load)) if copies else copied
