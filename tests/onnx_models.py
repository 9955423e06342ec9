"""Small ONNX models for tests, and onnxruntime as an oracle from outside.

m = model([node("Relu", "x", "y")], {"x": array}, ["y"])
check(m, {"x": array})        load + numpy reference = onnxruntime
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from tolerance import assert_close

from minicompiler.frontend.onnx import load
from minicompiler.ir.graph import Function
from minicompiler.ir.verify import verify_function
from minicompiler.ops.evaluate import run_reference

Array = np.ndarray
OPSET = 20


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
