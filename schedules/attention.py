"""The rule for attention: a product whose rows are reduced, and whose result weights another one.

    x[i, j] = sum over k of q[i, k] * y[j, k];  m[i] = max over j of x;  e[i, j] = exp(x - m)
    s[i] = sum over j of e;  r[i, d] = (sum over j of e[i, j] * v[j, d]) / s[i]

A tile of a few rows i is done at a time: the scores of these rows against all j in thread-local
memory, the reductions along them, then their product with v. Memory grows with j, never with
i times j. The operand that has j is packed once so that j runs along vectors.
"""

from __future__ import annotations

import dataclasses

from minicompiler.ir.expr import ZERO, Binary, Dim, Expr, Load, Var, const_int, free_vars, walk
from minicompiler.ir.layout import IndexMap
from minicompiler.ir.tir import PARALLEL, SERIAL, UNROLL, VECTOR, Block, Buffer, Iter, Scope

from . import analysis, combining, contraction, elementwise, truncate
from .schedule import Schedule

WORTH_A_COPY = 64  # rows that read an operand: fewer read it where it is
UNROLLED = 4  # steps of a product written out: more makes LLVM spill


@dataclasses.dataclass
class _Nest:
    """What the rule found: names of blocks and of loops of the last one."""

    scores: str  # the first product
    between: list[str]  # what happens to its rows, in order
    values: str  # the second product, over the columns of the first
    last: str  # what finishes the rows: `values` itself or the elementwise block after it
    column: int  # the axis of the scores that `values` sums over
    row: int | None  # the axis of the scores that only they have; None: a single row
    lane: Expr  # the iterator of `values` that only its other operand has
    loops: _Roles  # of the last block
    after: list[str]  # blocks that stay phases of their own


@dataclasses.dataclass
class _Cut:
    """A block whose columns are cut: the loop over vectors, and for reductions the buffer and block
    of the partial results, and their init."""

    loop: str
    buffer: str = ""
    partial: str = ""
    start: str = ""


# How the last block tells one coordinate of the second product: a loop, or a loop divided by n
# ("floordiv") or modulo n ("mod"), where rows of several matrices lie side by side.
_Coordinate = tuple[str, str, int]
_Roles = tuple[list[_Coordinate], _Coordinate | None, _Coordinate]  # outer, row, vector


def applies(s: Schedule) -> bool:
    """Two products, the second over the axis along which the rows of the first are reduced."""
    return _find(s) is not None


def _find(s: Schedule) -> _Nest | None:
    blocks = list(analysis.blocks(s.func))
    products = [b for b in blocks if analysis.product_loads(b)]
    if len(products) != 2 or blocks[0] is not products[0]:
        return None
    if any(_is_clamped(i) for b in products for i in _operand_indices(b)):
        return None  # tiles of an operand would differ in size
    scores, values = products
    out = values.body.buffer
    followers = [b for b in blocks if out in _read_by(b) and b is not values]
    between = [b for b in blocks if b not in products and b not in followers]
    made = {b.body.buffer for b in between}
    # Everything but the last block must be of this function alone.
    private = {scores.body.buffer, *made, *([out] if followers else [])}
    if len(followers) > 1 or not private <= set(s.func.buffers):
        return None
    if followers and analysis.is_reduction(followers[0]):
        return None
    loads = analysis.product_loads(values)
    assert loads is not None
    weights = [x for x in loads if x.buffer in made]
    reduce = [i for i in values.iters if i.reduce]
    if len(weights) != 1 or len(reduce) != 1 or not any(map(analysis.is_reduction, between)):
        return None
    (w,) = weights
    v = loads[0] if w is loads[1] else loads[1]
    if scores.body.buffer.shape != w.buffer.shape or v.buffer not in s.func.params:
        return None
    column = next((k for k, i in enumerate(w.indices) if i is reduce[0].var), None)
    only_v = [i for i in values.iters if not i.reduce and i.var not in _vars(w)]
    if column is None or len(only_v) != 1 or only_v[0].var not in _vars(v):
        return None
    only_w = [i for i in values.iters if not i.reduce and i.var not in _vars(v)]
    row = only_w[-1] if only_w else None
    row_axis = next((k for k, i in enumerate(w.indices) if row is not None and i is row.var), None)
    if row is not None and row_axis is None:
        return None
    last = followers[0] if followers else values
    roles = _roles(values, last, row, only_v[0])
    if roles is None and not made & _read_by(last):
        last, roles = values, _roles(values, values, row, only_v[0])
    if roles is None or not (roles[0] or roles[1]):
        return None
    after = [b.name for b in followers if b is not last]
    names = [b.name for b in between]
    return _Nest(
        scores.name, names, values.name, last.name, column, row_axis, only_v[0].var, roles, after
    )


def _operand_indices(product: Block) -> list[Expr]:
    return [i for x in analysis.product_loads(product) or () for i in x.indices]


def _is_clamped(index: Expr) -> bool:
    return any(type(e) is Binary and e.op in ("min", "max") for e in walk(index))


def _roles(values: Block, last: Block, row: Iter | None, vector: Iter) -> _Roles | None:
    """Where the loops of `last` stand for those of `values`. None: they cannot be told apart."""
    if any(not isinstance(i.value, Var) for i in (*values.iters, *last.iters)):
        return None
    found: dict[Expr, _Coordinate] = {}
    if last is values:
        found = {i.var: (str(i.value), "", 1) for i in values.iters if not i.reduce}
    else:
        reads = [x for x in analysis.operand_loads(last) if x.buffer is values.body.buffer]
        if len(reads) != 1:
            return None
        loop_of = {i.var: str(i.value) for i in last.iters}
        for own, index in zip(values.body.indices, reads[0].indices, strict=True):
            if index in loop_of:
                found[own] = (loop_of[index], "", 1)
            elif type(index) is Binary and index.op in ("floordiv", "mod") and index.a in loop_of:
                n = const_int(index.b)
                if n is None:
                    return None
                found[own] = (loop_of[index.a], index.op, n)
    spatial = [i.var for i in values.iters if not i.reduce]
    if any(v not in found for v in spatial) or len(last.iters) != len(
        {name for name, _, _ in found.values()}
    ) + sum(i.reduce for i in last.iters):
        return None
    apart = (vector.var, row.var if row is not None else None)
    outer = [found[v] for v in spatial if v not in apart]
    return outer, found[row.var] if row is not None else None, found[vector.var]


def _read_by(block: Block) -> set[Buffer]:
    return {x.buffer for x in analysis.operand_loads(block)}


def _vars(load: Load) -> frozenset[Expr]:
    return frozenset().union(*map(free_vars, load.indices), frozenset())


def apply(s: Schedule) -> None:
    nest = _find(s)
    assert nest is not None
    s.rows = _may_be_one(s, nest)
    lanes = s.target.vector_bytes // 4
    width = s.choose("width", (lanes, 2 * lanes, 4 * lanes), 2 * lanes)
    shape = s.block(nest.scores)[0].body.buffer.shape
    height = 1 if nest.row is None else const_int(shape[nest.row])
    rows = contraction.tile_rows(height, width // lanes, s.target.registers)
    if nest.loops[1] is not None and nest.loops[1][1]:  # a tile stays within its matrix
        rows = max(n for n in range(1, rows + 1) if nest.loops[1][2] % n == 0)
    rows = s.choose("rows", tuple(range(1, 33)), rows)

    # ---- the last block: tiles of rows and of the vector axis -----------------------------------
    outer, row, vector = _loops_of_last(s, nest)
    # A single row needs more sums at a time to hide their latency, and reads the operand once.
    wide = width if rows > 1 else 8 * lanes
    across = _vector_width(s, vector, wide, nest.loops[2][1] != "")
    v_o, v_i = s.split(vector, across, "mask")
    shared, tile = [*outer], [v_i]
    if row is not None:
        row_o, row_i = s.split(row, rows, "mask")
        shared, tile = [*outer, row_o], [row_i, v_i]
    depth = [n for n in s.loops_of(nest.last) if n not in (*shared, v_o, *tile)]
    s.reorder(*shared, v_o, *depth, *tile)
    # Where there are enough matrices each belongs to one thread, which packs its operand.
    count = 1
    for n in outer:
        count *= const_int(s.loop(n)[0].extent) or 1
    own = s.choose("own_matrices", (False, True), row is not None and count >= 4 * s.target.cores)
    if own and len(outer) > 1:
        shared = [s.fuse(*outer), *shared[len(outer) :]]
    elif not own and len(shared) > 1:
        shared = [s.fuse(*shared)]
    home = shared[-1]
    size = _columns(s, nest, rows)
    if nest.last != nest.values:
        s.compute_at(nest.values, home if size else v_o)
    order = [b.name for b in analysis.blocks(s.func) if b.name in nest.between]
    for name in [*reversed(order), nest.scores]:
        s.compute_at(name, home)

    # ---- what is done per row: everything up to the second product ------------------------------
    place, tiled = home, rows > 1
    if size:
        place, order = _roll(s, nest, order, home, size)
    packed, whose = [], shared[0] if own else None
    if tiled:
        column = s.block(nest.scores)[0].body.indices[nest.column]
        readers = height or WORTH_A_COPY
        packed.append(_pack(s, nest.scores, column, width, whose, readers))
        packed.append(_pack(s, nest.values, nest.lane, across, whose, readers))
    _hold_rows(s, nest, order, place, width, tiled)

    # ---- the second product, the last block -----------------------------------------------------
    if size:
        _hold_sums(s, nest, home, place, across)
    else:
        _second_product(s, nest, v_o)
    if nest.last != nest.values:
        elementwise.vector_tile(s, nest.last, s.loops_of(nest.last)[-len(tile) - 1])
    for copy in packed:
        if copy is not None:
            _fill_panels(s, f"{copy}_in", whose)
    for name in nest.after:
        elementwise.one_block(s, name)
    if truncate.is_triangular(s, place):
        s.truncate(place, width)
    s.mark(shared[0], PARALLEL)


def _may_be_one(s: Schedule, nest: _Nest) -> Dim | None:
    """The number of rows, if they may be a single one that is compared with any number of columns:
    it reads each operand once, where it is."""
    shape = s.block(nest.scores)[0].body.buffer.shape
    count = ZERO if nest.row is None else shape[nest.row]
    if not isinstance(count, Dim) or count.lo > 1 or shape[nest.column] is count:
        return None
    return count


def _hold_rows(
    s: Schedule, nest: _Nest, order: list[str], place: str, width: int, tiled: bool
) -> None:
    """The scores of a tile of rows and the blocks after them, in memory of `place`, in vectors."""
    buffers = {n: s.block(n)[0].body.buffer.name for n in (nest.scores, *order)}
    if tiled:
        around, first = _tile_of_scores(s, nest, place, width)
    else:
        combining.schedule_reduction(s, nest.scores, place)
    cuts = {n: _cut_columns(s, n, nest.column, place, width) for n in order}
    for n, buffer in buffers.items():  # in order: what a block reads has room for tails by then
        cut = cuts.get(n)
        if cut is not None and cut.buffer:
            s.stage(cut.buffer, place, Scope.REGISTER)
            s.stage(buffer, place, Scope.REGISTER)
        else:
            held = s.stage(buffer, place, Scope.LOCAL)
            if n == nest.scores and tiled:
                _in_registers(s, n, held, around, first)
    for n, cut in cuts.items():
        if cut is not None:
            _mark_columns(s, n, place, cut)


def _second_product(s: Schedule, nest: _Nest, at: str) -> None:
    """One register tile of the second product per iteration of `at`, over all columns."""
    block, path = s.block(nest.values)
    (k,) = [x.var.name for x in analysis.reduce_loops(block, analysis.loops_in(path))]
    inside = s.loops_of(nest.values, at)
    wanted = [k, *[n for n in inside if n != k]]
    if inside != wanted:
        s.reorder(*wanted)
    first = s.decompose_reduction(nest.values, k)
    # The last block may read the tile at i // n and i % n: a box of the product's axes.
    boxed = IndexMap.identity(len(block.body.indices)) if nest.last != nest.values else None
    _in_registers(s, nest.values, block.body.buffer.name, at, first, boxed)


def _columns(s: Schedule, nest: _Nest, rows: int) -> int:
    """How many columns are done at a time; 0: all. A row is done in one piece as long as the scores
    of a tile stay in the second-level cache; memory grows with the row's length then."""
    maxima = [n for n in nest.between if _is_maximum(s, n)]
    sums = [n for n in nest.between if analysis.is_reduction(s.block(n)[0]) and n not in maxima]
    if len(maxima) != 1 or not sums or nest.last == nest.values or rows == 1:
        return 0
    count = const_int(s.block(nest.scores)[0].body.buffer.shape[nest.column])
    long = count is not None and 2 * 4 * rows * count > s.target.caches[1] // 2
    return s.choose("columns", (0, 64, 256, 512, 1024), 512 if long else 0)


def _is_maximum(s: Schedule, name: str) -> bool:
    update = analysis.update_operand(s.block(name)[0])
    return update is not None and update[0] == "max"


def _roll(
    s: Schedule, nest: _Nest, order: list[str], home: str, size: int
) -> tuple[str, list[str]]:
    """The rows advance by blocks of columns: a running maximum, and sums that are repaired when it
    grows. The loop over blocks, and what is computed per block."""
    inner: list[str] = []
    maximum = ("", "")
    for name in [*order, nest.values]:
        block, path = s.block(name)
        inside = s.loops_of(name, home)
        reducing = [x.var.name for x in analysis.reduce_loops(block, analysis.loops_in(path))]
        column = (
            reducing[0] if reducing else _loop_of(block, block.body.indices[nest.column], inside)
        )
        others = [n for n in inside if n != column]
        o, i = s.split(column, size, "mask")
        s.reorder(o, *others, i)
        if name == nest.values:
            s.decompose_reduction(name, o)
        elif not reducing:
            inner.append(name)
        else:
            inner.append(s.rfactor(name, o)[0])
            after = s.loops_of(name, home)
            if len(after) > 1:
                s.reorder(after[-1], *after[:-1])
            s.decompose_reduction(name, after[-1])
            if _is_maximum(s, name):
                maximum = name, after[-1]
    if truncate.is_triangular(s, home):
        s.truncate(home, size)
    s.rolling(*maximum)
    place = maximum[1]
    for name in [*reversed(inner), nest.scores]:
        if place not in s.loops_of(name):
            s.compute_at(name, place)
    return place, inner


def _hold_sums(s: Schedule, nest: _Nest, home: str, place: str, across: int) -> None:
    """What rolls on from block to block of columns: factors per block, maxima and sums per tile of
    rows; the sums of the second product are loaded into registers and stored again per block."""
    values = s.block(nest.values)[0].body.buffer
    inside = s.loops_of(nest.values, place)
    block, path = s.block(nest.values)
    (k,) = [
        x.var.name
        for x in analysis.reduce_loops(block, analysis.loops_in(path))
        if x.var.name in inside
    ]
    lane = _loop_of(block, nest.lane, inside)
    v_o, v_i = s.split(lane, across)
    s.reorder(v_o, k, *[n for n in inside if n not in (k, lane)], v_i)
    for b in [b.name for b in analysis.writers(s.func, values) if b.name != nest.values]:
        _, v = s.split(s.loops_of(b)[-1], across)
        s.mark(v, VECTOR)
    for buffer in [b.name for b in s.func.buffers if b.scope is Scope.GLOBAL]:
        for at in (place, home):
            loop, _ = s.loop(at)
            users = [
                b
                for b in analysis.blocks(s.func)
                if buffer in {x.name for x in (*_read_by(b), b.body.buffer)}
            ]
            if users and all(analysis.contains(loop, b) for b in users):
                s.stage(buffer, at, Scope.LOCAL)
                break
    # What is left are scalars of rows.
    for name in [b.name for b in analysis.blocks(s.loop(home)[0])]:
        around = analysis.loops_in(s.block(name)[1])
        below = around[next(k for k, x in enumerate(around) if x.var.name == home) + 1 :]
        rows = [x for x in below if x.var.name != place]
        if len(rows) == 1 and rows[0].kind is SERIAL:
            s.mark(rows[0].var.name, UNROLL)
    _in_registers(s, nest.values, s.block(nest.values)[0].body.buffer.name, v_o)


def _vector_width(s: Schedule, loop: str, width: int, divided: bool) -> int:
    """The width of the second product's tile: no tail if that can be had, and none at all where it
    would reach the next matrix."""
    extent = const_int(s.loop(loop)[0].extent)
    lanes = s.target.vector_bytes // 4
    if extent is None:
        return width
    for count in range(width // lanes, 0, -1):
        if extent % (count * lanes) == 0:
            return count * lanes
    return next(n for n in range(width, 0, -1) if extent % n == 0) if divided else width


def _loops_of_last(s: Schedule, nest: _Nest) -> tuple[list[str], str | None, str]:
    """(outer loops, row loop, vector loop) of the last block. Where it reads the product at i // n
    and i % n (rows of several matrices side by side), its loop over i is split."""
    split: dict[tuple[str, int], tuple[str, str]] = {}

    def loop_of(at: _Coordinate) -> str:
        name, op, n = at
        if not op:
            return name
        if (name, n) not in split:
            split[name, n] = s.split(name, n)
        return split[name, n][0 if op == "floordiv" else 1]

    outer, row, vector = nest.loops
    vector_loop = loop_of(vector)
    return [loop_of(x) for x in outer], None if row is None else loop_of(row), vector_loop


def _pack(s: Schedule, name: str, lane: Expr, width: int, at: str | None, rows: int) -> str | None:
    """Panels [blocks of lanes][depth][width] of the operand of a product that has the iterator
    `lane`, so that the product reads it as one stream. The packed buffer; None: as it is."""
    block, _ = s.block(name)
    loads = analysis.product_loads(block)
    assert loads is not None
    load = next(x for x in loads if lane in _vars(x))
    buffer = load.buffer
    reduced = {i.var for i in block.iters if i.reduce}
    axes = [k for k, i in enumerate(load.indices) if lane in free_vars(i)]
    depth = [k for k, i in enumerate(load.indices) if free_vars(i) & reduced]
    readers = [b for b in analysis.blocks(s.func) if buffer in _read_by(b)]
    if len(axes) != 1 or axes[0] in depth or buffer not in s.func.params or len(readers) > 1:
        return None
    arith = analysis.arith_of(s.func)
    if analysis.strides(buffer, load.indices, lane, arith) == 1 and rows < WORTH_A_COPY:
        return None
    (axis,) = axes
    start = arith.simplify(load.indices[axis] - lane)
    if at is None and arith.simplify(start % width) is not ZERO:
        return None  # panels of the whole operand might not begin where its parts do
    others = [k for k in range(len(load.indices)) if k != axis and k not in depth]
    parts = [
        *[[k, 1, 0] for k in others],
        [axis, width, 0],
        *[[k, 1, 0] for k in depth],
        [axis, 1, width],
    ]
    return s.stage(buffer.name, at, Scope.GLOBAL if at is None else Scope.LOCAL, parts)


def _fill_panels(s: Schedule, name: str, below: str | None) -> None:
    """Vectors along the source's memory: loads are contiguous, a block of panels fits in cache."""
    block, _ = s.block(name)
    names = s.loops_of(name, below)
    layout = block.body.buffer.layout
    assert layout is not None
    packed, width = next((axis, modulus) for axis, _, modulus in layout.splits() if modulus)
    value = block.iters[packed].value
    column = str(value)
    if column not in names or column == names[-1]:
        elementwise.one_block(s, name, parallel=below is None, below=below)
        return
    lanes = s.target.vector_bytes // 4
    j_o, j_i = s.split(column, width, "mask")
    c_o, c_i = s.split(names[-1], lanes, "mask")
    outer = [n for n in names[:-1] if n != column]
    s.reorder(*outer, j_o, c_o, j_i, c_i)
    s.mark(c_i, VECTOR)
    if below is None:
        elementwise.threads_over(s, [*outer, j_o, c_o], name)


def _tile_of_scores(s: Schedule, nest: _Nest, home: str, width: int) -> tuple[str, str]:
    """One register tile of scores: all rows and `width` columns. The loop around it, its init."""
    block, path = s.block(nest.scores)
    inside = s.loops_of(nest.scores, home)
    column = _loop_of(block, block.body.indices[nest.column], inside)
    depth = [x.var.name for x in analysis.reduce_loops(block, analysis.loops_in(path))]
    rows = [n for n in inside if n != column and n not in depth]
    j_o, j_i = s.split(column, width, "mask")
    s.reorder(j_o, *depth, *rows, j_i)
    return j_o, s.decompose_reduction(nest.scores, depth[0])


def _loop_of(block: Block, var: Expr, inside: list[str]) -> str:
    """The loop, of those named, that moves an iterator."""
    value = next(i.value for i in block.iters if i.var is var)
    return next(n for n in reversed(inside) if Var(n) in free_vars(value))


def _cut_columns(s: Schedule, name: str, column: int, home: str, width: int) -> _Cut | None:
    """Cuts the columns of a block between the products into vectors, all rows of a tile at once. A
    reduction keeps a vector of partial results per row, which are then combined for all rows
    together. None: the block has no columns."""
    block, path = s.block(name)
    inside = s.loops_of(name, home)
    reducing = [x.var.name for x in analysis.reduce_loops(block, analysis.loops_in(path))]
    if reducing:
        (loop,) = reducing
    elif any(i.var is block.body.indices[column] for i in block.iters):
        loop = _loop_of(block, block.body.indices[column], inside)
    else:
        return None
    rows = [n for n in inside if n != loop]
    j_o, j_i = s.split(loop, width, "mask")
    s.reorder(j_o, *rows, j_i)
    if not reducing:
        return _Cut(j_o)
    partial, buffer = s.rfactor(name, j_i)
    start = s.decompose_reduction(partial, j_o)
    s.decompose_reduction(name, s.loops_of(name)[-1])
    return _Cut(j_o, buffer, partial, start)


def _mark_columns(s: Schedule, name: str, home: str, cut: _Cut) -> None:
    """Vectors and unrolled rows for a block that `_cut_columns` has cut."""
    if not cut.buffer:
        elementwise.vector_tile(s, name, cut.loop)
        return
    elementwise.vector_tile(s, cut.partial, cut.loop)
    elementwise.vector_tile(s, cut.start, home)
    elementwise.vector_tile(s, name, home)


def _in_registers(
    s: Schedule, name: str, buffer: str, at: str, first: str = "", layout: IndexMap | None = None
) -> None:
    """A product accumulates in registers below `at`, its innermost reduction loop repeated."""
    staged = s.stage(buffer, at, Scope.REGISTER, layout)
    block, path = s.block(name)
    inside = s.loops_of(name, at)
    depth = [x.var.name for x in analysis.reduce_loops(block, analysis.loops_in(path))][-1]
    extent = const_int(s.loop(depth)[0].extent)
    around = analysis.spatial_loops(block, analysis.loops_in(path))
    tile = [x.var.name for x in around if x.var.name in inside]
    if extent is not None and extent % UNROLLED == 0:
        _, part = s.split(depth, UNROLLED)
        s.mark(part, UNROLL)
    for n in tile[:-1]:
        s.mark(n, UNROLL)
    s.mark(tile[-1], VECTOR)
    elementwise.around_tile(s, first, staged, at)
