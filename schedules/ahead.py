"""What rules for memory-bound work ask for before it is needed (primitive `prefetch`).

    for i_o: vector i_i: r[i] = exp(x[i])   ->   for i_o: prefetch x[i_o*32] + 512; vector i_i: ...

The hardware's own prefetcher ends with each page, cannot know which row comes next, and does not go
far enough where each element takes a while.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from minicompiler.ir.expr import Binary, Dim, Expr, const_int, free_vars, substitute
from minicompiler.ir.tir import VECTOR, Buffer
from minicompiler.target import LINE_BYTES

from . import analysis, hints

if TYPE_CHECKING:
    from .schedule import Schedule

SOON = 2048  # bytes until what is read next, while one pass goes through memory
NEXT = 8192  # bytes until the next row, at least
LINES = 16  # that an iteration asks for, at most


def fetch_soon(s: Schedule, name: str) -> None:
    """Each iteration of the innermost loop around the vectors of a block asks for what the next
    ones read of large operands."""
    for buffer in {x.buffer: None for x in analysis.operand_loads(s.block(name)[0])}:
        steps = _steps(s, name, buffer, [_loop(s, name)])
        if steps:
            _fetch(s, name, buffer, SOON, steps[0])


def fetch_rows(s: Schedule, top: str, most: int) -> None:
    """The first of the passes over a row, an iteration of `top`, asks for what it reads next, the
    last one for what a row ahead reads, where that is at most so many bytes: the memory is idle
    from when a row is in the caches until the next one begins. Rows whose length is not known are
    taken for neighbours in memory."""
    for buffer in s.func.params:
        readers = [
            b.name
            for b in analysis.blocks(s.loop(top)[0])
            if any(x.buffer is buffer for x in analysis.operand_loads(b))
        ]
        if not readers:
            continue
        row, step = _steps(s, readers[-1], buffer, [top, _loop(s, readers[-1])]) or (0, 0)
        if row is None or 0 < row <= most:
            distance = NEXT if row is None else -(-NEXT // row) * row
            _fetch(s, readers[-1], buffer, distance, step)
            if len(readers) > 1:
                first = _steps(s, readers[0], buffer, [_loop(s, readers[0])])
                _fetch(s, readers[0], buffer, SOON, first[0] if first else 0)


def _loop(s: Schedule, name: str) -> str:
    """The innermost loop around the vectors of a block."""
    return next(n for n in reversed(s.loops_of(name)) if s.loop(n)[0].kind is not VECTOR)


def _steps(s: Schedule, name: str, buffer: Buffer, loops: list[str]) -> list[int | None]:
    """The bytes from one iteration of each loop to the next one in what a block reads of a large
    buffer, None where they vary; no list where it reads more than one place, or little."""
    block, _ = s.block(name)
    near = s.target.caches[1]
    places = {x.indices for x in analysis.operand_loads(block) if x.buffer is buffer}
    if len(places) != 1 or math.prod(const_int(n) or near for n in buffer.shape) < near // 2:
        return []
    arith, values = analysis.arith_of(s.func), analysis.values_of(block)
    at = tuple(_unclamped(substitute(i, values)) for i in places.pop())
    strides = [analysis.strides(buffer, at, s.loop(n)[0].var, arith) for n in loops]
    return [None if n is None else n * buffer.dtype.bytes for n in strides]


def _unclamped(index: Expr) -> Expr:
    """An index without the limit that keeps the excess lanes of a tail in memory."""
    clamped = type(index) is Binary and index.op == "min" and not _moves(index.b)
    return index.a if clamped else index  # type: ignore[attr-defined]


def _moves(e: Expr) -> bool:
    return any(not isinstance(v, Dim) for v in free_vars(e))


def _fetch(s: Schedule, name: str, buffer: Buffer, distance: int, step: int | None) -> None:
    """Not where other blocks in the loop read elsewhere, or data decides where."""
    loop = _loop(s, name)
    places = hints.starts(buffer, s.loop(loop)[0], analysis.arith_of(s.func))
    step = step or 0
    near = 0 < step <= LINES * LINE_BYTES
    if near and len(places) == 1 and hints.known_early(places[0]):
        lines = -(-step // LINE_BYTES)
        s.prefetch(buffer.name, loop, distance // buffer.dtype.bytes, lines=lines)
