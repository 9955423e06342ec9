"""The high-level IR: a dataflow graph in Relay's vocabulary, without let, closures or ADTs.

    x = Input("x", TensorType((n, Const(784)), float32))
    w = Constant(array, "fc.weight")
    y = apply(matmul, x, w, locs=(Loc("fc", "mlp.onnx", 1, "MatMul"),))
    fn = Function("mlp", (x,), (y,))

Five node kinds: Input, Constant, Apply, Item, Function. A Function is also what fusion makes:
an Apply whose `op` is a Function with `fused=True` is one kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import InternalError, ShapeError
from .expr import (
    Binary,
    Const,
    Dim,
    Expr,
    Select,
    Var,
    maximum,
    minimum,
    rewrite,
    walk,
    wrapped,
)
from .layout import IndexMap
from .node import Node, node
from .op import Arg, NoAttrs, Op
from .types import Loc, TensorType, bool_, dtype_of, index

CONTENT_LIMIT = 64  # integer tensors of up to this many elements carry their value as expressions


@node
class Value(Node):
    """What an Apply takes: Input, Constant, Apply with one result, or Item."""


@node
class Input(Value):
    """A parameter of a Function, under the model's own name."""

    name: str
    type: TensorType
    layout: IndexMap | None = None


@node
class Constant(Value):
    """A tensor known while compiling. `data` is an ndarray (possibly a memory map), never
    copied."""

    data: np.ndarray
    name: str = ""
    layout: IndexMap | None = None
    locs: tuple[Loc, ...] = ()

    @property
    def type(self) -> TensorType:
        return TensorType(tuple(Const(s) for s in self.data.shape), dtype_of(self.data))


@node
class Apply(Value):
    """An operator (or fused Function) on values. `type` is a tuple when there are several results.

    args may hold None for an optional input that is absent. contents: per result, the value of a
    small integer tensor as an object array of expressions, or None. layouts: per result.
    """

    op: Op | Function
    args: tuple[Value | None, ...]
    attrs: Any
    type: TensorType | tuple[TensorType, ...]
    locs: tuple[Loc, ...] = ()
    contents: tuple[np.ndarray | None, ...] = (None,)
    layouts: tuple[IndexMap | None, ...] = (None,)
    name: str = ""  # of the first result, after the source model's value names


@node
class Item(Value):
    """One result of an Apply with several."""

    tuple: Apply
    index: int

    @property
    def type(self) -> TensorType:
        types = self.tuple.type
        assert not isinstance(types, TensorType)
        return types[self.index]


@node
class Function(Node):
    """A graph with named parameters and results. Not a value: an Apply refers to it as its `op`."""

    name: str
    params: tuple[Input, ...]
    results: tuple[Value, ...]
    fused: bool = False
    result_names: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()  # why neighbours were not fused, for the stage record


AnyValue = Input | Constant | Apply | Item


# ---- construction -------------------------------------------------------------------------------
def apply(
    op: Op,
    *args: Value | None,
    attrs: Any = None,
    locs: tuple[Loc, ...] = (),
    name: str = "",
) -> Apply:
    """An Apply node with its type and, where possible, its content inferred.

    Raises ShapeError (with `locs`) when the type rule refuses the arguments.
    """
    if attrs is None:
        attrs = op.attrs()
    seen = [None if a is None else arg_of(a) for a in args]
    try:
        if op.absorb is not None:
            kept, attrs = op.absorb(seen, attrs)
            args, seen = args[:kept], seen[:kept]
        types = op.infer(*seen, attrs)
    except ShapeError as e:
        if not e.locs and locs:
            raise type(e)(e.message, locs, e.excerpt, e.hint) from None
        raise
    results = types if isinstance(types, tuple) else (types,)
    for t in results:
        _check_sizes(op, t, locs)
    contents: tuple[np.ndarray | None, ...] = (None,) * len(results)
    if op.shape_math and all(may_have_content(t) for t in results):
        known = [None if a is None else a.content for a in seen]
        if all(a is None or k is not None for a, k in zip(seen, known, strict=True)):
            got = op.reference(*known, attrs)
            if got is not None:
                every = got if isinstance(got, tuple) else (got,)
                contents = tuple(_as_content(g, t) for g, t in zip(every, results, strict=True))
    return Apply(op, tuple(args), attrs, types, locs, contents, (None,) * len(results), name)


def without_choices(size: Expr) -> Expr:
    """A size with choices by comparisons as arithmetic, which a plan can compute: where a slice
    begins may count from either end."""

    def one(e: Expr) -> Expr | None:
        if type(e) is not Select or type(e.cond) is not Binary or e.cond.op not in ("lt", "le"):
            return None
        above = e.cond.b - e.cond.a + int(e.cond.op == "le")
        return e.b + (e.a - e.b) * maximum(minimum(above, 1), 0)

    return rewrite(size, one)


_SIZE_OPERATIONS = ("add", "sub", "mul", "floordiv", "mod", "min", "max")  # see runtime/plan.py


def _check_sizes(op: Op, t: TensorType, locs: tuple[Loc, ...]) -> None:
    """Refuses sizes that are negative, or that no plan can compute."""
    for s in t.shape:
        if type(s) is Const:
            if s.value < 0:
                raise ShapeError(f"{op.name} would make {t}: a size cannot be negative", locs)
        elif not isinstance(s, Dim) and any(
            not isinstance(e, Dim | Var | Const)
            and not (type(e) is Binary and e.op in _SIZE_OPERATIONS)
            for e in walk(without_choices(s))
        ):
            raise ShapeError(
                f"{op.name} would make {t}: such a size cannot be computed at run time",
                locs,
                hint="give the dimensions it depends on a value: dims={...}",
            )


def arg_of(value: Value) -> Arg:
    """What type rules see of a value."""
    return Arg(type_of(value), content_of(value))


def type_of(value: Value) -> TensorType:
    """The type of a single value. Raises InternalError for an Apply with several results."""
    t = value.type  # type: ignore[attr-defined]
    if not isinstance(t, TensorType):
        raise InternalError(f"a tuple-valued {value.op} is used as one tensor")  # type: ignore[attr-defined]
    return t


def layout_of(value: Value) -> IndexMap | None:
    """How a value lies in memory; None: row-major."""
    if isinstance(value, Apply):
        return value.layouts[0]
    if isinstance(value, Item):
        return value.tuple.layouts[value.index]
    assert isinstance(value, Input | Constant)
    return value.layout


def content_of(value: Value) -> np.ndarray | None:
    """The value of a small integer tensor as an object array of expressions, if known."""
    if isinstance(value, Apply):
        return value.contents[0]
    if isinstance(value, Item):
        return value.tuple.contents[value.index]
    if (
        isinstance(value, Constant)
        and value.data.size <= CONTENT_LIMIT
        and value.data.dtype.kind in "iub"
    ):
        return _as_content(value.data, value.type)
    return None


def may_have_content(t: TensorType) -> bool:
    """A tensor of few integers or bools, such as shapes are."""
    if not (t.dtype.is_int or t.dtype.is_bool) or not all(type(s) is Const for s in t.shape):
        return False
    count = 1
    for s in t.shape:
        count *= s.value  # type: ignore[attr-defined]
    return count <= CONTENT_LIMIT


def _as_content(items: Any, t: TensorType) -> np.ndarray | None:
    """Numbers or expressions as the content of a tensor of type `t` (bools stay bools).

    Numbers wrap as those of the type do. None where one does not fit 64 bits with a sign, or where
    an expression could wrap: sizes fit 32 bits, not fewer.
    """
    shape: tuple[int, ...] = tuple(s.value for s in t.shape)  # type: ignore[attr-defined]
    out: Any = np.empty(shape, dtype=object)
    kind = bool_ if t.dtype.is_bool else index
    for k, v in enumerate(np.asarray(items).reshape(-1)):
        if isinstance(v, Expr) and not isinstance(v, Const):
            if t.dtype.is_int and not (t.dtype.is_signed and t.dtype.bits >= 32):
                return None
            out.reshape(-1)[k] = v
            continue
        number = v.value if isinstance(v, Const) else v
        if t.dtype.is_int:
            number = wrapped(int(number), t.dtype)
            if number != wrapped(number, index):
                return None
        out.reshape(-1)[k] = Const(number, kind)
    return out


# ---- traversal ----------------------------------------------------------------------------------
def operands(value: Value) -> tuple[Value, ...]:
    """The values a node reads, absent optional ones left out."""
    if isinstance(value, Apply):
        return tuple(a for a in value.args if a is not None)
    if isinstance(value, Item):
        return (value.tuple,)
    return ()


def topological(results: Sequence[Value]) -> list[Value]:
    """All nodes that the results need, operands first. Iterative: depth is not limited."""
    order: list[Value] = []
    done: set[int] = set()
    stack: list[tuple[Value, bool]] = [(r, False) for r in reversed(results)]
    while stack:
        v, ready = stack.pop()
        if id(v) in done:
            continue
        if ready:
            done.add(id(v))
            order.append(v)
        else:
            stack.append((v, True))
            stack.extend((o, False) for o in reversed(operands(v)) if id(o) not in done)
    return order


def applies(fn: Function) -> Iterator[Apply]:
    """The Apply nodes of a function in topological order."""
    return (v for v in topological(fn.results) if isinstance(v, Apply))


def nested_functions(attrs: Any) -> list[Function]:
    """The Functions in the attributes of a node: what control flow runs."""
    if not dataclasses.is_dataclass(attrs):
        return []
    values = [getattr(attrs, f.name) for f in dataclasses.fields(attrs)]
    return [v for v in values if isinstance(v, Function)]


def every_function(fn: Function) -> list[Function]:
    """A function and those nested in it, at any depth."""
    found = [fn]
    for f in found:  # grows meanwhile
        for v in applies(f):
            found += nested_functions(v.attrs)
    return found


def users(fn: Function) -> dict[int, list[Value]]:
    """id(value) -> the nodes that read it, in topological order (results are not counted)."""
    found: dict[int, list[Value]] = {}
    for v in topological(fn.results):
        for o in operands(v):
            found.setdefault(id(o), []).append(v)
    return found


def rebuild(
    fn: Function, change: Callable[[Value, tuple[Value | None, ...]], Value | None]
) -> Function:
    """A graph pass in one call: nodes in topological order, each with its new operands.

    `change(old, new_args)` returns the replacement, or None to keep the node (with its new
    operands, type inferred again where an operand's type changed).
    """
    new: dict[int, Value] = {}
    for v in topological(fn.results):
        if isinstance(v, Apply):
            args = tuple(None if a is None else new[id(a)] for a in v.args)
            made = change(v, args)
            if made is None:
                made = (
                    v
                    if all(a is b for a, b in zip(args, v.args, strict=True))
                    else with_args(v, args)
                )
        elif isinstance(v, Item):
            source = new[id(v.tuple)]
            made = change(v, (source,))
            if made is None:
                made = v if source is v.tuple else Item(source, v.index)  # type: ignore[arg-type]
        else:
            made = change(v, ()) or v
        new[id(v)] = made
    results = tuple(new[id(r)] for r in fn.results)
    if all(a is b for a, b in zip(results, fn.results, strict=True)):
        return fn
    return dataclasses.replace(fn, results=results)


def with_args(old: Apply, args: tuple[Value | None, ...]) -> Apply:
    """`old` on other operands. The type is inferred again only when an operand's type differs."""

    def same(a: Value | None, b: Value | None) -> bool:
        return a is b or (
            a is not None and b is not None and type_of(a) == type_of(b) and _same_content(a, b)
        )

    if isinstance(old.op, Function) or all(same(a, b) for a, b in zip(args, old.args, strict=True)):
        return old.with_(args=args)
    made = apply(old.op, *args, attrs=old.attrs, locs=old.locs, name=old.name)
    return made.with_(layouts=old.layouts)


def _same_content(a: Value, b: Value) -> bool:
    ca, cb = content_of(a), content_of(b)
    if ca is None or cb is None:
        return ca is cb
    return ca.shape == cb.shape and all(x is y for x, y in zip(ca.flat, cb.flat, strict=True))


def function_dims(fn: Function) -> list[Dim]:
    """The symbolic dimensions of a function's parameters, by name."""
    from .arith import dims_of

    return dims_of(s for p in fn.params for s in p.type.shape)


__all__ = [
    "AnyValue",
    "Apply",
    "Constant",
    "Function",
    "Input",
    "Item",
    "NoAttrs",
    "Value",
    "applies",
    "apply",
    "arg_of",
    "content_of",
    "every_function",
    "function_dims",
    "layout_of",
    "may_have_content",
    "nested_functions",
    "operands",
    "rebuild",
    "topological",
    "type_of",
    "users",
    "with_args",
]
