"""Who takes part in a parallel loop whose extent is known at run time only."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from minicompiler import te
from minicompiler.codegen.llvm import WORTH_SHARING, emit
from minicompiler.codegen.native import compile_object
from minicompiler.ir.expr import Dim, Expr, wrap
from minicompiler.ir.types import float32
from minicompiler.lower.blocks import lower_blocks
from minicompiler.lower.to_tir import from_tensors
from minicompiler.runtime.loader import Library
from minicompiler.runtime.pool import kernel_symbols
from minicompiler.schedules.schedule import Schedule
from minicompiler.target import Target

COLUMNS = 8


def kernel(rows: Expr) -> tuple[Library, str]:
    """r[i, j] = x[i, j] + 1, rows shared by threads; and its text."""
    x = te.placeholder("x", (rows, wrap(COLUMNS)), float32)
    s = Schedule(
        from_tensors("shared", [x], [te.map_elements(lambda e: e + 1.0, x, name="y")]),
        Target.host(),
    )
    s.mark("i0", "parallel")
    text = emit(lower_blocks(s.func)).text
    library = Library(compile_object(text, s.target), ["shared"], kernel_symbols())
    return library, text


@pytest.mark.parametrize(
    ("rows", "alone"),
    [(1, True), (WORTH_SHARING // COLUMNS - 1, True), (WORTH_SHARING // COLUMNS, False)],
)
def test_thread_0_does_what_is_not_worth_sharing(rows: int, alone: bool) -> None:
    library, _ = kernel(Dim("n", 1, 10_000))
    kinds = [ctypes.c_int32, ctypes.c_int32, *[ctypes.c_void_p] * 3]
    call = ctypes.CFUNCTYPE(None, *kinds, ctypes.c_int64, ctypes.c_void_p)(
        library.address("shared")
    )
    x, y = np.zeros((2, rows, COLUMNS), np.float32)
    for thread, done in ((1, not alone), (0, True)):  # each by itself, the other one is late
        barrier = (ctypes.c_int64 * 1024)()  # with the counts of what threads have taken
        barrier[0] = 1 << 32  # the number of the phase
        y[:] = 0
        call(thread, 2, barrier, x.ctypes.data, y.ctypes.data, rows, None)
        assert (y == (1 if done else 0)).all()


def test_schedules_decide_where_sizes_are_numbers() -> None:
    assert "i32 %nthreads, i64" in kernel(wrap(4))[1]
    assert "i32 %nthreads, i64" not in kernel(Dim("n", 1, 10_000))[1]
