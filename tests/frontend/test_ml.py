"""Operators of ai.onnx.ml that are not trees, against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import ValueInfoProto, helper

import minicompiler as mc
from minicompiler.errors import ImportModelError

ROWS, WIDTH = 9, 5
RNG = np.random.default_rng(0)
X = RNG.standard_normal((ROWS, WIDTH)).astype(np.float32)
X[3] = 0
SUPPORTS = {
    "n_supports": 4,
    "support_vectors": RNG.standard_normal(4 * WIDTH).tolist(),
    "coefficients": RNG.standard_normal(4).tolist(),
    "rho": [0.3],
    "kernel_params": [0.2, 0.5, 3.0],
}


def both(op: str, x: np.ndarray, outputs: int, **attributes: Any) -> list[tuple[Any, Any]]:
    """(minicompiler's, onnxruntime's) results of a model of one node."""
    node = helper.make_node(op, ["x"], [f"y{k}" for k in range(outputs)], domain="ai.onnx.ml")
    node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    rows = ["rows", *x.shape[1:]]
    results = [ValueInfoProto(name=f"y{k}") for k in range(outputs)]
    graph = helper.make_graph(
        [node], "ml", [helper.make_tensor_value_info("x", kind, rows)], results
    )
    sets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 4)]
    model = helper.make_model(graph, opset_imports=sets, ir_version=9).SerializeToString()
    got = mc.compile(model, threads=1)(x)
    want = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    return list(zip(got, want, strict=True))


def check(op: str, x: np.ndarray = X, outputs: int = 1, **attributes: Any) -> None:
    for got, want in both(op, x, outputs, **attributes):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, WIDTH])
def test_scaler(size: int) -> None:
    offset, scale = RNG.standard_normal((2, size)).tolist()
    check("Scaler", offset=offset, scale=scale)
    check("Scaler", (X * 9).astype(np.int64), offset=offset, scale=scale)


@pytest.mark.parametrize("norm", ["MAX", "L1", "L2"])
def test_normalizer(norm: str) -> None:
    check("Normalizer", norm=norm)


def test_imputer() -> None:
    x = X.copy()
    x[1, 2] = x[4, 0] = np.nan
    nan = float("nan")
    means = RNG.standard_normal(WIDTH).tolist()
    check("Imputer", x, imputed_value_floats=means, replaced_value_float=nan)
    check("Imputer", imputed_value_floats=[7.0], replaced_value_float=0.0)
    whole = np.arange(20).reshape(4, 5)
    check("Imputer", whole, imputed_value_int64s=[-1], replaced_value_int64=7)


def test_label_encoder() -> None:
    x = np.array([[3, 1], [7, 4], [-2, 9]])
    keys = [9, 3, -2, 1]
    check("LabelEncoder", x, keys_int64s=keys, values_int64s=[5, 6, 7, 8], default_int64=-3)
    check("LabelEncoder", x, keys_int64s=keys, values_floats=[0.5, 6, 7, 8])
    floats = np.array([0.5, np.nan, 2, -1], np.float32)
    nan = float("nan")
    check("LabelEncoder", floats, keys_floats=[2.0, nan, 0.5], values_int64s=[1, 2, 3])


@pytest.mark.parametrize("transform", ["NONE", "SOFTMAX", "LOGISTIC"])
def test_linear_models(transform: str) -> None:
    c = RNG.standard_normal(3 * WIDTH).tolist()
    check("LinearRegressor", coefficients=c, intercepts=[1.0, 2.0, 3.0], targets=3)
    labels = [4, 2, 9]
    check(
        "LinearClassifier", outputs=2, coefficients=c, intercepts=[0.1, 0.2, 0.3],
        classlabels_ints=labels, post_transform=transform,
    )  # fmt: skip


@pytest.mark.parametrize("kernel", ["LINEAR", "POLY", "RBF", "SIGMOID"])
@pytest.mark.parametrize("one_class", [0, 1])
def test_support_vectors(kernel: str, one_class: int) -> None:
    check("SVMRegressor", kernel_type=kernel, one_class=one_class, **SUPPORTS)


def test_strings_are_refused() -> None:
    with pytest.raises(ImportModelError, match="strings"):
        both("LabelEncoder", np.ones(3, np.int64), 1, keys_int64s=[1], values_strings=["a"])
    with pytest.raises(ImportModelError, match="strings"):
        attributes = {"coefficients": [1.0] * 2 * WIDTH, "classlabels_strings": ["a", "b"]}
        both("LinearClassifier", X, 2, **attributes)
