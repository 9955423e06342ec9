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
from minicompiler.ir.expr import Dim, Expr
from minicompiler.ir.graph import (
    Apply,
    Constant,
    Item,
    Value,
    apply,
    content_of,
    type_of,
)
from minicompiler.ir.op import Op
from minicompiler.ir.types import Loc, TensorType

from .onnx_values import KnownValues, Quotients

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
        values: the numbers that are known while importing.
        quotients: the floats that are known to be quotients of sizes.
        minted: how often a name of a dimension was given.
        around: the values that the graphs in the node's attributes may read.
        graph: imports the graph in an attribute in the place of the node, with values for its
            inputs: its results.
        expand: imports the node through the body that the ONNX specification defines for it.
    """

    op_type: str
    opset: int
    inputs: tuple[Any, ...]
    attributes: dict[str, Any]
    outputs: tuple[str, ...]
    loc: Loc
    values: KnownValues
    quotients: Quotients
    minted: dict[str, int]
    around: Callable[[], list[Value]]
    graph: Callable[..., tuple[Any, ...]]
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

    def shape(self, k: int, rank: int) -> tuple[Expr, ...]:
        """The sizes of a required input that has to have `rank` dimensions."""
        t = self.type(k)
        if t.rank != rank:
            self.fail(f"input {k} of {self.op_type} is {t}: {rank} dimensions are expected")
        return t.shape

    def axis(self, axis: int, rank: int) -> int:
        """An axis number that may be negative, from 0 on."""
        if not -rank <= axis < rank:
            self.fail(f"{self.op_type}: axis {axis} is out of range for {rank} dimensions")
        return axis % rank

    def attr(self, name: str, default: Any = MISSING) -> Any:
        """An attribute; without a default it is required."""
        if name in self.attributes:
            return self.attributes[name]
        if default is MISSING:
            self.fail(f"{self.op_type} needs the attribute {name!r}")
        return default

    def branch(self, name: str, count: int, *args: Any) -> tuple[Any, ...]:
        """The first `count` results of the graph in an attribute, for values of its inputs."""
        made = self.graph(name, *args)
        if len(made) < count:
            self.fail(f"the {name!r} of {self.op_type} has {len(made)} results, not {count}")
        return made[:count]

    def per_axis(self, name: str, rank: int, default: int) -> tuple[int, ...]:
        """An attribute with a number for each of `rank` axes."""
        found = tuple(self.attr(name, (default,) * rank))
        if len(found) != rank:
            self.fail(f"{name!r} of {self.op_type} has {len(found)} numbers for {rank} axes")
        return found

    def known(self, k: int) -> np.ndarray | None:
        """The value of an input that is constant while importing; None when absent.

        Raises ImportModelError for an input that depends on data or on a symbolic dimension.
        """
        value = self.opt(k)
        if value is None:
            return None
        found = self.values.of(value)
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

    def table(self, elements: int) -> None:
        """Pays for a table of numbers that the converter is about to make. Raises LimitError."""
        self.values.budget.use("fold_bytes", 8 * elements, (self.loc,))
        self.values.budget.check_time((self.loc,))

    def dim(self, name: str, hi: int | None, lo: int = 0) -> Dim:
        """A new dimension from lo to hi; a name that was given before gets a number."""
        count = self.minted[name] = self.minted.get(name, 0) + 1
        return Dim(name if count == 1 else f"{name}.{count}", lo, hi)

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


def sizes_of(value: Value) -> Sequence[Expr] | None:
    """The elements of a shape tensor as expressions, when they are known."""
    content = content_of(value)
    return None if content is None else list(content.reshape(-1))
