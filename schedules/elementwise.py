"""Rules for nests in which every block stands alone: elementwise work, copies, plain reductions.

    for i0: for i1: r[i0, i1] = f(...)   ->   parallel i: for j_o: vector j_i: ...

Loops follow the order in which the result lies in memory; the innermost is cut into vectors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from minicompiler.ir import polynomials
from minicompiler.ir.arith import Arith
from minicompiler.ir.expr import (
    ONE,
    ZERO,
    Binary,
    Call,
    Const,
    Expr,
    Load,
    Select,
    Var,
    conjuncts,
    const_int,
    free_vars,
    loads,
    substitute,
    walk,
)
from minicompiler.ir.polynomials import Poly
from minicompiler.ir.tir import PARALLEL, UNROLL, VECTOR, Block, For, Scope
from minicompiler.ir.types import int64
from minicompiler.target import WORTH_SHARING

from . import ahead, analysis, streaming, tails, transposed

if TYPE_CHECKING:
    from .schedule import Schedule

LONG_VECTORS = 4  # side by side they hide the latency of a polynomial
MOST_PIECES = 32  # of a concatenation that are written out
WORTH_A_THREAD = 16384  # elements below which waking another thread costs more than it saves
LONG_LINE = 64  # vectors of a row that is as good as a longer one
SHARES = 8  # iterations for each thread that are even enough
WORTH_A_LINE = 6  # vectors of a row from which its first and last ones may be incomplete
MOST_PIECES_OF_A_LINE = 8  # where choices by position change within it
MOST_UNEVEN = 512  # elements of a row with addresses that are worked out while compiling
_UNKNOWN = 64  # iterations of a loop whose extent is known at run time only


def apply(s: Schedule) -> None:
    """Schedules each root nest by itself."""
    follow_readers(s)
    for name in [b.name for b in analysis.blocks(s.func)]:
        one_block(s, name)
    streaming.apply(s)
    tails.apart(s)


def follow_readers(s: Schedule) -> None:
    """Workspace is stored in the order of the result that is computed from it, where both have the
    axis that is cut into blocks."""
    for block in reversed(list(analysis.blocks(s.func))):
        buffer = block.body.buffer
        if buffer.scope is Scope.PARAM or buffer.layout is not None:
            continue
        for reader in analysis.readers(s.func, buffer):
            layout, at = reader.body.buffer.layout, reader.body.indices
            if layout is None or layout.rank != len(buffer.shape):
                continue
            cut = [axis for axis, _, modulus in layout.splits() if modulus > 0]
            loads = [x for x in analysis.block_loads(reader) if x.buffer is buffer]
            if all(x.indices[axis] is at[axis] for x in loads for axis in cut):
                s.relayout(buffer.name, layout)
                break


def steps(s: Schedule, name: str, loop: Expr) -> list[int | None]:
    """How far each access of a block moves in memory with a loop; the store comes first."""
    block, _ = s.block(name)
    moves = [analysis.slope(o, loop) for o in offsets(block, analysis.arith_of(s.func))]
    return [None if m is None else analysis.constant(m) for m in moves]


def offsets(block: Block, arith: Arith) -> list[Poly]:
    """Where each access of a block goes, in elements; the store comes first."""
    values = analysis.values_of(block)
    own = [(block.body.buffer, block.body.indices)]
    loads = [(x.buffer, x.indices) for x in analysis.operand_loads(block)]
    return [arith.poly(b.offset(tuple(substitute(i, values) for i in at))) for b, at in own + loads]


def memory_order(s: Schedule, name: str, below: str | None = None) -> list[str]:
    """Splits the spatial loops of a block by the blocking of what it writes and puts them in memory
    order. Returns the spatial loop names, outermost first; reduction loops stay innermost.

    below: only the loops inside this one take part."""
    block, path = s.block(name)
    buffer = block.body.buffer
    splits = (
        buffer.layout.splits()
        if buffer.layout is not None
        else tuple((k, 1, 0) for k in range(len(buffer.shape)))
    )
    loop_of: dict[int, str | None] = {}
    for axis, index in enumerate(block.body.indices):
        it = next((i for i in block.iters if i.var is index and not i.reduce), None)
        loop_of[axis] = _moving_loop(it.value, block, path, below) if it is not None else None
    parts: dict[tuple[int, int, int], str] = {}
    for axis, divisor, modulus in splits:
        loop = loop_of.get(axis)
        if loop is None:
            continue
        if modulus == 0 and divisor > 1:
            outer, inner = s.split(loop, divisor, "mask")
            parts[axis, divisor, 0] = outer
            parts[axis, 1, divisor] = inner
        elif modulus == 0:
            parts[axis, 1, 0] = loop
    order = [parts[p] for p in splits if p in parts]
    block, path = s.block(name)
    around = inside_of(analysis.loops_in(path), below)
    order = [n for n in order if n in {x.var.name for x in around}]
    if len(around) > 1:
        spatial = {x.var.name for x in analysis.spatial_loops(block, around)}
        reduce = [x.var.name for x in around if x.var.name not in spatial]
        wanted = [*order, *[n for n in spatial if n not in order], *reduce]
        if wanted != [x.var.name for x in around]:
            s.reorder(*wanted)
    return order


def inside_of(around: list[For], below: str | None) -> list[For]:
    """The loops inside of one (all, for None)."""
    names = [x.var.name for x in around]
    return around if below is None else around[names.index(below) + 1 :]


def _moving_loop(value: Expr, block: Block, path: analysis.Path, below: str | None) -> str | None:
    """The loop (inside `below`) that moves an iterator by one each step, if there is just one."""
    around = inside_of(analysis.loops_in(path), below)
    if isinstance(value, Var):
        return value.name if any(x.var is value for x in around) else None
    moving = [x for x in around if x.var in free_vars(value)]
    return moving[0].var.name if len(moving) == 1 else None


def one_block(s: Schedule, name: str, parallel: bool = True, below: str | None = None) -> None:
    """Memory order, vectors along the innermost axis, threads over the rest."""
    block, path = s.block(name)
    if not analysis.loops_in(path):
        return
    if analysis.is_reduction(block):
        reduction_block(s, name)
        return
    order = memory_order(s, name, below)
    if not order:
        return
    flat = below is None and _same_everywhere(s, name)
    lanes = lanes_for(s, s.block(name)[0], flat)
    if flat and len(order) > 1:
        order = [s.fuse(*order)]
    elif below is None:
        order = transposed.split_blocks(s, name, order)
        if transposed.schedule(s, name, order):
            return
        order = _joined(s, name, _in_pieces(s, name, order))
    alone = _alone(s, name, order[:-1])
    order = _in_periods(s, name, order, lanes)
    outer = order[:-1]
    lines = _pieces_of_line(s, name, order[-1]) if alone else [(name, order[-1])]
    vectors = [_in_vectors(s, *line, lanes, outer, alone) for line in lines]
    if parallel:
        inner = [n for n in vectors if n is not None and len(lines) == 1]
        nest = itertools.takewhile(lambda n: s.loop(n)[0].kind is not UNROLL, [*outer, *inner])
        shared = [*nest]
        # The iterations of the last are single vectors: its index should stay a plain one.
        longest = max([n for n, _ in lines], key=lambda n: _count(s, s.loops_of(n)))
        whole = bool(shared) and _vectors_below(s, shared[-1]) > 1
        threads_over(s, shared if whole or not _enough(s, shared[:-1]) else shared[:-1], longest)


def _vectors_below(s: Schedule, name: str) -> int:
    """How many loops inside of one are vectors."""
    return sum(x.kind is VECTOR for x in analysis.loops(s.loop(name)[0].body))


def _in_periods(s: Schedule, name: str, order: list[str], lanes: int) -> list[str]:
    """r[i] = x[i % n]   ->   for i_o: for i_i in n: r[i_o*n + i_i] = x[i_i]

    Vectors of a line that is read again and again begin with it, and no row asks which one of an
    operand it reads, if that takes a division. The new order."""
    made = list[str]()
    for loop in order:
        n = analysis.period(s.block(name)[0], s.loop(loop)[0], analysis.arith_of(s.func))
        known = None if n is None else const_int(n)
        worth_it = known is None or (loop == order[-1] and known >= lanes)
        made += s.split_by_period(loop, name) if n is not None and worth_it else [loop]
    return made


def _alone(s: Schedule, name: str, outer: list[str]) -> bool:
    """Whether one thread runs all of the innermost loop of a block, inside of others."""
    return bool(outer) and in_one_thread(s, name, outer)


def in_one_thread(s: Schedule, name: str, outer: list[str]) -> bool:
    """Whether one thread does all that is inside of some loops around a block."""
    return _count(s, s.loops_of(name)) < WORTH_A_THREAD or _enough(s, outer)


def _enough(s: Schedule, loops: list[str]) -> bool:
    """Whether threads share the iterations of some loops evenly."""
    return _count(s, loops) >= SHARES * s.target.cores


def _in_vectors(
    s: Schedule, name: str, inner: str, lanes: int, outer: list[str], again: bool
) -> str | None:
    """Vectors along the innermost loop of a block; the loop over them, or over shares of them, if
    there are several.

    again: one thread runs all of it, so that the last vectors may overlap."""
    block, _ = s.block(name)
    extent = const_int(s.loop(inner)[0].extent)
    copies, arith = _copies(s, name, inner), analysis.arith_of(s.func)
    wide = LONG_VECTORS * s.target.vector_bytes // block.body.buffer.dtype.bytes
    if copies and arith.holds(s.loop(inner)[0].extent >= 2 * wide):
        lanes = wide
    if extent is not None and extent <= 2 * lanes:
        if extent > 1:
            s.mark(inner, VECTOR)
        return None
    if extent is None and again and None not in steps(s, name, s.loop(inner)[0].var):
        _any_length(s, inner, lanes, copies and lanes < wide)
        return None
    long = bool(outer) and extent is not None and extent >= WORTH_A_LINE * lanes
    line = streaming.broken_lines(s, name, inner) if long and _plain(s, name, inner) else 0
    uneven = (extent or 0) * _uneven_loads(s, name, inner)
    if line:
        big, small = s.split_at_lines(inner, lanes, name, line)
    else:
        again = again and extent is not None
        big, small = s.split(inner, lanes, "overlap" if again else "mask")
    s.mark(small, VECTOR)
    if extent is None and not outer:  # of each share but the last, all vectors are whole ones
        return s.split(big, tails.LONG, "guard")[0]
    if outer and 0 < uneven <= MOST_UNEVEN:
        s.mark(big, UNROLL)
    if _takes_long(block) and streaming.is_large(s, name):
        ahead.fetch_soon(s, name)
    return big


def _any_length(s: Schedule, inner: str, lanes: int, several: bool) -> None:
    """Vectors along a line whose length comes with the call, and which one thread runs.

    several: four an iteration, and nests of their own for the fewer than four that are left and
    for the last one."""
    big, small = s.split(inner, lanes, tails.at_end(s, inner, lanes))
    if not several or not analysis.arith_of(s.func).holds(s.loop(big)[0].extent >= ONE):
        s.mark(small, VECTOR)
        return
    big, last = s.cut(big, -1)
    big, few = s.cut(big, LONG_VECTORS, multiple=True)
    _, four = s.split(big, LONG_VECTORS, "perfect")
    s.mark(s.fuse(four, small), VECTOR)
    for rest in (few, last):
        (vector,) = analysis.loops(s.loop(rest)[0].body)
        s.mark(vector.var.name, VECTOR)


def _pieces_of_line(s: Schedule, name: str, inner: str) -> list[tuple[str, str]]:
    """r[i] = select(i < 3, 0, x[i - 3])   ->   for i in 3: r[i] = 0;  for i_t in n: r[i_t + 3] = ..

    The innermost loop is cut where choices by position change. Its blocks, and the loop of each."""
    loops, whole = [inner], 0
    while whole < len(loops) < MOST_PIECES_OF_A_LINE:
        at = _turn(s, loops[whole])
        if at is None:
            whole += 1
        else:
            loops[whole : whole + 1] = s.cut(loops[whole], at)
    return [(next(analysis.blocks(s.loop(n)[0])).name, n) for n in loops]


def _turn(s: Schedule, name: str) -> int | None:
    """An iteration of a loop from which on what its block chooses by position is another, or what
    it reads begins again: counted from the start, or, below 0, from an end that is not known."""
    loop, _ = s.loop(name)
    block, arith = next(analysis.blocks(loop)), analysis.arith_of(s.func)
    values = analysis.values_of(block)
    value = block.body.value
    for cond in (*analysis.choices(value), *_wraps(value)):
        at = analysis.turn(substitute(cond, values), loop.var, arith)
        if at is None or not (arith.prove(at > ZERO) and arith.prove(at < loop.extent)):
            continue
        for known in (at, arith.simplify(at - loop.extent)):
            if const_int(known) is not None:
                return const_int(known)
    return None


def _wraps(e: Expr) -> Iterator[Expr]:
    """Comparisons that say where a remainder by a size that comes with the call begins again."""
    for x in walk(e):
        wraps = type(x) is Binary and x.op == "mod" and x.dtype is int64 and not loads(x)
        if wraps and const_int(x.b) is None:  # type: ignore[attr-defined]
            yield from (x.a < ZERO, x.a < x.b)  # type: ignore[attr-defined]


def _in_pieces(s: Schedule, name: str, order: list[str]) -> list[str]:
    """r[i, j] = select(i < 64, a[i, j], b[i - 64, j])   ->   unroll i_o: for f: one long copy

    An axis along which operands take turns is cut where they do, and what lies between two cuts is
    one loop, if all operands step through its axes as through one. The new order."""
    block, path = s.block(name)
    cuts: dict[str, set[int]] = {}
    for e in walk(block.body.value):
        if type(e) is not Select or [*loads(e.cond)]:  # data decides: the sign of an index, say
            continue
        for c in conjuncts(e.cond):
            known = type(c) is Binary and c.op == "lt" and const_int(c.b) is not None
            it = next((i for i in block.iters if known and i.var is c.a), None)  # type: ignore[attr-defined]
            if it is None or not isinstance(it.value, Var):
                return order
            cuts.setdefault(it.value.name, set()).add(const_int(c.b) or 0)  # type: ignore[attr-defined]
    if len(cuts) != 1 or analysis.where_parts(block):
        return order
    ((axis, at),) = cuts.items()
    sizes = [const_int(x.extent) for x in analysis.loops_in(path)]
    extent = const_int(s.loop(axis)[0].extent)
    if axis not in order or None in sizes or extent is None:
        return order
    k = order.index(axis)
    # The last piece may be shorter, where each is one loop anyway.
    size = math.gcd(extent, *at) if order[k + 1 :] else math.gcd(*at)
    if extent % size and len(at) < MOST_PIECES_OF_A_LINE and _alone(s, name, order[:-1]):
        return order  # loops of their own have no tails
    work = math.prod(n or 1 for n in sizes)
    shared = math.prod(const_int(s.loop(n)[0].extent) or 1 for n in order[:k])
    if work >= WORTH_A_THREAD and shared < 2 * s.target.cores:
        return order  # threads need more to share
    if not all(as_one(s, name, a, b) for a, b in itertools.pairwise(order[k:])):
        return order
    if not 1 < -(-extent // size) <= MOST_PIECES:
        return order
    piece, rest = s.split(axis, size, "perfect" if extent % size == 0 else "mask")
    s.mark(piece, UNROLL)
    whole = [rest, *order[k + 1 :]]
    return [*order[:k], piece, s.fuse(*whole) if len(whole) > 1 else rest]


def _joined(s: Schedule, name: str, order: list[str]) -> list[str]:
    """r[c, y, x] = a[c, y, x] + b[c]   ->   for c: for f: r[c, f] = a[c, f] + b[c]

    Short innermost loops are one, if enough are left for the threads. The new order."""
    line = _inner_line(s, name, order)
    outer = order[: -len(line)]
    work = _count(s, s.loops_of(name))
    few = work >= WORTH_A_THREAD and not _enough(s, outer)
    return order if len(line) == 1 or few else [*outer, s.fuse(*line)]


def _inner_line(s: Schedule, name: str, order: list[str]) -> list[str]:
    """The innermost loops through which all operands of a block step as through one, as few of
    them as make a long one."""
    block, _ = s.block(name)
    values = analysis.values_of(block)
    own = {
        v
        for it in {*walk(block.body.value, into_loads=False), *free_vars(block.where)}
        if type(it) is Var
        for v in free_vars(values.get(it, it))
    }
    long = LONG_LINE * s.target.vector_bytes // block.body.buffer.dtype.bytes
    k = len(order) - 1
    while k and _count(s, order[k:]) < long:
        outer, inner = (s.loop(n)[0] for n in order[k - 1 : k + 1])
        if outer.kind is UNROLL or outer.var in own or inner.var in own:
            break
        if not as_one(s, name, outer.var.name, inner.var.name):
            break
        k -= 1
    return order[k:]


def _count(s: Schedule, loops: list[str]) -> int:
    """Of iterations of a nest of loops, about."""
    return math.prod(const_int(s.loop(n)[0].extent) or _UNKNOWN for n in loops)


def as_one(s: Schedule, name: str, outer: str, inner: str) -> bool:
    """Whether every access of a block steps through two loops as through one long one."""
    arith = analysis.arith_of(s.func)
    first, second = (s.loop(n)[0] for n in (outer, inner))
    times = arith.poly(second.extent)
    for offset in offsets(s.block(name)[0], arith):
        far, near = (analysis.slope(offset, x.var) for x in (first, second))
        if far is None or near is None or far != polynomials.mul(near, times):
            return False
    return True


def lanes_for(s: Schedule, block: Block, flat: bool) -> int:
    """How many elements an iteration computes: a vector, or several where each takes long, or the
    result is large (a load right behind a store may have to wait for it, where their addresses
    differ by a multiple of 4 KB), or may be and all operands are read as it is written."""
    own, long = block.body, _takes_long(block)
    # Small numbers are mostly computed as float32 or int32, and several vectors of one type are
    # as good as one of another.
    widest = min(4, _widest(own.value))
    size = max(own.buffer.dtype.bytes, widest if long else widest // LONG_VECTORS)
    large = streaming.may_be_large if flat else streaming.is_large
    long = long or large(s, block.name)
    lanes = s.target.vector_bytes // size * (LONG_VECTORS if long else 1)
    return min(lanes, LONG_VECTORS * s.target.vector_bytes // max(widest, 1))


def _widest(e: Expr) -> int:
    """The bytes of the largest number that an expression computes with, positions apart."""
    return max(
        0 if x.dtype is int64 and type(x) is not Load else x.dtype.bytes
        for x in walk(e, into_loads=False)
    )


def _takes_long(block: Block) -> bool:
    return any(type(e) is Call for e in walk(block.body.value))


def threads_over(s: Schedule, outer: list[str], block: str) -> None:
    """Fuses outer loops into one that is shared by the threads, where there is enough work."""
    if not outer:
        return
    work = _count(s, s.loops_of(block))
    if work < WORTH_A_THREAD:
        return
    # An outermost size that is not known is often that of a batch of one, which may have work for
    # all threads.
    one = const_int(s.loop(outer[0])[0].extent) is None and work >= _UNKNOWN * WORTH_SHARING
    # Only as many loops as it takes to share the work evenly: the inner ones keep plain indices.
    count, take = 1, 0
    for name in outer:
        known = const_int(s.loop(name)[0].extent)
        count *= known or (1 if one and take == 0 else _UNKNOWN)
        take += 1
        if count >= 16 * s.target.cores:
            break
    top = s.fuse(*outer[:take]) if take > 1 else outer[0]
    s.mark(top, PARALLEL)


def _uneven_loads(s: Schedule, name: str, inner: str) -> int:
    """The loads of a block at places such as i * 7 // 12, which neither lie evenly along a
    loop nor are the same for a number of its iterations."""
    block, _ = s.block(name)
    loop, values, arith = s.loop(inner)[0], analysis.values_of(block), analysis.arith_of(s.func)

    def uneven(e: Expr) -> bool:
        divisor = const_int(e.b) if type(e) is Binary and e.op == "floordiv" else None
        if type(e) is not Binary or not divisor:
            return False
        step = arith.poly(e.a).get((loop.var,), 0)
        return step > 1 and divisor % step != 0 and step % divisor != 0

    places = [[substitute(i, values) for i in x.indices] for x in analysis.operand_loads(block)]
    return sum(any(uneven(e) for i in at for e in walk(i)) for at in places)


def _plain(s: Schedule, name: str, inner: str) -> bool:
    """Whether each operand is read along a loop or is the same for all of it, without choices."""
    block, _ = s.block(name)
    moves = steps(s, name, s.loop(inner)[0].var)
    chooses = any(type(e) is Select for e in walk(block.body.value))
    return moves[0] == 1 and all(m in (0, 1) for m in moves) and not chooses


def _copies(s: Schedule, name: str, inner: str) -> bool:
    """Whether a block only moves elements, or fills, and whole vectors of them along a loop."""
    block, _ = s.block(name)
    loop, values = s.loop(inner)[0], analysis.values_of(block)
    todo = [block.body.value]
    for e in todo:
        if type(e) is Select:
            if loads(e.cond):
                return False
            todo += [e.a, e.b]
        elif type(e) is not Load and type(e) is not Const:
            return False
    # What says where to read from is the same for all of a row.
    places = [x for e in loads(block.body.value) for i in e.indices for x in loads(i)]
    if any(loop.var in free_vars(substitute(i, values)) for x in places for i in x.indices):
        return False
    own, *moves = steps(s, name, loop.var)
    read = zip(analysis.operand_loads(block), moves, strict=True)
    return own == 1 and all(m == 1 or x in places for x, m in read)


def _same_everywhere(s: Schedule, name: str) -> bool:
    """True when all operands have the result's shape and layout and are read at its index (or are
    single elements), whatever that is: the nest is one long loop."""
    block, _ = s.block(name)
    places = {i.var for i in block.iters}
    if any(free_vars(c) & places for c in analysis.choices(block.body.value)):
        return False
    own = block.body
    if own.buffer.layout is not None and own.buffer.padded_shape != own.buffer.shape:
        return False
    for load in analysis.block_loads(block):
        if not load.indices or all(const_int(i) is not None for i in load.indices):
            continue
        if (
            load.indices != own.indices
            or load.buffer.layout != own.buffer.layout
            or load.buffer.shape != own.buffer.shape
        ):
            return False
    return bool(block.iters)


def reduction_block(s: Schedule, name: str) -> None:
    """A reduction that stands alone: vectors over an axis of the result where the input is
    contiguous along it, else over the reduced axis through partial results."""
    from . import sums

    if sums.schedule(s, name):
        return
    block, path = s.block(name)
    around = analysis.loops_in(path)
    reducing = analysis.reduce_loops(block, around)
    if reducing and block.init is not None:
        s.decompose_reduction(name, reducing[0].var.name)


def vector_tile(s: Schedule, block: str, below: str, unroll: bool = True) -> None:
    """Marks the loops between `below` and a block: the innermost a vector, the others unrolled."""
    inner = s.loops_of(block, below)
    for k, n in enumerate(inner):
        extent = const_int(s.loop(n)[0].extent)
        if extent is None or extent == 1:
            continue
        if k == len(inner) - 1:
            s.mark(n, VECTOR)
        elif unroll:
            s.mark(n, UNROLL)


def around_tile(s: Schedule, init: str, tile: str, below: str) -> None:
    """`vector_tile` for what stands around the loops over a register tile, as far as it is there:
    the block that sets it, the copies into it and out of it."""
    there = {b.name for b in analysis.blocks(s.func)}
    for b in (init, f"{tile}_in", f"{tile}_out"):
        if b in there:
            vector_tile(s, b, below)


__all__ = [
    "Block",
    "Scope",
    "apply",
    "memory_order",
    "one_block",
    "substitute",
    "threads_over",
]
