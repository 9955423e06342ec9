"""The life of a model, from a file to a Module. Every step is public, so one can stop after any.

fn      = import_model("resnet18.onnx", dims)            graph Function
fn      = optimise(fn, ctx)                               passes and fusion
kernel  = build_kernel(fused, constant, ctx)              one fused function -> object code
module  = compile("resnet18.onnx", threads=2)             all of it
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import config, ops, pipeline
from .artifacts import (
    NOTHING,
    KernelOverride,
    Overrides,
    keeps_kernels,
    keeps_texts,
    reads_cache,
    record,
    unless_same,
    wants_assembly,
)
from .checks import checks_of
from .codegen.launch import emit_main
from .codegen.llvm import emit
from .codegen.native import compile_assembly, compile_object
from .config import VERSION
from .context import Context, Options, Stage
from .errors import InternalError, MinicompilerError
from .extensions import Extensions
from .frontend import onnx as onnx_frontend
from .ir.arith import Arith, dims_of, evaluate_int
from .ir.equal import structural_key
from .ir.expr import ZERO, Const, Dim, Expr, binary, eq, substitute, wrap
from .ir.graph import (
    Apply,
    Constant,
    Function,
    Item,
    Value,
    applies,
    arg_of,
    every_function,
    function_dims,
    nested_functions,
    rebuild,
)
from .ir.layout import IndexMap
from .ir.op import Counted, assumptions
from .ir.serial import to_json
from .ir.text import function_text
from .ir.tir import Buffer, PrimFunc, script
from .ir.verify_tir import verify_tir
from .limits import Limits
from .lower.blocks import lower_blocks
from .lower.control import kernel_nodes, loop_counts, steps_of, with_calls
from .lower.cost import flops, moved
from .lower.guards import guard_accesses
from .lower.lift_constants import lift_constants
from .lower.memory import Count, KernelCall, plan_memory, to_size
from .lower.sizes import name_sizes
from .lower.to_tir import lower_function
from .passes.fuse import fused_functions
from .prepare import Kernel, Preparation, settle
from .runtime.checked import CheckedModule
from .runtime.diskcache import DiskCache
from .runtime.module import Module
from .runtime.plan import Size
from .runtime.pool import available_threads
from .schedules.cpu import RULES, schedule
from .schedules.schedule import Schedule, replay
from .target import Target


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
    ctx = Context(
        Target.parse(target) if isinstance(target, str) else target,
        Options(
            level=level,
            threads=threads or 0,
            checked=checked or config.checked(),
            max_error=max_error,
            record=record,
            limits=limits or Limits(),
            dump=None if dump is None else Path(dump),
            override=None if override is None else Path(override),
            extensions=extensions or Extensions(),
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


def run_time_guards(fn: Function) -> list[tuple[Expr, str]]:
    """What type rules took for granted, each with the node that needs it: sizes that are equal, and
    sizes that are not negative (a window larger than the image)."""
    found: dict[Expr, str] = {}
    nodes = [v for f in every_function(fn) for v in applies(f)]
    counted = any(isinstance(v.attrs, Counted) for v in nodes)
    known = frozenset(function_dims(fn))
    if not known and not counted:
        return []
    for v in nodes:
        if isinstance(v.op, Function):
            continue
        with assumptions() as pairs:
            v.op.infer(*[None if a is None else arg_of(a) for a in v.args], v.attrs)
        where = str(v.locs[0]) if v.locs else v.op.name
        for a, b in pairs:
            found.setdefault(eq(a, b), f"{where} needs {a} = {b}")
        for t in v.type if isinstance(v.type, tuple) else (v.type,):
            for size in t.shape:
                if _may_be_negative(size, known):
                    found.setdefault(size >= ZERO, f"{where} makes {t}")
    return list(found.items())


def _may_be_negative(size: Expr, known: frozenset[Dim]) -> bool:
    """Whether a size has to be looked at when a call tells the dimensions `known`."""
    if isinstance(size, Const | Dim) or not known.issuperset(dims_of([size])):
        return False
    return Arith().prove(size >= ZERO) is not True


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
    fn = pipeline.run(passes, fn, ctx)

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
    # LLVM works on one kernel (without the interpreter lock) while the next is being scheduled.
    with ThreadPoolExecutor(1, "minicompiler-llvm") as worker, _dropping(worker):
        for v in kernel_nodes(steps):
            assert isinstance(v.op, Function)
            constant = tuple(isinstance(a, Constant) for a in v.args)
            key = kernel_key(v.op, constant, ctx)
            if key not in started:
                ctx.budget.check_time(v.locs, v.op.name)
                override = overrides.of(v.op.name)
                started[key] = _start_kernel(key, v.op, constant, ctx, cache, worker, override)
            wanted.append((v, key))
        kernels: dict[str, Kernel] = {}
        for key, future in started.items():
            kernels[key], stages = future.result()
            for stage in stages:
                record(ctx, stage)
            ctx.budget.check_time(where=kernels[key].name)
    with Preparation(available_threads()) as preparation:
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
    main_key = f"main {_stamp(ctx.target)}\n{text}"
    cache = DiskCache()
    entry = cache.get(main_key.encode())
    main = entry.value if entry is not None else compile_object(text, ctx.target, opt=1)
    if entry is None:
        cache.put(main_key.encode(), main)
    record(ctx, Stage(fn.name, "code", "main", "", time.perf_counter() - start))
    objects = {name: k.code for name, k in built.kernels.items()}
    threads, stages = ctx.options.threads or None, tuple(ctx.stages)
    if ctx.options.checked and not plan.regions:  # the checks follow a straight line of calls
        checks = checks_of(fn, built.calls)
        return CheckedModule(
            plan, objects, main, constants, ctx.target, threads, stages, checks=checks
        )
    return Module(plan, objects, main, constants, ctx.target, threads, stages)


# ---- one kernel ---------------------------------------------------------------------------------
def kernel_key(fn: Function, constant: tuple[bool, ...], ctx: Context) -> str:
    """What a kernel depends on, known before any scheduling work."""
    flags = "".join("c" if c else "v" for c in constant)
    assert ctx.target is not None
    key = f"kernel {_stamp(ctx.target)} {ctx.options.max_error}\n{flags}\n{structural_key(fn)}"
    if any(v.op not in ops.OWN for v in applies(fn)):
        # The sources of a user's operator are not part of the stamp: what it computes is.
        key += json.dumps(to_json(lower_function(fn, constant, ctx.options.max_error)))
    return key


_fingerprint: list[str] = []


def _stamp(target: Target) -> str:
    """Version, the sources that make kernels, and the target."""
    if not _fingerprint:
        digest = hashlib.blake2b(digest_size=16)
        top = Path(__file__).parent
        from . import codegen, schedules

        layers = [top / name for name in ("ir", "ops", "passes", "lower", "runtime")]
        layers += [Path(m.__path__[0]) for m in (codegen, schedules)]
        files = [f for folder in layers for f in folder.rglob("*.py")]
        for path in sorted([*files, *(top / f"{n}.py" for n in ("driver", "pipeline", "te"))]):
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
    override: KernelOverride = NOTHING,
) -> Future[tuple[Kernel, list[Stage]]]:
    """The kernel and the record of its last steps: from the cache, or as soon as LLVM is done."""
    if override:  # another kernel than the key says: it gets its own symbol, and is not kept
        key = f"{key}\n{override.key()}"
    raw = key.encode()
    start = time.perf_counter()
    entry = cache.get(raw) if reads_cache(ctx) and not override else None
    if entry is not None:
        ready: Future[tuple[Kernel, list[Stage]]] = Future()
        stage = Stage(fn.name, "code", "cached", "", time.perf_counter() - start)
        ready.set_result((_kernel_from(entry.metadata, entry.value), [stage]))
        return ready
    suffix = "_" + hashlib.blake2b(raw, digest_size=6).hexdigest()
    kernel, text = write_kernel(fn, constant, ctx, suffix, override)

    def finish() -> tuple[Kernel, list[Stage]]:
        made, stages = _compiled(kernel, text, ctx, fn.name)
        if keeps_kernels(ctx) and not override:
            fields = [f.name for f in dataclasses.fields(made) if f.name != "code"]
            cache.put(raw, made.code, {name: getattr(made, name) for name in fields})
        return made, stages

    return worker.submit(finish)


def _compiled(kernel: Kernel, text: str, ctx: Context, subject: str) -> tuple[Kernel, list[Stage]]:
    assert ctx.target is not None
    start = time.perf_counter()
    code = (ctx.options.extensions.assemble or compile_object)(text, ctx.target)
    stages = [Stage(subject, "code", "object", "", time.perf_counter() - start)]
    if wants_assembly(ctx) and ctx.options.extensions.assemble is None:
        start = time.perf_counter()
        assembly = compile_assembly(text, ctx.target).replace(kernel.name, subject)
        stages.append(Stage(subject, "code", "asm", assembly, time.perf_counter() - start))
    return dataclasses.replace(kernel, code=code), stages


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
    kernel, stages = _compiled(*write_kernel(fn, constant, ctx, suffix), ctx, fn.name)
    for stage in stages:
        record(ctx, stage)
    return kernel


def write_kernel(
    fn: Function,
    constant: tuple[bool, ...],
    ctx: Context,
    suffix: str = "",
    override: KernelOverride = NOTHING,
) -> tuple[Kernel, str]:
    """`build_kernel` up to LLVM IR: the kernel still without code, and the text to compile.

    override: files that replace what a stage makes.
    """
    target = ctx.target
    assert target is not None

    checked, extensions = ctx.options.checked, ctx.options.extensions
    write = extensions.emit or emit
    # What the plan checks at every call may be taken for granted in proofs. Only what follows from
    # the function itself may change its code, which other models use as well.
    whole = fn
    fn, sizes = name_sizes(fn)
    own = [fact for fact, _ in run_time_guards(fn)]
    facts = [*own, *(fact for fact, _ in ctx.guards)]

    def lower() -> PrimFunc:
        made = guard_accesses(lower_function(fn, constant, ctx.options.max_error), own)
        return override.tir("to_tir", made) or made

    lowered = _timed(
        ctx, fn.name, "tir", "to_tir", lower, script,
        details=lambda r: {"nodes": [str(loc) for loc in r.locs]},
    )  # fmt: skip

    def check(func: PrimFunc) -> None:
        ctx.budget.check_time(lowered.locs, fn.name)
        if checked:
            verify_tir(func, facts=facts)

    def scheduled() -> Schedule:
        steps = override.steps()
        if steps is not None:
            return replay(lowered, steps, target)
        rules = RULES if extensions.rules is None else tuple(extensions.rules(RULES))
        made = schedule(lowered, target, after_step=check, rules=rules)
        made.func = override.tir("schedule", made.func) or made.func
        return made

    s = _timed(
        ctx, fn.name, "tir", "schedule", scheduled, lambda r: script(r.func),
        lambda r: r.func, schedule_details,
    )  # fmt: skip
    original = s.func.params
    func, prepared = _timed(
        ctx, fn.name, "tir", "lift_constants", lambda: lift_constants(s.func),
        lambda r: script(r[0]), lambda r: r[0],
    )  # fmt: skip
    if checked:
        for f in (func, *[p.func for p in prepared]):
            verify_tir(f, True, facts)
    name = fn.name + suffix
    back: dict[Expr, Expr] = dict(sizes)
    dims = tuple(dims_of(back.get(d, d) for d in func.dims))
    parts = []
    emitted = None
    names = []
    for k, f in enumerate([func, *[p.func for p in prepared]]):
        ending = f"_prepare_{k - 1}" if k else ""
        names.append(name + ending)
        for step in pipeline.TIR_PASSES:
            f = _timed(
                ctx, fn.name + ending, "tir", step.__name__, partial(step, f, ctx), script,
            )  # fmt: skip
            if checked:
                verify_tir(f, True, facts, bounds=step is lower_blocks)
        f = f.with_(name=names[-1])
        if not k and sizes:
            f = f.with_(dims=dims, sizes=sizes)
        # Symbols are shown without the hash, as an override may name them.
        e = _timed(
            ctx, fn.name + ending, "code", "llvm", partial(write, f),
            lambda r: r.text.replace(name, fn.name),
        )  # fmt: skip
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
    meaning = lower_function(whole, constant)
    final = func.params
    params = tuple(("prepared", ready.index(b)) if b in ready else place(b, func) for b in final)
    kernel = Kernel(
        name,
        params,
        tuple(made),
        tuple(d.name for d in dims),
        to_size(substitute(emitted.shared, back)),
        to_size(substitute(emitted.local, back)),
        to_size(flops(meaning)),
        to_size(moved(meaning)),
        b"",
    )
    parts[0] = override.llvm(suffix) or parts[0]
    return kernel, _merge(parts)


def schedule_details(s: Schedule) -> dict[str, Any]:
    """What a stage says of a schedule: its rule, its steps, and what was chosen from what."""
    choices = [{"name": c.name, "options": list(c.options), "chosen": c.chosen} for c in s.choices]
    return {"rule": s.rule, "steps": s.trace(), "choices": choices}


def _timed(
    ctx: Context,
    subject: str,
    level: str,
    name: str,
    run: Callable[[], Any],
    text: Callable[[Any], str],
    artifact: Callable[[Any], Any] = lambda result: result,
    details: Callable[[Any], Mapping[str, Any]] = lambda result: {},
) -> Any:
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    shown = text(result) if keeps_texts(ctx) else ""
    if level == "tir" and name != "to_tir":
        shown = unless_same(ctx, subject, level, shown)
    record(ctx, Stage(subject, level, name, shown, seconds, details(result)), artifact(result))
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
    from .ir.graph import type_of

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
