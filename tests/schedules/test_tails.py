"""The last iteration of a loop around vectors has code of its own: the others ask for nothing."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from one_operator import scheduled

import minicompiler as mc
from minicompiler import te
from minicompiler.frontend.builder import Builder
from minicompiler.ir.expr import Dim, Expr
from minicompiler.ir.tir import PrimFunc
from minicompiler.ir.types import float32
from minicompiler.schedules import analysis


def row_maxima(width: int | Expr) -> PrimFunc:
    x = te.placeholder("x", (64, width), float32)
    return scheduled(te.max(x, 1), x)


@pytest.mark.parametrize("width", [100, 1000, Dim("d", 1, 10**6)])
def test_only_the_last_vectors_ask_which_numbers_exist(width: int | Expr) -> None:
    reading = [b for b in analysis.blocks(row_maxima(width)) if "p0[" in str(b.body)]
    first, last = reading
    assert not list(analysis.choices(first.body.value))
    assert list(analysis.choices(last.body.value))


@pytest.mark.parametrize("width", [20, 128])
def test_few_or_whole_vectors_stay_one_loop(width: int) -> None:
    assert "_t in" not in str(row_maxima(width))


def test_lines_that_may_be_empty_stay_one_loop() -> None:
    """There would be -1 iterations before the last one."""
    width = Dim("d", 1, 1000) // 2
    x = te.placeholder("x", (64, width), float32)
    assert "_t in" not in str(
        scheduled(te.compute((64, width), lambda i, j: x[i, j] * 2.0, "y"), x)
    )


@functools.cache
def of_any_length(threads: int) -> mc.Module:
    """Rows, columns, and lines that are combined."""
    net = Builder("rows", {"D": (1, 100_000)})
    v = net.input("x", (5, "D"), "float32")
    rows, columns = net.softmax(v, axis=1), net.softmax(v, axis=0)
    tops, middle = net.reduce_max(v, axes=[1]), net.reduce_max(net.unsqueeze(v, axes=[0]), axes=[1])
    fn = net.function(rows=rows, columns=columns, tops=tops, middle=middle)
    return mc.compile(fn, threads=threads, checked=True)


@pytest.mark.parametrize("width", [1, 7, 31, 32, 33, 64, 65, 127, 128, 129, 257, 1000, 2049])
def test_lines_of_any_length(width: int) -> None:
    x = np.random.default_rng(width).standard_normal((5, width), np.float32)
    found = [of_any_length(t)(x) for t in (1, 2)]
    for one, two in zip(*found, strict=True):
        np.testing.assert_array_equal(one, two)
    e = np.exp(x - x.max())
    wanted = [e / e.sum(1, keepdims=True), e / e.sum(0), x.max(1, keepdims=True), x.max(0)]
    for got, want in zip(found[0], wanted, strict=True):
        np.testing.assert_allclose(got.reshape(want.shape), want, rtol=2e-5, atol=1e-7)
