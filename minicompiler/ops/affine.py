"""Reading and writing at positions that are affine functions of the index: no table of positions.

read_affine(x: [12]; axis=0, shape=(3, 4), starts=(0,), steps=((2, 1),))     [3, 4]
                                                           y[i, j] = x[0 + 2*i + 1*j]
assign_slice(x: [8, 9], u: [2, 3]; starts=(0, 4), steps=(1, 2))              [8, 9]
                                                           y = x, but y[0:2, 4:9:2] = u
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .. import te
from ..ir.expr import Const, Expr, all_of, binary, const_int, eq, select
from ..ir.op import Arg, Op, register
from ..ir.types import TensorType
from .draws import Draw, array, choice, integer, shape
from .rules import axis_of, direct, fail, inside, need_const, need_rank, same_dtype, text
from .shape import MOVED

Array = np.ndarray


# ---- read_affine --------------------------------------------------------------------------------
@dataclass(frozen=True)
class AffineAttrs:
    """Axes of the operand from `axis` on, one per number of `starts`, become axes of sizes `shape`.

    Along the k-th of them, the element [i, j, ...] lies at
    starts[k] + steps[k][0] * i + steps[k][1] * j + ...
    """

    axis: int = 0
    shape: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    steps: tuple[tuple[int, ...], ...] = ()


def _read_infer(x: Arg, a: AffineAttrs) -> TensorType:
    axis, depth = axis_of(a.axis, need_rank("read_affine", x, 1), "read_affine"), len(a.starts)
    if axis + depth > x.type.rank or len(a.steps) != depth:
        fail(f"read_affine: {depth} starts and {len(a.steps)} steps for {x.type} from axis {axis}")
    own = x.type.shape
    for size, start, steps in zip(own[axis:], a.starts, a.steps, strict=False):
        room = need_const("read_affine", "a size", size)
        if len(steps) != len(a.shape):
            fail(f"read_affine: {len(steps)} steps for the shape {text(a.shape)}")
        ends = [s * (n - 1) for s, n in zip(steps, a.shape, strict=True)]
        low, high = start + sum(min(e, 0) for e in ends), start + sum(max(e, 0) for e in ends)
        if min(a.shape, default=1) > 0 and not 0 <= low <= high < room:
            fail(f"read_affine: positions {low} .. {high} on an axis of {room} elements")
    new = tuple(map(Const, a.shape))
    return TensorType((*own[:axis], *new, *own[axis + depth :]), x.type.dtype)


def _read_compute(x: te.Tensor, a: AffineAttrs) -> te.Tensor:
    axis, depth, count = a.axis % len(x.shape), len(a.starts), len(a.shape)

    def body(*i: Expr) -> Expr:
        moved = i[axis : axis + count]
        at = []
        for start, steps in zip(a.starts, a.steps, strict=True):
            terms = (v * step for v, step in zip(moved, steps, strict=True) if step)
            at.append(sum(terms, Const(0)) + start)
        return x[(*i[:axis], *at, *i[axis + count :])]

    new = (*x.shape[:axis], *map(Const, a.shape), *x.shape[axis + depth :])
    return te.compute(new, body, "read_affine")


def _read_reference(x: Array, a: AffineAttrs) -> Array:
    places = np.indices(a.shape, dtype=np.int64)
    at = [
        np.tensordot(np.array(steps, np.int64), places, 1) + start
        for start, steps in zip(a.starts, a.steps, strict=True)
    ]
    where: list[slice | Array] = [slice(None)] * (a.axis % x.ndim)
    return np.asarray(x[(*where, *at)])


def _read_samples(draw: Draw) -> tuple[list[Array], AffineAttrs]:
    new = shape(draw, 1, 3, 3)
    starts, steps, sizes = [], [], []
    for _ in range(integer(draw, 1, 2)):
        own = tuple(integer(draw, -2, 3) for _ in new)
        ends = [s * (n - 1) for s, n in zip(own, new, strict=True)]
        starts.append(integer(draw, 0, 2) - sum(min(e, 0) for e in ends))
        steps.append(own)
        sizes.append(starts[-1] + sum(max(e, 0) for e in ends) + integer(draw, 1, 3))
    lead = shape(draw, 0, 2, 3)
    x = array(draw, (*lead, *sizes, *shape(draw, 0, 1, 3)), choice(draw, MOVED))
    return [x], AffineAttrs(len(lead), new, tuple(starts), tuple(steps))


read_affine = register(
    Op(
        "read_affine",
        AffineAttrs,
        _read_infer,
        direct(_read_compute),
        _read_reference,
        _read_samples,
        shape_math=True,
    )
)


# ---- assign_slice -------------------------------------------------------------------------------
@dataclass(frozen=True)
class AssignAttrs:
    """Per axis: the first position that is written, and the distance to the next one (above 0)."""

    starts: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()


def _assign_infer(x: Arg, updates: Arg, a: AssignAttrs) -> TensorType:
    rank = need_rank("assign_slice", updates, x.type.rank, x.type.rank)
    same_dtype("assign_slice", x, updates)
    if not rank == len(a.starts) == len(a.steps) or min(a.steps, default=1) < 1:
        fail(f"assign_slice: starts {a.starts} and steps {a.steps} for {x.type}")
    for k, (room, count) in enumerate(zip(x.type.shape, updates.type.shape, strict=True)):
        if room is count and a.starts[k] == 0 and a.steps[k] == 1:
            continue
        size, n = need_const("assign_slice", "a size", room), const_int(count)
        if n is None or a.starts[k] < 0 or a.starts[k] + (n - 1) * a.steps[k] >= size:
            fail(f"assign_slice: axis {k} of {updates.type} does not fit that of {x.type}")
    return x.type


def _assign_compute(x: te.Tensor, updates: te.Tensor, a: AssignAttrs) -> te.Tensor:
    def body(*i: Expr) -> Expr:
        conditions: list[Expr] = []
        at: list[Expr] = []
        for v, size, own, start, step in zip(
            i, x.shape, updates.shape, a.starts, a.steps, strict=True
        ):
            if size is own:
                at.append(v)
                continue
            there = v - start
            if step > 1:
                conditions.append(eq(binary("mod", there, Const(step)), Const(0)))
                there = there // step
            conditions.append(inside(there, own))
            at.append(there)
        return select(all_of(conditions), updates[tuple(at)], x[i])

    return te.compute(x.shape, body, "assign_slice")


def _assign_reference(x: Array, updates: Array, a: AssignAttrs) -> Array:
    made = x.copy()
    where = tuple(
        slice(start, start + n * step, step)
        for start, step, n in zip(a.starts, a.steps, updates.shape, strict=True)
    )
    made[where] = updates
    return made


def _assign_samples(draw: Draw) -> tuple[list[Array], AssignAttrs]:
    own = shape(draw, 1, 3, 3)
    steps = tuple(choice(draw, (1, 1, 2, 3)) for _ in own)
    starts = tuple(integer(draw, 0, 2) for _ in own)
    of = tuple(
        start + (n - 1) * step + integer(draw, 1, 3)
        for start, n, step in zip(starts, own, steps, strict=True)
    )
    dtype = choice(draw, MOVED)
    return [array(draw, of, dtype), array(draw, own, dtype)], AssignAttrs(starts, steps)


assign_slice = register(
    Op(
        "assign_slice",
        AssignAttrs,
        _assign_infer,
        direct(_assign_compute),
        _assign_reference,
        _assign_samples,
    )
)
