"""The part of onnx's backend suite that CI runs: names that have passed must go on passing.

backend_cases.txt holds at least one case of every combination of operators. After an improvement:

    python tests/frontend/test_backend_suite.py out.json      from backend_suite.py --json out.json
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from backend_suite import load_cases, run_suite
from onnx import TensorProto, helper

LIST = Path(__file__).parent / "backend_cases.txt"
PER_OPERATOR = 1  # cases of one combination of operators
LARGE = ("real",)  # networks of this kind take seconds each; the zoo covers them


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MINICOMPILER_CACHE", str(tmp_path))
    monkeypatch.setenv("MINICOMPILER_THREADS", "1")
    yield


@pytest.mark.usefixtures("cache")
def test_cases_that_passed_pass() -> None:
    wanted = LIST.read_text().split()
    cases = [c for c in load_cases() if c.name in set(wanted)]
    assert sorted(c.name for c in cases) == sorted(wanted)
    lost = [o for o in run_suite(cases, 100, 60, os.cpu_count() or 1) if o.state != "passed"]
    assert not lost, "\n".join(f"{o.name} {o.state}: {o.message}" for o in lost)


def one_node(op: str, inputs: dict[str, tuple[int, list[int]]], **attrs: Any) -> onnx.ModelProto:
    infos = [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()]
    node = helper.make_node(op, list(inputs), ["y"], **attrs)
    graph = helper.make_graph([node], op, infos, [onnx.ValueInfoProto(name="y")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


@pytest.mark.usefixtures("cache")
def test_a_model_is_compiled_once_per_value_that_decides_shapes() -> None:
    from minicompiler.frontend.onnx_backend import Backend

    inputs = {"x": (TensorProto.FLOAT, [2, 3]), "axes": (TensorProto.INT64, [1])}
    rep = Backend.prepare(one_node("ReduceSum", inputs, keepdims=0))
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    for axis in (0, 1, 0):
        (y,) = rep.run([x, np.array([axis], np.int64)])
        np.testing.assert_array_equal(y, x.sum(axis))
    assert len(rep.modules) == 2


@pytest.mark.usefixtures("cache")
def test_run_node() -> None:
    from minicompiler.frontend.onnx_backend import Backend

    x = np.array([-1.0, 2.0], np.float32)
    (y,) = Backend.run_node(helper.make_node("Relu", ["x"], ["y"]), [x])
    np.testing.assert_array_equal(y, [0, 2])
    assert Backend.supports_device("CPU") and not Backend.supports_device("CUDA")


@pytest.mark.usefixtures("cache")
def test_a_sequence_is_taken_apart_and_put_together() -> None:
    from minicompiler.frontend.onnx_backend import Backend

    inner = helper.make_tensor_type_proto(TensorProto.FLOAT, [2])
    info = helper.make_value_info("s", helper.make_sequence_type_proto(inner))
    new = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    out = helper.make_value_info("t", helper.make_sequence_type_proto(inner))
    node = helper.make_node("SequenceInsert", ["s", "x"], ["t"])
    graph = helper.make_graph([node], "insert", [info, new], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    a, b = np.ones(2, np.float32), np.zeros(2, np.float32)
    (made,) = Backend.run_model(model, [[a, a], b])
    assert [m.tolist() for m in made] == [[1, 1], [1, 1], [0, 0]]


def choose(outcomes: list[dict[str, Any]]) -> list[str]:
    """The names for the list: some passed cases of each combination of operators."""
    taken: dict[tuple[str, ...], int] = {}
    names = []
    for o in outcomes:
        # Conversions between types of elements are code paths of their own.
        kinds = re.findall(r"_to_FLOAT\d\w+|_to_U?INT\d", o["name"])
        key = (o["kind"], *o["ops"], *kinds)
        if o["state"] == "passed" and o["kind"] not in LARGE:
            taken[key] = taken.get(key, 0) + 1
            if taken[key] <= PER_OPERATOR and not o["name"].endswith("_expanded"):
                names.append(o["name"])
    return sorted(names)


if __name__ == "__main__":
    chosen = choose(json.loads(Path(sys.argv[1]).read_text()))
    LIST.write_text("\n".join(chosen) + "\n")
    print(f"{len(chosen)} cases")
