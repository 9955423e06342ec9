"""Sample points: assignments of numbers to dimensions, variables and data, to refute claims.

    Samples().refute(arith, {(x,): 1, (): -3})      True where x may be below 3

What is false needs no attempt at a proof, and attempts that fail are the expensive ones. The points
differ in how large dimensions are beside each other, and in where variables stand in their ranges.
Known facts hold at few of them, perhaps at none: for a claim that would be costly there are more,
where every number is drawn.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import islice
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
_MORE = 100  # points that are drawn
_ENOUGH = 8  # of those, where all facts hold
_UNKNOWN = ("shl", "shr", "pow")  # nothing is known of their results, as of data


class Samples:
    """The values of expressions at each point, as far as they were asked for."""

    def __init__(self) -> None:
        self._values: defaultdict[int, dict[Expr, int | None]] = defaultdict(dict)
        self._valid: list[bool | None] = [None] * len(_POINTS)  # whether all facts hold there
        self._order = list(range(len(_POINTS)))  # the one that refuted last comes first
        self._drawn: list[int] | None = None

    def fact_added(self) -> None:
        """Other points may satisfy all facts now."""
        self._valid = [None] * len(_POINTS)
        self._drawn = None

    def range_changed(self) -> None:
        """The points lie elsewhere."""
        self._values.clear()

    def refute(self, arith: Arith, p: Poly) -> bool:
        """True when p < 0 at a point that lies inside of the ranges and satisfies the facts."""
        for place, k in enumerate(self._order):
            valid = self._valid[k]
            if valid is None:
                valid = all((self._poly_at(arith, f, k) or 0) >= 0 for f in arith.facts)
                self._valid[k] = valid
            if valid and (self._poly_at(arith, p, k) or 0) < 0:
                self._order.insert(0, self._order.pop(place))
                return True
        return False

    def refute_at_more(self, arith: Arith, p: Poly) -> bool:
        """The same at points that are drawn."""
        if self._drawn is None:
            every = range(len(_POINTS), len(_POINTS) + _MORE)
            holds = (k for k in every if all(self._holds(arith, f, k) for f in arith.facts))
            self._drawn = list(islice(holds, _ENOUGH))
        return any((self._poly_at(arith, p, k) or 0) < 0 for k in self._drawn)

    def _holds(self, arith: Arith, fact: Poly, k: int) -> bool:
        value = self._poly_at(arith, fact, k)
        return value is not None and value >= 0

    def _poly_at(self, arith: Arith, p: Poly, k: int) -> int | None:
        total, known = 0, self._values[k]
        for m, c in p.items():
            for atom in m:
                value = known[atom] if atom in known else self._at(arith, atom, k)
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
        value: int | None = None
        if type(e) is Const:
            value = e.value
        elif isinstance(e, Dim):
            value = e.lo + _above(e.name, k)
            value -= value % e.multiple_of
            value = max(e.lo, value if e.hi is None else min(value, e.hi))
        elif isinstance(e, Var) and e in arith.ranges:
            low, high = (self._at(arith, b, k) for b in arith.ranges[e])
            if low is not None and high is not None and low <= high:
                value = low + _inside(e.name, high - low, k)
        elif type(e) is Binary and e.op not in _UNKNOWN:
            a, b = self._at(arith, e.a, k), self._at(arith, e.b, k)
            if a is not None and b is not None:
                value = fold(e.op, a, b, e.a.dtype)
        elif type(e) is Select:
            cond = self._at(arith, e.cond, k)
            value = None if cond is None else self._at(arith, e.a if cond else e.b, k)
        elif e.dtype.is_int and e.dtype.lanes == 1:  # data: any number that it may be
            low, high = arith.interval(e)
            data = _POINTS[k][2] if k < len(_POINTS) else _draw(str(e), k)
            value = data if low is None else max(data, low)
            value = value if high is None else min(value, high)
        known[e] = value
        return value


def _above(name: str, k: int) -> int:
    """How far a dimension lies above its least value at point k."""
    if k >= len(_POINTS):
        return _draw(name, k) % (2 << k % 10)
    above = _POINTS[k][0]
    return 1 + crc32(name.encode()) % 512 if above is None else above


def _inside(name: str, room: int, k: int) -> int:
    """How far a variable has gone through its range at point k."""
    if k >= len(_POINTS):
        return _draw(name, k) % (room + 1)
    sixths = _POINTS[k][1]
    return room * (len(name) % 2 * 6 if sixths is None else sixths) // 6


def _draw(name: str, k: int) -> int:
    """Any number, the same one each time."""
    return crc32(f"{name} {k}".encode())
