"""One assertion for all tests: two computations of the same result, within `tolerance`.

assert_close(got, want, reduction_length=1024, largest=3.0)
"""

from __future__ import annotations

import numpy as np

from minicompiler.tolerance import tolerance


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
    if not rtol and want.dtype.kind in "biu":
        np.testing.assert_array_equal(got, want)
        return
    wide_got, wide_want = got.astype(np.float64), want.astype(np.float64)
    if not rtol:  # types of ml_dtypes, whose NaN numpy does not know
        np.testing.assert_array_equal(wide_got, wide_want)
        return
    finite = np.abs(wide_want[np.isfinite(wide_want)])
    largest = max(float(finite.max()) if finite.size else 0.0, largest)
    np.testing.assert_allclose(wide_got, wide_want, rtol=rtol, atol=scale * largest)
