"""The command line: `minicompiler demo | compile | run | bench | inspect | cache`.

    minicompiler compile model.onnx -o model.mc --dims batch=1..64
    minicompiler run model.mc --input x=x.npy --output y.npz
    minicompiler bench model.onnx --threads 1,2 --against onnxruntime

Exit codes: 0 fine, 1 a check failed, 2 wrong usage or a model that cannot be handled, 130 Ctrl-C.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

# Nothing else is imported at the top, so that --help is quick.
from minicompiler import __version__
from minicompiler.errors import MinicompilerError

if TYPE_CHECKING:
    import numpy as np

    from minicompiler.inputs import Bounds
    from minicompiler.report import Opened, Output

F = TypeVar("F", bound=Callable[..., Any])
_USER_ERROR = 2
_CHECK_FAILED = 1
_INTERRUPTED = 130
DEMO_LIMIT = 5e-5


class _Commands(click.Group):
    """A group whose commands end with a message, never with a traceback, on a user's mistake."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MinicompilerError as error:
            click.echo(f"{type(error).__name__}: {error}", err=True)
            ctx.exit(_USER_ERROR)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(_INTERRUPTED)


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    def add(f: F) -> F:
        for option in reversed(options):
            f = option(f)
        return f

    return add


_model = click.argument("model", type=click.Path(exists=True, dir_okay=False))
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
_threads = click.option("--threads", type=click.IntRange(1), help="Default: the usable cores.")
_dims = click.option(
    "--dims",
    multiple=True,
    metavar="NAME=SIZE,...",
    help="Sizes of named dimensions: batch=8, batch=1..64, sequence=8..512:8 (multiples of 8).",
)
_compiling = _options(
    click.option("--target", default="cpu", show_default=True, help="cpu, cpu:avx2, ..."),
    click.option("--level", type=click.IntRange(0, 3), default=3, show_default=True,
                 help="Optimisation; 0 is none."),
)  # fmt: skip
_feeding = _options(
    click.option("--input", "pairs", multiple=True, metavar="NAME=FILE.npy", help="One input."),
    click.option("--inputs", "archive", metavar="FILE.npz", help="Inputs by name."),
)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """A small tensor compiler: ONNX models to fast native kernels.

    MODEL is an .onnx file, or an .mc file that `compile` wrote. Start with `minicompiler demo`.
    """


# ---- demo ----------------------------------------------------------------------------------------
@main.command()
@_threads
@click.option("--size", type=click.IntRange(32), default=224, show_default=True, help="Pixels.")
@_json
def demo(threads: int | None, size: int, as_json: bool) -> None:
    """Compile and check a ResNet-18 with random weights.

    The network is built in Python, so nothing is downloaded. Its result is compared with a plain
    numpy evaluation of the same graph; an error above 5e-5 of the largest result fails.
    Rates count the operations of plain convolution, whatever algorithm a kernel uses.
    """
    from minicompiler.demo import image, resnet18
    from minicompiler.inputs import difference
    from minicompiler.ops.evaluate import run_reference
    from minicompiler.report import (
        Output,
        compiled,
        count_text,
        kernel_rows,
        show_kernels,
        show_stages,
    )
    from minicompiler.runtime.profile import profile

    out = Output(as_json)
    fn, x = resnet18(size), image(size)
    with out.busy("compiling ResNet-18"):
        opened = compiled("resnet18", fn, threads, "cpu", 3, time.perf_counter())
    module = opened.module
    (y,) = module(x)
    with out.busy("evaluating it with numpy"):
        start = time.perf_counter()
        (want,) = run_reference(fn, [x])
        numpy_seconds = time.perf_counter() - start
    error = difference(y, want)
    seconds = _median_seconds(lambda: module(x))
    rows = kernel_rows(opened, profile(module, [x]))
    flops = opened.flops({}) or 0
    out.say(f"ResNet-18, {size}x{size} pixels, for {module.target}; {module.threads} threads")
    show_stages(out, module)
    show_kernels(out, rows)
    out.say(f"compiled in   {opened.seconds:.2f} s")
    out.say(f"latency       {seconds * 1e3:.2f} ms (numpy: {numpy_seconds * 1e3:.0f} ms)")
    out.say(f"speed         {flops / seconds / 1e9:.1f} GFLOP/s ({count_text(flops, 'FLOP')})")
    out.say(f"max |error| / max |reference|  {error:.2e} (limit {DEMO_LIMIT:.0e})")
    out.finish({
        "compile_seconds": opened.seconds, "latency_seconds": seconds, "flops": flops,
        "numpy_seconds": numpy_seconds, "error": error, "limit": DEMO_LIMIT,
        "target": str(module.target), "threads": module.threads, "kernels": rows,
    })  # fmt: skip
    _fail_unless(error <= DEMO_LIMIT, "the result is wrong")


def _median_seconds(run: Callable[[], object], budget: float = 1.0) -> float:
    run()
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _fail_unless(fine: bool, message: str) -> None:
    if not fine:
        click.echo(f"check failed: {message}", err=True)
        raise click.exceptions.Exit(_CHECK_FAILED)


# ---- compile -------------------------------------------------------------------------------------
@main.command("compile")
@_model
@click.option("-o", "--output", metavar="FILE", help="Default: MODEL with the ending .mc.")
@_dims
@_threads
@_compiling
@_json
def compile_(
    model: str,
    output: str | None,
    dims: Sequence[str],
    threads: int | None,
    target: str,
    level: int,
    as_json: bool,
) -> None:
    """Compile an ONNX model to a file that runs without the compiler.

    Dimensions without a name in the model are called INPUT.AXIS, such as x.0.
    """
    from minicompiler.inputs import parse_dims, single, suffix_of
    from minicompiler.report import Output, count_text, open_model, show_stages

    if suffix_of(model) == ".mc":
        raise MinicompilerError(f"{model} is compiled already")
    out = Output(as_json)
    path = output or str(Path(model).with_suffix(".mc"))
    with out.busy(f"compiling {Path(model).name}"):
        opened = open_model(model, single(parse_dims(dims)), threads, target, level)
    module = opened.module
    module.save(path)
    size = os.path.getsize(path)
    show_stages(out, module)
    _say_interface(out, opened)
    out.say(f"{path}: {count_text(size, 'B')}, {len(module.plan.kernels)} kernels, "
            f"compiled in {opened.seconds:.2f} s for {module.target}")  # fmt: skip
    out.finish({
        "output": path, "bytes": size, "kernels": len(module.plan.kernels),
        "seconds": opened.seconds, "target": str(module.target), **_interface(opened),
    })  # fmt: skip


def _interface(opened: Opened) -> dict[str, Any]:
    plan = opened.module.plan
    return {
        "inputs": [str(t) for t in plan.inputs],
        "outputs": [str(t) for t in plan.outputs],
        "dims": {d.name: [d.lo, d.hi, d.multiple_of] for d in plan.dims},
    }


def _say_interface(out: Output, opened: Opened) -> None:
    plan = opened.module.plan
    for kind, tensors in (("input", plan.inputs), ("output", plan.outputs)):
        for t in tensors:
            out.say(f"{kind:7} {t}")
    for d in plan.dims:
        top = "any size" if d.hi is None else f"to {d.hi}"
        step = f", multiples of {d.multiple_of}" if d.multiple_of > 1 else ""
        out.say(f"dim     {d.name}: from {d.lo} {top}{step}")


# ---- run -----------------------------------------------------------------------------------------
@main.command()
@_model
@_feeding
@click.option("--output", metavar="FILE.npz", help="Where to write the outputs.")
@click.option("--check", type=click.Choice(["onnxruntime", "reference"]),
              help="Compare with onnxruntime or a numpy evaluation of the graph.")  # fmt: skip
@click.option("--tolerance", type=float, default=1e-4, show_default=True,
              help="For --check: max |error| / max |result|.")  # fmt: skip
@_dims
@_threads
@_compiling
@_json
def run(
    model: str,
    pairs: Sequence[str],
    archive: str | None,
    output: str | None,
    check: str | None,
    tolerance: float,
    dims: Sequence[str],
    threads: int | None,
    target: str,
    level: int,
    as_json: bool,
) -> None:
    """Run a model once; inputs that are not given are random."""
    import numpy as np

    from minicompiler.inputs import difference, parse_dims, read_inputs, single
    from minicompiler.report import Output, open_model

    out = Output(as_json)
    wanted = single(parse_dims(dims))
    given = read_inputs(pairs, archive)
    with out.busy(f"preparing {Path(model).name}"):
        opened = open_model(model, wanted, threads, target, level)
    feeds = _feeds(out, opened, wanted, given)
    results = opened.module.run(feeds)
    if output:
        try:
            with open(output, "wb") as file:
                np.savez(file, **results)
        except OSError as error:
            raise MinicompilerError(f"{output} cannot be written: {error.strerror}") from None
    rows = [_statistics(name, a) for name, a in results.items()]
    out.table(
        "Outputs", ["name", "type", ">min", ">mean", ">max"], [list(r.values()) for r in rows]
    )
    report: dict[str, Any] = {"outputs": rows}
    errors: dict[str, float] = {}
    if check:
        expected = _expected(check, opened, feeds)
        for (name, a), want in zip(results.items(), expected, strict=True):
            errors[name] = e = difference(a, want)
            out.say(f"{name}: max |error| / max |{check}| = {e:.2e} (limit {tolerance:.0e})")
        report["check"] = {"against": check, "limit": tolerance, "errors": errors}
    out.finish(report)
    wrong = [name for name, e in errors.items() if e > tolerance]
    _fail_unless(not wrong, f"{', '.join(wrong)} differs from {check}")


def _feeds(
    out: Output, opened: Opened, wanted: Mapping[str, Bounds], given: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """All inputs of a call; says which ones are made up."""
    from minicompiler.inputs import random_inputs, sizes_for, sizes_of

    plan = opened.module.plan
    unknown = [n for n in given if n not in {t.name for t in plan.inputs}]
    if unknown:
        names = ", ".join(t.name for t in plan.inputs)
        raise MinicompilerError(
            f"the model has no input {', '.join(unknown)}", hint=f"it has: {names}"
        )
    # Of an ONNX model, a dimension with one size is a constant by now.
    left = {d.name for d in plan.dims} if opened.graph is not None else set(wanted)
    asked = {n: b for n, b in wanted.items() if isinstance(b, int) and n in left}
    sizes = sizes_for(plan, asked | sizes_of(plan, given))
    missing = [t.name for t in plan.inputs if t.name not in given]
    if missing:
        chosen = ", ".join(f"{n}={v}" for n, v in sizes.items())
        at = f" (with {chosen})" if chosen else ""
        out.remark(
            f"random values for {', '.join(missing)}{at}: floats in [-1, 1), integers 0 and 1"
        )
    return random_inputs(plan, sizes, given)


def _expected(check: str, opened: Opened, feeds: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
    """The outputs that something else computes."""
    if opened.graph is None:
        raise MinicompilerError(f"--check needs the original model, not {opened.path}")
    if check == "reference":
        from minicompiler.ops.evaluate import run_reference

        return run_reference(opened.graph, feeds)
    from minicompiler.bench import peer

    return peer(check, opened.path, 1)(feeds)()


def _statistics(name: str, a: np.ndarray) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "type": f"{a.dtype}{list(a.shape)}"}
    if a.size and a.dtype.kind != "b":
        wide = a.astype("float64")
        row |= {
            "min": f"{wide.min():.6g}",
            "mean": f"{wide.mean():.6g}",
            "max": f"{wide.max():.6g}",
        }
    return row


# ---- bench ---------------------------------------------------------------------------------------
@main.command()
@_model
@click.option("--threads", metavar="N,...", help="Thread counts; default: the usable cores.")
@click.option("--dims", multiple=True, metavar="NAME=SIZE,...",
              help="As for compile; several sizes (batch=1,8) are measured in turn.")  # fmt: skip
@click.option("--against", metavar="RUNTIME,...", default="",
              help="onnxruntime, openvino, torch: measured in turn with this model.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(0.1), default=3.0, show_default=True,
              help="Time per runtime, thread count and size.")  # fmt: skip
@click.option("--kernels", is_flag=True, help="Also the time of each kernel.")
@_feeding
@_compiling
@_json
def bench(
    model: str,
    threads: str | None,
    dims: Sequence[str],
    against: str,
    seconds: float,
    kernels: bool,
    pairs: Sequence[str],
    archive: str | None,
    target: str,
    level: int,
    as_json: bool,
) -> None:
    """Measure latency and throughput, alone or against other runtimes.

    Runtimes take turns in short blocks; warm-up calls are not counted. A ratio above 1 means that
    minicompiler is faster; the range beside it holds half of the turns.
    """
    from minicompiler.inputs import parse_dims, read_inputs, suffix_of
    from minicompiler.report import Output, open_model

    out = Output(as_json)
    given = read_inputs(pairs, archive)
    bounds, cases = _cases(parse_dims(dims), static=suffix_of(model) != ".mc")
    peers = [name for name in against.split(",") if name]
    if peers and suffix_of(model) == ".mc":
        raise MinicompilerError(f"other runtimes need the original model, not {model}")
    report = []
    for count in _thread_counts(threads):
        with out.busy(f"preparing {Path(model).name}"):
            opened = open_model(model, bounds, count, target, level)
            others = _peers(peers, model, opened.module.threads)
        for sizes in cases:
            feeds = _feeds(out, opened, sizes, given)
            report.append(_measure(out, opened, others, sizes, feeds, seconds))
            if kernels:
                report[-1]["kernels"] = _kernel_times(out, opened, feeds)
    out.finish({"model": model, "results": report})


def _cases(
    dims: Mapping[str, Sequence[Bounds]], static: bool
) -> tuple[dict[str, Bounds], list[dict[str, int]]]:
    """The bounds to compile for, and the sizes to measure: every combination of the given ones."""
    bounds: dict[str, Bounds] = {}
    choices: dict[str, list[int]] = {}
    for name, values in dims.items():
        numbers = [v for v in values if isinstance(v, int)]
        ranges = [v for v in values if not isinstance(v, int)]
        if static or ranges:
            several = (min(numbers), max(numbers)) if len(numbers) > 1 else None
            bounds[name] = ranges[0] if ranges else several or numbers[0]
        if numbers:
            choices[name] = numbers
    combinations = itertools.product(*choices.values())
    return bounds, [dict(zip(choices, c, strict=True)) for c in combinations]


def _thread_counts(text: str | None) -> list[int | None]:
    if text is None:
        return [None]
    parts = text.split(",")
    if not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise MinicompilerError(f'--threads "{text}" is not understood', hint="--threads 1,2")
    return [int(p) for p in parts]


def _peers(names: Iterable[str], model: str, threads: int) -> dict[str, Callable[..., Any]]:
    from minicompiler.bench import peer

    return {name: peer(name, model, threads) for name in names}


def _measure(
    out: Output,
    opened: Opened,
    others: Mapping[str, Callable[..., Any]],
    sizes: Mapping[str, int],
    feeds: Mapping[str, np.ndarray],
    seconds: float,
) -> dict[str, Any]:
    """One size and thread count: every runtime's times, and how far its results are from ours."""
    from minicompiler.bench import compare
    from minicompiler.inputs import difference, sizes_of
    from minicompiler.report import TIMING_COLUMNS, timing_records, timing_rows

    module = opened.module
    arrays = [feeds[t.name] for t in module.inputs]
    runners: dict[str, Callable[[], Any]] = {"minicompiler": lambda: module(*arrays)}
    runners |= {name: prepare(feeds) for name, prepare in others.items()}
    mine = module(*arrays)
    apart = {
        name: max(difference(a, b) for a, b in zip(mine, runners[name](), strict=True))
        for name in others
    }
    with out.busy("measuring"):
        times = compare(runners, seconds)
    flops = opened.flops(sizes_of(module.plan, feeds))
    several = "s" if module.threads > 1 else ""
    at = ", ".join([f"{module.threads} thread{several}", *(f"{n}={v}" for n, v in sizes.items())])
    rows = timing_rows(times, flops, apart)
    out.table(f"{Path(opened.path).name}, {at}", TIMING_COLUMNS, rows)
    return {
        "threads": module.threads, "dims": dict(sizes), "flops": flops,
        "runtimes": timing_records(times, apart),
    }  # fmt: skip


def _kernel_times(
    out: Output, opened: Opened, feeds: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    from minicompiler.report import kernel_rows, show_kernels
    from minicompiler.runtime.profile import profile

    module = opened.module
    rows = kernel_rows(opened, profile(module, [feeds[t.name] for t in module.inputs]))
    show_kernels(out, rows)
    return rows


# ---- inspect -------------------------------------------------------------------------------------
@main.command()
@_model
@_dims
@_compiling
@_json
def inspect(model: str, dims: Sequence[str], target: str, level: int, as_json: bool) -> None:
    """Show what is in a model: operators, sizes, work and memory.

    Exits with 1 when the model uses operators that are not supported, and lists them.
    """
    from minicompiler.errors import ImportModelError
    from minicompiler.inputs import parse_dims, single, sizes_for
    from minicompiler.report import Output, count_text, memory, open_model, parameters_of

    out = Output(as_json)
    wanted = single(parse_dims(dims))
    try:
        with out.busy(f"compiling {Path(model).name}"):
            opened = open_model(model, wanted, 1, target, level)
    except ImportModelError as error:
        out.finish({"supported": False, "error": str(error)})
        _fail_unless(False, str(error))
        return
    plan = opened.module.plan
    left = {d.name for d in plan.dims}
    sizes = sizes_for(plan, {n: b for n, b in wanted.items() if isinstance(b, int) and n in left})
    flops, used = opened.flops(sizes), memory(opened.module, sizes)
    report: dict[str, Any] = {"supported": True, **_interface(opened)}
    _say_interface(out, opened)
    if opened.graph is not None:
        operators, count, size = parameters_of(opened.graph)
        rows = [[name, n] for name, n in operators.items()]
        out.table("Operators", ["operator", ">nodes"], rows)
        out.say(f"parameters  {count_text(count, '').rstrip()} ({count_text(size, 'B')})")
        report |= {"operators": operators, "parameters": count, "parameter_bytes": size}
    at = ", ".join(f"{n}={v}" for n, v in sizes.items())
    out.say(f"kernels     {len(plan.kernels)} in {len(plan.calls)} calls")
    if flops is not None:
        out.say(f"work        {count_text(flops, 'FLOP')}{f' at {at}' if at else ''}")
    for name, n in used.items():
        out.say(
            f"{name:11} {count_text(n, 'B')}{f' at {at}' if at and name != 'constants' else ''}"
        )
    out.finish(report | {"kernels": list(plan.kernels), "calls": len(plan.calls), "sizes": sizes,
                         "flops": flops, "memory_bytes": used})  # fmt: skip


# ---- cache ---------------------------------------------------------------------------------------
@main.group()
def cache() -> None:
    """The compiled kernels kept on disk (folder: MINICOMPILER_CACHE)."""


@cache.command()
@_json
def info(as_json: bool) -> None:
    """Show where the cache is and how full."""
    from minicompiler.report import Output, count_text
    from minicompiler.runtime.diskcache import DiskCache

    state = DiskCache().info()
    out = Output(as_json)
    out.say(f"{state.folder}: {state.entries} entries, {count_text(state.bytes, 'B')} "
            f"of {count_text(state.limit, 'B')}")  # fmt: skip
    out.finish({
        "folder": str(state.folder), "entries": state.entries, "bytes": state.bytes,
        "limit": state.limit,
    })  # fmt: skip


@cache.command()
@_json
def clear(as_json: bool) -> None:
    """Delete all cached kernels."""
    from minicompiler.report import Output
    from minicompiler.runtime.diskcache import DiskCache

    count = DiskCache().clear()
    out = Output(as_json)
    out.say(f"{count} entries deleted")
    out.finish({"deleted": count})


if __name__ == "__main__":
    main()
