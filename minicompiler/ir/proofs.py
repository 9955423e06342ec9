"""The search for proofs: is a polynomial never negative, while variables run through their ranges?

    Prover().nonneg(arith, {(x,): 16, (): 3})      True, where x >= 0

A claim is first refuted at a few points of the ranges; then variables are replaced by their bounds,
quotients, minima and maxima by what they are known to be, and known facts are subtracted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from math import gcd
from typing import TYPE_CHECKING

from .bounds import eliminate
from .expr import ZERO, Binary, Const, Dim, Expr, free_vars, walk
from .polynomials import (
    Interval,
    Monomial,
    Poly,
    add,
    add_bounds,
    clean,
    mul,
    mul_bounds,
    plus,
    subtract,
)
from .samples import Samples

if TYPE_CHECKING:
    from .arith import Arith

_MOST_ATOMS = 16  # quotients, minima and maxima in a claim that is taken apart
_FEW = 3  # terms in a claim that is multiplied by a divisor: each quotient may lead to another one
_LONG = 16  # steps after which a claim is probably false: few that were proved took more
_GIVEN_UP = 1 << 30  # terms: of a search for what turned out to be false


class Patience:
    """How much a search for a proof may cost, in terms of the polynomials it looks at: half as much
    after each search that used all of it in vain. So all of them together cost little."""

    MOST, LEAST = 4000, 200  # of 26,700 searches three found a proof after 200

    def __init__(self, terms: int = MOST) -> None:
        self.terms = terms

    def lost(self) -> None:
        """A search used all of it."""
        self.terms = max(self.terms // 2, self.LEAST)


class Prover:
    """What one `Arith` remembers of its proofs: above all, what did not lead to one."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._with_fact = False
        # (polynomial, _with_fact): the smallest depth at which no proof of >= 0 was found.
        self._unproved: dict[tuple[frozenset[tuple[Monomial, int]], bool], int] = {}
        self._steps = 0  # of the search for a proof that goes on
        self._terms = 0  # that it looked at
        self._claim: Poly = {}  # what it is for
        self._samples = Samples()

    def fact_added(self) -> None:
        """What had no proof may have one now."""
        self._samples.fact_added()
        self._unproved.clear()

    def range_changed(self) -> None:
        """The sample points lie elsewhere."""
        self._samples.range_changed()

    def nonneg(self, arith: Arith, p: Poly, depth: int = 0) -> bool:
        """True when the polynomial is known to be >= 0."""
        if _never_negative(arith, p) or p in arith.facts:
            return True
        if depth > 6 or all(not m for m in p):
            return False
        # Terms can be bounded in any order, and all orders of a subset end at the same polynomial.
        key = frozenset(p.items()), self._with_fact
        if depth >= self._unproved.get(key, 7):
            return False
        if self._samples.refute(arith, p) or not self._may_go_on(arith, p):
            return False
        outermost = not self._steps
        if outermost:
            self._claim = p
        self._steps += 1
        self._terms += len(p)
        try:
            if self._proved(arith, p, depth):
                return True
        finally:
            if outermost:
                if self._patience.terms < self._terms < _GIVEN_UP:
                    self._patience.lost()
                self._steps = self._terms = 0
        self._unproved[key] = depth
        return False

    def _may_go_on(self, arith: Arith, p: Poly) -> bool:
        """Whether the search shall look at one more polynomial."""
        if self._terms > self._patience.terms:
            return False
        if self._steps == _LONG and self._samples.refute_at_more(arith, self._claim):
            self._terms = _GIVEN_UP
        return self._steps < _LONG or not self._samples.refute_at_more(arith, p)

    def _proved(self, arith: Arith, p: Poly, depth: int) -> bool:
        """`nonneg` where numbers alone do not decide."""
        if not depth and any(_never_negative(arith, q) for q in _less_facts(arith, p)):
            return True  # a fact that says it: the search below may come to it late
        low = _least(arith, p)
        if low is not None and low >= 0:
            return True
        many = sum(any(type(a) is Binary for a in m) for m in p) > _MOST_ATOMS
        if many and (fewer := _without_lonely(arith, p)) != p:
            return self.nonneg(arith, fewer, depth + 1)
        # Eliminate the innermost variable by its symbolic bound (innermost: not in another's
        # range).
        for v in _elimination_order(arith, p):
            r = eliminate(arith, p, v)
            if r is not None and r != p and self.nonneg(arith, r, depth + 1):
                return True
        if many:
            return False  # what follows has two cases for each
        if any(self.nonneg(arith, q, depth + 1) for q in _without_pair(arith, p)):
            return True
        exact = without_quotient(arith, p)
        if exact is not None and self.nonneg(arith, exact, depth + 1):
            return True
        # A quotient or remainder of loop variables by a Dim lies within its symbolic bounds.
        for m, c in p.items():
            for k, atom in enumerate(m):
                if type(atom) is Binary and (
                    atom.op == "floordiv" or (atom.op == "mod" and type(atom.b) is not Const)
                ):
                    over = [v for v in free_vars(atom) if v in arith.ranges]
                    others = {m[:k] + m[k + 1 :]: c}
                    low, high = arith.poly_interval(others)
                    sign = (
                        -1
                        if low is not None and low >= 0
                        else 1
                        if high is not None and high <= 0
                        else 0
                    )
                    if not sign:
                        continue
                    if atom.op == "mod":
                        limit: Expr | None = ZERO if sign < 0 else atom.b - 1
                    else:
                        limit = arith.bound(atom, over, sign) if over else None
                    if limit is not None and limit is not atom:
                        rest = {n: d for n, d in p.items() if n != m}
                        if self.nonneg(arith, add(rest, mul(others, arith.poly(limit))), depth + 1):
                            return True
        for m, c in sorted(p.items(), key=_clamped_variables, reverse=True):
            for k, atom in enumerate(m):
                if type(atom) is Binary and atom.op == "floordiv" and type(atom.b) is Const:
                    if any(self.nonneg(arith, q, depth + 1) for q in _unrounded(arith, p, m, k)):
                        return True
                elif type(atom) is Binary and atom.op in ("min", "max"):
                    # min(a, b) <= a and <= b; max(a, b) >= a and >= b: use where the sign allows,
                    # otherwise both cases must hold.
                    rest = {n: k2 for n, k2 in p.items() if n != m}
                    others = mul({m[:k] + m[k + 1 :]: 1}, {(): c})
                    if not _never_negative(arith, {m[:k] + m[k + 1 :]: 1}):
                        continue
                    cases = [add(rest, mul(others, arith.poly(side))) for side in (atom.a, atom.b)]
                    easy = (atom.op == "max") == (c > 0)
                    if (any if easy else all)(self.nonneg(arith, q, depth + 1) for q in cases):
                        return True
                    # Twice the max is at least a + b: |x| = max(x, -x) >= 0.
                    if easy and self.nonneg(arith, add(cases[0], cases[1]), depth + 1):
                        return True
        return self._from_facts(arith, p, depth)

    def _from_facts(self, arith: Arith, p: Poly, depth: int) -> bool:
        """True when one fact and the ranges give p >= 0, or two facts add up to it."""
        if not arith.facts or self._with_fact or depth > 3:
            return False
        self._with_fact = True  # what is asked on the way must not ask for facts again
        try:
            return any(self.nonneg(arith, q, depth + 3) for q in _less_facts(arith, p))
        finally:
            self._with_fact = False


def _less_facts(arith: Arith, p: Poly) -> Iterator[Poly]:
    """Polynomials of which p >= 0 follows by a fact where one of them is >= 0."""
    for f in arith.facts:
        # As many times the fact as makes one of its terms vanish from p.
        times = {p[m] // c for m, c in f.items() if m and m in p and p[m] % c == 0}
        # ... or as often as a quotient in it divides by, so that x // d * d stands beside x.
        times |= {
            a.b.value
            for m in f
            for a in m
            if type(a) is Binary and a.op == "floordiv" and type(a.b) is Const
        }
        for k in sorted(times):
            if k > 0:
                yield add(p, {m: -c * k for m, c in f.items()})
        # k*p > f - k gives p > -1, and p is an integer.
        times = {c // p[m] for m, c in f.items() if m and m in p and c % p[m] == 0}
        for k in sorted(times):
            if k > 1:
                scaled = {m: c * k for m, c in p.items()}
                yield plus(subtract(scaled, f), k - 1)
        # A fact times n + k, where that is not negative.
        for n in sorted({a for m in p if len(m) > 1 for a in m if type(a) is Dim}, key=str):
            rest = subtract(p, mul(f, {(n,): 1}))
            if len(rest) < len(p):
                times = {rest[m] // c for m, c in f.items() if m in rest and rest[m] % c == 0}
                for k in sorted(times):
                    if n.lo + k >= 0:
                        yield subtract(rest, mul(f, {(): k}))


def _never_negative(arith: Arith, p: Poly) -> bool:
    """Whether numeric bounds alone say that p >= 0."""
    low = arith.poly_interval(p)[0]
    return low is not None and low >= 0


def _least(arith: Arith, p: Poly) -> int | None:
    """What a polynomial is not less than, by numeric bounds that are tighter than those of its
    terms: each atom is counted from its least value, so that n*m - n - m + 1 has no negative term
    where n, m >= 1, and n*m - n is n*(m - 1)."""
    more = {a for m, c in p.items() if c > 0 for a in m}
    if any(c < 0 and m and more.isdisjoint(m) for m, c in p.items()):
        return None  # nothing makes up for this term
    spans = {a: arith.interval(a) for m in p for a in m}
    counted: Poly = {}
    for m, c in p.items():
        term: Poly = {(): c}
        for a in m:
            term = mul(term, clean({(a,): 1, (): spans[a][0] or 0}))
        counted = add(counted, term)
    spans = {
        a: span if span[0] is None else (0, None if span[1] is None else span[1] - span[0])
        for a, span in spans.items()
    }
    return _horner(counted, spans)[0]


def _horner(p: Poly, spans: Mapping[Expr, Interval]) -> Interval:
    """Bounds of a polynomial, the atom that most of its terms share taken out of them first."""
    uses = Counter(a for m in p for a in dict.fromkeys(m))
    if not uses:
        return p.get((), 0), p.get((), 0)
    atom = max(uses, key=uses.__getitem__)
    inside: Poly = {}
    others: Poly = {}
    for m, c in p.items():
        if atom in m:
            k = m.index(atom)
            inside[m[:k] + m[k + 1 :]] = c
        else:
            others[m] = c
    return add_bounds(mul_bounds(spans[atom], _horner(inside, spans)), _horner(others, spans))


def without_quotient(arith: Arith, p: Poly) -> Poly | None:
    """A polynomial that is >= 0 exactly when p is, with one quotient less; None when there is
    none. g*(x // d) + r >= 0 is x + (r // g)*d >= 0, and r >= g*(x // d) is (r // g + 1)*d >
    x. Quotients of loop variables go first: where x // w < (h + 1)//2, it is x that is
    compared with the product of two sizes."""
    quotients = _quotients(p)
    if len(quotients) > 1:
        quotients.sort(key=lambda t: arith.ranges.keys().isdisjoint(free_vars(t[0])))
        # One inside of another goes after it: (x//3*3 + y)//5 + x//3 < 5 is x//3*8 + y < 25.
        inside = {x for a, _ in quotients for x in walk(a) if x is not a}
        quotients.sort(key=lambda t: t[0] in inside)
    for atom, c in quotients:
        d = arith.poly(atom.b)
        low = arith.poly_interval(d)[0]
        rest = {n: k for n, k in p.items() if n != (atom,)}
        g = abs(c)
        if low is None or low <= 0:
            low = _least(arith, d)
        positive = (low is not None and low > 0) or plus(d, -1) in arith.facts
        if not positive or any(k % g for n, k in rest.items() if n):
            continue
        rest = clean({n: k // g for n, k in rest.items()})
        x = arith.poly(atom.a)
        if c > 0:
            return arith.rejoin(add(x, mul(rest, d)))
        return arith.rejoin(subtract(plus(mul(plus(rest, 1), d), -1), x))
    return None


def _quotients(p: Poly) -> list[tuple[Binary, int]]:
    """The terms of a polynomial that are a number times a quotient."""
    return [
        (atom, c)
        for (*others, atom), c in ((m, c) for m, c in p.items() if m)
        if not others and type(atom) is Binary and atom.op == "floordiv"
    ]


def _unrounded(arith: Arith, p: Poly, m: Monomial, k: int) -> Iterator[Poly]:
    """`p` without the quotient at place k of a term, times the divisor where that is needed:
    c * (x // d) lies between c/d * (x - d + 1) and c/d * x, and is at least c where x >= d."""
    c, atom = p[m], m[k]
    assert type(atom) is Binary and type(atom.b) is Const
    d, others = atom.b.value, {m[:k] + m[k + 1 :]: 1}
    if d <= 0 or (c % d and (len(m) == 1 or len(p) > _FEW)) or not _never_negative(arith, others):
        return
    times = d // gcd(c, d)
    rest = {n: size * times for n, size in p.items() if n != m}
    x = arith.poly(atom.a)
    near = plus(x, 1 - d) if c > 0 else x
    yield add(rest, mul({(): c * times // d}, mul(others, near)))
    if c > 0 and len(p) <= _FEW and arith.holds(atom.b <= atom.a):
        yield add(rest, mul({(): c * times}, others))


def _without_pair(arith: Arith, p: Poly) -> Iterator[Poly]:
    """`p` with the least that x // d - k * (y // (k*d)) is where x >= y, and that its negative is
    where x <= y, instead of them (d > 0)."""
    quotients = _quotients(p)
    for x, c in quotients:
        least = _least(arith, arith.poly(x.b)) if len(quotients) > 1 else None
        if least is None or least <= 0:
            continue
        for y, d in quotients:
            k = -d // c
            if x is y or k <= 0 or d % c or arith.poly(y.b) != mul(arith.poly(x.b), {(): k}):
                continue
            if arith.holds(y.a <= x.a if c > 0 else x.a <= y.a):
                rest = {m: n for m, n in p.items() if m not in ((x,), (y,))}
                yield plus(rest, 0 if c > 0 else c * (k - 1))


def _without_lonely(arith: Arith, p: Poly) -> Poly:
    """The least numbers for terms of sizes that stand in no other term and bound no variable: of
    the sizes of many parts only that of the part in question matters."""
    names = {m: frozenset[Expr]().union(*map(free_vars, m)) for m in p}
    every = frozenset[Expr]().union(*names.values())
    bounds = [free_vars(b) for v in every for b in arith.ranges.get(v, ())]
    uses = Counter(v for own in (*names.values(), *bounds) for v in own)
    made: Poly = {}
    for m, c in p.items():
        low = arith.poly_interval({m: c})[0]
        lonely = all(uses[v] == 1 and v not in arith.ranges for v in names[m])
        made = plus(made, low) if lonely and low is not None else add(made, {m: c})
    return made


def _clamped_variables(term: tuple[Monomial, int]) -> int:
    """Of how many variables a minimum or maximum is: a sum in one may cancel the terms beside it,
    while it takes two cases each to bound those first."""
    return max((len(free_vars(a)) for a in term[0] if _is_clamp(a)), default=0)


def _is_clamp(e: Expr) -> bool:
    return type(e) is Binary and e.op in ("min", "max")


def _elimination_order(arith: Arith, p: Poly) -> list[Expr]:
    names = {a for m in p for a in m if a in arith.ranges}
    inner = []
    for v in names:
        used = any(v in free_vars(b) for w in names if w is not v for b in arith.ranges[w])
        if not used:
            inner.append(v)
    return sorted(inner, key=str)
