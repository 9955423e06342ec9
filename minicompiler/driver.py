"""The life of a model, from a file to a Module. Every step is public, so one can stop after any.

fn      = import_model("resnet18.onnx", dims)            graph Function
fn      = optimise(fn, ctx)                               passes and fusion
kernel  = build_kernel(fused, constant, ctx)              one fused function -> object code
module  = compile("resnet18.onnx", threads=2)             all of it
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from . import config, pipeline
from .artifacts import Overrides, keeps_texts, record
from .checks import checks_of
from .codegen.launch import emit_main
from .codegen.native import compile_object
from .context import Context, Options, Stage
from .errors import MinicompilerError
from .extensions import Extensions
from .frontend import onnx as onnx_frontend
from .ir.arith import dims_of, evaluate_int
from .ir.expr import Dim, Expr, binary, wrap
from .ir.graph import (
    Apply,
    Constant,
    Function,
    Item,
    Value,
    applies,
    every_function,
    nested_functions,
    rebuild,
    type_of,
)
from .ir.op import Counted
from .ir.text import function_text
from .kernel import Kernel, build_kernel, kernel_key, stamp, start_kernel
from .limits import Limits
from .lower.control import kernel_nodes, loop_counts, steps_of, with_calls
from .lower.guards import run_time_guards
from .lower.memory import Count, KernelCall, plan_memory
from .passes.fuse import fused_functions
from .prepare import Preparation, settle
from .runtime.checked import CheckedModule
from .runtime.diskcache import DiskCache
from .runtime.module import Module
from .runtime.pages import collapse
from .runtime.plan import Size
from .runtime.pool import available_threads
from .target import Target

_TURN_SECONDS = 1e-4  # after which a thread that compiles lets others have the interpreter
_NEW_OBJECTS = 50_000  # after which the garbage collector looks for cycles among them


@dataclasses.dataclass(frozen=True)
class Built:
    """The kernels of an optimised graph by name, and their calls in order.

    calls: with aliases and the regions of control flow, where there are some. pairs: all nodes
    that became calls.
    """

    kernels: dict[str, Kernel]
    calls: tuple[Any, ...]
    pairs: tuple[tuple[Apply, KernelCall], ...] = ()


def compile(
    source: str | os.PathLike[str] | bytes | Function | Any,
    target: str | Target = "cpu",
    dims: Mapping[str, Any] | None = None,
    threads: int | None = None,
    level: int = 3,
    checked: bool = False,
    max_error: float = 1e-4,
    caches: bool = False,
    record: bool = True,
    limits: Limits | None = None,
    dump: str | os.PathLike[str] | None = None,
    override: str | os.PathLike[str] | None = None,
    extensions: Extensions | None = None,
) -> Module:
    """Compiles a model: an ONNX path, bytes or ModelProto, or a graph Function.

    dims: symbolic dimensions by name: a size, or (lo, hi), or (lo, hi, multiple_of).
    threads: how many the module uses (default: the usable cores). level: 0 to 3.
    checked: verify the IR after every pass and schedule step, and every kernel while it runs (slow;
    runtime/checked.py). max_error: how much accuracy an
    algorithm with fewer multiplications may cost, relative to the largest result (0: none is used).
    caches: outputs that append to an input, such as the keys and values of a decoder, are written
    behind it in the caller's memory where `out=` says so (runtime/caches.py).
    record: keep the text of every stage in `Module.stages`. limits: what compiling may cost, for
    models that are not trusted (default: `Limits()`, which is generous). dump: folder that every
    stage's artifact is written to; override: folder of such artifacts that replace those of kernels
    (docs/debugging.md).
    extensions: operators, passes, schedule rules or a backend of your own (docs/extending.md).
    Raises MinicompilerError subclasses that name the user's nodes.
    """
    if threads is not None and threads < 1:
        raise MinicompilerError(
            f"a module cannot run on {threads} threads",
            hint="threads=1 or more, None for all cores",
        )
    checked = checked or config.checked()
    if caches and checked:
        raise MinicompilerError(
            "caches=True cannot be checked: kernels share memory with the caller's inputs",
            hint="compile it without caches to look for a mistake",
        )
    ctx = Context(
        Target.parse(target) if isinstance(target, str) else target,
        Options(
            level=level,
            threads=threads or 0,
            checked=checked,
            max_error=max_error,
            caches=caches,
            record=record,
            limits=limits or Limits(),
            dump=None if dump is None else Path(dump),
            override=None if override is None else Path(override),
            extensions=extensions or Extensions(),
        ),
    )
    with _interpreter_for_compiling():
        fn = import_model(source, dims, ctx)
        fn = optimise(fn, ctx)
        return build_module(fn, ctx)


@contextlib.contextmanager
def _interpreter_for_compiling() -> Iterator[None]:
    """Python's own settings suit other programs. Between its calls into LLVM the worker needs the
    interpreter for microseconds, and would wait for it five milliseconds each time: as long as LLVM
    works on a small kernel. And the garbage collector would look through all there is again and
    again for the few cycles among nodes and expressions."""
    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    if interval <= _TURN_SECONDS:  # another compilation goes on, and sets them back
        yield
        return
    sys.setswitchinterval(_TURN_SECONDS)
    gc.set_threshold(_NEW_OBJECTS, *thresholds[1:])
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*thresholds)


def import_model(
    source: Any, dims: Mapping[str, Any] | None = None, ctx: Context | None = None
) -> Function:
    """The graph of a model (a Function is taken as it is)."""
    if isinstance(source, Function):
        if dims:
            raise MinicompilerError(
                "dims= is for models that are imported; this is a graph already",
                hint="give the Dims of the graph their ranges when building it",
            )
        fn, start = source, time.perf_counter()
    else:
        start = time.perf_counter()
        given = ctx or Context()
        fn = onnx_frontend.load(source, dims, given.budget, given.options.extensions.converters)
    if ctx is not None:
        seconds = time.perf_counter() - start
        text = function_text(fn) if keeps_texts(ctx) else ""
        record(ctx, Stage(fn.name, "graph", "import", text, seconds))
    return fn


def optimise(fn: Function, ctx: Context) -> Function:
    """The graph passes of the chosen level; the result consists of fused functions."""
    if not 0 <= ctx.options.level <= 3:
        raise MinicompilerError(
            f"level must be 0, 1, 2 or 3, not {ctx.options.level!r}",
            hint="0 does not optimise, 3 is the default",
        )
    ctx.guards = run_time_guards(fn)
    return _optimised(fn, ctx)


def _optimised(fn: Function, ctx: Context) -> Function:
    """The passes on a function, then on those that its control flow runs."""
    passes = ctx.options.extensions.passes(pipeline.GRAPH_PASSES[ctx.options.level])
    return optimise_bodies(pipeline.run(passes, fn, ctx), ctx)


def optimise_bodies(fn: Function, ctx: Context) -> Function:
    """The passes on the functions that the control flow of an optimised function runs."""

    def inner(v: Value, args: tuple[Value | None, ...]) -> Value | None:
        if not isinstance(v, Apply) or not nested_functions(v.attrs):
            return None
        values = {f.name: getattr(v.attrs, f.name) for f in dataclasses.fields(v.attrs)}
        done = {k: _optimised(x, ctx) for k, x in values.items() if isinstance(x, Function)}
        return v.with_(args=args, attrs=dataclasses.replace(v.attrs, **done))

    return rebuild(fn, inner)


def build_module(fn: Function, ctx: Context) -> Module:
    """Kernels, memory plan and native main of an optimised graph."""
    return assemble(fn, build_kernels(fn, ctx), ctx)


def build_kernels(fn: Function, ctx: Context) -> Built:
    """The kernels of an optimised graph, each compiled once or taken from the cache."""
    assert ctx.target is not None
    cache = DiskCache()
    overrides = Overrides.read(ctx, [f.name for f in fused_functions(fn)])
    started: dict[str, Future[tuple[Kernel, list[Stage]]]] = {}
    wanted: list[tuple[Apply, str]] = []
    steps = steps_of(fn)
    nodes = list(kernel_nodes(steps))
    # LLVM works on one kernel (without the interpreter lock) while the next is being scheduled, and
    # the constants of kernels from the cache are packed meanwhile.
    with (
        Preparation(available_threads()) as preparation,
        ThreadPoolExecutor(1, "minicompiler-llvm") as worker,
        _dropping(worker),
    ):
        for v, _ in nodes:
            assert isinstance(v.op, Function)
            constant = tuple(isinstance(a, Constant) for a in v.args)
            key = kernel_key(v.op, constant, ctx)
            if key not in started:
                ctx.budget.check_time(v.locs, v.op.name)
                override = overrides.of(v.op.name)
                started[key] = start_kernel(key, v.op, constant, ctx, cache, worker, override)
            if started[key].done():
                preparation.start(v, started[key].result()[0])
            wanted.append((v, key))
        kernels: dict[str, Kernel] = {}
        for key, future in started.items():
            kernels[key], stages = future.result()
            for stage in stages:
                record(ctx, stage)
            ctx.budget.check_time(where=kernels[key].name)
        for (v, times), (_, key) in zip(nodes, wanted, strict=True):
            ctx.budget.use("operations", times * _least_points(v, kernels[key]), v.locs)
        for v, key in wanted:
            preparation.start(v, kernels[key])
        pairs = tuple(
            (v, _call(v, kernels[key], preparation.arguments(v, kernels[key]))) for v, key in wanted
        )
    calls = with_calls(steps, {id(v): call for v, call in pairs})
    return Built({k.name: k for k in kernels.values()}, tuple(calls), pairs)


@contextlib.contextmanager
def _dropping(worker: ThreadPoolExecutor) -> Iterator[None]:
    """An error inside leaves nothing for the worker to do but what it has begun."""
    try:
        yield
    except BaseException:
        worker.shutdown(wait=False, cancel_futures=True)
        raise


def assemble(fn: Function, built: Built, ctx: Context) -> Module:
    """The module of an optimised graph and its kernels: memory plan and native main."""
    assert ctx.target is not None
    start = time.perf_counter()
    plan, constants = plan_memory(fn, built.calls, ctx.guards, counts_of(fn))
    constants = settle(constants)
    record(ctx, Stage(fn.name, "plan", "plan_memory", "", time.perf_counter() - start))
    start = time.perf_counter()
    text = emit_main(plan)
    main_key = f"main {stamp(ctx.target)}\n{text}"
    cache = DiskCache()
    entry = cache.get(main_key.encode())
    main = entry.value if entry is not None else compile_object(text, ctx.target, opt=1)
    if entry is None:
        cache.put(main_key.encode(), main)
    record(ctx, Stage(fn.name, "code", "main", "", time.perf_counter() - start))
    objects = {name: k.code for name, k in built.kernels.items()}
    threads, stages = ctx.options.threads or None, tuple(ctx.stages)
    module: Module
    if ctx.options.checked and not plan.regions:  # the checks follow a straight line of calls
        checks = checks_of(fn, built.calls)
        module = CheckedModule(
            plan, objects, main, constants, ctx.target, threads, stages, checks=checks
        )
    else:
        module = Module(plan, objects, main, constants, ctx.target, threads, stages)
    collapse(constants)
    return module


# ---- a call ------------------------------------------------------------------------------------
def _call(v: Apply, kernel: Kernel, args: tuple[Value | np.ndarray, ...]) -> KernelCall:
    if isinstance(v.type, tuple):
        results: tuple[Value, ...] = tuple(Item(v, k) for k in range(len(v.type)))
    else:
        results = (v,)
    ordered = tuple(results[k] for kind, k in kernel.params if kind == "result")
    dims = {d.name: d for d in _dims(v)}
    return KernelCall(
        kernel.name,
        args,
        ordered,
        tuple(dims[n] for n in kernel.dims),
        _expr(kernel.shared, dims),
        _expr(kernel.local, dims),
    )


def _least_points(v: Apply, kernel: Kernel) -> int:
    """The iterations of a kernel's loops where its dimensions are smallest."""
    dims = {d.name: d for d in _dims(v)}
    smallest = {name: max(d.lo, 1) for name, d in dims.items()}
    try:
        return evaluate_int(_expr(kernel.points, dims), smallest)
    except ZeroDivisionError:  # a guard refuses calls with these sizes
        return 0


def counts_of(fn: Function) -> list[Count]:
    """The dimensions that kernels count, and where: the last argument of a node like `head`."""
    found: dict[Any, Count] = {}
    for v in (v for f in every_function(fn) for v in applies(f)):
        if not isinstance(v.op, Function):
            for count in loop_counts(v):
                found.setdefault(count.dim, count)
            continue
        outer = {id(p): a for p, a in zip(v.op.params, v.args, strict=True)}
        for x in applies(v.op):
            if isinstance(x.attrs, Counted) and isinstance(x.attrs.dim, Dim):
                value = outer.get(id(x.args[-1]), x.args[-1])
                assert value is not None
                most = None if x.attrs.most is None else wrap(x.attrs.most)
                found.setdefault(x.attrs.dim, Count(x.attrs.dim, value, most))
    return list(found.values())


def _dims(v: Apply) -> list[Any]:
    types = [type_of(a) for a in v.args if a is not None]
    types += list(v.type) if isinstance(v.type, tuple) else [v.type]
    assert isinstance(v.op, Function)
    sizes: list[Expr] = []
    for x in applies(v.op):
        types += list(x.type) if isinstance(x.type, tuple) else [x.type]
        for field in dataclasses.fields(x.attrs):
            value = getattr(x.attrs, field.name)
            every = value if isinstance(value, tuple) else (value,)
            sizes += [e for e in every if isinstance(e, Expr)]
    return dims_of([*sizes, *(s for t in types for s in t.shape)])


def _expr(size: Size, dims: Mapping[str, Expr]) -> Expr:
    if isinstance(size, tuple):
        return binary(size[0], _expr(size[1], dims), _expr(size[2], dims))
    return dims[size] if isinstance(size, str) else wrap(size)


__all__ = [
    "Built",
    "Kernel",
    "assemble",
    "build_kernel",
    "build_kernels",
    "build_module",
    "compile",
    "import_model",
    "kernel_key",
    "optimise",
    "optimise_bodies",
    "run_time_guards",
]
