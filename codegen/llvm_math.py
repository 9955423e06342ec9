"""float32 and float64 functions as polynomial expressions: LLVM has no vector exp, tanh, erf, ...

    expand(Call("exp", (x,)))   -> an expression of + * fma, bit operations and selects

Bounds (float32, over all inputs, tests/codegen/test_llvm_math.py): exp 1.0 ulp, log 1.0, sigmoid 2.5,
tanh 2.0, erf 2.0. Methods: Cody-Waite range reduction (W. J. Cody, W. Waite, Software Manual for the
Elementary Functions, 1980) with minimax polynomials.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from minicompiler.ir.expr import (
    Binary,
    Call,
    Expr,
    binary,
    cast,
    const,
    maximum,
    minimum,
    select,
)
from minicompiler.ir.types import DType, float32, int32, int64


def expand(e: Call) -> Expr | None:
    """An equal expression without the call; None for functions LLVM lowers itself (sqrt, floor, ...)."""
    f = _EXPANSIONS.get(e.fn)
    return None if f is None else f(*e.args)


def fma(a: Expr, b: Expr, c: Expr) -> Expr:
    """a * b + c with one rounding."""
    return Call("fma", (a, b, c))


def bits(x: Expr, to: DType) -> Expr:
    """The bits of x as another type of the same size."""
    return Call("bitcast", (x,), to.with_lanes(x.dtype.lanes))


def horner(x: Expr, *coefficients: float) -> Expr:
    """A polynomial, highest coefficient first."""
    result = const(coefficients[0], x.dtype)
    for c in coefficients[1:]:
        result = fma(result, x, const(c, x.dtype))
    return result


def _pow2(n: Expr) -> Expr:
    """2**n for an int32 n in the normal range, as float32."""
    return bits(binary("shl", n + 127, 23), float32)


def _round(x: Expr) -> Expr:
    return Call("round", (x,))


def exp(x: Expr) -> Expr:
    """e**x: x = n*ln2 + r with |r| <= ln2/2, a degree 6 polynomial of r, scaled by 2**n in two steps so
    that subnormal results stay right."""
    if x.dtype.scalar.name == "float64":
        return _exp64(x)
    if x.dtype.scalar.bits == 16:
        return cast(exp(cast(x, float32)), x.dtype.scalar)
    t = const(0.0, float32)
    y = minimum(maximum(x, const(-104.0, t.dtype)), const(89.0, t.dtype))
    n = _round(y * const(1.4426950408889634, float32))
    r = fma(n, const(-0.693145751953125, float32), y)
    r = fma(n, const(-1.428606765330187e-06, float32), r)
    p = horner(r, 1.3978564e-3, 8.3692595e-3, 4.1666616e-2, 1.6666520e-1, 5.0e-1)
    p = fma(r * r, p, r) + const(1.0, float32)
    i = cast(n, int32)
    half = binary("shr", i, 1)
    return p * _pow2(half) * _pow2(i - half)


def _exp64(x: Expr) -> Expr:
    f = x.dtype.scalar
    y = minimum(maximum(x, const(-746.0, f)), const(710.0, f))
    n = _round(y * const(1.4426950408889634, f))
    r = fma(n, const(-6.93147180369123816490e-01, f), y)
    r = fma(n, const(-1.90821492927058770002e-10, f), r)
    p = horner(r, *[1.0 / math.factorial(k) for k in range(13, 1, -1)])
    p = fma(r * r, p, r) + const(1.0, f)
    i = cast(n, int64)
    half = binary("shr", i, 1)

    def pow2(k: Expr) -> Expr:
        return bits(binary("shl", k + 1023, 52), f)

    return p * pow2(half) * pow2(i - half)


def log(x: Expr) -> Expr:
    """ln x: x = 2**k * m with m in [sqrt(1/2), sqrt(2)), then the series in s = (m-1)/(m+1)."""
    f = x.dtype.scalar
    if f.bits == 16:
        return cast(log(cast(x, float32)), f)
    wide = f.name == "float64"
    integer, mantissa, bias = (int64, 52, 1023) if wide else (int32, 23, 127)
    tiny = 2.0 ** (-1022 if wide else -126)
    scale = 2.0 ** (54 if wide else 25)
    small = x < const(tiny, f)
    scaled = select(small, x * const(scale, f), x)
    i = bits(scaled, integer)
    # Adding (1 - sqrt(1/2)) in units of the mantissa moves the cut from 1 to sqrt(1/2).
    offset = 0x3FE6A09E00000000 if wide else 0x3F3504F3
    j = i - offset
    k = binary("shr", j, mantissa)
    m = bits(binary("and", j, (1 << mantissa) - 1) + offset, f)
    e = cast(k, f) - select(small, const(54.0 if wide else 25.0, f), const(0.0, f))
    a = m - const(1.0, f)
    s = a / (m + const(1.0, f))
    z = s * s
    if wide:
        r = horner(z, *[2.0 / d for d in range(21, 1, -2)]) * z
        hfsq = a * a * const(0.5, f)
        low = fma(s, hfsq + r, e * const(1.90821492927058770002e-10, f))
        body = fma(e, const(6.93147180369123816490e-01, f), a - (hfsq - low))
    else:
        r = horner(z, 0.24279078841, 0.28498786688, 0.40000972152, 0.66666662693) * z
        hfsq = a * a * const(0.5, f)
        low = fma(s, hfsq + r, e * const(9.0580006145e-06, f))
        body = fma(e, const(6.9313812256e-01, f), a - (hfsq - low))
    del bias
    inf, nan = const(float("inf"), f), const(float("nan"), f)
    body = select(x < inf, body, x)  # inf and NaN
    body = select(binary("eq", x, const(0.0, f)), const(float("-inf"), f), body)
    return select(x < const(0.0, f), nan, body)


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + e**-x)."""
    one = const(1.0, x.dtype)
    return one / (one + exp(const(0.0, x.dtype) - x))


def tanh(x: Expr) -> Expr:
    """An odd polynomial near 0, elsewhere 1 - 2 / (e**2|x| + 1) with the sign of x."""
    f = x.dtype.scalar
    if f.bits == 16:
        return cast(tanh(cast(x, float32)), f)
    a = Call("abs", (x,))
    e = exp(a + a)
    one = const(1.0, f)
    big = one - const(2.0, f) / (e + one)
    z = x * x
    if f.name == "float64":
        # (e**2a - 1) / (e**2a + 1) loses digits near 0: use expm1's series there.
        t = expm1_small(a + a)
        near = t / (t + const(2.0, f))
        return Call("copysign", (select(a < const(0.17, f), near, big), x))
    p = horner(z, -5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
    near = fma(p * z, x, x)
    return select(a < const(0.625, f), near, Call("copysign", (big, x)))


def expm1_small(x: Expr) -> Expr:
    """e**x - 1 for |x| < 0.35 by its series (float64)."""
    return horner(x, *[1.0 / math.factorial(k) for k in range(16, 0, -1)], 0.0)


def erf(x: Expr) -> Expr:
    """Two polynomial pieces after N. Juffa's minimax fit (erff, 2016): in x**2 for |x| < 0.921875,
    elsewhere 1 - exp(-p(|x|))."""
    f = x.dtype.scalar
    if f.bits == 16:
        return cast(erf(cast(x, float32)), f)
    if f.name == "float64":
        return cast(erf(cast(x, float32)), f)
    a = Call("abs", (x,))
    s = x * x
    r = fma(const(-1.72853470e-5, f), a, const(3.83197126e-4, f))
    u = fma(const(-3.88396438e-3, f), a, const(2.42546219e-2, f))
    r = fma(r, s, u)
    r = fma(r, a, const(-1.06777877e-1, f))
    r = fma(r, a, const(-6.34846687e-1, f))
    r = fma(r, a, const(-1.28717512e-1, f))
    r = fma(r, a, const(0.0, f) - a)
    far = const(1.0, f) - exp(r)
    p = horner(s, -5.96761703e-4, 4.99119423e-3, -2.67681349e-2, 1.12819925e-1, -3.76125336e-1, 1.28379166e-1)
    near = fma(p, x, x)
    return select(a < const(0.927734375, f), near, Call("copysign", (far, x)))


def rsqrt(x: Expr) -> Expr:
    """1 / sqrt(x), correctly rounded at each step."""
    return const(1.0, x.dtype) / Call("sqrt", (x,))


def power(a: Expr, b: Expr) -> Expr:
    """a**b through exp(b * ln|a|) with the signs and zeros of IEEE pow; about 1e-6 relative error for
    moderate exponents."""
    f = a.dtype.scalar
    size = exp(b * log(Call("abs", (a,))))
    whole = binary("eq", _round(b), b)
    odd = binary("ne", _round(b * const(0.5, f)) * const(2.0, f), b)
    one, nan = const(1.0, f), const(float("nan"), f)
    negative = select(whole, select(odd, const(0.0, f) - size, size), nan)
    result = select(a < const(0.0, f), negative, size)
    result = select(binary("eq", b, const(0.0, f)), one, result)
    return select(binary("eq", a, one), one, result)


def small_power(a: Expr, n: int) -> Expr:
    """a**n for a small integer n by repeated squaring."""
    if n < 0:
        return const(1.0, a.dtype) / small_power(a, -n)
    if n == 0:
        return const(1.0, a.dtype)
    half = small_power(a, n // 2) if n > 1 else None
    if half is None:
        return a
    return half * half * a if n % 2 else half * half


_EXPANSIONS: dict[str, Callable[..., Expr]] = {
    "exp": exp, "log": log, "sigmoid": sigmoid, "tanh": tanh, "erf": erf, "rsqrt": rsqrt,
}  # fmt: skip
__all__ = ["Binary", "expand", "power", "small_power"]
