"""IR as JSON and back: expressions, layouts, TIR functions, graph functions.

    arrays = []
    text = json.dumps(to_json(fn, arrays))          arrays: the data of the Constants met
    same = from_json(json.loads(text), arrays)      structurally equal to fn

A document is {"nodes": [[class, field, ...], ...], "root": value}. Nodes and expressions stand in
the table once, operands first, and are referred to by number: what was shared is shared again.
Values: JSON scalars as they are, {"ref": k}, {"tuple": [...]}, {"dtype": "float32"}, {"op": name},
{"array": k}, {"objects": [shape, items]}, {"enum": [class, name]}, {"data": [class, field, ...]}.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from . import expr, graph, tir
from .expr import Expr
from .graph import Function, topological
from .layout import IndexMap
from .node import Node
from .op import REGISTRY, NoAttrs, Op
from .types import DType, Loc, TensorType

_EXPRS: dict[str, Callable[..., Expr]] = {
    c.__name__: c
    for c in (
        expr.Const, expr.Var, expr.Dim, expr.Binary, expr.Cast, expr.Select, expr.Call, expr.Load,
        expr.Ramp, expr.Splat,
    )
}  # fmt: skip
_NODES: dict[str, type[Node]] = {
    c.__name__: c
    for c in (
        graph.Input, graph.Constant, graph.Apply, graph.Item, graph.Function,
        tir.Buffer, tir.Iter, tir.Block, tir.Store, tir.For, tir.Seq, tir.If, tir.Alloc,
        tir.Prefetch, tir.PrimFunc,
    )
}  # fmt: skip
_RECORDS: tuple[type, ...] = (TensorType, Loc, IndexMap, NoAttrs)
_ENUMS: dict[str, type[enum.Enum]] = {c.__name__: c for c in (tir.LoopKind, tir.Scope)}


def to_json(obj: Any, arrays: list[np.ndarray] | None = None) -> dict[str, Any]:
    """A JSON-able document. Arrays of Constants are appended to `arrays`, by reference.

    Raises TypeError for what is not IR, ValueError for a Constant where no list is given.
    """
    writer = _Writer(arrays)
    root = writer.value(obj)
    return {"nodes": writer.table, "root": root}


def from_json(
    data: Mapping[str, Any], arrays: Sequence[np.ndarray] = (), operators: Sequence[Op] = ()
) -> Any:
    """The inverse of `to_json`, given the same arrays. operators: some that are not registered.

    Raises ValueError for a document that is not one. Operators are found by name, so `ops` must
    have been imported.
    """
    reader = _Reader(arrays, operators)
    for entry in data["nodes"]:
        name, *fields = entry
        made: Any = _EXPRS.get(name) or _NODES.get(name)
        if made is None:
            raise ValueError(f"no IR node is called {name!r}")
        reader.done.append(made(*map(reader.value, fields)))
    return reader.value(data["root"])


class _Writer:
    def __init__(self, arrays: list[np.ndarray] | None) -> None:
        self.arrays = arrays
        self.table: list[list[Any]] = []
        self.numbers: dict[int, int] = {}
        self.held: list[Any] = []  # keeps the ids in `numbers` from being used again

    def value(self, v: Any) -> Any:
        if v is None or isinstance(v, bool | str) or type(v) is int:
            return v
        if isinstance(v, float):
            return v if math.isfinite(v) else {"float": struct.pack(">d", v).hex()}
        if isinstance(v, Expr | Node):
            return {"ref": self.number(v)}
        if isinstance(v, tuple):
            return {"tuple": [self.value(x) for x in v]}
        if isinstance(v, DType):
            return {"dtype": v.name if v.lanes == 1 else [v.name, v.lanes]}
        if isinstance(v, Op):
            return {"op": v.name}
        if isinstance(v, enum.Enum) and type(v).__name__ in _ENUMS:
            return {"enum": [type(v).__name__, v.name]}
        if isinstance(v, np.ndarray):
            return self.array(v)
        if isinstance(v, np.generic):
            return self.value(v.item())
        if dataclasses.is_dataclass(v) and not isinstance(v, type):
            fields = [self.value(getattr(v, f.name)) for f in dataclasses.fields(v)]
            return {"data": [_record_name(type(v)), *fields]}
        raise TypeError(f"{type(v).__name__} is no part of the IR: {v!r}")

    def array(self, v: np.ndarray) -> dict[str, Any]:
        if v.dtype == object:  # the known content of an integer tensor, as expressions
            return {"objects": [list(v.shape), [self.value(x) for x in v.flat]]}
        if self.arrays is None:
            raise ValueError("this function holds constants: give a list for their arrays")
        self.arrays.append(v)
        return {"array": len(self.arrays) - 1}

    def number(self, v: Expr | Node) -> int:
        found = self.numbers.get(id(v))
        if found is None:
            if isinstance(v, Function):  # operands first, so that a deep graph needs no deep stack
                for x in topological(v.results):
                    if id(x) not in self.numbers:
                        self.add(x)
            found = self.add(v)
        return found

    def add(self, v: Expr | Node) -> int:
        kind = type(v).__name__
        if kind not in _EXPRS and kind not in _NODES:
            raise TypeError(f"a {kind} cannot be written")
        if isinstance(v, Expr):
            fields = v._fields
        else:
            fields = tuple(getattr(v, n) for n in v.__dataclass_fields__)  # type: ignore[attr-defined]
        entry = [kind, *map(self.value, fields)]
        self.held.append(v)
        self.table.append(entry)
        self.numbers[id(v)] = len(self.table) - 1
        return len(self.table) - 1


class _Reader:
    def __init__(self, arrays: Sequence[np.ndarray], operators: Sequence[Op]) -> None:
        self.arrays = arrays
        self.done: list[Any] = []
        self.operators = {**REGISTRY, **{op.name: op for op in operators}}
        attrs = {op.attrs for op in self.operators.values()}
        self.records = {_record_name(c): c for c in (*_RECORDS, *attrs)}

    def value(self, v: Any) -> Any:
        if not isinstance(v, dict):
            return v
        if len(v) != 1:
            raise ValueError(f"not a value of a serialised IR: {v}")
        ((kind, x),) = v.items()
        if kind == "ref":
            if not 0 <= x < len(self.done):
                raise ValueError(f"node {x} is used before it is defined")
            return self.done[x]
        if kind == "tuple":
            return tuple(map(self.value, x))
        if kind == "dtype":
            return DType(x) if isinstance(x, str) else DType(*x)
        if kind == "float":
            return struct.unpack(">d", bytes.fromhex(x))[0]
        if kind == "op":
            if x not in self.operators:
                raise ValueError(f"operator {x!r} is not known to this version")
            return self.operators[x]
        if kind == "enum":
            return _ENUMS[x[0]][x[1]]
        if kind == "array":
            return self.arrays[x]
        if kind == "objects":
            out = np.empty(tuple(x[0]), dtype=object)
            for k, item in enumerate(x[1]):
                out.reshape(-1)[k] = self.value(item)
            return out
        if kind == "data":
            name, *fields = x
            if name not in self.records:
                raise ValueError(f"no record is called {name!r}")
            return self.records[name](*map(self.value, fields))
        raise ValueError(f"not a value of a serialised IR: {v}")


def _record_name(record: type) -> str:
    return f"{record.__module__}.{record.__qualname__}"


__all__ = ["from_json", "to_json"]
