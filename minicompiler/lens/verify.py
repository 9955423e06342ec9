"""A compiled model against a reference, value by value; and which step of the compiler is wrong.

report = verify(graph, {"x": x}, Context(target))
for row in report.rows: print(row.value, row.deviation.relative, row.deviation.verdict)
print(report.culprit)        graph pass `fold_batch_norm` (value "relu_1"): it differs by ...

The model is compiled as ever (but not from the cache) and run call by call, so the values are those
between kernels. Reference: the operators in numpy, or values that another runtime gave.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from minicompiler import driver, pipeline
from minicompiler.context import Context
from minicompiler.errors import MinicompilerError
from minicompiler.ir.arith import evaluate_int
from minicompiler.ir.expr import product
from minicompiler.ir.graph import (
    Apply,
    Constant,
    Function,
    Item,
    Value,
    applies,
    nested_functions,
)
from minicompiler.ir.tir import SCAN, Block, For, PrimFunc, script, statements
from minicompiler.lower import memory
from minicompiler.lower.guards import run_time_guards
from minicompiler.lower.memory import KernelCall, Region, after_counts, kernel_calls
from minicompiler.lower.to_tir import lower_function
from minicompiler.ops.control import LoopAttrs, loop
from minicompiler.runtime.module import Module
from minicompiler.schedules.schedule import Step

from .bisect import Culprit, KernelCase, blame_kernel, blame_pass, named_values, value_name
from .compare import ROUNDING, WRONG, Deviation, deviation
from .evaluate import Exact, Values
from .kernel import State
from .memory import poisoned
from .observe import Observed, observe

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Row:
    """One value: its name and source nodes, the kernel that made it ("" for an output of the whole
    module), and how far it lies from the reference."""

    value: str
    nodes: str
    kernel: str
    deviation: Deviation


@dataclasses.dataclass(frozen=True)
class Failure:
    """The artifact that the guilty step was given, for a reproducer.

    graph, feeds, length: for a fault of a pass, or of the model as a whole. kernel: for a fault of
    one kernel, with the state before the guilty step and the schedule step, where there is one.
    """

    graph: Function | None = None
    feeds: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    length: int = 1
    kernel: KernelCase | None = None
    state: State | None = None
    step: Step | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """The values in the order of their calls, then the outputs; what is to blame, if anything."""

    rows: list[Row]
    culprit: Culprit | None = None
    failure: Failure | None = None

    @property
    def first(self) -> Row | None:
        """The first value beyond its bound: a wrong one, or else one that differs by rounding."""
        for verdict in (WRONG, ROUNDING):
            for row in self.rows:
                if row.deviation.verdict == verdict:
                    return row
        return None

    @property
    def right(self) -> bool:
        """Whether nothing is wrong beyond rounding."""
        return self.culprit is None and all(r.deviation.verdict != WRONG for r in self.rows)


def verify(
    graph: Function,
    feeds: Mapping[str, Array],
    ctx: Context,
    reference: Mapping[str, Array] | None = None,
) -> Report:
    """Compiles an imported graph, compares all values with the reference, and looks for the cause.

    reference: values by their names in the model; where it names none, the operators in numpy
    serve. Of branches and loops the results are compared, not the values inside. Raises RunError
    where an input is missing or does not fit.
    """
    return _Verification(graph, feeds, ctx, reference or {}).run()


@dataclasses.dataclass(frozen=True)
class _Expected:
    """What a value should be: in its type and in float64, and how far rounding may move it."""

    want: Array
    exact: Array
    spread: Callable[[], float]

    def deviation(self, got: Array, length: int, extra: float) -> Deviation:
        """How far a value lies from this."""
        return deviation(got, self.want, self.exact, length, extra, self.spread)


class _Verification:
    """One model being compiled, run and compared."""

    def __init__(
        self,
        graph: Function,
        feeds: Mapping[str, Array],
        ctx: Context,
        reference: Mapping[str, Array],
    ) -> None:
        options = dataclasses.replace(ctx.options, cache=False, record=False, checked=False)
        self.ctx = Context(ctx.target, options, ctx.database)
        self.feeds, self.reference = feeds, reference
        self.passes, self.graphs = _optimised(graph, self.ctx)
        self.source = Values(graph, feeds)
        self.exact_source = Exact(graph, feeds)
        self.fn = self.graphs[-1]
        self.own, self.exact = Values(self.fn, feeds), Exact(self.fn, feeds)
        self.sums = {id(v): self.sum_of(v) for v in applies(self.fn)}
        # Errors of algorithms with fewer multiplications stay in all that follows.
        self.extra = max((error for _, error in self.sums.values()), default=0.0)
        self.lengths: dict[int, int] = {}
        for v in applies(self.fn):
            makers = [a.tuple if isinstance(a, Item) else a for a in v.args]
            before = max((self.lengths.get(id(m), 0) for m in makers), default=0)
            self.lengths[id(v)] = before + self.sums[id(v)][0]
        self.longest = max(self.lengths.values(), default=1)

    def run(self) -> Report:
        blamed = self.blame_graph()
        changed = blamed is not None and blamed[0].kind == "graph pass"
        self.named = self.expected_by_name(changed)
        try:
            self.built = driver.build_kernels(self.fn, self.ctx)
            self.module: Module = driver.assemble(self.fn, self.built, self.ctx)
        except MinicompilerError:
            if blamed is None:
                raise
            return Report([], *blamed)  # the compiler stumbled over what the pass made
        steps = after_counts(self.built.calls, driver.counts_of(self.fn))
        self.calls = list(kernel_calls(steps))
        arrays = [np.asarray(self.feeds[p.name]) for p in self.fn.params]
        seen = observe(self.module, steps, arrays)
        made = _makers(steps, self.fn)
        rows = [self.rows_of(v, results, seen) for v, results in made]
        outputs = self.output_rows(arrays)
        every = [r for found in rows for r in found] + outputs
        if blamed is not None:
            return Report(every, *blamed)
        for (v, _), found in zip(made, rows, strict=True):
            if any(r.deviation.verdict == WRONG for r in found):
                return Report(every, *self.blame_node(v, seen))
        if any(r.deviation.verdict == WRONG for r in outputs):
            detail = "all kernels are right one by one, the native main that calls them is not"
            culprit = Culprit("native main", "emit_main", detail, self.fn.name)
            return Report(every, culprit, self.whole())
        return Report(every)

    def blame_graph(self) -> tuple[Culprit, Failure] | None:
        """What is wrong before any kernel is made: the import, or a graph pass."""
        imported = self.blame_import()
        if imported is not None:
            return imported, self.whole()
        known = {0: self.exact_source, len(self.graphs) - 1: self.exact}
        blamed = blame_pass(self.passes, self.graphs, self.feeds, self.longest, known)
        if blamed is None:
            return None
        culprit, k = blamed
        return culprit, Failure(self.graphs[k - 1], self.feeds, self.longest)

    # ---- references -----------------------------------------------------------------------------
    def blame_import(self) -> Culprit | None:
        """The first node whose numpy value differs from the reference that was given."""
        for v in named_values(self.graphs[0]):
            other = self.reference.get(v.name)
            if other is None or other.dtype != self.source[v].dtype:
                continue
            # The float64 value is that of this graph, so the other one has to come near it.
            e = _Expected(
                self.source[v], self.exact_source[v], partial(self.exact_source.spread, v)
            )
            found = e.deviation(other, self.longest, 0.0)
            if found.verdict == WRONG:
                detail = "as imported, it is not what the reference computes" + _from(v)
                return Culprit("import", v.op.name, detail, f'value "{v.name}"')
        return None

    def expected_by_name(self, changed: bool) -> dict[str, _Expected]:
        """What values should be, by their names in the model.

        changed: some pass changed the meaning of the graph. If none did, a name whose value differs
        has been given to something else.
        """
        found: dict[str, _Expected] = {}
        mine = {v.name: v for v in named_values(self.graphs[-1])}
        for v in named_values(self.graphs[0]):
            spread = partial(self.exact_source.spread, v)
            e = _Expected(self.source[v], self.exact_source[v], spread)
            u = mine.get(v.name)
            if not changed and u is not None:
                same = e.deviation(self.own[u], self.longest, self.ctx.options.max_error)
                if same.verdict == WRONG:
                    continue
            found[v.name] = self.given(v.name, e)
        return found

    def given(self, name: str, e: _Expected) -> _Expected:
        """With the value of the reference that was given, where it has one of this name."""
        other = self.reference.get(name)
        if other is None or other.shape != e.want.shape or other.dtype != e.want.dtype:
            return e
        return dataclasses.replace(e, want=other)

    def expected(self, v: Value) -> _Expected:
        """What a value of the optimised graph should be."""
        named = self.named.get(v.name) if isinstance(v, Apply) else None
        if named is not None and named.want.shape == self.own[v].shape:
            return named
        return _Expected(self.own[v], self.exact[v], partial(self.exact.spread, v))

    def sum_of(self, v: Apply) -> tuple[int, float]:
        """The length of the sums of a kernel, and what its algorithm may add to their error."""
        if not isinstance(v.op, Function):  # all that its bodies do, in each iteration
            inner = [self.sum_of(x) for f in nested_functions(v.attrs) for x in applies(f)]
            trips = int(self.own[Item(v, 0)]) if v.op is loop else 1
            return trips * sum(n for n, _ in inner), max((e for _, e in inner), default=0.0)
        constant = _constant(v)
        func = lower_function(v.op, constant)
        error = self.ctx.options.max_error
        other = lower_function(v.op, constant, error)
        return _sum_length(func, self.own.dims), error if script(other) != script(func) else 0.0

    # ---- comparison -----------------------------------------------------------------------------
    def rows_of(self, v: Apply, results: Sequence[Value], seen: Observed) -> list[Row]:
        """The results of a node: a kernel, or a branch or loop as a whole."""
        found = []
        for r in results:
            name = value_name(r) + (f".{r.index}" if isinstance(r, Item) else "")
            got, e = seen.value(r), self.expected(r)
            if isinstance(v.attrs, LoopAttrs) and isinstance(r, Item) and r.index >= v.attrs.states:
                made = int(self.own[Item(v, 0)])  # rows behind these hold anything
                got, e = got[:made], _Expected(e.want[:made], e.exact[:made], e.spread)
            apart = e.deviation(got, self.lengths[id(v)], self.extra)
            found.append(Row(name, " + ".join(map(str, v.locs)), v.op.name, apart))
        return found

    def output_rows(self, arrays: list[Array]) -> list[Row]:
        """The outputs of the module, called as a user calls it."""
        found = []
        graph = self.graphs[0]
        # Memory that was just given back may hold the right answer: it is overwritten before.
        out = [
            None if k in self.module._trimmed else poisoned(a.shape, a.dtype)
            for k, a in enumerate(self.source.results)
        ]
        results = self.module(*arrays, out=out)
        for k, (t, got) in enumerate(zip(self.module.outputs, results, strict=True)):
            want, exact = self.source.results[k], self.exact_source.results[k]
            e = _Expected(want, exact, partial(self.exact_source.result_spread, k))
            v = graph.results[k]
            nodes = " + ".join(map(str, v.locs)) if isinstance(v, Apply) else ""
            apart = self.given(t.name, e).deviation(got, self.longest, self.extra)
            found.append(Row(t.name, nodes, "", apart))
        return found

    def blame_node(self, v: Apply, seen: Observed) -> tuple[Culprit, Failure]:
        """What made the results of a node wrong, when its inputs were right."""
        if not isinstance(v.op, Function):
            detail = "a kernel inside of it is wrong, or run at the wrong time" + _from(v)
            where = f'value "{value_name(v)}"'
            return Culprit("control flow", v.op.name, detail, where), self.whole()
        k = next(k for k, c in enumerate(self.calls) if _maker(c.results[0]) is v)
        case = self.case(v, self.calls[k])
        kernel = case.fn.name
        blamed = blame_kernel(case, self.ctx)
        if blamed is not None:
            culprit, before, step = blamed
            return culprit, dataclasses.replace(self.whole(), kernel=case, state=before, step=step)
        whole = self.whole()
        for c in seen.changed:
            if c.call == k:
                a = self.calls[k].args[c.argument]
                name = value_name(a) if isinstance(a, Value) else "constant"
                detail = f'value "{name}" is overwritten before this kernel reads it'
                return Culprit("memory plan", "plan_memory", detail, kernel), whole
        if k in seen.overlaps:
            detail = "this kernel writes where it reads"
            return Culprit("memory plan", "plan_memory", detail, kernel), whole
        detail = f"right alone on one thread, wrong in the plan on {self.module.threads}"
        return Culprit("code generation", "parallel", detail, kernel), whole

    def whole(self) -> Failure:
        """The model with its inputs."""
        return Failure(self.graphs[0], self.feeds, self.longest)

    def case(self, v: Apply, call: KernelCall) -> KernelCase:
        """A call with the inputs that it should get."""
        fn = v.op
        assert isinstance(fn, Function)
        inputs = [self.own[a] for a in v.args if a is not None]
        feeds = {p.name: a for p, a in zip(fn.params, inputs, strict=True)}
        want = Values(fn, feeds, dims=self.own.dims).results
        exact = Exact(fn, feeds, self.own.dims)
        length, extra = self.sums[id(v)]
        kernel = self.built.kernels[call.kernel]
        return KernelCase(
            fn, _constant(v), kernel, call, inputs, self.own.dims, want, exact, length, extra
        )


def _optimised(graph: Function, ctx: Context) -> tuple[list[str], list[Function]]:
    """The passes by name, and the graph before and after each."""
    ctx.guards = run_time_guards(graph)
    graphs = [graph]
    passes = ctx.options.extensions.passes(pipeline.GRAPH_PASSES[ctx.options.level])
    for step in passes:
        graphs.append(pipeline.run([step], graphs[-1], ctx))
    names = [step.__name__ for step in passes]
    if any(nested_functions(v.attrs) for v in applies(graph)):
        names.append(driver.optimise_bodies.__name__)
        graphs.append(driver.optimise_bodies(graphs[-1], ctx))
    return names, graphs


def _sum_length(func: PrimFunc, dims: Mapping[str, int]) -> int:
    """The number of terms that a result of a kernel is summed from, one block after another."""
    total = 1
    for s in statements(func):
        if isinstance(s, Block):
            total += evaluate_int(product(i.extent for i in s.iters if i.reduce), dims)
    steps = [s for s in statements(func) if isinstance(s, For) and s.tag == SCAN]
    for s in steps:
        total *= max(evaluate_int(s.extent, dims), 1)
    return total


def _constant(v: Apply) -> tuple[bool, ...]:
    return tuple(isinstance(a, Constant) for a in v.args)


def _maker(v: Value) -> Value:
    """The node that makes a value; a place that steps write is its own."""
    return v.tuple if isinstance(v, Item) else v


def _makers(steps: Sequence[memory.Step], fn: Function) -> list[tuple[Apply, list[Value]]]:
    """The nodes of an optimised graph in the order in which they are done, with their results."""
    nodes = {id(v): v for v in applies(fn)}
    found: dict[int, dict[int, Value]] = {}
    for s in steps:
        results: list[Value] = list(s.results) if isinstance(s, KernelCall) else []
        if isinstance(s, Region):
            results = [a.result for a in s.results]
            results += [r for c in kernel_calls(s.last) for r in c.results]
        for r in results:
            key = id(_maker(r))
            if key in nodes:  # it is not done before the last of its steps
                index = r.index if isinstance(r, Item) else 0
                found[key] = {**found.pop(key, {}), index: r}
    return [(nodes[key], list(results.values())) for key, results in found.items()]


def _from(v: Apply) -> str:
    return f" ({' + '.join(map(str, v.locs))})" if v.locs else ""
