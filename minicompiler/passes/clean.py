"""Removing what changes nothing: repeated computations and identities.

    %1 = exp(%x)                         %1 = exp(%x)
    %2 = exp(%x)            ->           %2 = add(%1, %1)
    %3 = identity(%2)                    return %2
    %4 = add(%1, %3) ...
Dead code needs no pass: a node that no result needs is not part of a Function.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..ir.equal import attrs_key
from ..ir.graph import Apply, Constant, Function, Item, Value, rebuild
from ..ops.elementwise import identity

_SMALL = 64  # constants of up to this many elements are compared by value, larger ones by memory


def eliminate_common_subexpr(fn: Function, ctx: Any) -> Function:
    """Equal operators on equal arguments become one node; equal small constants become one."""
    seen: dict[tuple[Any, ...], Value] = {}

    def change(v: Value, args: tuple[Value | None, ...]) -> Value | None:
        key: tuple[Any, ...]
        if isinstance(v, Constant):
            key = ("constant", v.data.dtype, v.data.shape, v.layout, _identity_of(v.data))
        elif isinstance(v, Item):
            key = ("item", id(args[0]), v.index)
        elif isinstance(v, Apply):
            operands = tuple(None if a is None else id(a) for a in args)
            key = ("apply", id(v.op), operands, attrs_key(v.attrs), v.layouts)
        else:
            return None
        first = seen.get(key)
        if first is not None:
            return first
        if isinstance(v, Constant):
            made: Value = v
        elif all(a is b for a, b in zip(args, _operands(v), strict=True)):
            made = v
        else:
            # Only the operands' identity changed, never their types.
            made = Item(args[0], v.index) if isinstance(v, Item) else v.with_(args=args)  # type: ignore[arg-type]
        seen[key] = made
        kept.append(args)
        return made

    kept: list[Any] = []  # keeps the nodes alive whose ids are keys
    return rebuild(fn, change)


def _operands(v: Value) -> tuple[Value | None, ...]:
    return (v.tuple,) if isinstance(v, Item) else v.args  # type: ignore[attr-defined]


def _identity_of(data: np.ndarray) -> Any:
    if data.size <= _SMALL:
        return data.tobytes()
    return (data.__array_interface__["data"][0], data.strides)


def drop_identities(fn: Function, ctx: Any) -> Function:
    """Identity nodes give way to their operand."""

    def change(v: Value, args: tuple[Value | None, ...]) -> Value | None:
        return args[0] if isinstance(v, Apply) and v.op is identity else None

    return rebuild(fn, change)
