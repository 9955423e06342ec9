"""Products of small integers become products of pairs, and scaled ones products of integers.

    %0 = dequantize(%x, sx, zx)            %0 = pairs(cast(%x) - zx)
    %1 = dequantize(@w, @sw, zw)     ->    %1 = matmul(%0, pairs(cast(@w) - zw)) {in_pairs}
    %2 = matmul(%0, %1)                    %2 = cast(%1) * (sx * @sw)
A difference of 8-bit numbers fits in 16 bits, and two such are multiplied and added by one
instruction, in twice as many lanes as float32 has. Sums of integers are exact, so what was float32
becomes more accurate.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ..ir.expr import const_int, product, wrap
from ..ir.graph import Apply, Constant, Function, Value, apply, rebuild, type_of
from ..ir.op import Op
from ..ir.types import float32, int32
from ..ops import conv, elementwise, linalg, quant, shape, winograd
from ..ops.pairs import PairsAttrs, pairs

_BYTES = ("int8", "uint8")
_GAIN = 0.6  # time of a product of pairs over that of the two products of float32

Range = tuple[int, int]


def multiply_pairs(fn: Function, ctx: Any) -> Function:
    """Rewrites matrix products and convolutions whose operands are known to be so small."""
    max_error = 0.0 if ctx is None else ctx.options.max_error

    def change(v: Value, args: tuple[Value | None, ...]) -> Value | None:
        if not isinstance(v, Apply) or v.op not in (conv.conv, linalg.matmul):
            return None
        return _of_integers(v, args) or _of_scaled(v, args, max_error)

    return rebuild(fn, change)


# ---- products of integers -----------------------------------------------------------------------
def _of_integers(v: Apply, args: tuple[Value | None, ...]) -> Value | None:
    """The same product of pairs of numbers, where both operands fit in 16 bits."""
    a, b = args[:2]
    assert a is not None and b is not None
    if type_of(v).dtype is not int32 or v.attrs.in_pairs or not _divides(v):
        return None
    found = [_range(x) for x in (a, b)]
    if any(r is None or r[0] < -(1 << 15) or r[1] >= 1 << 15 for r in found):
        return None
    packed = [
        apply(pairs, *_difference(x), attrs=PairsAttrs(axis), locs=v.locs)
        for x, axis in zip((a, b), _reduced_axes(v), strict=True)
    ]
    attrs = dataclasses.replace(v.attrs, in_pairs=True)
    weight = _known(b)
    if v.op is conv.conv and weight is not None and found[0] is not None:
        low, high = found[0]
        tiles = winograd.exact_tiles(v.attrs, min(low, 0), max(high, 0), weight)
        attrs = dataclasses.replace(attrs, tiles=tiles)
    assert isinstance(v.op, Op)
    return apply(v.op, *packed, *args[2:], attrs=attrs, locs=v.locs, name=v.name)


def _difference(v: Value) -> tuple[Value, Value | None]:
    """A value as x or x - number, with the elements of x as narrow as they come."""
    if isinstance(v, Apply) and v.op is elementwise.sub:
        a, b = v.args
        if a is not None and b is not None and type_of(b).rank == 0 and type_of(a) == v.type:
            return _narrow(a), b
    return _narrow(v), None


def _narrow(v: Value) -> Value:
    """What was converted, if that is an integer with fewer bits."""
    x = v.args[0] if isinstance(v, Apply) and v.op is elementwise.cast_ else None
    return v if x is None or type_of(x).dtype.name not in _BYTES else x


def _divides(v: Apply) -> bool:
    """False where a pair would hold numbers of two sums, or never two."""
    a, b = v.args[:2]
    assert a is not None and b is not None
    length = const_int(type_of(b).shape[_reduced_axes(v)[1]])
    if v.op is conv.conv and v.attrs.groups > 1:
        return length is not None and length % 2 == 0
    return length != 1


def _reduced_axes(v: Apply) -> tuple[int, int]:
    """The axis of each operand over which a product sums: the channels of a convolution."""
    if v.op is conv.conv:
        return 1, 1
    a, b = v.args[:2]
    assert a is not None and b is not None
    left = -2 if v.attrs.transpose_a and type_of(a).rank > 1 else -1
    return left, -2 if not v.attrs.transpose_b and type_of(b).rank > 1 else -1


def _range(v: Value) -> Range | None:
    """Bounds of an integer's value, from how it was made."""
    if isinstance(v, Constant):
        return (int(v.data.min()), int(v.data.max())) if v.data.size else (0, 0)
    dtype = type_of(v).dtype
    if dtype.name in _BYTES:
        limits = np.iinfo(dtype.numpy)
        return int(limits.min), int(limits.max)
    if not isinstance(v, Apply) or not dtype.is_int:
        return None
    parts = [None if a is None else _range(a) for a in v.args]
    if v.op in (elementwise.cast_, shape.reshape) and dtype is int32:
        return parts[0]
    if v.op is elementwise.sub and parts[0] is not None and parts[1] is not None:
        return parts[0][0] - parts[1][1], parts[0][1] - parts[1][0]
    return None


def _known(v: Value) -> np.ndarray | None:
    """An integer's value, if it is made of constants."""
    if isinstance(v, Constant):
        return v.data.astype(np.int64)
    if not isinstance(v, Apply) or not type_of(v).dtype.is_int:
        return None
    parts = [None if a is None else _known(a) for a in v.args]
    if not parts or parts[0] is None:
        return None
    if v.op is elementwise.cast_ and type_of(v).dtype is int32:
        return parts[0]
    if v.op is shape.reshape:
        return parts[0].reshape([const_int(n) or 0 for n in type_of(v).shape])
    return parts[0] - parts[1] if v.op is elementwise.sub and parts[1] is not None else None


# ---- products of scaled integers ----------------------------------------------------------------
def _of_scaled(v: Apply, args: tuple[Value | None, ...], max_error: float) -> Value | None:
    """The product of the integers, scaled, where weights are constant and that takes less time."""
    x, w = (_dequantized(a) for a in args[:2])
    if x is None or w is None or not isinstance(w.args[0], Constant) or not _divides(v):
        return None
    scale_x, scale_w = _scale_of_data(x), _scale_of_weights(v, w)
    if scale_x is None or scale_w is None:
        return None
    whole = _centred(x), _centred(w)
    if not _sums_fit(v, *whole):
        return None
    assert isinstance(v.op, Op)
    of = apply(v.op, *whole, attrs=v.attrs, locs=v.locs)
    packed = _of_integers(of, of.args)
    if not isinstance(packed, Apply) or not _cheaper(v, packed, max_error):
        return None
    scale = apply(elementwise.mul, scale_x, scale_w, locs=v.locs)
    real = apply(elementwise.cast_, packed, attrs=elementwise.CastAttrs(float32), locs=v.locs)
    bias = args[2] if len(args) > 2 else None
    name = v.name if bias is None else ""
    made = apply(elementwise.mul, real, scale, locs=v.locs, name=name)
    if bias is None:
        return made
    bias = _reshaped(bias, _per_channel(v))
    return apply(elementwise.add, made, bias, locs=v.locs, name=v.name)


def _dequantized(v: Value | None) -> Apply | None:
    """A value that is a small integer times a scale."""
    if not isinstance(v, Apply) or v.op is not quant.dequantize or v.attrs.block:
        return None
    known = v.args[0] is not None and type_of(v.args[0]).dtype.name in _BYTES
    return v if known and v.attrs.dtype is float32 else None


def _cheaper(v: Apply, packed: Apply, max_error: float) -> bool:
    """False for a convolution that a way with fewer multiplications computes faster in float32."""
    floats = _costs(v, max_error)
    if not any(floats[:1]):
        return True
    pairs = [_GAIN * c for c in (floats[0], *[2 * c for c in _costs(packed, 0.0)]) if c]
    return min(pairs) <= min(floats)


def _costs(v: Apply, max_error: float) -> list[float]:
    """The time of each way to compute a node, by the operator's own estimate."""
    assert isinstance(v.op, Op)
    types = [None if a is None else type_of(a) for a in v.args]
    return [
        c.cost(types, v.attrs)
        for c in v.op.computes
        if c.cost is not None
        and c.error <= max_error
        and (c.applies is None or c.applies(types, v.attrs))
    ]


def _sums_fit(v: Apply, a: Value, b: Value) -> bool:
    """Whether no sum of products leaves the range of int32."""
    lengths = type_of(b).shape[1:] if v.op is conv.conv else [type_of(b).shape[_reduced_axes(v)[1]]]
    count, ranges = const_int(product(lengths)), (_range(a), _range(b))
    most = [max(map(abs, r)) for r in ranges if r is not None]
    return count is not None and len(most) == 2 and count * most[0] * most[1] < 1 << 31


def _centred(v: Apply) -> Value:
    """The integers that are scaled: x - zero."""
    x = v.args[0]
    assert x is not None
    wide = _int32(x, v)
    zero = v.args[2] if len(v.args) > 2 else None
    if zero is None:
        return wide
    axis, rank = v.attrs.axis, type_of(x).rank
    shape = [-1 if k == axis % rank else 1 for k in range(rank)] if _count(zero) != 1 else []
    return apply(elementwise.sub, wide, _reshaped(_int32(zero, v), shape), locs=v.locs)


def _int32(x: Value, v: Apply) -> Value:
    return apply(elementwise.cast_, x, attrs=elementwise.CastAttrs(int32), locs=v.locs)


def _scale_of_data(v: Apply) -> Value | None:
    """The scale if it is one number, like the zero point."""
    one = all(_count(a) == 1 for a in v.args[1:] if a is not None)
    return _reshaped(v.args[1], []) if one else None


def _scale_of_weights(v: Apply, w: Apply) -> Value | None:
    """One scale, or one per channel of the result, in a shape that broadcasts."""
    if _count(w.args[1]) == 1:
        return _reshaped(w.args[1], [])
    assert w.args[0] is not None
    rank = type_of(w.args[0]).rank
    if v.op is conv.conv:
        fits = w.attrs.axis % rank == 0
    else:  # the axis of a matrix that is not summed over
        fits = rank == 2 and w.attrs.axis % 2 != _reduced_axes(v)[1] % 2
    return _reshaped(w.args[1], _per_channel(v)) if fits else None


def _per_channel(v: Apply) -> list[int]:
    """The shape of one number per channel of the result."""
    return [-1, *[1] * (type_of(v).rank - 2)] if v.op is conv.conv else [-1]


def _count(v: Value | None) -> int | None:
    return None if v is None else const_int(product(type_of(v).shape))


def _reshaped(v: Value | None, to: list[int]) -> Value:
    assert v is not None
    if type_of(v).rank == len(to) <= 1:
        return v
    return apply(shape.reshape, v, attrs=shape.ReshapeAttrs(tuple(map(wrap, to))))
