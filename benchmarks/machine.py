"""The memory bandwidth of this machine, measured by copies. (Its rate of multiplications:
`minicompiler.machine.Meter`.)

copy = CopyRate(target, 64 << 20, threads=2); copy()   GB/s, read and written
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from minicompiler.codegen.native import compile_object
from minicompiler.runtime.loader import Library
from minicompiler.target import Target


class CopyRate:
    """Bytes of a large array read and written again; calling it gives GB/s (both counted) of the
    fastest of three ways: the C library's copy, vector stores, vector stores past the caches."""

    def __init__(self, target: Target, size: int, threads: int) -> None:
        lanes = target.vector_bytes // 4
        ty = f"<{lanes} x float>"
        text = "".join(
            _COPY.format(name=n, ty=ty, hint=h, align=lanes * 4) for n, h in _STORES.items()
        )
        self._library = Library(compile_object(text, target), _STORES)
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
        self._loops = [kind(self._library.address(name)) for name in _STORES]
        self._source, self._result = (_pages(size) for _ in range(2))
        self._source[:] = 1
        self._result[:] = 0
        self._bounds = [size // 4096 * k // threads * 4096 for k in range(threads + 1)]
        self._pool = ThreadPoolExecutor(threads)
        self._step = target.vector_bytes

    def __call__(self) -> float:
        return max(self._rate(self._copy), *[self._rate(self._loop(f)) for f in self._loops])

    def _rate(self, part: Callable[[int, int], None]) -> float:
        """GB/s with every thread copying its part."""
        start = time.perf_counter()
        list(self._pool.map(part, self._bounds[:-1], self._bounds[1:]))
        return 2 * self._bounds[-1] / (time.perf_counter() - start) / 1e9

    def _copy(self, low: int, high: int) -> None:
        np.copyto(self._result[low:high], self._source[low:high])

    def _loop(self, function: Any) -> Callable[[int, int], None]:
        source, result = self._source.ctypes.data, self._result.ctypes.data
        return lambda low, high: function((high - low) // self._step, result + low, source + low)


def _pages(size: int) -> np.ndarray:
    """Bytes that start at a page."""
    raw = np.empty(size + 4096, np.uint8)
    return raw[-raw.ctypes.data % 4096 :][:size]


_STORES = {"copy_plain": "", "copy_past_caches": ", !nontemporal !0"}
_COPY = """
define void @{name}(i64 %n, ptr %to, ptr %from) #0 {{
entry:
  br label %loop
loop:
  %i = phi i64 [ 0, %entry ], [ %j, %loop ]
  %p = getelementptr {ty}, ptr %from, i64 %i
  %q = getelementptr {ty}, ptr %to, i64 %i
  %v = load {ty}, ptr %p, align {align}
  store {ty} %v, ptr %q, align {align}{hint}
  %j = add i64 %i, 1
  %more = icmp slt i64 %j, %n
  br i1 %more, label %loop, label %done
done:
  ret void
}}
"""
