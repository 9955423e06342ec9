"""Operators that sort.

argsort(x; axis, largest)    positions of the elements from the largest to the smallest;
                             equal ones keep their order (a merge sort)
topk(x; k, axis, largest)    (values, positions) of the first k of them; few are kept in order while
                             the row goes by (an insertion sort of those that enter)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .. import te
from ..ir.expr import (
    ONE,
    Const,
    Expr,
    Load,
    binary,
    cast,
    ceildiv,
    const,
    const_int,
    eq,
    maximum,
    minimum,
    select,
    wrap,
)
from ..ir.op import Arg, Op, register
from ..ir.tir import (
    PARALLEL,
    SERIAL,
    VECTOR,
    Alloc,
    Buffer,
    For,
    If,
    LoopKind,
    Scope,
    Stmt,
    Store,
    seq,
)
from ..ir.types import TensorType, index, int64
from .draws import Draw, array, choice, flag, integer, shape
from .rules import (
    Size,
    axis_of,
    direct,
    fail,
    need_dtype,
    need_rank,
    result,
    short_index,
    simplified,
)
from .scatter import Fresh

Array = np.ndarray
_ONLY = (Const(0),)
_SIDE = 8  # elements in order that move at a time
_LEVELS = 40  # a run doubles at each level: enough for any tensor
_FEW = (
    64  # elements that are kept in order; more are sorted, as a row in the wrong order enters all
)


@dataclass(frozen=True)
class OrderAttrs:
    """largest: from the largest to the smallest, else the other way round. k: of topk."""

    axis: int = -1
    largest: bool = True
    k: Size = 1


def merge_sort(
    n: Expr,
    order: Buffer,
    spare: Buffer,
    at: Callable[[Expr], tuple[Expr, ...]],
    before: Callable[[Expr, Expr], Expr],
    fresh: Fresh,
) -> Stmt:
    """Sorts the n positions order[at(k)]; equal ones keep their order. `spare` is scratch memory.

    before(a, b): position a has to stand before position b.
    """
    known = const_int(n)
    levels = _LEVELS if known is None else max(known - 1, 0).bit_length()
    p, start, t, c = (fresh(s) for s in ("p", "s", "t", "c"))
    width = binary("shl", ONE, p)
    left, right = local("left", fresh), local("right", fresh)
    low = start * width * 2
    middle, high = minimum(low + width, n), minimum(low + width * 2, n)
    i, j = Load(left, _ONLY), Load(right, _ONLY)
    # Both candidates are looked at even where a run is used up, hence the bounds.
    a = Load(order, at(minimum(i, n - 1)))
    b = Load(order, at(minimum(j, n - 1)))
    keep = binary("and", i < middle, binary("or", high <= j, ~before(b, a)))
    merge = If(
        keep,
        seq([Store(spare, at(low + t), a), Store(left, _ONLY, i + 1)]),
        seq([Store(spare, at(low + t), b), Store(right, _ONLY, j + 1)]),
    )
    loop = For(t, high - low, SERIAL, merge)
    run = seq([Store(left, _ONLY, low), Store(right, _ONLY, middle), loop])
    level = seq(
        [
            For(start, ceildiv(n, width * 2), SERIAL, run),
            For(c, n, SERIAL, Store(order, at(c), Load(spare, at(c)))),
        ]
    )
    passes = For(p, wrap(levels), SERIAL, If(width < n, level))
    return Alloc(left, Alloc(right, passes))


def local(stem: str, fresh: Fresh) -> Buffer:
    """One int64 of a thread's own."""
    return Buffer(fresh(stem).name, index, (ONE,), Scope.LOCAL)


def sorting(
    x: Buffer,
    order: Buffer,
    spare: Buffer,
    axis: int,
    largest: bool,
    fresh: Fresh,
    kind: LoopKind = PARALLEL,
) -> Stmt:
    """Fills `order` (int64, like x) with the sorted positions along an axis; `spare` is scratch.
    kind: SERIAL where more follows in the same phase, which threads that share the rows would not
    wait for."""
    n = x.shape[axis]

    def row(*outer: Expr) -> Stmt:
        def at(k: Expr) -> tuple[Expr, ...]:
            return (*outer[:axis], k, *outer[axis:])

        def before(a: Expr, b: Expr) -> Expr:
            p, q = Load(x, at(a)), Load(x, at(b))
            return q < p if largest else p < q

        k = fresh("k")
        start = For(k, n, SERIAL, Store(order, at(k), k))
        return seq([start, merge_sort(n, order, spare, at, before, fresh)])

    return _rows((*x.shape[:axis], *x.shape[axis + 1 :]), fresh, row, kind)


def _rows(
    shape: Sequence[Expr], fresh: Fresh, row: Callable[..., Stmt], kind: LoopKind = PARALLEL
) -> Stmt:
    """row(i, j, ...) for every index of a shape. kind: of the outermost loop."""
    index = [None if n is ONE else fresh("i") for n in shape]
    made = row(*[Const(0) if v is None else v for v in index])
    loops = [(v, n) for v, n in zip(index, shape, strict=True) if v is not None]
    for k, (v, extent) in reversed(list(enumerate(loops))):
        made = For(v, extent, SERIAL if k else kind, made)
    return made


def selecting(x: Buffer, first: Buffer, axis: int, largest: bool, fresh: Fresh) -> Stmt:
    """Fills `first` with the positions of as many elements along an axis as it has room for."""
    n, k = x.shape[axis], const_int(first.shape[axis])
    assert k is not None
    put = _one_by_one if k <= _SIDE else _side_by_side

    def row(*outer: Expr) -> Stmt:
        def at(j: Expr) -> tuple[Expr, ...]:
            return (*outer[:axis], j, *outer[axis:])

        return put(x, first, at, n, k, largest, fresh)

    return _rows((*x.shape[:axis], *x.shape[axis + 1 :]), fresh, row)


def _one_by_one(
    x: Buffer, first: Buffer, at: Callable[[Expr], tuple[Expr, ...]], n: Expr, k: int,
    largest: bool, fresh: Fresh,
) -> Stmt:  # fmt: skip
    """Of a row: what enters moves those behind it one after the other."""
    kept = Buffer(fresh("kept").name, x.dtype, (Const(k),), Scope.LOCAL)
    place = local("place", fresh)
    c, t, u = (fresh(s) for s in ("c", "t", "u"))
    new, here = Load(x, at(c)), Load(place, _ONLY)

    def stays(j: Expr) -> Expr:
        """An element that is kept already stands before the new one."""
        old = Load(kept, (j,))
        return ~(old < new if largest else new < old)

    # Places of what is not there yet count as behind the new element.
    there = binary("and", t < c, stays(t))
    count = For(t, Const(k), SERIAL, If(there, Store(place, _ONLY, here + 1)))
    later = maximum(Const(k - 1) - u, ONE)
    move = seq(
        [
            Store(kept, (later,), Load(kept, (later - 1,))),
            Store(first, at(later), Load(first, at(later - 1))),
        ]
    )
    shift = For(u, Const(k - 1), SERIAL, If(here < Const(k - 1) - u, move))
    slot = minimum(here, Const(k - 1))
    enter: list[Stmt] = [
        Store(place, _ONLY, Const(0)), count, shift,
        Store(kept, (slot,), new), Store(first, at(slot), c),
    ]  # fmt: skip
    wanted = binary("or", c < Const(k), ~stays(Const(k - 1)))
    loop = For(c, n, SERIAL, If(wanted, seq(enter)))
    return Alloc(kept, Alloc(place, loop))


def _side_by_side(
    x: Buffer, first: Buffer, at: Callable[[Expr], tuple[Expr, ...]], n: Expr, k: int,
    largest: bool, fresh: Fresh,
) -> Stmt:  # fmt: skip
    """Of a row: what enters moves those behind it `_SIDE` at a time, and none of those before
    it. Each entry waits for the last one to reach memory, as long as ten moves one by one take."""
    # What is kept stands one place further on: all have one before them.
    room = -(-k // _SIDE) * _SIDE
    short = short_index(n)
    kept, places, kept_next, places_next = (
        Buffer(fresh(name).name, dtype, (Const(size),), scope)
        for size, scope in ((room + 1, Scope.LOCAL), (_SIDE, Scope.REGISTER))
        for name, dtype in (("kept", x.dtype), ("place", short))
    )

    def enter(c: Expr, full: bool) -> Stmt:
        """Element c comes to stand behind those that stay where they are. What is no number counts
        as the last of all, since those that stay have to be the first ones."""
        new: Expr = Load(x, at(c))
        if x.dtype.is_float:
            new = select(eq(new, new), new, const(-math.inf if largest else math.inf, x.dtype))

        def stays(t: Expr) -> Expr:
            old = Load(kept, (t + 1,))
            here = ~(old < new if largest else new < old)
            return here if full else binary("and", t < c, here)

        def moved(base: int) -> Stmt:
            """Places base to base + _SIDE, read before they are written."""
            lane, out = fresh("lane"), fresh("lane")
            t = lane + base
            behind = stays(t - 1) if base else binary("or", t < ONE, stays(t - 1))
            ways = ((kept, kept_next, new), (places, places_next, cast(c, short)))
            read: list[Stmt] = [
                Store(then, (lane,), select(
                    stays(t), Load(now, (t + 1,)), select(behind, value, Load(now, (t,)))
                ))
                for now, then, value in ways
            ]  # fmt: skip
            write: list[Stmt] = [
                Store(now, (out + (base + 1),), Load(then, (out,))) for now, then, _ in ways
            ]
            return seq([
                For(v, Const(_SIDE), VECTOR, seq(part))
                for v, part in ((lane, read), (out, write))
            ])  # fmt: skip

        return seq([
            If(~stays(Const(min(base + _SIDE, k) - 1)), moved(base))
            for base in reversed(range(0, room, _SIDE))
        ])  # fmt: skip

    c, d, t = fresh("c"), fresh("d"), fresh("t")
    some = minimum(n, k)
    later = d + some
    last = Load(kept, (Const(k),))
    wanted = last < Load(x, at(later)) if largest else Load(x, at(later)) < last
    made: Stmt = seq(
        [
            For(c, some, SERIAL, enter(c, False)),
            For(d, n - some, SERIAL, If(wanted, enter(later, True))),
            For(t, Const(k), SERIAL, Store(first, at(t), cast(Load(places, (t + 1,)), index))),
        ]
    )
    for buffer in (kept, places, kept_next, places_next):
        made = Alloc(buffer, made)
    return made


def order_of(x: te.Tensor, axis: int, largest: bool) -> te.Tensor:
    """The sorted positions along an axis, as int64."""

    def build(ins: list[Buffer], outs: list[Buffer], fresh: Fresh) -> Stmt:
        return sorting(ins[0], outs[0], outs[1], axis, largest, fresh)

    scratch = (x.shape, int64)
    return te.extern("order", (x,), [(x.shape, int64), scratch], build)[0]


def first_of(x: te.Tensor, axis: int, count: int, largest: bool) -> te.Tensor:
    """The first of the sorted positions along an axis, as int64."""

    def build(ins: list[Buffer], outs: list[Buffer], fresh: Fresh) -> Stmt:
        return selecting(ins[0], outs[0], axis, largest, fresh)

    shape = (*x.shape[:axis], Const(count), *x.shape[axis + 1 :])
    return te.extern("first", (x,), [(shape, int64)], build)[0]


def _np_order(x: Array, axis: int, largest: bool) -> Array:
    keys = x.astype(np.float32) if x.dtype.name == "bfloat16" else x
    if largest:  # reversed, because the sort keeps the order of equal elements
        back = np.argsort(np.flip(keys, axis), axis=axis, kind="stable")
        return x.shape[axis] - 1 - np.flip(back, axis)
    return np.argsort(keys, axis=axis, kind="stable")


# ---- argsort ------------------------------------------------------------------------------------
def _argsort_infer(x: Arg, a: OrderAttrs) -> TensorType:
    need_dtype("argsort", x, "fi")
    axis_of(a.axis, need_rank("argsort", x, 1), "argsort")
    return TensorType(x.type.shape, int64)


def _argsort_compute(x: te.Tensor, a: OrderAttrs) -> te.Tensor:
    return order_of(x, a.axis % len(x.shape), a.largest)


def _argsort_reference(x: Array, a: OrderAttrs) -> Array:
    return _np_order(x, a.axis, a.largest)


_DTYPES = ("float32", "float64", "float16", "int64", "int32", "uint8")


def _argsort_samples(draw: Draw) -> tuple[list[Array], OrderAttrs]:
    of = shape(draw, 1, 3, 7)
    axis = integer(draw, -len(of), len(of) - 1)
    return [array(draw, of, choice(draw, _DTYPES))], OrderAttrs(axis, flag(draw))


argsort = register(
    Op(
        "argsort",
        OrderAttrs,
        _argsort_infer,
        direct(_argsort_compute),
        _argsort_reference,
        _argsort_samples,
    )
)


# ---- topk ---------------------------------------------------------------------------------------
def _topk_infer(x: Arg, a: OrderAttrs) -> tuple[TensorType, TensorType]:
    need_dtype("topk", x, "fi")
    axis = axis_of(a.axis, need_rank("topk", x, 1), "topk")
    size, k = const_int(x.type.shape[axis]), const_int(simplified(a.k))
    if k is not None and (k < 0 or (size is not None and k > size)):
        fail(f"topk: {k} elements of an axis of {size} in {x.type}")
    shape = (*x.type.shape[:axis], a.k, *x.type.shape[axis + 1 :])
    return result(shape, x.type.dtype), result(shape, int64)


def _topk_compute(x: te.Tensor, a: OrderAttrs) -> tuple[te.Tensor, te.Tensor]:
    axis = a.axis % len(x.shape)
    shape = (*x.shape[:axis], simplified(a.k), *x.shape[axis + 1 :])
    few = const_int(shape[axis])
    if few is not None and 0 < few <= _FEW:
        order = first_of(x, axis, few, a.largest)
    else:
        order = order_of(x, axis, a.largest)

    def value(*i: Expr) -> Expr:
        return x[(*i[:axis], cast(order[i], index), *i[axis + 1 :])]

    return te.compute(shape, value, "topk"), te.compute(shape, lambda *i: order[i], "positions")


def _topk_reference(x: Array, a: OrderAttrs) -> tuple[Array, Array]:
    k = const_int(wrap(a.k))
    order = np.take(_np_order(x, a.axis, a.largest), range(k or 0), axis=a.axis)
    return np.take_along_axis(x, order, a.axis), order


def _topk_samples(draw: Draw) -> tuple[list[Array], OrderAttrs]:
    (x,), a = _argsort_samples(draw)
    return [x], OrderAttrs(a.axis, a.largest, integer(draw, 1, x.shape[a.axis]))


topk = register(
    Op(
        "topk",
        OrderAttrs,
        _topk_infer,
        direct(_topk_compute),
        _topk_reference,
        _topk_samples,
    )
)
