"""How far a computed value lies from its reference, and whether that is rounding.

deviation(got, want, exact, 576)     want: numpy in the value's own type; exact: in float64
    -> Deviation(absolute=3e-07, relative=1e-07, ulp=2.0, bound=1.0, verdict="ok")

A value beyond its bound is "rounding" when it lies about as near to the float64 result as the
reference does, or within what rounding may do where a computation is ill-conditioned, else "wrong".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from minicompiler.tolerance import epsilon, tolerance

Array = np.ndarray
OK, ROUNDING, WRONG = "ok", "rounding", "wrong"
# Two float32 computations in different orders differ by small factors in how near they come.
_AS_NEAR = 4.0
# Between two discrete values (an argmax, a rounded integer) float32 cannot tell which is right.
_FEW = 1e-3


@dataclasses.dataclass(frozen=True)
class Deviation:
    """How far a value lies from its reference.

    Attributes:
        absolute: max |got - want|; infinity where shape, dtype or special values differ.
        relative: the same divided by max |want|.
        ulp: in units of the last place of the larger of the two elements; the largest such.
        bound: the largest part of what `tolerance` allows that an element uses: 1 is the limit.
        verdict: OK, ROUNDING or WRONG.
    """

    absolute: float
    relative: float
    ulp: float
    bound: float
    verdict: str


def deviation(
    got: Array,
    want: Array,
    exact: Array | None = None,
    length: int = 1,
    extra: float = 0.0,
    spread: Callable[[], float] = lambda: 0.0,
) -> Deviation:
    """Compares a value with its reference.

    exact: the value in float64; None: nothing passes as rounding. length: of the sums that lead to
    it. extra: what an algorithm may add, relative to the largest element. spread: how far rounding
    may move an element; asked where a bound is exceeded.
    """
    if got.shape != want.shape or got.dtype != want.dtype:
        return _infinite()
    if want.size == 0:
        return Deviation(0.0, 0.0, 0.0, 0.0, OK)
    name = want.dtype.name
    a, b = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(b)
    if (
        not np.array_equal(a[~finite], b[~finite], equal_nan=True)
        or not np.isfinite(a[finite]).all()
    ):
        return _infinite()
    error = np.abs(a[finite] - b[finite])
    size = np.abs(b[finite])
    if not error.size:
        return Deviation(0.0, 0.0, 0.0, 0.0, OK)
    absolute, largest = float(error.max()), float(size.max())
    relative = absolute / largest if largest else absolute
    rtol, scale = tolerance(name, length)
    eps = epsilon(name)
    if not eps:
        changed = float((error != 0).mean())
        verdict = OK if not changed else WRONG
        if changed and exact is not None and changed <= _FEW and absolute <= 1:
            verdict = ROUNDING
        return Deviation(absolute, relative, absolute, absolute, verdict)
    tiny = np.finfo(np.float32).tiny
    larger = np.maximum(np.maximum(size, np.abs(a[finite])), tiny)
    spacing = 2.0 ** np.floor(np.log2(larger)) * eps
    allowed = rtol * size + max(scale, extra) * largest + tiny
    bound = float((error / allowed).max())
    verdict = OK
    if bound > 1:
        near = exact is not None and _as_near(a, b, exact, spread())
        verdict = ROUNDING if near else WRONG
    return Deviation(absolute, relative, float((error / spacing).max()), bound, verdict)


def _as_near(got: Array, want: Array, exact: Array, spread: float) -> bool:
    """Whether a value is about as near to the float64 result as can be asked for."""
    if exact.shape != want.shape:
        return False
    finite = np.isfinite(want) & np.isfinite(exact)
    if not finite.any():
        return False
    ours = float(np.abs(got[finite] - exact[finite]).max())
    theirs = float(np.abs(want[finite] - exact[finite]).max())
    return ours <= _AS_NEAR * max(theirs, spread)


def _infinite() -> Deviation:
    inf = float("inf")
    return Deviation(inf, inf, inf, inf, WRONG)
