"""One kernel at every moment of its making, each a function that can be run and compared.

    states = making_of(fused, (False, True), ctx).states
    states[0].name, states[7].name            "to_tir", "split"
    run(states[7].func, [x, w], {"batch": 3})      its results: interpreted, or compiled plainly

The states are: as lowered, after each schedule step, after lifting constants, after each TIR pass.
All have the parameters of the first, so one set of inputs serves them all.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minicompiler import pipeline
from minicompiler.codegen.llvm import emit
from minicompiler.codegen.native import compile_object
from minicompiler.context import Context
from minicompiler.ir import interp
from minicompiler.ir.arith import evaluate_int, sizes
from minicompiler.ir.expr import Expr, Load, rewrite
from minicompiler.ir.graph import Function
from minicompiler.ir.layout import IndexMap
from minicompiler.ir.tir import (
    SERIAL,
    Alloc,
    Buffer,
    For,
    PrimFunc,
    Scope,
    Stmt,
    Store,
    map_exprs,
    map_statements,
    statements,
    sub_statements,
)
from minicompiler.kernel import final_loops, lower_kernel, rules_of
from minicompiler.lower.blocks import lower_blocks
from minicompiler.lower.lift_constants import Prepared
from minicompiler.runtime.loader import Library
from minicompiler.runtime.pool import kernel_symbols
from minicompiler.schedules.cpu import schedule
from minicompiler.schedules.schedule import Step
from minicompiler.target import Target

from .memory import from_memory, one_to_one, physical_shape, poisoned, to_memory

Array = np.ndarray
# Statements that the interpreter carries out in about a second.
INTERPRETED = 300_000
BARRIER_BYTES = 4096  # more than a barrier takes: its block is the runtime's own


@dataclasses.dataclass(frozen=True)
class State:
    """A kernel after one step. kind: "lowering", "schedule step" or "tir pass"; detail: the step
    as it was called; step: the same for machines."""

    kind: str
    name: str
    detail: str
    func: PrimFunc
    step: Step | None = None


@dataclasses.dataclass(frozen=True)
class Making:
    """How a kernel came about: its states, and what computes its prepared constants."""

    states: list[State]
    prepared: tuple[Prepared, ...]


def making_of(fn: Function, constant: tuple[bool, ...], ctx: Context) -> Making:
    """The making of a kernel, from its lowered form to what code is generated from."""
    assert ctx.target is not None
    lowered = lower_kernel(fn, constant, ctx)
    states = [State("lowering", "to_tir", "", lowered)]
    after: list[PrimFunc] = []
    s = schedule(lowered, ctx.target, after_step=after.append, rules=rules_of(ctx))
    for k, (step, func) in enumerate(zip(s.steps, after, strict=True)):
        detail = f"step {k + 1} of {len(after)} of rule {s.rule}: {step}"
        states.append(State("schedule step", step.primitive, detail, func, step))
    func, prepared = final_loops(s, lowered, rules_of(ctx))
    states.append(State("tir pass", "lift_constants", "", joined(lowered, func, prepared)))
    functions = [func, *[p.func for p in prepared]]
    for tir_pass in pipeline.TIR_PASSES:
        functions = [tir_pass(f, ctx) for f in functions]
        pairs = zip(prepared, functions[1:], strict=True)
        now = [dataclasses.replace(p, func=f) for p, f in pairs]
        func = joined(lowered, functions[0], now)
        states.append(State("tir pass", tir_pass.__name__, "", func))
    return Making(states, prepared)


def joined(lowered: PrimFunc, func: PrimFunc, prepared: Sequence[Prepared]) -> PrimFunc:
    """A function with its compile-time functions back in front, on the original parameters."""
    ready = tuple(p.buffer for p in prepared)
    phases = tuple(phase for p in prepared for phase in p.func.phases)
    return func.with_(
        params=lowered.params, buffers=(*func.buffers, *ready), phases=(*phases, *func.phases)
    )


# ---- running a state ----------------------------------------------------------------------------
def run(
    func: PrimFunc, inputs: Sequence[Array], dims: Mapping[str, int], target: Target
) -> list[Array]:
    """The results of a state: interpreted where that is quick, else compiled as plain loops. Arrays
    may have other shapes than the loops give the same memory (lower/join_axes.py).

    Plain loops are serial, scalar and keep everything in memory, so that code generation has the
    least to do wrong.
    """
    if is_small(func, dims):
        shaped = [
            a.reshape(sizes(b.shape, dims)) for a, b in zip(inputs, func.params, strict=False)
        ]
        return interp.run(func, shaped, dims)
    return run_plain(func, inputs, dims, target)


def is_small(func: PrimFunc, dims: Mapping[str, int]) -> bool:
    """Whether the interpreter is quick enough."""
    return iterations(func, dims) <= INTERPRETED


def iterations(func: PrimFunc, dims: Mapping[str, int]) -> int:
    """About how many statements a call carries out; a bound that varies counts at its first."""

    def count(s: Stmt, env: dict[str, int]) -> int:
        if isinstance(s, For):
            extent = _first(s.extent, env)
            return max(extent, 0) * count(s.body, {**env, s.var.name: 0})
        return sum(count(x, env) for x in sub_statements(s)) or 1

    return sum(count(p, dict(dims)) for p in func.phases)


def _first(e: Expr, env: Mapping[str, int]) -> int:
    try:
        return evaluate_int(e, env)
    except KeyError:  # it depends on what a tensor holds
        return 1


def run_plain(
    func: PrimFunc, inputs: Sequence[Array], dims: Mapping[str, int], target: Target
) -> list[Array]:
    """The results of a function compiled as plain loops, on one thread."""
    made = run_in_memory(func, [to_memory(*x) for x in _placed(func, inputs)], dims, target)
    outs = zip(made, func.params[len(func.params) - func.results :], strict=True)
    return [from_memory(a, sizes(b.shape, dims), b.layout) for a, b in outs]


def _placed(func: PrimFunc, inputs: Sequence[Array]) -> list[tuple[Array, IndexMap | None]]:
    return [(a, b.layout) for a, b in zip(inputs, func.params, strict=False)]


def run_in_memory(
    func: PrimFunc, tensors: Sequence[Array], dims: Mapping[str, int], target: Target
) -> list[Array]:
    """The same on memory as it is, padding included."""
    func = plain(func)
    emitted = emit(func, target)
    code = compile_object(emitted.text, target)
    made = []
    for b in func.params[len(tensors) :]:
        shape = physical_shape(sizes(b.shape, dims), b.layout)
        made.append(poisoned(shape, b.dtype.numpy))
    workspace = evaluate_int(emitted.shared, dims) + evaluate_int(emitted.local, dims)
    invoke(code, func.name, [*tensors, *made], [dims[d.name] for d in func.dims], workspace)
    return made


def plain(func: PrimFunc) -> PrimFunc:
    """The same function with serial loops, buffers in memory and no blocks."""
    swap: dict[Buffer, Buffer] = {}
    for s in statements(func):
        if isinstance(s, Alloc):
            swap[s.buffer] = s.buffer.with_(scope=Scope.LOCAL)
    for b in func.buffers:
        swap[b] = b.with_(scope=Scope.GLOBAL, constant=False)
    func = swap_buffers(func, swap)

    def serial(s: Stmt) -> Stmt | None:
        return s.with_(kind=SERIAL) if isinstance(s, For) and s.kind is not SERIAL else None

    func = func.with_(phases=tuple(map_statements(p, serial) for p in func.phases))
    return lower_blocks(func)


def swap_buffers(func: PrimFunc, mapping: Mapping[Buffer, Buffer]) -> PrimFunc:
    """The function on other buffers."""

    def load(e: Expr) -> Expr | None:
        if type(e) is Load and e.buffer in mapping:
            return Load(mapping[e.buffer], e.indices, e.mask)
        return None

    def child(x: Any) -> Any:
        if isinstance(x, Buffer):
            return mapping.get(x, x)
        return x.map(child) if isinstance(x, Store) else x  # those inside a Block

    def one(phase: Stmt) -> Stmt:
        return map_statements(map_exprs(phase, lambda e: rewrite(e, load)), lambda s: s.map(child))

    buffers = tuple(mapping.get(b, b) for b in func.buffers)
    return func.with_(buffers=buffers, phases=tuple(map(one, func.phases)))


def invoke(
    code: bytes, symbol: str, tensors: Sequence[Array], dims: Sequence[int], workspace: int
) -> None:
    """One call of a kernel in memory as it is; the workspace is poisoned before."""
    library = Library(code, [symbol], kernel_symbols())
    room = poisoned((workspace + 64,), np.dtype(np.uint8))
    start = room.ctypes.data
    barrier = np.zeros(BARRIER_BYTES, np.uint8)
    pointers = [a.ctypes.data for a in tensors]
    kinds: list[type] = [ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p]
    kinds += [ctypes.c_void_p] * len(pointers) + [ctypes.c_int64] * len(dims) + [ctypes.c_void_p]
    function = ctypes.CFUNCTYPE(None, *kinds)(library.address(symbol))
    function(0, 1, barrier.ctypes.data, *pointers, *dims, start + -start % 64)


def shared_places(func: PrimFunc, dims: Mapping[str, int]) -> list[str]:
    """Buffers whose layout puts two elements in one place."""
    allocated = [s.buffer for s in statements(func) if isinstance(s, Alloc)]
    return [
        b.name
        for b in (*func.params, *func.buffers, *allocated)
        if b.layout is not None and not one_to_one(b.layout, sizes(b.shape, dims))
    ]
