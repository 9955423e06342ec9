"""Pools and other reductions over windows of a line: what they share, vectors of every kind."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from one_operator import run

import minicompiler as mc
from minicompiler import te
from minicompiler.codegen.llvm import emit
from minicompiler.errors import ScheduleError
from minicompiler.frontend.builder import Builder
from minicompiler.ir.expr import (
    Binary,
    Expr,
    Load,
    all_of,
    binary,
    cast,
    const,
    select,
    walk,
)
from minicompiler.ir.tir import UNROLL, For, statements, stores
from minicompiler.ir.types import DType, float32
from minicompiler.ir.verify_tir import verify_tir
from minicompiler.lower.blocks import hoist_conditions, lower_blocks, unswitch
from minicompiler.lower.to_tir import from_tensors
from minicompiler.schedules.cpu import schedule
from minicompiler.schedules.schedule import Schedule
from minicompiler.target import Target

AVX2 = Target.parse("cpu:avx2")


@pytest.mark.parametrize(
    ("width", "step", "dtype"),
    [
        *itertools.product((9, 56, 101), (1, 2, 3, 4), ["float32"]),
        *itertools.product([28], [2, 3], ["float64", "float16", "uint8"]),
    ],
)
def test_windows_along_a_line(width: int, step: int, dtype: str) -> None:
    """All positions of a window against the border, vectors of every kind."""
    x = np.random.default_rng(1).integers(0, 100, (3, 2, 7, width)).astype(dtype)
    attrs = {"kernel": (2, 3), "strides": (1, step), "pads_begin": (0, 1), "pads_end": (1, 1)}
    got = run("max_pool", x, width == 56, **attrs)
    low = 0 if dtype == "uint8" else -np.inf
    wide = np.pad(x, ((0, 0), (0, 0), (0, 1), (1, 1)), constant_values=low)
    view = np.lib.stride_tricks.sliding_window_view(wide, (2, 3), (2, 3))[:, :, :, ::step]
    np.testing.assert_array_equal(got, view.max((4, 5)))


def window_sums(x: te.Tensor, size: int, step: int = 1) -> te.Tensor:
    """Sums over windows on the last two axes of x[c, h, w], with a border of zeros."""
    c, h, w = x.shape
    half = size // 2
    a, b = te.reduce_vars(2)

    def term(k: Expr, i: Expr, j: Expr) -> Expr:
        at = [i * step + a - half, j * step + b - half]
        there = [(p >= 0, p < n) for p, n in zip(at, (h, w), strict=True)]
        return select(all_of(itertools.chain(*there)), x[(k, *at)], const(0, x.dtype))

    shape = (c, (h - 1) // step + 1, (w - 1) // step + 1)
    return te.compute(shape, term, "s", ("sum", {a: size, b: size}))


@pytest.mark.parametrize(("size", "step", "width"), [(3, 1, 113), (5, 1, 56), (3, 2, 113)])
def test_windows_share_what_is_combined_across(size: int, step: int, width: int) -> None:
    """Each place of a line is loaded once per row of the windows, and no index is clamped."""
    x = te.placeholder("x", (8, 113, width), float32)
    s = schedule(from_tensors("f", [x], [window_sums(x, size, step)]), AVX2, after_step=verify_tir)
    assert s.rule == "windows" and any(step.primitive == "slide" for step in s.steps)
    func = lower_blocks(s.func)
    taps = [y.extent.value for y in statements(func) if isinstance(y, For) and y.kind is UNROLL]
    assert taps == [size, size]
    read = [e for st in stores(func) for e in walk(st.value) if isinstance(e, Load)]
    assert not any(
        isinstance(e, Binary) and e.op == "min" for r in read for i in r.indices for e in walk(i)
    )


@pytest.mark.parametrize(
    ("size", "step", "apart", "dtype"),
    [
        *[
            (k, s, d, "float32")
            for k, s, d in ((3, 1, 1), (5, 2, 1), (3, 1, 2), (3, 4, 1), (7, 1, 1))
        ],
        *[(3, 2, 1, t) for t in ("float64", "float16", "uint8", "int8")],
    ],
)
def test_windows_across_lines(size: int, step: int, apart: int, dtype: str) -> None:
    """Maxima in two steps, for tails of lines and of groups of lines; sizes known and not."""
    x = np.random.default_rng(3).integers(-90, 90, (2, 3, 37, 41)).astype(dtype)
    border = (size - 1) * apart // 2
    attrs = {"kernel": (size,) * 2, "strides": (step,) * 2, "dilations": (apart,) * 2}
    attrs |= {"pads_begin": (border,) * 2, "pads_end": (border,) * 2}
    low = np.iinfo(dtype).min if np.dtype(dtype).kind in "iu" else -np.inf
    wide = np.pad(x, ((0, 0), (0, 0), (border, border), (border, border)), constant_values=low)
    reach = 2 * border + 1
    view = np.lib.stride_tricks.sliding_window_view(wide, (reach, reach), (2, 3))
    want = view[:, :, ::step, ::step, ::apart, ::apart].max((4, 5))
    np.testing.assert_array_equal(run("max_pool", x, **attrs), want)
    net = Builder("sizes", {"H": (9, 100), "W": (9, 100)})
    v = net.input("x", (2, 3, "H", "W"), dtype)
    fn = net.function(y=net.max_pool(v, **attrs))
    np.testing.assert_array_equal(mc.compile(fn, checked=True)(x)[0], want)


@pytest.mark.parametrize("width", [9, 113])
def test_averages_count_taps_once_per_tile(width: int) -> None:
    """Only tiles at the ends of a line count the taps of each of their windows."""
    x = np.random.default_rng(4).integers(-9, 9, (2, 3, 21, width)).astype(np.float32)
    attrs = {"kernel": (5, 5), "pads_begin": (2, 2), "pads_end": (2, 2)}
    wide = [np.pad(v, ((0, 0), (0, 0), (2, 2), (2, 2))) for v in (x, np.ones_like(x))]
    views = [np.lib.stride_tricks.sliding_window_view(v, (5, 5), (2, 3)) for v in wide]
    total, count = (v.sum((4, 5)) for v in views)
    np.testing.assert_allclose(run("avg_pool", x, **attrs), total / count, rtol=1e-6)
    p = te.placeholder("x", (64, 120), float32)
    mean = te.compute(
        (64, 120), lambda i, j: p[i, j] / cast(binary("min", 3, 121 - j), float32), "mean"
    )
    func = unswitch(lower_blocks(schedule(from_tensors("f", [p], [mean]), AVX2).func))
    counting = [
        any(isinstance(e, Binary) and e.op == "min" for e in walk(st.value)) for st in stores(func)
    ]
    assert sorted(counting) == [False, True]


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_windows_of_computed_integers_slide(dtype: str) -> None:
    """Numbers are no places, whatever their type: those of zero points, say."""
    x = te.placeholder("x", (4, 40, 60), DType(dtype))
    a, b = te.reduce_vars(2)
    total = te.compute(
        (4, 38, 58), lambda k, i, j: x[k, i + a, j + b] - 120, "s", ("sum", {a: 3, b: 3})
    )
    s = schedule(from_tensors("f", [x], [total]), AVX2, after_step=verify_tir)
    assert any(step.primitive == "slide" for step in s.steps)


def test_slide_needs_windows_on_a_line_and_across_it() -> None:
    x = te.placeholder("x", (4, 9, 30), float32)
    (a,) = te.reduce_vars(1)
    along = te.compute((4, 9, 28), lambda c, h, w: x[c, h, w + a], "s", ("sum", {a: 3}))
    s = Schedule(from_tensors("f", [x], [along]), AVX2)
    with pytest.raises(ScheduleError, match="nothing in common"):
        s.slide("s", "i2")
    weighed = te.compute(
        (4, 9, 28), lambda c, h, w: x[c, h, w + a] * cast(w, float32), "s", ("sum", {a: 3})
    )
    s = Schedule(from_tensors("f", [x], [weighed]), AVX2)
    with pytest.raises(ScheduleError, match="nothing in common"):
        s.slide("s", "i2")
    s = Schedule(from_tensors("f", [x], [window_sums(x, 3)]), AVX2)
    with pytest.raises(ScheduleError, match="no windows along"):
        s.slide("s", "k0")
    s.split("i2", 8, "mask")
    with pytest.raises(ScheduleError, match="split already"):
        s.slide("s", "i1")


def test_windows_apart_are_picked_out_of_vectors() -> None:
    x = te.placeholder("x", (4, 64, 64), float32)
    a, b = te.reduce_vars(2)
    mean = te.compute(
        (4, 32, 32), lambda c, h, w: x[c, h * 2 + a, w * 2 + b], "s", ("sum", {a: 2, b: 2})
    )
    s = schedule(from_tensors("f", [x], [mean]), AVX2, after_step=verify_tir)
    assert s.rule == "windows"
    func = s.func
    for step in (lower_blocks, hoist_conditions, unswitch):
        func = step(func)
    text = emit(func).text
    assert "shufflevector" in text and "insertelement" not in text
