"""The debug ladder, dumps of all artifacts, and overrides of kernels from files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from lens.networks import network, scaled

import minicompiler as mc
from minicompiler.errors import MinicompilerError
from minicompiler.runtime.diskcache import DiskCache

X = np.array([1.0, -3.0, 0.5], np.float32)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINICOMPILER_CACHE", str(tmp_path / "cache"))
    for name in ("DEBUG", "DUMP", "OVERRIDE"):
        monkeypatch.delenv(f"MINICOMPILER_{name}", raising=False)


def result(**options: object) -> np.ndarray:
    """What `scaled` gives for X."""
    (y,) = mc.compile(scaled(), threads=1, **options)(X)  # type: ignore[arg-type]
    return np.asarray(y)


# ---- the ladder ---------------------------------------------------------------------------------
LADDER = (
    "[graph] net: fold_batch_norm (",  # 1: a line per stage
    "%0 = conv(%x, @c, @.bias)",  # 2: graphs
    "fused_softmax = softmax",  # 3: what was fused
    "rule: contraction",  # 4: inside kernels
    "define void @fused_softmax",  # 5: LLVM IR
    ".globl\tfused_softmax",  # 6: assembly
)


@pytest.mark.parametrize("level", range(7))
def test_each_level_tells_more(
    level: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINICOMPILER_DEBUG", str(level))
    mc.compile(network()[0], threads=1)
    told = capsys.readouterr()
    assert told.out == ""
    assert [text in told.err for text in LADDER] == [k < level for k in range(6)]
    assert bool(told.err) == (level > 0)


def test_inside_kernels_there_is_something_to_see_although_they_are_cached(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result()
    monkeypatch.setenv("MINICOMPILER_DEBUG", "1")
    result()
    assert "fused_mul: cached" in capsys.readouterr().err
    monkeypatch.setenv("MINICOMPILER_DEBUG", "5")
    result()
    assert "define void @fused_mul" in capsys.readouterr().err


# ---- dump ---------------------------------------------------------------------------------------
def test_a_dump_holds_every_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINICOMPILER_DUMP", str(tmp_path / "dump"))
    module = mc.compile(network()[0], threads=1)
    files = {str(p.relative_to(tmp_path / "dump")) for p in (tmp_path / "dump").rglob("*.*")}
    kernel = "fused_conv_relu"
    assert {f"{kernel}/{name}" for name in (
        "to_tir.txt", "to_tir.json", "schedule.txt", "schedule.json", "schedule.steps.json",
        "lower_blocks.txt", "llvm.ll", "asm.s",
    )} <= files  # fmt: skip
    assert "01-import.txt" in files
    assert any(f.endswith("_prepare_0/llvm.ll") for f in files)
    assert any(f.endswith("-fold_batch_norm.txt") for f in files)
    text = (tmp_path / "dump" / kernel / "schedule.txt").read_text()
    assert [s.text for s in module.stages if (s.subject, s.name) == (kernel, "schedule")] == [text]


def test_a_dump_by_option_and_one_that_cannot_be_written(tmp_path: Path) -> None:
    np.testing.assert_array_equal(result(dump=tmp_path / "dump"), 2 * X)
    assert (tmp_path / "dump" / "fused_mul" / "llvm.ll").exists()
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(MinicompilerError, match=r"the dump folder .*file cannot be written"):
        result(dump=blocked)


# ---- override -----------------------------------------------------------------------------------
@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """The dump of `fused_mul`, and an empty folder to override it from."""
    result(dump=tmp_path / "dump")
    own = tmp_path / "override" / "fused_mul"
    own.mkdir(parents=True)
    return tmp_path / "dump" / "fused_mul", own


def edited(folders: tuple[Path, Path], file: str, old: str, new: str) -> Path:
    """The override folder with one file of the dump, changed."""
    dump, own = folders
    text = (dump / file).read_text()
    assert old in text
    (own / file).write_text(text.replace(old, new))
    return own.parent


@pytest.mark.parametrize("file", ["to_tir.json", "schedule.json"])
def test_a_loop_nest_replaces_that_of_its_stage(folders: tuple[Path, Path], file: str) -> None:
    folder = edited(folders, file, '"Const", 2.0', '"Const", 3.0')
    np.testing.assert_array_equal(result(override=folder), 3 * X)


def test_llvm_text_replaces_what_was_emitted(folders: tuple[Path, Path]) -> None:
    folder = edited(folders, "llvm.ll", "fmul contract", "fadd contract")
    np.testing.assert_array_equal(result(override=folder), X + 2)


def test_schedule_steps_are_replayed(folders: tuple[Path, Path]) -> None:
    steps = [
        {"primitive": "split", "args": {"loop": "i0", "factor": 4, "tail": "mask"}},
        {"primitive": "mark", "args": {"loop": "i0_i", "kind": "unroll"}},
    ]
    (folders[1] / "schedule.steps.json").write_text(json.dumps(steps))
    module = mc.compile(scaled(), threads=1, override=folders[1].parent)
    np.testing.assert_array_equal(module(X)[0], 2 * X)
    (schedule,) = [s for s in module.stages if s.name == "schedule"]
    assert [s["primitive"] for s in schedule.details["steps"]] == ["split", "mark"]
    assert "unroll i0_i in 4:" in schedule.text


def test_an_override_leaves_no_trace_in_the_cache(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = edited(folders, "to_tir.json", '"Const", 2.0', '"Const", 3.0')
    before = DiskCache().info().entries
    monkeypatch.setenv("MINICOMPILER_OVERRIDE", str(folder))
    for _ in range(2):
        np.testing.assert_array_equal(result(), 3 * X)
    assert DiskCache().info().entries <= before + 1  # the native main of the other kernel's name
    monkeypatch.delenv("MINICOMPILER_OVERRIDE")
    np.testing.assert_array_equal(result(), 2 * X)
    # Also when both live in one process.
    edited(folders, "to_tir.json", '"Const", 2.0', '"Const", 5.0')
    np.testing.assert_array_equal(result(override=folder), 5 * X)
    np.testing.assert_array_equal(result(), 2 * X)


def refusal(folder: Path) -> str:
    with pytest.raises(MinicompilerError) as e:
        result(override=folder)
    return str(e.value)


def test_overrides_that_fit_nothing_are_refused_by_name(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    own = folders[1]
    assert "the override folder" in refusal(tmp_path / "nowhere")
    (own / "schedule.txt").write_text("for i in n:")
    text = refusal(own.parent)
    assert "schedule.txt" in text and "to_tir.json, schedule.steps.json" in text
    (own / "schedule.txt").unlink()
    (own.parent / "fused_muk").mkdir()
    text = refusal(own.parent)
    assert "fused_muk" in text and "names no kernel" in text and "its kernels: fused_mul" in text


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("to_tir.json", "{", "is not JSON"),
        ("to_tir.json", '{"nodes": [["Foo"]], "root": {"ref": 0}}', "is no loop nest"),
        ("to_tir.json", '{"nodes": [], "root": 7}', "holds a int, not a loop nest"),
        ("schedule.steps.json", '{"primitive": "split"}', "is no list of steps"),
        ("schedule.steps.json", '[{"primitive": "split", "args": {"loop": "z", "factor": 2}}]',
         "there is no loop 'z'"),
        ("llvm.ll", "define void @fused_mul( {", "LLVM refused the generated code"),
    ],
)  # fmt: skip
def test_damaged_overrides_are_refused(
    folders: tuple[Path, Path], file: str, content: str, message: str
) -> None:
    (folders[1] / file).write_text(content)
    assert message in refusal(folders[1].parent)


def test_an_override_keeps_the_parameters_of_its_kernel(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    mc.compile(network()[0], threads=1, dump=tmp_path / "other")
    text = (tmp_path / "other" / "fused_softmax" / "to_tir.json").read_text()
    (folders[1] / "to_tir.json").write_text(text)
    assert "has other parameters than the kernel that it replaces" in refusal(folders[1].parent)
