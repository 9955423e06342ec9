"""The rule for contractions: a sum of products of two operands (matrix products, convolutions,
depthwise convolutions, batched products), with elementwise work before and after.

    C[.., m, n] = sum over k of X[.., m, k] * W[.., k, n]

One tile of C, `rows` x `lanes`, stays in registers while k runs. The vector axis is the one that is
contiguous in the result; rows are the axes that only the other operand has, fused while they lie
next to each other in memory. What tiles read often is packed as they read it: while compiling if it
is constant, otherwise beside them (panels.py).
"""

from __future__ import annotations

import dataclasses
import math

from minicompiler.ir.expr import (
    Expr,
    Load,
    Var,
    const_int,
    free_vars,
    group_along,
    substitute,
)
from minicompiler.ir.layout import IndexMap
from minicompiler.ir.tir import PARALLEL, UNROLL, VECTOR, Block, Iter, Scope

from . import analysis, dots, elementwise, followers, hints, lines, panels, shares
from .panels import axis_of, block_of
from .schedule import Schedule

STREAMS = 8  # rows of a matrix that are read side by side: the ways of a first-level cache
_DEPTHS = (STREAMS // 2, STREAMS, 64, 96, 128, 192, 256, 320, 384, 512, 768, 1024)


@dataclasses.dataclass
class Nest:
    """What the rule found out: operand loads and the role of each iterator."""

    block: Block
    vector: Iter
    broad: Load  # the operand whose elements are broadcast (or, depthwise, also vectors)
    wide: Load  # the operand that is a vector along the vector axis
    rows: list[Iter]
    outer: list[Iter]
    reduce: list[Iter]


def applies(s: Schedule) -> bool:
    """Exactly one block is a sum of products, and what follows can be computed tile by tile."""
    products = [b for b in analysis.blocks(s.func) if analysis.product_loads(b)]
    return len(products) == 1 and followers.can_follow(s, products[0])


def _vars(load: Load) -> frozenset[Expr]:
    return frozenset().union(*[free_vars(i) for i in load.indices], frozenset())


def apply(s: Schedule) -> None:
    main = next(b for b in analysis.blocks(s.func) if analysis.product_loads(b))
    _follow_result_layout(s, main)
    for other in [b.name for b in analysis.blocks(s.func) if not analysis.product_loads(b)]:
        if _before(s, other, main.name):
            follow_reader_layout(s, other)
    nest = _analyse(s, main.name)
    if nest is None:
        elementwise.apply(s)
        return
    if dots.applies(s, nest):
        dots.apply(s, nest)
        return
    conflict = panels.rows_conflict(s, nest)
    if s.choose("block_rows", (False, True) if conflict else (False,), conflict):
        panels.block_rows(s, nest, _tile(s, nest)[2])
        made = _analyse(s, main.name)
        assert made is not None
        nest = made
    _schedule(s, nest)


def _before(s: Schedule, first: str, second: str) -> bool:
    names = [b.name for b in analysis.blocks(s.func)]
    return names.index(first) < names.index(second)


def _follow_result_layout(s: Schedule, main: Block) -> None:
    """The sum is kept in the order of the result it becomes, so that both agree on what is
    contiguous."""
    buffer = main.body.buffer
    if buffer.scope is Scope.PARAM or buffer.layout is not None:
        return
    for b in analysis.readers(s.func, buffer):
        target = b.body.buffer
        if (
            target.layout is not None
            and len(target.shape) == len(buffer.shape)
            and target.shape == buffer.shape
        ):
            s.relayout(buffer.name, target.layout)
            return


def follow_reader_layout(s: Schedule, name: str) -> None:
    """A block that prepares an operand (padding) keeps the layout of what it reads."""
    block, _ = s.block(name)
    buffer = block.body.buffer
    if buffer.scope is Scope.PARAM or buffer.layout is not None:
        return
    for load in analysis.block_loads(block):
        if load.buffer.layout is not None and len(load.buffer.shape) == len(buffer.shape):
            s.relayout(buffer.name, load.buffer.layout)
            return


def _analyse(s: Schedule, name: str) -> Nest | None:
    block, _ = s.block(name)
    loads = analysis.product_loads(block)
    assert loads is not None
    spatial = [i for i in block.iters if not i.reduce]
    reduce = [i for i in block.iters if i.reduce]
    if not spatial or any(not isinstance(i.value, Var) for i in block.iters):
        return None
    buffer = block.body.buffer
    layout = buffer.layout or IndexMap.identity(len(buffer.shape))
    in_order: list[Iter] = []  # spatial iterators by their place in memory, outermost first
    for axis, _, _ in layout.splits():
        it = next((i for i in spatial if i.var is block.body.indices[axis]), None)
        if it is not None:
            if it in in_order:
                in_order.remove(it)
            in_order.append(it)
    if not in_order:
        return None
    a, b = loads
    vector = _along_rows(s, in_order, reduce, a, b) or in_order[-1]
    if vector.var in _vars(a) and vector.var not in _vars(b):
        broad, wide = b, a
    elif vector.var in _vars(b) and vector.var not in _vars(a):
        broad, wide = a, b
    elif vector.var in _vars(a):  # in both: one of them is the weights
        broad, wide = (b, a) if a.buffer.constant else (a, b)
    else:
        return None
    only = [
        i for i in spatial if i is not vector and i.var in _vars(broad) and i.var not in _vars(wide)
    ]
    rows: list[Iter] = []
    # Of the axes that only the broadcast operand has, those that lie innermost and side by side.
    outermost_first = [
        i for i in _memory_order_without_blocks(layout, block, spatial) if i is not vector
    ]
    for it in reversed(outermost_first):
        if it not in only or (rows and _apart(layout, block, vector, it, rows)):
            break
        rows.insert(0, it)
    if not rows and only:
        rows = [only[-1]]
    outer = [i for i in spatial if i is not vector and i not in rows]
    return Nest(block, vector, broad, wide, rows, outer, reduce)


def _along_rows(
    s: Schedule, in_order: list[Iter], reduce: list[Iter], a: Load, b: Load
) -> Iter | None:
    """Where the last axis of the result is one of both operands, which are contiguous along the
    reduction: the last axis that only one of them has."""
    last = in_order[-1].var
    if last not in _vars(a) & _vars(b) or not dots.along(s, reduce, (a, b)):
        return None
    return next((i for i in reversed(in_order) if (i.var in _vars(a)) != (i.var in _vars(b))), None)


def _apart(layout: IndexMap, block: Block, vector: Iter, it: Iter, rows: list[Iter]) -> bool:
    """Whether the blocks of the vector axis lie between `it` and rows whose number is not known
    while compiling: rows of both would have to be divided by that number, one by one."""
    if all(const_int(r.extent) is not None for r in rows):
        return False
    order = [block.body.indices[axis] for axis, _, modulus in layout.splits() if modulus == 0]
    return vector.var in order[order.index(it.var) : order.index(rows[0].var)]


def _memory_order_without_blocks(layout: IndexMap, block: Block, spatial: list[Iter]) -> list[Iter]:
    order: list[Iter] = []
    for axis, _, modulus in layout.splits():
        it = next((i for i in spatial if i.var is block.body.indices[axis]), None)
        if it is not None and modulus == 0 and it not in order:
            order.append(it)
    return order


def _loop(it: Iter) -> str:
    assert isinstance(it.value, Var)
    return it.value.name


def tile_rows(extent: int | None, vectors: int, registers: int) -> int:
    """Rows of the register tile: `vectors` vectors each, one operand vector set and one broadcast
    besides. Chosen by the time of all tiles, counting two fused multiply-adds or two loads a cycle
    and a latency of four."""
    most = max(1, (registers - vectors - 1) // vectors)
    best, best_time = 1, float("inf")
    for rows in range(1, most + 1):
        per_k = max(rows * vectors / 2, (rows + vectors) / 2, 4)
        tiles = -(-extent // rows) if extent is not None else 840 / rows
        time = tiles * (per_k + 0.4)
        if time < best_time - 1e-9:
            best, best_time = rows, time
    return best


def depth_block(extent: int | None, limit: int) -> int | None:
    """How much of the reduction one pass over the tile does; None: all of it."""
    if limit <= STREAMS:
        return limit if extent is None or extent > limit else None
    if extent is None:
        return limit
    if extent <= limit + limit // 3:
        return None
    for size in range(limit + limit // 3, limit // 2, -1):
        if extent % size == 0 and size % 16 == 0:
            return size
    parts = -(-extent // (limit + limit // 3))
    return -(-extent // parts // 4) * 4


def _blocks_together(block: int, extent: int | None, lanes: int) -> int:
    """Blocks of the result's layout in one tile: what is broadcast serves several vectors."""
    if extent is None or block > lanes or extent <= block:
        return 1
    return min((3, 2), key=lambda n: -(-extent // (block * n)) * n)


def _block(s: Schedule, nest: Nest) -> int:
    """Neighbours along the vector axis that lie in one block of the result's layout (1: none), and
    belong to one group, as far as that leaves whole vectors."""
    out = nest.block.body
    block = block_of(out.buffer.layout, axis_of(out, nest.vector))
    group = group_along(nest.broad, nest.vector.var)
    narrower = block if group is None else math.gcd(group, block)
    return block if narrower % s.target.lanes(out.buffer.dtype.bytes) else narrower


def _tile(s: Schedule, nest: Nest) -> tuple[int, int, int, int | None]:
    """The register tile: (lanes of the vector axis, vectors, rows), and the number of rows if
    known."""
    t = s.target
    out = nest.block.body
    lanes = t.lanes(out.buffer.dtype.bytes)
    vector_extent = const_int(nest.vector.extent)
    blocked = _block(s, nest)
    group = group_along(nest.broad, nest.vector.var)
    row_extent: int | None = 1
    for r in nest.rows:
        e = const_int(r.extent)
        row_extent = None if e is None or row_extent is None else row_extent * e
    if blocked > 1:
        together = _blocks_together(blocked, vector_extent, lanes)
        width = blocked * (together if group is None else math.gcd(group // blocked, together))
    elif row_extent == 1:
        # Rows of a matrix that no panel holds are read side by side, in shorter pieces.
        several = (8 if nest.wide.buffer.constant else 4) * lanes
        width = several if vector_extent is None or vector_extent >= several else 2 * lanes
    elif vector_extent is not None and vector_extent <= lanes:
        width = lanes
    else:
        width = 2 * lanes
    counts = (1, 2, 3, 4) if blocked > 1 else (1, 2, 4, 8)
    width = s.choose("width", tuple(n * (blocked if blocked > 1 else lanes) for n in counts), width)
    # A block shorter than a vector of the machine takes a register for itself.
    vectors = max(1, width // (min(blocked, lanes) if blocked > 1 else lanes))
    # A depthwise tile loads a vector per row instead of broadcasting one, and may keep no operand.
    rows = tile_rows(row_extent, vectors, t.registers)
    if group is not None and group % width:
        rows = min(rows, 4 if vectors > 1 else 7)
    rows = s.choose("rows", tuple(range(1, 33)), rows)
    return width, vectors, rows, row_extent


def _schedule(s: Schedule, nest: Nest) -> None:
    name = nest.block.name
    out = nest.block.body
    width, _vectors, rows, row_extent = _tile(s, nest)

    # ---- loops: outer, rows, vector, reduction --------------------------------------------------
    order = [_loop(i) for i in (*nest.outer, *nest.rows, nest.vector)] + [
        _loop(i) for i in nest.reduce
    ]
    if order != s.loops_of(name):
        s.reorder(*order)
    depth, packed_depth = _reduction_order(s, nest)
    way = panels.way_of(s, nest, rows, row_extent, packed_depth)
    part = _part_of_depth(s, nest, depth, width, rows, row_extent, way)
    row, lines_o = None, None
    outer = [_loop(i) for i in nest.outer]
    row_loops = [_loop(i) for i in nest.rows]
    prepared = lines.prepared_by(s, nest) if way is panels.Way.FIRST else None
    if prepared is not None:
        inside = dataclasses.replace(nest, outer=[])

        def part_of(n: int) -> lines.Part:
            return _part_of_depth(s, inside, depth, width, rows, n, way)

        blocks = shares.extent(s, depth[0], 1)
        count = lines.lines_of_block(s, nest, rows, blocks, part_of)
        if count is not None:
            *more, line, pixel = row_loops
            lines_o, line = s.split(line, count, "perfect")
            outer, row_loops = [*outer, *more], [line, pixel]
            row_extent = count * shares.extent(s, pixel, 1)
            part = part_of(row_extent)
    if row_loops:
        row = s.fuse(*row_loops) if len(row_loops) > 1 else row_loops[0]
    block = _block(s, nest)
    v_o, v_i = s.split(_loop(nest.vector), block if block > 1 else width, "mask")
    tile = [v_i]
    if 1 < block < width:  # several blocks
        v_o, v_b = s.split(v_o, width // block, "mask")
        tile = [v_b, v_i]
    elif width & (width - 1):  # vectors have a power of two of lanes
        tile = [*s.split(v_i, s.target.lanes(out.buffer.dtype.bytes))]
    row_o = None
    if row is not None:
        row_o, row_i = s.split(row, rows, "mask")
        tile = [row_i, *tile]
    k_o, limit = None, 0
    if part is not None:
        limit, size = part
        k_o, k_i = s.split(depth[0], size, "guard")
        depth = [k_i, *depth[1:]]
    # ---- packing, and the order of the loops around a tile --------------------------------------
    packed = None
    if way is panels.Way.NEAR:
        assert row_o is not None
        group = shares.group_of(
            s, nest, width, math.prod(shares.extent(s, n, limit) for n in depth)
        )
        v_g, v_o = s.split(v_o, group, "guard")
        around = [*outer, v_g]
        rows_outer, row_o = shares.rows_for_threads(s, row_o, around)
        around += [rows_outer] if rows_outer else []
        s.reorder(*around, *([k_o] if k_o else []), row_o, v_o, *depth, *tile)
        packed = panels.stage_near(s, nest, k_o or around[-1], width)
        home = v_o
    elif lines_o is not None and prepared is not None and row_o is not None:
        around = [*outer, lines_o]
        s.reorder(*around, *([k_o] if k_o else []), v_o, row_o, *depth, *tile)
        lines.prepare(s, prepared, k_o or lines_o)
        packed = panels.pack_first(s, nest, width, packed_depth)
        home = row_o
    else:
        rows_outer = None
        if row_o is not None:
            rows_outer, row_o = shares.rows_in_cache(
                s, nest, row_o, rows, row_extent, depth, k_o, limit, [*outer, v_o]
            )
        around = [*outer, *([rows_outer] if rows_outer else []), v_o]
        # Parts of the reduction come outermost: then a block of rows and a panel both stay in
        # cache, and the threads need no barrier between parts because each goes on with its own
        # elements.
        s.reorder(*([k_o] if k_o else []), *around, *([row_o] if row_o else []), *depth, *tile)
        if way is panels.Way.FIRST:
            packed = panels.pack_first(s, nest, width, packed_depth)
        home = row_o if row_o is not None else v_o
    # ---- what comes after, and the register tile ------------------------------------------------
    for b in followers.near(s, name):
        s.compute_at(b, home)
    init = s.decompose_reduction(name, depth[0])
    staged = s.stage(out.buffer.name, home, Scope.REGISTER)
    # The innermost reduction loop is repeated four times in the code: more makes LLVM spill. So do
    # taps side by side, which read each other's pixels: LLVM would keep these in registers. Sums of
    # integers change their order, so that three and more no longer fit.
    last, extent = depth[-1], const_int(s.loop(depth[-1])[0].extent)
    most = 4 if out.buffer.dtype.is_float else 2
    unroll = s.choose("unroll", (1, 2, 4, 8), 1 if _slides(nest, last) else most)
    if extent is not None and unroll > 1:
        if extent <= unroll:
            s.mark(last, UNROLL)
        elif extent % unroll == 0:
            last, inner = s.split(last, unroll)
            s.mark(inner, UNROLL)
            if packed is not None and nest.wide.buffer.constant and row_o is not None:
                fetch_ahead(s, name, packed, last, row_o, v_o)
    if way is panels.Way.NEAR:
        assert row_o is not None and packed is not None
        panels.pack_near(s, nest, packed, row_o, last, width)
    elif row_o is not None and len(depth) > 1 and depth[0] != last:
        _fetch_rows(s, nest, depth[0], rows)
    for n in tile[:-1]:
        s.mark(n, UNROLL)
    s.mark(tile[-1], VECTOR)
    elementwise.around_tile(s, init, staged, home)
    for b in followers.of(s, staged):
        elementwise.vector_tile(s, b, home)
    # ---- threads --------------------------------------------------------------------------------
    _share(s, around, name)
    for b in [x.name for x in analysis.blocks(s.func)]:
        if not _is_root_preparation(s, b, name):
            continue
        if packed is None or b != f"{packed}_in" or not panels.copy_panels(s, b):
            elementwise.one_block(s, b)


def _slides(nest: Nest, loop: str) -> bool:
    """Whether a reduction loop walks along an axis of the operand as the rows of the tile do."""
    taps = {i.var for i in nest.reduce if _loop(i) == loop}
    rows = {i.var for i in nest.rows}
    return any(taps & free_vars(i) and rows & free_vars(i) for i in nest.broad.indices)


def _part_of_depth(
    s: Schedule,
    nest: Nest,
    depth: list[str],
    width: int,
    rows: int,
    row_extent: int | None,
    way: panels.Way,
) -> tuple[int, int] | None:
    """How a long reduction is cut into parts, so that what a tile reads of the packed operand stays
    in a cache: (depth of a part, iterations of the outermost reduction loop); None: not at all."""
    near, stream = way is panels.Way.NEAR, way is panels.Way.STREAM
    if (nest.outer and not near) or (row_extent == 1 and not stream):
        return None
    if way is panels.Way.FIRST and row_extent is not None and row_extent <= rows:
        return None  # one tile of rows reads a panel once
    # Every part is a pass over the result: cheap if that stays in the second-level cache.
    columns = const_int(nest.vector.extent)
    known = row_extent is not None and columns is not None
    result = 4 * row_extent * columns if known else math.inf  # type: ignore[operator]
    small = result <= s.target.caches[1]
    extents = [const_int(s.loop(n)[0].extent) for n in depth]
    if len(nest.reduce) == 1:
        several = columns is None or columns > width  # panels: one reads each row once
        fits = result <= 2 * s.target.caches[1]
        planes = shares.planes_together(s, nest, depth) if several and fits else None
        if stream:
            several = row_extent != 1 or panels.from_memory(s, nest)
            default = STREAMS if several else STREAMS // 2
        else:
            # Tiles of few rows, which stay near whole, wait for panels: long parts are streams.
            deep = const_int(nest.reduce[0].extent)
            few = known and deep is not None and 8 * row_extent * deep <= s.target.caches[1]  # type: ignore[operator]
            default = 768 if near else planes or (1024 if few else 256 if small else 768)
        limit = s.choose("depth", _DEPTHS, default)
        size = depth_block(const_int(nest.reduce[0].extent), limit)
        # The axis may be cut into blocks of the operand's layout already.
        inner = 1 if len(depth) == 1 else extents[-1]
        return None if size is None or inner is None else (limit, max(1, size // inner))
    if not small or None in extents:
        return None
    inner = math.prod(e for e in extents[1:] if e is not None)
    most = s.target.caches[0] // 2 // (4 * width * inner)
    whole = extents[0] or 1
    if whole <= most:
        return None
    size = max(d for d in range(1, whole + 1) if whole % d == 0 and d <= max(most, 1))
    return size * inner, size


def fetch_ahead(s: Schedule, name: str, operand: str, loop: str, turns: str, panels: str) -> None:
    """While all tiles of `turns` go through one panel of an operand that comes from memory, the
    next one is fetched; while one alone does, what it reads soon."""
    buffer, (block, path) = s.buffer(operand), s.block(name)
    size = buffer.dtype.bytes
    for n in buffer.physical_shape:
        size *= const_int(n) or 1
    arith = analysis.arith_of(s.func)
    load = next(x for x in analysis.operand_loads(block) if x.buffer is buffer)
    values = analysis.values_of(block)
    at = tuple(substitute(i, values) for i in load.indices)
    panel = analysis.strides(buffer, at, s.loop(panels)[0].var, arith)
    around = s.loop(turns)[0]
    passes = const_int(around.extent)
    if panel is None or panel <= 0:
        return
    part = buffer.dtype.bytes  # of the panel that one pass reads
    used = frozenset().union(*[free_vars(i) for i in at])
    for x in analysis.loops_in(path):
        if x is not around and analysis.contains(around, x) and x.var in used:
            part *= const_int(x.extent) or 64
    # From one call of a model to the next nothing stays near but what is smaller than the
    # first-level cache.
    if size <= s.target.caches[0]:
        return
    if passes == 1:
        s.prefetch(operand, loop, hints.NEAR_BYTES // buffer.dtype.bytes)
    elif 4 * part <= s.target.caches[1]:  # both parts stay in the second-level cache
        s.prefetch(operand, loop, panel, turns)


def _fetch_rows(s: Schedule, nest: Nest, loop: str, rows: int) -> None:
    """While a tile goes through one block of a blocked operand, the next tile's part of that block
    is fetched: a short run of lines, far from the tile's next block, that no hardware foresees."""
    buffer = nest.broad.buffer
    size, passes = buffer.dtype.bytes, const_int(nest.vector.extent)
    for n in buffer.physical_shape:
        size *= const_int(n) or 1
    if len(nest.reduce) != 1 or buffer.scope is not Scope.PARAM or passes is None:
        return
    arith = analysis.arith_of(s.func)
    step = analysis.strides(buffer, nest.broad.indices, nest.rows[-1].var, arith)
    # It pays where the operand comes from beyond the second-level cache, and not once in many.
    if step is None or step <= 0 or size <= s.target.caches[1] or passes > 512:
        return
    if const_int(s.loop(loop)[0].extent) == 1:
        return
    # Blocks that lie a multiple of 4 KB apart share the same few lines of the first-level cache.
    block, _ = s.block(nest.block.name)
    at = tuple(substitute(i, analysis.values_of(block)) for i in nest.broad.indices)
    apart = analysis.strides(buffer, at, s.loop(loop)[0].var, arith)
    if apart is not None and apart * buffer.dtype.bytes % shares.PAGE == 0:
        return
    lines = -(-rows * step * buffer.dtype.bytes // 64)
    s.prefetch(buffer.name, loop, rows * step, None, lines)


def _share(s: Schedule, loops: list[str], block: str) -> None:
    work = 1
    for x in analysis.loops_in(s.block(block)[1]):
        work *= const_int(x.extent) or 32
    if work < elementwise.WORTH_A_THREAD:
        return
    top = s.fuse(*loops) if len(loops) > 1 else loops[0]
    s.mark(top, PARALLEL)


def _is_root_preparation(s: Schedule, name: str, main: str) -> bool:
    """True for blocks of other phases than the main one (padding, packing) not yet scheduled."""
    _, path = s.block(name)
    _, main_path = s.block(main)
    loops, main_loops = analysis.loops_in(path), analysis.loops_in(main_path)
    if not loops or (main_loops and loops[0] is main_loops[0]):
        return False
    return all(x.kind.value == "for" for x in loops)


def _reduction_order(s: Schedule, nest: Nest) -> tuple[list[str], list[tuple[int, int]]]:
    """Puts the reduction loops in the order of the broadcast operand's memory; a blocked axis is
    split.

    Returns the loops and, for packing, (axis of the other operand, block) per loop pair.
    """
    layout = nest.broad.buffer.layout
    names = [_loop(i) for i in nest.reduce]
    packed: list[tuple[int, int]] = []
    if layout is None:
        for i in nest.reduce:
            axis = axis_of(nest.wide, i)
            if axis is not None:
                packed.append((axis, 0))
        return names, packed
    outer_names, inner_names = [], []
    outer_packed: list[tuple[int, int]] = []
    inner_packed: list[tuple[int, int]] = []
    for i, n in zip(nest.reduce, names, strict=True):
        axis = axis_of(nest.broad, i)
        size = block_of(layout, axis) if axis is not None else 1
        wide_axis = axis_of(nest.wide, i)
        if axis is None:  # the channels of one group
            around = [k for k, x in enumerate(nest.broad.indices) if i.var in free_vars(x)]
            size = block_of(layout, around[0]) if len(around) == 1 else 1
            size = math.gcd(size, const_int(i.extent) or 1)
            size = size if size >= s.target.lanes(nest.broad.buffer.dtype.bytes) else 1
        if size > 1:
            o, inner = s.split(n, size, "guard")
            outer_names.append(o)
            inner_names.append(inner)
            if wide_axis is not None:
                outer_packed.append((wide_axis, size))
                inner_packed.append((wide_axis, -size))
        else:
            outer_names.append(n)
            if wide_axis is not None:
                outer_packed.append((wide_axis, 0))
    order = outer_names + inner_names
    if len(order) > 1:
        s.reorder(*order)
    return order, outer_packed + inner_packed
