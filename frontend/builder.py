"""Models built by hand: operators as functions on values, weights as numpy arrays.

    net = Builder("mlp")
    x = net.input("x", ("batch", 784))
    h = net.relu(net.add(net.matmul(x, w1), b1), name="hidden")
    fn = net.function(logits=net.matmul(h, w2))          minicompiler.compile(fn)

Every registered operator is a method: tensors first, then its attributes by keyword. Arrays and
numbers become constants; a number takes the type of the first tensor. An operator with several
results gives a tuple. Values are named, and each node remembers the line that made it.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minicompiler import ops
from minicompiler.errors import MinicompilerError, ShapeError
from minicompiler.ir.expr import Dim, Expr, wrap
from minicompiler.ir.graph import Constant, Function, Input, Item, Value, apply, type_of
from minicompiler.ir.op import REGISTRY, Op
from minicompiler.ir.types import DType, Loc, TensorType

assert ops  # importing it fills REGISTRY

Operand = Value | np.ndarray | float | int | bool | None
Size = int | str | Expr
Bounds = tuple[int, int | None] | tuple[int, int | None, int]


class Builder:
    """A model that is being built; see the module text.

    dims: bounds of dimensions that inputs name, (lo, hi) or (lo, hi, multiple_of); from 1 on if not
        given. A `Dim` may be used instead of a name.
    """

    def __init__(self, name: str = "model", dims: Mapping[str, Bounds] | None = None) -> None:
        self.name = name
        self.inputs: list[Input] = []
        self._dims: dict[str, Expr] = {n: Dim(n, *b) for n, b in (dims or {}).items()}
        self._counts: dict[str, int] = {}
        self._names: set[str] = set()

    def input(self, name: str, shape: Iterable[Size], dtype: str = "float32") -> Input:
        """A new parameter of the model; a size is a number or the name of a dimension."""
        sizes = tuple(
            self._dims.setdefault(s, Dim(s)) if isinstance(s, str) else wrap(s) for s in shape
        )
        made = Input(self._unique(name), TensorType(sizes, DType(dtype)))
        self.inputs.append(made)
        return made

    def constant(self, data: Any, name: str = "") -> Constant:
        """A weight. The array is not copied."""
        return Constant(np.asarray(data), self._unique(name) if name else "")

    def apply(self, op: Op, *args: Operand, name: str = "", **attrs: Any) -> Any:
        """`op` on some arguments; its value, or a tuple of values. Raises ShapeError."""
        label = self._unique(name or op.name, numbered=not name)
        loc = Loc(label, *_caller(), op.name)
        tensors = [a for a in args if isinstance(a, Value | np.ndarray)]
        like = _dtype_of(tensors[0]) if tensors else np.dtype("float32")
        values = [self._value(a, like) for a in args]
        node = apply(op, *values, attrs=_attributes(op, attrs, loc), locs=(loc,), name=label)
        if isinstance(node.type, tuple):
            return tuple(Item(node, k) for k in range(len(node.type)))
        return node

    def function(self, *results: Value, **named: Value) -> Function:
        """The finished model. Results given by keyword have that name."""
        values = [*results, *named.values()]
        if not values:
            raise MinicompilerError(f'model "{self.name}" has no result')
        names = [*(f"output{k}" for k in range(len(results))), *named]
        return Function(self.name, tuple(self.inputs), tuple(values), result_names=tuple(names))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = REGISTRY.get(name)
        if op is None:
            near = difflib.get_close_matches(name, REGISTRY, 3)
            hint = f"; near: {', '.join(near)}" if near else ""
            raise AttributeError(f"there is no operator {name!r}{hint}")

        def call(*args: Operand, name: str = "", **attrs: Any) -> Any:
            return self.apply(op, *args, name=name, **attrs)

        return call

    def __dir__(self) -> list[str]:
        return sorted([*super().__dir__(), *REGISTRY])

    def _value(self, a: Operand, like: np.dtype[Any]) -> Value | None:
        if a is None or isinstance(a, Value):
            return a
        return Constant(a if isinstance(a, np.ndarray) else np.asarray(a, like))

    def _unique(self, name: str, numbered: bool = False) -> str:
        if not numbered:
            if name in self._names:
                raise MinicompilerError(f'the name "{name}" is used twice in "{self.name}"')
            self._names.add(name)
            return name
        while True:
            self._counts[name] = self._counts.get(name, 0) + 1
            made = f"{name}_{self._counts[name]}"
            if made not in self._names:
                self._names.add(made)
                return made


def _dtype_of(a: Value | np.ndarray) -> np.dtype[Any]:
    return a.dtype if isinstance(a, np.ndarray) else type_of(a).dtype.numpy


def _caller() -> tuple[str, int]:
    """The file name and line outside this module that is being executed."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return Path(frame.f_code.co_filename).name, frame.f_lineno


def _attributes(op: Op, given: dict[str, Any], loc: Loc) -> Any:
    """The operator's record of attributes; `pads` sets both ends, names of dtypes become DTypes."""
    fields = {f.name: f for f in dataclasses.fields(op.attrs)}
    if "pads" in given and "pads_begin" in fields:
        given["pads_begin"] = given["pads_end"] = given.pop("pads")
    unknown = [n for n in given if n not in fields]
    if unknown:
        raise ShapeError(
            f"{op.name} has no attribute {', '.join(unknown)}",
            (loc,),
            hint=f"its attributes: {', '.join(fields) or 'none'}",
        )
    values = {}
    for name, v in given.items():
        if isinstance(v, list):
            v = tuple(v)
        is_dtype = isinstance(v, str) and "DType" in str(fields[name].type)
        values[name] = DType(v) if is_dtype else v
    return op.attrs(**values)


__all__ = ["Builder"]
