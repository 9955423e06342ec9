"""Which outputs of an optimised graph grow in the memory of an input; see passes/caches.py."""

from __future__ import annotations

from ..ir.expr import Dim
from ..ir.graph import Apply, Function
from ..ops import append


def cache_pairs(fn: Function) -> list[tuple[int, int, int, Dim]]:
    """(input, output, axis, room) of every append of an optimised graph."""
    inputs = {id(p): k for k, p in enumerate(fn.params)}
    found = []
    for k, r in enumerate(fn.results):
        if not isinstance(r, Apply) or not isinstance(r.op, Function):
            continue
        for inner in r.op.results:
            if not isinstance(inner, Apply) or inner.op is not append.append:
                continue
            room = inner.attrs.room
            if isinstance(room, Dim):  # else no memory is shared
                past = r.args[r.op.params.index(inner.args[0])]
                found.append((inputs[id(past)], k, inner.attrs.axis, room))
    return found
