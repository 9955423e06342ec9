"""The first few of a row: those that enter move the others one by one, or many side by side."""

from __future__ import annotations

import numpy as np
import pytest

import minicompiler as mc
from minicompiler import te
from minicompiler.frontend.builder import Builder
from minicompiler.ir.expr import Dim
from minicompiler.ir.tir import VECTOR, Alloc, For, statements
from minicompiler.ir.types import float32
from minicompiler.lower.to_tir import from_tensors
from minicompiler.ops.order import OrderAttrs, topk
from minicompiler.ops.reduce import ArgAttrs, argmax

ROWS, SIZE = 6, 70
RNG = np.random.default_rng(0)
DATA = {
    "random": RNG.standard_normal((ROWS, SIZE)),
    "rising": np.sort(RNG.standard_normal((ROWS, SIZE)), 1),
    "equal": RNG.integers(0, 3, (ROWS, SIZE)),
    "infinite": np.where(RNG.random((ROWS, SIZE)) < 0.5, -np.inf, np.inf),
}


@pytest.mark.parametrize("k", [8, 9, 16, 33, 64])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_first_of_each_row_in_order(k: int, largest: bool, axis: int) -> None:
    for dtype in ("float32", "int64"):
        net = Builder("first")
        x = net.input("x", (ROWS, SIZE) if axis else (SIZE, ROWS), dtype)
        values, places = net.topk(x, k=k, axis=axis, largest=largest)
        m = mc.compile(net.function(values=values, places=places), threads=2)
        for name, data in DATA.items():
            if dtype == "int64" and name == "infinite":
                continue
            rows = (data * 100 if dtype == "int64" else data).astype(dtype)
            order = np.argsort(-rows if largest else rows, axis=1, kind="stable")[:, :k]
            wanted = np.take_along_axis(rows, order, 1), order
            found = m(rows if axis else rows.T.copy())
            for got, right in zip(found, wanted, strict=True):
                np.testing.assert_array_equal(got if axis else got.T, right)


@pytest.mark.parametrize(("k", "vectors"), [(8, 0), (9, 8), (20, 12)])
def test_many_are_moved_side_by_side(k: int, vectors: int) -> None:
    """Each eight are read and written in a loop of their own, before the row is full and after."""
    x = te.placeholder("x", (ROWS, SIZE), float32)
    made = topk.computes[0].build(x, OrderAttrs(1, True, k))
    func = from_tensors("f", [x], list(made))
    found = [s for s in statements(func.phases[0]) if isinstance(s, For) and s.kind is VECTOR]
    assert len(found) == vectors


@pytest.mark.parametrize("k", [3, 20, 66])
@pytest.mark.parametrize("largest", [True, False])
def test_no_element_comes_twice_where_some_are_no_numbers(k: int, largest: bool) -> None:
    x = np.where(RNG.random((ROWS, SIZE)) < 0.2, np.nan, DATA["infinite"]).astype(np.float32)
    net = Builder("first")
    values, places = net.topk(net.input("x", x.shape), k=k, axis=1, largest=largest)
    got, at = mc.compile(net.function(values=values, places=places))(x)
    assert all(len(set(row)) == k for row in at)
    np.testing.assert_array_equal(got, np.take_along_axis(x, at, 1))


@pytest.mark.parametrize("size", [SIZE, Dim("size", 10, 1 << 30), Dim("size", 10, 1 << 40)])
def test_positions_are_short_where_the_axis_is(size: int | Dim) -> None:
    """Vectors of int32 have twice as many lanes."""
    wanted = "int64" if isinstance(size, Dim) and size.hi == 1 << 40 else "int32"
    x = te.placeholder("x", (ROWS, size), float32)
    func = from_tensors("f", [x], list(topk.computes[0].build(x, OrderAttrs(1, True, 9))))
    kept = [s.buffer for s in statements(func.phases[0]) if isinstance(s, Alloc)]
    assert {b.dtype.name for b in kept if b.name.startswith("place")} == {wanted}
    func = from_tensors("f", [x], [argmax.computes[0].build(x, ArgAttrs(1))])
    assert ("int32" in {b.dtype.name for b in func.buffers}) == (wanted == "int32")
