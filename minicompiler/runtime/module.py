"""A compiled model in memory: checks arguments, gives them to the native main, returns arrays.

    y, = m(x)                          inputs in the order of m.inputs
    m.run({"x": x})["y"]               by name;  out={"y": y} writes into the caller's array
    m.save("model.mc");  m = load("model.mc", threads=2)      without the compiler

Calls may come from many Python threads at once: each takes a context of its own (arena, workspace,
table of addresses). One call at a time runs on all threads of the pool, others on their own thread.
Usual calls are checked and made by native code (`entry`); any other is checked here.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import struct
import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np

from minicompiler.errors import MinicompilerError, RunError
from minicompiler.runtime import caches, savefile
from minicompiler.runtime.arguments import as_array, as_input, check_names, check_out
from minicompiler.runtime.arrays import address, address_of_part, overlap, span
from minicompiler.runtime.entry import MISSING, REFUSED, entry
from minicompiler.runtime.frame import Frame, Words
from minicompiler.runtime.loader import Library
from minicompiler.runtime.pages import HUGE_PAGE
from minicompiler.runtime.plan import MAIN, Plan, Tensor, evaluate, numpy_dtype
from minicompiler.runtime.pool import available_threads, get_pool, kernel_symbols, region_address
from minicompiler.runtime.shapes import Shapes, Sizes, number_in
from minicompiler.target import Target

_FORMAT = 1  # of the header of a saved module
_CACHE_LINE = 64
_ALIGNED_BYTES = 64 << 10  # outputs from here on start at a cache line
_KEPT_BYTES = 4 << 20  # numpy asks for huge pages from here on, which are handed out quickly
_CHECKED_BYTES = 16 << 20  # arenas from here on are compared with the available memory

_ndarray = np.ndarray
_empty = np.empty
_address_of = ctypes.addressof
_SEQUENCES = (list, tuple)
_living: weakref.WeakSet[Module] = weakref.WeakSet()


class Module:
    """A model that can be called. `driver.compile` and `load` make it.

    Attributes:
        inputs, outputs: name, dtype and shape of each, in call order.
        threads: how many threads a call uses.
        stages: what the compiler recorded, empty for a loaded module.
    """

    _on_threads = True  # a call is one region of the pool

    def __init__(
        self,
        plan: Plan,
        objects: Mapping[str, bytes],
        main: bytes,
        constants: Iterable[np.ndarray],
        target: Target,
        threads: int | None = None,
        stages: Sequence[Any] = (),
    ) -> None:
        """objects: kernel name -> object file; main: object file of the function MAIN.

        On a machine that lacks features of `target` the module can be saved, but not called.
        """
        self.plan = plan
        self.target = target
        self.threads = available_threads() if threads is None else threads
        if self.threads < 1:
            raise RunError(f"a module cannot run on {threads} threads", hint="threads=1 or more")
        self.stages = tuple(stages)
        self.inputs = plan.inputs
        self.outputs = plan.outputs
        self._objects = dict(objects)
        self._main_object = main
        self._constants = [np.asarray(c, c.dtype.newbyteorder("="), order="C") for c in constants]
        self._copied = [
            (i, place) for i, place in enumerate(plan.results) if place != ("output", i)
        ]
        self._grown = {c.output: c for c in plan.caches}
        self._layout = plan.table()
        self._shapes = Shapes(plan, self.threads)
        self._dtypes = self._shapes.dtypes
        self._trimmed = self._shapes.counted
        self._all_new = (None,) * len(plan.outputs)
        self._signature = self._shapes.signature if self._on_threads else None
        # Inputs and outputs lie at the start of the table.
        self._pack = struct.Struct(f"{self._layout.arena}q").pack_into
        self._free: list[_Context] = []
        self._pool: Any = None
        self._template: list[int] = []
        if not target.missing_features(Target.host()):
            self._link()
        _living.add(self)

    def __call__(
        self, *arrays: Any, out: Sequence[np.ndarray | None] | None = None
    ) -> tuple[Any, ...]:
        """The outputs for some inputs: arrays, DLPack tensors, or Python numbers and lists.

        out: arrays to write outputs into (None: a new one); they must not overlap an input, but for
        caches (runtime/caches.py).
        Raises RunError when an argument does not fit.
        """
        try:
            context = self._free.pop()
        except IndexError:
            context = self._new_context()
        try:
            if out is None:
                given: tuple[Any, ...] = self._all_new
            else:
                given = tuple(out) if type(out) in _SEQUENCES else ()
            # Usually the sizes are those of the last call.
            end = self._enter(context.address, arrays, given)
            if end == REFUSED and self._follow(context, arrays, given):
                end = self._enter(context.address, arrays, given)
            if end == MISSING:
                given = context.with_new(given)
                end = self._enter(context.address, arrays, given)
            if end == REFUSED:  # unusual, or wrong
                arrays, given = self._call_checked(context, arrays, out)
            if self.plan.checks:
                self._refuse_counts(context)
            if self._trimmed:
                given = self._trimmed_results(context, given)
        finally:
            self._free.append(context)
        if self._copied:
            self._copy(arrays, given)
        return given

    def _new_context(self) -> _Context:
        if self._pool is None:
            self._pool = self._start()
        if self._signature is None:
            return _Context(self._template)
        callee = (self._pool.handle.value, self._main.value or 0, self.threads)
        return _Context(self._template, callee, self._signature)

    def _follow(self, context: _Context, inputs: Sequence[Any], outputs: Sequence[Any]) -> bool:
        """Prepares a context for other sizes than the last ones, if the arguments tell them."""
        sizes = None if self._signature is None else self._shapes.follow(inputs, outputs)
        if sizes is None or sizes is context.sizes:
            return False
        context.prepare(sizes, self._layout.arena)
        return True

    def _call_checked(
        self, context: _Context, arrays: tuple[Any, ...], out: Any
    ) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """Any call: inputs and results as arrays. Raises RunError where something does not fit."""
        if len(arrays) != len(self._dtypes):
            raise self._wrong_count("input", self.inputs, len(arrays))
        if self._grown:
            return self._call_growing(context, arrays, out)
        given = tuple(map(as_input, arrays, self._dtypes, self.inputs))
        sizes = self._shapes.measure_arrays(given)
        results = self._given(out, sizes)
        every = (*given, *results)
        addresses = [*map(address, every)]
        if out is not None:
            self._refuse_overlap(every, addresses)
        context.prepare(sizes, self._layout.arena)
        self._execute(context, addresses)
        return given, results

    def _execute(self, context: _Context, addresses: list[int]) -> None:
        """Runs the native main for arguments that have been checked."""
        self._pack(context.table, 0, *addresses)
        self._pool.region(self._pool.handle, self._main, context.table_address, self.threads)

    def _call_growing(
        self, context: _Context, arrays: Sequence[Any], out: Any
    ) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """A call of a module with caches: the first part of each is put in its place."""
        grown = {c.input for c in self.plan.caches}
        given = tuple(
            as_array(a, dtype, t) if i in grown else as_input(a, dtype, t)
            for i, (a, dtype, t) in enumerate(zip(arrays, self._dtypes, self.inputs, strict=True))
        )
        shapes = [a.shape for a in given]
        told = tuple(number_in(given[i]) for i in self._shapes.telling)
        sizes = self._shapes.measure(shapes, (*told, 0))
        results = self._given(out, sizes)
        addresses = [*map(address_of_part, given), *map(address_of_part, results)]
        present = [results[c.output] for c in self.plan.caches]
        names = [f'out= for output "{self.outputs[c.output].name}"' for c in self.plan.caches]
        room = caches.common_room(self.plan.caches, present, names)
        placed = []  # caches whose first part lies where it belongs already
        for c, array in zip(self.plan.caches, present, strict=True):
            same = addresses[c.input] == addresses[len(given) + c.output]
            if same and caches.same_strides(given[c.input], array):
                placed.append(c.input)
        self._refuse_overlap((*given, *results), addresses, placed)
        for c, array in zip(self.plan.caches, present, strict=True):
            if c.input not in placed:
                past = given[c.input]
                np.copyto(caches.first_part(array, c.axis, past.shape[c.axis]), past)
        if room:
            sizes = self._shapes.measure(shapes, (*told, room))
        context.prepare(sizes, self._layout.arena)
        self._execute(context, addresses)
        return given, results

    def run(
        self, inputs: Mapping[str, Any], out: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, Any]:
        """The outputs by name for inputs by name; `out` may name some of the outputs."""
        reads, writes = [t.name for t in self.inputs], [t.name for t in self.outputs]
        if inputs.keys() != set(reads):
            check_names("input", reads, inputs, complete=True)
        if out is not None and not out.keys() <= set(writes):
            check_names("output", writes, out, complete=False)
        results = self(
            *[inputs[n] for n in reads],
            out=None if out is None else [out.get(n) for n in writes],
        )
        return dict(zip(writes, results, strict=True))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the module to a file for `load`. Raises RunError when that fails."""
        header = {
            "module": _FORMAT,
            "plan": self.plan.to_json(),
            "target": self.target.to_json(),
            "kernels": list(self._objects),
            "constants": [c.dtype.name for c in self._constants],
        }
        blobs: dict[str, savefile.Blob] = {"main": self._main_object}
        for name, data in self._objects.items():
            blobs[f"kernel/{name}"] = data
        for k, c in enumerate(self._constants):
            # bfloat16 is not a number type of numpy itself.
            blobs[f"constant/{k}"] = c if c.dtype.isbuiltin == 1 else c.view(f"u{c.dtype.itemsize}")
        savefile.write(path, header, blobs)

    def __repr__(self) -> str:
        inputs, outputs = (", ".join(map(str, ts)) for ts in (self.inputs, self.outputs))
        return f"Module({inputs} -> {outputs}; {self.target.level}, threads={self.threads})"

    # ---- native code ----------------------------------------------------------------------------
    def _link(self) -> None:
        symbols = kernel_symbols()
        kernels = self.plan.kernels
        images = [self._objects[name] for name in kernels]
        self._library = Library([*images, self._main_object], [*kernels, MAIN], symbols)
        self._main = ctypes.c_void_p(self._library.address(MAIN))
        self._enter = entry(region_address())
        layout = self._layout
        template = [0] * layout.length
        for k, c in enumerate(self._constants):
            template[layout.constants + k] = address(c)
        for name, slot in layout.kernels.items():
            template[slot] = self._library.address(name)
        self._template = template

    def _start(self) -> Any:
        self.target.check_host("this module")
        return get_pool(self.threads)

    def _copy(self, arrays: Sequence[np.ndarray], results: Sequence[np.ndarray]) -> None:
        """Fill the outputs that no kernel writes."""
        sources: dict[str, Sequence[np.ndarray]] = {
            "input": arrays, "output": results, "constant": self._constants,
        }  # fmt: skip
        for i, (place, at) in self._copied:
            assert isinstance(at, int)
            # An output may hold the same elements under another shape.
            np.copyto(results[i], sources[place][at].reshape(results[i].shape))

    def _counted(self, context: _Context) -> dict[str, int]:
        """The dimensions of a call, those that kernels have counted included."""
        assert context.sizes is not None
        first = self._layout.dims + len(self.plan.dims)
        dims = dict(context.sizes.known)
        dims.update((c.dim, context.table[first + k]) for k, c in enumerate(self.plan.counts))
        return dims

    def _refuse_counts(self, context: _Context) -> None:
        """Raises RunError where the native main found that a condition does not hold."""
        failed = context.table[self._layout.failed]
        if failed:
            context.table[self._layout.failed] = 0
            raise self.plan.checks[failed - 1].error(self._counted(context), "sizes of data")

    def _trimmed_results(self, context: _Context, results: Sequence[Any]) -> tuple[Any, ...]:
        """Outputs with their shapes, now that the kernels have counted."""
        dims = self._counted(context)
        trimmed = list(results)
        for i in self._trimmed:
            shape = tuple(evaluate(s, dims) for s in self.outputs[i].shape)
            # Elements lie without gaps, so those that count come first.
            trimmed[i] = results[i].reshape(-1)[: math.prod(shape)].reshape(shape)
        return tuple(trimmed)

    # ---- arguments ------------------------------------------------------------------------------
    def _given(self, out: Any, sizes: Sizes) -> tuple[np.ndarray, ...]:
        """The caller's arrays for the outputs, checked, and new ones where there is none."""
        if out is None:
            return tuple(starmap(_new, sizes.outputs))
        if type(out) not in (list, tuple) and (
            isinstance(out, np.ndarray) or not isinstance(out, Sequence)
        ):
            raise RunError(
                f"out= is {type(out).__name__}, expected a list or tuple with an array per output",
                hint="m(x, out=[y]), or m.run({...}, out={...})",
            )
        if len(out) != len(self.outputs):
            raise self._wrong_count("output", self.outputs, len(out))
        results: list[np.ndarray] = []
        for t, array, spec in zip(self.outputs, out, sizes.outputs, strict=True):
            if array is None:
                results.append(_new(*spec))
                continue
            if self._trimmed and len(results) in self._trimmed:
                raise RunError(f'out= for output "{t.name}", whose size is known only afterwards')
            check_out(t, array, spec[0], spec[1], parts=len(results) in self._grown)
            results.append(array)
        return tuple(results)

    def _refuse_overlap(
        self, arrays: Sequence[np.ndarray], addresses: list[int], placed: Sequence[int] = ()
    ) -> None:
        """Inputs and outputs may not share memory, but for inputs that are `placed`."""
        count = len(self.inputs)
        used = [k for k in range(len(arrays)) if k not in placed]
        pair = overlap([span(arrays[k], addresses[k]) for k in used], sum(k < count for k in used))
        if pair is None:
            return
        names = [f'input "{t.name}"' for t in self.inputs]
        names += [f'out= for output "{t.name}"' for t in self.outputs]
        raise RunError(
            f"{names[used[pair[1]]]} overlaps {names[used[pair[0]]]}",
            hint="outputs are written while inputs are still read: use separate arrays",
        )

    def _wrong_count(self, kind: str, expected: Sequence[Tensor], got: int) -> RunError:
        names = ", ".join(map(str, expected))
        call = "m(" + ", ".join(t.name for t in expected) + ")" if kind == "input" else "out=[...]"
        return RunError(
            f"{got} {kind}s given, the model has {len(expected)}: {names}",
            hint=f"{call} with one array for each, None for an output that may be new"
            if kind == "output"
            else f"{call}, or m.run({{name: array}})",
        )


def load(path: str | os.PathLike[str], threads: int | None = None) -> Module:
    """The module that `Module.save` wrote; its constants stay in the mapped file.

    Raises RunError when the file is damaged or no saved module, or this processor lacks
    instructions that it uses.
    """
    header, blobs = savefile.read(path)
    name = Path(path).name
    if header.get("module") != _FORMAT:
        raise RunError(
            f'"{name}" holds no compiled model that this minicompiler can load',
            hint="load what Module.save of the same version wrote",
        )
    try:
        target = Target.from_json(header["target"])
        plan = Plan.from_json(header["plan"])
        objects = {kernel: bytes(blobs[f"kernel/{kernel}"]) for kernel in header["kernels"]}
        main = bytes(blobs["main"])
        constants = [
            blobs[f"constant/{k}"].view(numpy_dtype(dtype))
            for k, dtype in enumerate(header["constants"])
        ]
        if not set(plan.kernels) <= objects.keys() or plan.constants != len(constants):
            raise ValueError("kernels or constants are missing")
    except (KeyError, TypeError, ValueError, AttributeError, MinicompilerError) as error:
        raise RunError(f'"{name}" is not a complete saved module: {error}') from error
    target.check_host(f'"{name}"')
    return Module(plan, objects, main, constants, target, threads)


class _Context(Frame):
    """What one running call has for itself: the native table, arena and workspace."""

    __slots__ = ("kept", "memory", "sizes")

    def __init__(
        self,
        template: Sequence[int],
        callee: tuple[int, int, int] = (0, 0, 0),
        signature: Words | None = None,
    ) -> None:
        super().__init__(template, callee, signature)
        self.memory: _Memory | None = None
        self.sizes: Sizes | None = None  # those that the table is set up for
        self.kept: dict[int, list[np.ndarray]] = {}  # memory of each output's last two arrays

    def prepare(self, sizes: Sizes, slot: int) -> None:
        """Set up for some sizes: `slot` is that of the arena, workspace and dims follow it."""
        if self.sizes is sizes:
            return
        self.sizes = None  # stays so if there is not enough memory
        self.expect(None)
        if self.memory is None or self.memory.size < sizes.memory:
            self.memory = None  # gives the old one back first
            self.memory = _Memory(sizes.memory)
        base = self.memory.address
        words: list[ctypes.c_int64 | int] = [base, base + sizes.arena, *sizes.dims]
        self.table[slot : slot + len(words)] = words
        self.sizes = sizes
        self.expect(sizes.words)

    def with_new(self, outputs: tuple[Any, ...]) -> tuple[np.ndarray, ...]:
        """The outputs of a call of these sizes, with new arrays for None."""
        assert self.sizes is not None
        specs = self.sizes.outputs
        return tuple([self._made(i, *specs[i]) if y is None else y for i, y in enumerate(outputs)])

    def _made(self, k: int, shape: tuple[int, ...], dtype: np.dtype[Any], size: int) -> np.ndarray:
        """An array for output k. The system takes longer to hand out pages of fresh memory than a
        kernel to fill them, so memory of earlier results is used again once nobody holds these."""
        if not _ALIGNED_BYTES <= size < _KEPT_BYTES:
            return _new(shape, dtype, size)
        blocks = self.kept.setdefault(k, [])
        for i in range(len(blocks)):
            if blocks[i].nbytes == size + _CACHE_LINE and _holders(blocks, i) == _NOBODY:
                return _at_line(shape, dtype, blocks[i])
        made = _new(shape, dtype, size)
        assert isinstance(made.base, np.ndarray)
        blocks[1:] = blocks[:1]  # the caller may still hold the result of the last call
        blocks[:1] = [made.base]
        return made


class _Memory:
    """Private zeroed pages, on huge pages where the system has them; unmapped with this object."""

    __slots__ = ("_map", "_pin", "address", "size")

    def __init__(self, size: int) -> None:
        """Raises RunError when the system does not have that much memory."""
        self.size = max(size, 1)
        slack = 0 if size < HUGE_PAGE else HUGE_PAGE
        available = _available_memory() if size >= _CHECKED_BYTES else None
        if available is not None and size > available:
            raise _too_large(size, f"{available / 2**30:.2f} GiB are available")
        try:
            if hasattr(mmap, "MAP_PRIVATE"):  # shared pages would connect a forked child
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
                self._map = mmap.mmap(-1, self.size + slack, flags=flags)
            else:
                self._map = mmap.mmap(-1, self.size + slack)
        except (OSError, ValueError, OverflowError, MemoryError) as error:
            raise _too_large(size, f"the system refused it: {error}") from None
        if slack and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self._pin = ctypes.c_char.from_buffer(self._map)
        start = _address_of(self._pin)
        self.address = start + (-start % slack if slack else 0)


def _too_large(size: int, why: str) -> RunError:
    return RunError(
        f"this call needs {size / 2**30:.2f} GiB for intermediate values; {why}",
        hint="use smaller inputs, or split the batch",
    )


def _available_memory() -> int | None:
    """Bytes this process may still take, as far as the system tells."""
    limits = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) << 10)
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # also the word "max"
            limits.append(int(Path(path).read_text()))
    return min(limits, default=None)


# ---- arrays -------------------------------------------------------------------------------------
def _new(shape: tuple[int, ...], dtype: np.dtype[Any], size: int) -> np.ndarray:
    """An array to write to; a large one starts at a cache line, so that no vector crosses one."""
    try:
        if size < _ALIGNED_BYTES:
            return _empty(shape, dtype)
        raw = _empty(size + _CACHE_LINE, np.uint8)
    except MemoryError:
        raise RunError(
            f"there is no memory for an output of {size / 2**30:.2f} GiB",
            hint="use smaller inputs, or split the batch",
        ) from None
    return _at_line(shape, dtype, raw)


def _at_line(shape: tuple[int, ...], dtype: np.dtype[Any], raw: np.ndarray) -> np.ndarray:
    """An array in a block of memory, from its first cache line on."""
    return _ndarray(shape, dtype, raw, -address(raw) % _CACHE_LINE)


def _holders(blocks: list[np.ndarray], k: int) -> int:
    """References to a block, some of which are the list's and the interpreter's own. Views of an
    array, and views of these, refer to the block."""
    return sys.getrefcount(blocks[k])


_NOBODY = _holders([np.empty(0)], 0)


def _after_fork() -> None:
    """In the child of a fork the pool's threads do not exist: the next call asks for a new pool."""
    for module in list(_living):
        module._pool = None
        module._free.clear()  # they name the pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

__all__ = ["Module", "load"]
