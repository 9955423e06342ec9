"""Borders of windows: rules of `simplify` for convolutions and pooling.

    %1 = pad(%x) {begin=(0, 0, 1, 1)}           conv(%x, @w) {pads_begin=(1, 1), ..}
    conv(%1, @w)                            ->
    avg_pool(%x: [1, 8, 7, 7]) {kernel=(1280, 1280), ceil_mode}     ->  {kernel=(7, 7)}
Exporters of some frameworks write each border as a node of its own, which would be a copy.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ..ir.expr import const_int, wrap
from ..ir.graph import Apply, Constant, Value, apply, type_of
from ..ir.types import TensorType
from ..ops import activations, conv, elementwise, padding, pieces
from ..ops.windows import Windows

_LEAD = 2  # images and channels


def padded_conv(v: Apply) -> Value | None:
    """A border of zeros becomes the convolution's own."""
    border = _border(v)
    return None if border is None or border.attrs.value != 0 else _merged(v, border)


def padded_max_pool(v: Apply) -> Value | None:
    """A border that is never the largest element of a window becomes the pool's own."""
    border = _border(v)
    if border is None or border.attrs.value == -math.inf:
        return None if border is None else _merged(v, border)
    made = _merged(v, border)
    w = _windows(made)
    # Where every window has an element of the image, and none is less than the border.
    inside = max(w.dilations) == 1 and all(
        max(b, e) < k for b, e, k in zip(w.begin, w.end, w.kernel, strict=True)
    )
    return made if border.attrs.value == 0 and inside and _not_negative(border.args[0]) else None


def padded_avg_pool(v: Apply) -> Value | None:
    """A border of zeros that counts like other elements becomes the pool's own."""
    border = _border(v)
    if border is None or border.attrs.value != 0 or _windows(v).needs_padding():
        return None
    return _merged(v, border, count_include_pad=True)


def trimmed(v: Apply) -> Value | None:
    """Taps that lie outside of the image (and of what counts for a mean) in every window go."""
    w, x, t = _windows(v), v.args[0], v.type
    assert x is not None and isinstance(t, TensorType)
    sizes = [const_int(s) for s in type_of(x).shape[_LEAD:]]
    counts = [const_int(s) for s in t.shape[_LEAD:]]
    include = v.op is not conv.conv and v.attrs.count_include_pad
    first, kernel, begin, end = [0] * w.rank, list(w.kernel), list(w.begin), list(w.end)
    for k, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        if size is None or count is None:
            continue
        step, last = w.dilations[k], (count - 1) * w.strides[k]
        high = size + (w.end[k] if include else 0)
        taps = min(w.kernel[k], -(-(high + w.begin[k]) // step))
        start = 0 if include else max(0, -(-(w.begin[k] - last) // step))
        start = min(start, w.begin[k] // step)  # there are no borders of negative size
        if (start, taps) == (0, w.kernel[k]) or start >= taps:
            continue
        first[k], kernel[k], begin[k] = start, taps - start, w.begin[k] - start * step
        end[k] = max(0, last + (kernel[k] - 1) * step + 1 - size - begin[k])
        if include and end[k] != w.end[k]:
            return None
    if tuple(kernel) == w.kernel:
        return None
    if v.op is not conv.conv:
        return _again(v, v.args, kernel=tuple(kernel), begin=begin, end=end, ceil_mode=False)
    weight = v.args[1]
    if not isinstance(weight, Constant):
        return None
    axes = tuple(range(_LEAD, _LEAD + w.rank))
    stop = tuple(f + n for f, n in zip(first, kernel, strict=True))
    part = pieces.SliceAttrs(tuple(first), stop, axes, (1,) * w.rank)
    kept = apply(pieces.strided_slice, weight, attrs=part, locs=v.locs, name=weight.name)
    return _again(v, (x, kept, *v.args[2:]), begin=begin, end=end)


def _windows(v: Apply) -> Windows:
    if v.op is not conv.conv:
        return v.attrs.windows(v.op.name)
    weight = v.args[1]
    assert weight is not None
    sizes = [const_int(s) for s in type_of(weight).shape[_LEAD:]]
    return v.attrs.windows("conv", tuple(s for s in sizes if s is not None))


def _border(v: Apply) -> Apply | None:
    """The node that puts a constant border around the spatial axes of what `v` reads."""
    border = v.args[0]
    if not isinstance(border, Apply) or border.op is not padding.pad:
        return None
    if border.attrs.mode != "constant":
        return None
    begin, end = _extents(border)
    if any(p is None or p < 0 for p in (*begin, *end)) or any(begin[:_LEAD] + end[:_LEAD]):
        return None
    return border


def _extents(border: Apply) -> tuple[tuple[int | None, ...], tuple[int | None, ...]]:
    a = border.attrs
    return tuple(const_int(wrap(p)) for p in a.begin), tuple(const_int(wrap(p)) for p in a.end)


def _merged(v: Apply, border: Apply, **other: Any) -> Apply:
    """`v` on what lies inside the border, which it makes itself."""
    w, (begin, end) = _windows(v), _extents(border)
    both = [
        [a + (b or 0) for a, b in zip(own, more[_LEAD:], strict=True)]
        for own, more in ((w.begin, begin), (w.end, end))
    ]
    made = _again(v, (border.args[0], *v.args[1:]), begin=both[0], end=both[1], **other)
    return dataclasses.replace(made, locs=(*border.locs, *v.locs))


def _again(
    v: Apply, args: tuple[Value | None, ...], begin: list[int], end: list[int], **other: Any
) -> Apply:
    attrs = dataclasses.replace(v.attrs, pads_begin=tuple(begin), pads_end=tuple(end), **other)
    return apply(v.op, *args, attrs=attrs, locs=v.locs, name=v.name)  # type: ignore[arg-type]


def _not_negative(v: Value | None) -> bool:
    if not isinstance(v, Apply):
        return False
    if v.op is elementwise.clip:
        return v.attrs.low is not None and v.attrs.low >= 0
    return v.op in (activations.relu, elementwise.sigmoid)
