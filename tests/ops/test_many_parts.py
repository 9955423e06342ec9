"""Concatenations of many parts: along each axis, for one thread and two."""

from __future__ import annotations

import numpy as np
import pytest

import minicompiler as mc
from minicompiler import te
from minicompiler.frontend.builder import Builder
from minicompiler.ir.expr import Select, walk
from minicompiler.ir.tir import PARALLEL, For, statements, stores
from minicompiler.ir.types import float32
from minicompiler.lower.to_tir import from_tensors
from minicompiler.ops.pieces import ConcatAttrs, concat


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("rest", [(2, 3), (3, 40), ()])
def test_many_parts_side_by_side(axis: int, rest: tuple[int, ...]) -> None:
    """Of parts that differ in size, along each axis of one to three."""
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
