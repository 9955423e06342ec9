"""Recurrences: from te.scan to loops, what schedules may do with them, and what they may not."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from random_steps import step
from tir_samples import Sample, tensor
from tolerance import assert_close

from minicompiler import te
from minicompiler.errors import ScheduleError
from minicompiler.ir import interp
from minicompiler.ir.expr import Call, Dim, Expr
from minicompiler.ir.tir import PARALLEL, SCAN, VECTOR, For, script, statements
from minicompiler.ir.types import float32
from minicompiler.ir.verify_tir import verify_tir
from minicompiler.lower.to_tir import from_tensors
from minicompiler.ops.evaluate import evaluate
from minicompiler.schedules.cpu import schedule
from minicompiler.schedules.schedule import Schedule
from minicompiler.target import Target

AVX2 = Target.parse("cpu:avx2")


def rnn(steps: int | Expr, batch: int = 2, hidden: int = 5) -> tuple[list[te.Tensor], te.Tensor]:
    """h[t + 1] = tanh(x[t] + h[t] @ r) for t in steps: the parameters, and h[1:]."""
    x, r, h0 = (
        tensor("x", steps, batch, hidden),
        tensor("r", hidden, hidden),
        tensor("h0", batch, hidden),
    )
    shape = (batch, hidden)

    def update(t: Expr, states: tuple[te.Tensor, ...]) -> list[te.Tensor]:
        (k,) = te.reduce_vars(1)
        a = te.compute(shape, lambda b, i: states[0][b, k] * r[k, i], "a", ("sum", {k: hidden}))
        return [te.compute(shape, lambda b, i: Call("tanh", (x[t, b, i] + a[b, i],)), "h")]

    (h,) = te.scan(steps, [h0], update, "rnn")
    return [x, r, h0], te.compute((steps, *shape), lambda t, b, i: h[t + 1, b, i], "y")


def two_states() -> Sample:
    """Each state reads the other: a[t + 1] = a[t] + b[t], b[t + 1] = a[t + 1] * 0.5 - b[t]."""
    start = tensor("start", 4)

    def update(t: Expr, states: tuple[te.Tensor, ...]) -> list[te.Tensor]:
        a, b = states
        new = te.compute((4,), lambda i: a[i] + b[i], "a")
        return [new, te.compute((4,), lambda i: new[i] * 0.5 - b[i], "b")]

    zero = te.compute((4,), lambda i: start[i] * 0.0, "zero")
    a, b = te.scan(3, [start, zero], update, "pair")
    return Sample(from_tensors("pair", [start], [a, b]))


def sample(steps: int = 3) -> Sample:
    params, y = rnn(steps)
    return Sample(from_tensors("rnn", params, [y], params[1:2]))


def single() -> Sample:
    start = tensor("start", 4)
    (a,) = te.scan(3, [start], lambda t, s: [te.compute((4,), lambda i: s[0][i] * 0.5, "a")], "one")
    return Sample(from_tensors("one", [start], [a]))


def by_hand(x: np.ndarray, r: np.ndarray, h: np.ndarray) -> np.ndarray:
    made = []
    for now in x:
        h = np.tanh(now + h @ r)
        made.append(h)
    return np.stack(made)


# ---- meaning ------------------------------------------------------------------------------------
@pytest.mark.parametrize("steps", [1, 4])
def test_a_scan_is_its_recurrence(steps: int) -> None:
    s = sample(steps)
    verify_tir(s.func)
    want = by_hand(*s.inputs())
    assert_close(s.run()[0], want, 5)
    params, y = rnn(steps)
    feeds = dict(zip(params, s.inputs(), strict=True))
    assert_close(evaluate([y], feeds, {})[0], want, 5)


def test_any_number_of_steps() -> None:
    n = Dim("n", 1, 9)
    params, y = rnn(n)
    s = Sample(from_tensors("rnn", params, [y], params[1:2]), {"n": 6})
    assert_close(s.run()[0], by_hand(*s.inputs()), 5)
    assert_close(s.run(schedule(s.func, AVX2, after_step=verify_tir).func)[0], s.run()[0], 5)


def test_states_of_the_same_step_and_of_the_one_before() -> None:
    s = two_states()
    (start,) = s.inputs()
    a, b = [start], [start * 0]
    for _ in range(3):
        a.append(a[-1] + b[-1])
        b.append(a[-1] * np.float32(0.5) - b[-1])
    for func in (s.func, schedule(s.func, AVX2, after_step=verify_tir).func):
        for got, want in zip(s.run(func), (np.stack(a), np.stack(b)), strict=True):
            assert_close(got, want, 4)


def test_states_may_change_places() -> None:
    x, y = tensor("x", 3), tensor("y", 3)
    a, b = te.scan(2, [x, y], lambda t, states: [states[1], states[0]])
    func = from_tensors("swap", [x, y], [a, b])
    one, two = np.arange(3, dtype=np.float32), np.ones(3, np.float32)
    got = interp.run(func, [one, two])
    np.testing.assert_array_equal(got, [[one, two, one], [two, one, two]])
    assert x.dtype is float32


def test_the_steps_are_one_loop_of_phases() -> None:
    func = sample().func
    (scan,) = [x for x in statements(func) if isinstance(x, For) and x.tag == SCAN]
    assert scan in func.phases
    assert "for t in 3:  # scan\n" in script(func)
    assert "rnn_0[vt_2 + 1, " in script(func)


# ---- schedules ----------------------------------------------------------------------------------
def test_the_rule_keeps_what_a_step_needs_in_registers() -> None:
    params, y = rnn(4, 1, 256)
    s = schedule(from_tensors("rnn", params, [y], params[1:2]), AVX2, after_step=verify_tir)
    assert s.rule == "recurrent"
    assert [b.name for b in s.func.buffers] == ["rnn_0", "p1_s"]
    (scan,) = [x for x in s.func.phases if isinstance(x, For) and x.tag == SCAN]
    assert isinstance(scan.body, For)
    assert scan.body.kind is PARALLEL


STEPS: dict[str, Callable[[Schedule, str], object]] = {
    "split": lambda s, inner: s.split("t", 1),
    "fuse": lambda s, inner: s.fuse("t", inner),
    "reorder": lambda s, inner: s.reorder(inner, "t"),
    "parallel": lambda s, inner: s.mark("t", "parallel"),
    "vector": lambda s, inner: s.mark("t", "vector"),
    "unroll": lambda s, inner: s.mark("t", "unroll"),
}


@pytest.mark.parametrize("how", STEPS)
def test_the_order_of_steps_stays(how: str) -> None:
    s = Schedule(single().func, AVX2)
    with pytest.raises(ScheduleError, match="each iteration needs the one before"):
        STEPS[how](s, s.loops_of("a")[1])


def test_nothing_leaves_the_scan() -> None:
    s = Schedule(sample().func, AVX2)
    with pytest.raises(ScheduleError, match="part of the recurrence over t"):
        s.compute_at("a", s.loops_of("y")[0])


def test_a_state_is_made_where_its_sum_is() -> None:
    s = Schedule(sample().func, AVX2, after_step=verify_tir)
    row = s.loops_of("a")[1]
    s.compute_at("rnn_0", row)
    s.stage("a", row)
    s.mark(row, PARALLEL)
    s.mark(s.loops_of("rnn_0")[-1], VECTOR)
    assert [b.name for b in s.func.buffers] == ["rnn_0"]
    assert_close(sample().run(s.func)[0], sample().run()[0], 5)


@pytest.mark.parametrize("seed", range(40))
def test_random_steps_keep_the_result(seed: int) -> None:
    given = (sample, two_states, single)[seed % 3]()
    rng = Random(seed)
    s = Schedule(given.func, AVX2, after_step=verify_tir)
    for _ in range(12):
        step(s, rng.choice)
    for got, want in zip(given.run(s.func), given.run(), strict=True):
        assert_close(got, want, 16)
