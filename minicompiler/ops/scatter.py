"""Operators that write elements to positions held in another tensor.

    scatter_elements(x, indices, updates; axis)    x with x[.., indices[i, j], ..] = updates[i, j]
    scatter_nd(x, indices, updates)                the last axis of indices holds a position in x

Several updates of one element are combined by `reduction`, or the last one wins. Positions outside
x are moved to its edge: writing stays within memory whatever the data.

Where a position leaves an axis free, threads take strips of that axis: each goes through all
updates in their order, so the sums have the same bits for any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import te
from ..ir.expr import (
    ONE,
    Const,
    Expr,
    Load,
    Var,
    binary,
    cast,
    ceildiv,
    const_int,
    maximum,
    minimum,
    select,
    wrap,
)
from ..ir.op import Arg, Op, register
from ..ir.tir import PARALLEL, SERIAL, VECTOR, Buffer, For, Stmt, Store, seq
from ..ir.types import TensorType, index
from .draws import Draw, array, choice, integer, shape
from .rules import (
    axis_of,
    clamped,
    direct,
    fail,
    inside,
    is_low,
    need_const,
    need_dtype,
    need_rank,
    need_same,
    same_dtype,
    same_size,
    wide,
    wrapped,
)

Array = np.ndarray
Fresh = Callable[[str], Var]
LANES = 16  # elements of a strip that are written side by side
REDUCTIONS = ("none", "add", "mul", "max", "min")
_NP = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}


def over(shape: Sequence[Expr], fresh: Fresh, body: Callable[..., Stmt]) -> Stmt:
    """body(i, j, ...) for every index of a shape, in row-major order."""
    index = [fresh("i") for _ in shape]
    made = body(*index)
    for v, extent in reversed(list(zip(index, shape, strict=True))):
        made = For(v, extent, SERIAL, made)
    return made


def strips(extent: Expr, fresh: Fresh, body: Callable[[Expr, Expr], Stmt]) -> Stmt:
    """body(first element, one past the last) for strips of an axis, shared out between threads.
    Two cache lines at least: with shorter ones the threads would write the same lines in turns."""
    width = 2 * LANES if (const_int(extent) or 1 << 30) < 8 * LANES else 4 * LANES
    k = fresh("strip")
    return For(
        k, ceildiv(extent, width), PARALLEL, body(k * width, minimum(k * width + width, extent))
    )


def along(
    low: Expr, high: Expr, fresh: Fresh, body: Callable[[Expr], Stmt], lanes: int = LANES
) -> Stmt:
    """body(j) for low <= j < high, `lanes` at a time; the bodies must not depend on each other."""
    part, lane, rest = fresh("part"), fresh("lane"), fresh("rest")
    whole = (high - low) // lanes
    vector = For(lane, wrap(lanes), VECTOR, body(low + part * lanes + lane))
    left = high - low - whole * lanes
    tail = For(rest, left, SERIAL, body(low + whole * lanes + rest))
    return seq([For(part, whole, SERIAL, vector), tail])


def line_from(shape: Sequence[Expr], axis: int) -> int:
    """The first axis, from `axis` on, behind which all sizes are known: as one axis, only they
    divide its index."""
    last = len(shape) - 1
    return next(k for k in range(axis, last + 1) if None not in map(const_int, shape[k + 1 :]))


def product(sizes: Sequence[Expr]) -> Expr:
    return math.prod(sizes[1:], start=sizes[0]) if sizes else ONE


def unravelled(index: Expr, sizes: Sequence[Expr]) -> list[Expr]:
    """The indices of an element of several axes, by its number."""
    found: list[Expr] = []
    for size in reversed(sizes[1:]):
        found.insert(0, index % size)
        index = index // size
    return [index, *found]


def _combined(reduction: str, target: Buffer, at: tuple[Expr, ...], value: Expr) -> Store:
    if reduction == "none":
        return Store(target, at, value)
    old: Expr = Load(target, at)
    if is_low(value.dtype):
        inner = wide(value.dtype)
        return Store(
            target, at, cast(binary(reduction, cast(old, inner), cast(value, inner)), value.dtype)
        )
    return Store(target, at, binary(reduction, old, value))


def _check_reduction(op: str, reduction: str, x: Arg) -> None:
    if reduction not in REDUCTIONS:
        fail(f"{op}: reduction {reduction!r} is not one of {', '.join(REDUCTIONS)}")
    if reduction != "none":
        need_dtype(op, x, "fi")


# ---- scatter_elements ---------------------------------------------------------------------------
@dataclass(frozen=True)
class ScatterAttrs:
    axis: int = 0
    reduction: str = "none"


def _elements_infer(x: Arg, indices: Arg, updates: Arg, a: ScatterAttrs) -> TensorType:
    need_dtype("scatter_elements", indices, "i")
    axis_of(a.axis, need_rank("scatter_elements", x, 1), "scatter_elements")
    _check_reduction("scatter_elements", a.reduction, x)
    if not indices.type.rank == updates.type.rank == x.type.rank:
        fail(f"scatter_elements: {x.type}, {indices.type} and {updates.type} differ in rank")
    for k, (size, other) in enumerate(zip(indices.type.shape, updates.type.shape, strict=True)):
        need_same("scatter_elements", f"axis {k} of indices and updates", size, other)
        room = x.type.shape[k]
        if k != a.axis % x.type.rank and same_size(minimum(size, room), size) is False:
            fail(f"scatter_elements: indices {indices.type} are longer than {x.type} at axis {k}")
    same_dtype("scatter_elements", x, updates)
    return x.type


def _elements_compute(
    x: te.Tensor, indices: te.Tensor, updates: te.Tensor, a: ScatterAttrs
) -> te.Tensor:
    axis = a.axis % len(x.shape)

    def build(ins: list[Buffer], outs: list[Buffer], fresh: Fresh) -> Stmt:
        where, values = ins
        (made,) = outs

        def inner(k: int, i: Expr) -> Expr:
            size, room = where.shape[k], made.shape[k]
            return i if same_size(minimum(size, room), size) else clamped(i, room)

        def put(*i: Expr) -> Stmt:
            place = [inner(k, e) for k, e in enumerate(i)]
            place[axis] = wrapped(Load(where, i), made.shape[axis])
            return _combined(a.reduction, made, tuple(place), Load(values, i))

        if len(made.shape) == 1:
            return over(where.shape, fresh, put)
        if axis == len(made.shape) - 1:  # each row of x takes its own updates alone
            r, rows = fresh("r"), minimum(where.shape[0], made.shape[0])
            return For(r, rows, PARALLEL, over(where.shape[1:], fresh, lambda *i: put(r, *i)))

        def strip(low: Expr, high: Expr) -> Stmt:
            """Columns low .. high of all rows."""
            j = fresh("j")
            columns = maximum(minimum(high, where.shape[-1]) - low, 0)

            def some(*i: Expr) -> Stmt:
                return For(j, columns, SERIAL, put(*i, low + j))

            return over(where.shape[:-1], fresh, some)

        return strips(where.shape[-1], fresh, strip)

    return te.changed("scatter_elements", x, (indices, updates), build)


def _elements_reference(x: Array, indices: Array, updates: Array, a: ScatterAttrs) -> Array:
    axis = a.axis % x.ndim
    made = x.copy()
    at: list[Array] = list(np.indices(indices.shape))
    at[axis] = np.where(indices < 0, indices + x.shape[axis], indices)
    return _np_scatter(made, tuple(at), updates, a.reduction)


def _np_scatter(made: Array, at: tuple[Any, ...], updates: Array, reduction: str) -> Array:
    if reduction == "none":
        made[at] = updates
        return made
    wide_made = made.astype(np.float32) if made.dtype.itemsize == 2 else made
    places = [p.reshape(-1) for p in np.broadcast_arrays(*at)]
    values = updates.reshape(len(places[0]), *made.shape[len(at) :])
    for place, value in zip(zip(*places, strict=True), values, strict=True):
        # Rounded after every step, as the kernel does.
        wide_made[place] = _NP[reduction](wide_made[place], value).astype(made.dtype)
    return wide_made.astype(made.dtype)


def _elements_samples(draw: Draw) -> tuple[list[Array], ScatterAttrs]:
    of = shape(draw, 1, 3)
    axis = integer(draw, -len(of), len(of) - 1)
    own = tuple(integer(draw, 1, s) for s in of)
    at = array(draw, own, choice(draw, ("int64", "int32")), -of[axis], of[axis] - 1)
    reduction = choice(draw, REDUCTIONS)
    if reduction == "none":  # which of several updates is last depends on nothing but their order
        at = np.sort(at, axis=axis)
    dtype = choice(draw, ("float32", "float64", "float16", "int64", "int8"))
    a = ScatterAttrs(axis, reduction)
    return [array(draw, of, dtype), at, array(draw, own, dtype)], a


scatter_elements = register(
    Op(
        "scatter_elements",
        ScatterAttrs,
        _elements_infer,
        direct(_elements_compute),
        _elements_reference,
        _elements_samples,
    )
)


# ---- scatter_nd ---------------------------------------------------------------------------------
def _nd_infer(x: Arg, indices: Arg, updates: Arg, a: ScatterAttrs) -> TensorType:
    need_dtype("scatter_nd", indices, "i")
    need_rank("scatter_nd", indices, 1)
    _check_reduction("scatter_nd", a.reduction, x)
    depth = need_const("scatter_nd", "the last size of the indices", indices.type.shape[-1])
    if depth > x.type.rank or updates.type.rank != indices.type.rank - 1 + x.type.rank - depth:
        fail(f"scatter_nd: positions {indices.type} and updates {updates.type} do not fit {x.type}")
    wanted = (*indices.type.shape[:-1], *x.type.shape[depth:])
    for k, (size, own) in enumerate(zip(wanted, updates.type.shape, strict=True)):
        need_same("scatter_nd", f"axis {k} of the updates and what they replace", own, size)
    same_dtype("scatter_nd", x, updates)
    return x.type


def _nd_compute(x: te.Tensor, indices: te.Tensor, updates: te.Tensor, a: ScatterAttrs) -> te.Tensor:
    depth = need_const("scatter_nd", "the last size of the indices", indices.shape[-1])
    lead = len(indices.shape) - 1

    def build(ins: list[Buffer], outs: list[Buffer], fresh: Fresh) -> Stmt:
        where, values = ins
        (made,) = outs

        def put(*i: Expr) -> Stmt:
            at = [wrapped(Load(where, (*i[:lead], Const(k))), made.shape[k]) for k in range(depth)]
            return _combined(a.reduction, made, (*at, *i[lead:]), Load(values, i))

        if depth == len(made.shape):
            return over(where.shape[:-1], fresh, put)
        first = line_from(made.shape, depth)
        line = made.shape[first:]

        def strip(low: Expr, high: Expr) -> Stmt:
            """Elements low .. high of the lines of all updates."""

            def part(*i: Expr) -> Stmt:
                return along(low, high, fresh, lambda j: put(*i, *unravelled(j, line)))

            return over(values.shape[: lead + first - depth], fresh, part)

        return strips(product(line), fresh, strip)

    return te.changed("scatter_nd", x, (indices, updates), build)


def _nd_reference(x: Array, indices: Array, updates: Array, a: ScatterAttrs) -> Array:
    at = tuple(
        np.where(p < 0, p + n, p)
        for p, n in zip(np.moveaxis(indices, -1, 0), x.shape, strict=False)
    )
    return _np_scatter(x.copy(), at, updates, a.reduction)


def _nd_samples(draw: Draw) -> tuple[list[Array], ScatterAttrs]:
    of = shape(draw, 1, 3)
    depth = integer(draw, 1, len(of))
    lead = shape(draw, 1, 2, 3)
    at = np.stack([array(draw, lead, "int64", -s, s - 1) for s in of[:depth]], -1)
    dtype = choice(draw, ("float32", "float16", "int32"))
    reduction = choice(draw, REDUCTIONS)
    values = array(draw, (*lead, *of[depth:]), dtype)
    if reduction == "none":
        values[...] = 1
    return [array(draw, of, dtype), at, values], ScatterAttrs(0, reduction)


scatter_nd = register(
    Op(
        "scatter_nd",
        ScatterAttrs,
        _nd_infer,
        direct(_nd_compute),
        _nd_reference,
        _nd_samples,
    )
)


# ---- write_at -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class WriteAtAttrs:
    """circular: what runs over the end goes on at the start."""

    axis: int = -2
    circular: bool = False


def _write_infer(x: Arg, updates: Arg, start: Arg, a: WriteAtAttrs) -> TensorType:
    axis_of(a.axis, need_rank("write_at", x, 2), "write_at")
    need_rank("write_at", updates, x.type.rank, x.type.rank)
    need_rank("write_at", start, 1, 1)
    need_dtype("write_at", start, "i")
    same_dtype("write_at", x, updates)
    for k, (size, other) in enumerate(zip(x.type.shape, updates.type.shape, strict=True)):
        if k != a.axis % x.type.rank:
            need_same("write_at", f"axis {k} of the tensor and of what is written", size, other)
        else:
            need_same("write_at", "what is written and what fits", maximum(size, other), size)
    count = start.type.shape[0]
    need_same("write_at", "the batch and the number of positions", x.type.shape[0], count)
    return x.type


def _write_compute(
    x: te.Tensor, updates: te.Tensor, start: te.Tensor, a: WriteAtAttrs
) -> te.Tensor:
    axis = a.axis % len(x.shape)
    size, length = x.shape[axis], updates.shape[axis]

    def body(*i: Expr) -> Expr:
        at = i[axis] - cast(start[i[0]], index)
        at = at % size if a.circular else at
        value = updates[(*i[:axis], clamped(at, length), *i[axis + 1 :])]
        return select(inside(at, length), value, x[i])

    return te.compute(x.shape, body, "write_at")


def _write_reference(x: Array, updates: Array, start: Array, a: WriteAtAttrs) -> Array:
    axis = a.axis % x.ndim
    made = np.moveaxis(x.copy(), axis, 1)
    new = np.moveaxis(updates, axis, 1)
    for b, t in np.ndindex(*new.shape[:2]):
        at = int(start[b]) + t
        at = at % made.shape[1] if a.circular else at
        if 0 <= at < made.shape[1]:
            made[b, at] = new[b, t]
    return np.moveaxis(made, 1, axis)


def _write_samples(draw: Draw) -> tuple[list[Array], WriteAtAttrs]:
    of = (integer(draw, 1, 3), integer(draw, 1, 5), integer(draw, 1, 3))
    axis = choice(draw, (1, 2, -1))
    own = tuple(integer(draw, 1, s) if k == axis % 3 else s for k, s in enumerate(of))
    circular = choice(draw, (True, False))
    most = of[axis] - 1 if circular else of[axis] - own[axis]
    start = array(draw, of[:1], "int64", 0, most)
    return [array(draw, of), array(draw, own), start], WriteAtAttrs(axis, circular)


write_at = register(
    Op(
        "write_at",
        WriteAtAttrs,
        _write_infer,
        direct(_write_compute),
        _write_reference,
        _write_samples,
    )
)
