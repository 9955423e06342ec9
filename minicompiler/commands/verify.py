"""`minicompiler verify model`: every value against a reference, and which step is to blame."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minicompiler.commands import options
from minicompiler.errors import MinicompilerError

if TYPE_CHECKING:
    import numpy as np

    from minicompiler.inputs import Bounds
    from minicompiler.ir.graph import Function
    from minicompiler.lens.verify import Report
    from minicompiler.report import Output


@click.command("verify")
@options.model
@options.feeding
@click.option("--against", type=click.Choice(["interpreter", "onnxruntime"]), show_default=True,
              default="interpreter", help="The operators in numpy, or onnxruntime.")  # fmt: skip
@click.option("--reproducer", metavar="FOLDER", default="reproducer", show_default=True,
              help="Where to write what shows a fault alone.")  # fmt: skip
@options.dims
@options.threads
@options.compiling
@options.as_json
def command(
    model: str,
    pairs: Sequence[str],
    archive: str | None,
    against: str,
    reproducer: str,
    dims: Sequence[str],
    threads: int | None,
    target: str,
    level: int,
    as_json: bool,
) -> None:
    """Compare every value with a reference, and find what is wrong.

    Every value between kernels is compared. One beyond its bound is "rounding" if it lies about as
    near to a float64 evaluation as the reference does, else "wrong": then bisection over the graph
    passes, or over the steps of one kernel, names the guilty one, and a reproducer is written.
    Inputs that are not given are random. Exits with 1 when a value is wrong.
    """
    from minicompiler import driver
    from minicompiler.context import Context, Options
    from minicompiler.inputs import parse_dims, read_inputs, single, suffix_of
    from minicompiler.lens.peer import onnxruntime_values
    from minicompiler.lens.reproduce import write
    from minicompiler.lens.verify import verify
    from minicompiler.report import Output
    from minicompiler.target import Target

    if suffix_of(model) == ".mc":
        raise MinicompilerError(
            f"{model} is compiled: the steps that made it cannot be looked at",
            hint="verify the model that it was compiled from",
        )
    out = Output(as_json)
    wanted, given = single(parse_dims(dims)), read_inputs(pairs, archive)
    graph = driver.import_model(model, wanted)
    feeds = _inputs(out, graph, wanted, given)
    ctx = Context(Target.parse(target), Options(level=level, threads=threads or 0))
    with out.busy(f"verifying {Path(model).name}"):
        reference = onnxruntime_values(model, feeds) if against == "onnxruntime" else None
        report = verify(graph, feeds, ctx, reference)
    _show(out, report, against)
    script = ""
    if report.culprit is not None:
        script = str(write(Path(reproducer), report, ctx))
        out.say(f"guilty: {report.culprit}")
        out.say(f"reproducer: python {script}")
    out.finish(_record(report, against, script))
    options.fail_unless(report.right, "the compiled model is wrong")


def _inputs(
    out: Output,
    graph: Function,
    wanted: Mapping[str, Bounds],
    given: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """All inputs of a graph: the given ones, and random ones; says which."""
    import numpy as np

    from minicompiler.inputs import SEED, random_array
    from minicompiler.ir.arith import sizes
    from minicompiler.ir.expr import Dim
    from minicompiler.ir.graph import function_dims

    names = [p.name for p in graph.params]
    unknown = [n for n in given if n not in names]
    if unknown:
        raise MinicompilerError(
            f"the model has no input {', '.join(unknown)}", hint=f"it has: {', '.join(names)}"
        )
    env = {d.name: -(-d.lo // d.multiple_of) * d.multiple_of for d in function_dims(graph)}
    env |= {n: b for n, b in wanted.items() if n in env and isinstance(b, int)}
    for p in graph.params:
        if p.name in given:
            pairs = zip(p.type.shape, given[p.name].shape, strict=False)
            env |= {s.name: n for s, n in pairs if isinstance(s, Dim)}
    missing = [n for n in names if n not in given]
    if missing:
        at = ", ".join(f"{n}={v}" for n, v in env.items())
        at = f" (with {at})" if at else ""
        out.remark(
            f"random values for {', '.join(missing)}{at}: floats in [-1, 1), integers 0 and 1"
        )
    rng = np.random.default_rng(SEED)
    found = dict(given)
    for p in graph.params:
        if p.name not in given:
            found[p.name] = random_array(rng, p.type.dtype.numpy, sizes(p.type.shape, env))
    return found


def _show(out: Output, report: Report, against: str) -> None:
    rows = []
    for r in report.rows:
        d = r.deviation
        numbers = [f"{x:.2e}" for x in (d.absolute, d.relative, d.ulp)]
        rows.append([r.value, r.kernel or "(output)", *numbers, f"{d.bound:.3f}", d.verdict])
    columns = ["value", "kernel", ">max error", ">relative", ">ulp", ">of bound", "verdict"]
    out.table(f"Values, against {against}", columns, rows)
    first = report.first
    if first is None:
        out.say("all values are within their bounds" if report.rows else "nothing was run")
    else:
        nodes = f" from {first.nodes}" if first.nodes else ""
        out.say(f'first value beyond its bound: "{first.value}"{nodes}: {first.deviation.verdict}')


def _record(report: Report, against: str, script: str) -> dict[str, Any]:
    """The report for machines; what is infinite is null."""

    def finite(x: Any) -> Any:
        return None if x == float("inf") else x

    rows = []
    for r in report.rows:
        deviation = {k: finite(v) for k, v in dataclasses.asdict(r.deviation).items()}
        rows.append({"value": r.value, "nodes": r.nodes, "kernel": r.kernel, **deviation})
    culprit = None if report.culprit is None else dataclasses.asdict(report.culprit)
    first = None if report.first is None else report.first.value
    return {
        "against": against, "right": report.right, "values": rows, "first": first,
        "culprit": culprit, "reproducer": script or None,
    }  # fmt: skip
