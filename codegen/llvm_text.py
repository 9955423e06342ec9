"""Writing LLVM IR as text: types, literals, fresh names, and blocks of lines nested like the loops.

    w.op("fadd float %a, %b")        appends "  %t7 = fadd float %a, %b", returns "%t7"
    w.op(text, level=0)              the same at the end of the outermost scope: code motion

A scope is the body of a loop or branch while it is being written, with the values known in it.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from minicompiler.ir.expr import Const, Expr
from minicompiler.ir.tir import Buffer, PrimFunc
from minicompiler.ir.types import CODED, DType

_TYPES = {
    "bool": "i8", "int8": "i8", "uint8": "i8", "int16": "i16", "uint16": "i16", "int32": "i32",
    "uint32": "i32", "int64": "i64", "uint64": "i64", "float16": "half", "bfloat16": "i16",
    "float32": "float", "float64": "double", **dict.fromkeys(CODED, "i8"),
}  # fmt: skip
_MANGLED = {"float": "f32", "double": "f64", "half": "f16"}


class Operand(NamedTuple):
    """A value: its LLVM name or literal, and its lane count."""

    name: str
    lanes: int = 1


def memory_type(t: DType) -> str:
    """The LLVM type of an element in memory. A bfloat16 is its bits, as few processors know it;
    so are the types of at most 8 bits that are only stored."""
    return _TYPES.get(t.name, "i8")


def value_type(t: DType, lanes: int = 1) -> str:
    """The LLVM type of a value in a register (a bool is i1)."""
    return vector("i1" if t.is_bool else _TYPES.get(t.name, "i8"), lanes)


def vector(scalar: str, lanes: int) -> str:
    """`scalar` itself for one lane."""
    return scalar if lanes == 1 else f"<{lanes} x {scalar}>"


def everywhere(scalar: str, literal: str, lanes: int) -> str:
    """A literal in every lane."""
    return literal if lanes == 1 else f"splat ({scalar} {literal})"


def mangle(ty: str) -> str:
    """The suffix of an overloaded intrinsic."""
    if ty.startswith("<"):
        lanes, scalar = ty[1:-1].split(" x ")
        return f"v{lanes}{mangle(scalar)}"
    return _MANGLED.get(ty, ty)


def literal(e: Expr) -> str:
    """A Const as LLVM writes it."""
    assert isinstance(e, Const)
    t = e.dtype
    if t.is_bool:
        return "true" if e.value else "false"
    if not t.is_float:
        value = e.value
        return str(value - (1 << t.bits) if value >= 1 << (t.bits - 1) else value)
    if t.bits == 16:
        raw = int(np.asarray(e.value, t.numpy).view(np.uint16))
        if t.name == "float16":
            return f"0xH{raw:04X}"
        return str(raw - (1 << 16) if raw >> 15 else raw)
    with np.errstate(over="ignore"):  # beyond float32 a value becomes infinite, as in numpy
        value = float(np.float32(e.value)) if t.name == "float32" else e.value
    return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"


@dataclasses.dataclass(frozen=True, slots=True)
class Division:
    """A dividend, as expression and operand, and what its division by some size gave."""

    expr: Expr
    dividend: str
    quotient: str
    rest: str


@dataclasses.dataclass(slots=True)
class Lines:
    """Code being written for one loop body or branch, and the values known in it.

    passing: values that the next store may change. divisions: those written last, by divisor.
    writes: the buffers that a loop stores to; None for what is no loop.
    """

    lines: list[str]
    values: dict[object, Operand] = dataclasses.field(default_factory=dict)
    passing: dict[object, Operand] = dataclasses.field(default_factory=dict)
    divisions: dict[Expr, list[Division]] = dataclasses.field(default_factory=dict)
    writes: frozenset[Buffer] | None = None


class Writer:
    """The text of one function under construction."""

    def __init__(self, func: PrimFunc) -> None:
        self.func = func
        self.count = 0
        self.scopes = [Lines([])]
        self.declared: dict[str, str] = {}
        self.helpers: dict[str, str] = {}  # further functions that the code calls
        self.allocas: list[str] = []
        self.label = "entry"

    def fresh(self, hint: str = "t") -> str:
        self.count += 1
        return f"%{hint}{self.count}"

    def put(self, line: str, level: int = -1) -> None:
        self.scopes[level].lines.append("  " + line)

    def op(self, text: str, level: int = -1, hint: str = "t") -> str:
        self.count += 1
        name = f"%{hint}{self.count}"
        self.scopes[level].lines.append(f"  {name} = {text}")
        return name

    def declare(self, name: str, signature: str) -> str:
        self.declared[name] = signature
        return f"@{name}"

    def intrinsic(self, name: str, ty: str, *args: str, level: int = -1) -> str:
        """The result of an intrinsic function whose operands have its own type."""
        full = f"llvm.{name}.{mangle(ty)}"
        if full not in self.declared:
            self.declared[full] = f"{ty} @{full}({', '.join([ty] * len(args))})"
        return self.op(f"call {ty} @{full}({', '.join([f'{ty} {a}' for a in args])})", level)

    def branch(
        self,
        cond: str,
        then: Callable[[], None],
        orelse: Callable[[], None] | None = None,
        rarely: bool = False,
        confirm: Callable[[], str] | None = None,
    ) -> None:
        """if cond: then() else: orelse(). rarely: `cond` almost never holds. confirm: a second
        condition for then(), computed where `cond` holds."""
        self.count += 1
        yes, no, done = f"then{self.count}", f"else{self.count}", f"end{self.count}"
        outer = self.scopes[-1]
        hint = ", !prof !1" if rarely else ""
        other = no if orelse else done
        asked: list[str] = []
        first = yes
        if confirm:
            first = f"confirm{self.count}"
            self.scopes.append(Lines([]))
            self.label = first
            sure = confirm()
            jump = f"  br i1 {sure}, label %{yes}, label %{other}{hint}"
            asked = [f"{first}:", *self.scopes.pop().lines, jump]
        parts = []
        for label, body in ((yes, then), (no, orelse)):
            if body is None:
                continue
            self.scopes.append(Lines([]))
            self.label = label
            body()
            parts.append((label, self.scopes.pop().lines))
        # Only now: a body may put what does not depend on it in front.
        outer.lines.append(f"  br i1 {cond}, label %{first}, label %{other}{hint}")
        outer.lines += asked
        for label, lines in parts:
            outer.lines.append(f"{label}:")
            outer.lines += lines
            outer.lines.append(f"  br label %{done}")
        outer.lines.append(f"{done}:")
        self.label = done

    def splat(self, v: Operand, scalar: str, lanes: int) -> Operand:
        """`v` with this many lanes."""
        if v.lanes == lanes or lanes == 1:
            return v
        if not v.name.startswith("%"):
            return Operand(everywhere(scalar, v.name, lanes), lanes)
        key = ("splat", v.name, scalar, lanes)
        for scope in self.scopes:
            found = scope.values.get(key)
            if found is not None:
                return found
        ty = f"<{lanes} x {scalar}>"
        first = self.op(f"insertelement {ty} poison, {scalar} {v.name}, i64 0")
        name = self.op(f"shufflevector {ty} {first}, {ty} poison, <{lanes} x i32> zeroinitializer")
        result = self.scopes[-1].values[key] = Operand(name, lanes)
        return result

    def both(self, a: Operand | None, b: Operand | None) -> Operand | None:
        """The conjunction of two lane masks; None is the mask of all lanes."""
        if a is None or b is None:
            return a or b
        lanes = max(a.lanes, b.lanes)
        a, b = self.splat(a, "i1", lanes), self.splat(b, "i1", lanes)
        return Operand(self.op(f"and {vector('i1', lanes)} {a.name}, {b.name}"), lanes)

    def negated(self, cond: Operand) -> Operand:
        ones = everywhere("i1", "true", cond.lanes)
        return Operand(self.op(f"xor {vector('i1', cond.lanes)} {cond.name}, {ones}"), cond.lanes)
