"""What `compile` leaves behind of itself: nothing; and code for other machines than this one."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import numpy as np
import pytest

import minicompiler as mc
from minicompiler import kernel
from minicompiler.context import Context
from minicompiler.errors import MinicompilerError, RunError
from minicompiler.extensions import Extensions
from minicompiler.frontend.builder import Builder
from minicompiler.ir.graph import Function
from minicompiler.machine import Meter
from minicompiler.target import Target


def doubled() -> Function:
    net = Builder("doubled")
    x = net.input("x", (4,))
    return net.function(y=net.add(x, x))


@pytest.mark.parametrize("fails", [False, True])
def test_the_settings_of_the_interpreter_are_as_before(fails: bool) -> None:
    seen = []

    def look(fn: Function, ctx: Context) -> Function:
        seen.append((sys.getswitchinterval(), gc.get_threshold()))
        if fails:
            raise MinicompilerError("a pass that fails")
        return fn

    before = sys.getswitchinterval(), gc.get_threshold()
    own = Extensions(passes=lambda passes: (look, *passes))
    if fails:
        with pytest.raises(MinicompilerError, match="a pass that fails"):
            mc.compile(doubled(), extensions=own)
    else:
        mc.compile(doubled(), extensions=own)
    assert (sys.getswitchinterval(), gc.get_threshold()) == before
    assert seen[0][0] < before[0] and seen[0][1][0] > before[1][0]


def convolved() -> Function:
    """Its weights are packed, and transformed for Winograd's algorithm, while compiling."""
    rng = np.random.default_rng(0)
    net = Builder("convolved")
    x = net.input("x", (1, 16, 14, 14))
    weight = rng.standard_normal((16, 16, 3, 3), np.float32)
    made = net.conv(x, weight, pads_begin=(1, 1), pads_end=(1, 1))
    flat = net.reshape(made, shape=(14, 224))
    return net.function(y=net.matmul(flat, rng.standard_normal((224, 64), np.float32)))


def test_a_model_is_compiled_for_another_machine(tmp_path: Path) -> None:
    """What makes its constants runs here; the rest is saved."""
    other = "cpu:neon" if Target.host().arch == "x86_64" else "cpu:avx2"
    module = mc.compile(convolved(), target=other)
    x = np.zeros((1, 16, 14, 14), np.float32)
    with pytest.raises(RunError, match="this module uses instructions that this processor lacks"):
        module(x)
    with pytest.raises(RunError, match=r"code for .* uses instructions that this processor lacks"):
        Meter(Target.parse(other), 1)
    module.save(tmp_path / "other.mc")
    with pytest.raises(RunError, match=r'"other.mc" uses instructions'):
        mc.load(tmp_path / "other.mc")


def test_constants_for_another_machine_are_those_for_this_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = np.random.default_rng(1).standard_normal((1, 16, 14, 14), np.float32)
    (want,) = mc.compile(convolved())(x)
    made = []

    def maker(target: Target) -> list[Target]:
        made.append(target)
        return [target]

    monkeypatch.setattr(kernel, "_maker", maker)
    (got,) = mc.compile(convolved())(x)
    assert made
    np.testing.assert_array_equal(got, want)
