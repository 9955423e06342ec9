"""Operators: infer = reference = evaluated compute over samples, spot checks, symbolic shapes.

Law 3 (first half): for every operator and every compute that applies, the type rule gives the
reference's shape and dtype, and the compute evaluated in numpy gives the reference's values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from tolerance import assert_close

import minicompiler.ops  # noqa: F401
from minicompiler import te
from minicompiler.errors import ShapeError
from minicompiler.ir import graph
from minicompiler.ir.arith import evaluate_int
from minicompiler.ir.expr import Const, Dim, Expr, select
from minicompiler.ir.graph import Constant, Function, Input, apply
from minicompiler.ir.op import REGISTRY, Arg, Op
from minicompiler.ir.types import DType, TensorType, dtype_of, float32, int64
from minicompiler.ops.evaluate import bind_attrs, evaluate, is_symbolic, run_reference
from minicompiler.ops.pool import PoolAttrs
from minicompiler.ops.resize import ResizeAttrs

Array = np.ndarray


def typed(a: Array | None) -> Arg | None:
    return None if a is None else Arg(TensorType(tuple(map(Const, a.shape)), dtype_of(a)))


def as_tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def evaluated(op: Op, which: int, arrays: list[Array | None], attrs: Any) -> list[Array]:
    """The results of a compute of `op`."""
    params = [
        None if a is None else te.placeholder(f"p{k}", a.shape, dtype_of(a))
        for k, a in enumerate(arrays)
    ]
    results = as_tuple(op.computes[which].build(*params, attrs))
    feeds = {p: a for p, a in zip(params, arrays, strict=True) if p is not None and a is not None}
    return evaluate(results, feeds, {})


_ONE = inspect.Parameter.POSITIONAL_OR_KEYWORD


def unary_float(op: Op) -> bool:
    """True for functions of one float tensor that keep its shape."""
    if [p.kind for p in inspect.signature(op.infer).parameters.values()] != [_ONE, _ONE]:
        return False
    try:
        t = op.infer(Arg(TensorType((Const(3),), float32)), op.attrs())
    except ShapeError:
        return False
    return isinstance(t, TensorType) and t.shape == (Const(3),)


# ---- law 3 --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_infer_reference_and_compute_agree(name: str) -> None:
    op = REGISTRY[name]

    @settings(
        max_examples=15,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def check(data: st.DataObject) -> None:
        arrays, attrs = op.samples(data.draw)
        args = [typed(a) for a in arrays]
        with np.errstate(all="ignore"):
            want = as_tuple(op.reference(*arrays, attrs))
        types = as_tuple(op.infer(*args, attrs))
        assert len(types) == len(want)
        for t, w in zip(types, want, strict=True):
            assert isinstance(w, np.ndarray)
            assert tuple(evaluate_int(s, {}) for s in t.shape) == w.shape
            assert t.dtype.numpy == w.dtype
        inputs = [a.astype(np.float64) for a in arrays if a is not None and a.size]
        largest = max((float(np.abs(a).max()) for a in inputs), default=1.0)
        largest = max(largest, 1.0)  # exp(x) - 1 and the like cancel numbers around 1
        length = max((a.size for a in arrays if a is not None), default=1)
        for k, compute in enumerate(op.computes):
            if compute.applies is None or compute.applies([a and a.type for a in args], attrs):
                got = evaluated(op, k, arrays, attrs)
                for g, w in zip(got, want, strict=True):
                    assert_close(g, w, length, largest)

    check()


SPECIAL = np.array(
    [np.nan, np.inf, -np.inf, -0.0, 0.0, 88, -88, 100, -100, 1e-10, -1e-10, 1e-4, 30.5, -30.5],
    dtype=np.float32,
)


@pytest.mark.parametrize("name", [n for n, o in sorted(REGISTRY.items()) if unary_float(o)])
def test_special_values_pass_through_as_in_numpy(name: str) -> None:
    """NaN, infinities, zeros, and where exponentials overflow."""
    op = REGISTRY[name]
    with np.errstate(all="ignore"):
        want = op.reference(SPECIAL, op.attrs())
    got = evaluated(op, 0, [SPECIAL], op.attrs())[0]
    np.testing.assert_allclose(got.astype(float), want.astype(float), rtol=1e-5, atol=1e-7)


def test_evaluate_refuses_an_index_outside_the_tensor() -> None:
    x = te.placeholder("x", (3,), float32)
    shifted = te.compute((3,), lambda i: x[i + 1], "shifted")
    with pytest.raises(IndexError, match="shifted: 3 in x"):
        evaluate([shifted], {x: noise(3)}, {})
    guarded = te.compute((3,), lambda i: select(i < 2, x[i + 1], x[i]), "guarded")
    data = noise(3)
    assert_close(evaluate([guarded], {x: data}, {})[0], data[[1, 2, 2]])


# ---- spot checks against onnxruntime ------------------------------------------------------------
def onnx_run(
    op_type: str, inputs: list[Array], attrs: dict[str, Any], result: int = TensorProto.FLOAT
) -> Array:
    """One ONNX node in onnxruntime."""
    names = [f"x{k}" for k in range(len(inputs))]
    given_names = [n if a.size else "" for n, a in zip(names, inputs, strict=True)]
    node = helper.make_node(op_type, given_names, ["y"], **attrs)
    infos = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in zip(names, inputs, strict=True)
        if a.size
    ]
    out = helper.make_tensor_value_info("y", result, None)
    model = helper.make_model(
        helper.make_graph([node], "g", infos, [out]),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {n: a for n, a in zip(names, inputs, strict=True) if a.size}
    return np.asarray(session.run(None, feeds)[0])


def noise(*shape: int) -> Array:
    return np.random.default_rng(7).uniform(-2, 2, shape).astype(np.float32)


def agrees(name: str, arrays: list[Array | None], attrs: Any, want: Array) -> None:
    """infer, reference and the first compute all give what another implementation gives."""
    op = REGISTRY[name]
    t = op.infer(*[typed(a) for a in arrays], attrs)
    assert isinstance(t, TensorType)
    assert tuple(evaluate_int(s, {}) for s in t.shape) == want.shape
    with np.errstate(all="ignore"):
        assert_close(np.asarray(op.reference(*arrays, attrs)), want, 64, 4.0)
    assert_close(evaluated(op, 0, arrays, attrs)[0], want, 64, 4.0)


@pytest.mark.parametrize("include", [0, 1])
@pytest.mark.parametrize("ceil", [0, 1])
@pytest.mark.parametrize(("size", "kernel", "stride", "pads"), [
    (7, 3, 2, (1, 1)), (8, 3, 2, (0, 0)), (10, 2, 3, (1, 0)), (9, 4, 3, (2, 1)), (6, 1, 4, (0, 0)),
])  # fmt: skip
def test_pools_agree_with_onnxruntime(
    size: int, kernel: int, stride: int, pads: tuple[int, int], ceil: int, include: int
) -> None:
    x = noise(1, 2, size, size + 1)
    given_attrs = {
        "kernel_shape": [kernel] * 2,
        "strides": [stride] * 2,
        "pads": [pads[0]] * 2 + [pads[1]] * 2,
        "ceil_mode": ceil,
    }
    a = PoolAttrs((kernel,) * 2, (stride,), (pads[0],), (pads[1],), (), bool(ceil), bool(include))
    agrees("max_pool", [x], a, onnx_run("MaxPool", [x], given_attrs))
    averaged = onnx_run("AveragePool", [x], {**given_attrs, "count_include_pad": include})
    agrees("avg_pool", [x], a, averaged)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions_agree_with_onnxruntime(rank: int, groups: int) -> None:
    strides, dilations = (2, 1, 2)[:rank], (1, 2, 1)[:rank]
    begin, end = (1, 0, 2)[:rank], (0, 2, 1)[:rank]
    given_attrs = {
        "strides": strides, "dilations": dilations, "pads": [*begin, *end], "group": groups,
    }  # fmt: skip
    x, bias = noise(2, 4, *(7, 8, 6)[:rank]), noise(8)
    w = noise(8, 4 // groups, *(3, 2, 3)[:rank])
    conv = REGISTRY["conv"]
    a = conv.attrs(strides, begin, end, dilations, groups)
    agrees("conv", [x, w, bias], a, onnx_run("Conv", [x, w, bias], given_attrs))
    w = noise(4, 8 // groups, *(3, 2, 3)[:rank])
    extra = (1, 0, 1)[:rank]
    turned = REGISTRY["conv_transpose"]
    b = turned.attrs(strides, begin, end, dilations, extra, groups)
    given_attrs["output_padding"] = extra
    agrees("conv_transpose", [x, w, bias], b, onnx_run("ConvTranspose", [x, w, bias], given_attrs))


def whole(*values: Any) -> Array:
    return np.array(values, dtype=np.int64)


SPOT: list[tuple[str, list[Array], dict[str, Any], str, list[Array | None], dict[str, Any]]] = [
    ("LRN", [noise(1, 7, 3, 3)], {"size": 3, "alpha": 0.5}, "lrn", [], {"size": 3, "alpha": 0.5}),
    ("DepthToSpace", [noise(1, 8, 2, 3)], {"blocksize": 2}, "depth_to_space", [], {}),
    ("DepthToSpace", [noise(1, 8, 2, 3)], {"blocksize": 2, "mode": "CRD"}, "depth_to_space", [],
     {"channels_first": True}),
    ("SpaceToDepth", [noise(1, 2, 4, 6)], {"blocksize": 2}, "space_to_depth", [], {}),
    ("CumSum", [noise(2, 5), np.array(1)], {"exclusive": 1, "reverse": 1}, "cumsum",
     [noise(2, 5)], {"axis": 1, "exclusive": True, "reverse": True}),
    ("GatherND", [noise(2, 3, 4), whole([[1], [-1]], [[0], [2]])], {"batch_dims": 1}, "gather_nd",
     [], {"batch_dims": 1}),
    ("GatherElements", [noise(3, 4), whole([0, -1], [2, 1])], {"axis": 1}, "gather_elements", [],
     {"axis": 1}),
    ("LpPool", [noise(1, 2, 7, 7)], {"kernel_shape": [3, 2], "p": 3, "strides": [2, 2]}, "lp_pool",
     [], {"kernel": (3, 2), "strides": (2,), "p": 3}),
    ("GroupNormalization", [noise(2, 6, 3), noise(6), noise(6)], {"num_groups": 2}, "group_norm",
     [], {"groups": 2}),
    ("InstanceNormalization", [noise(2, 3, 4), noise(3), noise(3)], {}, "group_norm", [], {}),
    ("LayerNormalization", [noise(2, 3, 4), noise(3, 4), noise(3, 4)], {"axis": 1}, "layer_norm",
     [], {"axis": 1}),
    ("BatchNormalization", [noise(2, 3, 4), *(noise(3),) * 3, np.abs(noise(3))], {}, "batch_norm",
     [], {}),
    ("Trilu", [noise(3, 4), np.array(-1)], {"upper": 0}, "trilu", [noise(3, 4)],
     {"upper": False, "k": -1}),
    ("Gelu", [noise(9)], {"approximate": "tanh"}, "gelu", [], {"approximate": "tanh"}),
    ("Selu", [noise(9)], {}, "selu", [], {}),
    ("Celu", [noise(9)], {"alpha": 2.0}, "celu", [], {"alpha": 2.0}),
    ("HardSwish", [noise(9) * 3], {}, "hard_swish", [], {}),
    ("HardSigmoid", [noise(9) * 3], {}, "hard_sigmoid", [], {}),
    ("Mish", [noise(9)], {}, "mish", [], {}),
    ("Shrink", [noise(9)], {"bias": 0.2, "lambd": 0.7}, "shrink", [], {"bias": 0.2, "lambd": 0.7}),
    ("PRelu", [noise(2, 3, 4), noise(3, 1)], {}, "prelu", [], {}),
    ("Mod", [noise(9) * 3, noise(9) + 2.5], {"fmod": 1}, "fmod", [], {}),
    ("ReduceLogSumExp", [noise(2, 3), whole(1)], {"keepdims": 0}, "reduce_log_sum_exp",
     [noise(2, 3)], {"axes": (1,), "keepdims": False}),
    ("Pad", [noise(3, 4), whole(1, 2, 0, 1)], {"mode": "reflect"}, "pad", [noise(3, 4)],
     {"begin": (1, 2), "end": (0, 1), "mode": "reflect"}),
    ("OneHot", [whole(1, -1, 5), np.array(4), whole(2, 7).astype(np.float32)], {"axis": 0},
     "one_hot", [whole(1, -1, 5), whole(2, 7).astype(np.float32)], {"depth": 4, "axis": 0}),
]  # fmt: skip


@pytest.mark.parametrize("case", SPOT, ids=[f"{c[0]}-{k}" for k, c in enumerate(SPOT)])
def test_onnx_operators_agree_with_onnxruntime(case: Any) -> None:
    op_type, inputs, onnx_attrs, name, own, attrs = case
    want = onnx_run(op_type, inputs, onnx_attrs)
    agrees(name, own or inputs, REGISTRY[name].attrs(**attrs), want)


@pytest.mark.parametrize("rounding", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
@pytest.mark.parametrize("coordinates", ["half_pixel", "asymmetric", "align_corners"])
@pytest.mark.parametrize("sizes", [(8, 10), (3, 9), (2, 2), (11, 5)])
def test_resize_agrees_with_onnxruntime(
    sizes: tuple[int, int], coordinates: str, rounding: str
) -> None:
    x = noise(1, 2, 4, 5)
    empty = np.zeros(0, np.float32)
    target = np.array([1, 2, *sizes], dtype=np.int64)
    for mode in ("nearest", "linear"):
        if mode == "linear" and rounding != "floor":
            continue
        want = onnx_run(
            "Resize",
            [x, empty, empty, target],
            {
                "mode": mode,
                "coordinate_transformation_mode": coordinates,
                "nearest_mode": rounding,
            },
        )
        agrees("resize", [x], ResizeAttrs((1, 2, *sizes), (), mode, coordinates, rounding), want)


def test_resize_by_two_divides_the_index() -> None:
    x = te.placeholder("x", (1, 1, 4, 4), float32)
    for coordinates, rounding in (("asymmetric", "floor"), ("half_pixel", "round_prefer_floor")):
        a = ResizeAttrs((), (1.0, 1.0, 2.0, 2.0), "nearest", coordinates, rounding)
        y = REGISTRY["resize"].computes[0].build(x, a)
        assert [str(i).split("//")[-1] for i in y.body.indices[2:]] == ["2", "2"], y.body


# ---- the form of contractions -------------------------------------------------------------------
def conv_body(groups: int, cin: int, cout: int, kernel: int, pad: int) -> tuple[te.Tensor, str]:
    x = te.placeholder("x", (1, cin, 8, 8), float32)
    w = te.placeholder("w", (cout, cin // groups, kernel, kernel), float32)
    a = REGISTRY["conv"].attrs((), (pad,), (pad,), (), groups)
    y = REGISTRY["conv"].computes[0].build(x, w, None, a)
    return y, str(y.body)


def test_ungrouped_convolution_has_no_group_arithmetic() -> None:
    y, text = conv_body(1, 4, 6, 3, 1)
    assert "//" not in text
    assert len(y.body.axes) == 3  # type: ignore[union-attr]
    assert [t.name for t in te.inputs(y)] == ["pad", "w"]


def test_depthwise_convolution_reduces_over_the_kernel_only() -> None:
    y, text = conv_body(4, 4, 4, 3, 0)
    assert "//" not in text
    assert len(y.body.axes) == 2  # type: ignore[union-attr]
    assert [t.name for t in te.inputs(y)] == ["x", "w"]


def test_pointwise_convolution_reduces_over_channels_only() -> None:
    y, _ = conv_body(1, 4, 6, 1, 0)
    assert len(y.body.axes) == 1  # type: ignore[union-attr]


# ---- symbolic shapes ----------------------------------------------------------------------------
B, S = Dim("batch", 1, 64), Dim("seq", 1, 128)


def op(name: str, *args: Any, **attrs: Any) -> graph.Apply:
    o = REGISTRY[name]
    values = [v if isinstance(v, graph.Value | None) else ints(v) for v in args]
    return apply(o, *values, attrs=o.attrs(**attrs))


def ints(v: Any) -> Constant:
    return Constant(np.asarray(v, dtype=np.int64))


def value(*shape: Expr | int, dtype: DType = float32) -> Input:
    sizes = tuple(Const(s) if isinstance(s, int) else s for s in shape)
    return Input("x", TensorType(sizes, dtype))


def shape_of(v: graph.Value) -> str:
    return str(graph.type_of(v)).split("[", 1)[1][:-1]


def test_shape_gather_concat_reshape_dissolves() -> None:
    """The head split of attention as exporters write it."""
    x = value(B, S, 768)
    sizes = op("shape", x)
    batch = op("unsqueeze", op("gather", sizes, 0), axes=(0,))
    length = op("unsqueeze", op("gather", sizes, 1), axes=(0,))
    target = op("concat", batch, length, [12], [-1])
    heads = op("reshape", x, target)
    assert shape_of(heads) == "batch, seq, 12, 64"
    assert [type(a) for a in heads.args] == [Input]
    back = op("reshape", op("transpose", heads, perm=(0, 2, 1, 3)), [0, 12, -1])
    assert shape_of(back) == "batch, 12, seq*64"
    merged = op("reshape", heads, op("concat", batch, length, [768]))
    assert shape_of(merged) == "batch, seq, 768"
    fn = Function("f", (x,), (merged,))
    data = noise(2, 3, 768)
    np.testing.assert_array_equal(run_reference(fn, {"x": data})[0], data)


def test_reshape_index_stays_within_its_group() -> None:
    x = te.placeholder("x", (B, S, 12, 64), float32)
    y = REGISTRY["reshape"].computes[0].build(x, REGISTRY["reshape"].attrs((0, 0, 768)))
    i = [str(v) for v in y.axes]
    assert [str(e) for e in y.body.indices] == [i[0], i[1], f"{i[2]}//64", f"{i[2]}%64"]
    flat = REGISTRY["reshape"].computes[0].build(x, REGISTRY["reshape"].attrs((-1, 768)))
    j = [str(v) for v in flat.axes]
    assert str(flat.body.indices[0]) == f"{j[0]}//seq"
    assert str(flat.body.indices[1]) == f"{j[0]}%seq"


def test_expand_to_a_computed_shape() -> None:
    """where(equal(shape, -1), ones, shape), as torch exports an Expand."""
    mask = value(B, 1, 1, S, dtype=int64)
    wanted = op("concat", op("shape", mask, end=1), [1], op("shape", mask, start=3), [-1])
    ones = op("full", [4], value=1, dtype=int64)
    chosen = op("where", op("equal", wanted, [-1]), ones, wanted)
    assert shape_of(op("expand", mask, chosen)) == "batch, 1, seq, seq"


def test_slices_of_symbolic_sizes() -> None:
    x = value(B, S, 512)
    assert shape_of(op("strided_slice", x, [0], [-1], [1])) == "batch, seq - 1, 512"
    assert shape_of(op("strided_slice", x, [-1], [1 << 62], [1])) == "batch, 1, 512"
    length = op("shape", x, start=1, end=2)
    assert shape_of(op("strided_slice", x, [0], length, [2])) == "batch, seq, seq"
    assert shape_of(op("strided_slice", x, [0], [1 << 62], [1], [2])) == "batch, (seq + 1)//2, 512"
    assert shape_of(op("strided_slice", x, [-1], [-(1 << 62)], [2], [-1])) == "batch, seq, 512"


def test_positions_follow_a_symbolic_length() -> None:
    x = value(B, S)
    n = op("gather", op("shape", x), 1)
    positions = op("arange", 0, n, 1)
    assert shape_of(positions) == "seq"
    assert shape_of(op("arange", op("sub", n, 1), n, 1)) == "1"
    fn = Function("f", (x,), (op("unsqueeze", positions, axes=(0,)),))
    np.testing.assert_array_equal(run_reference(fn, [noise(2, 5)])[0], [[0, 1, 2, 3, 4]])


def test_attributes_know_whether_they_are_numbers() -> None:
    known = op("shape", value(2, 3))
    symbolic = op("shape", value(B, 3))
    assert (is_symbolic(known.attrs), is_symbolic(symbolic.attrs)) == (False, True)
    assert bind_attrs(symbolic.attrs, {"batch": 5}).values == (5, 3)


def test_split_and_tile_and_windows_of_symbolic_sizes() -> None:
    parts = op("split", value(B, S, 2304), axis=2, parts=3)
    assert [str(t.shape[2]) for t in parts.type] == ["768"] * 3  # type: ignore[union-attr]
    assert shape_of(op("tile", value(B, S), [1, 2])) == "batch, seq*2"
    image = value(B, 3, S, S)
    w = Constant(noise(8, 3, 3, 3))
    same = op("conv", image, w, pads_begin=(1,), pads_end=(1,))
    assert shape_of(same) == "batch, 8, seq, seq"
    half = op("max_pool", same, kernel=(2, 2), strides=(2,))
    assert shape_of(half) == "batch, 8, seq//2, seq//2"


def test_symbolic_computes_evaluate_at_every_size() -> None:
    """One compute built for symbolic sizes serves all of them."""
    attrs = REGISTRY["reshape"].attrs((0, 0, 12, -1))
    x = te.placeholder("x", (B, S, 24), float32)
    y = REGISTRY["reshape"].computes[0].build(x, attrs)
    z = REGISTRY["softmax"].computes[0].build(y, REGISTRY["softmax"].attrs(1))
    for b, s in ((1, 1), (2, 5)):
        data = noise(b, s, 24)
        got = evaluate([z], {x: data}, {"batch": b, "seq": s})[0]
        softmax = REGISTRY["softmax"]
        want = softmax.reference(data.reshape(b, s, 12, 2), softmax.attrs(1))
        assert_close(got, want, s)


# ---- refusals -----------------------------------------------------------------------------------
@pytest.mark.parametrize(("make", "message"), [
    (lambda: op("matmul", value(2, 3), value(4, 5)), "inner sizes 3 and 4 differ"),
    (lambda: op("add", value(2, 3), value(4)), "cannot be broadcast"),
    (lambda: op("add", value(2), value(2, dtype=int64)), "different element types"),
    (lambda: op("reshape", value(B, 6), [0, 7]), "has batch*6 elements"),
    (lambda: op("reshape", value(B), value(2, dtype=int64)), "computed from data"),
    (lambda: op("reshape", value(2, 3), shape=(2, 0), allow_zero=True), "has 6 elements"),
    (lambda: op("reshape", value(B, 3), shape=(0, 2), allow_zero=True), "has batch*3 elements"),
    (lambda: op("reshape", value(0, 3), [0, -1]), "whatever -1 stands for"),
    (lambda: op("argmax", value(2, 0), axis=1), "axis 1 of float32[2, 0] is empty"),
    (lambda: op("conv", value(1, 3, 4, 4), value(8, 2, 3, 3)), "the input has 3 channels"),
    (lambda: op("max_pool", value(1, 3, 2, 2), kernel=(3, 3)), "does not fit spatial axis 0"),
    (lambda: op("softmax", value(2, 3), axis=2), "axis 2 is out of range"),
    (lambda: op("concat", value(2, 3), value(2, 4)), "sizes of dimension 1 do not match"),
    (lambda: op("transpose", value(2, 3), perm=(0, 0)), "is not an order"),
    (lambda: op("gather", value(2, 3), 5), "index 5 is out of range"),
    (lambda: op("col2im", value(1, 5, 5), image=(5, 5), kernel=(1, 5), strides=(1, 1),
                pads_begin=(0, 0), pads_end=(0, 0), dilations=(1,)), "2 axes, dilations 1"),
])  # fmt: skip
def test_refusals_say_what_is_wrong(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ShapeError) as caught:
        make()
    assert message in str(caught.value)


def test_undecided_sizes_are_taken_to_be_equal() -> None:
    assert shape_of(op("add", value(B, S), value(B, Dim("other", 1, 64)))) == "batch, seq"
