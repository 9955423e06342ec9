"""What `samples` of operators are drawn with; Hypothesis is imported only when a sample is drawn.

axis = integer(draw, -2, 1)
x = array(draw, (2, 3), "float32")       values from a drawn seed, so that shrinking stays fast
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

T = TypeVar("T")
Draw = Callable[[Any], Any]
FLOATS = ("float32", "float32", "float32", "float64", "float16", "bfloat16")
INTS = ("int64", "int32", "int8", "uint8")


def integer(draw: Draw, low: int, high: int) -> int:
    """A number in low .. high, both included."""
    from hypothesis import strategies as st

    return int(draw(st.integers(low, high)))


def choice(draw: Draw, options: Sequence[T]) -> T:
    """One of the options."""
    return options[integer(draw, 0, len(options) - 1)]


def flag(draw: Draw) -> bool:
    """True or False."""
    return integer(draw, 0, 1) == 1


def shape(draw: Draw, least: int = 0, most: int = 4, size: int = 4) -> tuple[int, ...]:
    """A shape of `least` to `most` dimensions of 1 to `size` each."""
    return tuple(integer(draw, 1, size) for _ in range(integer(draw, least, most)))


def array(
    draw: Draw, of: Sequence[int], dtype: str = "float32", low: float = -3, high: float = 3
) -> np.ndarray:
    """Evenly distributed values in low .. high."""
    rng = np.random.default_rng(integer(draw, 0, 1 << 16))
    if dtype == "bool":
        return rng.integers(0, 2, tuple(of)).astype(bool)
    if "float" not in dtype:
        start = max(int(low), 0) if dtype.startswith("u") else int(low)
        return rng.integers(start, int(high) + 1, tuple(of)).astype(dtype)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    return rng.uniform(low, high, tuple(of)).astype(kind)


def broadcastable(draw: Draw, count: int) -> list[tuple[int, ...]]:
    """Shapes that broadcast together: some dimensions 1, some leading ones missing."""
    full = shape(draw)
    found = [full]
    for _ in range(count - 1):
        some = tuple(1 if integer(draw, 0, 3) == 0 else s for s in full)
        found.append(some[integer(draw, 0, len(full)) if flag(draw) else 0 :])
    return found[::-1] if flag(draw) else found


def some_axes(draw: Draw, rank: int, least: int = 1) -> tuple[int, ...]:
    """Distinct axes, some counted from the end."""
    from hypothesis import strategies as st

    if rank == 0:
        return ()
    picked = draw(st.lists(st.integers(0, rank - 1), min_size=least, max_size=rank, unique=True))
    return tuple(a - rank if flag(draw) else a for a in picked)
