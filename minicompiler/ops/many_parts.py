"""A concatenation of many parts, written as statements: each part is copied to its place.

    joined([a: [n, 1], b: [n, 1], ...], 1, starts)      for i in n: y[i, 0] = a[i, 0]
                                                        for i in n: y[i, 1] = b[i, 0]  ...
As an expression every element would ask all parts in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from .. import te
from ..ir.expr import Const, Expr, Load
from ..ir.tir import PARALLEL, Buffer, For, Stmt, Store, seq
from .scatter import Fresh, along, over, strips


def joined(xs: Sequence[te.Tensor], axis: int, starts: Sequence[Expr]) -> te.Tensor:
    """The parts side by side along an axis, the k-th from starts[k] on, the last entry the size.

    Threads take rows where the parts lie side by side in a row, else strips of the last axis.
    """
    first = xs[0].shape
    shape = (*first[:axis], starts[-1], *first[axis + 1 :])
    last = len(shape) - 1

    def build(ins: list[Buffer], outs: list[Buffer], fresh: Fresh) -> Stmt:
        (made,) = outs

        def copy(k: int, *i: Expr) -> Stmt:
            return Store(made, (*i[:axis], i[axis] + starts[k], *i[axis + 1 :]), Load(ins[k], i))

        def line(k: int, low: Expr, high: Expr, *i: Expr) -> Stmt:
            return along(low, high, fresh, lambda j: copy(k, *i, j))

        def strip(low: Expr, high: Expr) -> Stmt:
            own = enumerate(x.shape[:-1] for x in ins)
            return seq([over(lead, fresh, partial(line, k, low, high)) for k, lead in own])

        def row(*r: Expr) -> Stmt:
            own = enumerate(x.shape for x in ins)
            return seq([
                over(s[1:-1], fresh, partial(line, k, Const(0), s[-1], *r)) for k, s in own
            ])  # fmt: skip

        if axis < last:
            return strips(shape[-1], fresh, strip)
        if last == 0:
            return row()
        r = fresh("r")
        return For(r, shape[0], PARALLEL, row(r))

    return te.extern("concat", tuple(xs), [(shape, xs[0].dtype)], build)[0]
