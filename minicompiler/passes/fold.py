"""Constant folding: what depends on constants only is computed while compiling.

    %0 = mul(@scale, 2.0)                %0 is now the constant @scale * 2
    %1 = add(%x, %0)            ->       %1 = add(%x, @mul)
Shape arithmetic whose value turned out to be plain numbers becomes a Constant as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from .. import te
from ..ir.expr import Const, Reduce
from ..ir.graph import (
    Apply,
    Constant,
    Function,
    Item,
    Value,
    content_of,
    rebuild,
    type_of,
    with_args,
)
from ..ir.op import Op
from ..ir.types import TensorType
from ..limits import Budget
from ..ops.evaluate import bind_attrs, is_symbolic

_ROOM = 16 << 20  # bytes that a result may exceed its operands by
_SMALL = 1 << 16  # elements of operands and results whose work is not worth counting exactly


def fold_constants(fn: Function, ctx: Any) -> Function:
    """Replaces nodes on constants by their value, computed with the operator's numpy reference.

    A result may exceed its operands by `ctx.options.fold_bytes`: a large Expand stays a node.
    """
    room = ctx.options.fold_bytes if ctx is not None else _ROOM
    budget = ctx.budget if ctx is not None else Budget()
    computed: dict[int, tuple[np.ndarray, ...] | None] = {}

    def values_of(v: Apply) -> tuple[np.ndarray, ...] | None:
        if id(v) not in computed:
            computed[id(v)] = evaluate_node(v, room, budget)
            alive.append(v)
        return computed[id(v)]

    alive: list[Apply] = []  # keeps the nodes whose ids are keys

    def change(v: Value, args: tuple[Value | None, ...]) -> Value | None:
        if isinstance(v, Apply):
            if not isinstance(v.type, TensorType):
                return None
            known = _known_content(v)
            if known is not None:
                return Constant(known, v.name, locs=v.locs)
            now = v if args == v.args else with_args(v, args)
            values = values_of(now)
            if values is not None:
                return Constant(values[0], v.name, locs=v.locs)
            return now
        if isinstance(v, Item):
            source = args[0]
            assert isinstance(source, Apply)
            known = _known_content(Item(source, v.index))
            values = None if known is not None else values_of(source)
            if known is None and values is not None:
                known = values[v.index]
            if known is not None:
                return Constant(known, f"{source.name}.{v.index}", locs=source.locs)
        return None

    return rebuild(fn, change)


def evaluate_node(
    v: Apply, room: int = _ROOM, budget: Budget | None = None
) -> tuple[np.ndarray, ...] | None:
    """The results of a node on constants; None when it depends on data or is too large.

    room: bytes that the results may exceed the operands by. budget: pays for bytes and work.
    Raises LimitError.
    """
    if isinstance(v.op, Function) or not all(a is None or isinstance(a, Constant) for a in v.args):
        return None
    if not v.op.computes or (dataclasses.is_dataclass(v.attrs) and is_symbolic(v.attrs)):
        return None
    types = v.type if isinstance(v.type, tuple) else (v.type,)
    if not all(type(s) is Const for t in types for s in t.shape):
        return None
    given = [a.data for a in v.args if isinstance(a, Constant)]
    size = sum(_elements(t) * t.dtype.bytes for t in types)
    if size > room + sum(a.nbytes for a in given):
        return None
    if budget is not None:
        budget.use("fold_bytes", size, v.locs)
        budget.use("fold_operations", _work(v, types), v.locs)
        budget.check_time(v.locs)
    return compute(
        v.op, [a.data if isinstance(a, Constant) else None for a in v.args], v.attrs, types
    )


def _elements(t: TensorType) -> int:
    return prod(s.value for s in t.shape if type(s) is Const)


def _work(v: Apply, types: Sequence[TensorType]) -> int:
    """The points of the loops that the node's tensor expressions stand for."""
    shapes = [None if a is None else type_of(a) for a in v.args]
    flat = sum(_elements(t) for t in (*types, *[t for t in shapes if t is not None]))
    if flat <= _SMALL:
        return flat
    assert not isinstance(v.op, Function)
    args = [
        None if t is None else te.placeholder(f"a{k}", t.shape, t.dtype)
        for k, t in enumerate(shapes)
    ]
    made = v.op.computes[0].build(*args, v.attrs)
    total = flat
    for t in te.closure(made if isinstance(made, tuple) else (made,)):
        extents = [*t.shape, *(t.body.extents if isinstance(t.body, Reduce) else ())]
        total += prod(e.value for e in extents if type(e) is Const)
    return total


def compute(
    op: Op, args: Sequence[np.ndarray | None], attrs: Any, types: Sequence[TensorType]
) -> tuple[np.ndarray, ...]:
    """The operator's reference on numbers, each result in its declared type."""
    with np.errstate(all="ignore"):
        got = op.reference(*args, bind_attrs(attrs, {}))
    results = got if isinstance(got, tuple) else (got,)
    return tuple(np.asarray(r, t.dtype.numpy) for r, t in zip(results, types, strict=True))


def _known_content(v: Value) -> np.ndarray | None:
    content = content_of(v)
    if content is None or not all(type(e) is Const for e in content.flat):
        return None
    t = v.type  # type: ignore[attr-defined]
    numbers = np.array([e.value for e in content.flat], t.dtype.numpy)
    return numbers.reshape(content.shape)
