"""Products of pairs of small integers: exact for the extremes, and only where they are safe."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close

import minicompiler as mc
from minicompiler.context import Context
from minicompiler.frontend.builder import Builder
from minicompiler.ir.graph import Function, Value, applies, type_of
from minicompiler.ir.types import int32
from minicompiler.lower import to_tir
from minicompiler.lower.to_tir import choose_compute
from minicompiler.ops.conv import conv
from minicompiler.ops.evaluate import run_reference
from minicompiler.ops.winograd import exact_tiles
from minicompiler.passes.integers import multiply_pairs
from minicompiler.target import Target

Array = np.ndarray
EXTREMES = {"uint8": (0, 255), "int8": (-128, 127)}


def extremes(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    """Numbers of which most are the smallest or the largest of their type."""
    some = rng.choice(EXTREMES[dtype], shape)
    return np.where(rng.random(shape) < 0.2, rng.integers(0, 100, shape), some).astype(dtype)


def centred(net: Builder, x: Value, zero: Array) -> Value:
    return net.sub(net.cast(x, dtype=int32), net.constant(zero.astype(np.int32)))


def product(
    x: Array, w: Array, zero_x: int = 0, zero_w: int = 0, run_time: bool = False, **attrs: Any
) -> Function:
    """The product (for images: the convolution) of x - zero_x and w - zero_w, in int32."""
    net = Builder("product")
    a = centred(net, net.input("x", x.shape, x.dtype.name), np.array(zero_x))
    right = net.input("w", w.shape, w.dtype.name) if run_time else net.constant(w)
    b = centred(net, right, np.array(zero_w))
    return net.function(y=(net.conv if x.ndim > 2 else net.matmul)(a, b, **attrs))


def in_pairs(fn: Function) -> list[bool]:
    made = multiply_pairs(fn, None)
    return [v.attrs.in_pairs for v in applies(made) if v.op.name in ("matmul", "conv")]


def wrapped(exact: Array) -> Array:
    """int64 -> int32, modulo 2**32."""
    return exact.astype(np.int64).astype(np.int32)


# ---- matrix products ----------------------------------------------------------------------------
SIZES = [
    (1, 2, 1),
    (1, 33, 40),
    (3, 7, 5),
    (17, 64, 70),
    (37, 129, 19),
    (70, 300, 33),
    (6, 4096, 8),
]


@pytest.mark.parametrize("m, k, n", SIZES)
@pytest.mark.parametrize("types", list(itertools.product(EXTREMES, EXTREMES)), ids="-".join)
def test_matrix_products_are_exact(m: int, k: int, n: int, types: tuple[str, str]) -> None:
    rng = np.random.default_rng(0)
    x, w = extremes(rng, (m, k), types[0]), extremes(rng, (k, n), types[1])
    x[0], w[:, 0] = EXTREMES[types[0]][0], EXTREMES[types[1]][0]  # -128 * -128, k times
    zeros = EXTREMES[types[0]][1], EXTREMES[types[1]][1]
    fn = product(x, w, *zeros)
    assert in_pairs(fn) == [True]
    (y,) = mc.compile(fn, threads=1)(x)
    want = (x.astype(np.int64) - zeros[0]) @ (w.astype(np.int64) - zeros[1])
    np.testing.assert_array_equal(y, wrapped(want))


@given(st.data())
@settings(deadline=None, max_examples=8)
def test_any_matrices(data: st.DataObject) -> None:
    m, k, n = (data.draw(st.integers(1, 40)) for _ in range(3))
    attrs = {f"transpose_{side}": data.draw(st.booleans()) for side in "ab"}
    types = [data.draw(st.sampled_from(sorted(EXTREMES))) for _ in range(2)]
    run_time = data.draw(st.booleans())
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    x = extremes(rng, (k, m) if attrs["transpose_a"] else (m, k), types[0])
    w = extremes(rng, (n, k) if attrs["transpose_b"] else (k, n), types[1])
    fn = product(x, w, 7, -3, run_time, **attrs)
    a, b = (v.astype(np.int64) - z for v, z in ((x, 7), (w, -3)))
    want = (a.T if attrs["transpose_a"] else a) @ (b.T if attrs["transpose_b"] else b)
    feeds = {"x": x, "w": w} if run_time else {"x": x}
    np.testing.assert_array_equal(mc.compile(fn, threads=2).run(feeds)["y"], wrapped(want))


# ---- convolutions -------------------------------------------------------------------------------
IMAGES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "one tap": ((2, 32, 9, 7), (48, 32, 1, 1), {}),
    "odd channels": ((1, 3, 11, 11), (16, 3, 3, 3), {"strides": (2, 2), "pads_begin": (1, 1)}),
    "padded": ((1, 16, 8, 8), (24, 16, 3, 3), {"pads_begin": (1, 1), "pads_end": (1, 1)}),
    "dilated": ((1, 8, 9, 9), (8, 8, 3, 2), {"dilations": (2, 1)}),
    "groups": ((1, 12, 6, 6), (8, 6, 3, 3), {"groups": 2}),
    "line": ((1, 6, 20), (5, 6, 3), {"pads_end": (2,)}),
    "volume": ((1, 4, 3, 4, 5), (6, 4, 2, 2, 2), {}),
}


@pytest.mark.parametrize("name", IMAGES)
def test_convolutions_are_exact(name: str) -> None:
    of, weight, attrs = IMAGES[name]
    rng = np.random.default_rng(1)
    x, w = extremes(rng, of, "uint8"), extremes(rng, weight, "int8")
    fn = product(x, w, 255, 127, **attrs)
    assert in_pairs(fn) == [True]
    (want,) = run_reference(fn, [x])
    (y,) = mc.compile(fn, threads=2)(x)
    np.testing.assert_array_equal(y, want)


WINDOWS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "images": ((2, 32, 13, 9), (32, 32, 3, 3)),
    "many channels": ((1, 256, 14, 14), (128, 256, 3, 3)),  # filters that each call transforms
    "odd channels": ((1, 63, 8, 8), (24, 63, 3, 3)),
    "line": ((2, 64, 40), (32, 64, 3)),
    "volume": ((1, 32, 5, 9, 9), (32, 32, 3, 3, 3)),
    "column": ((1, 64, 11, 12), (64, 64, 3, 1)),
}


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("threads", [1, 2])
def test_tiles_of_integers_are_exact(name: str, threads: int) -> None:
    """Also with weights of one sign, for which sums and borders are the largest."""
    of, weight = WINDOWS[name]
    rng = np.random.default_rng(4)
    x, w = extremes(rng, of, "uint8"), extremes(rng, weight, "int8")
    w[0] = 40
    pads = tuple(k // 2 for k in weight[2:])
    fn = product(x, w, 131, 0, pads_begin=pads, pads_end=pads)
    (v,) = [v for v in applies(multiply_pairs(fn, None)) if v.op.name == "conv"]
    types = [type_of(a) for a in v.args]
    assert choose_compute(v, {id(v.args[1])}, 0.0).name.startswith("winograd")
    assert {c.name for c in conv.computes if c.applies and c.applies(types, v.attrs)} == {
        f"winograd{m}_pairs" for m in v.attrs.tiles
    }
    (want,) = run_reference(fn, [x])
    (y,) = mc.compile(fn, threads=threads)(x)
    np.testing.assert_array_equal(y, want)


@pytest.mark.parametrize("m", [2, 4])
def test_tiles_end_where_the_result_is_too_large(m: int) -> None:
    """At the largest sum for which a tile is exact it is, and beyond it is not chosen."""
    attrs = conv.attrs(in_pairs=True)
    fits, most = 31 - {2: 2, 4: 6}[m], 255 * 127
    channels = (1 << fits) // (9 * most)
    weight = np.full((8, channels, 3, 3), 127, np.int8)
    assert m in exact_tiles(attrs, 0, 255, weight)
    assert m not in exact_tiles(attrs, 0, 255, np.full((8, channels + 1, 3, 3), 127, np.int8))
    assert m not in exact_tiles(attrs, -(1 << 13), 255, weight[:, :2])
    x = np.full((1, channels, 8, 8), 255, np.uint8)
    (compute,) = [c for c in conv.computes if c.name == f"winograd{m}_pairs"]
    with pytest.MonkeyPatch.context() as patch:
        only = lambda v, *_: compute if v.op is conv else v.op.computes[0]  # noqa: E731
        patch.setattr(to_tir, "choose_compute", only)
        (y,) = mc.compile(product(x, weight), threads=2, record=False)(x)
    np.testing.assert_array_equal(y, np.full(y.shape, 9 * most * channels))


def test_what_has_no_pairs_stays() -> None:
    rng = np.random.default_rng(2)
    bytes_ = extremes(rng, (1, 6, 5, 5), "int8")
    depthwise = product(bytes_, extremes(rng, (6, 1, 3, 3), "int8"), groups=6)
    odd_groups = product(bytes_, extremes(rng, (2, 3, 3, 3), "int8"), groups=2)
    column = product(extremes(rng, (4, 1), "int8"), extremes(rng, (1, 5), "int8"))
    wide = Builder("wide")
    x = wide.input("x", (4, 6), "int32")
    assert in_pairs(wide.function(y=wide.matmul(x, x, transpose_b=True))) == [False]
    large = product(extremes(rng, (4, 6), "int8"), np.full((6, 2), 1 << 15, np.int32))
    for fn in (depthwise, odd_groups, column, large):
        assert in_pairs(fn) == [False]
    limit = product(extremes(rng, (4, 6), "int8"), np.full((6, 2), -(1 << 15), np.int32))
    assert in_pairs(limit) == [True]


# ---- scaled integers ----------------------------------------------------------------------------
def scaled(
    of: tuple[int, ...], weight: tuple[int, ...], per_channel: bool, **attrs: Any
) -> tuple[Function, Array, Array]:
    """A product of dequantized numbers, data for it, and the result in float64."""
    rng = np.random.default_rng(3)
    x, w = extremes(rng, of, "uint8"), extremes(rng, weight, "int8")
    channels = weight[0] if len(of) > 2 else weight[1]
    scale = rng.uniform(0.001, 0.1, channels if per_channel else ()).astype(np.float32)
    bias = rng.standard_normal(channels).astype(np.float32)
    net = Builder("scaled")
    axis = 0 if len(of) > 2 else 1
    net_x = net.input("x", of, "uint8")
    one = net.constant(np.float32(0.02)), net.constant(np.uint8(131))
    a = net.dequantize(net_x, *one)
    b = net.dequantize(net.constant(w), net.constant(scale), axis=axis)
    y = net.conv(a, b, bias, **attrs) if len(of) > 2 else net.add(net.matmul(a, b, **attrs), bias)
    fn = net.function(y=y)
    wide = Builder("wide")
    factor = scale.astype(np.float64).reshape([-1, *[1] * (len(of) - 1)] if axis == 0 else [-1])
    exact = wide.input("x", of, "float64")
    if axis == 0:
        z = wide.conv(exact, w * factor, bias.astype(np.float64), **attrs)
    else:
        z = wide.add(wide.matmul(exact, w * factor, **attrs), bias.astype(np.float64))
    (want,) = run_reference(wide.function(z=z), [(x - 131.0) * np.float64(np.float32(0.02))])
    return fn, x, want


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    "of, weight, attrs",
    [
        ((30, 70), (70, 40), {}),
        ((2, 16, 9, 9), (24, 16, 3, 3), {"strides": (2, 2), "pads_begin": (1, 1)}),
        ((1, 32, 8, 8), (16, 32, 1, 1), {}),
    ],
)
def test_scales_are_applied_to_the_sums(
    of: tuple[int, ...], weight: tuple[int, ...], attrs: dict[str, Any], per_channel: bool
) -> None:
    fn, x, want = scaled(of, weight, per_channel, **attrs)
    assert in_pairs(fn) == [True]
    (y,) = mc.compile(fn, threads=2)(x)
    # Sums are exact: what is left is the rounding of a conversion, two products and a sum.
    assert_close(y, want.astype(np.float32), 4, float(np.abs(want).max()))


@pytest.mark.parametrize("channels, whole", [(64, True), (512, False)])
def test_where_fewer_products_do(channels: int, whole: bool) -> None:
    """Integers may have the tiles of float32, unless their sums are too large for them."""
    weight = (channels, channels, 3, 3)
    fn, *_ = scaled((1, channels, 28, 28), weight, True, pads_begin=(1, 1), pads_end=(1, 1))
    made = multiply_pairs(fn, None)  # without a context no error may be spent
    context = Context(Target.host())
    assert [v.attrs.in_pairs for v in applies(made) if v.op.name == "conv"] == [True]
    made = multiply_pairs(fn, context)
    assert [v.attrs.in_pairs for v in applies(made) if v.op.name == "conv"] == [whole]


def test_sums_that_could_overflow_stay() -> None:
    fn, *_ = scaled((2, 1 << 17), (1 << 17, 2), False)
    assert in_pairs(fn) == [False]
    fn, *_ = scaled((2, 1 << 16), (1 << 16, 2), False)
    assert in_pairs(fn) == [True]
