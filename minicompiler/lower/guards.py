"""What is looked at when a call tells the sizes, and what is kept in bounds without looking.

Every access of a kernel stays inside its buffer: what cannot be proved is clamped.

    guard_accesses(func)      order[k] as an index of p0[n]   ->   max(min(order[k], n - 1), 0)

Of a buffer that may be empty nothing is read (the value is 0) or written. Done before scheduling,
where loops are still simple; primitives keep the meaning, so this as well. Nearly everything is
proved. What is left are tables that externs look up, and sizes that a type rule should have
compared: there a mistake gives a wrong number, not a crash.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from ..ir.arith import Arith, dims_of
from ..ir.expr import (
    FALSE,
    TRUE,
    ZERO,
    Binary,
    Const,
    Dim,
    Expr,
    Load,
    all_of,
    const,
    eq,
    maximum,
    minimum,
    ne,
    select,
    substitute,
    walk,
)
from ..ir.graph import Apply, Function, applies, arg_of, every_function, function_dims
from ..ir.op import Counted, assumptions
from ..ir.tir import If, PrimFunc, Seq, Stmt, Store, map_exprs, map_statements
from ..ir.verify_tir import unproved_accesses
from ..ops.rules import known_nonneg

_DIVIDES = ("floordiv", "mod", "div")


def guard_accesses(func: PrimFunc, facts: Sequence[Expr] = ()) -> PrimFunc:
    """Clamps indices that are not proved to be in range.

    facts: conditions on dimensions that are checked at run time before the function is called.
    """
    found = unproved_accesses(func, facts)
    if not found:
        return func
    inner: dict[tuple[object, tuple[Expr, ...]], tuple[Expr, ...]] = {}
    some: dict[tuple[object, tuple[Expr, ...]], Expr] = {}  # where there is an element at all
    arith = Arith(facts=facts)
    for (buffer, indices), axes in found.items():
        inner[buffer, indices] = tuple(
            maximum(minimum(i, size - 1), ZERO) if axis in axes else i
            for axis, (i, size) in enumerate(zip(indices, buffer.shape, strict=True))
        )
        some[buffer, indices] = all_of(
            buffer.shape[axis] > ZERO
            for axis in sorted(axes)
            if arith.prove(buffer.shape[axis] > ZERO) is not True
        )

    memo: dict[Expr, Expr] = {}

    def fixed(e: Expr) -> Expr:
        done = memo.get(e)
        if done is None:
            if type(e) is Load:
                indices = inner.get((e.buffer, e.indices), e.indices)
                mask = None if e.mask is None else fixed(e.mask)
                done = Load(e.buffer, tuple(map(fixed, indices)), mask)
                there = some.get((e.buffer, e.indices), TRUE)
                done = select(there, done, const(0, e.dtype))
            else:
                done = e.map(fixed)
            memo[e] = done
        return done

    def store(s: Stmt) -> Stmt | None:
        if not isinstance(s, Store) or (s.buffer, s.indices) not in inner:
            return None
        place = s.buffer, s.indices
        made = s.with_(indices=inner[place])
        if some[place] is FALSE:
            return Seq(())
        return made if some[place] is TRUE else If(some[place], made)

    phases = [map_exprs(map_statements(p, store), fixed) for p in func.phases]
    return func.with_(phases=tuple(phases))


def run_time_guards(fn: Function) -> list[tuple[Expr, str]]:
    """What type rules took for granted, each with the node that needs it: sizes that are equal, and
    sizes that are not negative (a window larger than the image). First, because other conditions
    divide by them as well: sizes that are not 0."""
    found: dict[Expr, str] = {}
    divisors: dict[Expr, str] = {}
    nodes = [v for f in every_function(fn) for v in applies(f)]
    counted = any(isinstance(v.attrs, Counted) for v in nodes)
    known = frozenset(function_dims(fn))
    if not known and not counted:
        return []
    for v in nodes:
        if isinstance(v.op, Function):
            continue
        with assumptions() as pairs:
            v.op.infer(*[None if a is None else arg_of(a) for a in v.args], v.attrs)
        where = str(v.locs[0]) if v.locs else v.op.name
        for size in _sizes(v):
            for e in walk(size):
                if type(e) is Binary and e.op in _DIVIDES and _may_be_zero(e.b, known):
                    divisors.setdefault(ne(e.b, ZERO), f"{where} divides by {e.b}")
        for a, b in pairs:
            found.setdefault(eq(a, b), f"{where} needs {a} = {b}")
        for t in v.type if isinstance(v.type, tuple) else (v.type,):
            for size in t.shape:
                if _may_be_negative(size, known):
                    found.setdefault(size >= ZERO, f"{where} makes {t}")
    return [*divisors.items(), *found.items()]


def equal_sizes(fn: Function) -> dict[Expr, Expr]:
    """Dimensions that every call gives the size of another one, or a known size, by what stands for
    them: {m: n, k: 2}. Loops and buffers that take one size of several would not match otherwise.
    """
    found: dict[Expr, Expr] = {}
    given = function_dims(fn)  # others are counted from data, perhaps by this very function
    for fact, _ in run_time_guards(fn):
        if type(fact) is not Binary or fact.op != "eq":
            continue
        # The one with the larger bound, a number above all, stands for both.
        a, b = sorted((substitute(e, found) for e in (fact.b, fact.a)), key=_least)
        if a is not b and a in given and isinstance(b, Dim | Const):
            found = {k: substitute(v, {a: b}) for k, v in found.items()} | {a: b}
    return found


def _least(size: Expr) -> tuple[bool, int]:
    return not isinstance(size, Dim), size.lo if isinstance(size, Dim) else 0


def _sizes(v: Apply) -> Iterator[Expr]:
    """The sizes in the types and the attributes of a node."""
    for t in v.type if isinstance(v.type, tuple) else (v.type,):
        yield from t.shape
    for field in dataclasses.fields(v.attrs):
        value = getattr(v.attrs, field.name)
        every = value if isinstance(value, tuple) else (value,)
        yield from (e for e in every if isinstance(e, Expr))


def _may_be_zero(size: Expr, known: frozenset[Dim]) -> bool:
    """Whether a divisor has to be looked at when a call tells the dimensions `known`."""
    if isinstance(size, Const) or not known.issuperset(dims_of([size])):
        return False
    arith = Arith()
    return arith.prove(size > ZERO) is not True and arith.prove(size < ZERO) is not True


def _may_be_negative(size: Expr, known: frozenset[Dim]) -> bool:
    """Whether a size has to be looked at when a call tells the dimensions `known`."""
    if isinstance(size, Const | Dim) or not known.issuperset(dims_of([size])):
        return False
    return not known_nonneg(size)
