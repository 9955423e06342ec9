"""Roundings that stay floats, and scales that are applied once: the numbers do not change."""

from __future__ import annotations

import numpy as np
import pytest

import minicompiler as mc
from minicompiler.frontend.builder import Builder
from minicompiler.ir.graph import Constant, Function, applies
from minicompiler.ir.types import DType
from minicompiler.ops.evaluate import run_reference
from minicompiler.passes.fold import fold_constants
from minicompiler.passes.rounding import round_in_place


def names(fn: Function) -> list[str]:
    return [v.op.name for v in applies(fn)]


def restored(dtype: str, points: tuple[int, int], also: str = "") -> Function:
    """dequantize(quantize(x)); also: what else reads the integers."""
    net = Builder("restored")
    x = net.input("x", (7, 65))
    first, second = (net.constant(np.array(p, dtype)) for p in points)
    q = net.quantize(x, net.constant(np.float32(0.37)), first, dtype=DType(dtype))
    y = net.dequantize(q, net.constant(np.float32(0.21)), second)
    if also:
        z = q if also == "result" else net.cast(q, dtype=DType("int32"))
        return net.function(y=y, z=z)
    return net.function(y=y)


def data() -> np.ndarray:
    """Ordinary numbers, quotients that lie between two integers, and what leaves every type."""
    x = np.random.default_rng(0).normal(0, 60, (7, 65)).astype(np.float32)
    x[0] = np.float32(0.37) * (np.arange(65) - 30.5).astype(np.float32)
    x[1, :4] = 1e30, -1e30, np.inf, -np.inf
    return x


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
@pytest.mark.parametrize("point", [0, 3, 127])
def test_the_same_numbers_without_integers(dtype: str, point: int) -> None:
    fn = restored(dtype, (point, point))
    assert names(round_in_place(fn, None)) == ["div", "round", "clip", "mul"]
    (want,) = run_reference(fn, [data()])
    np.testing.assert_array_equal(mc.compile(fn, threads=1)(data())[0], want)


@pytest.mark.parametrize("also", ["result", "reader"])
def test_integers_that_something_else_reads_stay(also: str) -> None:
    fn = restored("uint8", (3, 3), also)
    assert "quantize" in names(round_in_place(fn, None))
    made = mc.compile(fn, threads=1)(data())
    for y, want in zip(made, run_reference(fn, [data()]), strict=True):
        np.testing.assert_array_equal(y, want)


def test_other_zero_points_stay() -> None:
    assert names(round_in_place(restored("uint8", (3, 4)), None)) == ["quantize", "dequantize"]


@pytest.mark.parametrize("offset", [False, True])
def test_integers_are_scaled_once(offset: bool) -> None:
    rng = np.random.default_rng(1)
    factor = rng.uniform(0.001, 0.01, 40).astype(np.float32)
    net = Builder("scaled")
    i = net.input("i", (30, 40), "int32")
    x = net.mul(net.cast(i, dtype=DType("float32")), net.constant(factor))
    if offset:
        x = net.add(x, net.constant(rng.standard_normal(40).astype(np.float32)))
    scale, point = net.constant(np.float32(0.07)), net.constant(np.array(11, np.uint8))
    fn = net.function(y=net.quantize(x, scale, point, dtype=DType("uint8")))
    made = fold_constants(round_in_place(fn, None), None)
    assert names(made) == names(fn)
    (last,) = [v for v in applies(made) if v.op.name == "quantize"]
    assert isinstance(last.args[1], Constant) and last.args[1].data == 1
    values = rng.integers(-2000, 2000, (30, 40)).astype(np.int32)
    (y,), (want,) = (run_reference(f, [values]) for f in (made, fn))
    (compiled,) = mc.compile(fn, threads=1)(values)
    # A quotient may lie on the other side of the middle between two integers, but hardly ever.
    for found in (y, compiled):
        apart = np.abs(found.astype(int) - want.astype(int))
        assert apart.max() <= 1 and np.count_nonzero(apart) <= 2


def test_a_scaled_number_with_other_readers_stays() -> None:
    net = Builder("shared")
    i = net.input("i", (4, 5), "int32")
    x = net.mul(net.cast(i, dtype=DType("float32")), net.constant(np.float32(0.3)))
    scale = net.constant(np.float32(0.07))
    fn = net.function(x=x, y=net.quantize(x, scale, dtype=DType("uint8")))
    assert round_in_place(fn, None) is fn
