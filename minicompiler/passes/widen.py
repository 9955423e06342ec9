"""Attention of 16-bit floats computes in float32 and rounds once, at its end.

    %0 = matmul(%q, %k)       float16         %0 = matmul(cast(%q), cast(%k))     float32
    %1 = softmax(%0)          float16    ->   %1 = softmax(%0)                    float32
    %2 = matmul(%1, %v)       float16         %2 = cast(matmul(%1, cast(%v)))     float16

Scores that are rounded in between lose what softmax then tells apart, and `recognise` makes one
kernel of float32 attention. Conversions that the model itself puts in between are dropped.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ..ir.expr import ONE
from ..ir.graph import Apply, Constant, Function, Value, apply, topological, type_of, users
from ..ir.types import DType, float32
from ..ops import elementwise, linalg
from ..ops.rules import is_low
from .recognise import Match, Operand, is_nan, match_of, operand_of, rebuilt, times


def widen_attention(fn: Function, ctx: Any) -> Function:
    """Every attention in which 16-bit floats take part, computed in float32."""
    readers = users(fn)
    for r in fn.results:
        readers.setdefault(id(r), []).append(r)
    found: dict[int, Match] = {}
    for v in topological(fn.results):
        if isinstance(v, Apply) and v.op is linalg.matmul:
            match = match_of(v, readers, low=True)
            if match is not None and _gains(match):
                found[id(match.end)] = match
    casts: dict[int, Value] = {}
    return rebuilt(fn, {k: partial(_widened, m, casts) for k, m in found.items()})


def _gains(m: Match) -> bool:
    """True where something is rounded to 16 bits in between. With a single query each key is read
    once, and converting all of them first would take longer than the attention."""
    nodes = [m.scores, *[node for node, _ in m.path], m.normal, m.output]
    some = any(is_low(type_of(n).dtype) for n in nodes)
    return some and type_of(m.scores).shape[-2] is not ONE


def _widened(m: Match, casts: dict[int, Value], new: dict[int, Value]) -> Value:
    """The nodes of an attention again, on operands in float32. casts: those made already, by the
    id of what they convert."""

    def wide(v: Value) -> Value:
        """A new value in float32, if it is a number."""
        if not is_low(type_of(v).dtype):
            return v
        if isinstance(v, Constant):
            return Constant(v.data.astype(np.float32))
        if id(v) not in casts:
            casts[id(v)] = _cast(v, float32)
        return casts[id(v)]

    def viewed(operand: Operand) -> Value:
        x = wide(new[id(operand.source)])
        for view in operand.views:
            x = _again(view, x)
        return x

    left, right, values = map(operand_of, (*m.scores.args, m.output.args[1]))
    x = times(_again(m.scores, viewed(left), viewed(right)), left.factor * right.factor)
    for node, position in m.path:
        if node.op is not elementwise.cast_:
            args = [None if a is None else wide(new[id(a)]) for a in node.args]
            args[position] = x
            x = _again(node, *args)
    x = _again(m.normal, x)
    if m.zeroed is not None:
        nan = is_nan(m.zeroed, m.normal)
        condition = apply(elementwise.isnan, x) if nan else new[id(m.zeroed)]
        x = apply(elementwise.where, condition, Constant(np.zeros((), np.float32)), x)
    x = times(_again(m.output, x, viewed(values)), values.factor)
    for view in m.tail:
        x = _again(view, x)
    return _cast(x, type_of(m.end).dtype)


def _again(node: Apply, *args: Value | None) -> Apply:
    assert not isinstance(node.op, Function)
    return apply(node.op, *args, attrs=node.attrs, locs=node.locs, name=node.name)


def _cast(x: Value, dtype: DType) -> Value:
    return apply(elementwise.cast_, x, attrs=elementwise.CastAttrs(dtype))
