"""Where the elements of numpy arrays lie, without a copy and in few microseconds.

address(x)                      of the first element
overlap([x, y, z], reads=2)     (0, 2): z is written, and shares memory with x
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

_address_of = ctypes.addressof
_view = ctypes.c_char.from_buffer
_FIRST = (slice(0, 1),)


def address(array: np.ndarray) -> int:
    """The address of an array's first element; the writable, contiguous case is the fast one."""
    try:
        return _address_of(_view(array))  # type: ignore[arg-type]
    except (TypeError, ValueError, BufferError):
        start: int = array.__array_interface__["data"][0]
        return start


def address_of_part(array: np.ndarray) -> int:
    """The same for an array that is rarely contiguous, such as a part of another."""
    return address(array if array.flags.c_contiguous else array[_FIRST * array.ndim])


def span(array: np.ndarray, start: int) -> tuple[int, int]:
    """The addresses between which the elements of an array lie; start: that of its first."""
    if array.flags.c_contiguous:
        return start, start + array.nbytes
    steps = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)]
    low, high = sum(s for s in steps if s < 0), sum(s for s in steps if s > 0)
    return start + low, start + high + array.itemsize


def overlap(spans: Sequence[tuple[int, int]], reads: int) -> tuple[int, int] | None:
    """Two spans, in order, that overlap, if one of them is written: the first `reads` are read."""
    every = (0, 0)  # where what begins before ends last, and which span that is
    written = (0, 0)
    for (start, end), k in sorted(zip(spans, range(len(spans)), strict=True)):
        before, other = written if k < reads else every
        if start < before and start < end:
            return min(k, other), max(k, other)
        every = max(every, (end, k))
        if k >= reads:
            written = max(written, (end, k))
    return None
