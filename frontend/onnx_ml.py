"""Converters of the domain ai.onnx.ml without trees: scalers, linear and support vector machines.

Scaler -> (x - offset)*scale;  LinearRegressor -> x @ coefficients + intercepts

Labels that are strings are refused, as strings are everywhere. Where the specification leaves
something open (a row of zeros, a single score), onnxruntime is followed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minicompiler.ir.expr import const_int
from minicompiler.ir.graph import Value, type_of
from minicompiler.ir.types import float32
from minicompiler.ops import elementwise as el
from minicompiler.ops import index as ix
from minicompiler.ops import linalg
from minicompiler.ops import pieces as pc
from minicompiler.ops import reduce as red
from minicompiler.ops import shape as sh

from .onnx_math import Converter, cast_to
from .onnx_node import OnnxNode
from .onnx_trees import transformed

Array = np.ndarray
KERNELS = ("LINEAR", "POLY", "RBF", "SIGMOID")


def _floats(n: OnnxNode) -> Value:
    return cast_to(n, n.arg(0), float32)


def _numbers(n: OnnxNode, name: str, sizes: tuple[int | None, ...]) -> Array:
    """A list of floats of one of the sizes."""
    found = np.asarray(n.attributes.get(name, ()), np.float32)
    if found.size not in sizes:
        n.fail(f"{n.op_type}: {name!r} has {found.size} elements, which do not fit its input")
    return found


def _width(n: OnnxNode) -> int:
    """Features of the input, [rows, features]."""
    n.shape(0, 2)
    width = const_int(n.type(0).shape[1])
    if width is None:
        n.fail(f"{n.op_type} of an unknown number of features")
    return width


# ---- features -----------------------------------------------------------------------------------
def _scaler(n: OnnxNode) -> Value:
    width = const_int(n.type(0).shape[-1]) if n.type(0).rank else 1
    offset, scale = (_numbers(n, k, (1, width)) for k in ("offset", "scale"))
    moved = n.apply(el.sub, _floats(n), n.constant(offset), name="")
    return n.apply(el.mul, moved, n.constant(scale))


def _normalizer(n: OnnxNode) -> Value:
    x, norm, last = _floats(n), n.attr("norm", "MAX"), red.ReduceAttrs((-1,), True)
    if norm == "MAX":
        size: Value = n.apply(red.reduce_max, x, attrs=last, name="")
    elif norm == "L1":
        size = n.apply(red.reduce_sum, n.apply(el.abs_, x, name=""), attrs=last, name="")
    elif norm == "L2":
        squares = n.apply(red.reduce_sum, n.apply(el.square, x, name=""), attrs=last, name="")
        size = n.apply(el.sqrt, squares, name="")
    else:
        n.fail(f"Normalizer with the norm {norm}")
    one, zero = n.constant(1, np.float32), n.constant(0, np.float32)
    nothing = n.apply(el.equal, size, zero, name="")
    return n.apply(el.div, x, n.apply(el.where, nothing, one, size, name=""))


def _imputer(n: OnnxNode) -> Value:
    """What is missing, by one number or one per feature."""
    x = n.arg(0)
    kind = type_of(x).dtype
    suffix, old = ("floats", "float") if kind.is_float else ("int64s", "int64")
    width = const_int(type_of(x).shape[-1]) if type_of(x).rank else 1
    new = np.asarray(n.attributes.get(f"imputed_value_{suffix}", ()))
    if new.size not in (1, width):
        n.fail(f"Imputer: {new.size} values do not fit its input")
    lost = n.attr(f"replaced_value_{old}", 0)
    if kind.is_float and np.isnan(lost):
        missing = n.apply(el.isnan, x, name="")
    else:
        missing = n.apply(el.equal, x, n.constant(lost, kind.numpy), name="")
    return n.apply(el.where, missing, n.constant(new, kind.numpy), x)


def _feature_vectorizer(n: OnnxNode) -> Value:
    """Its inputs side by side, [rows, features]."""
    parts = []
    for k in range(len(n.inputs)):
        x = cast_to(n, n.arg(k), float32)
        rank = n.type(k).rank
        parts.append(
            x if rank == 2 else n.apply(sh.unsqueeze, x, attrs=sh.UnsqueezeAttrs((1,)), name="")
        )
    return n.apply(pc.concat, *parts, attrs=pc.ConcatAttrs(1))


# ---- labels -------------------------------------------------------------------------------------
def _label_encoder(n: OnnxNode) -> Value:
    """values[k] where x is keys[k]: a table that is searched from end to end."""
    keys, values = _mapping(n, "keys"), _mapping(n, "values")
    if keys.shape != values.shape or not keys.size:
        n.fail(f"LabelEncoder has {keys.size} keys and {values.size} values")
    n.table(keys.size)
    default = n.attributes.get("default_tensor")
    if default is None:
        whole = values.dtype.kind == "i"
        default = n.attr("default_int64", -1) if whole else n.attr("default_float", -0.0)
    kind = n.type(0).dtype.numpy
    x = n.apply(sh.unsqueeze, n.arg(0), attrs=sh.UnsqueezeAttrs((-1,)), name="")
    same: Value = n.apply(el.equal, x, n.constant(keys, kind), name="")
    if keys.dtype.kind == "f" and np.isnan(keys).any():
        both = n.apply(el.logical_and, n.apply(el.isnan, x, name=""), n.constant(np.isnan(keys)))
        same = n.apply(el.logical_or, same, both, name="")
    hit = cast_to(n, same, float32)
    first = n.apply(red.argmax, hit, attrs=red.ArgAttrs(-1, False, False), name="")
    found = n.apply(ix.gather, n.constant(values), first, attrs=ix.GatherAttrs(0), name="")
    most = n.apply(red.reduce_max, hit, attrs=red.ReduceAttrs((-1,), False), name="")
    known = n.apply(el.greater, most, n.constant(0, np.float32), name="")
    other = n.constant(np.reshape(default, ()), values.dtype)
    return n.apply(el.where, known, found, other)


def _mapping(n: OnnxNode, side: str) -> Array:
    for suffix, kind in (("tensor", None), ("int64s", np.int64), ("floats", np.float32)):
        found = n.attributes.get(f"{side}_{suffix}")
        if found is not None:
            made = np.asarray(found, kind).reshape(-1)
            if made.dtype.kind in "iuf":
                return made
    n.fail("LabelEncoder with strings", "map labels to numbers outside of the model")


# ---- linear models ------------------------------------------------------------------------------
def _scores(n: OnnxNode, targets: int) -> Value:
    """x @ coefficients + intercepts, [rows, targets]."""
    width = _width(n)
    coefficients = _numbers(n, "coefficients", (targets * width,)).reshape(targets, width)
    intercepts = _numbers(n, "intercepts", (0, targets))
    made: Value = n.apply(linalg.matmul, _floats(n), n.constant(coefficients.T.copy()), name="")
    if intercepts.size:
        made = n.apply(el.add, made, n.constant(intercepts), name="")
    return made


def _linear_regressor(n: OnnxNode) -> Value:
    return transformed(n, _scores(n, n.attr("targets", 1)), n.attr("post_transform", "NONE"), 0)


def _linear_classifier(n: OnnxNode) -> tuple[Value, ...]:
    """Labels and scores, of one row of coefficients per class."""
    labels = n.attributes.get("classlabels_ints")
    if labels is None and n.wants(0):
        n.fail(f"{n.op_type} with labels that are strings", "use the scores alone")
    count = len(labels if labels is not None else n.attr("classlabels_strings"))
    if np.size(n.attr("coefficients")) != count * _width(n):
        n.fail(f"{n.op_type} with other than one row of coefficients per class")
    scores = _scores(n, count)
    made = transformed(n, scores, n.attr("post_transform", "NONE"), 1)
    best = n.apply(red.argmax, scores, attrs=red.ArgAttrs(-1, False, False), name="")
    if labels is None:
        return best, made
    names = n.constant(labels, np.int64)
    return n.apply(ix.gather, names, best, attrs=ix.GatherAttrs(0)), made


# ---- support vectors ----------------------------------------------------------------------------
def _svm_regressor(n: OnnxNode) -> Value:
    """The sum of coefficient * kernel(x, support vector), plus rho."""
    width, count = _width(n), n.attr("n_supports", 0)
    coefficients = _numbers(n, "coefficients", (count or width,))
    rho = _numbers(n, "rho", (1,))
    x = _floats(n)
    if count:
        vectors = _numbers(n, "support_vectors", (count * width,)).reshape(count, width)
        x = _kernel(n, x, vectors)
    made: Value = n.apply(linalg.matmul, x, n.constant(coefficients[:, None]), name="")
    made = n.apply(el.add, made, n.constant(rho), name="")
    if n.attr("one_class", 0):
        above = n.apply(el.greater, made, n.constant(0, np.float32), name="")
        made = n.apply(el.where, above, *(n.constant(k, np.float32) for k in (1, -1)), name="")
    return transformed(n, made, n.attr("post_transform", "NONE"), 0)


def _kernel(n: OnnxNode, x: Value, vectors: Array) -> Value:
    """Each row against each support vector, [rows, vectors]."""
    kind = n.attr("kernel_type", "LINEAR")
    gamma, coef0, degree = (*n.attributes.get("kernel_params", ()), 0.0, 0.0, 0.0)[:3]
    if kind not in KERNELS:
        n.fail(f"{n.op_type} with the kernel {kind}")

    def number(op: Any, a: Value, b: float) -> Value:
        return n.apply(op, a, n.constant(b, np.float32), name="")

    across = n.constant(vectors.T.copy())
    if kind == "RBF":  # differences first: |x|^2 + |v|^2 - 2*x*v would cancel where x is near v
        columns = n.apply(sh.unsqueeze, x, attrs=sh.UnsqueezeAttrs((2,)), name="")
        squares = n.apply(el.square, n.apply(el.sub, columns, across, name=""), name="")
        apart = n.apply(red.reduce_sum, squares, attrs=red.ReduceAttrs((1,), False), name="")
        return n.apply(el.exp, number(el.mul, apart, -gamma), name="")
    products: Value = n.apply(linalg.matmul, x, across, name="")
    if kind == "LINEAR":
        return products
    inner = number(el.add, number(el.mul, products, gamma), coef0)
    return (
        n.apply(el.tanh, inner, name="") if kind == "SIGMOID" else number(el.power, inner, degree)
    )


ML: dict[str, Converter] = {
    "ai.onnx.ml.FeatureVectorizer": _feature_vectorizer,
    "ai.onnx.ml.Imputer": _imputer,
    "ai.onnx.ml.LabelEncoder": _label_encoder,
    "ai.onnx.ml.LinearClassifier": _linear_classifier,
    "ai.onnx.ml.LinearRegressor": _linear_regressor,
    "ai.onnx.ml.Normalizer": _normalizer,
    "ai.onnx.ml.SVMRegressor": _svm_regressor,
    "ai.onnx.ml.Scaler": _scaler,
}
