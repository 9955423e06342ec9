"""`minicompiler profile model`: the time of each kernel, what limits it, and where it came from."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minicompiler.commands import options
from minicompiler.errors import MinicompilerError

if TYPE_CHECKING:
    from minicompiler.machine import Peaks
    from minicompiler.report import Opened, Output
    from minicompiler.runtime.profile import KernelTime

_WHOLE_SECONDS = 0.5  # for the time of the whole model, which the sum is compared with
_BUSY = 0.85  # of the highest rate: below, other programs take a part of the machine


@click.command("profile")
@options.model
@click.option("--kernel", "wanted", metavar="NAME",
              help="Only kernels whose name or nodes contain NAME, with their steps.")  # fmt: skip
@click.option("--steps", is_flag=True, help="Also each kernel's source nodes and schedule steps.")
@click.option("--repeat", type=click.IntRange(1), default=20, show_default=True,
              help="Measurements of each kernel; the median counts.")  # fmt: skip
@click.option("--remeasure", is_flag=True, help="Measure the machine again, not from the cache.")
@options.feeding
@options.dims
@options.threads
@options.compiling
@options.as_json
def command(
    model: str,
    wanted: str | None,
    steps: bool,
    repeat: int,
    remeasure: bool,
    pairs: Sequence[str],
    archive: str | None,
    dims: Sequence[str],
    threads: int | None,
    target: str,
    level: int,
    as_json: bool,
) -> None:
    """Show where the time goes, kernel by kernel, and why.

    The slowest kernel comes first. Kernels run one by one, in the model's order, on all threads.
    GFLOP/s counts the operations of the operators' definition, GB/s what they must read and write.
    The roofline is the larger of two times: the operations at the highest rate of multiply-adds,
    the bytes at the bandwidth of the cache or memory that holds them. These limits are measured on
    this machine once, with generated code, and cached.

    \b
    Examples:
      minicompiler profile resnet18.onnx --threads 1
      minicompiler profile bert.onnx --dims batch=8,sequence=128 --json
      minicompiler profile resnet18.onnx --kernel layer1 --steps
    """
    from minicompiler.commands.feeds import feeds
    from minicompiler.footprint import predict
    from minicompiler.inputs import parse_dims, read_inputs, single
    from minicompiler.machine import flops_now, peaks
    from minicompiler.report import Output, open_model, short_name
    from minicompiler.runtime.profile import profile

    out = Output(as_json)
    sizes = single(parse_dims(dims))
    given = read_inputs(pairs, archive)
    with out.busy(f"compiling {Path(model).name}"):
        opened = open_model(model, sizes, threads, target, level)
    module = opened.module
    inputs = feeds(out, opened, sizes, given)
    arrays = [inputs[t.name] for t in module.inputs]
    with out.busy("measuring this machine"):
        limits = peaks(module.target, module.threads, remeasure)
    with out.busy("measuring the kernels"):
        times = profile(module, arrays, repeat)
        now = flops_now(module.target, module.threads)
        whole = _whole(lambda: module(*arrays))
    at = times[0].dims if times else {}
    memory = predict(module, at)
    with out.busy("reading the kernels' loops"):
        rows = _rows(opened, times, limits, memory["weights"] + memory["arena"])
    if wanted is not None:
        rows = [r for r in rows if any(wanted in text for text in (r["kernel"], *r["nodes"]))]
        if not rows:
            raise MinicompilerError(
                f'no kernel or source node contains "{wanted}"',
                hint=f"kernels: {', '.join(map(short_name, module.plan.kernels))}",
            )
    if now < _BUSY * limits.flops:
        out.remark(
            f"the machine runs at {100 * now / limits.flops:.0f}% of its highest rate now, "
            "probably for other programs: all rates are low by that"
        )
    totals = _totals(opened, times, whole, rows, limits)
    _show(out, opened, rows, totals, limits)
    if steps or wanted is not None:
        _show_steps(out, rows)
    out.finish({
        "model": model, "target": str(module.target), "threads": module.threads, "dims": at,
        "machine": limits.to_json(), "flops_now": now, **totals, "kernels": rows,
    })  # fmt: skip


def _whole(run: Any) -> float:
    """The median time of a call of the whole model, in seconds."""
    run()
    times: list[float] = []
    end = time.perf_counter() + _WHOLE_SECONDS
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _rows(
    opened: Opened, times: Sequence[KernelTime], limits: Peaks, resident: int
) -> list[dict[str, Any]]:
    """A record per kernel, the slowest first; its numbers are of all its calls."""
    from minicompiler.diagnose import diagnose

    by_kernel: dict[str, list[KernelTime]] = {}
    for t in times:
        by_kernel.setdefault(t.kernel, []).append(t)
    total = sum(t.seconds for t in times) or 1.0
    rows = []
    for kernel, calls in by_kernel.items():
        seconds, made = sum(t.seconds for t in calls), sum(t.times for t in calls)
        row: dict[str, Any] = {
            "kernel": kernel, "calls": made, "seconds": seconds,
            "share": seconds / total, "nodes": [],
        }  # fmt: skip
        if kernel in opened.fused and made:
            nest = opened.nest(kernel).at(calls[0].dims)
            work = nest.work(calls[0].dims)
            found = diagnose(work, seconds / made, limits, resident)
            row |= {
                "nodes": [str(loc) for v in opened.fused[kernel] for loc in v.locs],
                "flops": work.flops * made,
                "performed": work.performed * made,
                "bytes": work.moved * made,
                "roofline_percent": found.percent,
                "bound": found.bound,
                "why": list(found.reasons),
                "rule": nest.rule,
                "steps": list(nest.steps),
            }
        rows.append(row)
    return sorted(rows, key=lambda row: -float(row["seconds"]))


def _totals(
    opened: Opened,
    times: Sequence[KernelTime],
    whole: float,
    rows: Sequence[Mapping[str, Any]],
    limits: Peaks,
) -> dict[str, Any]:
    """Of all rows, and the time of the whole model beside their sum."""
    found: dict[str, Any] = {
        "kernels_seconds": sum(t.seconds for t in times),
        "whole_seconds": whole,
    }
    if opened.kernels:
        made = [r for r in rows if "flops" in r]  # not those in a branch that was not taken
        flops = sum(r["flops"] for r in made)
        best = sum(r["seconds"] * r["roofline_percent"] / 100 for r in made)
        spent = sum(r["seconds"] for r in made)
        found |= {
            "flops": flops, "performed": sum(r["performed"] for r in made),
            "bytes": sum(r["bytes"] for r in made),
            "peak_flops_percent": 100 * flops / spent / limits.flops if spent else 0.0,
            "roofline_percent": 100 * best / spent if spent else 0.0,
        }  # fmt: skip
    return found


def _show(
    out: Output,
    opened: Opened,
    rows: Sequence[Mapping[str, Any]],
    totals: Mapping[str, Any],
    limits: Peaks,
) -> None:
    from minicompiler.report import first_of, short_name

    cells = []
    for r in rows:
        rates = [f"{r[k] / r['seconds'] / 1e9:.1f}" if r.get(k) and r["seconds"] else ""
                 for k in ("flops", "bytes")]  # fmt: skip
        percent = f"{r['roofline_percent']:.0f}" if "roofline_percent" in r else ""
        why = "; ".join(r.get("why", ()))
        cells.append([
            short_name(r["kernel"]), r["calls"], f"{r['seconds'] * 1e3:.3f}",
            f"{100 * r['share']:.1f}", *rates, percent, first_of(r["nodes"]), why,
        ])  # fmt: skip
    several = "s" if opened.module.threads > 1 else ""
    title = f"{Path(opened.path).name}, {opened.module.threads} thread{several}"
    columns = ["kernel", ">calls", ">ms", ">%", ">GFLOP/s", ">GB/s", ">% of roof", "from", "why"]
    out.table(title, columns, cells)
    sums, whole = totals["kernels_seconds"], totals["whole_seconds"]
    out.say(f"kernels     {sums * 1e3:.3f} ms one by one; the whole model {whole * 1e3:.3f} ms "
            f"({100 * (whole / sums - 1) if sums else 0:+.0f}%)")  # fmt: skip
    if "flops" in totals:
        out.say(f"reached     {totals['peak_flops_percent']:.0f}% of the highest FMA rate, "
                f"{totals['roofline_percent']:.0f}% of the roofline")  # fmt: skip
    else:
        out.remark("operations and reasons need the original model, not a compiled one")
    rates_of = ", ".join(
        f"{x.name} {x.read / 1e9:.0f} read {x.write / 1e9:.0f} write" for x in limits.levels
    )
    if totals.get("performed", 0) < totals.get("flops", 0):
        out.say(f"algorithms  {totals['performed'] / totals['flops']:.2f} of these operations are "
                "carried out: some kernels use one that needs fewer")  # fmt: skip
    out.say(f"machine     {limits.flops / 1e9:.0f} GFLOP/s; GB/s: {rates_of}")


def _show_steps(out: Output, rows: Sequence[Mapping[str, Any]]) -> None:
    from minicompiler.report import short_name

    for r in rows:
        out.say()
        out.say(f"{short_name(r['kernel'])}, rule {r.get('rule', 'unknown')}")
        for node in r["nodes"]:
            out.say(f"  from {node}")
        for step in r.get("steps", ()):
            out.say(f"  {step}")
