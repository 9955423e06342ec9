"""Symbolic sizes: those that a call refuses, that a model decides, that nothing in a kernel has.
The smallest cases of what once failed."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_models import model, node, numbers

import minicompiler as mc
from minicompiler.errors import RunError, ShapeError

LONG = np.int64


def symbolic(nodes: list, inputs: dict[str, np.ndarray], shapes: dict, constants=None):  # type: ignore[no-untyped-def, type-arg]
    made = model(nodes, inputs, ["y"], constants, opset=24, shapes=shapes)
    return mc.compile(made, threads=1)


def test_sizes_that_become_negative_are_refused_at_the_call() -> None:
    m = symbolic(
        [node("MaxPool", "x", "a", kernel_shape=[3]), node("MaxPool", "a", "b", kernel_shape=[3]),
         node("GlobalMaxPool", "b", "y")],
        {"x": numbers(1, 1, 9)}, {"x": (1, 1, "m")},
    )  # fmt: skip
    assert m(numbers(1, 1, 5))[0].shape == (1, 1, 1)
    with pytest.raises(RunError, match=r"at least 5\n.*windows of the model may need that much"):
        m(numbers(1, 1, 1))


def test_a_product_of_the_rows_behind_a_cut() -> None:
    """A decoder's new positions: from as many as were before to the end."""
    nodes = [
        node("Shape", "old", "past", start=1, end=2),
        node("Shape", "x", "total", start=1, end=2),
        node("Slice", "x past total one", "rest"),
        node("MatMul", "rest w", "y"),
    ]
    x, old, w = numbers(2, 9, 64), numbers(2, 4, 1), numbers(64, 64)
    shapes = {"x": ("b", "total", 64), "old": ("b", "past", 1)}
    m = symbolic(nodes, {"x": x, "old": old}, shapes, {"one": np.array([1]), "w": w})
    np.testing.assert_allclose(m(x, old)[0], x[:, 4:] @ w, rtol=1e-4, atol=1e-4)
    assert m(x[:, :3], old)[0].shape == (2, 0, 64)


def test_a_size_that_can_only_be_one_is_one() -> None:
    """A decoder traced with one token: its reshape leaves no other number of tokens, and one is
    broadcast where the compiler would have taken t to be 3."""
    nodes = [
        node("Shape", "x", "batch", end=1),
        node("Concat", "batch heads", "s", axis=0),
        node("Reshape", "x s", "r"),
        node("Add", "r z", "y"),
    ]
    x, z = numbers(2, 1, 12), numbers(2, 1, 4)
    shapes = {"x": ("b", "t", 12), "z": ("b", "t", 4)}
    constants = {"heads": np.array([3, 4])}
    made = model(nodes, {"x": x, "z": z}, ["y"], constants, opset=24, shapes=shapes)
    for bounds in ({}, {"t": (1, 2)}):  # of which 2 is not broadcast either
        m = mc.compile(made, dims=bounds)
        np.testing.assert_array_equal(m(x, z)[0], x.reshape(2, 3, 4) + z)
        with pytest.raises(RunError, match="axis 1 has size 3, expected 1"):
            m(numbers(2, 3, 12), numbers(2, 3, 4))
    with pytest.raises(ShapeError, match=r"has b\*t\*12 elements"):
        mc.compile(made, dims={"t": (4, 8)})


@pytest.mark.parametrize("bounds", [None, (1, 100), (2, 100, 2), (5, 100)])
def test_a_size_that_the_model_decides(bounds: tuple[int, ...] | None) -> None:
    """A model traced with 4 tokens, whose reshape holds for no other number."""
    nodes = [
        node("Shape", "x", "batch", end=1),
        node("Concat", "batch rest", "s", axis=0),
        node("Reshape", "x s", "y"),
    ]
    x = numbers(2, 4, 12)
    m = model(
        nodes, {"x": x}, ["y"], constants={"rest": np.array([3, 16])}, shapes={"x": ("b", "t", 12)}
    )
    if bounds == (5, 100):  # no call can be right
        with pytest.raises(ShapeError, match=r"has b\*t\*12 elements, .* holds b\*48"):
            mc.compile(m, dims={"t": bounds})
        return
    c = mc.compile(m, dims=None if bounds is None else {"t": bounds})
    assert str(c.inputs[0].shape[1]) == "4"
    np.testing.assert_array_equal(c(x)[0], x.reshape(2, 3, 16))
    with pytest.raises(RunError, match="axis 1 has size 3, expected 4"):
        c(numbers(2, 3, 12))


@pytest.mark.parametrize(
    ("nodes", "sizes", "good", "bad"),
    [
        ([node("DepthToSpace", "x", "y", blocksize=2)], (1, "c", 1, 1), (1, 8, 1, 1), (1, 6, 1, 1)),
        ([node("SpaceToDepth", "x", "y", blocksize=2)], (1, 1, "c", 2), (1, 1, 4, 2), (1, 1, 5, 2)),
        ([node("Reshape", "x to", "y")], ("c",), (8,), (6,)),
    ],
    ids=lambda v: v[0].op_type if isinstance(v, list) else None,
)
def test_sizes_that_do_not_divide_are_refused_at_the_call(
    nodes: list,
    sizes: tuple,
    good: tuple,
    bad: tuple,  # type: ignore[type-arg]
) -> None:
    constants = {"to": np.array([4, -1])} if nodes[0].op_type == "Reshape" else None
    m = symbolic(nodes, {"x": numbers(*good)}, {"x": sizes}, constants)
    assert m(numbers(*good))[0].size == np.prod(good)
    with pytest.raises(RunError, match=nodes[0].op_type):
        m(numbers(*bad))


@pytest.mark.parametrize(
    "name", ["a b", "i0", "p0", "tid", "entry", "past + 1", 'quo"te', "ü", "1"]
)
def test_dimensions_may_have_any_name(name: str) -> None:
    m = symbolic([node("Relu", "x", "y")], {"x": numbers(3)}, {"x": (name,)})
    x = numbers(19)
    assert np.array_equal(m(x)[0], np.maximum(x, 0))


def test_a_scale_may_depend_on_a_size_that_no_tensor_of_the_kernel_has() -> None:
    nodes = [
        node("Shape", "q", "s"), node("Gather", "s k", "d"), node("Cast", "d", "e", to=1),
        node("Sqrt", "e", "f"), node("Div", "x f", "y"),
    ]  # fmt: skip
    m = symbolic(nodes, {"x": numbers(3), "q": numbers(4, 9)}, {"q": (4, "n")}, {"k": np.array(1)})
    assert np.allclose(m(numbers(3), numbers(4, 9))[0], numbers(3) / 3)


@pytest.mark.parametrize("op", ["Div", "Mod"])
def test_sizes_that_are_divided_by_are_looked_at_in_each_call(op: str) -> None:
    """In a kernel such a division would end the process."""
    nodes = [node("Shape", "x", "s"), node("Sub", "s k", "d"), node("Max", "d z", "m"),
             node(op, "c m", "q"), node("Expand", "o q", "e"),
             node("ReduceMax", "e", "y", keepdims=0)]  # fmt: skip
    known = {"k": np.array([2]), "z": np.array([0]), "c": np.array([60]), "o": numbers(1)}
    m = symbolic(nodes, {"x": numbers(7)}, {"x": ("n",)}, known)
    assert m(numbers(9))[0].shape == ()
    with pytest.raises(RunError, match=r"divided by 0|divides by"):
        m(numbers(2))


def test_parts_of_a_symbolic_axis() -> None:
    """The parts before the last one lie inside of the axis because the last one has a size."""
    split = node("Split", "x", "p q r", num_outputs=3, axis=1)
    m = model([split], {"x": numbers(2, 7)}, ["p", "q", "r"], shapes={"x": (2, "n")}, opset=18)
    made = mc.compile(m, checked=True)(numbers(2, 7))
    assert [p.shape for p in made] == [(2, 3), (2, 3), (2, 1)]
    with pytest.raises(RunError, match="make"):
        mc.compile(m)(numbers(2, 1))


def test_a_cache_of_run_time_size_holds_what_is_written() -> None:
    x, u, i = numbers(2, 1, 4, 5), numbers(2, 1, 3, 5), np.zeros(2, LONG)
    m = symbolic([node("TensorScatter", "x u i", "y")], {"x": x, "u": u, "i": i},
                 {"x": (2, 1, "room", 5), "u": (2, 1, "count", 5)})  # fmt: skip
    assert np.array_equal(m(x, u, i)[0][:, :, :3], u)
    with pytest.raises(RunError, match="do not fit together"):
        m(x, numbers(2, 1, 5, 5), i)
