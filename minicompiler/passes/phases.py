"""Transposed convolutions by phases: a convolution per residue of the output position.

    conv_transpose(%x[n, c, h, w], @w[c, o, 4, 4]) {strides=(2, 2)}
->  %0 = conv(%x, @w')              w'[(2*i + j)*o, c, 2, 2]: what pixels (2*y + i, 2*x + j) need
    interleave(%0)                  as reshape, transpose, reshape and strided_slice

With zeros between the pixels of x, which is what the operator means, all but one product in
strides**2 would be with a zero (W. Shi et al., "Is the deconvolution layer the same as a
convolutional layer?", 2016).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..ir.expr import const_int
from ..ir.graph import Apply, Constant, Function, Value, apply, rebuild, type_of
from ..ir.types import TensorType
from ..ops import conv, pieces, shape
from ..ops.windows import Windows

_LEAD = 2  # images and channels


def convolve_phases(fn: Function, ctx: Any) -> Function:
    """Replaces transposed convolutions with constant weights."""

    def change(v: Value, args: tuple[Value | None, ...]) -> Value | None:
        if not isinstance(v, Apply) or v.op is not conv.conv_transpose:
            return None
        return _by_phases(v, args)

    return rebuild(fn, change)


def _by_phases(v: Apply, args: tuple[Value | None, ...]) -> Value | None:
    x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else None
    constant = isinstance(weight, Constant) and (bias is None or isinstance(bias, Constant))
    if not constant or v.attrs.groups != 1 or max(v.attrs.dilations, default=1) > 1:
        return None
    assert isinstance(weight, Constant) and x is not None and isinstance(v.type, TensorType)
    data = weight.data
    w: Windows = v.attrs.windows(data.shape[_LEAD:])
    sizes, extra = type_of(x).shape, v.attrs.output_padding or (0,) * w.rank
    # Of a single pixel each product goes to another place, whatever the stride is.
    single = [const_int(n) == 1 for n in sizes[_LEAD:]]
    strides = [k if one else s for k, s, one in zip(w.kernel, w.strides, single, strict=True)]
    taps = [-(-k // s) for k, s in zip(w.kernel, strides, strict=True)]
    if math.prod(taps) == math.prod(w.kernel):
        return None
    # Output y lies at position y + begin = q * stride + phase; x[q - j] is multiplied there by
    # tap j * stride + phase.
    first = [b // s for b, s in zip(w.begin, strides, strict=True)]
    last = [
        (k - 1 - e + more) // s
        for k, s, e, more in zip(w.kernel, strides, w.end, extra, strict=True)
    ]
    begin = tuple(t - 1 - q for t, q in zip(taps, first, strict=True))
    if min(*begin, *last) < 0:
        return None
    outputs = data.shape[1]
    phases = math.prod(strides)
    attrs = conv.ConvAttrs((1,) * w.rank, begin, tuple(last))
    operands: list[Value] = [x, Constant(_kernels(data, strides, taps), weight.name)]
    if isinstance(bias, Constant):
        operands.append(Constant(np.tile(bias.data, phases), bias.name))
    made = apply(conv.conv, *operands, attrs=attrs, locs=v.locs, name=v.name)

    def then(op: Any, a: Value, attributes: Any) -> Apply:
        return apply(op, a, attrs=attributes, locs=v.locs, name=v.name)

    image = type_of(made).shape[_LEAD:]
    cut = (sizes[0], *strides, outputs, *image)
    order = [0, 1 + w.rank]
    for k in range(w.rank):
        order += [2 + w.rank + k, 1 + k]
    whole = (sizes[0], outputs, *(n * s for n, s in zip(image, strides, strict=True)))
    parts = then(shape.reshape, made, shape.ReshapeAttrs(cut, allow_zero=True))
    moved = then(shape.transpose, parts, shape.TransposeAttrs(tuple(order)))
    joined = then(shape.reshape, moved, shape.ReshapeAttrs(whole, allow_zero=True))
    starts = tuple(b - q * s for b, q, s in zip(w.begin, first, strides, strict=True))
    ends = tuple(n + a for n, a in zip(v.type.shape[_LEAD:], starts, strict=True))
    axes = tuple(range(_LEAD, _LEAD + w.rank))
    return then(pieces.strided_slice, joined, pieces.SliceAttrs(starts, ends, axes, (1,) * w.rank))


def _kernels(data: np.ndarray, strides: list[int], taps: list[int]) -> np.ndarray:
    """The weight [c, o, *kernel] as [phases * o, c, *taps]; taps that a phase lacks are zero."""
    rank = len(strides)
    room = [(0, 0), (0, 0)]
    room += [(0, t * s - k) for t, s, k in zip(taps, strides, data.shape[_LEAD:], strict=True)]
    full = np.pad(data, room)
    split = [n for t, s in zip(taps, strides, strict=True) for n in (t, s)]
    cut = full.reshape(*data.shape[:_LEAD], *split)
    phase_axes = [_LEAD + 2 * k + 1 for k in range(rank)]
    tap_axes = [_LEAD + 2 * k for k in range(rank)]
    moved = cut.transpose(*phase_axes, 1, 0, *tap_axes)
    flipped = np.flip(moved, tuple(range(moved.ndim - rank, moved.ndim)))
    return np.ascontiguousarray(flipped).reshape(-1, data.shape[0], *taps)
