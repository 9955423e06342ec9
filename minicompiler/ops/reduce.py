"""Reductions over axes, softmax among them; positions of extrema.

reduce_mean(x; axes=(-1,), keepdims=True)   axes None: all of them
argmax(x; axis=1)                           the first position of the largest element
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import te
from ..ir.expr import Binary, Call, Const, Expr, binary, cast, const, const_int, eq, product, select
from ..ir.op import Arg, Op, Precision, register
from ..ir.types import TensorType, int64
from .draws import FLOATS, Draw, array, choice, flag, integer, shape, some_axes
from .elementwise import dtypes_of, magnitude
from .rules import (
    axes_of,
    axis_of,
    direct,
    fail,
    float32_inside,
    need_dtype,
    need_rank,
    number,
    on_contents,
    result,
    short_index,
    symbolic,
    widened,
)

Array = np.ndarray


@dataclass(frozen=True)
class ReduceAttrs:
    """axes: None is all, () none. keepdims: reduced axes stay with size 1."""

    axes: tuple[int, ...] | None = None
    keepdims: bool = True


@dataclass(frozen=True)
class AxisAttrs:
    axis: int = -1


# ---- reductions over axes -----------------------------------------------------------------------
def _reduction(
    name: str,
    compute: Callable[[te.Tensor, tuple[int, ...], bool], te.Tensor],
    meaning: Callable[..., Any],
    kinds: str = "fi",
    domain: tuple[float, float] = (-2, 2),
    content: Callable[[Expr, Expr], Expr] | None = None,
) -> Op:
    """Registers a reduction: compute(widened x, axes, keepdims), meaning(x, axis=, keepdims=)."""

    def infer(x: Arg, a: ReduceAttrs) -> TensorType:
        need_dtype(name, x, kinds)
        over = axes_of(a.axes, x.type.rank, name)
        kept = [Const(1) if k in over else s for k, s in enumerate(x.type.shape)]
        if not a.keepdims:
            kept = [s for k, s in enumerate(x.type.shape) if k not in over]
        return result(kept, x.type.dtype)

    def build(x: te.Tensor, a: ReduceAttrs) -> te.Tensor:
        over = axes_of(a.axes, len(x.shape), name)
        return te.astype(compute(widened(x), over, a.keepdims), x.dtype)

    def reference(x: Array, a: ReduceAttrs) -> Array | None:
        over = axes_of(a.axes, x.ndim, name)
        if symbolic(x):
            return None if content is None else _fold(content, x, over, a.keepdims)
        dtype = np.float32 if x.dtype == np.float32 else x.dtype
        return np.asarray(meaning(x, axis=over, keepdims=a.keepdims)).astype(dtype)

    def samples(draw: Draw) -> tuple[list[Array], ReduceAttrs]:
        of = shape(draw)
        axes = None if flag(draw) else some_axes(draw, len(of), 0)
        x = array(draw, of, choice(draw, dtypes_of(kinds, ("int64", "int32"))), *domain)
        return [x], ReduceAttrs(axes, flag(draw))

    return register(
        Op(
            name,
            ReduceAttrs,
            infer,
            direct(build),
            float32_inside(reference),
            samples,
            precision=Precision.FLOAT32_INSIDE,
            shape_math=content is not None,
        )
    )


def _fold(
    f: Callable[[Expr, Expr], Expr], x: Array, over: tuple[int, ...], keepdims: bool
) -> Array | None:
    """A reduction of contents; None for one of nothing."""
    if not x.size:
        return None
    moved = np.moveaxis(x, over, range(len(over)))
    rows = moved.reshape(-1, *moved.shape[len(over) :])
    done = np.empty(moved.shape[len(over) :], dtype=object)
    done[...] = functools.reduce(lambda p, q: on_contents(f, p, q), rows)
    return np.expand_dims(done, over) if keepdims else done


def _mapped(f: Callable[[Expr], Expr], x: te.Tensor, name: str) -> te.Tensor:
    return te.map_elements(f, x, name=name)


def count_of(x: te.Tensor, axes: tuple[int, ...]) -> Expr:
    """The number of elements along some axes, in the element type of `x`."""
    return number(product(x.shape[k] for k in axes), x.dtype)


def mean(x: te.Tensor, axes: tuple[int, ...], keepdims: bool = True) -> te.Tensor:
    """The mean of a widened tensor."""
    n = count_of(x, axes)
    return _mapped(lambda e: e / n, te.sum(x, axes, keepdims), "mean")


def _log_sum_exp(x: te.Tensor, axes: tuple[int, ...], keepdims: bool) -> te.Tensor:
    top = te.max(x, axes)
    # An infinite maximum must not turn into inf - inf.
    top = _mapped(lambda e: select(Call("isinf", (e,)), const(0, e.dtype), e), top, "top")
    total = te.sum(te.exp(x - top), axes, keepdims)
    if not keepdims:
        top = te.max(top, axes, keepdims=False)
    return te.map_elements(lambda s, t: Call("log", (s,)) + t, total, top, name="log_sum_exp")


def _np_log_sum_exp(x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    return np.log(np.sum(np.exp(x.astype(np.float64)), axis=axis, keepdims=keepdims))


def _sum_of(f: Callable[[Expr], Expr], after: str = "") -> Callable[..., te.Tensor]:
    """sum(f(x)), then a scalar function."""

    def compute(x: te.Tensor, axes: tuple[int, ...], keepdims: bool) -> te.Tensor:
        total = te.sum(_mapped(f, x, "term"), axes, keepdims)
        return te.call(after, total) if after else total

    return compute


def _np_sum_of(f: Callable[[Any], Any], after: Callable[[Any], Any] = lambda s: s) -> Any:
    return lambda x, **how: after(np.sum(f(x), **how))


def _np_max(x: Array, **how: Any) -> Array:
    return np.max(x, initial=_least(x.dtype), **how)


def _np_min(x: Array, **how: Any) -> Array:
    return np.min(x, initial=_most(x.dtype), **how)


def _least(dtype: np.dtype[Any]) -> Any:
    """The maximum of nothing."""
    return -np.inf if dtype.kind == "f" else False if dtype.kind == "b" else np.iinfo(dtype).min


def _most(dtype: np.dtype[Any]) -> Any:
    """The minimum of nothing."""
    return np.inf if dtype.kind == "f" else True if dtype.kind == "b" else np.iinfo(dtype).max


def _np_mean(x: Array, **how: Any) -> Array:
    return np.trunc(np.mean(x, **how)) if x.dtype.kind in "iu" else np.mean(x, **how)


reduce_sum = _reduction("reduce_sum", te.sum, np.sum, content=lambda a, b: a + b)
reduce_max = _reduction("reduce_max", te.max, _np_max, content=lambda a, b: binary("max", a, b))
reduce_min = _reduction("reduce_min", te.min, _np_min, content=lambda a, b: binary("min", a, b))
reduce_prod = _reduction(
    "reduce_prod",
    functools.partial(te.reduction, "prod"),
    np.prod,
    content=lambda a, b: a * b,
)
reduce_mean = _reduction("reduce_mean", mean, _np_mean)
reduce_l1 = _reduction("reduce_l1", _sum_of(magnitude), _np_sum_of(np.abs))
reduce_l2 = _reduction(
    "reduce_l2", _sum_of(lambda e: e * e, "sqrt"), _np_sum_of(np.square, np.sqrt), "f"
)
reduce_sum_square = _reduction("reduce_sum_square", _sum_of(lambda e: e * e), _np_sum_of(np.square))
reduce_log_sum = _reduction(
    "reduce_log_sum", _sum_of(lambda e: e, "log"), _np_sum_of(lambda x: x, np.log), "f", (0.1, 2)
)
reduce_log_sum_exp = _reduction("reduce_log_sum_exp", _log_sum_exp, _np_log_sum_exp, "f")
reduce_all = _reduction("reduce_all", functools.partial(te.reduction, "and"), np.all, "b")
reduce_any = _reduction("reduce_any", functools.partial(te.reduction, "or"), np.any, "b")


# ---- softmax, log_softmax -----------------------------------------------------------------------
def _softmax_infer(x: Arg, a: AxisAttrs) -> TensorType:
    need_dtype("softmax", x, "f")
    need_rank("softmax", x, 1)
    axis_of(a.axis, x.type.rank, "softmax")
    return x.type


def _below_largest(x: te.Tensor, axis: int) -> tuple[te.Tensor, te.Tensor]:
    """x - the largest x along the axis, and e to the power of that. Where an x is NaN, so are both
    and the sum of the powers: the maximum need not be."""
    shifted = x - te.reduction("maxnum", x, axis)
    return shifted, te.call("exp_nonpositive", shifted)


def _softmax_compute(x: te.Tensor, a: AxisAttrs) -> te.Tensor:
    _, e = _below_largest(widened(x), a.axis)
    inverse = te.map_elements(lambda total: 1.0 / total, te.sum(e, a.axis), name="inverse")
    return te.astype(e * inverse, x.dtype)


def _softmax_reference(x: Array, a: AxisAttrs) -> Array:
    e = np.exp(x - x.max(axis=a.axis, keepdims=True, initial=-np.inf))
    return np.asarray(e / e.sum(axis=a.axis, keepdims=True))


def _log_softmax_compute(x: te.Tensor, a: AxisAttrs) -> te.Tensor:
    shifted, e = _below_largest(widened(x), a.axis)
    return te.astype(shifted - te.call("log", te.sum(e, a.axis)), x.dtype)


def _log_softmax_reference(x: Array, a: AxisAttrs) -> Array:
    shifted = x - x.max(axis=a.axis, keepdims=True, initial=-np.inf)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=a.axis, keepdims=True)))


def _axis_samples(draw: Draw) -> tuple[list[Array], AxisAttrs]:
    of = shape(draw, 1)
    axis = integer(draw, -len(of), len(of) - 1)
    return [array(draw, of, choice(draw, FLOATS), -9, 9)], AxisAttrs(axis)


softmax = register(
    Op(
        "softmax",
        AxisAttrs,
        _softmax_infer,
        direct(_softmax_compute),
        float32_inside(_softmax_reference),
        _axis_samples,
        precision=Precision.FLOAT32_INSIDE,
    )
)
log_softmax = register(
    Op(
        "log_softmax",
        AxisAttrs,
        _softmax_infer,
        direct(_log_softmax_compute),
        float32_inside(_log_softmax_reference),
        _axis_samples,
        precision=Precision.FLOAT32_INSIDE,
    )
)


# ---- argmax, argmin -----------------------------------------------------------------------------
@dataclass(frozen=True)
class ArgAttrs:
    """last: of several equal elements, the last position instead of the first."""

    axis: int = 0
    keepdims: bool = True
    last: bool = False


def _arg_infer(x: Arg, a: ArgAttrs) -> TensorType:
    need_dtype("argmax", x, "fi")
    need_rank("argmax", x, 1)
    axis = axis_of(a.axis, x.type.rank, "argmax")
    if const_int(x.type.shape[axis]) == 0:
        fail(f"argmax: axis {axis} of {x.type} is empty, so it has no extreme element")
    kept = [Const(1) if k == axis else s for k, s in enumerate(x.type.shape)]
    return result(kept if a.keepdims else kept[:axis] + kept[axis + 1 :], int64)


def _position(combiner: str) -> Callable[..., te.Tensor]:
    """The extremum first, then the smallest (largest) position that holds it. A NaN is an extremum,
    as in numpy."""

    def compute(x: te.Tensor, a: ArgAttrs) -> te.Tensor:
        rank = len(x.shape)
        axis = a.axis % rank
        best = te.reduction(combiner, x, axis)
        size = x.shape[axis]
        place = short_index(size)
        (r,) = te.reduce_vars(1)

        def body(*i: Expr) -> Expr:
            rest = i[:axis] + (i[axis + 1 :] if a.keepdims else i[axis:])
            e = x[(*rest[:axis], r, *rest[axis:])]
            hit = eq(e, best[(*rest[:axis], Const(0), *rest[axis:])])
            if x.dtype.is_float:
                hit = Binary("or", hit, Call("isnan", (e,)))
            return select(hit, cast(r, place), const(-1, place) if a.last else cast(size, place))

        kept = [Const(1) if k == axis else s for k, s in enumerate(x.shape)]
        shape = kept if a.keepdims else kept[:axis] + kept[axis + 1 :]
        over = ("max" if a.last else "min", {r: size})
        return te.astype(te.compute(shape, body, "position", over), int64)

    return compute


def _np_position(find: Callable[..., Any]) -> Callable[[Array, ArgAttrs], Array]:
    def reference(x: Array, a: ArgAttrs) -> Array:
        if not a.last:
            return np.asarray(find(x, axis=a.axis, keepdims=a.keepdims), dtype=np.int64)
        found = find(np.flip(x, a.axis), axis=a.axis, keepdims=a.keepdims)
        return np.asarray(x.shape[a.axis] - 1 - found, dtype=np.int64)

    return reference


def _arg_samples(draw: Draw) -> tuple[list[Array], ArgAttrs]:
    of = shape(draw, 1)
    # Few distinct values, so that ties occur.
    x = array(draw, of, choice(draw, ("int32", "int8")), -2, 2)
    x = x.astype(choice(draw, ("float32", "int32")))
    return [x], ArgAttrs(integer(draw, -len(of), len(of) - 1), flag(draw), flag(draw))


argmax = register(
    Op(
        "argmax",
        ArgAttrs,
        _arg_infer,
        direct(_position("max")),
        _np_position(np.argmax),
        _arg_samples,
    )
)
argmin = register(
    Op(
        "argmin",
        ArgAttrs,
        _arg_infer,
        direct(_position("min")),
        _np_position(np.argmin),
        _arg_samples,
    )
)
