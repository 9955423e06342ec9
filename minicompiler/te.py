"""Tensor expressions: what an operator computes, one formula per output element.

    x = placeholder("x", (m, k)); w = placeholder("w", (k, n))
    y = compute((m, n), lambda i, j: x[i, l] * w[l, j], "y", reduce=("sum", {l: k}))
    softmax: m = max(x, -1); e = exp(x - m); return e / sum(e, -1)

Tensors support + - * / with numpy broadcasting; functions of one tensor map over its elements.
"""

from __future__ import annotations

import builtins
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Union

from .ir.expr import (
    ONE,
    ZERO,
    Call,
    Const,
    Expr,
    Load,
    Reduce,
    Var,
    binary,
    cast,
    const,
    free_vars,
    rewrite,
    select,
    wrap,
)
from .ir.types import DType

_counter = itertools.count()
Operand = Union["Tensor", Expr, int, float, bool]


class Tensor:
    """A tensor defined by one expression per element, or a placeholder (`body` None).

    `axes[d]` is the index variable of dimension d in `body`; a Reduce may stand only at the top of
    it. kept: readers never compute an element again.
    """

    __slots__ = ("axes", "body", "dtype", "kept", "name", "shape", "source")

    def __init__(
        self,
        name: str,
        shape: Sequence[Expr | int],
        dtype: DType,
        axes: tuple[Var, ...],
        body: Expr | None,
    ) -> None:
        self.name, self.shape, self.dtype = name, tuple(wrap(s) for s in shape), dtype
        self.axes, self.body = axes, body
        self.source: Extern | Scan | None = None  # what computes it, where it has no formula
        self.kept = False

    def __getitem__(self, indices: Any) -> Expr:
        """The element at some indices (Exprs or ints), one per dimension."""
        got = indices if isinstance(indices, tuple) else (indices,)
        if len(got) != len(self.shape):
            raise IndexError(
                f"{self.name} has {len(self.shape)} dimensions, got {len(got)} indices"
            )
        return Load(self, tuple(wrap(i) for i in got))

    def __repr__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"

    def __add__(self, o: Operand) -> Tensor:
        return elementwise("add", self, o)

    def __radd__(self, o: Operand) -> Tensor:
        return elementwise("add", o, self)

    def __sub__(self, o: Operand) -> Tensor:
        return elementwise("sub", self, o)

    def __rsub__(self, o: Operand) -> Tensor:
        return elementwise("sub", o, self)

    def __mul__(self, o: Operand) -> Tensor:
        return elementwise("mul", self, o)

    def __rmul__(self, o: Operand) -> Tensor:
        return elementwise("mul", o, self)

    def __truediv__(self, o: Operand) -> Tensor:
        return elementwise("div", self, o)

    def __rtruediv__(self, o: Operand) -> Tensor:
        return elementwise("div", o, self)


def placeholder(name: str, shape: Sequence[Expr | int], dtype: DType) -> Tensor:
    """An input tensor."""
    return Tensor(name, shape, dtype, (), None)


def axis_vars(rank: int) -> tuple[Var, ...]:
    """Fresh index variables for a tensor of `rank` dimensions."""
    n = next(_counter)
    return tuple(Var(f"i{k}_{n}") for k in range(rank))


def reduce_vars(count: int) -> tuple[Var, ...]:
    """Fresh reduction variables."""
    n = next(_counter)
    return tuple(Var(f"r{k}_{n}") for k in range(count))


def compute(
    shape: Sequence[Expr | int],
    f: Callable[..., Expr],
    name: str = "t",
    reduce: tuple[str, Mapping[Var, Expr | int]] | None = None,
) -> Tensor:
    """The tensor with element f(i, j, ...) at [i, j, ...].

    reduce: (combiner, {reduction variable: extent}) combines f over the variables; combiner is one
    of sum prod max min and or.
    """
    axes = axis_vars(len(shape))
    body = f(*axes)
    if reduce is not None and reduce[1]:
        combiner, over = reduce
        body = Reduce(combiner, tuple(over), tuple(wrap(e) for e in over.values()), body)
    return Tensor(name, shape, body.dtype, axes, body)


class Extern:
    """Tensors computed by statements: what has no formula per element (sorting, scattering).

    build(input buffers, output buffers, fresh) -> the statement (ir.tir), a phase of its own;
    fresh("i") is a new loop variable. One thread runs it, unless its outermost loop is PARALLEL. An
    output may serve as scratch memory. changes: the first input lies in the memory of the only
    output, and nobody else reads it.
    """

    __slots__ = ("build", "changes", "inputs", "name", "outputs")

    def __init__(
        self, name: str, inputs: tuple[Tensor, ...], build: Callable[..., Any], changes: bool
    ) -> None:
        self.name, self.inputs, self.build, self.changes = name, inputs, build, changes
        self.outputs: tuple[Tensor, ...] = ()


def extern(
    name: str,
    inputs: Sequence[Tensor],
    outputs: Sequence[tuple[Sequence[Expr | int], DType]],
    build: Callable[..., Any],
) -> tuple[Tensor, ...]:
    """The tensors of shape and dtype `outputs` that the statement of `build` fills; see Extern."""
    return _extern(Extern(name, tuple(inputs), build, changes=False), outputs)


def changed(name: str, x: Tensor, inputs: Sequence[Tensor], build: Callable[..., Any]) -> Tensor:
    """A copy of x that the statement of `build` changes: outs[0] holds it; ins are the `inputs`."""
    start = compute(x.shape, lambda *i: x[i], f"{name}_start")
    source = Extern(
        name, (start, *inputs), lambda ins, *others: build(ins[1:], *others), changes=True
    )
    return _extern(source, [(x.shape, x.dtype)])[0]


def _extern(
    source: Extern, outputs: Sequence[tuple[Sequence[Expr | int], DType]]
) -> tuple[Tensor, ...]:
    made = [Tensor(source.name, shape, dtype, (), None) for shape, dtype in outputs]
    for t in made:
        t.source = source
    source.outputs = tuple(made)
    return source.outputs


class Scan:
    """Tensors defined by recurrence over steps; `scan` makes it.

    outputs[s] has steps + 1 entries: entry 0 is init[s], entry t + 1 is next[s], a formula over the
    step `t`, the placeholders `prev` (the states at entry t) and other tensors. stages: next and
    what it needs that varies from step to step, definitions before uses. inputs: what they read.
    """

    __slots__ = ("init", "inputs", "name", "next", "outputs", "prev", "stages", "steps", "t")

    def __init__(
        self, name: str, steps: Expr, t: Var,
        init: Sequence[Tensor], prev: Sequence[Tensor], next: Sequence[Tensor],
    ) -> None:  # fmt: skip
        self.name, self.steps, self.t = name, steps, t
        self.init, self.prev, self.next = tuple(init), tuple(prev), tuple(next)
        varying = set(self.prev)
        stages = []
        for x in closure(self.next):
            if x.body is not None and (
                x in self.next or t in free_vars(x.body) or not varying.isdisjoint(inputs(x))
            ):
                varying.add(x)
                stages.append(x)
        self.stages = tuple(stages)
        # An initial state with a formula of its own is computed where it is needed.
        starts = [i for x in self.init for i in (inputs(x) if x.body is not None else [x])]
        read = [i for x in stages for i in inputs(x) if i not in varying]
        self.inputs = tuple(dict.fromkeys((*starts, *read)))
        self.outputs: tuple[Tensor, ...] = ()


def scan(
    steps: Expr | int,
    init: Sequence[Tensor],
    update: Callable[[Expr, tuple[Tensor, ...]], Sequence[Tensor]],
    name: str = "scan",
) -> tuple[Tensor, ...]:
    """The histories of some states: h[0] = init, h[t + 1] = update(t, h[t]); each of shape
    (steps + 1, *its init's).

    update(t, the states after t steps) -> the states after one more.
    """
    t = Var(f"t_{next(_counter)}")
    prev = tuple(placeholder(f"{name}_{k}", x.shape, x.dtype) for k, x in enumerate(init))
    made: list[Tensor] = []
    for x in update(t, prev):
        if x.body is None or x in made:  # a state may be handed on, and two may be the same
            x = compute(x.shape, lambda *i, x=x: x[i], x.name)
        made.append(x)
    source = Scan(name, wrap(steps), t, init, prev, made)
    histories = []
    for k, x in enumerate(init):
        h = Tensor(f"{name}_{k}", (source.steps + 1, *x.shape), x.dtype, (), None)
        h.source = source
        histories.append(h)
    source.outputs = tuple(histories)
    return source.outputs


# ---- elementwise, with numpy broadcasting -------------------------------------------------------
def _at(x: Operand, axes: Sequence[Var], like: DType | None) -> Expr:
    """The element of `x` that goes with output index `axes` (sizes of 1 are repeated)."""
    if not isinstance(x, Tensor):
        assert like is not None or isinstance(x, Expr)
        return x if isinstance(x, Expr) else const(x, like)  # type: ignore[arg-type]
    tail = axes[len(axes) - len(x.shape) :]
    return Load(x, tuple(ZERO if s is ONE else a for s, a in zip(x.shape, tail, strict=True)))


def broadcast_shape(shapes: Iterable[Sequence[Expr]]) -> tuple[Expr, ...]:
    """numpy's rule on shapes that a type rule has checked already: the first size that is not 1."""
    shapes = list(shapes)
    rank = builtins.max((len(s) for s in shapes), default=0)
    result: list[Expr] = [ONE] * rank
    for s in shapes:
        for k, size in enumerate(s, rank - len(s)):
            if result[k] is ONE or (
                type(result[k]) is not Const and type(size) is Const and size is not ONE
            ):
                result[k] = size
    return tuple(result)


def map_elements(f: Callable[..., Expr], *xs: Operand, name: str = "t") -> Tensor:
    """f on corresponding elements, with broadcasting. Python numbers take the first tensor's
    dtype."""
    tensors = [x for x in xs if isinstance(x, Tensor)]
    like = tensors[0].dtype
    shape = broadcast_shape([t.shape for t in tensors])
    return compute(shape, lambda *i: f(*[_at(x, i, like) for x in xs]), name)


def elementwise(op: str, a: Operand, b: Operand) -> Tensor:
    """A Binary operation on tensors."""
    return map_elements(lambda x, y: binary(op, x, y), a, b, name=op)


def call(fn: str, *xs: Operand) -> Tensor:
    """A scalar function (exp, tanh, ...) on every element."""
    return map_elements(lambda *e: Call(fn, e), *xs, name=fn)


def exp(x: Tensor) -> Tensor:
    return call("exp", x)


def sqrt(x: Tensor) -> Tensor:
    return call("sqrt", x)


def where(cond: Tensor, a: Operand, b: Operand) -> Tensor:
    """a where cond, else b; the dtype is that of the first tensor among a and b."""
    like = next(t for t in (a, b) if isinstance(t, Tensor)).dtype
    shape = broadcast_shape([t.shape for t in (cond, a, b) if isinstance(t, Tensor)])
    return compute(
        shape, lambda *i: select(_at(cond, i, None), _at(a, i, like), _at(b, i, like)), "where"
    )


def astype(x: Tensor, dtype: DType) -> Tensor:
    """Elements converted to another type."""
    return x if x.dtype is dtype else map_elements(lambda e: cast(e, dtype), x, name="cast")


# ---- reductions ---------------------------------------------------------------------------------
def reduction(combiner: str, x: Tensor, axis: int | Sequence[int], keepdims: bool = True) -> Tensor:
    """`combiner` over one or several axes (negative ones count from the end)."""
    rank = len(x.shape)
    over = sorted({a % rank for a in ([axis] if isinstance(axis, int) else axis)})
    if not over:
        return x
    r = reduce_vars(len(over))
    shape = [ONE if k in over else s for k, s in enumerate(x.shape) if keepdims or k not in over]

    def body(*i: Var) -> Expr:
        spatial, reduced = iter(i), iter(r)
        full = []
        for k in range(rank):
            if k in over:
                full.append(next(reduced))
                if keepdims:
                    next(spatial)
            else:
                full.append(next(spatial))
        return Load(x, tuple(full))

    return compute(
        shape, body, combiner, (combiner, {v: x.shape[a] for v, a in zip(r, over, strict=True)})
    )


def sum(x: Tensor, axis: int | Sequence[int], keepdims: bool = True) -> Tensor:
    return reduction("sum", x, axis, keepdims)


def max(x: Tensor, axis: int | Sequence[int], keepdims: bool = True) -> Tensor:
    return reduction("max", x, axis, keepdims)


def min(x: Tensor, axis: int | Sequence[int], keepdims: bool = True) -> Tensor:
    return reduction("min", x, axis, keepdims)


# ---- views of a definition ----------------------------------------------------------------------
def inputs(t: Tensor) -> list[Tensor]:
    """The tensors that `t` reads directly, in order of first use."""
    if t.source is not None:
        return list(dict.fromkeys(t.source.inputs))
    if t.body is None:
        return []
    found: list[Tensor] = []

    def see(e: Expr) -> Expr | None:
        if type(e) is Load and e.buffer not in found:
            found.append(e.buffer)
        return None

    rewrite(t.body, see)
    return found


def closure(results: Sequence[Tensor]) -> list[Tensor]:
    """All tensors that the results need, definitions before uses."""
    order: list[Tensor] = []
    seen: set[int] = set()
    stack: list[tuple[Tensor, bool]] = [(r, False) for r in reversed(results)]
    while stack:
        t, ready = stack.pop()
        if ready:
            if id(t) not in seen:
                seen.add(id(t))
                order.append(t)
        elif id(t) not in seen:
            stack.append((t, True))
            stack.extend((i, False) for i in reversed(inputs(t)))
    return order
