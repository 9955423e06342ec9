"""Index arithmetic -> LLVM values, each emitted once and outside of the loops it does not need.

An index expression is emitted in the scope of its innermost variable: code motion and common
subexpressions of all addresses come from that. `env` holds unrolled variables, which are numbers.
"""

from __future__ import annotations

from minicompiler.ir.expr import (
    Binary,
    Const,
    Dim,
    Expr,
    Load,
    Select,
    Var,
    free_vars,
    substitute,
)
from minicompiler.ir.polynomials import Poly, subtract
from minicompiler.ir.tir import Buffer, PrimFunc
from minicompiler.ir.types import int64
from minicompiler.lower.blocks import arith_of_loops

from .llvm_convert import Conversions
from .llvm_text import Division, Operand, vector

_INDEX_OPS = frozenset(("add", "sub", "mul", "floordiv", "mod", "min", "max"))
_NSW = {"add": "add nsw", "sub": "sub nsw", "mul": "mul nsw"}
_RECENT = 4  # divisions by one size that the next may follow: a tile reads and writes a few ways
_NO_BUFFERS: frozenset[Buffer] = frozenset()


class Indices(Conversions):
    """Index expressions of one function, given the variables that are bound at this point."""

    def __init__(self, func: PrimFunc) -> None:
        super().__init__(func)
        self.level: dict[Expr, int] = {}  # variable -> index of the scope it belongs to
        self.names: dict[Expr, str] = {}
        self.env: dict[Expr, Expr] = {}  # unrolled variables and their value now
        self.arith = arith_of_loops(func)
        self.resolved: dict[object, Expr] = {}
        self.buffers_in: dict[Expr, frozenset[Buffer]] = {}
        self.index_like: dict[Expr, bool] = {}
        self.straight = False  # while code is written that must not branch

    # ---- facts about expressions ----------------------------------------------------------------
    def reads(self, e: Expr) -> frozenset[Buffer]:
        """The buffers that `e` loads from."""
        found = self.buffers_in.get(e)
        if found is None:
            found = _NO_BUFFERS
            for c in e.children():
                inner = self.reads(c)
                if inner:
                    found = found | inner if found else inner
            if type(e) is Load:
                found = found | {e.buffer}
            self.buffers_in[e] = found
        return found

    def is_index(self, e: Expr) -> bool:
        """Whether `index` can emit all of `e`, which then moves out of inner loops."""
        found = self.index_like.get(e)
        if found is None:
            if type(e) is Binary:
                known = e.op in _INDEX_OPS and e.dtype is int64
                found = known and self.is_index(e.a) and self.is_index(e.b)
            elif type(e) is Select:
                found = e.dtype is int64 and self.is_condition(e.cond)
                found = found and self.is_index(e.a) and self.is_index(e.b)
            else:
                found = e.dtype is int64 and isinstance(e, Const | Var | Dim)
            self.index_like[e] = found
        return found

    def is_condition(self, e: Expr) -> bool:
        """A comparison of index expressions, or several joined by and, or."""
        if type(e) is Binary and e.op in ("and", "or"):
            return self.is_condition(e.a) and self.is_condition(e.b)
        return type(e) is Binary and e.dtype.is_bool and self.is_index(e.a) and self.is_index(e.b)

    def resolve(self, e: Expr) -> Expr:
        """`e` with unrolled variables replaced by their current values, simplified."""
        if not self.env:
            return e
        free = free_vars(e)
        used = [v for v in self.env if v in free]
        if not used:
            return e
        key = (e, *[(v, self.env[v]) for v in used])
        found = self.resolved.get(key)
        if found is None:
            found = self.arith.simplify(substitute(e, {v: self.env[v] for v in used}))
            self.resolved[key] = found
        return found

    def at_env(self, poly: Poly) -> Poly:
        """A polynomial with the unrolled variables replaced."""
        if not self.env:
            return poly
        result: Poly = {}
        for m, whole in poly.items():
            c = whole
            rest: list[Expr] | None = []
            for a in m:
                value = self.env.get(a)
                if type(value) is Const:
                    c = c * value.value
                elif free_vars(a).isdisjoint(self.env):
                    assert rest is not None
                    rest.append(a)
                else:  # an unrolled variable inside // or %: simplify the whole term
                    rest = None
                    break
            if rest is None:
                term = self.resolve(self.arith.expr({m: whole}))
                for m2, c2 in self.arith.poly(term).items():
                    result[m2] = result.get(m2, 0) + c2
            else:
                k = tuple(rest)
                result[k] = result.get(k, 0) + c
        return {m: c for m, c in result.items() if c}

    def home(self, e: Expr) -> int:
        """The scope a pure expression belongs to: that of its innermost variable."""
        level = self.level
        return max([level[v] for v in free_vars(e)], default=0)

    # ---- index arithmetic -----------------------------------------------------------------------
    def index(self, e: Expr, at: int | None = None) -> str:
        """An i64 operand for a scalar index expression."""
        e = self.resolve(e)
        if type(e) is Const:
            return str(e.value)
        known = self.names.get(e)
        if known is not None:
            return known
        if self.reads(e):
            return self.value(e).name
        home = self.home(e) if at is None else at
        found = self.scopes[home].values.get(e)
        if found is not None:
            return found.name
        if type(e) is Binary and e.op in _INDEX_OPS:
            a, b = self.index(e.a), self.index(e.b)
            if e.op in _NSW:
                name = self.op(f"{_NSW[e.op]} i64 {a}, {b}", home)
            elif e.op in ("min", "max"):
                name = self.intrinsic("s" + e.op, "i64", a, b, level=home)
            else:
                name = self.floor(e.op, e.a, a, e.b, b, home)
        elif type(e) is Select and self.is_condition(e.cond):
            c = self.condition(e.cond, home)
            a, b = self.index(e.a), self.index(e.b)
            name = self.op(f"select i1 {c}, i64 {a}, i64 {b}", home)
        else:  # a conversion from numbers: ordinary values, computed at their home
            name = self.value_at(e, home).name
        self.scopes[home].values[e] = Operand(name)
        return name

    def condition(self, e: Expr, home: int) -> str:
        """An i1 operand for what `is_condition` accepts."""
        assert isinstance(e, Binary)
        if e.op in ("and", "or"):
            a, b = self.condition(e.a, home), self.condition(e.b, home)
            return self.op(f"{e.op} i1 {a}, {b}", home)
        code = {"lt": "slt", "le": "sle"}.get(e.op, e.op)
        return self.op(f"icmp {code} i64 {self.index(e.a)}, {self.index(e.b)}", home)

    def floor(self, op: str, ea: Expr, a: str, eb: Expr, b: str, home: int) -> str:
        """Division rounding down; plain unsigned division where both sides are known positive."""
        low = self.arith.interval(ea)[0]
        natural, positive = low is not None and low >= 0, self.positive(eb)
        if positive and type(eb) is not Const:
            quotient, rest = self.divided(ea, a, eb, b, home, natural)
            return quotient if op == "floordiv" else rest
        if not positive and b.startswith("%"):
            # Code moved out of a loop also runs where the loop does not: it must not trap.
            zero = self.op(f"icmp eq i64 {b}, 0", home)
            b = self.op(f"select i1 {zero}, i64 1, i64 {b}", home)
        if natural and positive:
            return self.op(f"{'udiv' if op == 'floordiv' else 'urem'} i64 {a}, {b}", home)
        return self.floor_signed(op, a, b, "i64", 1, home)

    def divided(
        self, ea: Expr, a: str, eb: Expr, b: str, home: int, natural: bool
    ) -> tuple[str, str]:
        """Quotient and rest of a division rounding down by a positive size that is not known while
        compiling. Rows of a tile divide one number after the next: only the first is divided, the
        others count on, since a division takes longer than the arithmetic of a row."""
        known = self.scopes[home].divisions.setdefault(eb, [])
        for last in reversed(known[-_RECENT:]):
            if last.expr is ea:
                return last.quotient, last.rest
            if self.follows(ea, last.expr):
                step = self.op(f"sub nsw i64 {a}, {last.dividend}", home)
                more = self.op(f"add nsw i64 {last.rest}, {step}", home)
                wraps = self.op(f"icmp eq i64 {more}, {b}", home)
                rest = self.op(f"select i1 {wraps}, i64 0, i64 {more}", home)
                carry = self.op(f"zext i1 {wraps} to i64", home)
                quotient = self.op(f"add nsw i64 {last.quotient}, {carry}", home)
                break
        else:
            if natural:
                quotient = self.op(f"udiv i64 {a}, {b}", home)
                rest = self.op(f"urem i64 {a}, {b}", home)
            else:
                quotient = self.floor_signed("floordiv", a, b, "i64", 1, home)
                rest = self.floor_signed("mod", a, b, "i64", 1, home)
        known.append(Division(ea, a, quotient, rest))
        return quotient, rest

    def follows(self, new: Expr, old: Expr) -> bool:
        """Whether `new` is known to be `old` or one more."""
        if isinstance(new, Binary) and isinstance(old, Binary):
            alike = new.op == old.op and new.b is old.b
            if alike and (new.op == "min" or (new.op == "floordiv" and self.positive(new.b))):
                return self.follows(new.a, old.a)
        return subtract(self.arith.poly(new), self.arith.poly(old)) in ({}, {(): 1})

    def positive(self, e: Expr) -> bool:
        low = self.arith.interval(e)[0]
        return low is not None and low > 0

    def floor_signed(self, op: str, a: str, b: str, scalar: str, lanes: int, level: int) -> str:
        ty = vector(scalar, lanes)
        r = self.op(f"srem {ty} {a}, {b}", level)
        q = self.op(f"sdiv {ty} {a}, {b}", level) if op != "mod" else ""
        return self.floored(op, q, r, b, scalar, lanes, level)

    def floored(self, op: str, q: str, r: str, b: str, scalar: str, lanes: int, level: int) -> str:
        """Quotient or remainder of a division rounded down, from those of one rounded to zero."""
        ty, flag = vector(scalar, lanes), vector("i1", lanes)
        zero = "0" if lanes == 1 else "zeroinitializer"
        signs = self.op(f"xor {ty} {r}, {b}", level)
        differ = self.op(f"icmp slt {ty} {signs}, {zero}", level)
        some = self.op(f"icmp ne {ty} {r}, {zero}", level)
        fix = self.op(f"and {flag} {differ}, {some}", level)
        if op == "mod":
            more = self.op(f"add {ty} {r}, {b}", level)
            return self.op(f"select {flag} {fix}, {ty} {more}, {ty} {r}", level)
        less = self.op(f"sext {flag} {fix} to {ty}", level)
        return self.op(f"add {ty} {q}, {less}", level)

    def value_at(self, e: Expr, level: int) -> Operand:
        """A value computed in a scope further out, at the end of what is written of it."""
        inner, straight = self.scopes, self.straight
        self.scopes, self.straight = inner[: level + 1], True
        result = self.value(e)
        self.scopes, self.straight = inner, straight
        return result

    def value(self, e: Expr, mask: Operand | None = None) -> Operand:
        """The operand for any expression; see llvm_values.py."""
        raise NotImplementedError
