"""Seconds per kernel of a compiled model: its calls run one by one, on the threads of the model.

    for k in profile(module, [x]): print(k.kernel, k.seconds)     one entry per call of the plan

A call is timed from outside, so the time of an empty one is taken off. The sum differs a little
from the time of the whole model, which starts its threads once and has no gaps between kernels.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm

from minicompiler.errors import RunError
from minicompiler.runtime.arguments import as_input
from minicompiler.runtime.arrays import address
from minicompiler.runtime.loader import Library
from minicompiler.runtime.module import Module, _Context
from minicompiler.runtime.plan import Call, Size, evaluate
from minicompiler.runtime.pool import get_pool

_NOTHING = "mc_nothing"


@dataclass(frozen=True)
class KernelTime:
    """One call of the plan: the kernel, the values of all dimensions, and what it takes in one run
    of the model: how often it is made (more or less than once inside control flow), and the median
    over several runs of the seconds of all these times."""

    kernel: str
    dims: dict[str, int]
    seconds: float
    times: int = 1


def profile(module: Module, arrays: Sequence[Any], repeat: int = 10) -> list[KernelTime]:
    """Times every call of the model for these inputs, in `repeat` runs in the model's order.

    Raises RunError where an input does not fit, or another call holds the threads.
    """
    results = module(*arrays)  # checks the arguments
    run = _Run(module, arrays, results)
    with get_pool(module.threads).lease() as lease:
        if lease is None:
            raise RunError("another call is using the threads", hint="profile while nothing runs")
        run.lease = lease
        empty = min(run.seconds(*run.nothing) for _ in range(200))
        run.whole()  # warm-up
        rounds = [run.whole() for _ in range(repeat)]
    return [
        KernelTime(
            call.kernel,
            run.dims(),
            max(statistics.median(seconds[k] - empty * times[k] for seconds, times in rounds), 0.0),
            rounds[-1][1][k],
        )
        for k, call in enumerate(module.plan.calls)
    ]


class _Run:
    """The plan of a module, carried out call by call as its native main does."""

    def __init__(self, module: Module, arrays: Sequence[Any], results: Sequence[Any]) -> None:
        self.plan, self.layout, self.threads = module.plan, module._layout, module.threads
        self.inputs = [
            as_input(*x) for x in zip(arrays, module._dtypes, module.inputs, strict=True)
        ]
        self.results = results  # with the inputs, the memory that the table points to
        sizes = module._shapes.measure_arrays(self.inputs)
        self.context = _Context(module._template)
        self.context.prepare(sizes, self.layout.arena)
        self.table: Any = self.context.table
        module._pack(self.table, 0, *map(address, (*self.inputs, *results)))
        self.names = {d.name: n for d, n in zip(self.plan.dims, sizes.dims, strict=True)}
        for name, size in self.plan.named:
            self.names[name] = evaluate(size, self.names)
        self.first = {
            "input": self.layout.inputs,
            "output": self.layout.outputs,
            "constant": self.layout.constants,
        }
        self.library = _trampolines({(len(c.args), len(c.dims)) for c in self.plan.calls})
        self.nothing = (self.library.address(_NOTHING), (ctypes.c_int64 * 1)())
        self.lease: Any = None
        self.spent: list[float] = []
        self.times: list[int] = []

    def dims(self) -> dict[str, int]:
        """Dimensions of the call, and those that were counted, as they were last."""
        known = [d.name for d in self.plan.dims] + [c.dim for c in self.plan.counts]
        return {name: self.names[name] for name in known if name in self.names}

    def whole(self) -> tuple[list[float], list[int]]:
        """One run: the seconds and the number of times of each call."""
        self.spent = [0.0] * len(self.plan.calls)
        self.times = [0] * len(self.plan.calls)
        self.span(0, len(self.plan.calls), 0, 0)
        return self.spent, self.times

    def span(self, start: int, end: int, depth: int, ahead: int) -> None:
        """Some calls in order, inside `depth` regions; `ahead` is the first region not entered."""
        regions = self.plan.regions
        k = start
        while k < end:
            for c in self.plan.counts:
                if c.before == k and c.depth == depth:
                    place = self.address(*c.place)
                    self.names[c.dim] = ctypes.c_int64.from_address(place).value
                    self.plan.refuse_counts(c.dim, self.names)
            if ahead == len(regions) or regions[ahead].start != k:
                self.call(k)
                k += 1
                continue
            r = regions[ahead]
            while bool(ctypes.c_int8.from_address(self.address(*r.flag)).value) == r.wanted:
                self.span(r.start, r.end, depth + 1, ahead + 1)
                if not r.repeat:
                    break
            k = r.end
            while ahead < len(regions) and regions[ahead].start < k:
                ahead += 1

    def call(self, k: int) -> None:
        """Makes and times one call."""
        c = self.plan.calls[k]
        symbol = _symbol(len(c.args), len(c.dims))
        self.spent[k] += self.seconds(self.library.address(symbol), self.words(c))
        self.times[k] += 1

    def seconds(self, fn: int, argument: Any) -> float:
        """One function on all threads."""
        address = ctypes.addressof(argument)
        start = time.perf_counter()
        self.lease.run(fn, address, self.threads)
        return time.perf_counter() - start

    def words(self, call: Call) -> Any:
        """What a trampoline reads: the kernel, and its arguments in order."""
        found = [self.table[self.layout.kernels[call.kernel]]]
        found += [self.address(*location) for location in call.args]
        found += [self.names[d] for d in call.dims]
        found.append(self.table[self.layout.workspace])
        return (ctypes.c_int64 * len(found))(*found)

    def address(self, place: str, at: Size) -> int:
        """Where a value lies, now that sizes are known."""
        if place == "arena":
            return int(self.table[self.layout.arena]) + evaluate(at, self.names)
        assert isinstance(at, int)
        return int(self.table[self.first[place] + at])


def _symbol(tensors: int, dims: int) -> str:
    return f"mc_call_{tensors}_{dims}"


def _trampolines(kinds: Iterable[tuple[int, int]]) -> Library:
    """Functions that a region can run: each calls a kernel of so many tensors and dimensions."""
    parameters = "i32 %tid, i32 %n, ptr %words, ptr %barrier"
    lines = [f"define void @{_NOTHING}({parameters}) {{", "  ret void", "}"]
    for tensors, dims in kinds:
        lines.append(f"define void @{_symbol(tensors, dims)}({parameters}) {{")
        types = ["ptr"] * (1 + tensors) + ["i64"] * dims + ["ptr"]
        for k, kind in enumerate(types):
            lines.append(f"  %p{k} = getelementptr i64, ptr %words, i64 {k}")
            lines.append(f"  %a{k} = load {kind}, ptr %p{k}, align 8")
        given = ", ".join(f"{kind} %a{k}" for k, kind in enumerate(types) if k)
        lines += [f"  call void %a0(i32 %tid, i32 %n, ptr %barrier, {given})", "  ret void", "}"]
    module = llvm.parse_assembly("\n".join(lines))
    triple = llvm.get_process_triple()
    machine = llvm.Target.from_triple(triple).create_target_machine(codemodel="small", reloc="pic")
    return Library(machine.emit_object(module), [_NOTHING, *(_symbol(*k) for k in kinds)])


__all__ = ["KernelTime", "profile"]
