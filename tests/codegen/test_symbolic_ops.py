"""Every operator with some sizes known only at run time: each schedule step and pass keeps the loop
nest valid, and LLVM IR is made of it. (Law 7 over the samples of the operators.)

What a sample cannot do with such a size (a split into two parts of 3) is refused by a type rule.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import minicompiler.ops  # noqa: F401
from minicompiler.context import Context, Options
from minicompiler.errors import ShapeError, VerifyError
from minicompiler.ir.expr import Const, Dim, Expr
from minicompiler.ir.graph import Function, Input, Item, Value, apply
from minicompiler.ir.op import REGISTRY, Op
from minicompiler.ir.types import TensorType, dtype_of
from minicompiler.kernel import write_kernel
from minicompiler.lower.guards import run_time_guards
from minicompiler.target import Target

TARGETS = (Target.parse("cpu:avx2"), Target.parse("cpu:sse"))


def kernel_of(op: Op, arrays: Sequence[np.ndarray | None], attrs: Any, pick: Any) -> Function:
    """One application, sizes of its first argument replaced at random by dimensions of at least as
    much: equal sizes by one and the same."""
    args: list[Input | None] = []
    for k, a in enumerate(arrays):
        shape: list[Expr] = []
        for n in () if a is None else a.shape:
            symbolic = k == 0 and n > 0 and pick(2) == 0
            shape.append(Dim(f"n{n}", n, 1 << 16) if symbolic else Const(n))
        args.append(None if a is None else Input(f"x{k}", TensorType(tuple(shape), dtype_of(a))))
    made = apply(op, *args, attrs=attrs)
    many = isinstance(made.type, tuple)
    results: list[Value] = [Item(made, k) for k in range(len(made.type))] if many else [made]
    return Function("kernel", tuple(a for a in args if a is not None), tuple(results))


def write(fn: Function, target: Target) -> str:
    """The LLVM IR of a kernel, its loop nest verified after every step."""
    ctx = Context(target, Options(record=False, checked=True))
    ctx.guards = run_time_guards(fn)
    return write_kernel(fn, tuple(False for _ in fn.params), ctx)[1]


def cases() -> list[Any]:
    reason = "n*m - 2*n - 2*m + 4 is not known to be (n - 2)*(m - 2), so nor its sign"
    unproved = pytest.mark.xfail(raises=VerifyError, strict=True, reason=reason)
    # Three sizes n - 2, fused into one loop.
    return [pytest.param(n, marks=unproved if n == "lp_pool" else ()) for n in sorted(REGISTRY)]


@pytest.mark.parametrize("name", cases())
def test_sizes_may_be_known_at_run_time_only(name: str) -> None:
    op = REGISTRY[name]

    @settings(
        max_examples=6,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def law(data: st.DataObject) -> None:
        arrays, attrs = op.samples(data.draw)
        pick = lambda n: data.draw(st.integers(0, n - 1))  # noqa: E731
        with contextlib.suppress(ShapeError):
            assert write(kernel_of(op, arrays, attrs, pick), TARGETS[pick(2)])

    law()
