"""Convolution and its transpose, over any number of spatial axes.

    conv(x[n, c, h, w], weight[o, c / groups, kh, kw], bias[o]?) -> [n, o, h', w']
    conv_transpose(x[n, c, h, w], weight[c, o / groups, kh, kw], bias[o]?) -> [n, o, h', w']

The padded input is a tensor of its own, so the contraction itself is Load * Load.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .. import te
from ..ir.expr import Const, Expr, all_of, const, eq, select
from ..ir.op import Arg, Compute, Op, Precision, register
from ..ir.types import DType, TensorType
from . import winograd
from .draws import Draw, array, choice, flag, integer
from .pairs import INT32, multiply, need_int32, np_multiplied
from .rules import (
    direct,
    fail,
    float32_inside,
    inside,
    need_const,
    need_rank,
    need_same,
    optional,
    result,
    same_dtype,
    simplified,
    unequal,
    widened,
)
from .windows import Windows, np_counts, np_padded, np_windows, padded

Array = np.ndarray
_OFTEN = 32  # times that an element is read, from where on it is worth a copy


def _finished(x: te.Tensor, bias: te.Tensor | None, dtype: DType) -> te.Tensor:
    """A contraction plus the bias per channel, in the operator's element type."""
    if bias is not None:
        x = _biased(x, te.astype(bias, x.dtype))
    return te.astype(x, dtype)


def _biased(x: te.Tensor, bias: te.Tensor) -> te.Tensor:
    return te.compute(x.shape, lambda *i: x[i] + bias[i[1]], "bias")


def _check_bias(op: str, bias: Arg | None, channels: Expr) -> None:
    if bias is not None:
        need_rank(op, bias, 1, 1)
        need_same(op, "the bias and the output channels", bias.type.shape[0], channels)


def _np_biased(x: Array, bias: Array | None) -> Array:
    return x if bias is None else x + bias.reshape((1, -1) + (1,) * (x.ndim - 2))


# ---- conv ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ConvAttrs:
    """Per spatial axis; () stands for 1 (pads: 0) on every axis.

    in_pairs: elements are pairs of neighbouring channels (see pairs.py). tiles: those of Winograd's
    algorithm that compute them exactly."""

    strides: tuple[int, ...] = ()
    pads_begin: tuple[int, ...] = ()
    pads_end: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    groups: int = 1
    in_pairs: bool = False
    tiles: tuple[int, ...] = ()

    def windows(self, op: str, kernel: tuple[int, ...]) -> Windows:
        return Windows.of(
            op, len(kernel), kernel, self.strides, self.pads_begin, self.pads_end, self.dilations
        )


def _kernel(op: str, w: Arg) -> tuple[int, ...]:
    return tuple(need_const(op, "the kernel size", s) for s in w.type.shape[2:])


def _conv_infer(x: Arg, w: Arg, *rest: Any) -> TensorType:
    bias, a = optional(rest)
    rank = need_rank("conv", x, 3)
    if w.type.rank != rank:
        fail(f"conv: the weight {w.type} does not have the {rank} dimensions of the input {x.type}")
    out = w.type.shape[0]
    if a.groups < 1 or need_const("conv", "the number of output channels", out) % a.groups:
        fail(f"conv: {out} output channels do not divide into {a.groups} groups")
    channels = x.type.shape[1]
    if unequal(channels, w.type.shape[1] * a.groups):
        fail(
            f"conv: the input has {channels} channels, but the weight {w.type} with {a.groups} "
            f"group(s) reads {simplified(w.type.shape[1] * a.groups)}",
            "the weight's shape is (output channels, input channels / groups, *kernel)",
        )
    _check_bias("conv", bias, out)
    windows = a.windows("conv", _kernel("conv", w))
    spatial = windows.check("conv", x.type.shape[2:], x.type)
    dtype = same_dtype("conv", x, w, bias)
    if a.in_pairs:
        need_int32("conv", dtype)
    return result((x.type.shape[0], out, *spatial), dtype)


def _conv_compute(x: te.Tensor, w: te.Tensor, *rest: Any) -> te.Tensor:
    bias, a = optional(rest)
    out, cg, *kernel = (need_const("conv", "the weight's size", s) for s in w.shape)
    windows = a.windows("conv", tuple(kernel))
    source, weight = widened(x), widened(w)
    source = padded(source, 2, windows, const(0, source.dtype))
    sizes = windows.output(x.shape[2:])
    per_group = out // a.groups
    if max(kernel) == 1 and max(windows.strides) > 1 and per_group >= _OFTEN:
        source = _picked(source, sizes, windows)
        windows = dataclasses.replace(windows, strides=(1,) * windows.rank)
    taps, over = windows.taps()
    channel: Expr = Const(0)
    if cg > 1:
        (c,) = te.reduce_vars(1)
        channel, over = c, {c: cg, **over}

    def body(n: Expr, o: Expr, *spatial: Expr) -> Expr:
        read = channel
        if a.groups > 1:
            group = o if per_group == 1 else o // per_group
            read = group if cg == 1 else group * cg + channel
        at = [windows.position(k, i, taps[k]) for k, i in enumerate(spatial)]
        return multiply(source[(n, read, *at)], weight[(o, channel, *taps)], a.in_pairs)

    shape = (x.shape[0], w.shape[0], *sizes)
    return _finished(te.compute(shape, body, "conv", reduce=("sum", over)), bias, x.dtype)


def _picked(source: te.Tensor, sizes: tuple[Expr, ...], windows: Windows) -> te.Tensor:
    """The pixels that windows of one tap read, side by side: read in place for every output
    channel, they would share caches with all those between them."""

    def body(n: Expr, c: Expr, *out: Expr) -> Expr:
        at = [windows.position(k, i, Const(0)) for k, i in enumerate(out)]
        return source[(n, c, *at)]

    return te.compute((*source.shape[:2], *sizes), body, "picked")


def _conv_reference(x: Array, w: Array, *rest: Any) -> Array:
    bias, a = optional(rest)
    windows = a.windows("conv", w.shape[2:])
    counts = np_counts(windows, x.shape[2:])
    view = np_windows(np_padded(x, 2, windows, 0), 2, windows, counts)
    g, r = a.groups, windows.rank
    view = view.reshape(x.shape[0], g, x.shape[1] // g, *view.shape[2:])
    weight = w.reshape(g, w.shape[0] // g, *w.shape[1:])
    # [n, c, *out, *kernel] with [o, c, *kernel] -> [n, *out, o]
    axes = [1, *range(2 + r, 2 + 2 * r)], list(range(1, 2 + r))
    parts = []
    for k in range(g):
        of = partial(np.tensordot, axes=axes)
        one = view[:, k], weight[k]
        parts.append(np.moveaxis(np_multiplied(of, *one) if a.in_pairs else of(*one), -1, 1))
    return _np_biased(np.concatenate(parts, axis=1), bias)


def _conv_samples(draw: Draw) -> tuple[list[Array | None], ConvAttrs]:
    rank = choice(draw, (1, 2, 2, 3))
    groups = choice(draw, (1, 1, 2, 3))
    cg, og = integer(draw, 1, 3), integer(draw, 1, 3)
    kernel = tuple(integer(draw, 1, 3) for _ in range(rank))
    a = _draw_conv(draw, rank, groups)
    spatial = tuple((k - 1) * 2 + 1 + integer(draw, 0, 3) for k in kernel)
    dtype = choice(draw, ("float32", "float32", "float64", "float16", "int32"))
    a = dataclasses.replace(a, in_pairs=dtype == "int32")
    bounds = INT32 if a.in_pairs else (-3, 3)
    x = array(draw, (integer(draw, 1, 2), groups * cg, *spatial), dtype, *bounds)
    w = array(draw, (groups * og, cg, *kernel), dtype, *bounds)
    return [x, w, array(draw, (groups * og,), dtype) if flag(draw) else None], a


def _draw_conv(draw: Draw, rank: int, groups: int) -> ConvAttrs:
    pads = flag(draw)
    return ConvAttrs(
        tuple(integer(draw, 1, 2) for _ in range(rank)) if flag(draw) else (),
        tuple(integer(draw, 0, 2) for _ in range(rank)) if pads else (),
        tuple(integer(draw, 0, 2) for _ in range(rank)) if pads else (),
        tuple(integer(draw, 1, 2) for _ in range(rank)) if flag(draw) else (),
        groups,
    )


def _conv_cost(types: list[TensorType | None], attrs: ConvAttrs) -> float:
    """Comparable to `winograd.cost`, so only meaningful where that applies."""
    return winograd.cost(0, types, attrs) if winograd.applies(types, attrs) else 0.0


def _winograd(m: int, in_pairs: bool) -> Compute:
    def applies(types: list[TensorType | None], attrs: ConvAttrs) -> bool:
        fits = m in attrs.tiles if in_pairs else not attrs.in_pairs
        return fits and winograd.applies(types, attrs)

    return Compute(
        f"winograd{m}_pairs" if in_pairs else f"winograd{m}",
        winograd.build(m, in_pairs),
        applies=applies,
        cost=partial(winograd.cost, m),
        constants=(1,),
        error=0.0 if in_pairs else winograd.ERROR[m],
    )


conv = register(
    Op(
        "conv",
        ConvAttrs,
        _conv_infer,
        (
            Compute("direct", _conv_compute, cost=_conv_cost),
            *[_winograd(m, in_pairs) for in_pairs in (False, True) for m in (4, 2)],
        ),
        float32_inside(_conv_reference),
        _conv_samples,
        precision=Precision.LOW,
    )
)


# ---- conv_transpose -----------------------------------------------------------------------------
@dataclass(frozen=True)
class ConvTransposeAttrs:
    """As ConvAttrs; output_padding adds to the end of each spatial axis."""

    strides: tuple[int, ...] = ()
    pads_begin: tuple[int, ...] = ()
    pads_end: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1

    def windows(self, kernel: tuple[int, ...]) -> Windows:
        return Windows.of(
            "conv_transpose",
            len(kernel),
            kernel,
            self.strides,
            self.pads_begin,
            self.pads_end,
            self.dilations,
        )

    def output(self, w: Windows, sizes: tuple[Expr, ...]) -> tuple[Expr, ...]:
        """The inverse of `Windows.output`: (size - 1) * stride + span - pads + output_padding."""
        extra = self.output_padding or (0,) * w.rank
        return tuple(
            simplified((s - 1) * w.strides[k] + (w.span(k) - w.begin[k] - w.end[k] + extra[k]))
            for k, s in enumerate(sizes)
        )


def _transpose_infer(x: Arg, w: Arg, *rest: Any) -> TensorType:
    bias, a = optional(rest)
    rank = need_rank("conv_transpose", x, 3)
    if w.type.rank != rank:
        fail(f"conv_transpose: the weight {w.type} and the input {x.type} differ in rank")
    need_same("conv_transpose", "channels and weight", x.type.shape[1], w.type.shape[0])
    channels = need_const("conv_transpose", "the channel count", w.type.shape[0])
    if a.groups < 1 or channels % a.groups:
        fail(f"conv_transpose: {w.type.shape[0]} channels do not divide into {a.groups} groups")
    out = w.type.shape[1] * a.groups
    _check_bias("conv_transpose", bias, out)
    windows = a.windows(_kernel("conv_transpose", w))
    if len(a.output_padding) not in (0, windows.rank):
        fail(f"conv_transpose: output_padding {a.output_padding} for {windows.rank} spatial axes")
    spatial = a.output(windows, x.type.shape[2:])
    return result((x.type.shape[0], out, *spatial), same_dtype("conv_transpose", x, w, bias))


def _transpose_compute(x: te.Tensor, w: te.Tensor, *rest: Any) -> te.Tensor:
    """A convolution of stride 1 with the flipped kernel over the input with zeros in between."""
    bias, a = optional(rest)
    cin, og, *kernel = (need_const("conv_transpose", "the weight's size", s) for s in w.shape)
    windows = a.windows(tuple(kernel))
    r, cg, sizes = windows.rank, cin // a.groups, x.shape[2:]
    out = a.output(windows, sizes)
    source, weight = widened(x), widened(w)

    def spread(n: Expr, c: Expr, *at: Expr) -> Expr:
        conds, read = [], []
        for k, p in enumerate(at):
            stride = windows.strides[k]
            q = p + (windows.begin[k] - windows.span(k) + 1)
            conds.append(inside(q, (sizes[k] - 1) * stride + 1))
            if stride > 1:
                conds.append(eq(q % stride, 0))
            read.append(q // stride)
        return select(all_of(conds), source[(n, c, *read)], const(0, source.dtype))

    extents = [simplified(n + windows.span(k) - 1) for k, n in enumerate(out)]
    wide_input = te.compute((*x.shape[:2], *extents), spread, "spread")
    taps, over = windows.taps()
    channel: Expr = Const(0)
    if cg > 1:
        (c,) = te.reduce_vars(1)
        channel, over = c, {c: cg, **over}

    def body(n: Expr, o: Expr, *i: Expr) -> Expr:
        group = Const(0) if a.groups == 1 else o if og == 1 else o // og
        read = channel if a.groups == 1 else group * cg + channel
        within = o if a.groups == 1 else o - group * og if og > 1 else Const(0)
        at = [i[k] + (windows.kernel[k] - 1 - taps[k]) * windows.dilations[k] for k in range(r)]
        return wide_input[(n, read, *at)] * weight[(read, within, *taps)]

    shape = (x.shape[0], og * a.groups, *out)
    made = te.compute(shape, body, "conv_transpose", reduce=("sum", over))
    return _finished(made, bias, x.dtype)


def _transpose_reference(x: Array, w: Array, *rest: Any) -> Array:
    bias, a = optional(rest)
    windows = a.windows(w.shape[2:])
    g, og = a.groups, w.shape[1]
    full = [(s - 1) * windows.strides[k] + windows.span(k) for k, s in enumerate(x.shape[2:])]
    extra = a.output_padding or (0,) * windows.rank
    room = [f + e for f, e in zip(full, extra, strict=True)]
    out = np.zeros((x.shape[0], g * og, *room), x.dtype)
    cg = x.shape[1] // g
    for k in range(g):
        for tap in np.ndindex(*windows.kernel):
            within = slice(k * cg, (k + 1) * cg)
            part = np.einsum("nc...,co->no...", x[:, within], w[(within, slice(None), *tap)])
            at = tuple(
                slice(t * d, t * d + (s - 1) * st + 1, st)
                for t, d, s, st in zip(
                    tap, windows.dilations, x.shape[2:], windows.strides, strict=True
                )
            )
            out[(slice(None), slice(k * og, (k + 1) * og), *at)] += part
    crop = tuple(slice(b, n - e) for b, e, n in zip(windows.begin, windows.end, room, strict=True))
    return _np_biased(out[(slice(None), slice(None), *crop)], bias)


def _transpose_samples(draw: Draw) -> tuple[list[Array | None], ConvTransposeAttrs]:
    rank = choice(draw, (1, 2, 2))
    groups = choice(draw, (1, 1, 2))
    cg, og = integer(draw, 1, 3), integer(draw, 1, 3)
    kernel = tuple(integer(draw, 2, 3) for _ in range(rank))
    strides = tuple(integer(draw, 1, 3) for _ in range(rank))
    a = ConvTransposeAttrs(
        strides,
        tuple(integer(draw, 0, 1) for _ in range(rank)),
        tuple(integer(draw, 0, 1) for _ in range(rank)),
        tuple(integer(draw, 1, 2) for _ in range(rank)) if flag(draw) else (),
        tuple(integer(draw, 0, s - 1) for s in strides) if flag(draw) else (),
        groups,
    )
    dtype = choice(draw, ("float32", "float32", "float64", "float16"))
    spatial = tuple(integer(draw, 2, 4) for _ in kernel)
    x = array(draw, (integer(draw, 1, 2), groups * cg, *spatial), dtype)
    w = array(draw, (groups * cg, og, *kernel), dtype)
    return [x, w, array(draw, (groups * og,), dtype) if flag(draw) else None], a


conv_transpose = register(
    Op(
        "conv_transpose",
        ConvTransposeAttrs,
        _transpose_infer,
        direct(_transpose_compute),
        float32_inside(_transpose_reference),
        _transpose_samples,
        precision=Precision.LOW,
    )
)
