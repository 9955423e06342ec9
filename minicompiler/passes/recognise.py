"""Attention becomes one kernel: rows of a product, normalised, weight the rows of another product.

    %0 = matmul(%q, %k)                %0 = fused_attention(%q, %k, %mask, %v) {
    %1 = mul(%0, 0.125)                  %0 = matmul(%p0, %p1)
    %2 = add(%1, %mask)         ->       ...  %4 = exp(%2 - max of %2)
    %3 = softmax(%2)                     %5 = matmul(%4, %p3)
    %4 = matmul(%3, %v)                  return %5 / sum of %4
                                       }
Any elementwise work may stand between the products. Views of the operands and of the result (split
and joined heads) go into the kernel as index maps; factors of an operand move behind its product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from ..ir.equal import structural_key
from ..ir.expr import ONE, Const
from ..ir.graph import (
    Apply,
    Constant,
    Function,
    Input,
    Item,
    Value,
    apply,
    layout_of,
    topological,
    type_of,
    users,
    with_args,
)
from ..ir.op import Kind
from ..ir.types import DType, TensorType, float32
from ..ops import elementwise, linalg, pieces, reduce, shape
from ..ops.rules import is_low
from .kind import kind_of
from .masks import causal_offset, computed_inside, masked, never_empty

_VIEWS = (
    shape.reshape, shape.transpose, shape.squeeze, shape.unsqueeze, shape.expand,
    pieces.strided_slice,
)  # fmt: skip
_TAIL = (shape.reshape, shape.transpose)
_LAST = reduce.ReduceAttrs((-1,), True)


@dataclasses.dataclass
class Operand:
    """A value as a product reads it: views of a source, innermost first, times a factor."""

    source: Value
    views: list[Apply]
    factor: float


@dataclasses.dataclass
class Match:
    """The nodes of one attention.

    scores: (matmul) -> path: elementwise nodes, each with the position of the argument that comes
    from the one before -> softmax (0 where `zeroed` holds) -> output: (matmul) -> tail: views.
    """

    scores: Apply
    path: list[tuple[Apply, int]]
    normal: Apply
    zeroed: Value | None
    output: Apply
    tail: list[Apply]

    @property
    def end(self) -> Apply:
        return self.tail[-1] if self.tail else self.output


Readers = dict[int, list[Value]]


def recognise(fn: Function, ctx: Any) -> Function:
    """Every attention whose intermediate values nobody else reads becomes a fused Function."""
    readers = users(fn)
    for r in fn.results:
        readers.setdefault(id(r), []).append(r)
    matches: dict[int, Match] = {}
    for v in topological(fn.results):
        match = match_of(v, readers) if isinstance(v, Apply) and v.op is linalg.matmul else None
        if match is not None:
            matches[id(match.end)] = match
    shared: dict[str, Function] = {}
    return rebuilt(fn, {k: partial(_call, m, shared) for k, m in matches.items()})


def rebuilt(fn: Function, changed: Mapping[int, Callable[[dict[int, Value]], Value]]) -> Function:
    """The function with other values for some nodes, by id.

    changed: what makes such a value, given the new values of all that stands before it.
    """
    new: dict[int, Value] = {}
    for v in topological(fn.results) if changed else ():
        if id(v) in changed:
            new[id(v)] = changed[id(v)](new)
        elif isinstance(v, Apply):
            args = tuple(None if a is None else new[id(a)] for a in v.args)
            same = all(a is b for a, b in zip(args, v.args, strict=True))
            new[id(v)] = v if same else with_args(v, args)
        elif isinstance(v, Item):
            source = new[id(v.tuple)]
            assert isinstance(source, Apply)
            new[id(v)] = v if source is v.tuple else Item(source, v.index)
        else:
            new[id(v)] = v
    return fn.with_(results=tuple(new[id(r)] for r in fn.results)) if changed else fn


# ---- the pattern --------------------------------------------------------------------------------
def match_of(output: Apply, readers: Readers, low: bool = False) -> Match | None:
    """The attention that ends in a product, if it is one.

    low: 16-bit floats may take part, and conversions between them and float32.
    """
    weights, values = output.args
    assert weights is not None and values is not None
    t, other = type_of(weights), type_of(values)
    if (
        t.rank < 2
        or other.rank < 2
        or output.attrs.transpose_a
        or not _private(low, output, values)
    ):
        return None
    if type_of(output).shape[:-1] != t.shape[:-1] or all(n is ONE for n in t.shape[:-1]):
        return None
    if t.shape[-1] is ONE or type_of(output).shape[-1] is ONE:
        return None
    normal, zeroed = _normalised(weights, readers, low)
    if normal is None or normal.attrs.axis not in (-1, t.rank - 1):
        return None
    path: list[tuple[Apply, int]] = []
    x = normal.args[0]
    while x is not None and isinstance(x, Apply) and x.op is not linalg.matmul:
        if len(readers[id(x)]) > 1 or isinstance(x.type, tuple) or not x.args:
            return None
        if not _alike(x.type, t, low):
            return None
        if kind_of(x) > Kind.BROADCAST or any(m is not None for m in x.layouts):
            return None
        position = _towards_product(x, low)
        if position is None:
            return None
        path.insert(0, (x, position))
        x = x.args[position]
    if not isinstance(x, Apply) or len(readers[id(x)]) > 1 or not _alike(type_of(x), t, low):
        return None
    depth = -2 if x.attrs.transpose_a else -1
    left = x.args[0]
    if left is None or not _private(low, x, *x.args) or type_of(left).shape[depth] is ONE:
        return None
    tail: list[Apply] = []
    last: Value = output
    while len(readers[id(last)]) == 1:
        (reader,) = readers[id(last)]
        if reader is last or not isinstance(reader, Apply) or reader.op not in _TAIL:
            break
        kept = type_of(reader).shape  # a loop over rows side by side is split by a known number
        if any(type(n) is not Const and n not in kept for n in type_of(last).shape):
            break
        if layout_of(reader) is not None:
            tail = []  # one copy of rows into blocks, behind the rows that this kernel writes best
            break
        tail.append(reader)
        last = reader
    return Match(x, path, normal, zeroed, output, tail)


def _alike(a: TensorType, b: TensorType, low: bool) -> bool:
    """Whether two values may belong to the same scores."""
    return a == b or (low and a.shape == b.shape and _is_number(a.dtype) and _is_number(b.dtype))


def _is_number(dtype: DType) -> bool:
    return dtype is float32 or is_low(dtype)


def _private(low: bool, product: Apply, *operands: Value | None) -> bool:
    """True for a product of float32 matrices that are computed at run time."""
    dtype = type_of(product).dtype
    return (
        (_is_number(dtype) if low else dtype is float32)
        and all(isinstance(a, Apply | Item | Input) and type_of(a).rank >= 2 for a in operands)
        and not any(layout_of(a) for a in operands if a is not None)
    )


def _normalised(weights: Value, readers: Readers, low: bool) -> tuple[Apply | None, Value | None]:
    """The softmax behind the weights, which nothing else reads, and the condition under which they
    are zero: one per row, or that they are not numbers (which holds for all of a row or none)."""
    while low and isinstance(weights, Apply) and weights.op is elementwise.cast_:
        (source,) = weights.args
        if len(readers[id(weights)]) > 1 or source is None:
            return None, None
        weights = source
    if not isinstance(weights, Apply) or len(readers[id(weights)]) > 1:
        return None, None
    if weights.op is reduce.softmax:
        return weights, None
    if weights.op is not elementwise.where:
        return None, None
    condition, zero, normal = weights.args
    if not isinstance(normal, Apply) or normal.op is not reduce.softmax:
        return None, None
    if normal.type != weights.type or not isinstance(zero, Constant) or zero.data.any():
        return None, None
    readers_of_normal = [r for r in readers[id(normal)] if r is not weights]
    if is_nan(condition, normal):
        alone = readers_of_normal == [condition] and len(readers[id(condition)]) == 1
        return (normal, condition) if alone else (None, None)
    assert condition is not None
    per_row = type_of(condition).rank > 0 and type_of(condition).shape[-1] is ONE
    return (normal, condition) if per_row and not readers_of_normal else (None, None)


def is_nan(condition: Value | None, of: Value) -> bool:
    return (
        isinstance(condition, Apply)
        and condition.op is elementwise.isnan
        and condition.args[0] is of
    )


def _towards_product(x: Apply, low: bool) -> int | None:
    """The argument of an elementwise node behind which a product of the same shape stands."""
    for position, a in enumerate(x.args):
        below = a
        while isinstance(below, Apply) and below.op is not linalg.matmul:
            same = [b for b in below.args if b is not None and _alike(type_of(b), type_of(x), low)]
            below = same[0] if same and _alike(type_of(below), type_of(x), low) else None
        if isinstance(below, Apply) and _alike(type_of(below), type_of(x), low):
            return position
    return None


def operand_of(value: Value | None) -> Operand:
    """Views and constant factors taken off an operand of a product."""
    assert value is not None
    views: list[Apply] = []
    factor = 1.0
    while isinstance(value, Apply) and layout_of(value) is None:
        scalar = _scalar(value)
        if value.op in _VIEWS:
            views.insert(0, value)
            value = value.args[0]
        elif value.op is elementwise.mul and scalar is not None:
            factor *= scalar[1]
            value = value.args[scalar[0]]
        else:
            break
        assert value is not None
    return Operand(value, views, factor)


def _scalar(v: Apply) -> tuple[int, float] | None:
    """(position of the other argument, number) of a node with one number among two arguments."""
    for k, a in enumerate(v.args[:2]):
        other = v.args[1 - k] if len(v.args) == 2 else None
        if other is None or not isinstance(a, Constant) or a.data.size != 1:
            continue
        if type_of(other) == v.type:
            return 1 - k, float(a.data.reshape(-1)[0])
    return None


# ---- the kernel ---------------------------------------------------------------------------------
def _call(m: Match, shared: dict[str, Function], new: dict[int, Value]) -> Apply:
    """The fused Function of an attention, applied to what it reads."""
    params: list[Input] = []
    args: list[Value] = []

    def leaf(v: Value) -> Value:
        """Each use has a parameter of its own, so that schedules can pack one and not the other."""
        if isinstance(v, Constant) and v.data.size == 1:
            return v
        params.append(Input(f"p{len(params)}", type_of(v), layout_of(v)))
        args.append(new[id(v)])
        return params[-1]

    def viewed(operand: Operand) -> Value:
        x = leaf(operand.source)
        for view in operand.views:
            x = view.with_(args=(x,))
        return x

    left, right, values = map(operand_of, (*m.scores.args, m.output.args[1]))
    x: Value = m.scores.with_(args=(viewed(left), viewed(right)))
    x = times(x, left.factor * right.factor)
    alone = sum(len(node.args) > 1 and _scalar(node) is None for node, _ in m.path) == 1
    for k, (node, position) in enumerate(m.path):
        offset = causal_offset(node, position, alone and k == len(m.path) - 1)
        if offset is not None:
            x = masked(x, offset)
            continue
        x = node.with_(
            args=tuple(
                x if i == position else None if a is None else computed_inside(a, leaf) or leaf(a)
                for i, a in enumerate(node.args)
            )
        )
    e = apply(elementwise.exp, apply(elementwise.sub, x, apply(reduce.reduce_max, x, attrs=_LAST)))
    total = apply(reduce.reduce_sum, e, attrs=_LAST)
    # The rows are divided by their sums after the product: there are fewer elements then.
    y: Value = times(m.output.with_(args=(e, viewed(values))), values.factor)
    y = apply(elementwise.div, y, total)
    if m.zeroed is not None and not never_empty(m.zeroed):
        nan = is_nan(m.zeroed, m.normal)
        condition = apply(elementwise.isnan, total) if nan else leaf(m.zeroed)
        y = apply(elementwise.where, condition, Constant(np.zeros((), np.float32)), y)
    for view in m.tail:
        y = view.with_(args=(y,))
    fn = Function("fused_attention", tuple(params), (y,), fused=True)
    key = structural_key(fn)
    if key not in shared:
        name = fn.name if not shared else f"{fn.name}_{len(shared)}"
        shared[key] = fn.with_(name=name)
    nodes = (m.scores, *[n for n, _ in m.path], m.normal, m.output, *m.tail)
    locs = tuple(dict.fromkeys(loc for n in nodes for loc in n.locs))
    made = Apply(shared[key], tuple(args), None, type_of(m.end), locs, name=m.end.name)
    return made.with_(layouts=(layout_of(m.end),))


def times(x: Value, factor: float) -> Value:
    """x times a number."""
    return x if factor == 1 else apply(elementwise.mul, x, Constant(np.asarray(factor, np.float32)))
