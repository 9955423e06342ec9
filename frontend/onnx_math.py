"""Converters of ONNX operators that work element by element, and of reductions over axes.

    Add -> add, Sum(a, b, c) -> add(add(a, b), c), Clip -> clip with its bounds as attributes

Each takes an OnnxNode and returns the value(s) of its results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from minicompiler.ir.expr import ONE
from minicompiler.ir.graph import Value, type_of
from minicompiler.ir.op import Op
from minicompiler.ir.types import DType, TensorType, float64
from minicompiler.ops import activations as act
from minicompiler.ops import cumulative as cu
from minicompiler.ops import elementwise as el
from minicompiler.ops import reduce as red
from minicompiler.ops import shape as sh

from .onnx_data import element_type
from .onnx_node import OnnxNode

Converter = Callable[[OnnxNode], Any]


def direct(op: Op, inputs: int) -> Converter:
    """An operator with the same inputs and no attributes."""
    return lambda n: n.apply(op, *(n.arg(k) for k in range(inputs)))


def _binary(op: Op) -> Converter:
    """Two operands. Before opset 7 the second one started at `axis` of the first."""

    def convert(n: OnnxNode) -> Value:
        return n.apply(op, n.arg(0), _aligned(n))

    return convert


def _aligned(n: OnnxNode) -> Value:
    """The second operand, with trailing axes of size 1 where an old model gives it an axis."""
    y = n.arg(1)
    t: TensorType = n.type(1)
    if n.opset >= 7 or not n.attr("broadcast", 0) or n.attr("axis", None) is None:
        return y
    trailing = n.type(0).rank - n.attr("axis") % max(n.type(0).rank, 1) - t.rank
    if trailing <= 0:
        return y
    return n.apply(sh.reshape, y, attrs=sh.ReshapeAttrs((*t.shape, *(ONE,) * trailing)), name="")


def _prelu(n: OnnxNode) -> Value:
    """Before opset 7 a slope per channel had one axis."""
    slope, t = n.arg(1), n.type(1)
    trailing = n.type(0).rank - 2
    if n.opset < 7 and t.rank == 1 and trailing > 0 and t.shape[0] is not ONE:
        shape = (*t.shape, *(ONE,) * trailing)
        slope = n.apply(sh.reshape, slope, attrs=sh.ReshapeAttrs(shape), name="")
    return n.apply(act.prelu, n.arg(0), slope)


def with_attrs(op: Op, **defaults: Any) -> Converter:
    """A function of one tensor whose attributes have the same names in both worlds."""

    def convert(n: OnnxNode) -> Value:
        given = {name: n.attr(name, default) for name, default in defaults.items()}
        return n.apply(op, n.arg(0), attrs=op.attrs(**given))

    return convert


def cast_to(n: OnnxNode, x: Value, dtype: DType, name: str = "") -> Value:
    """`x` with another element type; `x` itself when it has it already."""
    if type_of(x).dtype is dtype:
        return x
    return n.apply(el.cast_, x, attrs=el.CastAttrs(dtype), name=name)


def rounding_integers(convert: Converter) -> Converter:
    """Interpolates integers as floats; the result is rounded, half to even, and saturated."""

    def convert_any(n: OnnxNode) -> Value:
        t = n.type(0).dtype
        if not t.is_int or n.attr("mode", "nearest") == "nearest":
            return convert(n)
        floats = cast_to(n, n.arg(0), DType("float32" if t.bits <= 16 else "float64"))
        made = convert(dataclasses.replace(n, inputs=(floats, *n.inputs[1:])))
        made = n.apply(el.round_, made, name="")
        info = np.iinfo(t.numpy)
        attrs = el.ClipAttrs(float(info.min), float(info.max))
        return n.apply(el.cast_, n.apply(el.clip, made, attrs=attrs, name=""),
                       attrs=el.CastAttrs(t))  # fmt: skip

    return convert_any


# ---- two and more operands ----------------------------------------------------------------------
def _folded(op: Op, mean: bool = False) -> Converter:
    """An operator on any number of tensors, pairwise from the left."""

    def convert(n: OnnxNode) -> Value:
        result = n.arg(0)
        for k in range(1, len(n.inputs)):
            result = n.apply(op, result, n.arg(k))
        if mean and len(n.inputs) > 1:
            count = n.constant(len(n.inputs), type_of(result).dtype.numpy)
            result = n.apply(el.div, result, count)
        return result

    return convert


def _pow(n: OnnxNode) -> Value:
    return n.apply(el.power, n.arg(0), cast_to(n, _aligned(n), n.type(0).dtype))


def _mod(n: OnnxNode) -> Value:
    return n.apply(el.fmod if n.attr("fmod", 0) else el.mod, n.arg(0), n.arg(1))


def _bit_shift(n: OnnxNode) -> Value:
    left = n.attr("direction") == "LEFT"
    return n.apply(el.shift_left if left else el.shift_right, n.arg(0), n.arg(1))


def _clip(n: OnnxNode) -> Value:
    """Bounds that are constants become attributes; others are tensors."""
    x = n.arg(0)
    if n.opset < 11:
        low, high = n.attr("min", None), n.attr("max", None)
        return n.apply(el.clip, x, attrs=el.ClipAttrs(low, high))
    constant = [n.opt(k) is None or n.values.of(n.arg(k)) is not None for k in (1, 2)]
    if all(constant):
        return n.apply(el.clip, x, attrs=el.ClipAttrs(n.scalar(1), n.scalar(2)))
    if n.opt(1) is not None:
        x = n.apply(el.maximum_, x, n.arg(1))
    return x if n.opt(2) is None else n.apply(el.minimum_, x, n.arg(2))


def _identity(n: OnnxNode) -> Any:
    found = n.raw(0)
    return n.apply(el.identity, n.arg(0)) if isinstance(found, Value) else found


# ---- one operand --------------------------------------------------------------------------------
def _cast(n: OnnxNode) -> Value:
    dtype = element_type(n.attr("to"), f"the result of {n.op_type}", n.loc.file)
    return _converted(n, dtype)


def _cast_like(n: OnnxNode) -> Value:
    return _converted(n, n.type(1).dtype)


def _converted(n: OnnxNode, dtype: DType) -> Value:
    # Only the powers of two of float8e8m0 are not rounded to the nearest.
    rounding = n.attr("round_mode", "up")
    if rounding not in ("up", "down", "nearest"):
        n.fail(f"{n.op_type} that rounds {rounding!r}", "known: up, down, nearest")
    attrs = el.CastAttrs(dtype, bool(n.attr("saturate", 1)), rounding)
    return n.apply(el.cast_, n.arg(0), attrs=attrs)


def _is_inf(n: OnnxNode) -> Value:
    attrs = el.IsInfAttrs(bool(n.attr("detect_positive", 1)), bool(n.attr("detect_negative", 1)))
    return n.apply(el.isinf, n.arg(0), attrs=attrs)


def _dropout(n: OnnxNode) -> Any:
    """Inference: the identity, and a mask of ones where it is asked for."""
    ratio = n.scalar(1)
    if n.opt(2) is not None and n.scalar(2) and ratio != 0:
        n.fail("Dropout in training mode is not supported", "export the model for inference")
    x = n.arg(0)
    same = n.apply(el.identity, x)
    if len(n.outputs) < 2 or not n.outputs[1]:
        return same
    # `b or not b` is true in the shape of x, whatever its sizes.
    b = cast_to(n, x, DType("bool"))
    return same, n.apply(el.logical_or, b, n.apply(el.logical_not, b, name=""), name=n.outputs[1])


# ---- reductions ---------------------------------------------------------------------------------
def _reduction(op: Op, on_bool: Op | None = None, roots: bool = False) -> Converter:
    """on_bool: the operator for bools. roots: results are roots or logarithms, those of integers
    cut off to integers."""

    def convert(n: OnnxNode) -> Value:
        axes = n.ints(1, "axes")
        if not axes:  # a norm over no axes still takes magnitudes
            axes = () if n.attr("noop_with_empty_axes", 0) else None
        dtype = n.type(0).dtype
        chosen = on_bool if on_bool is not None and dtype.is_bool else op
        attrs = red.ReduceAttrs(axes, bool(n.attr("keepdims", 1)))
        if not roots or dtype.is_float:
            return n.apply(chosen, n.arg(0), attrs=attrs)
        made = n.apply(chosen, cast_to(n, n.arg(0), float64), attrs=attrs, name="")
        return cast_to(n, made, dtype)

    return convert


def _arg_reduction(op: Op) -> Converter:
    def convert(n: OnnxNode) -> Value:
        last = bool(n.attr("select_last_index", 0))
        attrs = red.ArgAttrs(n.attr("axis", 0), bool(n.attr("keepdims", 1)), last)
        return n.apply(op, n.arg(0), attrs=attrs)

    return convert


def _cumulative(op: Op) -> Converter:
    def convert(n: OnnxNode) -> Value:
        exclusive, reverse = bool(n.attr("exclusive", 0)), bool(n.attr("reverse", 0))
        attrs = cu.CumulativeAttrs(int(n.scalar(1)), exclusive, reverse)
        return n.apply(op, n.arg(0), attrs=attrs)

    return convert


def _global(op: Op) -> Converter:
    """A reduction over the spatial axes."""

    def convert(n: OnnxNode) -> Value:
        t: TensorType = n.type(0)
        return n.apply(op, n.arg(0), attrs=red.ReduceAttrs(tuple(range(2, t.rank)), True))

    return convert


def _global_lp(n: OnnxNode) -> Value:
    p, t = n.attr("p", 2), n.type(0)
    if p < 1:
        n.fail(f"GlobalLpPool: the norm of order {p} does not exist")
    if p <= 2:
        return _global(red.reduce_l1 if p == 1 else red.reduce_l2)(n)
    size = n.apply(el.abs_, n.arg(0), name="")
    powers = n.apply(el.power, size, n.constant(p, t.dtype.numpy), name="")
    over = red.ReduceAttrs(tuple(range(2, t.rank)), True)
    total = n.apply(red.reduce_sum, powers, attrs=over, name="")
    return n.apply(el.power, total, n.constant(1 / p, t.dtype.numpy))


def _lp_norm(n: OnnxNode) -> Value:
    p = n.attr("p", 2)
    over = red.ReduceAttrs((n.attr("axis", -1),), True)
    norm = n.apply(red.reduce_l1 if p == 1 else red.reduce_l2, n.arg(0), attrs=over, name="")
    # A row of zeros stays one.
    zero, one = (n.constant(v, n.type(0).dtype.numpy) for v in (0, 1))
    empty = n.apply(el.equal, norm, zero, name="")
    return n.apply(el.div, n.arg(0), n.apply(el.where, empty, one, norm, name=""))


_UNARY = {
    "Abs": el.abs_, "Acos": el.acos, "Acosh": el.acosh, "Asin": el.asin, "Asinh": el.asinh,
    "Atan": el.atan, "Atanh": el.atanh, "BitwiseNot": el.bitwise_not, "Ceil": el.ceil,
    "Cos": el.cos, "Cosh": el.cosh, "Erf": el.erf, "Exp": el.exp, "Floor": el.floor,
    "HardSwish": act.hard_swish, "IsNaN": el.isnan, "Log": el.log,
    "Mish": act.mish, "Neg": el.neg, "Not": el.logical_not, "Reciprocal": el.reciprocal,
    "Relu": act.relu, "Round": el.round_, "Sigmoid": el.sigmoid, "Sign": el.sign, "Sin": el.sin,
    "Sinh": el.sinh, "Softplus": act.softplus, "Softsign": act.softsign, "Sqrt": el.sqrt,
    "Tan": el.tan, "Tanh": el.tanh,
}  # fmt: skip
_BINARY = {
    "Add": el.add, "And": el.logical_and, "BitwiseAnd": el.bitwise_and,
    "BitwiseOr": el.bitwise_or, "BitwiseXor": el.bitwise_xor, "Div": el.div, "Equal": el.equal,
    "Greater": el.greater, "GreaterOrEqual": el.greater_equal, "Less": el.less,
    "LessOrEqual": el.less_equal, "Mul": el.mul, "Or": el.logical_or,
    "Sub": el.sub, "Xor": el.logical_xor,
}  # fmt: skip
MATH: dict[str, Converter] = {
    **{name: direct(op, 1) for name, op in _UNARY.items()},
    **{name: _binary(op) for name, op in _BINARY.items()},
    "ArgMax": _arg_reduction(red.argmax),
    "ArgMin": _arg_reduction(red.argmin),
    "BitShift": _bit_shift,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Celu": with_attrs(act.celu, alpha=1.0),
    "Clip": _clip,
    "CumProd": _cumulative(cu.cumprod),
    "CumSum": _cumulative(cu.cumsum),
    "Dropout": _dropout,
    "Elu": with_attrs(act.elu, alpha=1.0),
    "Gelu": with_attrs(act.gelu, approximate="none"),
    "GlobalAveragePool": _global(red.reduce_mean),
    "GlobalLpPool": _global_lp,
    "GlobalMaxPool": _global(red.reduce_max),
    "HardSigmoid": with_attrs(act.hard_sigmoid, alpha=0.2, beta=0.5),
    "Identity": _identity,
    "IsInf": _is_inf,
    "LeakyRelu": with_attrs(act.leaky_relu, alpha=0.01),
    "LpNormalization": _lp_norm,
    "Max": _folded(el.maximum_),
    "Mean": _folded(el.add, mean=True),
    "Min": _folded(el.minimum_),
    "Mod": _mod,
    "PRelu": _prelu,
    "Pow": _pow,
    "ReduceL1": _reduction(red.reduce_l1),
    "ReduceL2": _reduction(red.reduce_l2, roots=True),
    "ReduceLogSum": _reduction(red.reduce_log_sum, roots=True),
    "ReduceLogSumExp": _reduction(red.reduce_log_sum_exp, roots=True),
    "ReduceMax": _reduction(red.reduce_max, red.reduce_any),
    "ReduceMean": _reduction(red.reduce_mean),
    "ReduceMin": _reduction(red.reduce_min, red.reduce_all),
    "ReduceProd": _reduction(red.reduce_prod),
    "ReduceSum": _reduction(red.reduce_sum),
    "ReduceSumSquare": _reduction(red.reduce_sum_square),
    "Selu": with_attrs(act.selu, alpha=1.6732631921768188, gamma=1.0507010221481323),
    "Shrink": with_attrs(act.shrink, bias=0.0, lambd=0.5),
    "Sum": _folded(el.add),
    "Swish": with_attrs(act.swish, alpha=1.0),
    "ThresholdedRelu": with_attrs(act.thresholded_relu, alpha=1.0),
    "Where": direct(el.where, 3),
}
