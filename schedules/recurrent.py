"""The rule for recurrences: a loop over steps around contractions with the previous state and
elementwise work that makes the next one.

    for t:                                     # scan
        parallel h_o:                          # a block of hidden units: all of their gates
            for b_o:
                registers: sums[b_i, gate, h_i] of h[t, b, :] and the weights
                c[t + 1, b, h], h[t + 1, b, h]

The weights are packed as the tiles read them, so each step streams them once. Threads share the
blocks of a step and meet after it.
"""

from __future__ import annotations

import dataclasses

from minicompiler.ir.expr import Load, Var, const_int
from minicompiler.ir.tir import PARALLEL, SCAN, UNROLL, VECTOR, Block, Iter, Scope

from . import analysis, combining, contraction, elementwise
from .schedule import Schedule

MOST_SIDES = 4  # gates that one register tile holds
FEW_ROWS = 2  # of the state, which weights from beyond the first-level cache keep waiting anyway
UNEQUAL = 8  # a share larger than the mean by one part in so many is worth reading weights twice
WORTH_A_BARRIER = 32768  # multiplications of a step below which its threads would mostly wait


@dataclasses.dataclass
class _Product:
    """A contraction of a step: the weights it reads and the roles of its iterators."""

    block: Block
    weights: Load
    vector: Iter
    rows: list[Iter]  # of the state alone
    sides: list[Iter]  # of the weights alone: gates
    outer: list[Iter]
    reduce: list[Iter]


def applies(s: Schedule) -> bool:
    """There is a recurrence."""
    return any(x.tag == SCAN for x in analysis.loops(s.func))


def apply(s: Schedule) -> None:
    scans = [x.var.name for x in analysis.loops(s.func) if x.tag == SCAN]
    inside = {b.name for t in scans for b in analysis.blocks(s.loop(t)[0])}
    outside = [b.name for b in analysis.blocks(s.func) if b.name not in inside]
    for t in scans:
        _steps(s, t)
    for b in [*outside, *(b.name for b in analysis.blocks(s.func) if b.tag == "copy_in")]:
        if analysis.scan_around(s.block(b)[1]) is None:
            elementwise.one_block(s, b)


def _steps(s: Schedule, t: str) -> None:
    """Schedules what one recurrence does in each step."""
    found: dict[str, _Product | None] = {}
    owner: dict[object, str] = {}  # buffer -> the contraction that it waits for in a step
    followers: dict[str, list[str]] = {}
    alone: list[str] = []
    order = [b.name for b in analysis.blocks(s.loop(t)[0])]
    for name in order:
        block, _ = s.block(name)
        waits = [
            owner[x.buffer]
            for x in analysis.operand_loads(block)
            if x.buffer in owner and not _earlier(s, x, block)
        ]
        if analysis.is_reduction(block):
            found[name] = _analyse(s, name, t)
            owner[block.body.buffer] = name
            followers[name] = []
        elif waits:
            last = max(waits, key=list(found).index)
            owner[block.body.buffer] = last
            followers[last].append(name)
        else:
            alone.append(name)
    tiled: list[str] = []
    for name, product in found.items():
        if product is not None:
            _tile(s, product, followers[name], t, f" {len(tiled)}" if tiled else "")
            tiled.append(name)
        else:
            combining.schedule_reduction(s, name, t)
            alone += followers[name]
    for name in alone:
        elementwise.one_block(s, name, parallel=False, below=t)


def _earlier(s: Schedule, load: Load, block: Block) -> bool:
    """True when what a block reads is there from earlier steps."""
    arith = analysis.arith_of(s.func)
    return all(analysis.apart(load, block, w, arith) for w in analysis.writers(s.func, load.buffer))


def _vars(load: Load) -> set[Var]:
    return {i for i in load.indices if isinstance(i, Var)}


def _analyse(s: Schedule, name: str, t: str) -> _Product | None:
    """None for a reduction that is no product of a state and weights with plain indices."""
    block, _ = s.block(name)
    loads = analysis.product_loads(block)
    iters = [i for i in block.iters if not (isinstance(i.value, Var) and i.value.name == t)]
    spatial = [i for i in iters if not i.reduce]
    vector = next((i for i in spatial if i.var is block.body.indices[-1]), None)
    if loads is None or vector is None or any(not isinstance(i.value, Var) for i in iters):
        return None
    weights = [x for x in loads if vector.var in _vars(x)]
    if len(weights) != 1:
        return None
    mine = _vars(weights[0])
    theirs = _vars(loads[0] if loads[1] is weights[0] else loads[1])
    rest = [i for i in spatial if i is not vector]
    sides = [i for i in rest if i.var in mine and i.var not in theirs]
    count = 1
    for i in sides:
        count *= const_int(i.extent) or MOST_SIDES + 1
    if count > MOST_SIDES:
        sides = []
    lines = [i for i in rest if i.var in theirs and i.var not in mine]
    outer = [i for i in rest if i not in sides and i not in lines]
    reduce = [i for i in iters if i.reduce]
    return _Product(block, weights[0], vector, lines, sides, outer, reduce)


def _loop(it: Iter) -> str:
    assert isinstance(it.value, Var)
    return it.value.name


def _size(iters: list[Iter]) -> int | None:
    """How many points some iterators have; None where that varies."""
    total = 1
    for i in iters:
        extent = const_int(i.extent)
        if extent is None:
            return None
        total *= extent
    return total


def _tile(s: Schedule, p: _Product, followers: list[str], t: str, number: str) -> None:
    """Register tiles of one contraction, with the work on its sums in the same place.

    number: tells its choices from those of other contractions in the step.
    """
    name, buffer = p.block.name, p.block.body.buffer
    lanes = s.target.lanes(buffer.dtype.bytes)
    gates, count = _size(p.sides) or 1, _size(p.rows)
    # Few rows: all gates in one tile. More: a tile of rows for one gate after the other, and the
    # sums of a block of units in cache. A number that is not known is often one.
    apart = bool(p.sides) and count is not None and count > FEW_ROWS
    if apart:
        vectors = 2
    elif count == 1:
        vectors = 4 if gates == 1 else 2
    else:
        vectors = 2 if gates <= 2 else 1
    extent = const_int(p.vector.extent)
    while vectors > 1 and extent is not None and extent <= vectors // 2 * lanes:
        vectors //= 2
    vectors = s.choose(f"vectors{number}", (1, 2, 4, 8), vectors)
    width = vectors * lanes
    depth = [_loop(i) for i in p.reduce]
    sides = [_loop(i) for i in p.sides]
    shared = [_loop(i) for i in p.outer]

    # ---- loops: blocks of units, rows, reduction, tile ------------------------------------------
    row_o: list[str] = []
    tile: list[str] = []
    if p.rows:
        s.reorder(*shared, *(_loop(i) for i in p.rows), *sides, _loop(p.vector), *depth)
        row = s.fuse(*(_loop(i) for i in p.rows)) if len(p.rows) > 1 else _loop(p.rows[0])
        wide = vectors if apart else gates * vectors
        fit = contraction.tile_rows(count, wide, s.target.registers)
        if count is None:
            fit = min(fit, FEW_ROWS)
        fit = s.choose(f"rows{number}", tuple(range(1, 17)), fit)
        if apart and _unequal(s, p, width) and count is not None and count >= s.target.cores * fit:
            each = -(-count // (s.target.cores * fit)) * fit
            part, row = s.split(row, each, "mask")
            shared.append(part)
        o, inner = s.split(row, fit, "mask")
        row_o, tile = [o], [inner]
    v_o, v_i = s.split(_loop(p.vector), width, "mask")
    shared.append(v_o)
    if apart:
        s.reorder(*shared, *sides, *row_o, *depth, *tile, v_i)
    else:
        tile += sides
        s.reorder(*shared, *row_o, *depth, *tile, v_i)
    around = (row_o or [v_o])[0]  # one register tile
    home = v_o if apart else around  # what follows the sums
    _pack(s, p, width, apart)

    # ---- what comes after, and the register tile ------------------------------------------------
    for b in followers:
        s.compute_at(b, home)
    init = s.decompose_reduction(name, depth[0])
    sums = s.stage(buffer.name, home, Scope.LOCAL) if apart else buffer.name
    staged = s.stage(sums, around, Scope.REGISTER)
    size = const_int(s.loop(depth[-1])[0].extent)
    unroll = s.choose(f"unroll{number}", (1, 2, 4, 8), 4)
    if size is not None and size > unroll and size % unroll == 0 and unroll > 1:
        s.mark(s.split(depth[-1], unroll)[1], UNROLL)
    for n in tile:
        s.mark(n, UNROLL)
    s.mark(v_i, VECTOR)
    elementwise.around_tile(s, init, staged, around)
    alive = {b.name for b in analysis.blocks(s.func)}
    for b in (f"{sums}_out", *followers):
        if b in alive and b != f"{staged}_out":
            elementwise.vector_tile(s, b, home, unroll=not apart)

    # ---- threads --------------------------------------------------------------------------------
    work = 1
    for x in analysis.loops_in(s.block(name)[1]):
        if x.var.name != t:
            work *= const_int(x.extent) or 32
    if work >= WORTH_A_BARRIER:
        s.mark(s.fuse(*shared) if len(shared) > 1 else shared[0], PARALLEL)


def _unequal(s: Schedule, p: _Product, width: int) -> bool:
    """Whether blocks of units give some thread much more work than others."""
    units, outer, cores = const_int(p.vector.extent), _size(p.outer), s.target.cores
    if units is None or outer is None:
        return False
    blocks = -(-units // width) * outer
    return -(-blocks // cores) * cores * UNEQUAL > blocks * (UNEQUAL + 1)


def _pack(s: Schedule, p: _Product, width: int, apart: bool) -> None:
    """Puts the weights in the order in which the tiles read them.

    apart: the gates come one after the other, not side by side.
    """
    load, buffer = p.weights, p.weights.buffer
    place = {i: k for k, i in reversed(list(enumerate(load.indices))) if isinstance(i, Var)}
    inside = (*p.sides, *p.reduce) if apart else (*p.reduce, *p.sides)
    wanted = [i.var for i in (*inside, p.vector)]
    if any(v not in place for v in wanted):
        return
    axis = place[p.vector.var]
    inner = [place[v] for v in wanted[:-1]]
    parts = [[k, 1, 0] for k in range(len(load.indices)) if k not in (*inner, axis)]
    parts += [[axis, width, 0], *([k, 1, 0] for k in inner), [axis, 1, width]]
    if buffer in s.func.buffers and buffer.layout is None:  # converted weights, say
        s.relayout(buffer.name, parts)
    elif buffer in s.func.params and not analysis.writers(s.func, buffer):
        s.stage(buffer.name, None, Scope.GLOBAL, parts)


__all__ = ["applies", "apply"]
