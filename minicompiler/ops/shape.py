"""Operators that move or repeat elements, and the ones that make tensors out of shapes.

Sizes in attributes may be expressions. A target shape can also be given as a further argument
(`apply(reshape, x, target)`): `absorb` moves its value into the attributes, so that what is left
has the data as its only arguments.

    reshape(x; shape=(0, -1, 12, 64))    0 copies a size of x, -1 takes what is left
    shape(x)                             becomes shape(; values=(batch, 3, 224, 224))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import te
from ..ir.arith import Arith
from ..ir.expr import ONE, Const, Expr, cast, const, const_int, eq, maximum, product, select, wrap
from ..ir.op import Arg, Op, register
from ..ir.types import DType, TensorType, float32, int64
from .draws import FLOATS, Draw, array, broadcastable, choice, flag, integer, shape, some_axes
from .rules import (
    Shape,
    Size,
    axes_of,
    axis_of,
    broadcast_sizes,
    content_sizes,
    direct,
    fail,
    need_const,
    result,
    same_dtype,
    simplified,
    surely_equal,
    text,
    unequal,
)

Array = np.ndarray
MOVED = ("float32", "float16", "int64", "bool")  # element types are all the same to these
Absorb = Callable[[Sequence[Arg | None], Any], tuple[int, Any]]


def absorber(op: str, what: str, field: str, keep: int) -> Absorb:
    """An `absorb` for operators with one shape argument after `keep` others."""

    def absorb(args: Sequence[Arg | None], attrs: Any) -> tuple[int, Any]:
        if len(args) <= keep or args[keep] is None:
            return keep, attrs
        return keep, replace(attrs, **{field: content_sizes(op, what, args[keep])})

    return absorb


def numbers(sizes: Sequence[Size]) -> tuple[int, ...]:
    """Attributes as numbers, in references."""
    return tuple(need_const("the numpy reference", "a size", wrap(s)) for s in sizes)


# ---- reshape ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ReshapeAttrs:
    """shape: sizes, of which one may be -1; 0 copies the size of x, unless allow_zero."""

    shape: tuple[Size, ...] = ()
    allow_zero: bool = False


def reshaped(x: Shape, a: ReshapeAttrs) -> Shape:
    """The target shape with -1 and 0 filled in. Raises ShapeError where it cannot fit."""
    target: list[Expr | None] = []
    for k, size in enumerate(map(wrap, a.shape)):
        value = const_int(size)
        if value == 0 and not a.allow_zero:
            if k >= len(x):
                fail(f"reshape: {text(a.shape)} copies dimension {k} of {text(x)}")
            target.append(x[k])
        elif value is not None and value < -1:
            fail(f"reshape: {value} is not a size")
        else:
            target.append(None if value == -1 else simplified(size))
    if target.count(None) > 1:
        fail(f"reshape: {text(a.shape)} leaves more than one size open")
    have = simplified(product(x))
    rest = simplified(product(s for s in target if s is not None))
    if None in target and rest is Const(0):
        fail(f"reshape: {text(a.shape)} has no elements whatever -1 stands for")
    found = tuple(simplified(have // rest) if s is None else s for s in target)
    if None in target and unequal(have % rest, 0):
        fail(f"reshape: {text(x)} has {have} elements, which {text(a.shape)} does not divide")
    if unequal(product(found), have):
        fail(
            f"reshape: {text(x)} has {have} elements, {text(a.shape)} holds {rest}",
            "one size of the target may be -1",
        )
    return found


def _reshape_infer(x: Arg, a: ReshapeAttrs) -> TensorType:
    return TensorType(reshaped(x.type.shape, a), x.type.dtype)


def _reshape_compute(x: te.Tensor, a: ReshapeAttrs) -> te.Tensor:
    target = reshaped(x.shape, a)
    groups = _matching(x.shape, target)

    def body(*i: Expr) -> Expr:
        arith = Arith({v: (Const(0), s - 1) for v, s in zip(i, target, strict=True)})
        index: list[Expr] = []
        for (i0, i1), (o0, o1) in groups:
            index += _regrouped(x.shape[i0:i1], target[o0:o1], i[o0:o1])
        return x[tuple(arith.simplify(e) for e in index)]

    return te.compute(target, body, "reshape")


def _regrouped(source: Shape, target: Shape, at: Sequence[Expr]) -> list[Expr]:
    """The source indices of one group of dimensions with as many elements on both sides."""
    flat: Expr = Const(0)
    for size, i in zip(target, at, strict=True):
        flat = flat * size + i if size is not ONE else flat
    index: list[Expr] = []
    stride: Expr = ONE
    for k in range(len(source) - 1, -1, -1):
        if source[k] is ONE:
            index.append(Const(0))
            continue
        whole = flat // stride
        outermost = all(s is ONE for s in source[:k])
        index.append(whole if outermost else whole % source[k])
        stride = stride * source[k]
    return index[::-1]


def _matching(a: Shape, b: Shape) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Cuts two shapes into runs with equal numbers of elements, as short as can be shown.

    [n, 128, 12, 64] and [n, 128, 768]: n with n, 128 with 128, (12, 64) with 768.
    """
    tail = 0
    while tail < min(len(a), len(b)) and surely_equal(a[-1 - tail], b[-1 - tail]):
        tail += 1
    groups: list[tuple[tuple[int, int], tuple[int, int]]] = []
    i = j = 0
    while i < len(a) - tail or j < len(b) - tail:
        end_a, end_b = len(a) - tail, len(b) - tail
        p, q, cut = i, j, None
        left, right = ONE, ONE
        # Grows the shorter run; a symbolic product counts as longer than a constant one.
        while cut is None and (p < end_a or q < end_b):
            if q == end_b or (p < end_a and _weight(left) <= _weight(right)):
                left, p = simplified(left * a[p]), p + 1
            else:
                right, q = simplified(right * b[q]), q + 1
            if p > i and q > j and surely_equal(left, right):
                cut = p, q
        p, q = cut or (end_a, end_b)
        groups.append(((i, p), (j, q)))
        i, j = p, q
    for k in range(tail, 0, -1):
        groups.append(((len(a) - k, len(a) - k + 1), (len(b) - k, len(b) - k + 1)))
    return groups


def _weight(e: Expr) -> tuple[int, int]:
    value = const_int(e)
    return (0, value) if value is not None else (str(e).count("*") + 1, 0)


def _reshape_reference(x: Array, a: ReshapeAttrs) -> Array:
    return x.reshape(numbers(reshaped(tuple(map(Const, x.shape)), a)))


def _reshape_samples(draw: Draw) -> tuple[list[Array], ReshapeAttrs]:
    factors = [integer(draw, 1, 3) for _ in range(integer(draw, 0, 4))]
    of, target = _grouped(draw, factors), list(_grouped(draw, factors))
    if target and flag(draw):
        target[integer(draw, 0, len(target) - 1)] = -1
    k = integer(draw, 0, 3)
    if k < min(len(of), len(target)) and of[k] == target[k]:
        target[k] = 0
    return [array(draw, of, choice(draw, MOVED))], ReshapeAttrs(tuple(target))


def _grouped(draw: Draw, factors: list[int]) -> tuple[int, ...]:
    """The factors, neighbours multiplied at random."""
    sizes: list[int] = []
    for f in factors:
        if sizes and flag(draw):
            sizes[-1] *= f
        else:
            sizes.append(f)
    return tuple(sizes)


reshape = register(
    Op(
        "reshape",
        ReshapeAttrs,
        _reshape_infer,
        direct(_reshape_compute),
        _reshape_reference,
        _reshape_samples,
        shape_math=True,
        absorb=absorber("reshape", "the target shape", "shape", 1),
    )
)


# ---- transpose ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class TransposeAttrs:
    """Dimension k of the result is dimension perm[k] of x; (): reversed."""

    perm: tuple[int, ...] = ()


def _order(rank: int, a: TransposeAttrs) -> tuple[int, ...]:
    perm = tuple(axis_of(p, rank, "transpose") for p in a.perm) or tuple(range(rank))[::-1]
    if sorted(perm) != list(range(rank)):
        fail(f"transpose: {a.perm} is not an order of {rank} dimensions")
    return perm


def _transpose_infer(x: Arg, a: TransposeAttrs) -> TensorType:
    order = _order(x.type.rank, a)
    return TensorType(tuple(x.type.shape[p] for p in order), x.type.dtype)


def _transpose_compute(x: te.Tensor, a: TransposeAttrs) -> te.Tensor:
    order = _order(len(x.shape), a)

    def body(*i: Expr) -> Expr:
        return x[tuple(i[order.index(k)] for k in range(len(order)))]

    return te.compute(tuple(x.shape[p] for p in order), body, "transpose")


def _transpose_reference(x: Array, a: TransposeAttrs) -> Array:
    return np.transpose(x, _order(x.ndim, a))


def _transpose_samples(draw: Draw) -> tuple[list[Array], TransposeAttrs]:
    of = shape(draw)
    perm = some_axes(draw, len(of), len(of)) if flag(draw) else ()
    return [array(draw, of, choice(draw, MOVED))], TransposeAttrs(perm)


transpose = register(
    Op(
        "transpose",
        TransposeAttrs,
        _transpose_infer,
        direct(_transpose_compute),
        _transpose_reference,
        _transpose_samples,
        shape_math=True,
    )
)


# ---- squeeze, unsqueeze -------------------------------------------------------------------------
@dataclass(frozen=True)
class SqueezeAttrs:
    """axes: None is all dimensions of size 1."""

    axes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class UnsqueezeAttrs:
    """axes: where the new dimensions of size 1 stand in the result."""

    axes: tuple[int, ...] = (0,)


def _squeezed(x: Shape, a: SqueezeAttrs) -> tuple[int, ...]:
    if a.axes is None:
        return tuple(k for k, s in enumerate(x) if const_int(s) == 1)
    over = axes_of(a.axes, len(x), "squeeze")
    for k in over:
        if unequal(x[k], 1):
            fail(f"squeeze: dimension {k} of {text(x)} is not 1")
    return over


def _squeeze_infer(x: Arg, a: SqueezeAttrs) -> TensorType:
    gone = _squeezed(x.type.shape, a)
    return TensorType(tuple(s for k, s in enumerate(x.type.shape) if k not in gone), x.type.dtype)


def _squeeze_compute(x: te.Tensor, a: SqueezeAttrs) -> te.Tensor:
    gone = _squeezed(x.shape, a)
    kept = [s for k, s in enumerate(x.shape) if k not in gone]

    def body(*i: Expr) -> Expr:
        rest = iter(i)
        return x[tuple(Const(0) if k in gone else next(rest) for k in range(len(x.shape)))]

    return te.compute(kept, body, "squeeze")


def _squeeze_samples(draw: Draw) -> tuple[list[Array], SqueezeAttrs]:
    of = tuple(choice(draw, (1, 1, 2, 3)) for _ in range(integer(draw, 0, 4)))
    ones = [k for k, s in enumerate(of) if s == 1]
    axes = tuple(k - len(of) if flag(draw) else k for k in ones[integer(draw, 0, 1) :])
    return [array(draw, of, choice(draw, MOVED))], SqueezeAttrs(axes if flag(draw) else None)


squeeze = register(
    Op(
        "squeeze",
        SqueezeAttrs,
        _squeeze_infer,
        direct(_squeeze_compute),
        lambda x, a: np.squeeze(x, a.axes),
        _squeeze_samples,
        shape_math=True,
    )
)


def _unsqueeze_infer(x: Arg, a: UnsqueezeAttrs) -> TensorType:
    rank = x.type.rank + len(a.axes)
    new = axes_of(a.axes, rank, "unsqueeze")
    rest = iter(x.type.shape)
    return TensorType(tuple(ONE if k in new else next(rest) for k in range(rank)), x.type.dtype)


def _unsqueeze_compute(x: te.Tensor, a: UnsqueezeAttrs) -> te.Tensor:
    rank = len(x.shape) + len(a.axes)
    new = axes_of(a.axes, rank, "unsqueeze")
    rest = iter(x.shape)
    of = [ONE if k in new else next(rest) for k in range(rank)]

    def body(*i: Expr) -> Expr:
        return x[tuple(v for k, v in enumerate(i) if k not in new)]

    return te.compute(of, body, "unsqueeze")


def _unsqueeze_samples(draw: Draw) -> tuple[list[Array], UnsqueezeAttrs]:
    of = shape(draw, 0, 3)
    count = integer(draw, 1, 2)
    rank = len(of) + count
    axes = tuple(a % rank for a in some_axes(draw, rank, count))[:count]
    axes = tuple(a - rank if flag(draw) else a for a in axes)
    return [array(draw, of, choice(draw, MOVED))], UnsqueezeAttrs(axes)


unsqueeze = register(
    Op(
        "unsqueeze",
        UnsqueezeAttrs,
        _unsqueeze_infer,
        direct(_unsqueeze_compute),
        lambda x, a: np.expand_dims(x, a.axes),
        _unsqueeze_samples,
        shape_math=True,
    )
)


# ---- expand -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ExpandAttrs:
    """The shape that x is broadcast with; sizes of 1 keep those of x."""

    shape: tuple[Size, ...] = ()


def _expanded(x: Shape, a: ExpandAttrs) -> Shape:
    return broadcast_sizes("expand", x, tuple(map(simplified, a.shape)))


def _expand_infer(x: Arg, a: ExpandAttrs) -> TensorType:
    return TensorType(_expanded(x.type.shape, a), x.type.dtype)


def _expand_compute(x: te.Tensor, a: ExpandAttrs) -> te.Tensor:
    def body(*i: Expr) -> Expr:
        own = i[len(i) - len(x.shape) :]
        return x[tuple(Const(0) if s is ONE else v for s, v in zip(x.shape, own, strict=True))]

    return te.compute(_expanded(x.shape, a), body, "expand")


def _expand_reference(x: Array, a: ExpandAttrs) -> Array:
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, numbers(a.shape)))


def _expand_samples(draw: Draw) -> tuple[list[Array], ExpandAttrs]:
    of, target = broadcastable(draw, 2)
    return [array(draw, of, choice(draw, MOVED))], ExpandAttrs(target)


expand = register(
    Op(
        "expand",
        ExpandAttrs,
        _expand_infer,
        direct(_expand_compute),
        _expand_reference,
        _expand_samples,
        shape_math=True,
        absorb=absorber("expand", "the target shape", "shape", 1),
    )
)


# ---- shape --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ShapeAttrs:
    """start, end: which sizes of x, as in a Python slice. values: once absorbed, the sizes."""

    start: int = 0
    end: int | None = None
    values: tuple[Size, ...] | None = None


def _shape_absorb(args: Sequence[Arg | None], a: ShapeAttrs) -> tuple[int, ShapeAttrs]:
    if args and args[0] is not None:
        return 0, ShapeAttrs(values=args[0].type.shape[a.start : a.end])
    return 0, a


def _shape_infer(a: ShapeAttrs) -> TensorType:
    return TensorType((Const(len(a.values or ())),), int64)


def _shape_compute(a: ShapeAttrs) -> te.Tensor:
    values = [wrap(v) for v in a.values or ()]

    def body(i: Expr) -> Expr:
        found = values[-1] if values else const(0)
        for k in range(len(values) - 2, -1, -1):
            found = select(eq(i, k), values[k], found)
        return found

    return te.compute((len(values),), body, "shape")


def _shape_reference(a: ShapeAttrs) -> Array:
    values = [wrap(v) for v in a.values or ()]
    known = [const_int(v) for v in values]
    if None not in known:
        return np.array(known, dtype=np.int64)
    made = np.empty(len(values), dtype=object)
    made[:] = values
    return made


shape_ = register(
    Op(
        "shape",
        ShapeAttrs,
        _shape_infer,
        direct(_shape_compute),
        _shape_reference,
        lambda draw: ([], ShapeAttrs(values=shape(draw, 1))),
        shape_math=True,
        absorb=_shape_absorb,
    )
)


# ---- full (a tensor of one number) --------------------------------------------------------------
@dataclass(frozen=True)
class FullAttrs:
    shape: tuple[Size, ...] = ()
    value: float | int = 0
    dtype: DType = float32


def _full_infer(a: FullAttrs) -> TensorType:
    return result(a.shape, a.dtype)


def _full_compute(a: FullAttrs) -> te.Tensor:
    return te.compute(tuple(map(simplified, a.shape)), lambda *i: const(a.value, a.dtype), "full")


def _full_reference(a: FullAttrs) -> Array:
    return np.full(numbers(a.shape), a.value, dtype=a.dtype.numpy)


full = register(
    Op(
        "full",
        FullAttrs,
        _full_infer,
        direct(_full_compute),
        _full_reference,
        lambda draw: (
            [],
            FullAttrs(shape(draw), integer(draw, 0, 9), DType(choice(draw, (*FLOATS, "int64")))),
        ),
        shape_math=True,
        absorb=absorber("full", "the shape", "shape", 0),
    )
)


# ---- arange -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ArangeAttrs:
    """start, start + step, ... below limit (above it for a negative step); integers."""

    start: Size = 0
    limit: Size = 0
    step: Size = 1
    dtype: DType = int64


def _arange_absorb(args: Sequence[Arg | None], a: ArangeAttrs) -> tuple[int, ArangeAttrs]:
    given = [content_sizes("arange", "a bound", x)[0] for x in args if x is not None]
    if not given:
        return 0, a
    start, limit, step = given
    dtype = same_dtype("arange", *args)
    return 0, ArangeAttrs(start, limit, step, dtype)


def _arange_count(a: ArangeAttrs) -> Expr:
    step = need_const("arange", "the step", wrap(a.step))
    if step == 0:
        fail("arange: the step is 0")
    start, limit = wrap(a.start), wrap(a.limit)
    span = limit - start if step > 0 else start - limit
    count = simplified((span + (abs(step) - 1)) // abs(step))
    # Where Arith can show that it is not negative, the maximum is left out.
    return simplified(maximum(count, 0))


def _arange_infer(a: ArangeAttrs) -> TensorType:
    return TensorType((_arange_count(a),), a.dtype)


def _arange_compute(a: ArangeAttrs) -> te.Tensor:
    return te.compute((_arange_count(a),), lambda i: cast(i * a.step + a.start, a.dtype), "arange")


def _arange_reference(a: ArangeAttrs) -> Array:
    start, limit, step = wrap(a.start), wrap(a.limit), wrap(a.step)
    if const_int(start) is None or const_int(limit) is None:
        count = need_const("arange", "the length", _arange_count(a))
        made = np.empty(count, dtype=object)
        made[:] = [simplified(start + step * k) for k in range(count)]
        return made
    return np.arange(*numbers((start, limit, step)), dtype=a.dtype.numpy)


def _arange_samples(draw: Draw) -> tuple[list[Array], ArangeAttrs]:
    step = choice(draw, (1, 1, 2, 3, -1, -2))
    dtype = DType(choice(draw, ("int64", "int32")))
    return [], ArangeAttrs(integer(draw, -4, 4), integer(draw, -4, 9), step, dtype)


arange = register(
    Op(
        "arange",
        ArangeAttrs,
        _arange_infer,
        direct(_arange_compute),
        _arange_reference,
        _arange_samples,
        shape_math=True,
        absorb=_arange_absorb,
    )
)
