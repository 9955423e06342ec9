"""Calls compiled models with unreadable pages around every buffer: a stray access ends the process.

    python tests/guarded.py                  three networks, and every model of ONNX's test suite
    python tests/guarded.py 0 40             every 40th of them, from number 0

Inputs, outputs, constants and the arena end, and in a second call begin, where a page without any
access does. Prints the name of each model before its calls, so the last one is the guilty one.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from onnx import ModelProto

import minicompiler as mc
from minicompiler.errors import MinicompilerError
from minicompiler.inputs import random_inputs
from minicompiler.runtime import module as module_file
from minicompiler.runtime.module import Module
from minicompiler.runtime.plan import evaluate, nbytes, numpy_dtype

PAGE = mmap.PAGESIZE
LINE = 64
LARGEST = 1 << 24  # bytes of a buffer
_mprotect = ctypes.CDLL(None, use_errno=True).mprotect
_mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Guarded:
    """`size` bytes between two pages that nobody may touch, at the end of its own pages or not."""

    def __init__(self, size: int, at_end: bool = True, align: int = 1) -> None:
        room = -(-max(size, 1) // PAGE) * PAGE
        self._map = mmap.mmap(-1, room + 2 * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        for page in (start, start + PAGE + room):
            if _mprotect(page, PAGE, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        own = -(-size // align) * align
        self.size = size
        self.address = start + PAGE + (room - own if at_end else 0)

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        raw = (ctypes.c_uint8 * self.size).from_address(self.address)
        raw.owner = self  # type: ignore[attr-defined]  # as long as the array lives
        return np.frombuffer(raw, dtype).reshape(shape) if self.size else np.empty(shape, dtype)


def guarded_copy(a: np.ndarray, at_end: bool, align: int = 1) -> np.ndarray:
    made = Guarded(a.nbytes, at_end, align).array(a.shape, a.dtype)
    made[...] = a
    return made


def guarded_constants(m: Module, at_end: bool) -> None:
    """The module's constants move between guards. The code may take them to lie at cache lines."""
    copies = [guarded_copy(c, at_end, LINE) for c in m._constants]
    m._constants = copies
    m._link()
    m._free.clear()


def call(m: Module, sizes: dict[str, int], at_end: bool) -> list[np.ndarray]:
    """One call with everything between guards."""
    guarded_constants(m, at_end)
    feeds = random_inputs(m.plan, sizes, {})
    arrays = [guarded_copy(np.ascontiguousarray(feeds[t.name]), at_end) for t in m.inputs]
    measured = m._shapes.measure([a.shape for a in arrays])
    out: list[np.ndarray | None] = []
    for k, (shape, dtype, size) in enumerate(measured.outputs):
        # Those whose size is only known afterwards cannot be given.
        own = k not in m._trimmed
        out.append(Guarded(size, at_end).array(shape, dtype) if own else None)

    class Memory(Guarded):
        def __init__(self, size: int) -> None:
            super().__init__(size, at_end, LINE)

    usual, module_file._Memory = module_file._Memory, Memory  # type: ignore[misc,assignment]
    try:
        return [np.array(y) for y in m(*arrays, out=out)]
    finally:
        module_file._Memory = usual  # type: ignore[misc]


def too_large(m: Module, sizes: dict[str, int]) -> bool:
    names = dict(sizes)
    for name, size in m.plan.named:
        names[name] = evaluate(size, names)
    names.update((c.dim, evaluate(c.most, names)) for c in m.plan.counts)
    every = [*m.inputs, *m.outputs]
    return any(
        nbytes(tuple(evaluate(s, names) for s in t.shape), numpy_dtype(t.dtype)) > LARGEST
        for t in every
    )


def models() -> Iterator[tuple[str, ModelProto, list[int]]]:
    """Names, models, and the sizes that their symbolic dimensions take."""
    from backend_suite import load_cases, model_of
    from onnx_models import attention, conv_net, mlp

    for threads_of in (mlp, conv_net, attention):
        yield threads_of.__name__, threads_of("n"), [1, 2, 3, 5, 7, 13]
    for case in load_cases(kinds=("node", "simple", "pytorch-operator")):
        yield case.name, model_of(case), [1, 3]


def check(name: str, model: ModelProto, values: list[int], threads: int) -> str:
    """ "fine", "refused" or "large"; the process ends where an access is out of bounds."""
    try:
        m = mc.compile(model, threads=threads, record=False)
    except MinicompilerError:
        return "refused"
    for value in values if m.plan.dims else values[:1]:
        sizes = {d.name: max(value, d.lo) for d in m.plan.dims}
        if too_large(m, sizes):
            return "large"
        try:
            first, second = call(m, sizes, True), call(m, sizes, False)
        except MinicompilerError:
            return "refused"  # the dimensions do not fit together
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)
    return "fine"


def main() -> None:
    faulthandler.enable()
    warnings.simplefilter("ignore")
    start, step = (int(a) for a in sys.argv[1:3]) if len(sys.argv) > 2 else (0, 1)
    counts: dict[str, int] = {}
    for k, (name, model, values) in enumerate(models()):
        if k < 3 or (k - start) % step == 0:
            print(name, flush=True)
            state = check(name, model, values, 1 + k % 2)
            counts[state] = counts.get(state, 0) + 1
    print(counts)


if __name__ == "__main__":
    main()
