"""Control flow that data decides: the graphs of If, Loop and Scan become Functions of the graph IR.

Loop(M, c, s0; body)    k, s = loop(c and 0 < M, 0, s0, w; body=fn(k, s, w) {
                            return go and k + 1 < M, k + 1, s_new })

What a graph reads from around it is passed in. Where a size differs from one iteration (or branch)
to the next, the value is padded to the largest size, its size becomes a value of its own, and
`head` takes the part that counts: [k] -> [k + 1] in at most M iterations is int64[] and [M].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minicompiler.ir.arith import Arith
from minicompiler.ir.expr import ZERO, Const, Dim, Expr, const_int, free_vars, maximum, substitute
from minicompiler.ir.graph import (
    Apply,
    Constant,
    Function,
    Input,
    Item,
    Value,
    content_of,
    operands,
    rebuild,
    topological,
    type_of,
)
from minicompiler.ir.op import Counted
from minicompiler.ir.types import TensorType, bool_, int64
from minicompiler.ops import control as ct
from minicompiler.ops import count as cn
from minicompiler.ops import elementwise as el
from minicompiler.ops import index as ix
from minicompiler.ops import padding
from minicompiler.ops import shape as sh

from .onnx_node import OnnxNode, items

_UNLIMITED = 1 << 31  # trip counts from here on stand for "as long as the condition holds"
# (number of the iteration, states) -> (whether it goes on, new states, rows)
Step = Callable[[Value, Sequence[Value]], tuple[Value | None, Sequence[Value], Sequence[Value]]]
Place = tuple[int, int]  # a state or result, and one of its axes


# ---- If -----------------------------------------------------------------------------------------
def if_(n: OnnxNode) -> tuple[Value, ...]:
    """One of two branches, chosen at run time."""
    around = n.around()
    names = ("then_branch", "else_branch")
    branches = [_tensors(n, n.branch(name, len(n.outputs))) for name in names]
    first, second = branches
    limits = _counted(branches, around)
    sizes: dict[Place, Expr] = {}
    for k, (a, b) in enumerate(zip(first, second, strict=True)):
        for axis, (s, t) in enumerate(_axes(n, type_of(a), type_of(b))):
            if not _same(s, t):
                sizes[k, axis] = maximum(substitute(s, limits), substitute(t, limits))
    bodies = []
    for values in branches:
        counts = [size_value(n, type_of(values[k]).shape[axis]) for k, axis in sizes]
        bodies.append([*_padded(n, values, sizes), *counts])
    captured, functions = _closed(bodies, [(), ()], around, hoist=False)
    attrs = ct.CondAttrs(*functions)
    made = items(n.apply(ct.cond, _flag(n, n.arg(0)), *captured, attrs=attrs, name=""))
    return tuple(_cut(n, made[: len(first)], made[len(first) :], sizes))


def _counted(branches: Sequence[Sequence[Value]], around: Sequence[Value]) -> dict[Expr, Expr]:
    """The dimensions that are counted in branches, which nobody knows outside, and what they are at
    most, where anything limits them."""
    outside = {id(v) for v in topological(around)}
    most: dict[Expr, Expr] = {}
    for v in topological([v for values in branches for v in values]):
        a = v.attrs if isinstance(v, Apply) and id(v) not in outside else None
        if isinstance(a, Counted) and a.most is not None:
            most[a.dim] = substitute(a.most, most)
    return most


# ---- Loop and Scan ------------------------------------------------------------------------------
def loop(n: OnnxNode) -> tuple[Value, ...]:
    """A Loop whose trip count or condition depends on data, or that is too long to be repeated."""
    states = _tensors(n, n.inputs[2:])

    def step(k: Value, now: Sequence[Value]) -> Any:
        count = 1 + max(len(states), len(n.outputs))
        going, *made = _tensors(n, n.branch("body", count, k, n.constant(True), *now))
        return going, made[: len(states)], made[len(states) :]

    trips, told = n.opt(0), False
    most: Expr | None = None
    if trips is not None:
        known, content = n.values.of(trips), content_of(trips)
        if known is not None:
            count = max(int(known.reshape(-1)[0]), 0)
            trips, most = (None, None) if count >= _UNLIMITED else (trips, Const(count))
        elif content is not None:  # as often as sizes say
            most = Arith().simplify(maximum(content.reshape(-1)[0], 0))
        elif isinstance(trips, Input):
            most, told = n.dim(f"{trips.name}.value", None, 1), True  # room for one at least
            trips = n.apply(cn.number, trips, attrs=Counted(most, None), name="")
        if trips is not None:
            trips = _scalar(n, trips)
    return run(n, states, step, trips, most, n.opt(1), told)


def scan(
    n: OnnxNode,
    states: Sequence[Any],
    scanned: Sequence[Value],
    axes: Sequence[int],
    backward: Sequence[int],
    body: Callable[..., tuple[Any, ...]],
) -> tuple[Value, ...]:
    """A Scan that is too long to be repeated; rows are stacked along the first axis, in the order
    of the iterations. body: (states, elements) -> (new states, rows)."""
    length = type_of(scanned[0]).shape[axes[0] % type_of(scanned[0]).rank]
    trips = size_value(n, length)

    def step(k: Value, now: Sequence[Value]) -> Any:
        parts = []
        for x, axis, back in zip(scanned, axes, backward, strict=True):
            last = n.apply(el.sub, trips, n.constant(1, np.int64), name="")
            at = n.apply(el.sub, last, k, name="") if back else k
            parts.append(n.apply(ix.gather, x, at, attrs=ix.GatherAttrs(axis), name=""))
        made = _tensors(n, body(*now, *parts))
        return None, made[: len(states)], made[len(states) :]

    return run(n, _tensors(n, states), step, trips, length, None)


def run(
    n: OnnxNode,
    states: Sequence[Value],
    step: Step,
    trips: Value | None,
    most: Expr | None,
    start: Value | None,
    told: bool = False,
) -> tuple[Value, ...]:
    """The last states and the stacked rows of a loop.

    trips: the number of iterations unless the condition ends it before; most: it as an expression,
    which may be larger if `told` by the value of an input.
    """
    around = n.around()
    own = [type_of(s) for s in states]
    growing, (going, made, rows) = _growth(n, own, step)
    sizes = {at: _most(n, own, at, by, most) for at, by in growing.items()}
    for row in rows:
        if any(isinstance(s, Dim) and s.name.startswith("growing.")
               for e in type_of(row).shape for s in free_vars(e)):  # fmt: skip
            n.fail(f"the rows of this {n.op_type} differ in size from one iteration to the next")
    if rows and most is None:
        n.fail(
            f"nothing limits the number of rows that this {n.op_type} stacks",
            "give it a trip count that is a constant or an input of the model",
        )
    k = Input("k", TensorType((), int64))
    counts = [Input(f"n{j}", TensorType((), int64)) for j in range(len(sizes))]
    full = [Input(f"s{j}", _grown(t, j, sizes)) for j, t in enumerate(own)]
    # Again, now with the parameters that the loop really has.
    going, made, rows = step(k, _cut(n, full, counts, sizes))
    new_counts = [size_value(n, type_of(made[j]).shape[axis]) for j, axis in sizes]
    following = n.apply(el.add, k, n.constant(1, np.int64), name="")
    again = _both(n, going, None if trips is None else _less(n, following, trips))
    results = [again, following, *new_counts, *_padded(n, made, sizes), *rows]
    params = (k, *counts, *full)
    captured, (body,) = _closed([results], [params], around, hoist=True)
    zero = n.constant(0, np.int64)
    first = _both(n, start, None if trips is None else _less(n, zero, trips))
    given = [zero, *[size_value(n, own[j].shape[axis]) for j, axis in sizes]]
    given += _padded(n, states, sizes)
    iteration = n.dim(f"{n.loc.name}.iteration", None).name
    room: Expr = most if rows and most is not None else ZERO
    exact = _always(n, going) and _always(n, start)
    if exact and trips is None:
        n.fail(f"this {n.op_type} never ends", "give it a trip count or a condition")
    known = const_int(most) if most is not None and exact else None
    attrs = ct.LoopAttrs(body, len(params), iteration, room, 1 if known is None else known)
    found = items(n.apply(ct.loop, first, *given, *captured, attrs=attrs, name=""))
    done, ends = found[0], found[1 : 1 + len(counts)]
    last = _cut(n, found[1 + len(counts) : len(params)], ends, sizes)
    stacks: Sequence[Value] = found[len(params) :]
    if told or not exact:
        stacks = [_head(n, s, done, 0, room) for s in stacks]
    return (*last, *stacks)


def _growth(n: OnnxNode, own: Sequence[TensorType], step: Step) -> tuple[dict[Place, Expr], Any]:
    """How much each size of a state grows in an iteration, where it changes; and the last step."""
    growing: dict[Place, Dim] = {}
    while True:
        inputs = [
            Input(f"s{j}", TensorType(
                tuple(growing.get((j, axis), s) for axis, s in enumerate(t.shape)), t.dtype))
            for j, t in enumerate(own)
        ]  # fmt: skip
        taken = step(Input("k", TensorType((), int64)), inputs)
        before = set(growing)
        by: dict[Place, Expr] = {}
        for j, (old, new) in enumerate(zip(inputs, taken[1], strict=True)):
            for axis, (s, t) in enumerate(_axes(n, old.type, type_of(new))):
                if _same(s, t):
                    continue
                if (j, axis) not in growing:
                    growing[j, axis] = Dim(f"growing.{n.loc.name}.{j}.{axis}", 0, None)
                by[j, axis] = Arith().simplify(t - s)
        if before == set(growing):
            return {at: by.get(at, ZERO) for at in growing}, taken


def _most(n: OnnxNode, own: Sequence[TensorType], at: Place, by: Expr, most: Expr | None) -> Expr:
    """The largest size of a state that grows by `by` in each iteration."""
    start = own[at[0]].shape[at[1]]
    if any(isinstance(v, Dim) and v.name.startswith("growing.") for v in free_vars(by)):
        n.fail(f"state {at[0]} of this {n.op_type} grows by {by} along axis {at[1]}, "
               "not by the same number in each iteration")  # fmt: skip
    if const_int(by) is not None and const_int(by) <= 0:  # type: ignore[operator]
        return start
    if most is None:
        n.fail(
            f"state {at[0]} of this {n.op_type} grows, and nothing limits how often",
            "give it a trip count that is a constant or an input of the model",
        )
    return Arith().simplify(start + by * most)


# ---- sizes that differ --------------------------------------------------------------------------
def _axes(n: OnnxNode, a: TensorType, b: TensorType) -> list[tuple[Expr, Expr]]:
    if a.dtype is not b.dtype or a.rank != b.rank:
        n.fail(f"a result of this {n.op_type} is {a} in one case and {b} in another")
    return list(zip(a.shape, b.shape, strict=True))


def _same(a: Expr, b: Expr) -> bool:
    return a is b or Arith().simplify(a - b) is ZERO


def _grown(t: TensorType, j: int, sizes: dict[Place, Expr]) -> TensorType:
    return TensorType(tuple(sizes.get((j, axis), s) for axis, s in enumerate(t.shape)), t.dtype)


def _padded(n: OnnxNode, values: Sequence[Value], sizes: dict[Place, Expr]) -> list[Value]:
    """The values with the sizes named brought to their largest."""
    made = list(values)
    for (k, axis), most in sizes.items():
        t = type_of(made[k])
        more = [ZERO] * t.rank
        more[axis] = Arith().simplify(most - t.shape[axis])
        attrs = padding.PadAttrs((0,) * t.rank, tuple(more))
        made[k] = n.apply(padding.pad, made[k], attrs=attrs, name="")
    return made


def _cut(
    n: OnnxNode, values: Sequence[Value], counts: Sequence[Value], sizes: dict[Place, Expr]
) -> list[Value]:
    """The parts that count, `_padded` undone."""
    made = list(values)
    for ((k, axis), most), count in zip(sizes.items(), counts, strict=True):
        made[k] = _head(n, made[k], count, axis, most)
    return made


def _head(n: OnnxNode, x: Value, count: Value, axis: int, most: Expr) -> Value:
    dim = n.dim(f"{n.loc.name}.size", const_int(most))
    return n.apply(cn.head, x, count, attrs=cn.HeadAttrs(dim, most, axis), name="")


def size_value(n: OnnxNode, size: Expr) -> Value:
    """A size as a value, int64[]."""
    line = n.apply(sh.shape_, attrs=sh.ShapeAttrs(values=(size,)), name="")
    return n.apply(sh.squeeze, line, attrs=sh.SqueezeAttrs((0,)), name="")


# ---- conditions ---------------------------------------------------------------------------------
def _scalar(n: OnnxNode, x: Value) -> Value:
    if not type_of(x).rank:
        return x
    return n.apply(sh.reshape, x, attrs=sh.ReshapeAttrs(()), name="")


def _flag(n: OnnxNode, x: Value) -> Value:
    if type_of(x).dtype is not bool_:
        n.fail(f"the condition of this {n.op_type} is {type_of(x)}, not bool")
    return _scalar(n, x)


def _always(n: OnnxNode, condition: Value | None) -> bool:
    known = None if condition is None else n.values.of(condition)
    return condition is None or (known is not None and bool(known.all()))


def _both(n: OnnxNode, a: Value | None, b: Value | None) -> Value:
    """a and b; what is not there holds."""
    given = [_flag(n, x) for x in (a, b) if x is not None and not _always(n, x)]
    if len(given) == 2:
        return n.apply(el.logical_and, *given, name="")
    return given[0] if given else n.constant(True)


def _less(n: OnnxNode, a: Value, b: Value) -> Value:
    return n.apply(el.less, a, b, name="")


# ---- functions ----------------------------------------------------------------------------------
def _tensors(n: OnnxNode, values: Sequence[Any]) -> list[Value]:
    for v in values:
        if not isinstance(v, Value):
            n.fail(f"{n.op_type} that data decides holds {v or 'nothing'}, which is not a tensor")
    return list(values)


def _closed(
    bodies: Sequence[Sequence[Value]],
    params: Sequence[Sequence[Input]],
    around: Sequence[Value],
    hoist: bool,
) -> tuple[list[Value], list[Function]]:
    """The values that some graphs read from around them, and the graphs as Functions of these.

    around: values that exist outside. hoist: what depends on no parameter is computed outside.
    """
    outside = {id(v) for v in topological(around)}
    own = {id(p) for ps in params for p in ps}
    captured: dict[int, Value] = {}
    for results in bodies:
        varying = set(own)
        for v in topological(results):
            if any(id(o) in varying for o in operands(v)):
                varying.add(id(v))
        stack, seen = list(results), set(own)
        while stack:
            v = stack.pop()
            if id(v) in seen or isinstance(v, Constant):
                continue
            seen.add(id(v))
            owner = v.tuple if isinstance(v, Item) else v
            free = id(owner) in outside or (hoist and id(v) not in varying)
            single = isinstance(v.type, TensorType)  # type: ignore[attr-defined]
            # Sizes are expressions of dimensions, which need not be passed in.
            if free and single and content_of(v) is None:
                captured.setdefault(id(v), v)
            else:
                stack.extend(operands(v))
    functions = []
    for results, ps in zip(bodies, params, strict=True):
        inputs = {key: Input(f"c{j}", type_of(v)) for j, (key, v) in enumerate(captured.items())}

        def change(v: Value, args: Any, inputs: dict[int, Input] = inputs) -> Value | None:
            return inputs.get(id(v))

        whole = Function("body", (), tuple(results))
        done = rebuild(whole, change)
        functions.append(dataclasses.replace(done, params=(*ps, *inputs.values())))
    return list(captured.values()), functions
