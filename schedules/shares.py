"""How the rows and panels of a contraction are divided: into blocks that stay in a cache, and so
that threads get equal shares.

    row_o = 784 tiles of rows  ->  rows_outer = 8 blocks of row_o = 98 tiles
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from minicompiler.ir.expr import Expr, const_int, substitute

from . import analysis
from .panels import axis_of, block_of, from_near

if TYPE_CHECKING:
    from .contraction import Nest
    from .schedule import Schedule

PAGE = 4096
_PLANES = 128  # channels of a part of a reduction, where their images lie far apart
MOST_IDLE = 0.05  # of the time of all threads, at the end of a parallel loop
_FEW_TILES = 8  # of rows: a smaller block would hardly use what it reads of the other operand
_TILES_PER_PACKING = 8  # or more, so that packing is little beside the products


def idle(shares: int, threads: int) -> float:
    """The time in which threads wait for the last one, over that of all the work."""
    return -(-shares // threads) * threads / shares - 1


def even(shares: int, options: Sequence[int], threads: int) -> int:
    """Into how many parts each of so many shares of work is divided, so that no thread waits long
    for another: the first option that does, or the best one."""
    enough = (n for n in options if idle(shares * n, threads) <= MOST_IDLE)
    return next(enough, min(options, key=lambda n: idle(shares * n, threads)))


def extent(s: Schedule, loop: str, otherwise: int) -> int:
    """The extent of a loop, where it is a number."""
    return const_int(s.loop(loop)[0].extent) or otherwise


def rows_in_cache(
    s: Schedule,
    nest: Nest,
    row_o: str,
    rows: int,
    row_extent: int | None,
    depth: list[str],
    k_o: str | None,
    limit: int,
    around: list[str],
) -> tuple[str | None, str]:
    """Rows that fit the second-level cache are done for all vector blocks before the next ones.
    There are more of them where threads would get unequal shares. Returns the loop over blocks of
    tiles, if there is one, and the loop over the tiles of a block."""
    if row_extent is not None and row_extent <= 4 * rows:
        return None, row_o
    total = limit if k_o is not None else math.prod(extent(s, n, 1024) for n in depth)
    # What lies between the rows comes into the cache as well; so does more than is used of planes,
    # as what is fetched ahead of one place in each of them.
    planes = len(nest.reduce) == 1 and planes_together(s, nest, depth) is not None
    share = s.target.caches[1] // (8 if leaves_gaps(s, nest) else 4 if planes else 2)
    fit = max(4, share // (4 * total) // rows)
    blockable = not nest.outer or len(nest.rows) == 1 or k_o is not None or _plain_rows(nest)
    if not blockable or (row_extent is not None and row_extent <= fit * rows * 3 // 2):
        return None, row_o
    # Blocks of equal size, and equal shares, for the threads' sake.
    others, cores = math.prod(extent(s, n, 1) for n in around), s.target.cores
    if row_extent is None:
        return _even_blocks(s, row_o, fit, even(others, range(1, cores + 1), cores))
    tiles = -(-row_extent // rows)
    least = -(-tiles // fit)
    options = [n for n in range(least, 2 * least + cores) if tiles >= n * _FEW_TILES]
    return s.split(row_o, -(-tiles // even(others, options or [least], cores)), "guard")


def rows_for_threads(s: Schedule, row_o: str, around: list[str]) -> tuple[str | None, str]:
    """Where the loops around leave threads without work the rows are shared out too, though each
    of their blocks then packs the same panels."""
    wanted = 2 * s.target.cores
    shares = math.prod(extent(s, n, wanted) for n in around)
    tiles = const_int(s.loop(row_o)[0].extent)
    if shares >= wanted or (tiles is not None and tiles < 2 * _TILES_PER_PACKING):
        return None, row_o
    each = _TILES_PER_PACKING
    if tiles is not None:
        each = max(each, -(-tiles // -(-wanted // shares)))
    return _even_blocks(s, row_o, each)


def group_of(s: Schedule, nest: Nest, width: int, depth: int) -> int:
    """How many panels of a depth are packed together, at least a group for each thread. Every group
    is one pass over the rows. Where these come from far, that costs more than panels which stay in
    the last cache only: a panel is read from end to end, which hardware foresees. Groups of another
    size are taken where they make equal shares."""
    _, second, last = s.target.caches
    size = nest.wide.buffer.dtype.bytes
    rows = size * math.prod(const_int(r.extent) or 64 for r in nest.rows) * depth
    columns = const_int(nest.vector.extent)
    near = columns is None or from_near(s, nest) or 2 * rows <= second
    share = second // 4 if near else max(second // 4, last // (4 * s.target.cores))
    panel = size * width * depth
    most = max(1, share // panel)
    if columns is None:
        return most
    panels, threads = -(-columns // width), s.target.cores
    around = math.prod(const_int(x.extent) or 1 for x in nest.outer)
    groups = max(-(-panels // most), min(panels, -(-2 * threads // around)))
    group = -(-panels // groups)

    def waits(n: int) -> float:
        """How much longer than an equal share the thread with the most to do takes."""
        of_one = -(-(-(-panels // n) * around) // threads) * n
        return of_one * threads / (panels * around) - 1

    least = max(1, min(group // 2 + 1, second // 3 // panel))
    options = sorted(range(least, group * 5 // 4 + 1), key=lambda n: abs(n - group))
    return next((n for n in options if waits(n) <= MOST_IDLE), min(options, key=waits))


def _even_blocks(s: Schedule, loop: str, most: int, multiple: int = 1) -> tuple[str, str]:
    """Blocks of equal size, unless the loop may have no iterations at all: sizes of which that is
    not known are beyond what can be proved of a quotient of them."""
    some = analysis.arith_of(s.func).prove(s.loop(loop)[0].extent > 0) is True
    return s.split(loop, most, "even", multiple) if some else s.split(loop, most, "guard")


def planes_together(s: Schedule, nest: Nest, depth: list[str]) -> int | None:
    """How much of the reduction axis is read together where its blocks lie far apart, as whole
    images, and a tile reads a few lines of each. A multiple of 4 KB apart these fight for the same
    places of the first-level cache. None where they lie close, or are few."""
    values: dict[Expr, Expr] = {
        nest.reduce[0].var: analysis.values_of(s.block(nest.block.name)[0])[nest.reduce[0].var]
    }
    at = tuple(substitute(i, values) for i in nest.broad.indices)
    arith = analysis.arith_of(s.func)
    apart = analysis.strides(nest.broad.buffer, at, s.loop(depth[0])[0].var, arith)
    if len(depth) == 1 or apart is None:
        return None
    apart *= nest.broad.buffer.dtype.bytes
    if apart < PAGE:
        return None
    if apart % PAGE == 0:
        return _PLANES // 2
    return _PLANES if (const_int(nest.reduce[0].extent) or 1024) > 2 * _PLANES else None


def leaves_gaps(s: Schedule, nest: Nest) -> bool:
    """True for rows that are the pixels of a strided window in a blocked layout: each is a short
    run of memory, and the next one is not its neighbour."""
    buffer = nest.broad.buffer
    runs = [block_of(buffer.layout, k) for k in range(len(buffer.shape))]
    arith = analysis.arith_of(s.func)
    step = analysis.strides(buffer, nest.broad.indices, nest.rows[-1].var, arith)
    return max(runs) > 1 and step is not None and step > max(runs)


def _plain_rows(nest: Nest) -> bool:
    return all(axis_of(nest.broad, r) is not None for r in nest.rows)
