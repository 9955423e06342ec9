"""`minicompiler profile`: a row per kernel with its source, schedule, rates and the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner, Result
from onnx_models import attention, conv_net, model, node, numbers

import minicompiler as mc
from minicompiler import cli, machine
from minicompiler.commands import profile as profile_command
from minicompiler.machine import Level, Peaks

LEVELS = (Level("L2", 10**6, 1e11, 1e11), Level("memory", 10**9, 1e10, 1e10))


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that do not depend on what else runs on this machine; they take no time either."""
    monkeypatch.setattr(
        machine, "peaks", lambda _, threads, again: Peaks(threads, 1e11, LEVELS, 1e-9)
    )
    monkeypatch.setattr(machine, "flops_now", lambda *_: 1e11)


def profile(m: onnx.ModelProto, folder: Path, *args: str, code: int = 0) -> Result:
    path = folder / "net.onnx"
    onnx.save(m, path)
    command = ["profile", str(path), "--repeat", "3", "--threads", "2", *args]
    result = CliRunner().invoke(cli.main, command, env={"COLUMNS": "250"})
    assert result.exit_code == code, result.output
    return result


def report(m: onnx.ModelProto, folder: Path, *args: str) -> Any:
    return json.loads(profile(m, folder, *args, "--json").stdout)


def test_every_kernel_has_its_row(tmp_path: Path) -> None:
    found = report(conv_net("batch"), tmp_path, "--dims", "batch=4")
    rows = found["kernels"]
    assert [r["seconds"] for r in rows] == sorted((r["seconds"] for r in rows), reverse=True)
    assert sum(r["share"] for r in rows) == pytest.approx(1)
    assert sum(r["seconds"] for r in rows) == pytest.approx(found["kernels_seconds"])
    assert found["whole_seconds"] > 0 and found["threads"] == 2
    for r in rows:
        assert (
            r["nodes"] and r["rule"] and r["why"] and r["bound"] in ("compute", "memory", "launch")
        )
        assert r["calls"] >= 1 and r["bytes"] > 0 and r["roofline_percent"] >= 0
    # Every operator of the model is in some kernel.
    nodes = " ".join(n for r in rows for n in r["nodes"])
    assert all(f'"{n.name}"' in nodes for n in conv_net("batch").graph.node if n.op_type == "Conv")
    convolution = next(r for r in rows if any(n.startswith("Conv") for n in r["nodes"]))
    assert convolution["rule"] == "contraction" and len(convolution["steps"]) > 5
    assert any(step.startswith("mark(") and "vector" in step for step in convolution["steps"])


def test_the_sum_is_compared_with_the_whole(tmp_path: Path) -> None:
    text = profile(conv_net("batch"), tmp_path, "--dims", "batch=64").stdout
    assert "one by one; the whole model" in text and "% of the highest FMA rate" in text
    assert "machine     100 GFLOP/s; GB/s: L2 100 read 100 write, memory 10 read 10 write" in text
    # One thread: no kernel waits for a second one that a busy machine runs later.
    last = ("--threads", "1", "--repeat", "20")
    found = report(conv_net("batch"), tmp_path, "--dims", "batch=64", *last)
    assert found["threads"] == 1
    # Gaps between kernels and what else the machine does; not a factor of several.
    assert 0.2 < found["kernels_seconds"] / found["whole_seconds"] < 5


def test_operations_and_bytes_are_those_of_inspect(tmp_path: Path) -> None:
    m = attention("batch", "sequence")
    found = report(m, tmp_path, "--dims", "batch=2,sequence=7")
    command = ["inspect", str(tmp_path / "net.onnx"), "--dims", "batch=2,sequence=7", "--json"]
    (size,) = json.loads(CliRunner().invoke(cli.main, command).stdout)["sizes"]
    assert found["flops"] == size["flops"] > 0
    assert sum(r["flops"] for r in found["kernels"]) == found["flops"]


def test_one_kernel_with_its_steps(tmp_path: Path) -> None:
    every = report(conv_net("batch"), tmp_path)["kernels"]
    node_name = next(n.name for n in conv_net("batch").graph.node if n.op_type == "Conv")
    (one,) = report(conv_net("batch"), tmp_path, "--kernel", f'"{node_name}"')["kernels"]
    assert one["kernel"] in [r["kernel"] for r in every] and len(every) > 1
    text = profile(conv_net("batch"), tmp_path, "--kernel", f'"{node_name}"').stdout
    assert f'  from Conv "{node_name}" (net.onnx' in text
    assert all(f"  {step}" in text for step in one["steps"])
    wrong = profile(conv_net("batch"), tmp_path, "--kernel", "nothing", code=2)
    assert 'no kernel or source node contains "nothing"' in wrong.stderr


def test_a_reason_that_is_known_beforehand(tmp_path: Path) -> None:
    """A transposition moves data, the rest of the model is not called that."""
    nodes = [node("Transpose", "x", "t", perm=[1, 0]), node("Softmax", "t", "y", axis=0),
             node("CumSum", "y z", "s"), node("Transpose", "x", "u", perm=[1, 0])]  # fmt: skip
    m = model(nodes, {"x": numbers(300, 400)}, ["s", "u"], {"z": numbers(1).astype("int64") * 0})
    rows = report(m, tmp_path)["kernels"]
    moved = [r for r in rows if any("layout conversion" in w for w in r["why"])]
    assert moved and all(r["flops"] == 0 for r in moved) and len(moved) < len(rows)


def test_sizes_that_kernels_count(tmp_path: Path) -> None:
    """The dimension that NonZero counts is known when the kernels after it are measured."""
    nodes = [node("NonZero", "x", "i"), node("Cast", "i", "f", to=1), node("Exp", "f", "y")]
    rows = report(model(nodes, {"x": numbers(40, 50)}, ["y"]), tmp_path)["kernels"]
    assert len(rows) == 2
    assert any("exp" in r["kernel"] and 0 < r["flops"] <= 2 * 2000 for r in rows)


def test_a_saved_module_has_times_only(tmp_path: Path) -> None:
    path = tmp_path / "m.mc"
    mc.compile(conv_net(1)).save(path)
    result = CliRunner().invoke(cli.main, ["profile", str(path), "--json"])
    assert result.exit_code == 0, result.output
    assert "need the original model" in result.stderr
    rows = json.loads(result.stdout)["kernels"]
    assert rows and all(r["seconds"] >= 0 and "flops" not in r for r in rows)


def test_a_busy_machine_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "flops_now", lambda *_: 4e10)
    result = profile(conv_net(1), tmp_path)
    assert "runs at 40% of its highest rate now" in result.stderr
    assert profile_command._BUSY > 0.4
