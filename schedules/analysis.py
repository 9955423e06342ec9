"""What primitives and rules ask of a loop nest: where things are, what a region of code touches.

find_loop(func, "i_o")              the For, and the statements above it
region(func, loop.body, buffer)     [(lowest index, extent) per dimension] touched inside
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minicompiler.ir.arith import Arith, knowing
from minicompiler.ir.expr import (
    ZERO,
    Binary,
    Cast,
    Dim,
    Expr,
    Load,
    Select,
    ceildiv,
    conjuncts,
    const_int,
    factors,
    free_vars,
    loads,
    maximum,
    minimum,
    substitute,
    walk,
)
from minicompiler.ir.polynomials import Poly
from minicompiler.ir.tir import (
    PARALLEL,
    SCAN,
    VECTOR,
    Block,
    Buffer,
    For,
    If,
    Iter,
    PrimFunc,
    Stmt,
    Store,
    statements,
    sub_statements,
)

if TYPE_CHECKING:
    from .schedule import Schedule

Path = tuple[Stmt, ...]
Box = list[tuple[Expr, Expr]]  # (lowest index, extent) per dimension


@dataclass(frozen=True)
class Access:
    """One load or store of a buffer inside a block, its indices in terms of loop variables.

    chosen: conditions `a < b` and `a <= b` of the selects around a load; it is wanted only where
    they hold."""

    block: Block
    buffer: Buffer
    indices: tuple[Expr, ...]
    is_store: bool
    chosen: tuple[Expr, ...] = ()


def find_loop(func: PrimFunc, name: str) -> tuple[For, Path] | None:
    """The loop with this variable name and its ancestors (outermost first), or None."""
    return _find(func, lambda s: isinstance(s, For) and s.var.name == name)


def find_block(func: PrimFunc, name: str) -> tuple[Block, Path] | None:
    """The block with this name and its ancestors, or None."""
    return _find(func, lambda s: isinstance(s, Block) and s.name == name)


def _find(func: PrimFunc, test):  # type: ignore[no-untyped-def]
    for phase in func.phases:
        stack: list[tuple[Stmt, Path]] = [(phase, ())]
        while stack:
            s, path = stack.pop()
            if test(s):
                return s, path
            inner = sub_statements(s)
            if inner:
                around = (*path, s)
                stack.extend([(x, around) for x in reversed(inner)])
    return None


def blocks(s: Stmt | PrimFunc) -> Iterator[Block]:
    """The blocks below, in program order."""
    return (x for x in statements(s) if isinstance(x, Block))


def loops(s: Stmt | PrimFunc) -> Iterator[For]:
    """The loops below, outer before inner."""
    return (x for x in statements(s) if isinstance(x, For))


def loops_in(path: Path) -> list[For]:
    """The loops of a path, outermost first."""
    return [s for s in path if isinstance(s, For)]


@functools.lru_cache(maxsize=8)
def arith_of(func: PrimFunc) -> Arith:
    """An Arith that knows the range of every loop variable and block iterator of the function. Who
    asks again about the same function gets the same one, with all that it has found out: it must
    not be told more."""
    ranges: dict[Expr, tuple[Expr, Expr]] = {}
    for s in statements(func):
        if isinstance(s, For):
            ranges[s.var] = (ZERO, s.extent - 1)
        elif isinstance(s, Block):
            for i in s.iters:
                # Two blocks may share an iterator (an init and its update), one of them widened.
                most = i.extent - 1
                known = ranges.get(i.var)
                ranges[i.var] = (ZERO, most if known is None else maximum(known[1], most))
    return knowing(ranges)


def choices(e: Expr) -> Iterator[Expr]:
    """The comparisons by which an expression chooses, without what data decides."""
    for x in walk(e):
        if type(x) is Select:
            yield from (c for c in conjuncts(x.cond) if not loads(c))
        elif type(x) is Binary and x.op in ("min", "max") and x.dtype.is_int and not loads(x):
            yield x.a <= x.b


def turn(cond: Expr, var: Expr, arith: Arith) -> Expr | None:
    """The first value of `var` for which a comparison is not what it was before, where it is linear
    in it; None for others."""
    if type(cond) is not Binary or cond.op not in ("lt", "le") or not cond.a.dtype.is_int:
        return None
    line = dict(arith.poly(cond.b - cond.a))  # at least 0 or 1 where it holds
    slope = line.pop((var,), 0)
    if slope == 0 or any(var in free_vars(a) for m in line for a in m):
        return None
    least = (1 if cond.op == "lt" else 0) - arith.expr(line)
    return arith.simplify(ceildiv(least, slope) if slope > 0 else -least // -slope + 1)


def period(block: Block, loop: For, arith: Arith) -> Expr | None:
    """After how many iterations of a loop what a block reads along it, x[i % n], begins again,
    where it does so several times and then ends; None for others."""
    values, found = values_of(block), set[Expr | None]()
    for load in operand_loads(block):
        place = arith.poly(load.buffer.offset(tuple(substitute(i, values) for i in load.indices)))
        for a in {a for m in place for a in m if loop.var in free_vars(a)}:
            found.add(a.b if type(a) is Binary and a.op == "mod" and a.a is loop.var else None)
    n = next(iter(found), None)
    if n is None or len(found) > 1 or n is arith.simplify(loop.extent):
        return None
    if not all(isinstance(v, Dim) for v in free_vars(n)):
        return None
    return n if arith.simplify(loop.extent % n) is ZERO else None


def strides(buffer: Buffer, indices: tuple[Expr, ...], var: Expr, arith: Arith) -> int | None:
    """The distance in elements between neighbouring values of `var`: 0 when it does not matter,
    None when it varies or is not known."""
    change = slope(arith.poly(buffer.offset(indices)), var)
    return None if change is None else constant(change)


def slope(poly: Poly, var: Expr) -> Poly | None:
    """By how much a polynomial changes from one value of `var` to the next; None when it varies."""
    change: Poly = {}
    for m, c in poly.items():
        rest = tuple(a for a in m if a is not var)
        if any(var in free_vars(a) for a in rest) or len(rest) < len(m) - 1:
            return None
        if len(rest) < len(m):
            change[rest] = c
    return change


def constant(poly: Poly) -> int | None:
    """The value of a polynomial, if it is known while compiling."""
    return poly.get((), 0) if poly.keys() <= {()} else None


def values_of(block: Block) -> dict[Expr, Expr]:
    """Iterator variable -> its value in loop variables."""
    return {i.var: i.value for i in block.iters}


def accesses(s: Stmt | PrimFunc, arith: Arith, buffer: Buffer | None = None) -> list[Access]:
    """The loads and stores below `s` (of one buffer, or of all)."""
    found = []
    for block in blocks(s):
        mapping = values_of(block)
        for store in (block.init, block.body):
            if store is None:
                continue
            for e in (store.value, *store.indices):
                for load, conditions in _chosen_loads(e):
                    if buffer is None or load.buffer is buffer:
                        at = _resolve(load.indices, mapping, arith)
                        chosen = _resolve(conditions, mapping, arith)
                        found.append(Access(block, load.buffer, at, False, chosen))
            if buffer is None or store.buffer is buffer:
                found.append(
                    Access(block, store.buffer, _resolve(store.indices, mapping, arith), True)
                )
    return found


def _chosen_loads(e: Expr) -> list[tuple[Load, tuple[Expr, ...]]]:
    """Every load in an expression, with the comparisons `a < b` and `a <= b` of the selects that
    choose it."""
    found = []
    stack: list[tuple[Expr, tuple[Expr, ...]]] = [(e, ())]
    seen: set[tuple[Expr, tuple[Expr, ...]]] = set()
    while stack:
        here = stack.pop()
        if here in seen:
            continue
        seen.add(here)
        x, conditions = here
        if type(x) is Load:
            found.append((x, conditions))
        if type(x) is Select:
            limits = [c for c in conjuncts(x.cond) if type(c) is Binary and c.op in ("lt", "le")]
            stack += [(x.cond, conditions), (x.b, conditions), (x.a, (*conditions, *limits))]
        else:
            stack += [(c, conditions) for c in x.children()]
    return found


def _resolve(indices: Sequence[Expr], mapping: dict[Expr, Expr], arith: Arith) -> tuple[Expr, ...]:
    return tuple(arith.simplify(substitute(i, mapping)) for i in indices)


def region(body: Stmt, buffer: Buffer, arith: Arith, found: Sequence[Access] | None = None) -> Box:
    """The smallest box (as far as it can be told) that the accesses of `buffer` below `body` touch,
    as expressions of the variables outside. A dimension with no bound is taken whole."""
    inner = [loop.var for loop in loops(body)]
    box: Box = []
    found = accesses(body, arith, buffer) if found is None else found
    for d, extent in enumerate(buffer.shape):
        low: Expr | None = None
        high: Expr | None = None
        for a in found:
            lo, hi = arith.bound(a.indices[d], inner, -1), arith.bound(a.indices[d], inner, +1)
            limit = _limit(a, d, inner)
            if limit is not None and (hi is None or arith.prove(limit <= hi) is True):
                hi = _same_size(arith, lo, hi, limit)
            least = _least(a, d, inner, arith)
            if lo is not None and least is not None and arith.prove(lo <= least) is True:
                lo = least
            if lo is None or hi is None or any(type(x) is Load for e in (lo, hi) for x in walk(e)):
                low, high = ZERO, extent - 1
                break
            low = lo if low is None else arith.simplify(minimum(low, lo))
            high = hi if high is None else arith.simplify(maximum(high, hi))
        if low is None or high is None:
            low, high = ZERO, extent - 1
        box.append((low, arith.simplify(high - low + 1)))
    return box


def _same_size(arith: Arith, low: Expr | None, high: Expr | None, limit: Expr) -> Expr:
    """The lower one of two upper bounds, but not where a box of constant size would vary by it."""
    if low is None or high is None or const_int(arith.simplify(limit - low)) is not None:
        return limit
    return limit if const_int(arith.simplify(high - low)) is None else high


def _limit(access: Access, d: int, inner: Sequence[Expr]) -> Expr | None:
    """The highest index along axis d where a select says it: select(i < n, C[i], 0)."""
    for c in access.chosen:
        if not isinstance(c, Binary):
            continue  # it always holds
        if c.op == "lt" and c.a is access.indices[d] and free_vars(c.b).isdisjoint(inner):
            return c.b - 1
    return None


def _least(access: Access, d: int, inner: Sequence[Expr], arith: Arith) -> Expr | None:
    """The lowest index along axis d where a select says it: select(0 <= i + k - 1, C[i + k - 1],
    0)."""
    for c in access.chosen:
        if not isinstance(c, Binary) or c.op != "le" or c.b.dtype is not access.indices[d].dtype:
            continue  # data may be compared as well
        between = arith.simplify(access.indices[d] - c.b)
        if free_vars(between).isdisjoint(inner) and free_vars(c.a).isdisjoint(inner):
            return arith.simplify(c.a + between)
    return None


def dense(body: Stmt, access: Access, arith: Arith) -> bool:
    """True when an access below `body` is known to touch every element of its region."""
    extents: dict[Expr, int | None] = {x.var: const_int(x.extent) for x in loops(body)}
    used: set[Expr] = set()
    for index in access.indices:
        parts: list[tuple[int, Expr]] = []
        for m, c in arith.poly(index).items():
            inner = [v for a in m for v in free_vars(a) if v in extents]
            if inner:
                if len(m) > 1 or m[0] not in extents or c < 0 or m[0] in used:
                    return False
                used.add(m[0])
                parts.append((c, m[0]))
        reach: int | None = 1  # of how many neighbours the variables so far touch all
        for c, v in sorted(parts, key=lambda t: t[0]):
            if reach is None or c > reach:
                return False
            extent = extents[v]
            reach = None if extent is None else reach + c * (extent - 1)
    return True


def reduce_loops(block: Block, around: Sequence[For]) -> list[For]:
    """Those of the given loops that the block reduces over."""
    used = frozenset().union(*[free_vars(i.value) for i in block.iters if i.reduce], frozenset())
    return [loop for loop in around if loop.var in used]


def spatial_loops(block: Block, around: Sequence[For]) -> list[For]:
    """Those of the given loops that choose which element the block computes."""
    used = frozenset().union(
        *[free_vars(i.value) for i in block.iters if not i.reduce], frozenset()
    )
    return [loop for loop in around if loop.var in used]


def mixed_loops(block: Block, around: Sequence[For]) -> list[For]:
    """Those of the given loops that choose the element and reduce as well (a fusion of both
    kinds)."""
    reduce = reduce_loops(block, around)
    return [x for x in spatial_loops(block, around) if x in reduce]


def repeats(block: Block, loop: For) -> bool:
    """True when every iteration of a loop around the block does the same."""
    return const_int(loop.extent) != 1 and not any(
        loop.var in free_vars(i.value) for i in block.iters
    )


def scan_around(path: Path) -> For | None:
    """The recurrence that a statement is part of."""
    return next((x for x in loops_in(path) if x.tag == SCAN), None)


def apart(load: Load, block: Block, writer: Block, arith: Arith) -> bool:
    """True when what `block` loads is never what `writer` stores in the same iteration of the loops
    around both: an earlier entry of a recurrence, say."""
    mine, theirs = values_of(block), values_of(writer)
    for i, j in zip(load.indices, writer.body.indices, strict=True):
        between = arith.simplify(substitute(i, mine) - substitute(j, theirs))
        if arith.prove(between > ZERO) is True or arith.prove(between < ZERO) is True:
            return True
    return False


def depends(s: Schedule, load: Load, block: Block, writer: Block, arith: Arith) -> bool:
    """False when a block in a recurrence reads only what the writer stored in earlier
    iterations."""
    return scan_around(s.block(block.name)[1]) is None or not apart(load, block, writer, arith)


def made_below(s: Schedule, block: Block, loop: For, arith: Arith) -> list[Load]:
    """What a block reads of that which the same iteration of `loop` makes."""
    return [
        x
        for x in operand_loads(block)
        if any(
            contains(loop, w) and depends(s, x, block, w, arith) for w in writers(s.func, x.buffer)
        )
    ]


def is_reduction(block: Block) -> bool:
    """True when the block combines several iterations into one element."""
    return any(i.reduce for i in block.iters)


def readers(func: PrimFunc, buffer: Buffer) -> list[Block]:
    """The blocks that load from `buffer`, except an update reading back its own element."""
    found = []
    for block in blocks(func):
        if (
            any(ld.buffer is buffer for ld in block_loads(block))
            and block.body.buffer is not buffer
        ):
            found.append(block)
    return found


def writers(func: PrimFunc, buffer: Buffer) -> list[Block]:
    """The blocks that store to `buffer`."""
    return [b for b in blocks(func) if b.body.buffer is buffer]


def block_loads(block: Block) -> list[Load]:
    """The distinct loads in a block's body and init."""
    found: dict[Load, None] = {}
    for store in (block.init, block.body):
        if store is not None:
            for e in (store.value, *store.indices):
                for x in walk(e):
                    if type(x) is Load:
                        found[x] = None
    return list(found)


def operand_loads(block: Block) -> list[Load]:
    """The loads of a block, the running value of a reduction left out."""
    own = block.body
    return [
        x for x in block_loads(block) if not (x.buffer is own.buffer and x.indices == own.indices)
    ]


def where_parts(block: Block) -> list[Expr]:
    """The conditions of a block, one by one."""
    return conjuncts(block.where)


def contains(s: Stmt, inner: Stmt) -> bool:
    """True when `inner` is `s` or stands below it."""
    return any(x is inner for x in statements(s))


def comes_after(s: Schedule, block: Block, loop: For) -> bool:
    """True when a block stands after (or inside) a loop in the text."""
    order = [id(x) for x in statements(s.func)]
    return order.index(id(block)) > order.index(id(loop))


def refuse_parallel_below(s: Schedule, loop: For) -> None:
    """Every thread runs what stands around a parallel loop, so nothing may be put there."""
    for x in statements(loop):
        if isinstance(x, For) and x.kind is PARALLEL:
            s.refuse(f"{x.var} is parallel: nothing can be put around it", x, "do this before mark")


def refuse_vector_around(s: Schedule, path: Path) -> None:
    """A vector loop stays innermost, so no loops may be made inside it."""
    for x in path:
        if isinstance(x, For) and x.kind is VECTOR:
            s.refuse(
                f"{x.var} is a vector loop: nothing can be put inside it", x, "do this before mark"
            )


def refuse_leaving_scan(s: Schedule, block: Block, to: Path) -> None:
    """What a recurrence computes stays in it."""
    scan = scan_around(s.block(block.name)[1])
    if scan is not None and scan_around(to) is not scan:
        s.refuse(f"block {block.name} is part of the recurrence over {scan.var}", block)


def enclosing_condition(path: Path) -> bool:
    """True when an If stands on the path (primitives leave such code alone)."""
    return any(isinstance(s, If) for s in path)


def update_operand(block: Block) -> tuple[str, Expr] | None:
    """(combiner, operand) of a reduction whose body is `C[..] = combine(C[..], operand)`."""
    v = block.body.value
    if type(v) is Binary and type(v.a) is Load:
        own: Store = block.body
        if v.a.buffer is own.buffer and v.a.indices == own.indices:
            return v.op, v.b
    return None


def product_loads(block: Block) -> tuple[Load, Load] | None:
    """The two operands of a block that adds up products of two buffers, through conversions."""
    update = update_operand(block)
    if update is None or update[0] != "add" or not is_reduction(block):
        return None
    sides = [x.a if type(x) is Cast else x for x in factors(update[1]) or ()]
    if sides and all(type(x) is Load for x in sides) and sides[0] is not sides[1]:
        return sides[0], sides[1]  # type: ignore[return-value]
    return None


def stays_within(it: Iter, size: Expr, arith: Arith) -> bool:
    """Whether an iterator that is an index itself is known to stay within an axis of that size."""
    return it.extent is size or arith.prove(it.extent <= size) is True
