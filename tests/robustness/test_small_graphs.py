"""Small random graphs that were not compiled, or wrongly: the smallest case of each."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto
from onnx_models import model, node, numbers
from tolerance import assert_close

import minicompiler as mc
from minicompiler.frontend.onnx import load
from minicompiler.ops.evaluate import run_reference


def check(m: ModelProto, *inputs: np.ndarray, length: int = 64) -> None:
    """Compiled for one and for two threads as the reference has it, with equal bits."""
    want = run_reference(load(m), list(inputs))
    one, two = [mc.compile(m, threads=n, checked=n == 1)(*inputs) for n in (1, 2)]
    for a, b, w in zip(one, two, want, strict=True):
        assert_close(a, w, length)
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("sizes", "axis"), [((16, 16), 1), ((4, 33, 20), 1), ((40, 100), 0)])
def test_logarithms_of_softmax_of_rows_that_are_computed_once(
    sizes: tuple[int, ...], axis: int
) -> None:
    """The sum needs the maximum besides the row: it is not added up while the row is made."""
    nodes = [node("Tanh", "x", "t"), node("Mul", "t x", "z"),
             node("LogSoftmax", "z", "y", axis=axis)]  # fmt: skip
    x = numbers(*sizes)
    check(model(nodes, {"x": x}, ["y"]), x)


@pytest.mark.parametrize("pool", ["MaxPool", "AveragePool"])
def test_windows_over_what_a_softmax_gives(pool: str) -> None:
    """Lines and pixels are one axis to the softmax, but not to the windows."""
    nodes = [node("Softmax", "x", "s", axis=0), node("Mul", "s x", "z"),
             node(pool, "z", "y", kernel_shape=[2], strides=[3])]  # fmt: skip
    x = numbers(9, 7, 17)
    check(model(nodes, {"x": x}, ["y"]), x)


def test_a_size_that_constants_count() -> None:
    """No kernel reads the count."""
    x, chosen = numbers(2, 5, 3), np.array([1, 0, 0, 1, 1], bool)
    m = mc.compile(model([node("Compress", "x c", "y", axis=1)], {"x": x}, ["y"], {"c": chosen}))
    np.testing.assert_array_equal(m(x)[0], x[:, chosen])


@pytest.mark.parametrize("dilation", [2, 3])
def test_taps_between_which_the_border_ends(dilation: int) -> None:
    """The first tap is always outside, but without it the border would be of negative size."""
    nodes = [node("Conv", "x w", "y", dilations=[dilation], pads=[1, 1], strides=[3])]
    x, w = numbers(2, 1, 3), numbers(4, 1, 2)
    check(model(nodes, {"x": x}, ["y"], {"w": w}), x)


def test_a_choice_by_data_that_is_compared() -> None:
    """What a condition compares need not be an index."""
    nodes = [node("LogSoftmax", "x", "s"), node("LessOrEqual", "x z", "c"),
             node("Where", "c s low", "y")]  # fmt: skip
    x, z = numbers(17, 7, 16), numbers(17, 1, 16)
    check(model(nodes, {"x": x, "z": z}, ["y"], {"low": np.float32(-1e3)}), x, z)


def test_squares_of_rows_that_become_two_axes() -> None:
    """Row i // 16 and column i % 16 of what is divided by them are no tiles of a convolution."""
    nodes = [
        node("Mul", "x x", "q"), node("ReduceMean", "q axes", "m"), node("Sqrt", "m", "d"),
        node("Div", "x d", "n"), node("LogSoftmax", "n", "s"), node("Flatten", "s", "y"),
    ]  # fmt: skip
    x = numbers(17, 100, 16)
    check(model(nodes, {"x": x}, ["y"], {"axes": np.array([1])}), x, length=500)


def test_groups_behind_a_norm_whose_channels_lie_in_blocks() -> None:
    """Six results for each channel: the loop over them stays whole where vectors lie along it."""
    nodes = [
        node("ConvTranspose", "x w", "c", strides=[3], group=3),
        node("InstanceNormalization", "c s s", "n"), node("Conv", "n v", "y", group=21),
    ]  # fmt: skip
    x = numbers(2, 24, 16)
    known = {"w": numbers(24, 7, 1), "s": numbers(21), "v": numbers(126, 1, 1)}
    check(model(nodes, {"x": x}, ["y"], known), x, length=500)


def test_narrow_rows_that_passes_read_at_two_places() -> None:
    """Nothing is asked for before it is needed where the loop does not read one place."""
    nodes = [
        node("Split", "x", "a b", axis=1, num_outputs=2), node("ReduceMax", "a axes", "m"),
        node("Sub", "b m", "d"), node("Tanh", "d", "e"), node("Mul", "e m", "y"),
    ]  # fmt: skip
    x = numbers(60000, 6)
    check(model(nodes, {"x": x}, ["y"], {"axes": np.array([1])}), x)


def test_narrow_rows_whose_place_data_decide() -> None:
    """The place is not known early enough to ask for it before it is needed."""
    nodes = [node("Gather", "x i", "g"), node("Softmax", "g", "s"), node("Add", "s g", "y")]
    x, i = numbers(30000, 17, 3), np.array(2)
    check(model(nodes, {"x": x, "i": i}, ["y"]), x, i)


@pytest.mark.parametrize("upper", [0, 1])
def test_a_triangle_whose_diagonal_data_decide(upper: int) -> None:
    x, k = numbers(2, 5, 7), np.array(0)
    m = mc.compile(model([node("Trilu", "x k", "y", upper=upper)], {"x": x, "k": k}, ["y"],
                         shapes={"x": (2, "h", "w")}))  # fmt: skip
    for k in map(np.array, (-9, -2, 0, 1, 3, 20)):
        np.testing.assert_array_equal(m(x, k)[0], (np.triu if upper else np.tril)(x, k))


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize(
    ("start", "end", "count"), [(-22, -18, 1), (-(1 << 62), -9, 1), (3, -9, 4)]
)
def test_backwards_from_before_the_first_element(
    start: int, end: int, count: int, symbolic: bool
) -> None:
    """ONNX moves a start that lies before the axis to its first element; numpy takes nothing."""
    known = {"s": np.array([start]), "e": np.array([end]), "a": np.array([0]), "d": np.array([-1])}
    shapes = {"x": ("n",)} if symbolic else None
    m = mc.compile(model([node("Slice", "x s e a d", "y")], {"x": numbers(8)}, ["y"], known,
                         shapes=shapes))  # fmt: skip
    np.testing.assert_array_equal(m(numbers(8))[0], numbers(8)[:count][::-1])


@pytest.mark.parametrize("sizes", [(2, 5, 31, 16), (3, 7, 9, 17)])
def test_the_largest_of_what_a_sum_of_products_is_subtracted_from(sizes: tuple[int, ...]) -> None:
    """It reads the sum at its own points, but goes along an axis that the sum lacks."""
    nodes = [
        node("Mul", "w x", "p"), node("ReduceSum", "p a", "s"), node("Sub", "x s", "d"),
        node("Clip", "d low high", "c"), node("ReduceMax", "c a", "y"),
    ]  # fmt: skip
    x, w = numbers(*sizes), numbers(*sizes, seed=1)
    known = {"a": np.array([1]), "low": np.float32(-0.7), "high": np.float32(0.9)}
    check(model(nodes, {"w": w, "x": x}, ["y"], known), w, x)
