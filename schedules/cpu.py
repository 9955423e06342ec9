"""The CPU schedule rules, tried in order; the first that applies wins, the last always does.

    schedule(func, target) -> Schedule

A rule looks at the shape of the loop nest: which iterators choose elements, which are reduced, what
is contiguous in memory. It never asks for an operator's name. docs/schedules.md shows the results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from minicompiler.errors import InternalError, ScheduleError
from minicompiler.ir.expr import ZERO
from minicompiler.ir.tir import PrimFunc
from minicompiler.target import Target

from . import (
    analysis,
    attention,
    columns,
    contraction,
    depthwise,
    elementwise,
    recurrent,
    rows,
    transformed,
    windows,
)
from .schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Rule:
    """One way to schedule a kind of loop nest. `apply` transforms the schedule in place."""

    name: str
    applies: Callable[[Schedule], bool]
    apply: Callable[[Schedule], None]


RULES: tuple[Rule, ...] = (
    Rule("recurrent", recurrent.applies, recurrent.apply),
    Rule("transformed", transformed.applies, transformed.apply),
    Rule("attention", attention.applies, attention.apply),
    Rule("depthwise", depthwise.applies, depthwise.apply),
    Rule("contraction", contraction.applies, contraction.apply),
    Rule("windows", windows.applies, windows.apply),
    Rule("columns", columns.applies, columns.apply),
    Rule("rows", rows.applies, rows.apply),
    Rule("elementwise", lambda s: True, elementwise.apply),
)


def schedule(
    func: PrimFunc,
    target: Target,
    decisions: Mapping[str, Any] | None = None,
    after_step: Callable[[PrimFunc], None] | None = None,
    rules: Sequence[Rule] = RULES,
) -> Schedule:
    """The schedule of the first rule that applies. `decisions` replaces its default choices.

    Raises ScheduleError where the decisions do not fit, InternalError where a rule fails by itself.
    """
    s = Schedule(func, target, decisions, after_step)
    # The statements of an extern have no blocks: what other phases compute stays where it is.
    kept = [next(analysis.blocks(p), None) for p in func.phases]
    plain = bool(kept) and None not in kept  # there are none where all is of size 0
    # In a loop without iterations every condition is both true and false: nothing to gain or prove.
    empty = any(loop.extent is ZERO for loop in analysis.loops(func))
    for rule in rules if plain and not empty else rules[-1:]:
        if rule.applies(s):
            s.rule = rule.name
            try:
                rule.apply(s)
            except ScheduleError as e:
                if decisions:
                    raise
                raise InternalError(
                    f"schedule rule {rule.name!r} failed: {e.message}",
                    e.locs,
                    e.excerpt,
                    "this is a mistake of the rule: please report it with this text",
                ) from e
            return s
    raise AssertionError("the last rule always applies")
