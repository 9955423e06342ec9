"""Operators of onnxruntime's own domain: compared with what onnxruntime itself computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import NodeProto, helper
from onnx_models import model, node, numbers

import minicompiler as mc
from minicompiler.errors import ImportModelError

F = np.float32


def bytes_of(*sizes: int) -> np.ndarray:
    return np.random.default_rng(sum(sizes)).integers(0, 256, sizes).astype(np.uint8)


def scaled(name: str, scale: float, zero: int) -> dict[str, np.ndarray]:
    return {f"{name}s": np.array(scale, F), f"{name}z": np.array(zero, np.uint8)}


def own(op: str, inputs: str, outputs: str, **attributes: Any) -> NodeProto:
    made = node(op, inputs, outputs, **attributes)
    made.domain = "com.microsoft"
    return made


def both(
    n: NodeProto, inputs: dict[str, np.ndarray], known: dict[str, np.ndarray], **shapes: Any
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(our results, those of onnxruntime)."""
    names = [o for o in n.output if o]
    m = model([n], inputs, names, known, opset=17, shapes=shapes or None)
    m.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(m.SerializeToString(), options)
    return list(mc.compile(m, threads=1)(*inputs.values())), session.run(None, inputs)


QX, QY = scaled("x", 0.0513, 120), scaled("y", 0.0387, 99)
LAST = {"rs": np.array(0.06, F), "rz": np.array(110, np.uint8)}


@pytest.mark.parametrize(
    ("n", "inputs"),
    [
        (own("QLinearAdd", "x xs xz y ys yz rs rz", "r"), "xy"),
        (own("QLinearMul", "x xs xz y ys yz rs rz", "r"), "xy"),
        (own("QLinearConcat", "rs rz x xs xz y ys yz", "r", axis=1), "xy"),
        (own("QLinearGlobalAveragePool", "x xs xz rs rz", "r"), "x"),
        (own("QLinearAveragePool", "x xs xz rs rz", "r", kernel_shape=[2, 3],
             pads=[0, 1, 1, 1]), "x"),
        (own("QLinearLeakyRelu", "x xs xz rs rz", "r", alpha=0.2), "x"),
        (own("QLinearSigmoid", "x xs xz rs rz", "r"), "x"),
        (own("QLinearSoftmax", "x xs xz rs rz", "r", axis=-1, opset=13), "x"),
    ],
    ids=lambda v: v.op_type if isinstance(v, NodeProto) else None,
)  # fmt: skip
def test_operators_on_scaled_integers(n: NodeProto, inputs: str) -> None:
    """Within one step: a result half way between two integers may become either."""
    given = {k: bytes_of(2, 4, 7, 5 + (k == "y") * 0)[:: -1 if k == "y" else 1] for k in inputs}
    known = {k: v for k, v in {**QX, **QY, **LAST}.items() if k in n.input}
    (got,), (want,) = both(n, {k: given[k] for k in inputs}, known)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert np.abs(got.astype(int) - want).max() <= 1
    assert (got != want).mean() < 0.2


@pytest.mark.parametrize("result", [False, True])
@pytest.mark.parametrize("transposed", [0, 1])
def test_products_of_scaled_integers_with_a_summand(transposed: int, result: bool) -> None:
    a, b = bytes_of(5, 33), bytes_of(33, 12).T.copy() if transposed else bytes_of(33, 12)
    c = np.arange(-6, 6, dtype=np.int32) * 1000
    known = {"b": b, "c": c, **QX, "ys": np.linspace(0.01, 0.02, 12).astype(F),
             "yz": np.full(12, 99, np.uint8)}  # fmt: skip
    inputs = "a xs xz b ys yz c"
    if result:
        known |= {"rs": np.array(0.9, F), "rz": np.array(110, np.uint8)}
        inputs += " rs rz"
    (got,), (want,) = both(own("QGemm", inputs, "r", transB=transposed, alpha=0.5), {"a": a}, known)
    if result:
        assert np.abs(got.astype(int) - want).max() <= 1
    else:
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("bias", [False, True])
def test_products_of_floats_with_integers(bias: bool) -> None:
    x, b = numbers(3, 7, 16), bytes_of(16, 9)
    known = {"b": b, "s": np.array(0.02, F), "z": np.array(120, np.uint8), "c": numbers(9)}
    known = known if bias else {k: v for k, v in known.items() if k != "c"}
    names = "x b s z c" if bias else "x b s z"
    (got,), (want,) = both(own("DynamicQuantizeMatMul", names, "r"), {"x": x}, known)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_products_of_integers_with_both_scales() -> None:
    known = {"b": bytes_of(16, 9), "s": np.array(0.02, F), "t": np.array(0.05, F),
             "z": np.array(120, np.uint8), "c": numbers(9)}  # fmt: skip
    n = own("MatMulIntegerToFloat", "a b s t z z c", "r")
    (got,), (want,) = both(n, {"a": bytes_of(2, 5, 16)}, known)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_products_with_packed_weights(bits: int, zeros: bool) -> None:
    """112 rows are three blocks and a half."""
    k, columns, size = 112, 9, 32
    known = {"b": bytes_of(columns, 4, size * bits // 8), "s": np.abs(numbers(columns * 4)) / 9}
    if zeros:
        known["z"] = bytes_of(columns * 4 * bits // 8)
    n = own("MatMulNBits", "x b s z" if zeros else "x b s", "r", K=k, N=columns, bits=bits,
            block_size=size)  # fmt: skip
    (got,), (want,) = both(n, {"x": numbers(2, 3, k)}, known, x=(2, "n", k))
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=np.abs(want).max() * 1e-4)


@pytest.mark.parametrize(
    ("n", "known"),
    [
        (own("FusedMatMul", "x w", "r", alpha=0.3, transB=1), {"w": numbers(9, 16)}),
        (own("BiasGelu", "x b", "r"), {"b": numbers(16)}),
        (own("FastGelu", "x b", "r"), {"b": numbers(16)}),
        (own("FastGelu", "x", "r"), {}),
        (own("Gelu", "x", "r"), {}),
        (own("QuickGelu", "x", "r", alpha=1.5), {}),
        (own("SkipLayerNormalization", "x k g b c", "r - - t", epsilon=1e-3),
         {"k": numbers(3, 5, 16), "g": numbers(16), "b": numbers(16), "c": numbers(16)}),
        (own("SkipLayerNormalization", "x k g", "r", epsilon=1e-3),
         {"k": numbers(3, 5, 16), "g": numbers(16)}),
        (own("SkipSimplifiedLayerNormalization", "x k g", "r - - t", epsilon=1e-3),
         {"k": numbers(3, 5, 16), "g": numbers(16)}),
        (node("SimplifiedLayerNormalization", "x g", "r", axis=-1, epsilon=1e-3),
         {"g": numbers(16)}),
    ],
    ids=lambda v: v.op_type if isinstance(v, NodeProto) else None,
)  # fmt: skip
def test_joined_operators(n: NodeProto, known: dict[str, np.ndarray]) -> None:
    for i, o in enumerate(n.output):
        n.output[i] = o.replace("-", "")
    for got, want in zip(*both(n, {"x": numbers(3, 5, 16)}, known), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "parameters"),
    [("", []), ("Relu", []), ("LeakyRelu", [0.3]), ("Clip", [-0.2, 0.4]), ("Sigmoid", []),
     ("HardSigmoid", [0.3, 0.4])],
)  # fmt: skip
def test_convolutions_with_a_summand_and_a_function(function: str, parameters: list[float]) -> None:
    given: dict[str, Any] = {"activation": function} if function else {}
    given |= {"activation_params": parameters} if parameters else {}
    n = own("FusedConv", "x w b z", "r", kernel_shape=[3, 3], pads=[1] * 4, **given)
    known = {"w": numbers(6, 4, 3, 3), "b": numbers(6), "z": numbers(2, 6, 5, 7)}
    (got,), (want,) = both(n, {"x": numbers(2, 4, 5, 7)}, known)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_choice_between_scaled_integers() -> None:
    given = {"c": bytes_of(4, 5) > 120, "x": bytes_of(4, 5), "y": bytes_of(4, 5).T.reshape(4, 5)}
    n = own("QLinearWhere", "c x xs xz y ys yz rs rz", "r")
    (got,), (want,) = both(n, {k: v.copy() for k, v in given.items()}, {**QX, **QY, **LAST})
    assert np.abs(got.astype(int) - want).max() <= 1


def test_scales_and_zero_points_of_16_bits() -> None:
    known = {"s": np.array(0.01, F), "z": np.array(1000, np.uint16)}
    x = numbers(3, 9)
    (q,), (want,) = both(own("QuantizeLinear", "x s z", "q"), {"x": x}, known)
    assert q.dtype == np.uint16
    assert np.abs(q.astype(int) - want).max() <= 1
    (got,), (want,) = both(own("DequantizeLinear", "q s z", "y"), {"q": q}, known)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_products_with_a_function() -> None:
    n = own("FusedGemm", "x w b", "r", transB=1, activation="LeakyRelu", activation_alpha=0.3)
    known = {"w": numbers(9, 16), "b": numbers(9)}
    (got,), (want,) = both(n, {"x": numbers(5, 16)}, known)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_norm_that_is_older_than_in_the_specification() -> None:
    n = node("LayerNormalization", "x g b", "y", axis=-1, epsilon=1e-3)
    x, known = numbers(3, 16), {"g": numbers(16), "b": numbers(16, seed=1)}
    (got,) = mc.compile(model([n], {"x": x}, ["y"], known, opset=13))(x)
    want = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(got, want * known["g"] + known["b"], rtol=1e-4, atol=1e-5)


def test_a_result_that_is_not_there_is_refused() -> None:
    n = own("SkipLayerNormalization", "x k g", "r m")
    m = model([n], {"x": numbers(2, 8)}, ["r", "m"], {"k": numbers(2, 8), "g": numbers(8)})
    m.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(ImportModelError, match="mean and the deviation of SkipLayerNorm"):
        mc.compile(m)
