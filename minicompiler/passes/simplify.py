"""Algebra on the graph: a table of local rules, applied until none fires.

    %1 = transpose(%x) {perm=(0,2,1)}         %1 = mul(%x, %x)
    %2 = transpose(%1) {perm=(0,2,1)}   ->    return %1
    %3 = power(%2, 2.0)
A rule sees one node whose operands are simplified already and returns what replaces it, or None. It
may only change rounding where its comment says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..ir.expr import ONE, const_int
from ..ir.graph import (
    Apply,
    Constant,
    Function,
    Item,
    Value,
    apply,
    layout_of,
    rebuild,
    type_of,
    with_args,
)
from ..ir.op import Op
from ..ir.types import TensorType, float32
from ..ops import activations, conv, elementwise, index, padding, pieces, pool, scatter, shape
from ..ops import norm as norms
from . import borders, positions

Rule = Callable[[Apply], Value | None]


def simplify(fn: Function, ctx: Any) -> Function:
    """Applies `RULES` to every node, operands first."""

    def change(v: Value, args: tuple[Value | None, ...]) -> Value | None:
        if not isinstance(v, Apply) or isinstance(v.op, Function):
            return None
        now: Value = v if args == v.args else with_args(v, args)
        while isinstance(now, Apply):
            better = _once(now)
            if better is None:
                break
            now = better
        return now

    return rebuild(fn, change)


def _once(v: Apply) -> Value | None:
    assert isinstance(v.op, Op)
    for rule in RULES.get(v.op, ()):
        made = rule(v)
        # A rule that would change the type (by dropping a broadcast) or a layout does not apply.
        if made is not None and type_of(made) == v.type and layout_of(made) == layout_of(v):
            return made
    return None


def _again(v: Apply, op: Op, *args: Value | None, attrs: Any = None) -> Apply:
    """A new node in the place of `v`."""
    return apply(op, *args, attrs=attrs, locs=v.locs, name=v.name)


def _operand(v: Apply, k: int, op: Op) -> Apply | None:
    """Operand `k` when it is a node of the given operator."""
    a = v.args[k]
    return a if isinstance(a, Apply) and a.op is op else None


def _filled(v: Value | None) -> float | None:
    """The number that a constant consists of, when all its elements are the same."""
    if not isinstance(v, Constant) or v.data.size == 0 or v.data.size > 1 << 16:
        return None
    first = v.data.reshape(-1)[0]
    return float(first) if bool(np.all(v.data == first)) else None


# ---- arithmetic ---------------------------------------------------------------------------------
def _neutral(number: float, right_only: bool = False) -> Rule:
    """x op number = x (for x + 0, up to the sign of a zero)."""

    def rule(v: Apply) -> Value | None:
        a, b = v.args
        if _filled(b) == number:
            return a
        return b if not right_only and _filled(a) == number else None

    return rule


def _absorbing(number: float) -> Rule:
    """x op number = number (x and False)."""

    def rule(v: Apply) -> Value | None:
        return next((a for a in v.args if _filled(a) == number), None)

    return rule


def _divide_exactly(v: Apply) -> Value | None:
    """x / c = x * (1 / c), exact when c is a power of two."""
    number = _filled(v.args[1])
    if number is None or not type_of(v).dtype.is_float or not math.isfinite(number) or number == 0:
        return None
    mantissa, exponent = math.frexp(abs(number))
    if mantissa != 0.5 or abs(exponent) > 14:  # 1 / c is a normal number in every float type
        return None
    dtype = type_of(v).dtype.numpy
    old = v.args[1]
    assert isinstance(old, Constant)
    factor = Constant(np.full(old.data.shape, 1 / number, dtype), old.name, locs=old.locs)
    return _again(v, elementwise.mul, v.args[0], factor)


def _small_power(v: Apply) -> Value | None:
    """x ** 2 = x * x; x ** 3 = x * x * x within one rounding of `pow`."""
    x, number = v.args[0], _filled(v.args[1])
    if number == 1:
        return x
    if number not in (2, 3) or x is None or type_of(x) != v.type:
        return None
    square = _again(v, elementwise.mul, x, x)
    return square if number == 2 else _again(v, elementwise.mul, square, x)


def _half_of_tanh(v: Apply) -> Value | None:
    """0.5 * (1 + tanh(y)) = sigmoid(2 * y), and the same times x, as exporters write GELU. Rounding
    differs by that of the sum, which cancels below 0."""
    if type_of(v).dtype is not float32:
        return None
    for k in (0, 1):
        total, other = _operand(v, k, elementwise.add), v.args[1 - k]
        for j in (0, 1):
            wave = None if total is None else _operand(total, j, elementwise.tanh)
            if total is None or wave is None or _filled(total.args[1 - j]) != 1:
                continue
            two = Constant(np.full((), 2, np.float32), "2", locs=v.locs)
            half = _again(
                wave, elementwise.sigmoid, _again(wave, elementwise.mul, wave.args[0], two)
            )
            if _filled(other) == 0.5:
                return half
            scaled = _operand(v, 1 - k, elementwise.mul)
            for x, factor in (scaled.args, scaled.args[::-1]) if scaled is not None else ():
                if _filled(factor) == 0.5:
                    return _again(v, elementwise.mul, x, half)
    return None


def _twice(op: Op) -> Rule:
    """op(op(x)) = x."""

    def rule(v: Apply) -> Value | None:
        inner = _operand(v, 0, op)
        return None if inner is None else inner.args[0]

    return rule


def _idempotent(op: Op) -> Rule:
    """op(op(x)) = op(x)."""
    return lambda v: _operand(v, 0, op)


def _clip_of_clip(v: Apply) -> Value | None:
    """Nested bounds become one pair; an inner bound that the outer range excludes is left alone."""
    inner = _operand(v, 0, elementwise.clip)
    if inner is None:
        return None
    low = _bound(max, v.attrs.low, inner.attrs.low)
    high = _bound(min, v.attrs.high, inner.attrs.high)
    if low is not None and high is not None and low > high:
        return None
    return _again(v, elementwise.clip, inner.args[0], attrs=elementwise.ClipAttrs(low, high))


def _bound(pick: Callable[..., Any], a: Any, b: Any) -> Any:
    known = [x for x in (a, b) if x is not None]
    return pick(known) if known else None


# ---- choice and conversion ----------------------------------------------------------------------
def _constant_choice(v: Apply) -> Value | None:
    """where with a condition that is the same everywhere, or with equal branches."""
    cond, a, b = v.args
    if a is b:
        return a
    number = _filled(cond)
    return None if number is None else a if number else b


def _negated_choice(v: Apply) -> Value | None:
    inner = _operand(v, 0, elementwise.logical_not)
    if inner is None:
        return None
    return _again(v, elementwise.where, inner.args[0], v.args[2], v.args[1])


def _unchanged(v: Apply) -> Value | None:
    """An operator that only moves elements and keeps the shape (the caller compares types)."""
    return v.args[0]


# ---- moving elements ----------------------------------------------------------------------------
def _perm(v: Apply) -> tuple[int, ...]:
    rank = type_of(v).rank
    return tuple(p % rank for p in v.attrs.perm) or tuple(reversed(range(rank)))


def _transpose(v: Apply) -> Value | None:
    perm = _perm(v)
    if perm == tuple(range(len(perm))):
        return v.args[0]
    inner = _operand(v, 0, shape.transpose)
    if inner is not None:
        first = _perm(inner)
        both = shape.TransposeAttrs(tuple(first[p] for p in perm))
        return _again(v, shape.transpose, inner.args[0], attrs=both)
    source = type_of(v.args[0])  # type: ignore[arg-type]
    moved = [p for p in perm if const_int(source.shape[p]) != 1]
    if moved == sorted(moved):  # only dimensions of size 1 change places
        return _reshaped(v, v.args[0])
    return None


_VIEWS = (shape.reshape, shape.squeeze, shape.unsqueeze)


def _view(v: Apply) -> Value | None:
    """Views of views become one reshape; a view that changes nothing goes."""
    x = v.args[0]
    assert x is not None
    if type_of(x) == v.type:
        return x
    if isinstance(x, Apply) and x.op in _VIEWS:
        return _reshaped(v, x.args[0])
    return None


def _reshaped(v: Apply, x: Value | None) -> Apply:
    attrs = shape.ReshapeAttrs(type_of(v).shape, allow_zero=True)
    return _again(v, shape.reshape, x, attrs=attrs)


def _normalised_groups(v: Apply) -> Value | None:
    """reshape(norm of each channel of reshape(x, [n, groups, ..])) is a norm of groups of channels
    of x: so exporters write it, and x keeps its layout then."""
    norm = _operand(v, 0, norms.group_norm)
    view = None if norm is None else norm.args[0]
    if norm is None or not isinstance(view, Apply) or view.op not in _VIEWS:
        return None
    x, *parameters = view.args[0], *norm.args[1:]
    whole, cut = type_of(v).shape, type_of(norm).shape
    if x is None or type_of(x) != v.type or len(whole) < 2 or whole[0] is not cut[0]:
        return None
    channels, parts = const_int(whole[1]), const_int(cut[1])
    if not channels or not parts or channels % parts:
        return None
    if not all(isinstance(p, Constant) for p in parameters):
        return None
    each = [Constant(np.repeat(p.data, channels // parts)) for p in parameters]  # type: ignore[union-attr]
    attrs = norms.GroupNormAttrs(norm.attrs.groups or parts, norm.attrs.epsilon)
    locs = (*norm.locs, *v.locs)
    return apply(norms.group_norm, x, *each, attrs=attrs, locs=locs, name=v.name)


def _whole_slice(v: Apply) -> Value | None:
    """A slice as large as its operand; a reversed one has that size too."""
    return v.args[0] if all(step == 1 for step in v.attrs.steps) else None


def _unpadded(v: Apply) -> Value | None:
    padding = (*v.attrs.begin, *v.attrs.end)
    return v.args[0] if all(const_int(p) == 0 for p in padding) else None


def _one_part(v: Apply) -> Value | None:
    return v.args[0] if len(v.args) == 1 else None


def _flat_concat(v: Apply) -> Value | None:
    """concat(concat(a, b), c) = concat(a, b, c) along one axis."""
    axis = v.attrs.axis % type_of(v).rank

    def nested(a: Value | None) -> bool:
        return (
            isinstance(a, Apply)
            and a.op is pieces.concat
            and a.attrs.axis % type_of(a).rank == axis
        )

    if not any(map(nested, v.args)):
        return None
    parts: list[Value | None] = []
    for a in v.args:
        parts.extend(a.args if isinstance(a, Apply) and nested(a) else (a,))
    return _again(v, pieces.concat, *parts, attrs=v.attrs)


def _joined_split(v: Apply) -> Value | None:
    """concat of all parts of one split, in order, is what was split."""
    first = v.args[0]
    if not isinstance(first, Item) or first.tuple.op is not pieces.split:
        return None
    source = first.tuple
    assert not isinstance(source.type, TensorType)
    axis = source.attrs.axis % type_of(first).rank
    whole = [(source, k) for k in range(len(source.type))]
    found = [(a.tuple, a.index) for a in v.args if isinstance(a, Item)]
    same = len(found) == len(v.args) and found == whole
    return source.args[0] if same and v.attrs.axis % type_of(v).rank == axis else None


# ---- scattering ---------------------------------------------------------------------------------
def _scattered_rows(v: Apply) -> Value | None:
    """Where all elements of a row go to the same row, its position is read once."""
    x, updates = v.args[0], v.args[2]
    spread = _operand(v, 1, shape.expand)
    if spread is None or spread.args[0] is None or v.attrs.axis % v.type.rank != 0:  # type: ignore[union-attr]
        return None
    rows, whole = type_of(spread.args[0]).shape, type_of(spread).shape
    own = type_of(v).shape[1:]
    if len(rows) != len(whole) or rows[0] is not whole[0] or whole[1:] != own:
        return None
    if any(const_int(size) != 1 for size in rows[1:]):
        return None
    positions: Value = spread.args[0]
    if len(rows) != 2:
        flat = shape.ReshapeAttrs((rows[0], ONE), allow_zero=True)
        positions = _again(spread, shape.reshape, positions, attrs=flat)
    return _again(v, scatter.scatter_nd, x, positions, updates, attrs=v.attrs)


RULES: dict[Op, tuple[Rule, ...]] = {
    elementwise.add: (_neutral(0),),
    elementwise.sub: (_neutral(0, right_only=True),),
    elementwise.mul: (_neutral(1), _half_of_tanh),
    elementwise.div: (_neutral(1, right_only=True), _divide_exactly),
    elementwise.power: (_small_power,),
    elementwise.neg: (_twice(elementwise.neg),),
    elementwise.logical_not: (_twice(elementwise.logical_not),),
    elementwise.logical_and: (_neutral(1), _absorbing(0)),
    elementwise.logical_or: (_neutral(0), _absorbing(1)),
    elementwise.bitwise_not: (_twice(elementwise.bitwise_not),),
    elementwise.abs_: (_idempotent(elementwise.abs_),),
    activations.relu: (_idempotent(activations.relu),),
    elementwise.clip: (_clip_of_clip,),
    elementwise.where: (_constant_choice, _negated_choice),
    elementwise.cast_: (_unchanged,),
    elementwise.identity: (_unchanged,),
    shape.expand: (_unchanged,),
    pieces.tile: (_unchanged,),
    padding.pad: (_unpadded,),
    pieces.strided_slice: (_whole_slice,),
    shape.transpose: (_transpose,),
    shape.reshape: (_normalised_groups, _view),
    shape.squeeze: (_view,),
    shape.unsqueeze: (_view,),
    pieces.concat: (_one_part, _flat_concat, _joined_split),
    conv.conv: (borders.padded_conv, borders.trimmed),
    pool.max_pool: (borders.padded_max_pool, borders.trimmed),
    pool.avg_pool: (borders.padded_avg_pool, borders.trimmed),
    scatter.scatter_elements: (_scattered_rows,),
    scatter.scatter_nd: (positions.assigned,),
    index.gather: (positions.gathered,),
    index.gather_nd: (positions.gathered_points,),
}
