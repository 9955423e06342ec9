"""The primitive `truncate`: loops over the columns of a triangle end at its diagonal.

    for j in n: s[i, j] = ..                          for j in (i + w) // w * w: s[i, j] = ..
    for j in n: m[i] = max(m[i], select(j <= i,       for j in ..: m[i] = max(m[i], ..)
                               s[i, j], -inf))  ->
    for j in n: e[i, j] = exp(select(..) - m[i])      for j in ..: e[i, j] = exp(select(..) - m[i])
    for j in n: r[i] = r[i] + e[i, j] * v[j]          for j in ..: r[i] = r[i] + e[i, j] * v[j]

What lies beyond is followed from block to block: elements become -inf or 0 there, combining them
changes nothing, and what only they are made of need not be computed. As for `skip`, 0 * inf counts
as 0 here, and so does exp(-inf - m): every row has a column before the diagonal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

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
    binary,
    conjuncts,
    const,
    const_int,
    free_vars,
    maximum,
    minimum,
    substitute,
    walk,
)
from minicompiler.ir.tir import SERIAL, Alloc, Block, Buffer, For, Stmt, statements, sub_statements
from minicompiler.ir.types import index as index_type
from minicompiler.ir.types import int64
from minicompiler.lower.to_tir import identity_of

from . import analysis
from .reductions import COMBINER

if TYPE_CHECKING:
    from minicompiler.ir.arith import Arith

    from .schedule import Schedule


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """Elements of a buffer lie beyond where the sum of slope * index, plus start, is positive."""

    slopes: tuple[int, ...]
    start: Expr
    value: Expr | None  # what they are there; None: nobody reads them


@dataclasses.dataclass
class _Search:
    """What is known so far. Distances are positive beyond the diagonal; they are in loop variables
    and simplified, so that equal ones are identical."""

    s: Schedule
    arith: Arith
    inner: frozenset[Var]  # the loops inside the one that is looked at
    matrices: dict[Buffer, _Matrix] = dataclasses.field(default_factory=dict)
    distances: dict[str, Expr] = dataclasses.field(default_factory=dict)  # of blocks
    settled: set[str] = dataclasses.field(default_factory=set)  # they need no operand beyond
    neutral: set[str] = dataclasses.field(default_factory=set)  # reductions that change nothing
    hidden: set[Buffer] = dataclasses.field(default_factory=set)  # read before the diagonal only


def truncate(s: Schedule, name: str, width: int) -> None:
    """See the module text. All loops inside one iteration of `name` that are of no effect beyond a
    diagonal end there, at the next multiple of `width` columns."""
    around, _ = s.loop(name)
    ends = _ends_inside(s, around)
    if not ends:
        s.refuse(f"nothing inside of {name} is without effect beyond a diagonal", around)
    if len({distance for distance, _ in ends.values()}) > 1:
        s.refuse(f"the loops inside of {name} do not reach the diagonal together", around)
    arith = analysis.arith_of(s.func)
    for loop, (distance, step) in ends.items():
        if width % step:
            s.refuse(f"{loop.var} walks by {step} columns, which does not divide {width}", loop)
        groups = arith.simplify((ZERO - distance) // width + 1)
        if arith.prove(groups >= ZERO) is not True:
            groups = maximum(groups, ZERO)
        extent = arith.simplify(minimum(loop.extent, groups * (width // step)))
        here, _ = s.loop(loop.var.name)
        s.swap(here, here.with_(extent=extent))


def is_triangular(s: Schedule, name: str) -> bool:
    """True when `truncate` finds loops inside of one."""
    return bool(_ends_inside(s, s.loop(name)[0]))


def _ends_inside(s: Schedule, around: For) -> dict[For, tuple[Expr, int]]:
    """For each loop that can end at the diagonal: the least distance in its first iteration, and
    the columns of an iteration."""
    inner = frozenset(x.var for x in analysis.loops(around.body))
    found = _Search(s, analysis.arith_of(s.func), inner)
    every = list(analysis.blocks(around.body))
    for b in every:
        _follow(found, b)
    for b in reversed(every):
        _ask_readers(found, b)
    return dict(_ends(found, around.body))


# ---- what blocks do beyond the diagonal ---------------------------------------------------------
def _follow(found: _Search, b: Block) -> None:
    """Notes the distance of a block, and what it computes beyond the diagonal."""
    update = analysis.update_operand(b) if analysis.is_reduction(b) else None
    operand = substitute(b.body.value if update is None else update[1], analysis.values_of(b))
    distance = next(iter(_distances(found, operand)), None)
    if distance is None or (update is None and analysis.is_reduction(b)):
        return
    value: Expr | None = _beyond(found, operand, distance)
    if update is not None:
        combiner = COMBINER.get(update[0])
        if combiner is None or value is not identity_of(combiner, operand.dtype):
            return
        found.neutral.add(b.name)
        value = None if b.init is None else b.init.value
    elif type(value) is not Const:
        return
    found.distances[b.name] = distance
    found.settled.add(b.name)
    if type(value) is Const and analysis.writers(found.s.func, b.body.buffer) == [b]:
        reduced = {v for i in b.iters if i.reduce for v in free_vars(i.value)} & found.inner
        least = found.arith.bound(distance, reduced, -1)  # all that is reduced lies beyond
        matrix = None if least is None else _matrix(found, _place(found, b), least, value)
        if matrix is not None:
            found.matrices[b.body.buffer] = matrix


def _ask_readers(found: _Search, b: Block) -> None:
    """Notes whether what a block computes is read before the diagonal only."""
    buffer, func = b.body.buffer, found.s.func
    if buffer in func.params:
        return
    for r in analysis.readers(func, buffer):
        loads = [x for x in analysis.operand_loads(r) if x.buffer is buffer]
        if loads and r.name not in found.settled:
            return
        values = analysis.values_of(r)
        for load in loads:
            distance = found.distances[r.name]
            at = [found.arith.simplify(substitute(i, values)) for i in load.indices]
            if buffer not in found.matrices:
                matrix = _matrix(found, at, distance, None)
                if matrix is None:
                    return
                found.matrices[buffer] = matrix
            if _distance_at(found, found.matrices[buffer], at) is not distance:
                return
    if buffer in found.matrices:
        found.hidden.add(buffer)
        if b.name not in found.distances:
            found.distances[b.name] = _distance_at(found, found.matrices[buffer], _place(found, b))
            found.settled.add(b.name)


def _place(found: _Search, b: Block) -> list[Expr]:
    values = analysis.values_of(b)
    return [found.arith.simplify(substitute(i, values)) for i in b.body.indices]


def _beyond(found: _Search, e: Expr, distance: Expr) -> Expr:
    """The expression beyond the diagonal: a constant, or something unknown."""
    if type(e) is Select:
        if any(_distance(found, c) is distance for c in conjuncts(e.cond)):
            return _beyond(found, e.b, distance)
        a, b = (_beyond(found, x, distance) for x in (e.a, e.b))
        return a if a is b else e
    elif type(e) is Load:
        matrix = found.matrices.get(e.buffer)
        if matrix is not None and matrix.value is not None:
            same = _distance_at(found, matrix, e.indices) is distance
            return matrix.value if same else e
    elif type(e) is Call and e.fn == "exp":
        if _is(_beyond(found, e.args[0], distance), float("-inf")):
            return const(0, e.dtype)
    elif type(e) is Binary:
        a, b = (_beyond(found, x, distance) for x in (e.a, e.b))
        if e.op == "mul" and (_is(a, 0) or _is(b, 0)):
            return const(0, e.dtype)
        if e.op in ("add", "sub") and _is(a, float("-inf")):
            return a
        if e.op == "add" and _is(b, float("-inf")):
            return b
        if e.op == "mul" and _is(a, float("-inf")) and type(b) is Const and b.value > 0:
            return a
    return e


def _is(e: Expr, value: float) -> bool:
    return type(e) is Const and e.dtype.is_float and e.value == value


# ---- distances ----------------------------------------------------------------------------------
def _distances(found: _Search, e: Expr) -> Iterator[Expr]:
    """The distances that may decide what an expression is."""
    for x in walk(e):
        if type(x) is Select:
            for c in conjuncts(x.cond):
                distance = _distance(found, c)
                if distance is not None:
                    yield distance
        elif type(x) is Load and x.buffer in found.matrices:
            yield _distance_at(found, found.matrices[x.buffer], x.indices)


def _distance(found: _Search, cond: Expr) -> Expr | None:
    """The distance of a condition `column <= row + n` that the first column of each row meets."""
    if type(cond) is not Binary or cond.op not in ("lt", "le") or not cond.a.dtype.is_int:
        return None
    if any(type(x) is Load for x in walk(cond)):
        return None
    arith = found.arith
    column, row = _position(cond.a), _position(cond.b)
    if column is None or row is None:
        return None
    distance = arith.simplify(column - row + (1 if cond.op == "lt" else 0))
    # Columns count from 0, so without them it is that of the first.
    line = arith.poly(distance)
    moving = {m for m in line if _loops(arith, m)}
    first = {m: c for m, c in line.items() if c < 0 or m not in moving}
    if len(first) == len(line) or moving.isdisjoint(first):
        return None
    return distance if arith.prove(arith.expr(first) <= ZERO) is True else None


def _position(e: Expr) -> Expr | None:
    """An integer expression as an index: positions in tensors are int64."""
    if type(e) is Const:
        return const(e.value, index_type)
    if type(e) is Cast and e.dtype is int64:
        return _position(e.a)
    if type(e) is Binary and e.dtype is int64 and e.op in ("add", "sub", "mul"):
        a, b = _position(e.a), _position(e.b)
        return None if a is None or b is None else binary(e.op, a, b)
    return e if e.dtype is index_type else None


def _loops(arith: Arith, term: tuple[Expr, ...]) -> bool:
    return any(isinstance(v, Var) and v in arith.ranges for a in term for v in free_vars(a))


def _matrix(found: _Search, at: list[Expr], distance: Expr, value: Expr | None) -> _Matrix | None:
    """The same distance in terms of the indices of an element, if they tell it."""
    slopes = []
    for index in at:
        line, whole = found.arith.poly(index), found.arith.poly(distance)
        moving = next((m for m in line if {v for a in m for v in free_vars(a)} & found.inner), None)
        slope, rest = (0, 0) if moving is None else divmod(whole.get(moving, 0), line[moving])
        if rest:
            return None
        slopes.append(slope)
        distance = found.arith.simplify(distance - index * slope)
    if free_vars(distance) & found.inner:
        return None
    return _Matrix(tuple(slopes), distance, value)


def _distance_at(found: _Search, matrix: _Matrix, at: Sequence[Expr]) -> Expr:
    distance = matrix.start
    for slope, index in zip(matrix.slopes, at, strict=True):
        distance = distance + index * slope
    return found.arith.simplify(distance)


# ---- loops --------------------------------------------------------------------------------------
def _ends(found: _Search, body: Stmt) -> Iterator[tuple[For, tuple[Expr, int]]]:
    """The outermost loops that can end at the diagonal."""
    end = _end(found, body) if isinstance(body, For) else None
    if end is not None:
        assert isinstance(body, For)
        yield body, end
        return
    for x in sub_statements(body):
        yield from _ends(found, x)


def _end(found: _Search, loop: For) -> tuple[Expr, int] | None:
    if loop.kind is not SERIAL:
        return None
    own = {x.buffer for x in statements(loop.body) if isinstance(x, Alloc)}
    inside = {x.var: x for x in analysis.loops(loop.body)}
    ends: set[tuple[Expr, int]] = set()
    for b in analysis.blocks(loop.body):
        if b.body.buffer in own:
            continue
        neutral = b.name in found.neutral and b.init is None
        if b.name not in found.distances or not (neutral or b.body.buffer in found.hidden):
            return None
        line = found.arith.poly(found.distances[b.name])
        step = line.get((loop.var,), 0)
        span = 0  # columns of one iteration, but for one
        for v in found.inner:
            slope = line.get((v,), 0)
            if v is loop.var or slope <= 0:
                continue
            extent = const_int(inside[v].extent) if v in inside else None
            if extent is None:
                return None
            span += slope * (extent - 1)
        least = found.arith.bound(
            substitute(found.distances[b.name], {loop.var: ZERO}), found.inner, -1
        )
        if step <= span or least is None:
            return None
        ends.add((least, step))
    return next(iter(ends)) if len(ends) == 1 else None
