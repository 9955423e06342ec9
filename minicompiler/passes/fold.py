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

from ..ir.expr import Const
from ..ir.graph import Apply, Constant, Function, Item, Value, content_of, rebuild, with_args
from ..ir.op import Op
from ..ir.types import TensorType
from ..ops.evaluate import bind_attrs, is_symbolic

_BUDGET = 16 << 20


def fold_constants(fn: Function, ctx: Any) -> Function:
    """Replaces nodes on constants by their value, computed with the operator's numpy reference.

    A result may exceed its operands by `ctx.options.fold_bytes`: a large Expand stays a node.
    """
    budget = ctx.options.fold_bytes if ctx is not None else _BUDGET
    computed: dict[int, tuple[np.ndarray, ...] | None] = {}

    def values_of(v: Apply) -> tuple[np.ndarray, ...] | None:
        if id(v) not in computed:
            computed[id(v)] = evaluate_node(v, budget)
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


def evaluate_node(v: Apply, budget: int = _BUDGET) -> tuple[np.ndarray, ...] | None:
    """The results of a node on constants; None when it depends on data or is too large."""
    if isinstance(v.op, Function) or not all(a is None or isinstance(a, Constant) for a in v.args):
        return None
    if not v.op.computes or (dataclasses.is_dataclass(v.attrs) and is_symbolic(v.attrs)):
        return None
    types = v.type if isinstance(v.type, tuple) else (v.type,)
    if not all(type(s) is Const for t in types for s in t.shape):
        return None
    counts = [prod(s.value for s in t.shape if type(s) is Const) for t in types]
    size = sum(n * t.dtype.bytes for n, t in zip(counts, types, strict=True))
    given = [a.data for a in v.args if isinstance(a, Constant)]
    if size > budget + sum(a.nbytes for a in given):
        return None
    return compute(
        v.op, [a.data if isinstance(a, Constant) else None for a in v.args], v.attrs, types
    )


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
