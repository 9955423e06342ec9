"""Converters of the ONNX operators that move elements, and of those that compute with shapes.

    Reshape(x, [0, -1]) -> reshape(x){shape=(0, -1)}       shape arguments end up in attributes
    Constant -> a Constant of the graph, no node
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minicompiler.ir.expr import const_int, product
from minicompiler.ir.graph import Constant, Value, type_of
from minicompiler.ops import reduce as red
from minicompiler.ops import shape as sh

from .onnx_data import element_type
from .onnx_math import Converter
from .onnx_node import OnnxNode


# ---- constants ----------------------------------------------------------------------------------
_CONSTANT_KINDS = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


def _constant(n: OnnxNode) -> Constant:
    if "value" in n.attributes:
        return Constant(n.attr("value"), n.outputs[0], locs=(n.loc,))
    for name, dtype in _CONSTANT_KINDS.items():
        if name in n.attributes:
            return n.constant(n.attr(name), dtype, n.outputs[0])
    n.fail(f"Constant with {', '.join(n.attributes) or 'no value'} is not supported")


def _constant_of_shape(n: OnnxNode) -> Value:
    value = np.asarray(n.attr("value", np.zeros(1, np.float32))).reshape(-1)
    dtype = type_of(n.constant(value)).dtype
    return n.apply(sh.full, n.arg(0), attrs=sh.FullAttrs((), value[0].item(), dtype))


def _range(n: OnnxNode) -> Value:
    if not n.type(0).dtype.is_float:
        return n.apply(sh.arange, *(n.arg(k) for k in range(3)))
    start, limit, step = (n.scalar(k) for k in range(3))
    return n.constant(np.arange(start, limit, step), n.type(0).dtype.numpy, n.outputs[0])


def _eye_like(n: OnnxNode) -> Value:
    t = n.type(0)
    rows, columns = (const_int(s) for s in t.shape)
    if rows is None or columns is None:
        n.fail(f"EyeLike of {t} needs a constant shape")
    dtype = t.dtype
    if n.attr("dtype", None) is not None:
        dtype = element_type(n.attr("dtype"), "the result of EyeLike", n.loc.file)
    return n.constant(np.eye(rows, columns, n.attr("k", 0)), dtype.numpy, n.outputs[0])


# ---- shapes -------------------------------------------------------------------------------------
def _shape(n: OnnxNode) -> Value:
    return n.apply(sh.shape_, n.arg(0), attrs=sh.ShapeAttrs(n.attr("start", 0), n.attr("end", None)))


def _size(n: OnnxNode) -> Value:
    sizes = n.apply(sh.shape_, n.arg(0), name="")
    return n.apply(red.reduce_prod, sizes, attrs=red.ReduceAttrs(None, False))


def _reshape(n: OnnxNode) -> Value:
    attrs = sh.ReshapeAttrs(allow_zero=bool(n.attr("allowzero", 0)))
    return n.apply(sh.reshape, n.arg(0), n.arg(1), attrs=attrs)


def _flatten(n: OnnxNode) -> Value:
    t = n.type(0)
    axis = n.attr("axis", 1)
    at = axis + t.rank if axis < 0 else axis
    target = (product(t.shape[:at]), product(t.shape[at:]))
    return n.apply(sh.reshape, n.arg(0), attrs=sh.ReshapeAttrs(target, True))


def _transpose(n: OnnxNode) -> Value:
    return n.apply(sh.transpose, n.arg(0), attrs=sh.TransposeAttrs(tuple(n.attr("perm", ()))))


def _squeeze(n: OnnxNode) -> Value:
    return n.apply(sh.squeeze, n.arg(0), attrs=sh.SqueezeAttrs(n.ints(1, "axes")))


def _unsqueeze(n: OnnxNode) -> Value:
    axes = n.ints(1, "axes")
    if axes is None:
        n.fail("Unsqueeze needs axes")
    return n.apply(sh.unsqueeze, n.arg(0), attrs=sh.UnsqueezeAttrs(axes))


def _concat(n: OnnxNode) -> Value:
    args = [n.arg(k) for k in range(len(n.inputs))]
    return n.apply(sh.concat, *args, attrs=sh.ConcatAttrs(n.attr("axis", 1)))


def _split(n: OnnxNode) -> Any:
    axis, sizes = n.attr("axis", 0), n.ints(1, "split")
    parts = n.attr("num_outputs", len(n.outputs))
    attrs = sh.SplitAttrs(axis, sizes) if sizes else sh.SplitAttrs(axis, (), parts)
    return n.apply(sh.split, n.arg(0), attrs=attrs)


def _tile(n: OnnxNode) -> Value:
    return n.apply(sh.tile, n.arg(0), n.arg(1))


def _expand(n: OnnxNode) -> Value:
    return n.apply(sh.expand, n.arg(0), n.arg(1))


SHAPE: dict[str, Converter] = {
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "EyeLike": _eye_like,
    "Flatten": _flatten,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
