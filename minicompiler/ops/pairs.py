"""Two small integers in one number, whose products one instruction computes and adds.

    pairs(x[.., n, ..]; axis) -> [.., (n + 1) // 2, ..]     x[2i] | x[2i + 1] << 16

Arguments and results are int32, and what is packed fits in int16; an odd end is filled with 0. Sums
over an axis of products of such tensors are exact, like those of the integers in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .. import te
from ..ir.expr import Call, Const, Expr, binary, ceildiv, const, const_int, select
from ..ir.op import Arg, Op, register
from ..ir.types import DType, TensorType, int32
from .draws import Draw, array, integer
from .rules import axis_of, direct, fail, result, simplified

Array = np.ndarray


INT32 = -(1 << 31), (1 << 31) - 1


def need_int32(op: str, dtype: DType) -> None:
    """Checks the type of tensors of pairs."""
    if dtype is not int32:
        fail(f"{op}: pairs are int32 elements, got {dtype}", "insert a Cast")


def multiply(a: Expr, b: Expr, in_pairs: bool) -> Expr:
    """The product of two elements, or the sum of the products of two pairs."""
    return Call("dot_pairs", (a, b)) if in_pairs else a * b


def np_multiplied(f: Callable[[Array, Array], Array], a: Array, b: Array) -> Array:
    """What a sum of products does with tensors of pairs, given what it does with numbers."""
    low = [x.astype(np.int16).astype(np.int32) for x in (a, b)]
    return f(*low) + f(a >> 16, b >> 16)


# ---- pairs --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PairsAttrs:
    axis: int = -1


def _pairs_infer(x: Arg, a: PairsAttrs) -> TensorType:
    need_int32("pairs", x.type.dtype)
    axis = axis_of(a.axis, x.type.rank, "pairs")
    shape = list(x.type.shape)
    shape[axis] = simplified(ceildiv(shape[axis], 2))
    return result(tuple(shape), int32)


def _pairs_compute(x: te.Tensor, a: PairsAttrs) -> te.Tensor:
    axis = a.axis % len(x.shape)
    size = x.shape[axis]
    extents = list(x.shape)
    extents[axis] = simplified(ceildiv(size, 2))
    count = const_int(size)

    def body(*i: Expr) -> Expr:
        def element(k: Expr) -> Expr:
            return x[(*i[:axis], k, *i[axis + 1 :])]

        first = i[axis] * 2
        high = element(first + 1)
        if count is None or count % 2:
            high = select(first + 1 < size, high, const(0, int32))
        low = binary("and", element(first), Const(0xFFFF, int32))
        return binary("or", low, binary("shl", high, Const(16, int32)))

    return te.compute(extents, body, "pairs")


def _pairs_reference(x: Array, a: PairsAttrs) -> Array:
    axis = a.axis % x.ndim
    odd = [(0, x.shape[k] % 2 if k == axis else 0) for k in range(x.ndim)]
    halves = np.moveaxis(np.pad(x, odd), axis, -1)
    packed = (halves[..., ::2] & 0xFFFF) | (halves[..., 1::2] << 16)
    return np.ascontiguousarray(np.moveaxis(packed, -1, axis)).astype(np.int32)


def _pairs_samples(draw: Draw) -> tuple[list[Array], PairsAttrs]:
    of = tuple(integer(draw, 1, 5) for _ in range(integer(draw, 1, 3)))
    x = array(draw, of, "int32", -(1 << 15), (1 << 15) - 1)
    return [x], PairsAttrs(integer(draw, -len(of), len(of) - 1))


pairs = register(
    Op(
        "pairs",
        PairsAttrs,
        _pairs_infer,
        direct(_pairs_compute),
        _pairs_reference,
        _pairs_samples,
    )
)
