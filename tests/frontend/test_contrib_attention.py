"""Attention and embeddings of onnxruntime's own domain: compared with onnxruntime."""

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
HEADS = 4


def both(
    n: NodeProto,
    inputs: dict[str, np.ndarray],
    known: dict[str, np.ndarray],
    shapes: dict[str, Any] | None = None,
) -> None:
    """Our results are those of onnxruntime."""
    n.domain = "com.microsoft"
    m = model([n], inputs, [o for o in n.output if o], known, opset=17, shapes=shapes)
    m.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    session = ort.InferenceSession(m.SerializeToString())
    compiled = mc.compile(m, threads=1)
    for got, want in zip(compiled(*inputs.values()), session.run(None, inputs), strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def masks(kind: str) -> dict[str, np.ndarray]:
    found = {
        "none": [], "ends": np.array([5, 9]), "keys": np.arange(18).reshape(2, 9) % 4 > 0,
        "pairs": np.arange(162).reshape(2, 9, 9) % 5 > 0,
    }[kind]  # fmt: skip
    return {"m": np.asarray(found, np.int32)} if kind != "none" else {}


@pytest.mark.parametrize("unidirectional", [0, 1])
@pytest.mark.parametrize("mask", ["none", "ends", "keys", "pairs"])
def test_attention_with_one_product(mask: str, unidirectional: int) -> None:
    m = masks(mask)
    n = node("Attention", "x w b m" if m else "x w b", "y", num_heads=HEADS,
             unidirectional=unidirectional)  # fmt: skip
    known = {"w": numbers(32, 96) / 4, "b": numbers(96)}
    both(n, {"x": numbers(2, 9, 32), **m}, known)


def test_attention_with_a_past() -> None:
    n = node("Attention", "x w b - p", "y t", num_heads=HEADS, unidirectional=1)
    known = {"w": numbers(32, 96) / 4, "b": numbers(96)}
    inputs = {"x": numbers(2, 3, 32), "p": numbers(2, 2, HEADS, 6, 8)}
    both(n, inputs, known, {"x": (2, "s", 32), "p": (2, 2, HEADS, "past", 8)})


@pytest.mark.parametrize("mask", ["none", "ends", "keys"])
@pytest.mark.parametrize("extras", [False, True])
def test_attention_with_three_operands(extras: bool, mask: str) -> None:
    m = masks(mask)
    names = "q k v " + ("b " if extras else "- ") + ("m " if m else "- ") + ("a" if extras else "")
    n = node("MultiHeadAttention", names.rstrip("- "), "y", num_heads=HEADS)
    inputs = {"q": numbers(2, 5, 32), "k": numbers(2, 9, 32), "v": numbers(2, 9, 32), **m}
    known = {"b": numbers(96), "a": numbers(1, HEADS, 5, 9)} if extras else {}
    both(n, inputs, known)


def test_keys_that_have_their_heads() -> None:
    n = node("MultiHeadAttention", "q k v", "y", num_heads=HEADS, scale=0.3)
    heads = (2, HEADS, 9, 8)
    both(n, {"q": numbers(2, 5, 32), "k": numbers(*heads), "v": numbers(*heads)}, {})


def test_three_operands_with_a_past() -> None:
    n = node("MultiHeadAttention", "q k v - - - c d", "y kk vv", num_heads=HEADS)
    past = (2, HEADS, 6, 8)
    inputs = {k: numbers(2, 3, 32, seed=j) for j, k in enumerate("qkv")}
    inputs |= {"c": numbers(*past), "d": numbers(*past, seed=1)}
    both(n, inputs, {})


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("heads", [False, True])
def test_rotary_embeddings(heads: bool, one: bool, interleaved: int) -> None:
    angles = np.outer(np.arange(20), np.arange(1, 5)).astype(F) / 9
    known = {"c": np.cos(angles), "s": np.sin(angles)}
    at = np.array([4]) if one else np.array([[0, 1, 2], [7, 3, 19]])
    x = numbers(2, HEADS, 3, 8) if heads else numbers(2, 3, 32)
    n = node("RotaryEmbedding", "x p c s", "y", interleaved=interleaved)
    both(n, {"x": x, "p": at}, known)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("given", "past", "new", "totals"),
    [({}, 0, 7, [7, 7]), ({"do_rotary": 1}, 0, 7, [7, 4]), ({"do_rotary": 1}, 6, 1, [7, 5]),
     ({"local_window_size": 3}, 6, 1, [7, 7]), ({"softcap": 2.0, "scale": 0.5}, 0, 5, [5, 5])],
    ids=["plain", "prompts", "step", "window", "cap"],
)  # fmt: skip
def test_heads_that_share_keys(
    given: dict[str, Any], past: int, new: int, totals: list[int], packed: bool
) -> None:
    """Rows of different lengths: what lies behind the end of a row does not count."""
    n = node("GroupQueryAttention", ("q - -" if packed else "q k v") + " c d l t cos sin",
             "y kk vv", num_heads=HEADS, kv_num_heads=2, **given)  # fmt: skip
    q, k, v = numbers(2, new, 64), numbers(2, new, 32, seed=1), numbers(2, new, 32, seed=2)
    inputs = {"q": np.concatenate([q, k, v], 2)} if packed else {"q": q, "k": k, "v": v}
    rest = {"l": np.array(totals, np.int32) - 1}
    inputs |= {"c": numbers(2, 2, past, 16), "d": numbers(2, 2, past, 16, seed=3)} if past else {}
    if not past:
        n.input[3] = n.input[4] = ""
    angles = np.outer(np.arange(20), np.arange(1, 9)).astype(F) / 9
    known = {"t": np.array(past + new, np.int32), "cos": np.cos(angles), "sin": np.sin(angles)}
    n.domain = "com.microsoft"
    m = model([n], {**inputs, **rest}, ["y", "kk", "vv"], known, opset=17)
    m.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    want = ort.InferenceSession(m.SerializeToString()).run(None, {**inputs, **rest})
    got = mc.compile(m, threads=1)(*inputs.values(), *rest.values())
    for b, total in enumerate(totals):
        used = min(total, new)
        np.testing.assert_allclose(got[0][b, :used], want[0][b, :used], rtol=1e-4, atol=1e-5)
        for j in (1, 2):
            assert got[j].shape == want[j].shape
            np.testing.assert_allclose(got[j][b, :, :total], want[j][b, :, :total], rtol=1e-4,
                                       atol=1e-5)  # fmt: skip


def test_one_model_for_any_batch_and_length() -> None:
    n = node("GroupQueryAttention", "q k v c d l t cos sin", "y kk vv", num_heads=HEADS,
             kv_num_heads=2, do_rotary=1)  # fmt: skip
    n.domain = "com.microsoft"

    def inputs(batch: int, past: int) -> dict[str, np.ndarray]:
        row, cache = (batch, 1, 32), (batch, 2, past, 16)
        found = {"q": numbers(batch, 1, 64), "k": numbers(*row), "v": numbers(*row, seed=1)}
        found |= {"c": numbers(*cache), "d": numbers(*cache, seed=1)}
        return found | {"l": np.full(batch, past, np.int32), "t": np.array(past + 1, np.int32)}

    angles = np.outer(np.arange(60), np.arange(1, 9)).astype(F) / 9
    shapes: dict[str, Any] = {"q": ("b", "s", 64), "k": ("b", "s", 32), "v": ("b", "s", 32)}
    shapes |= {"c": ("b", 2, "p", 16), "d": ("b", 2, "p", 16), "l": ("b",), "t": ()}
    m = model([n], inputs(1, 6), ["y", "kk", "vv"], {"cos": np.cos(angles), "sin": np.sin(angles)},
              opset=17, shapes=shapes)  # fmt: skip
    m.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    session, compiled = ort.InferenceSession(m.SerializeToString()), mc.compile(m, threads=2)
    for given in (inputs(1, 6), inputs(3, 33)):
        for got, want in zip(compiled.run(given).values(), session.run(None, given), strict=True):
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("segments", [False, True])
def test_embeddings_of_tokens(segments: bool) -> None:
    ids = np.array([[1, 5, 3, 0], [2, 2, 9, 8]], np.int32)
    names = "i s w p e g b m" if segments else "i - w p - g b m"
    inputs = {"i": ids, "m": (ids > 0).astype(np.int32)}
    inputs |= {"s": ids % 2} if segments else {}
    known = {"w": numbers(10, 16), "p": numbers(6, 16), "g": numbers(16), "b": numbers(16)}
    known |= {"e": numbers(2, 16)} if segments else {}
    both(node("EmbedLayerNormalization", names, "y n t", epsilon=1e-3), inputs, known)


def test_forms_that_are_not_supported_are_refused() -> None:
    n = node("Attention", "x w", "y", num_heads=3)
    n.domain = "com.microsoft"
    m = model([n], {"x": numbers(2, 9, 32)}, ["y"], {"w": numbers(32, 96)})
    m.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(ImportModelError, match="with 3 heads"):
        mc.compile(m)
