"""pad(x; begin=(0, 1), end=(0, 2), mode="constant", value=0)

Sizes in attributes may be expressions, or come as a further argument; see shape.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import te
from ..ir.arith import Arith
from ..ir.expr import ZERO, Expr, all_of, binary, const, const_int, maximum, minimum, select, wrap
from ..ir.op import Arg, Op, register
from ..ir.types import TensorType
from .draws import Draw, array, choice, integer
from .rules import (
    Shape,
    Size,
    clamped,
    content_sizes,
    direct,
    fail,
    inside,
    known_nonneg,
    need_same,
    result,
    simplified,
)
from .shape import numbers

Array = np.ndarray


@dataclass(frozen=True)
class PadAttrs:
    """Elements added before and after each dimension (negative: removed).

    mode: constant (`value`), edge, reflect (without repeating the edge) or wrap.
    """

    begin: tuple[Size, ...] = ()
    end: tuple[Size, ...] = ()
    mode: str = "constant"
    value: float | int = 0


def _pad_absorb(args: Sequence[Arg | None], a: PadAttrs) -> tuple[int, PadAttrs]:
    if len(args) < 2 or args[1] is None:
        return 1, a
    sizes = content_sizes("pad", "the padding", args[1])
    half = len(sizes) // 2
    return 1, replace(a, begin=sizes[:half], end=sizes[half:])


def _pad_infer(x: Arg, a: PadAttrs) -> TensorType:
    if not len(a.begin) == len(a.end) == x.type.rank:
        fail(f"pad: {len(a.begin)} + {len(a.end)} numbers for {x.type}")
    if a.mode not in ("constant", "edge", "reflect", "wrap"):
        fail(f"pad: mode {a.mode!r} is none of constant, edge, reflect, wrap")
    if a.mode == "reflect":
        for k, (whole, *added) in enumerate(zip(x.type.shape, a.begin, a.end, strict=True)):
            size = _kept(whole, *added)[1]
            for more in (e for e in map(wrap, added) if const_int(e) != 0):
                # Further out the image would have to be reflected again.
                what = f"axis {k} of {x.type} reflected by {more}, and as much as it has"
                need_same("pad", what, minimum(more, wrap(size) - 1), more)
    return result(_pad_shape(x.type.shape, a), x.type.dtype)


def _kept(size: Size, begin: Size, end: Size) -> tuple[Expr, Expr]:
    """What negative padding leaves of an axis, before it is continued: its first element, size."""
    first, last = (ZERO if known_nonneg(p) else maximum(const(0) - p, 0) for p in (begin, end))
    return first, wrap(size) - first - last


def _pad_shape(x: Shape, a: PadAttrs) -> Shape:
    return tuple(simplified(s + b + e) for s, b, e in zip(x, a.begin, a.end, strict=True))


def _turned_around(at: Expr, size: Expr, most: Expr) -> Expr:
    """at % size, where at lies at most `most` outside: once around is compared, not divided."""
    if Arith().prove(most <= size) is not True:
        return at % size
    return select(all_of([inside(at, size)]), at, select(at < 0, at + size, at - size))


def _pad_compute(x: te.Tensor, a: PadAttrs) -> te.Tensor:
    def body(*i: Expr) -> Expr:
        index, conds = [], []
        for v, whole, b, e in zip(i, x.shape, a.begin, a.end, strict=True):
            if const_int(wrap(b)) == 0 and const_int(wrap(e)) == 0:
                index.append(v)
                continue
            if a.mode == "constant":
                index.append(v - b)
                conds.append(inside(v - b, whole))
                continue
            first, size = _kept(whole, b, e)
            at = v - b - first
            if a.mode == "edge":
                at = clamped(at, size)
            elif a.mode == "wrap":
                at = _turned_around(at, size, maximum(b, e))
            else:
                away = binary("max", at, const(0) - at)
                at = binary("min", away, (size - 1) * 2 - away)
            index.append(at + first)
        return select(all_of(conds), x[tuple(index)], const(a.value, x.dtype))

    return te.compute(_pad_shape(x.shape, a), body, "pad")


def _pad_reference(x: Array, a: PadAttrs) -> Array:
    widths = list(zip(numbers(a.begin), numbers(a.end), strict=True))
    crop = tuple(
        slice(max(-b, 0), s - max(-e, 0)) for s, (b, e) in zip(x.shape, widths, strict=True)
    )
    grown = [(max(b, 0), max(e, 0)) for b, e in widths]
    options: Any = {"constant_values": a.value} if a.mode == "constant" else {}
    return np.pad(x[crop], grown, a.mode, **options)  # type: ignore[call-overload]


def _pad_samples(draw: Draw) -> tuple[list[Array], PadAttrs]:
    mode = choice(draw, ("constant", "constant", "edge", "reflect", "wrap"))
    of = tuple(integer(draw, 3, 4) for _ in range(integer(draw, 1, 3)))
    most = 1 if mode == "reflect" else 2  # two may be all that is left
    begin = tuple(integer(draw, -1, most) for _ in of)
    end = tuple(integer(draw, -1, most) for _ in of)
    dtype = choice(draw, ("float32", "float16", "int64"))
    return [array(draw, of, dtype)], PadAttrs(begin, end, mode, integer(draw, 0, 3))


pad = register(
    Op(
        "pad",
        PadAttrs,
        _pad_infer,
        direct(_pad_compute),
        _pad_reference,
        _pad_samples,
        absorb=_pad_absorb,
    )
)
