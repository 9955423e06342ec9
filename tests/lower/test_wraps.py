"""Vectors across the ends of lines: the same elements, and one load where no line ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import minicompiler as mc
from minicompiler import te
from minicompiler.codegen.llvm import emit
from minicompiler.frontend.builder import Builder
from minicompiler.ir.tir import VECTOR, For, If, PrimFunc, statements
from minicompiler.ir.types import float32
from minicompiler.lower.blocks import hoist_conditions, lower_blocks, unswitch
from minicompiler.lower.to_tir import from_tensors
from minicompiler.lower.wraps import unwrap_lines
from minicompiler.schedules.cpu import schedule
from minicompiler.target import Target


def prepared(y: te.Tensor, *xs: te.Tensor) -> PrimFunc:
    """What the pass gets."""
    func = schedule(from_tensors("f", list(xs), [y]), Target.parse("cpu:avx2")).func
    return hoist_conditions(lower_blocks(func))


def reader(line: int, step: int = 1) -> PrimFunc:
    """Element t of a flat result lies in line step*t // line."""
    x = te.placeholder("x", (-(-240 * step // line), line + 5), float32)
    y = te.compute((10, 24), lambda i, j: x[_at(i, j, step) // line, _at(i, j, step) % line], "y")
    return prepared(y, x)


def _at(i: Any, j: Any, step: int) -> Any:
    return (i * 24 + j) * step


def vectors(func: PrimFunc) -> int:
    return sum(isinstance(s, For) and s.kind is VECTOR for s in statements(func))


def test_where_no_line_ends_the_elements_are_one_load() -> None:
    func = reader(33)
    made = unwrap_lines(func)
    assert vectors(made) == 2 * vectors(func)
    (form,) = (s for s in statements(made) if isinstance(s, If))
    whole = made.with_(phases=(_replaced(made.phases[0], form),))
    text = emit(unswitch(whole)).text
    assert "load <8 x float>" in text and "load float" not in text


def _replaced(s: Any, form: If) -> Any:
    """The statement with the first form only."""
    if s is form:
        return form.then
    return s.with_(body=_replaced(s.body, form)) if isinstance(s, For) else s


@pytest.mark.parametrize(("line", "step"), [(3, 1), (33, 11), (24, 1)])
def test_lines_shorter_than_a_vector_or_in_step_with_it_stay(line: int, step: int) -> None:
    func = reader(line, step)
    assert unwrap_lines(func).phases == func.phases


def test_rows_of_one_long_line_stay() -> None:
    x = te.placeholder("x", (10, 33), float32)
    y = te.compute((11, 30), lambda i, j: x[(i * 30 + j) // 33, (i * 30 + j) % 33], "y")
    func = prepared(y, x)
    assert unwrap_lines(func).phases == func.phases


@pytest.mark.parametrize("width", [9, 31, 64, 97])
@pytest.mark.parametrize("rows", [5, 40])
def test_lines_that_are_shifted_against_each_other(rows: int, width: int) -> None:
    """Rows one longer, read as rows of the old length: the diagonals of a band."""
    net = Builder("skewed")
    x = net.input("x", (3, rows, width))
    longer = net.pad(x, begin=(0, 0, 0), end=(0, 0, 1))
    flat = net.reshape(longer, shape=(3, rows * (width + 1)))
    part = net.strided_slice(flat, starts=(0,), ends=(rows * width,), axes=(1,))
    fn = net.function(y=net.reshape(part, shape=(3, rows, width)))
    data = np.random.default_rng(0).random((3, rows, width), np.float32)
    right = np.pad(data, ((0, 0), (0, 0), (0, 1))).reshape(3, -1)[:, : rows * width]
    for threads in (1, 2):
        (got,) = mc.compile(fn, threads=threads)(data)
        np.testing.assert_array_equal(got, right.reshape(3, rows, width))
