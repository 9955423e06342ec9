"""One reduction: sums in vectors, side by side where neighbours are reduced to neighbours, else one
vector of partial sums for each result.

    r[j] = sum over k of x[k, j]   ->   for k: vector j: sums[j] += x[k, j]
    r[j] = sum over k of x[j, k]   ->   for k_o: vector k_i: sums[k_i] += x[j, k_o*8 + k_i]
"""

from __future__ import annotations

from minicompiler.ir.arith import Arith
from minicompiler.ir.expr import TRUE, Expr, Var, const_int, free_vars
from minicompiler.ir.tir import UNROLL, VECTOR, Block, For, Iter, Scope

from . import analysis, elementwise
from .schedule import Schedule

DEEP = 32  # rows that are added up: from here on it pays to keep partial sums in memory
ROWS = 4  # of them are added to the sums at a time
ACCUMULATORS = 4  # vectors of partial results, enough to hide the latency of an addition


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
    lanes = s.target.lanes(block.body.buffer.dtype.bytes)
    arith = analysis.arith_of(s.func)
    spatial = [x for x in inside if x not in reducing]
    if goes_across(block, spatial, arith):
        deep = const_int(reducing[-1].extent)
        rows = block.body.buffer.layout is None and _together(block) == 1
        if top is None and rows and (deep is None or deep >= DEEP):
            order = elementwise.memory_order(s, name)
            if columns(s, name, order):
                return True
        return _across(s, name, top, lanes)
    names = joined(s, name, [x.var.name for x in reducing])
    along = next((n for n in names if 1 in elementwise.steps(s, name, s.loop(n)[0].var)), names[-1])
    extent = const_int(s.loop(along)[0].extent)
    if extent is not None and extent < 2 * lanes:
        return plain(s, name, top)
    return _along(s, name, along, top, lanes, extent)


def goes_across(block: Block, spatial: list[For], arith: Arith) -> bool:
    """True for a reduction of vectors side by side."""
    across = _contiguous(block, spatial, arith)
    return across is not None and (const_int(across) or 64) >= 4


def _contiguous(block: Block, loops: list[For], arith: Arith) -> Expr | None:
    """The extent of the innermost-in-memory spatial axis along which the operands that are reduced
    are contiguous."""
    reduced = {i.var for i in block.iters if i.reduce}
    for it in block.iters:
        if it.reduce or not isinstance(it.value, Var) or it.value not in {x.var for x in loops}:
            continue
        own = analysis.strides(block.body.buffer, block.body.indices, it.var, arith)
        steps = [
            analysis.strides(x.buffer, x.indices, it.var, arith)
            for x in analysis.operand_loads(block)
            if any(reduced & free_vars(i) for i in x.indices)
        ]
        layout = block.body.buffer.layout
        blocked = layout is not None and layout.splits()[-1][0] == _axis(block, it)
        in_blocks = blocked or _blocks_of(block, it) > 1
        if (own == 1 or blocked) and any(x == 1 or (x is None and in_blocks) for x in steps):
            return it.extent
    return None


def _blocks_of(block: Block, it: Iter) -> int:
    """How many neighbours along an iterator lie together in an operand of a blocked layout."""
    for x in analysis.operand_loads(block):
        if x.buffer.layout is not None:
            axis, _, size = x.buffer.layout.splits()[-1]
            if size and x.indices[axis] is it.var:
                return size
    return 1


def _together(block: Block) -> int:
    """How many neighbouring results lie together in a blocked operand."""
    return max([_blocks_of(block, i) for i in block.iters if not i.reduce], default=1)


def _axis(block: Block, it: Iter) -> int:
    return next(k for k, i in enumerate(block.body.indices) if i is it.var)


def joined(s: Schedule, name: str, loops: list[str]) -> list[str]:
    """Fuses the two innermost loops of a block while all operands step through them as through
    one."""
    while len(loops) > 1:
        (outer, _), (inner, _) = s.loop(loops[-2]), s.loop(loops[-1])
        if outer.body is not inner:
            break
        if not elementwise.as_one(s, name, outer.var.name, inner.var.name):
            break
        loops = [*loops[:-2], s.fuse(outer.var.name, inner.var.name)]
    return loops


def _across(s: Schedule, name: str, top: str | None, lanes: int) -> bool:
    """for n, c_o, h, w: vector c_i: registers += over the window"""
    order = elementwise.memory_order(s, name, top)
    block, _ = s.block(name)
    inner = order[-1]
    extent = const_int(s.loop(inner)[0].extent)
    outer = order[:-1]
    together = _together(block)
    tile = [inner]
    if extent is None or extent > 4 * lanes or (extent > together > 1):
        size = 2 * lanes if extent is None or extent >= 2 * lanes else lanes
        size = together if together > 1 else size
        big, inner = s.split(inner, size, "mask")
        outer = [*outer, big]
        # Vectors have a power of two of lanes.
        tile = [*s.split(inner, lanes)] if size & (size - 1) and size % lanes == 0 else [inner]
    elif not outer and top is not None and block.body.buffer.scope is Scope.GLOBAL:
        # Once around, for the registers: whoever holds the buffer at `top` still finds it.
        big, inner = s.split(inner, extent, "perfect")
        outer, tile = [big], [inner]
    block, path = s.block(name)
    reduce = [x.var.name for x in analysis.reduce_loops(block, analysis.loops_in(path))]
    if outer or reduce:
        wanted = [*outer, *reduce, *tile]
        if len(wanted) > 1:
            s.reorder(*wanted)
    init = s.decompose_reduction(name, reduce[0])
    block, _ = s.block(name)
    home = outer[-1] if outer else top
    if home is not None:
        staged = s.stage(block.body.buffer.name, home, Scope.REGISTER)
        elementwise.around_tile(s, init, staged, home)
    for n in tile[:-1]:
        s.mark(n, UNROLL)
    s.mark(tile[-1], VECTOR)
    if home is None:
        n = s.loops_of(init)[-1]
        s.mark(n, VECTOR)
    if top is None and outer:
        elementwise.threads_over(s, outer, name)
    return True


def columns(s: Schedule, name: str, order: list[str], top: str | None = None) -> bool:
    """for columns_o: for k: partial sums of a stretch of columns += row k of it

    Rows are read in long stretches, and the sums stay in first-level cache. order: the loops that
    choose the element, in that of memory; top: the loop around, if threads share it already."""
    block, path = s.block(name)
    extent = const_int(s.loop(order[-1])[0].extent)  # lines of unknown length may be short ones
    lanes = (2 if extent is None else 4) * s.target.lanes(block.body.buffer.dtype.bytes)
    if extent is not None and extent < 2 * lanes:
        return False
    stretch = longest(s, block)
    if extent is not None:
        big, inner = s.split(order[-1], even(extent, stretch, lanes), "mask")
    else:
        alone = top is None and len(order) == 1  # threads have nothing else to share
        big, inner = s.split(order[-1], 8 * lanes if alone else stretch, "guard")
    block, path = s.block(name)
    reduce = [x.var.name for x in analysis.reduce_loops(block, analysis.loops_in(path))]
    outer = [*order[:-1], big]
    s.reorder(*outer, *reduce, inner)
    init = s.decompose_reduction(name, reduce[0])
    staged = s.stage(block.body.buffer.name, big, Scope.LOCAL)
    for b in (init, f"{staged}_in", f"{staged}_out"):
        if any(x.name == b for x in analysis.blocks(s.func)):
            _, v = s.split(s.loops_of(b)[-1], lanes, "mask")
            s.mark(v, VECTOR)
    vectors, v = s.split(inner, lanes, "mask")
    k_o, k_i = s.split(reduce[-1], ROWS, "mask")
    s.reorder(k_o, vectors, k_i, v)
    tile = s.stage(staged, vectors, Scope.REGISTER)
    for b in (name, f"{tile}_in", f"{tile}_out"):
        elementwise.vector_tile(s, b, vectors)
    if top is None:
        elementwise.threads_over(s, outer, name)
    return True


def longest(s: Schedule, block: Block) -> int:
    """How many sums side by side leave room in first-level cache for what is added to them."""
    return s.target.caches[0] // 8 // block.body.buffer.dtype.bytes


def even(extent: int, most: int, lanes: int) -> int:
    """The length of pieces of a line, about equal ones or, better, equal ones of whole vectors."""
    pieces = -(-extent // most)
    for n in range(pieces, 4 * pieces):
        if extent % (n * lanes) == 0:
            return extent // n
    return min(extent, -(-extent // (pieces * lanes)) * lanes)


def plain(s: Schedule, name: str, top: str | None) -> bool:
    """One sum at a time, in a register where there are loops around it."""
    block, path = s.block(name)
    around = analysis.loops_in(path)
    start = [x.var.name for x in around].index(top) + 1 if top is not None else 0
    reducing = analysis.reduce_loops(block, around[start:])
    outer = [x.var.name for x in around[start:] if x not in reducing]
    s.decompose_reduction(name, reducing[0].var.name)
    home = outer[-1] if outer else top
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
    width = lanes * ACCUMULATORS
    if extent is not None and extent < 4 * width and extent % width:
        width = lanes
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
    # Where it cannot be shown that all rows lie inside, their lanes are added one by one.
    if s.block(name)[0].where is TRUE:
        s.mark(final_loops[-1], VECTOR)
    s.stage(buffer, home, Scope.REGISTER)
    if home is not None:
        target = s.block(name)[0].body.buffer
        if target in s.func.params or target in s.func.buffers:
            s.stage(target.name, home, Scope.REGISTER)
    if top is None and outer:
        elementwise.threads_over(s, outer, partial)
    return True
