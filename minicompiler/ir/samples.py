"""Sample points: assignments of numbers to dimensions, variables and data, to refute claims.

    Samples().refute(arith, {(x,): 1, (): -3})      True where x may be below 3

What is false needs no attempt at a proof, and attempts that fail are the expensive ones. The points
differ in how large dimensions are beside each other, and in where variables stand in their ranges.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from zlib import crc32

from .expr import Binary, Const, Dim, Expr, Select, Var, fold
from .polynomials import Poly

if TYPE_CHECKING:
    from .arith import Arith

# Per point: how far dimensions lie above their least value (None: each elsewhere, by its name), how
# many sixths of its range a variable has gone through (None: all or nothing), and what data is.
_POINTS: tuple[tuple[int | None, int | None, int], ...] = (
    (0, 0, 0),
    (0, 6, -(1 << 20)),
    (36, 6, 1 << 20),
    (5, 3, -(1 << 20)),
    (2, None, 1),
    (10_000, 3, 2),  # sizes that are halved five times still differ from 1
    (None, 2, 36),
)
_UNKNOWN = ("shl", "shr", "pow")  # nothing is known of their results, as of data


class Samples:
    """The values of expressions at each point, as far as they were asked for."""

    def __init__(self) -> None:
        self._values: tuple[dict[Expr, int | None], ...] = tuple({} for _ in _POINTS)
        self._valid: list[bool | None] = [None] * len(_POINTS)  # whether all facts hold there

    def fact_added(self) -> None:
        """Other points may satisfy all facts now."""
        self._valid = [None] * len(_POINTS)

    def range_changed(self) -> None:
        """The points lie elsewhere."""
        for values in self._values:
            values.clear()

    def refute(self, arith: Arith, p: Poly) -> bool:
        """True when p < 0 at a point that lies inside of the ranges and satisfies the facts."""
        for k, valid in enumerate(self._valid):
            if valid is None:
                valid = all((self._poly_at(arith, f, k) or 0) >= 0 for f in arith.facts)
                self._valid[k] = valid
            if valid:
                value = self._poly_at(arith, p, k)
                if value is not None and value < 0:
                    return True
        return False

    def _poly_at(self, arith: Arith, p: Poly, k: int) -> int | None:
        total = 0
        for m, c in p.items():
            for atom in m:
                value = self._at(arith, atom, k)
                if value is None:
                    return None
                c *= value
            total += c
        return total

    def _at(self, arith: Arith, e: Expr, k: int) -> int | None:
        """The value of an expression at point k; None when it has none (an empty range)."""
        known = self._values[k]
        if e in known:
            return known[e]
        known[e] = None  # cut cycles through ranges
        above, sixths, data = _POINTS[k]
        value: int | None = None
        if type(e) is Const:
            value = e.value
        elif isinstance(e, Dim):
            value = e.lo + (1 + crc32(e.name.encode()) % 512 if above is None else above)
            value -= value % e.multiple_of
            value = max(e.lo, value if e.hi is None else min(value, e.hi))
        elif isinstance(e, Var) and e in arith.ranges:
            low, high = (self._at(arith, b, k) for b in arith.ranges[e])
            if low is not None and high is not None and low <= high:
                part = len(e.name) % 2 * 6 if sixths is None else sixths
                value = low + (high - low) * part // 6
        elif type(e) is Binary and e.op not in _UNKNOWN:
            a, b = self._at(arith, e.a, k), self._at(arith, e.b, k)
            if a is not None and b is not None:
                value = fold(e.op, a, b, e.a.dtype)
        elif type(e) is Select:
            cond = self._at(arith, e.cond, k)
            value = None if cond is None else self._at(arith, e.a if cond else e.b, k)
        elif e.dtype.is_int and e.dtype.lanes == 1:  # data: any number that it may be
            low, high = arith.interval(e)
            value = data if low is None else max(data, low)
            value = value if high is None else min(value, high)
        known[e] = value
        return value
