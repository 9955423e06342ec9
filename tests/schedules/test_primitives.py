"""Law 6: any accepted sequence of primitives keeps the result, verifies, and replays from its JSON;
refusals change nothing. And what each primitive makes, as golden text."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_steps import step
from tir_samples import SAMPLES, Sample, matmul_of, softmax_of
from tolerance import assert_close

from minicompiler.errors import ScheduleError, VerifyError
from minicompiler.ir.arith import Arith
from minicompiler.ir.equal import tir_equal
from minicompiler.ir.expr import Const, Dim, Expr, const_int, substitute
from minicompiler.ir.tir import PrimFunc, script
from minicompiler.ir.verify_tir import verify_tir
from minicompiler.schedules.schedule import Schedule, replay
from minicompiler.target import Target

TARGET = Target.parse("cpu:avx2")
PANELS = [[1, 4, 0], [0, 1, 0], [1, 1, 4]]  # (k, n) -> (n // 4, k, n % 4)
STEPS = 6  # accepted steps per sequence
sample = functools.cache(lambda name: SAMPLES[name]())
wanted = functools.cache(lambda name: sample(name).run())


def start(func: PrimFunc) -> Schedule:
    return Schedule(func, TARGET)


def same_result(name: str, func: PrimFunc) -> None:
    s: Sample = sample(name)
    for got, want in zip(s.run(func), wanted(name), strict=True):
        assert_close(got, want, s.length, largest=1.0)


# ---- law 6 --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SAMPLES)
def test_random_steps_keep_the_result(name: str) -> None:
    unproved = 0
    tried = 0

    @settings(max_examples=40, derandomize=True, deadline=None, database=None)
    @given(st.integers(0, 2**32 - 1))
    def check(seed: int) -> None:
        nonlocal tried, unproved
        rng = Random(seed)
        s = start(sample(name).func)
        for _ in range(25):
            if len(s.steps) == STEPS:
                break
            if step(s, lambda options: rng.choice(list(options))):
                same_result(name, s.func)  # strict: every index is checked
                tried += 1
                try:
                    verify_tir(s.func)
                except VerifyError as e:
                    # What takes several conditions at once, or quotients of symbolic sizes, can be
                    # beyond the prover. Nothing else may fail.
                    if "not known to be" not in e.message:
                        raise
                    unproved += 1
                    break
        again = replay(sample(name).func, json.loads(json.dumps(s.trace())), TARGET)
        assert tir_equal(again.func, s.func)

    check()
    assert unproved <= tried // 50


def test_the_init_of_a_reduction_keeps_the_tail_of_a_loop_over_both() -> None:
    """A fused loop chooses the element and a part of the sum: its tail concerns the init."""
    func = matmul_of(5, 7, 6)
    s = start(func)
    s.reorder("i0", "i1", "k0")
    i1_o, i1_i = s.split("i1", 4, "mask")
    s.reorder(i1_o, "k0", i1_i)
    both = s.fuse(i1_o, "k0")
    s.decompose_reduction("matmul", i1_i)
    verify_tir(s.func)
    assert both in s.loops_of("matmul")
    assert "where" in script(s.func).split("block matmul_init")[1].split("\n")[0]


def test_a_refused_step_changes_nothing() -> None:
    s = start(matmul_of(5, 7, 6))
    s.split("k0", 7)
    before, trace = s.func, s.trace()
    for wrong in WRONG.values():
        with pytest.raises(ScheduleError):
            wrong(s)
        assert s.func is before and s.trace() == trace
    s.split("i0", 5)  # and the schedule goes on as if nothing had happened
    assert [x["made"] for x in s.trace()] == [("k0_o", "k0_i"), ("i0_o", "i0_i")]


# ---- what the primitives make -------------------------------------------------------------------
def blocked_tile(s: Schedule) -> None:
    """The schedule of a register tile, as in ARCHITECTURE 9."""
    s.split("i1", 4, "mask")
    s.split("i0", 2, "mask")
    s.reorder("i1_o", "i0_o", "k0", "i0_i", "i1_i")
    s.stage("p1", None, "global", PANELS)
    s.compute_at("relu", "i0_o")
    s.decompose_reduction("matmul", "k0")
    s.stage("matmul", "i0_o")
    s.mark("i0_i", "unroll")
    s.mark("i1_i", "vector")


def packed_once(s: Schedule) -> None:
    """The first tiles of rows fill the panels that all others read."""
    s.split("i1", 4, "mask")
    s.split("i0", 2, "mask")
    s.reorder("i0_o", "i1_o", "k0", "i0_i", "i1_i")
    s.stage("p1", None, "global", PANELS)
    s.compute_at("p1_s_in", "k0", "i0_o")


def fused(s: Schedule) -> None:
    s.fuse("i0", "i1")


def softmax_row(s: Schedule) -> None:
    for b in ("sum", "exp", "max"):
        s.compute_at(b, "i0_4")


def added_at_once(s: Schedule) -> None:
    softmax_row(s)
    made, summed = (s.loops_of(b)[-1] for b in ("exp", "sum"))
    s.decompose_reduction("sum", summed)
    s.compute_with(summed, made)


def written_late(s: Schedule) -> None:
    """Terms of the next row take the places of those that are divided."""
    softmax_row(s)
    s.stage("exp", "i0_4", "local")
    terms, results = (s.loops_of(b)[-1] for b in ("exp", "div"))
    s.delay("div", "i0_4", terms)
    s.compute_with(terms, results)


def partial_sums(s: Schedule) -> None:
    s.split("k0", 3, "mask")
    s.rfactor("sum", "k0_i")


def next_row(s: Schedule) -> None:
    s.reorder("k0", "i0", "i1")
    s.prefetch_next("p1", "i0", "k0")


def without_border(s: Schedule) -> None:
    s.inline("pad")
    s.decompose_reduction("conv", "k0")
    s.skip("conv")


def lines_without_border(s: Schedule) -> None:
    s.inline("pad")
    s.decompose_reduction("conv", "k0")
    s.skip("conv", "i3_2")


PRIMITIVES: dict[str, tuple[str, Callable[[Schedule], Any]]] = {
    "split_perfect": ("plain_matmul", lambda s: s.split("k0", 4)),
    "split_mask": ("matmul", lambda s: s.split("i0", 4, "mask")),
    "split_guard": ("matmul", lambda s: s.split("k0", 3, "guard")),
    "split_even": ("matmul_dynamic", lambda s: s.split("i0", 8, "even")),
    "split_overlap": ("matmul", lambda s: s.split("i1_2", 4, "overlap")),
    "cut": ("matmul", lambda s: s.cut("k0", 3)),
    "cut_from_the_end": ("matmul_dynamic", lambda s: s.cut("i1_2", -2)),
    "cut_at_a_multiple": ("matmul_dynamic", lambda s: s.cut("i0", 4, multiple=True)),
    "cut_where_choices_change": ("conv", lambda s: s.cut("i2", 1)),
    "split_overlap_of_any_length": ("repeated", lambda s: s.split("i0", 4, "overlap")),
    "split_by_period": ("repeated", lambda s: s.split_by_period("i0", "repeated")),
    "split_dynamic": ("matmul_dynamic", lambda s: s.split("i0", 8, "mask")),
    "split_at_lines": ("matmul", lambda s: s.split_at_lines("i1_2", 8, "relu", 4)),
    "fuse": ("transpose", fused),
    "reorder": ("matmul", lambda s: s.reorder("k0", "i0")),
    "mark": ("matmul", lambda s: s.mark("i1_2", "vector")),
    "relayout": ("conv", lambda s: s.relayout("pad", [[0, 1, 0], [2, 1, 0], [3, 1, 0], [1, 1, 0]])),
    "inline": ("conv", lambda s: s.inline("pad")),
    "compute_at_producer": ("conv", lambda s: s.compute_at("pad", "i2_2")),
    "compute_at_consumer": ("matmul", lambda s: s.compute_at("relu", "i0")),
    "compute_at_last_iteration": ("matmul", lambda s: s.compute_at("relu", "k0")),
    "compute_at_row": ("softmax", softmax_row),
    "compute_at_once": ("matmul", packed_once),
    "compute_with": ("softmax", added_at_once),
    "delay": ("softmax", written_late),
    "decompose_reduction": ("matmul", lambda s: s.decompose_reduction("matmul", "i1")),
    "stage_register": ("matmul", lambda s: s.stage("matmul", "i1")),
    "stage_local": ("conv", lambda s: s.stage("pad", "i2_2", "local")),
    "stage_phase": ("layer_norm", lambda s: s.stage("sum", None)),
    "stage_packed": ("matmul", lambda s: s.stage("p1", None, "global", PANELS)),
    "prefetch": ("matmul", lambda s: s.prefetch("p1", "k0", 128)),
    "prefetch_in_turns": ("matmul", lambda s: s.prefetch("p1", "k0", 128, "i0")),
    "prefetch_next": ("matmul", next_row),
    "rfactor": ("layer_norm", partial_sums),
    "rfactor_first": ("layer_norm", lambda s: s.rfactor("sum", "k0", first=True)),
    "skip": ("conv", without_border),
    "skip_but_choices": ("conv", lines_without_border),
    "tile": ("matmul", blocked_tile),
}  # fmt: skip


@pytest.mark.parametrize("name", PRIMITIVES)
def test_before_and_after(name: str, golden: Callable[[str, str], None]) -> None:
    kind, apply = PRIMITIVES[name]
    s = start(sample(kind).func)
    apply(s)
    verify_tir(s.func)
    same_result(kind, s.func)
    steps = "\n".join(map(str, s.steps))
    golden(f"schedules/{name}", f"{sample(kind).func}\n{steps}\n\n{s.func}")


@pytest.mark.parametrize("multiple", [1, 2, 3])
def test_even_blocks(multiple: int) -> None:
    """Blocks of equal size, as many as asked for, whatever a dimension turns out to be."""
    dim = Dim("n", 0, 400)
    s = start(matmul_of(dim, 2, 2))
    outer, inner = (s.loop(n)[0] for n in s.split("i0", 14, "even", multiple))
    verify_tir(s.func)
    for n in range(dim.hi + 1):
        arith = Arith({})
        count = const_int(arith.simplify(substitute(outer.extent, {dim: Const(n)})))
        bound: list[dict[Expr, Expr]] = [
            {dim: Const(n), outer.var: Const(k)} for k in range(count or 0)
        ]
        sizes = [const_int(arith.simplify(substitute(inner.extent, b))) or 0 for b in bound]
        assert sum(sizes) == n and all(0 < x <= 14 for x in sizes)
        assert all(x == sizes[0] for x in sizes[:-1])
        if n >= 14 * multiple and len(sizes) < sizes[0]:  # else the last ones may be left out
            assert len(sizes) % multiple == 0
        if multiple == 1:
            assert len(sizes) == -(-n // 14)


# ---- what is refused ----------------------------------------------------------------------------
WRONG: dict[str, Callable[[Schedule], Any]] = {
    "prefetch_standing_still": lambda s: s.prefetch("p1", "i0", 128),
    "prefetch_no_turns": lambda s: s.prefetch("p1", "k0", 128, "i1"),
    "prefetch_next_of_itself": lambda s: s.prefetch_next("p1", "k0", "k0"),
    "prefetch_next_of_the_same": lambda s: s.prefetch_next("p1", "k0", "i0"),
    "split_not_perfect": lambda s: s.split("i1", 4),
    "split_no_multiple": lambda s: s.split("i1", 4, "even", 0),
    "split_unknown_tail": lambda s: s.split("i1", 4, "round"),
    "split_overlap_of_a_sum": lambda s: s.split("i0", 4, "overlap"),
    "split_overlap_of_less": lambda s: s.split("i0_2", 8, "overlap"),
    "cut_at_the_start": lambda s: s.cut("i0", 0),
    "cut_at_no_multiple": lambda s: s.cut("i0", -1, multiple=True),
    "cut_behind_the_end": lambda s: s.cut("i0", 5),
    "split_by_no_period": lambda s: s.split_by_period("i0_2", "relu"),
    "split_by_period_elsewhere": lambda s: s.split_by_period("i0", "relu"),
    "split_at_lines_by_columns": lambda s: s.split_at_lines("i0_2", 4, "relu", 4),
    "split_at_lines_elsewhere": lambda s: s.split_at_lines("i0", 4, "relu", 4),
    "split_at_no_lines": lambda s: s.split_at_lines("i1_2", 4, "relu", 0),
    "no_such_loop": lambda s: s.split("q", 4),
    "fuse_not_nested": lambda s: s.fuse("i0", "k0_i"),
    "reorder_two_nests": lambda s: s.reorder("i0", "i0_2"),
    "vector_over_a_reduction": lambda s: s.mark("k0_i", "vector"),
    "threads_inside": lambda s: s.mark("i1", "parallel"),
    "inline_a_reduction": lambda s: s.inline("matmul"),
    "compute_at_itself": lambda s: s.compute_at("matmul", "i0"),
    "compute_at_stranger": lambda s: s.compute_at("nothing", "i0"),
    "compute_at_once_for_a_consumer": lambda s: s.compute_at("relu", "i0", "i0"),
    "compute_with_a_loop_inside": lambda s: s.compute_with("k0_o", "i0"),
    "compute_with_the_next": lambda s: s.compute_with("i0", "i0_2"),
    "stage_untouched": lambda s: s.stage("p2", "i1"),
    "stage_what_is_written": lambda s: s.stage("r0", None, "global"),
    "stage_a_phase_that_writes_nothing": lambda s: s.stage("p2", None),
    "stage_global_in_a_loop": lambda s: s.stage("p0", "i0", "global"),
    "relayout_of_the_caller": lambda s: s.relayout("p0", [[1, 1, 0], [0, 1, 0]]),
    "skip_with_an_init": lambda s: s.skip("matmul"),
    "skip_nothing": lambda s: s.skip("relu"),
    "rfactor_spatial": lambda s: s.rfactor("matmul", "i0"),
    "decompose_elementwise": lambda s: s.decompose_reduction("relu", "i0_2"),
    "choice_unknown": lambda s: s.choose("rows", (1, 2), 3),
}


def schedule_after(steps: Sequence[tuple[str, tuple[Any, ...]]]) -> Schedule:
    s = start(matmul_of(5, 7, 6))
    for primitive, args in steps:
        getattr(s, primitive)(*args)
    return s


ILLEGAL: dict[str, tuple[list[tuple[str, tuple[Any, ...]]], tuple[str, tuple[Any, ...]]]] = {
    "split after mark": ([("mark", ("i1_2", "vector"))], ("split", ("i1_2", 2))),
    "loops inside a vector": (
        [("reorder", ("k0", "i0", "i1")), ("mark", ("i1", "vector"))], ("stage", ("p1", "i1")),
    ),
    "work around threads": (
        [("reorder", ("k0", "i0", "i1")), ("mark", ("i0", "parallel"))],
        ("stage", ("p0", "k0", "local")),
    ),
    "reorder of marked loops": ([("mark", ("i1_2", "vector"))], ("reorder", ("i1_2", "i0_2"))),
    "inline of what is relative": ([("stage", ("p0", "i0", "local"))], ("inline", ("p0_s_in",))),
    "a copy moved away from its tile": (
        [("stage", ("matmul", "i1"))], ("compute_at", ("matmul_s_out", "k0")),
    ),
    "partial sums of a tail": ([("cut", ("k0", 3))], ("rfactor", ("matmul_t", "k0_t"))),
    "threads that write the same": (
        [("split", ("i0_2", 3, "overlap"))], ("mark", ("i0_2_o", "parallel")),
    ),
    "cut after mark": ([("mark", ("i1_2", "vector"))], ("cut", ("i1_2", 2))),
    "an init around threads": (
        [("reorder", ("k0", "i0", "i1")), ("mark", ("i0", "parallel"))],
        ("decompose_reduction", ("matmul", "k0")),
    ),
    "a mixed loop": ([("fuse", ("i1", "k0"))], ("compute_at", ("relu", "i1_k0"))),
    "a sum run before it is whole": (
        [("compute_at", ("relu", "i0"))], ("compute_with", ("i1_2", "i1")),
    ),
    "an init twice": (
        [("decompose_reduction", ("matmul", "k0"))], ("decompose_reduction", ("matmul", "i0")),
    ),
    "different parts in one iteration": (
        [("stage", ("p0", None, "global"))], ("compute_at", ("p0_s_in", "k0", "i0")),
    ),
    "a loop elsewhere": (
        [("stage", ("p1", None, "global"))], ("compute_at", ("p1_s_in", "k0", "i0_2")),
    ),
    "memory that ends too early": (
        [("stage", ("p1", "i1", "local"))], ("compute_at", ("p1_s_in", "k0", "i0")),
    ),
    "threads that begin later": (
        [("stage", ("p1", None, "global")), ("compute_at", ("p1_s_in", "k0", "i0"))],
        ("mark", ("i0", "parallel")),
    ),
    "less padding": (
        [("stage", ("p1", None, "global", PANELS))],
        ("relayout", ("p1_s", [[0, 1, 0], [1, 1, 0]])),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ILLEGAL)
def test_what_would_be_wrong_is_refused(name: str) -> None:
    before, (primitive, args) = ILLEGAL[name]
    s = schedule_after(before)
    with pytest.raises(ScheduleError):
        getattr(s, primitive)(*args)


LATE: dict[str, tuple[str, str, str, str]] = {
    "what it reads is made again": ("div", "i0_4", "k0_2_2", "changes or reads what"),
    "not the last statement": ("sum", "i0_4", "i1_3", "not in the last one of several statements"),
    "no loop before it": ("div", "i0_4", "i1_2", "does not stand before block div"),
    "a loop that is shared": ("div", "shared", "i1_3", "is marked parallel already"),
    "a loop inside another one": ("div", "i0_4", "inner", "is not directly in i0_4"),
    "no row at all": ("div", "rows", "i1_3", "may have no iteration"),
}


@pytest.mark.parametrize("name", LATE)
def test_a_block_is_not_delayed(name: str) -> None:
    block, loop, before, message = LATE[name]
    s = start(softmax_of(Dim("n", 0, 9), 10) if loop == "rows" else sample("softmax").func)
    softmax_row(s)
    if loop == "shared":
        s.mark("i0_4", "parallel")
    if before == "inner":
        before = s.split("i1_3", 5)[1]
    with pytest.raises(ScheduleError, match=message):
        s.delay(block, "i0_4", before)


def test_what_is_made_in_another_iteration_is_not_overwritten() -> None:
    """Each row is divided in another order: terms of the next one cannot take its places."""
    s = start(sample("softmax").func)
    softmax_row(s)
    s.stage("exp", "i0_4", "local")
    s.reorder(*reversed(s.split("i1_2", 5)))
    s.delay("div", "i0_4", "i1_3")
    with pytest.raises(ScheduleError, match="reads is written in another iteration of i1_3_o"):
        s.compute_with(s.split("i1_3", 2)[0], "i1_2_i")


def test_a_consumer_waits_for_all_its_operands() -> None:
    s = start(sample("softmax").func)
    with pytest.raises(ScheduleError, match="sum, which div reads, runs after i0_2"):
        s.compute_at("div", "i0_2")


def test_a_box_with_gaps_is_loaded_before_it_is_written_back() -> None:
    """Rows 0 and 2 of three are written: row 1 must come back as it was."""
    s = start(sample("plain_matmul").func)
    s.fuse("i0", "i1")
    s.split("i0_i1", 8)
    s.reorder("i0_i1_i", "i0_i1_o", "k0")
    s.stage("r0", "i0_i1_i", "local")
    same_result("plain_matmul", s.func)
    verify_tir(s.func)
