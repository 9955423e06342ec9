"""Reductions that stand alone: right for any axes and sizes, the same bits for any number of
threads, sums in registers and vectors along memory."""

from __future__ import annotations

import re

import numpy as np
import pytest
from one_operator import run

import minicompiler as mc
from minicompiler.frontend.builder import Builder

AVX2 = "cpu:avx2,cores=2"


def nest(
    op: str, shape: tuple[int | str, ...], axes: tuple[int, ...], dtype: str = "float32"
) -> str:
    """The loop nest of a reduction, without what follows it."""
    net = Builder("one", {"N": (1, 100_000)})
    fn = net.function(y=getattr(net, op)(net.input("x", shape, dtype), axes=axes))
    module = mc.compile(fn, target=AVX2, threads=1, checked=True)
    (text,) = [s.text for s in module.stages if s.name == "schedule"]
    return text


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((3, 65, 13, 13), (0, 1, 3)),  # short runs in lines that are added up
        ((21, 5, 11, 7), (1, 3)),
        ((9, 33, 70, 3), (1, 3)),  # lines longer than registers
        ((3, 65, 13, 13), (2,)),  # short lines
        ((5, 37, 5), (1,)),  # shorter than a vector: several side by side
        ((700, 3), (0,)),
        ((3, 401, 57), (1,)),  # as many vectors as registers hold
        ((50, 40, 2), (0,)),  # a line of two axes
        ((30_001, 3), (0, 1)),  # parts, of all
        ((9001, 4, 2), (0, 2)),  # parts, of a few
        ((5003, 13), (0,)),  # parts, of lines
        ((9, 5, 300, 7), (0, 2)),
    ],
)
def test_any_axes(shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    x = np.random.default_rng(1).standard_normal(shape, np.float32) * 9
    wide = x.astype(np.float64)
    for dynamic in (False, True):
        got = run("reduce_mean", x, dynamic, axes=axes)
        want = wide.mean(axes, keepdims=got.ndim == x.ndim)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    for dtype in ("float16", "int64"):
        small = x.astype(dtype)
        got = run("reduce_max", small, axes=axes)
        np.testing.assert_array_equal(got, small.max(axes, keepdims=got.ndim == x.ndim))


@pytest.mark.parametrize("size", [1, 2, 31, 33, 100])
def test_a_line_of_symbolic_length(size: int) -> None:
    """Its pieces have registers for more than a short one has."""
    net = Builder("line", {"N": (1, 1000)})
    fn = net.function(y=net.reduce_sum(net.input("x", (64, "N", 3)), axes=(0, 2)))
    x = np.random.default_rng(2).standard_normal((64, size, 3), np.float32)
    found = [mc.compile(fn, threads=t, checked=True)(x)[0] for t in (1, 2)]
    np.testing.assert_allclose(found[0].reshape(-1), x.sum((0, 2)), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
    ("shape", "axes", "sums", "loops"),
    [
        ((3, 65, 13, 13), (0, 1, 2, 3), "32", 2),  # joined axes, whatever lies between them
        (("N",), (0,), "32", 2),
        ((4, 64, 56, 56), (1, 2), "7, 8", 1),  # a line
        ((64, 300, 16), (1,), "4, 8", 1),  # two lines
        ((8, 400, 5), (1,), "5, 8", 1),  # eight lines
        ((6, 70, 13, 13), (1, 3), "11, 8", 1),  # half of a line of 13 runs
    ],
)
def test_sums_stay_in_registers(
    shape: tuple[int | str, ...], axes: tuple[int, ...], sums: str, loops: int
) -> None:
    """The largest tile, in which the only loads of the reduction are added up, by vectors: in one
    loop, or two where the last vectors ask which of their numbers exist."""
    text = nest("reduce_sum", shape, axes)
    assert f"float32[{sums}] register" in text, text
    loads = [line for line in text.splitlines() if "p0[" in line]
    assert len(loads) == loops
    for add in loads:
        assert re.match(r"\s*\w+_s\[", add), add  # into what is staged


def test_no_result_is_stored_in_a_loop_over_what_is_added_up() -> None:
    """Of few numbers, all in one vector; threads share parts of a sum."""
    text = nest("reduce_sum", (64, 8, 32, 16), (0, 1, 2))
    assert text.count("---") == 1 and "parallel" in text.split("---")[0]
    for line in (x for x in text.splitlines() if " + p0[" in x):
        assert re.match(r"\s*\w+_s\[", line)


def test_parts_are_of_whole_vectors_if_they_can() -> None:
    """Masked loads behind the end of memory take hundreds of cycles each."""
    assert "where" not in nest("reduce_sum", (300_000,), (0,))
    assert "in 25:" in nest("reduce_sum", (300_000,), (0,))
