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
from minicompiler.runtime.loader import Library
from minicompiler.runtime.module import Module, _address, _as_input, _Context
from minicompiler.runtime.plan import Call, evaluate
from minicompiler.runtime.pool import get_pool

_NOTHING = "mc_nothing"


@dataclass(frozen=True)
class KernelTime:
    """One call of the plan: the kernel, the values of all dimensions, its median time."""

    kernel: str
    dims: dict[str, int]
    seconds: float


def profile(module: Module, arrays: Sequence[Any], repeat: int = 10) -> list[KernelTime]:
    """Times every call of the model for these inputs, each `repeat` times in the model's order.

    Raises RunError where an input does not fit, or another call holds the threads.
    """
    results = module(*arrays)  # checks the arguments
    inputs = [_as_input(*x) for x in zip(arrays, module._dtypes, module.inputs, strict=True)]
    layout, plan = module._layout, module.plan
    sizes = module._measure(tuple(a.shape for a in inputs))
    context = _Context(layout.length, module._template)
    context.prepare(sizes, layout.arena)
    table: Any = context.table
    module._pack(table, 0, *map(_address, (*inputs, *results)))
    dims = {d.name: n for d, n in zip(plan.dims, sizes.dims, strict=True)}
    names = dict(dims)
    for name, size in plan.named:
        names[name] = evaluate(size, names)
    first = {"input": layout.inputs, "output": layout.outputs, "constant": layout.constants}

    def words(call: Call) -> Any:
        """What a trampoline reads: the kernel, and its arguments in order."""
        found = [table[layout.kernels[call.kernel]]]
        for place, at in call.args:
            if place == "arena":
                found.append(table[layout.arena] + evaluate(at, names))
            else:
                found.append(table[first[place] + int(at)])  # type: ignore[arg-type]
        found += [names[d] for d in call.dims]
        found.append(table[layout.workspace])
        return (ctypes.c_int64 * len(found))(*found)

    library = _trampolines({(len(c.args), len(c.dims)) for c in plan.calls})
    jobs = [(library.address(_symbol(len(c.args), len(c.dims))), words(c)) for c in plan.calls]
    nothing = (library.address(_NOTHING), (ctypes.c_int64 * 1)())
    times: list[list[float]] = [[] for _ in jobs]
    with get_pool(module.threads).lease() as lease:
        if lease is None:
            raise RunError("another call is using the threads", hint="profile while nothing runs")

        def seconds(fn: int, argument: Any) -> float:
            address = ctypes.addressof(argument)
            start = time.perf_counter()
            lease.run(fn, address, module.threads)
            return time.perf_counter() - start

        empty = min(seconds(*nothing) for _ in range(200))
        for _ in range(repeat):
            for job, found in zip(jobs, times, strict=True):
                found.append(seconds(*job))
    return [
        KernelTime(call.kernel, dims, max(statistics.median(found) - empty, 0.0))
        for call, found in zip(plan.calls, times, strict=True)
    ]


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
