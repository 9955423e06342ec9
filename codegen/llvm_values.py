"""Scalar expressions -> LLVM values: the arithmetic of kernels.

A value is emitted where it is needed and remembered there (an index: see llvm_index.py). Inside a
vector loop an expression that depends on the loop variable has one lane per iteration; the rest
stays scalar until it meets such a value.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence

from minicompiler.errors import CodegenError
from minicompiler.ir.expr import (
    ZERO,
    Binary,
    Call,
    Cast,
    Const,
    Expr,
    Load,
    Select,
    Var,
    cast,
    const,
    free_vars,
    maximum,
    minimum,
    walk,
)
from minicompiler.ir.tir import Buffer, PrimFunc, Scope
from minicompiler.ir.types import DType, float32, float64, int64
from minicompiler.target import Target

from . import llvm_math
from .llvm_lanes import TABLE_ALIGN, Lanes
from .llvm_text import Lines, Operand, everywhere, literal, mangle, value_type, vector

_FLOAT_COMPARE = {"lt": "fcmp olt", "le": "fcmp ole", "eq": "fcmp oeq", "ne": "fcmp une"}
_FLOAT_OPS = {
    "add": "fadd contract", "sub": "fsub contract", "mul": "fmul contract", "div": "fdiv",
}  # fmt: skip
_INTEGER_OPS = {"add": "add", "sub": "sub", "mul": "mul", "and": "and", "or": "or", "xor": "xor"}
# Only a product written right there may be fused with a sum: elementary functions rely on exact
# differences elsewhere.
# `fma` may round twice where the processor has no such instruction; the C library has none for us.
_INTRINSICS = {
    "sqrt": "sqrt", "floor": "floor", "ceil": "ceil", "round": "roundeven", "trunc": "trunc",
    "abs": "fabs", "fma": "fmuladd", "copysign": "copysign",
}  # fmt: skip
_OUTSIDE = (Scope.PARAM, Scope.GLOBAL)


def _is_product(e: Expr) -> bool:
    return type(e) is Binary and e.op == "mul"


class Values(Lanes):
    """Expressions of one function, given the variables that are bound at this point."""

    def __init__(self, func: PrimFunc, target: Target | None = None) -> None:
        super().__init__(func, target)
        # Whether multiply-adds read memory, and registers are too few for a polynomial's constants.
        self.few_registers = target is not None and target.fma and target.registers <= 16
        self.fused = target is not None and target.fma
        self.multiply_pairs = _pairs_instruction(target)
        self.vector: tuple[Expr, int] | None = None
        self.masks: list[Operand] = []
        self.first_lanes: dict[str, int] = {}  # masks of so many lanes, the first ones
        self.written: set[Buffer] = set()
        self.arguments: dict[Expr, Operand] = {}  # of the elementary function being emitted
        self.always: dict[Expr, bool] = {}  # whether an access always stays in its buffer
        self.stored: frozenset[Expr] = frozenset()  # the constants that it reads from memory

    # ---- any value ------------------------------------------------------------------------------
    def load(self, e: Load, mask: Operand | None) -> Operand:
        """The element (or elements) of a buffer; see llvm_memory.py."""
        raise NotImplementedError

    def value(self, e: Expr, mask: Operand | None = None) -> Operand:
        """The operand for any expression. `mask`: lanes in which a load may be done."""
        if type(e) is Const:
            return Operand(literal(e))
        known = self.names.get(e)
        if known is not None:
            return Operand(known)
        unrolled = self.env.get(e)
        if unrolled is not None:
            return Operand(literal(unrolled))
        argument = self.arguments.get(e)
        if argument is not None:
            return argument
        in_vector = False
        if self.vector is not None:
            if e is self.vector[0]:
                ramp = ", ".join([f"i64 {k}" for k in range(self.vector[1])])
                return Operand(f"<{ramp}>", self.vector[1])
            in_vector = self.vector[0] in free_vars(e)
        if not in_vector and self.is_index(e):
            return Operand(self.index(e))
        if self.env and e.dtype.is_bool and self.is_condition(e):
            decided = self.resolve(e)
            if type(decided) is Const:
                return Operand(literal(decided))
        buffers = self.reads(e)
        mask = mask if buffers else None
        key = self.key(e, mask)
        found = self.found(key)
        if found is None and mask is not None:
            found = self.found(self.key(e, None))  # wanted in more lanes before
        if found is not None:
            return found
        level = len(self.scopes) - 1 if in_vector else self.level_of(e, buffers)
        if level < len(self.scopes) - 1:
            return self.value_at(e, level)
        result = self.emit_value(e, mask)
        if all(b not in self.written and b.scope in _OUTSIDE for b in buffers):
            self.scopes[-1].values[key] = result
        else:
            self.scopes[-1].passing[key] = result
        return result

    def key(self, e: Expr, mask: Operand | None) -> tuple[object, ...]:
        """What the value of an expression depends on at this point."""
        free = free_vars(e)
        used: list[object] = [(v, self.env[v]) for v in self.env if v in free]
        if self.arguments:
            used += [x for x in self.arguments.items() if x[0] in free]
        vector = self.vector if self.vector is not None and self.vector[0] in free else None
        active = self.masks[-1] if self.masks and self.reads(e) else None
        return (e, *used, vector, mask, active)

    def found(self, key: tuple[object, ...]) -> Operand | None:
        """The value that was emitted for a key, if it was."""
        for scope in reversed(self.scopes):
            known = scope.values.get(key) or scope.passing.get(key)
            if known is not None:
                return known
        return None

    def level_of(self, e: Expr, buffers: frozenset[Buffer]) -> int:
        """The scope of a value: outside of the loops that change nothing about it, where it is made
        of what is in registers. A product stays where it may be fused with a sum."""
        level = len(self.scopes) - 1
        if e.dtype is not int64 and (
            not isinstance(e, Binary | Call) or _is_product(e) or not e.dtype.is_float
        ):
            return level
        if not buffers or any(b.scope is not Scope.REGISTER for b in buffers) or self.arguments:
            return level
        lowest = self.home(self.resolve(e))
        while level > lowest:
            writes = self.scopes[level].writes
            if writes is None or not writes.isdisjoint(buffers):
                break
            level -= 1
        return level

    def emit_value(self, e: Expr, mask: Operand | None) -> Operand:
        if type(e) is Load:
            return self.load(e, mask)
        if type(e) is Binary:
            return self.binary(e, mask)
        if type(e) is Select:
            return self.select(e, mask)
        if type(e) is Cast:
            return self.convert(self.value(e.a, mask), e.a.dtype, e.dtype)
        if type(e) is Call:
            return self.call(e, mask)
        message = f"the LLVM backend does not know the expression {type(e).__name__}: {e}"
        raise CodegenError(message, self.func.locs)

    def binary(self, e: Binary, mask: Operand | None) -> Operand:
        t = e.a.dtype
        if t.is_float and t.bits == 16:  # computed in float32, rounded once
            wide = Binary(e.op, cast(e.a, float32), cast(e.b, float32))
            return self.value(wide if e.dtype.is_bool else Cast(t, wide), mask)
        if e.op == "pow":
            power = self.elementary(e, mask)
            if power is not None:
                return power
        if e.op in ("lt", "le") and self.vector is not None and t is int64:
            found = self.lane_limit(e)
            if found is not None:
                return found
        a, b = self.value(e.a, mask), self.value(e.b, mask)
        lanes = max(a.lanes, b.lanes)
        scalar, ty = value_type(t), value_type(t, lanes)
        x, y = self.splat(a, scalar, lanes).name, self.splat(b, scalar, lanes).name
        if t.is_float and e.op in ("add", "sub") and not (_is_product(e.a) or _is_product(e.b)):
            return Operand(self.op(f"f{e.op} {ty} {x}, {y}"), lanes)
        return Operand(self.operation(e.op, x, y, t, lanes, ty), lanes)

    def operation(self, op: str, a: str, b: str, t: DType, lanes: int, ty: str) -> str:
        """One operation on operands of the same type and lane count."""
        if t.is_float:
            if op in _FLOAT_OPS:
                return self.op(f"{_FLOAT_OPS[op]} {ty} {a}, {b}")
            if op in _FLOAT_COMPARE:
                return self.op(f"{_FLOAT_COMPARE[op]} {ty} {a}, {b}")
            if op in ("min", "max"):
                return self.float_extreme(op, a, b, lanes, ty)
            if op == "maxnum":
                more = self.op(f"fcmp ogt {ty} {b}, {a}")
                return self.op(f"select {vector('i1', lanes)} {more}, {ty} {b}, {ty} {a}")
            if op == "mod":
                return self.float_mod(a, b, t, lanes)
            if op == "floordiv":
                return self.intrinsic("floor", ty, self.op(f"fdiv {ty} {a}, {b}"))
            raise CodegenError(f"{op} of {t}", self.func.locs)
        sign = "s" if t.is_signed else "u"
        if op in ("lt", "le", "eq", "ne"):
            code = {"lt": f"{sign}lt", "le": f"{sign}le"}.get(op, op)
            return self.op(f"icmp {code} {ty} {a}, {b}")
        if op in _INTEGER_OPS:
            return self.op(f"{_INTEGER_OPS[op]} {ty} {a}, {b}")
        if op in ("min", "max", "maxnum"):
            if t.is_bool:
                return self.op(f"{'and' if op == 'min' else 'or'} {ty} {a}, {b}")
            return self.intrinsic(sign + op[:3], ty, a, b)
        if op in ("div", "floordiv", "mod"):
            return self.division(op, a, b, t, lanes)
        if op in ("shl", "shr"):
            return self.shift(op, a, b, t, lanes)
        if op == "pow":
            helper = self.helper("power", f"{value_type(t)}", llvm_math.INTEGER_POWER)
            return self.lanewise(helper, [a, b], value_type(t), lanes)
        raise CodegenError(f"{op} of {t}", self.func.locs)

    def lane_limit(self, e: Binary) -> Operand | None:
        """`base + lane < n` as a comparison of 32-bit lane numbers with n - base, which is half the
        work of 64-bit lanes; `n < base + lane` likewise. None when the condition has another
        form."""
        assert self.vector is not None
        v, lanes = self.vector
        if v not in free_vars(e) or not self.is_index(e.a) or not self.is_index(e.b):
            return None
        poly = self.at_env(self.arith.poly(e.b - e.a))
        slope = poly.get((v,))
        limit = {m: c for m, c in poly.items() if m != (v,)}
        if slope is None or abs(slope) != 1 or any(v in free_vars(a) for m in limit for a in m):
            return None
        room = self.arith.expr(limit) if slope < 0 else 0 - self.arith.expr(limit)
        room = room + 1 if (e.op == "le") == (slope < 0) else room
        count = self.index(minimum(maximum(room, 0), lanes))
        low = count if not count.startswith("%") else self.op(f"trunc i64 {count} to i32")
        bound = self.splat(Operand(low), "i32", lanes)
        ramp = "<" + ", ".join([f"i32 {k}" for k in range(lanes)]) + ">"
        compare = "slt" if slope < 0 else "sge"
        name = self.op(f"icmp {compare} <{lanes} x i32> {ramp}, {bound.name}")
        if low is count and slope < 0:
            self.first_lanes[name] = int(count)
        return Operand(name, lanes)

    # ---- integers -------------------------------------------------------------------------------
    def division(self, op: str, a: str, b: str, t: DType, lanes: int) -> str:
        """Never traps: what is divided by zero gives 0, as in numpy, and -2**31 / -1 wraps."""
        scalar = value_type(t)
        ty, flag = vector(scalar, lanes), vector("i1", lanes)
        zero = everywhere(scalar, "0", lanes)
        known = not b.startswith("%") and b not in ("0", "-1", zero)
        known = known and b != everywhere(scalar, "-1", lanes)
        bad, by = "", b
        if not known:
            bad = self.op(f"icmp eq {ty} {b}, {zero}")
            unsafe = bad
            if t.is_signed:
                minus = self.op(f"icmp eq {ty} {b}, {everywhere(scalar, '-1', lanes)}")
                unsafe = self.op(f"or {flag} {bad}, {minus}")
            one = everywhere(scalar, "1", lanes)
            by = self.op(f"select {flag} {unsafe}, {ty} {one}, {ty} {b}")
        if lanes > 1 and not known and t.bits <= 32:
            result = self.float_division(op, a, by, t, lanes)
        elif not t.is_signed:
            result = self.op(f"{'urem' if op == 'mod' else 'udiv'} {ty} {a}, {by}")
        elif op == "div":
            result = self.op(f"sdiv {ty} {a}, {by}")
        else:
            result = self.floor_signed(op, a, by, scalar, lanes, -1)
        if known:
            return result
        if t.is_signed and op != "mod":
            less = self.op(f"sub {ty} {zero}, {a}")
            result = self.op(f"select {flag} {minus}, {ty} {less}, {ty} {result}")
        return self.op(f"select {flag} {bad}, {ty} {zero}, {ty} {result}")

    def float_division(self, op: str, a: str, b: str, t: DType, lanes: int) -> str:
        """Vectors of integers divided as floats of twice their bits, which is exact: a quotient
        below n by 1/b or more is not rounded up to n. Processors divide integers one by one."""
        scalar, letter = value_type(t), "s" if t.is_signed else "u"
        ty, wide = vector(scalar, lanes), vector("float" if t.bits <= 16 else "double", lanes)
        x, y = [self.op(f"{letter}itofp {ty} {v} to {wide}") for v in (a, b)]
        ratio = self.op(f"fdiv {wide} {x}, {y}")
        q = self.op(f"fpto{letter}i {wide} {ratio} to {ty}")
        if op == "div" or (op == "floordiv" and not t.is_signed):
            return q
        r = self.op(f"sub {ty} {a}, {self.op(f'mul {ty} {q}, {b}')}")
        return self.floored(op, q, r, b, scalar, lanes, -1) if t.is_signed else r

    def shift(self, op: str, a: str, b: str, t: DType, lanes: int) -> str:
        """A shift by the width or more leaves only the sign."""
        scalar = value_type(t)
        ty, flag = vector(scalar, lanes), vector("i1", lanes)
        code = "shl" if op == "shl" else "ashr" if t.is_signed else "lshr"
        if not b.startswith("%"):
            return self.op(f"{code} {ty} {a}, {b}")
        most = everywhere(scalar, str(t.bits - 1), lanes)
        near = self.op(f"icmp ule {ty} {b}, {most}")
        by = self.op(f"select {flag} {near}, {ty} {b}, {ty} {most}")
        result = self.op(f"{code} {ty} {a}, {by}")
        if code == "ashr":
            return result
        zero = everywhere(scalar, "0", lanes)
        return self.op(f"select {flag} {near}, {ty} {result}, {ty} {zero}")

    # ---- floats ---------------------------------------------------------------------------------
    def float_extreme(self, op: str, a: str, b: str, lanes: int, ty: str) -> str:
        """min and max; NaN where either side is, as in numpy. One instruction picks b when either
        is NaN, so a constant goes first and needs no more."""
        if not b.startswith("%"):
            a, b = b, a
        flag = vector("i1", lanes)
        first = self.op(f"fcmp {'ogt' if op == 'max' else 'olt'} {ty} {a}, {b}")
        best = self.op(f"select {flag} {first}, {ty} {a}, {ty} {b}")
        if not a.startswith("%"):
            return best
        nan = self.op(f"fcmp uno {ty} {a}, {a}")
        return self.op(f"select {flag} {nan}, {ty} {a}, {ty} {best}")

    def float_mod(self, a: str, b: str, t: DType, lanes: int) -> str:
        """The remainder with the sign of the divisor, exact."""
        scalar, flag = value_type(t), vector("i1", lanes)
        # float32 numbers are float64 numbers, and so are their remainders.
        x = self.convert(Operand(a, lanes), t, float64)
        y = self.convert(Operand(b, lanes), t, float64)
        r = self.remainder(x.name, y.name, lanes, small=t is not float64)
        result = self.convert(Operand(r, lanes), float64, t).name
        ty, zero = vector(scalar, lanes), everywhere(scalar, "0.0", lanes)
        some = self.op(f"fcmp one {ty} {result}, {zero}")
        negative = self.op(f"fcmp olt {ty} {result}, {zero}")
        wanted = self.op(f"fcmp olt {ty} {b}, {zero}")
        differ = self.op(f"xor {flag} {negative}, {wanted}")
        fix = self.op(f"and {flag} {some}, {differ}")
        more = self.op(f"fadd {ty} {result}, {b}")
        return self.op(f"select {flag} {fix}, {ty} {more}, {ty} {result}")

    def remainder(self, x: str, y: str, lanes: int, small: bool) -> str:
        """What C calls fmod, of float64. small: of numbers with at most 24 bits, whose quotients
        below 2**28 are rounded to no other integer than they lie above, and times the divisor have
        at most 53 bits: the remainder is exact."""
        helper = self.helper("remainder", "double", llvm_math.REMAINDER)
        ty, parts = vector("double", lanes), list[tuple[str, str]]()

        def one_by_one() -> None:
            parts.append((self.lanewise(helper, [x, y], "double", lanes), self.label))

        def together() -> None:
            whole = self.op(f"fptosi {ty} {quotient} to {vector('i32', lanes)}")
            whole = self.op(f"sitofp {vector('i32', lanes)} {whole} to {ty}")
            minus = self.op(f"fneg {ty} {whole}")
            rest = self.intrinsic("fmuladd", ty, minus, y, x)
            parts.append((self.intrinsic("copysign", ty, rest, x), self.label))

        if not small or self.straight:
            one_by_one()
            return parts[0][0]
        quotient = self.op(f"fdiv {ty} {x}, {y}")
        zero = everywhere("double", "0.0", lanes)
        asked = self.intrinsic(
            "fmuladd", ty, y, zero, quotient
        )  # no number for an infinite divisor
        large, confirm = self.above(Operand(asked, lanes), Const(2.0**28, float64))
        self.branch(large, one_by_one, together, rarely=True, confirm=confirm)
        values = ", ".join([f"[ {v}, %{label} ]" for v, label in parts])
        return self.op(f"phi {ty} {values}")

    def helper(self, name: str, scalar: str, body: str) -> str:
        """A function of this kernel for what needs a loop of its own."""
        full = f"@{self.func.name}_{name}_{scalar}"
        self.helpers[full] = body.replace("NAME", full).replace("TYPE", scalar)
        return full

    def lanewise(self, function: str, args: list[str], scalar: str, lanes: int) -> str:
        """A call for each lane."""
        if lanes == 1:
            return self.op(f"call {scalar} {function}({', '.join(f'{scalar} {a}' for a in args)})")
        ty, result = vector(scalar, lanes), "poison"
        for k in range(lanes):
            ones = [self.op(f"extractelement {ty} {a}, i64 {k}") for a in args]
            one = self.op(f"call {scalar} {function}({', '.join(f'{scalar} {a}' for a in ones)})")
            result = self.op(f"insertelement {ty} {result}, {scalar} {one}, i64 {k}")
        return result

    # ---- select, functions ----------------------------------------------------------------------
    def select(self, e: Select, mask: Operand | None) -> Operand:
        if _is_branch(e):
            return self.rare(e, mask)
        cond = self.value(e.cond, mask)
        if cond.name == "true":
            return self.value(e.a, mask)
        if cond.name == "false":
            return self.value(e.b, mask)
        a_mask = b_mask = mask
        # Whether it is loaded also where it is not wanted.
        whole = self.found(self.key(e.a, None)) is not None or self.inside(e.a, cond)
        if self.reads(e.a) and not whole:
            a_mask = self.both(mask, cond)
        if self.reads(e.b) and not self.inside(e.b, cond):
            b_mask = self.both(mask, self.negated(cond))
        a, b = self.value(e.a, a_mask), self.value(e.b, b_mask)
        lanes = max(cond.lanes, a.lanes, b.lanes)
        outside = type(e.a) is Load and e.a.buffer.scope in _OUTSIDE
        if outside and not whole and a.lanes == lanes and e.b is const(0, e.dtype):
            return a  # lanes that are not loaded are zeros
        scalar, ty = value_type(e.dtype), value_type(e.dtype, lanes)
        a, b = self.splat(a, scalar, lanes), self.splat(b, scalar, lanes)
        flag = vector("i1", cond.lanes)
        text = f"select {flag} {cond.name}, {ty} {a.name}, {ty} {b.name}"
        return Operand(self.op(text), lanes)

    def inside(self, e: Expr, mask: Operand) -> bool:
        """Whether an access stays in its buffer also in the lanes that a mask leaves out: not every
        processor has loads of some lanes for every type."""
        if (
            mask.lanes == 1
            or type(e) is not Load
            or e.mask is not None
            or self.reads(e) != {e.buffer}
        ):
            return False
        found = self.always.get(e)
        if found is None:
            sizes = zip(e.indices, e.buffer.shape, strict=True)
            found = all(self.arith.holds(i >= ZERO) and self.arith.holds(i < n) for i, n in sizes)
            self.always[e] = found
        return found

    def rare(self, e: Select, mask: Operand | None) -> Operand:
        """A branch: see `llvm_math.rarely_above`."""
        assert type(e.cond) is Call
        # Without fma, the sum whose bits are asked may be 0, which has none.
        if self.straight or (_asks_bits(e.cond.args[0]) and not self.fused):
            return self.value(e.a, mask)
        parts: list[tuple[Operand, str]] = []

        def side(x: Expr) -> None:
            parts.append((self.value(x, mask), self.label))

        flag, confirm = self.rare_condition(e.cond.args[0], mask)
        self.branch(flag, lambda: side(e.a), lambda: side(e.b), rarely=True, confirm=confirm)
        lanes = max([v.lanes for v, _ in parts])
        values = ", ".join([f"[ {v.name}, %{label} ]" for v, label in parts])
        return Operand(self.op(f"phi {value_type(e.dtype, lanes)} {values}"), lanes)

    def rare_condition(
        self, compared: Expr, mask: Operand | None
    ) -> tuple[str, Callable[[], str] | None]:
        """Whether a comparison may hold in some lane, and the code that says whether it does if
        that is not the same."""
        assert type(compared) is Binary
        if _asks_bits(compared):
            both = compared.a
            assert type(both) is Binary and both.op == "and" and type(both.b) is Const
            return self.any_bit(self.value(both.a, mask), both.b), None
        limit, x = compared.a, compared.b
        assert type(limit) is Const and type(x) is Call and x.fn == "abs"
        self.scopes.append(Lines([]))  # either side computes for itself what it needs
        found = self.above(self.value(x.args[0], mask), limit)
        self.scopes[-2].lines += self.scopes.pop().lines
        return found

    def call(self, e: Call, mask: Operand | None) -> Operand:
        t = e.args[0].dtype
        if e.fn == "bitcast":
            v = self.value(e.args[0], mask)
            a, b = value_type(t, v.lanes), value_type(e.dtype, v.lanes)
            return Operand(self.op(f"bitcast {a} {v.name} to {b}"), v.lanes)
        if t.is_float and t.bits == 16:
            wide = Call(e.fn, tuple(cast(a, float32) for a in e.args))
            return self.value(wide if e.dtype.is_bool else Cast(t, wide), mask)
        found = self.elementary(e, mask)
        if found is not None:
            return found
        if e.fn == "lookup":
            return self.lookup(self.value(e.args[0], mask), [literal(c) for c in e.args[1:]])
        args = [self.value(a, mask) for a in e.args]
        lanes = max(a.lanes for a in args)
        scalar, ty = value_type(t), value_type(t, lanes)
        names = [self.splat(a, scalar, lanes).name for a in args]
        if e.fn == "fma" and lanes > 1 and e.args[2] in self.stored:
            names[2] = self.stored_constant(names[2], ty)
        if e.fn == "dot_pairs":
            return Operand(self.dot_pairs(names[0], names[1], lanes), lanes)
        if e.fn == "not":
            return self.negated(args[0])
        if e.fn == "isnan":
            return Operand(self.op(f"fcmp uno {ty} {names[0]}, {names[0]}"), lanes)
        if e.fn == "isinf":
            size = self.intrinsic("fabs", ty, names[0])
            inf = everywhere(scalar, literal(Const(float("inf"), t)), lanes)
            return Operand(self.op(f"fcmp oeq {ty} {size}, {inf}"), lanes)
        name = _INTRINSICS.get(e.fn)
        if name is None:
            message = f"the LLVM backend does not know the function {e.fn}"
            raise CodegenError(message, self.func.locs)
        if t.is_float:
            return Operand(self.intrinsic(name, ty, *names), lanes)
        if e.fn != "abs":
            return args[0]  # rounding an integer
        full = f"llvm.abs.{mangle(ty)}"
        f = self.declare(full, f"{ty} @{full}({ty}, i1)")
        return Operand(self.op(f"call {ty} {f}({ty} {names[0]}, i1 false)"), lanes)

    def dot_pairs(self, a: str, b: str, lanes: int) -> str:
        """Products of the halves of 32-bit numbers, added. Where the processor has an instruction
        that adds such sums to a third number, LLVM makes it of this one and the addition."""
        ty = vector("i32", lanes)
        if self.multiply_pairs is None or lanes % self.multiply_pairs[0]:
            half = everywhere("i32", "16", lanes)
            high = [self.op(f"ashr {ty} {x}, {half}") for x in (a, b)]
            raised = [self.op(f"shl {ty} {x}, {half}") for x in (a, b)]
            low = [self.op(f"ashr {ty} {x}, {half}") for x in raised]
            products = [self.op(f"mul {ty} {x}, {y}") for x, y in (low, high)]
            return self.op(f"add {ty} {products[0]}, {products[1]}")
        width, name = self.multiply_pairs
        part, halves = vector("i32", width), vector("i16", 2 * width)
        f = self.declare(name, f"{part} @{name}({halves}, {halves})")
        result = "poison"
        for first in range(0, lanes, width):
            some = ", ".join([f"i32 {first + k}" for k in range(width)])
            operands = []
            for x in (a, b):
                if lanes > width:
                    pick = f"shufflevector {ty} {x}, {ty} poison, <{width} x i32> <{some}>"
                    x = self.op(pick)
                operands.append(self.op(f"bitcast {part} {x} to {halves}"))
            done = self.op(f"call {part} {f}({', '.join([f'{halves} {x}' for x in operands])})")
            if lanes == width:
                return done
            wide = [*range(width), *[-1] * (lanes - width)]
            order = [*range(first), *range(lanes, lanes + width)]
            order += [-1] * (lanes - len(order))
            result = self.shuffled(ty, result, self.shuffled(part, done, "poison", wide), order)
        return result

    def shuffled(self, ty: str, a: str, b: str, order: Sequence[int]) -> str:
        """Lanes chosen from two vectors; -1: any."""
        lanes = ", ".join([f"i32 {k}" if k >= 0 else "i32 poison" for k in order])
        return self.op(f"shufflevector {ty} {a}, {ty} {b}, <{len(order)} x i32> <{lanes}>")

    def elementary(self, e: Call | Binary, mask: Operand | None) -> Operand | None:
        """A function that is an expression of its arguments; None for others. The arguments are
        evaluated once: the expression, with its many selects, holds no loads. That one is at most
        a constant is left to see: it may make the function cheaper."""
        parts = e.args if isinstance(e, Call) else (e.a, e.b)
        shape: list[Expr] = []
        outside: list[tuple[Expr, Expr]] = []
        for k, a in enumerate(parts):
            var = Var(f"argument{k}", a.dtype)
            if type(a) is Const:
                shape.append(a)
            elif type(a) is Binary and a.op in ("min", "mul") and type(a.b) is Const:
                shape.append(Binary(a.op, var, a.b))
                outside.append((var, a.a))
            else:
                shape.append(var)
                outside.append((var, a))
        what = Call(e.fn, tuple(shape)) if isinstance(e, Call) else Binary("pow", *shape)
        expression = _expanded(what)
        if expression is None:
            return None
        bound = {v: self.value(a, mask) for v, a in outside}
        outer = self.arguments, self.stored
        self.arguments = bound
        self.stored = _used_once(expression) if self.few_registers else frozenset()
        result = self.value(expression)
        self.arguments, self.stored = outer
        return result

    def stored_constant(self, literal: str, ty: str) -> str:
        """A constant that an instruction takes from memory. One register for all its lanes would be
        loaded again in each iteration where a polynomial has more constants than there are
        registers, and a store in flight waits for each."""
        return self.op(f"load {ty}, ptr {self.table(literal, ty)}, align {TABLE_ALIGN}")


@functools.cache
def _expanded(e: Call | Binary) -> Expr | None:
    return llvm_math.expand(e)


@functools.cache
def _used_once(e: Expr) -> frozenset[Expr]:
    """The constants that occur at one place of an expression, whichever way its branch goes."""
    branches = [x for x in walk(e) if type(x) is Select and _is_branch(x)]
    sides = [x for select in branches for x in (select.a, select.b)] or [e]
    count: Counter[Expr] = Counter()
    for side in sides:
        count |= Counter(x for parent in walk(side) for x in parent.children() if type(x) is Const)
    return frozenset([x for x, n in count.items() if n == 1])


def _asks_bits(e: Expr) -> bool:
    """`llvm_math.rarely_any`, not `rarely_above`."""
    return type(e) is Binary and e.op == "ne"


def _is_branch(e: Select) -> bool:
    return type(e.cond) is Call and e.cond.fn == "rarely"


def _pairs_instruction(target: Target | None) -> tuple[int, str] | None:
    """The instruction that multiplies and adds pairs: its 32-bit lanes, and its name for LLVM."""
    if target is None or target.arch != "x86_64":
        return None
    sizes = {"avx512bw": (16, "avx512.pmaddw.d.512"), "avx2": (8, "avx2.pmadd.wd")}
    found = [size for feature, size in sizes.items() if feature in target.features]
    lanes, name = found[0] if found else (4, "sse2.pmadd.wd")
    return lanes, f"llvm.x86.{name}"
