"""Running sums and products along an axis.

    cumsum(x; axis=1, exclusive=False, reverse=False)      y[i, t] = y[i, t-1] + x[i, t]

Each sum waits for the one before it, so several go side by side: a strip of neighbours where the
axis is not the last, else a few rows, whose sums stay in registers. Threads share strips and rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .. import te
from ..ir.expr import (
    ONE,
    ZERO,
    Const,
    Expr,
    Load,
    Var,
    binary,
    cast,
    ceildiv,
    const,
    const_int,
    minimum,
    product,
)
from ..ir.op import Arg, Op, Precision, register
from ..ir.tir import PARALLEL, SERIAL, UNROLL, Alloc, Buffer, For, Scope, Stmt, Store, seq
from ..ir.types import TensorType
from .draws import Draw, array, choice, flag, integer, shape
from .rules import axis_of, direct, float32_inside, need_dtype, need_rank, wide
from .scatter import LANES, along

Array = np.ndarray
Fresh = Callable[[str], Var]
ROWS = 8  # side by side: an addition takes four cycles, and two begin in each
STRIP = 4096  # neighbours side by side, at most


@dataclass(frozen=True)
class CumulativeAttrs:
    """exclusive: an element does not count itself. reverse: sums run from the end."""

    axis: int = 0
    exclusive: bool = False
    reverse: bool = False


@dataclass(frozen=True)
class _Step:
    """y[.., t, ..] = sum = sum + x[.., t, ..] for the t-th element of an axis."""

    combine: str
    attrs: CumulativeAttrs
    axis: int
    x: Buffer
    y: Buffer

    def __call__(self, t: Expr, sums: Buffer, lane: Expr, rest: Sequence[Expr]) -> Stmt:
        """rest: the place on the other axes."""
        at = self.x.shape[self.axis] - 1 - t if self.attrs.reverse else t
        place = (*rest[: self.axis], at, *rest[self.axis :])
        value = cast(Load(self.x, place), sums.dtype)
        add = Store(sums, (lane,), binary(self.combine, Load(sums, (lane,)), value))
        put = Store(self.y, place, cast(Load(sums, (lane,)), self.y.dtype))
        return seq([put, add] if self.attrs.exclusive else [add, put])


def _index(k: Expr, shape: Sequence[Expr]) -> list[Expr]:
    """Where element k of a row-major array lies."""
    return [
        k // product(shape[a + 1 :]) % n if a else k // product(shape[1:])
        for a, n in enumerate(shape)
    ]


def _rows(step: _Step, start: Expr, others: Sequence[Expr], fresh: Fresh) -> Stmt:
    """A few rows at a time; the last ones again where fewer are left."""
    count = product(others)
    height = min(ROWS, const_int(count) or ROWS)
    block, t = fresh("rows"), fresh("t")
    sums = Buffer(fresh("sum").name, start.dtype, (Const(height),), Scope.REGISTER)

    def each(body: Callable[[Expr], Stmt]) -> Stmt:
        row = fresh("row")
        return For(row, Const(height), UNROLL, body(row))

    def next_(row: Expr) -> Stmt:
        return step(t, sums, row, _index(minimum(block * height + row, count - 1), others))

    run = [
        each(lambda row: Store(sums, (row,), start)),
        For(t, step.x.shape[step.axis], SERIAL, each(next_)),
    ]
    return For(block, ceildiv(count, height), PARALLEL, Alloc(sums, seq(run)))


def _strips(step: _Step, start: Expr, others: Sequence[Expr], fresh: Fresh) -> Stmt:
    """Part of a line of the last axis at a time, or as many whole lines as a strip has room for.
    Lines of a length that comes with the call may be short ones: all of them are one line."""
    outer, inner = others[: step.axis], others[step.axis :]
    joined = const_int(inner[-1]) is None
    lines, columns = ((), product(inner)) if joined else (inner[:-1], inner[-1])
    width = min(STRIP, const_int(columns) or STRIP)
    height = max(1, min(STRIP // width, const_int(product(lines)) or STRIP))
    lanes = math.gcd(width, LANES)
    grid = (*outer, ceildiv(product(lines), height), ceildiv(columns, width))
    strip, t = fresh("strip"), fresh("t")
    sums = Buffer(fresh("sum").name, start.dtype, (Const(height * width),), Scope.LOCAL)
    *place, top, part = _index(strip, grid)
    first, have = part * width, minimum(columns - part * width, width)

    def each(body: Callable[[Expr, Expr], Stmt]) -> Stmt:
        line = fresh("line")
        row = along(ZERO, have, fresh, lambda j: body(line, j), lanes if lanes > 2 else LANES)
        return For(line, minimum(product(lines) - top * height, height), SERIAL, row)

    def next_(r: Expr, j: Expr) -> Stmt:
        at = _index(first + j, inner) if joined else [*_index(top * height + r, lines), first + j]
        return step(t, sums, r * width + j, [*place, *at])

    run = [
        each(lambda r, j: Store(sums, (r * width + j,), start)),
        For(t, step.x.shape[step.axis], SERIAL, each(next_)),
    ]
    return For(strip, product(grid), PARALLEL, Alloc(sums, seq(run)))


def _cumulative(name: str, combine: str, neutral: int, ufunc: np.ufunc) -> Op:
    """Registers a running sum or product along an axis."""

    def infer(x: Arg, a: CumulativeAttrs) -> TensorType:
        need_dtype(name, x, "fi")
        need_rank(name, x, 1)
        axis_of(a.axis, x.type.rank, name)
        return x.type

    def compute(x: te.Tensor, a: CumulativeAttrs) -> te.Tensor:
        axis = a.axis % len(x.shape)
        others = (*x.shape[:axis], *x.shape[axis + 1 :])
        start = const(neutral, wide(x.dtype))
        inner = [n for n in x.shape[axis + 1 :] if n is not ONE]

        def build(ins: list[Buffer], outs: list[Buffer], fresh: Fresh) -> Stmt:
            side_by_side = _strips if inner else _rows
            return side_by_side(_Step(combine, a, axis, *ins, *outs), start, others, fresh)

        return te.extern(name, (x,), [(x.shape, x.dtype)], build)[0]

    def reference(x: Array, a: CumulativeAttrs) -> Array:
        x = np.flip(x, a.axis) if a.reverse else x
        if a.exclusive and x.size:
            crop = tuple(
                slice(0, -1) if k == a.axis % x.ndim else slice(None) for k in range(x.ndim)
            )
            edge = [(1, 0) if k == a.axis % x.ndim else (0, 0) for k in range(x.ndim)]
            x = np.pad(x[crop], edge, constant_values=neutral)
        y = ufunc.accumulate(x, axis=a.axis, dtype=x.dtype)
        return np.flip(y, a.axis) if a.reverse else y

    def samples(draw: Draw) -> tuple[list[Array], CumulativeAttrs]:
        of = shape(draw, 1)
        x = array(draw, of, choice(draw, ("float32", "float64", "int32", "int64", "float16")))
        axis = integer(draw, -len(of), len(of) - 1)
        return [x], CumulativeAttrs(axis, flag(draw), flag(draw))

    return register(
        Op(
            name,
            CumulativeAttrs,
            infer,
            direct(compute),
            float32_inside(reference),
            samples,
            precision=Precision.FLOAT32_INSIDE,
        )
    )


cumsum = _cumulative("cumsum", "add", 0, np.add)
cumprod = _cumulative("cumprod", "mul", 1, np.multiply)
