"""Converters of ONNX's quantized operators.

QLinearMatMul(a, b) -> quantize(cast(matmul(int32(a) - zero_a, int32(b) - zero_b)) * scale)
"""

from __future__ import annotations

import numpy as np

from minicompiler.ir.expr import ONE
from minicompiler.ir.graph import Value, type_of
from minicompiler.ir.types import DType, float32, int32, uint8
from minicompiler.ops import elementwise as el
from minicompiler.ops import linalg
from minicompiler.ops import quant as qt
from minicompiler.ops import reduce as red
from minicompiler.ops import shape as sh

from .onnx_data import element_type
from .onnx_math import Converter, cast_to
from .onnx_nn import convolution
from .onnx_node import OnnxNode


def _dtype(n: OnnxNode, default: DType) -> DType:
    code = n.attr("output_dtype", 0)
    return element_type(code, f"the result of {n.op_type}", n.loc.file) if code else default


def _quantize(n: OnnxNode) -> Value:
    zero = n.opt(2)
    dtype = _dtype(n, uint8) if zero is None else type_of(zero).dtype
    attrs = qt.QuantizeAttrs(
        n.attr("axis", 1), n.attr("block_size", 0), dtype, bool(n.attr("saturate", 1))
    )
    return n.apply(qt.quantize, n.arg(0), n.arg(1), zero, attrs=attrs)


def _dequantize(n: OnnxNode) -> Value:
    scale = n.type(1).dtype
    dtype = _dtype(n, float32 if scale.is_coded else scale)
    attrs = qt.DequantizeAttrs(n.attr("axis", 1), n.attr("block_size", 0), dtype)
    return n.apply(qt.dequantize, n.arg(0), n.arg(1), n.opt(2), attrs=attrs)


def _dynamic_quantize(n: OnnxNode) -> tuple[Value, ...]:
    """Scale and zero point from the range of the data, which always holds 0."""
    x = n.arg(0)
    everything = red.ReduceAttrs(None, False)
    zero = n.constant(0, np.float32)
    low = n.apply(red.reduce_min, x, attrs=everything, name="")
    low = n.apply(el.minimum_, low, zero, name="")
    high = n.apply(red.reduce_max, x, attrs=everything, name="")
    high = n.apply(el.maximum_, high, zero, name="")
    span = n.apply(el.sub, high, low, name="")
    scale = n.apply(el.div, span, n.constant(255, np.float32), name=n.outputs[1])
    first = n.apply(el.div, n.apply(el.sub, zero, low, name=""), scale, name="")
    rounded = n.apply(el.round_, first, name="")
    bounded = n.apply(el.clip, rounded, attrs=el.ClipAttrs(0, 255), name="")
    point = cast_to(n, bounded, uint8, n.outputs[2])
    attrs = qt.QuantizeAttrs(dtype=uint8)
    return n.apply(qt.quantize, x, scale, point, attrs=attrs, name=n.outputs[0]), scale, point


# ---- products of integers -----------------------------------------------------------------------
def _centred(n: OnnxNode, x: Value, zero: Value | None, axis: int) -> Value:
    """x - zero as int32; several zero points belong to indices along an axis."""
    wide = cast_to(n, x, int32)
    if zero is None:
        return wide
    return n.apply(el.sub, wide, _along(n, cast_to(n, zero, int32), axis, x), name="")


def _along(n: OnnxNode, v: Value, axis: int, x: Value) -> Value:
    """A vector such that it broadcasts along one axis of x."""
    t, rank = type_of(v), type_of(x).rank
    if t.rank != 1:
        return v
    if t.shape[0] is ONE:
        return n.apply(sh.reshape, v, attrs=sh.ReshapeAttrs(()), name="")
    shape = [ONE] * rank
    shape[axis] = t.shape[0]
    return n.apply(sh.reshape, v, attrs=sh.ReshapeAttrs(tuple(shape)), name="")


def _matmul_integer(n: OnnxNode) -> Value:
    a = _centred(n, n.arg(0), n.opt(2), n.type(0).rank - 2)
    b = _centred(n, n.arg(1), n.opt(3), n.type(1).rank - 1)
    return n.apply(linalg.matmul, a, b)


def _qlinear_matmul(n: OnnxNode) -> Value:
    a = _centred(n, n.arg(0), n.arg(2), n.type(0).rank - 2)
    b = _centred(n, n.arg(3), n.arg(5), n.type(3).rank - 1)
    whole = cast_to(n, n.apply(linalg.matmul, a, b, name=""), float32)
    left = _along(n, cast_to(n, n.arg(1), float32), type_of(whole).rank - 2, whole)
    right = _along(n, cast_to(n, n.arg(4), float32), type_of(whole).rank - 1, whole)
    real = n.apply(el.mul, n.apply(el.mul, whole, left, name=""), right, name="")
    attrs = qt.QuantizeAttrs(dtype=n.type(7).dtype)
    return n.apply(qt.quantize, real, n.arg(6), n.arg(7), attrs=attrs)


def _conv_integer(n: OnnxNode) -> Value:
    return convolution(
        n, _centred(n, n.arg(0), n.opt(2), 1), _centred(n, n.arg(1), n.opt(3), 0), None
    )


def _qlinear_conv(n: OnnxNode) -> Value:
    x = _centred(n, n.arg(0), n.arg(2), 1)
    w = _centred(n, n.arg(3), n.arg(5), 0)
    whole = cast_to(n, convolution(n, x, w, n.opt(8)), float32)
    scale_x = _along(n, cast_to(n, n.arg(1), float32), 1, whole)
    scale_w = _along(n, cast_to(n, n.arg(4), float32), 1, whole)
    real = n.apply(el.mul, n.apply(el.mul, whole, scale_x, name=""), scale_w, name="")
    attrs = qt.QuantizeAttrs(dtype=n.type(7).dtype)
    return n.apply(qt.quantize, real, n.arg(6), n.arg(7), attrs=attrs)


QUANT: dict[str, Converter] = {
    "ConvInteger": _conv_integer,
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "MatMulInteger": _matmul_integer,
    "QLinearConv": _qlinear_conv,
    "QLinearMatMul": _qlinear_matmul,
    "QuantizeLinear": _quantize,
}
