"""The rules of the IR, checked: raises VerifyError with the offending line marked.

    VerifyError: `relu` is typed float32[2], its type rule gives float32[3]
      in net, from Relu "act"
        > %1 = relu(%0) : float32[2]
A Function that passes has typed, defined, acyclic values; passes rely on it and keep it.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import ShapeError, VerifyError
from .arith import Arith
from .expr import Dim, Expr, walk
from .graph import (
    Apply,
    Constant,
    Function,
    Input,
    Item,
    Value,
    arg_of,
    function_dims,
    layout_of,
    operands,
)
from .layout import IndexMap
from .text import function_lines
from .types import Loc, TensorType

_CONTEXT = 3  # lines of excerpt before and after the marked one


def verify_function(fn: Function) -> None:
    """Checks one graph function and the fused functions in it. Raises VerifyError."""
    order = _ordered(fn)
    _check_params(fn, order)
    if len(fn.result_names) not in (0, len(fn.results)):
        raise VerifyError(
            f"{len(fn.results)} results have {len(fn.result_names)} names", where=fn.name
        )
    arith = Arith()
    checked: set[int] = set()
    for v in order:
        if isinstance(v, Apply):
            _check_apply(fn, v, arith)
            if isinstance(v.op, Function) and id(v.op) not in checked:
                checked.add(id(v.op))
                verify_function(v.op)
        elif isinstance(v, Item):
            types = v.tuple.type
            if isinstance(types, TensorType):
                raise _error(fn, v.tuple, f"item {v.index} is taken of a value with one result")
            if not 0 <= v.index < len(types):
                raise _error(fn, v.tuple, f"item {v.index} is taken of {len(types)} results")
        elif isinstance(v, Constant | Input):
            _check_layouts(fn, v, (v.type,), (v.layout,))
    for r in fn.results:
        if isinstance(r, Apply) and not isinstance(r.type, TensorType):
            raise _error(fn, r, "a tuple is returned as one result; take its items")


def _ordered(fn: Function) -> list[Value]:
    """Topological order; raises on a cycle, which `topological` could not survive."""
    order: list[Value] = []
    state: dict[int, int] = {}  # 1: being visited, 2: done
    stack: list[tuple[Value, bool]] = [(r, False) for r in reversed(fn.results)]
    while stack:
        v, leaving = stack.pop()
        if leaving:
            state[id(v)] = 2
            order.append(v)
            continue
        if state.get(id(v)):
            continue
        if not isinstance(v, Input | Constant | Apply | Item):
            raise VerifyError(f"{type(v).__name__} is not a value", where=fn.name)
        state[id(v)] = 1
        stack.append((v, True))
        for o in reversed(operands(v)):
            if state.get(id(o)) == 1:
                locs = v.locs if isinstance(v, Apply) else ()
                raise VerifyError(f"{_title(v)} depends on itself", locs, where=fn.name)
            stack.append((o, False))
    return order


def _check_params(fn: Function, order: Iterable[Value]) -> None:
    names: set[str] = set()
    for p in fn.params:
        if p.name in names:
            raise VerifyError(f"two parameters are named {p.name!r}", where=fn.name)
        names.add(p.name)
    dims: dict[str, Dim] = {}
    for d in function_dims(fn):
        if dims.setdefault(d.name, d) is not d:
            raise VerifyError(f"two dims named {d.name!r} have different ranges", where=fn.name)
    known = {id(p) for p in fn.params}
    for v in order:
        if isinstance(v, Input) and id(v) not in known:
            raise VerifyError(f"input {v.name!r} is used but is not a parameter", where=fn.name)


def _check_apply(fn: Function, v: Apply, arith: Arith) -> None:
    types = v.type if isinstance(v.type, tuple) else (v.type,)
    if len(v.contents) != len(types) or len(v.layouts) != len(types):
        raise _error(
            fn, v, f"{len(types)} results have {len(v.contents)} contents, {len(v.layouts)} layouts"
        )
    for a in v.args:
        if isinstance(a, Apply) and not isinstance(a.type, TensorType):
            raise _error(
                fn, v, f"{_title(a)} has several results and is read as one; take its items"
            )
    _check_layouts(fn, v, types, v.layouts)
    for t, content in zip(types, v.contents, strict=True):
        if content is not None and content.shape != tuple(getattr(s, "value", -1) for s in t.shape):
            raise _error(fn, v, f"the known value has shape {content.shape}, the type is {t}")
    if isinstance(v.op, Function):
        _check_call(fn, v, v.op, types, arith)
        return
    if not isinstance(v.attrs, v.op.attrs):
        raise _error(
            fn,
            v,
            f"attributes of `{v.op.name}` are {type(v.attrs).__name__}, not {v.op.attrs.__name__}",
        )
    try:
        inferred = v.op.infer(*(None if a is None else arg_of(a) for a in v.args), v.attrs)
    except ShapeError as e:
        raise _error(
            fn, v, f"the type rule of `{v.op.name}` refuses its arguments: {e.message}"
        ) from e
    again = inferred if isinstance(inferred, tuple) else (inferred,)
    minted = _dims(again) - _dims(_argument_types(v))
    for have, want in zip(types, again, strict=False):
        if not _agree(have, want, arith, minted):
            raise _error(fn, v, f"`{v.op.name}` is typed {have}, its type rule gives {want}")
    if len(types) != len(again):
        raise _error(
            fn, v, f"`{v.op.name}` has {len(types)} results, its type rule gives {len(again)}"
        )


def _check_call(
    fn: Function, v: Apply, op: Function, types: tuple[TensorType, ...], arith: Arith
) -> None:
    """An Apply of a fused Function: arguments and results agree with it, layouts included."""
    if len(v.args) != len(op.params) or len(types) != len(op.results):
        raise _error(
            fn,
            v,
            f"`{op.name}` takes {len(op.params)} and returns {len(op.results)} values, "
            f"here {len(v.args)} and {len(types)}",
        )
    for a, p in zip(v.args, op.params, strict=True):
        if a is None:
            raise _error(fn, v, f"argument {p.name!r} of `{op.name}` is absent")
        have = arg_of(a).type
        if not _agree(have, p.type, arith, set()):
            raise _error(fn, v, f"argument {p.name!r} of `{op.name}` is {have}, expected {p.type}")
        if layout_of(a) != p.layout:
            raise _error(fn, v, f"argument {p.name!r} of `{op.name}` has another layout")
    for k, (t, r) in enumerate(zip(types, op.results, strict=True)):
        if not _agree(t, arg_of(r).type, arith, set()):
            raise _error(fn, v, f"result {k} of `{op.name}` is {arg_of(r).type}, typed {t}")
        if layout_of(r) != v.layouts[k]:
            raise _error(fn, v, f"result {k} of `{op.name}` has another layout")


def _check_layouts(
    fn: Function, v: Value, types: tuple[TensorType, ...], layouts: tuple[IndexMap | None, ...]
) -> None:
    for t, m in zip(types, layouts, strict=True):
        if m is not None and m.rank != t.rank:
            raise _error(fn, v, f"a layout of rank {m.rank} is on {t}")


def _argument_types(v: Apply) -> tuple[TensorType, ...]:
    return tuple(arg_of(a).type for a in v.args if a is not None)


def _dims(types: Iterable[TensorType]) -> set[Expr]:
    return {d for t in types for s in t.shape for d in walk(s) if isinstance(d, Dim)}


def _agree(have: TensorType, want: TensorType, arith: Arith, minted: set[Expr]) -> bool:
    """Equal types. A dim minted by the type rule (NonZero) is a new one each time it is asked."""
    if have.dtype is not want.dtype or have.rank != want.rank:
        return False
    return all(
        a is b or arith.simplify(a - b) is arith.simplify(b - b) or not minted.isdisjoint(_walk(b))
        for a, b in zip(have.shape, want.shape, strict=True)
    )


def _walk(e: Expr) -> set[Expr]:
    return set(walk(e))


def _title(v: Value) -> str:
    if isinstance(v, Apply):
        return f"`{v.op.name}`" + (f" {v.name!r}" if v.name else "")
    return f"{type(v).__name__.lower()} {getattr(v, 'name', '')!r}"


def _error(fn: Function, v: Value, message: str) -> VerifyError:
    """The error with the lines around `v`, its own marked."""
    lines = function_lines(fn)
    at = next((k for k, (_, node) in enumerate(lines) if node is v), None)
    excerpt = ""
    if at is not None:
        near = range(max(0, at - _CONTEXT), min(len(lines), at + _CONTEXT + 1))
        excerpt = "\n".join(("> " if k == at else "  ") + lines[k][0] for k in near)
    locs: tuple[Loc, ...] = v.locs if isinstance(v, Apply | Constant) else ()
    return VerifyError(message, locs, excerpt, where=fn.name)
