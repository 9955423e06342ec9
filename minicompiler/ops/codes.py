"""Element types of at most 8 bits that are only stored: their values as numbers, and back.

    decode(e)                        float32 of a float8 or float4 element, int32 of an int4
    encode(e, DType("float8_e5m2"))  the element nearest to a number, ties to even

Bits of a float type, from the highest: sign, exponent, mantissa. `fn`: no infinities; `fnuz`: also
no negative zero, whose bits are the only NaN. OCP 8-bit floating point specification, 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from ..ir.expr import Call, Expr, binary, cast, const, eq, maximum, minimum, select
from ..ir.types import DType, float32, int32, uint8


@dataclass(frozen=True)
class _Float:
    """largest: the code of the largest finite number. infinity: its code, None: there is none."""

    mantissa: int
    bias: int
    largest: int
    nan: int
    infinity: int | None = None
    bits: int = 8
    unsigned_zero: bool = False


_FLOATS = {
    "float8_e4m3fn": _Float(3, 7, 0x7E, 0x7F),
    "float8_e4m3fnuz": _Float(3, 8, 0x7F, 0x80, unsigned_zero=True),
    "float8_e5m2": _Float(2, 15, 0x7B, 0x7E, 0x7C),
    "float8_e5m2fnuz": _Float(2, 16, 0x7F, 0x80, unsigned_zero=True),
    "float4_e2m1fn": _Float(1, 1, 0x7, 0x8, bits=4),
}
_INTS = {"int4": (4, True), "uint4": (4, False), "int2": (2, True), "uint2": (2, False)}
_SCALE = "float8_e8m0fnu"  # a power of two: an exponent with bias 127, 255 is NaN


def bits_of(e: Expr, dtype: DType) -> Expr:
    """The same bits as another type of that size."""
    return Call("bitcast", (e,), dtype)


def _i(value: int) -> Expr:
    return const(value, int32)


def _power(exponent: Expr) -> Expr:
    """2 ** exponent as float32, for -126 <= exponent <= 127."""
    return bits_of(binary("shl", exponent + 127, 23), float32)


def limits(dtype: DType) -> tuple[int, int]:
    """The smallest and largest number of an integer type, a stored one included."""
    bits, signed = _INTS.get(dtype.name, (dtype.bits, dtype.is_signed))
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def is_float_code(dtype: DType) -> bool:
    """True for the stored types that are floating point."""
    return dtype.name in _FLOATS or dtype.name == _SCALE


# ---- to numbers ---------------------------------------------------------------------------------
def decode(e: Expr) -> Expr:
    """The number that an element stands for."""
    code = cast(bits_of(e, uint8), int32)
    if e.dtype.name in _INTS:
        width, signed = _INTS[e.dtype.name]
        code = binary("and", code, (1 << width) - 1)
        half = 1 << (width - 1)
        return binary("xor", code, half) - half if signed else code
    nan = const(float("nan"), float32)
    if e.dtype.name == _SCALE:
        # 2 ** -127 lies below the normal numbers of float32.
        tiny = const(2.0**-127, float32)
        value = select(eq(code, 0), tiny, _power(maximum(code, 1) - 127))
        return select(eq(code, 255), nan, value)
    f = _FLOATS[e.dtype.name]
    top = 1 << (f.bits - 1)
    size = binary("and", code, top - 1)
    exponent = binary("shr", size, f.mantissa)
    fraction = binary("and", size, (1 << f.mantissa) - 1)
    whole = select(eq(exponent, 0), fraction, fraction + (1 << f.mantissa))
    value = cast(whole, float32) * _power(maximum(exponent, 1) - (f.bias + f.mantissa))
    if f.infinity is not None:
        infinite = const(float("inf"), float32)
        value = select(size < f.infinity, value, select(eq(size, f.infinity), infinite, nan))
    elif f.nan == 0x7F:
        value = select(eq(size, f.nan), nan, value)
    value = select(binary("and", code, top) < 1, value, value * -1.0)
    return select(eq(code, f.nan), nan, value) if f.unsigned_zero else value


# ---- from numbers -------------------------------------------------------------------------------
def encode(e: Expr, dtype: DType, saturate: bool = True, rounding: str = "nearest") -> Expr:
    """The element for a number (float32, or int32 for integer types, which wrap).

    saturate: what lies beyond the largest finite number becomes that number, else infinity or NaN.
    rounding: of powers of two: "nearest", "up" or "down".
    """
    if dtype.name in _INTS:
        code = binary("and", cast(e, int32), (1 << _INTS[dtype.name][0]) - 1)
    elif dtype.name == _SCALE:
        code = _scale_code(cast(e, float32), saturate, rounding)
    else:
        code = _float_code(cast(e, float32), _FLOATS[dtype.name], saturate)
    return bits_of(cast(code, uint8), dtype)


def _float_code(e: Expr, f: _Float, saturate: bool) -> Expr:
    raw = bits_of(e, int32)
    size = binary("and", raw, 0x7FFFFFFF)
    # The spacing of the numbers around e is 2 ** (exponent - mantissa).
    exponent = maximum(binary("shr", size, 23) - 127, 1 - f.bias)
    spacing = minimum(exponent, 127) - f.mantissa
    steps = Call("round", (bits_of(size, float32) * _power(_i(0) - spacing),))
    finite = size < 0x7F800000
    count = cast(select(finite, steps, const(0, float32)), int32)
    code = binary("shl", exponent + f.bias, f.mantissa) + count - (1 << f.mantissa)
    if f.bits == 4:  # has neither infinity nor NaN
        saturate = True
    beyond = _i(f.largest) if saturate else _i(f.nan if f.infinity is None else f.infinity)
    fits = binary("and", finite, code <= f.largest)
    code = select(fits, code, beyond)
    top = 1 << (f.bits - 1)
    negative = raw < 0
    if f.unsigned_zero:
        negative = binary("and", negative, ~eq(code, 0))
        code = select(binary("and", negative, ~eq(code, f.nan)), code + top, code)
    else:
        code = select(negative, code + top, code)
    is_nan = _i(0x7F800000) < size
    if f.bits == 4 or f.unsigned_zero:
        return select(is_nan, _i(f.nan), code)
    return select(is_nan, select(raw < 0, _i(f.nan + top), _i(f.nan)), code)


def _scale_code(e: Expr, saturate: bool, rounding: str) -> Expr:
    raw = bits_of(e, int32)
    size = binary("and", raw, 0x7FFFFFFF)
    code = binary("shr", size, 23)
    rest = binary("and", size, 0x7FFFFF)
    zero = const(False, DType("bool"))
    up = {"down": zero, "up": _i(0) < rest, "nearest": _i(0x400000) <= rest}[rounding]
    # Below 2 ** -126 there is only 2 ** -127: nothing is smaller, whatever the rounding.
    small = binary("and", eq(code, 0), size <= 0x400000)
    code = select(binary("and", up, ~small), code + 1, code)
    code = select(code < 255, code, _i(254 if saturate else 255))
    return select(_i(0x7F800000) <= size, _i(255), code)


# ---- numpy --------------------------------------------------------------------------------------
def np_decode(x: np.ndarray) -> np.ndarray:
    """An array of a stored type as float32 (int32 for integers)."""
    return x.astype(np.int32 if x.dtype.name in _INTS else np.float32)


def np_encode(x: np.ndarray, dtype: DType, saturate: bool, rounding: str) -> np.ndarray:
    """An array as a stored type."""
    if dtype.name in _INTS:
        return x.astype(np.int32).astype(np.int8).astype(dtype.numpy)
    wide = x.astype(np.float32)
    if dtype.name == _SCALE:
        mantissa, exponent = np.frexp(np.abs(wide))
        rises = {"down": mantissa > 1, "up": mantissa > 0.5, "nearest": mantissa >= 0.75}[rounding]
        code = np.clip(exponent - 1 + rises + 127, 0, 254 if saturate else 255)
        code = np.where(wide == 0, 0, np.where(np.isfinite(wide), code, 255))
        return code.astype(np.uint8).view(dtype.numpy)
    if saturate:
        info: Any = ml_dtypes.finfo(dtype.numpy)
        wide = np.clip(wide, float(info.min), float(info.max))
    return np.asarray(wide.astype(dtype.numpy))  # not a scalar, as `clip` makes of rank 0
