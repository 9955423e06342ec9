"""What kernels read of constants, made while compiling: packed weights, and where they lie.

    with Preparation(threads=2) as preparation:
        for v, kernel in calls: preparation.start(v, kernel)
        arguments = [preparation.arguments(v, kernel) for v, kernel in calls]
    constants = settle(constants)       arrays that do not keep the model's file in memory

A kernel comes with functions that compute its constants from those of the graph
(lower/lift_constants.py). Equal ones are computed once; the native code runs without Python's lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from .codegen.native import compile_object
from .ir.graph import Apply, Constant, Value
from .ir.types import DType
from .kernel import Kernel
from .runtime.loader import Library
from .runtime.pages import Block, Pages, memory_of
from .runtime.pool import kernel_symbols
from .target import Target

Array = np.ndarray
_KEPT_MAPPED = 32 << 20  # bytes of a constant that stays in the mapped file of the model
_TILE = 64  # of a transposing copy: 64 rows of 64 elements stay in the first-level cache


class Preparation:
    """The constants of some kernel calls on their way; threads: how many work on them."""

    def __init__(self, threads: int) -> None:
        self.pool = ThreadPoolExecutor(max(threads, 1), "minicompiler-prepare")
        self.libraries: dict[str, Library] = {}
        self.made: dict[tuple[Any, ...], Future[Array]] = {}
        self.sources: dict[int, tuple[Array, Future[Array]]] = {}
        self.pages = Pages()

    def __enter__(self) -> Preparation:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def start(self, v: Apply, kernel: Kernel) -> list[Future[Array]]:
        """Begins with what a call needs, unless that was begun before; one for each of
        `kernel.prepared`."""
        ready: list[Future[Array]] = []
        for n, (symbol, params, dtype, shape) in enumerate(kernel.prepared):
            sources = [ready[k] if kind == "prepared" else self._constant(v, k)
                       for kind, k in params]  # fmt: skip
            key = (symbol, *map(id, sources))
            if key not in self.made:
                address = self._library(kernel).address(symbol)
                kept = ("prepared", n) in kernel.params
                pages = self.pages if kept else None
                # The sources are ahead in the queue, so waiting for them ends.
                self.made[key] = self.pool.submit(_run, address, sources, dtype, shape, pages)
            ready.append(self.made[key])
        return ready

    def arguments(self, v: Apply, kernel: Kernel) -> tuple[Value | Array, ...]:
        """The tensors that a call reads, in the order of the kernel's parameters."""
        ready = self.start(v, kernel)
        found: list[Value | Array] = []
        for kind, k in kernel.params:
            if kind == "prepared":
                found.append(ready[k].result())
            elif kind == "arg":
                value = v.args[k]
                assert value is not None
                found.append(value)
        return tuple(found)

    def _library(self, kernel: Kernel) -> Library:
        if kernel.name not in self.libraries:
            code, exports = kernel.code, [p[0] for p in kernel.prepared]
            if kernel.preparing:
                code = compile_object(kernel.preparing, Target.host())
            self.libraries[kernel.name] = Library(code, exports, kernel_symbols())
        return self.libraries[kernel.name]

    def _constant(self, v: Apply, k: int) -> Future[Array]:
        value = v.args[k]
        assert isinstance(value, Constant)
        data = value.data
        if id(data) not in self.sources:
            # With the array itself, so that its id is not given to another one.
            self.sources[id(data)] = data, self.pool.submit(_contiguous, data)
        return self.sources[id(data)][1]


def _run(
    address: int,
    sources: Sequence[Future[Array]],
    dtype: str,
    shape: Sequence[int],
    pages: Pages | None,
) -> Array:
    """The result of a compile-time function, in `pages` if the module keeps it."""
    arrays = [s.result() for s in sources]
    kind = DType(dtype).numpy
    result = np.empty(shape, kind) if pages is None else pages.empty(shape, kind)
    pointers = [a.ctypes.data for a in [*arrays, result]]
    kinds: list[Any] = [ctypes.c_int32, ctypes.c_int32]
    kinds += [ctypes.c_void_p] * (len(pointers) + 2)
    ctypes.CFUNCTYPE(None, *kinds)(address)(0, 1, None, *pointers, None)
    return result


def _contiguous(a: Array) -> Array:
    """`a` in row-major order; numpy's own copy of a large transposed matrix misses every cache."""
    if a.flags.c_contiguous:
        return a
    if a.ndim != 2 or a.strides[0] >= a.strides[1] or min(a.shape) < _TILE:
        return np.ascontiguousarray(a)
    made = np.empty(a.shape, a.dtype)
    for k in range(0, a.shape[1], _TILE):
        for j in range(0, a.shape[0], _TILE):
            made[j : j + _TILE, k : k + _TILE] = a[j : j + _TILE, k : k + _TILE]
    return made


def settle(constants: Sequence[Array]) -> list[Array]:
    """The constants of a finished plan, in memory of their own.

    Large ones stay in the mapped file of the model, as those of a loaded module do; its pages are
    given back until they are read again.
    """
    found, maps, pages = [], {}, Pages()
    for a in constants:
        source = memory_of(a)
        in_file = isinstance(source, mmap.mmap) and not isinstance(source, Block)
        if in_file and a.nbytes >= _KEPT_MAPPED and a.flags.c_contiguous:
            maps[id(source)] = source
        elif in_file or not isinstance(source, np.ndarray | Block):
            copied = pages.empty(a.shape, a.dtype)
            copied[...] = a
            a = copied
        found.append(a)
    for source in maps.values():
        if hasattr(source, "madvise"):
            with contextlib.suppress(OSError):  # advice only
                source.madvise(mmap.MADV_DONTNEED)
    return found
