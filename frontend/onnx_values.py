"""What is known of values while importing: numbers, and sizes that exporters compute in floats.

    Shape -> Cast(float) -> Mul(0.5) -> Floor -> Cast(int64)      h // 2

A float that depends on sizes and constants alone is a quotient of two integer expressions. A
constant is the simple fraction that rounds to it, so float32's 0.1 is 1/10 and 10 of them are 1:
what whoever wrote the model meant, and what rounded arithmetic gives for sizes below 2**24.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from minicompiler.ir.arith import Arith
from minicompiler.ir.expr import ONE, ZERO, Const, Expr, maximum, minimum
from minicompiler.ir.graph import (
    CONTENT_LIMIT,
    Apply,
    Constant,
    Value,
    apply,
    content_of,
    operands,
    type_of,
)
from minicompiler.ir.op import Op
from minicompiler.ir.types import TensorType
from minicompiler.limits import Budget
from minicompiler.ops import elementwise as el
from minicompiler.ops import index as ix
from minicompiler.ops import pieces as pc
from minicompiler.ops import shape as sh
from minicompiler.ops.evaluate import is_symbolic
from minicompiler.ops.resize import ratio
from minicompiler.passes.fold import evaluate_node

_MOST = 1 << 53  # larger numerators stand for no size


class _Found:
    """What is found out about values from what is known of their operands, each looked at once."""

    def __init__(self) -> None:
        # With the value itself, so that its id is not given to another one.
        self.found: dict[int, tuple[Value, np.ndarray | None]] = {}

    def of(self, value: Value) -> np.ndarray | None:
        """What is known of a value; None when it depends on data or is too large."""
        stack = [value]
        while stack:
            v = stack[-1]
            if id(v) in self.found:
                stack.pop()
                continue
            known = self._direct(v)
            if known is None and isinstance(v, Apply) and self._follows(v):
                waiting = [o for o in operands(v) if id(o) not in self.found]
                if waiting:
                    stack += waiting
                    continue
                known = self._compute(v)
            self.found[id(v)] = v, known
            stack.pop()
        return self.found[id(value)][1]

    def _direct(self, v: Value) -> np.ndarray | None:
        """What a value tells by itself."""
        raise NotImplementedError

    def _follows(self, v: Apply) -> bool:
        """Whether it may follow from the operands, those that have been looked at included."""
        raise NotImplementedError

    def _compute(self, v: Apply) -> np.ndarray | None:
        """It follows from the operands, which have all been looked at."""
        raise NotImplementedError


class KnownValues(_Found):
    """The numbers that values always have, as far as they are known while importing.

    `budget` pays for what is computed.
    """

    ROOM = 1 << 20  # bytes that a value computed here may exceed its operands by

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self.budget = budget

    def _direct(self, v: Value) -> np.ndarray | None:
        return _from_content(v) if _is_tensor(v) else None

    def _follows(self, v: Apply) -> bool:
        parts = [self.found.get(id(o)) for o in operands(v)]
        return _is_tensor(v) and all(p is None or p[1] is not None for p in parts)

    def _compute(self, v: Apply) -> np.ndarray | None:
        args = tuple(None if a is None else Constant(self._known(a)) for a in v.args)
        results = evaluate_node(v.with_(args=args), self.ROOM, self.budget)
        return None if results is None else results[0]

    def _known(self, v: Value) -> np.ndarray:
        found = self.found[id(v)][1]
        assert found is not None
        return found


def _from_content(value: Value) -> np.ndarray | None:
    if isinstance(value, Constant):
        return value.data
    content = content_of(value)
    if content is None or not all(type(e) is Const for e in content.flat):
        return None
    numbers = [e.value for e in content.flat]
    return np.array(numbers, type_of(value).dtype.numpy).reshape(content.shape)


# ---- sizes computed in floats --------------------------------------------------------------------
@dataclass(frozen=True)
class Quotient:
    """top / bottom; the bottom is positive."""

    top: Expr
    bottom: Expr = ONE


def _add(a: Quotient, b: Quotient) -> Quotient:
    return Quotient(a.top * b.bottom + b.top * a.bottom, a.bottom * b.bottom)


def _sub(a: Quotient, b: Quotient) -> Quotient:
    return Quotient(a.top * b.bottom - b.top * a.bottom, a.bottom * b.bottom)


def _mul(a: Quotient, b: Quotient) -> Quotient:
    return Quotient(a.top * b.top, a.bottom * b.bottom)


def _div(a: Quotient, b: Quotient) -> Quotient | None:
    if Arith().prove(b.top > ZERO) is not True:
        return None
    return Quotient(a.top * b.bottom, a.bottom * b.top)


def _extreme(choose: Callable[[Expr, Expr], Expr]) -> Callable[[Quotient, Quotient], Quotient]:
    return lambda a, b: Quotient(choose(a.top * b.bottom, b.top * a.bottom), a.bottom * b.bottom)


def _floor(a: Quotient) -> Quotient:
    return Quotient(a.top // a.bottom)


def _ceil(a: Quotient) -> Quotient:
    return Quotient((a.top + a.bottom - 1) // a.bottom)


def _round(a: Quotient) -> Quotient | None:
    """The nearest integer, where no element can lie in the middle of two."""
    if type(a.bottom) is not Const or a.bottom.value % 2 == 0:
        return None
    return Quotient((a.top * 2 + a.bottom) // (a.bottom * 2))


def _truncated(a: Quotient) -> Quotient | None:
    if a.bottom is ONE:
        return a
    return _floor(a) if Arith().prove(a.top >= ZERO) is True else None


_FORMULAS: dict[Op, Callable[..., Quotient | None]] = {
    el.add: _add, el.sub: _sub, el.mul: _mul, el.div: _div,
    el.minimum_: _extreme(minimum), el.maximum_: _extreme(maximum),
    el.floor: _floor, el.ceil: _ceil, el.round_: _round,
    el.neg: lambda a: Quotient(0 - a.top, a.bottom), el.identity: lambda a: a,
}  # fmt: skip
_MOVES = (pc.concat, pc.strided_slice, sh.reshape, sh.squeeze, sh.unsqueeze, sh.expand)


class Quotients(_Found):
    """What is known of floats that sizes determine: their elements as Quotients."""

    def __init__(self, values: KnownValues) -> None:
        super().__init__()
        self.values = values

    def sizes(self, value: Value) -> list[Expr] | None:
        """The elements of an integer tensor as expressions; None where they depend on data."""
        found = self.of(value)
        if found is None or not all(q.bottom is ONE for q in found.flat):
            return None
        return [Arith().simplify(q.top) for q in found.flat]

    def _direct(self, v: Value) -> np.ndarray | None:
        """Of sizes, and of constants."""
        if not _few(v):
            return None
        content = content_of(v)
        if content is not None:
            return None if type_of(v).dtype.is_bool else _each(Quotient, content)
        numbers = self.values.of(v)
        if numbers is None or numbers.dtype.kind not in "fiu" or not np.isfinite(numbers).all():
            return None
        fractions = [ratio(float(x)) for x in numbers.flat]
        if any(abs(f.numerator) > _MOST or f.denominator > _MOST for f in fractions):
            return None
        return _shaped([_constant(f) for f in fractions], numbers.shape)

    def _follows(self, v: Apply) -> bool:
        return _few(v) and _understood(v.op)

    def _compute(self, v: Apply) -> np.ndarray | None:
        assert isinstance(v.op, Op)
        args = [None if a is None else self.found[id(a)][1] for a in v.args]
        given = [a for a in args if a is not None]
        if len(given) < len(operands(v)):
            return None
        if v.op is el.cast_:
            to = type_of(v).dtype
            if not (to.is_float or to.is_int):
                return None
            return _each(lambda q: q if to.is_float else _truncated(q), given[0])
        if v.op in _FORMULAS:
            made = _each(_FORMULAS[v.op], *given)
            # Quotients of integers are integers.
            if made is None or type_of(v).dtype.is_float:
                return made
            return _each(_truncated, made)
        if is_symbolic(v.attrs):
            return None
        if v.op is ix.gather:
            at = self.values.of(v.args[1]) if v.args[1] is not None else None
            return None if at is None else np.asarray(v.op.reference(given[0], at, v.attrs))
        return np.asarray(v.op.reference(*given, v.attrs))


def with_sizes(made: Apply, sizes: list[Expr]) -> Apply:
    """The sizes as an integer tensor of the type and in the place of `made`."""
    line = apply(sh.shape_, attrs=sh.ShapeAttrs(values=tuple(sizes)), locs=made.locs)
    to = el.CastAttrs(type_of(made).dtype)
    cast = apply(el.cast_, line, attrs=to, locs=made.locs)
    shape = sh.ReshapeAttrs(type_of(made).shape)
    return apply(sh.reshape, cast, attrs=shape, locs=made.locs, name=made.name)


def _few(v: Value) -> bool:
    if not _is_tensor(v):
        return False
    t = type_of(v)
    known = [s.value for s in t.shape if type(s) is Const]
    return len(known) == t.rank and math.prod(known) <= CONTENT_LIMIT


def _is_tensor(v: Value) -> bool:
    return isinstance(v.type, TensorType)  # type: ignore[attr-defined]


def _understood(op: object) -> bool:
    return op in _FORMULAS or op in _MOVES or op is el.cast_ or op is ix.gather


def _constant(f: Fraction) -> Quotient:
    return Quotient(Const(f.numerator), Const(f.denominator))


def _each(f: Callable[..., Quotient | None], *arrays: np.ndarray) -> np.ndarray | None:
    """f on corresponding elements, with numpy's broadcasting; None where one is None."""
    together = np.broadcast_arrays(*arrays)
    made = [f(*each) for each in zip(*(a.flat for a in together), strict=True)]
    if any(q is None for q in made):
        return None
    return _shaped([_lowest(q) for q in made if q is not None], together[0].shape)


def _lowest(q: Quotient) -> Quotient:
    """The same quotient over 1, where that is known to be exact."""
    arith = Arith()
    top, bottom = arith.simplify(q.top), arith.simplify(q.bottom)
    if bottom is not ONE and arith.simplify(top % bottom) is ZERO:
        return Quotient(arith.simplify(top // bottom))
    return Quotient(top, bottom)


def _shaped(elements: list[Quotient], shape: tuple[int, ...]) -> np.ndarray:
    made = np.empty(len(elements), object)
    for k, q in enumerate(elements):
        made[k] = q
    return made.reshape(shape)
