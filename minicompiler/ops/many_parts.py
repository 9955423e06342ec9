"""A concatenation of many parts, written as statements: each part is copied to its place.

    joined([a: [n, 1], b: [n, 1], ...], 1, starts)      for i in n: y[i, 0] = a[i, 0]
                                                        for i in n: y[i, 1] = b[i, 0]  ...
As an expression every element would ask all parts in turn. Axes that are one piece of memory in all
parts are copied as a single line: [n, 4] as 4*n numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

from .. import te
from ..ir.expr import ZERO, Expr, Load, const_int
from ..ir.tir import PARALLEL, Buffer, For, Stmt, Store, seq
from .scatter import LANES, Fresh, along, line_from, over, product, strips, unravelled


def joined(xs: Sequence[te.Tensor], axis: int, starts: Sequence[Expr]) -> te.Tensor:
    """The parts side by side along an axis, the k-th from starts[k] on, the last entry the size.

    Threads take rows where the parts lie side by side in a row, else strips of what is behind the
    axis, unless these are too short.
    """
    first = xs[0].shape
    shape = (*first[:axis], starts[-1], *first[axis + 1 :])

    def build(ins: list[Buffer], outs: list[Buffer], fresh: Fresh) -> Stmt:
        (made,) = outs

        def parts(outer: Sequence[Expr], line: int, low: Expr, high: Expr | None) -> Stmt:
            """Elements low to high (None: the last) of the lines that the axes from `line` on are,
            of all parts, where the outermost axes have the indices `outer`."""

            def part(k: int) -> Stmt:
                sizes = ins[k].shape

                def copy(*i: Expr) -> Stmt:
                    i = (*outer, *i[:-1], *unravelled(i[-1], sizes[line:]))
                    to = (*i[:axis], i[axis] + starts[k], *i[axis + 1 :])
                    return Store(made, to, Load(ins[k], i))

                end = product(sizes[line:]) if high is None else high
                lines = sizes[len(outer) : line]
                return over(
                    lines, fresh, lambda *i: along(low, end, fresh, lambda j: copy(*i, j))
                )  # fmt: skip

            return seq([part(k) for k in range(len(ins))])

        line = line_from(shape, axis)
        if axis:
            r = fresh("r")
            return For(r, shape[0], PARALLEL, parts((r,), line, ZERO, None))
        behind = line_from(shape, 1) if len(shape) > 1 else 1
        size = product(shape[behind:])
        if (const_int(size) or LANES) < LANES:
            return parts((), line, ZERO, None)
        return strips(size, fresh, lambda low, high: parts((), behind, low, high))

    return te.extern("concat", tuple(xs), [(shape, xs[0].dtype)], build)[0]
