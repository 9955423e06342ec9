"""Reference semantics in numpy: of tensor expressions, and of graphs node by node.

    evaluate([y], {x: array}, {"batch": 2})     the values of te tensors: index variables become
                                                broadcast ranges, a Load fancy indexing
    run_reference(fn, {"input": array})         a graph through the operators' numpy references

A Load checks its indices where it is selected and raises IndexError when they leave the tensor.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from .. import te
from ..errors import InternalError, RunError
from ..ir import interp
from ..ir.arith import dims_of, evaluate_int
from ..ir.expr import (
    Binary,
    Call,
    Cast,
    Const,
    Dim,
    Expr,
    Load,
    Reduce,
    Select,
    Var,
    walk,
)
from ..ir.graph import (
    Apply,
    Constant,
    Function,
    Item,
    applies,
    nested_functions,
    topological,
)
from ..ir.op import Counted
from ..ir.tir import Buffer, PrimFunc, Store
from ..ir.types import DType
from .pairs import np_multiplied
from .scatter import over

Array = np.ndarray


# ---- scalar functions ---------------------------------------------------------------------------
_math_erf = np.frompyfunc(math.erf, 1, 1)


def erf(x: Array) -> Array:
    """The error function; computed in float64."""
    return np.asarray(_math_erf(np.asarray(x, dtype=np.float64)), dtype=np.float64).astype(x.dtype)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) without overflow."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e)).astype(x.dtype)


def maxnum(a: Array, b: Array) -> Array:
    """The greater one of each pair; a where b is NaN."""
    return np.where(b > a, b, a)


def truncated_div(a: Array, b: Array) -> Array:
    """Integer division toward zero."""
    q = np.floor_divide(a, b)
    return (q + ((np.remainder(a, b) != 0) & ((a < 0) != (b < 0)))).astype(q.dtype)


_CALLS: dict[str, Callable[..., Array]] = {
    "exp": np.exp, "log": np.log, "tanh": np.tanh, "erf": erf, "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x), "floor": np.floor, "ceil": np.ceil, "round": np.rint,
    "trunc": np.trunc, "abs": np.abs, "sin": np.sin, "cos": np.cos, "tan": np.tan,
    "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan, "sinh": np.sinh, "cosh": np.cosh,
    "asinh": np.arcsinh, "acosh": np.arccosh, "atanh": np.arctanh, "log1p": np.log1p,
    "expm1": np.expm1, "exp_nonpositive": np.exp, "dot_pairs": partial(np_multiplied, np.multiply),
    "sigmoid": sigmoid, "isnan": np.isnan, "isinf": np.isinf, "not": np.logical_not,
}  # fmt: skip
_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "floordiv": np.floor_divide,
    "mod": np.remainder, "min": np.minimum, "max": np.maximum, "maxnum": maxnum, "pow": np.power,
    "lt": np.less, "le": np.less_equal, "eq": np.equal, "ne": np.not_equal,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "shl": np.left_shift, "shr": np.right_shift,
}  # fmt: skip
_REDUCE: dict[str, np.ufunc] = {
    "sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum,
    "and": np.bitwise_and, "or": np.bitwise_or, "maxnum": np.fmax,
}  # fmt: skip


# ---- tensor expressions -------------------------------------------------------------------------
def evaluate(
    results: Sequence[te.Tensor], feeds: Mapping[te.Tensor, Array], dims: Mapping[str, int]
) -> list[Array]:
    """The values of `results`, given those of the placeholders and the symbolic dimensions.

    Raises IndexError where a selected Load leaves its tensor.
    """
    values: dict[te.Tensor, Array] = dict(feeds)
    with np.errstate(all="ignore"):
        for t in te.closure(results):
            if t not in values:
                if t.source is not None:
                    run = _scan if isinstance(t.source, te.Scan) else _extern
                    values.update(run(t.source, values, dims))  # type: ignore[arg-type]
                    continue
                if t.body is None:
                    raise InternalError(f"no value was given for the placeholder {t}")
                values[t] = _tensor(t, values, dims)
    return [values[t] for t in results]


def _extern(
    source: te.Extern, values: Mapping[te.Tensor, Array], dims: Mapping[str, int]
) -> dict[te.Tensor, Array]:
    """The outputs of an extern: its statement, interpreted."""
    names = itertools.count()
    buffers = [
        Buffer(f"b{k}", t.dtype, t.shape) for k, t in enumerate((*source.inputs, *source.outputs))
    ]
    ins, outs = buffers[: len(source.inputs)], buffers[len(source.inputs) :]

    def fresh(stem: str) -> Var:
        return Var(f"{stem}{next(names)}")

    phases = [source.build(ins, outs, fresh)]
    if source.changes:
        start = over(ins[0].shape, fresh, lambda *i: Store(outs[0], i, Load(ins[0], i)))
        phases.insert(0, start)
    used = tuple(dims_of(s for b in buffers for s in b.shape))
    func = PrimFunc(source.name, tuple(buffers), len(outs), used, (), tuple(phases))
    results = interp.run(func, [values[t] for t in source.inputs], dims)
    return dict(zip(source.outputs, results, strict=True))


def _scan(
    scan: te.Scan, values: Mapping[te.Tensor, Array], dims: Mapping[str, int]
) -> dict[te.Tensor, Array]:
    """The histories of a recurrence, step by step."""
    local = dict(values)
    now = [local[x] if x.body is None else _tensor(x, local, dims) for x in scan.init]
    histories = [[x] for x in now]
    for t in range(evaluate_int(scan.steps, dims)):
        local.update(zip(scan.prev, now, strict=True))
        for x in scan.stages:
            local[x] = _tensor(x, local, dims, {scan.t: np.asarray(t)})
        now = [local[x] for x in scan.next]
        for history, value in zip(histories, now, strict=True):
            history.append(value)
    return {h: np.stack(x) for h, x in zip(scan.outputs, histories, strict=True)}


def _tensor(
    t: te.Tensor,
    values: Mapping[te.Tensor, Array],
    dims: Mapping[str, int],
    known: Mapping[Expr, Array] | None = None,
) -> Array:
    body = t.body
    assert body is not None
    extents = [evaluate_int(s, dims) for s in t.shape]
    axes: list[Expr] = list(t.axes)
    if isinstance(body, Reduce):
        axes += body.axes
        extents += [evaluate_int(e, dims) for e in body.extents]
    rank = len(axes)
    env: dict[Expr, Array] = dict(known or {})
    for k, (axis, n) in enumerate(zip(axes, extents, strict=True)):
        env[axis] = np.arange(n).reshape((1,) * k + (n,) + (1,) * (rank - k - 1))
    inner = body.body if isinstance(body, Reduce) else body
    full = np.broadcast_to(_Grid(env, values, dims, t.name).at(inner, None), extents)
    if isinstance(body, Reduce):
        over = tuple(range(len(t.axes), rank))
        ufunc = _REDUCE[body.combiner]
        # maximum and minimum have no identity of their own; an empty range is never reduced.
        options: dict[str, Any] = {"dtype": full.dtype} if body.combiner in ("sum", "prod") else {}
        full = ufunc.reduce(full, axis=over, **options)
    return np.array(full, dtype=t.dtype.numpy)


class _Grid:
    """The expressions of one tensor over its whole index grid."""

    def __init__(
        self,
        env: Mapping[Expr, Array],
        values: Mapping[te.Tensor, Array],
        dims: Mapping[str, int],
        name: str,
    ) -> None:
        self.env, self.values, self.dims, self.name = env, values, dims, name
        self.memo: dict[tuple[Expr, int], Array] = {}
        self.kept: list[Array] = []  # keeps masks alive, since their ids are part of memo keys

    def at(self, e: Expr, active: Array | None) -> Array:
        """The value of `e`; only the places where `active` (None: all) are looked at."""
        key = (e, id(active))
        found = self.memo.get(key)
        if found is None:
            found = self.memo[key] = self._compute(e, active)
        return found

    def _compute(self, e: Expr, active: Array | None) -> Array:
        if isinstance(e, Const):
            return np.asarray(e.value, dtype=e.dtype.numpy)
        if isinstance(e, Var):
            return self.env[e]
        if isinstance(e, Dim):
            return np.asarray(self.dims[e.name], dtype=np.int64)
        if isinstance(e, Select):
            cond = self.at(e.cond, active)
            yes = cond if active is None else cond & active
            no = ~cond if active is None else ~cond & active
            self.kept += [yes, no]
            return np.where(cond, self.at(e.a, yes), self.at(e.b, no))
        if isinstance(e, Load):
            return self._load(e, active)
        if isinstance(e, Binary):
            return self._binary(e.op, self.at(e.a, active), self.at(e.b, active), e.a.dtype)
        if isinstance(e, Cast):
            a = self.at(e.a, active)
            return a.astype(e.dtype.numpy)
        if isinstance(e, Call):
            args = [self.at(a, active) for a in e.args]
            if e.fn == "bitcast":
                return np.ascontiguousarray(args[0]).view(e.dtype.numpy).reshape(args[0].shape)
            return np.asarray(_CALLS[e.fn](*args), dtype=e.dtype.numpy)
        raise InternalError(f"a tensor expression holds {type(e).__name__}: {e}")

    def _binary(self, op: str, a: Array, b: Array, dtype: DType) -> Array:
        if op == "div":
            return truncated_div(a, b) if dtype.is_int else np.asarray(a / b, dtype=a.dtype)
        if op == "pow" and dtype.is_int:
            b = np.maximum(b, 0)
        return np.asarray(_BINARY[op](a, b))

    def _load(self, e: Load, active: Array | None) -> Array:
        x = self.values[e.buffer]
        where = []
        for axis, index in enumerate(e.indices):
            i = self.at(index, active)
            size = x.shape[axis]
            bad = (i < 0) | (i >= size)
            if active is not None:
                bad = bad & active
            if bad.any():
                at = int(np.broadcast_to(i, bad.shape)[bad].reshape(-1)[0])
                raise IndexError(f"{self.name}: {at} in {e} leaves axis {axis} of size {size}")
            where.append(np.clip(i, 0, max(size - 1, 0)))
        if x.size == 0:
            shape = np.broadcast_shapes(*(w.shape for w in where))
            return np.zeros(shape, x.dtype)
        return x[tuple(where)] if where else x


# ---- graphs -------------------------------------------------------------------------------------
def run_reference(fn: Function, feeds: Mapping[str, Array] | Sequence[Array]) -> list[Array]:
    """The results of a graph for numpy inputs, by name or in order.

    Raises RunError where an input does not fit the type of its parameter.
    """
    if isinstance(feeds, Mapping):
        missing = [p.name for p in fn.params if p.name not in feeds]
        if missing:
            raise RunError(f"{fn.name}: no value was given for {', '.join(missing)}")
        arrays = [np.asarray(feeds[p.name]) for p in fn.params]
    else:
        arrays = [np.asarray(a) for a in feeds]
    return _run(fn, arrays, {})


def _run(fn: Function, arrays: Sequence[Array], outer: Mapping[str, int]) -> list[Array]:
    dims = dict(outer)
    values: dict[int, Any] = {}
    for p, a in zip(fn.params, arrays, strict=True):
        if a.ndim != p.type.rank or a.dtype != p.type.dtype.numpy:
            raise RunError(f"{fn.name}: {p.name} is {p.type}, got {a.dtype}{list(a.shape)}")
        for size, got in zip(p.type.shape, a.shape, strict=True):
            if isinstance(size, Dim):
                dims.setdefault(size.name, got)
        values[id(p)] = a
    # A node may use a counted size without reading what tells it, so these come first.
    counted = [v for v in applies(fn) if isinstance(v.attrs, Counted)]
    for v in topological((*counted, *fn.results)):
        if isinstance(v, Constant):
            values[id(v)] = v.data
        elif isinstance(v, Item):
            values[id(v)] = values[id(v.tuple)][v.index]
        elif isinstance(v, Apply):
            args = [None if a is None else values[id(a)] for a in v.args]
            if isinstance(v.attrs, Counted) and isinstance(v.attrs.dim, Dim):
                dims[v.attrs.dim.name] = max(
                    int(values[id(v.args[-1])].reshape(-1)[0]), v.attrs.dim.lo
                )
            if isinstance(v.op, Function):
                got = _run(v.op, [a for a in args if a is not None], dims)
                values[id(v)] = got[0] if len(got) == 1 else tuple(got)
            else:
                more = []
                if nested_functions(v.attrs):
                    more.append(lambda f, xs: _run(f, xs, dims))
                with np.errstate(all="ignore"):
                    values[id(v)] = v.op.reference(*args, bind_attrs(v.attrs, dims), *more)
    return [values[id(r)] for r in fn.results]


def bind_attrs(attrs: Any, dims: Mapping[str, int]) -> Any:
    """Attributes with numbers for index expressions. Raises KeyError for a dim without a value."""
    return map_sizes(attrs, lambda size: evaluate_int(size, dims))


def map_sizes(attrs: Any, change: Callable[[Expr], Any]) -> Any:
    """Attributes with change(size) for each size that is an expression."""
    fields = {f.name: getattr(attrs, f.name) for f in dataclasses.fields(attrs)}
    mapped = {k: _map_size(v, change) for k, v in fields.items()}
    same = all(mapped[k] is fields[k] for k in fields)
    return attrs if same else dataclasses.replace(attrs, **mapped)


def _map_size(value: Any, change: Callable[[Expr], Any]) -> Any:
    if isinstance(value, Expr):
        return change(value)
    if isinstance(value, tuple) and any(isinstance(v, Expr) for v in value):
        return tuple(_map_size(v, change) for v in value)
    return value


def is_symbolic(attrs: Any) -> bool:
    """True when attributes mention a symbolic dimension, so that they need `bind_attrs` first."""
    for field in dataclasses.fields(attrs):
        value = getattr(attrs, field.name)
        for v in value if isinstance(value, tuple) else (value,):
            if isinstance(v, Expr) and any(isinstance(x, Dim | Var) for x in walk(v)):
                return True
    return False
