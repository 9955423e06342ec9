"""Attention and products of 16-bit floats: kernels of float32, rounded once."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from onnx_models import model, node, numbers

import minicompiler as mc
from minicompiler.frontend.builder import Builder
from minicompiler.ir.graph import Constant, Function, Value, applies, type_of
from minicompiler.ir.types import DType
from minicompiler.ir.verify import verify_function
from minicompiler.ops.evaluate import run_reference
from minicompiler.passes.recognise import recognise
from minicompiler.passes.widen import widen_attention, widen_products

HEADS, KEYS, WIDTH = 3, 20, 8
HALF = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
Array = np.ndarray


def operands(net: Builder, dtype: str, queries: int) -> tuple[Value, Value, Value]:
    """q[h, queries, d], k[h, d, keys] and v[h, keys, d], turned from what the caller passes."""
    q, k, v = (
        net.input(name, (n, HEADS, WIDTH), dtype)
        for name, n in (("q", queries), ("k", KEYS), ("v", KEYS))
    )
    perms = ((1, 0, 2), (1, 2, 0), (1, 0, 2))
    turned = [net.transpose(x, perm=p) for x, p in zip((q, k, v), perms, strict=True)]
    return turned[0], turned[1], turned[2]


def plain(dtype: str, queries: int) -> Function:
    """Everything in 16 bits: both operands scaled, a mask added, rows of NaN replaced."""
    net = Builder("plain")
    q, k, v = operands(net, dtype, queries)
    half = np.array(0.5, HALF[dtype])
    mask = np.where(np.tri(queries, KEYS, dtype=bool), 0, -np.inf).astype(HALF[dtype])
    p = net.softmax(net.add(net.matmul(net.mul(q, half), net.mul(k, half)), mask))
    p = net.where(net.isnan(p), np.zeros((), HALF[dtype]), p)
    return net.function(y=net.transpose(net.matmul(p, v), perm=(1, 0, 2)))


def wide_softmax(dtype: str, queries: int) -> Function:
    """Only the softmax in float32, as exporters of models in 16 bits write it."""
    net = Builder("wide")
    q, k, v = operands(net, dtype, queries)
    scores = net.mul(net.matmul(q, k), np.array(0.25, HALF[dtype]))
    mask = np.where(np.tri(queries, KEYS, dtype=bool), 0, -np.inf).astype(HALF[dtype])
    p = net.softmax(net.cast(net.add(scores, mask), dtype=DType("float32")))
    o = net.matmul(net.cast(p, dtype=DType(dtype)), v)
    return net.function(y=net.transpose(o, perm=(1, 0, 2)))


def feeds(dtype: str, queries: int) -> list[Array]:
    sizes = (queries, KEYS, KEYS)
    return [(2 * numbers(n, HEADS, WIDTH, seed=k)).astype(HALF[dtype]) for k, n in enumerate(sizes)]


def exact(q: Array, k: Array, v: Array) -> Array:
    """The attention of both graphs in float64."""
    scores = np.einsum("qhd,khd->hqk", q, k) / 4
    scores = np.where(np.tri(*scores.shape[1:], dtype=bool), scores, -np.inf)
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", e / e.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("build", (plain, wide_softmax))
def test_rounded_once(build: Callable[[str, int], Function], dtype: str) -> None:
    fn, inputs = build(dtype, 12), feeds(dtype, 12)
    widened = widen_attention(fn, None)
    verify_function(widened)
    kernels = [v.op.name for v in applies(recognise(widened, None))]
    assert kernels.count("fused_attention") == 1
    assert not {"softmax", "matmul", "transpose"} & set(kernels)
    want = exact(*[x.astype(np.float64) for x in inputs])

    def ulps(got: Array) -> float:
        """The largest error in units of the last place of what is exact."""
        assert got.dtype == HALF[dtype]
        eps = float(ml_dtypes.finfo(HALF[dtype]).eps)
        unit = 2.0 ** np.floor(np.log2(np.abs(want))) * eps
        return float((np.abs(got.astype(np.float64) - want) / unit).max())

    one, two = (mc.compile(fn, threads=t)(*inputs)[0] for t in (1, 2))
    assert np.array_equal(one, two)
    assert ulps(one) < 0.51
    assert ulps(run_reference(widened, inputs)[0]) < 0.51
    assert ulps(run_reference(fn, inputs)[0]) > 1  # what is rounded in between is worse


def test_a_single_query_stays() -> None:
    fn = plain("float16", 1)
    assert widen_attention(fn, None) is fn


def test_float32_stays() -> None:
    net = Builder("float32")
    q, k, v = operands(net, "float32", 5)
    fn = net.function(y=net.matmul(net.softmax(net.matmul(q, k)), v))
    assert widen_attention(fn, None) is fn


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rows", [40, "n"])
def test_products_round_once(dtype: str, rows: int | str) -> None:
    """A convolution and a product of its pixels; both weights are converted while compiling."""
    net = Builder("net", {"n": (1, 100)})
    x = net.input("x", (rows, 8, 5, 5), dtype)
    filters, weight = (
        numbers(*n, seed=k).astype(HALF[dtype]) for k, n in enumerate([(16, 8, 3, 3), (16, 24)])
    )
    pixels = net.transpose(net.relu(net.conv(x, filters)), perm=(0, 2, 3, 1))
    fn = net.function(y=net.matmul(pixels, weight))
    widened = widen_products(fn, None)
    verify_function(widened)
    for product in (v for v in applies(widened) if v.op.name in ("conv", "matmul")):
        assert {str(type_of(a).dtype) for a in product.args if a is not None} == {"float32"}
        assert isinstance(product.args[1], Constant)
    given = numbers(40, 8, 5, 5, seed=2).astype(HALF[dtype])
    one, two = (mc.compile(fn, threads=t)(given)[0] for t in (1, 2))
    np.testing.assert_array_equal(one, two)
    (want,) = run_reference(fn, [given])
    eps = float(ml_dtypes.finfo(HALF[dtype]).eps)
    assert (
        np.abs(one.astype(np.float64) - want.astype(np.float64)).max()
        <= 2 * eps * np.abs(want).max()
    )


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((1, 64), (64, 32)),
        ((64, 64), (64, 1)),
        ((500, 1, 64), (500, 64, 20)),  # one query of many heads
    ],
)
def test_products_that_wait_for_the_memory_stay(
    left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    net = Builder("net")
    a, b = net.input("a", left, "float16"), net.input("b", right, "float16")
    fn = net.function(y=net.matmul(a, b))
    assert widen_products(fn, None) is fn


def test_an_operand_of_two_products_is_converted_once() -> None:
    net = Builder("net")
    x = net.input("x", (30, 16), "float16")
    a, b = (numbers(16, 16, seed=k).astype(np.float16) for k in range(2))
    fn = widen_products(net.function(y=net.matmul(x, a), z=net.matmul(x, b)), None)
    assert [v.op.name for v in applies(fn)].count("cast") == 3  # of x, and of both results


@pytest.mark.parametrize("equation", ["ij->ji", "ii->i", "ij->"])
def test_one_operand_is_no_product(equation: str) -> None:
    x = numbers(9, 9, seed=3).astype(np.float16)
    m = model([node("Einsum", "x", "y", equation=equation)], {"x": x}, ["y"])
    (y,) = mc.compile(m)(x)
    want = np.einsum(equation, x.astype(np.float64))
    np.testing.assert_allclose(y.astype(np.float64), want, rtol=1e-3, atol=1e-3)
