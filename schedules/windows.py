"""The rule for windows that slide along contiguous memory: pooling in the plain layout.

    C[.., h, w] = max over a, b of X[.., h*2 + a, w*2 + b]

Vectors lie along the line that the windows slide over; windows of several lines combine these
first, for a few lines of the result at a time (`slide`). Where windows are some elements apart, the
code generator picks the wanted ones out of whole vectors; taps that may lie in a border are asked
about once per vector (`unswitch`).
"""

from __future__ import annotations

import math

from minicompiler.ir.expr import Call, Expr, Var, const_int, free_vars, walk
from minicompiler.ir.tir import UNROLL, VECTOR, Block, Iter, Scope

from . import analysis, elementwise, sliding
from .schedule import Schedule

MOST_TAPS = 64  # that are repeated in the code
APART = 4  # neighbouring windows, at most
WIDEST = 4  # registers in a row
MOST_ROWS = 16  # that are combined across at a time
UNKNOWN = 256  # elements of a line, perhaps


def applies(s: Schedule) -> bool:
    """A reduction over windows along the innermost axis of a plain layout; what follows it is
    elementwise."""
    first, *after = analysis.blocks(s.func)
    if not analysis.is_reduction(first) or not _slides(s, first):
        return False
    made = {first.body.buffer}
    for b in after:
        if analysis.is_reduction(b) or b.body.buffer.shape != first.body.buffer.shape:
            return False
        if any(x.buffer in made and x.indices != b.body.indices for x in analysis.block_loads(b)):
            return False
        made.add(b.body.buffer)
    return True


def _slides(s: Schedule, block: Block) -> bool:
    update = analysis.update_operand(block)
    loads = analysis.operand_loads(block)
    if update is None or any(type(e) is Call for e in walk(update[1])) or len(loads) != 1:
        return False
    if any(not isinstance(i.value, Var) for i in block.iters) or block.init is None:
        return False
    line = _line(block)
    if line is None or any(b.layout is not None for b in (block.body.buffer, loads[0].buffer)):
        return False
    reduce = [i for i in block.iters if i.reduce]
    if math.prod(const_int(i.extent) or MOST_TAPS + 1 for i in reduce) > MOST_TAPS:
        return False
    apart = elementwise.steps(s, block.name, line.value)[1]
    moving = [free_vars(i) for i in loads[0].indices]
    spatial = {i.var for i in block.iters if not i.reduce}
    slides = {v for used in moving if used & spatial for v in used} - spatial
    return apart in range(1, APART + 1) and slides == {i.var for i in reduce}


def _line(block: Block) -> Iter | None:
    """The iterator of the result's innermost axis."""
    last: Expr | None = block.body.indices[-1] if block.body.indices else None
    return next((i for i in block.iters if i.var is last and not i.reduce), None)


def apply(s: Schedule) -> None:
    main, *others = analysis.blocks(s.func)
    name, after = main.name, [b.name for b in others]
    *outer, line = elementwise.memory_order(s, name)
    it = _line(main)
    assert it is not None
    if outer and sliding.saves(main, it, analysis.arith_of(s.func)):
        across, places = s.slide(name, line)
        _vector(s, name, line)
        part, _ = s.split(outer[-1], _rows(s, places), "guard")
        s.compute_at(across, part)
        _vector(s, across, elementwise.memory_order(s, across, part)[-1])
        s.stage(places, part, Scope.LOCAL)
        _registers(s, across, [])
        outer = [*outer[:-1], part]
    else:
        outer += _vector(s, name, line)
    _registers(s, name, after)
    if outer:
        elementwise.threads_over(s, outer, name)


def _rows(s: Schedule, places: str) -> int:
    """How many lines are combined across before the windows on them are: what was just stored
    cannot be loaded at other places yet, and all should stay in the nearest cache."""
    buffer = s.buffer(places)
    line = (const_int(buffer.shape[-1]) or UNKNOWN) * buffer.dtype.bytes
    return max(1, min(MOST_ROWS, s.target.caches[0] // 4 // line))


def _vector(s: Schedule, name: str, line: str) -> list[str]:
    """Splits the loop over a line into tiles of whole vectors; the loop around them, if any."""
    lanes = s.target.lanes(s.block(name)[0].body.buffer.dtype.bytes)
    whole = const_int(s.loop(line)[0].extent)
    if whole is not None and whole <= WIDEST * lanes:
        return []
    size = next((n * lanes for n in (4, 3, 2) if (whole or 1) % (n * lanes) == 0), lanes)
    return [s.split(line, size, "mask")[0]]


def _registers(s: Schedule, name: str, after: list[str]) -> None:
    """Tiles of a line stay in registers while the taps, repeated in the code, are gone through;
    what follows goes along."""
    block, path = s.block(name)
    taps = [x.var.name for x in analysis.reduce_loops(block, analysis.loops_in(path))]
    *around, line = [n for n in s.loops_of(name) if n not in taps]
    s.reorder(*taps, line)
    for b in after if around else []:
        s.compute_at(b, around[-1])
    init = s.decompose_reduction(name, taps[0])
    for n in taps:
        s.mark(n, UNROLL)
    s.mark(line, VECTOR)
    if not around:
        for n in (init, *after):
            s.mark(s.loops_of(n)[-1], VECTOR)
        return
    tile = s.stage(block.body.buffer.name, around[-1], Scope.REGISTER)
    for n in (init, f"{tile}_out", *after):
        if any(b.name == n for b in analysis.blocks(s.func)):
            elementwise.vector_tile(s, n, around[-1])
