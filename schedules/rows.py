"""The rule for reductions: softmax, normalisations, sums, pooling windows.

    m[i] = max over k of x[i, k];  e[i, k] = exp(x[i, k] - m[i]);  s[i] = sum over k of e[i, k];
    ...

becomes one pass per row with everything of the row in registers or first-level cache: all blocks
are computed at the row loop of the last one. A reduction along contiguous memory keeps a vector of
partial results (rfactor); one across it keeps a vector of results.
"""

from __future__ import annotations

import math

from minicompiler.ir.expr import (
    TRUE,
    Binary,
    Call,
    Const,
    Expr,
    Load,
    Var,
    const_int,
    free_vars,
    walk,
)
from minicompiler.ir.tir import PARALLEL, UNROLL, VECTOR, Block, Buffer, Iter, Scope

from . import ahead, analysis, elementwise, overlapping, streaming
from .loops import kept_apart
from .schedule import Schedule

DEEP = 32  # rows that are added up: from here on it pays to keep partial sums in memory
ROWS = 4  # of them are added to the sums at a time
PART = 16384  # elements of a long reduction that are added up by themselves
SIDE_BY_SIDE = 4  # rows: the lanes of one are combined while the next one is read
CHEAP = 4  # operations on one element
ACCUMULATORS = 4  # vectors of partial results, enough to hide the latency of an addition


def applies(s: Schedule) -> bool:
    """At least one reduction, and all blocks end in one last block that has spatial loops."""
    every = list(analysis.blocks(s.func))
    return any(analysis.is_reduction(b) for b in every)


def apply(s: Schedule) -> None:
    names = [b.name for b in analysis.blocks(s.func)]
    last = names[-1]
    results = [b for b in analysis.blocks(s.func) if b.body.buffer in s.func.params]
    row = None
    if len(results) == 1 and len(names) > 1 and not analysis.is_reduction(s.block(last)[0]):
        for n in names[:-1]:
            if is_cheap(s.block(n)[0]):
                s.inline(n)
        row = None if _side_by_side(s) else _row_loops(s, last) or _group_loops(s, last)
    if row is None or _are_columns(s, last, row):
        elementwise.apply(s)
        return
    names = [b.name for b in analysis.blocks(s.func)]
    together = _rows_together(s, last, row)
    if together > 1:
        row = [*row[:-1], s.split(row[-1], together, "guard")[0]]
    top = s.fuse(*row) if len(row) > 1 else row[0]
    for n in reversed(names[:-1]):
        s.compute_at(n, top)
    for n in names:
        _one_row(s, n, top, together > 1)
    _hold(s, names[:-1], top)
    if together > 1:
        _hold_several(s, names, top)
    else:
        _sum_at_once(s, top)
    work = 1
    for x in analysis.loops(s.func.phases[0]):
        work *= const_int(x.extent) or 64
    shared, top = overlapping.write_late(s, last, top)
    if work >= elementwise.WORTH_A_THREAD:
        s.mark(shared, PARALLEL)
    ahead.fetch_rows(s, top, s.target.caches[1] // 4)
    streaming.apply(s)


def _sum_at_once(s: Schedule, top: str) -> None:
    """What one pass over a row makes is added up in that pass and not in one of its own."""
    for block in list(analysis.blocks(s.loop(top)[0])):
        for load in analysis.operand_loads(block):
            makers = analysis.writers(s.func, load.buffer)
            if not analysis.is_reduction(block) or len(makers) != 1 or block.init is not None:
                continue
            own, other = [s.loops_of(b.name, top) for b in (block, makers[0])]
            while own and other and not kept_apart(s, own[0], other[0]):
                s.compute_with(own[0], other[0])
                own, other = own[1:], other[1:]


def _side_by_side(s: Schedule) -> bool:
    """True where rows lie in vectors: what is reduced has blocks of an axis that is not."""
    for block in analysis.blocks(s.func):
        summed = {i.var for i in block.iters if i.reduce}
        for load in analysis.operand_loads(block):
            if summed and load.buffer.layout is not None:
                axis, _, modulus = load.buffer.layout.splits()[-1]
                if modulus > 0 and not free_vars(load.indices[axis]) & summed:
                    return True
    return False


def _are_columns(s: Schedule, last: str, row: list[str]) -> bool:
    """True where each result is one number, and what is reduced to it lies in a column: its
    neighbours are reduced to the next ones."""
    inside = [x for x in analysis.loops_in(s.block(last)[1]) if x.var.name not in row]
    if any(const_int(x.extent) != 1 for x in inside):
        return False
    arith = analysis.arith_of(s.func)
    for block in filter(analysis.is_reduction, list(analysis.blocks(s.func))):
        around = analysis.loops_in(s.block(block.name)[1])
        reducing = analysis.reduce_loops(block, around)
        if _goes_across(block, [x for x in around if x not in reducing], arith):
            return True
    return False


def is_cheap(block: Block) -> bool:
    """True for an element that is computed again in less time than stored and loaded."""
    if analysis.is_reduction(block):
        return False
    parts = [e for e in walk(block.body.value) if not isinstance(e, Load | Const | Var)]
    return len(parts) <= CHEAP and not any(isinstance(e, Call) for e in parts)


def _row_loops(s: Schedule, last: str) -> list[str] | None:
    """The outer loops of the last block over which every reduction gives one value per
    iteration."""
    block, path = s.block(last)
    if analysis.is_reduction(block) or block.body.buffer.layout is not None:
        return None
    around = analysis.loops_in(path)
    reductions = [b for b in analysis.blocks(s.func) if analysis.is_reduction(b)]
    # An output axis is a row axis when each reduction has it as a spatial axis of the same extent,
    # and each block reads from the others what lies at its own place along it: after a transpose
    # of a square, another axis has the same extent.
    rank = len(block.body.indices)
    passed = [
        (b.body.indices, load.indices)
        for b in analysis.blocks(s.func)
        for load in analysis.operand_loads(b)
        if load.buffer in s.func.buffers
    ]
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
        if any(len(at) == rank == len(of) and at[axis] is not of[axis] for at, of in passed):
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


def _group_loops(s: Schedule, last: str) -> list[str] | None:
    """As `_row_loops`, where reductions have fewer axes, or some neighbours along one share them:
    r[i, c, k] = f(x[i, c, k], m[i, c // 8]). The loop over that axis is split."""
    block, path = s.block(last)
    if block.body.buffer.layout is not None:
        return None
    made = {b.body.buffer for b in analysis.blocks(s.func) if analysis.is_reduction(b)}
    others = {b.body.buffer for b in analysis.blocks(s.func)} - made - {block.body.buffer}
    shared = {x.indices for x in analysis.operand_loads(block) if x.buffer in made}
    if others or len(shared) != 1 or len({b.shape for b in made}) != 1:
        return None
    loop_of: dict[Expr, Var] = {i.var: i.value for i in block.iters if isinstance(i.value, Var)}
    around = [x.var.name for x in analysis.loops_in(path)]
    at = shared.pop()
    if not at:
        return None
    *whole, grouped = at
    divided = 1
    if type(grouped) is Binary and grouped.op == "floordiv":
        divided = const_int(grouped.b) or 0
        grouped = grouped.a
    if not divided or any(i not in loop_of for i in (*whole, grouped)):
        return None
    names = [str(loop_of[i]) for i in (*whole, grouped)]
    if names != around[: len(names)]:
        return None
    if divided == 1:
        return names
    extent = const_int(s.loop(names[-1])[0].extent)
    if extent is None or extent % divided:
        return None
    return [*names[:-1], s.split(names[-1], divided, "perfect")[0]]


def _rows_together(s: Schedule, last: str, row: list[str]) -> int:
    """How many rows an iteration works on: several short ones, where there are many."""
    loops = analysis.loops_in(s.block(last)[1])
    inside = [const_int(x.extent) for x in loops if x.var.name not in row]
    rows = [const_int(x.extent) for x in loops if x.var.name in row]
    if None in inside or rows[-1] == 1:
        return 1
    elements = math.prod(n or 1 for n in inside)
    fit = s.target.caches[0] // 8 // (elements * s.block(last)[0].body.buffer.dtype.bytes)
    few = None not in rows and math.prod(n or 1 for n in rows) < 16 * SIDE_BY_SIDE * s.target.cores
    long = elements > elementwise.LONG_VECTORS * s.target.vector_bytes // 4
    return min(SIDE_BY_SIDE, fit) if long and not few else 1


def _one_row(s: Schedule, name: str, top: str, several: bool) -> None:
    """Schedules the part of a block inside the row loop, or inside a loop over several rows: each
    begins with a vector of its own, as the buffers do that hold them."""
    inner = s.loops_of(name, top)
    if not inner:
        return
    block, _ = s.block(name)
    if analysis.is_reduction(block):
        schedule_reduction(s, name, top)
        return
    vector = s.target.vector_bytes // 4
    loop = _joined(s, name, inner[several:] or inner)[-1]
    extent = const_int(s.loop(loop)[0].extent)
    lanes = vector * elementwise.LONG_VECTORS
    if extent is not None and extent <= vector:
        s.mark(loop, VECTOR)
        return
    # Whoever fills a row fills at least as much of it as anyone reads.
    short = extent is not None and extent <= lanes
    held = any(x.buffer.scope is Scope.REGISTER for x in analysis.operand_loads(block))
    o, v = s.split(loop, vector if short else lanes, "mask")
    if short and held:  # registers have no addresses
        s.mark(o, UNROLL)
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
    lanes = s.target.lanes(block.body.buffer.dtype.bytes)
    arith = analysis.arith_of(s.func)
    spatial = [x for x in inside if x not in reducing]
    if _goes_across(block, spatial, arith):
        deep = const_int(reducing[-1].extent)
        if top is None and (deep is None or deep >= DEEP) and _columns(s, name):
            return True
        return _across(s, name, top, lanes)
    names = _joined(s, name, [x.var.name for x in reducing])
    along = next((n for n in names if 1 in elementwise.steps(s, name, s.loop(n)[0].var)), names[-1])
    extent = const_int(s.loop(along)[0].extent)
    if extent is not None and extent < 2 * lanes:
        return _plain(s, name, top)
    return _along(s, name, along, top, lanes, extent)


def _goes_across(block: Block, spatial, arith) -> bool:  # type: ignore[no-untyped-def]
    """True for a reduction of vectors side by side."""
    across = _contiguous(block, spatial, arith)
    return across is not None and (const_int(across) or 64) >= 4


def _contiguous(block: Block, loops, arith):  # type: ignore[no-untyped-def]
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


def _axis(block: Block, it) -> int:  # type: ignore[no-untyped-def]
    return next(k for k, i in enumerate(block.body.indices) if i is it.var)


def _joined(s: Schedule, name: str, loops: list[str]) -> list[str]:
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
    together = max([_blocks_of(block, i) for i in block.iters if not i.reduce], default=1)
    if extent is None or extent > 4 * lanes or (extent > together > 1):
        size = 2 * lanes if extent is None or extent >= 2 * lanes else lanes
        big, inner = s.split(inner, together if together > 1 else size, "mask")
        outer = [*outer, big]
    elif not outer and top is not None and block.body.buffer.scope is Scope.GLOBAL:
        # Once around, for the registers: whoever holds the buffer at `top` still finds it.
        big, inner = s.split(inner, extent, "perfect")
        outer = [big]
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


def _columns(s: Schedule, name: str) -> bool:
    """for columns_o: for k: partial sums of a stretch of columns += row k of it

    Rows are read in long stretches, and the sums stay in first-level cache."""
    block, path = s.block(name)
    if block.body.buffer.layout is not None:
        return False
    order = elementwise.memory_order(s, name)
    lanes = 4 * s.target.lanes(block.body.buffer.dtype.bytes)
    extent = const_int(s.loop(order[-1])[0].extent)
    if extent is not None and extent < 2 * lanes:
        return False
    stretch = s.target.caches[0] // 8 // block.body.buffer.dtype.bytes
    if extent is not None:
        stretch = _even(extent, stretch, lanes)
    big, inner = s.split(order[-1], stretch, "mask")
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
    elementwise.threads_over(s, outer, name)
    return True


def _even(extent: int, most: int, lanes: int) -> int:
    """The length of pieces of a line, about equal ones or, better, equal ones of whole vectors."""
    pieces = -(-extent // most)
    for n in range(pieces, 4 * pieces):
        if extent % (n * lanes) == 0:
            return extent // n
    return min(extent, -(-extent // (pieces * lanes)) * lanes)


def in_parts(s: Schedule, name: str) -> bool:
    """sum over k   ->   for k_o: parts[k_o] = sum over k_i;   sum over k_o of parts[k_o]

    For long reductions to a single element, so that threads can share them. The parts depend on the
    size of the input alone, so the sum does not depend on the threads."""
    block, path = s.block(name)
    around = analysis.loops_in(path)
    reducing = analysis.reduce_loops(block, around)
    if block.init is None or not reducing or len(reducing) != len(around):
        return False
    sizes = [const_int(x.extent) or DEEP for x in reducing]
    if math.prod(sizes) < 4 * PART:
        return False
    rows = max(1, PART // math.prod(sizes[1:]))
    outer, _ = s.split(reducing[0].var.name, rows, "mask")
    parts, _ = s.rfactor(name, outer)
    s.separate(name)
    for b in (parts, name):
        elementwise.reduction_block(s, b)
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
        s.stage(buffer.name, top, Scope.REGISTER if _single(s, buffer, top) else Scope.LOCAL)


def _hold_several(s: Schedule, names: list[str], top: str) -> None:
    """The same for what is one number per row, where an iteration has several rows: in cache, and
    in a register while its row is worked on."""
    for buffer in s.func.buffers:
        s.stage(buffer.name, top, Scope.LOCAL)
    for n in names:
        loops = s.loops_of(n)
        row = loops[loops.index(top) + 1]
        for buffer in dict.fromkeys(x.buffer for x in analysis.operand_loads(s.block(n)[0])):
            if buffer.scope is Scope.LOCAL and _single(s, buffer, row):
                s.stage(buffer.name, row, Scope.REGISTER)


def _single(s: Schedule, buffer: Buffer, loop: str) -> bool:
    """True where an iteration of a loop touches one element of a buffer."""
    box = analysis.region(s.loop(loop)[0].body, buffer, analysis.arith_of(s.func))
    return all(const_int(x) == 1 for _, x in box)
