"""The record of a compilation as a text to read: what each stage did, and what it changed.

stages = compile_stages(graph, ctx, kernel="fused_conv_relu")
for line in explain(stages, kernel="fused_conv_relu"): print(line.mark, line.text)

A mark is "+" or "-" where a line differs from the previous stage, "#" for a heading, else " ". Only
the record is read, so a Module tells the same from its `stages` (kernels that came from the disk
cache have none).
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence

from minicompiler import driver
from minicompiler.artifacts import fusion_lines, schedule_lines
from minicompiler.codegen.native import compile_assembly
from minicompiler.context import Context, Stage
from minicompiler.errors import MinicompilerError
from minicompiler.ir.graph import Constant, Function, applies
from minicompiler.kernel import write_kernel

STAGES = ("graph", "fuse", "tir", "schedule", "llvm", "asm")
_CONTEXT = 2  # unchanged lines around a change


@dataclasses.dataclass(frozen=True)
class Line:
    """One line, and whether it was added ("+"), removed ("-") or is a heading ("#")."""

    mark: str
    text: str


# ---- making the record --------------------------------------------------------------------------
def compile_stages(
    graph: Function, ctx: Context, kernel: str | None = None, stage: str | None = None
) -> list[Stage]:
    """The stages of a graph as far as they are asked for: nothing is run or taken from the cache.

    Raises MinicompilerError when no kernel has that name.
    """
    driver.import_model(graph, ctx=ctx)
    fn = driver.optimise(graph, ctx)
    if stage in ("graph", "fuse") and kernel is None:
        return ctx.stages
    calls = {v.op.name: v for v in reversed(list(applies(fn))) if isinstance(v.op, Function)}
    if kernel is not None and kernel not in calls:
        raise MinicompilerError(
            f'the model has no kernel "{kernel}"', hint=f"its kernels: {', '.join(reversed(calls))}"
        )
    for name, call in reversed(calls.items()):
        if kernel in (None, name):
            assert isinstance(call.op, Function)
            constant = tuple(isinstance(a, Constant) for a in call.args)
            _, text = write_kernel(call.op, constant, ctx)
            if stage == "asm":
                assert ctx.target is not None
                ctx.stages.append(Stage(name, "code", "asm", compile_assembly(text, ctx.target), 0))
    return ctx.stages


# ---- reading it ---------------------------------------------------------------------------------
def explain(
    stages: Sequence[Stage], kernel: str | None = None, stage: str | None = None
) -> list[Line]:
    """What the stages did. kernel: of one kernel only; stage: one of STAGES only.

    Without `stage`: graph passes, fusion, and per kernel its source nodes, loop nests and schedule;
    with neither, loop nests are left out.
    """
    lines: list[Line] = []
    if kernel is None and stage in (None, "graph"):
        lines += _graph(stages)
    if stage in (None, "fuse"):
        lines += _fusion(stages, kernel)
    for name in kernel_names(stages):
        if kernel in (None, name) and stage not in ("graph", "fuse"):
            lines += _kernel(stages, name, kernel is not None, stage)
    return lines


def kernel_names(stages: Sequence[Stage]) -> list[str]:
    """The kernels with stages to look at, in order."""
    return list(dict.fromkeys(s.subject for s in stages if s.name == "to_tir"))


def of_kernel(stages: Sequence[Stage], name: str) -> list[Stage]:
    """The stages of one kernel and of what prepares its constants."""
    pattern = re.compile(rf"{re.escape(name)}(_prepare_\d+)?")
    return [s for s in stages if pattern.fullmatch(s.subject)]


def changes(before: str, after: str) -> list[Line]:
    """The lines of `after` and those of `before` that it lacks, around the differences; "..."
    stands for what is left out."""
    a, b = before.splitlines(), after.splitlines()
    matcher = difflib.SequenceMatcher(None, _unnumbered(a), _unnumbered(b), autojunk=False)
    lines: list[Line] = []
    end = 0
    for group in matcher.get_grouped_opcodes(_CONTEXT):
        if group[0][3] > end:
            lines.append(Line(" ", "..."))
        for tag, a0, a1, b0, b1 in group:
            if tag == "equal":
                lines += [Line(" ", t) for t in b[b0:b1]]
            else:
                lines += [Line("-", t) for t in a[a0:a1]] + [Line("+", t) for t in b[b0:b1]]
        end = group[-1][4]
    return lines if end == len(b) else [*lines, Line(" ", "...")]


def _unnumbered(lines: Sequence[str]) -> list[str]:
    """Lines of a graph with values called after their last source node, not numbered: a node that
    goes away renumbers what follows it, which is no change."""
    names: dict[str, str] = {}
    for line in lines:
        defined = re.match(r"\s*(%\d+) = .*\"(.*)\"$", line)
        if defined:
            names[defined[1]] = f'%"{defined[2]}"'
    return [re.sub(r"%\d+\b", lambda m: names.get(m[0], m[0]), line) for line in lines]


def _graph(stages: Sequence[Stage]) -> list[Line]:
    """The graph as imported, and what each pass before fusion changed."""
    lines: list[Line] = []
    before = ""
    unchanged: list[str] = []
    for s in stages:
        if s.level != "graph" or s.name == "fuse":
            continue
        if not s.text:
            unchanged.append(s.name)
            continue
        lines += _nothing(unchanged)
        lines.append(_heading(s))
        if before:
            lines += changes(before, s.text)
        else:
            lines += [Line(" ", t) for t in s.text.splitlines()]
        before = s.text
    return lines + _nothing(unchanged)


def _nothing(names: list[str]) -> list[Line]:
    """A line for the passes that left the graph as it was; empties the list."""
    text = ", ".join(names)
    names.clear()
    return [Line("#", f"{text}: nothing to change")] if text else []


def _fusion(stages: Sequence[Stage], kernel: str | None) -> list[Line]:
    """Kernels and their nodes; refused fusions, of one kernel those that concern its nodes."""
    lines: list[Line] = []
    for s in stages:
        if s.name != "fuse" or s.level != "graph":
            continue
        details = dict(s.details)
        if kernel is not None:
            calls = details["kernels"].get(kernel, [])
            names = {name for call in calls for name in re.findall('"[^"]*"', call)}
            details["kernels"] = {kernel: calls}
            details["refused"] = [
                r for r in details["refused"]
                if names & set(re.findall('"[^"]*"', r.partition(": ")[0]))
            ]  # fmt: skip
        lines.append(_heading(s))
        lines += [Line(" ", t) for t in fusion_lines(details)]
    return lines


def _kernel(stages: Sequence[Stage], name: str, alone: bool, wanted: str | None) -> list[Line]:
    """The stages of one kernel. alone: it is the one that was asked for, so all are shown."""
    own = of_kernel(stages, name)
    lines: list[Line] = []
    before: dict[str, str] = {}
    for s in own:
        if s.level == "tir":
            kind = {"to_tir": "tir", "schedule": "schedule"}.get(s.name, "tir")
            if wanted == kind or (wanted is None and (alone or s.name == "schedule")):
                lines.append(_heading(s))
                lines += _nest(s, before.get(s.subject), alone or wanted is not None)
            before[s.subject] = s.text or before.get(s.subject, "")
        elif s.name == wanted:
            lines.append(_heading(s))
            lines += [Line(" ", t) for t in s.text.splitlines()]
    return lines


def _nest(s: Stage, before: str | None, whole: bool) -> Iterator[Line]:
    """A loop nest: where it comes from, how it was scheduled, then the text or its changes."""
    for node in s.details.get("nodes", ()):
        yield Line(" ", f"from {node}")
    for step in schedule_lines(s.details):
        yield Line(" ", step)
    if not whole:
        return
    if s.name == "schedule" or before is None:
        # A schedule moves nearly every line, so marks would say nothing.
        yield from (Line(" ", t) for t in s.text.splitlines())
    elif s.text:
        yield from changes(before, s.text)
    else:
        yield Line(" ", "(nothing to change)")


def _heading(s: Stage) -> Line:
    return Line("#", f"{s.subject}: {s.name}")
