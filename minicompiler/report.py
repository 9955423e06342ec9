"""Models opened for the command line, and the tables that it prints.

    opened = open_model("resnet18.onnx", threads=2)      .mc is loaded, anything else compiled
    opened.flops({})                                     3.6e9, None for a loaded module
    Output(as_json=False).table("kernels", ["name", "ms"], [["fused_conv", "1.25"]])

Results go to standard output, remarks to standard error; with --json the output is one object.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minicompiler import config
from minicompiler.bench import Times, ratios
from minicompiler.errors import MinicompilerError
from minicompiler.footprint import named_sizes
from minicompiler.inputs import Bounds, suffix_of
from minicompiler.limits import Limits
from minicompiler.runtime.module import Module, load
from minicompiler.runtime.plan import evaluate
from minicompiler.runtime.profile import KernelTime

if TYPE_CHECKING:
    from minicompiler.ir.graph import Apply, Function
    from minicompiler.kernel import Kernel
    from minicompiler.kernel_facts import Nest

TIMING_COLUMNS = (
    "runtime", ">mean ms", ">median", ">p90", ">p99", ">calls/s", ">GFLOP/s", ">ratio",
    ">difference",
)  # fmt: skip
_WIDTH = 160  # of tables that are not shown on a terminal


# ---- models --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Opened:
    """A model ready to run. graph: as imported; kernels: with their costs; fused: the nodes that
    each kernel runs, by its name. All three are absent for .mc."""

    path: str
    module: Module
    seconds: float
    graph: Function | None = None
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    fused: Mapping[str, Sequence[Apply]] = field(default_factory=dict)

    def flops(self, dims: Mapping[str, int]) -> int | None:
        """Floating-point operations of one call."""
        if not self.kernels:
            return None
        names = self.sizes(dims)
        return sum(evaluate(self.kernels[c.kernel].flops, names) for c in self.module.plan.calls)

    def moved(self, dims: Mapping[str, int]) -> int | None:
        """Bytes that the kernels of one call read and write."""
        if not self.kernels:
            return None
        names = self.sizes(dims)
        return sum(evaluate(self.kernels[c.kernel].moved, names) for c in self.module.plan.calls)

    def sizes(self, dims: Mapping[str, int]) -> dict[str, int]:
        """Every size that has a name."""
        return named_sizes(self.module.plan, dims)

    def nest(self, kernel: str) -> Nest:
        """The loops of a kernel, made again."""
        from minicompiler.ir.graph import Constant, Function
        from minicompiler.kernel_facts import read_nest

        node = self.fused[kernel][0]
        assert isinstance(node.op, Function)
        constant = tuple(isinstance(a, Constant) for a in node.args)
        return read_nest(node.op, constant, self.module.target)


def open_model(
    path: str,
    dims: Mapping[str, Bounds] | None = None,
    threads: int | None = None,
    target: str = "cpu",
    level: int = 3,
    limits: Limits | None = None,
    checked: bool = False,
) -> Opened:
    """Loads a saved module or compiles a model. Raises MinicompilerError."""
    start = time.perf_counter()
    if suffix_of(path) == ".mc":
        if any(not isinstance(b, int) for b in (dims or {}).values()):
            raise MinicompilerError(
                f"{path} is compiled, so the ranges of its dimensions are fixed",
                hint="give single sizes (name=8), or compile the model again",
            )
        module = load(path, threads)
        return Opened(path, module, time.perf_counter() - start)
    return compiled(path, path, threads, target, level, start, dims, limits, checked)


def compiled(
    path: str,
    source: str | Function,
    threads: int | None,
    target: str,
    level: int,
    start: float,
    dims: Mapping[str, Bounds] | None = None,
    limits: Limits | None = None,
    checked: bool = False,
) -> Opened:
    """A model or a graph, compiled; `start` is when the work on it began."""
    # Imported here so that a saved module runs without the compiler.
    from minicompiler import driver
    from minicompiler.context import Context, Options
    from minicompiler.target import Target

    # Texts of stages are not shown here, and writing them takes time.
    options = Options(
        level=level,
        threads=threads or 0,
        checked=checked or config.checked(),
        record=False,
        limits=limits or Limits(),
    )
    ctx = Context(Target.parse(target), options)
    graph = driver.import_model(source, dims, ctx)
    fn = driver.optimise(graph, ctx)
    built = driver.build_kernels(fn, ctx)
    module = driver.assemble(fn, built, ctx)
    fused: dict[str, list[Apply]] = {}
    for v, call in built.pairs:
        fused.setdefault(call.kernel, []).append(v)
    return Opened(path, module, time.perf_counter() - start, graph, built.kernels, fused)


def parameters_of(graph: Function) -> tuple[dict[str, int], int, int]:
    """Operators with their number of nodes, the number of parameters, and their bytes."""
    from minicompiler.ir.graph import Apply, Constant, topological

    operators: dict[str, int] = {}
    count = size = 0
    for v in topological(graph.results):
        if isinstance(v, Apply):
            operators[v.op.name] = operators.get(v.op.name, 0) + 1
        elif isinstance(v, Constant):
            count += v.data.size
            size += v.data.nbytes
    return dict(sorted(operators.items(), key=lambda item: -item[1])), count, size


# ---- output --------------------------------------------------------------------------------------
class Output:
    """Where results and remarks of a command go."""

    def __init__(self, as_json: bool) -> None:
        # Imported here so that --help does not wait for it.
        from rich.console import Console

        self.as_json = as_json
        terminal = sys.stdout.isatty()
        # Without a terminal a line must not break in the middle of a table's row.
        self._out = Console(width=None if terminal else _WIDTH, highlight=False)
        self._err = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, text: str = "") -> None:
        """A line of the result; not with --json."""
        if not self.as_json:
            self._out.print(text, markup=False, soft_wrap=True)

    def marked(self, mark: str, text: str) -> None:
        """A line of a difference: "+" added, "-" removed, "#" a heading; coloured on a terminal."""
        style = {"+": "green", "-": "red", "#": "bold"}.get(mark)
        if not self.as_json:
            self._out.print(f"{mark} {text}", markup=False, soft_wrap=True, style=style)

    def remark(self, text: str) -> None:
        """What the user should know about the result, on standard error."""
        self._err.print(text, style="yellow", markup=False)

    def busy(self, text: str) -> AbstractContextManager[Any]:
        """Shows that something takes time, and how long it has taken, on a terminal only."""
        if not self._err.is_terminal:
            return nullcontext()
        from rich.markup import escape
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        progress = Progress(*columns, console=self._err, transient=True)
        progress.add_task(escape(text))
        return progress

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; columns whose name starts with ">" are aligned to the right, and those without
        any entry are left out."""
        if self.as_json or not rows:
            return
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        made = Table(
            title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, title_style="bold"
        )
        used = [k for k in range(len(columns)) if any(str(row[k]) for row in rows)]
        for c in (columns[k] for k in used):
            made.add_column(c.removeprefix(">"), justify="right" if c.startswith(">") else "left")
        for row in rows:
            made.add_row(*(escape(str(row[k])) for k in used))
        self._out.print(made)

    def finish(self, data: Mapping[str, Any]) -> None:
        """The result as a machine reads it, with --json."""
        if self.as_json:
            sys.stdout.write(json.dumps(data, indent=2) + "\n")


# ---- the interface of a model -------------------------------------------------------------------
def interface(opened: Opened) -> dict[str, Any]:
    """Inputs, outputs and dimensions for machines."""
    plan = opened.module.plan
    return {
        "inputs": [str(t) for t in plan.inputs],
        "outputs": [str(t) for t in plan.outputs],
        "dims": {d.name: [d.lo, d.hi, d.multiple_of] for d in plan.dims},
    }


def say_interface(out: Output, opened: Opened) -> None:
    """The same for people, one line each."""
    plan = opened.module.plan
    for kind, tensors in (("input", plan.inputs), ("output", plan.outputs)):
        for t in tensors:
            out.say(f"{kind:7} {t}")
    for d in plan.dims:
        top = ", without a limit" if d.hi is None else f" to {d.hi}"
        step = f", multiples of {d.multiple_of}" if d.multiple_of > 1 else ""
        out.say(f"dim     {d.name}: from {d.lo}{top}{step}")


# ---- tables of numbers ---------------------------------------------------------------------------
def kernel_rows(opened: Opened, times: Sequence[KernelTime]) -> list[dict[str, Any]]:
    """Per kernel, the slowest first: name, calls, seconds of all calls, GFLOP/s, bytes moved."""
    found: dict[str, dict[str, Any]] = {}
    for t in times:
        row = found.setdefault(t.kernel, {"kernel": t.kernel, "calls": 0, "seconds": 0.0})
        row["calls"] += t.times
        row["seconds"] += t.seconds
        kernel = opened.kernels.get(t.kernel)
        if kernel is not None:
            row["flops"] = row.get("flops", 0) + t.times * evaluate(kernel.flops, t.dims)
            row["bytes"] = row.get("bytes", 0) + t.times * evaluate(kernel.moved, t.dims)
    return sorted(found.values(), key=lambda row: -float(row["seconds"]))


def show_kernels(out: Output, rows: Sequence[Mapping[str, Any]]) -> None:
    """The table of `kernel_rows`."""
    total = sum(row["seconds"] for row in rows) or 1.0
    cells = []
    for row in rows:
        seconds = row["seconds"]
        rates = [
            f"{row[k] / seconds / 1e9:.1f}" if row.get(k) and seconds else ""
            for k in ("flops", "bytes")
        ]
        share = f"{100 * seconds / total:.1f}"
        cells.append([row["kernel"], row["calls"], f"{seconds * 1e3:.3f}", share, *rates])
    out.table("Kernels", ["kernel", ">calls", ">ms", ">%", ">GFLOP/s", ">GB/s"], cells)


def show_stages(out: Output, module: Module) -> None:
    """What the compiler did, in order; steps that ran for each kernel are one row."""
    sums: dict[tuple[str, str], list[float]] = {}
    for s in module.stages:
        sums.setdefault((s.level, s.name), []).append(s.seconds)
    rows = [[level, name, len(t), f"{sum(t) * 1e3:.1f}"] for (level, name), t in sums.items()]
    out.table("Stages", ["level", "step", ">times", ">ms"], rows)


def short_name(kernel: str) -> str:
    """A kernel's name without the hash that tells kernels of different models apart."""
    return kernel.rpartition("_")[0] or kernel


def first_of(nodes: Sequence[str]) -> str:
    """The first source node, without its file, and how many more there are."""
    first = nodes[0].partition(" (")[0] if nodes else ""
    return f"{first} +{len(nodes) - 1}" if len(nodes) > 1 else first


def count_text(n: float, unit: str) -> str:
    """3600000000, "FLOP" -> "3.6 GFLOP"."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= factor:
            return f"{n / factor:.4g} {prefix}{unit}"
    return f"{n:.4g} {unit}"


def timing_rows(
    times: Mapping[str, Times], flops: int | None, apart: Mapping[str, float]
) -> list[list[str]]:
    """A row of TIMING_COLUMNS per runtime; apart: how far its results are from ours. GFLOP/s are
    those of all callers together."""
    rows = []
    for name, t in times.items():
        s = t.summary()
        row = [name, *(f"{s[k] * 1e3:.4g}" for k in ("mean", "median", "p90", "p99"))]
        row += [f"{s['calls_per_second']:.4g}", _rate(t, flops)]
        if name in apart:
            middle, low, high = ratios(times["minicompiler"], t)
            row += [f"{middle:.2f} ({low:.2f}-{high:.2f})", f"{apart[name]:.1e}"]
        else:
            row += ["", ""]
        rows.append(row)
    return rows


def _rate(times: Times, flops: int | None) -> str:
    return f"{flops / statistics.median(times.paces()) / 1e9:.1f}" if flops else ""


def timing_records(
    times: Mapping[str, Times], apart: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """The same for machines: seconds, and the ratio to minicompiler with its quartiles."""
    found: dict[str, dict[str, Any]] = {}
    for name, t in times.items():
        found[name] = {f"{k}_seconds" if k in ("mean", "median", "p90", "p99", "best") else k: v
                       for k, v in t.summary().items()}  # fmt: skip
        if name in apart:
            middle, low, high = ratios(times["minicompiler"], t)
            found[name] |= {
                "ratio": middle,
                "ratio_quartiles": [low, high],
                "difference": apart[name],
            }
    return found
