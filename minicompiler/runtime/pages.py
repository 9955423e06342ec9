"""Memory for constants: arrays side by side on huge pages.

    pages = Pages()
    packed = pages.empty((64, 9, 16), np.dtype("float32"))      not initialised, starts a cache line
    collapse([packed, ...])                                     huge pages, in the background

A kernel reads megabytes of weights once per call. On pages of 4 KB every one of them needs an
address translation, and where it lies among the sets of the second-level cache is left to chance.
The system may take milliseconds to find a huge page, so only the first block has them at once; the
others get them while the program goes on. Memory is given back with the last array of a block.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HUGE_PAGE = 2 << 20
_BLOCK = 32 << 20  # of addresses; memory is taken as it is written
_SMALL = 64 << 10  # bytes of an array that huge pages would not help
_LINE = 64
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MADV_COLLAPSE = 25  # of Linux 6.1, not named by Python


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


def has_huge_pages() -> bool:
    """Whether memory that asks for huge pages gets them; a part of one then takes a whole one."""
    return _SETTING.exists() and "[never]" not in _SETTING.read_text()


def memory_of(a: np.ndarray) -> object:
    """What holds the elements: an array, or the object that lends its bytes."""
    owner: Any = a
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
        while isinstance(owner, memoryview):
            owner = owner.obj
    return owner


def collapse(arrays: Sequence[np.ndarray]) -> threading.Thread | None:
    """Moves arrays of `Pages` to huge pages while they are in use: contents and addresses stay.

    Starts a thread that ends when it is through, usually within a second. Its priority is that of
    others: whoever meets a page that a waiting thread is moving would wait as long. None where
    there is nothing to move.
    """
    ends: dict[int, tuple[weakref.ref[Block], int, int]] = {}  # of the part of a block with arrays
    for a in arrays:
        block = memory_of(a)
        if isinstance(block, Block):
            first, last = a.ctypes.data, a.ctypes.data + a.nbytes
            of, low, high = ends.get(id(block), (weakref.ref(block), first, last))
            ends[id(block)] = of, min(low, first), max(high, last)
    if not ends or not sys.platform.startswith("linux") or not has_huge_pages():
        return None
    thread = threading.Thread(
        target=_collapse, args=(list(ends.values()),), name="minicompiler-pages", daemon=True
    )
    thread.start()
    return thread


def _collapse(parts: Sequence[tuple[weakref.ref[Block], int, int]]) -> None:
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for of, low, high in parts:
        # Against the order in which kernels read: one that meets the page being moved waits once.
        for page in reversed(range(low // HUGE_PAGE * HUGE_PAGE, high, HUGE_PAGE)):
            block = of()  # not unmapped meanwhile
            if block is not None:
                # Advice only: without such memory, or on an old kernel, all stays as it is.
                advise(page, HUGE_PAGE, _MADV_COLLAPSE)
            del block


__all__ = ["Block", "Pages", "collapse", "has_huge_pages", "memory_of"]
