"""Memory for constants: arrays side by side on huge pages.

    pages = Pages()
    packed = pages.empty((64, 9, 16), np.dtype("float32"))      not initialised, starts a cache line

A kernel reads megabytes of weights once per call. On pages of 4 KB every one of them needs an
address translation, and where it lies among the sets of the second-level cache is left to chance.
Only the first block has huge pages: the system may take milliseconds to find each, and hundreds of
megabytes would take longer to get than to pack. Memory is given back when the last array of a block
is gone.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
from collections.abc import Sequence

import numpy as np

HUGE_PAGE = 2 << 20
_BLOCK = 32 << 20  # of addresses; memory is taken as it is written
_SMALL = 64 << 10  # bytes of an array that huge pages would not help
_LINE = 64


class Block(mmap.mmap):
    """Anonymous memory that arrays of `Pages` lie in."""


class Pages:
    """Gives out arrays, to several threads at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rest = np.empty(0, np.uint8)  # of the newest block
        self._huge = True  # whether the next block shall have huge pages

    def empty(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """An array whose elements are not set. Raises MemoryError."""
        size = math.prod(shape) * dtype.itemsize
        if size < _SMALL or not hasattr(mmap, "MADV_HUGEPAGE"):
            return _at_line(np.empty(size + _LINE, np.uint8))[:size].view(dtype).reshape(shape)
        with self._lock:
            if self._rest.nbytes < size:
                self._rest = _block(max(_BLOCK, size), self._huge and size <= _BLOCK)
                self._huge = False
            part = self._rest[:size]
            self._rest = self._rest[-(-size // _LINE) * _LINE :]
        return part.view(dtype).reshape(shape)


def _at_line(memory: np.ndarray) -> np.ndarray:
    """The bytes from the first that starts a cache line: vectors then lie in one line each."""
    return memory[-memory.ctypes.data % _LINE :]


def _block(size: int, huge: bool) -> np.ndarray:
    """So many bytes that start where a huge page may, and are on such pages if `huge`."""
    try:
        block = Block(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size} bytes for constants: {error}") from None
    if huge:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            block.madvise(mmap.MADV_HUGEPAGE)
    every = np.frombuffer(block, np.uint8)
    start = -every.ctypes.data % HUGE_PAGE
    return every[start : start + size]


__all__ = ["Block", "Pages"]
