"""Control flow: operators whose attributes hold Functions; a plan runs them as regions of calls.

    y = cond(flag, a, b; then=fn(a, b) {...}, other=fn(a, b) {...})
    n, s, rows = loop(flag, n0, s0, w; body=fn(n, s, w) {... return flag, n, s, row})

The functions see nothing but their parameters: what they take from around them is passed in.
States keep their types. A state that grows is padded to its largest size, with a count beside it,
and `head` (ops/count.py) takes the part that counts; so one mechanism serves all sizes that data
decides. Neither operator is registered: the laws of registered ones speak of tensor expressions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ShapeError
from ..ir.expr import ZERO, Expr, const_int
from ..ir.graph import Function, type_of
from ..ir.op import Arg, Op
from ..ir.types import TensorType, bool_
from .draws import Draw

Array = np.ndarray
Run = Callable[[Function, Sequence[Array]], list[Array]]
_NOTHING = Function("nothing", (), ())


def _need_flag(what: str, t: TensorType) -> None:
    if t.dtype is not bool_ or t.rank:
        raise ShapeError(f"{what}: the condition is {t}, not bool[]")


def _need_params(what: str, fn: Function, types: Sequence[TensorType]) -> None:
    if [p.type for p in fn.params] != list(types):
        raise ShapeError(f"{what}: {fn.name} takes other types than it is given")


def _results(fn: Function) -> list[TensorType]:
    return [type_of(r) for r in fn.results]


# ---- cond ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class CondAttrs:
    """Functions of the same parameters and result types; one of them runs."""

    then: Function = _NOTHING
    other: Function = _NOTHING


def _cond_infer(flag: Arg, *args: Any) -> TensorType | tuple[TensorType, ...]:
    *captured, a = args
    _need_flag("cond", flag.type)
    for fn in (a.then, a.other):
        _need_params("cond", fn, [x.type for x in captured])
    types, others = _results(a.then), _results(a.other)
    if types != others:
        raise ShapeError(f"cond: one branch gives {types}, the other {others}")
    return types[0] if len(types) == 1 else tuple(types)


def _cond_reference(flag: Array, *args: Any) -> Any:
    *captured, a, run = args
    results = run(a.then if flag else a.other, captured)
    return results[0] if len(results) == 1 else tuple(results)


def _no_samples(draw: Draw) -> Any:
    raise NotImplementedError("sampled as whole graphs: tests/frontend/test_control.py")


cond = Op("cond", CondAttrs, _cond_infer, (), _cond_reference, _no_samples, variadic=True)


# ---- loop ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LoopAttrs:
    """While the flag holds: flag, states, rows = body(states, captured).

    states: their number; the first one counts the iterations from 0, `iteration` names its value
    while the body runs. most: there are no more iterations; a row is stored for each. Results: the
    last states, and per row a tensor [most, *row] of which the first `iterations` rows count.
    trips: the number of iterations where it is known, else 1; it only says how much work there is.
    """

    body: Function = _NOTHING
    states: int = 0
    iteration: str = ""
    most: Expr | int = ZERO
    trips: int = 1


def _loop_infer(flag: Arg, *args: Any) -> TensorType | tuple[TensorType, ...]:
    *given, a = args
    _need_flag("loop", flag.type)
    _need_params("loop", a.body, [x.type for x in given])
    again, *made = _results(a.body)
    _need_flag("loop", again)
    states, rows = made[: a.states], made[a.states :]
    if states != [x.type for x in given[: a.states]]:
        raise ShapeError("loop: a state changes its type")
    types = [*states, *[TensorType((a.most, *t.shape), t.dtype) for t in rows]]
    return types[0] if len(types) == 1 else tuple(types)


def _loop_reference(flag: Array, *args: Any) -> Any:
    *given, a, run = args
    states, captured = list(given[: a.states]), given[a.states :]
    stacked: list[list[Array]] = [[] for _ in a.body.results[1 + a.states :]]
    while flag:
        flag, *made = run(a.body, [*states, *captured])
        states = made[: a.states]
        for rows, row in zip(stacked, made[a.states :], strict=True):
            rows.append(row)
    full = []
    for rows, r in zip(stacked, a.body.results[1 + a.states :], strict=True):
        most = const_int(a.most) if isinstance(a.most, Expr) else a.most
        shape = rows[0].shape if rows else tuple(const_int(s) or 0 for s in type_of(r).shape)
        dtype = rows[0].dtype if rows else type_of(r).dtype.numpy
        # Rows that no iteration makes hold anything.
        whole = np.full((len(rows) if most is None else most, *shape), 113, dtype)
        for k, row in enumerate(rows):
            whole[k] = row
        full.append(whole)
    results = (*states, *full)
    return results[0] if len(results) == 1 else results


loop = Op("loop", LoopAttrs, _loop_infer, (), _loop_reference, _no_samples, variadic=True)
