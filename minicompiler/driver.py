"""The life of a model, from a file to a Module. Every step is public, so one can stop after any.

fn      = import_model("resnet18.onnx", dims)            graph Function
fn      = optimise(fn, ctx)                               passes and fusion
kernel  = build_kernel(fused, constant, ctx)              one fused function -> object code
module  = compile("resnet18.onnx", threads=2)             all of it
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from . import pipeline
from .codegen.launch import emit_main
from .codegen.llvm import emit
from .codegen.native import compile_object
from .config import VERSION
from .context import Context, Options, Stage
from .errors import InternalError, MinicompilerError
from .frontend import onnx as onnx_frontend
from .ir.arith import evaluate_int
from .ir.equal import structural_key
from .ir.expr import ZERO, Dim, Expr, binary, eq, wrap
from .ir.graph import (
    Apply,
    Constant,
    Function,
    Item,
    Value,
    applies,
    arg_of,
    function_dims,
    topological,
)
from .ir.layout import IndexMap
from .ir.op import Counted, assumptions
from .ir.tir import Buffer, PrimFunc, script
from .ir.verify_tir import verify_tir
from .lower.cost import flops, moved
from .lower.lift_constants import lift_constants
from .lower.memory import Count, KernelCall, plan_memory, to_size
from .lower.to_tir import lower_function
from .runtime.diskcache import DiskCache
from .runtime.loader import Library
from .runtime.module import Module
from .runtime.plan import Size
from .runtime.pool import barrier_address
from .schedules.cpu import schedule
from .target import Target


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled fused function. All fields are plain data: this is what the disk cache holds.

    params: per kernel parameter ("arg", k): argument k of the fused function; ("prepared", k): a
    constant made while compiling; ("result", k). prepared: for each, its symbol, its own parameters
    in the same form, dtype and physical shape. flops, moved: operations and bytes of a call, see
    lower/cost.py.
    """

    name: str
    params: tuple[tuple[str, int], ...]
    prepared: tuple[tuple[str, tuple[tuple[str, int], ...], str, tuple[int, ...]], ...]
    dims: tuple[str, ...]
    shared: Size
    local: Size
    flops: Size
    moved: Size
    code: bytes


@dataclasses.dataclass(frozen=True)
class Built:
    """The kernels of an optimised graph by name, and their calls in order."""

    kernels: dict[str, Kernel]
    calls: tuple[KernelCall, ...]


def compile(
    source: str | os.PathLike[str] | bytes | Function | Any,
    target: str | Target = "cpu",
    dims: Mapping[str, Any] | None = None,
    threads: int | None = None,
    level: int = 3,
    checked: bool = False,
    max_error: float = 1e-4,
    record: bool = True,
) -> Module:
    """Compiles a model: an ONNX path, bytes or ModelProto, or a graph Function.

    dims: symbolic dimensions by name: a size, or (lo, hi), or (lo, hi, multiple_of).
    threads: how many the module uses (default: the usable cores). level: 0 to 3.
    checked: verify the IR after every pass and schedule step. max_error: how much accuracy an
    algorithm with fewer multiplications may cost, relative to the largest result (0: none is used).
    record: keep the text of every stage in `Module.stages`.
    Raises MinicompilerError subclasses that name the user's nodes.
    """
    ctx = Context(
        Target.parse(target) if isinstance(target, str) else target,
        Options(
            level=level, threads=threads or 0, checked=checked, max_error=max_error, record=record
        ),
    )
    fn = import_model(source, dims, ctx)
    fn = optimise(fn, ctx)
    return build_module(fn, ctx)


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
        return source
    start = time.perf_counter()
    fn = onnx_frontend.load(source, dims)
    if ctx is not None:
        ctx.stages.append(Stage(fn.name, "graph", "import", "", time.perf_counter() - start))
    return fn


def run_time_guards(fn: Function) -> list[tuple[Expr, str]]:
    """The equalities of sizes that type rules took for granted, each with the node that needs
    it."""
    found: dict[Expr, str] = {}
    counted = any(isinstance(v.attrs, Counted) for v in applies(fn))
    if not function_dims(fn) and not counted:
        return []
    for v in applies(fn):
        if isinstance(v.op, Function):
            continue
        with assumptions() as pairs:
            v.op.infer(*[None if a is None else arg_of(a) for a in v.args], v.attrs)
        for a, b in pairs:
            where = str(v.locs[0]) if v.locs else v.op.name
            found.setdefault(eq(a, b), f"{where} needs {a} = {b}")
    return list(found.items())


def optimise(fn: Function, ctx: Context) -> Function:
    """The graph passes of the chosen level; the result consists of fused functions."""
    if not 0 <= ctx.options.level <= 3:
        raise MinicompilerError(f"level must be 0, 1, 2 or 3, not {ctx.options.level!r}")
    ctx.guards = run_time_guards(fn)
    return pipeline.run(pipeline.GRAPH_PASSES[ctx.options.level], fn, ctx)


def build_module(fn: Function, ctx: Context) -> Module:
    """Kernels, memory plan and native main of an optimised graph."""
    return assemble(fn, build_kernels(fn, ctx), ctx)


def build_kernels(fn: Function, ctx: Context) -> Built:
    """The kernels of an optimised graph, each compiled once or taken from the cache."""
    assert ctx.target is not None
    cache = DiskCache()
    started: dict[str, Future[tuple[Kernel, Stage]]] = {}
    wanted: list[tuple[Apply, str]] = []
    # LLVM works on one kernel (without the interpreter lock) while the next is being scheduled.
    with ThreadPoolExecutor(1, "minicompiler-llvm") as worker:
        for v in topological(fn.results):
            if not isinstance(v, Apply):
                continue
            if not isinstance(v.op, Function):
                raise InternalError(f"operator {v.op.name} was not put into a kernel", v.locs)
            constant = tuple(isinstance(a, Constant) for a in v.args)
            key = kernel_key(v.op, constant, ctx)
            if key not in started:
                started[key] = _start_kernel(key, v.op, constant, ctx, cache, worker)
            wanted.append((v, key))
    kernels: dict[str, Kernel] = {}
    for key, future in started.items():
        kernels[key], stage = future.result()
        ctx.stages.append(stage)
    libraries: dict[str, Library] = {}
    made: dict[tuple[Any, ...], np.ndarray] = {}
    calls = tuple(_call(v, kernels[key], libraries, made) for v, key in wanted)
    return Built({k.name: k for k in kernels.values()}, calls)


def assemble(fn: Function, built: Built, ctx: Context) -> Module:
    """The module of an optimised graph and its kernels: memory plan and native main."""
    assert ctx.target is not None
    start = time.perf_counter()
    plan, constants = plan_memory(fn, built.calls, ctx.guards, _counts(fn))
    ctx.stages.append(Stage(fn.name, "plan", "plan_memory", "", time.perf_counter() - start))
    start = time.perf_counter()
    text = emit_main(plan)
    main_key = f"main {_stamp(ctx.target)}\n{text}"
    cache = DiskCache()
    entry = cache.get(main_key.encode())
    main = entry.value if entry is not None else compile_object(text, ctx.target, opt=1)
    if entry is None:
        cache.put(main_key.encode(), main)
    ctx.stages.append(Stage(fn.name, "code", "main", "", time.perf_counter() - start))
    objects = {name: k.code for name, k in built.kernels.items()}
    return Module(
        plan, objects, main, constants, ctx.target, ctx.options.threads or None, tuple(ctx.stages)
    )


# ---- one kernel ---------------------------------------------------------------------------------
def kernel_key(fn: Function, constant: tuple[bool, ...], ctx: Context) -> str:
    """What a kernel depends on, known before any scheduling work."""
    flags = "".join("c" if c else "v" for c in constant)
    assert ctx.target is not None
    return f"kernel {_stamp(ctx.target)} {ctx.options.max_error}\n{flags}\n{structural_key(fn)}"


_fingerprint: list[str] = []


def _stamp(target: Target) -> str:
    """Version, sources of the compiler, and the target."""
    if not _fingerprint:
        digest = hashlib.blake2b(digest_size=16)
        top = Path(__file__).parent
        from . import codegen, frontend, schedules

        folders = [top, *[Path(m.__path__[0]) for m in (codegen, frontend, schedules)]]
        for folder in folders:
            for path in sorted(folder.rglob("*.py")):
                digest.update(path.read_bytes())
        _fingerprint.append(digest.hexdigest())
    return f"{VERSION} {_fingerprint[0]} {json.dumps(target.to_json(), sort_keys=True)}"


def _start_kernel(
    key: str,
    fn: Function,
    constant: tuple[bool, ...],
    ctx: Context,
    cache: DiskCache,
    worker: ThreadPoolExecutor,
) -> Future[tuple[Kernel, Stage]]:
    """The kernel and the record of its last step: from the cache, or as soon as LLVM is done."""
    raw = key.encode()
    start = time.perf_counter()
    entry = cache.get(raw)
    if entry is not None:
        ready: Future[tuple[Kernel, Stage]] = Future()
        stage = Stage(fn.name, "code", "cached", "", time.perf_counter() - start)
        ready.set_result((_kernel_from(entry.metadata, entry.value), stage))
        return ready
    suffix = "_" + hashlib.blake2b(raw, digest_size=6).hexdigest()
    kernel, text = write_kernel(fn, constant, ctx, suffix)

    def finish() -> tuple[Kernel, Stage]:
        made, stage = _compiled(kernel, text, ctx)
        fields = [f.name for f in dataclasses.fields(made) if f.name != "code"]
        cache.put(raw, made.code, {name: getattr(made, name) for name in fields})
        return made, stage

    return worker.submit(finish)


def _compiled(kernel: Kernel, text: str, ctx: Context) -> tuple[Kernel, Stage]:
    assert ctx.target is not None
    start = time.perf_counter()
    code = compile_object(text, ctx.target)
    stage = Stage(kernel.name, "code", "object", "", time.perf_counter() - start)
    return dataclasses.replace(kernel, code=code), stage


def _kernel_from(data: Mapping[str, Any], code: bytes) -> Kernel:
    def size(x: Any) -> Size:
        return (x[0], size(x[1]), size(x[2])) if isinstance(x, list) else x

    def params(x: Any) -> tuple[tuple[str, int], ...]:
        return tuple((a, b) for a, b in x)

    prepared = tuple((n, params(p), t, tuple(s)) for n, p, t, s in data["prepared"])
    return Kernel(
        data["name"],
        params(data["params"]),
        prepared,
        tuple(data["dims"]),
        size(data["shared"]),
        size(data["local"]),
        size(data["flops"]),
        size(data["moved"]),
        bytes(code),
    )


def build_kernel(
    fn: Function, constant: tuple[bool, ...], ctx: Context, suffix: str = ""
) -> Kernel:
    """One fused function, lowered, scheduled and compiled. `constant`: which arguments are
    constants."""
    kernel, stage = _compiled(*write_kernel(fn, constant, ctx, suffix), ctx)
    ctx.stages.append(stage)
    return kernel


def write_kernel(
    fn: Function, constant: tuple[bool, ...], ctx: Context, suffix: str = ""
) -> tuple[Kernel, str]:
    """`build_kernel` up to LLVM IR: the kernel still without code, and the text to compile."""
    target = ctx.target
    assert target is not None
    lowered = _timed(
        ctx,
        fn.name,
        "tir",
        "to_tir",
        lambda: lower_function(fn, constant, ctx.options.max_error),
        script,
    )
    original = lowered.params
    check = verify_tir if ctx.options.checked else None
    s = _timed(
        ctx,
        fn.name,
        "tir",
        "schedule",
        lambda: schedule(lowered, target, after_step=check),
        lambda r: script(r.func),
    )
    func, prepared = _timed(
        ctx,
        fn.name,
        "tir",
        "lift_constants",
        lambda: lift_constants(s.func),
        lambda r: script(r[0]),
    )
    if ctx.options.checked:
        for f in (func, *[p.func for p in prepared]):
            verify_tir(f, finished=True)
    name = fn.name + suffix
    parts = []
    emitted = None
    names = []
    for k, f in enumerate([func, *[p.func for p in prepared]]):
        f = f.with_(name=name if k == 0 else f"{name}_prepare_{k - 1}")
        names.append(f.name)
        for step in pipeline.TIR_PASSES:
            f = _timed(
                ctx, f.name, "tir", step.__name__, lambda f=f, step=step: step(f, ctx), script
            )
        e = _timed(ctx, f.name, "code", "llvm", lambda f=f: emit(f), lambda r: r.text)
        emitted = emitted or e
        if k and (e.shared is not ZERO or e.local is not ZERO):
            raise InternalError(f"{f.name} needs workspace while compiling", lowered.locs)
        parts.append(e.text)
    assert emitted is not None
    ready = [p.buffer for p in prepared]

    def place(b: Buffer, f: PrimFunc) -> tuple[str, int]:
        if b in ready and b is not f.params[-1]:
            return "prepared", ready.index(b)
        count = len(original) - lowered.results
        k = original.index(b)
        return ("arg", k) if k < count else ("result", k - count)

    made = []
    for p, symbol in zip(prepared, names[1:], strict=True):
        shape = tuple(evaluate_int(n, {}) for n in p.buffer.physical_shape)
        made.append(
            (
                symbol,
                tuple(place(b, p.func) for b in p.func.params[:-1]),
                p.buffer.dtype.name,
                shape,
            )
        )
    # Counted on the exact computes, so that the rate of another algorithm compares with theirs.
    meaning = lower_function(fn, constant)
    final = func.params
    params = tuple(("prepared", ready.index(b)) if b in ready else place(b, func) for b in final)
    kernel = Kernel(
        name,
        params,
        tuple(made),
        tuple(d.name for d in func.dims),
        to_size(emitted.shared),
        to_size(emitted.local),
        to_size(flops(meaning)),
        to_size(moved(meaning)),
        b"",
    )
    return kernel, _merge(parts)


def _timed(ctx: Context, subject: str, level: str, name: str, run: Any, text: Any) -> Any:
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    ctx.stages.append(
        Stage(subject, level, name, text(result) if ctx.options.record else "", seconds)
    )
    return result


def _merge(texts: list[str]) -> str:
    """Several emitted functions as one text: declarations once."""
    lines: dict[str, None] = {}
    bodies = []
    for t in texts:
        body = []
        for line in t.splitlines():
            if line.startswith("declare "):
                lines[line] = None
            else:
                body.append(line)
        bodies.append("\n".join(body))
    return "\n".join([*lines, *bodies]) + "\n"


# ---- a call: constants are prepared, arguments put in place -------------------------------------
def _call(
    v: Apply, kernel: Kernel, libraries: dict[str, Library], made: dict[tuple[Any, ...], np.ndarray]
) -> KernelCall:
    assert isinstance(v.op, Function)
    ready: list[np.ndarray] = []

    def argument(kind: str, k: int) -> Value | np.ndarray:
        if kind == "prepared":
            return ready[k]
        value = v.args[k]
        assert value is not None
        return value

    for symbol, params, dtype, shape in kernel.prepared:
        sources = [argument(*p) for p in params]
        arrays = [x.data if isinstance(x, Constant) else x for x in sources]
        assert all(isinstance(a, np.ndarray) for a in arrays)
        key = (symbol, *[id(a) for a in arrays])
        if key not in made:
            if kernel.name not in libraries:
                exports = [kernel.name, *[p[0] for p in kernel.prepared]]
                libraries[kernel.name] = Library(
                    kernel.code, exports, {"mc_barrier": barrier_address()}
                )
            made[key] = _prepare(libraries[kernel.name].address(symbol), arrays, dtype, shape)  # type: ignore[arg-type]
        ready.append(made[key])
    args = tuple(argument(kind, k) for kind, k in kernel.params if kind != "result")
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


def _counts(fn: Function) -> list[Count]:
    """The dimensions that kernels count, and where: the last argument of a node like `head`."""
    found: dict[Any, Count] = {}
    for v in applies(fn):
        assert isinstance(v.op, Function)
        outer = {id(p): a for p, a in zip(v.op.params, v.args, strict=True)}
        for x in applies(v.op):
            if isinstance(x.attrs, Counted) and isinstance(x.attrs.dim, Dim):
                value = outer.get(id(x.args[-1]), x.args[-1])
                assert value is not None
                found.setdefault(x.attrs.dim, Count(x.attrs.dim, value, wrap(x.attrs.most)))
    return list(found.values())


def _dims(v: Apply) -> list[Any]:
    from .ir.arith import dims_of
    from .ir.graph import type_of

    types = [type_of(a) for a in v.args if a is not None]
    types += list(v.type) if isinstance(v.type, tuple) else [v.type]
    assert isinstance(v.op, Function)
    inner = [x.type for x in topological(v.op.results) if isinstance(x, Apply)]
    for t in inner:
        types += list(t) if isinstance(t, tuple) else [t]
    return dims_of(s for t in types for s in t.shape)


def _expr(size: Size, dims: Mapping[str, Expr]) -> Expr:
    if isinstance(size, tuple):
        return binary(size[0], _expr(size[1], dims), _expr(size[2], dims))
    return dims[size] if isinstance(size, str) else wrap(size)


def _prepare(
    address: int, arrays: list[np.ndarray], dtype: str, shape: tuple[int, ...]
) -> np.ndarray:
    """Runs a compile-time function on constants."""
    from .ir.types import DType

    arrays = [np.ascontiguousarray(a) for a in arrays]
    result = np.empty(shape, DType(dtype).numpy)
    pointers = [a.ctypes.data for a in [*arrays, result]]
    kinds = [
        ctypes.c_int32,
        ctypes.c_int32,
        ctypes.c_void_p,
        *[ctypes.c_void_p] * (len(pointers) + 1),
    ]
    ctypes.CFUNCTYPE(None, *kinds)(address)(0, 1, None, *pointers, None)
    return result


__all__ = [
    "Built",
    "IndexMap",
    "Kernel",
    "assemble",
    "build_kernel",
    "build_kernels",
    "build_module",
    "compile",
    "import_model",
    "kernel_key",
    "optimise",
]
