"""`minicompiler bench model`: latency and throughput, in turn with other runtimes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minicompiler.commands import options
from minicompiler.errors import MinicompilerError

if TYPE_CHECKING:
    import numpy as np

    from minicompiler.bench import Measured
    from minicompiler.report import Opened, Output


@click.command("bench")
@options.model
@click.option("--threads", metavar="N,...", help="Thread counts; default: the usable cores.")
@click.option("--streams", type=click.IntRange(1), default=1, show_default=True,
              help="Callers at the same time, each in its own Python thread.")  # fmt: skip
@options.several_dims
@click.option("--batch", metavar="N,...",
              help="Sizes of the inputs' first axis, whatever its name is.")  # fmt: skip
@click.option("--against", metavar="RUNTIME,...", default="",
              help="onnxruntime, openvino, torch: measured in turn with this model.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(0.1), default=3.0, show_default=True,
              help="Time per runtime, thread count and size.")  # fmt: skip
@click.option("--kernels", is_flag=True, help="Also the time of each kernel.")
@options.feeding
@options.compiling
@options.as_json
def command(
    model: str,
    threads: str | None,
    streams: int,
    dims: Sequence[str],
    batch: str | None,
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
    minicompiler is faster; the range beside it holds half of the turns. With several streams the
    ratio is that of the throughputs: one call at a time runs on all threads, others on their own.
    The last line is a hint what to try next.

    \b
    Examples:
      minicompiler bench model.onnx --against onnxruntime,openvino
      minicompiler bench model.onnx --threads 1,2 --batch 1,8,64
      minicompiler bench model.mc --streams 4 --threads 1 --json
    """
    from minicompiler.bench import hint
    from minicompiler.commands.feeds import feeds
    from minicompiler.inputs import cases, parse_dims, read_inputs, suffix_of
    from minicompiler.report import Output, open_model
    from minicompiler.target import usable_cores

    out = Output(as_json)
    given = read_inputs(pairs, archive)
    saved = suffix_of(model) == ".mc"
    sizes = [*dims, f"{_batch_name(model)}={batch}"] if batch is not None else list(dims)
    bounds, wanted = cases(parse_dims(sizes), fixed=saved)
    peers = [name for name in against.split(",") if name]
    if peers and saved:
        raise MinicompilerError(f"other runtimes need the original model, not {model}")
    report, measured = [], []
    for count in _thread_counts(threads):
        with out.busy(f"preparing {Path(model).name}"):
            opened = open_model(model, bounds, count, target, level)
            others = _peers(peers, model, opened.module.threads)
        for at in wanted:
            arrays = feeds(out, opened, at, given)
            record, facts = _measure(out, opened, others, at, arrays, streams, seconds)
            if kernels:
                record["kernels"] = _kernel_times(out, opened, arrays)
            report.append(record)
            measured.append(facts)
    advice = hint(measured, usable_cores(), streams, Path(model).name)
    out.say(f"hint: {advice}")
    out.finish({"model": model, "streams": streams, "results": report, "hint": advice})


def _batch_name(model: str) -> str:
    """The dimension that is the first axis of inputs. Raises MinicompilerError without one."""
    from minicompiler.inputs import suffix_of

    first: list[str]
    if suffix_of(model) == ".mc":
        from minicompiler.runtime.module import load

        shapes = [t.shape for t in load(model, 1).inputs]
        first = [s[0] for s in shapes if s and isinstance(s[0], str)]
    else:
        from minicompiler.driver import import_model
        from minicompiler.ir.expr import Dim
        from minicompiler.ir.graph import arg_of

        types = [arg_of(p).type for p in import_model(model).params]
        first = [t.shape[0].name for t in types if t.shape and isinstance(t.shape[0], Dim)]
    names = list(dict.fromkeys(first))
    if len(names) != 1:
        found = f"several: {', '.join(names)}" if names else "none: its sizes are fixed"
        raise MinicompilerError(
            f"--batch needs a model whose inputs have one dimension as their first axis; "
            f"{model} has {found}",
            hint="name the dimension: --dims NAME=1,8" if names else "",
        )
    return names[0]


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
    streams: int,
    seconds: float,
) -> tuple[dict[str, Any], Measured]:
    """One size and thread count: every runtime's times, and how far its results are from ours."""
    from minicompiler.bench import Measured, compare
    from minicompiler.inputs import difference, sizes_of
    from minicompiler.report import TIMING_COLUMNS, timing_records, timing_rows

    module = opened.module
    arrays = [feeds[t.name] for t in module.inputs]
    runners: dict[str, list[Callable[[], Any]]] = {
        "minicompiler": [lambda: module(*arrays)] * streams
    }
    runners |= {name: [prepare(feeds) for _ in range(streams)] for name, prepare in others.items()}
    mine = module(*arrays)
    apart = {
        name: max(difference(a, b) for a, b in zip(mine, runners[name][0](), strict=True))
        for name in others
    }
    with out.busy("measuring"):
        times = compare(runners, seconds)
    flops = opened.flops(sizes_of(module.plan, feeds))
    several = "s" if module.threads > 1 else ""
    at = [f"{module.threads} thread{several}", *(f"{n}={v}" for n, v in sizes.items())]
    if streams > 1:
        at.insert(1, f"{streams} streams")
    rows = timing_rows(times, flops, apart)
    out.table(f"{Path(opened.path).name}, {', '.join(at)}", TIMING_COLUMNS, rows)
    records = timing_records(times, apart)
    record = {
        "threads": module.threads, "streams": streams, "dims": dict(sizes), "flops": flops,
        "compile_seconds": opened.seconds, "runtimes": records,
    }  # fmt: skip
    own, ratios = times["minicompiler"], {name: records[name]["ratio"] for name in apart}
    loose = [d.name for d in module.plan.dims if opened.graph is not None]
    return record, Measured(module.threads, sizes, loose, own.summary(), ratios)


def _kernel_times(
    out: Output, opened: Opened, feeds: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    from minicompiler.report import kernel_rows, show_kernels
    from minicompiler.runtime.profile import profile

    module = opened.module
    rows = kernel_rows(opened, profile(module, [feeds[t.name] for t in module.inputs]))
    show_kernels(out, rows)
    return rows
