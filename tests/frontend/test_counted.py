"""Sizes that only the data tells, from the importer to the running module."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx_models import Array, model, node, numbers

import minicompiler as mc
from minicompiler.errors import RunError, ShapeError
from minicompiler.frontend.onnx import load
from minicompiler.ops.evaluate import run_reference

X = np.array([[0, 3, 0, 5], [7, 0, 0, 0], [1, 1, 0, 2]], np.float32)
NOTHING = np.zeros_like(X)
ONE = np.array([1])


def positions() -> onnx.ModelProto:
    """The places of what is not zero, and the sum of the rows they lie in."""
    return model(
        [
            node("NonZero", "x", "places"),
            node("Gather", "places zero", "rows", axis=0),
            node("Gather", "x rows", "chosen", axis=0),
            node("MatMul", "chosen w", "product"),
            node("ReduceSum", "product", "y", keepdims=0),
        ],
        {"x": X},
        ["places", "product", "y"],
        {"zero": np.array(0, np.int64), "w": numbers(4, 8)},
    )


def expected(x: Array) -> list[Array]:
    places = np.array(np.nonzero(x))
    product = x[places[0]] @ numbers(4, 8)
    return [places, product, product.sum()]


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("x", (X, NOTHING, X + 1), ids=("some", "none", "all"))
def test_what_follows_a_count_has_its_size(x: Array, threads: int) -> None:
    module = mc.compile(positions(), threads=threads)
    for got, want in zip(module(x), expected(x), strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_one_module_serves_all_counts_and_survives_saving(tmp_path: Path) -> None:
    mc.compile(positions(), threads=1).save(tmp_path / "m.mc")
    module = mc.load(tmp_path / "m.mc", threads=1)
    for x in (X, NOTHING, X + 1, X):
        for got, want in zip(module(x), expected(x), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_the_interpreted_graph_agrees() -> None:
    fn = load(positions())
    for got, want in zip(run_reference(fn, {"x": X}), expected(X), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_symbolic_input_may_be_counted() -> None:
    m = model([node("NonZero", "x", "y")], {"x": X}, ["y"])
    m.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"
    module = mc.compile(m, threads=1)
    for x in (X, X[:1], np.concatenate([X, X, X])):
        np.testing.assert_array_equal(module(x)[0], np.array(np.nonzero(x)))


def test_a_size_may_be_used_without_its_tensor() -> None:
    """The kernel that makes the range reads no tensor, but has to wait for the count."""
    nodes = [
        node("NonZero", "x", "places"),
        node("Shape", "places", "shape"),
        node("Gather", "shape one", "count", axis=0),
        node("Range", "zero count one", "y"),
    ]
    constants = {"zero": np.array(0, np.int64), "one": np.array(1, np.int64)}
    m = model(nodes, {"x": X}, ["y", "places"], constants)
    y, places = mc.compile(m, threads=1)(X)
    np.testing.assert_array_equal(y, np.arange(6))
    assert places.shape == (2, 6)


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_sizes_that_must_agree_are_compared_once_they_are_counted(
    threads: int, checked: bool
) -> None:
    nodes = [node("NonZero", "x", "a"), node("NonZero", "z", "b"), node("Add", "a b", "y")]
    m = mc.compile(model(nodes, {"x": X, "z": X}, ["y"]), threads=threads, checked=checked)
    for _ in range(2):  # a call that failed leaves nothing behind
        np.testing.assert_array_equal(m(X, X)[0], 2 * np.array(np.nonzero(X)))
        with pytest.raises(RunError, match=r"must hold, but they are 6 and 12 \(Add"):
            m(X, X + 1)


def test_a_size_that_is_counted_and_that_of_an_input(tmp_path: Path) -> None:
    """No kernel runs with sizes that do not fit: it would read behind the end of `u`."""
    nodes = [node("Compress", "x c", "a", axis=0), node("Mul", "a u", "p"),
             node("ReduceSum", "p", "y", keepdims=0)]  # fmt: skip
    x, c, u = numbers(40), np.arange(40) % 3 > 0, numbers(26)
    made = mc.compile(model(nodes, {"x": x, "c": c, "u": u}, ["y"], shapes={"u": ("n",)}))
    made.save(tmp_path / "m.mc")
    for m in (made, mc.load(tmp_path / "m.mc")):
        np.testing.assert_allclose(m(x, c, u)[0], x[c] @ u, rtol=1e-5)
        with pytest.raises(RunError, match="they are 26 and 3 "):
            m(x, c, u[:3])
        with pytest.raises(RunError, match="they are 0 and 26 "):
            m(x, c & False, u)


def test_sizes_that_a_branch_counts_cannot_be_compared() -> None:
    def branch(of: str) -> onnx.GraphProto:
        nodes = [node("NonZero", of, f"{of}_a"), node("NonZero", "z", f"{of}_b"),
                 node("Add", f"{of}_a {of}_b", f"{of}_y"),
                 node("ReduceSum", f"{of}_y", f"{of}_s", keepdims=0)]  # fmt: skip
        out = onnx.helper.make_tensor_value_info(f"{of}_s", onnx.TensorProto.INT64, [])
        return onnx.helper.make_graph(nodes, of, [], [out])

    chosen = node("If", "c", "y", then_branch=branch("x"), else_branch=branch("w"))
    m = model([chosen], {"c": np.array(True), "x": X, "w": X, "z": X}, ["y"])
    with pytest.raises(ShapeError, match="counted in a branch"):
        mc.compile(m)


@pytest.mark.parametrize("axis", [None, 0])
def test_a_condition_that_is_constant_picks_a_number_of_rows(axis: int | None) -> None:
    chosen = np.array([True, False, True, True])
    attributes = {} if axis is None else {"axis": axis}
    m = model([node("Compress", "x c", "a", **attributes), node("Add", "a b", "y")],
              {"x": X.T, "b": numbers(3, 1) if axis == 0 else numbers(3)}, ["y"],
              {"c": chosen})  # fmt: skip
    x, b = X.T.copy(), numbers(3, 1) if axis == 0 else numbers(3)
    (got,) = mc.compile(m)(x, b)
    np.testing.assert_allclose(got, np.compress(chosen, x, axis) + b, rtol=1e-6)


@pytest.mark.parametrize("constant", [False, True])
def test_a_condition_that_is_longer_than_the_axis(constant: bool) -> None:
    """What it says beyond the end picks nothing."""
    x, chosen = numbers(2, 2), np.array([True, False, True, True, False, True])
    given = {"x": x} if constant else {"x": x, "c": chosen}
    known = {"c": chosen} if constant else {}
    made = mc.compile(model([node("Compress", "x c", "y")], given, ["y"], known))
    np.testing.assert_array_equal(made(*given.values())[0], x.reshape(-1)[[0, 2, 3]])


@pytest.mark.parametrize("symbolic", [False, True])
def test_positions_along_an_axis_are_those_of_a_line_of_ones(symbolic: bool) -> None:
    """Two such lines of the same length go together, and what they pick has its size."""
    nodes = [
        node("Shape", "x", "sizes"),
        node("Gather", "sizes zero", "rows", axis=0),
        *(
            n
            for k in "ab"
            for n in (
                node(
                    "ConstantOfShape", "rows", f"ones_{k}", value=onnx.numpy_helper.from_array(ONE)
                ),
                node("NonZero", f"ones_{k}", f"places_{k}"),
            )
        ),
        node("Add", "places_a places_b", "sum"),
        node("Squeeze", "places_a first", "line"),
        node("Gather", "x line", "picked", axis=0),
    ]
    constants = {"zero": np.array([0]), "first": np.array([0])}
    m = model(nodes, {"x": X}, ["sum", "picked"], constants)
    if symbolic:
        m.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"
    module = mc.compile(m, threads=1)
    for x in (X, X[:2]) if symbolic else (X,):
        total, picked = module(x)
        np.testing.assert_array_equal(total, 2 * np.arange(len(x))[None])
        np.testing.assert_array_equal(picked, x)


def test_places_in_what_is_constant() -> None:
    nodes = [node("NonZero", "c", "places"), node("Add", "places x", "y")]
    x = np.array([[10, 20, 30], [40, 50, 60]])
    constant = np.array([[0, 3, 0], [1, 0, 2]], np.float32)
    y = mc.compile(model(nodes, {"x": x}, ["y"], {"c": constant}), threads=1)(x)[0]
    np.testing.assert_array_equal(y, np.array(np.nonzero(constant)) + x)


def test_an_output_array_cannot_be_given() -> None:
    module = mc.compile(model([node("NonZero", "x", "y")], {"x": X}, ["y"]), threads=1)
    with pytest.raises(RunError, match="known only afterwards"):
        module(X, out=[np.empty((2, 6), np.int64)])


def test_detections() -> None:
    """Boxes are suppressed, and the rest of the model works on those that stay."""
    boxes = np.array([[[0, 0, 2, 2], [0, 0, 2, 2.1], [4, 4, 5, 5], [9, 9, 10, 10]]], np.float32)
    scores = np.array([[[0.7, 0.9, 0.8, 0.1]]], np.float32)
    nodes = [
        node("NonMaxSuppression", "boxes scores most overlap least", "found"),
        node("Gather", "found two", "which", axis=1),
        node("Squeeze", "boxes first", "flat"),
        node("Gather", "flat which", "y", axis=0),
    ]
    constants = {
        "most": np.array([3], np.int64), "overlap": np.array([0.5], np.float32),
        "least": np.array([0.3], np.float32), "two": np.array(2, np.int64),
        "first": np.array([0], np.int64),
    }  # fmt: skip
    m = model(nodes, {"boxes": boxes, "scores": scores}, ["y"], constants)
    (y,) = mc.compile(m, threads=1)(boxes, scores)
    np.testing.assert_array_equal(y, boxes[0, [1, 2]])
