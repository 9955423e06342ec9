"""Convolutions whose input is prepared (padded) block by block of lines of the result.

    pad = ...  # all of it            parallel lines_o:
    parallel ..:                ->        for k_o:
        r = sum of pad * w                    pad = ...  # what these lines read
                                              r += sum of pad * w

What a block of lines reads of some channels stays in a core's own cache; neighbouring blocks both
prepare the lines between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from minicompiler.ir.expr import Expr, Var, const_int, free_vars
from minicompiler.ir.tir import Scope

from . import analysis, elementwise, shares
from .panels import axis_of, block_of

if TYPE_CHECKING:
    from .contraction import Nest
    from .schedule import Schedule

Part = tuple[int, int] | None
_COPY, _NEAR_COPY = 0.9, 0.5  # cycles to copy an element to memory, and to a core's own cache
_WORTH = 0.01  # of the time, at least


def prepared_by(s: Schedule, nest: Nest) -> str | None:
    """The block that computes what the windows of a convolution read, element by element. Pixels
    have to be vectors of channels: those of short lines in row-major order are not copied twice."""
    buffer = nest.broad.buffer
    writers = analysis.writers(s.func, buffer)
    blocked = any(block_of(buffer.layout, k) > 1 for k in range(len(buffer.shape)))
    if buffer.scope is not Scope.GLOBAL or len(writers) != 1 or not blocked:
        return None
    # Of several groups a part of each one's channels would be needed, which do not lie together.
    grouped = any(nest.vector.var in free_vars(i) for i in nest.broad.indices)
    if len(nest.reduce) < 2 or grouped:
        return None
    return None if analysis.is_reduction(writers[0]) else writers[0].name


def lines_of_block(
    s: Schedule, nest: Nest, rows: int, blocks: int, part_of: Callable[[int], Part]
) -> int | None:
    """How many lines of the result make one block; None: the input is prepared as a whole.

    rows: of a register tile. blocks: of the outermost reduction loop. part_of: how the reduction is
    cut for a number of rows (see contraction.py).
    """
    if len(nest.rows) < 2:
        return None
    *more, line_iter, pixel = nest.rows
    if any(axis_of(nest.broad, i) is None for i in more):
        return None  # windows over planes: each would be prepared several times
    extents = {i.var: const_int(i.extent) for i in (line_iter, pixel, *nest.reduce, nest.vector)}
    if None in extents.values():
        return None
    known: dict[Expr, int] = {v: n for v, n in extents.items() if n is not None}
    line, pixels = line_iter.var, known[pixel.var]
    high = known[line]
    images = math.prod(const_int(i.extent) or 1 for i in (*nest.outer, *more))
    depth = math.prod(known[i.var] for i in nest.reduce)
    products = 2 * s.target.vector_bytes // 4  # in a cycle

    def work(lines: int) -> float:
        """Cycles that the tiles of some lines take, which may reach beyond the last one."""
        return -(-lines * pixels // rows) * rows * known[nest.vector.var] * depth / products

    whole = _elements(s, nest, known)
    if whole is None:
        return None
    best, least = None, (work(high) + _COPY * whole) * (1 - _WORTH)
    for lines in (n for n in range(1, high) if high % n == 0):
        count = high // lines
        every = count * images
        if every < 2 * s.target.cores or shares.idle(every, s.target.cores) > shares.MOST_IDLE:
            continue
        part = part_of(lines * pixels)
        channels = known[nest.reduce[0].var] * (part[1] if part else blocks) // blocks
        held = _elements(s, nest, {**known, line: lines, nest.reduce[0].var: channels})
        read = _elements(s, nest, {**known, line: lines})
        assert held is not None and read is not None
        time = count * (work(lines) + _NEAR_COPY * read)
        if 4 * nest.broad.buffer.dtype.bytes * held <= s.target.caches[1] and time < least:
            best, least = lines, time
    return best


def _elements(s: Schedule, nest: Nest, extents: dict[Expr, int]) -> int | None:
    """Elements of the prepared operand that iterators with these extents read; None where indices
    are not linear in them."""
    arith = analysis.arith_of(s.func)
    count = 1
    for index in nest.broad.indices:
        reach = 1
        for atoms, factor in arith.poly(index).items():
            moving = [a for a in atoms if isinstance(a, Var) and a in extents]
            if moving and (len(atoms) > 1 or factor < 0):
                return None
            reach += sum(factor * (extents[a] - 1) for a in moving)
        count *= reach
    return count


def prepare(s: Schedule, name: str, at: str) -> None:
    """Moves the preparing block into the iterations of a loop, whose thread keeps what it makes."""
    s.compute_at(name, at)
    elementwise.one_block(s, name, parallel=False, below=at)
    buffer = s.block(name)[0].body.buffer
    s.stage(buffer.name, at, Scope.LOCAL, buffer.layout)
