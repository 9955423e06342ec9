"""Constant positions: which patterns become reads and assignments, and which must not."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import minicompiler as mc
from minicompiler.context import Context, Options
from minicompiler.driver import optimise
from minicompiler.ir.expr import Const, Dim
from minicompiler.ir.graph import Constant, Function, Input, Value, applies, apply
from minicompiler.ir.types import TensorType, float32
from minicompiler.kernel import build_kernel
from minicompiler.ops import elementwise as el
from minicompiler.ops import index as ix
from minicompiler.ops import scatter as sc
from minicompiler.ops.evaluate import run_reference
from minicompiler.passes.simplify import simplify
from minicompiler.target import Target

Array = np.ndarray


def tensor(*shape: int, name: str = "x") -> Input:
    return Input(name, TensorType(tuple(map(Const, shape)), float32))


def at(positions: Any) -> Constant:
    return Constant(np.asarray(positions, np.int64))


def gather(x: Value, positions: Any, axis: int = 0) -> Value:
    return apply(ix.gather, x, at(positions), attrs=ix.GatherAttrs(axis))


def gather_nd(x: Value, positions: Any, batch: int = 0) -> Value:
    return apply(ix.gather_nd, x, at(positions), attrs=ix.GatherNdAttrs(batch))


def scatter(x: Value, positions: Any, u: Value, reduction: str = "none") -> Value:
    return apply(sc.scatter_nd, x, at(positions), u, attrs=sc.ScatterAttrs(0, reduction))


def grid(*lines: Any) -> Array:
    """Positions [.., d] of all combinations."""
    return np.stack(np.meshgrid(*lines, indexing="ij"), -1)


X = tensor(40)
WINDOWS = 8 * np.arange(4)[:, None] + np.arange(16)
U = tensor(3, 2, name="u")

READS = {
    "windows that overlap": gather(X, WINDOWS),
    "from the end": gather(X, WINDOWS - 40),
    "backwards": gather(tensor(2, 9, 3), np.arange(8, -1, -2), axis=1),
    "the last axis": gather(tensor(2, 9), [[1], [4]], axis=-1),
    "points": gather_nd(tensor(5, 7, 2), grid(np.arange(1, 4), np.arange(6, 0, -2))),
    "a diagonal": gather_nd(tensor(5, 7), np.stack([np.arange(5), np.arange(2, 7)], -1)),
}
ASSIGNS = {
    "a box": scatter(tensor(5, 7), grid(np.arange(1, 4), [2, 3]), U),
    "every other column": scatter(tensor(5, 7), grid([0, 1, 2], [1, 4]), U),
    "turned": scatter(tensor(5, 7), grid([2, 3], [0, 1, 2])[..., ::-1].swapaxes(0, 1), U),
    "turned for real": scatter(tensor(5, 7), grid([4, 5, 6], [2, 3])[..., ::-1], U),
    "whole rows": scatter(tensor(5, 7), [[-3], [-2]], tensor(2, 7, name="u")),
    "one number of a position stays": scatter(
        tensor(5, 7, 2), grid([1, 2, 3], [6]), tensor(3, 1, 2, name="u")
    ),
}
KEPT = {
    "no pattern": gather(X, [3, 1, 2]),
    "a step that changes": gather(X, [0, 2, 4, 7]),
    "one position": gather(X, 3),
    "batches": gather_nd(tensor(2, 9), [[[0], [1]], [[1], [2]]], batch=1),
    "a sum": scatter(tensor(5, 7), grid(np.arange(1, 4), [2, 3]), U, "add"),
    "written twice": scatter(tensor(9), np.array([[[1], [1]]] * 3), U),
    "written along a diagonal": scatter(
        tensor(9, 9), [[0, 0], [1, 1], [2, 2]], tensor(3, name="u")
    ),
    "written backwards": scatter(tensor(9), [[3], [2], [1]], tensor(3, name="u")),
}


def inputs_of(result: Value) -> tuple[Input, ...]:
    found: list[Input] = []
    stack = [result]
    while stack:
        v = stack.pop()
        if isinstance(v, Input) and v not in found:
            found.append(v)
        stack += [a for a in getattr(v, "args", ()) if a is not None]
    return tuple(found)


def check(result: Value, wanted: str) -> None:
    """The rule applies, and numpy's meaning of the graph before is that of the kernel after."""
    fn = Function("f", inputs_of(result), (result,))
    simple = simplify(fn, None)
    names = [v.op.name for v in applies(simple)]
    assert wanted in names and not {"gather", "gather_nd", "scatter_nd"} & {*names} - {wanted}
    rng = np.random.default_rng(0)
    data = [
        rng.random([s.value for s in p.type.shape], np.float32)  # type: ignore[attr-defined]
        for p in fn.params
    ]
    (right,) = run_reference(fn, data)
    np.testing.assert_array_equal(mc.compile(fn, threads=1)(*data)[0], right)


@pytest.mark.parametrize("result", READS.values(), ids=READS)
def test_positions_that_are_affine_are_read_without_a_table(result: Value) -> None:
    check(result, "read_affine")


@pytest.mark.parametrize("result", ASSIGNS.values(), ids=ASSIGNS)
def test_a_box_of_positions_is_an_assignment_to_a_slice(result: Value) -> None:
    check(result, "assign_slice")


@pytest.mark.parametrize("result", KEPT.values(), ids=KEPT)
def test_what_looks_alike_stays(result: Value) -> None:
    check(result, result.op.name)  # type: ignore[attr-defined]


def test_positions_of_an_axis_of_unknown_size_stay() -> None:
    """They may lie beyond its end, where reading is moved to the edge."""
    x = Input("x", TensorType((Dim("n", 1, 64),), float32))
    fn = Function("f", (x,), (gather(x, [0, 1, 2, 3]),))
    assert [v.op.name for v in applies(simplify(fn, None))] == ["gather"]


def test_positions_outside_stay() -> None:
    x = tensor(4)
    result = apply(ix.gather_nd, x, at([[3], [4]]), attrs=ix.GatherNdAttrs(0))
    fn = Function("f", (x,), (result,))
    assert [v.op.name for v in applies(simplify(fn, None))] == ["gather_nd"]


def test_windows_are_read_with_contiguous_loads_in_one_kernel() -> None:
    """What comes before is computed where it is read, and no index is loaded."""
    two = Constant(np.float32(2) * np.ones((), np.float32))
    result = apply(el.mul, gather(apply(el.neg, X), WINDOWS), two)
    ctx = Context(Target.parse("cpu:avx2"), Options(record=True))
    (kernel,) = applies(optimise(Function("f", (X,), (result,)), ctx))
    build_kernel(kernel.op, (False,), ctx)  # type: ignore[arg-type]
    (text,) = (s.text for s in ctx.stages if s.name == "llvm")
    assert re.findall(r"= load ([^,]+),", text) == ["<16 x float>"]
