"""Trigonometric and hyperbolic functions and their inverses, as expressions in float64.

    FUNCTIONS["sin"](x)     an expression; float32 is computed here too, and rounded at the end
    FLOAT32["sin"](x)       the same for a float32, with fewer steps; 1.25 ulp for atan

Largest errors in ulp for float64: sin, cos 1, tan 2 (for |x| <= 2**40, NaN beyond 2**45; a float32
may be of any size), asin, acos, atan 2, sinh, cosh 3, asinh, acosh, atanh 3. Polynomials of fdlibm
(Sun Microsystems, 1993); large float32 arguments are reduced as by M. Payne and R. Hanek (1983).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from minicompiler.ir.expr import (
    Call,
    Cast,
    Expr,
    binary,
    cast,
    const,
    eq,
    minimum,
    ne,
    select,
)
from minicompiler.ir.types import float32, float64, int64, uint32, uint64

from .llvm_math import (
    absolute,
    bits,
    exp,
    expm1,
    fast_sum,
    fma,
    horner,
    log,
    log1p,
    rarely_above,
    with_sign,
)  # fmt: skip

# pi/2 as the sum of three float64.
_HALF_PI = (1.5707963267948966, 6.123233995736766e-17, -1.4973849048591698e-33)
_LARGE = 2.0**40
# The first 224 bits of 2/pi behind the point.
_TWO_OVER_PI = (
    0xA2F9836E, 0x4E441529, 0xFC2757D1, 0xF534DDC0, 0xDB629599, 0x3C439041, 0xFE5163AB,
)  # fmt: skip


# ---- reduction to |r| <= pi/4 -------------------------------------------------------------------
def _reduced(x: Expr) -> tuple[Expr, Expr, Expr]:
    """(n, r, low) with x = n*pi/2 + r + low, |r| <= pi/4; n as the low bits of an int64."""
    shift = 6755399441055744.0
    t = fma(x, const(2 / math.pi, float64), shift)
    n = t - shift
    high, middle, last = [const(-c, float64) for c in _HALF_PI]
    first = fma(n, high, x)  # exact
    r = fma(n, middle, first)
    low = fma(n, last, fma(n, middle, first - r))
    r = select(absolute(x) < 2.0**45, r, const(math.nan, float64))
    quadrant = bits(t, int64)
    if type(x) is not Cast or x.a.dtype is not float32:
        return quadrant, r, low
    # A float32 beyond 2**40: its 24 bits times those 96 bits of 2/pi that do not make whole turns.
    q2, r2 = _large(x.a)
    large = binary("le", _LARGE, absolute(x))
    large = binary("and", large, absolute(x) < math.inf)
    zero = const(0.0, float64)
    return select(large, q2, quadrant), select(large, r2, r), select(large, zero, low)


def _large(x: Expr) -> tuple[Expr, Expr]:
    """The quadrant and the rest of a float32 of at least 2**40."""
    raw = cast(bits(absolute(x), uint32), uint64)
    mantissa = binary("or", binary("and", raw, 0x7FFFFF), 0x800000)
    # x = mantissa * 2**s. Bits of 2/pi with weights above 2**(1 - s) give multiples of 4.
    skipped = minimum(binary("shr", raw, 23), 254) - (127 + 23 + 2)
    word = binary("shr", skipped, 5)
    pairs = [const(_TWO_OVER_PI[k] << 32 | _TWO_OVER_PI[k + 1], uint64) for k in range(6)]

    def chosen(values: list[Expr]) -> Expr:
        result = values[-1]
        for k in range(len(values) - 2, -1, -1):
            result = select(eq(word, k), values[k], result)
        return result

    high, low = chosen(pairs[:4]), chosen(pairs[2:])
    by = binary("and", skipped, 31)
    top = binary("or", binary("shl", high, by), binary("shr", binary("shr", low, 1), 63 - by))
    tail = binary("shr", binary("shl", low, by), 32)
    # A quarter of the turns: the two top bits are the quadrant.
    turns = mantissa * top + binary("shr", mantissa * tail, 32)
    quadrant = binary("shr", turns + (1 << 61), 62)
    rest = bits(turns - binary("shl", quadrant, 62), int64)
    size = cast(rest, float64) * (math.pi / 2 * 2.0**-62)
    negative = x < 0.0
    q = bits(quadrant, int64)
    zero = const(0, int64)
    return select(negative, zero - q, q), select(negative, const(0.0, float64) - size, size)


def _sin_near(r: Expr, low: Expr) -> Expr:
    """sin(r + low) for |r| <= pi/4."""
    z = r * r
    p = horner(
        z, 1.58969099521155010221e-10, -2.50507602534068634195e-08, 2.75573137070700676789e-06,
        -1.98412698298579493134e-04, 8.33333333332248946124e-03,
    )  # fmt: skip
    cube = z * r
    # sin r + low * cos r, where cos r is 1 - z/2
    correction = fma(z, const(0.0, float64) - (low * 0.5), low)
    return r + fma(cube, fma(z, p, -1.66666666666666324348e-01), correction)


def _cos_near(r: Expr, low: Expr) -> Expr:
    z = r * r
    p = horner(
        z, -1.13596475577881948265e-11, 2.08757232129817482790e-09, -2.75573143513906633035e-07,
        2.48015872894767294178e-05, -1.38888888888741095749e-03, 4.16666666666666019037e-02,
    )  # fmt: skip
    half = z * 0.5
    w = 1.0 - half
    return w + ((1.0 - w) - half + fma(z * z, p, const(0.0, float64) - r * low))


def _wave(x: Expr, turn: int) -> Expr:
    """sin(x + turn * pi/2)."""
    n, r, low = _reduced(x)
    n = n + turn if turn else n
    odd = ne(binary("and", n, 1), 0)
    value = select(odd, _cos_near(r, low), _sin_near(r, low))
    return select(ne(binary("and", n, 2), 0), const(0.0, float64) - value, value)


def sin(x: Expr) -> Expr:
    return select(eq(x, 0.0), x, _wave(x, 0))


def cos(x: Expr) -> Expr:
    return _wave(x, 1)


# ---- sin, cos of float32 ------------------------------------------------------------------------
# sin(r)/r in powers of r*r for |r| <= pi/2 with 1 fixed, minimax: relative error 2**-35.3
# (tests/codegen/test_minimax.py finds them again).
SIN = (
    -2.3888908550544317e-08, 2.752538438341884e-06, -1.9840868209100717e-04,
    8.333331108597105e-03, -1.6666666626149507e-01, 1.0,
)  # fmt: skip


def _wave32(x: Expr, turn: int) -> Expr:
    """sin(x + turn * pi/2) of a float32, in float64 and rounded once: 0.501 ulp. One polynomial for
    half turns; what lies beyond 2**40 needs more bits of pi and is left to a branch."""
    wide = cast(x, float64)
    # x = h*pi + r with h = n (sin) or n + 1/2 (cos); an odd n flips the sign, for cos an even one.
    shift = 6755399441055744.0 + turn
    inverse = const(1 / math.pi, float64)
    t = fma(wide, inverse, -0.5) + shift if turn else fma(wide, inverse, shift)
    h = (t - shift) + 0.5 if turn else t - shift
    r = fma(h, const(-2 * _HALF_PI[0], float64), wide)
    r = fma(h, const(-2 * _HALF_PI[1], float64), r)
    value = horner(r * r, *SIN) * r
    near = bits(binary("xor", bits(value, uint64), binary("shl", bits(t, uint64), 63)), float64)
    # The quadrant and the rest, for what is larger.
    n, rest = _large(x)
    n = n + turn if turn else n
    zero = const(0.0, float64)
    value = select(ne(binary("and", n, 1), 0), _cos_near(rest, zero), _sin_near(rest, zero))
    far = select(ne(binary("and", n, 2), 0), zero - value, value)
    far = select(absolute(x) < math.inf, far, const(math.nan, float64))
    either = select(binary("le", absolute(x), _LARGE), near, far)
    return cast(select(rarely_above(_LARGE, x), either, near), float32)


def tan(x: Expr) -> Expr:
    n, r, low = _reduced(x)
    s, c = _sin_near(r, low), _cos_near(r, low)
    odd = ne(binary("and", n, 1), 0)
    result = select(odd, const(0.0, float64) - c, s) / select(odd, s, c)
    return select(eq(x, 0.0), x, result)


# ---- inverse trigonometric ----------------------------------------------------------------------
def _asin_ratio(z: Expr) -> Expr:
    """(asin(s) - s) / s for z = s * s <= 1/4."""
    p = horner(
        z, 3.47933107596021167570e-05, 7.91534994289814532176e-04, -4.00555345006794114027e-02,
        2.01212532134862925881e-01, -3.25565818622400915405e-01, 1.66666666666666657415e-01,
    )  # fmt: skip
    q = horner(
        z, 7.70381505559019352791e-02, -6.88283971605453293030e-01, 2.02094576023350569471e00,
        -2.40339491173441421878e00, 1.0,
    )  # fmt: skip
    return z * p / q


def _asin_parts(x: Expr) -> tuple[Expr, Expr, Expr, Expr]:
    """(whether |x| < 1/2, s, the error of s, asin(s) - s); s is |x| or sqrt((1 - |x|) / 2)."""
    a = absolute(x)
    near = a < 0.5
    z = select(near, a * a, (1.0 - a) * 0.5)
    root = Call("sqrt", (z,))
    s = select(near, a, root)
    lost = fma(const(0.0, float64) - root, root, z) / (root + root)
    lost = select(binary("and", a >= 0.5, a < 1.0), lost, const(0.0, float64))
    return near, s, lost, s * _asin_ratio(z)


def asin(x: Expr) -> Expr:
    near, s, lost, more = _asin_parts(x)
    high, low = _HALF_PI[:2]
    rest = more + lost
    far = high - ((s + s) - (low - (rest + rest)))
    return with_sign(select(near, s + more, far), x)


def acos(x: Expr) -> Expr:
    near, s, lost, more = _asin_parts(x)
    high, low = _HALF_PI[:2]
    signed, extra = with_sign(s, x), with_sign(more, x)
    middle = high - (signed - (low - extra))
    rest = more + lost
    small = (s + rest) * 2.0
    large = 2 * high - ((s + s) - (2 * low - (rest + rest)))
    return select(near, middle, select(x < 0.0, large, small))


def atan(x: Expr) -> Expr:
    a = absolute(x)
    table = (
        (0.4375, 0.0, 0.0, 0.0),
        (0.6875, 0.5, 4.63647609000806093515e-01, 2.26987774529616870924e-17),
        (1.1875, 1.0, 7.85398163397448278999e-01, 3.06161699786838301793e-17),
        (2.4375, 1.5, 9.82793723247329054082e-01, 1.39033110312309984516e-17),
    )
    top, bottom = const(-1.0, float64), a
    high, low = const(_HALF_PI[0], float64), const(_HALF_PI[1], float64)
    for limit, c, h, l in reversed(table):
        # atan a = atan c + atan((a - c) / (1 + c a))
        inside = a < limit
        top = select(inside, a - c, top)
        bottom = select(inside, fma(a, const(c, float64), 1.0), bottom)
        high, low = select(inside, const(h, float64), high), select(inside, const(l, float64), low)
    t = top / bottom
    z = t * t
    p = horner(
        z, 1.62858201153657823623e-02, -3.65315727442169155270e-02, 4.97687799461593236017e-02,
        -5.83357013379057348645e-02, 6.66107313738753120669e-02, -7.69187620504482999495e-02,
        9.09088713343650656196e-02, -1.11111104054623557880e-01, 1.42857142725034663711e-01,
        -1.99999999998764832476e-01, 3.33333333333329318027e-01,
    )  # fmt: skip
    # t * z * p is what atan t lacks to t
    return with_sign(high - ((t * (z * p) - low) - t), x)


# ---- inverse trigonometric, of float32 ----------------------------------------------------------
# asin(s)/s for |s| <= 1/2 and atan(t)/t for |t| <= 1 in powers of their squares with 1 fixed,
# minimax: relative errors 2**-27.6 and 2**-28.5 (tests/codegen/test_minimax.py finds them again).
ASIN = (0.042158306, 0.024184778, 0.04546915, 0.074953094, 0.16666752, 1.0)
ATAN = (
    -0.0017827788, 0.010868565, -0.031096863, 0.057881337, -0.083993055, 0.109508805, -0.14264016,
    0.1999853, -0.333333, 1.0,
)  # fmt: skip
_HALF_PI32 = (1.5707964, -4.371139e-08)  # its sum


def _asin32_parts(x: Expr) -> tuple[Expr, Expr, Expr]:
    """(whether |x| < 1/2, s, asin(s) - s); s is |x| or sqrt((1 - |x|) / 2)."""
    a = absolute(x)
    near = a < 0.5
    z = select(near, a * a, (1.0 - a) * 0.5)
    s = select(near, a, Call("sqrt", (z,)))
    return near, s, s * (z * horner(z, *ASIN[:-1]))


def _asin32(x: Expr) -> Expr:
    near, s, more = _asin32_parts(x)
    high, low = _HALF_PI32
    far, lost = fast_sum(const(high, float32), s * -2.0)
    return with_sign(select(near, s + more, far + (lost - ((more + more) - low))), x)


def _acos32(x: Expr) -> Expr:
    near, s, more = _asin32_parts(x)
    high, low = _HALF_PI32
    middle = high - (with_sign(s, x) - (low - with_sign(more, x)))
    large = 2 * high - ((s + s) - (2 * low - (more + more)))
    return select(near, middle, select(x < 0.0, large, (s + more) * 2.0))


def _atan32(x: Expr) -> Expr:
    """Beyond 1, pi/2 - atan(1/|x|)."""
    a = absolute(x)
    far = a > 1.0
    t = select(far, -1.0 / a, a)
    high, low = [select(far, const(c, float32), const(0.0, float32)) for c in _HALF_PI32]
    z = t * t
    return with_sign(high + (t + fma(t, z * horner(z, *ATAN[:-1]), low)), x)


# ---- hyperbolic ---------------------------------------------------------------------------------
def sinh(x: Expr) -> Expr:
    a = absolute(x)
    t = expm1(minimum(a, 30.0))
    near = (t + t / (t + 1.0)) * 0.5
    h = exp(a * 0.5)
    return with_sign(select(a < 22.0, near, h * 0.5 * h), x)


def cosh(x: Expr) -> Expr:
    a = absolute(x)
    e = exp(minimum(a, 30.0))
    h = exp(a * 0.5)
    return select(a < 22.0, (e + 1.0 / e) * 0.5, h * 0.5 * h)


def asinh(x: Expr) -> Expr:
    a = absolute(x)
    b = minimum(a, 2.0**28)
    z = b * b
    near = log1p(b + z / (Call("sqrt", (z + 1.0,)) + 1.0))
    far = log(a) + math.log(2)
    return with_sign(select(a < 2.0**28, near, far), x)


def acosh(x: Expr) -> Expr:
    t = minimum(x, 2.0**28) - 1.0
    near = log1p(t + Call("sqrt", (fma(t, t, t + t),)))
    result = select(x > 2.0**28, log(x) + math.log(2), near)
    return select(x < 1.0, const(math.nan, float64), result)


def atanh(x: Expr) -> Expr:
    a = absolute(x)
    return with_sign(log1p((a + a) / (1.0 - a)) * 0.5, x)


FUNCTIONS: dict[str, Callable[..., Expr]] = {
    "sin": sin, "cos": cos, "tan": tan, "asin": asin, "acos": acos, "atan": atan,
    "sinh": sinh, "cosh": cosh, "asinh": asinh, "acosh": acosh, "atanh": atanh,
    "log1p": log1p, "expm1": expm1,
}  # fmt: skip
# Those that a float32 need not go through all of the above for.
FLOAT32: dict[str, Callable[[Expr], Expr]] = {
    "sin": lambda x: _wave32(x, 0), "cos": lambda x: _wave32(x, 1),
    "asin": _asin32, "acos": _acos32, "atan": _atan32,
}  # fmt: skip
