"""The rule for reductions: softmax, normalisations, sums, pooling windows.

    m[i] = max over k of x[i, k];  e[i, k] = exp(x[i, k] - m[i]);  s[i] = sum over k of e[i, k];
    ...

becomes one pass per row with everything of the row in registers or first-level cache: all blocks
are computed at the row loop of the last one. A reduction along contiguous memory keeps a vector of
partial results (rfactor); one across it keeps a vector of results.
"""

from __future__ import annotations

from minicompiler.ir.expr import Var, const_int
from minicompiler.ir.tir import PARALLEL, UNROLL, VECTOR, Block, Scope

from . import analysis, elementwise
from .schedule import Schedule

ACCUMULATORS = 4  # vectors of partial results, enough to hide the latency of an addition


def applies(s: Schedule) -> bool:
    """At least one reduction, and all blocks end in one last block that has spatial loops."""
    every = list(analysis.blocks(s.func))
    return any(analysis.is_reduction(b) for b in every)


def apply(s: Schedule) -> None:
    names = [b.name for b in analysis.blocks(s.func)]
    last = names[-1]
    results = [b for b in analysis.blocks(s.func) if b.body.buffer in s.func.params]
    row = _row_loops(s, last) if len(results) == 1 and len(names) > 1 else None
    if row is None:
        elementwise.apply(s)
        return
    top = s.fuse(*row) if len(row) > 1 else row[0]
    for n in reversed(names[:-1]):
        s.compute_at(n, top)
    for n in names:
        _one_row(s, n, top)
    _hold(s, names[:-1], top)
    work = 1
    for x in analysis.loops(s.func.phases[0]):
        work *= const_int(x.extent) or 64
    if work >= elementwise.WORTH_A_THREAD:
        s.mark(top, PARALLEL)


def _row_loops(s: Schedule, last: str) -> list[str] | None:
    """The outer loops of the last block over which every reduction gives one value per
    iteration."""
    block, path = s.block(last)
    if analysis.is_reduction(block) or block.body.buffer.layout is not None:
        return None
    around = analysis.loops_in(path)
    reductions = [b for b in analysis.blocks(s.func) if analysis.is_reduction(b)]
    # An output axis is a row axis when each reduction has it as a spatial axis of the same extent.
    rank = len(block.body.indices)
    rows: list[str] = []
    for axis in range(rank):
        it = next((i for i in block.iters if i.var is block.body.indices[axis]), None)
        if it is None:
            continue
        good = True
        for r in reductions:
            if (
                len(r.body.buffer.shape) != rank
                or r.body.buffer.shape[axis] is not block.body.buffer.shape[axis]
            ):
                good = False
        if not good or not isinstance(it.value, Var):
            break
        rows.append(it.value.name)
    names = [x.var.name for x in around]
    if not rows or rows != names[: len(rows)]:
        return None
    # Someone must still have work inside the row, and no block may need other rows.
    for b in analysis.blocks(s.func):
        for load in analysis.operand_loads(b):
            if load.buffer in s.func.buffers and any(
                const_int(i) is None and i not in {x.var for x in b.iters} for i in load.indices
            ):
                return None
    return rows


def _one_row(s: Schedule, name: str, top: str) -> None:
    """Schedules the part of a block inside the row loop."""
    names = s.loops_of(name)
    inner = names[names.index(top) + 1 :]
    if not inner:
        return
    block, _ = s.block(name)
    if analysis.is_reduction(block):
        schedule_reduction(s, name, top)
        return
    lanes = s.target.vector_bytes // 4
    loop = inner[-1]
    extent = const_int(s.loop(loop)[0].extent)
    if extent is not None and extent <= lanes:
        s.mark(loop, VECTOR)
        return
    _, v = s.split(loop, lanes, "mask")
    s.mark(v, VECTOR)


def schedule_reduction(s: Schedule, name: str, top: str | None = None) -> bool:
    """Vectors for one reduction block. False when neither form fits (the caller decomposes it)."""
    block, path = s.block(name)
    if block.init is None:
        return False
    around = analysis.loops_in(path)
    start = [x.var.name for x in around].index(top) + 1 if top is not None else 0
    inside = around[start:]
    reducing = analysis.reduce_loops(block, inside)
    if not reducing:
        return False
    lanes = s.target.vector_bytes // max(4, block.body.buffer.dtype.bytes)
    arith = analysis.arith_of(s.func)
    spatial = [x for x in inside if x not in reducing]
    across = _contiguous(block, spatial, arith)
    if across is not None and (const_int(across) or 64) >= 4:
        return _across(s, name, top, lanes)
    along = _contiguous_loop(block, reducing, arith)
    if along is None:
        along = reducing[-1].var.name
    extent = const_int(s.loop(along)[0].extent)
    if extent is not None and extent < 2 * lanes:
        return _plain(s, name, top)
    return _along(s, name, along, top, lanes, extent)


def _contiguous(block: Block, loops, arith):  # type: ignore[no-untyped-def]
    """The extent of the innermost-in-memory spatial axis along which the operands are
    contiguous."""
    for it in block.iters:
        if it.reduce or not isinstance(it.value, Var) or it.value not in {x.var for x in loops}:
            continue
        own = elementwise.strides(block.body.buffer, block.body.indices, it.var, arith)
        steps = [
            elementwise.strides(x.buffer, x.indices, it.var, arith)
            for x in analysis.operand_loads(block)
        ]
        layout = block.body.buffer.layout
        blocked = layout is not None and layout.splits()[-1][0] == _axis(block, it)
        if (own == 1 or blocked) and any(x == 1 or (x is None and blocked) for x in steps):
            return it.extent
    return None


def _axis(block: Block, it) -> int:  # type: ignore[no-untyped-def]
    return next(k for k, i in enumerate(block.body.indices) if i is it.var)


def _contiguous_loop(block: Block, reducing, arith) -> str | None:  # type: ignore[no-untyped-def]
    for it in block.iters:
        if it.reduce and isinstance(it.value, Var) and it.value in {x.var for x in reducing}:
            for x in analysis.operand_loads(block):
                if elementwise.strides(x.buffer, x.indices, it.var, arith) == 1:
                    return it.value.name
    return None


def _across(s: Schedule, name: str, top: str | None, lanes: int) -> bool:
    """for n, c_o, h, w: vector c_i: registers += over the window"""
    order = elementwise.memory_order(s, name, top)
    inner = order[-1]
    extent = const_int(s.loop(inner)[0].extent)
    outer = order[:-1]
    if extent is None or extent > 4 * lanes:
        big, inner = s.split(
            inner, 2 * lanes if extent is None or extent >= 2 * lanes else lanes, "mask"
        )
        outer = [*outer, big]
    block, path = s.block(name)
    reduce = [x.var.name for x in analysis.reduce_loops(block, analysis.loops_in(path))]
    if outer or reduce:
        wanted = [*outer, *reduce, inner]
        if len(wanted) > 1:
            s.reorder(*wanted)
    init = s.decompose_reduction(name, reduce[0])
    block, _ = s.block(name)
    home = outer[-1] if outer else top
    if home is not None:
        staged = s.stage(block.body.buffer.name, home, Scope.REGISTER)
        s.mark(inner, VECTOR)
        for b in (init, f"{staged}_in", f"{staged}_out"):
            if any(x.name == b for x in analysis.blocks(s.func)):
                elementwise.vector_tile(s, b, home)
    else:
        s.mark(inner, VECTOR)
        n = s.loops_of(init)[-1]
        s.mark(n, VECTOR)
    if top is None and outer:
        elementwise.threads_over(s, outer, name)
    return True


def _plain(s: Schedule, name: str, top: str | None) -> bool:
    block, path = s.block(name)
    around = analysis.loops_in(path)
    start = [x.var.name for x in around].index(top) + 1 if top is not None else 0
    reducing = analysis.reduce_loops(block, around[start:])
    outer = [x.var.name for x in around[start:] if x not in reducing]
    s.decompose_reduction(name, reducing[0].var.name)
    home = outer[-1] if outer else top
    if home is not None:
        block, _ = s.block(name)
        if block.body.buffer in s.func.params or block.body.buffer in s.func.buffers:
            s.stage(block.body.buffer.name, home, Scope.REGISTER)
    if top is None and outer:
        elementwise.threads_over(s, outer, name)
    return True


def _along(
    s: Schedule, name: str, along: str, top: str | None, lanes: int, extent: int | None
) -> bool:
    """sum over k   ->   vector of partial sums over k_o, then their sum"""
    block, path = s.block(name)
    around = analysis.loops_in(path)
    start = [x.var.name for x in around].index(top) + 1 if top is not None else 0
    inside = around[start:]
    reducing = [x.var.name for x in analysis.reduce_loops(block, inside)]
    outer = [x.var.name for x in inside if x.var.name not in reducing]
    if reducing[-1] != along:
        order = [n for n in reducing if n != along] + [along]
        s.reorder(*order)
    width = lanes * ACCUMULATORS if extent is None or extent >= 4 * lanes * ACCUMULATORS else lanes
    _, k_i = s.split(along, width, "mask")
    partial, buffer = s.rfactor(name, k_i)
    home = outer[-1] if outer else top
    reduce = [
        x.var.name
        for x in analysis.reduce_loops(s.block(partial)[0], analysis.loops_in(s.block(partial)[1]))
    ]
    loops = s.loops_of(partial)
    first = loops.index(reduce[0])
    if loops[first:] != [*reduce, k_i]:
        s.reorder(*reduce, k_i)
    init = s.decompose_reduction(partial, reduce[0])
    final_loops = s.loops_of(name)
    s.decompose_reduction(name, final_loops[-1])
    s.mark(k_i, VECTOR)
    s.mark(s.loops_of(init)[-1], VECTOR)
    s.mark(final_loops[-1], UNROLL)
    if home is not None:
        s.stage(buffer, home, Scope.REGISTER)
        target = s.block(name)[0].body.buffer
        if target in s.func.params or target in s.func.buffers:
            s.stage(target.name, home, Scope.REGISTER)
    if top is None and outer:
        elementwise.threads_over(s, outer, partial)
    return True


def _hold(s: Schedule, names: list[str], top: str) -> None:
    """Keeps what passes from block to block inside the row: scalars in registers, rows in cache."""
    seen = set()
    for n in names:
        if not any(b.name == n for b in analysis.blocks(s.func)):
            continue
        buffer = s.block(n)[0].body.buffer
        if buffer in seen or buffer not in s.func.buffers:
            continue
        seen.add(buffer)
        loop, _ = s.loop(top)
        box = analysis.region(loop.body, buffer, analysis.arith_of(s.func))
        single = all(const_int(x) == 1 for _, x in box)
        s.stage(buffer.name, top, Scope.REGISTER if single else Scope.LOCAL)
