"""Reductions that stand alone, by how they walk through memory: what is reduced to one number may
lie together (the last axis), apart (the first), or both.

    r[j] = sum over i, k of x[i, j, k]
      ->   for i: vectors of j, k: lines[j, k] += x[i, j, k];   r[j] = sum over k of lines[j, k]

Lines of memory are added up, and sums of several numbers of a line after that. Short lines stay in
registers, several of them side by side; long ones in first-level cache. A result of few numbers is
added up in parts, which threads share.
"""

from __future__ import annotations

import itertools
import math

from minicompiler.ir.expr import const_int
from minicompiler.ir.polynomials import Poly
from minicompiler.ir.tir import UNROLL, VECTOR, Block, Scope

from . import analysis, combining, elementwise
from .combining import ACCUMULATORS
from .schedule import Schedule

PART = 16384  # elements of a long reduction that are added up by themselves
FEW = 4  # times as many lines as there are side by side: below it is not worth their sum
UNKNOWN = 64  # iterations of a loop whose extent is known at run time only


def schedule(s: Schedule, name: str) -> bool:
    """Schedules a reduction in a nest of its own. False where the caller has to decompose it."""
    return _in_parts(s, name) or _by_lines(s, name) or combining.schedule_reduction(s, name)


def goes_by_lines(s: Schedule, name: str) -> bool:
    """Whether lines of memory are added up to make a reduction: of its nest with what follows, it
    is to be scheduled alone."""
    return _runs(s, name) is not None or _has_lines(s, name)


# ---- how a reduction walks through memory -------------------------------------------------------
def _walk(s: Schedule, name: str) -> list[tuple[str, bool]]:
    """The loops around a reduction in the order in which what is reduced lies in memory, each with
    whether it is reduced; none where they overlap (windows), or some are not known to move it."""
    block, path = s.block(name)
    around = analysis.loops_in(path)
    reducing = analysis.reduce_loops(block, around)
    accessed = [block.body.buffer, *(x.buffer for x in analysis.operand_loads(block))]
    if block.init is None or not reducing or any(b.layout is not None for b in accessed):
        return []
    _, *places = elementwise.offsets(block, analysis.arith_of(s.func))
    for place in places:
        slopes = [analysis.slope(place, x.var) for x in around]
        moves = [0 if m is None else _about(m) for m in slopes]
        if min(moves) > 0:
            order = sorted(zip(moves, around, strict=True), key=lambda m: -m[0])
            sizes = [(step, const_int(x.extent) or UNKNOWN) for step, x in order]
            if all(far >= near * n for (far, _), (near, n) in itertools.pairwise(sizes)):
                return [(x.var.name, x in reducing) for _, x in order]
    return []


def _about(size: Poly) -> int:
    """The value of a polynomial of sizes."""
    return sum(c * UNKNOWN ** len(m) for m, c in size.items())


def _runs(s: Schedule, name: str) -> tuple[list[str], list[str]] | None:
    """(loops, run) where what is reduced lies in short runs, and further apart as well: all loops
    in the order of memory, and the last ones, which run along it."""
    walk = _walk(s, name)
    run = [n for n, _ in itertools.takewhile(lambda x: x[1], reversed(walk))][::-1]
    rest = walk[: len(walk) - len(run)]
    size = math.prod(const_int(s.loop(n)[0].extent) or UNKNOWN for n in run)
    lanes = s.target.lanes(s.block(name)[0].body.buffer.dtype.bytes)
    apart = any(reduced for _, reduced in rest)
    return ([n for n, _ in walk], run) if run and apart and size < 2 * lanes else None


def _has_lines(s: Schedule, name: str) -> bool:
    """Whether what lies together is reduced to neighbours, as one line that is short, or of which
    no loop is long enough for vectors."""
    walk = _walk(s, name)
    line = [n for n, _ in itertools.takewhile(lambda x: not x[1], reversed(walk))][::-1]
    if not line or len(line) == len(walk):
        return False
    if not all(elementwise.as_one(s, name, a, b) for a, b in itertools.pairwise(line)):
        return False
    sizes = [const_int(s.loop(n)[0].extent) for n in line]
    summed, width = [n for n, reduced in walk if reduced], math.prod(n or UNKNOWN for n in sizes)
    lanes = s.target.lanes(s.block(name)[0].body.buffer.dtype.bytes)
    if None not in sizes and _side_by_side(s, name, summed[-1], line[-1], width):
        return True
    return (sizes[-1] or UNKNOWN) < ACCUMULATORS and width >= lanes


def _side_by_side(s: Schedule, name: str, row: str, line: str, width: int) -> int | None:
    """How many lines of so many numbers, one for each iteration of `row`, are added up side by side
    in registers; None for long ones. Where a line begins as the one before ends, vectors may begin
    in one and end in the next."""
    block, rows = s.block(name)[0], const_int(s.loop(row)[0].extent) or UNKNOWN
    lanes, room = s.target.lanes(block.body.buffer.dtype.bytes), s.target.registers * 3 // 4
    vectors = -(-width // lanes)
    if vectors > room:
        return None
    _, *places = elementwise.offsets(block, analysis.arith_of(s.func))
    moves = [[analysis.slope(p, s.loop(n)[0].var) for n in (row, line)] for p in places]
    dense = all(far == {(): width} and near == {(): 1} for far, near in moves)
    for n in range(1, room * lanes // width + 1) if dense else ():
        whole = n * width % lanes == 0
        if whole and n * width >= ACCUMULATORS * lanes and rows >= FEW * n:
            return n
    if width < lanes:
        return None
    several = -(-ACCUMULATORS // vectors)
    return several if rows >= FEW * several else 1


# ---- lines --------------------------------------------------------------------------------------
def _by_lines(s: Schedule, name: str) -> bool:
    found = _runs(s, name)
    if found is None:
        return _has_lines(s, name) and _add_lines(s, name, None)
    names, run = found
    reduced = {n for n, _ in filter(lambda x: x[1], _walk(s, name))}
    outer = [*itertools.takewhile(lambda n: n not in reduced, names)]
    if names != s.loops_of(name):
        s.reorder(*names)
    lines, buffer = s.rfactor(name, combining.joined(s, name, run)[-1])
    top = outer[-1] if outer else None
    if top is None:
        s.separate(name)
    else:
        s.stage(buffer, top, Scope.LOCAL)
    _add_lines(s, lines, top)
    combining.plain(s, name, top)
    elementwise.threads_over(s, outer, lines)
    return True


def _add_lines(s: Schedule, name: str, top: str | None) -> bool:
    """Adds up lines of memory, several side by side or piece by piece. top: the loop inside of
    which all is, if it is shared already."""
    order = combining.joined(s, name, elementwise.memory_order(s, name, top))
    block, path = s.block(name)
    reduce = [x.var.name for x in analysis.reduce_loops(block, analysis.loops_in(path))]
    reduce = combining.joined(s, name, reduce)
    *outer, line = order
    width = const_int(s.loop(line)[0].extent)
    count = None if width is None else _side_by_side(s, name, reduce[-1], line, width)
    if count is None:
        piece, line = s.split(line, _piece(s, block, width), "mask")
        outer.append(piece)
    s.reorder(*outer, *reduce, line)
    parts, home = name, outer[-1] if outer else top
    if count is not None and count > 1:
        _, k_i = s.split(reduce[-1], count, "mask")
        parts, buffer = s.rfactor(name, k_i, first=True)
        if home is not None:
            s.stage(buffer, home, Scope.LOCAL)
        rest, again = s.loops_of(name, home)
        _tile(s, name, [again], rest, unrolled=True)
        inner = s.loops_of(parts, home)
        reduce, line = inner[:-2], combining.joined(s, parts, inner[-2:])[-1]
    _tile(s, parts, reduce, line)
    if top is None:
        elementwise.threads_over(s, outer, parts)
    return True


def _piece(s: Schedule, block: Block, width: int | None) -> int:
    """The length of about equal pieces of a line that registers hold."""
    lanes, room = s.target.lanes(block.body.buffer.dtype.bytes), s.target.registers * 3 // 4
    vectors = room if width is None else -(-width // lanes)
    return -(-vectors // -(-vectors // room)) * lanes


def _tile(s: Schedule, name: str, reduce: list[str], line: str, unrolled: bool = False) -> None:
    """for k: registers += the vectors of line k. unrolled: the lines are written out."""
    lanes = s.target.lanes(s.block(name)[0].body.buffer.dtype.bytes)
    width = const_int(s.loop(line)[0].extent) or 1
    # What is the same register all the time may be a vector of any length.
    vectors, v = s.split(line, width if unrolled else lanes, "mask")
    count = const_int(s.loop(vectors)[0].extent) or 1
    once, inner = vectors, [v]
    if count > 1:
        once, vectors = s.split(vectors, count, "perfect")
        inner.insert(0, vectors)
    s.reorder(once, *reduce, *inner)
    init = s.decompose_reduction(name, reduce[0])
    s.mark(v, VECTOR)
    tile = s.stage(s.block(name)[0].body.buffer.name, once, Scope.REGISTER)
    for n in (*(reduce if unrolled else ()), *inner[:-1]):
        s.mark(n, UNROLL)
    elementwise.around_tile(s, init, tile, once)


# ---- parts --------------------------------------------------------------------------------------
def _in_parts(s: Schedule, name: str) -> bool:
    """sum over k   ->   for k_o: parts[k_o] = sum over k_i;   sum over k_o of parts[k_o]

    For long reductions to a number or a short line of them, so that threads can share them. The
    parts depend on the size of the input alone, so the sum does not depend on the threads."""
    block, path = s.block(name)
    around = analysis.loops_in(path)
    reducing = analysis.reduce_loops(block, around)
    if block.init is None or not reducing:
        return False
    alone = len(reducing) == len(around)
    walk = _walk(s, name) or [(x.var.name, True) for x in around if alone]
    sizes = {n: const_int(s.loop(n)[0].extent) or UNKNOWN for n, _ in walk}
    if not walk or not walk[0][1] or math.prod(sizes.values()) < 4 * PART:
        return False
    # Of results that are added up along memory each may be another thread's.
    few = elementwise.SHARES if walk[-1][1] else combining.longest(s, block)
    if math.prod(sizes[n] for n, reduced in walk if not reduced) > few:
        return False
    names = [n for n, _ in walk]
    if names != s.loops_of(name):
        s.reorder(*names)
    leading = [n for n, _ in itertools.takewhile(lambda x: x[1], walk)]
    first, *_ = combining.joined(s, name, leading)
    inside = math.prod(const_int(s.loop(n)[0].extent) or UNKNOWN for n in s.loops_of(name)[1:])
    size, lanes = max(1, PART // inside), s.target.lanes(block.body.buffer.dtype.bytes)
    extent, whole = const_int(s.loop(first)[0].extent), ACCUMULATORS * lanes
    if extent is not None and size >= whole:
        size = combining.even(extent, size, whole)
    outer, _ = s.split(first, size, "guard")
    parts, _ = s.rfactor(name, outer, first=True)
    s.separate(name)
    elementwise.memory_order(s, parts)
    for b in (parts, name):
        elementwise.reduction_block(s, b)
    return True
