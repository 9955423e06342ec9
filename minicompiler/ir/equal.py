"""Structural equality of functions, and the key under which equal kernels compile once.

    structural_key(f) == structural_key(g)    one compiled kernel serves both: same operators,
                                              attributes, types, dims, layouts; constants by type
    structurally_equal(f, g)                  the same computation: constants by value as well
    tir_equal(f, g)                           the same loop nests, statement by statement
Names of graph functions, values, parameters and locations never matter.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

import numpy as np

from .expr import Const, Dim, Expr, walk
from .graph import Apply, Constant, Function, Input, Item, Value, topological
from .layout import IndexMap
from .node import Node
from .tir import Buffer, PrimFunc
from .types import DType, TensorType


def structural_key(fn: Function) -> str:
    """A canonical text of the function's structure.

    Values are numbered in topological order and parameters by position. A Constant is its shape,
    dtype and layout; the value of one with a single element is included, because such constants
    become literals of the kernel. Dims stand with their ranges.
    """
    return _key(fn)[0]


def structurally_equal(a: Function, b: Function) -> bool:
    """True when both compute the same from the same parameters, constants compared by value."""
    if a is b:
        return True
    key_a, constants_a = _key(a)
    key_b, constants_b = _key(b)
    return key_a == key_b and all(
        x is y or np.array_equal(x, y, equal_nan=x.dtype.kind == "f")
        for x, y in zip(constants_a, constants_b, strict=True)
    )


def attrs_key(attrs: Any) -> str:
    """Attributes as canonical text, for comparing nodes."""
    return _Writer().value(attrs)


def _key(fn: Function) -> tuple[str, list[np.ndarray]]:
    writer = _Writer()
    writer.function(fn)
    dims = sorted(writer.dims, key=lambda d: (d.name, d.lo, d.hi or 0, d.multiple_of))
    ranges = "".join(f"dim {d.name} {d.lo} {d.hi} {d.multiple_of}\n" for d in dims)
    return ranges + "\n".join(writer.lines), writer.constants


class _Writer:
    """Collects the key's lines, the constants met and the dims used."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.constants: list[np.ndarray] = []
        self.dims: set[Dim] = set()

    def function(self, fn: Function) -> None:
        numbers: dict[int, str] = {}
        for k, p in enumerate(fn.params):
            numbers[id(p)] = f"p{k}"
            self.lines.append(f"p{k} {self.type(p.type)} {self.layout(p.layout)}")
        count = 0
        for v in topological(fn.results):
            if id(v) in numbers:
                continue
            if isinstance(v, Item):
                numbers[id(v)] = f"{numbers[id(v.tuple)]}.{v.index}"
                continue
            numbers[id(v)] = f"v{count}"
            self.lines.append(f"v{count} {self.node(v, numbers)}")
            count += 1
        self.lines.append(f"return{int(fn.fused)} " + " ".join(numbers[id(r)] for r in fn.results))

    def node(self, v: Value, numbers: dict[int, str]) -> str:
        if isinstance(v, Input):
            return f"free {v.name} {self.type(v.type)} {self.layout(v.layout)}"
        if isinstance(v, Constant):
            self.constants.append(v.data)
            literal = v.data.tobytes().hex() if v.data.size == 1 else ""
            return f"const {self.type(v.type)} {self.layout(v.layout)} {literal}"
        assert isinstance(v, Apply)
        args = " ".join("_" if a is None else numbers[id(a)] for a in v.args)
        types = v.type if isinstance(v.type, tuple) else (v.type,)
        typed = " ".join(
            f"{self.type(t)} {self.layout(m)}" for t, m in zip(types, v.layouts, strict=True)
        )
        if isinstance(v.op, Function):
            self.lines.append("{")
            self.function(v.op)
            return f"}} ({args}) {typed}"
        contents = [None if c is None else c.reshape(-1).tolist() for c in v.contents]
        return f"{v.op.name} ({args}) {self.value(v.attrs)} {typed} {self.value(contents)}"

    def type(self, t: TensorType) -> str:
        return f"{t.dtype}[{','.join(self.value(s) for s in t.shape)}]"

    def layout(self, m: IndexMap | None) -> str:
        return "-" if m is None else f"@({','.join(map(str, m.exprs))})"

    def value(self, value: Any) -> str:
        """An attribute's value, without the ambiguities of `repr` on arrays and nested records."""
        if isinstance(value, Expr):
            self.dims.update(d for d in walk(value) if isinstance(d, Dim))
            return str(value)
        if isinstance(value, np.ndarray):
            return f"{value.dtype}{list(value.shape)}{value.tobytes().hex()}"
        if isinstance(value, Function):
            inner = _key(value)
            self.constants.extend(inner[1])
            return f"fn<{inner[0]}>"
        if dataclasses.is_dataclass(value) and not isinstance(value, type | IndexMap):
            fields = [getattr(value, f.name) for f in dataclasses.fields(value)]
            return f"{type(value).__name__}({','.join(map(self.value, fields))})"
        if isinstance(value, IndexMap):
            return self.layout(value)
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            return f"({','.join(map(self.value, value))})"
        if isinstance(value, enum.Enum):
            return f"{type(value).__name__}.{value.name}"
        if isinstance(value, DType):
            return str(value)
        return repr(value)


# ---- TIR ----------------------------------------------------------------------------------------
def tir_equal(a: PrimFunc, b: PrimFunc) -> bool:
    """True when both are the same program with the same names: every field of every statement
    equal, and buffers used in the same places."""
    return _Matcher().same(a, b)


class _Matcher:
    """Compares in lockstep. Buffers of one function answer to those of the other one to one."""

    def __init__(self) -> None:
        self.memo: dict[tuple[int, int], bool] = {}
        self.partner: dict[Buffer, Buffer] = {}
        self.taken: dict[Buffer, Buffer] = {}

    def same(self, x: Any, y: Any) -> bool:
        if isinstance(x, tuple):
            return (
                isinstance(y, tuple)
                and len(x) == len(y)
                and all(self.same(p, q) for p, q in zip(x, y, strict=True))
            )
        if type(x) is not type(y):
            return False
        if isinstance(x, Buffer) and isinstance(y, Buffer):
            if x in self.partner or y in self.taken:
                return self.partner.get(x) is y and self.taken.get(y) is x
            self.partner[x], self.taken[y] = y, x
            return self.fields(x, y)
        if isinstance(x, Expr | Node):
            key = (id(x), id(y))
            known = self.memo.get(key)
            if known is None:
                known = self.memo[key] = x is y if type(x) is Const else self.fields(x, y)
            return known
        return bool(x == y)

    def fields(self, x: Any, y: Any) -> bool:
        if isinstance(x, Expr):
            return self.same(x._fields, y._fields)
        return all(self.same(getattr(x, n), getattr(y, n)) for n in x.__dataclass_fields__)
