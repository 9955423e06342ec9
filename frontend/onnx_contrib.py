"""Converters of operators of onnxruntime's own domain, which its optimiser and quantiser write.

    QLinearAdd(a, b) -> quantize(add(dequantize(a), dequantize(b)))
    SkipLayerNormalization(x, skip, scale) -> layer_norm(add(x, skip), scale)

They are put together from ONNX's operators. What they mean is said in onnxruntime's
documentation of contributed operators.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from minicompiler.ir.graph import Value, type_of
from minicompiler.ir.types import float32
from minicompiler.ops import elementwise as el
from minicompiler.ops import linalg
from minicompiler.ops import quant as qt

from .onnx_math import MATH, Converter, cast_to
from .onnx_nn import NN
from .onnx_node import OnnxNode
from .onnx_quant import QUANT
from .onnx_shape import SHAPE

_DOMAIN = "com.microsoft"
_OPSET = 22  # of the ONNX operators that these are put together from
_ONNX: dict[str, Converter] = {**MATH, **NN, **QUANT, **SHAPE}


def _onnx(n: OnnxNode, name: str, *inputs: Value | None, opset: int = _OPSET, **given: Any) -> Any:
    """An operator of ONNX with the attributes of the node, and those that are given."""
    attributes = {**n.attributes, **given}
    node = dataclasses.replace(
        n, op_type=name, opset=opset, inputs=inputs, attributes=attributes, outputs=n.outputs[:1]
    )
    return _ONNX[name](node)


# ---- numbers with scales ------------------------------------------------------------------------
def _real(n: OnnxNode, k: int, axis: int = 0) -> Value:
    """Inputs k, k + 1 and k + 2: what integers, their scale and their zero point stand for."""
    attrs = qt.DequantizeAttrs(axis)
    return n.apply(qt.dequantize, n.arg(k), n.arg(k + 1), n.opt(k + 2), attrs=attrs, name="")


def _integers(n: OnnxNode, x: Value, k: int, like: int = 0) -> Value:
    """`x` with the scale and the zero point of inputs k and k + 1, in the type of input `like`."""
    attrs = qt.QuantizeAttrs(dtype=n.type(like).dtype)
    return n.apply(qt.quantize, x, n.arg(k), n.opt(k + 1), attrs=attrs)


def _quantized(name: str, operands: int = 1) -> Converter:
    """An operator on what its operands stand for; scale and zero point of the result come last."""

    def convert(n: OnnxNode) -> Value:
        if n.attr("channels_last", 0):
            n.fail(f"{n.op_type} with channels_last is not supported")
        real = [_real(n, 3 * k) for k in range(operands)]
        opset = n.attr("opset", _OPSET) if name == "Softmax" else _OPSET
        made = _onnx(n, name, *real, opset=opset)
        return _integers(n, made, 3 * operands)

    return convert


def _quantized_concat(n: OnnxNode) -> Value:
    """Scale and zero point of the result come first."""
    real = [_real(n, k) for k in range(2, len(n.inputs), 3)]
    return _integers(n, _onnx(n, "Concat", *real), 0, 2)


def _quantized_where(n: OnnxNode) -> Value:
    return _integers(n, _onnx(n, "Where", n.arg(0), _real(n, 1), _real(n, 4)), 7, 1)


def _quantized_gemm(n: OnnxNode) -> Value:
    """The summand is an integer with the product of both scales."""
    columns = 0 if n.attr("transB", 0) else 1
    made: Value = _onnx(n, "Gemm", _real(n, 0), _real(n, 3, columns))
    c = n.opt(6)
    if c is not None:
        scale = n.apply(el.mul, n.arg(1), n.arg(4), name="")
        unit = n.apply(el.mul, scale, n.constant(n.attr("alpha", 1.0), np.float32), name="")
        made = n.apply(el.add, made, n.apply(el.mul, cast_to(n, c, float32), unit, name=""))
    return made if n.opt(7) is None else _integers(n, made, 7)


def _integer_product(
    n: OnnxNode, a: Value, zero_a: Value | None, zero_b: Value | None, scale: Value, bias: int
) -> Value:
    """a times the integers of input 1, with the product of both scales; plus a bias."""
    whole = cast_to(n, _onnx(n, "MatMulInteger", a, n.arg(1), zero_a, zero_b), float32)
    made = n.apply(el.mul, whole, scale)
    added = n.opt(bias)
    return made if added is None else n.apply(el.add, made, added)


def _integers_to_float(n: OnnxNode) -> Value:
    scale = n.apply(el.mul, n.arg(2), n.arg(3), name="")
    return _integer_product(n, n.arg(0), n.opt(4), n.opt(5), scale, 6)


def _dynamic_product(n: OnnxNode) -> Value:
    """The left side gets its scale from its own range."""
    node = dataclasses.replace(n, outputs=(*n.outputs[:1], "", ""))
    a, scale_a, zero_a = QUANT["DynamicQuantizeLinear"](node)
    scale = n.apply(el.mul, scale_a, n.arg(2), name="")
    return _integer_product(n, a, zero_a, n.opt(3), scale, 4)


def _packed_product(n: OnnxNode) -> Value:
    """A matrix [columns, rows] of few bits, in blocks of rows with a scale each."""
    bits, size = n.attr("bits", 4), n.attr("block_size")
    rows, columns = n.attr("K"), n.attr("N")
    packed, scales, zeros = n.known(1), n.known(2), n.known(3)
    if bits not in (4, 8) or size < 1 or n.opt(4) is not None:
        n.fail(f"MatMulNBits of {bits} bits, with an order of rows or not, is not supported")
    assert packed is not None and scales is not None
    blocks = -(-rows // size)
    if packed.size * 8 != columns * blocks * size * bits or scales.size != columns * blocks:
        n.fail(f"MatMulNBits: {packed.shape} and {scales.shape} are no matrix {rows} x {columns}")
    n.table(columns * blocks * size)
    numbers = _unpacked(packed.reshape(columns, -1), bits).reshape(columns, blocks, size)
    middle: Any = 1 << (bits - 1)
    if zeros is not None and zeros.dtype == np.uint8:
        middle = _unpacked(zeros.reshape(columns, -1), bits)[:, :blocks, None]
    elif zeros is not None:
        middle = zeros.reshape(columns, blocks, 1)
    weight = (numbers - middle) * scales.reshape(columns, blocks, 1)
    matrix = weight.reshape(columns, -1)[:, :rows].astype(n.type(0).dtype.numpy)
    attrs = linalg.MatmulAttrs(False, True)
    made = n.apply(linalg.matmul, n.arg(0), n.constant(matrix), attrs=attrs)
    bias = n.opt(5)
    return made if bias is None else n.apply(el.add, made, bias)


def _unpacked(data: np.ndarray, bits: int) -> np.ndarray:
    """Rows of bytes as rows of numbers of 4 or 8 bits, the lower half of a byte first."""
    if bits == 8:
        return data.astype(np.float32)
    return np.stack([data & 15, data >> 4], axis=-1).reshape(len(data), -1).astype(np.float32)


# ---- joined operators ---------------------------------------------------------------------------
def _fused_matmul(n: OnnxNode) -> Value:
    if n.attr("transBatchA", 0) or n.attr("transBatchB", 0):
        n.fail("FusedMatMul with transposed batches is not supported")
    attrs = linalg.MatmulAttrs(bool(n.attr("transA", 0)), bool(n.attr("transB", 0)))
    made = n.apply(linalg.matmul, n.arg(0), n.arg(1), attrs=attrs)
    alpha = n.attr("alpha", 1.0)
    dtype = type_of(made).dtype.numpy
    return made if alpha == 1.0 else n.apply(el.mul, made, n.constant(alpha, dtype))


_PARAMETERS = {
    "Clip": (), "HardSigmoid": ("alpha", "beta"), "LeakyRelu": ("alpha",), "Relu": (),
    "HardSwish": (), "Sigmoid": (), "Tanh": (),
}  # fmt: skip


def _activated(name: str) -> Converter:
    """An operator and the function that is applied to its result."""

    def convert(n: OnnxNode) -> Value:
        function = n.attr("activation", "")
        made: Value = _onnx(n, name, *(n.opt(k) for k in range(min(len(n.inputs), 3))))
        if n.opt(3) is not None:
            made = n.apply(el.add, made, n.arg(3))
        if not function:
            return made
        if function not in _PARAMETERS:
            n.fail(f"{n.op_type} with the function {function} is not supported")
        values = n.attr("activation_params", ())
        if function == "Clip":
            bounds = [n.constant(v, type_of(made).dtype.numpy) for v in values]
            return _onnx(n, "Clip", made, *bounds)
        given = dict(zip(_PARAMETERS[function], values, strict=False))
        names = {"activation_alpha": "alpha", "activation_beta": "beta"}
        given.update((names[k], v) for k, v in n.attributes.items() if k in names)
        plain = dataclasses.replace(n, attributes={})
        return _onnx(plain, function, made, **given)

    return convert


def _gelu(approximate: str) -> Converter:
    """A second input is added before."""

    def convert(n: OnnxNode) -> Value:
        x, bias = n.arg(0), n.opt(1)
        x = x if bias is None else n.apply(el.add, x, bias, name="")
        return _onnx(n, "Gelu", x, approximate=approximate)

    return convert


def _quick_gelu(n: OnnxNode) -> Value:
    return _onnx(n, "Swish", n.arg(0), alpha=n.attr("alpha", 1.702))


def _skip_norm(name: str, bias: int) -> Converter:
    """The normalised sum of a value, what goes round it, and a bias; the sum is the last result."""

    def convert(n: OnnxNode) -> Any:
        if n.wants(1) or n.wants(2):
            n.fail(f"the mean and the deviation of {n.op_type} are not supported")
        total = n.apply(el.add, n.arg(0), n.arg(1), name="")
        added = n.opt(bias)
        total = total if added is None else n.apply(el.add, total, added, name="")
        rest = [n.opt(k) for k in range(2, bias)]
        epsilon = n.attr("epsilon", 1e-12)
        made = _onnx(n, name, total, *rest, axis=-1, epsilon=epsilon)
        return made, None, None, total

    return convert


def _simplified_norm(n: OnnxNode) -> Value:
    if n.wants(1):
        n.fail("the deviation of SimplifiedLayerNormalization is not supported")
    made: Value = _onnx(n, "RMSNormalization", n.arg(0), n.arg(1))
    return made


CONTRIB: dict[str, Converter] = {
    "SimplifiedLayerNormalization": _simplified_norm,  # onnxruntime puts it in ONNX's domain
    **{
        f"{_DOMAIN}.{name}": convert
        for name, convert in {
            "BiasGelu": _gelu("none"),
            "DequantizeLinear": QUANT["DequantizeLinear"],
            "DynamicQuantizeMatMul": _dynamic_product,
            "FastGelu": _gelu("tanh"),
            "FusedConv": _activated("Conv"),
            "FusedGemm": _activated("Gemm"),
            "FusedMatMul": _fused_matmul,
            "Gelu": _gelu("none"),
            "MatMulIntegerToFloat": _integers_to_float,
            "MatMulNBits": _packed_product,
            "QGemm": _quantized_gemm,
            "QLinearAdd": _quantized("Add", 2),
            "QLinearAveragePool": _quantized("AveragePool"),
            "QLinearConcat": _quantized_concat,
            "QLinearGlobalAveragePool": _quantized("GlobalAveragePool"),
            "QLinearLeakyRelu": _quantized("LeakyRelu"),
            "QLinearMul": _quantized("Mul", 2),
            "QLinearSigmoid": _quantized("Sigmoid"),
            "QLinearSoftmax": _quantized("Softmax"),
            "QLinearWhere": _quantized_where,
            "QuantizeLinear": QUANT["QuantizeLinear"],
            "QuickGelu": _quick_gelu,
            "SkipLayerNormalization": _skip_norm("LayerNormalization", 4),
            "SkipSimplifiedLayerNormalization": _skip_norm("RMSNormalization", 3),
        }.items()
    },
}
