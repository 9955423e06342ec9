"""The command line: results, exit codes, messages without tracebacks, JSON, and start-up time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import ModelProto
from onnx_models import conv_net, mlp, model, node, numbers, reference_of
from tolerance import assert_close

import minicompiler as mc
from minicompiler import bench, cli, inputs
from minicompiler.commands import options
from minicompiler.errors import InternalError, MinicompilerError, RunError

Cli = Callable[..., Result]
WIDE = {"COLUMNS": "200"}


@pytest.fixture
def call() -> Cli:
    """Runs a command in this process; the exit code must be the expected one."""

    def run(*args: str | Path, code: int = 0) -> Result:
        result = CliRunner().invoke(cli.main, [str(a) for a in args], env=WIDE)
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return result

    return run


def saved(m: ModelProto, folder: Path, name: str = "net.onnx") -> Path:
    path = folder / name
    onnx.save(m, path)
    return path


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """x[batch, 20] -> y[batch, 7]"""
    return saved(mlp("batch"), tmp_path)


def parsed(result: Result) -> Any:
    return json.loads(result.stdout)


# ---- demo ----------------------------------------------------------------------------------------
@pytest.mark.smoke
def test_the_demo_checks_itself(call: Cli) -> None:
    report = parsed(call("demo", "--size", "32", "--threads", "1", "--json"))
    assert report["error"] <= report["limit"] == 5e-5
    assert report["threads"] == 1 and report["latency_seconds"] > 0
    assert sum(k["flops"] for k in report["kernels"]) == report["flops"]


def test_the_demo_fails_when_the_result_is_wrong(
    call: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minicompiler.ops import evaluate

    right = evaluate.run_reference
    monkeypatch.setattr(evaluate, "run_reference", lambda *a: [1.001 * y for y in right(*a)])
    result = call("demo", "--size", "32", code=1)
    assert "check failed" in result.stderr
    for word in ("Stages", "plan_memory", "Kernels", "GFLOP/s", "latency"):
        assert word in result.stdout


# ---- compile and run -----------------------------------------------------------------------------
@pytest.mark.smoke
def test_compile_then_run_gives_the_outputs_of_onnxruntime(
    call: Cli, net: Path, tmp_path: Path
) -> None:
    result = call("compile", net, "--dims", "batch=1..8", "--threads", "1")
    assert "batch: from 1 to 8" in result.stdout
    x = numbers(3, 20)
    np.save(tmp_path / "x.npy", x)
    out = tmp_path / "y.npz"
    call("run", net.with_suffix(".mc"), "--input", f"x={tmp_path / 'x.npy'}", "--output", out)
    with np.load(out) as results:
        assert_close(results["y"], reference_of(mlp("batch"), {"x": x})[0], 64)


def test_a_saved_module_runs_without_the_compiler(call: Cli, net: Path, tmp_path: Path) -> None:
    call("compile", net, "-o", tmp_path / "m.mc")
    script = (
        "import sys\nfrom minicompiler.cli import main\n"
        f"main(['run', {str(tmp_path / 'm.mc')!r}], standalone_mode=False)\n"
        "print([m for m in sys.modules if m in ('onnx', 'minicompiler.driver')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_inputs_from_an_archive_and_json_output(call: Cli, net: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=numbers(2, 20))
    result = call("run", net, "--inputs", tmp_path / "in.npz", "--json")
    assert parsed(result)["outputs"][0]["type"] == "float32[2, 7]"
    assert result.stderr == ""


def test_random_inputs_are_announced(call: Cli, net: Path) -> None:
    result = call("run", net, "--dims", "batch=1..8")
    assert "random values for x (with batch=1)" in result.stderr
    assert "float32[1, 7]" in result.stdout
    assert "float32[4, 7]" in call("run", net, "--dims", "batch=4").stdout


@pytest.mark.parametrize("check", ["onnxruntime", "reference"])
def test_run_checks_its_results(call: Cli, net: Path, check: str) -> None:
    report = parsed(call("run", net, "--check", check, "--json"))
    assert report["check"]["errors"]["y"] <= 1e-5
    # Nothing is as exact as this.
    call("run", net, "--check", check, "--tolerance", "-1", code=1)


# ---- bench ---------------------------------------------------------------------------------------
def test_bench_measures_against_onnxruntime(call: Cli, net: Path) -> None:
    command = ["bench", net, "--threads", "1,2", "--dims", "batch=1,3", "--seconds", "0.1"]
    report = parsed(call(*command, "--against", "onnxruntime", "--kernels", "--json"))
    found = [(r["threads"], r["dims"]) for r in report["results"]]
    assert found == [(t, {"batch": n}) for t in (1, 2) for n in (1, 3)]
    for r in report["results"]:
        other = r["runtimes"]["onnxruntime"]
        low, high = other["ratio_quartiles"]
        assert 0 < low <= other["ratio"] <= high
        assert other["difference"] < 1e-5
        assert other["best_seconds"] <= other["median_seconds"] <= other["p99_seconds"]
        assert len(r["kernels"]) == 2
    # Twice three rows of 20 x 33 and 33 x 7, and the bias and ReLU of the first.
    assert report["results"][1]["flops"] >= 3 * 2 * (20 * 33 + 33 * 7)
    text = call("bench", net, "--seconds", "0.1", "--threads", "2", "--dims", "batch=3").stdout
    assert "net.onnx, 2 threads, batch=3" in text and "calls/s" in text


def test_a_missing_runtime_is_named(call: Cli, net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.PEERS, "torch", (bench.PEERS["torch"][0], ("no_such_package",)))
    result = call("bench", net, "--against", "torch", code=2)
    assert "pip install no_such_package" in result.stderr
    assert (
        "known: onnxruntime, openvino, torch"
        in call("bench", net, "--against", "tvm", code=2).stderr
    )


def test_the_ratio_is_taken_turn_by_turn() -> None:
    own = bench.Times(((1.0, 1.0), (2.0, 2.0), (4.0, 4.0)))
    other = bench.Times(((2.0, 2.0), (4.0, 4.0), (8.0, 8.0)))
    assert bench.ratios(own, other) == (2.0, 2.0, 2.0)
    assert own.summary()["mean"] == pytest.approx(7 / 3)


# ---- inspect (tests/test_inspect.py) and cache ---------------------------------------------------
def test_inspect_tells_operators_work_and_memory(call: Cli, tmp_path: Path) -> None:
    path = saved(conv_net("batch"), tmp_path)
    report = parsed(call("inspect", path, "--dims", "batch=1..4", "--json"))
    assert report["operators"]["conv"] == 3
    convolutions = 2 * (8 * 3 * 9 * 169 + 8 * 8 * 9 * 169 + 12 * 8 * 9 * 4)
    (size,) = report["sizes"]
    assert convolutions < size["flops"] < 1.1 * convolutions
    assert size["memory_bytes"]["arena"] > 0
    assert report["dims"] == {"batch": [1, 4, 1]}
    text = call("inspect", path).stdout
    assert "operator" in text and "parameters" in text


def test_the_cache_can_be_seen_and_cleared(
    call: Cli, net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINICOMPILER_CACHE", str(tmp_path / "cache"))
    call("run", net)
    count = parsed(call("cache", "info", "--json"))["entries"]
    assert count > 1
    assert parsed(call("cache", "clear", "--json")) == {"deleted": count}
    assert "0 entries" in call("cache", "info").stdout


# ---- mistakes ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run", "NET", "--dims", "batch"], 'ERROR: --dims: "batch" is not understood'),
        (["run", "NET", "--dims", "batch=8..2"], "batch from 8 to 2 is empty"),
        (["run", "NET", "--dims", "batch=1,2"], "several values of batch are for bench only"),
        (["run", "NET", "--dims", "width=2"], "width"),
        (["run", "NET", "--input", "x=missing.npy"], "missing.npy cannot be read"),
        (["run", "NET", "--input", "z=NET"], "cannot be read as numpy data"),
        (["run", "NET", "--input", "z"], "--input x=x.npy"),
        (["run", "NET", "--output", "no/folder/y.npz"], "cannot be written"),
        (["run", "NET", "--target", "tpu"], 'unknown target "tpu"'),
        (["bench", "NET", "--threads", "0"], "--threads 1,2"),
        (["run", "TEXT"], "is not an ONNX model"),
        (["run", "NOTHING.onnx"], "does not exist"),
        (["compile", "TEXT"], "is not an ONNX model"),
        (["compile", "NET", "-o", "NET"], "is the model itself"),
    ],
)
def test_a_mistake_ends_with_a_message(
    call: Cli, net: Path, tmp_path: Path, args: list[str], words: str
) -> None:
    text = tmp_path / "text.onnx"
    text.write_text("this is not a model at all")
    named = [a.replace("NET", str(net)).replace("TEXT", str(text)) for a in args]
    result = call(*named, code=2)
    assert words.replace("ERROR", "MinicompilerError") in result.stderr
    assert result.stdout == ""


def test_a_batch_may_be_empty(call: Cli, tmp_path: Path) -> None:
    path = tmp_path / "conv.onnx"
    onnx.save(conv_net(0), path)
    assert "float32[0, 5]" in call("run", path, "--check", "reference").stdout


def test_a_compiled_model_keeps_its_ranges(call: Cli, net: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.mc"
    call("compile", net, "-o", path, "--dims", "batch=2..8")
    assert "float32[2, 7]" in call("run", path).stdout
    assert "float32[5, 7]" in call("run", path, "--dims", "batch=5").stdout
    assert "from 2 to 8" in call("run", path, "--dims", "batch=9", code=2).stderr
    assert "ranges" in call("run", path, "--dims", "batch=2..4", code=2).stderr
    assert "no dimension width" in call("run", path, "--dims", "width=1", code=2).stderr
    assert "original model" in call("run", path, "--check", "reference", code=2).stderr


def test_a_reference_without_memory_ends_with_a_message(call: Cli, tmp_path: Path) -> None:
    """numpy stores a border that compiled code only imagines."""
    pool = node("AveragePool", "x", "y", kernel_shape=[2], pads=[2**62, 0], strides=[2**62])
    path = saved(model([pool], {"x": numbers(1, 1, 4)}, ["y"]), tmp_path)
    result = call("run", path, "--check", "reference", code=options.USER_ERROR)
    assert "not enough memory" in result.stderr
    assert "--dims" in result.stderr


def test_ctrl_c_ends_with_130(call: Cli, net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inputs, "read_inputs", interrupted)
    assert "interrupted" in call("run", net, code=130).stderr
    assert parsed(call("run", net, "--json", code=130))["error"] == "KeyboardInterrupt"


def test_an_error_is_one_document_too(call: Cli, net: Path) -> None:
    result = call("run", net, "--dims", "width=2", "--json", code=2)
    report = parsed(result)
    assert report["error"] == "ImportModelError" and "width" in report["message"]
    assert report["text"] in result.stderr


def test_a_mistake_of_the_compiler_has_its_own_exit_code(
    call: Cli, net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise InternalError("a value is read before it is made")

    monkeypatch.setattr(inputs, "read_inputs", broken)
    assert "InternalError: a value is read" in call("run", net, code=4).stderr


# ---- dimensions and differences ------------------------------------------------------------------
def test_random_inputs_that_no_memory_holds() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(RunError, match=r"no memory for a random input \[2305843009213693952, 2\]"):
        inputs.random_array(rng, np.dtype("float32"), (2**61, 2))


def test_dimensions_are_parsed() -> None:
    assert inputs.parse_dims(["batch=1..64,sequence=8..512:8", "n=3"]) == {
        "batch": [(1, 64)], "sequence": [(8, 512, 8)], "n": [3],
    }  # fmt: skip
    assert inputs.parse_dims(["batch=1,8,n=2.."]) == {"batch": [1, 8], "n": [(2, None)]}
    assert inputs.parse_dims([]) == {}
    with pytest.raises(MinicompilerError, match="not understood"):
        inputs.parse_dims(["1,2"])


def test_random_inputs_have_legal_sizes() -> None:
    plan = mc.compile(mlp("batch"), dims={"batch": (3, 64, 8)}).plan
    sizes = inputs.sizes_for(plan, {})
    assert sizes == {"batch": 8}
    assert inputs.random_inputs(plan, sizes, {})["x"].shape == (8, 20)
    with pytest.raises(RunError, match="no dimension n"):
        inputs.sizes_for(plan, {"n": 1})


def test_the_difference_of_two_results() -> None:
    a = np.array([1, 2, 4], np.float32)
    assert inputs.difference(a, a) == 0
    assert inputs.difference(a + np.float32(0.5), a) == 0.125
    assert inputs.difference(a, a.astype(np.float64)) == np.inf
    assert inputs.difference(a[:2], a) == np.inf
    broken = a.copy()
    broken[1] = np.nan
    assert inputs.difference(broken, a) == np.inf
    assert inputs.difference(a, broken) == np.inf
    assert inputs.difference(broken, broken) == 0
    assert inputs.difference(np.array([1, 2]), np.array([1, 3])) == np.inf


# ---- as a program --------------------------------------------------------------------------------
def program(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "minicompiler.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})


@pytest.mark.smoke
def test_help_is_quick_and_piped_output_is_plain(net: Path) -> None:
    best = 10.0
    for _ in range(3):  # of several attempts on a busy machine
        start = time.perf_counter()
        done = program("--help")
        best = min(best, time.perf_counter() - start)
        assert done.returncode == 0 and "compile" in done.stdout
    assert best < 2  # 0.15 s on an idle machine
    shown = program("run", str(net), FORCE_COLOR="1", NO_COLOR="1")
    assert shown.returncode == 0 and "\x1b[3" not in shown.stdout
    piped = program("run", str(net))
    assert "\x1b" not in piped.stdout + piped.stderr


def test_importing_the_package_is_quick() -> None:
    """At most 0.3 s, and nothing heavy: the best of several attempts on a busy machine."""
    script = (
        "import time, sys; t = time.perf_counter(); import minicompiler;"
        "print(time.perf_counter() - t);"
        "print([m for m in sys.modules if m in ('onnx', 'llvmlite', 'numpy', 'rich', 'click')])"
    )
    best = 10.0
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        seconds, heavy = done.stdout.splitlines()
        assert heavy == "[]"
        best = min(best, float(seconds))
    assert best <= 0.3
