"""What a converter sees of one ONNX node: its inputs as graph values, its attributes, its opset.

    def _elu(n: OnnxNode) -> Value:
        return n.apply(activations.elu, n.arg(0), attrs=AlphaAttrs(n.attr("alpha", 1.0)))

Everything made through `apply` carries the node's location and the name of its ONNX result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from minicompiler.errors import ImportModelError
from minicompiler.ir.expr import Const, Expr
from minicompiler.ir.graph import (
    Apply,
    Constant,
    Item,
    Value,
    apply,
    content_of,
    topological,
    type_of,
)
from minicompiler.ir.op import Op
from minicompiler.ir.types import Loc, TensorType
from minicompiler.passes.fold import evaluate_node

MISSING: Any = object()


@dataclasses.dataclass
class OnnxNode:
    """One node while it is converted.

    Attributes:
        op_type: the ONNX operator.
        opset: the version of the operator's domain that the model uses.
        inputs: the values read; None where an optional input is left out.
        attributes: by name, as Python numbers, strings, lists, numpy arrays.
        outputs: names of the results; "" where one is not wanted.
        loc: the place in the model.
        branch: imports the graph in an attribute in the place of the node, with values for its
            inputs: its results.
        expand: imports the node through the body that the ONNX specification defines for it.
    """

    op_type: str
    opset: int
    inputs: tuple[Any, ...]
    attributes: dict[str, Any]
    outputs: tuple[str, ...]
    loc: Loc
    branch: Callable[..., tuple[Any, ...]]
    expand: Callable[[], tuple[Any, ...]]

    def arg(self, k: int) -> Value:
        """A required input."""
        found = self.opt(k)
        if found is None:
            self.fail(f"{self.op_type} needs an input number {k}")
        return found

    def opt(self, k: int) -> Value | None:
        """An optional input."""
        found = self.raw(k)
        if not (found is None or isinstance(found, Value)):
            self.fail(f"input {k} of {self.op_type} is {found}, not a tensor")
        return found

    def raw(self, k: int) -> Any:
        """An optional input that may also be a sequence or an empty optional."""
        return self.inputs[k] if k < len(self.inputs) else None

    def wants(self, k: int) -> bool:
        """Whether result `k` is used."""
        return k < len(self.outputs) and self.outputs[k] != ""

    def type(self, k: int) -> TensorType:
        """The type of a required input."""
        return type_of(self.arg(k))

    def attr(self, name: str, default: Any = MISSING) -> Any:
        """An attribute; without a default it is required."""
        if name in self.attributes:
            return self.attributes[name]
        if default is MISSING:
            self.fail(f"{self.op_type} needs the attribute {name!r}")
        return default

    def known(self, k: int) -> np.ndarray | None:
        """The value of an input that is constant while importing; None when absent.

        Raises ImportModelError for an input that depends on data or on a symbolic dimension.
        """
        value = self.opt(k)
        if value is None:
            return None
        found = constant_value(value)
        if found is None:
            self.fail(
                f"input {k} of {self.op_type} has to be a constant",
                "give the symbolic dimensions it depends on a value, or fold it before exporting",
            )
        return found

    def ints(self, k: int, attribute: str) -> tuple[int, ...] | None:
        """Integers given as input `k` (newer opsets) or as an attribute (older ones)."""
        if attribute in self.attributes:
            return tuple(int(v) for v in self.attributes[attribute])
        found = self.known(k)
        return None if found is None else tuple(int(v) for v in found.reshape(-1))

    def scalar(self, k: int, attribute: str = "") -> Any:
        """A number given as input `k` or as an attribute; None when absent."""
        if attribute in self.attributes:
            return self.attributes[attribute]
        found = self.known(k)
        if found is None or found.size == 0:
            return None
        return found.reshape(-1)[0].item()

    def apply(
        self, op: Op, *args: Value | None, attrs: Any = None, name: str | None = None
    ) -> Apply:
        """An Apply that knows where it comes from."""
        label = next(iter(self.outputs), "") if name is None else name
        return apply(op, *args, attrs=attrs, locs=(self.loc,), name=label)

    def constant(self, value: Any, dtype: Any = None, name: str = "") -> Constant:
        """A constant of the converter's own."""
        return Constant(np.asarray(value, dtype), name, locs=(self.loc,))

    def fail(self, message: str, hint: str = "") -> NoReturn:
        """Refuses the node."""
        raise ImportModelError(message, (self.loc,), hint=hint)


def items(v: Apply) -> tuple[Value, ...]:
    """The results of an Apply, one or several."""
    if isinstance(v.type, TensorType):
        return (v,)
    return tuple(Item(v, k) for k in range(len(v.type)))


@dataclasses.dataclass(frozen=True, eq=False)
class Tensors:
    """A sequence of tensors, which exists only while importing: its length is known."""

    items: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return f"a sequence of {len(self.items)}"


@dataclasses.dataclass(frozen=True, eq=False)
class Nothing:
    """An optional without a value."""

    def __str__(self) -> str:
        return "an empty optional"


_FOLDED = 1 << 20  # bytes of a value that is computed because shapes may follow from it


def constant_value(value: Value) -> np.ndarray | None:
    """The number(s) a value always has, when they are known while importing."""
    done: dict[int, np.ndarray | None] = {}
    for v in topological([value]):
        if isinstance(v, Apply) and not isinstance(v.type, TensorType):
            done[id(v)] = None
            continue
        found = _from_content(v)
        if found is None and isinstance(v, Apply):
            args = [None if a is None else done[id(a)] for a in v.args]
            known = [None if a is None else Constant(a) for a in args]
            if all(k is not None or a is None for k, a in zip(args, v.args, strict=True)):
                results = evaluate_node(v.with_(args=tuple(known)), _FOLDED)
                found = None if results is None else results[0]
        done[id(v)] = found
    return done[id(value)]


def _from_content(value: Value) -> np.ndarray | None:
    if isinstance(value, Constant):
        return value.data
    content = content_of(value)
    if content is None or not all(type(e) is Const for e in content.flat):
        return None
    numbers = [e.value for e in content.flat]
    return np.array(numbers, type_of(value).dtype.numpy).reshape(content.shape)


def sizes_of(value: Value) -> Sequence[Expr] | None:
    """The elements of a shape tensor as expressions, when they are known."""
    content = content_of(value)
    return None if content is None else list(content.reshape(-1))
