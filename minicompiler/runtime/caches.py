"""Memory that grows in place: the arrays of a call whose outputs append to inputs.

    cache = np.zeros((1, 12, 1024, 64), np.float32)             room for 1024 positions
    m.run({"past": cache[:, :, :n], "x": x}, out={"present": cache[:, :, :n + 1]})

`present` begins where `past` does and has the same strides: only what is new is written. Any other
arrays work as well; `past` is then copied first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from minicompiler.errors import RunError
from minicompiler.runtime.plan import Cache

_NO_PART = -1


def room_behind(array: np.ndarray, axis: int, what: str) -> int | None:
    """How many positions follow along `axis` in the array that this one is the first part of; None:
    any number, because no stride tells. Raises RunError for other strides."""
    room = _room(array.shape, array.strides, array.itemsize, axis)
    if room == _NO_PART:
        raise RunError(
            f"{what} is not the first part, along axis {axis}, of a C-contiguous array",
            hint="allocate the whole cache as one array, and give slices of it that begin at 0",
        )
    return room


@functools.lru_cache(maxsize=1024)
def _room(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, axis: int) -> int | None:
    sizes = [itemsize * math.prod(shape[k + 1 :]) for k in range(len(shape))]
    around = [k for k in range(axis) if shape[k] > 1]
    room = None
    if around:
        positions, rest = divmod(strides[around[-1]], sizes[axis])
        room = positions - shape[axis]
        for k in range(axis):
            sizes[k] += sizes[axis] * room * math.prod(shape[k + 1 : axis])
        if rest or room < 0:
            return _NO_PART
    wrong = any(n > 1 and s != t for n, s, t in zip(shape, strides, sizes, strict=True))
    return _NO_PART if wrong else room


def same_strides(past: np.ndarray, present: np.ndarray) -> bool:
    """True when the elements of `past` lie as the first ones of `present` do."""
    strides = zip(past.shape, past.strides, present.strides, strict=True)
    return past.strides == present.strides or all(n == 1 or a == b for n, a, b in strides)


def first_part(present: np.ndarray, axis: int, count: int) -> np.ndarray:
    """The first positions along an axis."""
    return present[(slice(None),) * axis + (slice(count),)]


def common_room(
    caches: Sequence[Cache], present: Sequence[np.ndarray], names: Sequence[str]
) -> int:
    """The room behind all of the caches of a call, in positions. Raises RunError."""
    found: dict[int, str] = {}
    for c, array, name in zip(caches, present, names, strict=True):
        room = room_behind(array, c.axis, name)
        if room is not None:
            found.setdefault(room, name)
    if len(found) > 1:
        (a, first), (b, second), *_ = found.items()
        raise RunError(
            f"{first} has room for {a} more positions, {second} for {b}",
            hint="give all caches of a call the same number of positions",
        )
    return next(iter(found), 0)
