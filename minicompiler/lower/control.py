"""Control flow -> steps: kernel calls, copies between them, and regions of calls.

    steps_of(fn)     for `s = loop(flag, s0; body=fn(s) {...})`:
    [Write(flag0, flag), Write(s0, s), Region(flag, repeat=True, steps=[calls of the body],
     last=[Write(s_new, t), Write(t, s), Write(flag_new, flag)], results=[Alias(s, loop)])]

A state lives in one place, which is written before the loop and at the end of each iteration. The
results of a branch are written to the place of the conditional's result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from minicompiler.errors import InternalError
from minicompiler.ir.expr import ZERO, Dim, Expr, wrap
from minicompiler.ir.graph import (
    Apply,
    Constant,
    Function,
    Input,
    Item,
    Value,
    apply,
    topological,
    type_of,
)
from minicompiler.ir.types import TensorType
from minicompiler.ops.control import CondAttrs, LoopAttrs
from minicompiler.ops.elementwise import identity

from . import memory
from .memory import Alias, Count, Reserve


@dataclasses.dataclass(frozen=True, eq=False)
class Write:
    """`call` copies a value to the place of `target`, `at` bytes from its start."""

    call: Apply
    target: Value
    again: bool = False
    at: Expr = ZERO


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Steps that depend on a flag; memory.Region with calls that are not compiled yet.

    trips: how often they run, where that is known, else 1.
    """

    flag: Value
    wanted: bool
    repeat: bool
    steps: Sequence[Step]
    last: Sequence[Step]
    states: Sequence[Value]
    results: Sequence[Alias]
    trips: int = 1


Step = Apply | Write | Alias | Reserve | Part


def kernel_nodes(steps: Sequence[Step], times: int = 1) -> Iterator[tuple[Apply, int]]:
    """The nodes that are calls of kernels, in the order of the plan, and how often each runs."""
    for s in steps:
        if isinstance(s, Apply):
            yield s, times
        elif isinstance(s, Write):
            yield s.call, times
        elif isinstance(s, Part):
            yield from kernel_nodes((*s.steps, *s.last), times * s.trips)


def with_calls(steps: Sequence[Step], calls: Mapping[int, memory.KernelCall]) -> list[memory.Step]:
    """The steps for the memory planner; calls: by the id of their node."""
    done: list[memory.Step] = []
    for s in steps:
        if isinstance(s, Apply):
            done.append(calls[id(s)])
        elif isinstance(s, Write):
            call = calls[id(s.call)]
            done.append(dataclasses.replace(call, results=(s.target,), again=s.again, at=s.at))
        elif isinstance(s, Part):
            inner, last = with_calls(s.steps, calls), with_calls(s.last, calls)
            done.append(memory.Region(s.flag, s.wanted, s.repeat, inner, last, s.states, s.results))
        else:
            done.append(s)
    return done


def loop_counts(v: Apply) -> list[Count]:
    """The number of a loop's iteration, which tells where a row is stored."""
    a = v.attrs
    if not isinstance(a, LoopAttrs) or len(_results(v)) == a.states:
        return []
    return [Count(_iteration(a), a.body.params[0], wrap(a.most))]


def _iteration(a: LoopAttrs) -> Dim:
    return Dim(a.iteration, 0, None)


def steps_of(fn: Function) -> list[Step]:
    """The steps of an optimised function. Raises InternalError for what is no kernel."""
    steps: list[Step] = []
    for v in topological(fn.results):
        if not isinstance(v, Apply):
            continue
        if isinstance(v.op, Function):
            steps.append(v)
        elif isinstance(v.attrs, CondAttrs):
            steps += _branches(v, v.attrs)
        elif isinstance(v.attrs, LoopAttrs):
            steps += _loop(v, v.attrs)
        else:
            raise InternalError(f"operator {v.op.name} was not put into a kernel", v.locs)
    return steps


def _branches(v: Apply, a: CondAttrs) -> list[Step]:
    flag, *captured = _given(v)
    steps: list[Step] = [Reserve(r) for r in _results(v)]
    for fn, wanted in ((a.then, True), (a.other, False)):
        inputs = [Alias(x, p) for x, p in zip(captured, fn.params, strict=True)]
        writes = [_copy(x, r, True) for x, r in zip(fn.results, _results(v), strict=True)]
        steps.append(Part(flag, wanted, False, [*inputs, *steps_of(fn)], writes, (), ()))
    return steps


def _loop(v: Apply, a: LoopAttrs) -> list[Step]:
    start, *given = _given(v)
    body, results = a.body, _results(v)
    states, captured = body.params[: a.states], body.params[a.states :]
    flag = Input("flag", type_of(start))
    steps: list[Step] = [_copy(start, flag)]
    steps += [_copy(x, p) for x, p in zip(given[: a.states], states, strict=True)]
    inputs = [Alias(x, p) for x, p in zip(given[a.states :], captured, strict=True)]
    new_flag, *made = body.results
    last: list[Step] = []
    # Rows first, while the count still says where they belong.
    stacks: list[Value] = []
    if len(results) > a.states:
        for row, r in zip(made[a.states :], results[a.states :], strict=True):
            stack = Input("stack", type_of(r))
            stacks.append(stack)
            steps.append(Reserve(stack))
            last.append(_copy(row, stack, True, _iteration(a) * _bytes(type_of(row))))
    # All new states, before any of them takes the place of an old one.
    moved: list[Value] = []
    for x, p in zip(made, states, strict=False):
        if isinstance(x, Input | Constant) or any(x is m for m in moved):
            t = Input("next", p.type)
            last.append(_copy(x, t))
            moved.append(t)
        else:
            moved.append(x)
    last += [_copy(x, p, True) for x, p in zip(moved, states, strict=True)]
    last.append(_copy(new_flag, flag, True))
    finals = [Alias(p, r) for p, r in zip(states, results, strict=False)]
    inner = [*inputs, *steps_of(body)]
    steps.append(Part(flag, True, True, inner, last, (*states, flag), finals, a.trips))
    steps += [_copy(s, r) for s, r in zip(stacks, results[a.states :], strict=True)]
    return steps


def _given(v: Apply) -> list[Value]:
    return [a for a in v.args if a is not None]


def _results(v: Apply) -> list[Value]:
    if isinstance(v.type, TensorType):
        return [v]
    return [Item(v, k) for k in range(len(v.type))]


def _copy(x: Value, target: Value, again: bool = False, at: Expr = ZERO) -> Write:
    t = type_of(x)
    source = Input("p0", t)
    fn = Function("copy", (source,), (apply(identity, source),), fused=True)
    return Write(Apply(fn, (x,), None, t), target, again, at)


def _bytes(t: TensorType) -> Expr:
    size: Expr = wrap(t.dtype.bytes)
    for s in t.shape:
        size = size * s
    return size
