"""`minicompiler inspect model`: operators, work, memory and what is not supported."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minicompiler.commands import options

if TYPE_CHECKING:
    from minicompiler.errors import UnsupportedError
    from minicompiler.report import Opened, Output

_PARTS = ("weights", "code", "arena", "workspace", "pages", "inputs", "outputs")


@click.command("inspect")
@options.model
@options.several_dims
@options.threads
@click.option("--layers", is_flag=True, help="Also each operator with its name and shape.")
@click.option("--kernels", is_flag=True, help="Also the work of each kernel.")
@click.option("--measure", is_flag=True,
              help="Also call it in a process of its own, and compare its memory.")  # fmt: skip
@options.compiling
@options.as_json
def command(
    model: str,
    dims: Sequence[str],
    threads: int | None,
    layers: bool,
    kernels: bool,
    measure: bool,
    target: str,
    level: int,
    as_json: bool,
) -> None:
    """Show the operators, shapes, work and memory of a model.

    Nothing is run (but with --measure). Memory is what a process needs beside Python and numpy to
    load the compiled model and call it: weights as kernels read them, code, arena (intermediate
    values), workspace inside kernels, rounding up to pages, inputs and outputs. Bytes moved are
    what kernels must read and write, each byte once; FLOP/B is the arithmetic intensity.

    Exits with 3 when the model uses operators that are not supported, and lists all of them.

    \b
    Examples:
      minicompiler inspect resnet18.onnx --kernels
      minicompiler inspect bert.onnx --dims batch=1,8,sequence=128,512
      minicompiler inspect model.mc --measure --json
    """
    from minicompiler.commands.feeds import single_sizes
    from minicompiler.errors import UnsupportedError
    from minicompiler.inputs import cases, parse_dims, sizes_for, suffix_of
    from minicompiler.report import Output, interface, open_model, say_interface

    out = Output(as_json)
    bounds, wanted = cases(parse_dims(dims), fixed=suffix_of(model) == ".mc")
    try:
        with out.busy(f"compiling {Path(model).name}"):
            opened = open_model(model, bounds, threads, target, level)
    except UnsupportedError as error:
        _refuse(out, error)
        raise click.exceptions.Exit(options.UNSUPPORTED) from None
    plan = opened.module.plan
    sizes = [sizes_for(plan, single_sizes(opened, w)) for w in wanted]
    report: dict[str, Any] = {"supported": True, **interface(opened)}
    say_interface(out, opened)
    if opened.graph is not None:
        report |= _operators(out, opened, layers)
    out.say(f"kernels     {len(plan.kernels)} in {len(plan.calls)} calls, "
            f"for {opened.module.target}")  # fmt: skip
    report |= {"kernels": list(plan.kernels), "calls": len(plan.calls)}
    report["sizes"] = [_at(opened, s) for s in sizes]
    if measure:
        with out.busy("calling it in a process of its own"):
            _measure(opened, report["sizes"])
    _show_sizes(out, opened, report["sizes"])
    if kernels and opened.kernels:
        for record, s in zip(report["sizes"], sizes, strict=True):
            record["kernels"] = _kernels(opened, s)
            _show_kernels(out, record)
    out.finish(report)


def _refuse(out: Output, error: UnsupportedError) -> None:
    """What is in a model that cannot be compiled, as far as it is known."""
    rows = [[op, n, "not supported" if op in error.operators else ""]
            for op, n in sorted(error.used.items(), key=lambda item: -item[1])]  # fmt: skip
    out.table("ONNX operators", ["operator", ">nodes", ""], rows)
    out.finish({"supported": False, "operators": error.used, "unsupported": error.operators})
    click.echo(f"not supported: {error}", err=True)


def _operators(out: Output, opened: Opened, layers: bool) -> dict[str, Any]:
    """The imported graph: operators, weights, and each node if asked for."""
    from minicompiler.ir.graph import Apply, topological
    from minicompiler.report import count_text, parameters_of

    assert opened.graph is not None
    operators, count, size = parameters_of(opened.graph)
    out.table("Operators", ["operator", ">nodes"], [[name, n] for name, n in operators.items()])
    out.say(f"parameters  {count_text(count, '').rstrip()} ({count_text(size, 'B')})")
    found: dict[str, Any] = {
        "operators": operators, "parameters": count, "parameter_bytes": size,
    }  # fmt: skip
    if layers:
        nodes = [v for v in topological(opened.graph.results) if isinstance(v, Apply)]
        found["layers"] = [
            {
                "operator": v.op.name,
                "from": [str(loc) for loc in v.locs],
                "types": [str(t) for t in (v.type if isinstance(v.type, tuple) else (v.type,))],
            }
            for v in nodes
        ]
        rows = [[x["operator"], ", ".join(x["from"]), ", ".join(x["types"])]
                for x in found["layers"]]  # fmt: skip
        out.table("Layers", ["operator", "from", "result"], rows)
    return found


def _at(opened: Opened, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Work and memory for one setting of the dimensions."""
    from minicompiler.footprint import predict

    memory = predict(opened.module, sizes)
    found: dict[str, Any] = {"dims": dict(sizes)}
    if opened.kernels:
        flops, moved = opened.flops(sizes) or 0, opened.moved(sizes) or 0
        intensity = flops / moved if moved else 0.0
        found |= {"flops": flops, "bytes_moved": moved, "intensity": intensity}
    return found | {"memory_bytes": memory, "peak_bytes": sum(memory.values())}


def _measure(opened: Opened, records: Sequence[dict[str, Any]]) -> None:
    """Adds the memory that a call really takes to each record."""
    from minicompiler.footprint import measure

    with tempfile.TemporaryDirectory() as folder:
        path = opened.path
        if opened.graph is not None:
            path = os.path.join(folder, "model.mc")
            opened.module.save(path)
        for record in records:
            record["measured_bytes"] = measure(path, opened.module.threads, record["dims"])


def _show_sizes(out: Output, opened: Opened, records: Sequence[Mapping[str, Any]]) -> None:
    from minicompiler.report import count_text

    work, memory = [], []
    for r in records:
        at = ", ".join(f"{n}={v}" for n, v in r["dims"].items()) or "fixed"
        if "flops" in r:
            work.append([
                at, count_text(r["flops"], "FLOP"), count_text(r["bytes_moved"], "B"),
                f"{r['intensity']:.1f}",
            ])  # fmt: skip
        parts = [count_text(r["memory_bytes"][p], "B") for p in _PARTS]
        row = [at, *parts, count_text(r["peak_bytes"], "B")]
        if "measured_bytes" in r:
            ratio = 100 * (r["peak_bytes"] / r["measured_bytes"] - 1)
            row += [count_text(r["measured_bytes"], "B"), f"{ratio:+.1f}%"]
        memory.append(row)
    out.table("Work of one call", ["dims", ">operations", ">moved", ">FLOP/B"], work)
    columns = ["dims", *(f">{p}" for p in _PARTS), ">peak"]
    if any("measured_bytes" in r for r in records):
        columns += [">measured", ">off by"]
    out.table("Memory of one call", columns, memory)


def _kernels(opened: Opened, sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Work of each kernel in all its calls, the largest first."""
    from minicompiler.runtime.plan import evaluate

    names = opened.sizes(sizes)
    calls: dict[str, int] = {}
    for call in opened.module.plan.calls:
        calls[call.kernel] = calls.get(call.kernel, 0) + 1
    found = [
        {
            "kernel": name,
            "calls": n,
            "flops": n * evaluate(opened.kernels[name].flops, names),
            "bytes_moved": n * evaluate(opened.kernels[name].moved, names),
            "from": [str(loc) for v in opened.fused[name] for loc in v.locs],
        }
        for name, n in calls.items()
    ]
    return sorted(found, key=lambda k: -int(k["flops"]))


def _show_kernels(out: Output, record: Mapping[str, Any]) -> None:
    from minicompiler.report import count_text, first_of, short_name

    rows = []
    for k in record["kernels"]:
        intensity = k["flops"] / k["bytes_moved"] if k["bytes_moved"] else 0.0
        rows.append([
            short_name(k["kernel"]), k["calls"], count_text(k["flops"], "FLOP"),
            count_text(k["bytes_moved"], "B"), f"{intensity:.1f}", first_of(k["from"]),
        ])  # fmt: skip
    at = ", ".join(f"{n}={v}" for n, v in record["dims"].items())
    columns = ["kernel", ">calls", ">operations", ">moved", ">FLOP/B", "from"]
    out.table(f"Kernels{f' at {at}' if at else ''}", columns, rows)
