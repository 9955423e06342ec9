"""A few rows times the rows of another matrix: dot products, each along both operands.

    C[m, n] = sum over k of X[m, k] * W[n, k]   ->   for n_o: for k_o: sums[m, n_i, k_i] += ..

Several rows of W are read side by side, from end to end, so that their memory streams overlap.
Turning W into panels would take longer than all the products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from minicompiler.ir import polynomials
from minicompiler.ir.expr import Load, Var, const_int
from minicompiler.ir.polynomials import Poly
from minicompiler.ir.tir import UNROLL, VECTOR, Iter, Scope

from . import analysis, elementwise, streaming, tails

if TYPE_CHECKING:
    from .contraction import Nest
    from .schedule import Schedule

FEW = 8  # rows of X that a matrix is not turned for
_SUMS = 8  # vectors of partial results: they hide the latency of a fused multiply-add
_STREAMS = 4  # rows of W


def applies(s: Schedule, nest: Nest) -> bool:
    """True when both operands are contiguous along the reduction, and the rows are few."""
    rows = math.prod(const_int(r.extent) or 64 for r in nest.rows)
    if rows > FEW or nest.wide.buffer.constant:
        return False
    return along(s, nest.reduce, (nest.broad, nest.wide))


def along(s: Schedule, reduce: Sequence[Iter], sides: Sequence[Load]) -> bool:
    """Whether operands step through the axes of a reduction as through one line of memory."""
    arith = analysis.arith_of(s.func)
    for load in sides:
        offset = arith.poly(load.buffer.offset(load.indices))
        step: Poly = {(): 1}
        for it in reversed(reduce):
            if analysis.slope(offset, it.var) != step:
                return False
            step = polynomials.mul(step, arith.poly(it.extent))
    return bool(reduce)


def apply(s: Schedule, nest: Nest) -> None:
    """Schedules the product, and what stands beside it by itself."""
    name, own = nest.block.name, nest.block.body.buffer
    lanes = s.target.lanes(own.dtype.bytes)
    others = [b.name for b in analysis.blocks(s.func) if b.name != name]
    rows = math.prod(const_int(r.extent) or 1 for r in nest.rows)
    streams = min(_STREAMS, _SUMS // rows, const_int(nest.vector.extent) or _STREAMS)
    reduce = [_loop(i) for i in nest.reduce]
    line = s.fuse(*reduce) if len(reduce) > 1 else reduce[0]
    depth = const_int(s.loop(line)[0].extent)
    width = lanes * max(1, _SUMS // (rows * streams))
    if depth is not None and depth < 4 * width:
        width = lanes
    outer = [_loop(i) for i in nest.outer]
    column, column_i = s.split(_loop(nest.vector), streams, "mask")
    k, k_i = s.split(line, width, "mask")
    tile = [*[_loop(i) for i in nest.rows], column_i]
    s.reorder(*outer, column, k, *tile, k_i)
    partial, sums = s.rfactor(name, k_i)
    init = s.decompose_reduction(partial, k)
    combined = s.loops_of(name)[-1]
    s.decompose_reduction(name, combined)
    s.stage(sums, column, Scope.REGISTER)
    result = s.stage(own.name, column, Scope.REGISTER)
    for n in tile:
        s.mark(n, UNROLL)
    s.mark(k_i, VECTOR)
    s.mark(combined, VECTOR)
    for n in s.loops_of(name)[len(outer) + 1 : -1]:
        s.mark(n, UNROLL)
    for b in (init, f"{result}_out"):
        elementwise.vector_tile(s, b, column)
    elementwise.threads_over(s, [*outer, column], partial)
    for b in others:
        elementwise.one_block(s, b)
    streaming.apply(s)
    tails.apart(s)


def _loop(it: Iter) -> str:
    assert isinstance(it.value, Var)
    return it.value.name
