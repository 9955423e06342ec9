"""Products and attention of 16-bit floats compute in float32 and round once, at their ends.

    %0 = matmul(%q, %k)       float16         %0 = matmul(cast(%q), cast(%k))     float32
    %1 = softmax(%0)          float16    ->   %1 = softmax(%0)                    float32
    %2 = matmul(%1, %v)       float16         %2 = cast(matmul(%1, cast(%v)))     float16

Scores that are rounded in between lose what softmax then tells apart, and `recognise` makes one
kernel of float32 attention. Conversions that the model itself puts in between are dropped.

A product uses every number many times, but would convert it each time. Conversions before it fuse
into what makes the operands, those of weights happen while compiling.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from ..ir.expr import ONE, const_int
from ..ir.graph import Apply, Constant, Function, Value, apply, topological, type_of, users
from ..ir.op import Precision
from ..ir.types import DType, float32
from ..ops import elementwise, linalg
from ..ops.rules import is_low
from .recognise import Match, Operand, is_nan, match_of, operand_of, rebuilt, times

OFTEN = 2  # uses of a number from which converting it once pays
_UNKNOWN = 64  # of a size that is known at run time only


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


def widen_products(fn: Function, ctx: Any) -> Function:
    """Every product of 16-bit floats, but for those that use an operand just once: they wait for
    the memory, which half as many bytes leave sooner."""
    found = [
        v
        for v in topological(fn.results)
        if isinstance(v, Apply)
        and not isinstance(v.op, Function)
        and v.op.precision is Precision.LOW
        and len(v.args) > 1  # an einsum of one operand multiplies nothing
        and any(a is not None and is_low(type_of(a).dtype) for a in v.args)
        and _uses(v) >= OFTEN
    ]
    casts: dict[int, Value] = {}
    return rebuilt(fn, {id(v): partial(_on_wide, v, casts) for v in found})


def _uses(v: Apply) -> float:
    """How often a product of x[M, K] and w[K, N] uses each number of w, or of x: the lesser of M
    and N, or of the square roots of r*x/w and r*w/x for r = M*N, which tell it of convolutions as
    well. Unknown sizes count as large."""
    result, x, w = (list(type_of(a).shape) for a in (v, v.args[0], v.args[1]) if a is not None)
    while v.op is linalg.matmul and len(w) > 2 and x[:-2] == w[:-2]:
        result, x, w = result[1:], x[1:], w[1:]  # as many products apart
    r, a, b = (math.prod(const_int(n) or _UNKNOWN for n in shape) for shape in (result, x, w))
    return min(math.sqrt(r * a / b), math.sqrt(r * b / a)) if a and b else 0.0


def _on_wide(v: Apply, casts: dict[int, Value], new: dict[int, Value]) -> Value:
    """The product again, on operands in float32."""
    args = [None if a is None else _wide(new[id(a)], casts) for a in v.args]
    return _cast(_again(v, *args), type_of(v).dtype)


def _gains(m: Match) -> bool:
    """True where something is rounded to 16 bits in between. With a single query each key is read
    once, and converting all of them first would take longer than the attention."""
    nodes = [m.scores, *[node for node, _ in m.path], m.normal, m.output]
    some = any(is_low(type_of(n).dtype) for n in nodes)
    return some and type_of(m.scores).shape[-2] is not ONE


def _widened(m: Match, casts: dict[int, Value], new: dict[int, Value]) -> Value:
    """The nodes of an attention again, on operands in float32."""

    def wide(v: Value) -> Value:
        return _wide(v, casts)

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


def _wide(v: Value, casts: dict[int, Value]) -> Value:
    """A new value in float32, if it is a number. casts: those made already, by the id of what they
    convert."""
    if not is_low(type_of(v).dtype):
        return v
    if isinstance(v, Constant):
        return Constant(v.data.astype(np.float32))
    if id(v) not in casts:
        casts[id(v)] = _cast(v, float32)
    return casts[id(v)]


def _again(node: Apply, *args: Value | None) -> Apply:
    assert not isinstance(node.op, Function)
    return apply(node.op, *args, attrs=node.attrs, locs=node.locs, name=node.name)


def _cast(x: Value, dtype: DType) -> Value:
    return apply(elementwise.cast_, x, attrs=elementwise.CastAttrs(dtype))
