"""One kernel, from a fused function to object code, or from the disk cache.

key = kernel_key(fused, constant, ctx)                known before any work is done
kernel = build_kernel(fused, constant, ctx)           lowered, scheduled, compiled
lowered = lower_kernel(fused, constant, ctx)          its first form, which lens/ follows
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from . import ops, pipeline
from .artifacts import (
    NOTHING,
    KernelOverride,
    keeps_kernels,
    keeps_texts,
    reads_cache,
    record,
    unless_same,
    wants_assembly,
)
from .codegen.llvm import emit
from .codegen.native import compile_assembly, compile_object
from .config import VERSION
from .context import Context, Stage
from .errors import InternalError
from .ir.arith import evaluate_int, keeping
from .ir.equal import structural_key
from .ir.expr import ZERO, Dim
from .ir.graph import Function, applies
from .ir.serial import to_json
from .ir.tir import Buffer, PrimFunc, script
from .ir.verify_tir import verify_tir
from .lower.blocks import lower_blocks
from .lower.cost import flops, moved, points
from .lower.guards import guard_accesses, run_time_guards
from .lower.join_axes import join_axes
from .lower.join_results import join_results
from .lower.lift_constants import Prepared, lift_constants
from .lower.memory import to_size
from .lower.one_row import of_one_row, one_or_many
from .lower.reshaped import keep_shape
from .lower.to_tir import is_exact, lower_function
from .runtime.diskcache import DiskCache
from .runtime.plan import Size
from .schedules.cpu import RULES, Rule, schedule
from .schedules.schedule import Schedule, replay
from .target import Target


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled fused function. All fields are plain data: this is what the disk cache holds.

    params: per kernel parameter ("arg", k): argument k of the fused function; ("prepared", k): a
    constant made while compiling; ("result", k). prepared: for each, its symbol, its own parameters
    in the same form, dtype and physical shape. flops, moved, points: operations, bytes and
    iterations of a call, see lower/cost.py. preparing: LLVM IR for this machine of what computes
    `prepared`, where `code` is for another one that has more.
    """

    name: str
    params: tuple[tuple[str, int], ...]
    prepared: tuple[tuple[str, tuple[tuple[str, int], ...], str, tuple[int, ...]], ...]
    dims: tuple[str, ...]
    shared: Size
    local: Size
    flops: Size
    moved: Size
    points: Size
    preparing: str
    code: bytes


# ---- by its key ---------------------------------------------------------------------------------
def kernel_key(fn: Function, constant: tuple[bool, ...], ctx: Context) -> str:
    """What a kernel depends on, known before any scheduling work."""
    flags = "".join("c" if c else "v" for c in constant)
    assert ctx.target is not None
    key = f"kernel {stamp(ctx.target)} {ctx.options.max_error}\n{flags}\n{structural_key(fn)}"
    if any(v.op not in ops.OWN for v in applies(fn)):
        # The sources of a user's operator are not part of the stamp: what it computes is.
        key += json.dumps(to_json(lower_function(fn, constant, ctx.options.max_error)))
    return key


_fingerprint: list[str] = []


def stamp(target: Target) -> str:
    """Version, the sources that make kernels, the target, and what makes constants for it."""
    if not _fingerprint:
        digest = hashlib.blake2b(digest_size=16)
        top = Path(__file__).parent
        from . import codegen, schedules

        layers = [top / name for name in ("ir", "ops", "passes", "lower", "runtime")]
        layers += [Path(m.__path__[0]) for m in (codegen, schedules)]
        files = [f for folder in layers for f in folder.rglob("*.py")]
        for path in sorted([*files, *(top / f"{n}.py" for n in ("kernel", "pipeline", "te"))]):
            digest.update(path.read_bytes())
        _fingerprint.append(digest.hexdigest())
    machines = [target, *_maker(target)]
    return f"{VERSION} {_fingerprint[0]} {json.dumps([t.to_json() for t in machines])}"


def _maker(target: Target) -> list[Target]:
    """This machine, if it cannot run code for the target: constants are made here."""
    host = Target.host()
    return [host] if target.missing_features(host) else []


def start_kernel(
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
        size(data["points"]),
        data["preparing"],
        bytes(code),
    )


# ---- its making ---------------------------------------------------------------------------------
def build_kernel(
    fn: Function, constant: tuple[bool, ...], ctx: Context, suffix: str = ""
) -> Kernel:
    """One fused function, lowered, scheduled and compiled. `constant`: which arguments are
    constants."""
    kernel, stages = _compiled(*write_kernel(fn, constant, ctx, suffix), ctx, fn.name)
    for stage in stages:
        record(ctx, stage)
    return kernel


def lower_kernel(fn: Function, constant: tuple[bool, ...], ctx: Context) -> PrimFunc:
    """The loop nest of a fused function, with every access inside its buffer.

    What the plan checks at every call may be taken for granted in proofs. Only what follows from
    the function itself may change its code, which other models use as well.
    """
    facts = [fact for fact, _ in run_time_guards(fn)]
    return guard_accesses(plain_loops(fn, constant, ctx.options.max_error), facts)


def plain_loops(fn: Function, constant: tuple[bool, ...], max_error: float) -> PrimFunc:
    """The loop nest of a fused function over the axes that suit schedules best."""
    return keep_shape(join_results(join_axes(lower_function(fn, constant, max_error))))


def final_loops(
    s: Schedule, lowered: PrimFunc, rules: Sequence[Rule]
) -> tuple[PrimFunc, tuple[Prepared, ...]]:
    """Scheduled loops without what constants alone determine, and where the rule asks for it, with
    loops of their own for a single row."""
    func, prepared = lift_constants(s.func)
    form = one_row_form(s, lowered, rules)
    if form is not None:
        rows, _, one = form
        func = one_or_many(one.func, func, rows)
    return func, prepared


def one_row_form(
    s: Schedule, lowered: PrimFunc, rules: Sequence[Rule] = RULES
) -> tuple[Dim, PrimFunc, Schedule] | None:
    """Where the rule asks for it: the dimension that counts rows, and the loops for a single one,
    lowered and scheduled."""
    if s.rows is None or lift_constants(s.func)[1]:
        return None
    alone = of_one_row(lowered, s.rows)
    one = schedule(alone, s.target, rules=rules)
    # What constants determine would be computed by each call.
    return None if lift_constants(one.func)[1] else (s.rows, alone, one)


def rules_of(ctx: Context) -> tuple[Rule, ...]:
    """The schedule rules, those of the user included."""
    own = ctx.options.extensions.rules
    return RULES if own is None else tuple(own(RULES))


@keeping()
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
    checked = ctx.options.checked
    write = ctx.options.extensions.emit or partial(emit, target=target)
    facts = [fact for fact, _ in (*run_time_guards(fn), *ctx.guards)]

    def lower() -> PrimFunc:
        made = lower_kernel(fn, constant, ctx)
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
        made = schedule(lowered, target, after_step=check, rules=rules_of(ctx))
        made.func = override.tir("schedule", made.func) or made.func
        return made

    s = _timed(
        ctx, fn.name, "tir", "schedule", scheduled, lambda r: script(r.func),
        lambda r: r.func, schedule_details,
    )  # fmt: skip
    original = s.func.params
    func, prepared = _timed(
        ctx, fn.name, "tir", "lift_constants", lambda: final_loops(s, lowered, rules_of(ctx)),
        lambda r: script(r[0]), lambda r: r[0],
    )  # fmt: skip
    if checked:
        for f in (func, *[p.func for p in prepared]):
            verify_tir(f, True, facts)
    name = fn.name + suffix
    parts, preparing = [], []
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
        # Symbols are shown without the hash, as an override may name them.
        e = _timed(
            ctx, fn.name + ending, "code", "llvm", partial(write, f),
            lambda r: r.text.replace(name, fn.name),
        )  # fmt: skip
        emitted = emitted or e
        if k and (e.shared is not ZERO or e.local is not ZERO):
            raise InternalError(f"{f.name} needs workspace while compiling", lowered.locs)
        parts.append(e.text)
        preparing += [emit(f, here).text for here in _maker(target) if k]
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
    exact = is_exact(fn, constant, ctx.options.max_error)
    meaning = lowered if exact else lower_function(fn, constant)
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
        to_size(points(meaning)),
        _merge(preparing) if preparing else "",
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
