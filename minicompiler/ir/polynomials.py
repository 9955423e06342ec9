"""Polynomials over atoms, and intervals: the arithmetic that `Arith` reasons with.

{(x,): 16, (): 3}          16*x + 3        atoms are expressions that no rule takes apart
(0, None)                  0 .. infinity
"""

from __future__ import annotations

from .expr import Expr

Monomial = tuple[Expr, ...]  # sorted atoms; () is the constant term
Poly = dict[Monomial, int]
Interval = tuple[int | None, int | None]


# ---- polynomials --------------------------------------------------------------------------------
def clean(p: Poly) -> Poly:
    return {m: c for m, c in p.items() if c}


def subtract(p: Poly, q: Poly) -> Poly:
    """p - q"""
    return add(p, {m: -c for m, c in q.items()})


def plus(p: Poly, value: int) -> Poly:
    q = dict(p)
    total = q.get((), 0) + value
    if total:
        q[()] = total
    else:
        q.pop((), None)
    return q


def add(p: Poly, q: Poly) -> Poly:
    if not p:
        return q
    if not q:
        return p
    r = dict(p)
    for m, c in q.items():
        total = r.get(m, 0) + c
        if total:
            r[m] = total
        else:
            del r[m]
    return r


def mul(p: Poly, q: Poly) -> Poly:
    r: Poly = {}
    for m, c in p.items():
        for n, d in q.items():
            k = tuple(sorted(m + n, key=str)) if m and n else m or n
            r[k] = r.get(k, 0) + c * d
    return clean(r)


def divide(p: Poly, q: Poly) -> tuple[Poly, Poly]:
    """quotient, rest with p = q * quotient + rest, taking out every term that divides exactly."""
    if len(q) != 1:
        return _divide_by_sum(p, q)
    ((mq, cq),) = q.items()
    quotient: Poly = {}
    rest: Poly = {}
    for m, c in p.items():
        left = list(m)
        exact = True
        for a in mq:
            if a in left:
                left.remove(a)
            else:
                exact = False
                break
        if not exact:
            rest[m] = c
            continue
        k = c // cq if cq > 0 else 0
        if c % cq and m != () and mq == ():
            k = 0 if abs(c) < cq else c // cq
        if k:
            quotient[tuple(left)] = k
        if c - k * cq:
            rest[m] = c - k * cq
    return quotient, rest


def _divide_by_sum(p: Poly, q: Poly) -> tuple[Poly, Poly]:
    """The same where q has several terms: long division by its leading one. What is left are terms
    of p; where others would appear, nothing is taken out."""
    if not q or len(q) > len(p):
        return {}, p
    first = _leading(q)
    quotient: Poly = {}
    rest: Poly = {}
    left = p
    while left:
        m = _leading(left)
        k, over = divide({m: left[m]}, {first: q[first]})
        if over or not k:
            if left[m] != p.get(m):
                return {}, p
            rest[m] = left[m]
            left = {n: c for n, c in left.items() if n != m}
            continue
        quotient = add(quotient, k)
        left = add(left, {n: -c for n, c in mul(k, q).items()})
    return quotient, rest


def _leading(p: Poly) -> Monomial:
    """The largest monomial: by degree, then by the alphabet."""
    degree = max(map(len, p))
    return min((m for m in p if len(m) == degree), key=lambda m: [str(a) for a in m])


# ---- intervals ----------------------------------------------------------------------------------
def both(a: Interval, b: Interval) -> Interval:
    """The values that lie in two intervals."""
    (al, ah), (bl, bh) = a, b
    low = bl if al is None else al if bl is None else max(al, bl)
    return low, bh if ah is None else ah if bh is None else min(ah, bh)


def add_bounds(a: Interval, b: Interval) -> Interval:
    low, high = ((None if x is None or y is None else x + y) for x, y in zip(a, b, strict=True))
    return low, high


def mul_bounds(a: Interval, b: Interval) -> Interval:
    (al, ah), (bl, bh) = a, b
    if al is not None and al >= 0 and bl is not None and bl >= 0:
        return al * bl, (0 if ah == 0 or bh == 0 else None if ah is None or bh is None else ah * bh)
    if None in (al, ah, bl, bh):
        return None, None
    corners = [x * y for x in (al, ah) for y in (bl, bh)]  # type: ignore[operator]
    return min(corners), max(corners)


def div_bounds(a: Interval, b: Interval) -> Interval:
    (al, ah), (bl, bh) = a, b
    assert bl is not None
    low = None if al is None else al // bl if al < 0 else (0 if bh is None else al // bh)
    high = None if ah is None else ah // bl if ah >= 0 else (-1 if bh is None else ah // bh)
    return low, high
