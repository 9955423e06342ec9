"""Sizes that are computed get names of their own inside a kernel, so that proofs stay short.

    fn(p0: float32[b, 16, (h + 1)//2, (w + 1)//2]) {conv ...}
 -> fn(p0: float32[b, 16, size0, size1]) {conv ...}, ((size0, (h + 1)//2), (size1, (w + 1)//2))

After a few strided convolutions a size is a tower of quotients, and its product with others is what
indices are divided by. The kernel still takes h and w; codegen computes size0 at its start.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from minicompiler.errors import ShapeError
from minicompiler.ir.arith import Arith
from minicompiler.ir.expr import Binary, Dim, Expr, free_vars, rewrite, substitute, walk
from minicompiler.ir.graph import Apply, Function, Input, Value, applies, apply, rebuild, type_of
from minicompiler.ir.op import Counted
from minicompiler.ir.types import TensorType

Sizes = tuple[tuple[Dim, Expr], ...]


def name_sizes(fn: Function) -> tuple[Function, Sizes]:
    """The function in terms of named sizes, and what they are; as it is where that cannot be."""
    arith = Arith()
    names: dict[Expr, Dim] = {}
    for p in fn.params:
        for s in p.type.shape:
            if s not in names and any(type(x) is Binary and x.op == "floordiv" for x in walk(s)):
                low, high = arith.interval(s)
                names[s] = Dim(f"size{len(names)}", max(low or 0, 0), high)
    if not names or any(isinstance(v.attrs, Counted) for v in applies(fn)):
        return fn, ()
    inputs = {id(p): Input(p.name, _typed(p.type, names), p.layout) for p in fn.params}

    def change(v: Value, args: tuple[Value | None, ...]) -> Value | None:
        if not isinstance(v, Apply):
            return inputs.get(id(v))
        assert not isinstance(v.op, Function)
        attrs = _attributes(v.attrs, names)
        made = apply(v.op, *args, attrs=attrs, locs=v.locs, name=v.name)
        return made.with_(layouts=v.layouts)

    try:
        made = rebuild(fn, change)
    except ShapeError:  # it needs to know how the sizes are computed
        return fn, ()
    made = dataclasses.replace(made, params=tuple(inputs[id(p)] for p in fn.params))
    back: dict[Expr, Expr] = {d: s for s, d in names.items()}
    for old, new in zip(fn.results, made.results, strict=True):
        for a, b in zip(type_of(old).shape, type_of(new).shape, strict=True):
            if arith.simplify(substitute(b, back)) is not arith.simplify(a):
                return fn, ()
    hidden = {v for s in names for v in free_vars(s)}
    if any(not hidden.isdisjoint(free_vars(e)) for e in _expressions(made)):
        return fn, ()  # they are needed besides
    return made, tuple((d, s) for s, d in names.items())


def _typed(t: TensorType, names: Mapping[Expr, Dim]) -> TensorType:
    return TensorType(tuple(names.get(s, s) for s in t.shape), t.dtype)


def _attributes(attrs: Any, names: Mapping[Expr, Dim]) -> Any:
    def named(value: Any) -> Any:
        if isinstance(value, Expr):
            return rewrite(value, names.get)
        if isinstance(value, tuple):
            return tuple(map(named, value))
        return value

    fields = {f.name: named(getattr(attrs, f.name)) for f in dataclasses.fields(attrs)}
    return dataclasses.replace(attrs, **fields)


def _expressions(fn: Function) -> Iterator[Expr]:
    """All sizes in a function's types and attributes."""

    def of(value: Any) -> Iterator[Expr]:
        if isinstance(value, Expr):
            yield value
        elif isinstance(value, tuple):
            for v in value:
                yield from of(v)

    for p in fn.params:
        yield from p.type.shape
    for v in applies(fn):
        for t in v.type if isinstance(v.type, tuple) else (v.type,):
            yield from t.shape
        for f in dataclasses.fields(v.attrs):
            yield from of(getattr(v.attrs, f.name))
