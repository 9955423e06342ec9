"""Axes of a result that are one axis of all it is made of are one.

    for h in 16: for w in 16: for c: r[h, w, c] = m[h*16 + w, c] / s[h*16 + w]
      ->   for f in 256: for c: r[f, c] = m[f, c] / s[f]

Memory stays as it is: the result gets another shape, with the same elements in the same order. So a
reshape behind a product or an attention leaves its rows what they are for the schedule.
"""

from __future__ import annotations

from ..ir.arith import Arith
from ..ir.expr import TRUE, ZERO, Binary, Expr, free_vars, substitute, walk
from ..ir.tir import (
    SERIAL,
    Block,
    For,
    Iter,
    PrimFunc,
    Stmt,
    map_statements,
    read_buffers,
    statements,
)


def join_results(func: PrimFunc) -> PrimFunc:
    """Joins axes of row-major results that lie side by side, in functions that reduce."""
    blocks = [s for s in statements(func) if isinstance(s, Block)]
    if all(b.init is None for b in blocks):
        return func
    for block in blocks:
        result = block.body.buffer
        plain = result in func.params and result.layout is None and block.init is None
        others = [b for b in blocks if b is not block]
        alone = not any(b.body.buffer is result or result in read_buffers(b) for b in others)
        if plain and alone and result not in read_buffers(block) and block.where is TRUE:
            func = _joined(func, block)
    return func


def _joined(func: PrimFunc, block: Block) -> PrimFunc:
    """The function with as many axes joined of what a block makes as can be."""
    nested = {
        (s.var, s.body.var)
        for s in statements(func)
        if isinstance(s, For) and isinstance(s.body, For)
    }
    result = block.body.buffer
    own: dict[Expr, Iter] = {i.var: i for i in block.iters}
    for k in range(len(result.shape) - 1):
        u, v = (own.get(i) for i in block.body.indices[k : k + 2])
        if u is None or v is None or (u.value, v.value) not in nested:
            continue
        made = _over_both(block, k, u, v)
        if made is not None:
            return _joined(_replaced(func, block, made, u, v), made)
    return func


def _over_both(block: Block, k: int, u: Iter, v: Iter) -> Block | None:
    """The block over the points of two axes of its result, counted by the first one's iterator;
    None where it reads anything at a part of these numbers."""
    result = block.body.buffer
    if result.shape[k : k + 2] != (u.extent, v.extent):
        return None
    both = u.with_(extent=u.extent * v.extent)
    iters = tuple(both if i is u else i for i in block.iters if i is not v)
    arith = Arith({i.var: (ZERO, i.extent - 1) for i in iters})
    parts: dict[Expr, Expr] = {u.var: u.var // v.extent, v.var: u.var % v.extent}
    value = arith.simplify(substitute(block.body.value, parts))
    if _divides(value, u.var) or u.var not in free_vars(value):
        return None
    shape = (*result.shape[:k], both.extent, *result.shape[k + 2 :])
    indices = (*block.body.indices[: k + 1], *block.body.indices[k + 2 :])
    body = block.body.with_(buffer=result.with_(shape=shape), indices=indices, value=value)
    return block.with_(iters=iters, body=body)


def _divides(e: Expr, var: Expr) -> bool:
    return any(
        type(x) is Binary and x.op in ("floordiv", "mod") and var in free_vars(x.a) for x in walk(e)
    )


def _replaced(func: PrimFunc, block: Block, made: Block, u: Iter, v: Iter) -> PrimFunc:
    def one(s: Stmt) -> Stmt | None:
        if s is block:
            return made
        if isinstance(s, For) and s.var is u.value:
            assert isinstance(s.body, For)
            return For(s.var, s.extent * s.body.extent, SERIAL, s.body.body)
        return None

    old, new = block.body.buffer, made.body.buffer
    return func.with_(
        params=tuple(new if b is old else b for b in func.params),
        phases=tuple(map_statements(p, one) for p in func.phases),
    )
