"""Pooling over any number of spatial axes of x[n, c, ...]; all take PoolAttrs.

    max_pool(x; kernel=(3, 3), strides=(2, 2), pads_begin=(1, 1), pads_end=(1, 1))

Global pooling is a reduction over the spatial axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import mul
from typing import Any

import numpy as np

from .. import te
from ..ir.expr import (
    Const,
    Expr,
    all_of,
    binary,
    ceildiv,
    const,
    const_int,
    eq,
    product,
    select,
)
from ..ir.op import Arg, Op, Precision, register
from ..ir.types import TensorType, int64
from .draws import FLOATS, Draw, array, choice, flag, integer
from .elementwise import magnitude
from .rules import (
    direct,
    fail,
    float32_inside,
    inside,
    lowest,
    need_dtype,
    need_rank,
    number,
    result,
    simplified,
    widened,
)
from .windows import Windows, np_counts, np_padded, np_windows, padded

Array = np.ndarray


@dataclass(frozen=True)
class PoolAttrs:
    """Per spatial axis; () stands for 1 (pads: 0) on every axis.

    ceil_mode: windows that start inside the input but run over its end count too.
    count_include_pad: an average divides by the positions in the padding as well.
    p: the exponent of lp_pool.
    """

    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    pads_begin: tuple[int, ...] = ()
    pads_end: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    ceil_mode: bool = False
    count_include_pad: bool = False
    p: int = 2

    def windows(self, op: str) -> Windows:
        return Windows.of(
            op,
            len(self.kernel),
            self.kernel,
            self.strides,
            self.pads_begin,
            self.pads_end,
            self.dilations,
            self.ceil_mode,
        )


def _infer(name: str, kinds: str) -> Callable[[Arg, PoolAttrs], TensorType]:
    def infer(x: Arg, a: PoolAttrs) -> TensorType:
        need_dtype(name, x, kinds)
        rank = need_rank(name, x, 3)
        if len(a.kernel) != rank - 2:
            fail(f"{name}: the kernel {a.kernel} does not fit the spatial axes of {x.type}")
        if a.p < 1:
            fail(f"{name}: the norm of order {a.p} does not exist")
        spatial = a.windows(name).check(name, x.type.shape[2:], x.type)
        return result((*x.type.shape[:2], *spatial), x.type.dtype)

    return infer


def _pooled(
    x: te.Tensor, w: Windows, combiner: str, value: Expr, f: Callable[[Expr], Expr] = lambda e: e
) -> te.Tensor:
    """`combiner` of f(element) over each window; positions outside x hold `value`."""
    source = padded(x, 2, w, value)
    taps, over = w.taps()

    def body(n: Expr, c: Expr, *i: Expr) -> Expr:
        at = [w.position(k, out, taps[k]) for k, out in enumerate(i)]
        return f(source[(n, c, *at)])

    shape = (*x.shape[:2], *w.output(x.shape[2:]))
    return te.compute(shape, body, f"{combiner}_pool", (combiner, over))


def _samples(*dtypes: str) -> Callable[[Draw], tuple[list[Array], PoolAttrs]]:
    def samples(draw: Draw) -> tuple[list[Array], PoolAttrs]:
        rank = choice(draw, (1, 2, 2, 3))
        kernel = tuple(integer(draw, 1, 3) for _ in range(rank))
        dilations = tuple(integer(draw, 1, 2) for _ in range(rank)) if flag(draw) else ()
        pads = flag(draw)
        a = PoolAttrs(
            kernel,
            tuple(integer(draw, 1, 3) for _ in range(rank)) if flag(draw) else (),
            # A window that lies in the padding only has no defined average.
            tuple(integer(draw, 0, k - 1) for k in kernel) if pads else (),
            tuple(integer(draw, 0, k - 1) for k in kernel) if pads else (),
            dilations,
            flag(draw),
            flag(draw),
            choice(draw, (1, 2, 3)),
        )
        spatial = [(k - 1) * 2 + integer(draw, 1, 4) for k in kernel]
        of = (integer(draw, 1, 2), integer(draw, 1, 2), *spatial)
        return [array(draw, of, choice(draw, dtypes))], a

    return samples


def _np_view(x: Array, a: PoolAttrs, name: str, value: float) -> tuple[Array, tuple[int, ...]]:
    """(windows over the padded array, the axes of their taps)."""
    w = a.windows(name)
    view = np_windows(np_padded(x, 2, w, value), 2, w, np_counts(w, x.shape[2:]))
    return view, tuple(range(2 + w.rank, 2 + 2 * w.rank))


# ---- max_pool -----------------------------------------------------------------------------------
def _max_compute(x: te.Tensor, a: PoolAttrs) -> te.Tensor:
    return _pooled(x, a.windows("max_pool"), "max", lowest(x.dtype))


def _max_reference(x: Array, a: PoolAttrs) -> Array:
    low = -np.inf if x.dtype.kind not in "iu" else np.iinfo(x.dtype).min
    view, taps = _np_view(x, a, "max_pool", low)
    return np.asarray(view.max(axis=taps))


max_pool = register(
    Op(
        "max_pool",
        PoolAttrs,
        _infer("max_pool", "fi"),
        direct(_max_compute),
        float32_inside(_max_reference),
        _samples(*FLOATS, "int8", "uint8"),
    )
)


# ---- max_pool_indices ---------------------------------------------------------------------------
@dataclass(frozen=True)
class IndexedPoolAttrs(PoolAttrs):
    """columns: positions are counted with the first spatial axis innermost (column-major)."""

    columns: bool = False


def _indexed_infer(x: Arg, a: IndexedPoolAttrs) -> tuple[TensorType, TensorType]:
    t = _infer("max_pool", "fi")(x, a)
    return t, TensorType(t.shape, int64)


def _indexed_compute(x: te.Tensor, a: IndexedPoolAttrs) -> tuple[te.Tensor, te.Tensor]:
    """The maximum, and the first position in the whole of x where it stands."""
    w = a.windows("max_pool")
    low = lowest(x.dtype)
    largest = _pooled(x, w, "max", low)
    source = padded(x, 2, w, low)
    taps, over = w.taps()
    sizes = x.shape[2:]

    def body(n: Expr, c: Expr, *i: Expr) -> Expr:
        at = [w.position(k, out, taps[k]) for k, out in enumerate(i)]
        own = [p - b for p, b in zip(at, w.begin, strict=True)]
        flat = n * x.shape[1] + c
        pairs = list(zip(own, sizes, strict=True))
        if a.columns:
            flat = flat * product(sizes)
            step: Expr = Const(1)
            for p, size in pairs:
                flat, step = flat + p * step, step * size
        else:
            for p, size in pairs:
                flat = flat * size + p
        found = binary("and", eq(source[(n, c, *at)], largest[(n, c, *i)]), _within(pairs))
        return select(found, flat, Const((1 << 62) - 1))

    return largest, te.compute(largest.shape, body, "positions", ("min", over))


def _within(pairs: list[tuple[Expr, Expr]]) -> Expr:
    return all_of(inside(p, size) for p, size in pairs)


def _indexed_reference(x: Array, a: IndexedPoolAttrs) -> tuple[Array, Array]:
    low = -np.inf if x.dtype.kind not in "iu" else np.iinfo(x.dtype).min
    view, taps = _np_view(x, a, "max_pool", low)
    flat: Array = np.arange(np.prod(x.shape[2:]))
    flat = flat.reshape(x.shape[:1:-1]).T if a.columns else flat.reshape(x.shape[2:])
    first = np.arange(x.shape[0] * x.shape[1]).reshape(*x.shape[:2], *[1] * flat.ndim)
    where, _ = _np_view(first * flat.size + flat, a, "max_pool", 1 << 62)
    largest = np.asarray(view.max(axis=taps))
    hit = view == largest.reshape(*largest.shape, *[1] * len(taps))
    return largest, np.where(hit, where, 1 << 62).min(axis=taps)


def _indexed_samples(draw: Draw) -> tuple[list[Array], IndexedPoolAttrs]:
    xs, a = _samples("float32", "int8")(draw)
    return xs, IndexedPoolAttrs(**dataclasses.asdict(a), columns=flag(draw))


max_pool_indices = register(
    Op(
        "max_pool_indices",
        IndexedPoolAttrs,
        _indexed_infer,
        direct(_indexed_compute),
        _indexed_reference,
        _indexed_samples,
    )
)


# ---- avg_pool -----------------------------------------------------------------------------------
def _count(w: Windows, k: int, out: Expr, size: Expr, include: bool) -> Expr:
    """How many taps of window `out` along axis k count for the average."""
    taps, dilation = w.kernel[k], w.dilations[k]
    low, high = (-w.begin[k], size + w.end[k]) if include else (Const(0), size)
    start = out * w.strides[k] - w.begin[k]

    def before(limit: Any) -> Expr:
        """Taps at positions below `limit`."""
        return binary("max", binary("min", ceildiv(limit - start, dilation), taps), 0)

    return before(high) if include else before(high) - before(low)


def _avg_compute(x: te.Tensor, a: PoolAttrs) -> te.Tensor:
    w = a.windows("avg_pool")
    source = widened(x)
    total = _pooled(source, w, "sum", const(0, source.dtype))
    sizes = x.shape[2:]
    plain = not (any(w.begin) or any(w.end)) or a.count_include_pad

    def body(n: Expr, c: Expr, *i: Expr) -> Expr:
        # Numbers per axis: the product of integers would be one per element.
        counts = [
            Const(w.kernel[k])
            if plain and not _runs_over(w, k, sizes[k])
            else _count(w, k, out, sizes[k], a.count_include_pad)
            for k, out in enumerate(i)
        ]
        return total[(n, c, *i)] / reduce(mul, [number(n, source.dtype) for n in counts])

    return te.astype(te.compute(total.shape, body, "avg_pool"), x.dtype)


def _runs_over(w: Windows, k: int, size: Expr) -> bool:
    """True where the last window may leave the padded input (with ceil_mode only)."""
    if not w.ceil_mode:
        return False
    last = (w.output((size,) * w.rank)[k] - 1) * w.strides[k] + w.span(k)
    spare = const_int(simplified(size + (w.begin[k] + w.end[k]) - last))
    return spare is None or spare < 0


def _avg_reference(x: Array, a: PoolAttrs) -> Array:
    w = a.windows("avg_pool")
    view, taps = _np_view(x, a, "avg_pool", 0)
    ones = np.ones_like(x)
    if a.count_include_pad:
        ones = np.pad(ones, [(0, 0), (0, 0), *zip(w.begin, w.end, strict=True)], constant_values=1)
        ones = np.pad(ones, [(0, 0), (0, 0), *((0, s) for s in w.strides)])
    else:
        ones = np_padded(ones, 2, w, 0)
    counts = np_windows(ones, 2, w, np_counts(w, x.shape[2:])).sum(axis=taps)
    return np.asarray(view.sum(axis=taps) / counts)


avg_pool = register(
    Op(
        "avg_pool",
        PoolAttrs,
        _infer("avg_pool", "f"),
        direct(_avg_compute),
        float32_inside(_avg_reference),
        _samples(*FLOATS),
        precision=Precision.FLOAT32_INSIDE,
    )
)


# ---- lp_pool ------------------------------------------------------------------------------------
def _lp_compute(x: te.Tensor, a: PoolAttrs) -> te.Tensor:
    source = widened(x)

    def term(e: Expr) -> Expr:
        if a.p == 2:
            return e * e
        return magnitude(e) if a.p == 1 else binary("pow", magnitude(e), float(a.p))

    total = _pooled(source, a.windows("lp_pool"), "sum", const(0, source.dtype), term)
    if a.p == 1:
        return te.astype(total, x.dtype)
    if a.p == 2:
        return te.astype(te.sqrt(total), x.dtype)
    root = te.map_elements(lambda e: binary("pow", e, 1 / a.p), total, name="lp_pool")
    return te.astype(root, x.dtype)


def _lp_reference(x: Array, a: PoolAttrs) -> Array:
    view, taps = _np_view(x, a, "lp_pool", 0)
    return np.asarray((np.abs(view) ** a.p).sum(axis=taps) ** (1 / a.p))


lp_pool = register(
    Op(
        "lp_pool",
        PoolAttrs,
        _infer("lp_pool", "f"),
        direct(_lp_compute),
        float32_inside(_lp_reference),
        _samples(*FLOATS),
        precision=Precision.FLOAT32_INSIDE,
    )
)
