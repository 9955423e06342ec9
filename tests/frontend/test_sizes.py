"""Sizes and scales that exporters compute in floats, symbolic: compiled code = onnxruntime."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto
from onnx_models import Array, check, model, node, numbers, reference_of
from tolerance import assert_close

import minicompiler as mc
from minicompiler.errors import ImportModelError, RunError
from minicompiler.frontend.onnx import load

CONSTANTS = {
    "two": np.float32([2, 2]), "part": np.float32([0.5, 0.7]), "more": np.float32([1.7, 0.3]),
    "ones": np.float32([1, 1]), "goal": np.float32([13, 7]), "least": np.float32([4, 4]),
}  # fmt: skip
SHAPE = [
    node("Shape", "x", "outer", end=2), node("Shape", "x", "inner", start=2),
    node("Cast", "inner", "f", to=TensorProto.FLOAT),
]  # fmt: skip


def to_sizes(floats: str) -> list[NodeProto]:
    return [
        node("Cast", floats, "k", to=TensorProto.INT64), node("Concat", "outer k", "to", axis=0),
        node("Resize", "x - - to", "y", mode="linear"),
    ]  # fmt: skip


def to_scales(floats: str, mode: str = "linear", **attrs: str) -> list[NodeProto]:
    return [
        node("Div", f"{floats} f", "by"), node("Concat", "ones by", "scales", axis=0),
        node("Resize", "x - scales", "y", mode=mode, **attrs),
    ]  # fmt: skip


CASES: dict[str, list[NodeProto]] = {
    "truncated": [node("Mul", "f part", "a"), *to_sizes("a")],
    "floor": [node("Mul", "f more", "a"), node("Floor", "a", "b"), *to_sizes("b")],
    "ceil": [node("Div", "f two", "a"), node("Ceil", "a", "b"), *to_sizes("b")],
    "at least": [node("Mul", "f part", "a"), node("Max", "a least", "b"), *to_sizes("b")],
    "sums": [node("Sub", "f two", "a"), node("Add", "a ones", "b"), *to_sizes("b")],
    "to a size": to_scales("goal"),
    "to a part": [node("Mul", "f part", "a"), node("Floor", "a", "b"), *to_scales("b", "cubic")],
    "corners": to_scales("goal", coordinate_transformation_mode="align_corners"),
}


def resized(nodes: list[NodeProto], x: Array) -> ModelProto:
    shapes = {"x": (1, 2, "height", "width")}
    return model([*SHAPE, *nodes], {"x": x}, ["y"], CONSTANTS, shapes=shapes)


@pytest.mark.parametrize("nodes", CASES.values(), ids=CASES)
def test_one_model_serves_all_sizes(nodes: list[NodeProto]) -> None:
    compiled = None
    for extent in ((8, 10), (7, 30), (33, 21)):
        x = numbers(1, 2, *extent)
        m = resized(nodes, x)
        check(m, {"x": x})
        compiled = compiled or mc.compile(m)
        (got,), (want,) = compiled(x), reference_of(m, {"x": x})
        assert got.shape == want.shape
        assert_close(got, want, 64)


def test_the_sizes_are_expressions() -> None:
    (result,) = load(resized(CASES["ceil"], numbers(1, 2, 8, 8))).results
    assert str(result.type) == "float32[1, 2, (height + 1)//2, (width + 1)//2]"  # type: ignore[attr-defined]


REFUSED: dict[str, tuple[Callable[[], list[NodeProto]], str]] = {
    "no whole number": (
        lambda: [node("Mul", "f part", "a"), *to_scales("a")],
        r"which may be no whole number(?s:.)*sizes instead of scales",
    ),
    "from data": (
        lambda: [node("ReduceMax", "x", "m", keepdims=0), node("Mul", "f m", "a"),
                 *to_scales("a")],
        "the scales of Resize are computed from data",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_scales_that_say_no_size_are_refused(
    case: tuple[Callable[[], list[NodeProto]], str],
) -> None:
    nodes, message = case
    with pytest.raises(ImportModelError, match=message):
        load(resized(nodes(), numbers(1, 2, 8, 8)))


@pytest.mark.parametrize("how", ["sizes", "scales"])
def test_antialiasing_of_any_number_of_images(how: str) -> None:
    """Only the axes that change need sizes that are numbers."""
    nodes = [
        node("Shape", "x", "outer", end=2), node("Concat", "outer to", "sizes", axis=0),
        node("Resize", f"x - {'- sizes' if how == 'sizes' else 'scales'}", "y", mode="linear",
             antialias=1),
    ]  # fmt: skip
    constants = {"to": np.array([5, 13]), "scales": np.float32([1, 1, 0.5, 2])}
    compiled = None
    for batch in (1, 3):
        x = numbers(batch, 2, 8, 10)
        m = model(nodes, {"x": x}, ["y"], constants, shapes={"x": ("batch", 2, 8, 10)})
        compiled = compiled or mc.compile(m)
        assert_close(compiled(x)[0], reference_of(m, {"x": x})[0], 64)


def test_dimensions_have_room_for_windows() -> None:
    """Two convolutions without padding, then row norms: there is nothing below 60 samples."""
    nodes = [
        node("Conv", "x w", "a", strides=[20]), node("Conv", "a v", "b", strides=[2]),
        node("Transpose", "b", "c", perm=[0, 2, 1]), node("LayerNormalization", "c g h", "y"),
    ]  # fmt: skip
    constants = {"w": numbers(8, 1, 20), "v": numbers(32, 8, 3), "g": numbers(32), "h": numbers(32)}
    shapes = {"x": ("batch", 1, "samples")}
    compiled = None
    for extent in ((1, 60), (3, 133), (2, 400)):
        x = numbers(extent[0], 1, extent[1])
        m = model(nodes, {"x": x}, ["y"], constants, shapes=shapes)
        compiled = compiled or mc.compile(m)
        assert_close(compiled(x)[0], reference_of(m, {"x": x})[0], 256)
    assert compiled is not None
    with pytest.raises(RunError, match=r'"samples" is 59.* at least 60'):
        compiled(numbers(1, 1, 59))


@pytest.mark.parametrize("op", ["Range", "Slice"])
def test_divisions_of_what_may_be_negative(op: str) -> None:
    """(h - 3)/2 + 1 is rounded towards zero; a range that ends before it begins is empty."""
    nodes = [
        node("Shape", "x", "s", end=1), node("Sub", "s three", "a"), node("Div", "a two", "b"),
        node("Add", "b one", "c"),
    ]  # fmt: skip
    if op == "Range":
        nodes += [node("Squeeze", "c", "d"), node("Range", "zero d by", "y")]
    else:
        nodes += [node("Slice", "x start c", "y")]
    constants = {"three": np.array([3]), "two": np.array([2]), "one": np.array([1]),
                 "zero": np.array(0), "by": np.array(1), "start": np.array([0])}  # fmt: skip
    compiled = None
    for rows in range(1, 10):
        x = numbers(rows)
        m = model(nodes, {"x": x}, ["y"], constants, shapes={"x": ("h",)})
        compiled = compiled or mc.compile(m)
        np.testing.assert_array_equal(compiled(x)[0], reference_of(m, {"x": x})[0])


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 0, 2)])
def test_rows_whose_number_cannot_be_simplified(axes: tuple[int, ...]) -> None:
    """Neither that all rows lie inside, nor that their number divides, can be shown."""
    nodes = [
        node("Shape", "x", "s", start=1, end=2), node("Sub", "s three", "a"),
        node("Div", "a two", "b"), node("Add", "b one", "k"),
        node("Concat", "rest k width", "to", axis=0), node("Reshape", "x to", "r"),
        node("Transpose", "r", "t", perm=axes), node("LayerNormalization", "t gain", "y"),
    ]  # fmt: skip
    constants = {"three": np.array([3]), "two": np.array([2]), "one": np.array([1]),
                 "rest": np.array([-1]), "width": np.array([32]), "gain": numbers(32)}  # fmt: skip
    compiled = None
    for extent in ((2, 4), (1, 3), (4, 6)):
        x = numbers(*extent, 64)
        m = model(nodes, {"x": x}, ["y"], constants, shapes={"x": ("b", "n", 64)})
        compiled = compiled or mc.compile(m)
        assert_close(compiled(x)[0], reference_of(m, {"x": x})[0], 64)


def test_a_slice_that_begins_at_either_end() -> None:
    """Positions relative to n tokens are cut out of a table; where it begins depends on n."""
    nodes = [node("Shape", "x", "s"), node("Sub", "five s", "a"), node("Slice", "table a end", "y")]
    constants = {"five": np.array([5]), "end": np.array([8]), "table": numbers(9)}
    m = model(nodes, {"x": numbers(1)}, ["y"], constants, shapes={"x": ("n",)})
    compiled = mc.compile(m)
    for n in (1, 4, 5, 6, 7, 13, 14, 15, 40):
        (y,) = compiled(numbers(n))
        np.testing.assert_array_equal(y, reference_of(m, {"x": numbers(n)})[0])
