"""Images read at fractional positions that are data.

    grid_sample(x, grid)                    x[n, c, ...] at grid[n, ..., d], -1 to 1 over each axis
    deform_conv(x, w, offset, mask, bias)   a convolution whose taps are moved by offsets

Weights of cubic interpolation: R. Keys, "Cubic convolution interpolation", 1981.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import te
from ..ir.arith import Arith
from ..ir.expr import Call, Const, Expr, all_of, binary, cast, const, eq, product, select, wrap
from ..ir.op import Arg, Op, Precision, register
from ..ir.types import TensorType, index, int32
from .draws import Draw, array, choice, flag, integer
from .elementwise import magnitude
from .roi import by_channel, by_pixel
from .rules import (
    Size,
    clamped,
    direct,
    fail,
    float32_inside,
    inside,
    need_const,
    need_dtype,
    need_rank,
    need_same,
    number,
    optional,
    result,
    same_dtype,
    widened,
)

Array = np.ndarray
MODES = ("nearest", "linear", "cubic")
PADDINGS = ("zeros", "border", "reflection")
Read = Callable[[Sequence[Expr]], Expr]  # the element of an image at a place
_CUBIC = -0.75


# ---- positions ----------------------------------------------------------------------------------
def _floor(e: Expr) -> Expr:
    return Call("floor", (e,))


def _reflected(e: Expr, low: Expr, high: Expr) -> Expr:
    """e, mirrored at both borders until it lies between them."""
    span = high - low
    away = magnitude(e - low)
    turns = _floor(away / span)
    rest = away - turns * span
    odd = ~eq(turns - _floor(turns * 0.5) * 2.0, 0.0)
    return select(span > 0.0, low + select(odd, span - rest, rest), low)


def _whole(e: Expr, size: Size) -> Expr:
    """A float position as an index; what lies far outside stays outside."""
    bound = number(wrap(size), e.dtype)
    near = binary("max", binary("min", e, bound + 4.0), -4.0)
    most = Arith().interval(wrap(size))[1]
    # Processors have vectors of conversions to int32.
    small = most is not None and most + 4 <= np.iinfo(np.int32).max
    return cast(cast(near, int32) if small else near, index)


def _pixel(read: Read, at: Sequence[Expr], sizes: Sequence[Expr], zeros: bool) -> Expr:
    """An element; outside 0 or the nearest one."""
    value = read([clamped(i, n) for i, n in zip(at, sizes, strict=True)])
    if not zeros:
        return value
    within = all_of(inside(i, n) for i, n in zip(at, sizes, strict=True))
    return select(within, value, const(0, value.dtype))


def _weights(t: Expr, mode: str) -> list[tuple[int, Expr]]:
    """(neighbour, weight) for a fraction 0 <= t < 1."""
    if mode == "linear":
        return [(0, 1.0 - t), (1, t)]
    a = _CUBIC

    def far(d: Expr) -> Expr:
        return ((d * a - 5 * a) * d + 8 * a) * d - 4 * a

    def near(d: Expr) -> Expr:
        return (d * (a + 2) - (a + 3)) * d * d + 1.0

    return [(-1, far(t + 1.0)), (0, near(t)), (1, near(1.0 - t)), (2, far(2.0 - t))]


def _interpolated(
    read: Read,
    sizes: Sequence[Expr],
    at: Sequence[Expr],
    mode: str = "linear",
    padding: str = "zeros",
    corners: bool = True,
) -> Expr:
    """An image of some sizes at float positions (in elements); read: its element at whole ones."""
    limits = []
    for n in sizes:
        size = number(n, at[0].dtype)
        edge = 0.0 if corners else 0.5
        limits.append((const(-edge, size.dtype), size - 1.0 + edge))

    def settled(i: Expr, k: int) -> Expr:
        """A whole position moved into x where the padding says so."""
        if padding != "reflection":
            return i
        e = cast(i, at[0].dtype)
        mirrored = _whole(_reflected(e, *limits[k]), sizes[k])
        return select(inside(i, sizes[k]), i, mirrored)

    moved = []
    for k, e in enumerate(at):
        if mode == "nearest":
            e = Call("round", (e,))
        low, high = limits[k]
        if padding == "border":
            most = number(sizes[k], e.dtype) - 1.0
            bounded = binary("max", binary("min", e, most), const(0, e.dtype))
            e = select(binary("or", e < low, high < e), bounded, e)
        elif padding == "reflection":
            e = select(binary("or", e < low, high < e), _reflected(e, low, high), e)
        moved.append(e)
    zeros = padding == "zeros"
    if mode == "nearest":
        near = [settled(_whole(e, n), k) for k, (e, n) in enumerate(zip(moved, sizes, strict=True))]
        return _pixel(read, near, sizes, zeros)
    base = [_whole(_floor(e), n) for e, n in zip(moved, sizes, strict=True)]
    dtype = read(base).dtype
    weights = [_weights(cast(e - _floor(e), dtype), mode) for e in moved]
    total: Expr | None = None
    for taps in itertools.product(*weights):
        pairs = zip(base, taps, strict=True)
        spots = [settled(b + tap, k) for k, (b, (tap, _)) in enumerate(pairs)]
        value = _pixel(read, spots, sizes, zeros)
        for _, w in taps:
            value = value * w
        total = value if total is None else total + value
    assert total is not None
    return total


# ---- grid_sample --------------------------------------------------------------------------------
@dataclass(frozen=True)
class GridSampleAttrs:
    """align_corners: -1 and 1 are the centres of the outermost elements, not their outer edges."""

    mode: str = "linear"
    padding: str = "zeros"
    align_corners: bool = False


def _grid_infer(x: Arg, grid: Arg, a: GridSampleAttrs) -> TensorType:
    rank = need_rank("grid_sample", x, 3)
    need_rank("grid_sample", grid, rank, rank)
    need_dtype("grid_sample", grid, "f")
    need_dtype("grid_sample", x, "f")
    need_same("grid_sample", "coordinates", grid.type.shape[-1], rank - 2)
    need_same("grid_sample", "batches", grid.type.shape[0], x.type.shape[0])
    if a.mode not in MODES or a.padding not in PADDINGS:
        fail(f"grid_sample: mode {a.mode!r} with padding {a.padding!r} is not supported")
    return result((*x.type.shape[:2], *grid.type.shape[1:-1]), x.type.dtype)


def _grid_compute(x: te.Tensor, grid: te.Tensor, a: GridSampleAttrs) -> te.Tensor:
    source, places = widened(x), widened(grid)
    channels, *sizes = x.shape[1:]
    d = len(sizes)
    # Where to read is told once per pixel, for all channels, so these are what is contiguous.
    pixels, _ = by_pixel(source)

    def body(n: Expr, *to: Expr) -> Expr:
        *i, c = to
        at = []
        for k in range(d):
            e = places[(n, *i, Const(d - 1 - k))]
            size = number(sizes[k], e.dtype)
            if a.align_corners:
                at.append((e + 1.0) * 0.5 * (size - 1.0))
            else:
                at.append(((e + 1.0) * size - 1.0) * 0.5)

        def read(place: Sequence[Expr]) -> Expr:
            return pixels[(n, *place, c)]

        return _interpolated(read, sizes, at, a.mode, a.padding, a.align_corners)

    made = te.compute((*grid.shape[:-1], pixels.shape[-1]), body, "grid_sample")
    return te.astype(by_channel(made, channels), x.dtype)


def _np_weights(t: Array, mode: str) -> list[tuple[int, Array]]:
    if mode == "linear":
        return [(0, 1 - t), (1, t)]
    a = _CUBIC
    d = np.stack([t + 1, t, 1 - t, 2 - t])
    far = ((d * a - 5 * a) * d + 8 * a) * d - 4 * a
    near = (d * (a + 2) - (a + 3)) * d * d + 1
    return [(-1, far[0]), (0, near[1]), (1, near[2]), (2, far[3])]


def _np_reflected(e: Array, low: float, high: float) -> Array:
    span = high - low
    if span <= 0:
        return np.full_like(e, low)
    away = np.abs(e - low)
    turns = np.floor(away / span)
    rest = away - turns * span
    return low + np.where(turns % 2 == 1, span - rest, rest)


def _np_interpolated(
    x: Array, at: Sequence[Array], mode: str, padding: str, corners: bool
) -> Array:
    """x[d1, d2, ...] at float positions."""
    moved = []
    for e, size in zip(at, x.shape, strict=True):
        low, high = (0.0, size - 1.0) if corners else (-0.5, size - 0.5)
        e = np.rint(e) if mode == "nearest" else e
        out = (e < low) | (e > high)
        if padding == "border":
            e = np.where(out, np.clip(e, 0, size - 1), e)
        elif padding == "reflection":
            e = np.where(out, _np_reflected(e, low, high), e)
        moved.append(e)

    def pixel(spots: Sequence[Array]) -> Array:
        valid = np.ones(spots[0].shape, bool)
        near = []
        for i, size in zip(spots, x.shape, strict=True):
            if padding == "reflection":
                low, high = (0.0, size - 1.0) if corners else (-0.5, size - 0.5)
                mirrored = _np_reflected(i.astype(e.dtype), low, high).astype(np.int64)
                i = np.where((i < 0) | (i >= size), mirrored, i)
            valid &= (i >= 0) & (i < size)
            near.append(np.clip(i, 0, size - 1))
        value = x[tuple(near)]
        return np.where(valid, value, 0) if padding == "zeros" else value

    base = [np.floor(e).astype(np.int64) for e in moved]
    if mode == "nearest":
        return pixel(base)
    weights = [_np_weights(e - np.floor(e), mode) for e in moved]
    total = np.zeros(at[0].shape, x.dtype)
    for taps in itertools.product(*weights):
        value = pixel([b + tap for b, (tap, _) in zip(base, taps, strict=True)])
        for _, w in taps:
            value = value * w
        total = total + value
    return total


def _grid_reference(x: Array, grid: Array, a: GridSampleAttrs) -> Array:
    made = np.empty((*x.shape[:2], *grid.shape[1:-1]), x.dtype)
    for n, c in np.ndindex(*x.shape[:2]):
        at = []
        for k, size in enumerate(x.shape[2:]):
            e = grid[n, ..., -1 - k]
            at.append((e + 1) / 2 * (size - 1) if a.align_corners else ((e + 1) * size - 1) / 2)
        made[n, c] = _np_interpolated(x[n, c], at, a.mode, a.padding, a.align_corners)
    return made


def _grid_samples(draw: Draw) -> tuple[list[Array], GridSampleAttrs]:
    d = choice(draw, (1, 2, 2, 3))
    a = GridSampleAttrs(choice(draw, MODES), choice(draw, PADDINGS), flag(draw))
    n = integer(draw, 1, 2)
    x = array(draw, (n, 2, *(integer(draw, 2, 4) for _ in range(d))))
    grid = array(draw, (n, *(integer(draw, 1, 3) for _ in range(d)), d), "float32", -1.4, 1.4)
    return [x, grid], a


grid_sample = register(
    Op(
        "grid_sample",
        GridSampleAttrs,
        _grid_infer,
        direct(_grid_compute),
        float32_inside(_grid_reference),
        _grid_samples,
        precision=Precision.FLOAT32_INSIDE,
    )
)


# ---- deform_conv --------------------------------------------------------------------------------
@dataclass(frozen=True)
class DeformConvAttrs:
    """Per spatial axis; offset_groups: how many sets of offsets the channels share."""

    strides: tuple[int, ...] = ()
    pads_begin: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    groups: int = 1
    offset_groups: int = 1


def _deform_infer(x: Arg, w: Arg, offset: Arg, *rest: Any) -> TensorType:
    mask, bias, a = optional(rest, 2)
    rank = need_rank("deform_conv", x, 3)
    need_rank("deform_conv", w, rank, rank)
    need_rank("deform_conv", offset, rank, rank)
    need_dtype("deform_conv", x, "f")
    dtype = same_dtype("deform_conv", x, w, offset)
    need_same("deform_conv", "channels", x.type.shape[1], w.type.shape[1] * a.groups)
    kernel = [need_const("deform_conv", "the kernel", s) for s in w.type.shape[2:]]
    numbers = product(kernel) * (a.offset_groups * len(kernel))
    need_same("deform_conv", "offsets", offset.type.shape[1], numbers)
    need_same("deform_conv", "batches", offset.type.shape[0], x.type.shape[0])
    for what, whole, parts in (
        ("channels", x.type.shape[1], a.offset_groups),
        ("filters", w.type.shape[0], a.groups),
    ):
        need_same("deform_conv", f"{what} modulo {parts} groups and 0", whole % parts, 0)
    if mask is not None:
        need_rank("deform_conv", mask, rank, rank)
        per_tap = product(kernel) * a.offset_groups
        wanted = (x.type.shape[0], per_tap, *offset.type.shape[2:])
        for size, own in zip(wanted, mask.type.shape, strict=True):
            need_same("deform_conv", "the mask and the offsets", size, own)
    if bias is not None:
        need_rank("deform_conv", bias, 1, 1)
        need_same("deform_conv", "the bias and the filters", bias.type.shape[0], w.type.shape[0])
    shape = (x.type.shape[0], w.type.shape[0], *offset.type.shape[2:])
    return result(shape, dtype)


def _deform_compute(x: te.Tensor, w: te.Tensor, offset: te.Tensor, *rest: Any) -> te.Tensor:
    mask, bias, a = optional(rest, 2)
    source, moves = widened(x), widened(offset)
    kernel = [need_const("deform_conv", "the kernel", s) for s in w.shape[2:]]
    d, count = len(kernel), int(np.prod(kernel))
    per_offset = x.shape[1] // a.offset_groups
    per_group, out_per_group = w.shape[1], w.shape[0] // a.groups

    def moved(n: Expr, c: Expr, *i: Expr) -> Expr:
        taps, out = i[:d], i[d:]
        tap: Expr = Const(0)
        for k in range(d):
            tap = tap * kernel[k] + taps[k]
        first = (c // per_offset) * count + tap
        at = []
        for k in range(d):
            plain = out[k] * a.strides[k] - a.pads_begin[k] + taps[k] * a.dilations[k]
            at.append(number(plain, source.dtype) + moves[(n, first * d + k, *out)])
        value = _interpolated(lambda place: source[(n, c, *place)], x.shape[2:], at)
        return value if mask is None else value * cast(mask[(n, first, *out)], value.dtype)

    spread = te.compute((*x.shape[:2], *kernel, *offset.shape[2:]), moved, "moved")
    weight = widened(w)
    channel, *r = te.reduce_vars(1 + d)

    def body(n: Expr, o: Expr, *i: Expr) -> Expr:
        c = (o // out_per_group) * per_group + channel
        return spread[(n, c, *r, *i)] * weight[(o, channel, *r)]

    over = {channel: per_group, **{v: wrap(k) for v, k in zip(r, kernel, strict=True)}}
    shape = (x.shape[0], w.shape[0], *offset.shape[2:])
    made = te.compute(shape, body, "deform_conv", ("sum", over))
    if bias is not None:
        added = widened(bias)
        plain = made
        made = te.compute(shape, lambda *i: plain[i] + added[i[1]], "deform_conv")
    return te.astype(made, x.dtype)


def _deform_reference(x: Array, w: Array, offset: Array, *rest: Any) -> Array:
    mask, bias, a = optional(rest, 2)
    kernel, d, count = w.shape[2:], w.ndim - 2, int(np.prod(w.shape[2:]))
    made = np.zeros((x.shape[0], w.shape[0], *offset.shape[2:]), x.dtype)
    grid = np.indices(offset.shape[2:])
    per_offset, out_per_group = x.shape[1] // a.offset_groups, w.shape[0] // a.groups
    for n, o, c in np.ndindex(x.shape[0], w.shape[0], w.shape[1]):
        channel = o // out_per_group * w.shape[1] + c
        for t, tap in enumerate(np.ndindex(*kernel)):
            first = channel // per_offset * count + t
            at = [
                grid[k] * a.strides[k] - a.pads_begin[k] + tap[k] * a.dilations[k]
                + offset[n, first * d + k]
                for k in range(d)
            ]  # fmt: skip
            value = _np_interpolated(x[n, channel], at, "linear", "zeros", True)
            made[n, o] += w[(o, c, *tap)] * (value if mask is None else value * mask[n, first])
    return made if bias is None else made + bias.reshape(1, -1, *[1] * d)


def _deform_samples(draw: Draw) -> tuple[list[Array | None], DeformConvAttrs]:
    groups, sets = integer(draw, 1, 2), integer(draw, 1, 2)
    n, kernel = integer(draw, 1, 2), (integer(draw, 1, 3), integer(draw, 1, 2))
    size = [integer(draw, 3, 5), integer(draw, 3, 5)]
    a = DeformConvAttrs((1, 1), (1, 0), (1, 1), groups, sets)
    out = [size[0] + 2 - kernel[0] + 1, size[1] - kernel[1] + 1]
    taps = kernel[0] * kernel[1] * sets
    x, w = array(draw, (n, 2, *size)), array(draw, (2, 2 // groups, *kernel))
    offset = array(draw, (n, 2 * taps, *out), "float32", -0.9, 0.9)
    mask = array(draw, (n, taps, *out)) if flag(draw) else None
    return [x, w, offset, mask, array(draw, (2,)) if flag(draw) else None], a


deform_conv = register(
    Op(
        "deform_conv",
        DeformConvAttrs,
        _deform_infer,
        direct(_deform_compute),
        float32_inside(_deform_reference),
        _deform_samples,
        precision=Precision.LOW,
    )
)
