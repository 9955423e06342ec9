"""Roundings to small integers, with as little around them as their results need.

    %0 = quantize(%x, s, z)             %0 = clip(round(%x / s), low - z, high - z)
    %1 = dequantize(%0, t, z)    ->     %1 = %0 * t
Whole numbers of 16 bits and their differences are float32 numbers, so the result is the same.
    quantize(cast(%i) * @a + @b, s)  ->  quantize(cast(%i) * (@a / s) + @b / s, 1)
Products of integers are scaled once; the quotient moves by its last bit, like other runtimes'.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..ir.expr import const_int, product
from ..ir.graph import Apply, Constant, Function, Value, apply, rebuild, type_of, users
from ..ir.types import float32
from ..ops import elementwise, quant

_SMALL = ("int8", "uint8", "int16", "uint16")


def round_in_place(fn: Function, ctx: Any) -> Function:
    """Rewrites where one scale and a constant zero point hold for all elements."""
    readers = users(fn)
    results = {id(r) for r in fn.results}
    rounded: dict[int, Value] = {}

    def change(v: Value, args: tuple[Value | None, ...]) -> Value | None:
        if not isinstance(v, Apply):
            return None
        if v.op is quant.quantize:
            alone = len(readers[id(v.args[0])]) == 1 and id(v.args[0]) not in results
            return _scaled_once(v, args) if alone else None
        if v.op is not quant.dequantize:
            return None
        whole = v.args[0]
        if not isinstance(whole, Apply) or whole.op is not quant.quantize:
            return None
        around = readers[id(whole)]
        if id(whole) in results or not all(_restores(whole, x) for x in around):
            return None
        if id(whole) not in rounded:
            now = args[0]
            assert isinstance(now, Apply)
            rounded[id(whole)] = _rounded(now)
        return apply(elementwise.mul, rounded[id(whole)], args[1], locs=v.locs, name=v.name)

    return rebuild(fn, change)


def _restores(whole: Apply, v: Value) -> bool:
    """Whether `v` is dequantize of `whole`, with its zero point."""
    if not isinstance(v, Apply) or v.op is not quant.dequantize or v.args[0] is not whole:
        return False
    points = [_zero_point(x) for x in (whole, v)]
    floats = [type_of(v), *[type_of(a) for a in (whole.args[0], whole.args[1], v.args[1]) if a]]
    return (
        type_of(whole).dtype.name in _SMALL
        and points[0] is not None
        and points[0] == points[1]
        and all(_is_one(x.args[1]) for x in (whole, v))
        and all(t.dtype is float32 for t in floats)
    )


def _rounded(v: Apply) -> Value:
    """What quantize computes, less the zero point, in float32."""
    point, limits = _zero_point(v), np.iinfo(type_of(v).dtype.numpy)
    assert point is not None
    x, scale = v.args[:2]
    if not isinstance(scale, Constant) or scale.data.item() != 1:
        x = apply(elementwise.div, x, scale, locs=v.locs)
    whole = apply(elementwise.round_, x, locs=v.locs)
    bounds = elementwise.ClipAttrs(float(limits.min - point), float(limits.max - point))
    return apply(elementwise.clip, whole, attrs=bounds, locs=v.locs, name=v.name)


# ---- scales of whole numbers --------------------------------------------------------------------
def _scaled_once(v: Apply, args: tuple[Value | None, ...]) -> Value | None:
    """quantize whose scale is part of those that its operand is multiplied with."""
    x, scale = args[:2]
    if not isinstance(scale, Constant) or scale.data.size != 1 or scale.data.item() == 0:
        return None
    total = x if isinstance(x, Apply) and x.op is elementwise.add else None
    scaled = x if total is None else total.args[0]
    offset = None if total is None else total.args[1]
    if not isinstance(scaled, Apply) or scaled.op is not elementwise.mul or not _is_whole(scaled):
        return None
    factor = scaled.args[1]
    if not isinstance(factor, Constant) or not isinstance(offset, Constant | None):
        return None
    if any(type_of(a).dtype is not float32 for a in (v.args[0], scale) if a is not None):
        return None
    made = apply(elementwise.mul, scaled.args[0], _over(factor, scale), locs=v.locs)
    if offset is not None:
        made = apply(elementwise.add, made, _over(offset, scale), locs=v.locs)
    if type_of(made) != type_of(v.args[0]):  # type: ignore[arg-type]
        return None
    one = Constant(np.ones_like(scale.data))
    return apply(v.op, made, one, *args[2:], attrs=v.attrs, locs=v.locs, name=v.name)  # type: ignore[arg-type]


def _is_whole(v: Apply) -> bool:
    """Whether the first operand consists of whole numbers: converted ones, or rounded ones."""
    x = v.args[0]
    if not isinstance(x, Apply) or x.op not in (elementwise.cast_, elementwise.clip):
        return False
    inner = x.args[0]
    if x.op is elementwise.cast_:
        return inner is not None and type_of(inner).dtype.is_int
    return isinstance(inner, Apply) and inner.op is elementwise.round_


def _over(numbers: Constant, scale: Constant) -> Constant:
    quotient = numbers.data.astype(np.float64) / float(scale.data.item())
    return Constant(quotient.astype(np.float32), numbers.name, locs=numbers.locs)


def _is_one(v: Value | None) -> bool:
    return v is not None and const_int(product(type_of(v).shape)) == 1


def _zero_point(v: Apply) -> int | None:
    """The zero point if it is known, 0 where there is none."""
    zero = v.args[2] if len(v.args) > 2 else None
    if zero is None:
        return 0
    one = isinstance(zero, Constant) and zero.data.size == 1
    return int(zero.data.reshape(-1)[0]) if one else None  # type: ignore[attr-defined]
