"""Tensors without elements: no loops are made for them, and what reads them still works."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import NodeProto
from onnx_models import model, node, numbers

import minicompiler as mc
from minicompiler import te
from minicompiler.ir.types import float32
from minicompiler.lower.to_tir import from_tensors

LSTM = {"w": numbers(1, 16, 2), "r": numbers(1, 16, 4)}
FIRST = {"k": np.array(0)}
# nodes, shape of x, constants, shape of the result
CASES: dict[str, tuple[list[NodeProto], tuple[int, ...], dict[str, np.ndarray], Any]] = {
    "no_images": ([node("AveragePool", "x", "y", kernel_shape=[5, 5], pads=[2] * 4)],
                  (0, 1, 5, 5), {}, (0, 1, 5, 5)),
    "no_images_to_convolve": ([node("Conv", "x w", "a"), node("Relu", "a", "y")],
                              (0, 8, 9, 9), {"w": numbers(8, 8, 3, 3)}, (0, 8, 7, 7)),
    "no_channels": ([node("Conv", "x w", "y", group=8)], (0, 8, 9), {"w": numbers(8, 1, 3)},
                    (0, 8, 7)),
    "no_rows": ([node("MatMul", "x w", "y")], (0, 3), {"w": numbers(3, 4)}, (0, 4)),
    "nothing_to_sum": ([node("MatMul", "x w", "y")], (5, 0), {"w": np.zeros((0, 4), np.float32)},
                       (5, 4)),
    "empty_rows": ([node("Softmax", "x", "y")], (3, 0), {}, (3, 0)),
    "one_empty_part": ([node("Concat", "x w", "y", axis=0)], (0, 3), {"w": numbers(2, 3)}, (2, 3)),
    "no_steps": ([node("LSTM", "x w r", "s y", hidden_size=4)], (0, 2, 2), LSTM, (1, 2, 4)),
    "no_sequences": ([node("LSTM", "x w r", "s y", hidden_size=4)], (3, 0, 2), LSTM, (1, 0, 4)),
    "no_rows_to_add_up": ([node("CumSum", "x k", "y")], (0, 4), FIRST, (0, 4)),
    "no_columns_to_add_up": ([node("CumSum", "x k", "y")], (4, 0), FIRST, (4, 0)),
    "no_largest": ([node("Hardmax", "x", "y")], (1, 0), {}, (1, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_tensor_without_elements(name: str) -> None:
    nodes, shape, constants, want = CASES[name]
    x = np.zeros(shape, np.float32)
    (y,) = mc.compile(model(nodes, {"x": x}, ["y"], constants), threads=1, checked=True)(x)
    assert y.shape == want
    if name == "one_empty_part":
        np.testing.assert_array_equal(y, constants["w"])
    else:
        assert not y.any()


def test_no_loops_are_made_for_it() -> None:
    x = te.placeholder("x", (0, 3), float32)
    func = from_tensors("f", [x], [te.exp(x), te.sum(x, 0)])
    (phase,) = func.phases
    assert "k0" in str(phase)  # the sum of nothing is 0, and that is stored
