"""Causal masks as one condition on indices, however an exporter writes them.

    add(%x, [[0, -inf], [0, 0]])                       a stored triangle
    add(%x, trilu(full(-inf), k=1))                    a computed one
    where(less(rows, columns), -3.4e38, %x)            a comparison of positions
        ->  where(trilu(true, lower, k=0), %x, -inf)   which reads nothing

What a mask is, is derived: a constant is looked at, anything else is evaluated for all elements on
each side of a diagonal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from .. import te
from ..ir.arith import Arith
from ..ir.expr import (
    ONE,
    ZERO,
    Binary,
    Call,
    Cast,
    Const,
    Expr,
    Load,
    Reduce,
    const,
    const_int,
    free_vars,
    rewrite,
    substitute,
    walk,
)
from ..ir.graph import Apply, Constant, Function, Value, apply, type_of
from ..ir.op import Kind
from ..ir.types import DType, TensorType, bool_, index, int64
from ..ops import elementwise, pieces, reduce, shape
from .kind import expressions, kind_of

LOWEST = -1e9  # a finite number from here on counts as -inf, where nothing else masks
_NODES = 32  # a mask of more nodes is not looked through
_NUMPY: dict[str, np.ufunc] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Triangle:
    """A matrix (or several equal ones) that holds two numbers: `inside` where column <= row +
    offset, `beyond` elsewhere. The offset is not negative."""

    offset: Expr
    inside: float
    beyond: float


def causal_offset(node: Apply, position: int, alone: bool) -> Expr | None:
    """The offset of a causal mask that `node` puts on argument `position`; None: it does not.

    alone: no other mask, and no other function of the scores, follows or precedes it.
    """
    low: float | None = None
    found: Triangle | None = None
    if node.op is elementwise.add:
        mask = node.args[1 - position]
        found = None if mask is None else triangle(mask)
        if found is not None and found.inside == 0:
            low = found.beyond
    elif node.op is elementwise.where and position > 0:
        condition, other = node.args[0], node.args[3 - position]
        found = None if condition is None else triangle(condition)
        single = isinstance(other, Constant) and other.data.size == 1
        if found is not None and single and bool(found.inside) is (position == 1):
            assert isinstance(other, Constant)
            low = float(other.data.reshape(-1)[0])
    if found is None or low is None:
        return None
    return found.offset if low == -np.inf or (alone and low <= LOWEST) else None


def never_empty(condition: Value) -> bool:
    """True for `equal(reduce_max(mask), low)`, the rows without a key, of a causal mask: none."""
    if not isinstance(condition, Apply) or condition.op is not elementwise.equal:
        return False
    most, low = condition.args
    if not isinstance(most, Apply) or most.op is not reduce.reduce_max or most.args[0] is None:
        return False
    mask, last = most.args[0], type_of(most.args[0]).rank - 1
    if most.attrs.axes not in ((-1,), (last,)) or not isinstance(low, Constant):
        return False
    found = triangle(mask)
    return found is not None and found.inside > found.beyond and found.inside not in low.data


def masked(x: Value, offset: Expr) -> Value:
    """x where column <= row + offset, -inf elsewhere."""
    t = type_of(x)
    low = Constant(np.full((), -np.inf, t.dtype.numpy))
    return apply(elementwise.where, _kept(t, offset), x, low)


def _kept(t: TensorType, offset: Expr) -> Value:
    """Where column <= row + offset in a matrix of a type."""
    number = const_int(offset)
    k = offset if number is None else number
    every = apply(shape.full, attrs=shape.FullAttrs(t.shape[-2:], True, bool_))
    return apply(pieces.trilu, every, attrs=pieces.TriluAttrs(upper=False, k=k))


def _written_out(mask: Constant) -> Value | None:
    """A stored triangle as nodes that read nothing."""
    found, dtype = triangle(mask), mask.type.dtype
    if found is None:
        return None
    kept = _kept(mask.type, found.offset)
    if dtype is bool_:
        return kept if found.inside else apply(elementwise.logical_not, kept)
    numbers = [Constant(np.full((), v, dtype.numpy)) for v in (found.inside, found.beyond)]
    return apply(elementwise.where, kept, *numbers)


def computed_inside(mask: Value, leaf: Callable[[Value], Value]) -> Value | None:
    """The nodes of a mask again, down to values of rows or columns alone, which `leaf` makes
    operands: a kernel that computes these needs no memory for the mask. None where a matrix is
    read, or where something costs more than to read it."""
    extents = type_of(mask).shape[-2:]
    if type_of(mask).rank < 2 or ONE in extents:
        return None
    made: dict[int, Value] = {}

    def is_matrix(v: Value) -> bool:
        return type_of(v).shape[-2:] == extents

    def copy(v: Value) -> bool:
        """Notes a node and what it is made of; False: not all of it can be."""
        if id(v) in made or (isinstance(v, Constant) and v.data.size == 1):
            made.setdefault(id(v), v)
            return True
        if isinstance(v, Constant) and is_matrix(v):
            triangular = _written_out(v)
            if triangular is not None:
                made[id(v)] = triangular
                stored.append(v)
            return triangular is not None
        if not is_matrix(v) and not _reads_nothing(v):
            leaves.append(v)
            sizes = [n for n in type_of(v).shape if n in extents]
            return len(sizes) < 2  # it has rows or columns, not both
        if not isinstance(v, Apply) or not _is_cheap(v):
            return False
        if not all(copy(a) for a in v.args if a is not None):
            return False
        nodes.append(v)
        return True

    leaves: list[Value] = []
    nodes: list[Apply] = []
    stored: list[Constant] = []
    if not copy(mask) or len(nodes) > _NODES:
        return None
    if stored and not any(_is_lowest(a) for v in nodes for a in v.args):
        return None  # no loop ends earlier for it
    for v in leaves:
        if id(v) not in made:
            made[id(v)] = leaf(v)
    for v in nodes:
        made[id(v)] = v.with_(args=tuple(None if a is None else made[id(a)] for a in v.args))
    return made[id(mask)]


def _is_lowest(v: Value | None) -> bool:
    return isinstance(v, Constant) and v.data.size == 1 and bool(v.data.reshape(-1)[0] == -np.inf)


def _reads_nothing(v: Value) -> bool:
    return isinstance(v, Apply) and _is_cheap(v) and all(
        a is not None and (_reads_nothing(a) or (isinstance(a, Constant) and a.data.size == 1))
        for a in v.args
    )  # fmt: skip


def _is_cheap(v: Apply) -> bool:
    """True for a few operations on elements whose place is known."""
    if isinstance(v.op, Function) or isinstance(v.type, tuple) or any(v.layouts):
        return False
    if kind_of(v) > Kind.INJECTIVE:
        return False
    _, results = expressions(v)
    for e in (x for t in te.closure(results) if t.body is not None for x in walk(t.body)):
        if type(e) is Call or (type(e) is Binary and e.op in ("floordiv", "mod", "pow", "div")):
            return False
        if type(e) is Load and any(type(x) is Load for i in e.indices for x in walk(i)):
            return False
    return True


def triangle(mask: Value) -> Triangle | None:
    """What the mask is, if it is a triangle of two numbers."""
    t = type_of(mask)
    if t.rank < 2 or ONE in t.shape[-2:] or ZERO in t.shape:
        return None
    return _stored(mask.data) if isinstance(mask, Constant) else _computed(mask)


def _stored(data: np.ndarray) -> Triangle | None:
    matrices = data.reshape(-1, *data.shape[-2:])
    first = matrices[0, 0]
    inside = first[0]
    others = np.flatnonzero(first != inside)
    if not others.size:
        return None
    beyond = first[others[0]]
    offset = int(others[0]) - 1
    rows, columns = matrices.shape[1:]
    wanted = np.where(np.tri(rows, columns, offset, dtype=bool), inside, beyond)
    if not np.array_equal(matrices, np.broadcast_to(wanted, matrices.shape)):
        return None
    return Triangle(const(offset), float(inside), float(beyond))


def _computed(mask: Value) -> Triangle | None:
    extents = type_of(mask).shape
    axes = te.axis_vars(len(extents))
    element = _element(mask, axes, [_NODES])
    if element is None:
        return None
    row, column = axes[-2:]
    ranges: dict[Expr, tuple[Expr, Expr]] = {
        a: (ZERO, n - 1) for a, n in zip(axes, extents, strict=True)
    }
    arith = Arith(ranges)
    for e in walk(element):
        if type(e) is not Binary or e.op not in ("lt", "le") or not e.a.dtype.is_int:
            continue
        if not {row, column} <= free_vars(e):
            continue
        line = arith.poly(e.b - e.a)  # not negative, or positive, where the comparison holds
        slope = line.pop((row,), 0)
        if abs(slope) != 1 or line.pop((column,), 0) != -slope:
            continue
        start = arith.expr(line) - (1 if e.op == "lt" else 0)
        # Either it holds up to a diagonal, or from the one after it on.
        offset = arith.simplify(start if slope > 0 else -start - 1)
        if set(axes) & free_vars(offset) or arith.prove(offset >= ZERO) is not True:
            continue
        inside = _decided(element, Arith(ranges, [column <= row + offset]))
        beyond = _decided(element, Arith(ranges, [row + offset < column]))
        if type(inside) is Const and type(beyond) is Const and inside is not beyond:
            return Triangle(offset, float(inside.value), float(beyond.value))
    return None


def _decided(e: Expr, arith: Arith) -> Expr:
    """The expression where each comparison that is known has its value, and what follows."""

    def one(x: Expr) -> Expr | None:
        if type(x) is Cast and type(x.a) is Const and x.dtype.is_float and x.a.dtype.is_float:
            return const(x.a.value, x.dtype)
        if type(x) is not Binary:
            return None
        if type(x.a) is Const and type(x.b) is Const and x.op in _NUMPY and x.dtype.is_float:
            numbers = (np.asarray(y.value, y.dtype.numpy) for y in (x.a, x.b))
            with np.errstate(all="ignore"):
                return const(_NUMPY[x.op](*numbers).item(), x.dtype)
        holds = arith.prove(x) if x.op in ("lt", "le", "eq", "ne") else None
        return None if holds is None else const(holds, bool_)

    return rewrite(e, one)


def _element(v: Value, at: tuple[Expr, ...], nodes: list[int]) -> Expr | None:
    """An element of a value as an expression of its indices; None: it reads data."""
    if isinstance(v, Constant):
        if v.data.size != 1:
            return None
        return const(v.data.reshape(-1)[0].item(), _as_position(v.type.dtype))
    nodes[0] -= 1
    if nodes[0] < 0 or not isinstance(v, Apply) or isinstance(v.type, tuple):
        return None
    if kind_of(v) > Kind.INJECTIVE:
        return None
    placeholders, (result,) = expressions(v)
    given = {p: a for p, a in zip(placeholders, v.args, strict=True) if p is not None}
    known = True

    def inner(t: te.Tensor, at: tuple[Expr, ...]) -> Expr:
        nonlocal known
        if t in given:
            source = given[t]
            e = None if source is None else _element(source, at, nodes)
            known = known and e is not None
            return const(0, t.dtype) if e is None else e
        if t.body is None or type(t.body) is Reduce:
            known = False
            return const(0, t.dtype)
        body = substitute(t.body, dict(zip(t.axes, at, strict=True)))
        return rewrite(body, element)

    def element(e: Expr) -> Expr | None:
        if type(e) is Load:
            return inner(e.buffer, e.indices)
        if type(e) is Cast and e.dtype is int64 and e.a.dtype is index:
            return e.a
        return None

    made = inner(result, at)
    return made if known else None


def _as_position(dtype: DType) -> DType:
    """Positions in tensors are int64, indices of loops are not: here they are the same."""
    return index if dtype is int64 else dtype
