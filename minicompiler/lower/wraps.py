"""Vectors of elements that lie side by side, except where a line ends among them.

    vector j in 8:                                  if i%98 + 7 < 98:
        r[i + j] = x[(i + j)//98, (i + j)%98]  ->       vector j in 8: r[i + j] = x[i//98, i%98 + j]
                                                    else: (as on the left)

A quotient changes at most once within a vector that is no longer than the line, and seldom does.
Where it does not, the elements are one load; else each is fetched from where it lies.
"""

from __future__ import annotations

from minicompiler.ir.arith import Arith
from minicompiler.ir.expr import (
    TRUE,
    Binary,
    Const,
    Expr,
    Load,
    Var,
    all_of,
    const_int,
    free_vars,
    rewrite,
    walk,
)
from minicompiler.ir.tir import (
    UNROLL,
    VECTOR,
    Alloc,
    Block,
    For,
    If,
    PrimFunc,
    Seq,
    Stmt,
    Store,
    map_statements,
    statements,
    stores,
)

from .blocks import arith_of_loops

MOST_LINES = 3  # ends of lines that are asked for: more are as dear as what they save


def unwrap_lines(func: PrimFunc, ctx: object = None) -> PrimFunc:
    """Vector loops whose loads wrap around the ends of lines get a form without."""
    arith = arith_of_loops(func)

    def visit(s: Stmt) -> Stmt:
        if isinstance(s, For):
            if s.kind is VECTOR:
                return _two_forms(s, arith)
            # A tile stays one piece of code without branches.
            body = s.body if s.kind is UNROLL else visit(s.body)
            return s if body is s.body else s.with_(body=body)
        if isinstance(s, Seq):
            stmts = tuple(visit(x) for x in s.stmts)
            return s.with_(stmts=stmts) if stmts != s.stmts else s
        if isinstance(s, If):
            return s.with_(then=visit(s.then), orelse=None if s.orelse is None else visit(s.orelse))
        if isinstance(s, Alloc):
            return s.with_(body=visit(s.body))
        return s

    return func.with_(phases=tuple(map(visit, func.phases)))


def _two_forms(loop: For, arith: Arith) -> Stmt:
    lanes = const_int(loop.extent)
    if lanes is None or any(isinstance(s, For | Block) for s in statements(loop.body)):
        return loop
    inside: dict[Expr, Expr] = {}  # // and %, and what they are where no line ends
    asked: dict[Expr, None] = {}
    for e in _in_loads(loop, arith):
        made = _within(e, loop.var, lanes, arith)
        if made is not None:
            inside[e], condition = made
            asked[condition] = None
    if not inside or len(asked) > MOST_LINES:
        return loop

    def replace(e: Expr) -> Expr | None:
        return inside.get(e)

    def one(s: Stmt) -> Stmt | None:
        if isinstance(s, If):
            return s.with_(cond=arith.simplify(rewrite(s.cond, replace)))
        if isinstance(s, Store):
            return s.with_(
                indices=tuple(arith.simplify(rewrite(i, replace)) for i in s.indices),
                value=arith.simplify(rewrite(s.value, replace)),
            )
        return None

    whole = loop.with_(body=map_statements(loop.body, one))
    condition = all_of(c for c in asked if c is not TRUE)
    return whole if condition is TRUE else If(condition, whole, loop)


def _in_loads(loop: For, arith: Arith) -> list[Expr]:
    """Quotients and remainders that vary along the loop, in the indices of loads which they keep
    from lying side by side: those of a whole line and what is left of it make one long line."""
    found: dict[Expr, None] = {}
    for s in stores(loop.body):
        for load in walk(s.value):
            if type(load) is Load and not _straight(load, loop.var, arith):
                for i in load.indices:
                    found.update(
                        (e, None) for e in walk(i)
                        if type(e) is Binary and e.op in ("floordiv", "mod")
                        and loop.var in free_vars(e)
                    )  # fmt: skip
    return list(found)


def _straight(load: Load, lane: Var, arith: Arith) -> bool:
    """Whether a load moves by the same distance with each lane."""
    terms = arith.poly(load.buffer.offset(load.indices))
    return all(m == (lane,) or not any(lane in free_vars(a) for a in m) for m in terms)


def _within(e: Expr, lane: Var, lanes: int, arith: Arith) -> tuple[Expr, Expr] | None:
    """What a quotient or remainder is in a vector in which the quotient does not change, and the
    condition for that. None where it changes in every vector, or the lanes count in another way."""
    assert isinstance(e, Binary)
    line = const_int(e.b)
    if line is None or any(type(x) is Load for x in walk(e)):
        return None
    terms = arith.poly(e.a)
    step = terms.get((lane,), 0)
    start = arith.expr({m: c for m, c in terms.items() if m != (lane,)})
    if step < 1 or step * (lanes - 1) >= line or lane in free_vars(start):
        return None
    first = arith.simplify(start % e.b)
    condition = arith.simplify(first + step * (lanes - 1) < Const(line))
    if e.op == "mod":
        return arith.simplify(first + lane * step), condition
    return arith.simplify(start // e.b), condition
