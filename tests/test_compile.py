"""What `compile` leaves behind of itself: nothing."""

from __future__ import annotations

import gc
import sys

import pytest

import minicompiler as mc
from minicompiler.context import Context
from minicompiler.errors import MinicompilerError
from minicompiler.extensions import Extensions
from minicompiler.frontend.builder import Builder
from minicompiler.ir.graph import Function


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
