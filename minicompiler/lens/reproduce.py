"""A folder that shows one miscompilation alone: a short script, and the artifact that goes wrong.

    write(Path("repro"), report, ctx)       repro/reproduce.py, case.json, case.npz
    python repro/reproduce.py               says what differs; exit code 1 while it does, else 0

For a graph pass, a schedule step or a TIR pass, the case is what the step was given. For any other
fault it is a graph (of the guilty kernel, where that alone shows the fault) to compile and verify.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minicompiler import ops, pipeline
from minicompiler.context import Context, Options
from minicompiler.driver import optimise_bodies
from minicompiler.errors import InternalError, MinicompilerError
from minicompiler.ir.graph import Apply, Constant, Function, Input, Item, Value, topological
from minicompiler.ir.serial import from_json, to_json
from minicompiler.ir.tir import PrimFunc
from minicompiler.lower.lift_constants import lift_constants
from minicompiler.ops.control import cond, loop
from minicompiler.runtime.plan import numpy_dtype
from minicompiler.schedules.schedule import replay
from minicompiler.target import Target

from .bisect import KernelCase, blame_pass, named_values
from .compare import WRONG, deviation
from .kernel import joined, run, shared_places
from .verify import Report, verify

assert ops  # importing it fills the table that operators are found in
Array = np.ndarray

_SCRIPT = '''"""{title}

Run it: exit code 1 while the fault is there. case.json holds {what},
case.npz the numbers.
"""

import sys

from minicompiler.lens.reproduce import load

case = load(__file__)
found = case.{method}()
print(found or "nothing differs")
sys.exit(1 if found else 0)
'''
_WHAT = {
    "check_pass": "the graph that the pass is given",
    "check_step": "the loop nest that the schedule step is given, and the step",
    "check_tir_pass": "the loop nest that the pass is given",
    "check_model": "the graph to compile",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What a reproducer starts from; each check returns what is wrong, or "".

    artifact: a graph Function or a PrimFunc. inputs: in the order of its parameters. length: of the
    sums that lead to a result.
    """

    name: str
    artifact: Any
    inputs: Sequence[Array]
    dims: Mapping[str, int]
    target: Target
    options: Options
    length: int
    step: Mapping[str, Any] | None = None

    @property
    def ctx(self) -> Context:
        return Context(self.target, self.options)

    @property
    def feeds(self) -> dict[str, Array]:
        """The inputs of a graph by name."""
        return {p.name: a for p, a in zip(self.artifact.params, self.inputs, strict=True)}

    def check_pass(self) -> str:
        """Runs a graph pass and compares the graphs before and after it."""
        every = (*pipeline.GRAPH_PASSES[self.options.level], optimise_bodies)
        passes = {p.__name__: p for p in every}
        if self.name not in passes:
            raise MinicompilerError(f'the pass "{self.name}" is not one of minicompiler itself')
        step = passes[self.name]
        after = pipeline.run([step], self.artifact, self.ctx)
        graphs = [self.artifact, after]
        blamed = blame_pass([self.name], graphs, self.feeds, self.length)
        return "" if blamed is None else str(blamed[0])

    def check_step(self) -> str:
        """Applies a schedule step and compares the loop nests before and after it."""
        assert self.step is not None
        return self._compare(replay(self.artifact, [self.step], self.target).func)

    def check_tir_pass(self) -> str:
        """Runs a TIR pass and compares the loop nests before and after it."""
        before = self.artifact
        if self.name == lift_constants.__name__:
            return self._compare(joined(before, *lift_constants(before)))
        step = next(p for p in pipeline.TIR_PASSES if p.__name__ == self.name)
        return self._compare(step(before, self.ctx))

    def check_model(self) -> str:
        """Compiles a graph and verifies it."""
        report = verify(self.artifact, self.feeds, self.ctx)
        return "" if report.right else str(report.culprit)

    def _compare(self, after: PrimFunc) -> str:
        if shared_places(after, self.dims):
            return f"the layout of {shared_places(after, self.dims)[0]} is not one-to-one"
        want = run(self.artifact, self.inputs, self.dims, self.target)
        try:
            got = run(after, self.inputs, self.dims, self.target)
        except InternalError as e:  # an access outside of a buffer, in the interpreter
            return e.message
        for k, (a, b) in enumerate(zip(got, want, strict=True)):
            apart = deviation(a, b, length=self.length)
            if apart.verdict == WRONG:
                return f"result {k} differs by up to {apart.absolute:.3g} after {self.name}"
        return ""


# ---- from a report ------------------------------------------------------------------------------
def write(folder: Path, report: Report, ctx: Context) -> Path:
    """Writes the reproducer of a report with a culprit; the path of its script.

    Raises MinicompilerError where the folder cannot be written.
    """
    case, method = _case_of(report, ctx)
    assert report.culprit is not None
    text = _SCRIPT.format(
        title=str(report.culprit).replace("\\", "/"), what=_WHAT[method], method=method
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _save(folder, case)
        path = folder / "reproduce.py"
        path.write_text(text)
    except OSError as e:
        raise MinicompilerError(f"the reproducer {folder} cannot be written: {e}") from None
    return path


def _case_of(report: Report, ctx: Context) -> tuple[Case, str]:
    """The smallest case that shows the fault, and the check to make."""
    culprit, failure = report.culprit, report.failure
    assert culprit is not None and failure is not None and ctx.target is not None

    def case(artifact: Any, inputs: Sequence[Array], dims: Mapping[str, int], length: int) -> Case:
        assert ctx.target is not None
        return Case(culprit.name, artifact, inputs, dims, ctx.target, ctx.options, length)

    kernel, state = failure.kernel, failure.state
    if kernel is not None and state is not None and culprit.kind in ("schedule step", "tir pass"):
        made = case(state.func, kernel.inputs, kernel.dims, kernel.length)
        if culprit.kind == "tir pass":
            return made, "check_tir_pass"
        assert failure.step is not None
        return dataclasses.replace(made, step=dataclasses.asdict(failure.step)), "check_step"
    if kernel is not None:
        fn, inputs = _alone(kernel)
        made = case(fn, inputs, {}, kernel.length)
        if made.check_model():
            return made, "check_model"
    graph = failure.graph
    assert graph is not None
    inputs = [np.asarray(failure.feeds[p.name]) for p in graph.params]
    made = case(graph, inputs, {}, failure.length)
    if culprit.kind != "graph pass":
        return made, "check_model"
    for v in named_values(graph):
        if culprit.where == f'value "{v.name}"':
            smaller = _ending_at(made, v)
            if smaller.check_pass():
                return smaller, "check_pass"
    return made, "check_pass"


def _ending_at(case: Case, v: Value) -> Case:
    """The part of a graph that computes one value."""
    needed = {id(x) for x in topological([v])}
    pairs = [(p, a) for p, a in zip(case.artifact.params, case.inputs, strict=True)
             if id(p) in needed]  # fmt: skip
    fn = Function(case.artifact.name, tuple(p for p, _ in pairs), (v,))
    return dataclasses.replace(case, artifact=fn, inputs=[a for _, a in pairs])


def _alone(kernel: KernelCase) -> tuple[Function, list[Array]]:
    """The operators of a kernel as a model of their own, with its constants; and its inputs."""
    new: dict[int, Value] = {}
    params, inputs = [], []
    for p, constant, array in zip(kernel.fn.params, kernel.constant, kernel.inputs, strict=True):
        if constant:
            new[id(p)] = Constant(array, p.name)
        else:
            new[id(p)] = made = Input(p.name, p.type)
            params.append(made)
            inputs.append(array)
    for v in topological(kernel.fn.results):
        if isinstance(v, Apply):
            args = tuple(None if a is None else new[id(a)] for a in v.args)
            new[id(v)] = v.with_(args=args, layouts=(None,) * len(v.layouts))
        elif isinstance(v, Item):
            source = new[id(v.tuple)]
            assert isinstance(source, Apply)
            new[id(v)] = Item(source, v.index)
        else:
            new.setdefault(id(v), v)
    results = tuple(new[id(r)] for r in kernel.fn.results)
    return Function(kernel.fn.name, tuple(params), results), inputs


# ---- files --------------------------------------------------------------------------------------
def _save(folder: Path, case: Case) -> None:
    constants: list[Array] = []
    artifact = to_json(case.artifact, constants)
    arrays = {f"constant_{k}": a for k, a in enumerate(constants)}
    arrays |= {f"input_{k}": a for k, a in enumerate(case.inputs)}
    options = {
        f.name: getattr(case.options, f.name)
        for f in dataclasses.fields(Options)
        if isinstance(getattr(case.options, f.name), int | float)
    }
    data = {
        "name": case.name, "artifact": artifact, "dims": dict(case.dims), "length": case.length,
        "target": case.target.to_json(), "options": options, "step": case.step,
        "dtypes": {name: a.dtype.name for name, a in arrays.items()},
    }  # fmt: skip
    (folder / "case.json").write_text(json.dumps(data))
    # bfloat16 is not a number type of numpy itself.
    plain = {n: a if a.dtype.isbuiltin == 1 else a.view(f"u{a.dtype.itemsize}")
             for n, a in arrays.items()}  # fmt: skip
    np.savez(folder / "case.npz", **plain)  # type: ignore[arg-type]


def load(script: str) -> Case:
    """The case beside a reproducer's script."""
    folder = Path(script).resolve().parent
    data = json.loads((folder / "case.json").read_text())
    with np.load(folder / "case.npz") as archive:
        arrays = {n: archive[n].view(numpy_dtype(data["dtypes"][n])) for n in archive.files}

    def numbered(stem: str) -> list[Array]:
        return [arrays[f"{stem}_{k}"] for k in range(sum(n.startswith(stem) for n in arrays))]

    return Case(
        data["name"],
        from_json(data["artifact"], numbered("constant"), (cond, loop)),
        numbered("input"),
        data["dims"],
        Target.from_json(data["target"]),
        Options(**data["options"]),
        data["length"],
        data["step"],
    )
