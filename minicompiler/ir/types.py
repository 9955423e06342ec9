"""Scalar types, tensor types and source locations.

DType("float32")            one scalar; DType("float32", 8) is a vector of eight lanes
TensorType((n, Const(3)), float32)     always the LOGICAL shape, whatever the layout
Loc("layer1/Conv", "net.onnx", 12, "Conv")
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from .expr import Expr

_BITS = {
    "bool": 8, "int8": 8, "uint8": 8, "int16": 16, "uint16": 16, "int32": 32, "uint32": 32,
    "int64": 64, "uint64": 64, "float16": 16, "bfloat16": 16, "float32": 32, "float64": 64,
}  # fmt: skip
# Types that are only stored, one element per byte: a Cast turns them into numbers (ops/codes.py).
CODED = (
    "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
    "float4_e2m1fn", "int4", "uint4", "int2", "uint2",
)  # fmt: skip
_BITS.update(dict.fromkeys(CODED, 8))
DTYPE_NAMES = tuple(_BITS)


class DType:
    """A scalar type and a lane count. Interned: `DType("int64") is DType("int64")`."""

    __slots__ = ("bits", "is_bool", "is_coded", "is_float", "is_int", "is_signed", "lanes", "name")
    name: str
    lanes: int
    bits: int
    is_float: bool
    is_int: bool
    is_bool: bool
    is_coded: bool
    is_signed: bool

    def __new__(cls, name: str, lanes: int = 1) -> DType:
        return _dtype(name, lanes)

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        return DType, (self.name, self.lanes)

    @property
    def bytes(self) -> int:
        """Bytes of one scalar in memory (a bool takes one)."""
        return self.bits // 8

    @property
    def numpy(self) -> np.dtype:
        """The numpy type of one scalar."""
        return np.dtype(getattr(ml_dtypes, self.name, self.name))

    def with_lanes(self, lanes: int) -> DType:
        """The same scalar type with another lane count."""
        return _dtype(self.name, lanes)

    @property
    def scalar(self) -> DType:
        """The type of one lane."""
        return _dtype(self.name, 1)

    def __repr__(self) -> str:
        return self.name if self.lanes == 1 else f"{self.name}x{self.lanes}"


@cache
def _dtype(name: str, lanes: int) -> DType:
    if name not in _BITS:
        raise TypeError(f"unknown dtype {name!r}; known: {', '.join(_BITS)}")
    t = object.__new__(DType)
    t.name, t.lanes, t.bits = name, lanes, _BITS[name]
    t.is_coded = name in CODED
    t.is_float = "float" in name and not t.is_coded
    t.is_bool = name == "bool"
    t.is_int = not t.is_float and not t.is_bool and not t.is_coded
    t.is_signed = t.is_float or name.startswith("int")
    return t


def dtype_of(value: object) -> DType:
    """The DType of a numpy dtype, array or name."""
    if isinstance(value, DType):
        return value
    if isinstance(value, str):
        return DType(value)
    kind: Any = getattr(value, "dtype", value)
    return DType(np.dtype(kind).name)


bool_ = DType("bool")
int8, int16, int32, int64 = DType("int8"), DType("int16"), DType("int32"), DType("int64")
uint8, uint16, uint32, uint64 = DType("uint8"), DType("uint16"), DType("uint32"), DType("uint64")
float16, bfloat16, float32, float64 = (
    DType("float16"), DType("bfloat16"), DType("float32"), DType("float64"),
)  # fmt: skip
index = int64  # the type of every shape, loop variable and subscript


@dataclasses.dataclass(frozen=True, slots=True)
class Loc:
    """Where a value came from: the user's node name, the file, the position in it, the operator."""

    name: str
    file: str = ""
    line: int = 0
    op: str = ""

    def __str__(self) -> str:
        at = f" ({self.file}{f':{self.line}' if self.line else ''})" if self.file else ""
        return f'{self.op} "{self.name}"{at}'.strip()


@dataclasses.dataclass(frozen=True, slots=True)
class TensorType:
    """A logical shape (one index expression per axis) and an element type."""

    shape: tuple[Expr, ...]
    dtype: DType

    @property
    def rank(self) -> int:
        return len(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"
