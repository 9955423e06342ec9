"""A compiled model in memory: checks arguments, gives them to the native main, returns arrays.

    y, = m(x)                          inputs in the order of m.inputs
    m.run({"x": x})["y"]               by name;  out={"y": y} writes into the caller's array
    m.save("model.mc");  m = load("model.mc", threads=2)      without the compiler

Calls may come from many Python threads at once: each takes a context of its own (arena, workspace,
table of addresses). One call at a time runs on all threads of the pool, others on their own thread.
What only depends on the shapes of the inputs is computed once per combination of shapes.
"""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import math
import mmap
import os
import struct
import weakref
from collections.abc import Iterable, Mapping, Sequence
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np

from minicompiler.errors import MinicompilerError, RunError
from minicompiler.runtime import caches, savefile
from minicompiler.runtime.arrays import address, address_of_part, overlap, span
from minicompiler.runtime.entry import (
    DONE,
    FRAME_WORDS,
    MISSING,
    REFUSED,
    Argument,
    Signature,
    entry,
    signature,
)
from minicompiler.runtime.loader import Library
from minicompiler.runtime.plan import (
    MAIN,
    RELATIONS,
    ROOM,
    VALUE,
    DimSpec,
    Plan,
    Tensor,
    evaluate,
    nbytes,
    numpy_dtype,
    size_text,
)
from minicompiler.runtime.pool import available_threads, get_pool, kernel_symbols, region_address
from minicompiler.target import Target

_FORMAT = 1  # of the header of a saved module
_SHAPES_KEPT = 512  # combinations of input shapes whose sizes are remembered
_HUGE_PAGE = 2 << 20
_CACHE_LINE = 64
_ALIGNED_BYTES = 64 << 10  # outputs from here on start at a cache line
_CHECKED_BYTES = 16 << 20  # arenas from here on are compared with the available memory

_ndarray = np.ndarray
_empty = np.empty
_address_of = ctypes.addressof
_Output = tuple[tuple[int, ...], np.dtype[Any], int]  # shape, dtype, bytes
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
        self._dtypes = [numpy_dtype(t.dtype) for t in plan.inputs]
        self._out_dtypes = [numpy_dtype(t.dtype) for t in plan.outputs]
        self._copied = [
            (i, place) for i, place in enumerate(plan.results) if place != ("output", i)
        ]
        # Inputs of one integer that tell a dimension.
        self._telling = [b.input for b in plan.binds if b.axis == VALUE]
        self._grown = {c.output: c for c in plan.caches}
        # Outputs whose size is known only after a call: they get room for the most.
        counted = {c.dim for c in plan.counts}
        self._trimmed = [
            i
            for i, t in enumerate(plan.outputs)
            if any(not counted.isdisjoint(_names(s)) for s in t.shape)
        ]
        self._layout = plan.table()
        # Whether calls like the last one may go without Python: shapes tell all that is to check.
        self._direct = self._on_threads and not self._telling and not self._trimmed
        self._enter = entry(region_address())
        # Inputs and outputs lie at the start of the table.
        self._pack = struct.Struct(f"{self._layout.arena}q").pack_into
        self._shapes: dict[tuple[tuple[int, ...], ...], _Sizes] = {}
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
            given: Any = tuple(out) if type(out) is list else out
            end = self._enter(context.address, arrays, given)
            if end == MISSING:
                given = context.with_new(given)
                end = self._enter(context.address, arrays, given)
            if end == REFUSED:
                arrays, given = self._call_checked(context, arrays, out)
            if self._trimmed:
                given = self._trimmed_results(context, given)
        finally:
            self._free.append(context)
        if self._copied:
            self._copy(arrays, given)
        results: tuple[Any, ...] = given
        return results

    def _new_context(self) -> _Context:
        if self._pool is None:
            self._pool = self._start()
        callee = (self._pool.handle.value, self._main.value, self.threads) if self._direct else ()
        return _Context(self._template, callee)

    def _call_checked(
        self, context: _Context, arrays: tuple[Any, ...], out: Any
    ) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """Any call: inputs and results as arrays. Raises RunError where something does not fit."""
        if len(arrays) != len(self._dtypes):
            raise self._wrong_count("input", self.inputs, len(arrays))
        if self._grown:
            return self._call_growing(context, arrays, out)
        given = tuple(map(_as_input, arrays, self._dtypes, self.inputs))
        sizes = self._sizes_of(given)
        results = tuple(starmap(_new, sizes.outputs)) if out is None else self._given(out, sizes)
        context.prepare(sizes, self._layout.arena)
        if self._enter(context.address, given, results) != DONE:
            every = (*given, *results)
            addresses = [*map(address, every)]
            if out is not None:
                self._refuse_overlap(every, addresses)
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
            _as_array(a, dtype, t) if i in grown else _as_input(a, dtype, t)
            for i, (a, dtype, t) in enumerate(zip(arrays, self._dtypes, self.inputs, strict=True))
        )
        key: tuple[Any, ...] = tuple(a.shape for a in given)
        told = tuple(_number(given[i]) for i in self._telling)
        sizes = self._shapes.get((*key, (*told, 0))) or self._measure((*key, (*told, 0)))
        results = self._given([None] * len(self.outputs) if out is None else out, sizes)
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
            sizes = self._shapes.get((*key, (*told, room))) or self._measure((*key, (*told, room)))
        again = context.sizes is sizes
        context.prepare(sizes, self._layout.arena)
        if again and len(placed) == len(self.plan.caches):
            context.expect(self._signature_of(given, results))
        self._execute(context, addresses)
        return given, results

    def run(
        self, inputs: Mapping[str, Any], out: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, Any]:
        """The outputs by name for inputs by name; `out` may name some of the outputs."""
        names = [t.name for t in self.outputs]
        _check_names("input", [t.name for t in self.inputs], inputs, complete=True)
        if out is not None:
            _check_names("output", names, out, complete=False)
        results = self(
            *[inputs[t.name] for t in self.inputs],
            out=None if out is None else [out.get(n) for n in names],
        )
        return dict(zip(names, results, strict=True))

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
        layout = self._layout
        template = [0] * layout.length
        for k, c in enumerate(self._constants):
            template[layout.constants + k] = address(c)
        for name, slot in layout.kernels.items():
            template[slot] = self._library.address(name)
        self._template = template

    def _signature_of(
        self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]
    ) -> Signature:
        """What `entry` expects of calls with caches in place, from a first one."""
        twins = {c.output: c.input for c in self.plan.caches}
        placed = set(twins.values())
        arguments = [
            Argument(
                dtype, a.shape, 0 if i in placed else a.nbytes, a.strides if i in placed else None
            )
            for i, (a, dtype) in enumerate(zip(inputs, self._dtypes, strict=True))
        ]
        for i, (a, dtype) in enumerate(zip(outputs, self._out_dtypes, strict=True)):
            low, high = span(a, 0)
            twin = twins.get(i, -1)
            strides = a.strides if i in twins else None
            arguments.append(
                Argument(
                    dtype, a.shape, high - low, strides, twin, writes=True, optional=i not in twins
                )
            )
        return signature(arguments, len(inputs))

    def _start(self) -> Any:
        missing = self.target.missing_features(Target.host())
        if missing:
            raise _unsupported("this module", missing)
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

    def _trimmed_results(self, context: _Context, results: Sequence[Any]) -> tuple[Any, ...]:
        """Outputs with their shapes, now that the kernels have counted."""
        assert context.sizes is not None
        first = self._layout.dims + len(self.plan.dims)
        dims = dict(context.sizes.known)
        dims.update((c.dim, context.table[first + k]) for k, c in enumerate(self.plan.counts))
        trimmed = list(results)
        for i in self._trimmed:
            shape = tuple(evaluate(s, dims) for s in self.outputs[i].shape)
            # Elements lie without gaps, so those that count come first.
            trimmed[i] = results[i].reshape(-1)[: math.prod(shape)].reshape(shape)
        return tuple(trimmed)

    # ---- shapes ---------------------------------------------------------------------------------
    def _sizes_of(self, arrays: Sequence[np.ndarray]) -> _Sizes:
        """The sizes of a call with these arguments, checked."""
        key: tuple[tuple[int, ...], ...] = tuple(a.shape for a in arrays)
        if self._telling:
            key = (*key, tuple(_number(arrays[i]) for i in self._telling))
        return self._shapes.get(key) or self._measure(key)

    def _measure(self, shapes: tuple[tuple[int, ...], ...]) -> _Sizes:
        """Check the shapes of a call and compute all sizes that follow from them.

        shapes: of the inputs; then the values of those that tell a dimension, if there are any.
        """
        dims = self._bind(shapes[: len(self.inputs)], shapes[len(self.inputs) :])
        for name, size in self.plan.named:
            dims[name] = evaluate(size, dims)
        for c in self.plan.counts:
            dims[c.dim] = evaluate(c.most, dims)
        outputs = []
        for t, dtype in zip(self.outputs, self._out_dtypes, strict=True):
            shape = tuple(evaluate(s, dims) for s in t.shape)
            if min(shape, default=0) < 0:
                raise RunError(
                    f'output "{t.name}" would have the shape {_shape_text(shape)}, declared {t}',
                    hint="the inputs are too small for the operators of this model",
                )
            outputs.append((shape, dtype, nbytes(shape, dtype)))
        plan = self.plan
        shared, local = evaluate(plan.shared, dims), evaluate(plan.local, dims)
        arena = -(-evaluate(plan.arena, dims) // _CACHE_LINE) * _CACHE_LINE
        values = [dims[d.name] for d in plan.dims]
        sizes = _Sizes(values, outputs, arena, arena + shared + self.threads * local, dims)
        if self._direct and not self._grown:
            sizes.signature = self._signature(shapes, outputs)
        if len(self._shapes) >= _SHAPES_KEPT:
            self._shapes.clear()
        self._shapes[shapes] = sizes
        return sizes

    def _signature(
        self, shapes: Sequence[tuple[int, ...]], outputs: Sequence[_Output]
    ) -> Signature:
        """What `entry` expects of calls with these shapes."""
        inputs = zip(self._dtypes, shapes, strict=True)
        arguments = [Argument(dtype, shape, nbytes(shape, dtype)) for dtype, shape in inputs]
        arguments += [
            Argument(dtype, shape, size, writes=True, optional=True)
            for shape, dtype, size in outputs
        ]
        return signature(arguments, len(self._dtypes))

    def _bind(
        self, shapes: tuple[tuple[int, ...], ...], told: tuple[tuple[int, ...], ...] = ()
    ) -> dict[str, int]:
        """The dimensions of a call. Raises RunError when a shape does not fit."""
        if self._telling and not told:
            names = ", ".join(f'"{self.inputs[i].name}"' for i in self._telling)
            raise RunError(f"sizes depend on the values of {names}, not on shapes alone")
        values = iter(told[0] if told else ())
        for t, shape in zip(self.inputs, shapes, strict=True):
            if len(shape) != len(t.shape):
                raise RunError(
                    f'input "{t.name}" has {len(shape)} dimensions, {len(t.shape)} are expected: '
                    f"shape {_shape_text(shape)}, declared {t}",
                    hint=_rank_hint(t, shape),
                )
        dims: dict[str, int] = {}
        origin: dict[str, str] = {}
        for spec, b in zip(self.plan.dims, self.plan.binds, strict=True):
            name = f'input "{self.inputs[b.input].name}"'
            if b.axis == VALUE:
                dims[b.dim], origin[b.dim] = next(values), f"the value of {name}"
            elif b.axis == ROOM:  # comes after all values
                dims[b.dim], origin[b.dim] = told[0][-1] if told else 0, f"the room behind {name}"
            else:
                dims[b.dim], origin[b.dim] = shapes[b.input][b.axis], f"axis {b.axis} of {name}"
            _check_range(spec, dims[b.dim], origin[b.dim])
        for t, shape in zip(self.inputs, shapes, strict=True):
            for axis, (size, got) in enumerate(zip(t.shape, shape, strict=True)):
                expected = evaluate(size, dims)
                if got != expected:
                    why = "" if isinstance(size, int) else f" ({size_text(size)})"
                    hint = "; ".join(f"{n} = {dims[n]} is {origin[n]}" for n in _names(size))
                    hint = hint or "this size is fixed in the model"
                    raise RunError(
                        f'input "{t.name}": axis {axis} has size {got}, expected {expected}{why}: '
                        f"shape {_shape_text(shape)}, declared {t}",
                        hint=hint,
                    )
        for g in self.plan.guards:
            try:
                left, right = evaluate(g.left, dims), evaluate(g.right, dims)
            except ZeroDivisionError:
                raise RunError(
                    f"these inputs do not fit together: a size would be divided by 0 ({g.text})",
                    hint=", ".join(f"{n} = {v} is {origin[n]}" for n, v in dims.items()),
                ) from None
            symbol, holds = RELATIONS[g.relation]
            if not holds(left, right):
                raise RunError(
                    f"these inputs do not fit together: {size_text(g.left)} {symbol} "
                    f"{size_text(g.right)} must hold, but they are {left} and {right} ({g.text})",
                    hint=", ".join(f"{n} = {v} is {origin[n]}" for n, v in dims.items()),
                )
        return dims

    # ---- arguments ------------------------------------------------------------------------------
    def _given(self, out: Any, sizes: _Sizes) -> tuple[np.ndarray, ...]:
        """The caller's arrays for the outputs, checked, and new ones where there is none."""
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
            _check_out(t, array, spec[0], spec[1], parts=len(results) in self._grown)
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
    missing = target.missing_features(Target.host())
    if missing:
        raise _unsupported(f'"{name}"', missing)
    return Module(plan, objects, main, constants, target, threads)


class _Sizes:
    """What follows from the shapes of a call's inputs."""

    __slots__ = ("arena", "dims", "known", "memory", "outputs", "signature")

    def __init__(
        self,
        dims: list[int],
        outputs: list[_Output],
        arena: int,
        memory: int,
        known: dict[str, int],
    ) -> None:
        self.dims, self.outputs, self.arena, self.memory = dims, outputs, arena, memory
        self.known = known  # every size with a name; counted ones at their largest
        self.signature: Signature | None = None


class _Context:
    """What one running call has for itself: the native table, arena and workspace.

    address: of its frame (see `entry`), whose second part is the table.
    """

    __slots__ = ("_frame", "_signature", "address", "memory", "sizes", "table", "table_address")

    def __init__(self, template: Sequence[int], callee: Sequence[int] = ()) -> None:
        """callee: what `entry` calls: pool, main, threads. Without, it refuses."""
        head = [0, *callee] if callee else [0] * FRAME_WORDS
        self._frame = (ctypes.c_int64 * (len(head) + len(template)))(*head, *template)
        self.address = _address_of(self._frame)
        start = 8 * FRAME_WORDS
        self.table = (ctypes.c_int64 * len(template)).from_buffer(self._frame, start)
        self.table_address = ctypes.c_void_p(self.address + start)
        self.memory: _Memory | None = None
        self.sizes: _Sizes | None = None  # those that the table is set up for
        self._signature: Signature | None = None

    def prepare(self, sizes: _Sizes, slot: int) -> None:
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
        self.expect(sizes.signature)

    def expect(self, signature: Signature | None) -> None:
        """From now on calls like this one are made by `entry`."""
        self._frame[0] = 0 if signature is None else _address_of(signature)
        self._signature = signature

    def with_new(self, outputs: tuple[Any, ...] | None) -> tuple[np.ndarray, ...]:
        """The outputs of a call like the last one, new arrays where there are none."""
        assert self.sizes is not None
        if outputs is None:
            return tuple(starmap(_new, self.sizes.outputs))
        pairs = zip(outputs, self.sizes.outputs, strict=True)
        return tuple([_new(*spec) if array is None else array for array, spec in pairs])


class _Memory:
    """Private zeroed pages, on huge pages where the system has them; unmapped with this object."""

    __slots__ = ("_map", "_pin", "address", "size")

    def __init__(self, size: int) -> None:
        """Raises RunError when the system does not have that much memory."""
        self.size = max(size, 1)
        slack = 0 if size < _HUGE_PAGE else _HUGE_PAGE
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
def _number(array: np.ndarray) -> int:
    """The size, at least 1, that an input of one integer tells; another shape is refused when it
    is checked."""
    return max(int(array.reshape(-1)[0]), 1) if array.size else 1


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
    return _ndarray(shape, dtype, raw, -address(raw) % _CACHE_LINE)


def _rank_hint(t: Tensor, shape: tuple[int, ...]) -> str:
    """What may bring an array to the declared number of dimensions."""
    name = t.name if t.name.isidentifier() else "array"
    if len(shape) + 1 == len(t.shape):
        return f"for a batch of one: {name}[None]"
    if len(shape) == len(t.shape) + 1 and 1 in shape:
        return f"to drop a dimension of size 1: {name}.squeeze({shape.index(1)})"
    return f"{name}.reshape(...)"


def _as_input(value: Any, dtype: np.dtype[Any], t: Tensor) -> np.ndarray:
    """An argument as a contiguous array in native byte order, copied only if it is not one."""
    if type(value) is _ndarray and value.dtype is dtype and value.flags.c_contiguous:
        return value
    return np.asarray(_as_array(value, dtype, t), order="C")


def _as_array(value: Any, dtype: np.dtype[Any], t: Tensor) -> np.ndarray:
    """An argument as an array in native byte order, with any strides."""
    if isinstance(value, bool | int | float | list | tuple):
        return _from_numbers(value, dtype, t)
    if isinstance(value, np.ndarray) or not hasattr(value, "__dlpack__"):
        array = np.asarray(value)
    else:
        try:
            array = np.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise RunError(
                f'input "{t.name}": {type(value).__name__} cannot be read as an array: {error}',
                hint="give a numpy array, or a tensor in CPU memory of a dtype that numpy has",
            ) from error
    if array.dtype.kind not in "biufcV":
        raise RunError(
            f'input "{t.name}" is {type(value).__name__}, no numbers: expected {t}',
            hint="give a numpy array; numpy.load reads one from a file",
        )
    if array.dtype.newbyteorder("=") != dtype:
        raise RunError(
            f'input "{t.name}" has dtype {array.dtype}, expected {dtype}: {t}',
            hint=f'convert it: {t.name}.astype("{dtype}")' if t.name.isidentifier() else "",
        )
    return np.asarray(array, dtype)


def _from_numbers(value: Any, dtype: np.dtype[Any], t: Tensor) -> np.ndarray:
    """Python numbers take the input's dtype if it can hold them; floats are rounded to it."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise RunError(f'input "{t.name}": not a tensor: {error}') from None
    kind = "f" if t.dtype.startswith(("float", "bfloat")) else "i" if dtype.kind in "iu" else "b"
    fits = array.size == 0 or array.dtype.kind in {"b": "b", "i": "biu", "f": "biuf"}[kind]
    if fits:
        with np.errstate(over="ignore"):
            made = np.asarray(array.astype(dtype), order="C")
        if array.dtype.kind == "f":
            same = np.isfinite(made.astype(np.float64)) == np.isfinite(array)
        else:
            same = made.astype(array.dtype) == array
        if array.size == 0 or bool(np.all(same)):
            return made
    raise RunError(
        f'input "{t.name}" is given as Python values of type {array.dtype}, which do not fit '
        f"into {dtype}: {t}",
        hint="give a numpy array of that dtype",
    )


def _check_out(
    t: Tensor, array: Any, shape: tuple[int, ...], dtype: np.dtype[Any], parts: bool = False
) -> None:
    """parts: the array may be a part of another; `caches` looks at its strides."""
    if type(array) is _ndarray and array.dtype is dtype and array.shape == shape:
        flags = array.flags
        if flags.c_contiguous and flags.writeable:
            return
    what = f'out= for output "{t.name}"'
    if not isinstance(array, np.ndarray):
        raise RunError(f"{what} is {type(array).__name__}, expected a numpy array")
    if array.dtype != dtype:
        raise RunError(
            f"{what} has dtype {array.dtype}, expected {dtype}",
            hint=f'np.empty({list(shape)}, "{dtype}")',
        )
    if array.shape != shape:
        raise RunError(
            f"{what} has shape {_shape_text(array.shape)}, expected {_shape_text(shape)}",
            hint=f'np.empty({list(shape)}, "{dtype}")',
        )
    if not parts and not array.flags.c_contiguous:
        raise RunError(f"{what} is not C-contiguous", hint="use np.empty, and copy afterwards")
    if not array.flags.writeable:
        raise RunError(f"{what} is read-only", hint="give an array that may be written, or a copy")


def _check_names(
    kind: str, known: Sequence[str], given: Mapping[str, Any], *, complete: bool
) -> None:
    unknown = [n for n in given if n not in known]
    if unknown:
        names = ", ".join(f'"{n}"' for n in unknown)
        near = difflib.get_close_matches(unknown[0].lower(), [k.lower() for k in known], 1)
        mean = next((f"; did you mean {k!r}?" for k in known if near and k.lower() == near[0]), "")
        hint = f"its {kind}s: {', '.join(known)}{mean}"
        raise RunError(f"the model has no {kind} {names}", hint=hint)
    missing = [n for n in known if n not in given]
    if complete and missing:
        names = ", ".join(f'"{n}"' for n in missing)
        raise RunError(f"{kind} {names} is missing", hint=f"the {kind}s: {', '.join(known)}")


def _check_range(d: DimSpec, value: int, origin: str) -> None:
    if value < d.lo or (d.hi is not None and value > d.hi):
        limits = f"at least {d.lo}" if d.hi is None else f"from {d.lo} to {d.hi}"
        raise RunError(
            f'dimension "{d.name}" is {value} ({origin}), the model was compiled for {limits}',
            hint="compile it with a wider range: dims={...}",
        )
    if value % d.multiple_of:
        raise RunError(
            f'dimension "{d.name}" is {value} ({origin}), not a multiple of {d.multiple_of}',
            hint=f"pad that axis to {-(-value // d.multiple_of) * d.multiple_of}",
        )


def _names(size: Any) -> list[str]:
    """The dimensions in a size, without repetition."""
    if isinstance(size, tuple):
        return list(dict.fromkeys([*_names(size[1]), *_names(size[2])]))
    return [size] if isinstance(size, str) else []


def _shape_text(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _unsupported(what: str, missing: Sequence[str]) -> RunError:
    return RunError(
        f"{what} uses instructions that this processor lacks: {', '.join(missing)}",
        hint='compile it for this machine, or for an older one such as target="cpu:avx2"',
    )


def _after_fork() -> None:
    """In the child of a fork the pool's threads do not exist: the next call asks for a new pool."""
    for module in list(_living):
        module._pool = None
        module._free.clear()  # they name the pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

__all__ = ["Module", "load"]
