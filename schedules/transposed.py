"""Transposes: an element is read along one axis of memory and written along another.

    r[i, j] = f(x[j, i])   ->   for panels of i, tiles of j, tiles of i:
                                    t[j, i] = x[j, i]           vectors along i, into registers
                                    r[i, j] = f(t[j, i])        vectors along j

Both sides of memory are touched in whole vectors; the emitter turns the tile with shuffles.
Neighbouring axes that move together are one axis first, so only the two that matter have tails.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from minicompiler.ir.expr import Dim, Load, Select, Var, const_int, walk
from minicompiler.ir.polynomials import Poly, mul
from minicompiler.ir.tir import UNROLL, VECTOR, Block, Scope

from . import analysis, elementwise

if TYPE_CHECKING:
    from .schedule import Schedule

PANEL = 8  # tiles: so many lines of the result are written side by side
LEAST = 4  # lines and columns of a tile
ONE: Poly = {(): 1}  # the distance of neighbours


def schedule(s: Schedule, name: str, order: list[str]) -> bool:
    """Schedules a block whose loops stand in the order of its result's memory. False, with nothing
    changed, when it transposes nothing."""
    found = _crossing(s, name, order)
    if found is None:
        return False
    loads, groups, k = found
    load = loads[0]
    fused = [s.fuse(*g) if len(g) > 1 else g[0] for g in groups]
    along, across = fused[k], fused[-1]
    extents = [const_int(s.loop(n)[0].extent) for n in (along, across)]
    lanes = s.target.lanes(load.buffer.dtype.bytes)
    few = min(n or lanes for n in extents) < lanes
    lanes = LEAST if few else lanes
    outer = [n for n in fused[:-1] if n != along]
    wide = LEAST if few else _width(s, load, lanes, extents[1])
    tails = [
        n is not None and n > f and n % f > 0 for n, f in zip(extents, (lanes, wide), strict=True)
    ]
    again = any(tails) and elementwise.in_one_thread(s, name, outer)
    across_o, across_i = _in_tiles(s, across, wide, again)
    along_o, along_i = _in_tiles(s, along, lanes, again)
    shared = [*outer]
    panels = const_int(s.loop(along_o)[0].extent)
    if panels is None or panels > PANEL:
        panel, along_o = s.split(along_o, PANEL, "guard")
        outer.append(panel)
    outer.append(across_o)
    s.reorder(*outer, along_o, across_i, along_i)
    tiles = [s.stage(x.buffer.name, along_o, Scope.REGISTER) for x in loads]
    s.reorder(along_i, across_i)
    s.mark(along_i, UNROLL)
    s.mark(across_i, VECTOR)
    for tile in tiles:
        elementwise.vector_tile(s, f"{tile}_in", along_o)
    elementwise.threads_over(s, shared if again else outer, name)
    return True


def _width(s: Schedule, load: Load, lanes: int, extent: int | None) -> int:
    """Of a tile along the result's memory. Lines of the result that lie a power of two apart are
    thrown out before the next piece comes."""
    if extent is None:  # it may be a short one
        return lanes
    whole = max(2 * lanes, s.target.vector_bytes // load.buffer.dtype.bytes)
    tail = extent < 8 * lanes and -extent % lanes < -extent % whole  # would be much of it
    return lanes if extent < whole or tail else whole


def _in_tiles(s: Schedule, loop: str, size: int, again: bool) -> tuple[str, str]:
    """Splits an axis. again: one thread does all of it, so that the last tile may end with it and
    do some of the one before again; it needs no mask then."""
    extent = const_int(s.loop(loop)[0].extent)
    overlap = again and extent is not None and extent >= size
    return s.split(loop, size, "overlap" if overlap else "mask")


def split_blocks(s: Schedule, name: str, order: list[str]) -> list[str]:
    """Splits the loops along axes that an operand has in blocks and the result has not: what lies
    in a block lies side by side. Returns the new order."""
    block, _ = s.block(name)
    if block.body.buffer.layout is not None or _conditional(block):
        return order
    for load in analysis.operand_loads(block):
        for axis, _, size in () if load.buffer.layout is None else load.buffer.layout.splits():
            it = next((i for i in block.iters if i.var is load.indices[axis]), None)
            loop = None if it is None or not isinstance(it.value, Var) else it.value.name
            if size and loop in order:
                assert loop is not None
                at = order.index(loop)
                order = [*order[:at], *s.split(loop, size, "mask"), *order[at + 1 :]]
    return order


def _conditional(block: Block) -> bool:
    return any(type(e) is Select for e in walk(block.body.value))


def _crossing(
    s: Schedule, name: str, order: list[str]
) -> tuple[list[Load], list[list[str]], int] | None:
    """The operands that are read across the innermost loop; the loops in groups of those that every
    access steps through as if they were one; which group runs along the operand's memory."""
    block, _ = s.block(name)
    loads = analysis.operand_loads(block)
    if analysis.is_reduction(block) or len({x.buffer for x in loads}) != len(loads):
        return None
    lanes = s.target.vector_bytes // 4
    sizes = [const_int(s.loop(n)[0].extent) for n in order]
    places = elementwise.offsets(block, analysis.arith_of(s.func))
    steps = [[_step(p, s.loop(n)[0].var) for p in places] for n in order]
    # Elements that may not exist can only be loaded as a box, and a tile of fused axes is none.
    conditional = _conditional(block)
    groups: list[list[int]] = []
    for k, inner in enumerate(steps):
        size = sizes[k]
        if groups and size is not None and not conditional:
            pairs = zip(steps[groups[-1][-1]], inner, strict=True)
            if all(a is not None and b is not None and a == mul(b, {(): size}) for a, b in pairs):
                groups[-1].append(k)
                continue
        groups.append([k])
    extents = [math.prod(sizes[k] or lanes for k in g) for g in groups]
    crossing: dict[int, list[Load]] = {}
    for j, load in enumerate(loads, 1):
        along = [k for k, g in enumerate(groups[:-1]) if steps[g[-1]][j] == ONE]
        plain = all(isinstance(i, Var) or const_int(i) is not None for i in load.indices)
        if steps[-1][j] in (None, {}, ONE) or len(along) != 1 or not plain:
            continue
        if min(extents[along[0]], extents[-1]) >= LEAST:
            crossing.setdefault(along[0], []).append(load)
    if not crossing:
        return None
    k, found = max(crossing.items(), key=lambda c: len(c[1]))
    return found, [[order[k] for k in g] for g in groups], k


def _step(place: Poly, loop: Var) -> Poly | None:
    """How far an access moves in memory with a loop: a polynomial of sizes, or None."""
    step = analysis.slope(place, loop)
    known = step is not None and all(isinstance(a, Dim) for m in step for a in m)
    return step if known else None
