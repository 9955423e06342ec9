"""Every operator with some sizes known only at run time, equal ones perhaps by several names: each
schedule step and pass keeps the loop nest valid, and LLVM IR is made of it. (Law 7 over the samples
of the operators.)

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
from minicompiler.errors import ShapeError
from minicompiler.ir.expr import Const, Dim, Expr
from minicompiler.ir.graph import Function, Input, Item, Value, apply
from minicompiler.ir.op import REGISTRY, Op
from minicompiler.ir.types import DType, TensorType, dtype_of, float16, float32, int32
from minicompiler.kernel import write_kernel
from minicompiler.lower.guards import run_time_guards
from minicompiler.ops.recurrent import RecurrentAttrs
from minicompiler.target import Target

TARGETS = (Target.parse("cpu:avx2"), Target.parse("cpu:sse"))


def function_of(op: Op, inputs: Sequence[Input | None], attrs: Any) -> Function:
    """The kernel of one application."""
    made = apply(op, *inputs, attrs=attrs)
    many = isinstance(made.type, tuple)
    results: list[Value] = [Item(made, k) for k in range(len(made.type))] if many else [made]
    return Function("kernel", tuple(a for a in inputs if a is not None), tuple(results))


def kernel_of(op: Op, arrays: Sequence[np.ndarray | None], attrs: Any, pick: Any) -> Function:
    """One application, sizes replaced at random by dimensions of at least as much: by one that
    stands for all such sizes, or by one of its own. (One that stands for all sizes of 1 might have
    to be equal to two numbers: 1 is broadcast.)"""
    args: list[Input | None] = []
    for k, a in enumerate(arrays):
        shape: list[Expr] = []
        for axis, n in enumerate(() if a is None else a.shape):
            own = f"x{k}_{axis}"
            names = [f"n{n}" if n > 1 else own, own, *[""] * 4]
            name = names[pick(6)] if n else ""
            shape.append(Dim(name, n, 1 << 16) if name else Const(n))
        args.append(None if a is None else Input(f"x{k}", TensorType(tuple(shape), dtype_of(a))))
    return function_of(op, args, attrs)


def write(fn: Function, target: Target) -> str:
    """The LLVM IR of a kernel, its loop nest verified after every step."""
    ctx = Context(target, Options(record=False, checked=True))
    ctx.guards = run_time_guards(fn)
    return write_kernel(fn, tuple(False for _ in fn.params), ctx)[1]


@pytest.mark.parametrize("name", sorted(REGISTRY))
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


GATES = {"lstm": 4, "gru": 3, "rnn": 1}


@pytest.mark.parametrize("dtype", [float16, float32])
@pytest.mark.parametrize("sizes", [("n", "2", "2"), ("n", "m", "k"), ("2", "m", "m")])
@pytest.mark.parametrize("name", GATES)
def test_one_size_may_have_several_names(name: str, sizes: Sequence[str], dtype: DType) -> None:
    """The batch of the inputs, of the initial states, of the lengths."""
    batches = [Const(int(s)) if s.isdigit() else Dim(s) for s in sizes]
    hidden, count = Const(3), GATES[name]
    x = Input("x", TensorType((Const(5), batches[0], Const(3 * count)), dtype))
    gates = () if name == "rnn" else (Const(count),)
    r = Input("r", TensorType((*gates, hidden, hidden), dtype))
    states = [Input(s, TensorType((batches[1], hidden), dtype)) for s in ("h", "c")]
    lengths = Input("lengths", TensorType((batches[2],), int32))
    inputs = {
        "lstm": [x, r, *states, None, lengths],
        "gru": [x, r, None, None, states[0], lengths],
        "rnn": [x, r, states[0], lengths],
    }
    attrs = RecurrentAttrs(("sigmoid", "tanh", "tanh"), (0.0,) * 3, (0.0,) * 3)
    assert write(function_of(REGISTRY[name], inputs[name], attrs), TARGETS[0])
