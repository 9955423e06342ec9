"""Timing of models and peers: concurrent callers, ratios with their spread, the hint."""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx_models import conv_net, mlp

import minicompiler as mc
from minicompiler import bench, cli
from minicompiler.bench import Measured, Times
from minicompiler.errors import MinicompilerError


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """x[batch, 20] -> y[batch, 7]"""
    path = tmp_path / "net.onnx"
    onnx.save(mlp("batch"), path)
    return path


def run(*args: str | Path, code: int = 0) -> Any:
    """The JSON of a command that ends with `code`."""
    result = CliRunner().invoke(cli.main, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


# ---- callers at the same time --------------------------------------------------------------------
def test_streams_call_at_the_same_time() -> None:
    """Eight calls that sleep overlap: together they take less than one after the other."""
    seen: set[int] = set()

    def sleep() -> list[np.ndarray]:
        seen.add(threading.get_ident())
        time.sleep(0.004)
        return []

    alone, together = (bench.compare({"x": [sleep] * n}, 0.1)["x"] for n in (1, 8))
    assert len(seen) > 8
    assert not alone.walls and len(together.walls) == len(together.turns) >= 5
    assert together.summary()["median"] >= 0.004
    # Paces count throughput when there are several callers; the machine may be busy in some turns.
    assert 3 * statistics.median(together.paces()) < 0.004 <= min(alone.paces())


def test_back_to_back_turns_are_single_calls_in_turn() -> None:
    calls: list[str] = []

    def runner(name: str) -> Callable[[], list[np.ndarray]]:
        def run() -> list[np.ndarray]:
            calls.append(name)
            return []

        return run

    times = bench.compare({n: runner(n) for n in "ab"}, 0.001, back_to_back=True)
    assert all(len(turn) == 1 for t in times.values() for turn in t.turns)
    assert calls[:2] == ["a", "b"]  # the first calls of all, not counted
    assert calls[2:10] == list("abbaabba")


def test_a_summary_counts_wall_time_of_concurrent_calls() -> None:
    both = Times(((1.0, 1.0, 1.0, 1.0), (2.0, 2.0, 2.0, 2.0)), (2.0, 4.0))
    found = both.summary()
    assert found["mean"] == 1.5 and found["calls"] == 8 and found["best"] == 1.0
    assert found["calls_per_second"] == pytest.approx(8 / 6)
    assert both.paces() == [0.5, 1.0]
    slower = Times(both.turns, (4.0, 8.0))
    assert bench.ratios(both, slower) == (2.0, 2.0, 2.0)


def test_streams_on_one_module(net: Path) -> None:
    report = run("bench", net, "--streams", "3", "--threads", "2", "--seconds", "0.1",
                 "--against", "onnxruntime", "--json")  # fmt: skip
    (result,) = report["results"]
    assert report["streams"] == result["streams"] == 3
    other = result["runtimes"]["onnxruntime"]
    assert 0 < other["ratio_quartiles"][0] <= other["ratio"] <= other["ratio_quartiles"][1]
    assert other["difference"] < 1e-5 and result["compile_seconds"] > 0


# ---- sizes ---------------------------------------------------------------------------------------
def test_batch_names_the_first_axis(net: Path, tmp_path: Path) -> None:
    report = run("bench", net, "--batch", "1,3", "--seconds", "0.1", "--json")
    assert [r["dims"] for r in report["results"]] == [{"batch": 1}, {"batch": 3}]
    saved = tmp_path / "m.mc"
    mc.compile(str(net), dims={"batch": (1, 8)}).save(saved)
    report = run("bench", saved, "--batch", "2", "--seconds", "0.1", "--json")
    assert report["results"][0]["dims"] == {"batch": 2}
    onnx.save(conv_net(1), tmp_path / "fixed.onnx")
    report = run("bench", tmp_path / "fixed.onnx", "--batch", "2", "--json", code=2)
    assert "its sizes are fixed" in report["message"]


# ---- the hint ------------------------------------------------------------------------------------
def measured(threads: int = 2, median: float = 1.0, p99: float = 1.1, **changes: Any) -> Measured:
    summary = {"median": median, "p99": p99, "calls_per_second": 1 / median}
    fields: dict[str, Any] = {"dims": {"batch": 1}, "open_dims": [], "ratios": {}}
    return Measured(threads, summary=summary, **{**fields, **changes})


@pytest.mark.parametrize(
    ("results", "cores", "streams", "words"),
    [
        ([measured(ratios={"openvino": 0.5})], 2, 1, "openvino is 2.00 times as fast on 2 threads"),
        ([measured(p99=3.0)], 2, 1, "p99 is 3.0 times the median"),
        ([measured(1, 1.0), measured(2, 1.5)], 2, 1, "--threads 1 is best, more do not pay"),
        ([measured(1)], 4, 1, "this machine has 4 cores: --threads 1,4"),
        ([measured(dims={}, open_dims=["batch"])], 2, 1, "--dims batch=1"),
        ([measured()], 2, 1, "--streams 2 --threads 1"),
        ([measured()], 2, 2, "`minicompiler profile net.onnx` shows where the time goes"),
        ([measured(1, 2.0), measured(2, 1.0)], 2, 2, "shows where the time goes"),
    ],
)
def test_the_hint_follows_from_what_was_measured(
    results: list[Measured], cores: int, streams: int, words: str
) -> None:
    assert words in bench.hint(results, cores, streams, "net.onnx")


def test_the_hint_is_one_line(net: Path) -> None:
    result = CliRunner().invoke(cli.main, ["bench", str(net), "--seconds", "0.1"])
    assert result.stdout.splitlines()[-1].startswith("hint: ")


# ---- peers ---------------------------------------------------------------------------------------
def test_a_peer_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, net: Path) -> None:
    def build(path: str, threads: int, *_: Any) -> Any:
        def prepare(feeds: Mapping[str, np.ndarray]) -> Any:
            def run() -> Any:
                raise ValueError("no kernel for this")

            return run

        return prepare

    monkeypatch.setitem(bench.PEERS, "torch", (build, ("numpy",)))
    with pytest.raises(MinicompilerError, match=r"torch cannot run net\.onnx: no kernel for this"):
        bench.peer("torch", "net.onnx", 1)({})


def test_a_model_too_new_for_a_peer_comes_with_a_hint(tmp_path: Path) -> None:
    m = mlp("batch")
    m.ir_version = 99
    onnx.save(m, tmp_path / "new.onnx")
    with pytest.raises(MinicompilerError, match="onnxruntime cannot load") as error:
        bench.peer("onnxruntime", str(tmp_path / "new.onnx"), 1)
    assert "model.ir_version" in error.value.hint


def test_torch_says_how_it_gets_a_network(monkeypatch: pytest.MonkeyPatch, net: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    monkeypatch.setitem(sys.modules, "onnx2torch", None)
    with pytest.raises(MinicompilerError, match="onnx2torch must be installed") as error:
        bench.peer("torch", str(net), 1)
    assert f"torch.export.save to {net.stem}.pt2" in error.value.hint


def test_torch_compiles_the_program_beside_the_file(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="the test environment is small: no torch")
    path = tmp_path / "mlp.onnx"
    onnx.save(mlp("batch"), path)
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}
    x = np.random.default_rng(0).standard_normal((3, 20), dtype=np.float32)

    class Network(torch.nn.Module):  # type: ignore[misc]  # torch is not there for the checker
        def forward(self, x: Any) -> Any:
            names = ("w1", "b1", "w2", "b2")
            w1, b1, w2, b2 = (torch.from_numpy(weights[n].copy()) for n in names)
            return torch.relu(x @ w1 + b1) @ w2 + b2

    program = torch.export.export(Network(), (torch.from_numpy(x),))
    torch.export.save(program, path.with_suffix(".pt2"))
    (found,) = bench.peer("torch", str(path), 1)({"x": x})()
    (want,) = bench.peer("onnxruntime", str(path), 1)({"x": x})()
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
