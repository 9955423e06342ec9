"""The rule for reductions: softmax, normalisations, sums, pooling windows.

    m[i] = max over k of x[i, k];  e[i, k] = exp(x[i, k] - m[i]);  s[i] = sum over k of e[i, k];
    ...

becomes one pass per row with everything of the row in registers or first-level cache: all blocks
are computed at the row loop of the last one. A reduction along contiguous memory keeps a vector of
partial results (rfactor); one across it keeps a vector of results.
"""

from __future__ import annotations

import math

from minicompiler.ir.expr import (
    Binary,
    Call,
    Const,
    Expr,
    Load,
    Var,
    const_int,
    free_vars,
    walk,
)
from minicompiler.ir.tir import PARALLEL, UNROLL, VECTOR, Block, Buffer, Scope

from . import ahead, analysis, combining, elementwise, overlapping, streaming, sums, tails
from .loops import kept_apart
from .schedule import Schedule

SIDE_BY_SIDE = 4  # rows: the lanes of one are combined while the next one is read
CHEAP = 4  # operations on one element


def applies(s: Schedule) -> bool:
    """At least one reduction, and all blocks end in one last block that has spatial loops."""
    every = list(analysis.blocks(s.func))
    return any(analysis.is_reduction(b) for b in every)


def apply(s: Schedule) -> None:
    names = [b.name for b in analysis.blocks(s.func)]
    last = names[-1]
    results = [b for b in analysis.blocks(s.func) if b.body.buffer in s.func.params]
    row = None
    if len(results) == 1 and len(names) > 1 and not analysis.is_reduction(s.block(last)[0]):
        beside = _side_by_side(s)
        for n in names[:-1]:
            if not beside and is_cheap(s.block(n)[0]):
                s.inline(n)
        row = None if beside else _row_loops(s, last) or _group_loops(s, last)
    if row is None or _are_columns(s, last, row):
        elementwise.apply(s)
        return
    names = [b.name for b in analysis.blocks(s.func)]
    together = _rows_together(s, last, row)
    if together > 1:
        row = [*row[:-1], s.split(row[-1], together, "guard")[0]]
    top = s.fuse(*row) if len(row) > 1 else row[0]
    for n in reversed(names[:-1]):
        s.compute_at(n, top)
    for n in names:
        _one_row(s, n, top, together > 1)
    _hold(s, names[:-1], top)
    if together > 1:
        _hold_several(s, names, top)
    else:
        _sum_at_once(s, top)
    work = 1
    for x in analysis.loops(s.func.phases[0]):
        work *= const_int(x.extent) or 64
    shared, top = overlapping.write_late(s, last, top)
    if work >= elementwise.WORTH_A_THREAD:
        s.mark(shared, PARALLEL)
    ahead.fetch_rows(s, top, s.target.caches[1] // 4)
    streaming.apply(s)
    tails.apart(s)


def _sum_at_once(s: Schedule, top: str) -> None:
    """What one pass over a row makes is added up in that pass and not in one of its own."""
    for block in list(analysis.blocks(s.loop(top)[0])):
        for load in analysis.operand_loads(block):
            makers = analysis.writers(s.func, load.buffer)
            if not analysis.is_reduction(block) or len(makers) != 1 or block.init is not None:
                continue
            own, other = [s.loops_of(b.name, top) for b in (block, makers[0])]
            while own and other and not kept_apart(s, own[0], other[0]):
                s.compute_with(own[0], other[0])
                own, other = own[1:], other[1:]


def _side_by_side(s: Schedule) -> bool:
    """True where rows lie in vectors: what is reduced has blocks of an axis that is not."""
    for block in analysis.blocks(s.func):
        summed = {i.var for i in block.iters if i.reduce}
        for load in analysis.operand_loads(block):
            if summed and load.buffer.layout is not None:
                axis, _, modulus = load.buffer.layout.splits()[-1]
                if modulus > 0 and not free_vars(load.indices[axis]) & summed:
                    return True
    return False


def _are_columns(s: Schedule, last: str, row: list[str]) -> bool:
    """True where each result is one number, and what is reduced to it lies in a column: its
    neighbours are reduced to the next ones."""
    inside = [x for x in analysis.loops_in(s.block(last)[1]) if x.var.name not in row]
    if any(const_int(x.extent) != 1 for x in inside):
        return False
    arith = analysis.arith_of(s.func)
    for block in filter(analysis.is_reduction, list(analysis.blocks(s.func))):
        around = analysis.loops_in(s.block(block.name)[1])
        reducing = analysis.reduce_loops(block, around)
        if combining.goes_across(block, [x for x in around if x not in reducing], arith):
            return True
        if sums.goes_by_lines(s, block.name):
            return True
    return False


def is_cheap(block: Block) -> bool:
    """True for an element that is computed again in less time than stored and loaded."""
    if analysis.is_reduction(block):
        return False
    parts = [e for e in walk(block.body.value) if not isinstance(e, Load | Const | Var)]
    return len(parts) <= CHEAP and not any(isinstance(e, Call) for e in parts)


def _row_loops(s: Schedule, last: str) -> list[str] | None:
    """The outer loops of the last block over which every reduction gives one value per
    iteration."""
    block, path = s.block(last)
    if analysis.is_reduction(block) or block.body.buffer.layout is not None:
        return None
    around = analysis.loops_in(path)
    reductions = [b for b in analysis.blocks(s.func) if analysis.is_reduction(b)]
    # An output axis is a row axis when each reduction has it as a spatial axis of the same extent,
    # and each block reads from the others what lies at its own place along it: after a transpose
    # of a square, another axis has the same extent.
    rank = len(block.body.indices)
    passed = [
        (b.body.indices, load.indices)
        for b in analysis.blocks(s.func)
        for load in analysis.operand_loads(b)
        if load.buffer in s.func.buffers
    ]
    rows: list[str] = []
    for axis in range(rank):
        it = next((i for i in block.iters if i.var is block.body.indices[axis]), None)
        if it is None:
            continue
        good = True
        for r in reductions:
            if (
                len(r.body.buffer.shape) != rank
                or r.body.buffer.shape[axis] is not block.body.buffer.shape[axis]
            ):
                good = False
        if any(len(at) == rank == len(of) and at[axis] is not of[axis] for at, of in passed):
            good = False
        if not good or not isinstance(it.value, Var):
            break
        rows.append(it.value.name)
    names = [x.var.name for x in around]
    if not rows or rows != names[: len(rows)]:
        return None
    # Someone must still have work inside the row, and no block may need other rows.
    for b in analysis.blocks(s.func):
        for load in analysis.operand_loads(b):
            if load.buffer in s.func.buffers and any(
                const_int(i) is None and i not in {x.var for x in b.iters} for i in load.indices
            ):
                return None
    return rows


def _group_loops(s: Schedule, last: str) -> list[str] | None:
    """As `_row_loops`, where reductions have fewer axes, or some neighbours along one share them:
    r[i, c, k] = f(x[i, c, k], m[i, c // 8]). The loop over that axis is split."""
    block, path = s.block(last)
    if block.body.buffer.layout is not None:
        return None
    made = {b.body.buffer for b in analysis.blocks(s.func) if analysis.is_reduction(b)}
    others = {b.body.buffer for b in analysis.blocks(s.func)} - made - {block.body.buffer}
    shared = {x.indices for x in analysis.operand_loads(block) if x.buffer in made}
    if others or len(shared) != 1 or len({b.shape for b in made}) != 1:
        return None
    loop_of: dict[Expr, Var] = {i.var: i.value for i in block.iters if isinstance(i.value, Var)}
    around = [x.var.name for x in analysis.loops_in(path)]
    at = shared.pop()
    if not at:
        return None
    *whole, grouped = at
    divided = 1
    if type(grouped) is Binary and grouped.op == "floordiv":
        divided = const_int(grouped.b) or 0
        grouped = grouped.a
    if not divided or any(i not in loop_of for i in (*whole, grouped)):
        return None
    names = [str(loop_of[i]) for i in (*whole, grouped)]
    if names != around[: len(names)]:
        return None
    if divided == 1:
        return names
    extent = const_int(s.loop(names[-1])[0].extent)
    if extent is None or extent % divided:
        return None
    return [*names[:-1], s.split(names[-1], divided, "perfect")[0]]


def _rows_together(s: Schedule, last: str, row: list[str]) -> int:
    """How many rows an iteration works on: several short ones, where there are many."""
    loops = analysis.loops_in(s.block(last)[1])
    inside = [const_int(x.extent) for x in loops if x.var.name not in row]
    rows = [const_int(x.extent) for x in loops if x.var.name in row]
    if None in inside or rows[-1] == 1:
        return 1
    elements = math.prod(n or 1 for n in inside)
    fit = s.target.caches[0] // 8 // (elements * s.block(last)[0].body.buffer.dtype.bytes)
    few = None not in rows and math.prod(n or 1 for n in rows) < 16 * SIDE_BY_SIDE * s.target.cores
    long = elements > elementwise.LONG_VECTORS * s.target.vector_bytes // 4
    return min(SIDE_BY_SIDE, fit) if long and not few else 1


def _one_row(s: Schedule, name: str, top: str, several: bool) -> None:
    """Schedules the part of a block inside the row loop, or inside a loop over several rows: each
    begins with a vector of its own, as the buffers do that hold them."""
    inner = s.loops_of(name, top)
    if not inner:
        return
    block, _ = s.block(name)
    if analysis.is_reduction(block):
        combining.schedule_reduction(s, name, top)
        return
    vector = s.target.vector_bytes // 4
    loop = combining.joined(s, name, inner[several:] or inner)[-1]
    extent = const_int(s.loop(loop)[0].extent)
    lanes = vector * elementwise.LONG_VECTORS
    if extent is not None and extent <= vector:
        s.mark(loop, VECTOR)
        return
    # Whoever fills a row fills at least as much of it as anyone reads.
    short = extent is not None and extent <= lanes
    held = any(x.buffer.scope is Scope.REGISTER for x in analysis.operand_loads(block))
    # Of results whose length comes with the call, whole vectors are stored at the end, too.
    again = extent is None and block.body.buffer in s.func.params
    tail = tails.at_end(s, loop, lanes) if again else "mask"
    o, v = s.split(loop, vector if short else lanes, tail)
    if short and held:  # registers have no addresses
        s.mark(o, UNROLL)
    s.mark(v, VECTOR)


def _hold(s: Schedule, names: list[str], top: str) -> None:
    """Keeps what passes from block to block inside the row: scalars in registers, rows in cache."""
    seen = set()
    for n in names:
        if not any(b.name == n for b in analysis.blocks(s.func)):
            continue
        buffer = s.block(n)[0].body.buffer
        if buffer in seen or buffer not in s.func.buffers:
            continue
        seen.add(buffer)
        s.stage(buffer.name, top, Scope.REGISTER if _single(s, buffer, top) else Scope.LOCAL)


def _hold_several(s: Schedule, names: list[str], top: str) -> None:
    """The same for what is one number per row, where an iteration has several rows: in cache, and
    in a register while its row is worked on."""
    for buffer in s.func.buffers:
        s.stage(buffer.name, top, Scope.LOCAL)
    for n in names:
        loops = s.loops_of(n)
        row = loops[loops.index(top) + 1]
        for buffer in dict.fromkeys(x.buffer for x in analysis.operand_loads(s.block(n)[0])):
            if buffer.scope is Scope.LOCAL and _single(s, buffer, row):
                s.stage(buffer.name, row, Scope.REGISTER)


def _single(s: Schedule, buffer: Buffer, loop: str) -> bool:
    """True where an iteration of a loop touches one element of a buffer."""
    box = analysis.region(s.loop(loop)[0].body, buffer, analysis.arith_of(s.func))
    return all(const_int(x) == 1 for _, x in box)
