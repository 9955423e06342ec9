"""The fixed part of fuzzing: the same few hundred damaged files at every run. See tests/fuzz.py."""

from __future__ import annotations

import collections
import subprocess
import sys
from pathlib import Path

import fuzz
import numpy as np
import onnx
import pytest
from mutations import mutated_model, mutated_module
from onnx_models import mlp

CASES = 200


def test_damaged_files_end_with_an_error_or_a_right_result(tmp_path: Path) -> None:
    report = fuzz.fuzz(tmp_path, seed=0, start=0, count=CASES, backend=False)
    assert report["findings"] == {}
    counts = report["counts"]
    refused = sum(n for state, n in counts.items() if state.endswith("Error"))
    assert refused > CASES // 4 and counts["right"] > CASES // 10
    assert refused + counts["right"] + counts.get("large", 0) == CASES


def test_mutations_repeat_and_differ() -> None:
    data = mlp("n").SerializeToString()
    made = [mutated_model(np.random.default_rng(k), data, [data]) for k in range(200)]
    assert made == [mutated_model(np.random.default_rng(k), data, [data]) for k in range(200)]
    assert len(set(made)) > 150
    readable = 0
    for m in made:
        try:
            onnx.ModelProto.FromString(m)
            readable += 1
        except Exception:
            continue
    assert readable > 150


def test_modules_are_damaged_in_both_ways() -> None:
    (data, *_) = fuzz.seed_modules()
    made = [mutated_module(np.random.default_rng(k), data) for k in range(40)]
    assert {forged for _, forged in made} == {True, False}
    assert all(m != data for m, forged in made if not forged)


CRASH = """
import fuzz, os, time
def attempt(path, forged):
    case = int(open(path.parent.parent / "position").read())
    if case == 3: os.abort()
    if case == 5:
        while True: pass
    if case == 7: open("/etc/hostname")
    if case == 8: raise KeyError("x")
    return "right", "", ""
fuzz.attempt, fuzz.SECONDS = attempt, 1
fuzz.child(fuzz.Path({folder!r}), 0, {start}, {stop})
"""


def test_what_goes_wrong_in_a_child_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One crash, one hang and one file outside: each loses one case, the others are done."""
    (tmp_path / "seeds").mkdir()
    (tmp_path / "seeds" / "0.onnx").write_bytes(mlp(1).SerializeToString())
    (tmp_path / "seeds" / "0.mc").write_bytes(fuzz.seed_modules()[0])
    right = subprocess.Popen

    def run(command: list[str], **how: object) -> subprocess.Popen[str]:
        start, stop = command[command.index("--child") + 1].split(":")
        text = CRASH.format(folder=str(tmp_path), start=start, stop=stop)
        here = str(Path(fuzz.__file__).parent)
        how["env"] = {**how["env"], "PYTHONPATH": here}  # type: ignore[dict-item]
        return right([sys.executable, "-X", "faulthandler", "-c", text], **how)  # type: ignore[call-overload]

    monkeypatch.setattr(fuzz.subprocess, "Popen", run)
    counts: collections.Counter[str] = collections.Counter()
    found = {f.case: f.state for f in fuzz.findings_of(tmp_path, 0, 0, 8, counts)}
    assert found == {3: "crash", 5: "hang", 7: "access"}
    assert counts["right"] == 6 and counts["hang"] == 1 and counts["crash"] == 1


def test_a_child_that_waits_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = subprocess.Popen

    def run(command: list[str], **how: object) -> subprocess.Popen[str]:
        return right([sys.executable, "-c", "import time; time.sleep(1000)"], **how)  # type: ignore[call-overload]

    monkeypatch.setattr(fuzz.subprocess, "Popen", run)
    monkeypatch.setattr(fuzz, "IDLE", 1)
    found = list(fuzz.findings_of(tmp_path, 0, 4, 6, collections.Counter()))
    assert [(f.case, f.state) for f in found] == [(4, "hang"), (5, "hang")]
