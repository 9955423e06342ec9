"""Winograd's minimal filtering as a named compute of 2-d convolution: 3x3, stride 1, one group.

    F(m x m, 3 x 3): (m + 2)^2 products per m x m outputs and channel pair instead of 9 m^2.

A. Lavin, S. Gray, Fast Algorithms for Convolutional Neural Networks (2015); matrices by the
Toom-Cook construction. For m = 4 the points 0, +-5/8, +-3/2, infinity give a third of the error of
0, +-1, +-2.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from typing import Any

from .. import te
from ..ir.expr import Const, Expr, all_of, ceildiv, const, const_int, select
from ..ir.types import TensorType, float32
from .rules import inside, optional, simplified

POINTS = {
    2: (Fraction(0), Fraction(1), Fraction(-1)),
    4: (Fraction(0), Fraction(5, 8), Fraction(-5, 8), Fraction(3, 2), Fraction(-3, 2)),
}
# max |error| / max |result| for up to 512 channels, against the direct sum's 3e-7
# (tests/ops/test_winograd.py)
ERROR = {2: 2e-6, 4: 1e-5}
Matrix = tuple[tuple[float, ...], ...]


@cache
def matrices(m: int) -> tuple[Matrix, Matrix, Matrix]:
    """(At [m, a], G [a, 3], Bt [a, a]) of F(m, 3), a = m + 2: Y = At ((G g) * (Bt d)).

    G holds plain powers of the points, so that a filter takes the least work; At has the factors.
    """
    points = POINTS[m]
    at = [[Fraction(0) for _ in points] + [Fraction(int(i == m - 1))] for i in range(m)]
    g: list[list[Fraction]] = []
    bt: list[list[Fraction]] = []
    for j, p in enumerate(points):
        others = [q for k, q in enumerate(points) if k != j]
        scale = Fraction(1)
        for q in others:
            scale *= p - q
        for i in range(m):
            at[i][j] = p**i / scale
        g.append([p**k for k in range(3)])
        bt.append([*_expand(others), Fraction(0)])
    g.append([Fraction(0), Fraction(0), Fraction(1)])
    bt.append(_expand(list(points)))

    def plain(rows: list[list[Fraction]]) -> Matrix:
        return tuple(tuple(float(x) for x in row) for row in rows)

    return plain(at), plain(g), plain(bt)


def _expand(roots: list[Fraction]) -> list[Fraction]:
    """Coefficients of the product of (x - r), lowest power first."""
    result = [Fraction(1)]
    for r in roots:
        shifted = [Fraction(0), *result]
        result = [s - r * (result[k] if k < len(result) else 0) for k, s in enumerate(shifted)]
    return result


def _combine(row: Expr, matrix: Matrix, term: Any) -> Expr:
    """sum over i of matrix[row, i] * term(i), for a row that is known once its loop is unrolled."""
    *others, result = _rows(matrix, term)
    for r in reversed(range(len(others))):
        result = select(_is(row, r), others[r], result)
    return result


def _rows(matrix: Matrix, term: Any) -> list[Expr]:
    """sum over i of matrix[r, i] * term(i) for every r. Points come in pairs p and -p: columns that
    differ in signs alone are added and subtracted first, and rows that do have both parts of their
    sums in common, which are computed once (equal expressions are)."""
    terms: list[tuple[Expr, tuple[float, ...]]] = []
    columns = list(zip(*matrix, strict=True))
    while columns:
        i = len(matrix[0]) - len(columns)
        column = columns.pop(0)
        if columns and columns[0] != column and [*map(abs, columns[0])] == [*map(abs, column)]:
            pairs = [*zip(column, columns.pop(0), strict=True)]
            x, y = term(i), term(i + 1)
            terms.append((x + y, tuple(c if c == d else 0.0 for c, d in pairs)))
            terms.append((x - y, tuple(c if c != d else 0.0 for c, d in pairs)))
        else:
            terms.append((term(i), column))
    rows = []
    for r, row in enumerate(zip(*[c for _, c in terms], strict=True)):
        near = [other for k, other in enumerate(matrix) if abs(k - r) == 1 and other != matrix[r]]
        twin = next((o for o in near if [*map(abs, o)] == [*map(abs, matrix[r])]), None)
        x = [e for e, _ in terms]
        if twin is None or len(terms) != len(twin):
            rows.append(_sum(row, x))
            continue
        same = [c if c == d else 0.0 for c, d in zip(row, twin, strict=True)]
        turned = [c if c != d else 0.0 for c, d in zip(row, twin, strict=True)]
        factor = next(c for c in reversed(turned) if c)
        odd = _sum([c / factor for c in turned], x)
        rows.append(_sum(same, x) + (odd if factor == 1 else odd * const(factor, float32)))
    return rows


def _sum(factors: Sequence[float], terms: Sequence[Expr]) -> Expr:
    """sum of factor * term, those with the factor 1 first."""
    parts = sorted(
        ((c, e) for c, e in zip(factors, terms, strict=True) if c), key=lambda t: t[0] != 1
    )
    total: Expr | None = None
    for c, e in parts:
        part = e if c == 1 else e * const(c, float32)
        total = part if total is None else total + part
    assert total is not None
    return total


def _is(row: Expr, value: int) -> Expr:
    from ..ir.expr import eq

    return eq(row, Const(value))


def applies(types: list[TensorType | None], attrs: Any) -> bool:
    """3x3, stride 1, no dilation, one group, float32, at least 16 channels, a spatial size that is
    known."""
    x, w = types[0], types[1]
    if x is None or w is None or x.dtype is not float32 or x.rank != 4 or attrs.groups != 1:
        return False
    if [const_int(s) for s in w.shape[2:]] != [3, 3]:
        return False
    if any(s != 1 for s in (*attrs.strides, *attrs.dilations)):
        return False
    channels = [const_int(w.shape[0]), const_int(w.shape[1])]
    sizes = [const_int(s) for s in x.shape[2:]]
    return all(c is not None and c % 16 == 0 for c in channels) and all(
        s is not None and s >= 6 for s in sizes
    )


def cost(m: int, types: list[TensorType | None], attrs: Any) -> float:
    """Estimated microseconds per image on one thread, at the FMA rate and the memory rate of a
    typical core. m: 0 for the direct sum. Half of the time in which a transformed filter comes from
    memory is hidden; transforming it in place takes as long as the products of 3.5 tiles."""
    x, w = types[0], types[1]
    assert x is not None and w is not None
    o, c = const_int(w.shape[0]) or 1, const_int(w.shape[1]) or 1
    h, v = (const_int(s) or 1 for s in x.shape[2:])
    if m == 0:
        return 2 * 9 * o * c * h * v / 93e3 + 4 * 9 * o * c / 15e3
    a = m + 2
    tiles = -(-h // m) * -(-v // m)
    each_tile = 2 * a * a * o * c / 93e3
    filters = min(4 * a * a * o * c / 15e3 / 2, 3.5 * each_tile)
    return each_tile * tiles + filters + tiles * (c * 1.6 + o * 1.3) * a * a / 8e3


def build(m: int) -> Any:
    """The compute of F(m x m, 3 x 3)."""
    at, g, bt = matrices(m)
    a = m + 2

    def winograd(x: te.Tensor, w: te.Tensor, *rest: Any) -> te.Tensor:
        bias, attrs = optional(rest)
        windows = attrs.windows("conv", (3, 3))
        top, left = windows.begin
        n, c, h, v = x.shape
        o = w.shape[0]
        out_h, out_v = windows.output((h, v))
        th, tv = simplified(ceildiv(out_h, m)), simplified(ceildiv(out_v, m))

        def padded(b: Expr, k: Expr, i: Expr, j: Expr) -> Expr:
            conds = [inside(i - top, h), inside(j - left, v)]
            return select(all_of(conds), x[b, k, i - top, j - left], const(0, float32))

        pad = te.compute((n, c, th * m + 2, tv * m + 2), padded, "pad")
        rows = te.compute(
            (a, a, n, th, tv, c),
            lambda p, j, b, s, t, k: _combine(p, bt, lambda i: pad[b, k, s * m + i, t * m + j]),
            "winograd_rows",
        )
        data = te.compute(
            (a, a, n, th, tv, c),
            lambda p, q, b, s, t, k: _combine(q, bt, lambda j: rows[p, j, b, s, t, k]),
            "winograd_data",
        )
        filter_rows = te.compute(
            (a, 3, o, c), lambda p, j, f, k: _combine(p, g, lambda i: w[f, k, i, j]), "filter_rows"
        )
        filters = te.compute(
            (a, a, o, c),
            lambda p, q, f, k: _combine(q, g, lambda j: filter_rows[p, j, f, k]),
            "filters",
        )
        (k,) = te.reduce_vars(1)
        product = te.compute(
            (a, a, n, th, tv, o),
            lambda p, q, b, s, t, f: data[p, q, b, s, t, k] * filters[p, q, f, k],
            "products",
            reduce=("sum", {k: c}),
        )
        half = te.compute(
            (m, a, n, th, tv, o),
            lambda i, q, b, s, t, f: _combine(i, at, lambda p: product[p, q, b, s, t, f]),
            "winograd_half",
        )

        def result(b: Expr, f: Expr, i: Expr, j: Expr) -> Expr:
            total = _combine(j % m, at, lambda q: half[i % m, q, b, i // m, j // m, f])
            return total if bias is None else total + bias[f]

        return te.compute((n, o, out_h, out_v), result, "conv")

    return winograd
