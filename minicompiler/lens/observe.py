"""A compiled model run call by call, so that every value between kernels can be looked at.

    seen = observe(module, steps, [x])
    seen.value(v)          a value as it lay in memory right after its call (or branch, or loop)
    seen.changed           arguments that differed from what their maker had left there

The calls run on the module's own plan, arena and threads: what is observed is what a call of the
module computes, except for the native main. Of control flow only the results are kept.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from minicompiler.errors import RunError
from minicompiler.ir.arith import sizes
from minicompiler.ir.graph import Input, Item, Value, layout_of, type_of
from minicompiler.lower.memory import Alias, KernelCall, Region, Reserve, Step, kernel_calls
from minicompiler.runtime.arguments import as_input
from minicompiler.runtime.arrays import address
from minicompiler.runtime.module import Module, _Context
from minicompiler.runtime.plan import Location, evaluate
from minicompiler.runtime.pool import get_pool
from minicompiler.runtime.profile import _symbol, _trampolines

from .memory import POISON, from_memory, physical_shape

Array = np.ndarray
Key = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Overwritten:
    """Argument number `argument` of call number `call` was changed between its maker and the
    call."""

    call: int
    argument: int


@dataclasses.dataclass
class Observed:
    """What a run call by call has shown. Calls are numbered as in the plan.

    overlaps: calls that write where they read. dims: the sizes of dimensions, counted ones
    included.
    """

    values: dict[Key, Array]
    changed: list[Overwritten]
    overlaps: list[int]
    dims: dict[str, int]

    def value(self, v: Value) -> Array:
        """The result of a call, a branch or a loop that is not inside of another."""
        return self.values[_key(v)]


def observe(module: Module, steps: Sequence[Step], arrays: Sequence[Array]) -> Observed:
    """Runs the calls of a module's plan one by one; `steps` are those that the plan was made of, in
    its order.

    Raises RunError where an input does not fit, or another call holds the threads.
    """
    outputs = module(*arrays)  # checks the arguments
    return _Run(module, steps, arrays, outputs).run()


class _Run:
    def __init__(
        self,
        module: Module,
        steps: Sequence[Step],
        arrays: Sequence[Array],
        outputs: Sequence[Array],
    ) -> None:
        self.module, self.steps, self.plan = module, steps, module.plan
        self.inputs = [
            as_input(*x) for x in zip(arrays, module._dtypes, module.inputs, strict=True)
        ]
        measured = module._shapes.measure_arrays(self.inputs)
        # Outputs whose size is counted are given room for the most, as the module does.
        self.outputs = [np.empty(shape, dtype) for shape, dtype, _ in measured.outputs]
        layout = module._layout
        self.context = _Context(module._template)
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
        self.seen = Observed({}, [], [], self.names)
        self.written: dict[Key, bytes] = {}
        self.places: dict[Key, Location] = {}
        for call, made in zip(self.plan.calls, kernel_calls(self.steps), strict=True):
            for v, place in zip(made.results, call.args[len(made.args) :], strict=True):
                self.places.setdefault(_key(v), place)
        pairs = zip(_regions(self.steps), self.plan.regions, strict=True)
        self.flags = {id(r): planned.flag for r, planned in pairs}
        kinds = {(len(c.args), len(c.dims)) for c in self.plan.calls}
        self.library = _trampolines(kinds)
        with get_pool(self.module.threads).lease() as lease:
            if lease is None:
                raise RunError(
                    "another call is using the threads", hint="verify while nothing runs"
                )
            self.lease = lease
            self.walk(self.steps, 0, 0)
        return self.seen

    def walk(self, steps: Sequence[Step], k: int, depth: int) -> int:
        """Runs steps whose first call has number k; the number of the first call after them."""
        reserved: list[Value] = []
        for s in steps:
            if isinstance(s, KernelCall):
                self.count(k, depth)
                self.call(s, k, depth == 0)
                k += 1
            elif isinstance(s, Region):
                k = self.region(s, k, depth)
                for v in [*(r.result for r in s.results), *reserved] if depth == 0 else ():
                    if _key(v) in self.places:
                        self.keep(v)
            elif isinstance(s, Reserve):
                if not isinstance(s.value, Input):  # rows, which are copied when all are there
                    reserved.append(s.value)
            else:
                self.alias(s)
        return k

    def region(self, r: Region, k: int, depth: int) -> int:
        """Runs the steps of a branch or a loop as often as its flag says."""
        inner = (*r.steps, *r.last)
        flag = self.flags[id(r)]
        self.count(k, depth)
        while bool(ctypes.c_uint8.from_address(self.address(flag)).value) is r.wanted:
            self.walk(inner, k, depth + 1)
            if not r.repeat:
                break
        for s in r.results:
            self.alias(s)
        return k + sum(1 for _ in kernel_calls(inner))

    def alias(self, s: Alias) -> None:
        if _key(s.source) in self.places:
            self.places.setdefault(_key(s.result), self.places[_key(s.source)])

    def count(self, k: int, depth: int) -> None:
        """The dimensions that are counted before call k."""
        for c in self.plan.counts:
            if c.before == k and c.depth == depth:
                found = ctypes.c_int64.from_address(self.address(c.place)).value
                self.names[c.dim] = max(min(found, evaluate(c.most, self.names)), 0)
                self.plan.refuse_counts(c.dim, self.names)

    def call(self, made: KernelCall, k: int, kept: bool) -> None:
        call = self.plan.calls[k]
        count = len(made.args)
        if kept:
            for n, (v, place) in enumerate(zip(made.args, call.args[:count], strict=True)):
                before = self.written.get(_key(v))
                if before is not None and before != self.bytes_at(place, len(before)):
                    self.seen.changed.append(Overwritten(k, n))
            if self.overlapping(call.args[:count], call.args[count:], made):
                self.seen.overlaps.append(k)
        words = self.words(call)
        fn = self.library.address(_symbol(len(call.args), len(call.dims)))
        self.lease.run(fn, ctypes.addressof(words), self.module.threads)
        for v in made.results if kept else ():
            self.keep(v)

    def keep(self, v: Value) -> None:
        raw = self.bytes_at(self.places[_key(v)], self.nbytes(v))
        self.written[_key(v)] = raw
        self.seen.values[_key(v)] = self.value(v, raw)

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


def _regions(steps: Sequence[Step]) -> Iterator[Region]:
    """All regions, outer before inner, as the plan lists them."""
    for s in steps:
        if isinstance(s, Region):
            yield s
            yield from _regions((*s.steps, *s.last))


def _key(v: Value | Array) -> Key:
    """Identity of a value; Items of one result are equal though they are different objects."""
    return (id(v.tuple), v.index) if isinstance(v, Item) else (id(v), 0)
