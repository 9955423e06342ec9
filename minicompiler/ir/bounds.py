"""Bounds: the largest or smallest value of an expression while variables run through their ranges.

bound(arith, 16*x + b, {b}, +1)          16*x + 15, where 0 <= b <= 15
eliminate(arith, {(x,): 1, (b,): -2}, b)  the polynomial x - 30: x - 2*b at its smallest
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .expr import ONE, ZERO, Binary, Const, Expr, Select, binary, free_vars
from .polynomials import Poly, add, mul

if TYPE_CHECKING:
    from .arith import Arith


def bound(arith: Arith, e: Expr, over: Iterable[Expr], sign: int) -> Expr | None:
    """The largest (sign=+1) or smallest (-1) value of `e` when the variables `over` run through
    their ranges: an expression of the others, tight for affine `e`; None when not bounded."""
    over = frozenset(over)
    e = arith.simplify(e)
    # Innermost first: a variable whose range mentions another in `over` goes before it. Only
    # those that `e` reaches, through the ranges, take part.
    reached: set[Expr] = set()
    queue = [v for v in free_vars(e) if v in over]
    while queue:
        v = queue.pop()
        if v not in reached:
            reached.add(v)
            queue.extend(w for b in arith.ranges.get(v, ()) for w in free_vars(b) if w in over)
    remaining = sorted(reached, key=str)
    while not over.isdisjoint(free_vars(e)):
        ready = [
            v
            for v in remaining
            if not any(
                v in free_vars(b)
                for w in remaining
                if w is not v and w in arith.ranges
                for b in arith.ranges[w]
            )
        ]
        if not ready:
            return None
        for v in ready:
            remaining.remove(v)
            bounded = _bound_one(arith, e, v, sign)
            if bounded is None:
                return None
            e = arith.simplify(bounded)
    return e


def _bound_side(arith: Arith, e: Expr, v: Expr, sign: int) -> Expr | None:
    """i*n + min(n, t - i*n) is at most t: a bound by way of one side of a minimum (or of a
    maximum, for the smallest value)."""
    p = arith.poly(e)
    for m, c in p.items():
        (x,) = m if len(m) == 1 else (None,)
        if type(x) is not Binary or x.op != ("min" if c * sign > 0 else "max"):
            continue
        if v not in free_vars(x):
            continue
        for side in (x.b, x.a):
            rest = arith.simplify(e + (side - x) * c)
            bounded = _bound_one(arith, rest, v, sign)
            if bounded is not None and v not in free_vars(bounded):
                return bounded
    return None


def _bound_one(arith: Arith, e: Expr, v: Expr, sign: int) -> Expr | None:
    if v not in free_vars(e):
        return e
    if v not in arith.ranges:
        return None
    if e is v:
        return arith.ranges[v][1 if sign > 0 else 0]
    if type(e) is Binary and e.op in ("floordiv", "mod", "min", "max"):
        if v not in free_vars(e.b) or e.op in ("min", "max"):
            if e.op == "mod":
                low, high = bound(arith, e.a, (v,), -1), bound(arith, e.a, (v,), 1)
                if low is not None and high is not None and type(e.b) is Const:
                    same = arith.simplify(low // e.b - high // e.b)
                    if same is ZERO:  # v never wraps around
                        return (high if sign > 0 else low) % e.b
                return e.b - 1 if sign > 0 else ZERO
            a = _bound_one(arith, e.a, v, sign)
            b = _bound_one(arith, e.b, v, sign) if e.op in ("min", "max") else e.b
            if a is None or b is None:
                return None
            return binary(e.op, a, b)
        return None
    if type(e) is Select:
        a, b = _bound_one(arith, e.a, v, sign), _bound_one(arith, e.b, v, sign)
        if a is None or b is None:
            return None
        return binary("max" if sign > 0 else "min", a, b)
    if type(e) is Binary and e.op in ("add", "sub", "mul"):
        p = arith.poly(e)
        flipped = {m: -c for m, c in p.items()} if sign > 0 else p
        r = eliminate(arith, flipped, v)
        if r is not None:
            return arith.expr({m: -c for m, c in r.items()} if sign > 0 else r)
        # Not plainly affine in v: bound each term on its own (looser, still sound).
        total: Expr = ZERO
        for m, c in p.items():
            if len(m) > 1 and any(v in free_vars(a) for a in m):
                return _bound_side(arith, e, v, sign)
            term = m[0] if m else ONE
            if len(m) > 1:
                term = arith.expr({m: 1})
            b = _bound_one(arith, term, v, sign if c > 0 else -sign)
            if b is None:
                return None
            total = total + b * c
        return total
    least, most = arith.interval(e)
    side = most if sign > 0 else least
    return None if side is None else Const(side)


def eliminate(arith: Arith, p: Poly, v: Expr) -> Poly | None:
    """`p` minimised over v, when v stands only as a plain factor with a sign-definite
    coefficient."""
    lo, hi = arith.ranges[v]
    plo, phi = arith.poly(lo), arith.poly(hi)
    result: Poly = {}
    coeff: Poly = {}
    for m, c in p.items():
        count = m.count(v)
        if count == 0:
            if any(v in free_vars(a) for a in m):
                return None
            result[m] = c
        elif count == 1:
            rest = list(m)
            rest.remove(v)
            if any(v in free_vars(a) for a in rest):
                return None
            coeff[tuple(rest)] = coeff.get(tuple(rest), 0) + c
        else:
            return None
    low, high = arith.poly_interval(coeff)
    if low is not None and low >= 0:
        return arith.rejoin(add(result, mul(coeff, plo)))
    if high is not None and high <= 0:
        return arith.rejoin(add(result, mul(coeff, phi)))
    return None
