"""The primitive `rolling`: sums of exp(x - maximum) advance with the maximum."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from documented_kernels import attention
from tir_samples import Sample, softmax_of, tensor
from tolerance import assert_close

import minicompiler as mc
from minicompiler import te
from minicompiler.errors import ScheduleError
from minicompiler.frontend.builder import Builder
from minicompiler.ir import interp
from minicompiler.ir.equal import tir_equal
from minicompiler.ir.tir import PrimFunc
from minicompiler.ir.verify_tir import verify_tir
from minicompiler.lower.to_tir import from_tensors
from minicompiler.ops.evaluate import run_reference
from minicompiler.schedules.cpu import schedule
from minicompiler.schedules.schedule import Schedule, replay
from minicompiler.target import Target

AVX2 = Target.parse("cpu:avx2")


def log_sum_exp(rows: int = 3, columns: int = 20, scale: float = 1.0) -> PrimFunc:
    x = tensor("x", rows, columns)
    y = x * scale
    m = te.max(y, -1)
    total = te.sum(te.exp(y - m), -1)
    return from_tensors("log_sum_exp", [x], [te.call("log", total) + m])


def blocks_of(s: Schedule, names: tuple[str, ...], size: int) -> str:
    """Cuts the columns of reductions into blocks, outermost; the loop of the maximum over them."""
    for name in names:
        row, column = s.loops_of(name)
        o, i = s.split(column, size, "mask")
        s.reorder(o, row, i)
    s.rfactor("max", s.loops_of("max")[0])
    s.reorder(*reversed(s.loops_of("max")))
    for name in names:
        s.decompose_reduction(name, s.loops_of(name)[0])
    return s.loops_of("max")[0]


def rolled(size: int = 8, scale: float = 1.0) -> tuple[Sample, Schedule]:
    sample = Sample(log_sum_exp(scale=scale), length=20)
    s = Schedule(sample.func, AVX2, after_step=verify_tir)
    s.rolling("max", blocks_of(s, ("max", "sum"), size))
    return sample, s


@pytest.mark.parametrize("size", [1, 3, 8, 32])
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_log_sum_exp_in_blocks(size: int, scale: float) -> None:
    sample, s = rolled(size, scale)
    for seed in range(3):
        (got,), (want,) = sample.run(s.func, seed), sample.run(seed=seed)
        assert_close(got, want, 20, largest=scale)


def test_rows_that_begin_with_minus_infinity() -> None:
    """The maximum stays -inf over the first block: its terms are no numbers, and do not count."""
    sample, s = rolled(4)
    x = np.linspace(-1, 1, 60, dtype=np.float32).reshape(3, 20)
    x[:, :9] = -np.inf
    (got,), (want,) = interp.run(s.func, [x], {}), interp.run(sample.func, [x], {})
    assert np.isfinite(want).all()
    assert_close(got, want, 20)
    x[1] = -np.inf
    (got,), (want,) = interp.run(s.func, [x], {}), interp.run(sample.func, [x], {})
    assert np.isnan(want[1]).all()
    assert_close(got, want, 20)


def test_the_nest(golden: Callable[[str, str], None]) -> None:
    golden("schedules/rolling", str(rolled()[1].func))


def test_a_trace_gives_the_same_function() -> None:
    sample, s = rolled()
    again = replay(sample.func, json.loads(json.dumps(s.trace())), AVX2)
    assert tir_equal(again.func, s.func)


# ---- refusals ------------------------------------------------------------------------------------
def test_terms_that_are_read_later_are_refused() -> None:
    """Softmax itself divides every term by the sum: it needs them for the final maximum."""
    s = Schedule(softmax_of(3, 20), AVX2)
    row, column = s.loops_of("exp")
    o, i = s.split(column, 8, "mask")
    s.reorder(o, row, i)
    loop = blocks_of(s, ("max", "sum"), 8)
    before = s.func
    with pytest.raises(ScheduleError, match="needs exp for the final maximum"):
        s.rolling("max", loop)
    assert s.func is before


def test_an_init_is_refused() -> None:
    s = Schedule(log_sum_exp(), AVX2)
    with pytest.raises(ScheduleError, match="no maximum over k0 without an init"):
        s.rolling("max", "k0")


def test_several_columns_per_iteration_are_refused() -> None:
    s = Schedule(log_sum_exp(), AVX2)
    row, column = s.loops_of("max")
    o, i = s.split(column, 4)
    s.reorder(o, row, i)
    s.decompose_reduction("max", o)
    with pytest.raises(ScheduleError, match="must reduce over k0_o alone"):
        s.rolling("max", o)


def test_a_sum_without_a_repair_is_refused() -> None:
    """x - m is not linear in exp(x - m)."""
    x = tensor("x", 3, 20)
    m = te.max(x, -1)
    s = Schedule(from_tensors("spread", [x], [te.sum(x - m, -1)]), AVX2)
    for name in ("max", "sum"):
        s.reorder(*reversed(s.loops_of(name)))
        s.decompose_reduction(name, s.loops_of(name)[0])
    with pytest.raises(ScheduleError, match="not linear in exp"):
        s.rolling("max", s.loops_of("max")[0])


def test_sums_over_rows_are_refused() -> None:
    """A sum over rows and columns has no single factor."""
    x = tensor("x", 3, 20)
    e = te.exp(x - te.max(x, -1))
    s = Schedule(from_tensors("total", [x], [te.sum(te.sum(e, -1), 0)]), AVX2)
    for name in ("max", "sum"):
        s.reorder(*reversed(s.loops_of(name)))
        s.decompose_reduction(name, s.loops_of(name)[0])
    s.rolling("max", s.loops_of("max")[0])  # per row it is legal
    both = te.reduce_vars(2)
    one = te.compute(
        (1,), lambda i: e[both[0], both[1]], "both", ("sum", dict(zip(both, (3, 20), strict=True)))
    )
    s = Schedule(from_tensors("total", [x], [one]), AVX2)
    s.reorder(*reversed(s.loops_of("max")))
    s.decompose_reduction("max", s.loops_of("max")[0])
    s.reorder(*reversed(s.loops_of("both")))
    s.decompose_reduction("both", s.loops_of("both")[0])
    with pytest.raises(ScheduleError, match="rolling"):
        s.rolling("max", s.loops_of("max")[0])


# ---- attention -----------------------------------------------------------------------------------
def test_attention_in_blocks_of_columns() -> None:
    sample = Sample(attention(7, 70, 2, 8))
    s = schedule(sample.func, AVX2, {"columns": 64})
    assert "rolling" in [step.primitive for step in s.steps]
    verify_tir(s.func, finished=True)
    for got, want in zip(sample.run(s.func), sample.run(), strict=True):
        assert_close(got, want, 256, largest=1)


def test_rows_of_several_matrices_side_by_side() -> None:
    """Attention over channels: its rows lie along the last axis, head by head, and no tile of
    them reaches into the next head."""
    net = Builder("channels")
    q, k, v = (net.input(n, (1, 3, 38, 32)) for n in "qkv")
    weights = net.softmax(net.matmul(q, net.transpose(k, perm=(0, 1, 3, 2))), axis=-1)
    heads = net.transpose(net.matmul(weights, v), perm=(0, 3, 1, 2))
    fn = net.function(y=net.reshape(heads, shape=(1, 32, 114)))
    rng = np.random.default_rng(0)
    xs = [rng.standard_normal((1, 3, 38, 32), np.float32) / 4 for _ in range(3)]
    assert_close(mc.compile(fn, target="cpu:avx2")(*xs)[0], run_reference(fn, xs)[0], 70)
