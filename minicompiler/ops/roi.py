"""Regions of images as images of one size: RoiAlign.

    roi_align(x, rois, batch)     x[n, c, h, w], rectangles [r, 4] -> [r, c, height, width]

The number of samples in a bin may depend on its rectangle: the loops over them have extents that
are computed from data just before. Where and how far to read is told once per sample, for all
channels, so these are what is contiguous: the image is transposed before and the result after.

Source: K. He et al., "Mask R-CNN", 2017; the rounding rules are those of ONNX.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import numpy as np

from .. import te
from ..ir.expr import (
    ONE,
    ZERO,
    Call,
    Const,
    Expr,
    Load,
    all_of,
    binary,
    cast,
    ceildiv,
    const,
    const_int,
    select,
    wrap,
)
from ..ir.op import Arg, Op, Precision, register
from ..ir.tir import PARALLEL, SERIAL, VECTOR, Alloc, Buffer, For, If, Scope, Stmt, Store, seq
from ..ir.types import DType, TensorType, index
from .draws import Draw, array, choice, flag, integer
from .rules import (
    clamped,
    direct,
    fail,
    float32_inside,
    lowest,
    need_dtype,
    need_rank,
    need_same,
    number,
    result,
    same_dtype,
    simplified,
    widened,
    wrapped,
)
from .scatter import Fresh

Array = np.ndarray
_ONLY = (ZERO,)
MOST_SAMPLES = float(1 << 22)  # of a bin along an axis: float32 still tells their positions apart
CHANNELS = 16  # side by side, at most


# ---- roi_align ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class RoiAlignAttrs:
    """Each of height x width bins is the mean (or maximum) of ratio x ratio samples; with a ratio
    of 0, of as many that they lie at most one pixel apart."""

    height: int = 1
    width: int = 1
    ratio: int = 0
    scale: float = 1.0
    half_pixel: bool = True
    maximum: bool = False


def _roi_infer(x: Arg, rois: Arg, batch: Arg, a: RoiAlignAttrs) -> TensorType:
    need_rank("roi_align", x, 4, 4)
    need_rank("roi_align", rois, 2, 2)
    need_rank("roi_align", batch, 1, 1)
    need_dtype("roi_align", x, "f")
    need_dtype("roi_align", batch, "i")
    need_same("roi_align", "numbers in a rectangle", rois.type.shape[1], 4)
    need_same("roi_align", "rectangles and batch indices", rois.type.shape[0], batch.type.shape[0])
    dtype = same_dtype("roi_align", x, rois)
    if a.ratio < 0 or a.height < 1 or a.width < 1:
        fail(f"roi_align: {a.height} x {a.width} bins of {a.ratio} samples are not possible")
    return result((rois.type.shape[0], x.type.shape[1], a.height, a.width), dtype)


class _Axis:
    """A rectangle along one axis of the image: what each register of the loops below holds.

    low, high, step, count, apart: of the rectangle: its borders, the length of a bin (all in
    pixels), the samples of a bin and the distance between two of them. start, first, visited: of
    a bin: its border, and which samples may touch the image. place, near, far, weight: of a sample:
    where it lies, the pixels beside it, and the weight of the far one.
    """

    def __init__(self, size: Expr, bins: int, dtype: DType, a: RoiAlignAttrs, fresh: Fresh) -> None:
        self.size, self.length, self.bins, self.dtype, self.a = (
            size, number(size, dtype), bins, dtype, a,
        )  # fmt: skip
        self.buffers: list[Buffer] = []

        def register_(stem: str, of: DType) -> Buffer:
            self.buffers.append(Buffer(fresh(stem).name, of, (ONE,), Scope.REGISTER))
            return self.buffers[-1]

        self.low, self.high, self.step, self.count, self.apart, self.start, self.place = (
            register_(n, dtype) for n in ("low", "high", "step", "count", "apart", "start", "place")
        )
        self.weight = register_("weight", dtype)
        self.first, self.visited, self.near, self.far = (
            register_(n, index) for n in ("first", "visited", "near", "far")
        )

    def rectangle(self, low: Expr, high: Expr) -> list[Stmt]:
        """Before all bins; the borders are in pixels of the original image."""
        # A product is stored before anything is subtracted: fused into the difference it would be
        # rounded differently, and rectangles of whole pixels would get other numbers of samples.
        shift = 0.5 if self.a.half_pixel else 0.0
        size = held(self.high) - held(self.low)
        if not self.a.half_pixel:
            size = binary("max", size, 1.0)
        count: Expr = const(float(self.a.ratio), self.dtype)
        if not self.a.ratio:
            some = binary("min", Call("ceil", (held(self.step),)), MOST_SAMPLES)
            count = select(held(self.step) > 0.0, some, const(0.0, self.dtype))
        return [
            hold(self.low, low * self.a.scale), hold(self.low, held(self.low) - shift),
            hold(self.high, high * self.a.scale), hold(self.high, held(self.high) - shift),
            hold(self.step, size / float(self.bins)), hold(self.count, count),
            hold(self.apart, held(self.step) / held(self.count)),
        ]  # fmt: skip

    def bin(self, i: Expr) -> list[Stmt]:
        """Before the samples of bin i."""
        start = held(self.low) + number(i, self.dtype) * held(self.step)
        if self.a.ratio:
            return [
                hold(self.start, start), hold(self.first, ZERO),
                hold(self.visited, wrap(self.a.ratio)),
            ]  # fmt: skip
        # Samples lie at -1 to `size` and at least half a pixel apart, unless there is only one: so
        # a few more than twice the size of the image are enough, whatever the rectangle.
        count, zero = held(self.count), const(0.0, self.dtype)
        before = (-1.0 - held(self.start)) / held(self.apart) - 0.5
        after = (self.length - held(self.start)) / held(self.apart) - 0.5
        first = select(before >= 2.0, binary("min", Call("floor", (before,)) - 1.0, count), zero)
        last = binary("max", Call("floor", (after,)) + 2.0, 0.0)
        end = cast(select(after + 2.0 < count, last, count), index)
        return [
            hold(self.start, start), hold(self.first, cast(first, index)),
            hold(self.visited, clamped(end - held(self.first), self.size * 2 + 9)),
        ]  # fmt: skip

    def samples(self) -> Expr:
        """The extent of the loop over samples."""
        return wrap(self.a.ratio) if self.a.ratio else held(self.visited)

    def sample(self, k: Expr, inside: Sequence[Stmt], outside: Stmt | None) -> Stmt:
        """What to do for sample k, which may lie in the image or not."""
        place, near = held(self.place), held(self.near)
        at = number(k + held(self.first), self.dtype) + 0.5
        moved = binary("max", binary("min", place, self.length - 1.0), 0.0)
        there = all_of([const(-1.0, self.dtype) <= place, place <= self.length])
        steps = [
            hold(self.place, moved),
            hold(self.near, clamped(cast(place, index), self.size)),
            hold(self.far, clamped(near + 1, self.size)),
            hold(self.weight, place - number(near, self.dtype)),
        ]
        found = If(there, seq([*steps, *inside]), outside)
        return seq([hold(self.place, held(self.start) + at * held(self.apart)), found])


def held(b: Buffer) -> Expr:
    """What a register holds."""
    return Load(b, _ONLY)


def hold(b: Buffer, value: Expr) -> Stmt:
    """Puts a number into a register."""
    return Store(b, _ONLY, value)


def by_pixel(x: te.Tensor) -> tuple[te.Tensor, int]:
    """x[n, c, ...] with the channels innermost, and how many of them are computed side by side:
    they are filled up with zeros to a multiple."""
    images, channels, *sizes = x.shape
    lanes = min(CHANNELS, 1 << max((const_int(channels) or CHANNELS) - 1, 0).bit_length())
    room = simplified(ceildiv(channels, lanes) * lanes)

    def pixel(n: Expr, *at: Expr) -> Expr:
        *place, c = at
        if room is channels:
            return x[(n, c, *place)]
        there = x[(n, clamped(c, channels), *place)]
        return select(c < channels, there, const(0, there.dtype))

    return te.compute((images, *sizes, room), pixel, "pixels"), lanes


def by_channel(bins: te.Tensor, channels: Expr) -> te.Tensor:
    """bins[r, ..., c] with its channels outside, and without those that only fill up."""
    shape = bins.shape[0], channels, *bins.shape[1:-1]
    return te.compute(shape, lambda r, c, *i: bins[(r, *i, c)], "turned")


def _roi_compute(x: te.Tensor, rois: te.Tensor, batch: te.Tensor, a: RoiAlignAttrs) -> te.Tensor:
    source, boxes = widened(x), widened(rois)
    images, channels, *sizes = x.shape
    pixels, lanes = by_pixel(source)
    room = pixels.shape[-1]

    def build(ins: list[Buffer], outs: list[Buffer], fresh: Fresh) -> Stmt:
        (image, rectangles, which), (made,) = ins, outs
        dtype = made.dtype
        y, z = (
            _Axis(size, bins, dtype, a, fresh)
            for size, bins in zip(sizes, (a.height, a.width), strict=True)
        )
        n = Buffer(fresh("n").name, index, (ONE,), Scope.REGISTER)
        weights = Buffer(fresh("weights").name, dtype, (Const(4),), Scope.REGISTER)
        zero = const(0, dtype)

        def every(r: Expr, i: Expr, j: Expr, body: Callable[[tuple[Expr, ...]], Expr]) -> Stmt:
            """made[r, i, j, c] = body(its index) for all channels."""
            part, lane = fresh("part"), fresh("lane")
            at = (r, i, j, part * lanes + lane)
            store = For(lane, wrap(lanes), VECTOR, Store(made, at, body(at)))
            return For(part, room // lanes, SERIAL, store)

        def one_bin(r: Expr, i: Expr, j: Expr) -> Stmt:
            def take(at: tuple[Expr, ...]) -> Expr:
                corners = [
                    Load(image, (held(n), held(p), held(q), at[-1])) * Load(weights, (Const(k),))
                    for k, (p, q) in enumerate(itertools.product((y.near, y.far), (z.near, z.far)))
                ]
                combine = "max" if a.maximum else "add"
                return binary(combine, Load(made, at), reduce(partial(binary, combine), corners))

            def nothing() -> Stmt | None:
                """A sample outside of the image is 0."""
                if not a.maximum:
                    return None
                return every(r, i, j, lambda at: binary("max", Load(made, at), zero))

            start: Expr = zero
            if a.maximum:  # samples that are not looked at are 0 as well
                whole = [number(held(s.visited), dtype) >= held(s.count) for s in (y, z)]
                some = [held(s.visited) > 0 for s in (y, z)]
                start = select(all_of([*whole, *some]), lowest(dtype), zero)
            # The mean is taken in the weights, which all channels share.
            part = const(1, dtype) if a.maximum else 1.0 / (held(y.count) * held(z.count))
            halves = [(1.0 - held(s.weight), held(s.weight)) for s in (y, z)]
            share = [
                Store(weights, (Const(k),), u * v * part)
                for k, (u, v) in enumerate(itertools.product(*halves))
            ]
            k, m = fresh("k"), fresh("k")
            inner = z.sample(m, [*share, every(r, i, j, take)], nothing())
            line = y.sample(k, [For(m, z.samples(), SERIAL, inner)], nothing())
            loop = For(k, y.samples(), SERIAL, line)
            return seq([*z.bin(j), every(r, i, j, lambda at: start), loop])

        r, i, j = fresh("r"), fresh("i"), fresh("j")
        borders = [Load(rectangles, (r, Const(k))) for k in range(4)]
        nest: Stmt = seq(
            [
                hold(n, wrapped(Load(which, (r,)), images)),
                *y.rectangle(borders[1], borders[3]),
                *z.rectangle(borders[0], borders[2]),
                For(i, Const(a.height), SERIAL,
                    seq([*y.bin(i), For(j, Const(a.width), SERIAL, one_bin(r, i, j))])),
            ]
        )  # fmt: skip
        for b in (n, weights, *y.buffers, *z.buffers):
            nest = Alloc(b, nest)
        return For(r, made.shape[0], PARALLEL, nest)

    shape = (rois.shape[0], Const(a.height), Const(a.width), room)
    (bins,) = te.extern("roi_align", (pixels, boxes, batch), [(shape, source.dtype)], build)
    return te.astype(by_channel(bins, channels), x.dtype)


def _np_samples(
    low: Any, high: Any, size: int, bins: int, a: RoiAlignAttrs
) -> list[list[tuple[int, int, Any] | None]]:
    """Per bin, its samples along an axis: two pixels and the weight of the second; None outside."""
    shift = 0.5 if a.half_pixel else 0.0
    low, high = low * a.scale - shift, high * a.scale - shift
    step = (high - low if a.half_pixel else max(high - low, 1.0)) / bins
    count = a.ratio or max(math.ceil(step), 0)
    found: list[list[tuple[int, int, Any] | None]] = []
    for i, k in itertools.product(range(bins), range(-1, count)):
        if k < 0:
            found.append([])
            continue
        e = low + i * step + (k + 0.5) * (step / count)
        if not -1 <= e <= size:
            found[i].append(None)
            continue
        e = min(max(e, 0), size - 1)
        found[i].append((int(e), min(int(e) + 1, size - 1), e - int(e)))
    return found


def _roi_reference(x: Array, rois: Array, batch: Array, a: RoiAlignAttrs) -> Array:
    made = np.zeros((len(rois), x.shape[1], a.height, a.width), x.dtype)
    for r, n in enumerate(batch):
        rows = _np_samples(rois[r, 1], rois[r, 3], x.shape[2], a.height, a)
        columns = _np_samples(rois[r, 0], rois[r, 2], x.shape[3], a.width, a)
        for i, j in np.ndindex(a.height, a.width):
            found = []
            for p, q in itertools.product(rows[i], columns[j]):
                if p is None or q is None:
                    found.append(np.zeros(x.shape[1], x.dtype))
                    continue
                (y0, y1, u), (x0, x1, v) = p, q
                corners = [
                    x[n, :, y0, x0] * (1 - u) * (1 - v), x[n, :, y0, x1] * (1 - u) * v,
                    x[n, :, y1, x0] * u * (1 - v), x[n, :, y1, x1] * u * v,
                ]  # fmt: skip
                found.append(np.max(corners, 0) if a.maximum else np.sum(corners, 0))
            if found:
                made[r, :, i, j] = np.max(found, 0) if a.maximum else np.mean(found, 0)
    return made


def _roi_samples(draw: Draw) -> tuple[list[Array], RoiAlignAttrs]:
    n, h, w, r = integer(draw, 1, 2), integer(draw, 3, 6), integer(draw, 3, 6), integer(draw, 1, 3)
    corner = array(draw, (r, 2), "float32", -2, 4)
    rois = np.concatenate([corner, corner + array(draw, (r, 2), "float32", -0.5, 9)], 1)
    bins = integer(draw, 1, 3), integer(draw, 1, 3)
    scale = choice(draw, (1.0, 0.5))
    a = RoiAlignAttrs(*bins, integer(draw, 0, 2), scale, flag(draw), flag(draw))
    channels = choice(draw, (1, 2, 3, 17))
    return [array(draw, (n, channels, h, w)), rois, array(draw, (r,), "int64", 0, n - 1)], a


roi_align = register(
    Op(
        "roi_align",
        RoiAlignAttrs,
        _roi_infer,
        direct(_roi_compute),
        float32_inside(_roi_reference),
        _roi_samples,
        precision=Precision.FLOAT32_INSIDE,
    )
)
