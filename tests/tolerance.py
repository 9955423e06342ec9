"""One function for all tests: how far two computations of the same result may lie apart.

    rtol, scale = tolerance("float32", reduction_length=1024)
    assert_close(got, want, reduction_length=1024, largest=3.0)
"""

from __future__ import annotations

import math

import numpy as np

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


def assert_close(
    got: np.ndarray, want: np.ndarray, reduction_length: int = 1, largest: float = 0.0
) -> None:
    """Same shape, same dtype, elements within `tolerance`; NaN equals NaN.

    largest: the largest number that enters the computation, where terms may cancel.
    """
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    assert got.dtype == want.dtype, f"dtype {got.dtype}, expected {want.dtype}"
    if want.size == 0:
        return
    rtol, scale = tolerance(want.dtype.name, reduction_length)
    if not rtol:
        np.testing.assert_array_equal(got, want)
        return
    wide_got, wide_want = got.astype(np.float64), want.astype(np.float64)
    finite = np.abs(wide_want[np.isfinite(wide_want)])
    largest = max(float(finite.max()) if finite.size else 0.0, largest)
    np.testing.assert_allclose(wide_got, wide_want, rtol=rtol, atol=scale * largest)
