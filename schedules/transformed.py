"""The rule for transformed contractions (Winograd): a product whose operand is computed tile by
tile from the input, and whose results are combined tile by tile into the output.

    data[p, q, t, c] = f(x);  products[p, q, t, o] = sum over c of data * filters;  r = g(products)

    parallel t_o, o_o:                     # a block of tiles, one vector block of the output
        for c_o: for p:                    # a small part of a filter is transformed, then used
            filters[p, q, o, c_i], in the first-level cache
            products of these tiles, in cache, register tile by register tile
        the output pixels of these tiles

Small filters are transformed while compiling instead.
"""

from __future__ import annotations

import dataclasses
import math

from minicompiler.ir.expr import (
    Binary,
    Const,
    Expr,
    Load,
    const_int,
    factors,
    free_vars,
    group_along,
    walk,
)
from minicompiler.ir.layout import IndexMap, axes
from minicompiler.ir.tir import PARALLEL, UNROLL, VECTOR, Block, Buffer, Scope

from . import analysis, contraction, elementwise, reductions, shares
from .schedule import Schedule

MOST_TILES = 64  # of a block: their products for one vector block stay in the second-level cache
LINES = 2  # of tiles in a block, where their number is not known; twice if it transforms filters
OUTPUTS = 128  # of a group that transforms its own input, which then takes little of its time
LATENCY = 8  # vectors of products in registers: two multiply-adds a cycle, of four cycles each
PART = 16  # input channels whose transformed filter stays in the first-level cache
NEAR = 8  # what takes at most this part of the last-level cache stays there: 1/8


def applies(s: Schedule) -> bool:
    """One sum of products that the result reads tile by tile (at i // m and i % m of its index).
    The numbers of images and of tiles may be symbolic."""
    found = [b for b in analysis.blocks(s.func) if _operands(b)]
    if len(found) != 1:
        return False
    (main,) = found
    last = list(analysis.blocks(s.func))[-1]
    if not main.body.indices or not _windows(last) or not _in_planes(s, main):
        return False
    channels = _channel(main, last)
    if len(channels & {i.var for i in last.iters}) != 1:
        return False
    known = {*channels, *_planes(main, last)}
    varying = {i.var for i in last.iters if const_int(i.extent) is None}
    return (
        main.body.buffer in s.func.buffers
        and last.body.buffer in s.func.params
        and varying.isdisjoint(known)
        and all(const_int(i.extent) is not None for i in main.iters if i.reduce)
    )


def _operands(block: Block) -> tuple[Load, Load] | None:
    """The operands of a sum of products, some of which may be left out (at borders)."""
    if not analysis.is_reduction(block):
        return None
    _, term = reductions.needed_terms(block)
    update = analysis.update_operand(block)
    loads = factors(term)
    if update is None or update[0] != "add" or loads is None:
        return None
    return loads if all(type(x) is Load for x in loads) else None  # type: ignore[return-value]


def _in_planes(s: Schedule, main: Block) -> bool:
    """Whether both operands share an axis that what reads the products sums up. One that it has as
    well is a batch, whose results may have been reshaped."""
    a, b = (frozenset().union(*map(free_vars, x.indices)) for x in _operands(main) or ())
    shared = [k for k, i in enumerate(main.body.indices) if i in a & b]
    return any(
        load.buffer is main.body.buffer and not free_vars(load.indices[k]) & own
        for reader in analysis.readers(s.func, main.body.buffer)
        for own in [{i.var for i in reader.iters if not i.reduce}]
        for load in analysis.operand_loads(reader)
        for k in shared
    )


def _windows(block: Block) -> dict[Expr, int]:
    """iterator -> m, for those that a load uses as i // m."""
    sizes: dict[Expr, int] = {}
    spatial = {i.var for i in block.iters}
    for load in analysis.operand_loads(block):
        for index in load.indices:
            for e in walk(index):
                if (
                    type(e) is Binary
                    and e.op == "floordiv"
                    and type(e.b) is Const
                    and e.a in spatial
                ):
                    sizes[e.a] = e.b.value
    return sizes


def _channel(main: Block, final: Block) -> set[Expr]:
    """The iterators of the result that stand, as they are, where the product has its last axis."""
    return _at_axis(main, final, len(main.body.indices) - 1)


def _at_axis(main: Block, final: Block, axis: int) -> set[Expr]:
    """What the result has where the product has one of its axes."""
    rank = len(main.body.indices)
    return {x.indices[axis] for x in analysis.operand_loads(final) if len(x.indices) == rank}


def _planes(main: Block, final: Block) -> list[Expr]:
    """The iterators of the result along which the product sums up taps of the windows."""
    reduced = {i.var for i in main.iters if i.reduce}
    found: list[Expr] = []
    for load in _operands(main) or ():
        for index in load.indices[:-1]:
            own = free_vars(index) - reduced
            if own and free_vars(index) & reduced:
                place = next(k for k, i in enumerate(main.body.indices) if i in own)
                found += _at_axis(main, final, place)
    return found


def _chain(s: Schedule, load: Load) -> list[str]:
    """The blocks that compute an operand, in order."""
    wanted = {load.buffer}
    names: list[str] = []
    for b in reversed(list(analysis.blocks(s.func))):
        if b.body.buffer in wanted:
            names.insert(0, b.name)
            wanted |= {x.buffer for x in analysis.operand_loads(b)}
    return names


def tile_rows_per_block(
    high: int, wide: int, vectors: int, registers: int, each_block: float
) -> int:
    """How many lines of tiles make one block: a divisor, by the cost of register tiles per tile.
    each_block: what a block costs besides its tiles, in the time of a tile's products."""
    best, least = 1, float("inf")
    for r in (d for d in range(1, high + 1) if high % d == 0):
        tiles = r * wide
        if tiles > MOST_TILES and r > 1:
            break
        rows = _tile_rows(tiles, vectors, registers, r in (1, high))
        time = -(-tiles // rows) * (max(rows * vectors / 2, 4) + 0.4) / tiles
        time *= 1 + each_block / tiles
        if time < least:
            best, least = r, time
    return best


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """How tiles are cut into blocks."""

    blocks: list[str]  # loops over blocks
    inside: list[str]  # loops over the tiles of a block, by lines
    count: int  # tiles of a block (at most)
    whole: bool  # a block is all of an image
    alone: bool  # see `_tile_rows`
    rows: int | None = None  # tiles of one line in a register tile; None: of any lines


def _blocks_of_tiles(s: Schedule, line: str, row: list[str], vectors: int, made: bool) -> _Tiles:
    """Whole lines of tiles make one block. Of lines whose length or number is not known, parts: in
    each of them the register tiles end, so that these are no larger than they have to be."""
    high, wide = const_int(s.loop(line)[0].extent), [const_int(s.loop(n)[0].extent) for n in row]
    if high is None or None in wide:
        rows = max(1, LATENCY // vectors)
        *above, last = [line, *row]
        o, i = s.split(last, 4 * rows, "guard")
        lines = 2 * LINES if made else LINES
        cut = [s.split(n, lines, "guard") for n in above]
        count = 4 * rows * lines ** len(above)
        return _Tiles(
            [*[n for n, _ in cut], o], [*[n for _, n in cut], i], count, False, False, rows
        )
    # A block transforms its filter (as much work as the products of 3.5 tiles), or reads it.
    each_block = 3.5 if made else 2.0
    count = _extent(s, row)
    lines = s.choose(
        "lines",
        tuple(d for d in range(1, high + 1) if high % d == 0),
        tile_rows_per_block(high, count, vectors, s.target.registers, each_block),
    )
    o, i = s.split(line, lines)
    return _Tiles([o], [i, *row], lines * count, lines == high, lines in (1, high))


def _tile_rows(tiles: int, vectors: int, registers: int, alone: bool) -> int:
    """Tiles of a register tile. alone: no other tiles follow those of the block in the buffer, so
    the last register tile may reach beyond them."""
    if alone:
        return contraction.tile_rows(tiles, vectors, registers)
    most = max(1, (registers - vectors - 1) // vectors)
    return max(d for d in range(1, most + 1) if tiles % d == 0)


def apply(s: Schedule) -> None:
    main = next(b for b in analysis.blocks(s.func) if _operands(b))
    loads = _operands(main)
    assert loads is not None
    final = list(analysis.blocks(s.func))[-1]
    windows = _windows(final)
    constant = [_reads_constants(s, x) for x in loads]
    broad, wide = loads if not constant[0] else (loads[1], loads[0])
    data, filters = _chain(s, broad), _chain(s, wide)
    after = [b.name for b in analysis.blocks(s.func)]
    after = after[after.index(main.name) + 1 : -1]
    lanes = s.target.vector_bytes // 4

    # ---- the result: tiles of lines, vector blocks, pixels --------------------------------------
    loop_of: dict[Expr, str] = {
        i.var: str(i.value) for i in final.iters
    }  # each is a loop's variable
    planes = [loop_of[v] for v in _planes(main, final)]
    sizes = {loop_of[v]: m for v, m in windows.items()}
    order = elementwise.memory_order(s, final.name)
    if order[-1] in loop_of.values():
        # A result in row-major order (of the whole model): vectors over the channels all the same,
        # whose lanes are then stored apart.
        (axis,) = [loop_of[i.var] for i in final.iters if i.var in _channel(main, final)]
        outer, inner = s.split(axis, 2 * lanes, "mask")
        order = [outer if n == axis else n for n in order] + [inner]
    vector = order[-1]
    width = const_int(s.loop(vector)[0].extent) or lanes
    panel = [n for n in order[:-1] if n not in loop_of.values()]
    own_outputs = group_along(broad, main.body.indices[-1])
    if own_outputs is not None and own_outputs % width:
        width = math.gcd(own_outputs, width)
        narrower, vector = s.split(vector, width)
        panel.append(narrower)
    images, along = _tile_axes(main, final, loop_of, planes)
    pixels: list[str] = []  # of a tile
    tiles: list[str] = []
    for n in along:
        if n in sizes:
            n, pixel = s.split(n, sizes[n], "mask")
            pixels.append(pixel)
        tiles.append(n)
    *more, line = tiles[:-1] or tiles
    row = tiles[len(more) + 1 :]
    batch = [*images, *more]
    vectors = max(1, width // lanes)
    made = s.choose("filter", ("stored", "made"), _where(s, wide)) == "made"
    tile = _blocks_of_tiles(s, line, row, vectors, made)
    planes = _planes_of_a_block(s, planes, tile.count)
    held = _extent(s, planes[-1:]) * tile.count
    together = _images_of_a_block(s, batch, held) if tile.whole else []
    around = [*batch, *tile.blocks]
    # One vector at a time: the transform of a tile takes all registers.
    each, vector = s.split(vector, lanes if width % lanes == 0 else width)
    s.reorder(*around, *panel, *planes, *together, *tile.inside, each, *pixels, vector)
    channels = s.fuse(*panel) if len(panel) > 1 else panel[0]
    # Each thread transforms the input of its own blocks, if there are enough of them.
    blocks = _extent(s, around)
    own = tile.rows is not None or own_outputs is not None or blocks >= 2 * s.target.cores
    local = s.choose("local", (False, True), own)
    panels = _extent(s, [channels])
    options = tuple(g for g in range(1, panels + 1) if panels % g == 0) if local else (1,)
    if own_outputs is not None and local:  # a group's outputs have an input of their own
        options = tuple(g for g in options if own_outputs % (panels // g * width) == 0)
    even = shares.even(blocks, options, s.target.cores)
    if tile.rows is not None:  # there may be one block only
        most = min(s.target.cores, panels * width // OUTPUTS if made else 1)
        even = max((g for g in options if g <= most), default=options[0])
    groups = s.choose("groups", options, even)
    home = around[-1]
    if groups > 1:
        home, channels = s.split(channels, panels // groups)
    alone = _extent(s, batch) == 1 if together else tile.alone

    # ---- what is computed where -----------------------------------------------------------------
    for name in reversed(after):
        s.compute_at(name, each)
    at_products = planes[-2] if len(planes) > 1 else channels
    s.compute_at(main.name, at_products)
    copies = [n for n in data if _copies(s, n)]
    data = [n for n in data if n not in copies]
    for name in copies:
        if own_outputs is not None:
            _blocks_within_groups(s, name, _channels(main, broad))
        contraction.follow_reader_layout(s, name)
    part = _part(s, main, broad, PART if made else 4 * PART)
    depth = len(broad.buffer.shape) - 1
    parts = [[depth, part, 0], *[[k, 1, 0] for k in range(depth)], [depth, 1, part]]
    s.relayout(broad.buffer.name, parts)
    if local:
        s.compute_at(data[-1], home)
    rank = len(windows)  # of the transform
    whole = lanes if own_outputs is None else math.gcd(_channels(main, broad), lanes)
    _data_block(s, data, rank, home if local else None, whole)
    for name in reversed(copies):
        if local:
            s.compute_at(name, home)
            elementwise.one_block(s, name, parallel=False, below=home)
            _hold(s, name, home)
        else:
            elementwise.one_block(s, name)
    s.relayout(wide.buffer.name, _filter_layout(main, wide, width))
    for name in after:
        _hold(s, name, each)
    at = _products(
        s, main.name, at_products, rank, vectors, part if made else None, tile.rows, alone
    )
    for n, kind in (*[(n, UNROLL) for n in pixels], (vector, VECTOR)):
        s.mark(n, kind)
    for name in after:
        elementwise.vector_tile(s, name, each)
    shared = [*around, *([home] if groups > 1 else [] if local else [channels])]
    top = s.fuse(*shared) if len(shared) > 1 else shared[0]
    if made:
        s.compute_at(filters[-1], at.filters)
        if at.filters not in at.part:
            s.mark(at.filters, UNROLL)
    packed = _filter_block(s, filters, rank, width, part, at.filters if made else None)
    if packed is None and at.tiles != at.panel:
        contraction.fetch_ahead(s, main.name, wide.buffer.name, at.depth, at.tiles, at.panel)
    elif packed is not None and const_int(s.loop(at.part[-1])[0].extent) != 1:
        s.prefetch_next(packed, at.depth, at.part[-1])
    s.mark(top, PARALLEL)


def _tile_axes(
    main: Block, final: Block, loop_of: dict[Expr, str], planes: list[str]
) -> tuple[list[str], list[str]]:
    """The loops of the result over images, and over what is computed tile by tile: all its other
    axes but channels and planes, in the order in which the product has them."""
    rank = len(main.body.indices)
    load = next(x for x in analysis.operand_loads(final) if len(x.indices) == rank)
    images: list[str] = []
    along: list[str] = []
    windows = _windows(final)
    first = len(windows)
    for axis, index in enumerate(load.indices[first:-1]):
        var = next((v for v in free_vars(index) if v in loop_of), None)
        if var is not None and loop_of[var] not in planes:
            (images if axis == 0 else along).append(loop_of[var])
    return images, along


def _extent(s: Schedule, loops: list[str]) -> int:
    """Iterations of some loops together, those of unknown number counted as one."""
    return math.prod(const_int(s.loop(n)[0].extent) or 1 for n in loops)


def _planes_of_a_block(s: Schedule, planes: list[str], tiles: int) -> list[str]:
    """Several planes make one block of tiles: (loops over these blocks .., planes of a block)."""
    if not planes:
        return []
    number = _extent(s, planes[-1:])
    most = max(1, MOST_TILES // tiles)
    count = s.choose(
        "planes",
        tuple(d for d in range(1, number + 1) if number % d == 0),
        max(d for d in range(1, most + 1) if number % d == 0),
    )
    return [*planes[:-1], *s.split(planes[-1], count)]


def _images_of_a_block(s: Schedule, batch: list[str], tiles: int) -> list[str]:
    """Several small images make one block of tiles: the loop over these; `batch` keeps the rest."""
    if not batch:
        return []
    number = const_int(s.loop(batch[-1])[0].extent) or 1
    most = max(1, MOST_TILES // tiles)
    count = max(d for d in range(1, most + 1) if number % d == 0)
    if count == 1:
        return []
    batch[-1], inside = s.split(batch[-1], count)
    return [inside]


def _where(s: Schedule, filters: Load) -> str:
    """Whether a filter is transformed while compiling ("stored") or by each call, part by part.

    The transformed filter has a multiple of the bytes: if it comes from memory, its products wait
    for it, and transforming it is cheaper. It is stored if it is small enough to stay in a cache
    and not to count."""
    return "stored" if _is_near(s, filters.buffer) else "made"


def _is_near(s: Schedule, buffer: Buffer) -> bool:
    """True if a buffer takes so little of the last-level cache that it likely stays there."""
    size = buffer.dtype.bytes
    for n in buffer.shape:
        size *= const_int(n) or 1
    return size * NEAR <= s.target.caches[2]


def _part(s: Schedule, main: Block, data: Load, most: int) -> int:
    """How many input channels lie together in the transformed input, tile beside tile."""
    channels = _channels(main, data)
    options = tuple(d for d in (8, 16, 32, 64, channels) if channels % d == 0)
    return s.choose("part", options, max([d for d in options if d <= most], default=channels))


def _channels(main: Block, data: Load) -> int:
    """The channels that are summed up: those of a group."""
    used = free_vars(data.indices[-1])
    return next(const_int(i.extent) or 1 for i in main.iters if i.reduce and i.var in used)


def _blocks_within_groups(s: Schedule, name: str, channels: int) -> None:
    """A copy of what lies in blocks that belong to several groups has blocks of its own."""
    block, _ = s.block(name)
    buffer = block.body.buffer
    rank = len(buffer.shape)
    (layout,) = {x.buffer.layout for x in analysis.operand_loads(block)}
    for axis, d in enumerate(axes(rank)):
        size = 1 if layout is None else layout.factor(d)
        if channels % size:
            s.relayout(buffer.name, IndexMap.blocked(rank, axis, math.gcd(channels, size)))


def _reads_constants(s: Schedule, load: Load) -> bool:
    """True when an operand depends on nothing but constants."""
    seen = {load.buffer}
    for b in reversed(list(analysis.blocks(s.func))):
        if b.body.buffer in seen:
            seen |= {x.buffer for x in analysis.operand_loads(b)}
    return all(b.constant or b in s.func.buffers for b in seen)


def _filter_layout(main: Block, load: Load, width: int) -> IndexMap:
    """Vector blocks of the output outermost, then as the product reads them."""
    out = main.body.indices
    axis = next(k for k, i in enumerate(load.indices) if i is out[-1])
    rest = [k for k in range(len(load.indices)) if k != axis]
    return IndexMap.make(
        len(load.indices), lambda *d: (d[axis] // width, *[d[k] for k in rest], d[axis] % width)
    )


def _copies(s: Schedule, name: str) -> bool:
    """True for a block that reads one element for each of its own (padding)."""
    block, _ = s.block(name)
    loads = {*analysis.operand_loads(block)}
    return len(loads) == 1 and len(block.body.indices) == len(loads.pop().indices)


def _data_block(s: Schedule, data: list[str], rank: int, at: str | None, lanes: int) -> None:
    """The transformed input of some tiles: per tile and vector of channels, all transform rows at
    once."""
    name = data[-1]
    names = s.loops_of(name)
    inner = names[names.index(at) + 1 :] if at is not None else names
    transform, (channel,) = inner[:rank], inner[-1:]
    tiles = inner[rank:-1]
    c_o, c_i = s.split(channel, lanes, "mask")
    s.reorder(*tiles, c_o, *transform, c_i)
    for earlier in reversed(data[:-1]):
        s.compute_at(earlier, c_o)
    for n in transform:
        s.mark(n, UNROLL)
    s.mark(c_i, VECTOR)
    for earlier in data[:-1]:
        loops = s.loops_of(earlier)
        for n in loops[loops.index(c_o) + 1 : -1]:
            s.mark(n, UNROLL)
        s.mark(loops[-1], VECTOR)
        _hold(s, earlier, c_o)
    if at is not None:
        _hold(s, name, at)
    else:
        top = s.fuse(*tiles, c_o)
        s.mark(top, PARALLEL)


def _filter_block(
    s: Schedule, filters: list[str], rank: int, width: int, part: int, at: str | None
) -> str | None:
    """The transformed filter: per vector of outputs and input channel, all transform rows at once.
    What it reads is gathered into registers first, so that no element is fetched twice.

    at: the loop in whose iterations a part of it is made. The filter itself is then packed in the
    order in which they read it; its name."""
    name = filters[-1]
    loops = s.loops_of(name)
    *transform, out, channel = loops if at is None else loops[loops.index(at) + 1 :]
    made = rank if at is None else len(transform)  # the first axis of two may be outside
    transform, taps = transform[:made], transform[made:]
    (source,) = {x.buffer for x in analysis.operand_loads(s.block(filters[0])[0])}
    axes = len(source.shape)
    packed = None
    outer = taps
    if at is None:
        out_o, out = s.split(out, width, "mask")
        outer = [out_o, *taps]
    else:
        kept = _kept_taps(s, filters[0], source, rank)
        rest = [[k, 1, 0] for k in range(2, axes) if k not in kept]
        depth = [[1, part, 0], *[[k, 1, 0] for k in kept], [1, 1, part]] if kept else [[1, 1, 0]]
        layout = [[0, width, 0], *depth, *rest, [0, 1, width]]
        packed = s.stage(source.name, None, Scope.GLOBAL, layout)
    each, vector = s.split(out, s.target.vector_bytes // 4, "mask")
    s.reorder(*outer, channel, each, *transform, vector)
    for earlier in reversed(filters[:-1]):
        s.compute_at(earlier, each)
    layout = [*[[k, 1, 0] for k in range(1, axes)], [0, 1, 0]]
    read = s.stage(packed or source.name, each, Scope.REGISTER, layout)
    for n in transform:
        s.mark(n, UNROLL)
    s.mark(vector, VECTOR)
    for earlier in (f"{read}_in", *filters[:-1]):
        loops = s.loops_of(earlier)
        inner = loops[loops.index(each) + 1 :]
        inner = [n for n in inner if const_int(s.loop(n)[0].extent) != 1]
        along = max(inner, key=lambda n: const_int(s.loop(n)[0].extent) or 0)  # the outputs
        s.reorder(*[n for n in inner if n != along], along)
        for n in inner:
            s.mark(n, VECTOR if n == along else UNROLL)
        if earlier in filters:
            buffer = s.block(earlier)[0].body.buffer
            s.stage(buffer.name, each, Scope.REGISTER, buffer.layout)
    if at is not None:
        _hold(s, name, at)
        elementwise.one_block(s, f"{packed}_in")
    return packed


def _kept_taps(s: Schedule, name: str, source: Buffer, rank: int) -> list[int]:
    """The axes of a filter whose taps are not transformed."""
    block, _ = s.block(name)
    kept = {i for i in block.body.indices[rank:] if const_int(i) is None}
    (at,) = {tuple(i if i in kept else None for i in x.indices)
             for x in analysis.operand_loads(block) if x.buffer is source}  # fmt: skip
    return [k for k in range(2, len(at)) if at[k] is not None]


def _hold(s: Schedule, name: str, at: str) -> None:
    """The result of a block lives in thread-local memory during one iteration of `at`."""
    buffer = s.block(name)[0].body.buffer
    s.stage(buffer.name, at, Scope.LOCAL, buffer.layout)


@dataclasses.dataclass(frozen=True)
class _Loops:
    """Loops around the products, outermost first."""

    part: list[str]  # parts of the input channels
    filters: str  # in whose iterations a part of a filter is transformed
    panel: str  # the last axis of the transform
    tiles: str
    depth: str  # input channels of a part, several at a time


def _products(
    s: Schedule, name: str, at: str, rank: int, vectors: int, size: int | None, rows: int | None,
    alone: bool,
) -> _Loops:  # fmt: skip
    """The products of one block of tiles and one vector block: register tiles of several tiles.
    size: input channels of a part, which come outermost; None: all. rows: tiles of one line; None:
    of all lines as one. alone: see `_tile_rows`."""
    _hold(s, name, at)
    names = s.loops_of(name)
    inner = names[names.index(at) + 1 :]
    block, path = s.block(name)
    depth, *taps = [x.var.name for x in analysis.reduce_loops(block, analysis.loops_in(path))]
    spatial = [n for n in inner if n not in (depth, *taps)]
    moving = _moving_with_taps(s, block)
    transform, vector = spatial[:rank], spatial[-1]
    planes = [n for n in spatial[rank:-1] if n in moving]
    tiles = [n for n in spatial[rank:-1] if n not in moving]
    if planes:
        s.reorder(*transform, *planes, *tiles)
    home, row = [*transform, *planes][-1], []
    if tiles:
        if rows is not None and len(tiles) > 1:  # a square of tiles: at borders the fewest are idle
            *above, line, _ = tiles
            line, upper = s.split(line, 2, "mask")
            planes, tiles, row = [*planes, *above, line], tiles[-1:], [upper]
            rows = max(1, rows // 2)
        t = s.fuse(*tiles) if len(tiles) > 1 else tiles[0]
        best = rows or _tile_rows(_extent(s, [t]), vectors, s.target.registers, alone)
        home, t_i = s.split(t, s.choose("rows", tuple(range(1, 33)), best), "mask")
        planes, row = [*planes, home], [*row, t_i]
    width = _extent(s, [vector])
    if width & (width - 1):  # vectors have a power of two of lanes
        several, vector = s.split(vector, s.target.vector_bytes // 4)
        row = [*row, several]
    part = []
    if size is not None:
        k_o, depth = s.split(depth, size)
        part, taps = [k_o, *taps], []
    s.reorder(*part, *transform, *planes, *taps, depth, *row, vector)
    init = s.decompose_reduction(name, taps[0] if taps else depth)
    if reductions.needed_terms(s.block(name)[0])[0]:
        s.skip(name)
    staged = s.stage(s.block(name)[0].body.buffer.name, home, Scope.REGISTER)
    k_o, k = s.split(depth, math.gcd(4, _extent(s, [depth])))
    for n, kind in (*[(n, UNROLL) for n in (k, *row)], (vector, VECTOR)):
        s.mark(n, kind)
    elementwise.around_tile(s, init, staged, home)
    filters = [*part, *transform][-2:][0]
    return _Loops(part, filters, transform[-1], home, k_o)


def _moving_with_taps(s: Schedule, block: Block) -> set[str]:
    """The loops that choose an element of the product and, with taps, where it reads."""
    reduced = {i.var for i in block.iters if i.reduce}
    values = analysis.values_of(block)
    found: set[str] = set()
    for load in analysis.operand_loads(block):
        for index in load.indices:
            used = free_vars(index)
            if used & reduced and used - reduced:
                at = frozenset().union(*[free_vars(values.get(v, v)) for v in used - reduced])
                found |= {v.name for v in at}  # type: ignore[attr-defined]
    return found
