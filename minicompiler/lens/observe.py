"""A compiled model run call by call, so that every value between kernels can be looked at.

    seen = observe(module, calls, [x])
    seen.results[k]        the results of call k, as they lay in memory right after it
    seen.changed           arguments that differed from what their maker had left there

The calls run on the module's own plan, arena and threads: what is observed is what a call of the
module computes, except for the native main.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from minicompiler.errors import RunError
from minicompiler.ir.arith import sizes
from minicompiler.ir.graph import Item, Value, layout_of, type_of
from minicompiler.lower.memory import KernelCall
from minicompiler.runtime.arrays import address
from minicompiler.runtime.module import Module, _as_input, _Context
from minicompiler.runtime.plan import Location, evaluate
from minicompiler.runtime.pool import get_pool
from minicompiler.runtime.profile import _symbol, _trampolines

from .memory import POISON, from_memory, physical_shape

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Overwritten:
    """Argument number `argument` of call number `call` was changed between its maker and the
    call."""

    call: int
    argument: int


@dataclasses.dataclass
class Observed:
    """What a run call by call has shown. dims: the sizes of dimensions, counted ones included."""

    results: list[tuple[Array, ...]]
    changed: list[Overwritten]
    overlaps: list[int]  # calls that write where they read
    dims: dict[str, int]


def observe(module: Module, calls: Sequence[KernelCall], arrays: Sequence[Array]) -> Observed:
    """Runs the calls of a module's plan one by one; `calls` are the plan's, in its order.

    Raises RunError where an input does not fit, or another call holds the threads.
    """
    outputs = module(*arrays)  # checks the arguments
    return _Run(module, calls, arrays, outputs).run()


class _Run:
    def __init__(
        self,
        module: Module,
        calls: Sequence[KernelCall],
        arrays: Sequence[Array],
        outputs: Sequence[Array],
    ) -> None:
        self.module, self.calls, self.plan = module, calls, module.plan
        self.inputs = [
            _as_input(*x) for x in zip(arrays, module._dtypes, module.inputs, strict=True)
        ]
        measured = module._measure(tuple(a.shape for a in self.inputs))
        # Outputs whose size is counted are given room for the most, as the module does.
        self.outputs = [np.empty(shape, dtype) for shape, dtype, _ in measured.outputs]
        layout = module._layout
        self.context = _Context(layout.length, module._template)
        self.context.prepare(measured, layout.arena)
        self.table: Any = self.context.table
        assert self.context.memory is not None
        ctypes.memset(self.context.memory.address, POISON, self.context.memory.size)
        module._pack(self.table, 0, *map(address, (*self.inputs, *self.outputs)))
        self.names = {d.name: n for d, n in zip(self.plan.dims, measured.dims, strict=True)}
        for name, size in self.plan.named:
            self.names[name] = evaluate(size, self.names)
        self.first = {
            "input": layout.inputs, "output": layout.outputs, "constant": layout.constants,
        }  # fmt: skip

    def run(self) -> Observed:
        seen = Observed([], [], [], self.names)
        written: dict[tuple[int, int], bytes] = {}
        kinds = {(len(c.args), len(c.dims)) for c in self.plan.calls}
        library = _trampolines(kinds)
        with get_pool(self.module.threads).lease() as lease:
            if lease is None:
                raise RunError(
                    "another call is using the threads", hint="verify while nothing runs"
                )
            for k, (call, made) in enumerate(zip(self.plan.calls, self.calls, strict=True)):
                for c in self.plan.counts:
                    if c.before == k:
                        at = self.address(c.place)
                        count = ctypes.c_int64.from_address(at).value
                        self.names[c.dim] = max(min(count, evaluate(c.most, self.names)), 0)
                count = len(made.args)
                for n, (v, place) in enumerate(zip(made.args, call.args[:count], strict=True)):
                    before = written.get(_key(v))
                    if before is not None and before != self.bytes_at(place, len(before)):
                        seen.changed.append(Overwritten(k, n))
                if self.overlapping(call.args[:count], call.args[count:], made):
                    seen.overlaps.append(k)
                words = self.words(call)
                fn = library.address(_symbol(len(call.args), len(call.dims)))
                lease.run(fn, ctypes.addressof(words), self.module.threads)
                found = []
                for v, place in zip(made.results, call.args[count:], strict=True):
                    raw = self.bytes_at(place, self.nbytes(v))
                    written[_key(v)] = raw
                    found.append(self.value(v, raw))
                seen.results.append(tuple(found))
        return seen

    def address(self, location: Location) -> int:
        place, at = location
        if place == "arena":
            return int(self.table[self.module._layout.arena]) + evaluate(at, self.names)
        assert isinstance(at, int)
        return int(self.table[self.first[place] + at])

    def words(self, call: Any) -> Any:
        """What a trampoline reads: the kernel, its tensors, its dimensions, the workspace."""
        layout = self.module._layout
        found = [self.table[layout.kernels[call.kernel]], *map(self.address, call.args)]
        found += [self.names[d] for d in call.dims]
        found.append(self.table[layout.workspace])
        return (ctypes.c_int64 * len(found))(*found)

    def shapes(self, v: Value) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The logical and the physical shape of a value."""
        logical = tuple(sizes(type_of(v).shape, self.names))
        return logical, physical_shape(logical, layout_of(v))

    def nbytes(self, v: Value) -> int:
        physical = self.shapes(v)[1]
        return int(np.prod(physical, dtype=np.int64)) * type_of(v).dtype.numpy.itemsize

    def value(self, v: Value, raw: bytes) -> Array:
        logical, physical = self.shapes(v)
        array = np.frombuffer(raw, type_of(v).dtype.numpy).reshape(physical)
        return from_memory(array, logical, layout_of(v))

    def bytes_at(self, place: Location, size: int) -> bytes:
        return ctypes.string_at(self.address(place), size)

    def overlapping(
        self, args: Sequence[Location], results: Sequence[Location], made: KernelCall
    ) -> bool:
        """Whether a call writes where it reads, or one result lies in another."""
        written = [
            (self.address(p), self.nbytes(v)) for p, v in zip(results, made.results, strict=True)
        ]
        read = [
            (self.address(p), self.nbytes(v))
            for p, v in zip(args, made.args, strict=True)
            if isinstance(v, Value)
        ]
        pairs = [(w, other) for k, w in enumerate(written) for other in (*read, *written[k + 1 :])]
        return any(a < d + m and d < a + n for (a, n), (d, m) in pairs)


def _key(v: Value | Array) -> tuple[int, int]:
    """Identity of a value; Items of one result are equal though they are different objects."""
    return (id(v.tuple), v.index) if isinstance(v, Item) else (id(v), 0)
