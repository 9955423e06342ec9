"""Loops whose last iteration is not like the others (primitive `cut`).

    for k_o in 32: vector k_i in 32: m[k_i] = max(m[k_i], select(k_o*32 + k_i < 1000, x[..], -inf))

becomes the first 31 iterations, which have nothing to ask, and one that asks for each lane.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from minicompiler.ir.arith import knowing
from minicompiler.ir.expr import ONE, ZERO, Expr, const_int, free_vars, substitute, wrap
from minicompiler.ir.tir import SERIAL, UNROLL, VECTOR, For

from . import analysis

if TYPE_CHECKING:
    from .schedule import Schedule

WORTH_IT = 4  # iterations, of which one has code of its own
LONG = 32  # iterations, of which one asks without need in all pieces of a line but the last


def at_end(s: Schedule, loop: str, lanes: int) -> str:
    """The tail of a split into vectors of which the last one ends with a line, if that may have
    room for one; not where there may be no last one, so that all of them had to ask."""
    extent, arith = s.loop(loop)[0].extent, analysis.arith_of(s.func)
    short = arith.prove(wrap(lanes) <= extent) is False
    return "mask" if short or not arith.holds(extent >= ONE) else "overlap"


def apart(s: Schedule) -> None:
    """Gives the last iteration of each loop around vectors a nest of its own, where it is the only
    one that must ask which elements exist."""
    for loop in list(analysis.loops(s.func)):
        inner = list(analysis.loops(loop.body))
        around_vectors = bool(inner) and all(x.kind in (VECTOR, UNROLL) for x in inner)
        if loop.kind is SERIAL and around_vectors and _asks_last(s, loop):
            s.cut(loop.var.name, -1)


def _asks_last(s: Schedule, loop: For) -> bool:
    """True where conditions about the position in a loop hold but for its last iteration."""
    if (const_int(loop.extent) or WORTH_IT) < WORTH_IT:
        return False
    arith = analysis.arith_of(s.func)
    if not arith.holds(loop.extent >= ONE):
        return False
    own: set[Expr] = {loop.var, *(x.var for x in analysis.loops(loop.body))}
    most = arith.interval(loop.extent)[1]
    if most is None or most >= LONG:  # of a piece of a line, which may be the last one
        own |= free_vars(loop.extent)
    elsewhere = arith.ranges.keys() - own
    asked = [
        c for c in _conditions(loop) if arith.prove(c) is None and not free_vars(c) & elsewhere
    ]
    others = knowing({**arith.ranges, loop.var: (ZERO, loop.extent - 2)})
    return any(others.prove(c) for c in asked)


def _conditions(loop: For) -> list[Expr]:
    """What blocks in a loop compare its variable with."""
    found: dict[Expr, None] = {}
    for block in analysis.blocks(loop):
        values = analysis.values_of(block)
        for c in (*analysis.choices(block.body.value), *analysis.where_parts(block)):
            found[substitute(c, values)] = None
    return [c for c in found if loop.var in free_vars(c)]
