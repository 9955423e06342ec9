"""`minicompiler inspect`: work against counts done by hand, memory against what a process takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import ModelProto
from onnx_models import conv_net, model, node, numbers

import minicompiler as mc
from minicompiler import cli, footprint
from minicompiler.errors import RunError, UnsupportedError

Inspect = Callable[..., Any]


@pytest.fixture
def inspect(tmp_path: Path) -> Inspect:
    """Runs the command on a model: the parsed JSON, or the result itself with text=True."""

    def run(m: ModelProto, *args: str, code: int = 0, text: bool = False) -> Any:
        path = tmp_path / "net.onnx"
        onnx.save(m, path)
        options = args if text else (*args, "--json")
        command = ["inspect", str(path), *options]
        result: Result = CliRunner().invoke(cli.main, command, env={"COLUMNS": "200"})
        assert result.exit_code == code, result.output
        return result if text else json.loads(result.stdout)

    return run


# ---- work, counted by hand -----------------------------------------------------------------------
# What the compiler does with constants is not part of a call, so every operand is an input. Bytes
# are 4 for each float32 that is read or written, each once.
def convolution() -> tuple[ModelProto, int, int]:
    """x[1, 3, 8, 10] by w[4, 3, 3, 3] with padding 1: y[1, 4, 8, 10].

    Each of the 4*8*10 results takes 3*3*3 multiplications and as many additions; padding counts.
    """
    m = model(
        [node("Conv", "x w", "y", pads=[1, 1, 1, 1])],
        {"x": numbers(1, 3, 8, 10), "w": numbers(4, 3, 3, 3)},
        ["y"],
    )
    return m, (4 * 8 * 10) * 2 * (3 * 3 * 3), 4 * (3 * 8 * 10 + 4 * 3 * 3 * 3 + 4 * 8 * 10)


def product() -> tuple[ModelProto, int, int]:
    """a[5, 6] times b[6, 7]: 5*7 results of 6 multiplications and 6 additions."""
    m = model([node("MatMul", "a b", "y")], {"a": numbers(5, 6), "b": numbers(6, 7)}, ["y"])
    return m, 5 * 7 * 2 * 6, 4 * (5 * 6 + 6 * 7 + 5 * 7)


def softmax() -> tuple[ModelProto, int, int]:
    """exp(x - max) * (1 / sum) of [5, 9]: per element a subtraction, an exponential, an addition
    and a multiplication, per row a division; finding the largest of a row counts nothing."""
    m = model([node("Softmax", "x", "y")], {"x": numbers(5, 9)}, ["y"])
    return m, 4 * 5 * 9 + 5, 4 * 2 * 5 * 9


def addition() -> tuple[ModelProto, int, int]:
    """x[4, 6] + b[6]: an addition per element; b is read once."""
    m = model([node("Add", "x b", "y")], {"x": numbers(4, 6), "b": numbers(6)}, ["y"])
    return m, 4 * 6, 4 * (4 * 6 + 6 + 4 * 6)


def pooling() -> tuple[ModelProto, int, int]:
    """The largest of 2x2 of x[1, 3, 8, 10]: comparisons are no operations."""
    kernel = {"kernel_shape": [2, 2], "strides": [2, 2]}
    m = model([node("MaxPool", "x", "y", **kernel)], {"x": numbers(1, 3, 8, 10)}, ["y"])
    return m, 0, 4 * (3 * 8 * 10 + 3 * 4 * 5)


def lookup() -> tuple[ModelProto, int, int]:
    """3 rows of a table of 1000 rows of 8: the other rows are not read. Indices are int64."""
    m = model(
        [node("Gather", "t i", "y")],
        {"t": numbers(1000, 8), "i": np.array([1, 5, 7])},
        ["y"],
    )
    return m, 0, 4 * 3 * 8 + 8 * 3 + 4 * 3 * 8


@pytest.mark.parametrize("case", [convolution, product, softmax, addition, pooling, lookup])
def test_work_is_what_a_count_by_hand_gives(
    inspect: Inspect, case: Callable[[], tuple[ModelProto, int, int]]
) -> None:
    m, flops, moved = case()
    (found,) = inspect(m, "--kernels")["sizes"]
    assert (found["flops"], found["bytes_moved"]) == (flops, moved)
    assert found["intensity"] == pytest.approx(flops / moved)
    assert sum(k["flops"] for k in found["kernels"]) == flops
    assert sum(k["bytes_moved"] for k in found["kernels"]) == moved


# ---- several sizes -------------------------------------------------------------------------------
def test_several_sizes_at_once(inspect: Inspect) -> None:
    report = inspect(conv_net("batch"), "--dims", "batch=1,4,16")
    assert [s["dims"] for s in report["sizes"]] == [{"batch": n} for n in (1, 4, 16)]
    assert report["dims"] == {"batch": [1, 16, 1]}
    one, four, many = report["sizes"]
    assert four["flops"] == 4 * one["flops"] and many["flops"] == 16 * one["flops"]
    assert many["memory_bytes"]["inputs"] == 16 * one["memory_bytes"]["inputs"]
    assert many["memory_bytes"]["arena"] > 10 * one["memory_bytes"]["arena"]
    assert one["peak_bytes"] == sum(one["memory_bytes"].values())
    # More images for the same weights.
    assert many["intensity"] > four["intensity"] > one["intensity"]


def test_operators_layers_and_weights(inspect: Inspect) -> None:
    report = inspect(conv_net("batch"), "--layers")
    assert report["operators"]["conv"] == 3
    assert sum(report["operators"].values()) == len(report["layers"])
    first = next(x for x in report["layers"] if x["operator"] == "conv")
    assert first["types"][0].startswith("float32[batch, 8, ") and first["from"]
    assert report["parameter_bytes"] == 4 * report["parameters"] > 0
    text = inspect(conv_net("batch"), "--layers", "--kernels", text=True).stdout
    for word in ("Operators", "Layers", "Work of one call", "Memory of one call", "FLOP/B", "peak"):
        assert word in text


def test_a_saved_module_tells_its_memory(tmp_path: Path) -> None:
    path = tmp_path / "m.mc"
    mc.compile(conv_net("batch"), dims={"batch": (1, 8)}).save(path)
    command = ["inspect", str(path), "--dims", "batch=1,8", "--json"]
    report = json.loads(CliRunner().invoke(cli.main, command).stdout)
    assert [s["dims"] for s in report["sizes"]] == [{"batch": 1}, {"batch": 8}]
    assert "flops" not in report["sizes"][0] and "operators" not in report


# ---- what is not supported -----------------------------------------------------------------------
def strange() -> ModelProto:
    """A model with two operators that nothing can import, and one that is known."""
    nodes = [
        node("StringNormalizer", "x", "a"),
        node("StringNormalizer", "a", "y"),
        node("RegexFullMatch", "x", "z"),
        node("Identity", "x", "w"),
    ]
    return model(nodes, {"x": numbers(3)}, ["y", "z", "w"])


def test_what_is_not_supported_is_listed(inspect: Inspect) -> None:
    report = inspect(strange(), code=3)
    assert report == {
        "supported": False,
        "operators": {"StringNormalizer": 2, "RegexFullMatch": 1, "Identity": 1},
        "unsupported": {"StringNormalizer": 2, "RegexFullMatch": 1},
    }
    result = inspect(strange(), code=3, text=True)
    assert result.stdout.count("not supported") == 2
    assert "2 x StringNormalizer" in result.stderr and "1 x RegexFullMatch" in result.stderr


def test_the_error_carries_the_numbers() -> None:
    with pytest.raises(UnsupportedError) as caught:
        mc.compile(strange())
    assert caught.value.operators == {"StringNormalizer": 2, "RegexFullMatch": 1}


# ---- memory --------------------------------------------------------------------------------------
def wide(batch: str | int) -> ModelProto:
    """Two products with 1000x2000 and 2000x1000 weights: 16 MB of them, and wide activations."""
    constants = {"v": numbers(1000, 2000), "w": numbers(2000, 1000)}
    nodes = [node("MatMul", "x v", "h"), node("Tanh", "h", "t"), node("MatMul", "t w", "y")]
    return model(nodes, {"x": numbers(1, 1000)}, ["y"], constants, shapes={"x": [batch, 1000]})


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured through /proc")
def test_predicted_memory_is_what_a_process_takes(inspect: Inspect) -> None:
    """Within a tenth, for small and large intermediate values."""
    report = inspect(wide("batch"), "--dims", "batch=8,2048", "--threads", "2", "--measure")
    for found in report["sizes"]:
        assert found["peak_bytes"] == pytest.approx(found["measured_bytes"], rel=0.1), found
    small, large = (s["measured_bytes"] for s in report["sizes"])
    assert small > 16e6 and large > small + 2048 * 4 * 4000


def test_a_model_that_cannot_run_cannot_be_measured(tmp_path: Path) -> None:
    path = tmp_path / "broken.mc"
    path.write_bytes(b"nothing")
    with pytest.raises(RunError, match="is not a file saved by minicompiler"):
        footprint.measure(str(path), 1, {})
