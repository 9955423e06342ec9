"""Tiles of any number of rows have a form for a single row, which means the same."""

from __future__ import annotations

import re

import numpy as np
import pytest

import minicompiler as mc
from minicompiler.frontend.builder import Builder
from minicompiler.ir.expr import Dim
from minicompiler.ir.graph import Function

RNG = np.random.default_rng(0)
DEEP, WIDE = 192, 80
WEIGHTS = RNG.standard_normal((DEEP, WIDE), np.float32)


def dense(batch: int | Dim, rows: int | Dim) -> Function:
    net = Builder("dense")
    x = net.input("x", (batch, rows, DEEP))
    return net.function(y=net.relu(net.add(net.matmul(x, WEIGHTS), WEIGHTS[0, :1])))


def doubled(fn: Function) -> bool:
    """Whether a register tile has two forms."""
    module = mc.compile(fn, threads=1)
    return any(s.text.count("register") == 2 for s in module.stages if s.name == "few_rows")


def test_only_where_there_may_be_one_row() -> None:
    assert doubled(dense(Dim("b", 1, 8), Dim("n", 1, 64)))
    assert doubled(dense(1, Dim("n", 1, None)))
    assert not doubled(dense(1, Dim("n", 2, 64)))
    assert not doubled(dense(1, 7))


@pytest.mark.parametrize("threads", [1, 2])
def test_one_row_is_the_same_to_the_bit(threads: int) -> None:
    module = mc.compile(dense(Dim("b", 1, 8), Dim("n", 1, 64)), threads=threads)
    values = RNG.standard_normal((2, 13, DEEP), np.float32)
    (all_of_them,) = module(values)
    want = np.maximum(values @ WEIGHTS + WEIGHTS[0, :1], 0)
    np.testing.assert_allclose(all_of_them, want, rtol=1e-4, atol=1e-4)
    for first, last in ((0, 1), (3, 4), (2, 5), (0, 6), (0, 7), (0, 13)):
        (part,) = module(values[:1, first:last])
        assert part.tobytes() == all_of_them[:1, first:last].tobytes()


def test_one_row_needs_no_hints_and_one_tile_asks_for_what_it_reads_soon() -> None:
    wide = np.ones((512, 2048), np.float32)
    net = Builder("decoder")
    x = net.input("x", (Dim("n", 1, None), 512))
    module = mc.compile(net.function(y=net.matmul(x, wide)), threads=1)
    (text,) = [s.text for s in module.stages if s.name == "few_rows" and "prefetch" in s.text]
    many, one = re.split(r"else:\n +alloc", text)
    near, few, rest = many.split("else:")[:3]
    assert near.count("prefetch") == 4 and "+ 256\n" in near and "i0_o_i%" not in near
    assert few.count("prefetch") == few.count("i0_o_i%2*32") == 2
    assert rest.count("prefetch") == rest.count("i0_o_i%4*16") == 1
    assert "prefetch" not in one
