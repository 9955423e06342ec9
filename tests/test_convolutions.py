"""Convolutions of many sizes followed by what networks have after them, against onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto
from onnx_models import Array, model, node, numbers, reference_of

import minicompiler as mc

# What follows a convolution `c` and makes `y`, with a second input `z` of its result's type.
AFTER: dict[str, list[NodeProto]] = {
    "nothing": [node("Identity", "c", "y")],
    "relu": [node("Relu", "c", "y")],
    "silu": [node("Sigmoid", "c", "s"), node("Mul", "c s", "y")],
    "gelu": [
        node("Mul", "c root", "d"), node("Erf", "d", "e"), node("Add", "e one", "a"),
        node("Mul", "c a", "y"),
    ],
    "residual": [node("Add", "c z", "a"), node("Relu", "a", "y")],
    "two readers": [
        node("Relu", "c", "r"), node("Tanh", "c", "t"), node("Concat", "r t", "y", axis=1),
    ],
    "joined": [node("Concat", "c z", "k", axis=1), node("Relu", "k", "y")],
    "pooled": [
        node("Relu", "c", "r"),
        node("MaxPool", "r", "y", kernel_shape=[2, 2], strides=[2, 2]),
    ],
    "gated": [
        node("Relu", "c", "r"), node("GlobalAveragePool", "r", "p"), node("Mul", "r p", "y"),
    ],
}  # fmt: skip


def network(batch: int, channels: int, outputs: int, size: tuple[int, int], border: int,
            after: str) -> tuple[ModelProto, dict[str, Array]]:  # fmt: skip
    weight = numbers(outputs, channels, 3, 3, seed=1) / np.float32(3 * channels**0.5)
    shape = (batch, outputs, *(n + 2 * border - 2 for n in size))
    feeds = {"x": numbers(batch, channels, *size), "z": numbers(*shape, seed=2)}
    made = model(
        [node("Conv", "x w b", "c", pads=[border] * 4), *AFTER[after]],
        feeds,
        ["y"],
        {"w": weight, "b": numbers(outputs, seed=3), "one": np.array(1, np.float32),
         "root": np.array(2**-0.5, np.float32)},
    )  # fmt: skip
    return made, feeds


COUNTS = st.sampled_from([8, 16, 20, 24, 32, 48, 64, 96, 100, 128])
SIZES = st.sampled_from([7, 8, 12, 13, 14, 16, 20, 28, 30, 32, 40, 56, 64])


def agree(batch: int, channels: int, outputs: int, size: tuple[int, int], border: int,
          after: str) -> None:  # fmt: skip
    made, feeds = network(batch, channels, outputs, size, border, after)
    (want,) = reference_of(made, feeds)
    got = mc.compile(made, threads=2, record=False).run(feeds)["y"]
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


# Tiles that cross the lines of an image and leave a rest, in the last block and in others.
@pytest.mark.parametrize(
    ("channels", "outputs", "size", "border", "after"),
    [
        (32, 128, (64, 64), 1, "relu"),
        (48, 16, (80, 80), 2, "nothing"),
        (96, 64, (30, 64), 2, "gated"),
        (96, 96, (32, 32), 1, "silu"),
        (24, 24, (8, 8), 1, "gelu"),
    ],
)
def test_tiles_with_a_rest(
    channels: int, outputs: int, size: tuple[int, int], border: int, after: str
) -> None:
    agree(1, channels, outputs, size, border, after)


@pytest.mark.parametrize(("stride", "size"), [(1, 3), (2, 3), (2, 7), (3, 3)])
def test_images_of_any_size(stride: int, size: int) -> None:
    """One image of symbolic height and width: tiles wrap around lines of (w + 1)//2 pixels."""
    pads = [size // 2] * 4
    nodes = [
        node("Conv", "x w b", "c", strides=[stride] * 2, pads=pads), node("Relu", "c", "r"),
        node("Conv", "r v", "d", strides=[2, 2], pads=[1] * 4), node("Relu", "d", "y"),
    ]  # fmt: skip
    constants = {
        "w": numbers(16, 3, size, size, seed=1) / np.float32(size), "b": numbers(16, seed=2),
        "v": numbers(24, 16, 3, 3, seed=3) / np.float32(12),
    }  # fmt: skip
    shapes = {"x": (1, 3, "height", "width")}
    compiled = None
    for extent in ((31, 18), (8, 9), (64, 100)):
        feeds = {"x": numbers(1, 3, *extent)}
        made = model(nodes, feeds, ["y"], constants, shapes=shapes)
        compiled = compiled or mc.compile(made, threads=2, record=False)
        (want,) = reference_of(made, feeds)
        assert np.abs(compiled.run(feeds)["y"] - want).max() <= 1e-4 * np.abs(want).max()


@given(st.integers(1, 3), COUNTS, COUNTS, st.tuples(SIZES, SIZES), st.sampled_from([0, 1, 1, 1, 2]),
       st.sampled_from(sorted(AFTER)))  # fmt: skip
@example(3, 100, 32, (7, 7), 1, "gated")
@settings(max_examples=12, deadline=None)
def test_convolutions(
    batch: int, channels: int, outputs: int, size: tuple[int, int], border: int, after: str
) -> None:
    agree(batch, channels, outputs, size, border, after)


@pytest.mark.nightly
@given(st.integers(1, 3), COUNTS, COUNTS, st.tuples(SIZES, SIZES), st.sampled_from([0, 1, 1, 1, 2]),
       st.sampled_from(sorted(AFTER)))  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_many_convolutions(
    batch: int, channels: int, outputs: int, size: tuple[int, int], border: int, after: str
) -> None:
    agree(batch, channels, outputs, size, border, after)
