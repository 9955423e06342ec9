"""Limits: each stops a model that needs more, with a message that says what and where."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_models import model, node, numbers

import minicompiler as mc
from minicompiler.errors import LimitError, MinicompilerError
from minicompiler.limits import Budget, Limits, parse_limits

X = numbers(2, 3)


def chain(count: int) -> onnx.ModelProto:
    nodes = [node("Relu", f"v{k}", f"v{k + 1}") for k in range(count)]
    return model(nodes, {"v0": X}, [f"v{count}"])


def unrolled(trips: int) -> onnx.ModelProto:
    body = helper.make_graph(
        [node("Identity", "go", "go_on"), node("Relu", "a", "b")],
        "body",
        [
            helper.make_tensor_value_info("k", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("a", TensorProto.FLOAT, X.shape),
        ],
        [helper.make_empty_tensor_value_info("go_on"), helper.make_empty_tensor_value_info("b")],
    )
    loop = node("Loop", "n go x", "y", body=body)
    return model([loop], {"x": X}, ["y"], {"n": np.array(trips), "go": np.array(True)})


def functions(depth: int) -> onnx.ModelProto:
    """Each function calls the one below twice: 2 ** depth nodes once they are expanded."""
    made = []
    for k in range(depth):
        name = f"f{k - 1}" if k else "Relu"
        domain = "own" if k else ""
        calls = [
            helper.make_node(name, ["x"], ["t"], domain=domain),
            helper.make_node(name, ["t"], ["y"], domain=domain),
        ]
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
        made.append(helper.make_function("own", f"f{k}", ["x"], ["y"], calls, opsets))
    m = model([node(f"f{depth - 1}", "x", "y", domain="own")], {"x": X}, ["y"])
    m.opset_import.append(helper.make_opsetid("own", 1))
    m.functions.extend(made)
    return m


def expanded(count: int, size: int) -> onnx.ModelProto:
    """Constants of `size` float32 elements, each computed from one number."""
    nodes, last = [], "x"
    for k in range(count):
        nodes += [node("Expand", f"c{k} s", f"e{k}"), node("Add", f"{last} e{k}", f"y{k}")]
        last = f"y{k}"
    known: dict[str, Any] = {f"c{k}": np.float32(k) for k in range(count)}
    return model(nodes, {"x": X[:1, :1]}, [last], {**known, "s": np.array([1, size])})


def product(size: int) -> onnx.ModelProto:
    w = np.zeros((size, size), np.float32)
    return model(
        [node("MatMul", "w w", "p"), node("Add", "x p", "y")], {"x": X[:1, :1]}, ["y"], {"w": w}
    )


CASES = {
    "nodes": (chain(11), Limits(nodes=10), 'needs 11 nodes.*Relu "n_v11".*nodes=22'),
    "unrolled nodes": (unrolled(50), Limits(nodes=20), "needs 21 nodes.*Loop|needs 21 nodes.*Relu"),
    "nodes of functions": (functions(40), Limits(), "needs 1099511627776 nodes"),
    "rank": (
        model([node("Unsqueeze", "x a", "y")], {"x": X}, ["y"], {"a": np.arange(4)}),
        Limits(rank=5),
        'has 6 dimensions, the limit is 5.*Unsqueeze "n_y"',
    ),
    "rank of an input": (
        model([node("Relu", "x", "y")], {"x": numbers(1, 1, 1)}, ["y"]),
        Limits(rank=2),
        'has 3 dimensions.*"x"',
    ),
    "fold_bytes": (
        expanded(4, 1000), Limits(fold_bytes=10_000), 'take 12000 bytes.*Expand "n_e2"',
    ),
    "fold_operations": (
        product(300), Limits(fold_operations=10_000_000), 'takes 27.* operations.*MatMul "n_p"',
    ),
    "operations": (
        product(300), Limits(operations=80_000), 'one call takes 90000 operations.*Add "n_y"',
    ),
    "operations of a loop": (
        unrolled(5000), Limits(operations=5000), "one call takes .* operations.*operations=",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_limit_stops_the_compiler(name: str) -> None:
    proto, limits, text = CASES[name]
    start = time.monotonic()
    with pytest.raises(LimitError, match=f"(?s){text}.*--limit"):
        mc.compile(proto, limits=limits)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("name", CASES)
def test_higher_limits_let_it_pass(name: str) -> None:
    if name == "nodes of functions":
        assert mc.compile(functions(4)) is not None
        return
    proto = CASES[name][0]
    assert mc.compile(proto, limits=Limits(fold_operations=100_000_000)) is not None


def test_model_bytes_count_the_file_and_the_files_beside_it(tmp_path: Path) -> None:
    proto = model([node("Add", "x w", "y")], {"x": X}, ["y"], {"w": numbers(200, 2, 3)})
    path = tmp_path / "net.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert path.stat().st_size < 1000
    with pytest.raises(LimitError, match=r'(?s)takes? .* bytes, the limit is 4000.*"w"'):
        mc.compile(path, limits=Limits(model_bytes=4000))
    with pytest.raises(LimitError, match="the limit is 100"):
        mc.compile(path.read_bytes(), limits=Limits(model_bytes=100))


def test_time_is_looked_at_within_a_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A clock that moves one second at each look: the limit decides after how many looks."""
    # An empty cache: a kernel from the cache has no schedule.
    monkeypatch.setenv("MINICOMPILER_CACHE", str(tmp_path))
    now = iter(range(10**9))
    monkeypatch.setattr("minicompiler.limits.time.monotonic", lambda: next(now))
    weights = numpy_helper.to_array(numpy_helper.from_array(numbers(3, 8)))
    proto = model([node("MatMul", "x w", "y")], {"x": X}, ["y"], {"w": weights})
    seen = []
    for looks in range(60):
        try:
            mc.compile(proto, limits=Limits(seconds=looks + 0.5))
        except LimitError as error:
            assert "the limit is" in str(error)
            seen.append(error.where or (error.locs[0].op if error.locs else ""))
        else:
            break
    assert "MatMul" in seen  # the importer
    assert "fuse" in seen  # a pass
    assert sum(where.startswith("fused_") for where in seen) > 3  # a kernel and its schedule


def test_what_is_not_a_limit_is_refused() -> None:
    assert parse_limits(["nodes=5", "seconds=0.5"]) == Limits(nodes=5, seconds=0.5)
    for text in ("nodes", "nodes=x", "size=3", "nodes=-1"):
        with pytest.raises(MinicompilerError):
            parse_limits([text])
    with pytest.raises(MinicompilerError, match="nodes is 0"):
        Limits(nodes=0)


def test_a_budget_adds_up() -> None:
    budget = Budget(Limits(nodes=3))
    budget.use("nodes", 3)
    with pytest.raises(LimitError):
        budget.use("nodes", 1)
