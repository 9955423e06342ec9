"""The coefficients of the elementary functions are found again, to nearly the same error.

Each polynomial has fixed low terms and free ones. Those free ones that make the largest relative
error smallest come from least squares whose weights grow where the error is large (C. Lawson,
1961).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from minicompiler.codegen import llvm_math, llvm_power, llvm_trig

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


@dataclass(frozen=True)
class Case:
    """The first `free` coefficients were to be found; powers: what each is multiplied with."""

    function: Callable[[Array], Array]
    interval: tuple[float, float]
    coefficients: tuple[float, ...]
    powers: tuple[int, ...]
    free: int
    dtype: type[np.floating]


HALF_LN2 = float(np.log(2)) / 2
SCALE = float(np.mean(np.float32(llvm_math.POWERS) / 2.0 ** (np.arange(8) / 8)))
CASES = {
    "exp, behind a table": Case(
        lambda x: np.exp(x) / SCALE,
        (-HALF_LN2 / 8, HALF_LN2 / 8),
        (*llvm_math.TABLE_EXP, 1.0),
        (3, 2, 1, 0, 0),
        4,
        np.float32,
    ),
    "exp, five terms": Case(
        np.exp, (-HALF_LN2, HALF_LN2), llvm_math.SHORT_EXP, (5, 4, 3, 2, 1, 0), 5, np.float32
    ),
    "asin": Case(np.arcsin, (1e-3, 0.5), llvm_trig.ASIN, (11, 9, 7, 5, 3, 1), 5, np.float32),
    "atan": Case(np.arctan, (1e-3, 1.0), llvm_trig.ATAN, tuple(range(19, 0, -2)), 9, np.float32),
    "log2, by the atanh of s": Case(
        lambda s: 2 * np.arctanh(s) / np.log(LONG(2)),
        (1e-3, 3 - 2 * 2**0.5),
        llvm_power.LOG2,
        (9, 7, 5, 3, 1),
        5,
        np.float64,
    ),
    "sin": Case(np.sin, (1e-3, np.pi / 2), llvm_trig.SIN, (11, 9, 7, 5, 3, 1), 5, np.float64),
}


@pytest.mark.parametrize("name", CASES)
def test_coefficients_are_nearly_the_best(name: str) -> None:
    case = CASES[name]
    x = chebyshev(*case.interval)
    exact = case.function(x)
    terms = np.stack([x**p for p in case.powers], 1) / exact[:, None]
    rounded = np.array(case.coefficients, case.dtype).astype(LONG)
    error = float(np.abs(terms @ rounded - 1).max())
    best = lawson(terms[:, : case.free], 1 - terms[:, case.free :] @ rounded[case.free :])
    print(f"{name}: relative error 2**{np.log2(error):.2f}, at best 2**{np.log2(best):.2f}")
    assert error < 1.25 * best
