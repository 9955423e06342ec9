"""The record that is an operator. `ops/` creates the instances; graph nodes hold the record itself.

    relu = Op("relu", NoAttrs, infer, (compute,), reference, samples)

`computes[0]` defines the meaning; further ones are named alternatives that the compiler may choose.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .expr import Expr
from .types import TensorType


class Kind(enum.IntEnum):
    """Fusion kinds, from the most to the least willing to be fused (docs/schedules.md,
    ARCHITECTURE 8)."""

    ELEMWISE = 0  # out[i] = f(a[i], b[i])
    BROADCAST = 1  # out[i, j] = f(a[i, j], b[j]): axes may be missing, order is kept
    INJECTIVE = 2  # out[i, j] = a[j, i]: each output reads one element of each input, anywhere
    REDUCTION = 3  # out[i] = sum over k of a[i, k]
    OUT_FUSABLE = (
        4  # a contraction (convolution, matmul): elementwise work can be fused onto its output
    )
    OPAQUE = 5  # never fused


class Precision(enum.Enum):
    """What a change of precision may do to an operator."""

    FOLLOW = "follow"  # computes in whatever type its inputs have
    LOW = "low"  # gains from low precision inputs (contractions)
    FLOAT32_INSIDE = "float32 inside"  # accepts low precision but computes in float32


@dataclasses.dataclass(frozen=True)
class NoAttrs:
    """The attributes of an operator that has none."""


@dataclasses.dataclass(frozen=True)
class Counted:
    """Attributes of a node with a size that only the data tells.

    dim: that size (a Dim of its own); the node's last argument holds its value, int64[].
    most: no count is larger; memory is reserved for it. None: there is no limit, and an input of
      the model has to hold the count.
    """

    dim: Any = 0
    most: Any = 0


@dataclasses.dataclass(frozen=True)
class Arg:
    """What a type rule sees of an argument: its type and, for small integer tensors, its value.

    content: a numpy object array of index expressions with the tensor's (constant) shape, or None.
    """

    type: TensorType
    content: np.ndarray | None = None


Infer = Callable[..., TensorType | tuple[TensorType, ...]]


@dataclasses.dataclass(frozen=True, eq=False)
class Compute:
    """One way to compute an operator as tensor expressions."""

    name: str
    build: Callable[..., Any]  # (*te.Tensor | None, attrs) -> te.Tensor or tuple of them
    applies: Callable[..., bool] | None = None  # (types, attrs) -> bool; None: always
    cost: Callable[..., float] | None = None  # (types, attrs) -> estimated time, to choose by
    constants: tuple[int, ...] = ()  # arguments that must be constants for it to pay
    blocked: bool = False  # the way to take where the first operand has a layout in blocks
    error: float = (
        0.0  # max |error| / max |result| beyond rounding (reduced-multiplication algorithms)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """One operator; see the module text.

    infer(*args: Arg | None, attrs) -> TensorType or tuple of them; raises ShapeError.
    reference(*numpy arrays | None, attrs) -> array or tuple: the numpy meaning. For operators with
      `shape_math` it must also work on object arrays of index expressions (that is how the values
      of shape tensors are followed through Shape, Gather, Concat, ...); None says it cannot follow.
    samples(draw) -> (list of numpy inputs | None, attrs): a Hypothesis strategy body.
    kind: None derives the fusion kind from computes[0]; a given kind may only be more conservative.
    absorb(args, attrs) -> (number of leading arguments kept, attrs): moves the values of trailing
      shape arguments (the target of a Reshape) into attrs, as expressions. `graph.apply` does this
      first, so neither computes nor fused functions ever see a shape argument.
    """

    name: str
    attrs: type
    infer: Infer
    computes: tuple[Compute, ...]
    reference: Callable[..., Any]
    samples: Callable[..., Any]
    kind: Kind | None = None
    precision: Precision = Precision.FOLLOW
    shape_math: bool = False
    variadic: bool = False  # takes any number of tensors (Concat)
    absorb: Callable[[Sequence[Arg | None], Any], tuple[int, Any]] | None = None
    rules: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        return f"Op({self.name})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _lookup, (self.name,)


# ---- what type rules take for granted -----------------------------------------------------------
_assumed: list[list[tuple[Expr, Expr]]] = []


def assume_equal(a: Expr, b: Expr) -> None:
    """A type rule needs two sizes to be equal and cannot tell: the plan gets a run-time guard."""
    if _assumed:
        _assumed[-1].append((a, b))


@contextlib.contextmanager
def assumptions() -> Iterator[list[tuple[Expr, Expr]]]:
    """Collects the equalities that type rules assume meanwhile."""
    found: list[tuple[Expr, Expr]] = []
    _assumed.append(found)
    try:
        yield found
    finally:
        _assumed.pop()


REGISTRY: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Adds an operator under its name. Raises ValueError when the name is taken."""
    if op.name in REGISTRY:
        raise ValueError(f"operator {op.name!r} is registered already")
    REGISTRY[op.name] = op
    return op


def _lookup(name: str) -> Op:
    return REGISTRY[name]


def shape_of(args: Sequence[Arg | None]) -> list[TensorType | None]:
    """The types of some arguments."""
    return [None if a is None else a.type for a in args]
