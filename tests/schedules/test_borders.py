"""Lines with borders: pieces in which nothing is chosen by position, and whole vectors in each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from one_operator import run

import minicompiler as mc
from minicompiler import te
from minicompiler.frontend.builder import Builder
from minicompiler.ir.expr import Dim, Expr, Select, all_of, binary, const, select, walk
from minicompiler.ir.tir import VECTOR, For, If, PrimFunc, statements, stores
from minicompiler.ir.types import DType, float32
from minicompiler.ir.verify_tir import verify_tir
from minicompiler.lower.blocks import hoist_conditions, lower_blocks
from minicompiler.lower.to_tir import from_tensors
from minicompiler.schedules.cpu import schedule
from minicompiler.target import Target

AVX2 = Target.parse("cpu:avx2")


def padded(width: int | Expr, dtype: DType = float32) -> PrimFunc:
    """32 images of `width`, with three zeros on all sides."""
    x = te.placeholder("x", (32, 113, width), dtype)

    def body(c: Expr, i: Expr, j: Expr) -> Expr:
        inside = [i >= 3, i < 116, j >= 3, j < width + 3]
        return select(all_of(inside), x[c, i - 3, j - 3], const(0, dtype))

    y = te.compute((32, 119, width + 6), body, "y")
    return schedule(from_tensors("f", [x], [y]), AVX2, after_step=verify_tir).func


@pytest.mark.parametrize("width", [113, Dim("w", 100, 1000)])
def test_nothing_is_chosen_in_a_line(width: int | Expr) -> None:
    made = hoist_conditions(lower_blocks(padded(width)))
    lines = [s for s in statements(made) if isinstance(s, For) and s.kind is VECTOR]
    chosen = [e for s in lines for x in stores(s) for e in walk(x.value) if type(e) is Select]
    # Two borders, a line of the image and one above or below; all vectors of these are whole ones.
    assert len(lines) == 4
    assert not chosen
    assert not [s for line in lines for s in statements(line) if isinstance(s, If)]


@pytest.mark.parametrize(("dtype", "lanes"), [("float32", 32), ("uint8", 32), ("float64", 16)])
def test_lines_are_copied_in_whole_vectors(dtype: str, lanes: int) -> None:
    loops = [s for s in statements(padded(113, DType(dtype))) if isinstance(s, For)]
    assert [str(s.extent) for s in loops if s.kind is VECTOR] == ["3", str(lanes), "3"]


@pytest.mark.parametrize("dtype", ["float32", "uint8", "bool", "int64", "float16"])
@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "wrap"])
@pytest.mark.parametrize("size", [(3, 9, 7), (40, 21, 70), (2, 5, 300)])
def test_padded_images(size: tuple[int, ...], mode: str, dtype: str) -> None:
    x = (np.random.default_rng(0).standard_normal(size) * 9).astype(dtype)
    begin, end = (0, 2, 1), (0, 1, 5)
    want = np.pad(x, [*zip(begin, end, strict=True)], mode)  # type: ignore[call-overload]
    for dynamic in (False, True):
        found = run("pad", x, dynamic, begin=begin, end=end, mode=mode)
        np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("columns", [33, 70, 101, 120])
def test_the_last_vectors_of_rows_overlap(columns: int) -> None:
    x, b = te.placeholder("x", (64, columns), float32), te.placeholder("b", (columns,), float32)
    y = te.compute((64, columns), lambda i, j: binary("max", x[i, j], b[j]), "y")
    func = schedule(from_tensors("f", [x, b], [y]), AVX2, after_step=verify_tir).func
    assert not any(isinstance(s, If) for s in statements(lower_blocks(func)))

    net = Builder("rows")
    fn = net.function(y=net.maximum(net.input("x", (64, columns)), net.input("b", (columns,))))
    given = [
        np.random.default_rng(1).standard_normal(n, np.float32) for n in ((64, columns), columns)
    ]
    for threads in (1, 2):
        (found,) = mc.compile(fn, threads=threads, checked=True)(*given)
        np.testing.assert_array_equal(found, np.maximum(*given))


def test_one_of_several_choices_does_not_double_the_others() -> None:
    """A sum of two concatenations stays one loop; a chain of parts becomes one for each."""
    one = const(1.0, float32)
    a, b, c = (te.placeholder(n, (64, 100), float32) for n in "abc")

    def loops(body: Any) -> int:
        s = schedule(from_tensors("f", [a, b, c], [te.compute((192, 100), body, "y")]), AVX2)
        made = hoist_conditions(lower_blocks(s.func))
        return sum(isinstance(x, For) and x.kind is VECTOR for x in statements(made))

    def chain(i: Expr, j: Expr) -> Expr:
        return select(i < 60, a[i, j], select(i < 100, b[i - 60, j], c[i - 128, j]))

    def twice(i: Expr, j: Expr) -> Expr:
        return select(i < 60, a[i, j], one) + select(i < 100, b[i - 60, j], one)

    assert (loops(chain), loops(twice)) == (3, 1)
