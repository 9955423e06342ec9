"""Regions of images as images of one size: MaxRoiPool.

    max_roi_pool(x, rois)     x[n, c, h, w], rectangles [r, 5] -> [r, c, height, width]

A row of `rois` is the number of an image and the corners x1, y1, x2, y2 of a rectangle, both ends
included. The extents of the loops over the pixels of a bin are computed from data just before.

Source: R. Girshick, "Fast R-CNN", 2015; roundings as in onnxruntime.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import te
from ..ir.expr import (
    ONE,
    Call,
    Const,
    Expr,
    Load,
    all_of,
    binary,
    cast,
    const,
    maximum,
    minimum,
    select,
    wrap,
)
from ..ir.op import Arg, Op, Precision, register
from ..ir.tir import PARALLEL, SERIAL, VECTOR, Alloc, Buffer, For, Scope, Stmt, Store, seq
from ..ir.types import DType, TensorType, index
from .draws import Draw, array, choice, integer
from .roi import by_channel, by_pixel, held, hold
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
    widened,
    wrapped,
)
from .scatter import Fresh

Array = np.ndarray
_FAR = float(1 << 30)  # pixels: sums and differences of such positions are integers of any size


@dataclass(frozen=True)
class MaxRoiPoolAttrs:
    """height x width bins of rectangles that are multiplied with `scale`."""

    height: int = 1
    width: int = 1
    scale: float = 1.0


def _infer(x: Arg, rois: Arg, a: MaxRoiPoolAttrs) -> TensorType:
    need_rank("max_roi_pool", x, 4, 4)
    need_rank("max_roi_pool", rois, 2, 2)
    need_dtype("max_roi_pool", x, "f")
    need_same("max_roi_pool", "numbers of a rectangle", rois.type.shape[1], 5)
    if a.height < 1 or a.width < 1:
        fail(f"max_roi_pool: {a.height} x {a.width} bins are not possible")
    shape = rois.type.shape[0], x.type.shape[1], a.height, a.width
    return result(shape, same_dtype("max_roi_pool", x, rois))


class _Side:
    """A rectangle along one axis of the image.

    low, high: its borders as they are given, in pixels. start, step: its first pixel, the length of
    a bin. first, count: the pixels of a bin that lie in the image.
    """

    def __init__(self, size: Expr, bins: int, dtype: DType, scale: float, fresh: Fresh) -> None:
        self.size, self.bins, self.dtype, self.scale = size, bins, dtype, scale

        def register_(stem: str, of: DType) -> Buffer:
            return Buffer(fresh(stem).name, of, (ONE,), Scope.REGISTER)

        self.low, self.high, self.step = (register_(n, dtype) for n in ("low", "high", "step"))
        self.start, self.first, self.count = (
            register_(n, index) for n in ("start", "first", "count")
        )
        self.buffers = (self.low, self.high, self.step, self.start, self.first, self.count)

    def rectangle(self, low: Expr, high: Expr) -> list[Stmt]:
        """Before all bins. Products are stored before anything is added, which would else be fused
        with them and be rounded differently."""
        length = maximum(_rounded(held(self.high)) - held(self.start) + 1, 1)
        return [
            hold(self.low, low * self.scale), hold(self.high, high * self.scale),
            hold(self.start, _rounded(held(self.low))),
            hold(self.step, number(length, self.dtype) / float(self.bins)),
        ]  # fmt: skip

    def bin(self, i: Expr) -> list[Stmt]:
        """Before the pixels of bin i."""

        def border(rounding: str, k: Expr) -> Expr:
            at = Call(rounding, (number(k, self.dtype) * held(self.step),))
            return minimum(maximum(cast(at, index) + held(self.start), 0), self.size)

        count = maximum(border("ceil", i + 1) - held(self.first), 0)
        return [hold(self.first, border("floor", i)), hold(self.count, count)]

    def pixel(self, k: Expr) -> Expr:
        return clamped(held(self.first) + k, self.size)


def _rounded(e: Expr) -> Expr:
    """The nearest integer, of two the one away from 0."""
    near = minimum(maximum(e, -_FAR), _FAR)
    return cast(
        select(near < 0.0, Call("ceil", (near - 0.5,)), Call("floor", (near + 0.5,))), index
    )


def _compute(x: te.Tensor, rois: te.Tensor, a: MaxRoiPoolAttrs) -> te.Tensor:
    images, channels, *sizes = x.shape
    pixels, lanes = by_pixel(widened(x))
    room = pixels.shape[-1]

    def build(ins: list[Buffer], outs: list[Buffer], fresh: Fresh) -> Stmt:
        (image, rectangles), (made,) = ins, outs
        dtype = made.dtype
        y, z = (
            _Side(size, bins, dtype, a.scale, fresh)
            for size, bins in zip(sizes, (a.height, a.width), strict=True)
        )
        n = Buffer(fresh("n").name, index, (ONE,), Scope.REGISTER)

        def one_bin(r: Expr, i: Expr, j: Expr) -> Stmt:
            def every(body: Any) -> Stmt:
                part, lane = fresh("part"), fresh("lane")
                at = r, i, j, part * lanes + lane
                store = For(lane, wrap(lanes), VECTOR, Store(made, at, body(at)))
                return For(part, room // lanes, SERIAL, store)

            p, q = fresh("p"), fresh("q")

            def larger(at: tuple[Expr, ...]) -> Expr:
                return binary(
                    "max", Load(made, at), Load(image, (held(n), y.pixel(p), z.pixel(q), at[-1]))
                )

            some = all_of([held(y.count) > 0, held(z.count) > 0])
            start = every(lambda at: select(some, lowest(dtype), const(0, dtype)))
            inner = For(q, held(z.count), SERIAL, every(larger))
            return seq([*z.bin(j), start, For(p, held(y.count), SERIAL, inner)])

        r, i, j = fresh("r"), fresh("i"), fresh("j")
        which, x1, y1, x2, y2 = (Load(rectangles, (r, Const(k))) for k in range(5))
        line = For(j, Const(a.width), SERIAL, one_bin(r, i, j))
        nest: Stmt = seq(
            [
                hold(n, wrapped(cast(which, index), images)),
                *y.rectangle(y1, y2), *z.rectangle(x1, x2),
                For(i, Const(a.height), SERIAL, seq([*y.bin(i), line])),
            ]
        )  # fmt: skip
        for b in (n, *y.buffers, *z.buffers):
            nest = Alloc(b, nest)
        return For(r, made.shape[0], PARALLEL, nest)

    shape = (rois.shape[0], Const(a.height), Const(a.width), room)
    (bins,) = te.extern("max_roi_pool", (pixels, widened(rois)), [(shape, pixels.dtype)], build)
    return te.astype(by_channel(bins, channels), x.dtype)


def _np_bins(low: Any, high: Any, size: int, bins: int, a: MaxRoiPoolAttrs) -> list[slice]:
    """The pixels of each bin along an axis."""

    def rounded(e: Any) -> int:
        return int(math.copysign(math.floor(abs(e) + 0.5), e))

    kind = type(low)
    start = rounded(low * kind(a.scale))
    step = kind(max(rounded(high * kind(a.scale)) - start + 1, 1)) / kind(bins)
    found = []
    for i in range(bins):
        edges = math.floor(kind(i) * step) + start, math.ceil(kind(i + 1) * step) + start
        found.append(slice(*(min(max(e, 0), size) for e in edges)))
    return found


def _reference(x: Array, rois: Array, a: MaxRoiPoolAttrs) -> Array:
    made = np.zeros((len(rois), x.shape[1], a.height, a.width), x.dtype)
    for r, (n, x1, y1, x2, y2) in enumerate(rois):
        rows = _np_bins(y1, y2, x.shape[2], a.height, a)
        columns = _np_bins(x1, x2, x.shape[3], a.width, a)
        for i, j in itertools.product(range(a.height), range(a.width)):
            part = x[int(n), :, rows[i], columns[j]]
            made[r, :, i, j] = part.max((1, 2)) if part.size else 0
    return made


def _samples(draw: Draw) -> tuple[list[Array], MaxRoiPoolAttrs]:
    n, h, w, r = integer(draw, 1, 2), integer(draw, 3, 6), integer(draw, 3, 6), integer(draw, 1, 3)
    corner = array(draw, (r, 2), "float32", -2, 4)
    sizes = array(draw, (r, 2), "float32", -0.5, 9)
    which = array(draw, (r, 1), "int64", 0, n - 1).astype(np.float32)
    a = MaxRoiPoolAttrs(integer(draw, 1, 3), integer(draw, 1, 3), choice(draw, (1.0, 0.5)))
    x = array(draw, (n, choice(draw, (1, 2, 3, 17)), h, w))
    return [x, np.concatenate([which, corner, corner + sizes], 1)], a


max_roi_pool = register(
    Op(
        "max_roi_pool",
        MaxRoiPoolAttrs,
        _infer,
        direct(_compute),
        float32_inside(_reference),
        _samples,
        precision=Precision.FLOAT32_INSIDE,
    )
)
