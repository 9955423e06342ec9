"""The plan of a compiled model: its inputs and outputs, the kernel calls, and where values live.

In:  lower/memory.py builds it, JSON stores it:  Plan.from_json(json.loads(json.dumps(p.to_json())))
Out: runtime/module.py checks calls against it; codegen/launch.py turns it into native code.

    Call("fused_dense_0", (("input", 0), ("constant", 0), ("arena", ("mul", 256, "n"))), ("n",))

A size is an int, the name of a dimension, or (operation, size, size). Control flow is a Region of
calls that a flag in memory guards: they are left out, or repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Union

import numpy as np

from minicompiler.errors import RunError

Size = Union[int, str, "tuple[str, Size, Size]"]
Location = tuple[str, Size]
"""("input", i), ("output", i), ("constant", i), or ("arena", offset in bytes)."""

VALUE = -1
"""The "axis" of a Bind to the content of an input of one integer."""

ROOM = -2
"""The "axis" of a Bind to the room that the caller's memory has behind an input; see Cache."""

MAIN = "mc_main"
"""Name of the native function that runs a whole plan; see codegen/launch.py."""

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "min": min,
    "max": max,
}
RELATIONS: dict[str, tuple[str, Callable[[int, int], bool]]] = {
    "eq": ("==", lambda a, b: a == b),
    "ne": ("!=", lambda a, b: a != b),
    "lt": ("<", lambda a, b: a < b),
    "le": ("<=", lambda a, b: a <= b),
}
_PLACES = ("input", "output", "constant", "arena")
_SYMBOLS = {
    "add": ("+", 1), "sub": ("-", 1), "mul": ("*", 2), "floordiv": ("//", 2), "mod": ("%", 2),
}  # fmt: skip


def evaluate(size: Size, dims: Mapping[str, int]) -> int:
    """The value of a size. Raises KeyError for a name that `dims` lacks."""
    if isinstance(size, int):
        return size
    if isinstance(size, str):
        return dims[size]
    op, a, b = size
    return OPERATIONS[op](evaluate(a, dims), evaluate(b, dims))


def names_in(size: Size) -> list[str]:
    """The dimensions in a size, without repetition."""
    if isinstance(size, tuple):
        return list(dict.fromkeys([*names_in(size[1]), *names_in(size[2])]))
    return [size] if isinstance(size, str) else []


def size_text(size: Size) -> str:
    """A size as a person writes it: `2*(n + 1)`."""
    return _text(size, 0)


def _text(size: Size, outer: int) -> str:
    if not isinstance(size, tuple):
        return str(size)
    op, a, b = size
    if op not in _SYMBOLS:
        return f"{op}({_text(a, 0)}, {_text(b, 0)})"
    symbol, rank = _SYMBOLS[op]
    space = " " if rank == 1 else ""
    # The right side gets brackets also at the same rank: a - (b - c).
    text = f"{_text(a, rank)}{space}{symbol}{space}{_text(b, rank + 1)}"
    return f"({text})" if rank < outer else text


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy type of a dtype's name, `bfloat16` and types of at most 8 bits included."""
    if name.startswith(("bfloat", "float8", "float4")) or name.endswith(("t4", "t2")):
        import ml_dtypes  # only models that use such a type need the package

        if not hasattr(ml_dtypes, name):
            raise TypeError(f"data type {name!r} not understood")
        return np.dtype(getattr(ml_dtypes, name))
    return np.dtype(name)


@dataclass(frozen=True)
class Tensor:
    """An input or output of the model. It lies in row-major order."""

    name: str
    dtype: str
    shape: tuple[Size, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(size_text, self.shape))}]"


@dataclass(frozen=True)
class DimSpec:
    """A dimension known at the call: from lo to hi (None: no limit), a multiple of multiple_of."""

    name: str
    lo: int
    hi: int | None
    multiple_of: int


@dataclass(frozen=True)
class Bind:
    """The dimension takes the size of this axis of this input; VALUE: the number that it holds, at
    least 1; ROOM: how many positions of memory follow it, along the axis of its Cache."""

    dim: str
    input: int
    axis: int


@dataclass(frozen=True)
class Guard:
    """A condition on dimensions that the compiler could not decide; `text` says where it is from.

    The sizes of all input axes, and the ranges of dimensions, are checked without guards.
    """

    left: Size
    relation: str
    right: Size
    text: str

    def error(self, dims: Mapping[str, int], what: str, hint: str = "") -> RunError:
        """That it does not hold for these sizes of `what`."""
        symbol, (left, right) = RELATIONS[self.relation][0], (self.left, self.right)
        return RunError(
            f"{what} do not fit together: {size_text(left)} {symbol} {size_text(right)} must "
            f"hold, but they are {evaluate(left, dims)} and {evaluate(right, dims)} ({self.text})",
            hint=hint,
        )


@dataclass(frozen=True)
class Call:
    """A kernel on memory: its tensors, results last, then the dimensions it takes."""

    kernel: str
    args: tuple[Location, ...]
    dims: tuple[str, ...]


@dataclass(frozen=True)
class Count:
    """A dimension that a kernel counts: call number `before` is the first that needs it.

    place: where its int64 lies once the earlier calls are done. most: it is never larger.
    depth: in how many of the regions around that call it is counted (anew in each iteration).
    """

    dim: str
    place: Location
    most: Size
    before: int
    depth: int = 0


@dataclass(frozen=True)
class Region:
    """Calls number `start` up to `end` are made only if a bool holds `wanted`; repeat: again and
    again, as long as it does."""

    start: int
    end: int
    flag: Location
    wanted: bool
    repeat: bool


@dataclass(frozen=True)
class Cache:
    """An output whose first part along an axis is an input. No kernel writes that part: it lies
    there when the calls begin. The declared size of the output along the axis includes the room
    behind it, which is not part of the array that the caller gets."""

    input: int
    output: int
    axis: int


@dataclass(frozen=True)
class Table:
    """Slots of the table of 64-bit words that the native main reads; each names the first slot."""

    inputs: int
    outputs: int
    arena: int
    workspace: int
    dims: int
    failed: int
    constants: int
    kernels: Mapping[str, int]
    length: int


@dataclass(frozen=True)
class Plan:
    """All that is needed to run the kernels.

    Attributes:
        binds: one for each of `dims`, in the same order.
        named: sizes with a name of their own, in order; later ones and all other sizes may use it.
        results: per output, where its value is once the calls are done. ("output", i) for output i
            itself; anything else is copied (an input or constant that is also an output, or a value
            that is several outputs).
        constants: their number.
        counts: dimensions that become known while the calls run. The shapes of outputs may use
            them; memory sizes do not.
        checks: conditions on them, looked at as soon as they are known: the calls end where one
            does not hold.
        regions: in the order of their starts, outer ones first; two overlap only if one holds the
            other.
        caches: outputs that grow in place.
        arena: bytes for intermediate values, offsets are multiples of 64.
        shared, local: bytes of workspace a kernel needs: shared + threads * local.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    dims: tuple[DimSpec, ...]
    binds: tuple[Bind, ...]
    guards: tuple[Guard, ...]
    named: tuple[tuple[str, Size], ...]
    calls: tuple[Call, ...]
    results: tuple[Location, ...]
    constants: int
    arena: Size
    shared: Size
    local: Size
    counts: tuple[Count, ...] = ()
    checks: tuple[Guard, ...] = ()
    regions: tuple[Region, ...] = ()
    caches: tuple[Cache, ...] = ()

    @property
    def kernels(self) -> tuple[str, ...]:
        """The distinct kernels in the order of their first call."""
        return tuple(dict.fromkeys(c.kernel for c in self.calls))

    def table(self) -> Table:
        """The layout of the native main's table: what changes from call to call comes first."""
        outputs = len(self.inputs)
        arena = outputs + len(self.outputs)
        dims = arena + 2
        failed = dims + len(self.dims) + len(self.counts)
        constants = failed + 1
        first = constants + self.constants
        kernels = {name: first + k for k, name in enumerate(self.kernels)}
        return Table(
            0, outputs, arena, arena + 1, dims, failed, constants, kernels, first + len(kernels)
        )

    def checks_of(self, dim: str, known: Collection[str]) -> list[tuple[int, Guard]]:
        """The checks that can be made once `dim` has been counted, with their numbers."""
        found = []
        for k, g in enumerate(self.checks):
            names = {*names_in(g.left), *names_in(g.right)}
            if dim in names and names.issubset(known):
                found.append((k, g))
        return found

    def refuse_counts(self, dim: str, known: Mapping[str, int]) -> None:
        """Raises RunError where a condition on the dimension, counted now, does not hold."""
        for _, g in self.checks_of(dim, known):
            if not RELATIONS[g.relation][1](evaluate(g.left, known), evaluate(g.right, known)):
                raise g.error(known, "sizes of data")

    def to_json(self) -> dict[str, Any]:
        """JSON types only; `from_json` is the inverse."""
        return {
            "inputs": [[t.name, t.dtype, list(t.shape)] for t in self.inputs],
            "outputs": [[t.name, t.dtype, list(t.shape)] for t in self.outputs],
            "dims": [[d.name, d.lo, d.hi, d.multiple_of] for d in self.dims],
            "binds": [[b.dim, b.input, b.axis] for b in self.binds],
            "guards": [[g.left, g.relation, g.right, g.text] for g in self.guards],
            "named": [list(pair) for pair in self.named],
            "calls": [[c.kernel, list(c.args), list(c.dims)] for c in self.calls],
            "results": list(self.results),
            "constants": self.constants,
            "arena": self.arena,
            "shared": self.shared,
            "local": self.local,
            "counts": [[c.dim, c.place, c.most, c.before, c.depth] for c in self.counts],
            "checks": [[g.left, g.relation, g.right, g.text] for g in self.checks],
            "regions": [[r.start, r.end, r.flag, r.wanted, r.repeat] for r in self.regions],
            "caches": [[c.input, c.output, c.axis] for c in self.caches],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The plan of `to_json`. Raises RunError when the data is something else."""
        try:
            plan = cls(
                inputs=tuple(map(_tensor, data["inputs"])),
                outputs=tuple(map(_tensor, data["outputs"])),
                dims=tuple(DimSpec(*d) for d in data["dims"]),
                binds=tuple(Bind(*b) for b in data["binds"]),
                guards=tuple(map(_guard, data["guards"])),
                named=tuple((name, _size(size)) for name, size in data["named"]),
                calls=tuple(
                    Call(kernel, tuple(map(_location, args)), tuple(dims))
                    for kernel, args, dims in data["calls"]
                ),
                results=tuple(map(_location, data["results"])),
                constants=data["constants"],
                arena=_size(data["arena"]),
                shared=_size(data["shared"]),
                local=_size(data["local"]),
                counts=tuple(
                    Count(dim, _location(place), _size(most), int(before), int(depth))
                    for dim, place, most, before, depth in data["counts"]
                ),
                checks=tuple(map(_guard, data["checks"])),
                regions=tuple(
                    Region(int(start), int(end), _location(flag), bool(wanted), bool(repeat))
                    for start, end, flag, wanted, repeat in data["regions"]
                ),
                caches=tuple(Cache(*map(int, c)) for c in data["caches"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"not a plan of a compiled model: {error!r}") from None
        plan.verify()
        return plan

    def verify(self) -> None:
        """Raises RunError for names, places or relations that do not exist in this plan."""
        counts = {"input": len(self.inputs), "output": len(self.outputs)}
        counts["constant"] = self.constants
        known = {d.name for d in self.dims}
        wrong: list[str] = []
        # An argument may lie where a counted dimension says: a row of a loop's result.
        arguments = [a for c in self.calls for a in c.args]
        places = [*self.results, *[c.place for c in self.counts], *[r.flag for r in self.regions]]
        if [b.dim for b in self.binds] != [d.name for d in self.dims]:
            wrong.append("the dimensions and what binds them differ")
        for b in self.binds:
            if not (0 <= b.input < len(self.inputs)) or not (
                b.axis in (VALUE, ROOM) or 0 <= b.axis < len(self.inputs[b.input].shape)
            ):
                wrong.append(f"dimension {b.dim} is bound to no axis")
        for c in self.caches:
            known_cache = 0 <= c.input < len(self.inputs) and 0 <= c.output < len(self.outputs)
            if not known_cache or not 0 <= c.axis < len(self.inputs[c.input].shape):
                wrong.append(f"cache {c.input}")
        for name, size in self.named:
            wrong += _unknown_names(size, known)
            known.add(name)
        # Known before the first call; sizes of outputs and of kernels may also be counted.
        sizes = [s for t in self.inputs for s in t.shape] + [c.most for c in self.counts]
        sizes += [self.arena, self.shared, self.local, *[at for p, at in places if p == "arena"]]
        for g in self.guards:
            sizes += [g.left, g.right]
            if g.relation not in RELATIONS:
                wrong.append(f"relation {g.relation}")
        wrong += [name for s in sizes for name in _unknown_names(s, known)]
        known |= {c.dim for c in self.counts}
        for g in self.checks:
            wrong += [*_unknown_names(g.left, known), *_unknown_names(g.right, known)]
            if g.relation not in RELATIONS:
                wrong.append(f"relation {g.relation}")
        for place, at in [*places, *arguments]:
            if place != "arena" and not (isinstance(at, int) and 0 <= at < counts[place]):
                wrong.append(f"{place} {at}")
        late = [s for t in self.outputs for s in t.shape] + [d for c in self.calls for d in c.dims]
        late += [at for place, at in arguments if place == "arena"]
        open_: list[Region] = []
        for r in self.regions:
            while open_ and open_[-1].end <= r.start:
                open_.pop()
            ends = open_[-1].end if open_ else len(self.calls)
            if not (0 <= r.start < r.end <= ends) or (open_ and r.start < open_[-1].start):
                wrong.append(f"region {r.start} to {r.end}")
            open_.append(r)
        wrong += [name for s in late for name in _unknown_names(s, known)]
        if len(self.results) != len(self.outputs):
            wrong.append("the outputs and where they are differ")
        if wrong:
            raise RunError(f"not a plan of a compiled model: {', '.join(dict.fromkeys(wrong))}")


def nbytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Bytes of a row-major tensor."""
    return math.prod(shape) * dtype.itemsize


def _unknown_names(size: Size, known: set[str]) -> Iterator[str]:
    if isinstance(size, tuple):
        yield from _unknown_names(size[1], known)
        yield from _unknown_names(size[2], known)
    elif isinstance(size, str) and size not in known:
        yield f"dimension {size}"


def _size(data: Any) -> Size:
    if isinstance(data, (int, str)) and not isinstance(data, bool):
        return data
    op, a, b = data
    if op not in OPERATIONS:
        raise ValueError(f"operation {op}")
    return op, _size(a), _size(b)


def _guard(data: Any) -> Guard:
    left, relation, right, text = data
    return Guard(_size(left), relation, _size(right), text)


def _location(data: Any) -> Location:
    place, at = data
    if place not in _PLACES:
        raise ValueError(f"place {place}")
    return place, _size(at)


def _tensor(data: Any) -> Tensor:
    name, dtype, shape = data
    numpy_dtype(dtype)
    return Tensor(name, dtype, tuple(map(_size, shape)))
