"""The reference meaning of TIR: runs a PrimFunc by translating it to Python, statement by
statement.

    run(func, [a, b], {"M": 5})   -> [c]      (results as fresh arrays of logical shape)

Slow and strict, for tests at small sizes: every index is checked, uninitialised memory is NaN (or a
wild integer), and parallel loops run in reverse order, so that a result cannot depend on their
order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import InternalError
from .arith import sizes
from .expr import (
    FALSE,
    TRUE,
    Binary,
    Call,
    Cast,
    Const,
    Dim,
    Expr,
    Load,
    Select,
    Var,
)
from .tir import (
    PARALLEL,
    Alloc,
    Block,
    Buffer,
    For,
    If,
    Prefetch,
    PrimFunc,
    Seq,
    Stmt,
    Store,
)
from .types import DTYPE_NAMES, DType


def run(
    func: PrimFunc, inputs: Sequence[np.ndarray], dims: Mapping[str, int] | None = None
) -> list[np.ndarray]:
    """Interprets `func` on numpy inputs of logical shape; returns its results.

    Raises InternalError for an index outside of a buffer.
    """
    env = dict(dims or {})
    arrays: dict[Buffer, np.ndarray] = {}
    count = len(func.params) - func.results
    for buffer, array in zip(func.params[:count], inputs, strict=True):
        room = _fresh(buffer, env)
        room[tuple(slice(0, s) for s in array.shape)] = array
        arrays[buffer] = room
    for buffer in (*func.params[count:], *func.buffers):
        arrays[buffer] = _fresh(buffer, env)
    writer = _Writer(env)
    for phase in func.phases:
        writer.stmt(phase, 1)
    source = f"def kernel({', '.join(['A', *func_dims(func)])}):\n" + "\n".join(
        writer.lines or ["    pass"]
    )
    scope: dict[str, Any] = dict(_LIBRARY, fresh=lambda b: _fresh(b, env), BUFFERS=writer.buffers)
    with np.errstate(all="ignore"):
        exec(compile(source, f"<interpreted {func.name}>", "exec"), scope)
        scope["kernel"](arrays, **{d: env[d] for d in func_dims(func)})
    results = []
    for buffer in func.params[count:]:
        shape = sizes(buffer.shape, env)
        results.append(arrays[buffer][tuple(slice(0, s) for s in shape)].copy())
    return results


def func_dims(func: PrimFunc) -> list[str]:
    return [d.name for d in func.dims]


def _fresh(buffer: Buffer, env: Mapping[str, int]) -> np.ndarray:
    """Memory with room for the padding, filled with a value that would be noticed."""
    room = np.empty(sizes(buffer.padded_shape, env), buffer.dtype.numpy)
    room.fill(np.nan if buffer.dtype.is_float else 1 if buffer.dtype.is_bool else 113)
    return room


class _Writer:
    """Python source for statements and expressions."""

    def __init__(self, env: Mapping[str, int]) -> None:
        self.lines: list[str] = []
        self.buffers: list[Buffer] = []
        self.env = env

    def put(self, depth: int, text: str) -> None:
        self.lines.append("    " * depth + text)

    def stmt(self, s: Stmt, d: int) -> None:
        if isinstance(s, For):
            order = f"range({self.expr(s.extent)})"
            self.put(
                d, f"for {_name(s.var)} in {f'reversed({order})' if s.kind is PARALLEL else order}:"
            )
            self.stmt(s.body, d + 1)
        elif isinstance(s, Seq):
            for x in s.stmts:
                self.stmt(x, d)
            if not s.stmts:
                self.put(d, "pass")
        elif isinstance(s, If):
            self.put(d, f"if {self.expr(s.cond)}:")
            self.stmt(s.then, d + 1)
            if s.orelse is not None:
                self.put(d, "else:")
                self.stmt(s.orelse, d + 1)
        elif isinstance(s, Alloc):
            self.put(d, f"A[{self.buffer(s.buffer)}] = fresh({self.buffer(s.buffer)})")
            self.stmt(s.body, d)
        elif isinstance(s, Block):
            for i in s.iters:
                self.put(d, f"{_name(i.var)} = {self.expr(i.value)}")
            if s.where is not TRUE:
                self.put(d, f"if {self.expr(s.where)}:")
                d += 1
            if s.init is not None:
                first = [f"{_name(i.var)} == 0" for i in s.iters if i.reduce]
                self.put(d, f"if {' and '.join(first) or 'True'}:")
                self.store(s.init, d + 1)
            self.store(s.body, d)
        elif isinstance(s, Prefetch):
            self.put(d, "pass")
        else:
            self.store(s, d)

    def store(self, s: Store, d: int) -> None:
        self.put(
            d, f"put(A[{self.buffer(s.buffer)}], ({self.indices(s.indices)}), {self.expr(s.value)})"
        )

    def buffer(self, b: Buffer) -> str:
        if b not in self.buffers:
            self.buffers.append(b)
        return f"BUFFERS[{self.buffers.index(b)}]"

    def indices(self, indices: Sequence[Expr]) -> str:
        return "".join(self.expr(i) + ", " for i in indices)

    def expr(self, e: Expr) -> str:
        if type(e) is Const:
            if e is TRUE or e is FALSE:
                return str(e.value)
            if e.dtype.name == "int64":
                return f"({e.value})"
            if e.dtype.is_float and not math.isfinite(e.value):
                return f"{_ctor(e.dtype)}('{e.value}')"
            return f"{_ctor(e.dtype)}({e.value!r})"
        if isinstance(e, Var | Dim):
            return _name(e)
        if type(e) is Binary:
            a, b = self.expr(e.a), self.expr(e.b)
            if e.op in _INFIX and not (e.op in ("and", "or") and not e.dtype.is_bool):
                return f"({a} {_INFIX[e.op]} {b})"
            return f"{_BINARY.get(e.op, e.op + '_')}({a}, {b})"
        if type(e) is Cast:
            return f"cast({self.expr(e.a)}, {_ctor(e.dtype)})"
        if type(e) is Select:
            return f"({self.expr(e.a)} if {self.expr(e.cond)} else {self.expr(e.b)})"
        if type(e) is Call and e.fn == "bitcast":
            return f"bitcast({self.expr(e.args[0])}, {_ctor(e.args[0].dtype)}, {_ctor(e.dtype)})"
        if type(e) is Call:
            return f"f_{e.fn}({', '.join(map(self.expr, e.args))})"
        if type(e) is Load:
            got = f"get(A[{self.buffer(e.buffer)}], ({self.indices(e.indices)}))"
            zero = f"{_ctor(e.dtype)}(0)"
            return got if e.mask is None else f"({got} if {self.expr(e.mask)} else {zero})"
        raise InternalError(f"the interpreter does not know {type(e).__name__}")


def _name(v: Expr) -> str:
    return str(v).replace(".", "_").replace("-", "_")


def _ctor(t: DType) -> str:
    return "bool" if t.is_bool else f"T_{t.name}"


_INFIX = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "lt": "<",
    "le": "<=",
    "eq": "==",
    "ne": "!=",
    "and": "and",
    "or": "or",
    "floordiv": "//",
    "mod": "%",
    "shl": "<<",
    "shr": ">>",
}
_BINARY = {
    "min": "minimum", "max": "maximum", "maxnum": "maxnum", "div": "divide", "pow": "power",
}  # fmt: skip


def _get(array: np.ndarray, index: tuple[int, ...]) -> Any:
    for i, n in zip(index, array.shape, strict=True):
        if not 0 <= i < n:
            raise InternalError(f"load at {index} outside of a buffer of shape {array.shape}")
    return array[index]


def _put(array: np.ndarray, index: tuple[int, ...], value: Any) -> None:
    for i, n in zip(index, array.shape, strict=True):
        if not 0 <= i < n:
            raise InternalError(f"store at {index} outside of a buffer of shape {array.shape}")
    array[index] = value


def _divide(a: Any, b: Any) -> Any:
    if isinstance(a, int | np.integer):
        q = abs(int(a)) // abs(int(b)) if int(b) else 0
        return type(a)(q if (int(a) < 0) == (int(b) < 0) else -q)
    return np.divide(a, b)


def _erf(x: Any) -> Any:
    return type(x)(math.erf(float(x)))


def _cast(value: Any, to: Any) -> Any:
    if to is bool:
        return bool(value)
    return np.asarray(value).astype(to)[()]


def _bitcast(value: Any, source: Any, to: Any) -> Any:
    return np.asarray(value, source).reshape(1).view(to)[0]


def _minimum(a: Any, b: Any) -> Any:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else np.minimum(a, b)


def _maximum(a: Any, b: Any) -> Any:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else np.maximum(a, b)


def _dot_pairs(a: Any, b: Any) -> Any:
    a, b = (np.asarray(x, np.int32).reshape(1).view(np.int16).astype(np.int32) for x in (a, b))
    return np.sum(a * b, dtype=np.int32)


_LIBRARY: dict[str, Any] = {
    "get": _get,
    "put": _put,
    "cast": _cast,
    "bitcast": _bitcast,
    "divide": _divide,
    "minimum": _minimum,
    "maximum": _maximum,
    "maxnum": lambda a, b: b if b > a else a,
    "power": np.power,
    "and_": np.bitwise_and,
    "or_": np.bitwise_or,
    "xor_": np.bitwise_xor,
    "f_erf": _erf,
    "f_rsqrt": lambda x: type(x)(1) / np.sqrt(x),
    "f_round": np.rint,
    "f_sigmoid": lambda x: type(x)(1) / (type(x)(1) + np.exp(-x)),
    "f_not": lambda x: not x,
    "f_fma": lambda a, b, c: type(a)(float(a) * float(b) + float(c)),
    "f_exp_nonpositive": np.exp,
    "f_dot_pairs": _dot_pairs,
    "f_isnan": lambda x: bool(np.isnan(x)),
    "f_isinf": lambda x: bool(np.isinf(x)),
    "f_asin": np.arcsin,
    "f_acos": np.arccos,
    "f_atan": np.arctan,
    "f_asinh": np.arcsinh,
    "f_acosh": np.arccosh,
    "f_atanh": np.arctanh,
}
for _fn in (
    "exp",
    "log",
    "tanh",
    "sqrt",
    "floor",
    "ceil",
    "trunc",
    "abs",
    "sin",
    "cos",
    "tan",
    "sinh",
    "cosh",
    "log1p",
    "expm1",
):
    _LIBRARY[f"f_{_fn}"] = getattr(np, _fn)
for _t in DTYPE_NAMES:
    _LIBRARY[f"T_{_t}"] = DType(_t).numpy.type
