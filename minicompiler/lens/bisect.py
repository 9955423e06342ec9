"""Which step went wrong: bisection over graph passes, and over the making of one kernel.

blame_pass(graphs, feeds)       Culprit("graph pass", "fold_batch_norm", ...), or None
blame_kernel(case, ctx)         Culprit("schedule step", "split", "step 3 of 21 ...", ...), or None

A step is guilty when what it was given computes the right result and what it made does not. Right
is what the operators' numpy references say, within `lens.compare`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from minicompiler.context import Context
from minicompiler.errors import InternalError
from minicompiler.ir.arith import evaluate_int, sizes
from minicompiler.ir.graph import (
    Apply,
    Constant,
    Function,
    Input,
    Value,
    layout_of,
    topological,
    type_of,
)
from minicompiler.ir.tir import PrimFunc
from minicompiler.ir.types import TensorType
from minicompiler.kernel import Kernel
from minicompiler.lower.lift_constants import Prepared
from minicompiler.lower.memory import KernelCall
from minicompiler.schedules.schedule import Step

from .compare import WRONG, deviation
from .evaluate import Exact
from .kernel import (
    State,
    invoke,
    is_small,
    making_of,
    run,
    run_in_memory,
    shared_places,
)
from .memory import from_memory, one_to_one, physical_shape, poisoned, to_memory

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Culprit:
    """What went wrong.

    Attributes:
        kind: "import", "graph pass", "lowering", "schedule step", "tir pass", "code generation",
            "constant preparation", "memory plan", "control flow" or "native main".
        name: the pass, primitive or function of the compiler.
        detail: what it did, as far as it is known.
        where: the kernel or the value concerned.
    """

    kind: str
    name: str
    detail: str
    where: str

    def __str__(self) -> str:
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.kind} `{self.name}` ({self.where}){detail}"


def first_bad(count: int, bad: Callable[[int], bool]) -> int:
    """The first k below `count` that is bad, where the last one is, and none becomes good again."""
    low, high = 0, count - 1
    while low < high:
        middle = (low + high) // 2
        if bad(middle):
            high = middle
        else:
            low = middle + 1
    return high


# ---- graph passes -------------------------------------------------------------------------------
def blame_pass(
    names: Sequence[str],
    graphs: Sequence[Function],
    feeds: Mapping[str, Array],
    length: int,
    known: Mapping[int, Exact] | None = None,
) -> tuple[Culprit, int] | None:
    """The first pass that changed what the graph computes, and its number.

    graphs: the imported graph, then what each of the passes `names` made of it. length: of the sums
    that lead to a result. Everything is computed in float64, so little is left of rounding.
    known: the values of some of the graphs.
    """
    made = dict(known or {})

    def values_of(k: int) -> Exact:
        if k not in made:
            made[k] = Exact(graphs[k], feeds)
        return made[k]

    right = values_of(0)

    def bad(k: int) -> bool:
        if misplaced(graphs[k], right.dims):
            return True
        return any(
            _differs(got, right.results[n], type_of(r), length, partial(right.result_spread, n))
            for n, (got, r) in enumerate(zip(values_of(k).results, graphs[k].results, strict=True))
        )

    if not bad(len(graphs) - 1):
        return None
    k = first_bad(len(graphs), bad)
    if k == 0:
        raise InternalError("the imported graph does not compute its own results")
    values = misplaced(graphs[k], right.dims)
    if values:
        layout = layout_of(values[0])
        detail = f"its layout {layout} puts several elements in one place"
        where = f'value "{value_name(values[0])}"'
    else:
        where, detail = _first_changed(
            graphs[k - 1 : k + 1], values_of(k - 1), values_of(k), length
        )
    return Culprit("graph pass", names[k - 1], detail, where), k


def _differs(
    got: Array, want: Array, t: TensorType, length: int, spread: Callable[[], float]
) -> bool:
    """Whether two float64 arrays differ by more than the bounds of a type."""
    dtype = t.dtype.numpy
    with np.errstate(over="ignore"):
        a, b = got.astype(dtype), want.astype(dtype)
    return deviation(a, b, want, length, spread=spread).verdict == WRONG


def misplaced(fn: Function, dims: Mapping[str, int]) -> list[Value]:
    """The values of a graph whose layout is not one-to-one."""
    found = []
    for v in topological(fn.results):
        if isinstance(v, Apply) and isinstance(v.type, tuple):
            continue  # its Items are looked at
        layout = layout_of(v)
        if layout is not None and not one_to_one(layout, sizes(type_of(v).shape, dims)):
            found.append(v)
    return found


def _first_changed(
    graphs: Sequence[Function], old: Exact, new: Exact, length: int
) -> tuple[str, str]:
    """Where a pass changed the values: the first one with a name on both sides, else a result."""
    before, after = graphs
    named = {v.name: v for v in named_values(before)}
    for v in named_values(after):
        u = named.get(v.name)
        if u is None or u.type != v.type:
            continue
        if _differs(new[v], old[u], type_of(v), length, partial(old.spread, u)):
            return f'value "{v.name}"', _change(old[u], new[v], v)
    for k, (a, b) in enumerate(zip(old.results, new.results, strict=True)):
        if _differs(b, a, type_of(before.results[k]), length, partial(old.result_spread, k)):
            name = before.result_names[k] if before.result_names else str(k)
            return f'result "{name}"', _change(a, b, after.results[k])
    raise InternalError("the results of two graphs differ and do not differ")


def _change(old: Array, new: Array, v: Value) -> str:
    apart = np.abs(np.asarray(new, np.float64) - np.asarray(old, np.float64)).max()
    locs = v.locs if isinstance(v, Apply | Constant) else ()
    nodes = f" ({' + '.join(map(str, locs))})" if locs else ""
    return f"it differs by up to {apart:.3g} from what it was before{nodes}"


def named_values(fn: Function) -> list[Apply]:
    """The nodes with one result that carry a name of the source model."""
    found = [v for v in topological(fn.results) if isinstance(v, Apply) and v.name]
    return [v for v in found if not isinstance(v.type, tuple)]


def value_name(v: Value) -> str:
    """The name of a value in the source model, else of its operator."""
    if isinstance(v, Apply):
        return v.name or v.op.name
    return v.name if isinstance(v, Input | Constant) else value_name(v.tuple)  # type: ignore[attr-defined]


# ---- one kernel ---------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class KernelCase:
    """A call of a kernel with inputs that are right, and the results that it should have.

    call: the arguments as the driver prepared them. inputs: one logical array per parameter of the
    fused function. want: its results in the graph's types; exact: its values in float64. length,
    extra: see `compare.deviation`.
    """

    fn: Function
    constant: tuple[bool, ...]
    kernel: Kernel
    call: KernelCall
    inputs: Sequence[Array]
    dims: Mapping[str, int]
    want: Sequence[Array]
    exact: Exact
    length: int
    extra: float

    def wrong(self, got: Sequence[Array]) -> bool:
        """Whether some result is wrong, and not by rounding."""
        for k, (g, w) in enumerate(zip(got, self.want, strict=True)):
            g = g.reshape(w.shape)  # loops may see the same memory in another shape
            exact, spread = self.exact.results[k], partial(self.exact.result_spread, k)
            if deviation(g, w, exact, self.length, self.extra, spread).verdict == WRONG:
                return True
        return False


def blame_kernel(
    case: KernelCase, ctx: Context
) -> tuple[Culprit, State | None, Step | None] | None:
    """What made a kernel compute something else, the state before, and the schedule step if it is
    one; None when the kernel alone computes the right results."""
    if not case.wrong(run_kernel(case)):
        return None
    assert ctx.target is not None
    target = ctx.target
    making = making_of(case.fn, case.constant, ctx)
    states, dims = making.states, case.dims
    failures: dict[int, str] = {}

    def bad(k: int) -> bool:
        func = states[k].func
        shared = shared_places(func, dims)
        if shared:
            failures[k] = f"the layout of {shared[0]} puts several elements in one place"
            return True
        try:
            return case.wrong(run(func, case.inputs, dims, target))
        except InternalError as e:  # an access outside of a buffer, in the interpreter
            failures[k] = e.message
            return True

    if bad(len(states) - 1):
        k = first_bad(len(states), bad)
        state = states[k]
        detail = "; ".join(filter(None, (state.detail, failures.get(k, ""))))
        if k == 0 and not is_small(state.func, dims):
            detail = "or code generation: at these sizes the loop nest is too large to interpret"
        before = states[k - 1] if k else None
        return Culprit(state.kind, state.name, detail, case.fn.name), before, state.step
    ready = _prepare(making.prepared, case, states[0].func, ctx)
    if ready and not case.wrong(run_kernel(case, ready)):
        detail = "the constants that it prepared for this kernel are not what its loop nest makes"
        return Culprit("constant preparation", "prepare", detail, case.fn.name), None, None
    detail = "its last loop nest is right, the code compiled from it is not"
    return Culprit("code generation", "llvm", detail, case.fn.name), None, None


def run_kernel(case: KernelCase, prepared: Sequence[Array] | None = None) -> list[Array]:
    """The compiled kernel alone, on one thread. prepared: constants to use instead of its own."""
    given = iter(case.call.args)
    tensors = []
    for kind, k in case.kernel.params:
        if kind == "result":
            continue
        argument = next(given)
        if kind == "prepared":
            assert isinstance(argument, np.ndarray)
            tensors.append(argument if prepared is None else prepared[k])
        else:
            layout = None if isinstance(argument, np.ndarray) else layout_of(argument)
            tensors.append(to_memory(case.inputs[k], layout))
    numbers = [k for kind, k in case.kernel.params if kind == "result"]
    shapes = [case.want[k].shape for k in numbers]
    made = [
        poisoned(physical_shape(shape, layout_of(v)), case.want[k].dtype)
        for v, shape, k in zip(case.call.results, shapes, numbers, strict=True)
    ]
    sizes_of_call = (case.call.shared, case.call.local)
    workspace = sum(evaluate_int(size, case.dims) for size in sizes_of_call)
    dims = [evaluate_int(d, case.dims) for d in case.call.dims]
    invoke(case.kernel.code, case.kernel.name, [*tensors, *made], dims, workspace)
    found = {
        k: from_memory(a, shape, layout_of(v))
        for k, a, shape, v in zip(numbers, made, shapes, case.call.results, strict=True)
    }
    return [found[k] for k in range(len(found))]


def _prepare(
    prepared: Sequence[Prepared], case: KernelCase, lowered: PrimFunc, ctx: Context
) -> list[Array]:
    """The prepared constants as their loop nests make them, in memory."""
    assert ctx.target is not None
    params = zip(lowered.params, case.inputs, strict=False)
    memory = {b: to_memory(a, b.layout) for b, a in params}
    for p in prepared:
        tensors = [memory[b] for b in p.func.params[:-1]]
        memory[p.buffer] = run_in_memory(p.func, tensors, case.dims, ctx.target)[0]
    return [memory[p.buffer] for p in prepared]
