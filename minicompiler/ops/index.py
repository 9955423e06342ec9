"""Operators that read elements at positions held in another tensor, and one_hot.

    gather(x, indices; axis)           numpy.take; negative indices count from the end
    gather_elements(x, indices; axis)  numpy.take_along_axis
    gather_nd(x, indices; batch_dims)  the last axis of indices holds a position in x

Positions outside x are moved to its edge: reading stays within memory whatever the data.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .. import te
from ..ir.expr import Const, Expr, binary, cast, const_int, eq, minimum, select, wrap
from ..ir.op import Arg, Op, register
from ..ir.types import TensorType, index
from .draws import Draw, array, choice, flag, integer, shape
from .rules import (
    Size,
    axis_of,
    clamped,
    direct,
    fail,
    need_const,
    need_dtype,
    need_rank,
    need_same,
    result,
    same_size,
    simplified,
    symbolic,
    wrapped,
)
from .shape import MOVED

Array = np.ndarray


@dataclass(frozen=True)
class GatherAttrs:
    axis: int = 0


# ---- gather -------------------------------------------------------------------------------------
def _gather_infer(x: Arg, indices: Arg, a: GatherAttrs) -> TensorType:
    need_dtype("gather", indices, "i")
    need_rank("gather", x, 1)
    axis = axis_of(a.axis, x.type.rank, "gather")
    shape = x.type.shape
    size = const_int(shape[axis])
    for e in () if indices.content is None else indices.content.reshape(-1):
        at = const_int(e)
        if at is not None and size is not None and not -size <= at < size:
            fail(f"gather: index {at} is out of range for axis {axis} of {x.type}")
    return TensorType((*shape[:axis], *indices.type.shape, *shape[axis + 1 :]), x.type.dtype)


def _gather_compute(x: te.Tensor, indices: te.Tensor, a: GatherAttrs) -> te.Tensor:
    axis = a.axis % len(x.shape)
    count = len(indices.shape)

    def body(*i: Expr) -> Expr:
        at = indices[i[axis : axis + count]]
        return x[(*i[:axis], wrapped(at, x.shape[axis]), *i[axis + count :])]

    return te.compute((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]), body, "gather")


def _gather_reference(x: Array, indices: Array, a: GatherAttrs) -> Array | None:
    if symbolic(indices):
        known = [const_int(wrap(e)) for e in indices.reshape(-1)]
        if None in known:
            return None
        indices = np.array(known, dtype=np.int64).reshape(indices.shape)
    return np.asarray(np.take(x, indices, axis=a.axis))


def _gather_samples(draw: Draw) -> tuple[list[Array], GatherAttrs]:
    of = shape(draw, 1, 3)
    axis = integer(draw, -len(of), len(of) - 1)
    dtype = choice(draw, ("int64", "int32"))
    at = array(draw, shape(draw, 0, 2), dtype, -of[axis], of[axis] - 1)
    return [array(draw, of, choice(draw, MOVED)), at], GatherAttrs(axis)


gather = register(
    Op(
        "gather",
        GatherAttrs,
        _gather_infer,
        direct(_gather_compute),
        _gather_reference,
        _gather_samples,
        shape_math=True,
    )
)


# ---- gather_elements ----------------------------------------------------------------------------
def _elements_infer(x: Arg, indices: Arg, a: GatherAttrs) -> TensorType:
    need_dtype("gather_elements", indices, "i")
    axis_of(a.axis, need_rank("gather_elements", x, 1), "gather_elements")
    if indices.type.rank != x.type.rank:
        fail(f"gather_elements: {x.type} and indices {indices.type} differ in rank")
    for k, (size, room) in enumerate(zip(indices.type.shape, x.type.shape, strict=True)):
        if k != a.axis % x.type.rank and same_size(minimum(size, room), size) is False:
            fail(f"gather_elements: indices {indices.type} are longer than {x.type} at axis {k}")
    return TensorType(indices.type.shape, x.type.dtype)


def _elements_compute(x: te.Tensor, indices: te.Tensor, a: GatherAttrs) -> te.Tensor:
    axis = a.axis % len(x.shape)

    def place(k: int, i: Expr) -> Expr:
        size, room = indices.shape[k], x.shape[k]
        return i if same_size(minimum(size, room), size) else clamped(i, room)

    def body(*i: Expr) -> Expr:
        at = [place(k, e) for k, e in enumerate(i)]
        at[axis] = wrapped(indices[i], x.shape[axis])
        return x[tuple(at)]

    return te.compute(indices.shape, body, "gather_elements")


def _elements_reference(x: Array, indices: Array, a: GatherAttrs) -> Array:
    axis = a.axis % x.ndim
    # ONNX lets the other axes of indices be shorter than those of x.
    crop = tuple(slice(None) if k == axis else slice(n) for k, n in enumerate(indices.shape))
    return np.take_along_axis(x[crop], indices.astype(np.int64), axis=axis)


def _elements_samples(draw: Draw) -> tuple[list[Array], GatherAttrs]:
    of = shape(draw, 1, 3)
    axis = integer(draw, -len(of), len(of) - 1)
    own = [integer(draw, 1, s) for s in of]
    own[axis] = integer(draw, 1, 5)
    at = array(draw, own, "int64", -of[axis], of[axis] - 1)
    return [array(draw, of, choice(draw, MOVED)), at], GatherAttrs(axis)


gather_elements = register(
    Op(
        "gather_elements",
        GatherAttrs,
        _elements_infer,
        direct(_elements_compute),
        _elements_reference,
        _elements_samples,
    )
)


# ---- gather_nd ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class GatherNdAttrs:
    """batch_dims: leading dimensions that x and indices share."""

    batch_dims: int = 0


def _depth(indices: Size) -> int:
    return need_const("gather_nd", "the last size of the indices", wrap(indices))


def _nd_infer(x: Arg, indices: Arg, a: GatherNdAttrs) -> TensorType:
    need_dtype("gather_nd", indices, "i")
    need_rank("gather_nd", indices, 1 + a.batch_dims)
    depth, b = _depth(indices.type.shape[-1]), a.batch_dims
    if b + depth > x.type.rank:
        fail(f"gather_nd: positions of {depth} numbers into {x.type} after {b} batch dimensions")
    for k in range(b):
        need_same("gather_nd", "batch dimensions", x.type.shape[k], indices.type.shape[k])
    return TensorType((*indices.type.shape[:-1], *x.type.shape[b + depth :]), x.type.dtype)


def _nd_compute(x: te.Tensor, indices: te.Tensor, a: GatherNdAttrs) -> te.Tensor:
    depth, b = _depth(indices.shape[-1]), a.batch_dims
    lead = len(indices.shape) - 1

    def body(*i: Expr) -> Expr:
        at = [wrapped(indices[(*i[:lead], Const(k))], x.shape[b + k]) for k in range(depth)]
        return x[(*i[:b], *at, *i[lead:])]

    return te.compute((*indices.shape[:-1], *x.shape[b + depth :]), body, "gather_nd")


def _nd_reference(x: Array, indices: Array, a: GatherNdAttrs) -> Array:
    b = a.batch_dims
    batch = np.indices(indices.shape[:-1])[:b]
    return np.asarray(x[(*batch, *np.moveaxis(indices, -1, 0))])


def _nd_samples(draw: Draw) -> tuple[list[Array], GatherNdAttrs]:
    of = shape(draw, 1, 4)
    b = integer(draw, 0, min(1, len(of) - 1))
    depth = integer(draw, 1, len(of) - b)
    lead = (*of[:b], *shape(draw, 0, 2))
    columns = [array(draw, lead, "int64", -s, s - 1) for s in of[b : b + depth]]
    return [array(draw, of, choice(draw, MOVED)), np.stack(columns, -1)], GatherNdAttrs(b)


gather_nd = register(
    Op(
        "gather_nd",
        GatherNdAttrs,
        _nd_infer,
        direct(_nd_compute),
        _nd_reference,
        _nd_samples,
    )
)


# ---- one_hot ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class OneHotAttrs:
    """A new axis of size depth; values hold (off, on). Indices out of range give no `on`."""

    depth: Size = 1
    axis: int = -1


def _one_hot_infer(indices: Arg, values: Arg, a: OneHotAttrs) -> TensorType:
    need_dtype("one_hot", indices, "if")
    need_rank("one_hot", values, 1, 1)
    need_same("one_hot", "the number of values and 2", values.type.shape[0], 2)
    axis = axis_of(a.axis, indices.type.rank + 1, "one_hot")
    shape = indices.type.shape
    return result((*shape[:axis], a.depth, *shape[axis:]), values.type.dtype)


def _one_hot_compute(indices: te.Tensor, values: te.Tensor, a: OneHotAttrs) -> te.Tensor:
    axis = a.axis % (len(indices.shape) + 1)
    depth = wrap(a.depth)

    def body(*i: Expr) -> Expr:
        at = cast(indices[(*i[:axis], *i[axis + 1 :])], index)
        hit = binary("or", eq(at, i[axis]), eq(at + depth, i[axis]))
        return select(hit, values[Const(1)], values[Const(0)])

    shape = (*indices.shape[:axis], simplified(depth), *indices.shape[axis:])
    return te.compute(shape, body, "one_hot")


def _one_hot_reference(indices: Array, values: Array, a: OneHotAttrs) -> Array:
    depth = need_const("one_hot", "the depth", wrap(a.depth))
    at = np.expand_dims(indices.astype(np.int64), a.axis)
    line = [1] * at.ndim
    line[a.axis] = depth
    row = np.arange(depth).reshape(line)
    return np.where((at == row) | (at + depth == row), values[1], values[0])


def _one_hot_samples(draw: Draw) -> tuple[list[Array], OneHotAttrs]:
    of = shape(draw, 0, 3)
    depth = integer(draw, 1, 4)
    axis = integer(draw, -len(of) - 1, len(of))
    values = array(draw, (2,), choice(draw, ("float32", "int32")))
    dtype = "float32" if flag(draw) else "int64"
    at = array(draw, of, "int64", -depth - 1, depth).astype(dtype)
    return [at, values], OneHotAttrs(depth, axis)


one_hot = register(
    Op(
        "one_hot",
        OneHotAttrs,
        _one_hot_infer,
        direct(_one_hot_compute),
        _one_hot_reference,
        _one_hot_samples,
    )
)


# ---- reverse_sequence ---------------------------------------------------------------------------
@dataclass(frozen=True)
class ReverseAttrs:
    """The first lengths[b] elements along `time` are reversed, b the index along `batch`."""

    time: int = 0
    batch: int = 1


def _reverse_infer(x: Arg, lengths: Arg, a: ReverseAttrs) -> TensorType:
    need_dtype("reverse_sequence", lengths, "i")
    rank = need_rank("reverse_sequence", x, 2)
    axis_of(a.time, rank, "reverse_sequence")
    batch = axis_of(a.batch, rank, "reverse_sequence")
    need_rank("reverse_sequence", lengths, 1, 1)
    need_same("reverse_sequence", "batch sizes", x.type.shape[batch], lengths.type.shape[0])
    return x.type


def _reverse_compute(x: te.Tensor, lengths: te.Tensor, a: ReverseAttrs) -> te.Tensor:
    rank = len(x.shape)
    time, batch = a.time % rank, a.batch % rank

    def body(*i: Expr) -> Expr:
        length = cast(lengths[i[batch]], index)
        at = select(i[time] < length, length - 1 - i[time], i[time])
        return x[(*i[:time], clamped(at, x.shape[time]), *i[time + 1 :])]

    return te.compute(x.shape, body, "reverse_sequence")


def _reverse_reference(x: Array, lengths: Array, a: ReverseAttrs) -> Array:
    made = x.copy()
    for b, n in enumerate(lengths):
        own = [slice(None)] * x.ndim
        own[a.batch] = slice(b, b + 1)
        own[a.time] = slice(0, int(n))
        made[tuple(own)] = np.flip(x[tuple(own)], a.time)
    return made


def _reverse_samples(draw: Draw) -> tuple[list[Array], ReverseAttrs]:
    of = shape(draw, 2, 3)
    a = ReverseAttrs(0, 1) if flag(draw) else ReverseAttrs(1, 0)
    lengths = array(draw, (of[a.batch],), "int64", 1, of[a.time])
    return [array(draw, of, choice(draw, MOVED)), lengths], a


reverse_sequence = register(
    Op(
        "reverse_sequence",
        ReverseAttrs,
        _reverse_infer,
        direct(_reverse_compute),
        _reverse_reference,
        _reverse_samples,
    )
)
