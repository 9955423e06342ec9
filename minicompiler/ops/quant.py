"""Numbers as small integers (or float8) times a scale: to them and back.

    quantize(x, scale, zero; axis)     saturate(round(x / scale) + zero), in the type of `dtype`
    dequantize(x, scale, zero; axis)   (x - zero) * scale, in the type of scale

Scales are one number, one per index along `axis`, or one per `block` neighbours along `axis`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import te
from ..ir.expr import Call, Const, Expr, binary, cast, ceildiv, const
from ..ir.op import Arg, Op, Precision, register
from ..ir.types import DType, TensorType, dtype_of, float32, int32, uint8
from . import codes
from .draws import Draw, array, choice, flag, integer
from .rules import axis_of, direct, fail, need_dtype, need_same, optional

Array = np.ndarray


@dataclass(frozen=True)
class QuantizeAttrs:
    """block: how many neighbours along axis share a scale; 0: scales are per axis index.

    dtype: of the result of quantize. saturate: for float8, see codes.py.
    """

    axis: int = 1
    block: int = 0
    dtype: DType = uint8
    saturate: bool = True


def _check(op: str, x: Arg, scale: Arg, zero: Arg | None, a: QuantizeAttrs) -> None:
    need_dtype(op, scale, "fc")
    if (scale.type.rank == 1 and scale.type.shape[0] is not Const(1)) or a.block:
        axis_of(a.axis, max(x.type.rank, 1), op)
    # One for all, one per index of the axis, or one per block: of as many dimensions as x.
    fits = {0, x.type.rank} if a.block else {0, 1, x.type.rank}
    if scale.type.rank not in fits:
        fail(f"{op}: scales {scale.type} do not fit {x.type}")
    for v in (scale, zero):
        if v is not None:
            _check_sizes(op, x, v, a)
    if zero is not None and {zero.type.rank} - fits:
        fail(f"{op}: the zero points {zero.type} do not fit {x.type}")


def _check_sizes(op: str, x: Arg, v: Arg, a: QuantizeAttrs) -> None:
    """One number for all, or one for each slice or block of x along the axis."""
    rank, shape = x.type.rank, v.type.shape
    if v.type.rank == 1 and not a.block:
        if shape[0] is not Const(1):
            size = x.type.shape[a.axis % rank] if rank else 1
            need_same(op, "the axis and the scales", size, shape[0])
        return
    if v.type.rank != rank:
        return
    for k, (size, own) in enumerate(zip(x.type.shape, shape, strict=True)):
        if own is Const(1):
            continue
        wanted = ceildiv(size, a.block) if a.block and k == a.axis % rank else size
        need_same(op, f"axis {k} and the scales", wanted, own)


def _own(v: te.Tensor, i: tuple[Expr, ...], a: QuantizeAttrs) -> Expr:
    """The scale or zero point for index i, as float32 or int32."""
    rank = len(v.shape)
    if rank == 0:
        e = v[()]
    elif rank == 1 and not a.block:
        one = len(i) == 0 or v.shape[0] is Const(1)
        e = v[Const(0)] if one else v[i[a.axis % len(i)]]
    else:
        axis = a.axis % rank
        at = [k // a.block if j == axis and a.block else k for j, k in enumerate(i)]
        e = v[tuple(Const(0) if s is Const(1) else k for s, k in zip(v.shape, at, strict=True))]
    return codes.decode(e) if e.dtype.is_coded else e


def _np_own(v: Array, x: Array, a: QuantizeAttrs) -> Array:
    v = codes.np_decode(v) if dtype_of(v).is_coded else v
    if v.ndim == 1 and v.size > 1 and not a.block:
        return v.reshape([-1 if k == a.axis % x.ndim else 1 for k in range(x.ndim)])
    if v.ndim == 0 or (v.ndim == 1 and not a.block):
        return v.reshape([1] * x.ndim)
    axis = a.axis % x.ndim
    if not a.block or v.shape[axis] == 1:
        return v
    return np.repeat(v, a.block, axis)[
        tuple(slice(n) if k == axis else slice(None) for k, n in enumerate(x.shape))
    ]


# ---- quantize -----------------------------------------------------------------------------------
def _quantize_infer(x: Arg, scale: Arg, *rest: Any) -> TensorType:
    zero, a = optional(rest)
    need_dtype("quantize", x, "fi")
    _check("quantize", x, scale, zero, a)
    return TensorType(x.type.shape, a.dtype)


def _quantize_compute(x: te.Tensor, scale: te.Tensor, *rest: Any) -> te.Tensor:
    zero, a = optional(rest)

    def body(*i: Expr) -> Expr:
        e = cast(x[i], float32) / cast(_own(scale, i, a), float32)
        if codes.is_float_code(a.dtype):
            return codes.encode(e, a.dtype, a.saturate)
        point = const(0, int32) if zero is None else cast(_own(zero, i, a), int32)
        # Bounded as a float, so that the conversion cannot overflow. Differences of 16-bit numbers
        # are exact.
        low, high = (cast(const(x, int32) - point, float32) for x in codes.limits(a.dtype))
        whole = point + cast(binary("min", binary("max", Call("round", (e,)), low), high), int32)
        return codes.encode(whole, a.dtype) if a.dtype.is_coded else cast(whole, a.dtype)

    return te.compute(x.shape, body, "quantize")


def _quantize_reference(x: Array, scale: Array, *rest: Any) -> Array:
    zero, a = optional(rest)
    y = x.astype(np.float32) / _np_own(scale, x, a).astype(np.float32)
    if codes.is_float_code(a.dtype):
        return codes.np_encode(y, a.dtype, a.saturate, "nearest")
    low, high = codes.limits(a.dtype)
    whole = np.clip(np.rint(y), -1e9, 1e9).astype(np.int64)
    if zero is not None:
        whole = whole + _np_own(zero, x, a).astype(np.int64)
    return np.clip(whole, low, high).astype(np.int32).astype(a.dtype.numpy)


def _scales(draw: Draw, of: tuple[int, ...], a: QuantizeAttrs) -> tuple[int, ...]:
    axis = a.axis % len(of)
    if a.block:
        return (*of[:axis], -(-of[axis] // a.block), *of[axis + 1 :])
    return (of[axis],) if flag(draw) else ()


_TO = ("uint8", "int8", "int16", "uint16", "int4", "uint4", "float8_e4m3fn", "float8_e5m2")


def _quantize_samples(draw: Draw) -> tuple[list[Array | None], QuantizeAttrs]:
    of = tuple(integer(draw, 1, 4) for _ in range(integer(draw, 1, 3)))
    dtype = DType(choice(draw, _TO))
    block = choice(draw, (0, 0, 2))
    a = QuantizeAttrs(integer(draw, -len(of), len(of) - 1), block, dtype, flag(draw))
    own = _scales(draw, of, a)
    x = array(draw, of, choice(draw, ("float32", "float16")), -9, 9)
    zero: Array | None = None
    if flag(draw) and not codes.is_float_code(dtype):
        zero = array(draw, own, "int32", 0, 5).astype(dtype.numpy)
    # Powers of two: x / scale is exact, so that both ways round alike.
    scale = 2.0 ** array(draw, own, "int32", -4, 1)
    return [x, scale.astype(np.float32), zero], a


quantize = register(
    Op(
        "quantize",
        QuantizeAttrs,
        _quantize_infer,
        direct(_quantize_compute),
        _quantize_reference,
        _quantize_samples,
        precision=Precision.FLOAT32_INSIDE,
    )
)


# ---- dequantize ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class DequantizeAttrs(QuantizeAttrs):
    """dtype: of the result."""

    dtype: DType = float32


def _dequantize_infer(x: Arg, scale: Arg, *rest: Any) -> TensorType:
    zero, a = optional(rest)
    need_dtype("dequantize", x, "ic")
    _check("dequantize", x, scale, zero, a)
    return TensorType(x.type.shape, a.dtype)


def _dequantize_compute(x: te.Tensor, scale: te.Tensor, *rest: Any) -> te.Tensor:
    zero, a = optional(rest)

    def body(*i: Expr) -> Expr:
        e = codes.decode(x[i]) if x.dtype.is_coded else cast(x[i], int32)
        if zero is not None:
            e = e - cast(_own(zero, i, a), e.dtype)
        return cast(cast(e, float32) * cast(_own(scale, i, a), float32), a.dtype)

    return te.compute(x.shape, body, "dequantize")


def _dequantize_reference(x: Array, scale: Array, *rest: Any) -> Array:
    zero, a = optional(rest)
    y = codes.np_decode(x) if dtype_of(x).is_coded else x.astype(np.int32)
    if zero is not None:
        y = y - _np_own(zero, x, a).astype(y.dtype)
    made = y.astype(np.float32) * _np_own(scale, x, a).astype(np.float32)
    return made.astype(a.dtype.numpy)


def _dequantize_samples(draw: Draw) -> tuple[list[Array | None], DequantizeAttrs]:
    (x, scale, zero), a = _quantize_samples(draw)
    assert x is not None and scale is not None
    y = _quantize_reference(x, scale, zero, a)
    to = DType(choice(draw, ("float32", "float16")))
    return [y, scale.astype(to.numpy), zero], DequantizeAttrs(a.axis, a.block, to)


dequantize = register(
    Op(
        "dequantize",
        DequantizeAttrs,
        _dequantize_infer,
        direct(_dequantize_compute),
        _dequantize_reference,
        _dequantize_samples,
        precision=Precision.FLOAT32_INSIDE,
    )
)
