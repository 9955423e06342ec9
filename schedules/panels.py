"""Packing the operands of a contraction: copies of what its register tiles read, in the order in
which they read it.

    [.., k, n]  ->  [.., n // width, k, n % width]       panels of the operand that is a vector

A panel is read from the first to the last line by all tiles beside it. `way_of` decides when it is
made: while compiling or in a phase of its own, inside of the loops, or never.
"""

from __future__ import annotations

import enum
import math
from typing import TYPE_CHECKING

from minicompiler.ir.expr import Load, const_int, free_vars
from minicompiler.ir.layout import IndexMap
from minicompiler.ir.tir import VECTOR, Iter, Scope, Store
from minicompiler.target import LINE_BYTES

from . import analysis, elementwise
from .hints import MOST_LINES

if TYPE_CHECKING:
    from .contraction import Nest
    from .schedule import Schedule

_ROWS = 32  # of a matrix that are copied into panels together
_ROWS_AHEAD = 16  # that are fetched while one is copied


class Way(enum.Enum):
    """FIRST: all panels, before anything else (while compiling, if the operand is constant);
    NEAR: a group of panels for the tiles that come next, in memory of the thread;
    STREAM: never, rows are read side by side once or twice; IN_PLACE: never."""

    FIRST = "first"
    NEAR = "near"
    STREAM = "stream"
    IN_PLACE = "in place"


def block_of(buffer_layout: IndexMap | None, axis: int | None) -> int:
    """The block size of a logical axis in a layout (1: none)."""
    if buffer_layout is None:
        return 1
    return max([m for a, _, m in buffer_layout.splits() if a == axis], default=1)


def axis_of(access: Load | Store, it: Iter) -> int | None:
    """The axis along which an iterator walks by itself, if there is one."""
    return next((k for k, i in enumerate(access.indices) if i is it.var), None)


def rows_conflict(s: Schedule, nest: Nest) -> bool:
    """True when the rows of a tile lie a multiple of 4 KB apart: they would fight for the same
    lines of the first-level cache each time a tile walks along them. Worth a copy if that happens
    for every panel."""
    load = nest.broad
    if (
        load.buffer.scope is not Scope.PARAM
        or load.buffer.constant
        or load.buffer.layout is not None
    ):
        return False
    if (
        len(nest.reduce) != 1
        or len(nest.rows) != 1
        or any(nest.vector.var in free_vars(i) for i in load.indices)
    ):
        return False
    row = const_int(nest.rows[-1].extent)
    reuse = const_int(nest.vector.extent)
    if (
        (row is not None and row < 16)
        or reuse is None
        or reuse < 256
        or analysis.writers(s.func, load.buffer)
    ):
        return False
    arith = analysis.arith_of(s.func)
    wide = nest.wide
    if (
        not wide.buffer.constant
        and analysis.strides(wide.buffer, wide.indices, nest.vector.var, arith) == 1
    ):
        return False  # tiles of rows stay near while a group of panels goes by
    depth = analysis.strides(load.buffer, load.indices, nest.reduce[0].var, arith)
    step = analysis.strides(load.buffer, load.indices, nest.rows[-1].var, arith)
    return depth == 1 and step is not None and step * load.buffer.dtype.bytes % 4096 == 0


def block_rows(s: Schedule, nest: Nest, rows: int) -> None:
    """Copies the broadcast operand tile by tile with the reduction axis in blocks of 16, so that
    the rows of a tile lie side by side."""
    load = nest.broad
    axis = axis_of(load, nest.reduce[0])
    row = axis_of(load, nest.rows[-1])
    assert axis is not None and row is not None
    others = [[k, 1, 0] for k in range(len(load.indices)) if k not in (axis, row)]
    parts = [*others, [row, rows, 0], [axis, 16, 0], [row, 1, rows], [axis, 1, 16]]
    s.stage(load.buffer.name, None, Scope.GLOBAL, parts)


def way_of(
    s: Schedule, nest: Nest, rows: int, row_extent: int | None, depth: list[tuple[int, int]]
) -> Way:
    """How the operand that is a vector gets to the tiles, which have so many rows each. `depth`:
    its reduced axes."""
    load = nest.wide
    buffer = load.buffer
    axis = axis_of(load, nest.vector)
    if axis is None or buffer.scope is not Scope.PARAM or analysis.writers(s.func, buffer):
        return Way.IN_PLACE
    reduce = {i.var for i in nest.reduce}
    known = {axis, *[a for a, _ in depth]}
    if any(free_vars(i) & reduce for k, i in enumerate(load.indices) if k not in known):
        return Way.IN_PLACE
    arith = analysis.arith_of(s.func)
    if buffer.constant or analysis.strides(buffer, load.indices, nest.vector.var, arith) != 1:
        return Way.FIRST
    reuse = row_extent or 64
    plain = len(nest.reduce) == 1 and len(depth) > 0 and buffer.layout is None
    if not plain:
        return Way.IN_PLACE if reuse < 64 else Way.FIRST
    if nest.rows and reuse > 2 * rows:
        return Way.NEAR
    size = (const_int(nest.vector.extent) or 1024) * (const_int(nest.reduce[0].extent) or 1024)
    beyond = size * buffer.dtype.bytes > s.target.caches[0]
    return Way.STREAM if beyond and not nest.outer else Way.IN_PLACE


def pack_first(s: Schedule, nest: Nest, width: int, depth: list[tuple[int, int]]) -> str:
    """Stages the wide operand as panels in a phase of its own. Returns the name of the copy."""
    axis = axis_of(nest.wide, nest.vector)
    assert axis is not None
    used = {axis, *[a for a, _ in depth]}
    parts = [[k, 1, 0] for k in range(len(nest.wide.indices)) if k not in used]
    parts.append([axis, width, 0])
    for a, size in depth:
        parts.append([a, 1, 0] if size == 0 else [a, size, 0] if size > 0 else [a, 1, -size])
    parts.append([axis, 1, width])
    return s.stage(nest.wide.buffer.name, None, Scope.GLOBAL, parts)


def from_near(s: Schedule, nest: Nest) -> bool:
    """True when the wide operand is not much larger than the second-level cache."""
    extents = [const_int(x.extent) or 1024 for x in (nest.vector, nest.reduce[0])]
    return nest.wide.buffer.dtype.bytes * math.prod(extents) * 2 <= 3 * s.target.caches[1]


def from_memory(s: Schedule, nest: Nest) -> bool:
    """True when much of the wide operand is not in the last-level cache, which other data shares,
    from one call to the next."""
    extents = [const_int(x.extent) or 1024 for x in (nest.vector, nest.reduce[0])]
    return nest.wide.buffer.dtype.bytes * math.prod(extents) > s.target.caches[2] // 4


def stage_near(s: Schedule, nest: Nest, at: str, width: int) -> str:
    """The part of the wide operand that an iteration of loop `at` reads gets a copy, as panels.
    Returns the name of the copy."""
    load = nest.wide
    axis, deep = axis_of(load, nest.vector), axis_of(load, nest.reduce[0])
    assert axis is not None and deep is not None
    others = [[k, 1, 0] for k in range(len(load.indices)) if k not in (axis, deep)]
    parts = [*others, [axis, width, 0], [deep, 1, 0], [axis, 1, width]]
    return s.stage(load.buffer.name, at, Scope.LOCAL, parts)


def pack_near(s: Schedule, nest: Nest, packed: str, rows: str, depth: str, width: int) -> None:
    """Fills the copy. A matrix that comes from near is copied by the first tiles of loop `rows` on
    their way through `depth`: what they load for their products they store as well. Of one from
    far, long pieces of rows are copied before the tiles, and fetched ahead."""
    load, copy = nest.wide, f"{packed}_in"
    axis, deep = axis_of(load, nest.vector), axis_of(load, nest.reduce[0])
    if from_near(s, nest):
        s.compute_at(copy, depth, rows)
        elementwise.vector_tile(s, copy, depth)
        return
    column, row = (next(n for n in s.loops_of(copy) if n == f"{packed}_{k}") for k in (axis, deep))
    piece = const_int(s.loop(column)[0].extent)
    panel, lanes = s.split(column, width, "perfect")
    s.reorder(row, panel, lanes)
    s.mark(lanes, VECTOR)
    arith = analysis.arith_of(s.func)
    apart = analysis.strides(load.buffer, load.indices, nest.reduce[0].var, arith)
    lines = -(-(piece or 0) * load.buffer.dtype.bytes // LINE_BYTES)
    if apart is not None and 0 < lines <= MOST_LINES:
        s.prefetch(load.buffer.name, row, _ROWS_AHEAD * apart, None, lines)


def copy_panels(s: Schedule, name: str) -> bool:
    """Schedules the copy of a matrix into panels: a few of its rows go to all panels before the
    next ones, since a panel's part of a row is one cache line, far from that of the next row.
    False, with nothing changed, for any other copy."""
    block, _ = s.block(name)
    (load,) = analysis.operand_loads(block) or (None,)
    lanes = s.loops_of(name)
    if load is None or load.buffer.layout is not None or len(lanes) != 2:
        return False
    panels, rows = block.iters[-1], block.iters[0]
    arith = analysis.arith_of(s.func)
    along = analysis.strides(load.buffer, load.indices, panels.var, arith)
    apart = analysis.strides(load.buffer, load.indices, rows.var, arith)
    width = block_of(block.body.buffer.layout, len(block.iters) - 1)
    count = const_int(rows.extent)
    columns = const_int(panels.extent)
    if along != 1 or apart is None or width < 2 or columns is None or columns % width:
        return False
    if count is not None and count < 2 * _ROWS:
        return False
    order = elementwise.memory_order(s, name)
    panel, depth, inner, vector = order[0], order[1], order[2:-1], order[-1]
    far, near = s.split(depth, max(1, _ROWS // (16 if inner else 1)), "guard")
    s.reorder(far, panel, near, *inner, vector)
    s.mark(vector, VECTOR)
    elementwise.threads_over(s, [far, panel], name)
    return True
