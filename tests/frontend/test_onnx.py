"""The ONNX importer against onnxruntime, operator by operator and on small whole models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_models import Array, check, model, node, numbers

from minicompiler.errors import ImportModelError
from minicompiler.frontend.onnx import load
from minicompiler.frontend.onnx_contrib import CONTRIB
from minicompiler.frontend.onnx_contrib_attention import ATTENTION
from minicompiler.frontend.onnx_ops import CONVERTERS
from minicompiler.ir.expr import Const, Dim
from minicompiler.ir.graph import Apply, Constant, applies
from minicompiler.ops.evaluate import run_reference

X4 = numbers(2, 4, 7, 6)
X3 = numbers(2, 3, 4)
POS = numbers(2, 3, low=0.1, high=3)
I64 = np.arange(-6, 6, dtype=np.int64).reshape(3, 4)
B = np.array([[True, False, True], [False, False, True]])


def i64(*v: int) -> Array:
    return np.array(v, np.int64)


def f32(*v: float) -> Array:
    return np.array(v, np.float32)


# (operator, inputs, constants, attributes, opset): inputs come first, "-" leaves one out.
Case = tuple[str, list[Array], list[Any], dict[str, Any], int]
CASES: list[Case] = [
    *[(op, [X3], [], {}, 20) for op in (
        "Abs Atan Ceil Cos Elu Erf Exp Floor HardSigmoid HardSwish Identity LeakyRelu Mish Neg "
        "Relu Round Selu Sigmoid Sign Sin Sinh Softplus Softsign Tanh ThresholdedRelu Gelu Softmax "
        "LogSoftmax IsNaN IsInf Celu Shrink"
    ).split()],
    *[(op, [POS], [], {}, 20) for op in ("Log", "Sqrt", "Reciprocal", "ReduceLogSum")],
    *[(op, [I64 % 7 + 1], [i64(1)], {}, 20)
      for op in ("ReduceL2", "ReduceLogSum", "ReduceLogSumExp")],
    *[(op, [X3, numbers(3, 1, seed=1, low=1)], [], {}, 20)
      for op in ("Add", "Sub", "Mul", "Div", "Less")],
    *[(op, [B, B[:1]], [], {}, 20) for op in ("And", "Or", "Xor")],
    ("Not", [B], [], {}, 20),
    ("Equal", [I64, I64 % 3], [], {}, 20),
    ("Mod", [I64, np.full((4,), 3, np.int64)], [], {}, 20),
    ("Mod", [X3, POS[:1, :1]], [], {"fmod": 1}, 20),
    ("Pow", [POS, i64(2)], [], {}, 20),
    ("BitShift", [np.array([1, 9], np.uint8), np.array([2, 1], np.uint8)], [],
     {"direction": "LEFT"}, 20),
    ("Where", [B, POS, f32(1)], [], {}, 20),
    ("Max", [X3, X3[:1], f32(0)], [], {}, 20),
    ("Mean", [X3, X3[:1], f32(3)], [], {}, 20),
    ("Sum", [X3], [], {}, 20),
    ("PRelu", [X4, numbers(4, 1, 1)], [], {}, 20),
    ("Gelu", [X3], [], {"approximate": "tanh"}, 20),
    ("Clip", [X3], [f32(-1).reshape(()), f32(1).reshape(())], {}, 20),
    ("Clip", [X3, f32(0.5).reshape(())], [], {}, 20),
    ("Clip", [X3], ["-", f32(1).reshape(())], {}, 13),
    ("Clip", [X3], [], {"min": -0.5, "max": 0.25}, 7),
    ("Cast", [X3], [], {"to": TensorProto.INT32}, 20),
    ("Cast", [I64], [], {"to": TensorProto.BOOL}, 9),
    ("CastLike", [I64, f32(1)], [], {}, 20),
    ("Dropout", [X3], [], {}, 13),
    ("ReduceSum", [X3], [i64(1)], {}, 20),
    ("ReduceSum", [X3], [], {"axes": [0, -1], "keepdims": 0}, 11),
    ("ReduceSum", [X3], ["-"], {"noop_with_empty_axes": 1}, 13),
    ("ReduceMean", [X3], [i64(-1, 0)], {"keepdims": 0}, 18),
    ("ReduceMean", [X3], [], {"axes": [1]}, 13),
    ("ReduceMax", [X3], [], {}, 20),
    ("ReduceMin", [X3], [i64(2)], {}, 20),
    ("ReduceProd", [X3], [i64(2)], {}, 20),
    ("ReduceL1", [X3], [i64(1)], {}, 20),
    ("ReduceL2", [X3], [i64(1)], {}, 20),
    ("ReduceSumSquare", [X3], [i64(1)], {}, 20),
    ("ReduceLogSumExp", [X3], [i64(1)], {}, 20),
    ("ArgMax", [X3], [], {"axis": 1}, 20),
    ("ArgMin", [X3], [], {"axis": -1, "keepdims": 0, "select_last_index": 1}, 13),
    ("CumSum", [X3], [np.array(1, np.int64)], {"exclusive": 1, "reverse": 1}, 14),
    ("Softmax", [X4], [], {"axis": 2}, 11),
    ("Softmax", [X3], [], {}, 9),
    ("LogSoftmax", [X3], [], {"axis": 0}, 13),
    ("LpNormalization", [X3], [], {"axis": 1, "p": 2}, 20),
    ("GlobalAveragePool", [X4], [], {}, 20),
    ("GlobalMaxPool", [X4], [], {}, 20),
    ("Conv", [X4], [numbers(5, 4, 3, 2)], {"pads": [1, 0, 1, 1], "strides": [2, 1]}, 20),
    ("Conv", [X4], [numbers(8, 2, 3, 3), numbers(8)], {"group": 2, "dilations": [2, 1]}, 11),
    ("Conv", [X4], [numbers(4, 1, 3, 3)],
     {"group": 4, "auto_pad": "SAME_UPPER", "strides": [2, 2]}, 20),
    ("Conv", [X3], [numbers(2, 3, 3)], {"auto_pad": "SAME_LOWER"}, 20),
    ("ConvTranspose", [X4], [numbers(4, 3, 3, 3), numbers(3)],
     {"strides": [2, 2], "pads": [1, 1, 1, 1]}, 20),
    ("ConvTranspose", [X4], [numbers(4, 2, 2, 2)],
     {"strides": [2, 2], "output_padding": [1, 1]}, 11),
    ("MaxPool", [X4], [], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]}, 20),
    ("MaxPool", [X4], [], {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}, 12),
    ("AveragePool", [X4], [],
     {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}, 19),
    ("AveragePool", [X4], [], {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER"}, 11),
    ("LpPool", [X4], [], {"kernel_shape": [2, 2]}, 18),
    ("BatchNormalization", [X4], [numbers(4, seed=s, low=0.5) for s in range(4)],
     {}, 15),
    ("InstanceNormalization", [X4], [numbers(4), numbers(4, seed=1)], {"epsilon": 1e-3}, 20),
    ("GroupNormalization", [X4], [numbers(2), numbers(2, seed=1)], {"num_groups": 2}, 18),
    ("LayerNormalization", [X3], [numbers(4), numbers(4, seed=1)], {"axis": -1}, 17),
    ("LRN", [X4], [], {"size": 3}, 13),
    ("MatMul", [X3, numbers(2, 4, 5)], [], {}, 13),
    ("Gemm", [POS, numbers(4, 3), f32(1, 2, 3, 4)], [],
     {"transB": 1, "alpha": 0.5, "beta": 2.0}, 13),
    ("Gemm", [numbers(3, 2), numbers(3, 4)], [], {"transA": 1}, 11),
    ("Reshape", [X3], [i64(0, -1)], {}, 14),
    ("Flatten", [X4], [], {"axis": 2}, 13),
    ("Flatten", [X4], [], {"axis": -1}, 13),
    ("Transpose", [X4], [], {"perm": [0, 2, 3, 1]}, 13),
    ("Transpose", [X3], [], {}, 13),
    ("Squeeze", [X3[:1]], [i64(0)], {}, 13),
    ("Squeeze", [X3[:1]], [], {"axes": [0]}, 11),
    ("Squeeze", [X3[:1]], [], {}, 13),
    ("Unsqueeze", [X3], [i64(0, -1)], {}, 13),
    ("Unsqueeze", [X3], [], {"axes": [1, 3]}, 11),
    ("Expand", [POS], [i64(4, 1, 3)], {}, 13),
    ("Concat", [X3, X3[:, :, :2]], [], {"axis": -1}, 13),
    ("Tile", [POS], [i64(2, 3)], {}, 13),
    ("Slice", [X4], [i64(1, -3), i64(100, -1), i64(1, 3)], {}, 13),
    ("Slice", [X4], [i64(5), i64(-100), i64(2), i64(-2)], {}, 13),
    ("Slice", [X4], [], {"starts": [1], "ends": [3], "axes": [2]}, 9),
    ("Pad", [X3], [i64(0, 1, 2, 0, 0, 1), f32(1.5).reshape(())], {}, 13),
    ("Pad", [X3], [], {"pads": [0, 1, 0, 0, 0, 1], "mode": "reflect"}, 7),
    ("Pad", [X3], [i64(1, 2), "-", i64(-1)], {"mode": "edge"}, 18),
    ("Gather", [X3, i64(1, -1)], [], {"axis": 1}, 13),
    ("GatherElements", [I64, I64 % 3], [], {"axis": 1}, 13),
    ("GatherND", [X3, np.array([[0, 1], [1, 2]], np.int64)], [], {}, 13),
    ("OneHot", [i64(0, 2, -1)], [np.array(3, np.int64), f32(0, 1)], {"axis": 0}, 11),
    ("Trilu", [X3], [np.array(1, np.int64)], {"upper": 0}, 14),
    ("DepthToSpace", [X4], [], {"blocksize": 2, "mode": "CRD"}, 13),
    ("SpaceToDepth", [X4[:, :, :6]], [], {"blocksize": 2}, 13),
    ("Resize", [X4], ["-", f32(1, 1, 2, 2)],
     {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}, 13),
    ("Resize", [X4], ["-", "-", i64(2, 4, 5, 9)], {"mode": "linear"}, 19),
    # Half an element behind the first one, where it is rounded to float32.
    ("Resize", [X4[:, :, :6]], [f32(0, 0, 0.1, 0.1, 1, 1, 0.8, 0.8), "-", i64(2, 4, 3, 3)],
     {"coordinate_transformation_mode": "tf_crop_and_resize"}, 18),
    ("Upsample", [X4], [f32(1, 1, 2, 2)], {}, 9),
    ("Shape", [X4], [], {"start": 1}, 15),
    ("Size", [X4], [], {}, 13),
    ("ConstantOfShape", [], [i64(2, 3)],
     {"value": helper.make_tensor("v", TensorProto.INT64, [1], [7])}, 9),
    ("Range", [], [np.array(1, np.int64), np.array(9, np.int64), np.array(3, np.int64)], {}, 11),
    ("Range", [], [np.float32(0), np.float32(1), np.float32(0.25)], {}, 11),
    ("EyeLike", [POS], [], {"k": 1}, 9),
    # Without a converter of their own: expanded through the specification.
    ("MeanVarianceNormalization", [X4], [], {}, 13),
    ("SoftmaxCrossEntropyLoss", [POS, i64(2, 0)], [], {"reduction": "none"}, 13),
]  # fmt: skip


def build(case: Case) -> tuple[onnx.ModelProto, dict[str, Array]]:
    op, inputs, constants, attrs, opset = case
    feeds = {f"x{k}": a for k, a in enumerate(inputs)}
    fixed = {f"c{k}": np.asarray(a) for k, a in enumerate(constants) if not isinstance(a, str)}
    names = [*feeds, *("-" if isinstance(a, str) else f"c{k}" for k, a in enumerate(constants))]
    return model([node(op, " ".join(names), "y", **attrs)], feeds, ["y"], fixed, opset), feeds


@pytest.mark.parametrize("case", CASES, ids=[f"{c[0]}-{c[4]}-{k}" for k, c in enumerate(CASES)])
def test_an_operator_means_what_onnxruntime_computes(case: Case) -> None:
    m, feeds = build(case)
    check(m, feeds, length=64)


def test_split_by_attribute_input_and_count() -> None:
    old = model([node("Split", "x", "a b", axis=2, split=[1, 3])], {"x": X3}, ["a", "b"], opset=11)
    check(old, {"x": X3})
    sizes = model([node("Split", "x s", "a b", axis=1)], {"x": X3}, ["b", "a"], {"s": i64(1, 2)})
    check(sizes, {"x": X3})
    even = model([node("Split", "x", "a b", axis=0, num_outputs=2)], {"x": X3}, ["a", "b"])
    check(even, {"x": X3})


@pytest.mark.parametrize("name", sorted(CONVERTERS.keys() - CONTRIB.keys() - ATTENTION.keys()))
def test_every_row_of_the_table_names_an_onnx_operator(name: str) -> None:
    domain, _, op = name.rpartition(".")
    assert onnx.defs.has(op, domain)


# ---- whole models -------------------------------------------------------------------------------
def attention_model() -> onnx.ModelProto:
    """Shape arithmetic as exporters write it: heads are split by sizes read at run time."""
    weights = {f"w{k}": numbers(8, 8, seed=k) for k in range(3)}
    nodes = [node("MatMul", f"x w{k}", f"p{k}") for k in range(3)]
    nodes += [
        node("Shape", "x", "s"),
        node("Gather", "s zero", "b", axis=0),
        node("Gather", "s one", "t", axis=0),
        node("Unsqueeze", "b zeros", "b1"),
        node("Unsqueeze", "t zeros", "t1"),
        node("Concat", "b1 t1 heads", "target", axis=0),
        node("Concat", "b1 t1 rest", "back", axis=0),
    ]
    for k, perm in enumerate(([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])):
        nodes += [
            node("Reshape", f"p{k} target", f"r{k}"),
            node("Transpose", f"r{k}", f"h{k}", perm=perm),
        ]
    nodes += [
        node("MatMul", "h0 h1", "scores"),
        node("Softmax", "scores", "probs", axis=-1),
        node("MatMul", "probs h2", "mixed"),
        node("Transpose", "mixed", "m1", perm=[0, 2, 1, 3]),
        node("Reshape", "m1 back", "y"),
    ]
    constants = {
        **weights, "zero": np.array(0), "one": np.array(1), "zeros": i64(0), "heads": i64(2, 4),
        "rest": i64(-1),
    }  # fmt: skip
    x = numbers(2, 5, 8)
    return model(nodes, {"x": x}, ["y"], constants, shapes={"x": ("batch", "time", 8)})


def test_shape_arithmetic_dissolves() -> None:
    fn = check(attention_model(), {"x": numbers(2, 5, 8)}, length=256)
    check(attention_model(), {"x": numbers(3, 1, 8)}, length=256)
    assert {v.op.name for v in applies(fn)} == {"matmul", "reshape", "transpose", "softmax"}
    batch, time, _ = fn.params[0].type.shape
    assert isinstance(batch, Dim) and batch.name == "batch"
    assert fn.results[0].type.shape == (batch, time, Const(8))


def test_dims_take_bounds_and_numbers() -> None:
    fn = load(attention_model(), {"batch": (1, 64), "time": (3, 500, 8)})
    batch, time, _ = fn.params[0].type.shape
    assert (batch.lo, batch.hi, batch.multiple_of) == (1, 64, 1)
    assert (time.lo, time.hi, time.multiple_of) == (8, 496, 8)
    fixed = load(attention_model(), {"batch": 2})
    assert fixed.params[0].type.shape[0] is Const(2)


def test_locations_and_names_come_from_the_model(tmp_path: Path) -> None:
    m = model([node("Relu", "x", "a"), node("Neg", "a", "y")], {"x": X3}, ["y"])
    path = tmp_path / "net.onnx"
    onnx.save(m, path)
    fn = load(path)
    assert fn.name == "net" and fn.result_names == ("y",)
    (relu, neg) = applies(fn)
    assert (relu.name, neg.name) == ("a", "y")
    (loc,) = neg.locs
    assert (loc.name, loc.file, loc.line, loc.op) == ("n_y", "net.onnx", 2, "Neg")


def test_constants_are_views_and_never_nodes() -> None:
    w = numbers(3, 4)
    m = model(
        [node("Constant", "", "c", value=numpy_helper.from_array(w)), node("Add", "x c", "y")],
        {"x": X3},
        ["y"],
    )
    fn = check(m, {"x": X3})
    (add,) = applies(fn)
    assert isinstance(add.args[1], Constant)
    weights = load(model([node("Add", "x w", "y")], {"x": X3}, ["y"], {"w": w}).SerializeToString())
    (add,) = applies(weights)
    assert not add.args[1].data.flags.owndata


def test_an_input_that_is_also_an_initializer_is_a_constant() -> None:
    m = model([node("Add", "x w", "y")], {"x": X3, "w": X3}, ["y"], {"w": X3})
    assert [p.name for p in load(m).params] == ["x"]


def test_nodes_may_come_in_any_order() -> None:
    m = model([node("Neg", "a", "y"), node("Relu", "x", "a")], {"x": X3}, ["y"])
    np.testing.assert_array_equal(run_reference(load(m), {"x": X3})[0], -np.maximum(X3, 0))


def test_the_functions_of_a_model_are_inlined() -> None:
    body = [node("Mul", "a a", "q"), helper.make_node("LeakyRelu", ["q"], ["r"])]
    alpha = onnx.AttributeProto(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT)
    body[1].attribute.append(alpha)
    f = helper.make_function(
        "own", "Square", ["a"], ["r"], body, [helper.make_opsetid("", 20)], ["slope"]
    )
    calls = [
        node("Square", "x", "s", domain="own", slope=0.5),
        node("Square", "s", "y", domain="own", slope=0.1),
    ]
    m = model(calls,
              {"x": X3}, ["y"], {"unused": numbers(2)})  # fmt: skip
    m.functions.append(f)
    m.opset_import.append(helper.make_opsetid("own", 1))
    fn = check(m, {"x": X3})
    assert [v.op.name for v in applies(fn)] == ["mul", "leaky_relu"] * 2


def test_a_condition_that_is_known_chooses_its_branch() -> None:
    def graph(op: str) -> Any:
        out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
        return helper.make_graph([node(op, "x", "mid"), node("Add", "mid w", "out")], op, [], [out])

    nodes = [
        node("Shape", "x", "s", start=2),
        node("Equal", "s four", "cond"),
        node("If", "cond", "y", then_branch=graph("Neg"), else_branch=graph("Abs")),
    ]
    m = model(nodes, {"x": X3}, ["y"], {"four": i64(4), "w": numbers(4)})
    fn = check(m, {"x": X3})
    assert [v.op.name for v in applies(fn)] == ["neg", "add"]
    # With a symbolic size both branches stay.
    m = model(
        nodes,
        {"x": X3},
        ["y"],
        {"four": i64(4), "w": numbers(4)},
        shapes={"x": (2, 3, "n")},
    )
    fn = check(m, {"x": X3})
    assert [v.op.name for v in applies(fn)][-1] == "cond"


def test_a_dropout_has_a_mask_of_ones() -> None:
    m = model([node("Dropout", "x", "y mask")], {"x": X3}, ["y", "mask"], opset=13)
    check(m, {"x": X3})


def test_a_result_may_be_an_input_or_a_constant() -> None:
    m = model([node("Neg", "x", "y")], {"x": X3}, ["y", "x", "w"], {"w": i64(1, 2)})
    fn = load(m)
    assert isinstance(fn.results[0], Apply)
    assert fn.results[1] is fn.params[0] and isinstance(fn.results[2], Constant)


# ---- external data ------------------------------------------------------------------------------
def external(folder: Path, location: str, data: bytes | None = None, **entries: str) -> Path:
    """A model whose weight `w` (12 float32) lies in the file `location`."""
    m = model([node("Add", "x w", "y")], {"x": X3}, ["y"], {"w": numbers(3, 4)})
    (w,) = m.graph.initializer
    w.ClearField("raw_data")
    w.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        w.external_data.add(key=key, value=value)
    if data is not None:
        (folder / location).parent.mkdir(parents=True, exist_ok=True)
        (folder / location).write_bytes(data)
    path = folder / "net.onnx"
    path.write_bytes(m.SerializeToString())
    return path


def test_external_data_is_mapped(tmp_path: Path) -> None:
    w = numbers(3, 4)
    fn = load(external(tmp_path, "sub/w.bin", b"\0" * 8 + w.tobytes(), offset="8", length="48"))
    (add,) = applies(fn)
    assert isinstance(add.args[1].data, np.memmap)
    np.testing.assert_array_equal(add.args[1].data, w)


@pytest.mark.parametrize(
    "location", ["../w.bin", "/etc/passwd", "a/../../w.bin", "C:\\w.bin", "..\\w.bin", ""]
)
def test_external_data_stays_in_the_folder(tmp_path: Path, location: str) -> None:
    with pytest.raises(ImportModelError, match="not a path inside the model's folder"):
        load(external(tmp_path, location))


def test_external_links_do_not_lead_out(tmp_path: Path) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    secret = tmp_path / "secret"
    secret.write_bytes(b"\0" * 48)
    path = external(inside, "w.bin")
    os.symlink(secret, inside / "w.bin")
    with pytest.raises(ImportModelError, match="link that leads out"):
        load(path)
    (inside / "w.bin").unlink()
    os.link(secret, inside / "w.bin")
    with pytest.raises(ImportModelError, match="hard link"):
        load(path)
    (inside / "w.bin").unlink()
    os.mkfifo(inside / "w.bin")
    with pytest.raises(ImportModelError, match="not a regular file"):
        load(path)
    with pytest.raises(ImportModelError, match="not given as a path"):
        load(path.read_bytes())


def test_external_data_that_is_cut_short(tmp_path: Path) -> None:
    with pytest.raises(ImportModelError, match="ends at byte 48"):
        load(external(tmp_path, "w.bin", b"\0" * 40))
    with pytest.raises(ImportModelError, match="cannot be opened"):
        load(external(tmp_path, "absent.bin"))


def test_sizes_that_exporters_compute_in_floats() -> None:
    nodes = [
        node("Shape", "x", "shape"), node("Gather", "shape one", "h"),
        node("Cast", "h", "f", to=TensorProto.FLOAT), node("Div", "f two", "half"),
        node("Ceil", "half", "up"), node("Cast", "up", "k", to=TensorProto.INT64),
        node("Unsqueeze", "k zero", "k1"), node("Concat", "rest k1", "to", axis=0),
        node("Reshape", "x to", "y"),
    ]  # fmt: skip
    constants = {"one": np.array(1), "two": np.array(2, np.float32), "zero": np.array([0]),
                 "rest": np.array([-1])}  # fmt: skip
    x = numbers(4, 6)
    check(model(nodes, {"x": x}, ["y"], constants), {"x": x})
