"""How far two computations of the same result may lie apart.

rtol, scale = tolerance("float32", reduction_length=1024)
|a - b| <= rtol * |b| + scale * max |b|
"""

from __future__ import annotations

import math

_EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def tolerance(dtype: str, reduction_length: int = 1) -> tuple[float, float]:
    """(relative error per element, absolute error as a part of the largest result).

    Rounding errors of a sum of n terms grow like sqrt(n), and where terms cancel they are relative
    to the terms rather than to the sum: hence the second number. 16-bit floats are summed in
    float32 and rounded once, so their length does not matter. Integers and bools are exact.
    """
    eps = _EPS.get(str(dtype))
    if eps is None:
        return 0.0, 0.0
    if str(dtype) in ("float16", "bfloat16"):
        return 2 * eps, eps
    # Functions such as exp and tanh are allowed a few units in the last place themselves.
    return 16 * eps * math.sqrt(reduction_length), 8 * eps * math.sqrt(reduction_length)


def epsilon(dtype: str) -> float:
    """The distance from 1 to the next number; 0 for integers."""
    return _EPS.get(str(dtype), 0.0)
