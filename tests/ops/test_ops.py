"""Operators: infer = reference = evaluated compute over drawn samples, spot checks, symbolic shapes.

Law 3 (first half): for every operator and every compute that applies, the type rule gives the
reference's shape and dtype, and the compute evaluated in numpy gives the reference's values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from tolerance import assert_close

import minicompiler.ops  # noqa: F401
from minicompiler import te
from minicompiler.errors import ShapeError
from minicompiler.ir import graph
from minicompiler.ir.arith import evaluate_int
from minicompiler.ir.expr import Const, Dim, Expr
from minicompiler.ir.graph import Constant, Function, Input, apply
from minicompiler.ir.op import REGISTRY, Arg, Op
from minicompiler.ir.types import DType, TensorType, dtype_of, float32, int64
from minicompiler.ops.evaluate import evaluate, run_reference
from minicompiler.ops.pool import PoolAttrs
from minicompiler.ops.resize import ResizeAttrs

Array = np.ndarray


def typed(a: Array | None) -> Arg | None:
    return None if a is None else Arg(TensorType(tuple(map(Const, a.shape)), dtype_of(a)))


def as_tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def evaluated(op: Op, which: int, arrays: list[Array | None], attrs: Any) -> list[Array]:
    """The results of a compute of `op`."""
    params = [
        None if a is None else te.placeholder(f"p{k}", a.shape, dtype_of(a))
        for k, a in enumerate(arrays)
    ]
    results = as_tuple(op.computes[which].build(*params, attrs))
    feeds = {p: a for p, a in zip(params, arrays, strict=True) if p is not None and a is not None}
    return evaluate(results, feeds, {})


# ---- law 3 --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_infer_reference_and_compute_agree(name: str) -> None:
    op = REGISTRY[name]

    @settings(
        max_examples=15,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def check(data: st.DataObject) -> None:
        arrays, attrs = op.samples(data.draw)
        args = [typed(a) for a in arrays]
        with np.errstate(all="ignore"):
            want = as_tuple(op.reference(*arrays, attrs))
        types = as_tuple(op.infer(*args, attrs))
        assert len(types) == len(want)
        for t, w in zip(types, want, strict=True):
            assert isinstance(w, np.ndarray)
            assert tuple(evaluate_int(s, {}) for s in t.shape) == w.shape
            assert t.dtype.numpy == w.dtype
        length = max((a.size for a in arrays if a is not None), default=1)
        for k, compute in enumerate(op.computes):
            if compute.applies is None or compute.applies([a and a.type for a in args], attrs):
                got = evaluated(op, k, arrays, attrs)
                for g, w in zip(got, want, strict=True):
                    assert_close(g, w, length)

    check()
