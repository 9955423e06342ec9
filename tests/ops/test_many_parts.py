"""Concatenations of many parts: along each axis, for one thread and two."""

from __future__ import annotations

import numpy as np
import pytest

import minicompiler as mc
from minicompiler import te
from minicompiler.frontend.builder import Builder
from minicompiler.ir.expr import Const, Dim, Select, minimum, walk
from minicompiler.ir.tir import PARALLEL, For, statements, stores
from minicompiler.ir.types import float32
from minicompiler.lower.guards import guard_accesses
from minicompiler.lower.to_tir import from_tensors
from minicompiler.ops.pieces import ConcatAttrs, concat


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("rest", [(4,), (2, 3), (3, 40), ()])
def test_many_parts_side_by_side(axis: int, rest: tuple[int, ...]) -> None:
    """Of parts that differ in size, along each axis of one to four, in short and in long rows."""
    shapes = [(5, *rest) for _ in range(70)]
    axis %= len(shapes[0])
    net = Builder("joined")
    parts = [
        np.full((*s[:axis], 1 + k % 18, *s[axis + 1 :]), k, np.float32)
        for k, s in enumerate(shapes)
    ]
    y = net.concat(*[net.input(f"x{k}", x.shape) for k, x in enumerate(parts)], axis=axis)
    for threads in (1, 2):
        (got,) = mc.compile(net.function(y=y), threads=threads)(*parts)
        np.testing.assert_array_equal(got, np.concatenate(parts, axis))


def test_no_element_asks_for_its_part_among_many() -> None:
    parts = [te.placeholder(f"x{k}", (64, 1), float32) for k in range(65)]
    few, many = (
        from_tensors("f", p, [concat.computes[0].build(*p, ConcatAttrs(1))])
        for p in (parts[:-1], parts)
    )
    assert any(type(e) is Select for s in stores(few.phases[0]) for e in walk(s.value))
    assert not any(type(e) is Select for s in stores(many.phases[0]) for e in walk(s.value))
    assert next(x.kind for x in statements(many.phases[0]) if isinstance(x, For)) == PARALLEL


@pytest.mark.parametrize("count", [30, 70])
def test_many_parts_of_sizes_that_data_decides_are_proved_to_fit(count: int) -> None:
    """As one expression and as statements: no index is clamped."""
    sizes = [minimum(Const(40), Dim(f"n{k}", 0, 300)) for k in range(count)]
    parts = [te.placeholder(f"x{k}", (n, 4), float32) for k, n in enumerate(sizes)]
    func = from_tensors("f", parts, [concat.computes[0].build(*parts, ConcatAttrs(0))])
    assert guard_accesses(func) is func


def test_short_rows_are_copied_as_one_line() -> None:
    parts = [te.placeholder(f"x{k}", (Dim(f"n{k}"), 4), float32) for k in range(65)]
    func = from_tensors("f", parts, [concat.computes[0].build(*parts, ConcatAttrs(0))])
    loops = [x for x in statements(func.phases[0]) if isinstance(x, For)]
    assert len(loops) == 3 * len(parts)  # registers, their lanes, what is left
    assert str(loops[0].extent) == "n0*4//16"
