"""Borders of convolutions and pooling: what is merged, what is trimmed, and what must stay."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from tolerance import assert_close

from minicompiler.ir.expr import Const, Dim
from minicompiler.ir.graph import Apply, Constant, Function, Input, Value, applies, apply
from minicompiler.ir.types import TensorType, float32
from minicompiler.ops import activations, conv, elementwise, padding, pool
from minicompiler.ops.evaluate import run_reference
from minicompiler.passes.fold import fold_constants
from minicompiler.passes.simplify import simplify

X = Input("x", TensorType((Const(2), Const(3), Const(9), Const(8)), float32))
SMALL = Input("x", TensorType((Const(1), Const(2), Const(5), Const(4)), float32))
HIGH = Input("x", TensorType((Const(1), Const(2), Dim("h", 3, 9), Const(4)), float32))
KERNEL = Constant(np.random.default_rng(0).standard_normal((4, 3, 3, 3), np.float32))
TWO = Constant(np.random.default_rng(0).standard_normal((4, 2, 3, 3), np.float32))


def border(
    x: Value, value: float = 0, amounts: Any = (1, 0, 2, 1), mode: str = "constant"
) -> Value:
    top, left, bottom, right = amounts
    attrs = padding.PadAttrs((0, 0, top, left), (0, 0, bottom, right), mode, value)
    return apply(padding.pad, x, attrs=attrs)


def pooled(op: Any, x: Value, **attrs: Any) -> Value:
    return apply(op, x, attrs=pool.PoolAttrs(**{"kernel": (3, 3), "strides": (2, 2), **attrs}))


def convolved(x: Value, weight: Value = KERNEL, **attrs: Any) -> Value:
    return apply(conv.conv, x, weight, attrs=conv.ConvAttrs(**attrs))


def simple(result: Value, x: Input) -> Function:
    return fold_constants(simplify(Function("f", (x,), (result,)), None), None)


RELU = apply(activations.relu, X)
CLIP = apply(elementwise.clip, X, attrs=elementwise.ClipAttrs(0.0, 6.0))
MERGED = {
    "convolution": convolved(border(X)),
    "convolution with a border of its own": convolved(
        border(X), pads_begin=(1, 1), pads_end=(0, 2)
    ),
    "least of all": pooled(pool.max_pool, border(X, -math.inf)),
    "zero below relu": pooled(pool.max_pool, border(RELU)),
    "zero below clip": pooled(pool.max_pool, border(CLIP)),
    "counted": pooled(pool.avg_pool, border(X)),
}  # fmt: skip


@pytest.mark.parametrize("name", MERGED)
def test_merged(name: str) -> None:
    fn = simple(MERGED[name], X)
    assert not any(v.op is padding.pad for v in applies(fn))
    x = np.random.default_rng(1).standard_normal((2, 3, 9, 8), np.float32)
    (want,) = run_reference(Function("f", (X,), (MERGED[name],)), [x])
    assert_close(run_reference(fn, [x])[0], want, 27)


KEPT = {
    "ones": convolved(border(X, 1.0)),
    "reflected": convolved(border(X, mode="reflect")),
    "cut off": convolved(border(X, amounts=(-1, 0, 1, 1))),
    "zero may be the largest": pooled(pool.max_pool, border(X)),
    "a window in the border": pooled(pool.max_pool, border(RELU, amounts=(3, 0, 0, 0))),
    "counted and not": pooled(pool.avg_pool, border(X), pads_begin=(1, 1), pads_end=(1, 1)),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    assert any(v.op is padding.pad for v in applies(simple(KEPT[name], X)))


def test_border_of_channels_stays() -> None:
    attrs = padding.PadAttrs((0, 1, 0, 0), (0, 0, 0, 0))
    wide = Constant(np.ones((4, 4, 3, 3), np.float32))
    fn = simple(convolved(apply(padding.pad, X, attrs=attrs), wide), X)
    assert any(v.op is padding.pad for v in applies(fn))


WHOLE = {"kernel": (1280, 1280), "strides": (1280, 1280), "ceil_mode": True}
TRIMMED: dict[str, tuple[Value, tuple[int, int]]] = {
    "a mean larger than the image": (
        pooled(pool.avg_pool, SMALL, **WHOLE, count_include_pad=True), (5, 4),
    ),
    "a maximum larger than the image": (pooled(pool.max_pool, SMALL, **WHOLE), (5, 4)),
    "both ends": (
        pooled(
            pool.avg_pool, SMALL, kernel=(9, 3), strides=(1, 1), pads_begin=(2, 0), pads_end=(2, 0)
        ),
        (5, 3),
    ),
    "dilated": (
        pooled(
            pool.max_pool, SMALL, strides=(1, 1), dilations=(5, 1), pads_begin=(5, 1),
            pads_end=(5, 1),
        ),
        (1, 3),
    ),
    "convolution": (
        convolved(SMALL, TWO, dilations=(6, 2), pads_begin=(6, 2), pads_end=(6, 2)), (1, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRIMMED)
def test_trimmed(name: str) -> None:
    result, kernel = TRIMMED[name]
    fn = simple(result, SMALL)
    (node,) = applies(fn)
    assert _kernel(node) == kernel
    x = np.random.default_rng(1).standard_normal((1, 2, 5, 4), np.float32)
    (want,) = run_reference(Function("f", (SMALL,), (result,)), [x])
    assert_close(run_reference(fn, [x])[0], want, 20)


def test_a_mean_that_counts_its_border_keeps_it() -> None:
    pads = {"pads_begin": (4, 0), "pads_end": (4, 0), "count_include_pad": True}
    result = pooled(pool.avg_pool, SMALL, kernel=(13, 3), strides=(1, 1), **pads)
    (node,) = applies(simple(result, SMALL))
    assert _kernel(node) == (13, 3)


def test_sizes_that_are_not_known_are_left_alone() -> None:
    result = pooled(pool.max_pool, HIGH, kernel=(3, 9), pads_begin=(1, 3), pads_end=(1, 3))
    (node,) = applies(simple(result, HIGH))
    assert _kernel(node) == (3, 4)


def _kernel(node: Apply) -> tuple[int, ...]:
    if node.op is not conv.conv:
        return tuple(node.attrs.kernel)
    weight = node.args[1]
    assert isinstance(weight, Constant)
    return weight.data.shape[2:]
