"""Resampling of images and volumes.

    resize(x; scales=(1, 1, 2, 2), mode="nearest", coordinates="asymmetric", rounding="floor")

Positions in x are rational numbers in the output index, so they are computed with integers only:
for a factor of 2 the index above simplifies to h // 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from .. import te
from ..ir.arith import Arith
from ..ir.expr import Const, Expr, binary, cast, ceildiv, const_int, eq, minimum, select, wrap
from ..ir.op import Arg, Op, Precision, register
from ..ir.types import TensorType
from .draws import Draw, array, choice, flag, integer
from .rules import (
    Shape,
    Size,
    axis_of,
    clamped,
    direct,
    fail,
    float32_inside,
    need_dtype,
    number,
    result,
    same_size,
    simplified,
    text,
    widened,
    wrapped,
)

Array = np.ndarray
COORDINATES = (
    "half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel", "tf_half_pixel_for_nn",
    "half_pixel_symmetric",
)  # fmt: skip
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


# ---- resize -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ResizeAttrs:
    """Either sizes or scales, one per dimension. mode: nearest, linear or cubic.

    coordinates and rounding are ONNX's coordinate_transformation_mode and nearest_mode, cubic its
    cubic_coeff_a.
    """

    sizes: tuple[Size, ...] = ()
    scales: tuple[float, ...] = ()
    mode: str = "nearest"
    coordinates: str = "half_pixel"
    rounding: str = "round_prefer_floor"
    cubic: float = -0.75


def ratio(scale: float) -> Fraction:
    """The fraction that a scale stands for: a simple one if it rounds to the same float32."""
    simple = Fraction(scale).limit_denominator(1000)
    return simple if np.float32(float(simple)) == np.float32(scale) else Fraction(scale)


def _output(x: Shape, a: ResizeAttrs) -> Shape:
    if a.sizes:
        return tuple(map(simplified, a.sizes))
    found = []
    for size, scale in zip(x, a.scales, strict=True):
        r = ratio(scale)
        found.append(simplified(size * r.numerator // r.denominator))
    return tuple(found)


def _resize_infer(x: Arg, a: ResizeAttrs) -> TensorType:
    if bool(a.sizes) == bool(a.scales):
        fail("resize takes either sizes or scales")
    if len(a.sizes or a.scales) != x.type.rank:
        fail(f"resize: {len(a.sizes or a.scales)} sizes or scales for {x.type}")
    if a.mode not in ("nearest", "linear", "cubic"):
        fail(f"resize: mode {a.mode!r} is not supported", "supported: nearest, linear, cubic")
    if a.mode != "nearest" and not x.type.dtype.is_float:
        fail(f"resize {a.mode} takes float elements, got {x.type.dtype}", "insert a Cast")
    if a.coordinates not in COORDINATES:
        fail(f"resize: coordinates {a.coordinates!r} are not supported", ", ".join(COORDINATES))
    if a.rounding not in ROUNDINGS:
        fail(f"resize: rounding {a.rounding!r} is not supported", ", ".join(ROUNDINGS))
    shape = _output(x.type.shape, a)
    for size, out in zip(x.type.shape, shape, strict=True):
        # Both are 1 unless something is to be made of nothing, which a count may turn out to be.
        if same_size(minimum(size * out, 1), minimum(out, 1)) is False:
            fail(f"resize: {x.type} has no elements to make {text(shape)} of")
    return result(shape, x.type.dtype)


def _position(i: Expr, size: Expr, out: Expr, a: ResizeAttrs, axis: int) -> tuple[Expr, Expr]:
    """The position in x of output index i, as numerator and denominator."""
    p, q = out, size  # scale = p / q
    if a.scales:
        r = ratio(a.scales[axis])
        p, q = Const(r.numerator), Const(r.denominator)
    if a.coordinates == "align_corners":
        if not a.scales:
            return i * (size - 1), binary("max", out - 1, 1)
        return i * (size - 1) * q, binary("max", size * p - q, 1)  # the size is not rounded
    if a.coordinates == "asymmetric":
        return i * q, p
    middle = (i * 2 + 1) * q
    if a.coordinates == "tf_half_pixel_for_nn":
        return middle, p * 2
    numerator = middle - p
    if a.coordinates == "pytorch_half_pixel":
        numerator = select(eq(out, 1), Const(0), numerator)
    if a.coordinates == "half_pixel_symmetric":
        numerator = numerator + (size * p - out * q)  # half of what rounding the size cut off
    return numerator, p * 2


def _nearest(numerator: Expr, denominator: Expr, rounding: str) -> Expr:
    if rounding == "floor":
        return numerator // denominator
    if rounding == "ceil":
        return ceildiv(numerator, denominator)
    if rounding == "round_prefer_floor":
        return ceildiv(numerator * 2 - denominator, denominator * 2)
    return (numerator * 2 + denominator) // (denominator * 2)


def _changes(size: Expr, out: Expr, a: ResizeAttrs, axis: int) -> bool:
    return a.scales[axis] != 1 if a.scales else size is not out


def _resize_compute(x: te.Tensor, a: ResizeAttrs) -> te.Tensor:
    shape = _output(x.shape, a)
    axes = [k for k, (s, o) in enumerate(zip(x.shape, shape, strict=True)) if _changes(s, o, a, k)]
    if a.mode != "nearest":
        y = widened(x)
        for k in _in_order(axes, x.shape, shape):
            y = (_linear if a.mode == "linear" else _cubic)(y, shape[k], a, k)
        return te.astype(y, x.dtype)

    places = {k: _nearest_places(x, shape[k], a, k) for k in axes}

    def body(*i: Expr) -> Expr:
        arith = Arith({v: (Const(0), s - 1) for v, s in zip(i, shape, strict=True)})
        at = list(i)
        for k, place in places.items():
            at[k] = arith.simplify(clamped(place(i[k]), x.shape[k]))
        return x[tuple(at)]

    return te.compute(shape, body, "resize")


def _in_order(axes: list[int], size: Shape, out: Shape) -> list[int]:
    """One axis is done after the other. Along the last one neighbours are read from anywhere, along
    the others whole lines are added: it comes where there are fewest lines, first unless they
    become fewer."""
    lines = axes[:-1]
    fewer = [k for k in lines if Arith().prove(out[k] < size[k])]
    return [*fewer, *axes[-1:], *(k for k in lines if k not in fewer)]


def _nearest_places(x: te.Tensor, out: Expr, a: ResizeAttrs, axis: int) -> Callable[[Expr], Expr]:
    """Of an output index: the element of x that is nearest; see `_places`."""

    def nearest(i: Expr) -> Expr:
        return _nearest(*_position(i, x.shape[axis], out, a, axis), a.rounding)

    if not _divides(x, out, a, axis):
        return nearest
    table = te.compute((out,), nearest, "place")
    return lambda i: table[i]


def _divides(x: te.Tensor, out: Expr, a: ResizeAttrs, axis: int) -> bool:
    """Whether positions along an axis take divisions by what is no number."""
    _, d = _position(Const(0), x.shape[axis], out, a, axis)
    return const_int(simplified(d)) is None


def _places(
    x: te.Tensor, out: Expr, a: ResizeAttrs, axis: int
) -> Callable[[Expr], tuple[Expr, Expr]]:
    """Of an output index: the element of x before its position, and how far behind that it lies.

    Without numbers for the sizes that takes divisions, which are done once per axis.
    """

    def low(i: Expr) -> Expr:
        n, d = _position(i, x.shape[axis], out, a, axis)
        return n // d

    def weight(i: Expr) -> Expr:
        n, d = _position(i, x.shape[axis], out, a, axis)
        return number(n - low(i) * d, x.dtype) / number(d, x.dtype)

    if not _divides(x, out, a, axis):
        return lambda i: (low(i), weight(i))
    lows, weights = te.compute((out,), low, "place"), te.compute((out,), weight, "weight")
    return lambda i: (lows[i], weights[i])


def _linear(x: te.Tensor, out: Expr, a: ResizeAttrs, axis: int) -> te.Tensor:
    """Linear interpolation along one axis; several axes are done one after the other."""
    size = x.shape[axis]
    place = _places(x, out, a, axis)

    def body(*i: Expr) -> Expr:
        low, weight = place(i[axis])
        first, second = (x[(*i[:axis], clamped(k, size), *i[axis + 1 :])] for k in (low, low + 1))
        return first + (second - first) * weight

    return te.compute((*x.shape[:axis], out, *x.shape[axis + 1 :]), body, "resize")


def _cubic(x: te.Tensor, out: Expr, a: ResizeAttrs, axis: int) -> te.Tensor:
    """Cubic interpolation (Keys 1981) along one axis, with the edges repeated."""
    size = x.shape[axis]
    place = _places(x, out, a, axis)

    def body(*i: Expr) -> Expr:
        low, t = place(i[axis])
        total: Expr | None = None
        for k, weight in zip(range(-1, 3), _keys(t, a.cubic), strict=True):
            at = (*i[:axis], clamped(low + k, size), *i[axis + 1 :])
            total = x[at] * weight if total is None else total + x[at] * weight
        assert total is not None
        return total

    return te.compute((*x.shape[:axis], out, *x.shape[axis + 1 :]), body, "resize")


def _keys(t: Any, a: float) -> list[Any]:
    """The weights of the elements at -1, 0, 1, 2 for a position t between 0 and 1."""

    def near(d: Any) -> Any:
        return ((d * (a + 2.0) - (a + 3.0)) * d) * d + 1.0

    def far(d: Any) -> Any:
        return ((d * a - 5.0 * a) * d + 8.0 * a) * d - 4.0 * a

    return [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)]


def _np_position(i: int, size: int, out: int, a: ResizeAttrs, axis: int) -> Fraction:
    scale = ratio(a.scales[axis]) if a.scales else Fraction(out, size)
    if a.coordinates == "align_corners":
        last = (scale * size if a.scales else out) - 1
        return i * (size - 1) / Fraction(last) if last > 0 else Fraction(0)
    if a.coordinates == "asymmetric":
        return i / scale
    if a.coordinates == "tf_half_pixel_for_nn":
        return (i + Fraction(1, 2)) / scale
    if a.coordinates == "pytorch_half_pixel" and out == 1:
        return Fraction(0)
    at = (i + Fraction(1, 2)) / scale - Fraction(1, 2)
    return at + (size - out / scale) / 2 if a.coordinates == "half_pixel_symmetric" else at


_NP_ROUND = {
    "floor": math.floor,
    "ceil": math.ceil,
    "round_prefer_floor": lambda p: math.ceil(p - Fraction(1, 2)),
    "round_prefer_ceil": lambda p: math.floor(p + Fraction(1, 2)),
}


def _resize_reference(x: Array, a: ResizeAttrs) -> Array:
    shape = [const_int(e) for e in _output(tuple(map(Const, x.shape)), a)]
    for k, out in enumerate(shape):
        size = x.shape[k]
        assert out is not None
        if not _changes(wrap(size), wrap(out), a, k):
            continue
        at = [_np_position(i, size, out, a, k) for i in range(out)]
        if not at:
            x = np.take(x, np.arange(0), axis=k)
            continue
        if a.mode == "nearest":
            x = np.take(x, [_NP_ROUND[a.rounding](p) for p in at], axis=k, mode="clip")
            continue
        low = [math.floor(p) for p in at]
        weight = np.array([p - f for p, f in zip(at, low, strict=True)], dtype=x.dtype)
        weight = weight.reshape([-1 if j == k else 1 for j in range(x.ndim)])
        if a.mode == "cubic":
            taps = [np.take(x, [f + j for f in low], k, mode="clip") for j in range(-1, 3)]
            x = sum(v * w for v, w in zip(taps, _keys(weight, a.cubic), strict=True))
            x = np.asarray(x, weight.dtype)
            continue
        first = np.take(x, low, axis=k, mode="clip")
        x = first + (np.take(x, [f + 1 for f in low], axis=k, mode="clip") - first) * weight
    return np.asarray(x)


def _resize_samples(draw: Draw) -> tuple[list[Array], ResizeAttrs]:
    of = (integer(draw, 1, 2), 2, *(integer(draw, 1, 4) for _ in range(integer(draw, 1, 2))))
    sizes: tuple[int, ...] = ()
    scales: tuple[float, ...] = ()
    if flag(draw):
        sizes = (*of[:2], *(integer(draw, 1, 7) for _ in of[2:]))
    else:
        scales = (1.0, 1.0, *(choice(draw, (1.0, 1.5, 2.0, 3.0)) for _ in of[2:]))
    mode = choice(draw, ("nearest", "linear", "cubic"))
    a = ResizeAttrs(sizes, scales, mode, choice(draw, COORDINATES), choice(draw, ROUNDINGS))
    return [array(draw, of, choice(draw, ("float32", "float64", "float16")))], a


resize = register(
    Op(
        "resize",
        ResizeAttrs,
        _resize_infer,
        direct(_resize_compute),
        float32_inside(_resize_reference),
        _resize_samples,
        precision=Precision.FLOAT32_INSIDE,
    )
)


# ---- resample -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class ResampleAttrs:
    """Any resizing along an axis: y[o] = sum over t of weights[o, t] * x[positions[o, t]]."""

    axis: int = 0


def _resample_infer(x: Arg, weights: Arg, positions: Arg, a: ResampleAttrs) -> TensorType:
    need_dtype("resample", x, "f")
    axis = axis_of(a.axis, x.type.rank, "resample")
    if weights.type.rank != 2 or positions.type.shape != weights.type.shape:
        fail(f"resample: weights {weights.type} and positions {positions.type} do not fit together")
    shape = (*x.type.shape[:axis], weights.type.shape[0], *x.type.shape[axis + 1 :])
    return result(shape, x.type.dtype)


def _resample_compute(
    x: te.Tensor, weights: te.Tensor, positions: te.Tensor, a: ResampleAttrs
) -> te.Tensor:
    axis = a.axis % len(x.shape)
    source = widened(x)
    (t,) = te.reduce_vars(1)

    def body(*i: Expr) -> Expr:
        at = wrapped(positions[i[axis], t], x.shape[axis])
        value = source[(*i[:axis], at, *i[axis + 1 :])]
        return value * cast(weights[i[axis], t], value.dtype)

    shape = (*x.shape[:axis], weights.shape[0], *x.shape[axis + 1 :])
    made = te.compute(shape, body, "resample", ("sum", {t: weights.shape[1]}))
    return te.astype(made, x.dtype)


def _resample_reference(x: Array, weights: Array, positions: Array, a: ResampleAttrs) -> Array:
    taken = np.take(x, positions, axis=a.axis)
    axis = a.axis % x.ndim
    line = [1] * taken.ndim
    line[axis : axis + 2] = weights.shape
    return (taken * weights.reshape(line).astype(x.dtype)).sum(axis + 1)


def _resample_samples(draw: Draw) -> tuple[list[Array], ResampleAttrs]:
    of = (integer(draw, 1, 3), integer(draw, 1, 4), integer(draw, 1, 4))
    axis = integer(draw, 0, 2)
    own = (integer(draw, 1, 5), integer(draw, 1, 4))
    x = array(draw, of, choice(draw, ("float32", "float64", "float16")))
    at = array(draw, own, "int64", 0, of[axis] - 1)
    return [x, array(draw, own), at], ResampleAttrs(axis)


resample = register(
    Op(
        "resample",
        ResampleAttrs,
        _resample_infer,
        direct(_resample_compute),
        float32_inside(_resample_reference),
        _resample_samples,
        precision=Precision.FLOAT32_INSIDE,
    )
)
