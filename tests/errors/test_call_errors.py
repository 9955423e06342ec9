"""What a user reads when a compiled model is called, saved, loaded or asked for in a wrong way."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_models import mlp, model, node, numbers

import minicompiler as mc
from minicompiler.errors import MinicompilerError
from minicompiler.runtime import savefile
from minicompiler.runtime.module import Module
from minicompiler.target import Target

Golden = Callable[[str, str], None]
X = numbers(3, 20)
OUT = np.zeros((3, 7), np.float32)


@pytest.fixture(scope="module")
def net() -> Module:
    """x[batch, 20] -> y[batch, 7], batch from 2 to 64 in twos or one."""
    return mc.compile(mlp("batch"), dims={"batch": (1, 64)}, threads=1)


@pytest.fixture(scope="module")
def pair() -> Module:
    """x[n, 4] and y[m, 4], which have to be equally long."""
    m = model(
        [node("Add", "x y", "z")], {"x": numbers(2, 4), "y": numbers(2, 4)}, ["z"],
        shapes={"x": ("n", 4), "y": ("m", 4)},
    )  # fmt: skip
    return mc.compile(m, threads=1)


@pytest.fixture(scope="module")
def outer() -> Module:
    """x[n] -> the sum of all products: n*n numbers in between."""
    nodes = [
        node("Unsqueeze", "x one", "r"), node("Unsqueeze", "x zero", "c"), node("Mul", "r c", "o"),
        node("Softmax", "o", "s"), node("MatMul", "s x", "y"),
    ]  # fmt: skip
    constants = {"one": np.array([1]), "zero": np.array([0])}
    m = model(nodes, {"x": numbers(4)}, ["y"], constants, shapes={"x": ("n",)})
    return mc.compile(m, threads=1)


def message(run: Callable[[], object]) -> str:
    with pytest.raises(MinicompilerError) as caught:
        run()
    return f"{type(caught.value).__name__}: {caught.value}"


# ---- arguments ----------------------------------------------------------------------------------
CALLS: dict[str, Callable[[Module], object]] = {
    "no_input": lambda m: m(),
    "too_many_inputs": lambda m: m(X, X),
    "wrong_dtype": lambda m: m(X.astype(np.float64)),
    "wrong_rank": lambda m: m(X[0]),
    "wrong_size": lambda m: m(numbers(3, 21)),
    "no_rows": lambda m: m(numbers(0, 20)),
    "too_many_rows": lambda m: m(numbers(65, 20)),
    "ragged_list": lambda m: m([[1.0, 2.0], [3.0]]),
    "text": lambda m: m("x.npy"),
    "number_too_large": lambda m: m([[1e300] * 20]),
    "unknown_name": lambda m: m.run({"X": X}),
    "missing_name": lambda m: m.run({}),
    "unknown_output": lambda m: m.run({"x": X}, out={"Y": OUT}),
    "out_is_an_array": lambda m: m(X, out=OUT),
    "out_of_wrong_count": lambda m: m(X, out=[OUT, OUT]),
    "out_of_wrong_dtype": lambda m: m(X, out=[OUT.astype(np.float64)]),
    "out_of_wrong_shape": lambda m: m(X, out=[OUT[:2]]),
    "out_not_contiguous": lambda m: m(X, out=[np.asfortranarray(OUT)]),
    "out_read_only": lambda m: m(X, out=[np.frombuffer(OUT.tobytes(), np.float32).reshape(3, 7)]),
    "out_overlaps": lambda m: m(X, out=[X.reshape(-1)[:21].reshape(3, 7)]),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_call(name: str, net: Module, golden: Golden) -> None:
    golden(f"calls/{name}", message(lambda: CALLS[name](net)))
    assert net(X)[0].shape == (3, 7)


def test_inputs_that_do_not_fit_together(pair: Module, golden: Golden) -> None:
    golden("calls/unequal", message(lambda: pair(numbers(2, 4), numbers(3, 4))))


def test_an_arena_larger_than_the_memory(outer: Module) -> None:
    text = message(lambda: outer(np.ones(3_000_000, np.float32)))
    assert text.startswith("RunError: this call needs ") and "GiB are available" in text
    assert "split the batch" in text


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("level", {"level": 9}),
        ("target", {"target": "gpu"}),
        ("threads", {"threads": 0}),
        ("limits", {"limits": None}),
    ],
)
def test_wrong_options(name: str, options: dict[str, Any], golden: Golden) -> None:
    if name == "limits":
        golden("calls/option_limits", message(lambda: mc.Limits(nodes=0)))
    elif name == "threads":
        golden("calls/option_threads", message(lambda: mc.compile(mlp(1), threads=0)))
    else:
        golden(f"calls/option_{name}", message(lambda: mc.compile(mlp(1), **options)))


def test_a_wrong_environment_variable(monkeypatch: pytest.MonkeyPatch, golden: Golden) -> None:
    monkeypatch.setenv("MINICOMPILER_CHECKED", "yes")
    golden("calls/environment", message(lambda: mc.compile(mlp(1))))


# ---- files --------------------------------------------------------------------------------------
@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, net: Module) -> Path:
    """A folder to be in, with net.mc, so that messages hold no other path."""
    monkeypatch.chdir(tmp_path)
    net.save("net.mc")
    return tmp_path


def damaged(path: Path, at: int, value: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= value
    path.write_bytes(data)


def newer(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8] = 9
    data[48:64] = hashlib.blake2b(bytes(data[:48]), digest_size=16).digest()
    path.write_bytes(data)


FILES: dict[str, Callable[[Path], object]] = {
    "absent": lambda p: mc.load("absent.mc"),
    "folder": lambda p: mc.load("."),
    "empty": lambda p: ((p / "net.mc").write_bytes(b"") and None) or mc.load("net.mc"),
    "onnx": lambda p: (
        (p / "net.onnx").write_bytes(mlp(1).SerializeToString()) and mc.load("net.onnx")
    ),
    "cut_off": lambda p: os.truncate("net.mc", 2000) or mc.load("net.mc"),
    "damaged_header": lambda p: damaged(p / "net.mc", 100, 1) or mc.load("net.mc"),
    "damaged_blob": lambda p: damaged(p / "net.mc", -1, 1) or mc.load("net.mc"),
    "newer": lambda p: newer(p / "net.mc") or mc.load("net.mc"),
    "threads": lambda p: mc.load("net.mc", threads=0),
    "model_absent": lambda p: mc.compile("absent.onnx"),
    "model_folder": lambda p: mc.compile("."),
}


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_file(name: str, here: Path, golden: Golden) -> None:
    # Sizes of files differ from machine to machine.
    text = re.sub(r"\d{3,}", "N", message(lambda: FILES[name](here)))
    golden(f"files/{name}", text)


def test_saving_where_nothing_can_be_written(net: Module, here: Path) -> None:
    text = message(lambda: net.save("no/such/folder.mc"))
    assert 'no/such/folder.mc": No such file or directory' in text
    assert "check that the folder exists" in text


def test_another_processor(net: Module, here: Path, golden: Golden) -> None:
    host = Target.host()
    other = dataclasses.replace(host, features=(*host.features, "avx1024"))
    foreign = Module(net.plan, net._objects, net._main_object, net._constants, other)
    foreign.save("foreign.mc")
    golden("files/another_processor", message(lambda: mc.load("foreign.mc")))
    golden("calls/another_processor", message(lambda: foreign(X)))


def test_a_container_of_something_else(here: Path, golden: Golden) -> None:
    savefile.write("other.mc", {"what": "a cache entry"}, {})
    golden("files/no_module", message(lambda: mc.load("other.mc")))


@pytest.mark.skipif(os.name == "nt", reason="permissions are other ones there")
def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is a file: true for root as well, who may write everywhere."""
    (tmp_path / "cache").write_text("not a folder")
    monkeypatch.setenv("MINICOMPILER_CACHE", str(tmp_path / "cache"))
    with pytest.warns(RuntimeWarning, match="cannot use the cache folder"):
        m = mc.compile(mlp(1), threads=1)
    assert m(numbers(1, 20))[0].shape == (1, 7)
