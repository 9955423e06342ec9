"""The rule for reductions across rows of memory, whose results every element needs again: a softmax
over channels, a normalisation over an axis that is not the last.

    m[i, j] = max over k of x[i, k, j];  e[i, k, j] = exp(x[i, k, j] - m[i, j]);  ...

becomes pass after pass over as many columns j as second-level cache holds for all k. Each pass goes
row by row, since what is read column by column comes from another page each time:

    for i, j_o: for k_o: for j_i: vector: m[j] = max(m[j], x[i, k_o*4, j], ..)
                for k_o: (for k_i, j_i: e[k, j] = ..; for j_i: s[j] += ..)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from minicompiler.ir.expr import ONE, Expr, Var, const_int
from minicompiler.ir.tir import PARALLEL, VECTOR, Scope
from minicompiler.target import LINE_BYTES

from . import ahead, analysis, elementwise, overlapping, rows, streaming, tails
from .loops import kept_apart
from .schedule import Schedule

ROWS = (4, 5, 3)  # that are added to what lies in cache at a time: the first that divides, or 4
LEAST = 512  # columns of a block: shorter pieces of rows are no streams
UNITS = 4  # blocks of columns per thread, at least


@dataclass(frozen=True)
class Axes:
    """The loops around the last block, by what the reductions do with their axes."""

    before: list[str]  # outside of the reduced axes
    reduced: list[str]
    columns: list[str]  # inside of all of them


def applies(s: Schedule) -> bool:
    """Reductions over the same axes, not the innermost, and a last block that has all axes."""
    axes = _axes(s)
    return axes is not None and bool(axes.before or _columns_of(s, axes) > 2 * LEAST)


def apply(s: Schedule) -> None:
    axes = _axes(s)
    assert axes is not None
    *others, last = analysis.blocks(s.func)
    whole = [b for b in others if b.body.buffer.shape == last.body.buffer.shape]
    for b in filter(rows.is_cheap, whole):
        s.inline(b.name)
    height = _height(s, axes)
    outer, inner = _split_columns(s, axes)
    s.reorder(*axes.before, *outer, *axes.reduced, *inner)
    together = [*axes.before, *outer]
    top = s.fuse(*together) if len(together) > 1 else together[0]
    names = [b.name for b in analysis.blocks(s.func)]
    for n in reversed(names[:-1]):
        s.compute_at(n, top)
    for buffer in s.func.buffers:
        s.stage(buffer.name, top, Scope.LOCAL)
    depth = len(axes.reduced)
    made = [b.name for b in whole if b.name in names]
    grouped = [*made, last.name] if streaming.is_large(s, last.name) else made
    for n in names:
        _row_by_row(s, n, top, height, depth if n in grouped else 0)
    for n in made:
        _sum_at_once(s, n, top, depth)
    work = math.prod(const_int(x.extent) or LEAST for x in analysis.loops(s.func.phases[0]))
    shared, top = overlapping.write_late(s, last.name, top)
    if work >= elementwise.WORTH_A_THREAD:
        s.mark(shared, PARALLEL)
    ahead.fetch_rows(s, top, s.target.caches[2] // 4)
    streaming.apply(s)
    tails.apart(s)


def _axes(s: Schedule) -> Axes | None:
    """None where the loop nest is of another shape."""
    every = list(analysis.blocks(s.func))
    last, path = s.block(every[-1].name)
    reduced = _reduced(s)
    if not reduced or analysis.is_reduction(last):
        return None
    loop_of: dict[Expr, Expr] = {i.var: i.value for i in last.iters}
    before, summed, columns = list[str](), list[str](), list[str]()
    for a, index in enumerate(last.body.indices):
        loop = loop_of.get(index, index)
        if isinstance(loop, Var):
            part = summed if a in reduced else before if a < max(reduced) else columns
            part.append(loop.name)
        elif const_int(loop) is None:
            return None
    around = {x.var.name for x in analysis.loops_in(path)}
    if not summed or not columns or around != {*before, *summed, *columns}:
        return None
    width = const_int(s.loop(columns[-1])[0].extent) or LEAST
    vector = s.target.lanes(last.body.buffer.dtype.bytes)
    known = all(const_int(s.loop(n)[0].extent) is not None for n in summed)
    return Axes(before, summed, columns) if known and width >= 2 * vector else None


def _reduced(s: Schedule) -> set[int]:
    """The axes that all reductions go over; none where they differ, where the innermost is one of
    them, or where a block needs more of another than what lies at its own place."""
    every = list(analysis.blocks(s.func))
    shape = every[-1].body.buffer.shape
    if any(x.layout is not None for x in (*s.func.params, *s.func.buffers)):
        return set()
    if any(len(b.body.buffer.shape) != len(shape) for b in every):
        return set()
    if sum(b.body.buffer in s.func.params for b in every) != 1:
        return set()
    axes = range(len(shape))
    over = [
        {a for a in axes if b.body.buffer.shape[a] is not shape[a]}
        for b in every
        if analysis.is_reduction(b)
    ]
    if not over or any(x != over[0] for x in over) or len(shape) - 1 in over[0]:
        return set()
    # After a transpose of a square, another axis has the same extent.
    for b in every:
        for x in analysis.operand_loads(b):
            if x.buffer in s.func.buffers and any(
                x.indices[a] is not b.body.indices[a] for a in axes if a not in over[0]
            ):
                return set()
    return over[0]


def _columns_of(s: Schedule, axes: Axes) -> int:
    return math.prod(const_int(s.loop(n)[0].extent) or 4 * LEAST for n in axes.columns)


def _split_columns(s: Schedule, axes: Axes) -> tuple[list[str], list[str]]:
    """The loops over blocks of columns, and those inside of a block."""
    height = math.prod(const_int(s.loop(n)[0].extent) or 1 for n in axes.reduced)
    size = max(4, max(x.dtype.bytes for x in s.func.params))
    line = LINE_BYTES // size
    room = s.target.caches[1] // 2 // (height * size)
    count = math.prod(const_int(s.loop(n)[0].extent) or LEAST for n in axes.before)
    room = min(room, _columns_of(s, axes) * count // (UNITS * s.target.cores))
    room = max(LEAST, room)
    outer: list[str] = []
    inner: list[str] = []
    for n in reversed(axes.columns):
        extent = const_int(s.loop(n)[0].extent)
        if outer or room == 1:
            outer.insert(0, n)
        elif extent is not None and extent <= room:
            inner.insert(0, n)
            room //= extent
        else:
            o, i = s.split(n, _part(extent, room, 1 if inner else line), "guard")
            outer.insert(0, o)
            inner.insert(0, i)
    return outer, inner


def _part(extent: int | None, most: int, multiple: int) -> int:
    """The size of blocks of about so many columns: one that divides their number, if one does."""
    most = max(1, most // multiple) * multiple
    if extent is not None:
        for size in range(most, most // 2, -multiple):
            if extent % size == 0:
                return size
    return most


def _height(s: Schedule, axes: Axes) -> int:
    """How many rows are added to what lies in cache at a time."""
    deep = const_int(s.loop(axes.reduced[-1])[0].extent) or 1
    return next((n for n in ROWS if deep % n == 0), ROWS[0])


def _row_by_row(s: Schedule, name: str, top: str, height: int, depth: int) -> None:
    """Schedules the part of a block inside a block of columns. Of the last axis that reductions go
    over, the loop at `depth`, `height` rows are taken at a time."""
    block, _ = s.block(name)
    lanes = s.target.lanes(block.body.buffer.dtype.bytes)
    lanes *= elementwise.LONG_VECTORS
    loops = s.loops_of(name, top)
    if analysis.is_reduction(block):
        _reduction(s, name, top, lanes, height)
        return
    _, v = s.split(loops[-1], lanes, "mask")
    s.mark(v, VECTOR)
    if depth:
        s.split(loops[depth - 1], height, "mask")


def _reduction(s: Schedule, name: str, top: str, lanes: int, height: int) -> None:
    """for k_o: for j_o: registers += rows k_o*4 .. k_o*4 + 3 of the vectors j_o"""
    block, path = s.block(name)
    reduce = [x.var.name for x in analysis.reduce_loops(block, analysis.loops_in(path))]
    columns = [n for n in s.loops_of(name, top) if n not in reduce]
    s.reorder(*reduce, *columns)
    init = s.decompose_reduction(name, reduce[0])
    _, v = s.split(s.loops_of(init, top)[-1], lanes, "mask")
    s.mark(v, VECTOR)
    vectors, v = s.split(columns[-1], lanes, "mask")
    k_o, k_i = s.split(reduce[-1], height, "mask")
    s.reorder(k_o, *columns[:-1], vectors, k_i, v)
    tile = s.stage(s.block(name)[0].body.buffer.name, vectors, Scope.REGISTER)
    for b in (name, f"{tile}_in", f"{tile}_out"):
        elementwise.vector_tile(s, b, vectors)


def _sum_at_once(s: Schedule, name: str, top: str, depth: int) -> None:
    """Rows are added to sums right after they were made."""
    for b in analysis.readers(s.func, s.block(name)[0].body.buffer):
        if analysis.is_reduction(b):
            own, other = [s.loops_of(n, top)[:depth] for n in (b.name, name)]
            for second, first in zip(own, other, strict=True):
                if s.loop(first)[0].extent is ONE:
                    continue
                if kept_apart(s, second, first):  # what it needs besides is not known so early
                    break
                s.compute_with(second, first)
