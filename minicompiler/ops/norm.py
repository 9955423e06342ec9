"""Normalisations. All compute in float32 at least.

batch_norm(x[n, c, ...], scale[c], bias[c], mean[c], var[c]; epsilon)     inference only
layer_norm(x, scale?, bias?; axis, epsilon)     over the axes from `axis` to the last
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import te
from ..ir.expr import Call, Const, Expr, binary, const, const_int, product, select
from ..ir.op import Arg, Compute, Op, Precision, register
from ..ir.types import TensorType
from .draws import FLOATS, Draw, array, choice, flag, integer, shape
from .reduce import mean
from .rules import (
    axis_of,
    broadcast,
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
    same_dtype,
    widened,
)

Array = np.ndarray


def _per_channel(x: te.Tensor, f: Callable[..., Expr], *of: te.Tensor, name: str) -> te.Tensor:
    """f(element, one value per channel of each of `of`)."""
    return te.compute(x.shape, lambda *i: f(x[i], *(c[i[1]] for c in of)), name)


def _np_channel(x: Array, ndim: int) -> Array:
    return x.reshape((1, -1) + (1,) * (ndim - 2))


def _check_channels(op: str, x: Arg, *of: Arg) -> None:
    need_dtype(op, x, "f")
    need_rank(op, x, 2)
    same_dtype(op, x, *of)
    for c in of:
        need_rank(op, c, 1, 1)
        need_same(op, "channels of the input and of a parameter", x.type.shape[1], c.type.shape[0])


# ---- batch_norm ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class EpsilonAttrs:
    epsilon: float = 1e-5


def _batch_norm_infer(x: Arg, s: Arg, b: Arg, m: Arg, v: Arg, a: EpsilonAttrs) -> TensorType:
    _check_channels("batch_norm", x, s, b, m, v)
    return x.type


def _batch_norm_compute(
    x: te.Tensor, s: te.Tensor, b: te.Tensor, m: te.Tensor, v: te.Tensor, a: EpsilonAttrs
) -> te.Tensor:
    # The factor and the offset depend on parameters only, so they are computed while compiling.
    factor = te.map_elements(
        lambda sc, va: sc / Call("sqrt", (va + a.epsilon,)), widened(s), widened(v), name="factor"
    )
    offset = widened(b) - widened(m) * factor
    y = _per_channel(widened(x), lambda e, f, o: e * f + o, factor, offset, name="batch_norm")
    return te.astype(y, x.dtype)


def _batch_norm_reference(
    x: Array, s: Array, b: Array, m: Array, v: Array, a: EpsilonAttrs
) -> Array:
    scale, bias, mu, var = (_np_channel(p, x.ndim) for p in (s, b, m, v))
    return (x - mu) / np.sqrt(var + np.asarray(a.epsilon, x.dtype)) * scale + bias


def _batch_norm_samples(draw: Draw) -> tuple[list[Array], EpsilonAttrs]:
    of = shape(draw, 2)
    dtype = choice(draw, FLOATS)
    params = [array(draw, (of[1],), dtype) for _ in range(3)]
    return [array(draw, of, dtype), *params, array(draw, (of[1],), dtype, 0.1, 2)], EpsilonAttrs()


batch_norm = register(
    Op(
        "batch_norm",
        EpsilonAttrs,
        _batch_norm_infer,
        direct(_batch_norm_compute),
        float32_inside(_batch_norm_reference),
        _batch_norm_samples,
        precision=Precision.FLOAT32_INSIDE,
    )
)


# ---- layer_norm, rms_norm -----------------------------------------------------------------------
@dataclass(frozen=True)
class RowNormAttrs:
    axis: int = -1
    epsilon: float = 1e-5


def _row_norm_infer(name: str) -> Callable[..., TensorType]:
    def infer(x: Arg, *rest: Any) -> TensorType:
        scale, bias, a = optional(rest, 2)
        need_dtype(name, x, "f")
        need_rank(name, x, 1)
        axis_of(a.axis, x.type.rank, name)
        for p in (scale, bias):
            if p is not None:
                same_dtype(name, x, p)
                if p.type.rank > x.type.rank:
                    fail(f"{name}: the parameter {p.type} does not broadcast to {x.type}")
                for own, size in zip(x.type.shape, broadcast(name, x, p), strict=True):
                    need_same(name, f"sizes of {x.type} and of the parameter {p.type}", own, size)
        return x.type

    return infer


def _row_axes(rank: int, axis: int) -> tuple[int, ...]:
    return tuple(range(axis % rank, rank))


def _scaled(y: te.Tensor, scale: te.Tensor | None, bias: te.Tensor | None) -> te.Tensor:
    y = y if scale is None else y * widened(scale)
    return y if bias is None else y + widened(bias)


def _inverse_std(variance: te.Tensor, epsilon: float) -> te.Tensor:
    return te.map_elements(lambda v: Call("rsqrt", (v + epsilon,)), variance, name="inverse_std")


def _layer_norm_compute(x: te.Tensor, *rest: Any) -> te.Tensor:
    scale, bias, a = optional(rest, 2)
    axes = _row_axes(len(x.shape), a.axis)
    wide_x = widened(x)
    centred = wide_x - mean(wide_x, axes)
    variance = mean(te.map_elements(lambda e: e * e, centred, name="square"), axes)
    return te.astype(_scaled(centred * _inverse_std(variance, a.epsilon), scale, bias), x.dtype)


def _layer_norm_reference(x: Array, *rest: Any) -> Array:
    scale, bias, a = optional(rest, 2)
    axes = _row_axes(x.ndim, a.axis)
    centred = x - x.mean(axis=axes, keepdims=True)
    var = np.square(centred).mean(axis=axes, keepdims=True)
    y = centred / np.sqrt(var + np.asarray(a.epsilon, x.dtype))
    return _np_scaled(y, scale, bias)


def _np_scaled(y: Array, scale: Array | None, bias: Array | None) -> Array:
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def _rms_norm_compute(x: te.Tensor, *rest: Any) -> te.Tensor:
    scale, bias, a = optional(rest, 2)
    axes = _row_axes(len(x.shape), a.axis)
    wide_x = widened(x)
    square = mean(te.map_elements(lambda e: e * e, wide_x, name="square"), axes)
    return te.astype(_scaled(wide_x * _inverse_std(square, a.epsilon), scale, bias), x.dtype)


def _rms_norm_reference(x: Array, *rest: Any) -> Array:
    scale, bias, a = optional(rest, 2)
    square = np.square(x).mean(axis=_row_axes(x.ndim, a.axis), keepdims=True)
    return _np_scaled(x / np.sqrt(square + np.asarray(a.epsilon, x.dtype)), scale, bias)


def _row_norm_samples(draw: Draw) -> tuple[list[Array | None], RowNormAttrs]:
    of = shape(draw, 1)
    axis = integer(draw, -len(of), len(of) - 1)
    dtype = choice(draw, FLOATS)
    rows = of[axis % len(of) :]
    scale = array(draw, rows, dtype) if flag(draw) else None
    bias = array(draw, rows, dtype) if flag(draw) else None
    return [array(draw, of, dtype), scale, bias], RowNormAttrs(axis, 1e-2)


layer_norm = register(
    Op(
        "layer_norm",
        RowNormAttrs,
        _row_norm_infer("layer_norm"),
        direct(_layer_norm_compute),
        float32_inside(_layer_norm_reference),
        _row_norm_samples,
        precision=Precision.FLOAT32_INSIDE,
    )
)
rms_norm = register(
    Op(
        "rms_norm",
        RowNormAttrs,
        _row_norm_infer("rms_norm"),
        direct(_rms_norm_compute),
        float32_inside(_rms_norm_reference),
        _row_norm_samples,
        precision=Precision.FLOAT32_INSIDE,
    )
)


# ---- group_norm (instance norm is one group per channel) ----------------------------------------
@dataclass(frozen=True)
class GroupNormAttrs:
    """groups: channels are normalised together in this many groups; 0: each channel alone."""

    groups: int = 0
    epsilon: float = 1e-5


def _group_norm_infer(x: Arg, s: Arg, b: Arg, a: GroupNormAttrs) -> TensorType:
    _check_channels("group_norm", x, s, b)
    channels = need_const("group_norm", "the number of channels", x.type.shape[1])
    if a.groups and channels % a.groups:
        fail(f"group_norm: {channels} channels do not divide into {a.groups} groups")
    return x.type


def _group_norm_compute(x: te.Tensor, s: te.Tensor, b: te.Tensor, a: GroupNormAttrs) -> te.Tensor:
    wide_x, per = widened(x), _channels_of_group(x, a)
    sizes = x.shape[2:]
    n = _group_size(wide_x, per)
    r = te.reduce_vars(1 + len(sizes))
    over = {v: e for v, e in zip(r, (Const(per), *sizes), strict=True) if e is not Const(1)}
    at = tuple(v if v in over else Const(0) for v in r)
    groups = (x.shape[0], Const(_channels(x) // per))

    def moment(f: Callable[[Expr, Expr, Expr], Expr], name: str) -> te.Tensor:
        def body(i: Expr, g: Expr) -> Expr:
            return f(wide_x[(i, g * per + at[0], *at[1:])], i, g)

        total = te.compute(groups, body, name, ("sum", over))
        return te.map_elements(lambda e: e / n, total, name=name)

    mu = moment(lambda e, i, g: e, "mean")
    var = moment(lambda e, i, g: (e - mu[i, g]) * (e - mu[i, g]), "variance")
    inverse = _inverse_std(var, a.epsilon)
    scale, bias = widened(s), widened(b)

    def body(i: Expr, c: Expr, *rest: Expr) -> Expr:
        g = c // per
        return (wide_x[(i, c, *rest)] - mu[i, g]) * inverse[i, g] * scale[c] + bias[c]

    return te.astype(te.compute(x.shape, body, "group_norm"), x.dtype)


def _group_norm_by_channels(
    x: te.Tensor, s: te.Tensor, b: te.Tensor, a: GroupNormAttrs
) -> te.Tensor:
    """Each channel is added up alone, and then those of a group; mean and factor are made for each
    channel again. Channels that lie in blocks are vectors then, whatever groups they belong to."""
    wide_x, per = widened(x), _channels_of_group(x, a)
    sizes = x.shape[2:]
    n = _group_size(wide_x, per)
    k, *r = te.reduce_vars(1 + len(sizes))
    over = {v: e for v, e in zip(r, sizes, strict=True) if e is not Const(1)}
    at = tuple(v if v in over else Const(0) for v in r)
    groups = (x.shape[0], Const(_channels(x) // per))

    def total(f: Callable[[Expr, Expr, Expr], Expr], name: str) -> te.Tensor:
        def channel(i: Expr, c: Expr) -> Expr:
            return f(wide_x[(i, c, *at)], i, c)

        each = te.compute(x.shape[:2], channel, f"{name}_of_channel", ("sum", over))
        whole = ("sum", {k: Const(per)})
        return te.compute(groups, lambda i, g: each[i, g * per + k], name, whole)

    def of_channel(f: Callable[[Expr, Expr, Expr], Expr], name: str) -> te.Tensor:
        made = te.compute(x.shape[:2], lambda i, c: f(i, c, c // per), name)
        made.kept = True
        return made

    mean_of_group = total(lambda e, i, c: e, "mean")
    mu = of_channel(lambda i, c, g: mean_of_group[i, g] / n, "centre")
    var = total(lambda e, i, c: (e - mu[i, c]) * (e - mu[i, c]), "variance")
    inverse = _inverse_std(te.map_elements(lambda e: e / n, var, name="variance"), a.epsilon)
    scale, bias = widened(s), widened(b)
    factor = of_channel(lambda i, c, g: inverse[i, g] * scale[c], "factor")

    def body(i: Expr, c: Expr, *rest: Expr) -> Expr:
        return (wide_x[(i, c, *rest)] - mu[i, c]) * factor[i, c] + bias[c]

    return te.astype(te.compute(x.shape, body, "group_norm"), x.dtype)


def _channels(x: te.Tensor) -> int:
    return need_const("group_norm", "the number of channels", x.shape[1])


def _channels_of_group(x: te.Tensor, a: GroupNormAttrs) -> int:
    return _channels(x) // (a.groups or _channels(x))


def _group_size(x: te.Tensor, per: int) -> Expr:
    return number(product((Const(per), *x.shape[2:])), x.dtype)


def _has_groups_of_channels(types: Sequence[TensorType], a: GroupNormAttrs) -> bool:
    return types[0].rank > 2 and 0 < a.groups < (const_int(types[0].shape[1]) or 0)


def _group_norm_reference(x: Array, s: Array, b: Array, a: GroupNormAttrs) -> Array:
    if not x.size:
        return x
    rows = x.reshape(x.shape[0], a.groups or x.shape[1], -1)
    centred = rows - rows.mean(axis=-1, keepdims=True)
    var = np.square(centred).mean(axis=-1, keepdims=True)
    y = (centred / np.sqrt(var + np.asarray(a.epsilon, x.dtype))).reshape(x.shape)
    return y * _np_channel(s, x.ndim) + _np_channel(b, x.ndim)


def _group_norm_samples(draw: Draw) -> tuple[list[Array], GroupNormAttrs]:
    groups = integer(draw, 0, 3)
    channels = integer(draw, 1, 3) * (groups or 1)
    of = (integer(draw, 1, 2), channels, *shape(draw, 0, 2))
    dtype = choice(draw, FLOATS)
    params = [array(draw, (channels,), dtype) for _ in range(2)]
    return [array(draw, of, dtype), *params], GroupNormAttrs(groups, 1e-2)


group_norm = register(
    Op(
        "group_norm",
        GroupNormAttrs,
        _group_norm_infer,
        (
            *direct(_group_norm_compute),
            Compute("by channels", _group_norm_by_channels, _has_groups_of_channels, blocked=True),
        ),
        float32_inside(_group_norm_reference),
        _group_norm_samples,
        precision=Precision.FLOAT32_INSIDE,
    )
)


# ---- lrn ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LrnAttrs:
    """x / (bias + alpha / size * sum of squares over `size` neighbouring channels) ** beta."""

    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    bias: float = 1.0


MOST_CHANNELS = 1 << 14  # of one window: more take for ever


def _lrn_infer(x: Arg, a: LrnAttrs) -> TensorType:
    need_dtype("lrn", x, "f")
    need_rank("lrn", x, 2)
    if not 1 <= a.size <= MOST_CHANNELS:
        fail(f"lrn: a window of {a.size} channels, 1 to {MOST_CHANNELS} are supported")
    return x.type


def _lrn_compute(x: te.Tensor, a: LrnAttrs) -> te.Tensor:
    wide_x = widened(x)
    (r,) = te.reduce_vars(1)
    before = (a.size - 1) // 2

    def term(n: Expr, c: Expr, *rest: Expr) -> Expr:
        k = c + r - before
        e = wide_x[(n, k, *rest)]
        return select(inside(k, x.shape[1]), e * e, const(0, e.dtype))

    total = te.compute(x.shape, term, "squares", ("sum", {r: a.size}))

    def formula(e: Expr, s: Expr) -> Expr:
        return e / binary("pow", s * (a.alpha / a.size) + a.bias, a.beta)

    return te.astype(te.map_elements(formula, wide_x, total, name="lrn"), x.dtype)


def _lrn_reference(x: Array, a: LrnAttrs) -> Array:
    before = (a.size - 1) // 2
    total = np.zeros_like(x)
    for c in range(x.shape[1]):
        low, high = max(c - before, 0), c - before + a.size
        total[:, c] = np.square(x[:, low:high]).sum(axis=1)
    return x / (a.bias + a.alpha / a.size * total) ** a.beta


def _lrn_samples(draw: Draw) -> tuple[list[Array], LrnAttrs]:
    a = LrnAttrs(integer(draw, 1, 5), choice(draw, (1e-4, 0.5)), 0.75, choice(draw, (1.0, 2.0)))
    return [array(draw, shape(draw, 2), choice(draw, FLOATS))], a


lrn = register(
    Op(
        "lrn",
        LrnAttrs,
        _lrn_infer,
        direct(_lrn_compute),
        float32_inside(_lrn_reference),
        _lrn_samples,
        precision=Precision.FLOAT32_INSIDE,
    )
)
