"""The measured limits of this machine: plausible, in order, and kept on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from minicompiler import machine
from minicompiler.errors import RunError
from minicompiler.machine import Level, Peaks
from minicompiler.runtime.pool import get_pool
from minicompiler.target import Target


def test_peaks_are_plausible() -> None:
    target = Target.host()
    found = machine.measure(target, 1)
    # A vector of additions and multiplications per cycle at 0.1 GHz, two of them at 10 GHz.
    per_cycle = target.vector_bytes / 4 * 2
    assert 0.1e9 * per_cycle < found.flops < 2 * 10e9 * per_cycle
    assert [level.name for level in found.levels] == ["L2", "L3", "memory"]
    assert all(1e8 < rate < 1e13 for x in found.levels for rate in (x.read, x.write))
    # Caches are faster than memory, with room for a machine that others use.
    assert found.levels[0].read > 0.5 * found.memory.read
    assert 0 < found.launch < 1e-2


def test_every_thread_works_on_its_own_part() -> None:
    """Two threads write 1 to all of the memory that is counted, and to nothing beyond."""
    meter = machine.Meter(Target.host(), 2)
    block = meter.lanes * machine._CHAINS  # elements of one round of the loop
    memory = np.zeros(6 * block + 8, np.int32)
    meter.seconds("mc_write", 1, memory.ctypes.data, 3 * block * 4)
    np.testing.assert_array_equal(memory[: 6 * block], 1)
    np.testing.assert_array_equal(memory[6 * block :], 0)


def test_peaks_are_kept_and_measured_again_when_too_low(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINICOMPILER_CACHE", str(tmp_path))
    levels = (Level("L2", 1000, 4e9, 2e9), Level("memory", 10**9, 2e9, 1e9))
    results = [Peaks(1, flops, levels, 1e-6) for flops in (1e9, 2e9, 3e9)]
    measured = iter(results)
    monkeypatch.setattr(machine, "measure", lambda *_: next(measured))
    now = 1e9
    monkeypatch.setattr(machine, "flops_now", lambda *_: now)
    target = Target.host()
    assert machine.peaks(target, 1) == results[0]
    assert machine.peaks(target, 1) == results[0]  # from the disk
    now = 2e9  # faster than the kept peak: that was measured on a busy machine
    assert machine.peaks(target, 1) == results[1]
    now = 1e9
    assert machine.peaks(target, 1) == results[1]
    assert machine.peaks(target, 1, again=True) == results[2]


def test_the_memory_that_holds_some_bytes() -> None:
    levels = (Level("L2", 1000, 4e9, 2e9), Level("memory", 10**6, 2e9, 1e9))
    found = Peaks(1, 1e9, levels, 1e-6)
    assert [found.level(n).name for n in (0, 1000, 1001, 10**9)] == ["L2", "L2", "memory", "memory"]
    assert found.memory.name == "memory"


def test_a_busy_pool_is_not_measured() -> None:
    with get_pool(2).lease(), pytest.raises(RunError, match="another call is using the threads"):
        machine.measure(Target.host(), 2)
