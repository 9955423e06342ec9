"""Layouts are index maps: where the element at a logical index lies in memory.

    NCHW16c = IndexMap.make(4, lambda n, c, h, w: (n, c // 16, h, w, c % 16))
    NCHW16c.apply((n, c, h, w))            the physical indices
    NCHW16c.physical_shape((1, 20, 7, 7))  (1, 2, 7, 7, 16): the last block is padded
    NCHW16c.padded_shape((1, 20, 7, 7))    (1, 32, 7, 7): logical indices that have memory

Each physical dimension is `axis`, `axis // f`, `axis % f` or `axis // f % g` with constant factors,
or a sum of such terms. The content of padding is unspecified: nothing may depend on it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

from .arith import Arith
from .expr import Binary, Const, Expr, Var, ceildiv, free_vars, substitute, wrap


@dataclasses.dataclass(frozen=True, slots=True)
class IndexMap:
    """logical index -> physical index. `exprs` are over the canonical variables `d0`, `d1`, ..."""

    rank: int
    exprs: tuple[Expr, ...]

    @staticmethod
    def make(rank: int, f: Callable[..., Sequence[Expr]]) -> IndexMap:
        """The map that takes `rank` logical indices to `f` of them."""
        return IndexMap(rank, tuple(Arith().simplify(wrap(e)) for e in f(*axes(rank))))

    @staticmethod
    def identity(rank: int) -> IndexMap:
        """Row-major order of the logical axes."""
        return IndexMap(rank, axes(rank))

    @staticmethod
    def blocked(rank: int, axis: int, factor: int) -> IndexMap:
        """`axis` cut into blocks of `factor`, the position in the block innermost (NCHW16c)."""
        d = axes(rank)
        outer = [x // factor if k == axis else x for k, x in enumerate(d)]
        return IndexMap(rank, (*outer, d[axis] % factor))

    @staticmethod
    def permuted(order: Sequence[int]) -> IndexMap:
        """Axes stored in the given order, outermost first."""
        d = axes(len(order))
        return IndexMap(len(order), tuple(d[k] for k in order))

    @property
    def is_identity(self) -> bool:
        return self.exprs == axes(self.rank)

    def apply(self, indices: Sequence[Expr]) -> tuple[Expr, ...]:
        """Physical indices of a logical index."""
        mapping: dict[Expr, Expr] = dict(zip(axes(self.rank), indices, strict=True))
        return tuple(substitute(e, mapping) for e in self.exprs)

    @functools.lru_cache(maxsize=1024)  # noqa: B019 (layouts are few, and small)
    def physical_shape(self, shape: tuple[Expr | int, ...]) -> tuple[Expr, ...]:
        """Extents in memory, padding included."""
        arith = _arith(shape)
        over = axes(self.rank)
        result: list[Expr] = []
        for e in self.exprs:
            if type(e) is Binary and e.op == "mod" and type(e.b) is Const:
                result.append(e.b)
                continue
            top = arith.bound(e, over, +1)
            if top is None:
                raise ValueError(f"physical index `{e}` of a layout has no bound")
            result.append(arith.simplify(top + 1))
        return tuple(result)

    @functools.lru_cache(maxsize=1024)  # noqa: B019
    def padded_shape(self, shape: tuple[Expr | int, ...]) -> tuple[Expr, ...]:
        """Logical extents rounded up to what the memory holds."""
        arith = _arith(shape)
        result = []
        for axis, extent in zip(axes(self.rank), shape, strict=True):
            factor = self.factor(axis)
            padded = wrap(extent) if factor == 1 else ceildiv(extent, factor) * factor
            result.append(arith.simplify(padded))
        return tuple(result)

    def factor(self, axis: Expr) -> int:
        """The block size of a logical axis (1: not blocked)."""
        sizes = [
            e.b.value
            for e in self.exprs
            if type(e) is Binary and e.op == "mod" and type(e.b) is Const and e.a is axis
        ]
        return max(sizes, default=1)

    @functools.lru_cache(maxsize=1024)  # noqa: B019
    def splits(self) -> tuple[tuple[int, int, int], ...]:
        """Per physical dimension: (logical axis, divisor, modulus or 0), as in axis // divisor %
        modulus. Raises ValueError for a dimension that mixes axes."""
        d = axes(self.rank)
        result = []
        for e in self.exprs:
            modulus, divisor = 0, 1
            if type(e) is Binary and e.op == "mod" and type(e.b) is Const:
                modulus, e = e.b.value, e.a
            if type(e) is Binary and e.op == "floordiv" and type(e.b) is Const:
                divisor, e = e.b.value, e.a
            if e not in d:
                raise ValueError(f"physical dimension `{e}` is not a part of one logical axis")
            result.append((d.index(e), divisor, modulus))
        return tuple(result)

    def __str__(self) -> str:
        return f"({', '.join(map(str, axes(self.rank)))}) -> ({', '.join(map(str, self.exprs))})"


def axes(rank: int) -> tuple[Var, ...]:
    """The canonical logical index variables d0 .. d(rank-1)."""
    return tuple(Var(f"d{k}") for k in range(rank))


def _arith(shape: Sequence[Expr | int]) -> Arith:
    ranges: dict[Expr, tuple[Expr, Expr]] = {}
    for v, extent in zip(axes(len(shape)), shape, strict=True):
        ranges[v] = (Const(0), wrap(extent) - 1)
    return Arith(ranges)


def mentions(e: Expr, axis: int) -> bool:
    """True when a physical index expression depends on logical axis number `axis`."""
    return Var(f"d{axis}") in free_vars(e)
