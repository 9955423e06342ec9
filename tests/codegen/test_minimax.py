"""The coefficients of the elementary functions are found again, to nearly the same error.

Each polynomial has fixed low terms and free ones. Those free ones that make the largest relative
error smallest come from least squares whose weights grow where the error is large (C. Lawson,
1961).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from minicompiler.codegen import llvm_math

LONG = np.longdouble
POINTS = 4001
Array = np.ndarray


def chebyshev(low: float, high: float) -> Array:
    """Points that lie denser towards the ends of an interval."""
    x = np.cos(np.pi * (np.arange(POINTS) + LONG(0.5)) / POINTS)
    return (low + high) / LONG(2) + (high - low) / LONG(2) * x


def lawson(basis: Array, wanted: Array) -> float:
    """The smallest possible largest error of a combination of the columns of `basis`."""
    weights = np.full(wanted.size, 1 / wanted.size)
    error = np.zeros(wanted.size)
    for _ in range(200):
        root = np.sqrt(weights)[:, None]
        scaled = basis.astype(float) * root
        found = np.linalg.lstsq(scaled, wanted.astype(float) * root[:, 0], rcond=None)[0]
        rest = wanted - basis @ found.astype(LONG)  # what float64 left over
        more = np.linalg.lstsq(scaled, rest.astype(float) * root[:, 0], rcond=None)[0]
        error = np.abs(rest - basis @ more.astype(LONG)).astype(float)
        weights = weights * error
        weights /= weights.sum()
    return float(error.max())


# name: (coefficients, powers of x they belong to, how many are free, function, interval)
Case = tuple[tuple[float, ...], tuple[int, ...], int, Callable[[Array], Array], tuple[float, float]]
HALF_LN2 = float(np.log(2)) / 2
CASES: dict[str, Case] = {
    "exp": (llvm_math.EXP, (6, 5, 4, 3, 2, 1, 0), 4, np.exp, (-HALF_LN2, HALF_LN2)),
}


@pytest.mark.parametrize("name", CASES)
def test_coefficients_are_nearly_the_best(name: str) -> None:
    coefficients, powers, free, function, interval = CASES[name]
    x = chebyshev(*interval)
    exact = function(x)
    terms = np.stack([x**p for p in powers], 1) / exact[:, None]
    ours = terms @ np.array([LONG(np.float32(c)) for c in coefficients])
    error = float(np.abs(ours - 1).max())
    fixed = terms[:, free:] @ np.array(coefficients[free:], LONG)
    best = lawson(terms[:, :free], 1 - fixed)
    print(f"{name}: relative error 2**{np.log2(error):.2f}, at best 2**{np.log2(best):.2f}")
    assert error < 1.25 * best
