"""Operators with results whose size depends on data.

Each fills tensors of the largest possible size and counts; `head` takes the part that counts:

    positions, n = nonzero(x)          int64[rank, elements of x], int64[]
    head(positions, n; axis=1)         int64[rank, D], with D a dimension that is read from n

That is the only operator with such a size: the plan loads D before the kernel that holds `head`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import te
from ..ir.expr import ONE, ZERO, Const, Expr, Load, binary, maximum, minimum, ne, product, wrap
from ..ir.op import Arg, Counted, NoAttrs, Op, register
from ..ir.tir import SERIAL, Alloc, Buffer, For, If, Stmt, Store, seq
from ..ir.types import TensorType, int64
from .draws import Draw, array, choice, flag, integer, shape
from .order import local, merge_sort, sorting
from .rules import (
    axis_of,
    direct,
    fail,
    need_dtype,
    need_rank,
    need_same,
    result,
    same_dtype,
    simplified,
)
from .scatter import Fresh, over

Array = np.ndarray
_ONLY = (ZERO,)


# ---- head ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class HeadAttrs(Counted):
    """The first `dim` indices along an axis."""

    axis: int = 0


def _head_infer(x: Arg, count: Arg, a: HeadAttrs) -> TensorType:
    axis = axis_of(a.axis, need_rank("head", x, 1), "head")
    need_dtype("head", count, "i")
    return result((*x.type.shape[:axis], a.dim, *x.type.shape[axis + 1 :]), x.type.dtype)


def _head_compute(x: te.Tensor, count: te.Tensor, a: HeadAttrs) -> te.Tensor:
    axis = a.axis % len(x.shape)
    shape = (*x.shape[:axis], simplified(a.dim), *x.shape[axis + 1 :])
    return te.compute(shape, lambda *i: x[i], "head")


def _head_reference(x: Array, count: Array, a: HeadAttrs) -> Array:
    return np.take(x, range(int(count)), axis=a.axis)


def _head_samples(draw: Draw) -> tuple[list[Array], HeadAttrs]:
    of = shape(draw, 1, 3)
    axis = integer(draw, 0, len(of) - 1)
    n = integer(draw, 1, of[axis])
    return [array(draw, of), np.array(n)], HeadAttrs(n, of[axis], axis)


head = register(
    Op("head", HeadAttrs, _head_infer, direct(_head_compute), _head_reference, _head_samples)
)


def _no_samples(draw: Draw) -> Any:
    raise NotImplementedError("sampled as part of loops: tests/frontend/test_control.py")


# ---- number -------------------------------------------------------------------------------------
def _number_infer(x: Arg, a: Counted) -> TensorType:
    need_dtype("number", x, "i")
    if any(s is not ONE for s in x.type.shape):
        fail(f"number: {x.type} is not one integer")
    return result((), x.type.dtype)


number = Op(
    "number",
    Counted,
    _number_infer,
    direct(lambda x, a: te.compute((), lambda: x[(ZERO,) * len(x.shape)], "number")),
    lambda x, a: x.reshape(()),
    _no_samples,
)
"""An integer that is also a dimension. Not registered: its attributes say the value of its input,
so there are no independent samples."""


# ---- nonzero ------------------------------------------------------------------------------------
def _nonzero_infer(x: Arg, a: NoAttrs) -> tuple[TensorType, TensorType]:
    return result((x.type.rank, product(x.type.shape)), int64), result((), int64)


def _nonzero_compute(x: te.Tensor, a: NoAttrs) -> tuple[te.Tensor, ...]:
    rank = len(x.shape)

    def build(ins: list[Buffer], outs: list[Buffer], fresh: Fresh) -> Stmt:
        (source,), (places, count) = ins, outs
        n = Load(count, ())

        def look(*i: Expr) -> Stmt:
            value = Load(source, i)
            hit = value if value.dtype.is_bool else ne(value, 0)
            puts: list[Stmt] = [Store(places, (Const(k), n), v) for k, v in enumerate(i)]
            return If(hit, seq([*puts, Store(count, (), n + 1)]))

        return seq([Store(count, (), ZERO), over(source.shape, fresh, look)])

    shapes = [((rank, product(x.shape)), int64), ((), int64)]
    return te.extern("nonzero", (x,), shapes, build)


def _nonzero_reference(x: Array, a: NoAttrs) -> tuple[Array, Array]:
    found = np.array(np.nonzero(np.atleast_1d(x)), np.int64)[: x.ndim]
    # What lies behind the positions that count has no meaning; both ways give the same there.
    room = np.full((x.ndim, x.size), 113, np.int64)
    room[:, : found.shape[1]] = found
    return room, np.array(np.count_nonzero(x))


def _nonzero_samples(draw: Draw) -> tuple[list[Array], NoAttrs]:
    x = array(draw, shape(draw, 1, 3), choice(draw, ("float32", "int64", "bool")), 1, 2)
    return [np.ones_like(x)], NoAttrs()  # all count: the rest of the results is not defined


nonzero = register(
    Op(
        "nonzero",
        NoAttrs,
        _nonzero_infer,
        direct(_nonzero_compute),
        _nonzero_reference,
        _nonzero_samples,
    )
)


# ---- unique -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class UniqueAttrs:
    """sorted: groups in the order of their rows, else in that of their first appearance."""

    sorted: bool = True


def _unique_infer(x: Arg, a: UniqueAttrs) -> tuple[TensorType, ...]:
    need_rank("unique", x, 2, 2)
    need_dtype("unique", x, "fi")
    line = result((x.type.shape[0],), int64)
    return line, line, line, result((), int64)


def _unique_compute(x: te.Tensor, a: UniqueAttrs) -> tuple[te.Tensor, ...]:
    """Of rows x[n, m]: first row of each group, group of each row, rows in each group, groups."""
    n, m = x.shape

    def build(ins: list[Buffer], outs: list[Buffer], fresh: Fresh) -> Stmt:
        (rows,), (first, group, size, count, order, spare) = ins, outs
        k, c, j, d = (fresh(s) for s in ("k", "c", "j", "d"))
        same = local("same", fresh)

        def at(i: Expr) -> tuple[Expr, ...]:
            return (i,)

        # Stable sorts by one column after the other, the last column first.
        column = m - 1 - c

        def before(p: Expr, q: Expr) -> Expr:
            return Load(rows, (p, column)) < Load(rows, (q, column))

        sort = For(c, m, SERIAL, merge_sort(n, order, spare, at, before, fresh))
        row, previous = Load(order, (j,)), Load(order, (maximum(j - 1, 0),))
        differ = ne(Load(rows, (row, d)), Load(rows, (previous, d)))
        total, own = Load(count, ()), (Load(count, ()) - 1,)
        start: list[Stmt] = [
            Store(first, (total,), row), Store(size, (total,), ZERO), Store(count, (), total + 1),
        ]  # fmt: skip
        collect = seq(
            [
                Store(same, _ONLY, binary("min", j, 1)),
                For(d, m, SERIAL, If(differ, Store(same, _ONLY, ZERO))),
                If(Load(same, _ONLY) < 1, seq(start)),
                Store(size, own, Load(size, own) + 1),
                Store(group, (row,), own[0]),
            ]
        )
        steps: list[Stmt] = [
            For(k, n, SERIAL, Store(order, (k,), k)), sort, Store(count, (), ZERO),
            For(j, n, SERIAL, collect),
        ]  # fmt: skip
        if not a.sorted:
            steps += _by_appearance(n, first, group, size, count, order, spare, fresh)
        return Alloc(same, seq(steps))

    line = ((n,), int64)
    return te.extern("unique", (x,), [line, line, line, ((), int64), line, line], build)[:4]


def _by_appearance(
    n: Expr,
    first: Buffer,
    group: Buffer,
    size: Buffer,
    count: Buffer,
    order: Buffer,
    spare: Buffer,
    fresh: Fresh,
) -> list[Stmt]:
    """Numbers the groups anew: by their first rows, which are sorted."""
    i, j, k, r, q = (fresh(s) for s in ("i", "j", "k", "r", "q"))
    total = Load(count, ())

    def at(k: Expr) -> tuple[Expr, ...]:
        return (k,)

    def before(a: Expr, b: Expr) -> Expr:
        # Only the groups there are get sorted; what lies behind them stays behind.
        return binary(
            "and", a < total,
            binary("or", total <= b, Load(first, at(a)) < Load(first, at(b))),
        )  # fmt: skip

    sort = merge_sort(n, order, spare, at, before, fresh)
    old = Load(order, at(k))
    return [
        For(i, n, SERIAL, Store(order, at(i), i)),
        sort,
        For(k, n, SERIAL, Store(spare, at(old), k)),
        For(j, n, SERIAL, Store(group, at(j), Load(spare, at(Load(group, at(j)))))),
        # The sizes and then the first rows, in their new order.
        For(r, n, SERIAL, Store(spare, at(r), Load(size, at(Load(order, at(r)))))),
        For(q, n, SERIAL, Store(size, at(q), Load(spare, at(q)))),
        *_permuted(n, first, order, spare, fresh),
    ]


def _permuted(n: Expr, x: Buffer, order: Buffer, spare: Buffer, fresh: Fresh) -> list[Stmt]:
    i, j = fresh("i"), fresh("j")
    return [
        For(i, n, SERIAL, Store(spare, (i,), Load(x, (Load(order, (i,)),)))),
        For(j, n, SERIAL, Store(x, (j,), Load(spare, (j,)))),
    ]


def _unique_reference(x: Array, a: UniqueAttrs) -> tuple[Array, ...]:
    keys = x.astype(np.float64) if x.dtype.name == "bfloat16" else x
    _, first, group, size = np.unique(
        keys, axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    group = group.reshape(-1)
    if not a.sorted:
        order = np.argsort(first)
        first, size = first[order], size[order]
        group = np.argsort(order)[group]
    room = [np.full(len(x), 113, np.int64) for _ in range(2)]
    room[0][: len(first)], room[1][: len(first)] = first, size
    return room[0], group, room[1], np.array(len(first))


def _unique_samples(draw: Draw) -> tuple[list[Array], UniqueAttrs]:
    n, m = integer(draw, 1, 6), integer(draw, 1, 3)
    x = array(draw, (n, m), choice(draw, ("float32", "int64", "int8")), -2, 2)
    x[:, 0] = np.argsort(array(draw, (n,), "float32"))  # all rows differ, see nonzero
    return [x], UniqueAttrs(flag(draw))


unique = register(
    Op(
        "unique",
        UniqueAttrs,
        _unique_infer,
        direct(_unique_compute),
        _unique_reference,
        _unique_samples,
    )
)


# ---- non_max_suppression ------------------------------------------------------------------------
@dataclass(frozen=True)
class SuppressionAttrs:
    """At most `most` boxes per class, with scores above `score`, that overlap by at most `overlap`.

    centre: boxes are (x, y, width, height) around a centre, else two corners (y, x, y, x).
    """

    most: int = 0
    overlap: float = 0.0
    score: float | None = None
    centre: bool = False


def _suppression_infer(boxes: Arg, scores: Arg, a: SuppressionAttrs) -> tuple[TensorType, ...]:
    need_rank("non_max_suppression", boxes, 3, 3)
    need_same("non_max_suppression", "numbers of a box and 4", boxes.type.shape[2], 4)
    need_rank("non_max_suppression", scores, 3, 3)
    need_dtype("non_max_suppression", boxes, "f")
    same_dtype("non_max_suppression", boxes, scores)
    need_same("non_max_suppression", "batches", boxes.type.shape[0], scores.type.shape[0])
    need_same("non_max_suppression", "boxes", boxes.type.shape[1], scores.type.shape[2])
    return result((_room(scores.type.shape, a), 3), int64), result((), int64)


def _room(scores: tuple[Expr, ...], a: SuppressionAttrs) -> Expr:
    return scores[0] * scores[1] * minimum(scores[2], wrap(max(a.most, 0)))


def _corners(boxes: Buffer, b: Expr, i: Expr, a: SuppressionAttrs) -> list[tuple[Expr, Expr]]:
    """(low, high) along both axes."""
    e = [Load(boxes, (b, i, Const(k))) for k in range(4)]
    if a.centre:
        return [(e[k] - e[k + 2] * 0.5, e[k] + e[k + 2] * 0.5) for k in (1, 0)]
    return [(minimum(e[k], e[k + 2]), maximum(e[k], e[k + 2])) for k in (0, 1)]


def _suppression_compute(
    boxes: te.Tensor, scores: te.Tensor, a: SuppressionAttrs
) -> tuple[te.Tensor, ...]:
    def build(ins: list[Buffer], outs: list[Buffer], fresh: Fresh) -> Stmt:
        (places, points), (made, count, order, spare, kept) = ins, outs
        batches, classes, n = points.shape
        taken, good = local("taken", fresh), local("good", fresh)

        def overlaps(b: Expr, i: Expr, j: Expr) -> Expr:
            first, second = _corners(places, b, i, a), _corners(places, b, j, a)
            shared: Expr | None = None
            sizes = []
            for (p, q), (r, s) in zip(first, second, strict=True):
                inner = maximum(minimum(q, s) - maximum(p, r), 0.0)
                shared = inner if shared is None else shared * inner
                sizes.append((q - p, s - r))
            assert shared is not None
            union = sizes[0][0] * sizes[1][0] + sizes[0][1] * sizes[1][1] - shared
            return shared / union > a.overlap

        def one_class(b: Expr, c: Expr) -> Stmt:
            k, j = fresh("k"), fresh("j")
            i, number, total = Load(order, (b, c, k)), Load(taken, _ONLY), Load(count, ())
            clash = If(overlaps(b, i, Load(kept, (j,))), Store(good, _ONLY, ZERO))
            keep: list[Stmt] = [Store(made, (total, Const(d)), v) for d, v in enumerate((b, c, i))]
            keep += [
                Store(kept, (number,), i),
                Store(taken, _ONLY, number + 1),
                Store(count, (), total + 1),
            ]
            consider: Stmt = seq(
                [
                    Store(good, _ONLY, ONE),
                    For(j, minimum(n, wrap(max(a.most, 0))), SERIAL, If(j < number, clash)),
                    If(Load(good, _ONLY) > 0, seq(keep)),
                ]
            )
            wanted = number < max(a.most, 0)
            if a.score is not None:
                wanted = binary("and", wanted, Load(points, (b, c, i)) > a.score)
            return seq([Store(taken, _ONLY, ZERO), For(k, n, SERIAL, If(wanted, consider))])

        sort = sorting(points, order, spare, 2, True, fresh, SERIAL)
        loop = over((batches, classes), fresh, one_class)
        return Alloc(taken, Alloc(good, seq([sort, Store(count, (), ZERO), loop])))

    like = (scores.shape, int64)
    shapes = [((_room(scores.shape, a), 3), int64), ((), int64), like, like]
    shapes.append(((scores.shape[2],), int64))
    return te.extern("non_max_suppression", (boxes, scores), shapes, build)[:2]


def _suppression_reference(boxes: Array, scores: Array, a: SuppressionAttrs) -> tuple[Array, Array]:
    found = []
    for b, c in np.ndindex(*scores.shape[:2]):
        kept: list[int] = []
        for i in np.argsort(-scores[b, c], kind="stable"):
            if len(kept) >= a.most or (a.score is not None and scores[b, c, i] <= a.score):
                break
            if all(_np_overlap(boxes[b, i], boxes[b, j], a) <= a.overlap for j in kept):
                kept.append(int(i))
                found.append((b, c, int(i)))
    room = scores.shape[0] * scores.shape[1] * min(scores.shape[2], max(a.most, 0))
    made = np.full((room, 3), 113, np.int64)
    made[: len(found)] = np.array(found, np.int64).reshape(-1, 3)
    return made, np.array(len(found))


def _np_overlap(p: Array, q: Array, a: SuppressionAttrs) -> Any:
    def corners(e: Array) -> tuple[Array, Array]:
        if a.centre:
            return e[1::-1] - e[:1:-1] / 2, e[1::-1] + e[:1:-1] / 2
        return np.minimum(e[:2], e[2:]), np.maximum(e[:2], e[2:])

    (pl, ph), (ql, qh) = corners(p), corners(q)
    shared = np.prod(np.maximum(np.minimum(ph, qh) - np.maximum(pl, ql), 0))
    return shared / (np.prod(ph - pl) + np.prod(qh - ql) - shared)


def _suppression_samples(draw: Draw) -> tuple[list[Array], SuppressionAttrs]:
    b, c, n = integer(draw, 1, 2), integer(draw, 1, 2), integer(draw, 1, 6)
    corner = array(draw, (b, n, 2), "float32", 0, 4)
    boxes = np.concatenate([corner, corner + array(draw, (b, n, 2), "float32", 1, 3)], 2)
    scores = array(draw, (b, c, n))
    # With no limits all boxes are found, see nonzero.
    return [boxes, scores], SuppressionAttrs(n, 1.0, None, flag(draw))


non_max_suppression = register(
    Op(
        "non_max_suppression",
        SuppressionAttrs,
        _suppression_infer,
        direct(_suppression_compute),
        _suppression_reference,
        _suppression_samples,
    )
)
