"""Appending to a tensor that has room: what a key/value cache of a decoder does in each step.

    append(past, x; axis, room)     [b, h, p, d], [b, h, n, d] -> [b, h, p + n + room, d]

The result's memory is that of `past`: its first p positions are not written, because they hold
`past` already, and the last `room` ones hold nothing. `runtime/caches.py` sees to that, so only
passes/caches.py may make such a node: for an input and an output of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import te
from ..ir.expr import Expr, Load, Var
from ..ir.op import Arg, Op, register
from ..ir.tir import Buffer, Stmt, Store
from ..ir.types import TensorType
from .draws import Draw, array, choice, integer, shape
from .rules import Size, axis_of, direct, fail, need_same, result, same_dtype
from .scatter import over
from .shape import MOVED

Array = np.ndarray


@dataclass(frozen=True)
class AppendAttrs:
    axis: int = 0
    room: Size = 0


def _append_infer(past: Arg, x: Arg, a: AppendAttrs) -> TensorType:
    rank = past.type.rank
    if x.type.rank != rank:
        fail(f"append: {past.type} and {x.type} differ in rank")
    axis = axis_of(a.axis, rank, "append")
    sizes = list(past.type.shape)
    for k, (s, t) in enumerate(zip(sizes, x.type.shape, strict=True)):
        if k != axis:
            need_same("append", f"sizes of dimension {k}", s, t)
    sizes[axis] = sizes[axis] + x.type.shape[axis] + a.room
    return result(sizes, same_dtype("append", past, x))


def _append_compute(past: te.Tensor, x: te.Tensor, a: AppendAttrs) -> te.Tensor:
    axis = a.axis % len(x.shape)
    start = past.shape[axis]

    def build(ins: Sequence[Buffer], outs: Sequence[Buffer], fresh: Callable[[str], Var]) -> Stmt:
        _, new = ins

        def put(*i: Expr) -> Stmt:
            at = (*i[:axis], start + i[axis], *i[axis + 1 :])
            return Store(outs[0], at, Load(new, i))

        return over(new.shape, fresh, put)

    made = _append_infer(Arg(_type(past)), Arg(_type(x)), a)
    return te.extern("append", (past, x), [(made.shape, made.dtype)], build)[0]


def _type(t: te.Tensor) -> TensorType:
    return TensorType(t.shape, t.dtype)


def _append_reference(past: Array, x: Array, a: AppendAttrs) -> Array:
    room = list(x.shape)
    room[a.axis] = a.room
    return np.concatenate([past, x, np.zeros(room, x.dtype)], axis=a.axis)


def _append_samples(draw: Draw) -> tuple[list[Any], AppendAttrs]:
    """Nothing before and behind: that is the only case in which all of the result is written."""
    of = list(shape(draw, 1))
    axis = integer(draw, -len(of), len(of) - 1)
    dtype = choice(draw, MOVED)
    x = array(draw, of, dtype)
    of[axis] = 0
    return [np.zeros(of, x.dtype), x], AppendAttrs(axis)


append = register(
    Op(
        "append",
        AppendAttrs,
        _append_infer,
        direct(_append_compute),
        _append_reference,
        _append_samples,
    )
)
