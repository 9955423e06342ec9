"""`minicompiler verify`: tables, exit codes, JSON, and a reproducer that runs on its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from lens.faults import subtracts
from onnx_models import mlp, numbers

from minicompiler import cli


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MINICOMPILER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    onnx.save(mlp("batch"), tmp_path / "mlp.onnx")
    np.savez(tmp_path / "in.npz", x=numbers(3, 20))
    return "mlp.onnx"


def run(*args: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli.main, ["verify", *args, "--threads", "1"])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.mark.parametrize("against", ["interpreter", "onnxruntime"])
def test_a_right_model(model: str, against: str) -> None:
    output = run(model, "--inputs", "in.npz", "--against", against)
    assert f"Values, against {against}" in output and "(output)" in output
    assert "all values are within their bounds" in output
    assert not Path("reproducer").exists()


def test_inputs_that_are_not_given_are_random_and_said_to_be(model: str) -> None:
    assert "random values for x (with batch=4)" in run(model, "--dims", "batch=4..8")
    report = json.loads(run(model, "--inputs", "in.npz", "--json"))
    assert report["right"] and report["culprit"] is None and report["reproducer"] is None
    assert [v["verdict"] for v in report["values"]] == ["ok"] * len(report["values"])


def test_a_wrong_model(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        subtracts(patch)
        output = run(model, "--inputs", "in.npz", "--reproducer", "here", code=1)
    assert 'first value beyond its bound: "h" from MatMul "n_a"' in output
    assert "guilty: code generation `llvm` (fused_matmul_add_relu)" in output
    assert "check failed: the compiled model is wrong" in output
    # On its own, in a compiler without the fault.
    done = subprocess.run(
        [sys.executable, "here/reproduce.py"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.strip()) == (0, "nothing differs"), done.stderr


def test_what_cannot_be_verified(model: str, tmp_path: Path) -> None:
    (tmp_path / "net.mc").write_bytes(b"")
    assert "verify the model that it was compiled from" in run("net.mc", code=2)
    np.savez(tmp_path / "wrong.npz", z=numbers(3, 20))
    assert "the model has no input z" in run(model, "--inputs", "wrong.npz", code=2)
