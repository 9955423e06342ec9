"""Vectors as a whole: whether any lane is above a limit or has a bit, and entries of a small table.

    lanes.any_bit(v, mask)           "%t9", an i1: v & mask is not 0 in some lane
    lanes.lookup(index, table)       for each lane the entry that its index says

Long vectors are taken apart into registers, so that one instruction serves for each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from minicompiler.ir.expr import Const, const
from minicompiler.ir.tir import PrimFunc
from minicompiler.ir.types import float64
from minicompiler.target import Target

from .llvm_index import Indices
from .llvm_text import Operand, everywhere, literal, value_type, vector

TABLE_ALIGN = 64  # bytes
JOINED = 8  # lanes that are compared at once: a register with AVX, two of shorter vectors
_PERMUTATIONS = {  # feature: (lanes, the instruction that picks any of them for each lane)
    "avx512f": (16, "llvm.x86.avx512.permvar.si.512"), "avx2": (8, "llvm.x86.avx2.permd"),
}  # fmt: skip


class Lanes(Indices):
    """What needs all lanes of a vector at once."""

    def __init__(self, func: PrimFunc, target: Target | None = None) -> None:
        super().__init__(func)
        self.permutation = _permutation(target)
        self.tables: dict[tuple[str, str], str] = {}  # a constant in memory and its type: its name

    # ---- any lane -------------------------------------------------------------------------------
    def above(self, v: Operand, limit: Const) -> tuple[str, Callable[[], str] | None]:
        """Whether the magnitude of any lane may be above a limit, or NaN, and the code that says
        whether it is if that is not the same."""
        ty = vector(value_type(limit.dtype), v.lanes)

        def any_above() -> str:
            return self.any_above(Operand(self.intrinsic("fabs", ty, v.name), v.lanes), limit)

        if v.lanes > JOINED and v.lanes % JOINED == 0:
            return self.squares_above(v, limit), any_above
        return any_above(), None

    def squares_above(self, v: Operand, limit: Const) -> str:
        """Whether the squares of some lanes add up to more than that of a limit, or NaN: one
        multiply-add for each register instead of two operations, and false only where no lane is
        above the limit."""
        scalar = value_type(limit.dtype)
        ty = vector(scalar, JOINED)
        first, *others = self.registers(v, scalar)
        total = self.op(f"fmul {ty} {first}, {first}")
        for x in others:
            total = self.intrinsic("fmuladd", ty, x, x, total)
        square = literal(const(limit.value * limit.value, limit.dtype))
        flags = self.op(f"fcmp ugt {ty} {total}, {everywhere(scalar, square, JOINED)}")
        return self.any_lane(Operand(flags, JOINED))

    def any_above(self, v: Operand, limit: Const) -> str:
        """Whether any lane of a number that is not negative is above a limit, or NaN. Registers are
        joined first, by maxima of the bits, among which those of NaN are the largest."""
        wide = limit.dtype is float64
        scalar, lanes = "i64" if wide else "i32", v.lanes
        floats, ty = vector(value_type(limit.dtype), lanes), vector(scalar, lanes)
        most = self.op(f"bitcast {floats} {v.name} to {ty}")
        if lanes > JOINED and lanes % JOINED == 0:
            parts = self.registers(Operand(most, lanes), scalar)
            ty, lanes = vector(scalar, JOINED), JOINED
            most = functools.reduce(lambda x, y: self.intrinsic("smax", ty, x, y), parts)
        bits = int(np.asarray(limit.value, limit.dtype.numpy).view(np.int64 if wide else np.int32))
        flags = self.op(f"icmp sgt {ty} {most}, {everywhere(scalar, str(bits), lanes)}")
        return self.any_lane(Operand(flags, lanes))

    def any_bit(self, v: Operand, mask: Const) -> str:
        """Whether any lane has one of some bits; registers are joined first."""
        scalar, lanes = value_type(mask.dtype), v.lanes
        ty, bits = vector(scalar, lanes), v.name
        if lanes > JOINED and lanes % JOINED == 0:
            ty, lanes = vector(scalar, JOINED), JOINED
            parts = self.registers(v, scalar)
            bits = functools.reduce(lambda x, y: self.op(f"or {ty} {x}, {y}"), parts)
        bits = self.op(f"and {ty} {bits}, {everywhere(scalar, literal(mask), lanes)}")
        flags = self.op(f"icmp ne {ty} {bits}, {everywhere(scalar, '0', lanes)}")
        return self.any_lane(Operand(flags, lanes))

    def any_lane(self, mask: Operand) -> str:
        """Whether any lane is set."""
        if mask.lanes == 1:
            return mask.name
        ty = vector("i1", mask.lanes)
        f = f"llvm.vector.reduce.or.v{mask.lanes}i1"
        f = self.declare(f, f"i1 @{f}({ty})")
        return self.op(f"call i1 {f}({ty} {mask.name})")

    def registers(self, v: Operand, scalar: str, lanes: int = JOINED) -> list[str]:
        """The parts of a vector that fill a register each; what the last one lacks is undefined."""
        whole, parts = vector(scalar, v.lanes), []
        for first in range(0, v.lanes, lanes):
            at = range(first, first + lanes)
            some = ", ".join([f"i32 {k if k < v.lanes else 'poison'}" for k in at])
            text = f"shufflevector {whole} {v.name}, {whole} poison, <{lanes} x i32> <{some}>"
            parts.append(self.op(text))
        return parts

    # ---- tables ---------------------------------------------------------------------------------
    def lookup(self, index: Operand, table: list[str]) -> Operand:
        """See `llvm_math.lookup`. The table is a register that an instruction picks lanes of, where
        there is one, and else memory."""
        width, instruction = self.permutation
        if index.lanes == 1 or len(table) > width:
            return self.lookup_in_memory(index, table)
        parts = self.registers(index, "i32", width)
        lanes = width * len(parts)
        ty, whole, joined = vector("i32", width), vector("i32", lanes), "poison"
        pick = self.declare(instruction, f"{ty} @{instruction}({ty}, {ty})")
        join = f"llvm.vector.insert.v{lanes}i32.v{width}i32"
        join = self.declare(join, f"{whole} @{join}({whole}, {ty}, i64)")
        entries = ", ".join([f"i32 {x}" for x in table * (width // len(table))])
        for k, part in enumerate(parts):
            found = self.op(f"call {ty} {pick}({ty} <{entries}>, {ty} {part})")
            at = f"{ty} {found}, i64 {k * width}"
            joined = self.op(f"call {whole} {join}({whole} {joined}, {at})")
        result = self.registers(Operand(joined, lanes), "i32", index.lanes)[0]
        return Operand(result, index.lanes)

    def lookup_in_memory(self, index: Operand, table: list[str]) -> Operand:
        """The same, one lane at a time."""
        lanes, count = index.lanes, len(table)
        entries = f"[{', '.join([f'i32 {x}' for x in table])}]"
        name = self.table(entries, f"[{count} x i32]")
        ty, result = vector("i32", lanes), "poison"
        low = self.op(f"and {ty} {index.name}, {everywhere('i32', str(count - 1), lanes)}")
        for k in range(lanes):
            one = low if lanes == 1 else self.op(f"extractelement {ty} {low}, i64 {k}")
            wide = self.op(f"zext i32 {one} to i64")
            at = self.op(f"getelementptr i32, ptr {name}, i64 {wide}")
            found = self.op(f"load i32, ptr {at}, align 4")
            if lanes == 1:
                return Operand(found)
            result = self.op(f"insertelement {ty} {result}, i32 {found}, i64 {k}")
        return Operand(result, lanes)

    def table(self, literal: str, ty: str) -> str:
        """The address of a constant in memory."""
        found = self.tables.get((literal, ty))
        if found is None:
            found = self.tables[literal, ty] = f"@{self.func.name}_constant_{len(self.tables)}"
        return found


def _permutation(target: Target | None) -> tuple[int, str]:
    """How many lanes of 32 bits an instruction can permute by the numbers in another register, and
    its name; (0, "") where there is none."""
    have = () if target is None else target.features
    return next((found for feature, found in _PERMUTATIONS.items() if feature in have), (0, ""))
