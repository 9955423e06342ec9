"""Random schedule steps: any primitive with any arguments that name something in the function.

done = step(s, pick)      pick(options) chooses; True when the step was accepted
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from minicompiler.errors import ScheduleError
from minicompiler.ir.tir import For, Seq, script, statements
from minicompiler.schedules import analysis
from minicompiler.schedules.loops import TAILS
from minicompiler.schedules.schedule import Schedule

Pick = Callable[[Sequence[Any]], Any]
SCOPES = ("register", "local", "global")


def step(s: Schedule, pick: Pick) -> bool:
    """One primitive with random arguments. A refusal must leave the schedule as it was."""
    before, steps = s.func, list(s.steps)
    try:
        pick(STEPS)(s, pick)
    except ScheduleError as e:
        assert s.func is before, "a refused step changed the function"
        assert s.steps == steps, "a refused step was recorded"
        assert script(before).splitlines()[0].strip() in e.excerpt
        return False
    return True


def loop_names(s: Schedule) -> list[str]:
    return [x.var.name for x in analysis.loops(s.func)] or ["none"]


def block_names(s: Schedule) -> list[str]:
    return [b.name for b in analysis.blocks(s.func)]


def split(s: Schedule, pick: Pick) -> None:
    s.split(pick(loop_names(s)), pick((1, 2, 3, 4, 8)), pick(TAILS))


def cut(s: Schedule, pick: Pick) -> None:
    s.cut(pick(loop_names(s)), pick((1, 2, 3, 4, -1, -3)), pick((False, True)))


def split_by_period(s: Schedule, pick: Pick) -> None:
    s.split_by_period(pick(loop_names(s)), pick(block_names(s)))


def split_at_lines(s: Schedule, pick: Pick) -> None:
    s.split_at_lines(pick(loop_names(s)), pick((1, 3, 8)), pick(block_names(s)), pick((1, 4, 16)))


def fuse(s: Schedule, pick: Pick) -> None:
    pairs = [
        [x.var.name, x.body.var.name] for x in analysis.loops(s.func) if isinstance(x.body, For)
    ]
    s.fuse(*pick(pairs or [loop_names(s)[:2]]))


def reorder(s: Schedule, pick: Pick) -> None:
    names = list(s.loops_of(pick(block_names(s)))) or loop_names(s)
    chosen = []
    for _ in range(pick((2, 2, 3))):
        if names:
            chosen.append(names.pop(names.index(pick(names))))
    s.reorder(*chosen)


def mark(s: Schedule, pick: Pick) -> None:
    s.mark(pick(loop_names(s)), pick(("parallel", "vector", "unroll", "for")))


def inline(s: Schedule, pick: Pick) -> None:
    s.inline(pick(block_names(s)))


def compute_at(s: Schedule, pick: Pick) -> None:
    once = pick((None, *loop_names(s))) if pick((True, False)) else None
    s.compute_at(pick(block_names(s)), pick(loop_names(s)), once)


def compute_with(s: Schedule, pick: Pick) -> None:
    pairs = [
        (b.var.name, a.var.name)
        for x in statements(s.func)
        if isinstance(x, Seq)
        for a, b in itertools.combinations([y for y in x.stmts if isinstance(y, For)], 2)
    ]
    s.compute_with(*pick(pairs or [(loop_names(s)[0], loop_names(s)[-1])]))


def delay(s: Schedule, pick: Pick) -> None:
    """Mostly something that ends a loop, before something that stands directly in it."""
    nests = [
        (last.name, x.var.name, y.var.name)
        for x in analysis.loops(s.func)
        for last in list(analysis.blocks(x.body))[-1:]
        for y in analysis.loops(x.body)
    ]
    s.delay(*pick(nests or [(pick(block_names(s)), *[pick(loop_names(s)) for _ in range(2)])]))


def decompose_reduction(s: Schedule, pick: Pick) -> None:
    block = pick(block_names(s))
    s.decompose_reduction(block, pick(s.loops_of(block) or loop_names(s)))


def rfactor(s: Schedule, pick: Pick) -> None:
    block = pick(block_names(s))
    s.rfactor(block, pick(s.loops_of(block) or loop_names(s)), pick((True, False)))


def skip(s: Schedule, pick: Pick) -> None:
    s.skip(pick(block_names(s)))


def slide(s: Schedule, pick: Pick) -> None:
    block = pick(block_names(s))
    s.slide(block, pick(s.loops_of(block) or loop_names(s)))


def rolling(s: Schedule, pick: Pick) -> None:
    block = pick(block_names(s))
    s.rolling(block, pick(s.loops_of(block) or loop_names(s)))


def layout_for(rank: int, pick: Pick) -> list[list[int]] | None:
    """A permutation of the axes, one of them perhaps in blocks."""
    if rank == 0 or pick((True, False)):
        return None
    axes = list(range(rank))
    order = [axes.pop(axes.index(pick(axes))) for _ in range(rank)]
    if pick((True, False)):
        return [[k, 1, 0] for k in order]
    axis, size = pick(order), pick((2, 4))
    return [*[[k, size if k == axis else 1, 0] for k in order], [axis, 1, size]]


def stage(s: Schedule, pick: Pick) -> None:
    buffers = {b.name: b for b in (*s.func.params, *s.func.buffers)}
    name = pick(list(buffers))
    at = pick([None, *loop_names(s)])
    layout = layout_for(len(buffers[name].shape), pick)
    s.stage(name, at, "global" if at is None else pick(SCOPES), layout)


def relayout(s: Schedule, pick: Pick) -> None:
    held = [x.buffer for x in statements(s.func) if hasattr(x, "buffer")]
    buffers = {b.name: b for b in (*s.func.params, *s.func.buffers, *held)}
    name = pick(list(buffers))
    s.relayout(name, layout_for(len(buffers[name].shape), pick) or [[0, 1, 0]])


def prefetch(s: Schedule, pick: Pick) -> None:
    buffers = [b.name for b in (*s.func.params, *s.func.buffers)]
    loops = loop_names(s)
    s.prefetch(pick(buffers), pick(loops), pick((0, 16, 100)), pick([None, *loops]))


def prefetch_next(s: Schedule, pick: Pick) -> None:
    buffers = [b.name for b in (*s.func.params, *s.func.buffers)]
    loops = loop_names(s)
    s.prefetch_next(pick(buffers), pick(loops), pick(loops))


STEPS = (
    split, split, split, fuse, reorder, reorder, mark, inline, compute_at, compute_at,
    split_at_lines, split_by_period, cut, cut, compute_with, compute_with, delay, delay,
    decompose_reduction, decompose_reduction, stage, stage, stage, relayout, rfactor, rolling,
    slide, prefetch, prefetch, prefetch_next, skip,
)  # fmt: skip
