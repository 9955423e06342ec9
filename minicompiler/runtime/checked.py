"""Checked mode at run time: kernels run one by one, and what they read and make is looked at.

    m = mc.compile("net.onnx", checked=True);  m(x)

    RunError: Log "log1" (net.onnx:3) makes NaN: its inputs have none
    RunError: an index is out of range in Gather "rows" (net.onnx:7): index 7 is out of bounds ...
    RuntimeWarning: Div "div1" (net.onnx:4) makes infinities: its inputs have none
    InternalError: fused_add_3 reads memory that holds no value at that time

Memory that holds no value, or one that no later kernel reads, is filled with a pattern (a NaN). A
kernel that is given nothing else, or makes NaN from some of it, reads memory too early or too late.
"""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minicompiler.errors import InternalError, RunError
from minicompiler.runtime.module import Module
from minicompiler.runtime.plan import Location, Plan, Size, evaluate, nbytes, numpy_dtype
from minicompiler.runtime.pool import get_pool
from minicompiler.runtime.profile import _symbol, _trampolines

# A NaN in float16, bfloat16, float32 and float64 (a signalling one in the last).
POISON = np.uint16(0xFFF5)

Dims = Mapping[str, int]
Steps = Iterator[tuple[str, Sequence[np.ndarray], Sequence[np.ndarray]]]


@dataclass(frozen=True)
class Tensor:
    """A tensor as a kernel sees it: its logical shape, and how it lies in memory.

    parts: per dimension in memory (axis, divisor, modulus), the index being axis // divisor %
    modulus (modulus 0: none); None: row-major.
    """

    dtype: str
    shape: tuple[Size, ...]
    parts: tuple[tuple[int, int, int], ...] | None = None


@dataclass(frozen=True, eq=False)
class CheckedCall:
    """What is known of one call of the plan.

    Attributes:
        tensors: for each argument; None for a constant that the compiler made for this kernel.
        results: how many of them, the last ones, the call makes.
        sources: for each input of `replay`, the position in `tensors` or a constant.
        indexed: whether data decides what the kernel reads or writes.
        replay: gives, for inputs as numpy arrays and the dimensions, every node of the kernel as
            text with its inputs and results. Raises IndexError that names the node
            whose index is out of range.
    """

    tensors: tuple[Tensor | None, ...]
    results: int
    sources: tuple[int | np.ndarray, ...]
    indexed: bool
    replay: Callable[[Sequence[np.ndarray], Dims], Steps]


class CheckedModule(Module):
    """A module whose every call is checked. A file that it is saved to holds no checks."""

    _on_threads = False

    def __init__(self, *args: Any, checks: Sequence[CheckedCall], **kwargs: Any) -> None:
        """checks: one for each call of the plan; the other arguments are those of Module."""
        super().__init__(*args, **kwargs)
        self.checks = tuple(checks)

    def _start(self) -> Any:
        super()._start()
        return _CheckedPool(self)


class _CheckedPool:
    """Stands in for the pool of threads: a region walks the plan in Python."""

    handle = None

    def __init__(self, module: CheckedModule) -> None:
        self.module = module
        self.lock = threading.Lock()
        kinds = {(len(c.args), len(c.dims)) for c in module.plan.calls}
        self.trampolines = _trampolines(kinds)

    def region(self, handle: None, main: Any, table: ctypes.c_void_p, threads: int) -> int:
        del handle, main
        with self.lock:
            _Run(self.module, table.value or 0, self.trampolines).run(threads)
        return threads


class _Run:
    """One call of a module."""

    def __init__(self, module: CheckedModule, table: int, library: Any) -> None:
        self.plan: Plan = module.plan
        self.checks, self.library, self.layout = module.checks, library, module._layout
        self.table: Any = (ctypes.c_int64 * self.layout.length).from_address(table)
        first = self.layout.dims
        self.names = {d.name: self.table[first + k] for k, d in enumerate(self.plan.dims)}
        for name, size in self.plan.named:
            self.names[name] = evaluate(size, self.names)
        self.limits: dict[str, int] = {}

    def run(self, threads: int) -> None:
        self.limits = {c.dim: evaluate(c.most, self.names) for c in self.plan.counts}
        _poison(self.table[self.layout.arena], evaluate(self.plan.arena, self.names | self.limits))
        for k, (call, check) in enumerate(zip(self.plan.calls, self.checks, strict=True)):
            for at, c in enumerate(self.plan.counts):
                if c.before == k:
                    self._count(at)
            arrays = [
                None if t is None else self._array(t, location)
                for t, location in zip(check.tensors, call.args, strict=True)
            ]
            split = len(arrays) - check.results
            before = self._logical(arrays[:split], check.tensors[:split])
            given = [s if isinstance(s, np.ndarray) else before[s] for s in check.sources]
            for a in arrays[:split]:
                if a is not None and a.size and _empty_parts(a).all() and self._counts_some():
                    raise self._no_value(call.kernel)
            if check.indexed:
                self._replay_indices(call.kernel, check, given)
            words = [self.table[self.layout.kernels[call.kernel]]]
            words += [self._address(location) for location in call.args]
            words += [self.names[d] for d in call.dims]
            words.append(self.table[self.layout.workspace])
            argument = (ctypes.c_int64 * len(words))(*words)
            run = self.library.address(_symbol(len(call.args), len(call.dims)))
            get_pool(threads).run(run, ctypes.addressof(argument), threads)
            made = self._logical(arrays[split:], check.tensors[split:])
            self._look(call.kernel, check, given, made)
            self._bury(k)

    # ---- memory ---------------------------------------------------------------------------------
    def _address(self, location: Location) -> int:
        place, at = location
        if place == "arena":
            return int(self.table[self.layout.arena]) + evaluate(at, self.names)
        assert isinstance(at, int)
        first = {"input": self.layout.inputs, "output": self.layout.outputs}
        return int(self.table[first.get(place, self.layout.constants) + at])

    def _array(self, t: Tensor, location: Location) -> np.ndarray:
        """The tensor's memory, in its dimensions there."""
        # What has not been counted yet may be as large as there is memory for.
        shape = tuple(evaluate(s, self.limits | self.names) for s in t.shape)
        if t.parts is not None:
            shape = tuple(m or -(-shape[axis] // d) for axis, d, m in t.parts)
        dtype = numpy_dtype(t.dtype)
        raw: Any = (ctypes.c_uint8 * nbytes(shape, dtype)).from_address(self._address(location))
        return np.frombuffer(raw, dtype).reshape(shape) if len(raw) else np.empty(shape, dtype)

    def _logical(self, arrays: Sequence[Any], tensors: Sequence[Tensor | None]) -> list[Any]:
        return [_logical(a, t, self.names) for a, t in zip(arrays, tensors, strict=True)]

    def _count(self, at: int) -> None:
        c = self.plan.counts[at]
        found = ctypes.c_int64.from_address(self._address(c.place)).value
        found = max(min(found, evaluate(c.most, self.names)), 0)
        self.names[c.dim] = found
        self.plan.refuse_counts(c.dim, self.names)
        self.table[self.layout.dims + len(self.plan.dims) + at] = found

    def _counts_some(self) -> bool:
        """Whether every tensor has elements that count: of none, memory holds nothing."""
        return all(self.names.get(c.dim, 0) > 0 for c in self.plan.counts)

    def _bury(self, k: int) -> None:
        """Poison the values that no later call reads."""
        for t, location in zip(self.checks[k].tensors, self.plan.calls[k].args, strict=True):
            if t is None or location[0] != "arena":
                continue
            memory = self._array(t, location)
            start, size = self._address(location), memory.nbytes
            if not self._needed(k, start, start + size):
                _poison(start, size)

    def _needed(self, k: int, start: int, stop: int) -> bool:
        """Whether a call after number k reads any of these bytes before they are written anew."""
        for c in self.plan.counts:
            if c.before > k and c.place[0] == "arena" and start <= self._address(c.place) < stop:
                return True
        for call, check in zip(self.plan.calls[k + 1 :], self.checks[k + 1 :], strict=True):
            split = len(call.args) - check.results
            for n, (t, location) in enumerate(zip(check.tensors, call.args, strict=True)):
                if t is None or location[0] != "arena":
                    continue
                at = self._address(location)
                if at < stop and start < at + self._array(t, location).nbytes:
                    return n < split
        return False

    # ---- values ---------------------------------------------------------------------------------
    def _replay_indices(self, kernel: str, check: CheckedCall, given: Sequence[Any]) -> None:
        try:
            for _ in check.replay(given, self.names):
                pass
        except IndexError as error:
            raise RunError(
                f"an index is out of range in {error}",
                where=kernel,
                hint="without checked=True such an index is moved to the edge of the tensor",
            ) from error

    def _look(
        self, kernel: str, check: CheckedCall, given: Sequence[Any], made: Sequence[Any]
    ) -> None:
        """Raise for NaN, and warn of infinities, that this kernel makes."""
        for what, test in (("NaN", np.isnan), ("infinities", np.isinf)):
            if _any(test, given) or not _any(test, made):
                continue
            if any(a is not None and _empty_parts(a).any() for a in given):
                raise self._no_value(kernel)
            anywhere = False
            for node, before, after in check.replay(given, self.names):
                anywhere = anywhere or _any(test, after)
                if _any(test, after) and not _any(test, before):
                    text = f"{node} makes {what}: its inputs have none"
                    if what == "NaN":
                        raise RunError(text, where=kernel)
                    warnings.warn(text, RuntimeWarning, stacklevel=6)
                    return
            # A constant of the model may hold them: a mask of minus infinity.
            if not anywhere:
                raise InternalError(f"{kernel} makes {what} where numpy does not")

    def _no_value(self, kernel: str) -> InternalError:
        return InternalError(f"{kernel} reads memory that holds no value at that time")


def _logical(array: np.ndarray | None, t: Tensor | None, names: Dims) -> np.ndarray | None:
    """The elements of a tensor in row-major order, without padding."""
    if array is None or t is None or t.parts is None:
        return array
    shape = tuple(evaluate(s, names) for s in t.shape)
    grid = np.ix_(*map(np.arange, shape))
    places = [grid[axis] // d % m if m else grid[axis] // d for axis, d, m in t.parts]
    return np.broadcast_to(array[tuple(places)], shape)


def _poison(start: int, size: int) -> None:
    if size >= 2:
        raw: Any = (ctypes.c_uint8 * (size // 2 * 2)).from_address(start)
        np.frombuffer(raw, np.uint16)[:] = POISON


def _any(test: Callable[[Any], Any], arrays: Sequence[Any]) -> bool:
    """Whether the test holds for any number of the floating-point arrays."""
    for a in arrays:
        if a is None or "float" not in a.dtype.name or a.dtype.itemsize < 2:
            continue
        with np.errstate(invalid="ignore"):
            found = test(a if a.dtype.kind == "f" else a.astype(np.float32))
        if bool(np.any(found & ~_empty_parts(a))):
            return True
    return False


def _empty_parts(a: np.ndarray) -> np.ndarray:
    """Which elements hold nothing but the pattern; those of one byte cannot tell."""
    width = a.dtype.itemsize
    if width < 2:
        return np.zeros(a.shape, np.bool_)
    words = np.ascontiguousarray(a).reshape(-1).view(np.uint16).reshape(*a.shape, width // 2)
    return np.asarray((words == POISON).all(-1))


__all__ = ["POISON", "CheckedCall", "CheckedModule", "Tensor"]
