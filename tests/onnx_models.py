"""Small ONNX models for tests, and onnxruntime as an oracle from outside.

m = model([node("Relu", "x", "y")], {"x": array}, ["y"])
check(m, {"x": array})        load + numpy reference = onnxruntime
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)
from tolerance import assert_close

from minicompiler.frontend.onnx import load
from minicompiler.ir.graph import Function
from minicompiler.ir.verify import verify_function
from minicompiler.ops.evaluate import run_reference

Array = np.ndarray
OPSET = 20
KINDS = {"f": TensorProto.FLOAT, "i": TensorProto.INT64, "b": TensorProto.BOOL}
NUMBER = np.array(0)


def node(op: str, inputs: str, outputs: str, **attrs: Any) -> NodeProto:
    """A node; names are separated by blanks, `-` stands for an input left out."""
    read = ["" if i == "-" else i for i in inputs.split()]
    domain = attrs.pop("domain", "")
    return helper.make_node(
        op, read, outputs.split(), f"n_{outputs.split()[0]}", domain=domain, **attrs
    )


def model(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, Array],
    outputs: Sequence[str],
    constants: Mapping[str, Array] | None = None,
    opset: int = OPSET,
    shapes: Mapping[str, Sequence[Any]] | None = None,
) -> ModelProto:
    """A model; `shapes` gives inputs symbolic sizes."""

    def value(name: str, a: Array) -> Any:
        of = (shapes or {}).get(name, a.shape)
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), of)

    results = [helper.make_tensor_value_info(o, TensorProto.UNDEFINED, None) for o in outputs]
    for r in results:
        r.ClearField("type")
    graph = helper.make_graph(
        list(nodes),
        "net",
        [value(n, a) for n, a in inputs.items()],
        results,
        [numpy_helper.from_array(a, n) for n, a in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def value(text: str) -> ValueInfoProto:
    """`k:i` is int64[], `x:f?,3` float32[?, 3]."""
    name, _, kind = text.partition(":")
    if not kind:
        return helper.make_empty_tensor_value_info(name)
    shape = [None if s == "?" else int(s) for s in kind[1:].split(",") if s]
    return helper.make_tensor_value_info(name, KINDS[kind[0]], shape)


def graph(
    inputs: str, nodes: Sequence[NodeProto], outputs: str, constants: Mapping[str, Any] = {}
) -> GraphProto:
    """What a branch or a loop runs."""
    tensors = [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()]
    values = ([value(v) for v in text.split()] for text in (inputs, outputs))
    ins, outs = values
    return helper.make_graph(list(nodes), "body", ins, outs, tensors)


def reference_of(m: ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    """What onnxruntime computes, without its optimisations."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(m.SerializeToString(), options, ["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def check(
    m: ModelProto, feeds: Mapping[str, Array], length: int = 16, dims: Any = None
) -> Function:
    """Imports and verifies the model and compares its numpy meaning with onnxruntime."""
    fn = load(m, dims)
    verify_function(fn)
    for got, want in zip(run_reference(fn, feeds), reference_of(m, feeds), strict=True):
        assert_close(np.asarray(got), np.asarray(want), length)
    return fn


def numbers(*shape: int, seed: int = 0, low: float = -2, high: float = 2) -> Array:
    """Evenly distributed float32 values."""
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


# ---- whole models --------------------------------------------------------------------------------
def _drawn(seed: int, *shapes: tuple[int, ...]) -> list[Array]:
    """Weights whose products keep the size of what they are multiplied with."""
    rng = np.random.default_rng(seed)
    scale = [max(1, int(np.prod(s[1:] if len(s) == 4 else s[:-1]))) ** -0.5 for s in shapes]
    return [
        (rng.standard_normal(s) * k).astype(np.float32) for s, k in zip(shapes, scale, strict=True)
    ]


def mlp(batch: int | str = 1) -> ModelProto:
    """x[batch, 20] -> y[batch, 7] through one hidden layer of 33."""
    w1, b1, w2, b2 = _drawn(1, (20, 33), (33,), (33, 7), (7,))
    nodes = [
        node("MatMul", "x w1", "a"),
        node("Add", "a b1", "b"),
        node("Relu", "b", "h"),
        node("Gemm", "h w2 b2", "y"),
    ]
    constants = {"w1": w1, "b1": b1, "w2": w2, "b2": b2}
    return model(nodes, {"x": numbers(1, 20)}, ["y"], constants, shapes={"x": (batch, 20)})


def conv_net(batch: int | str = 1) -> ModelProto:
    """x[batch, 3, 13, 13] -> y[batch, 5]: convolutions, norm, a way around, pooling, softmax."""
    c1, c2, c3, scale, shift, mean, fc = _drawn(
        2, (8, 3, 3, 3), (8, 8, 3, 3), (12, 8, 3, 3), (8,), (8,), (8,), (12, 5)
    )
    nodes = [
        node("Conv", "x c1", "a", pads=[1, 1, 1, 1]),
        node("BatchNormalization", "a scale shift mean var", "b"),
        node("Relu", "b", "c"),
        node("Conv", "c c2", "d", pads=[1, 1, 1, 1]),
        node("Add", "d c", "e"),
        node("MaxPool", "e", "f", kernel_shape=[3, 3], strides=[2, 2]),
        node("Conv", "f c3", "g", strides=[2, 2]),
        node("GlobalAveragePool", "g", "h"),
        node("Flatten", "h", "i"),
        node("MatMul", "i fc", "j"),
        node("Softmax", "j", "y"),
    ]
    var = np.linspace(0.5, 2, 8, dtype=np.float32)
    constants = {
        "c1": c1, "c2": c2, "c3": c3, "scale": scale, "shift": shift, "mean": mean, "var": var,
        "fc": fc,
    }  # fmt: skip
    shape = (batch, 3, 13, 13)
    return model(nodes, {"x": numbers(1, 3, 13, 13)}, ["y"], constants, shapes={"x": shape})


def attention(batch: int | str = 1, sequence: int | str = 6) -> ModelProto:
    """x[batch, sequence, 24] -> y of the same shape: a transformer block's attention, 3 heads."""
    names = ("wq", "wk", "wv", "wo")
    constants = dict(zip(names, _drawn(3, *[(24, 24)] * 4), strict=True))
    constants |= {
        "split": np.array([0, 0, 3, 8]), "join": np.array([0, 0, 24]),
        "scale": np.array(8**-0.5, np.float32), "gain": numbers(24, seed=4),
        "bias": numbers(24, seed=5),
    }  # fmt: skip
    nodes = []
    for k, perm in (("q", (0, 2, 1, 3)), ("k", (0, 2, 3, 1)), ("v", (0, 2, 1, 3))):
        nodes += [
            node("MatMul", f"x w{k}", f"{k}1"),
            node("Reshape", f"{k}1 split", f"{k}2"),
            node("Transpose", f"{k}2", f"{k}3", perm=perm),
        ]
    nodes += [
        node("MatMul", "q3 k3", "s"),
        node("Mul", "s scale", "t"),
        node("Softmax", "t", "p"),
        node("MatMul", "p v3", "a"),
        node("Transpose", "a", "b", perm=(0, 2, 1, 3)),
        node("Reshape", "b join", "c"),
        node("MatMul", "c wo", "d"),
        node("Add", "d x", "e"),
        node("LayerNormalization", "e gain bias", "y"),
    ]
    x = numbers(1, 6, 24)
    return model(nodes, {"x": x}, ["y"], constants, shapes={"x": (batch, sequence, 24)})
