"""Places in one piece of memory for values that are alive at different times.

    place([Lifetime(0, 2, n * 4), Lifetime(1, 3, n * 8)])    -> Placement: offsets, and bytes in all

Values alive together never overlap, whatever the sizes of dimensions: largest first, each value
takes the lowest place that is proved to be free, else

    offset_i = max over earlier-placed j alive with i of (offset_j + aligned(size_j))
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Sequence

from minicompiler.ir.arith import Arith, dims_of, evaluate_int
from minicompiler.ir.expr import ZERO, Binary, Dim, Expr, Var, ceildiv, maximum, walk

ALIGN = 64
# A coefficient of this many bytes is rounded up to ALIGN on its own, which wastes at most 6 %.
_COARSE = 1024
# Places that are free for some sizes, but not proved so for all: how many proofs are tried.
_TRIES = 8
# Proofs split cases at these operations, so their time grows exponentially with the number.
_HARD = ("floordiv", "mod", "min", "max")
_HARD_LIMIT = 2
# What an unlimited dimension is taken for where placement must guess.
_GUESS = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Lifetime:
    """A buffer of `size` bytes, alive from call `start` to call `end`, both included."""

    start: int
    end: int
    size: Expr


@dataclasses.dataclass(frozen=True)
class Placement:
    """Offsets of the buffers, and the bytes they need in all.

    named: variables that offsets and total use, each with its value (over dims and earlier ones).
    """

    offsets: tuple[Expr, ...]
    named: tuple[tuple[Var, Expr], ...]
    total: Expr


def place(buffers: Sequence[Lifetime]) -> Placement:
    """Offsets at which no two buffers that are alive together overlap, for any dimensions."""
    return _Placer(buffers).run()


class _Order:
    """Which of some sizes are below others: at two samples of the dimensions, or proved."""

    def __init__(self, arith: Arith, sizes: Sequence[Expr]) -> None:
        self.arith = arith
        dims = dims_of(sizes)
        self.samples = [{d.name: _sample(d, most) for d in dims} for most in (False, True)]
        self.seen: dict[Expr, tuple[int, int]] = {}

    def may(self, a: Expr, b: Expr) -> bool:
        """False when `a <= b` fails at a sample, so that a proof is not worth trying."""
        return all(x <= y for x, y in zip(self.values(a), self.values(b), strict=True))

    def below(self, a: Expr, b: Expr) -> bool:
        """True when `a <= b` is proved. Not tried where that could take long."""
        if not self.may(a, b):
            return False
        atoms = [atom for monomial in self.arith.poly(b - a) for atom in monomial]
        hard = sum(type(x) is Binary and x.op in _HARD for atom in atoms for x in walk(atom))
        return hard <= _HARD_LIMIT and self.arith.holds(a <= b)

    def highest(self, ends: Iterable[Expr]) -> Expr:
        """The maximum, without those proved to be below another."""
        kept: list[Expr] = []
        for e in sorted(set(ends), key=lambda e: (-self.values(e)[1], str(e))):
            if not any(self.below(e, k) for k in kept):
                kept.append(e)
        return _maximum(kept)

    def values(self, e: Expr) -> tuple[int, int]:
        """The value at small and at large dimensions."""
        found = self.seen.get(e)
        if found is None:
            low, high = (_value(e, sample) for sample in self.samples)
            found = self.seen[e] = low, high
        return found


class _Placer(_Order):
    def __init__(self, buffers: Sequence[Lifetime]) -> None:
        self.buffers = buffers
        arith = Arith()
        self.sizes = [aligned(b.size, arith) for b in buffers]
        super().__init__(arith, self.sizes)
        self.named: list[tuple[Var, Expr]] = []

    def run(self) -> Placement:
        offsets: dict[int, Expr] = {}
        ends: dict[int, Expr] = {}
        order = sorted(
            range(len(self.buffers)),
            key=lambda i: (-self.values(self.sizes[i])[1], self.buffers[i].start),
        )
        for i in order:
            b = self.buffers[i]
            rivals = [
                j for j in offsets
                if self.buffers[j].start <= b.end and b.start <= self.buffers[j].end
            ]  # fmt: skip
            taken = [(offsets[j], ends[j]) for j in rivals]
            offsets[i] = self.offset(self.sizes[i], taken)
            ends[i] = self.arith.simplify(offsets[i] + self.sizes[i])
        total = self.highest(ends.values())
        return Placement(
            tuple(offsets[i] for i in range(len(self.buffers))), tuple(self.named), total
        )

    def offset(self, size: Expr, taken: Sequence[tuple[Expr, Expr]]) -> Expr:
        """The lowest place for `size` bytes outside of the taken ranges."""
        places = sorted(
            {ZERO, *[end for _, end in taken]}, key=lambda e: (self.values(e)[1], str(e))
        )
        samples = [
            _Ranges([(self.values(low)[k], self.values(high)[k]) for low, high in taken])
            for k in range(len(self.samples))
        ]
        tries = 0
        for start in places:
            here = zip(samples, self.values(start), self.values(size), strict=True)
            if any(ranges.meet(low, low + length) for ranges, low, length in here):
                continue
            end = start + size
            if any(not (self.may(end, low) or self.may(high, start)) for low, high in taken):
                continue
            if all(self.below(end, low) or self.below(high, start) for low, high in taken):
                return start
            tries += 1
            if tries == _TRIES:
                break
        above = self.highest(high for _, high in taken)
        if type(above) is Binary and above.op == "max":
            # Named, so that expressions do not grow with the number of buffers below.
            name = Var(f"${len(self.named)}")
            self.named.append((name, above))
            self.seen[name] = self.values(above)
            for sample, value in zip(self.samples, self.seen[name], strict=True):
                sample[name.name] = value
            return name
        return above


class _Ranges:
    """Ranges of numbers, to be asked many times whether one of them meets another one."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        ordered = sorted(ranges)
        self.lows = [low for low, _ in ordered]
        self.reach = [*itertools.accumulate((high for _, high in ordered), max)]

    def meet(self, low: int, high: int) -> bool:
        before = bisect.bisect_left(self.lows, high)  # those that begin below `high`
        return before > 0 and self.reach[before - 1] > low


def _value(e: Expr, sample: dict[str, int]) -> int:
    """A size at some dimensions; 0 where there is none, because guards refuse such a call."""
    try:
        return evaluate_int(e, sample)
    except ZeroDivisionError:
        return 0


def aligned(size: Expr, arith: Arith) -> Expr:
    """At least `size`, and a multiple of ALIGN.

    A polynomial where that wastes little, because it is easy to prove: 4000*n becomes 4032*n.
    """
    poly = arith.poly(size)
    lows = [arith.interval(atom)[0] for monomial in poly for atom in monomial]
    if all(c % ALIGN == 0 or c >= _COARSE for c in poly.values()) and all(
        low is not None and low >= 0 for low in lows
    ):
        return arith.expr({m: -(-c // ALIGN) * ALIGN for m, c in poly.items()})
    return arith.simplify(ceildiv(size, ALIGN) * ALIGN)


def _sample(d: Dim, most: bool) -> int:
    step = d.multiple_of
    low = -(-d.lo // step) * step
    if not most:
        return low
    high = d.hi if d.hi is not None else max(d.lo, _GUESS * step)
    return max(low, high // step * step)


def largest(sizes: Sequence[Expr]) -> Expr:
    """The maximum of some sizes, simplified."""
    arith = Arith()
    simple = [arith.simplify(s) for s in sizes]
    return _Order(arith, simple).highest(simple)


def _maximum(sizes: list[Expr]) -> Expr:
    """The maximum as a balanced tree, so that no recursion over it runs deep."""
    while len(sizes) > 1:
        pairs = [sizes[k : k + 2] for k in range(0, len(sizes), 2)]
        sizes = [maximum(*p) if len(p) == 2 else p[0] for p in pairs]
    return sizes[0] if sizes else ZERO
