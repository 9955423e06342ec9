"""Small networks of the kinds that exporters write: compiled code, the graph's numpy meaning and
onnxruntime agree, at several values of the symbolic sizes where a network has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto
from onnx_models import Array, model, node, numbers, reference_of
from tolerance import assert_close

import minicompiler as mc
from minicompiler.frontend.onnx import load
from minicompiler.ops.evaluate import run_reference

# A model, and the inputs of some calls.
Network = tuple[ModelProto, list[Mapping[str, Array]]]


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def weights(*shape: int, seed: int) -> Array:
    """Values that keep the size of what they are multiplied with."""
    inputs = int(np.prod(shape[1:] if len(shape) == 4 else shape[-2:-1]))
    return numbers(*shape, seed=seed) * np.float32(inputs**-0.5)


def detector() -> Network:
    """Boxes and class scores from a convolution's features, then non-maximum suppression: as many
    rows as boxes are left."""
    nodes = [
        node("Conv", "image stem", "a", strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Relu", "a", "features"),
        node("Conv", "features head bias", "raw"),  # 2 anchors of 4 numbers and 3 classes
        node("Reshape", "raw anchors", "b"),
        node("Transpose", "b", "c", perm=[0, 1, 3, 4, 2]),
        node("Reshape", "c rows", "d"),
        node("Split", "d parts", "corner size classes", axis=2),
        node("Sigmoid", "size", "size01"),
        node("Add", "corner size01", "far"),
        node("Concat", "corner far", "boxes", axis=2),
        node("Sigmoid", "classes", "e"),
        node("Transpose", "e", "scores", perm=[0, 2, 1]),
        node("NonMaxSuppression", "boxes scores most iou least", "chosen"),
        node("Slice", "chosen two three axis", "position"),
        node("Squeeze", "position axis", "f"),
        node("Gather", "boxes f", "g", axis=1),
        node("Squeeze", "g zero", "found"),
    ]
    constants = {
        "stem": weights(8, 3, 3, 3, seed=1), "head": weights(14, 8, 1, 1, seed=2),
        "bias": numbers(14, seed=3), "anchors": ints(1, 2, 7, 6, 6), "rows": ints(1, 72, 7),
        "parts": ints(2, 2, 3), "most": ints(5), "iou": np.array([0.4], np.float32),
        "least": np.array([0.6], np.float32), "two": ints(2), "three": ints(3), "axis": ints(1),
        "zero": ints(0),
    }  # fmt: skip
    calls = [{"image": numbers(1, 3, 12, 12, seed=s)} for s in (4, 5)]
    return model(nodes, calls[0], ["chosen", "found"], constants), calls


def u_shape() -> Network:
    """Two levels down and up again, by a transposed convolution and by interpolation to the size
    of the way around; any batch, height and width that are multiples of 4."""

    def block(x: str, y: str, *w: str) -> list[NodeProto]:
        return [
            node("Conv", f"{x} {w[0]}", f"{y}_c", pads=[1, 1, 1, 1]),
            node("InstanceNormalization", f"{y}_c gain{w[1]} shift{w[1]}", f"{y}_n"),
            node("LeakyRelu", f"{y}_n", y, alpha=0.1),
        ]

    nodes = [
        *block("x", "a", "w1", "8"),
        node("MaxPool", "a", "a2", kernel_shape=[2, 2], strides=[2, 2]),
        *block("a2", "b", "w2", "12"),
        node("AveragePool", "b", "b2", kernel_shape=[2, 2], strides=[2, 2]),
        *block("b2", "c", "w3", "12"),
        node("ConvTranspose", "c up", "d", strides=[2, 2]),
        node("Concat", "d b", "e", axis=1),
        *block("e", "f", "w4", "8"),
        node("Shape", "f", "f_shape", end=2),
        node("Shape", "a", "a_shape", start=2),
        node("Concat", "f_shape a_shape", "size", axis=0),
        node("Resize", "f - - size", "g", mode="linear"),
        node("Add", "g a", "h"),
        node("Conv", "h w5", "y"),
    ]
    constants = {
        "w1": weights(8, 3, 3, 3, seed=1), "w2": weights(12, 8, 3, 3, seed=2),
        "w3": weights(12, 12, 3, 3, seed=3), "w4": weights(8, 24, 3, 3, seed=4),
        "w5": weights(2, 8, 1, 1, seed=5), "up": weights(12, 12, 2, 2, seed=6),
    }  # fmt: skip
    for n in (8, 12):
        constants |= {f"gain{n}": numbers(n, seed=7, low=0.5), f"shift{n}": numbers(n, seed=8)}
    sizes = ((1, 8, 12), (2, 16, 8), (1, 20, 24))
    calls = [{"x": numbers(n, 3, h, w, seed=9)} for n, h, w in sizes]
    shape = ("batch", 3, "height", "width")
    return model(nodes, calls[0], ["y"], constants, shapes={"x": shape}), calls


def shifted_windows() -> Network:
    """Attention inside 4 x 4 windows of an 8 x 8 image that is rolled by two rows and columns and
    rolled back; a bias per pair of places and a mask per window. Any batch."""

    def roll(x: str, y: str, first: str, rest: str) -> list[NodeProto]:
        made, at = [], x
        for k, axis in enumerate(("rows", "columns")):
            made += [
                node("Slice", f"{at} {first} end {axis}", f"{y}{k}_a"),
                node("Slice", f"{at} zero {rest} {axis}", f"{y}{k}_b"),
                node("Concat", f"{y}{k}_a {y}{k}_b", f"{y}{k}", axis=k + 1),
            ]
            at = f"{y}{k}"
        return made

    nodes = [
        node("LayerNormalization", "x gain bias", "n"),
        *roll("n", "r", "shift", "shift"),
        node("Reshape", "r1 cut", "a"),
        node("Transpose", "a", "b", perm=[0, 1, 3, 2, 4, 5]),
        node("Reshape", "b windows", "c"),
        node("MatMul", "c wqkv", "d"),
        node("Reshape", "d heads", "e"),
        node("Transpose", "e", "f", perm=[2, 0, 3, 1, 4]),
        node("Split", "f ones", "q1 k1 v1", axis=0),
        *[node("Squeeze", f"{k}1 zero", k) for k in "qkv"],
        node("Transpose", "k", "kt", perm=[0, 1, 3, 2]),
        node("MatMul", "q kt", "s1"),
        node("Mul", "s1 scale", "s2"),
        node("Add", "s2 places", "s3"),
        node("Reshape", "s3 by_image", "s4"),
        node("Add", "s4 mask", "s5"),
        node("Reshape", "s5 by_window", "s6"),
        node("Softmax", "s6", "p"),
        node("MatMul", "p v", "o1"),
        node("Transpose", "o1", "o2", perm=[0, 2, 1, 3]),
        node("Reshape", "o2 uncut", "o3"),
        node("Transpose", "o3", "o4", perm=[0, 1, 3, 2, 4, 5]),
        node("Reshape", "o4 image", "o5"),
        *roll("o5", "u", "back", "back"),
        node("Add", "u1 x", "y"),
    ]
    part = np.repeat([0, 1, 2], (4, 2, 2))  # what was not next to each other before the roll
    region = (part[:, None] * 3 + part).reshape(2, 4, 2, 4).transpose(0, 2, 1, 3).reshape(4, 16)
    apart = region[:, :, None] != region[:, None]
    constants = {
        "gain": numbers(16, seed=1), "bias": numbers(16, seed=2), "rows": ints(1),
        "columns": ints(2), "zero": ints(0), "end": ints(2**31 - 1), "shift": ints(2),
        "back": ints(-2), "cut": ints(-1, 2, 4, 2, 4, 16), "windows": ints(-1, 16, 16),
        "wqkv": weights(16, 48, seed=3), "heads": ints(-1, 16, 3, 2, 8), "ones": ints(1, 1, 1),
        "scale": np.array(8**-0.5, np.float32), "places": numbers(1, 2, 16, 16, seed=4),
        "by_image": ints(-1, 4, 2, 16, 16), "by_window": ints(-1, 2, 16, 16),
        "mask": np.where(apart, -100, 0).astype(np.float32)[None, :, None],
        "uncut": ints(-1, 2, 2, 4, 4, 16), "image": ints(-1, 8, 8, 16),
    }  # fmt: skip
    calls = [{"x": numbers(n, 8, 8, 16, seed=5)} for n in (1, 3)]
    shape = ("batch", 8, 8, 16)
    return model(nodes, calls[0], ["y"], constants, shapes={"x": shape}), calls


def grouped_queries() -> Network:
    """4 query heads share 2 of keys and values, which are turned by their position; causal, and
    with a mask of padding. Any batch and sequence length."""

    def heads(x: str, y: str, count: str) -> list[NodeProto]:
        return [
            node("MatMul", f"x w{x}", f"{y}_p"),
            node("Reshape", f"{y}_p {count}", f"{y}_r"),
            node("Transpose", f"{y}_r", y, perm=[0, 2, 1, 3]),
        ]

    def turned(x: str, y: str) -> list[NodeProto]:
        return [
            node("Split", f"{x} halves", f"{y}_a {y}_b", axis=3),
            node("Neg", f"{y}_b", f"{y}_n"),
            node("Concat", f"{y}_n {y}_a", f"{y}_h", axis=3),
            node("Mul", f"{x} cos", f"{y}_c"),
            node("Mul", f"{y}_h sin", f"{y}_s"),
            node("Add", f"{y}_c {y}_s", y),
        ]

    def repeated(x: str, y: str) -> list[NodeProto]:
        return [
            node("Unsqueeze", f"{x} two", f"{y}_u"),
            node("Expand", f"{y}_u twice", f"{y}_e"),
            node("Reshape", f"{y}_e joined", y),
        ]

    nodes = [
        node("Gather", "table ids", "x"),
        node("CumSum", "mask one", "position"),
        node("Unsqueeze", "position one_three", "position4"),
        node("Cast", "position4", "position_f", to=TensorProto.FLOAT),
        node("Mul", "position_f rates", "angle"),
        node("Concat", "angle angle", "angles", axis=3),
        node("Cos", "angles", "cos"),
        node("Sin", "angles", "sin"),
        *heads("q", "q", "four"), *heads("k", "k", "pair"), *heads("v", "v", "pair"),
        *turned("q", "q_t"), *turned("k", "k_t"),
        *repeated("k_t", "k_all"), *repeated("v", "v_all"),
        node("Transpose", "k_all", "k_last", perm=[0, 1, 3, 2]),
        node("MatMul", "q_t k_last", "s1"),
        node("Mul", "s1 scale", "s2"),
        node("Shape", "ids", "length", start=1),
        node("Concat", "length length", "square", axis=0),
        node("ConstantOfShape", "square", "zeros"),
        node("Add", "zeros least", "negative"),
        node("Trilu", "negative one0", "causal", upper=1),
        node("Add", "s2 causal", "s3"),
        node("Unsqueeze", "mask one_two", "mask4"),
        node("Equal", "mask4 nothing", "padding"),
        node("Where", "padding least s3", "s4"),
        node("Softmax", "s4", "p"),
        node("MatMul", "p v_all", "o1"),
        node("Transpose", "o1", "o2", perm=[0, 2, 1, 3]),
        node("Reshape", "o2 flat", "o3"),
        node("MatMul", "o3 wo", "o4"),
        node("Add", "o4 x", "y"),
    ]  # fmt: skip
    constants = {
        "table": numbers(20, 32, seed=1), "wq": weights(32, 32, seed=2),
        "wk": weights(32, 16, seed=3), "wv": weights(32, 16, seed=4), "wo": weights(32, 32, seed=5),
        "one": ints(1)[0], "one0": ints(1)[0], "two": ints(2), "one_two": ints(1, 2),
        "one_three": ints(1, 3),
        "rates": np.array([1, 0.1, 0.01, 0.001], np.float32), "halves": ints(4, 4),
        "four": ints(0, 0, 4, 8), "pair": ints(0, 0, 2, 8), "twice": ints(1, 1, 2, 1, 1),
        "joined": ints(0, 4, -1, 8), "scale": np.array(8**-0.5, np.float32), "nothing": ints(0),
        "least": np.array(-1e9, np.float32), "flat": ints(0, 0, 32),
    }  # fmt: skip
    rng = np.random.default_rng(6)
    calls = []
    for n, t in ((1, 5), (2, 9)):
        ids, mask = rng.integers(0, 20, (n, t)), np.ones((n, t), np.int64)
        mask[1:, 0] = 0  # the second sequence is padded on the left
        calls.append({"ids": ids, "mask": mask})
    shape = ("batch", "sequence")
    return model(nodes, calls[0], ["y"], constants, shapes={"ids": shape, "mask": shape}), calls


def both_directions() -> Network:
    """Embedded tokens through a bidirectional LSTM and a bidirectional GRU, each sequence of its
    own length; the directions stand beside each other. Any batch and sequence length."""

    def layer(op: str, x: str, y: str, w: str, **attrs: int) -> list[NodeProto]:
        inputs = f"{x} {w}_x {w}_h {w}_b lengths"
        return [
            node(op, inputs, f"{y}_d", hidden_size=12, direction="bidirectional", **attrs),
            node("Transpose", f"{y}_d", f"{y}_t", perm=[0, 2, 1, 3]),
            node("Reshape", f"{y}_t beside", y),
        ]

    nodes = [
        node("Gather", "table ids", "a"),
        node("Transpose", "a", "x", perm=[1, 0, 2]),
        *layer("LSTM", "x", "b", "lstm"),
        *layer("GRU", "b", "c", "gru", linear_before_reset=1),
        node("MatMul", "c w", "d"),
        node("LogSoftmax", "d", "e", axis=-1),
        node("Transpose", "e", "y", perm=[1, 0, 2]),
    ]
    constants = {"table": numbers(20, 10, seed=1), "beside": ints(0, 0, 24),
                 "w": weights(24, 7, seed=2)}  # fmt: skip
    for k, (name, gates, inputs) in enumerate((("lstm", 4, 10), ("gru", 3, 24))):
        rows = gates * 12
        constants |= {
            f"{name}_x": numbers(2, rows, inputs, seed=3 + k, low=-0.3, high=0.3),
            f"{name}_h": numbers(2, rows, 12, seed=5 + k, low=-0.3, high=0.3),
            f"{name}_b": numbers(2, 2 * rows, seed=7 + k),
        }
    rng = np.random.default_rng(9)
    calls = [
        {"ids": rng.integers(0, 20, (n, t)), "lengths": np.arange(t, t - n, -1).astype(np.int32)}
        for n, t in ((1, 6), (3, 11))
    ]
    shapes = {"ids": ("batch", "sequence"), "lengths": ("batch",)}
    return model(nodes, calls[0], ["y"], constants, shapes=shapes), calls


NETWORKS: list[Callable[[], Network]] = [
    detector, u_shape, shifted_windows, grouped_queries, both_directions,
]  # fmt: skip


@pytest.mark.parametrize("network", NETWORKS, ids=lambda f: f.__name__)
def test_compiled_code_agrees_with_numpy_and_onnxruntime(network: Callable[[], Network]) -> None:
    m, calls = network()
    fn, compiled = load(m), mc.compile(m, threads=2)
    for feeds in calls:
        got = compiled(*[feeds[t.name] for t in compiled.inputs])
        for want in (run_reference(fn, feeds), reference_of(m, feeds)):
            for a, b in zip(got, want, strict=True):
                assert a.shape == b.shape
                assert_close(a, np.asarray(b), 64)


def test_the_detector_leaves_some_boxes() -> None:
    m, calls = detector()
    counts = {len(reference_of(m, feeds)[0]) for feeds in calls}
    assert min(counts) >= 2 and max(counts) < 3 * 72
