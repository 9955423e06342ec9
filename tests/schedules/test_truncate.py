"""The primitive `truncate`: loops over the columns of a causal mask end at its diagonal."""

from __future__ import annotations

import numpy as np
import pytest
from documented_kernels import attention
from tir_samples import Sample, tensor
from tolerance import assert_close

from minicompiler import te
from minicompiler.errors import ScheduleError
from minicompiler.ir import interp
from minicompiler.ir.arith import Arith
from minicompiler.ir.equal import tir_equal
from minicompiler.ir.expr import Const, Dim, Expr, const, const_int, free_vars, select, substitute
from minicompiler.ir.tir import PrimFunc
from minicompiler.ir.types import float32
from minicompiler.ir.verify_tir import verify_tir
from minicompiler.lower.to_tir import from_tensors
from minicompiler.schedules import analysis
from minicompiler.schedules.cpu import schedule
from minicompiler.schedules.schedule import Schedule, replay
from minicompiler.target import Target

AVX2 = Target.parse("cpu:avx2")


def causal(queries: int, keys: int, offset: int | Expr = 0) -> Sample:
    return Sample(attention(queries, keys, 2, 8, offset=offset))


def whole(s: Schedule, func: PrimFunc) -> PrimFunc:
    """The same schedule with all columns."""
    trace = [step for step in s.trace() if step["primitive"] != "truncate"]
    return replay(func, trace, AVX2).func


def at(extent: Expr, loop: Expr, value: int) -> int:
    return const_int(Arith().simplify(substitute(extent, {loop: Const(value)})))  # type: ignore[return-value]


def done(func: PrimFunc, row_loop: str) -> list[int]:
    """Per iteration of a loop: the iterations of the longest loop that depends on it."""
    rows = next(x for x in analysis.loops(func) if x.var.name == row_loop)
    extents = {x.extent for x in analysis.loops(rows.body) if rows.var in free_vars(x.extent)}
    return [max(at(e, rows.var, k) for e in extents) for k in range(const_int(rows.extent) or 0)]


# ---- attention -----------------------------------------------------------------------------------
@pytest.mark.parametrize("columns", [0, 64])
@pytest.mark.parametrize("sizes", [(70, 70, 0), (21, 45, 24), (37, 37, 5), (40, 12, 0)])
def test_the_same_bits_as_with_all_columns(sizes: tuple[int, int, int], columns: int) -> None:
    sample = causal(*sizes)
    s = schedule(sample.func, AVX2, {"columns": columns, "rows": 4})
    assert "truncate" in [step.primitive for step in s.steps]
    verify_tir(s.func, finished=True)
    assert tir_equal(replay(sample.func, s.trace(), AVX2).func, s.func)
    got = sample.run(s.func)
    every = sample.run(whole(s, sample.func))
    for a, b, want in zip(got, every, sample.run(), strict=True):
        assert a.tobytes() == b.tobytes()
        assert_close(a, want, 256, largest=1)


def test_half_of_the_columns_are_left_out() -> None:
    func = attention(96, 96, 1, 8, offset=0)
    s = schedule(func, AVX2, {"columns": 0, "rows": 4})
    (step,) = [x for x in s.steps if x.primitive == "truncate"]
    # Tiles of 4 rows; the second product walks through groups of 16 columns by 4.
    assert done(s.func, step.args["loop"]) == [(4 * k + 3) // 16 * 4 + 4 for k in range(24)]


@pytest.mark.parametrize("columns", [0, 64])
def test_any_number_of_positions_before_and_in_the_call(columns: int) -> None:
    n, past = Dim("n", 1, 64), Dim("past", 0, 64)
    sample = Sample(attention(n, n + past, 2, 8, offset=past), {"n": 19, "past": 7})
    s = schedule(sample.func, AVX2, {"columns": columns})
    assert "truncate" in [step.primitive for step in s.steps]
    verify_tir(s.func, finished=True)
    for sizes in ({"n": 19, "past": 7}, {"n": 1, "past": 0}, {"n": 64, "past": 64}):
        one = Sample(sample.func, sizes)
        (got,), (want,) = one.run(s.func), one.run()
        assert_close(got, want, 256, largest=1)


@pytest.mark.parametrize("columns", [0, 64])
def test_a_row_without_a_number_stays_without_one(columns: int) -> None:
    """Another mask removes all that the causal one leaves of a row: softmax is not defined."""
    func = attention(70, 70, 1, 8, offset=0)
    q, k, v, mask = Sample(func).inputs()
    mask[33, :34] = -np.inf
    scheduled = schedule(func, AVX2, {"columns": columns, "rows": 4}).func
    with np.errstate(all="ignore"):
        (got,) = interp.run(scheduled, [q, k, v, mask], {})
    assert np.isnan(got[0, 33]).all()
    assert np.isfinite(np.delete(got[0], 33, axis=0)).all()


@pytest.mark.parametrize(("offset", "low"), [(-1, -np.inf), (0, -1e9), (0, 0.0)])
def test_what_may_matter_stays(offset: int, low: float) -> None:
    """A row without columns; a number that softmax does not make zero for all scores."""
    func = attention(20, 20, 1, 8, offset=offset, low=low)
    s = schedule(func, AVX2)
    assert s.rule == "attention"
    assert "truncate" not in [step.primitive for step in s.steps]


# ---- by hand -------------------------------------------------------------------------------------
def row_sums(low: float = 0.0) -> PrimFunc:
    """y[i] = sum of x[i, j] up to the diagonal and of `low` beyond."""
    x = tensor("x", 12, 12)
    e = te.compute(x.shape, lambda i, j: select(j <= i, x[i, j], const(low, float32)))
    return from_tensors("row_sums", [x], [te.sum(e, -1)])


def rows_of(func: PrimFunc) -> Schedule:
    s = Schedule(func, AVX2, after_step=verify_tir)
    names = [b.name for b in analysis.blocks(func)]
    home = s.loops_of(names[-1])[0]
    for name in reversed(names[:-1]):
        s.compute_at(name, home)
    for name in names:
        if analysis.is_reduction(s.block(name)[0]):
            s.decompose_reduction(name, s.loops_of(name)[-1])
    return s


@pytest.mark.parametrize("width", [1, 4, 5, 16])
def test_sums_of_a_triangle(width: int) -> None:
    sample = Sample(row_sums())
    s = rows_of(sample.func)
    home = s.loops_of("sum")[0]
    s.truncate(home, width)
    extent = s.loop(s.loops_of("sum")[-1])[0].extent
    row = s.loop(home)[0].var
    assert [at(extent, row, i) for i in range(12)] == [
        min(12, i // width * width + width) for i in range(12)
    ]
    (got,), (want,) = sample.run(s.func), sample.run()
    assert got.tobytes() == want.tobytes()


def test_a_sum_that_does_change_is_refused() -> None:
    s = rows_of(row_sums(low=-5.0))
    with pytest.raises(ScheduleError, match=r"nothing inside of .* is without effect beyond"):
        s.truncate(s.loops_of("sum")[0], 4)


def test_no_diagonal() -> None:
    x = tensor("x", 6, 9)
    s = rows_of(from_tensors("plain", [x], [te.sum(te.exp(x), -1)]))
    with pytest.raises(ScheduleError, match="nothing inside of"):
        s.truncate(s.loops_of("sum")[0], 1)


def test_a_width_that_a_loop_steps_over() -> None:
    s = rows_of(row_sums())
    outer, _ = s.split(s.loops_of("sum")[-1], 4)
    with pytest.raises(ScheduleError, match=f"{outer} walks by 4 columns, which does not divide 6"):
        s.truncate(s.loops_of("sum")[0], 6)
