"""What rules for memory-bound work write while the next row is computed (primitives `delay` and
`compute_with`).

    for i: (for k: m = max(m, x[i, k]); for k: s += e[k] = f(x[i, k], m); for k: r[i, k] = e[k] / s)

becomes, where rows are long and more than the caches hold,

    for i: (for k: m = max(m, x[i + 1, k])
            for k_o: (for k_i: r[i, k] = e[k] / s;  for k_i: s' += e[k] = f(x[i + 1, k], m)))

The memory takes a row about as fast as the processor computes one, so that each would wait for the
other.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from minicompiler.ir.expr import Call, const_int, walk
from minicompiler.ir.tir import SERIAL, Alloc, Seq

from . import analysis, streaming
from .loops import kept_apart
from .pipelining import not_delayed

if TYPE_CHECKING:
    from .schedule import Schedule

ROWS = 32  # of which the first is computed and the last is written by itself
SHARES = 4  # of the rows per thread, at least
PIECE = 1024  # bytes written at a time: rows may begin anywhere in a line, and its parts must meet


def write_late(s: Schedule, last: str, top: str) -> tuple[str, str]:
    """Block `last` in the loop `top` over rows writes a row while the next one is computed, if that
    pays. Returns the loop whose iterations threads share and the one over rows (or `top` twice)."""
    rows = const_int(s.loop(top)[0].extent) or 1
    each = min(ROWS, rows // (SHARES * s.target.cores))
    if each < 2 or not streaming.is_large(s, last) or _written(s, last, top) < _long(s):
        return top, top
    late = next((n for n in _passes(s, last, top) if not not_delayed(s, last, top, n)), None)
    if late is None or not _computes(s, late):
        return top, top
    beside = next(analysis.blocks(s.loop(late)[0])).name
    shared, row = s.split(top, each, "guard")
    s.delay(last, row, late)
    _side_by_side(s, row, last, beside)
    return shared, row


def _long(s: Schedule) -> int:
    """The bytes of a row that do not fit what waits on its way to memory."""
    return s.target.caches[0] // 4


def _passes(s: Schedule, last: str, top: str) -> list[str]:
    """The loops that go through a row as block `last` does, the latest first."""
    own, _ = s.loop(s.loops_of(last, top)[0])
    loop, around = s.loop(top)
    found: list[str] = []
    for x in analysis.loops(loop.body):
        between = s.loop(x.var.name)[1][len(around) + 1 :]
        alone = all(isinstance(y, Alloc | Seq) for y in between)
        if alone and x is not own and x.kind is SERIAL and x.extent is own.extent:
            found.insert(0, x.var.name)
    return found


def _computes(s: Schedule, loop: str) -> bool:
    """True for a pass that takes longer than reading a row that is in the caches."""
    values = [b.body.value for b in analysis.blocks(s.loop(loop)[0])]
    return any(isinstance(e, Call) for v in values for e in walk(v))


def _side_by_side(s: Schedule, row: str, last: str, beside: str) -> None:
    """Runs the loops of two blocks together, down to pieces of PIECE bytes."""
    for depth in range(min(len(s.loops_of(n, row)) for n in (last, beside))):
        first, second = (s.loops_of(n, row)[depth] for n in (last, beside))
        written = _written(s, last, first)
        if written < PIECE:
            first, second = (s.split(n, PIECE // written, "guard")[0] for n in (first, second))
        if kept_apart(s, second, first):
            return
        s.compute_with(second, first)
        if _written(s, last, s.loops_of(last, row)[depth]) <= PIECE:
            return


def _written(s: Schedule, last: str, loop: str) -> int:
    """The bytes that a block writes in one iteration of a loop."""
    inside = s.loops_of(last, loop)
    elements = math.prod(const_int(s.loop(n)[0].extent) or 1 for n in inside)
    return elements * s.block(last)[0].body.buffer.dtype.bytes
