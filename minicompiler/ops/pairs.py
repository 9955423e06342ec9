"""Two small integers in one number, whose products one instruction computes and adds.

    pairs(x[.., n, ..], zero?; axis) -> [.., (n + 1) // 2, ..]    x[2i] - zero | x[2i + 1] - zero

The first of a pair is the low half of an int32 and the second the high one. Differences have to fit
in int16; an odd end is filled with 0. Sums over an axis of products of such tensors are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import te
from ..ir.expr import Call, Expr, binary, cast, ceildiv, const, const_int, select
from ..ir.op import Arg, Op, register
from ..ir.types import DType, TensorType, int32
from .draws import Draw, array, choice, flag, integer
from .rules import axis_of, direct, fail, need_dtype, need_rank, optional, result, simplified

Array = np.ndarray


INT32 = -(1 << 31), (1 << 31) - 1


def need_int32(op: str, dtype: DType) -> None:
    """Checks the type of tensors of pairs."""
    if dtype is not int32:
        fail(f"{op}: pairs are int32 elements, got {dtype}", "insert a Cast")


def multiply(a: Expr, b: Expr, in_pairs: bool) -> Expr:
    """The product of two elements, or the sum of the products of two pairs."""
    return Call("dot_pairs", (a, b)) if in_pairs else a * b


def as_sum(e: Expr) -> Expr:
    """A pair as low + 2**16 * high: sums and multiples of such numbers are, modulo 2**32, those of
    both."""
    return e - _borrowed(e)


def as_halves(e: Expr) -> Expr:
    """The pair that `as_sum` made a number of, where both fit in 16 bits."""
    return e + _borrowed(e)


def _borrowed(e: Expr) -> Expr:
    """What a negative low half takes from the high one."""
    return binary("shl", binary("and", e, const(0x8000, int32)), const(1, int32))


def np_multiplied(f: Callable[[Array, Array], Array], a: Array, b: Array) -> Array:
    """What a sum of products does with tensors of pairs, given what it does with numbers."""
    low = [x.astype(np.int16).astype(np.int32) for x in (a, b)]
    return f(*low) + f(a >> 16, b >> 16)


# ---- pairs --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PairsAttrs:
    axis: int = -1


def _pairs_infer(x: Arg, *rest: Any) -> TensorType:
    zero, a = optional(rest)
    need_dtype("pairs", x, "i")
    if zero is not None:
        need_int32("pairs", zero.type.dtype)
        need_rank("pairs", zero, 0, 0)
    axis = axis_of(a.axis, x.type.rank, "pairs")
    shape = list(x.type.shape)
    shape[axis] = ceildiv(shape[axis], 2)
    return result(shape, int32)


def _pairs_compute(x: te.Tensor, *rest: Any) -> te.Tensor:
    zero, a = optional(rest)
    axis = a.axis % len(x.shape)
    size = x.shape[axis]
    extents = [simplified(ceildiv(n, 2)) if k == axis else n for k, n in enumerate(x.shape)]
    count = const_int(size)

    def body(*i: Expr) -> Expr:
        def element(k: Expr) -> Expr:
            e = cast(x[(*i[:axis], k, *i[axis + 1 :])], int32)
            return e if zero is None else e - zero[()]

        first = i[axis] * 2
        high = element(first + 1)
        if count is None or count % 2:
            high = select(first + 1 < size, high, const(0, int32))
        low = binary("and", element(first), const(0xFFFF, int32))
        return binary("or", low, binary("shl", high, const(16, int32)))

    return te.compute(extents, body, "pairs")


def _pairs_reference(x: Array, *rest: Any) -> Array:
    zero, a = optional(rest)
    x = x.astype(np.int32) - (0 if zero is None else zero)
    axis = a.axis % x.ndim
    odd = [(0, x.shape[k] % 2 if k == axis else 0) for k in range(x.ndim)]
    halves = np.moveaxis(np.pad(x, odd), axis, -1)
    packed = (halves[..., ::2] & 0xFFFF) | (halves[..., 1::2] << 16)
    return np.ascontiguousarray(np.moveaxis(packed, -1, axis)).astype(np.int32)


def _pairs_samples(draw: Draw) -> tuple[list[Array | None], PairsAttrs]:
    of = tuple(integer(draw, 1, 5) for _ in range(integer(draw, 1, 3)))
    x = array(draw, of, choice(draw, ("int32", "int16", "uint8", "int8")), -128, 127)
    zero = array(draw, (), "int32", -255, 255) if flag(draw) else None
    return [x, zero], PairsAttrs(integer(draw, -len(of), len(of) - 1))


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
