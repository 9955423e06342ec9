"""Transposed convolutions by phases: a convolution per residue of the output position.

    conv_transpose(%x[n, c, h, w], @w[c, o, 4, 4]) {strides=(2, 2)}
->  %0 = conv(%x, @w')              w'[(2*i + j)*o, c, 2, 2]: what pixels (2*y + i, 2*x + j) need
    interleave(%0)                  as reshape, transpose, reshape and strided_slice

Where phases need different taps or pixels, those that need the same are a convolution each, and
concat joins them. With zeros between the pixels of x, which is what the operator means, all but one
product in strides**2 would be with a zero (W. Shi et al., "Is the deconvolution layer the same as a
convolutional layer?", 2016).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ir.expr import Expr, const_int
from ..ir.graph import Apply, Constant, Function, Value, apply, rebuild, type_of
from ..ir.types import TensorType
from ..ops import conv, pieces, shape
from ..ops.rules import simplified
from ..ops.windows import Windows

_LEAD = 2  # images and channels
_USUAL = 32  # pixels along an axis of symbolic size, to estimate by
_BLOCK = 16  # channels of which a convolution computes a multiple
_EACH = 0.03  # of the time of all products, that another convolution costs besides


@dataclass(frozen=True)
class _Phases:
    """Phases of one axis that need the same: output `y` with y + begin = q * stride + residue is
    the sum over j < taps of x[q - j] * w[j * stride + residue], for q from `first` on."""

    residues: tuple[int, ...]
    taps: int
    first: int


@dataclass(frozen=True)
class _Axis:
    """How the output positions of an axis are computed: position i of each phase, from all of them
    in order, and the place of the first one that is wanted."""

    phases: tuple[_Phases, ...]
    stride: int
    count: Expr  # positions of a phase
    more: int  # of them than pixels
    start: int

    def border(self, p: _Phases) -> tuple[int, int]:
        """Pixels read before the first and behind the last one."""
        return p.taps - 1 - p.first, p.first + self.more


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
    sizes = type_of(x).shape[_LEAD:]
    # Of a single pixel each product goes to another place, whatever the stride is.
    strides = [
        k if const_int(n) == 1 else s for k, s, n in zip(w.kernel, w.strides, sizes, strict=True)
    ]
    extra = v.attrs.output_padding or (0,) * w.rank
    spans = [
        k - b - e + more for k, b, e, more in zip(w.kernel, w.begin, w.end, extra, strict=True)
    ]
    each = list(zip(w.kernel, strides, w.begin, spans, sizes, strict=True))
    ways = [[_alike(*a) for a in each], [_apart(*a) for a in each]]
    axes = min(filter(_fits, ways), key=lambda way: _time(way, data.shape[1]), default=None)
    return None if axes is None else _interleaved(v, x, weight, bias, axes)


def _alike(kernel: int, stride: int, begin: int, span: int, size: Expr) -> _Axis:
    """All phases of an axis are computed for the same pixels, with the taps of the longest."""
    taps, first = -(-kernel // stride), begin // stride
    more = (span + begin - 1) // stride - first
    phases = _Phases(tuple(range(stride)), taps, first)
    return _Axis((phases,), stride, simplified(size + more), more, begin - first * stride)


def _apart(kernel: int, stride: int, begin: int, span: int, size: Expr) -> _Axis:
    """Every phase of an axis is computed for its own pixels, with its own taps."""
    more = -((stride - span) // stride)
    places = [(r, len(range(r, kernel, stride)), -(-(begin - r) // stride))
              for r in sorted(range(stride), key=lambda r: (r - begin) % stride)]  # fmt: skip
    phases = [
        _Phases(tuple(r for r, *_ in same), max(taps, first + 1), first)
        for (taps, first), same in itertools.groupby(places, key=lambda p: p[1:])
    ]
    return _Axis(tuple(phases), stride, simplified(size + more), more, 0)


def _fits(axes: Sequence[_Axis]) -> bool:
    """True where no convolution would leave out pixels at a border."""
    return all(min(a.border(p)) >= 0 for a in axes for p in a.phases)


def _time(axes: Sequence[_Axis], outputs: int) -> float:
    """An estimate to compare ways of computing one operator by."""
    positions = math.prod(const_int(a.count) or _USUAL for a in axes)
    parts = list(itertools.product(*[a.phases for a in axes]))
    products = 0
    for part in parts:
        channels = outputs * math.prod(len(p.residues) for p in part)
        products += -(-channels // _BLOCK) * _BLOCK * math.prod(p.taps for p in part)
    return positions * products * (1 + _EACH * (len(parts) - 1))


def _interleaved(
    v: Apply, x: Value, weight: Constant, bias: Value | None, axes: Sequence[_Axis]
) -> Value:
    """The convolutions, and their results pixel by pixel in turns."""
    assert isinstance(v.type, TensorType)
    rank, images, outputs = len(axes), type_of(x).shape[0], weight.data.shape[1]
    counts = [a.count for a in axes]

    def then(op: Any, *args: Value, attrs: Any) -> Apply:
        return apply(op, *args, attrs=attrs, locs=v.locs, name=v.name)

    def convolved(phases: Sequence[_Phases]) -> Value:
        """[n, phases * o, positions..]"""
        begin, end = zip(*[a.border(p) for a, p in zip(axes, phases, strict=True)], strict=True)
        operands: list[Value] = [x, Constant(_kernel(weight.data, axes, phases), weight.name)]
        if isinstance(bias, Constant):
            number = math.prod(len(p.residues) for p in phases)
            operands.append(Constant(np.tile(bias.data, number), bias.name))
        return then(conv.conv, *operands, attrs=conv.ConvAttrs((1,) * rank, begin, end))

    def along(axis: int, chosen: tuple[_Phases, ...]) -> Value:
        """[n, phases of each axis.., o, positions..]: all phases of the axes from `axis` on, in
        order, with those of the others chosen."""
        if axis == rank:
            cut = (images, *[len(p.residues) for p in chosen], outputs, *counts)
            attrs = shape.ReshapeAttrs(cut, allow_zero=True)
            return then(shape.reshape, convolved(chosen), attrs=attrs)
        parts = [along(axis + 1, (*chosen, p)) for p in axes[axis].phases]
        if len(parts) == 1:
            return parts[0]
        return then(pieces.concat, *parts, attrs=pieces.ConcatAttrs(1 + axis))

    if all(a.stride == 1 for a in axes):
        return convolved([p for a in axes for p in a.phases])
    order = [0, 1 + rank]
    for k in range(rank):
        order += [2 + rank + k, 1 + k]
    moved = then(shape.transpose, along(0, ()), attrs=shape.TransposeAttrs(tuple(order)))
    whole = (images, outputs, *[a.count * a.stride for a in axes])
    joined = then(shape.reshape, moved, attrs=shape.ReshapeAttrs(whole, allow_zero=True))
    starts = tuple(a.start for a in axes)
    ends = tuple(n + s for n, s in zip(v.type.shape[_LEAD:], starts, strict=True))
    sliced = tuple(range(_LEAD, _LEAD + rank))
    return then(
        pieces.strided_slice, joined, attrs=pieces.SliceAttrs(starts, ends, sliced, (1,) * rank)
    )


def _kernel(data: np.ndarray, axes: Sequence[_Axis], phases: Sequence[_Phases]) -> np.ndarray:
    """The weight [c, o, *kernel] as [phases * o, c, *taps]; taps that a phase lacks are zero."""
    rank = len(axes)
    # Of each axis the taps of each phase, the last one first.
    at = [
        [[j * a.stride + r for j in reversed(range(p.taps))] for r in p.residues]
        for a, p in zip(axes, phases, strict=True)
    ]
    room = [max(0, np.max(k) + 1 - n) for k, n in zip(at, data.shape[_LEAD:], strict=True)]
    full = np.pad(data, [(0, 0), (0, 0), *[(0, n) for n in room]])
    for k, indices in enumerate(at):
        full = np.take(full, np.array(indices), axis=_LEAD + 2 * k)
    phase_axes = [_LEAD + 2 * k for k in range(rank)]
    moved = full.transpose(*phase_axes, 1, 0, *[axis + 1 for axis in phase_axes])
    taps = [p.taps for p in phases]
    return np.ascontiguousarray(moved).reshape(-1, data.shape[0], *taps)
