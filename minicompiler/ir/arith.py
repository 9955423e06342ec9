"""Simplify and prove: integer index expressions as polynomials over atoms, with variable ranges.

`Arith(ranges)` knows `lo <= var <= hi` (both inclusive, both Exprs, `hi` may name Dims and outer
vars).

    a = Arith({b: (ZERO, Const(15))})
    a.simplify((16*x + b)//16)      x
    a.prove(b < 16)                 True      (False: never holds; None: undecided)
    a.bound(16*x + b, {b}, +1)      16*x + 15  (the largest value over b)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from math import gcd

from .bounds import bound
from .expr import (
    COMPARE,
    FALSE,
    TRUE,
    ZERO,
    Binary,
    Call,
    Const,
    Dim,
    Expr,
    Load,
    Select,
    Splat,
    Var,
    binary,
    const,
    fold,
    logical_not,
    select,
    walk,
)
from .polynomials import (
    Interval,
    Monomial,
    Poly,
    add,
    both,
    clean,
    div_bounds,
    divide,
    mul,
    mul_bounds,
    plus,
    subtract,
)
from .proofs import Patience, Prover, without_quotient
from .types import index

Ranges = Mapping[Expr, tuple[Expr, Expr]]
_ONE: Interval = (1, 1)


class Arith:
    """A simplifier under variable ranges. Results are memoised, so reuse one for a whole
    function."""

    def __init__(
        self,
        ranges: Ranges | None = None,
        facts: Iterable[Expr] = (),
        patience: Patience | None = None,
    ):
        """`facts`: bool expressions known to hold (comparisons over Dims and Vars). `patience`: for
        the proofs of several simplifiers together."""
        self.ranges: dict[Expr, tuple[Expr, Expr]] = dict(ranges or {})
        self._memo: dict[Expr, Expr] = {}
        self._polys: dict[Expr, Poly] = {}
        self._intervals: dict[Expr, Interval] = {}
        self._told: dict[Expr, Interval] = {}  # of atoms that are no variables, by facts
        self._prover = Prover(patience or Patience())
        self.facts: list[Poly] = []  # each polynomial is known to be >= 0
        facts = tuple(facts)
        if facts:  # Bounds are understood before facts about them, or each would ask for the other.
            for low, high in self.ranges.values():
                self.poly(low), self.poly(high)
        for fact in facts:
            self._learn(fact)

    def _learn(self, fact: Expr) -> None:
        if type(fact) is Binary and fact.op == "and":
            self._learn(fact.a)
            self._learn(fact.b)
        elif type(fact) is Binary and fact.op in ("lt", "le") and fact.a.dtype.is_int:
            poly = subtract(self.poly(fact.b), self.poly(fact.a))
            if fact.op == "lt":
                poly = plus(poly, -1)
            known: Poly | None = poly
            while known is not None and known not in self.facts:
                self.facts.append(known)
                self._narrow(known)
                self._prover.fact_added()
                known = without_quotient(self, known)

    def _narrow(self, fact: Poly) -> None:
        """A fact about one atom is its range. A positive product of some that are not negative:
        none of them is 0."""
        terms = [(m, c) for m, c in fact.items() if m]
        if len(terms) != 1:
            return
        (atoms, c) = terms[0]
        most = fact.get((), 0) // abs(c)
        if len(atoms) > 1:
            lows = [self.interval(a)[0] for a in atoms]
            if c < 0 or most >= 0 or any(low is None or low < 0 for low in lows):
                return
            most = -1
        for atom in atoms:
            if atom in self.ranges:
                low, high = self.ranges[atom]
                if c < 0 and type(high) is Const and high.value > most:
                    self.ranges[atom] = low, Const(most)
                elif c > 0 and type(low) is Const and low.value < -most:
                    self.ranges[atom] = Const(-most), high
            else:
                told = (None, most) if c < 0 else (-most, None)
                self._told[atom] = both(self._told.get(atom, (None, None)), told)
        self._intervals.clear()
        self._prover.range_changed()

    # ---- polynomials --------------------------------------------------------------------------
    def poly(self, e: Expr) -> Poly:
        """`e` as sum of coefficient * product of atoms; atoms are simplified non-linear terms."""
        found = self._polys.get(e)
        if found is None:
            found = self._polys[e] = self._poly(e)
        return found

    def _poly(self, e: Expr) -> Poly:
        if type(e) is Const:
            return {(): e.value} if e.value else {}
        if type(e) is Binary:
            if e.op == "add":
                return self.rejoin(add(self.poly(e.a), self.poly(e.b)))
            if e.op == "sub":
                return self.rejoin(subtract(self.poly(e.a), self.poly(e.b)))
            if e.op == "mul":
                return self.rejoin(mul(self.poly(e.a), self.poly(e.b)))
            if e.op in ("floordiv", "mod"):
                return self._divmod(e.op, self.poly(e.a), self.poly(e.b))
            if e.op in ("min", "max"):
                return self._minmax(e.op, self.poly(e.a), self.poly(e.b))
        if isinstance(e, Var):
            lo_hi = self.ranges.get(e)
            if lo_hi is not None and lo_hi[0] is lo_hi[1]:
                return self.poly(lo_hi[0])
            return {(e,): 1}
        if isinstance(e, Dim):
            return {(): e.lo} if e.lo == e.hi else {(e,): 1}
        simple = self.simplify(e)
        return {(simple,): 1} if simple is e or type(simple) is not Const else self.poly(simple)

    def rejoin(self, p: Poly) -> Poly:
        """x // d * d + x % d = x, with any common factor: what fusing two loops takes apart."""
        for m, c in p.items():
            for k, atom in enumerate(m):
                if type(atom) is not Binary or atom.op != "mod":
                    continue
                others = m[:k] + m[k + 1 :]
                quotient = self.poly(Binary("floordiv", atom.a, atom.b))
                want = mul(mul(quotient, self.poly(atom.b)), {others: c})
                # A quotient of several terms (or none) was taken apart already: nothing to join.
                if len(want) == 1 and all(p.get(n) == d for n, d in want.items()):
                    rest = {n: d for n, d in p.items() if n != m and n not in want}
                    return self.rejoin(add(rest, mul(self.poly(atom.a), {others: c})))
        return p

    def _divmod(self, op: str, p: Poly, q: Poly) -> Poly:
        if not p:
            return {}
        quotient, rest = divide(p, q)
        # Now p = q * quotient + rest; when 0 <= rest < q the answer is at hand.
        if not rest or (self.nonneg(rest) and self.nonneg(plus(subtract(q, rest), -1))):
            return quotient if op == "floordiv" else rest
        low = self.poly_interval(rest)
        if low[1] is not None and low[1] < 0 and self.nonneg(add(rest, q)):  # -q <= rest < 0
            return plus(quotient, -1) if op == "floordiv" else add(rest, q)
        if op == "floordiv" and len(rest) == 1:
            # (x // a) // b = x // (a * b)
            ((m, c),) = rest.items()
            if c == 1 and len(m) == 1 and type(m[0]) is Binary and m[0].op == "floordiv":
                inside = self._divmod(op, self.poly(m[0].a), mul(self.poly(m[0].b), q))
                return add(quotient, inside)
        divisor = q.get(()) if len(q) == 1 else None
        if divisor is not None and divisor > 1:
            # (g*r + s) / (g*d) with 0 <= s < g is r / d, and the remainder is g * (r % d) + s.
            for g in sorted({gcd(divisor, c) for m, c in rest.items() if m}, reverse=True):
                if g == 1:
                    break
                small = {m: c for m, c in rest.items() if m and c % g}
                if rest.get((), 0) % g:
                    small[()] = rest[()] % g
                low = self.poly_interval(small)
                if low[0] is None or low[1] is None or low[0] < 0 or low[1] >= g:
                    continue
                inner = clean({m: c // g for m, c in rest.items() if m not in small or not m})
                if op == "floordiv":
                    return add(quotient, self._divmod("floordiv", inner, {(): divisor // g}))
                scaled = self._divmod("mod", inner, {(): divisor // g})
                return add({m: c * g for m, c in scaled.items()}, small)
        atom = Binary(op, self.expr(rest), self.expr(q))
        return add(quotient, {(atom,): 1}) if op == "floordiv" else {(atom,): 1}

    def _minmax(self, op: str, p: Poly, q: Poly) -> Poly:
        diff = subtract(q, p)
        if self.nonneg(diff):  # p <= q
            return p if op == "min" else q
        if self.nonneg({m: -c for m, c in diff.items()}):
            return q if op == "min" else p
        a, b = sorted((self.expr(p), self.expr(q)), key=str)
        return {(Binary(op, a, b),): 1}

    def expr(self, p: Poly) -> Expr:
        """The canonical expression of a polynomial: sorted terms, positive first, constant last."""
        if not p:
            return ZERO
        result: Expr | None = None
        order = sorted(p.items(), key=lambda t: (t[0] == (), t[1] < 0, [str(a) for a in t[0]]))
        for m, c in order:
            if not m:
                if result is None:
                    result = Const(c)
                else:
                    result = (
                        Binary("add", result, Const(c))
                        if c > 0
                        else Binary("sub", result, Const(-c))
                    )
                continue
            term: Expr = m[0]
            for a in m[1:]:
                term = Binary("mul", term, a)
            size = abs(c)
            if size != 1:
                term = Binary("mul", term, Const(size))
            if result is None:
                result = (
                    term
                    if c > 0
                    else Binary("mul", term, Const(-1))
                    if size == 1
                    else _negated(m, c)
                )
            else:
                result = Binary("add" if c > 0 else "sub", result, term)
        assert result is not None
        return result

    # ---- simplify ------------------------------------------------------------------------------
    def simplify(self, e: Expr) -> Expr:
        """An equal expression in canonical form: equal integer polynomials become the same
        object."""
        done = self._memo.get(e)
        if done is None:
            done = self._memo[e] = self._simplify(e)
            self._memo[done] = done
        return done

    def _simplify(self, e: Expr) -> Expr:
        if isinstance(e, Const):
            return e
        if isinstance(e, Var | Dim):
            return self.expr(self.poly(e)) if e.dtype.is_int else e
        scalar_int = e.dtype is index  # other integers wrap around, and are data
        if type(e) is Binary:
            if scalar_int and e.op in ("add", "sub", "mul", "floordiv", "mod", "min", "max"):
                return self.expr(self.poly(e))
            if e.op in COMPARE and e.a.dtype is index:
                return self._compare(e)
        if type(e) is Select:
            cond = self.simplify(e.cond)
            if cond is TRUE:
                return self.simplify(e.a)
            if cond is FALSE:
                return self.simplify(e.b)
            return select(cond, self.simplify(e.a), self.simplify(e.b))
        if type(e) is Call and e.fn == "not":
            return logical_not(self.simplify(e.args[0]))
        if type(e) is Load and e.mask is not None and self.simplify(e.mask) is TRUE:
            return Load(e.buffer, tuple(map(self.simplify, e.indices)))
        return e.map(self.simplify)

    def _compare(self, e: Binary) -> Expr:
        decided = self.prove(e)
        if decided is not None:
            return TRUE if decided else FALSE
        # Canonical: all terms moved to one side, then split back by sign so it reads naturally.
        diff = subtract(self.poly(e.b), self.poly(e.a))
        if e.op in ("lt", "le"):
            diff = self._in_steps(diff, least=1 if e.op == "lt" else 0)
        factor = 0
        for c in diff.values():
            factor = gcd(factor, c)
        if factor > 1 and e.op != "lt":
            diff = {m: c // factor for m, c in diff.items()}
        right = {m: c for m, c in diff.items() if c > 0}
        left = {m: -c for m, c in diff.items() if c < 0}
        return binary(e.op, self.expr(left), self.expr(right))

    def _in_steps(self, diff: Poly, least: int) -> Poly:
        """16*q + s >= least is q >= least where 0 <= s - least < 16: what is less than a step, such
        as the lane of a vector, does not matter."""
        for g in sorted({abs(c) for m, c in diff.items() if m and abs(c) > 1}, reverse=True):
            small = {m: c for m, c in diff.items() if m and c % g}
            low, high = self.poly_interval(small)
            if not small or low is None or high is None or high - low >= g:
                continue
            rest = (diff.get((), 0) - least + low) % g  # of the constant, to what is small
            if rest + high - low < g:
                steps = {m: c // g for m, c in diff.items() if m and not c % g}
                return plus(steps, (diff.get((), 0) - least + low) // g + least)
        return diff

    # ---- bounds ---------------------------------------------------------------------------------
    def interval(self, e: Expr) -> Interval:
        """Numeric bounds of an integer expression; None on a side that is unbounded."""
        found = self._intervals.get(e)
        if found is None:
            self._intervals[e] = (None, None)  # cut cycles through ranges
            found = self._interval(e)
            if e in self._told:
                found = both(found, self._told[e])
            self._intervals[e] = found
        return found

    def _interval(self, e: Expr) -> Interval:
        if type(e) is Const:
            return e.value, e.value
        if isinstance(e, Dim):
            return e.lo, e.hi
        if isinstance(e, Var):
            lo_hi = self.ranges.get(e)
            if lo_hi is None:
                return None, None
            return self.interval(lo_hi[0])[0], self.interval(lo_hi[1])[1]
        if type(e) is Binary and e.dtype.is_int:
            if e.op in ("add", "sub", "mul"):
                return self.poly_interval(self.poly(e))
            (al, ah), (bl, bh) = self.interval(e.a), self.interval(e.b)
            if e.op == "floordiv" and bl is not None and bl > 0:
                return div_bounds((al, ah), (bl, bh))
            if e.op == "mod" and bl is not None and bl > 0:
                top = None if bh is None else bh - 1
                if al is not None and al >= 0 and ah is not None:
                    top = ah if top is None else min(top, ah)
                return 0, top
            if e.op == "min":
                highs = [h for h in (ah, bh) if h is not None]
                return (None if al is None or bl is None else min(al, bl)), min(highs, default=None)
            if e.op == "max":
                lows = [x for x in (al, bl) if x is not None]
                return max(lows, default=None), (None if ah is None or bh is None else max(ah, bh))
        if type(e) is Select:
            (al, ah), (bl, bh) = self.interval(e.a), self.interval(e.b)
            low = None if al is None or bl is None else min(al, bl)
            return low, (None if ah is None or bh is None else max(ah, bh))
        return None, None

    def poly_interval(self, p: Poly) -> Interval:
        """Numbers that a polynomial lies between (None: not bounded on that side)."""
        low: int | None = 0
        high: int | None = 0
        for m, c in p.items():
            term = _ONE
            for atom in m:
                found = self._intervals.get(atom) or self.interval(atom)
                term = found if term is _ONE else mul_bounds(term, found)
            lo, hi = term if c > 0 else term[::-1]
            low = None if low is None or lo is None else low + lo * c
            high = None if high is None or hi is None else high + hi * c
        if len(p) > 1 and () not in p:  # n*m - 2*n is n*(m - 2), which has a sign
            first, *others = p
            for shared in first:
                if all(shared in m for m in others):
                    rest: Poly = {}
                    for m, c in p.items():
                        k = m.index(shared)
                        rest[m[:k] + m[k + 1 :]] = c
                    factored = mul_bounds(self.interval(shared), self.poly_interval(rest))
                    return both((low, high), factored)
        return low, high

    def nonneg(self, p: Poly) -> bool:
        """True when the polynomial is known to be >= 0."""
        return self._prover.nonneg(self, p)

    def bound(self, e: Expr, over: Iterable[Expr], sign: int) -> Expr | None:
        """The largest (sign=+1) or smallest (-1) value of `e` when the variables `over` run through
        their ranges: an expression of the others, tight for affine `e`; None when not bounded."""
        return bound(self, e, over, sign)

    # ---- prove ----------------------------------------------------------------------------------
    def holds(self, cond: Expr) -> bool:
        """True when `prove` is; costs less where the answer is no, as nobody asks for the
        opposite."""
        if type(cond) is Binary and cond.op in ("le", "lt") and cond.a.dtype.is_int:
            if cond.a.dtype.lanes > 1:
                return False
            diff = subtract(self.poly(cond.b), self.poly(cond.a))
            return self.nonneg(diff if cond.op == "le" else plus(diff, -1))
        return self.prove(cond) is True

    def prove(self, cond: Expr) -> bool | None:
        """True: always holds in the ranges. False: never holds. None: not decided."""
        if type(cond) is Const:
            return bool(cond.value)
        if type(cond) is Call and cond.fn == "not":
            inner = self.prove(cond.args[0])
            return None if inner is None else not inner
        if type(cond) is Splat:
            return self.prove(cond.value)
        if type(cond) is not Binary:
            return None
        if cond.op in ("and", "or"):
            a, b = self.prove(cond.a), self.prove(cond.b)
            if cond.op == "and":
                return False if False in (a, b) else True if a and b else None
            return True if True in (a, b) else False if a is False and b is False else None
        if not cond.a.dtype.is_int or cond.a.dtype.lanes > 1:
            return None
        diff = subtract(self.poly(cond.b), self.poly(cond.a))
        negated = {m: -c for m, c in diff.items()}
        if cond.op == "le":
            return True if self.nonneg(diff) else False if self.nonneg(plus(negated, -1)) else None
        if cond.op == "lt":
            return True if self.nonneg(plus(diff, -1)) else False if self.nonneg(negated) else None
        if cond.op in ("eq", "ne"):
            equal: bool | None = None
            if not diff:
                equal = True
            elif self.nonneg(plus(diff, -1)) or self.nonneg(plus(negated, -1)):
                equal = False
            elif cond.op == "eq" or cond.op == "ne":
                factor = 0
                for m, c in diff.items():
                    factor = gcd(factor, c) if m else factor
                if factor > 1 and diff.get((), 0) % factor:
                    equal = False
            return equal if cond.op == "eq" or equal is None else not equal
        return None


# ---- what was found out before -------------------------------------------------------------------
_kept: ContextVar[dict[object, Arith] | None] = ContextVar("_kept", default=None)


@contextmanager
def keeping() -> Iterator[None]:
    """Inside, all that `knowing` finds out is kept. For one kernel: how soon a search for a proof
    is given up depends on those before it, so its code must not depend on other kernels."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def knowing(ranges: Ranges, facts: Iterable[Expr] = ()) -> Arith:
    """An `Arith` with all that those found out who asked for the same ranges and facts before. It
    must not be told more."""
    facts = tuple(facts)
    kept = _kept.get()
    if kept is None:
        return Arith(ranges, facts)
    key = (*ranges.items(), *facts)
    found = kept.get(key)
    if found is None:
        found = kept[key] = Arith(ranges, facts)
    return found


# ---- expressions ---------------------------------------------------------------------------------
def _negated(m: Monomial, c: int) -> Expr:
    term: Expr = m[0]
    for a in m[1:]:
        term = Binary("mul", term, a)
    return Binary("mul", term, Const(c))


def sizes(values: Iterable[Expr], env: Mapping[str, int]) -> tuple[int, ...]:
    """Shapes as numbers, given a value for every Dim by name. Raises KeyError for a missing one."""
    return tuple(evaluate_int(v, env) for v in values)


def evaluate_int(e: Expr, env: Mapping[str, int]) -> int:
    """The value of an index expression, given numbers for its Dims and Vars by name."""
    if type(e) is Const:
        return int(e.value)
    if isinstance(e, Dim | Var):
        return env[e.name]
    if type(e) is Binary:
        value = fold(e.op, evaluate_int(e.a, env), evaluate_int(e.b, env), e.dtype)
        if value is None:
            raise ZeroDivisionError(str(e))
        return int(value)
    if type(e) is Call and e.fn == "not":
        return int(not evaluate_int(e.args[0], env))
    if type(e) is Select:
        return evaluate_int(e.a if evaluate_int(e.cond, env) else e.b, env)
    raise TypeError(f"not an index expression: {e}")


def dims_of(values: Iterable[Expr]) -> list[Dim]:
    """The distinct Dims in some expressions, by name."""
    found = {d for v in values for d in walk(v) if isinstance(d, Dim)}
    return sorted(found, key=lambda d: d.name)


def zero_of(e: Expr) -> Expr:
    """The zero of an expression's type."""
    return const(0, e.dtype)
