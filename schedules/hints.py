"""The primitive `prefetch`: memory that is read soon is asked for while something else is computed.

    for t in 4:                          for t in 4:
        for k in 128:             ->         for k in 128:
            ... B[k*64 + 0..63]                  prefetch B[k*64] + (8192 + t*16)
                                                 ... B[k*64 + 0..63]

A hint changes no value. It pays where a panel of an operand is read several times in a row and the
next panel comes from far: each pass over this panel fetches its part of the next one. Where the
number of passes is not known while compiling, it is asked at run time: few have to fetch more each,
and a single one asks for lines a little ahead, as the hardware's prefetcher does up to the end of a
page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from minicompiler.ir.arith import Arith
from minicompiler.ir.expr import (
    ONE,
    ZERO,
    Const,
    Expr,
    Load,
    const_int,
    eq,
    free_vars,
    maximum,
    minimum,
    substitute,
    walk,
)
from minicompiler.ir.tir import (
    VECTOR,
    Buffer,
    For,
    If,
    Prefetch,
    PrimFunc,
    Scope,
    Seq,
    Stmt,
    seq,
    statements,
)
from minicompiler.target import LINE_BYTES

from . import analysis

if TYPE_CHECKING:
    from .schedule import Schedule

MOST_LINES = 64
NEAR_BYTES = 1024  # ahead where lines are read once


def prefetch(
    s: Schedule,
    name: str,
    loop_name: str,
    ahead: int,
    turns_name: str | None,
    count: int | None,
) -> None:
    """See the module text. ahead: elements in memory order. turns: a loop around `loop` in whose
    iterations `loop` reads the same; each asks for its part of the lines. count: lines that an
    iteration reads, if they are not what lies between it and the next."""
    buffer = s.buffer(name)
    loop, path = s.loop(loop_name)
    if buffer.scope not in (Scope.PARAM, Scope.GLOBAL):
        s.refuse(f"{name} has scope {buffer.scope.value}: it is near already", loop)
    if loop.kind is VECTOR:
        s.refuse(f"{loop_name} is a vector loop: its iterations are one", loop)
    arith = analysis.arith_of(s.func)
    place = _place(s, buffer, loop, arith)
    lines = count or _lines_between(s, place, loop, arith)
    if lines > MOST_LINES:
        s.refuse(f"an iteration of {loop_name} moves on by {lines} cache lines of {name}", loop)
    place = _inside(place, arith)
    if turns_name is None:
        hint = _all_lines(place, ahead, lines)
    else:
        turns, _ = s.loop(turns_name)
        if turns not in path:
            s.refuse(f"{turns_name} is not a loop around {loop_name}", loop)
        if any(turns.var in free_vars(i) for i in place.indices):
            s.refuse(f"iterations of {turns_name} read different parts of {name}", turns)

        def in_turns(passes: int) -> Stmt:
            return _some_lines(place, ahead, lines, turns.var, -(-lines // passes), arith)

        passes = const_int(turns.extent)
        if passes is None:
            alone = _all_lines(place, NEAR_BYTES // buffer.dtype.bytes, lines)
            few = If(eq(turns.extent, ONE), alone, in_turns(2))
            hint = If(turns.extent < max(lines, 2), few, in_turns(lines))
        else:
            hint = in_turns(passes)
    s.swap(loop, loop.with_(body=seq([hint, loop.body])))


def _all_lines(place: Load, ahead: int, lines: int) -> Stmt:
    line = LINE_BYTES // place.buffer.dtype.bytes
    return seq([Prefetch(place, Const(ahead + k * line)) for k in range(lines)])


def _some_lines(place: Load, ahead: int, lines: int, turn: Expr, each: int, arith: Arith) -> Stmt:
    """So many of the lines in each turn."""
    line = LINE_BYTES // place.buffer.dtype.bytes
    mine = [arith.simplify((turn * each + k) % lines * line + ahead) for k in range(each)]
    return seq([Prefetch(place, at) for at in mine])


def prefetch_next(s: Schedule, name: str, loop_name: str, around_name: str) -> None:
    """What the next iteration of `around` reads of a buffer is asked for a few lines at a time by
    the iterations of `loop` inside of it, wherever in `around` the buffer is read. Iterations of
    loops between them whose number is not known ask for the same."""
    buffer = s.buffer(name)
    loop, path = s.loop(loop_name)
    around, _ = s.loop(around_name)
    nest = analysis.loops_in((*path, loop))
    loops = nest[nest.index(around) + 1 :] if around in nest else []
    loops = [x for x in loops if const_int(x.extent) is not None]
    if not loops:
        s.refuse(f"{around_name} is not a loop around {loop_name} that repeats it often", loop)
    if buffer.scope not in (Scope.PARAM, Scope.GLOBAL):
        s.refuse(f"{name} has scope {buffer.scope.value}: it is near already", loop)
    arith = analysis.arith_of(s.func)
    place = _place(s, buffer, around, arith)
    lines = _lines_between(s, place, around, arith)
    line = LINE_BYTES // buffer.dtype.bytes
    turn, turns = cast(Expr, ZERO), 1
    for x in loops:
        if turns < lines:  # loops further in would only ask for the same once more
            extent = const_int(x.extent) or 1
            turn, turns = turn * extent + x.var, turns * extent
    each = -(-lines // turns)
    if each > MOST_LINES:
        s.refuse(f"an iteration of {loop_name} would fetch {each} cache lines of {name}", loop)
    place = _inside(place, arith)
    parts: list[Stmt] = [
        Prefetch(place, arith.simplify(turn * each * line + (lines + k) * line))
        for k in range(each)
    ]
    s.swap(loop, loop.with_(body=seq([*parts, loop.body])))


def starts(buffer: Buffer, loop: For, arith: Arith) -> list[Load]:
    """Where an iteration of a loop begins to read a buffer, each place once."""
    inner: dict[Expr, Expr] = {x.var: ZERO for x in analysis.loops(loop.body)}
    places: dict[tuple[Expr, ...], Load] = {}
    for block in analysis.blocks(loop.body):
        values = analysis.values_of(block)
        for load in analysis.operand_loads(block):
            if load.buffer is buffer:
                at = tuple(
                    arith.simplify(substitute(substitute(i, values), inner)) for i in load.indices
                )
                places[at] = Load(buffer, at)
    return list(places.values())


def known_early(place: Load) -> bool:
    """Whether a place does not depend on data."""
    return not any(type(e) is Load for i in place.indices for e in walk(i))


def _place(s: Schedule, buffer: Buffer, loop: For, arith: Arith) -> Load:
    places = starts(buffer, loop, arith)
    if len(places) != 1:
        s.refuse(
            f"{buffer.name} is read at {len(places)} places inside {loop.var}, not at one", loop
        )
    (place,) = places
    if not known_early(place):
        s.refuse(f"where {buffer.name} is read depends on what is read elsewhere", loop)
    return place


def _inside(place: Load, arith: Arith) -> Load:
    """The place, or the nearest one where it lies outside of an axis: in a masked iteration, or in
    the border of an image."""

    def one(i: Expr, n: Expr) -> Expr:
        i = i if arith.prove(i < n) is True else minimum(i, n - 1)
        return i if arith.prove(i >= ZERO) is True else maximum(i, ZERO)

    return Load(
        place.buffer,
        tuple(one(i, n) for i, n in zip(place.indices, place.buffer.shape, strict=True)),
    )


def _lines_between(s: Schedule, place: Load, loop: For, arith: Arith) -> int:
    """Cache lines from what one iteration reads to what the next one does."""
    stride = analysis.strides(place.buffer, place.indices, loop.var, arith)
    if not stride or stride < 0:
        s.refuse(f"iterations of {loop.var} do not walk forward through {place.buffer.name}", loop)
    return -(-stride * place.buffer.dtype.bytes // LINE_BYTES)


def mend(s: Schedule, before: PrimFunc) -> None:
    """After a step: removes the hints whose buffer is gone or no longer read, and keeps the others
    inside of their buffers where loops have got masked iterations. Phases that are as they were
    before the step have nothing to mend."""
    changed = [p for p in s.func.phases if p not in before.phases]
    if not any(isinstance(x, Prefetch) for p in changed for x in statements(p)):
        return
    read = {ld.buffer for b in analysis.blocks(s.func) for ld in analysis.operand_loads(b)}
    arith = analysis.arith_of(s.func)

    def one(x: Stmt) -> Stmt | None:
        if not isinstance(x, Prefetch):
            return None
        if x.place.buffer not in read:
            return Seq(())
        place = _inside(x.place, arith)
        return None if place.indices == x.place.indices else x.with_(place=place)

    s.edit(one)


__all__ = ["known_early", "mend", "prefetch", "prefetch_next", "starts"]
