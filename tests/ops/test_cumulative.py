"""Running sums: rows and strips of neighbours side by side, additions in their order."""

from __future__ import annotations

import numpy as np
import pytest

import minicompiler as mc
from minicompiler import te
from minicompiler.frontend.builder import Builder
from minicompiler.ir.tir import UNROLL, VECTOR, For, statements
from minicompiler.ir.types import float32
from minicompiler.lower.to_tir import from_tensors
from minicompiler.ops.cumulative import STRIP, CumulativeAttrs, cumsum

CASES = [
    ((3,), 0), ((19, 7), 1), ((8, 5), 1), ((5, 1), 0), ((6, 37), 0), ((2, 3, 5, 56), 1),
    ((2, 3, 5, 56), 2), ((3, STRIP + 37), 0), ((2, 4, 3, 1), 1), ((0, 4), 1), ((4, 0), 0),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "int64"])
@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_sums_are_those_of_numpy_bit_by_bit(shape: tuple[int, ...], axis: int, dtype: str) -> None:
    x = (np.random.default_rng(0).standard_normal(shape) * 50).astype(dtype)
    for exclusive, reverse in ((False, False), (True, False), (False, True), (True, True)):
        net = Builder("sums")
        given = net.input("x", shape, dtype)
        fn = net.function(y=net.cumsum(given, axis=axis, exclusive=exclusive, reverse=reverse))
        attrs = CumulativeAttrs(axis, exclusive, reverse)
        for threads in (1, 2):
            (y,) = mc.compile(fn, threads=threads, checked=True)(x)
            np.testing.assert_array_equal(y, cumsum.reference(x, attrs))


def loops(x: te.Tensor, axis: int) -> list[For]:
    (compute,) = cumsum.computes
    func = from_tensors("f", [x], [compute.build(x, CumulativeAttrs(axis))])
    return [s for s in statements(func) if isinstance(s, For)]


def test_what_is_side_by_side() -> None:
    x = te.placeholder("x", (64, 48), float32)
    assert {str(s.extent) for s in loops(x, 1) if s.kind is UNROLL} == {"8"}
    assert {str(s.extent) for s in loops(x, 0) if s.kind is VECTOR} == {"16"}
