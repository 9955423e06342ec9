"""Powers as expressions of + * fma, bit operations and selects; see llvm_math.

    power(a, b)    a**b = 2**(b * log2 |a|), then the sign and the special cases of IEEE pow

A float32 takes logarithm and product in float64 and the exponential in float32: 0.9 ulp. A float64
takes the logarithm in twice its precision: 1.5 ulp.
"""

from __future__ import annotations

import math

from minicompiler.ir.expr import (
    Call,
    Const,
    Expr,
    binary,
    cast,
    const,
    eq,
    maximum,
    minimum,
    ne,
    select,
)
from minicompiler.ir.types import float32, float64, int32, uint32

from .llvm_math import (
    TABLE_EXP,
    absolute,
    bits,
    eighth_power,
    exact_product,
    exp64,
    fast_sum,
    fma,
    horner,
    mantissa,
    with_sign,
)

# log2((1 + s)/(1 - s)) / s in powers of s*s, for numbers from sqrt(1/2) to sqrt(2), minimax:
# relative error 2**-37.8 (tests/codegen/test_minimax.py finds them again).
LOG2 = (
    0.34072855359644477, 0.41167279069910506, 0.5770835840709405, 0.961796673343477,
    2.885390081790095,
)  # fmt: skip


def power(a: Expr, b: Expr) -> Expr | None:
    """a**b; with a constant b that is an integer |b| <= 8 the error is |b| ulp, with 1/2 or -1/2
    those of a root and a quotient. None for integers with a variable exponent."""
    n = b.value if type(b) is Const else None
    if n is not None and math.isfinite(n) and float(n).is_integer() and abs(n) <= 8:
        return small_power(a, int(n))
    if not a.dtype.is_float:
        return None
    if n is not None and abs(n) == 0.5:
        # Unlike roots, powers of -0 and of -inf are positive.
        root = select(eq(a, -math.inf), const(math.inf, a.dtype), Call("sqrt", (a + 0.0,)))
        return root if n > 0 else 1.0 / root
    size = absolute(a)
    result = _size64(size, b) if a.dtype is float64 else _size32(size, b)
    return _with_special_cases(a, b, result)


def small_power(a: Expr, n: int) -> Expr:
    """a**n for a small integer n by repeated squaring."""
    if n < 0:
        return const(1.0, a.dtype) / small_power(a, -n)
    if n < 2:
        return a if n else const(1.0, a.dtype)
    half = small_power(a, n // 2)
    return half * half * a if n % 2 else half * half


def _with_special_cases(a: Expr, b: Expr, result: Expr) -> Expr:
    """a**b for a result that is |a|**b."""
    whole = eq(Call("round", (b,)), b)
    odd = ne(Call("round", (b * 0.5,)) * 2.0, b)
    one = const(1.0, a.dtype)
    flipped = with_sign(result, select(odd, a, one))
    negative = binary("or", a < 0.0, eq(a, 0.0))
    broken = binary("and", Call("not", (whole,)), absolute(a) < math.inf)
    invalid = binary("or", binary("and", a < 0.0, broken), binary("or", ne(a, a), ne(b, b)))
    result = select(binary("and", negative, whole), flipped, result)
    result = select(invalid, const(math.nan, a.dtype), result)
    ones = binary("or", eq(b, 0.0), eq(a, 1.0))
    ones = binary("or", ones, binary("and", eq(a, -1.0), eq(absolute(b), math.inf)))
    return select(ones, one, result)


def _limited(size: Expr, of_ordinary: Expr) -> Expr:
    """A logarithm (or the part of it that is infinite) of what may be 0 or inf."""
    limit = select(eq(size, 0.0), const(-math.inf, size.dtype), size)
    return select(_is_ordinary(size), of_ordinary, limit)


def _is_ordinary(size: Expr) -> Expr:
    return binary("and", const(0.0, size.dtype) < size, size < math.inf)


# ---- float32 ------------------------------------------------------------------------------------
def _size32(size: Expr, b: Expr) -> Expr:
    """size**b = 2**(n/8) * e**r, the table and polynomial of `exp`. (What is NaN may come out as
    anything.)"""
    k, m = mantissa(size)
    m = cast(m, float64)
    s = (m - 1.0) / (m + 1.0)
    log2 = fma(s, horner(s * s, *LOG2), cast(_limited(size, k), float64))
    y = maximum(minimum(cast(b, float64) * log2 * 8.0, 8 * 129.0), -8 * 151.0)
    shift = 6755399441055744.0
    n = (y + shift) - shift
    r = cast(y - n, float32) * (math.log(2) / 8)
    bias = 8 * 254
    i = bits(cast(cast(n, float32) + float(bias), int32), uint32)
    whole = binary("shr", i, 3)  # 254 more than the exponent, which may need two factors
    scale = bits(eighth_power(i, bias) - binary("shl", whole - 254, 23), float32)
    half = binary("shr", whole, 1)
    result = fma(horner(r, *TABLE_EXP), scale, scale)
    result = result * bits(binary("shl", half, 23), float32)
    return result * bits(binary("shl", whole - half, 23), float32)


# ---- float64 ------------------------------------------------------------------------------------
def _size64(size: Expr, b: Expr) -> Expr:
    """e**(b * ln size) with the logarithm in twice the precision."""
    high, low = _log_exact(size)
    zero = const(0.0, float64)
    high, low = _limited(size, high), select(_is_ordinary(size), low, zero)
    p = fma(high, b, -0.0)
    lost = fma(high, b, zero - p) + low * b
    return exp64(p, select(absolute(p) < 2000.0, lost, zero))


def _log_exact(x: Expr) -> tuple[Expr, Expr]:
    """ln x of a finite x > 0 as a sum of two numbers, to about 64 bits."""
    k, m = mantissa(x)
    a, d = m - 1.0, m + 1.0
    dl = m - (d - 1.0)  # d + dl = m + 1
    s = a / d
    sl = (fma(s, const(0.0, float64) - d, a) - s * dl) / d
    z, zl = exact_product(s, s)
    zl = fma(s + s, sl, zl)
    # An fma, since a plain product may be fused with the sum.
    q = fma(horner(z, *[2.0 / n for n in range(25, 3, -2)]), z, -0.0)
    u, ul = fast_sum(const(2.0 / 3.0, float64), q)
    ul = ul + 3.700743415417188e-17  # what 2/3 has beyond its first 53 bits
    v, vl = exact_product(z, u)
    vl = fma(z, ul, fma(zl, u, vl))
    # ln m = 2 s + s v
    w, wl = exact_product(s, v)
    wl = fma(s, vl, fma(sl, v, wl))
    high, low = fast_sum(s + s, w)
    low = low + (wl + (sl + sl))
    kh, kl = exact_product(k, const(0.6931471805599453, float64))
    kl = fma(k, const(2.3190468138462996e-17, float64), kl)
    total, error = fast_sum(kh, high)
    return fast_sum(total, error + (low + kl))
