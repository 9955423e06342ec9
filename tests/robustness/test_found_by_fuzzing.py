"""The smallest cases of what fuzzing found: each once read outside of memory, or raised something
that was no MinicompilerError."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import GraphProto, ModelProto, TensorProto, helper
from onnx_models import graph, model, node, numbers, reference_of
from tolerance import assert_close

import minicompiler as mc
from minicompiler.errors import (
    ImportModelError,
    LimitError,
    MinicompilerError,
    RunError,
    ShapeError,
)
from minicompiler.frontend.onnx import load
from minicompiler.ops.evaluate import run_reference
from minicompiler.runtime.plan import numpy_dtype

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


def transposed_shape() -> ModelProto:
    inputs = {"x": numbers(1, 1, 3, 3), "w": numbers(1, 1, 2, 2)}
    return model([node("ConvTranspose", "x w", "y", output_shape=[6])], inputs, ["y"])


def transposed_rank() -> ModelProto:
    inputs = {"x": numbers(1, 1, 3, 3), "w": numbers(1, 1, 2)}
    return model([node("ConvTranspose", "x w", "y", auto_pad="SAME_UPPER")], inputs, ["y"])


def scan_of(count: int, **attributes: object) -> ModelProto:
    infos = [helper.make_tensor_value_info(f"b{k}", 1, []) for k in range(2)]
    out = helper.make_empty_tensor_value_info("c")
    body = helper.make_graph([node("Add", "b0 b1", "c")], "body", infos, [out])
    scan = node("Scan", "x s", "y", body=body, num_scan_inputs=count, **attributes)
    return model([scan], {"x": numbers(3), "s": numbers()}, ["y"])


def resize_far_away() -> ModelProto:
    known = {"r": np.array([0, 0, 0, 1e30], np.float32), "s": np.array([2, 2], np.float32)}
    mode = {"coordinate_transformation_mode": "tf_crop_and_resize", "mode": "linear"}
    return model([node("Resize", "x r s", "y", **mode)], {"x": numbers(2, 3)}, ["y"], known)


def scan_of_nothing() -> ModelProto:
    return scan_of(0)


def scan_of_more() -> ModelProto:
    return scan_of(3)


def scan_of_a_number() -> ModelProto:
    return scan_of(2)


def scan_of_one_axis() -> ModelProto:
    return scan_of(1, scan_input_axes=[0, 0])


def scan_without_rows() -> ModelProto:
    """The body gives the state only, the node wants what was scanned too."""
    model_ = scan_of(1)
    model_.graph.node[0].output.append("z")
    return model_


def loop_of_nothing() -> ModelProto:
    infos = [("k", TensorProto.INT64, []), ("go", TensorProto.BOOL, []), ("a", 1, [3])]
    inputs = [helper.make_tensor_value_info(*i) for i in infos]
    body = helper.make_graph([node("Relu", "a", "b")], "body", inputs, [])
    known = {"n": np.array(2), "go": np.array(True)}
    return model([node("Loop", "n go x", "y", body=body)], {"x": numbers(3)}, ["y"], known)


def branches_of_one_and_two() -> ModelProto:
    def branch(names: str) -> GraphProto:
        outputs = [helper.make_empty_tensor_value_info(name) for name in names.split()]
        return helper.make_graph([node("Split", "x", "p q")], "branch", [], outputs)

    nodes = [node("If", "c", "y z", then_branch=branch("p q"), else_branch=branch("p"))]
    return model(nodes, {"c": np.array(True), "x": numbers(4)}, ["y"], opset=11)


def pads_without_end() -> ModelProto:
    known = {"p": np.array([1, 1]), "v": np.array(0, np.float32), "a": np.array([0, 1])}
    return model([node("Pad", "x p v a", "y")], {"x": numbers(3, 3)}, ["y"], known)


def pads_of_no_axis() -> ModelProto:
    known = {"p": np.array([1, 1]), "v": np.array(0, np.float32), "a": np.array([7])}
    return model([node("Pad", "x p v a", "y")], {"x": numbers(3, 3)}, ["y"], known)


def steps_of_a_line() -> ModelProto:
    inputs = {"x": numbers(), "w": numbers(1, 8, 2), "r": numbers(1, 8, 2)}
    return model([node("LSTM", "x w r", "y", hidden_size=2)], inputs, ["y"])


def more_than_a_cache_holds() -> ModelProto:
    inputs = {"x": numbers(2, 1, 4, 5), "u": numbers(2, 1, 17, 5), "i": np.zeros(2, LONG)}
    scatter = node("TensorScatter", "x u i", "y", mode="circular")
    return model([scatter], inputs, ["y"], opset=24)


def weights_of_a_line() -> ModelProto:
    inputs = {"x": numbers(4, 1, 2), "w": numbers(1), "r": numbers(1, 2, 2)}
    return model([node("RNN", "x w r", "y", hidden_size=2)], inputs, ["y"])


def pool_of_another_rank() -> ModelProto:
    pool = node("MaxPool", "x", "y", kernel_shape=[2], auto_pad="SAME_UPPER")
    return model([pool], {"x": numbers(1, 1, 4, 4)}, ["y"])


def batch_of_numbers() -> ModelProto:
    inputs = {"x": numbers(3), **{name: numbers(3) for name in "sbmv"}}
    nodes = [node("BatchNormalization", "x s b m v", "y p q", training_mode=1)]
    return model(nodes, inputs, ["y"])


def unpool_of_a_line() -> ModelProto:
    inputs = {"x": numbers(1, 1, 2), "i": np.zeros((1, 1, 2), LONG)}
    return model([node("MaxUnpool", "x i", "y", kernel_shape=[2, 2])], inputs, ["y"])


def diagonal() -> ModelProto:
    return model([node("Einsum", "x", "y", equation="ii->i")], {"x": numbers(7, 1)}, ["y"])


def size_over_nothing() -> ModelProto:
    nodes = [node("Shape", "x", "s"), node("Div", "s z", "q"), node("Expand", "x q", "y")]
    return model(nodes, {"x": numbers(3)}, ["y"], {"z": np.array([0])})


def split_without_names() -> ModelProto:
    return model([node("Split", "x", "y", num_outputs=2**40)], {"x": numbers(4)}, ["y"])


def version_of_another_domain() -> ModelProto:
    m = model([node("Relu", "x", "y")], {"x": numbers(3)}, ["y"])
    m.opset_import.append(helper.make_opsetid("ai.onnx.ml", 2**40))
    return m


def unique_of_a_number() -> ModelProto:
    return model([node("Unique", "x", "y", axis=0)], {"x": numbers()}, ["y"])


def pieces_of_a_number() -> ModelProto:
    nodes = [node("SplitToSequence", "x", "s"), node("ConcatFromSequence", "s", "y", axis=0)]
    return model(nodes, {"x": numbers()}, ["y"])


def rows_of_larger_scale() -> ModelProto:
    inputs = {"x": numbers(2, 1, 4, 5), "s": numbers(3, 4, 5)}
    return model([node("RMSNormalization", "x s", "y", axis=1)], inputs, ["y"], opset=23)


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
    transposed_shape, transposed_rank, scan_of_nothing, scan_of_more, scan_of_a_number,
    scan_of_one_axis, batch_of_numbers, unpool_of_a_line, diagonal, size_over_nothing,
    split_without_names, rows_of_larger_scale, unique_of_a_number, pieces_of_a_number,
    version_of_another_domain, resize_far_away, scan_without_rows, loop_of_nothing,
    branches_of_one_and_two,
    pads_without_end, pads_of_no_axis, steps_of_a_line, weights_of_a_line,
    more_than_a_cache_holds, pool_of_another_rank,
)  # fmt: skip


@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_a_model_is_refused(make: Make, tmp_path: object) -> None:
    path = f"{tmp_path}/net.onnx"
    with open(path, "wb") as file:
        file.write(make().SerializeToString())
    with pytest.raises((ImportModelError, ShapeError)) as caught:
        mc.compile(path)
    assert "net.onnx" in str(caught.value)


def test_a_concatenation_of_many_parts() -> None:
    """An embedding bag is exported as a loop that joins its 256 results."""
    x = numbers(300, 3)
    starts = {f"s{k}": np.array([k]) for k in range(301)}
    nodes = [node("Slice", f"x s{k} s{k + 1}", f"p{k}") for k in range(300)]
    nodes += [node("Neg", f"p{k}", f"n{k}") for k in range(300)]
    nodes += [node("Concat", " ".join(f"n{k}" for k in range(299, -1, -1)), "y", axis=0)]
    m = mc.compile(model(nodes, {"x": x}, ["y"], starts, opset=24), threads=1)
    np.testing.assert_array_equal(m(x)[0], -x[::-1])


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


def test_attention_whose_head_size_is_told_by_the_call() -> None:
    q, k = numbers(2, 4, 72), numbers(2, 6, 24)
    heads = {"q_num_heads": 9, "kv_num_heads": 3}
    m = model([node("Attention", "q k v", "y", **heads)], {"q": q, "k": k, "v": k}, ["y"],
              opset=23, shapes={"k": (2, 6, "n")})  # fmt: skip
    assert_close(mc.compile(m)(q, k, k)[0], run_reference(load(m), [q, k, k])[0], 48)
    with pytest.raises(RunError, match='Attention "n_y"'):
        mc.compile(m)(q, numbers(2, 6, 30), k)


@pytest.mark.parametrize(
    ("op", "numbers_of", "text"),
    [
        ("MelWeightMatrix", (4, 16, 8000, 100.0, 9000.0), "at most half"),
        ("MelWeightMatrix", (4, 16, 8000, float("nan"), 400.0), "lowest, highest"),
        ("MelWeightMatrix", (2**50, 16, 8000, 0.0, 400.0), "the limit is"),
        ("Range", (0.0, float("inf"), 1.0), "Range from"),
        ("Range", (0.0, 1e15, 1.0), "the limit is"),
        ("Range", (-1e38, 1e38, 1e-40), "the limit is"),
    ],
)
def test_a_table_that_cannot_be_made(op: str, numbers_of: tuple, text: str) -> None:  # type: ignore[type-arg]
    known = {f"c{k}": np.array(v, LONG if isinstance(v, int) else np.float32)
             for k, v in enumerate(numbers_of)}  # fmt: skip
    nodes = [node(op, " ".join(known), "t"), node("ReduceMax", "t", "m"), node("Add", "x m", "y")]
    m = model(nodes, {"x": numbers(1, 1)}, ["y"], known)
    with pytest.raises((ImportModelError, LimitError), match=text):
        mc.compile(m)


@pytest.mark.parametrize(
    ("sizes", "length", "text"),
    [((1, 0, 1), None, "of 0 elements"), ((1, 9, 1), -3, "of -3 elements"),
     ((1, 9, 1), 2**60, "the limit is")],
)  # fmt: skip
def test_a_transform_of_an_impossible_length(
    sizes: tuple[int, ...], length: int | None, text: str
) -> None:
    known = {} if length is None else {"n": np.array(length)}
    m = model([node("DFT", "x n" if known else "x", "y")], {"x": numbers(*sizes)}, ["y"], known)
    with pytest.raises((ImportModelError, LimitError), match=text):
        mc.compile(m)


@pytest.mark.parametrize("field", ["arch", "cores", "fma", "features"])
def test_a_target_of_other_types(field: str) -> None:
    data = {**mc.Target.host().to_json(), field: {"a": 1} if field != "features" else 3}
    with pytest.raises(MinicompilerError, match="not a description of a target"):
        mc.Target.from_json(data)


@pytest.mark.parametrize("name", ["", "t", "t4", "bfloat", "float33"])
def test_a_type_that_does_not_exist(name: str) -> None:
    with pytest.raises(TypeError, match="not understood"):
        numpy_dtype(name)


@pytest.mark.parametrize("sizes", [(0, 4, 3), (2, 4, 0)])
def test_normalised_groups_of_nothing(sizes: tuple[int, ...]) -> None:
    inputs = {"x": np.zeros(sizes, np.float32), "s": numbers(4), "b": numbers(4)}
    nodes = [node("GroupNormalization", "x s b", "y", num_groups=2)]
    m = model(nodes, inputs, ["y"], opset=21)
    assert mc.compile(m)(*inputs.values())[0].shape == sizes
    assert run_reference(load(m), [*inputs.values()])[0].shape == sizes


@pytest.mark.parametrize("exclusive", [0, 1])
def test_running_sums_of_nothing(exclusive: int) -> None:
    nodes = [node("CumSum", "x a", "y", exclusive=exclusive)]
    m = model(nodes, {"x": numbers(0)}, ["y"], {"a": np.array(0)})
    assert mc.compile(m)(numbers(0))[0].shape == (0,)
    assert run_reference(load(m), [numbers(0)])[0].shape == (0,)


@pytest.mark.parametrize("sizes", [(0,), (2, 0), (0, 2)])
def test_a_sum_of_no_sizes(sizes: tuple[int, ...]) -> None:
    """Integers that are known while importing, but there are none."""
    nodes = [node("ReduceSum", "i a", "s", keepdims=0), node("Cast", "s", "f", to=1),
             node("Add", "x f", "y")]  # fmt: skip
    m = model(nodes, {"x": numbers(1)}, ["y"], {"i": np.zeros(sizes, LONG), "a": np.array([0])})
    want = numbers(1) + np.zeros(sizes, np.float32).sum(0)
    assert np.array_equal(mc.compile(m)(numbers(1))[0], want)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
def test_softmax_of_nothing(op: str) -> None:
    x = np.zeros((2, 0), np.float32)
    m = model([node(op, "x", "y", axis=1)], {"x": x}, ["y"])
    assert mc.compile(m)(x)[0].shape == (2, 0)
    assert run_reference(load(m), [x])[0].shape == (2, 0)


def test_the_extreme_of_nothing_is_the_identity() -> None:
    for op, value in (("ReduceMax", -np.inf), ("ReduceMin", np.inf)):
        m = model([node(op, "x a", "y", keepdims=0)], {"x": np.zeros((2, 0), np.float32)}, ["y"],
                  {"a": np.array([1])})  # fmt: skip
        (y,) = mc.compile(m)(np.zeros((2, 0), np.float32))
        assert (y == value).all()


@pytest.mark.parametrize("width", [1, 9])
def test_windows_over_a_line_of_one_pixel(width: int) -> None:
    """The last valid pixel's window begins before the line."""
    pool = node("MaxPool", "x", "y", kernel_shape=[2, 2], auto_pad="SAME_LOWER")
    x = numbers(1, 3, 32, width)
    m = model([pool], {"x": x}, ["y"], shapes={"x": (1, 3, 32, "w")})
    assert_close(mc.compile(m, checked=True)(x)[0], run_reference(load(m), [x])[0], 1)


def test_powers_over_windows_with_a_border() -> None:
    """The first window begins before the image: what is fetched early lies inside."""
    pool = node("LpPool", "x", "y", kernel_shape=[2, 2], p=4, auto_pad="SAME_LOWER")
    x = numbers(1, 3, 32, 32)
    m = model([pool], {"x": x}, ["y"], shapes={"x": (1, "c", 32, 32)}, opset=18)
    assert_close(mc.compile(m, checked=True)(x)[0], run_reference(load(m), [x])[0], 1)


def test_a_border_that_no_memory_holds() -> None:
    pool = node("AveragePool", "x", "y", kernel_shape=[2], pads=[2**62, 0], strides=[2**62])
    x = numbers(1, 1, 4)
    with pytest.raises(MemoryError, match="border"):
        run_reference(load(model([pool], {"x": x}, ["y"])), [x])


@pytest.mark.parametrize(("size", "rest"), [(12, 6), (16, 16), (8, 40), (9, 9), (40, 20)])
def test_a_transposed_part_of_a_result(size: int, rest: int) -> None:
    """The transposed part may be narrower than a tile."""
    inputs = {"a": numbers(2, size, 8), "b": numbers(2, 8, rest)}
    nodes = [node("Transpose", "a", "t", perm=[0, 2, 1]), node("Concat", "t b", "c", axis=2),
             node("Mul", "c c", "y")]  # fmt: skip
    m = model(nodes, inputs, ["y"])
    want = run_reference(load(m), [*inputs.values()])[0]
    assert np.array_equal(mc.compile(m, checked=True)(*inputs.values())[0], want)


def test_rows_of_products_that_are_wider_than_a_vector() -> None:
    """The scaling reads the row from registers, two vectors of it."""
    inputs = {"q": numbers(2, 3, 4, 8), "k": numbers(2, 3, 6, 8), "v": numbers(2, 3, 6, 10)}
    m = model([node("Attention", "q k v", "y", scale=0.01)], inputs, ["y"], opset=23,
              shapes={"q": (2, 3, 4, "d")})  # fmt: skip
    want = run_reference(load(m), [*inputs.values()])[0]
    assert_close(mc.compile(m, checked=True)(*inputs.values())[0], want, 8)


@pytest.mark.parametrize(("depth", "count"), [(16, 3), (4, 5), (16, 11), (8, 32)])
def test_one_query_with_few_keys(depth: int, count: int) -> None:
    """All scores of a row are one tile, and keys lie side by side."""
    inputs = {"q": numbers(2, 4, 1, depth), "k": numbers(2, 4, depth, count, seed=1),
              "v": numbers(2, 4, count, depth, seed=2)}  # fmt: skip
    nodes = [node("MatMul", "q k", "s"), node("Softmax", "s", "p"), node("MatMul", "p v", "y")]
    m = model(nodes, inputs, ["y"])
    want = run_reference(load(m), [*inputs.values()])[0]
    assert_close(mc.compile(m, checked=True)(*inputs.values())[0], want, depth)


def test_constants_that_are_normalised() -> None:
    """Sums in parts need a workspace, which what is computed while compiling has not got."""
    x, known = numbers(5), {"c": numbers(1, 5, 4, 4), "s": numbers(5, seed=1)}
    nodes = [node("GroupNormalization", "c s x", "y", num_groups=1)]
    m = model(nodes, {"x": x}, ["y"], known, opset=21)
    assert_close(mc.compile(m)(x)[0], run_reference(load(m), [x])[0], 80)


def test_a_refusal_beside_a_size_that_data_decides() -> None:
    """What is known of the counted size has no say in what the file's dimensions are."""
    inputs = {"x": numbers(2, 3), "n": np.ones(5, LONG), "i": np.array([1, 0])}
    nodes = [node("NonZero", "x", "z"), node("ReverseSequence", "z n", "y", time_axis=0),
             node("GatherND", "x i", "w")]  # fmt: skip
    m = model(nodes, inputs, ["y", "w"], shapes={"i": ("d",)})
    with pytest.raises(ShapeError, match=r'the indices.*\n.*from GatherND "n_w"'):
        mc.compile(m)


# ---- integers that leave their type --------------------------------------------------------------
@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Mod", "Cast"])
@pytest.mark.parametrize("of", [np.int8, np.uint8, np.int32, np.int64, np.uint64])
def test_known_integers_wrap(op: str, of: type[np.integer]) -> None:
    """Numbers of 64 bits stand for known integers of all types while importing."""
    lo, hi = int(np.iinfo(of).min), int(np.iinfo(of).max)
    ends = {"a": np.array([hi, lo, hi // 2 + 1, 3], of), "b": np.array([3, 7, 2, hi], of)}
    attrs = {"to": TensorProto.UINT32} if op == "Cast" else {}
    given = "a" if op == "Cast" else "a b"
    nodes = [node(op, given, "t", **attrs), node("Cast", "t", "u", to=TensorProto.UINT8),
             node("Cast", "u", "v", to=TensorProto.INT32), node("Add", "x v", "y")]  # fmt: skip
    x = np.zeros(4, np.int32)
    m = model(nodes, {"x": x}, ["t", "y"], ends)
    for value, want in zip(mc.compile(m)(x), reference_of(m, {"x": x}), strict=True):
        assert value.dtype == want.dtype
        assert np.array_equal(value, want)


def test_sizes_as_integers_of_few_bits() -> None:
    """What is subtracted from a symbolic size may be more than the size."""
    x, known = numbers(3, 5), {"k": np.array([9])}
    nodes = [node("Shape", "x", "s"), node("Sub", "s k", "t"),
             node("Cast", "t", "y", to=TensorProto.UINT32)]  # fmt: skip
    m = model(nodes, {"x": x}, ["y"], known, shapes={"x": ("n", 5)})
    assert np.array_equal(mc.compile(m)(x)[0], reference_of(m, {"x": x})[0])


# ---- what is there in small numbers, or not at all -----------------------------------------------
@pytest.mark.parametrize("op", ["L1", "L2", "LogSum", "LogSumExp", "SumSquare", "Mean"])
def test_a_reduction_over_no_axes(op: str) -> None:
    """Magnitudes, squares and logarithms are taken all the same."""
    x = numbers(3, 4, low=0.5 if "Log" in op else -2)
    m = model([node(f"Reduce{op}", "x", "y", noop_with_empty_axes=1)], {"x": x}, ["y"])
    assert_close(mc.compile(m)(x)[0], reference_of(m, {"x": x})[0])


@pytest.mark.parametrize("shape", [(3, 4), ("n", "m")])
@pytest.mark.parametrize("k", [0, 2, -1])
def test_ones_along_a_diagonal_of_any_size(shape: tuple[int | str, ...], k: int) -> None:
    x = numbers(3, 4)
    m = model([node("EyeLike", "x", "y", k=k)], {"x": x}, ["y"], shapes={"x": shape})
    assert np.array_equal(mc.compile(m)(x)[0], np.eye(3, 4, k))


def test_nothing_is_reflected_at_an_axis_without_elements() -> None:
    x = np.zeros((2, 0), np.float32)
    m = model([node("Pad", "x p", "y", mode="reflect")], {"x": x}, ["y"],
              {"p": np.array([1, 0, 0, 0])})  # fmt: skip
    assert mc.compile(m)(x)[0].shape == (3, 0)


@pytest.mark.parametrize("mode", ["edge", "reflect", "wrap"])
@pytest.mark.parametrize("sizes", [(2, 6), ("n", "m")])
def test_what_is_left_of_an_axis_is_continued(mode: str, sizes: tuple[int | str, ...]) -> None:
    """Negative padding comes first: what it takes away is nowhere in the result."""
    x, pads = numbers(2, 6), {"p": np.array([0, 3, 0, -2])}
    m = model([node("Pad", "x p", "y", mode=mode)], {"x": x}, ["y"], pads, shapes={"x": sizes})
    assert np.array_equal(mc.compile(m)(x)[0], reference_of(m, {"x": x})[0])


def test_a_loop_that_never_runs_stacks_nothing() -> None:
    body = graph("k:i c:b s:f?,?", [node("Identity", "c", "d"), node("Add", "s s", "t"),
                 node("ReduceSum", "s", "u", keepdims=0)], "d:b t:f?,? u:f")  # fmt: skip
    x = numbers(3, 4)
    m = model([node("Loop", "n - x", "y z", body=body)], {"x": x}, ["y", "z"], {"n": np.array(0)})
    y, z = mc.compile(m)(x)
    assert np.array_equal(y, x)
    assert z.shape == (0,)
