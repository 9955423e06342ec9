"""Key/value caches: outputs that append to an input are written where the input lies.

    %1 = concat(%past, %x; axis=2)            %1 = append(%past, %x; axis=2, room)
    %2 = softmax(matmul(%q, %1)) ...    ->    %2 = strided_slice(%1; ends=(p + n,), axes=(2,))
    return %1, ...                            %3 = softmax(matmul(%q, %2)) ...
                                              return %1, ...
`room` is a dimension: how many positions the caller's memory has behind those in use. It is told by
the strides of the arrays of a call (runtime/caches.py), the same for all caches.
"""

from __future__ import annotations

from typing import Any

from ..errors import MinicompilerError
from ..ir.expr import Dim
from ..ir.graph import Apply, Function, Input, Value, apply, function_dims, rebuild, type_of, users
from ..ops import append, pieces

ROOM = "room"


def append_in_place(fn: Function, ctx: Any) -> Function:
    """Each output that is the concatenation of an input, which nothing else reads, and something
    else becomes an append. Does nothing without `compile(caches=True)`."""
    if ctx is None or not ctx.options.caches:
        return fn
    readers = users(fn)
    found: dict[int, int] = {}
    for r in fn.results:
        if not isinstance(r, Apply) or r.op is not pieces.concat or len(r.args) != 2:
            continue
        past = r.args[0]
        alone = isinstance(past, Input) and len(readers[id(past)]) == 1
        if alone and fn.results.count(r) == 1:
            found[id(r)] = r.attrs.axis % type_of(r).rank
    if not found:
        raise MinicompilerError(
            "caches=True, but no output is the concatenation of an input and something new",
            hint="a decoder with past keys and values as inputs has such outputs",
        )
    if any(d.name == ROOM for d in function_dims(fn)):
        raise MinicompilerError(f'caches=True needs the name "{ROOM}", which a dimension has')
    room = Dim(ROOM, 0, None)
    whole: dict[int, Value] = {}

    def change(v: Value, args: tuple[Value | None, ...]) -> Value | None:
        if id(v) not in found:
            return None
        assert isinstance(v, Apply)
        axis = found[id(v)]
        attrs = append.AppendAttrs(axis, room)
        whole[id(v)] = apply(append.append, *args, attrs=attrs, locs=v.locs, name=v.name)
        used = pieces.SliceAttrs((0,), (type_of(v).shape[axis],), (axis,))
        return apply(pieces.strided_slice, whole[id(v)], attrs=used, locs=v.locs)

    made = rebuild(fn, change)
    results = [whole.get(id(r), new) for r, new in zip(fn.results, made.results, strict=True)]
    return made.with_(results=tuple(results))
