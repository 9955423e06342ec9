"""The smallest cases of what fuzzing found: each once read outside of memory, or raised something
that was no MinicompilerError."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper
from onnx_models import model, node, numbers

import minicompiler as mc
from minicompiler.errors import ImportModelError, LimitError, RunError, ShapeError
from minicompiler.frontend.onnx import load
from minicompiler.ops.evaluate import run_reference

Make = Callable[[], ModelProto]
LONG = np.int64


def deform_conv() -> ModelProto:
    """Offsets for one image, but 64 images."""
    inputs = {"x": numbers(64, 1, 3, 3), "w": numbers(1, 1, 2, 2), "o": numbers(1, 8, 2, 2)}
    return model([node("DeformConv", "x w o", "y", kernel_shape=[2, 2])], inputs, ["y"], opset=22)


def scatter_elements() -> ModelProto:
    inputs = {"x": numbers(3, 3), "i": np.zeros((2, 3), LONG), "u": numbers(2, 2)}
    return model([node("ScatterElements", "x i u", "y")], inputs, ["y"])


def gather_elements() -> ModelProto:
    inputs = {"x": numbers(3, 3), "i": np.zeros((4, 3), LONG)}
    return model([node("GatherElements", "x i", "y", axis=1)], inputs, ["y"])


def scatter_nd() -> ModelProto:
    inputs = {"x": numbers(4, 4), "i": np.zeros((2, 1), LONG), "u": numbers(2, 3)}
    return model([node("ScatterND", "x i u", "y")], inputs, ["y"])


def quantize() -> ModelProto:
    inputs = {"x": numbers(1, 5, 2), "s": numbers(3), "z": np.zeros(3, np.uint8)}
    return model([node("QuantizeLinear", "x s z", "y", axis=1)], inputs, ["y"])


def grid_sample() -> ModelProto:
    inputs = {"x": numbers(2, 1, 4, 4), "g": numbers(3, 2, 2, 2)}
    return model([node("GridSample", "x g", "y")], inputs, ["y"])


def roi_align() -> ModelProto:
    inputs = {"x": numbers(1, 1, 9, 9), "r": numbers(3, 4), "b": np.zeros(2, LONG)}
    attributes = {"output_height": 2, "output_width": 2, "sampling_ratio": 2}
    return model([node("RoiAlign", "x r b", "y", **attributes)], inputs, ["y"])


def groups() -> ModelProto:
    inputs = {"x": numbers(1, 2, 4, 4), "w": numbers(2, 2, 1, 1)}
    return model([node("Conv", "x w", "y", group=0)], inputs, ["y"])


def resize_scales() -> ModelProto:
    scales = {"s": np.ones(3, np.float32)}
    return model([node("Resize", "x - s", "y")], {"x": numbers(1, 1, 2, 2)}, ["y"], scales)


def resize_of_nothing() -> ModelProto:
    sizes = {"s": np.array([1, 1, 7, 8])}
    return model([node("Resize", "x - - s", "y")], {"x": numbers(1, 1, 0, 2)}, ["y"], sizes)


def quantize_blocks() -> ModelProto:
    """Scales of blocks that have fewer dimensions than the tensor."""
    inputs = {"x": numbers(3, 4), "s": numbers(2)}
    return model([node("QuantizeLinear", "x s", "y", block_size=2)], inputs, ["y"], opset=21)


def quantize_one_number() -> ModelProto:
    inputs = {"x": numbers(), "s": numbers(4)}
    return model([node("QuantizeLinear", "x s", "y", axis=0)], inputs, ["y"], opset=21)


def endless_loop() -> ModelProto:
    infos = [("k", TensorProto.INT64, []), ("go", TensorProto.BOOL, []), ("a", 1, [3])]
    body = helper.make_graph(
        [node("Identity", "go", "go_on"), node("Relu", "a", "b")],
        "body",
        [helper.make_tensor_value_info(*i) for i in infos],
        [helper.make_empty_tensor_value_info(name) for name in ("go_on", "b")],
    )
    known = {"n": np.array(2**62), "go": np.array(True)}
    return model([node("Loop", "n go x", "y", body=body)], {"x": numbers(3)}, ["y"], known)


def unknown_attribute() -> ModelProto:
    return model([node("Conv", "x w", "y", pad=[1, 1])],
                 {"x": numbers(1, 1, 4, 4), "w": numbers(1, 1, 3, 3)}, ["y"])  # fmt: skip


def wrong_attribute() -> ModelProto:
    return model([node("Softmax", "x", "y", axis=1.0)], {"x": numbers(2, 3)}, ["y"])


def too_many_inputs() -> ModelProto:
    return model([node("Relu", "x x", "y")], {"x": numbers(2, 3)}, ["y"])


def different_types() -> ModelProto:
    return model([node("Add", "x y", "z")], {"x": numbers(3), "y": np.zeros(3, LONG)}, ["z"])


def wrong_type() -> ModelProto:
    return model([node("Not", "x", "y")], {"x": numbers(3)}, ["y"])


def newer_operator() -> ModelProto:
    return model([node("Gelu", "x", "y")], {"x": numbers(3)}, ["y"], opset=18)


def same_output_twice() -> ModelProto:
    return model([node("Relu", "x", "y")], {"x": numbers(3)}, ["y", "y"])


def no_text() -> ModelProto:
    data = model([node("Relu", "x", "yyyy")], {"x": numbers(3)}, ["yyyy"]).SerializeToString()
    return ModelProto.FromString(data.replace(b"yyyy", b"\xff\xfe\xfd\xfc"))


def negative_opset() -> ModelProto:
    return model([node("Relu", "x", "y")], {"x": numbers(3)}, ["y"], opset=-1)


def branch_without_result() -> ModelProto:
    empty = helper.make_graph([], "nothing", [], [helper.make_empty_tensor_value_info("q")])
    nodes = [node("If", "c", "y", then_branch=empty, else_branch=empty)]
    return model(nodes, {"x": numbers(3)}, ["y"], {"c": np.array(True)})


def folder_as_weight() -> ModelProto:
    m = model([node("Add", "x w", "y")], {"x": numbers(3)}, ["y"], {"w": numbers(3)})
    w = m.graph.initializer[0]
    w.ClearField("raw_data")
    w.data_location = TensorProto.EXTERNAL
    w.external_data.add(key="location", value=".")
    return m


MODELS: tuple[Make, ...] = (
    deform_conv, scatter_elements, gather_elements, scatter_nd, quantize, grid_sample, roi_align,
    groups, resize_scales, unknown_attribute, wrong_attribute, too_many_inputs, different_types,
    wrong_type, newer_operator, same_output_twice, no_text, negative_opset, branch_without_result,
    folder_as_weight, resize_of_nothing, quantize_blocks, quantize_one_number, endless_loop,
)  # fmt: skip


@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_a_model_is_refused(make: Make, tmp_path: object) -> None:
    path = f"{tmp_path}/net.onnx"
    with open(path, "wb") as file:
        file.write(make().SerializeToString())
    with pytest.raises((ImportModelError, ShapeError)) as caught:
        mc.compile(path)
    assert "net.onnx" in str(caught.value)


def symbolic(nodes: list, inputs: dict[str, np.ndarray], shapes: dict, constants=None):  # type: ignore[no-untyped-def, type-arg]
    return mc.compile(model(nodes, inputs, ["y"], constants, shapes=shapes), threads=1)


def test_sizes_that_become_negative_are_refused_at_the_call() -> None:
    m = symbolic(
        [node("MaxPool", "x", "a", kernel_shape=[3]), node("MaxPool", "a", "b", kernel_shape=[3]),
         node("GlobalMaxPool", "b", "y")],
        {"x": numbers(1, 1, 9)}, {"x": (1, 1, "m")},
    )  # fmt: skip
    assert m(numbers(1, 1, 5))[0].shape == (1, 1, 1)
    with pytest.raises(RunError, match=r'MaxPool "n_[ab]"'):
        m(numbers(1, 1, 1))


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


def test_a_scale_of_many_dimensions_may_be_one_number() -> None:
    """Of the size 1 on every axis, it is no list of blocks."""
    x, scale = numbers(3, 4), np.full((1, 1), 0.25, np.float32)
    nodes = [node("QuantizeLinear", "x s", "q"), node("DequantizeLinear", "q s", "y")]
    m = model(nodes, {"x": x, "s": scale}, ["y"], opset=21)
    assert np.array_equal(mc.compile(m)(x, scale)[0], run_reference(load(m), [x, scale])[0])


def test_resize_of_a_tensor_that_turns_out_to_be_empty() -> None:
    sizes = {"s": np.array([1, 1, 3, 2])}
    nodes = [node("Compress", "x c", "z", axis=2), node("Resize", "z - - s", "y")]
    m = mc.compile(model(nodes, {"x": numbers(1, 1, 3, 2), "c": np.ones(3, bool)}, ["y"], sizes))
    x = numbers(1, 1, 3, 2)
    assert np.array_equal(m(x, np.ones(3, bool))[0], x)
    assert m(x, np.zeros(3, bool))[0].shape == x.shape  # of no meaning, but no crash


def test_work_without_bound_is_refused_before_it_starts() -> None:
    inputs = {"x": numbers(1, 1, 9, 9), "r": numbers(3, 4), "b": np.zeros(3, LONG)}
    sizes = {"output_height": 2, "output_width": 2, "sampling_ratio": 1 << 16}
    m = model([node("RoiAlign", "x r b", "y", **sizes)], inputs, ["y"])
    with pytest.raises(LimitError, match=r'(?s)one call takes \d+ operations.*RoiAlign "n_y"'):
        mc.compile(m, limits=mc.Limits(operations=10**9))


def test_the_extreme_of_nothing_is_the_identity() -> None:
    for op, value in (("ReduceMax", -np.inf), ("ReduceMin", np.inf)):
        m = model([node(op, "x a", "y", keepdims=0)], {"x": np.zeros((2, 0), np.float32)}, ["y"],
                  {"a": np.array([1])})  # fmt: skip
        (y,) = mc.compile(m)(np.zeros((2, 0), np.float32))
        assert (y == value).all()
