"""Winograd's minimal filtering as a named compute of convolution: 3 taps, stride 1.

    F(m x m, 3 x 3): (m + 2)^2 products per m x m outputs and channel pair instead of 9 m^2.

One or two axes of the windows are transformed; along the others (the depth of volumes) transformed
inputs and filters are multiplied tap by tap, and the sum is transformed back once.

A. Lavin, S. Gray, Fast Algorithms for Convolutional Neural Networks (2015); matrices by the
Toom-Cook construction. For m = 4 the points 0, +-5/8, +-3/2, infinity give a third of the error of
0, +-1, +-2. With those, and a multiple of the last matrix, all is whole: pairs of small integers
are transformed as they are, sums may wrap around modulo 2**32, and the division at the end is exact
where the multiple of the result fits (`exact_tiles`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np

from .. import te
from ..ir.expr import Const, Expr, all_of, binary, ceildiv, const, const_int, select
from ..ir.types import TensorType, float32, int32
from .pairs import as_halves, as_sum, multiply
from .rules import inside, optional, simplified
from .windows import Windows

POINTS = {
    2: (Fraction(0), Fraction(1), Fraction(-1)),
    4: (Fraction(0), Fraction(5, 8), Fraction(-5, 8), Fraction(3, 2), Fraction(-3, 2)),
}
# max |error| / max |result| for up to 512 channels, against the direct sum's 3e-7
# (tests/ops/test_winograd.py)
ERROR = {2: 2e-6, 4: 1e-5}
_USUAL = 64  # what a symbolic size is taken for: the choice must not depend on those of a call
WHOLE = {2: (0, 1, -1), 4: (0, 1, -1, 2, -2)}
MULTIPLE = {2: 2, 4: 24}  # of At that makes it whole for these points
_WORD = 1 << 32
Matrix = tuple[tuple[float, ...], ...]


@cache
def matrices(m: int, whole: bool = False) -> tuple[Matrix, Matrix, Matrix]:
    """(At [m, a], G [a, 3], Bt [a, a]) of F(m, 3), a = m + 2: Y = At ((G g) * (Bt d)).

    G holds plain powers of the points, so that a filter takes the least work; At has the factors.
    whole: of integers, with MULTIPLE[m] * At.
    """
    points = tuple(map(Fraction, WHOLE[m])) if whole else POINTS[m]
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

    if whole:
        at = [[x * MULTIPLE[m] for x in row] for row in at]
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
        rows.append(_sum(same, x) + (odd if factor == 1 else _times(odd, factor)))
    return rows


def _times(e: Expr, factor: float) -> Expr:
    return e * const(factor if e.dtype.is_float else int(factor), e.dtype)


def _sum(factors: Sequence[float], terms: Sequence[Expr]) -> Expr:
    """sum of factor * term, those with the factor 1 first."""
    parts = sorted(
        ((c, e) for c, e in zip(factors, terms, strict=True) if c), key=lambda t: t[0] != 1
    )
    total: Expr | None = None
    for c, e in parts:
        part = e if c == 1 else _times(e, c)
        total = part if total is None else total + part
    assert total is not None
    return total


def _is(row: Expr, value: int) -> Expr:
    from ..ir.expr import eq

    return eq(row, Const(value))


def transformed(windows: Windows) -> tuple[int, ...]:
    """The spatial axes along which windows are transformed: up to two with 3 taps, side by side and
    at every position, the innermost ones. Along the others the taps are summed up as they are."""
    each = zip(windows.kernel, windows.strides, windows.dilations, strict=True)
    return tuple(k for k, w in enumerate(each) if w == (3, 1, 1))[-2:]


def _windows(w: TensorType, attrs: Any) -> Windows | None:
    kernel = [const_int(s) for s in w.shape[2:]]
    known = tuple(k for k in kernel if k is not None)
    return attrs.windows("conv", known) if len(known) == len(kernel) else None


def exact_tiles(attrs: Any, low: int, high: int, weight: np.ndarray) -> tuple[int, ...]:
    """The m for which a convolution of integers from `low` (<= 0) to `high` with this weight is
    exact: transformed operands fit in 16 bits, and so many times the result in 32 bits as the
    division at the end leaves no remainder modulo 2**32 for."""
    depth = len(transformed(attrs.windows("conv", weight.shape[2:])))
    if not weight.size:
        return ()
    rows = weight.reshape(len(weight), math.prod(weight.shape[1:])).astype(np.int64)
    up, down = (np.where(c, rows, 0).sum(1) for c in (rows > 0, rows < 0))
    largest = max(np.abs(a * high + b * low).max() for a, b in ((up, down), (down, up)))
    found = []
    for m in WHOLE:
        _, g, bt = matrices(m, whole=True)
        sizes = (max(high, -low), bt), (int(np.abs(rows).max()), g)
        grown = [x * _growth(matrix) ** depth for x, matrix in sizes]
        shift, _ = _division(m, depth)
        if depth and max(grown) < 1 << 15 and int(largest) << shift < 1 << 31:
            found.append(m)
    return tuple(found)


def _growth(matrix: Matrix) -> int:
    return int(max(sum(map(abs, row)) for row in matrix))


def _division(m: int, depth: int) -> tuple[int, int]:
    """(s, f): MULTIPLE[m] ** depth * x is divided, modulo 2**32, by a product with f and a shift
    to the right by s bits."""
    total = MULTIPLE[m] ** depth
    shift = (total & -total).bit_length() - 1
    inverse = pow(total >> shift, -1, _WORD)
    return shift, inverse - _WORD if inverse >> 31 else inverse


def applies(types: list[TensorType | None], attrs: Any) -> bool:
    """Windows with an axis to transform, several tiles along it, float32 or pairs that stay exact,
    at most one lane of vectors of 8 empty for three channels, none where there are several groups.
    Only sizes along axes that are transformed may be symbolic."""
    x, w = types[0], types[1]
    if x is None or w is None:
        return False
    if not (attrs.tiles if attrs.in_pairs else x.dtype is float32):
        return False
    windows = _windows(w, attrs)
    o, c = const_int(w.shape[0]), const_int(w.shape[1])
    if windows is None or o is None or c is None:
        return False
    channels = (o // attrs.groups, c)  # of a group
    if any(-n % 8 > (n // 3 if attrs.groups == 1 else 0) for n in channels):
        return False
    axes = transformed(windows)
    sizes = [const_int(s) for s in x.shape[2:]]
    if any(n is None for k, n in enumerate(sizes) if k not in axes):
        return False
    out = [const_int(n) or _USUAL for n in windows.output(x.shape[2:])]
    tiles = any(out[k] > max(POINTS) for k in axes)
    return tiles and all((sizes[k] or _USUAL) >= 6 for k in axes)


def cost(m: int, types: list[TensorType | None], attrs: Any) -> float:
    """Estimated microseconds per image on one thread, at the FMA rate and the memory rate of a
    typical core. m: 0 for the direct sum. Half of the time in which a transformed filter comes from
    memory is hidden; transforming it in place takes as long as the products of 3.5 tiles."""
    x, w = types[0], types[1]
    assert x is not None and w is not None
    windows = _windows(w, attrs)
    assert windows is not None
    o, c = const_int(w.shape[0]) or 1, const_int(w.shape[1]) or 1
    sizes = [const_int(s) or _USUAL for s in windows.output(x.shape[2:])]
    if m == 0:
        taps = math.prod(windows.kernel)
        return 2 * taps * o * c * math.prod(sizes) / 93e3 + 4 * taps * o * c / 15e3
    axes = transformed(windows)
    points = (m + 2) ** len(axes)
    taps = math.prod(k for axis, k in enumerate(windows.kernel) if axis not in axes)
    tiles = math.prod(-(-n // m) if axis in axes else n for axis, n in enumerate(sizes))
    each_tile = 2 * points * taps * o * c / 93e3
    filters = min(4 * points * taps * o * c / 15e3 / 2, 3.5 * each_tile)
    moved = (attrs.groups * c * 1.6 + o * 1.3) * points * len(axes) / 2
    return each_tile * tiles + filters + tiles * moved / 8e3


def build(m: int, in_pairs: bool = False) -> Any:
    """The compute of F(m, 3) along each axis that `transformed` names."""
    at, g, bt = matrices(m, in_pairs)
    a = m + 2
    # Transforms add and scale both numbers of a pair at once.
    opened, closed = (as_sum, as_halves) if in_pairs else (_same, _same)

    def winograd(x: te.Tensor, w: te.Tensor, *rest: Any) -> te.Tensor:
        bias, attrs = optional(rest)
        windows = attrs.windows("conv", tuple(const_int(s) for s in w.shape[2:]))
        axes = transformed(windows)
        n, c, *sizes = x.shape
        o, depth, rank = w.shape[0], len(axes), len(sizes)
        out = windows.output(sizes)
        tiles = {k: simplified(ceildiv(out[k], m)) for k in axes}
        others = [k for k in range(rank) if k not in axes]
        border = [windows.begin[k] if k in axes else 0 for k in range(rank)]

        def padded(b: Expr, k: Expr, *spatial: Expr) -> Expr:
            read = [i - border[axis] for axis, i in enumerate(spatial)]
            conds = [inside(read[axis], sizes[axis]) for axis in axes]
            return select(all_of(conds), opened(x[(b, k, *read)]), const(0, x.dtype))

        extents = [tiles[k] * m + 2 if k in axes else s for k, s in enumerate(sizes)]
        pad = te.compute((n, c, *extents), padded, "pad")

        def pixel(moved: tuple[Expr, ...], b: Expr, *at: Expr) -> Expr:
            *spatial, k = at
            for axis, i in zip(axes, moved, strict=True):
                spatial[axis] = spatial[axis] * m + i
            return pad[(b, k, *spatial)]

        counts = tuple(tiles.get(k, s) for k, s in enumerate(sizes))
        names = ("winograd_rows", "winograd_data")[-depth:]
        data = _transform(bt, depth * (a,), (n, *counts, c), pixel, names, closed)

        def weight(moved: tuple[Expr, ...], *at: Expr) -> Expr:
            *taps, f, k = at
            place = {**dict(zip(axes, moved, strict=True)), **dict(zip(others, taps, strict=True))}
            return opened(w[(f, k, *[place[axis] for axis in range(rank)])])

        kernel = tuple(w.shape[2 + k] for k in others)
        names = ("filter_rows", "filters")[-depth:]
        inputs, outputs = w.shape[1], simplified(o // attrs.groups)  # of a group
        filters = _transform(g, depth * (3,), (*kernel, o, inputs), weight, names, closed)
        taps, over = windows.taps()
        (channel,) = te.reduce_vars(1)

        def products(*i: Expr) -> Expr:
            points, (b, *spatial, f) = i[:depth], i[depth:]
            conds = []
            for k in others:
                spatial[k] = windows.position(k, spatial[k], taps[k]) - windows.begin[k]
                if windows.begin[k] or windows.end[k]:
                    conds.append(inside(spatial[k], sizes[k]))
            read = channel if attrs.groups == 1 else f // outputs * inputs + channel
            load = select(all_of(conds), data[(*points, b, *spatial, read)], const(0, x.dtype))
            factor = filters[(*points, *[taps[k] for k in others], f, channel)]
            return multiply(load, factor, in_pairs)

        summed = {channel: inputs, **{taps[k]: over[taps[k]] for k in others if taps[k] in over}}
        made = (n, *[tiles.get(k, s) for k, s in enumerate(out)], o)
        product = te.compute((*depth * (a,), *made), products, "products", reduce=("sum", summed))
        half = product
        if depth == 2:
            half = te.compute(
                (m, a, *made),
                lambda i, q, *rest: _combine(i, at, lambda p: product[(p, q, *rest)]),
                "winograd_half",
            )

        def result(b: Expr, f: Expr, *spatial: Expr) -> Expr:
            tile = [i // m if k in axes else i for k, i in enumerate(spatial)]
            *before, last = [spatial[k] % m for k in axes]
            total = _combine(last, at, lambda q: half[(*before, q, b, *tile, f)])
            if in_pairs:
                shift, inverse = _division(m, depth)
                total = binary("shr", total * const(inverse, int32), const(shift, int32))
            return total if bias is None else total + bias[f]

        return te.compute((n, o, *out), result, "conv")

    return winograd


def _same(e: Expr) -> Expr:
    return e


def _transform(
    matrix: Matrix,
    before: tuple[int, ...],
    rest: tuple[Expr, ...],
    read: Callable[..., Expr],
    names: Sequence[str],
    closed: Callable[[Expr], Expr],
) -> te.Tensor:
    """sum over i, j, .. of matrix[p, i] * matrix[q, j] * .. * read((i, j, ..), *rest), one axis
    after the other, which are stages of their own. closed: what the last one does with sums."""
    done: list[int] = []
    made = None
    for k, name in enumerate(names):
        earlier = made

        def body(*at: Expr, k: int = k, earlier: te.Tensor | None = earlier) -> Expr:
            points, others = at[: len(before)], at[len(before) :]

            def term(i: int) -> Expr:
                moved = (*points[:k], Const(i), *points[k + 1 :])
                return read(moved, *others) if earlier is None else earlier[(*moved, *others)]

            total = _combine(points[k], matrix, term)
            return closed(total) if k == len(names) - 1 else total

        done.append(len(matrix))
        made = te.compute((*done, *before[k + 1 :], *rest), body, name)
    assert made is not None
    return made
