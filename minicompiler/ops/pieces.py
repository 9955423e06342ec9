"""Operators that take tensors apart and put them together, without computing on the elements.

    concat(a, b, ...; axis)     split(x; axis, sizes)      tile(x; repeats)
    strided_slice(x; starts=(1,), ends=(n,), axes=(0,), steps=(1,))

Sizes in attributes may be expressions, or come as further arguments; see shape.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import te
from ..ir.arith import Arith
from ..ir.expr import (
    Const,
    Expr,
    binary,
    const,
    const_int,
    select,
    wrap,
)
from ..ir.op import Arg, Op, register
from ..ir.types import TensorType
from .draws import Draw, array, choice, flag, integer, shape
from .many_parts import joined
from .rules import (
    Shape,
    Size,
    axis_of,
    content_ints,
    content_sizes,
    direct,
    fail,
    known_nonneg,
    need_rank,
    need_same,
    result,
    same_dtype,
    simplified,
    text,
    unequal,
)
from .shape import MOVED, absorber, numbers

Array = np.ndarray


# ---- concat -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ConcatAttrs:
    axis: int = 0


def _concat_infer(*rest: Any) -> TensorType:
    *xs, a = rest
    if not xs:
        fail("concat of nothing")
    first: Shape = xs[0].type.shape
    axis = axis_of(a.axis, len(first), "concat")
    total: Expr = Const(0)
    for x in xs:
        if x.type.rank != len(first):
            fail(f"concat: {xs[0].type} and {x.type} differ in rank")
        for k, (s, t) in enumerate(zip(first, x.type.shape, strict=True)):
            if k != axis:
                need_same("concat", f"sizes of dimension {k}", s, t)
        total = total + x.type.shape[axis]
    return result((*first[:axis], total, *first[axis + 1 :]), same_dtype("concat", *xs))


MANY_PARTS = 16  # of a concatenation: more make expressions too deep if asked for one by one
MOST_PARTS = 64  # each element asks for its part; more of them are copied one after the other


def _concat_compute(*rest: Any) -> te.Tensor:
    *xs, a = rest
    axis = a.axis % len(xs[0].shape)
    starts: list[Expr] = [Const(0)]
    for x in xs:
        starts.append(simplified(starts[-1] + x.shape[axis]))
    if len(xs) > MOST_PARTS:
        return joined(xs, axis, starts)

    def body(*i: Expr) -> Expr:
        def of(k: int) -> Expr:
            return xs[k][(*i[:axis], i[axis] - starts[k], *i[axis + 1 :])]

        def among(low: int, high: int) -> Expr:
            """The part of the given ones that has the element: one by one, or by halves."""
            if high - low == 1:
                return of(low)
            cut = low + 1 if high - low <= MANY_PARTS else (low + high) // 2
            return select(i[axis] < starts[cut], among(low, cut), among(cut, high))

        return among(0, len(xs))

    shape = xs[0].shape
    return te.compute((*shape[:axis], starts[-1], *shape[axis + 1 :]), body, "concat")


def _concat_reference(*rest: Any) -> Array:
    *xs, a = rest
    return np.concatenate(xs, axis=a.axis)


def _concat_samples(draw: Draw) -> tuple[list[Array], ConcatAttrs]:
    of = shape(draw, 1)
    axis = integer(draw, -len(of), len(of) - 1)
    dtype = choice(draw, MOVED)
    xs = []
    for _ in range(integer(draw, 1, 4)):
        own = list(of)
        own[axis] = integer(draw, 1, 3)
        xs.append(array(draw, own, dtype))
    return xs, ConcatAttrs(axis)


concat = register(
    Op(
        "concat",
        ConcatAttrs,
        _concat_infer,
        direct(_concat_compute),
        _concat_reference,
        _concat_samples,
        shape_math=True,
        variadic=True,
    )
)


# ---- split --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class SplitAttrs:
    """sizes of the parts along an axis; or () and `parts`, the last of which may be smaller."""

    axis: int = 0
    sizes: tuple[Size, ...] = ()
    parts: int = 0


def _parts(x: Shape, a: SplitAttrs) -> tuple[int, list[Expr]]:
    """(axis, sizes)."""
    axis = axis_of(a.axis, len(x), "split")
    if a.sizes:
        total = simplified(sum((wrap(s) for s in a.sizes), Const(0)))
        if unequal(total, x[axis]):
            fail(f"split: {text(a.sizes)} does not add up to dimension {axis} of {text(x)}")
        return axis, [simplified(s) for s in a.sizes]
    chunk = simplified((x[axis] + (a.parts - 1)) // a.parts)
    return axis, [chunk] * (a.parts - 1) + [simplified(x[axis] - chunk * (a.parts - 1))]


def _split_infer(x: Arg, a: SplitAttrs) -> tuple[TensorType, ...]:
    axis, sizes = _parts(x.type.shape, a)
    shape = x.type.shape
    return tuple(TensorType((*shape[:axis], s, *shape[axis + 1 :]), x.type.dtype) for s in sizes)


def _split_compute(x: te.Tensor, a: SplitAttrs) -> tuple[te.Tensor, ...]:
    axis, sizes = _parts(x.shape, a)
    made = []
    start: Expr = Const(0)
    for size in sizes:

        def body(*i: Expr, start: Expr = start) -> Expr:
            return x[(*i[:axis], i[axis] + start, *i[axis + 1 :])]

        made.append(te.compute((*x.shape[:axis], size, *x.shape[axis + 1 :]), body, "split"))
        start = simplified(start + size)
    return tuple(made)


def _split_reference(x: Array, a: SplitAttrs) -> tuple[Array, ...]:
    axis, sizes = _parts(tuple(map(Const, x.shape)), a)
    return tuple(np.split(x, np.cumsum(numbers(sizes))[:-1], axis=axis))


def _split_samples(draw: Draw) -> tuple[list[Array], SplitAttrs]:
    of = list(shape(draw, 1))
    axis = integer(draw, -len(of), len(of) - 1)
    if flag(draw):
        sizes = tuple(integer(draw, 1, 3) for _ in range(integer(draw, 1, 3)))
        of[axis] = sum(sizes)
        a = SplitAttrs(axis, sizes)
    else:
        parts = integer(draw, 1, 3)
        chunk = integer(draw, 1, 3)
        of[axis] = chunk * (parts - 1) + integer(draw, 1, chunk)
        a = SplitAttrs(axis, (), parts)
        if -(-of[axis] // parts) != chunk:
            of[axis] = chunk * parts
    return [array(draw, of, choice(draw, MOVED))], a


split = register(
    Op(
        "split",
        SplitAttrs,
        _split_infer,
        direct(_split_compute),
        _split_reference,
        _split_samples,
        shape_math=True,
    )
)


# ---- tile ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TileAttrs:
    repeats: tuple[Size, ...] = ()


def _tiled(x: Shape, a: TileAttrs) -> Shape:
    if len(a.repeats) != len(x):
        fail(f"tile: {len(a.repeats)} repeats for {len(x)} dimensions")
    return tuple(simplified(s * r) for s, r in zip(x, a.repeats, strict=True))


def _tile_compute(x: te.Tensor, a: TileAttrs) -> te.Tensor:
    def body(*i: Expr) -> Expr:
        once = [const_int(wrap(r)) == 1 for r in a.repeats]
        return x[tuple(v if o else v % s for v, o, s in zip(i, once, x.shape, strict=True))]

    return te.compute(_tiled(x.shape, a), body, "tile")


def _tile_samples(draw: Draw) -> tuple[list[Array], TileAttrs]:
    of = shape(draw, 0, 3)
    return [array(draw, of, choice(draw, MOVED))], TileAttrs(tuple(integer(draw, 1, 3) for _ in of))


tile = register(
    Op(
        "tile",
        TileAttrs,
        lambda x, a: TensorType(_tiled(x.type.shape, a), x.type.dtype),
        direct(_tile_compute),
        lambda x, a: np.tile(x, numbers(a.repeats)),
        _tile_samples,
        shape_math=True,
        absorb=absorber("tile", "the number of repeats", "repeats", 1),
    )
)


# ---- strided_slice ------------------------------------------------------------------------------
@dataclass(frozen=True)
class SliceAttrs:
    """Python slices start:end:step of some axes; axes () are the first ones, steps () are 1.

    As in ONNX, and not in Python, a start before the first element is that element backwards too.
    """

    starts: tuple[Size, ...] = ()
    ends: tuple[Size, ...] = ()
    axes: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()


# Models mark "to the end" with the largest or smallest number of their type.
_FAR = (1 << 31) - 1


def _slice_absorb(args: Sequence[Arg | None], a: SliceAttrs) -> tuple[int, SliceAttrs]:
    fields: dict[str, Any] = {}
    for arg, name in zip(args[1:], ("starts", "ends", "axes", "steps"), strict=False):
        if arg is not None:
            read = content_sizes if name in ("starts", "ends") else content_ints
            fields[name] = read("strided_slice", f"`{name}`", arg)
    return 1, replace(a, **fields)


def _edge(value: Size, size: Expr, low: Size, high: Expr) -> Expr:
    """One end of a slice as a position in low .. high."""
    known = const_int(wrap(value))
    if known is not None and abs(known) >= _FAR - 1:
        return high if known > 0 else wrap(low)
    at = wrap(value)
    if known is None and not known_nonneg(at):
        negative = Arith().prove(at < 0)
        at = at + size if negative else at if negative is False else select(at < 0, at + size, at)
    elif known is not None and known < 0:
        at = at + size
    at, high = simplified(at), simplified(high)
    return high if at is high else simplified(binary("min", binary("max", at, low), high))


def _sliced(x: Shape, a: SliceAttrs) -> list[tuple[Expr, int, Expr]]:
    """(first position, step, number of positions) per dimension."""
    found: list[tuple[Expr, int, Expr]] = [(Const(0), 1, s) for s in x]
    axes = a.axes or tuple(range(len(a.starts)))
    steps = a.steps or (1,) * len(a.starts)
    if not len(a.starts) == len(a.ends) == len(axes) == len(steps):
        fail(f"strided_slice: {len(a.starts)} starts, {len(a.ends)} ends, {len(axes)} axes")
    for start, end, axis, step in zip(a.starts, a.ends, axes, steps, strict=True):
        k = axis_of(axis, len(x), "strided_slice")
        size = x[k]
        if step == 0:
            fail(f"strided_slice: the step of axis {axis} is 0")
        if step > 0:
            first, last = _edge(start, size, 0, size), _edge(end, size, 0, size)
            span = last - first
        else:
            first, last = _edge(start, size, 0, size - 1), _edge(end, size, -1, size - 1)
            if (known := const_int(wrap(end))) is not None and -_FAR < known < 0:
                last = simplified(binary("max", size + known, -1))
            span = first - last
        count = binary("max", (span + (abs(step) - 1)) // abs(step), 0)
        found[k] = (simplified(first), step, simplified(count))
    return found


def _slice_infer(x: Arg, a: SliceAttrs) -> TensorType:
    return TensorType(tuple(n for _, _, n in _sliced(x.type.shape, a)), x.type.dtype)


def _slice_compute(x: te.Tensor, a: SliceAttrs) -> te.Tensor:
    runs = _sliced(x.shape, a)

    def body(*i: Expr) -> Expr:
        return x[tuple(v * step + first for v, (first, step, _) in zip(i, runs, strict=True))]

    return te.compute([n for _, _, n in runs], body, "strided_slice")


def _slice_reference(x: Array, a: SliceAttrs) -> Array | None:
    if any(const_int(wrap(v)) is None for v in (*a.starts, *a.ends)):
        return None
    where = [slice(None)] * x.ndim
    axes = a.axes or range(len(a.starts))
    steps = a.steps or (1,) * len(a.starts)
    for start, end, axis, step in zip(numbers(a.starts), numbers(a.ends), axes, steps, strict=True):
        first = max(start, -x.shape[axis]) if step < 0 else start
        where[axis] = slice(first, end, step)
    return x[tuple(where)]


def _slice_samples(draw: Draw) -> tuple[list[Array], SliceAttrs]:
    of = tuple(integer(draw, 1, 6) for _ in range(integer(draw, 1, 3)))
    axes = tuple(k - len(of) if flag(draw) else k for k in range(len(of)) if flag(draw))
    steps = tuple(choice(draw, (1, 1, 2, -1, -2)) for _ in axes)
    starts, ends = [], []
    for axis, step in zip(axes, steps, strict=True):
        low, high = sorted(integer(draw, 0, of[axis]) for _ in range(2))
        if low == high:
            low, high = 0, of[axis]
        first, last = (low, high) if step > 0 else (high - 1, low - 1 if low else -_FAR)
        starts.append(first - of[axis] if flag(draw) and first < of[axis] else first)
        ends.append(_FAR if step > 0 and last == of[axis] and flag(draw) else last)
    a = SliceAttrs(tuple(starts), tuple(ends), axes, steps)
    return [array(draw, of, choice(draw, MOVED))], a


strided_slice = register(
    Op(
        "strided_slice",
        SliceAttrs,
        _slice_infer,
        direct(_slice_compute),
        _slice_reference,
        _slice_samples,
        shape_math=True,
        absorb=_slice_absorb,
    )
)


# ---- trilu --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TriluAttrs:
    """Keeps the upper (or lower) triangle of the last two axes; k moves the diagonal right."""

    upper: bool = True
    k: Size = 0


def _trilu_infer(x: Arg, a: TriluAttrs) -> TensorType:
    need_rank("trilu", x, 2)
    return x.type


def _trilu_compute(x: te.Tensor, a: TriluAttrs) -> te.Tensor:
    def body(*i: Expr) -> Expr:
        row, column = i[-2] + a.k, i[-1]
        kept = row <= column if a.upper else column <= row
        return select(kept, x[i], const(0, x.dtype))

    return te.compute(x.shape, body, "trilu")


def _trilu_samples(draw: Draw) -> tuple[list[Array], TriluAttrs]:
    x = array(draw, shape(draw, 2), choice(draw, MOVED))
    return [x], TriluAttrs(flag(draw), integer(draw, -2, 2))


trilu = register(
    Op(
        "trilu",
        TriluAttrs,
        _trilu_infer,
        direct(_trilu_compute),
        lambda x, a: (np.triu if a.upper else np.tril)(x, a.k),
        _trilu_samples,
    )
)


# ---- depth_to_space, space_to_depth -------------------------------------------------------------
@dataclass(frozen=True)
class BlockAttrs:
    """block: edge of the square. channels_first: channel numbers count (channel, row, column) of a
    block (ONNX's CRD) rather than (row, column, channel)."""

    block: int = 2
    channels_first: bool = False


def _need_block(op: str, a: BlockAttrs) -> None:
    if a.block < 1:
        fail(f"{op}: the block has the size {a.block}")


def _to_space_infer(x: Arg, a: BlockAttrs) -> TensorType:
    need_rank("depth_to_space", x, 4, 4)
    n, c, h, w = x.type.shape
    _need_block("depth_to_space", a)
    need_same("depth_to_space", f"channels modulo {a.block}^2 and 0", c % a.block**2, 0)
    return result((n, c // a.block**2, h * a.block, w * a.block), x.type.dtype)


def _to_space_compute(x: te.Tensor, a: BlockAttrs) -> te.Tensor:
    n, c, h, w = x.shape
    b = a.block
    channels = simplified(c // (b * b))

    def body(i: Expr, k: Expr, y: Expr, z: Expr) -> Expr:
        within = y % b * b + z % b
        channel = k * (b * b) + within if a.channels_first else within * channels + k
        return x[i, channel, y // b, z // b]

    shape = (n, channels, simplified(h * b), simplified(w * b))
    return te.compute(shape, body, "depth_to_space")


def _to_space_reference(x: Array, a: BlockAttrs) -> Array:
    n, c, h, w = x.shape
    b = a.block
    if a.channels_first:
        y = x.reshape(n, c // b**2, b, b, h, w).transpose(0, 1, 4, 2, 5, 3)
    else:
        y = x.reshape(n, b, b, c // b**2, h, w).transpose(0, 3, 4, 1, 5, 2)
    return y.reshape(n, c // b**2, h * b, w * b)


def _to_space_samples(draw: Draw) -> tuple[list[Array], BlockAttrs]:
    b = integer(draw, 1, 3)
    channels = b * b * integer(draw, 1, 2)
    of = (integer(draw, 1, 2), channels, integer(draw, 1, 3), integer(draw, 1, 3))
    return [array(draw, of, choice(draw, MOVED))], BlockAttrs(b, flag(draw))


depth_to_space = register(
    Op(
        "depth_to_space",
        BlockAttrs,
        _to_space_infer,
        direct(_to_space_compute),
        _to_space_reference,
        _to_space_samples,
    )
)


def _to_depth_infer(x: Arg, a: BlockAttrs) -> TensorType:
    need_rank("space_to_depth", x, 4, 4)
    n, c, h, w = x.type.shape
    _need_block("space_to_depth", a)
    for s in (h, w):
        need_same("space_to_depth", f"size modulo {a.block} and 0", s % a.block, 0)
    return result((n, c * a.block**2, h // a.block, w // a.block), x.type.dtype)


def _to_depth_compute(x: te.Tensor, a: BlockAttrs) -> te.Tensor:
    n, c, h, w = x.shape
    b = a.block

    def body(i: Expr, k: Expr, y: Expr, z: Expr) -> Expr:
        channel, within = (k // (b * b), k % (b * b)) if a.channels_first else (k % c, k // c)
        return x[i, channel, y * b + within // b, z * b + within % b]

    shape = (n, simplified(c * (b * b)), simplified(h // b), simplified(w // b))
    return te.compute(shape, body, "space_to_depth")


def _to_depth_reference(x: Array, a: BlockAttrs) -> Array:
    n, c, h, w = x.shape
    b = a.block
    order = (0, 1, 3, 5, 2, 4) if a.channels_first else (0, 3, 5, 1, 2, 4)
    y = x.reshape(n, c, h // b, b, w // b, b).transpose(order)
    return y.reshape(n, c * b * b, h // b, w // b)


def _to_depth_samples(draw: Draw) -> tuple[list[Array], BlockAttrs]:
    b = integer(draw, 1, 3)
    height, width = b * integer(draw, 1, 2), b * integer(draw, 1, 2)
    of = (integer(draw, 1, 2), integer(draw, 1, 3), height, width)
    return [array(draw, of, choice(draw, MOVED))], BlockAttrs(b, flag(draw))


space_to_depth = register(
    Op(
        "space_to_depth",
        BlockAttrs,
        _to_depth_infer,
        direct(_to_depth_compute),
        _to_depth_reference,
        _to_depth_samples,
    )
)
