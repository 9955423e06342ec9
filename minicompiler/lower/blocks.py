"""Scheduled blocks -> plain statements, and branches that keep tails out of the fast path.

    block C(vi = i_o*8 + i_i) where i_o*8 + i_i < n:      ->    if i_o*8 + i_i < n:
        C[vi] = ...                                                 C[i_o*8 + i_i] = ...

`lower_blocks` substitutes iterators by their values; `unswitch` asks once per tile whether all of
it is inside, so that only the last tile pays for conditions.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator

from minicompiler.ir.arith import Arith, knowing
from minicompiler.ir.expr import (
    FALSE,
    TRUE,
    ZERO,
    Binary,
    Expr,
    Load,
    Select,
    Var,
    all_of,
    conjuncts,
    const_int,
    eq,
    free_vars,
    logical_not,
    rewrite,
    substitute,
    walk,
    wrap,
)
from minicompiler.ir.tir import (
    SERIAL,
    UNROLL,
    VECTOR,
    Block,
    For,
    If,
    PrimFunc,
    Seq,
    Stmt,
    Store,
    is_empty,
    map_exprs,
    map_statements,
    read_buffers,
    seq,
    statements,
    stores,
    substitute_stmt,
)
from minicompiler.ir.types import index

MOST_EXCEPTIONS = 4  # incomplete tiles that get code of their own
MOST_TURNS = 1024  # of an outer loop that are looked at for them


def arith_of_loops(func: PrimFunc) -> Arith:
    """An Arith that knows the range of every loop variable."""
    return knowing({s.var: (ZERO, s.extent - 1) for s in statements(func) if isinstance(s, For)})


def lower_blocks(func: PrimFunc, ctx: object = None) -> PrimFunc:
    """Blocks become stores under conditions; an init still inside a block runs at reduction index
    0."""
    arith = arith_of_loops(func)

    def one(s: Stmt) -> Stmt | None:
        if not isinstance(s, Block):
            return None
        mapping: dict[Expr, Expr] = {i.var: i.value for i in s.iters}

        def place(x: Store) -> Store:
            return x.with_(
                indices=tuple(arith.simplify(substitute(i, mapping)) for i in x.indices),
                value=arith.simplify(substitute(x.value, mapping)),
            )

        body: Stmt = place(s.body)
        if s.init is not None:
            first = arith.simplify(
                all_of(eq(arith.simplify(i.value), ZERO) for i in s.iters if i.reduce)
            )
            init = place(s.init)
            body = seq([init if first is TRUE else If(first, init), body])
        # Conditions that concern fewer loops go outside, where they are cheaper to test.
        parts = [arith.simplify(c) for c in conjuncts(s.where)]
        for c in reversed([c for c in parts if c is not TRUE]):
            body = If(c, body)
        return body

    return func.with_(phases=tuple(map_statements(p, one) for p in func.phases))


def hoist_conditions(func: PrimFunc, ctx: object = None) -> PrimFunc:
    """Ifs directly inside a loop whose conditions do not depend on it move out of it; one of
    several statements in an innermost loop makes two loops, with and without it. Where elements are
    chosen by conditions that do not depend on the loop, there is a loop for each choice."""

    def one(s: Stmt) -> Stmt | None:
        if not isinstance(s, For):
            return None
        conditions: list[Expr] = []
        body = s.body
        while isinstance(body, If) and body.orelse is None:
            conditions.append(body.cond)
            body = body.then
        moved = [c for c in conditions if s.var not in free_vars(c) and not _loads(c)]
        if not moved:
            return _two_loops(s) or _loop_for_each(s)
        made: Stmt = s.with_(body=_under([c for c in conditions if c not in moved], body))
        return _under(moved, made)

    return func.with_(phases=tuple(map_statements(p, one) for p in func.phases))


def _two_loops(s: For) -> Stmt | None:
    """for k: (if c: A); B   ->   if c: (for k: A; B) else: (for k: B)"""
    if s.kind is not SERIAL or s.tag or not isinstance(s.body, Seq):
        return None
    inner = [x.kind for x in statements(s.body) if isinstance(x, For)]
    conditions = {
        x.cond for x in s.body.stmts
        if isinstance(x, If) and x.orelse is None and s.var not in free_vars(x.cond)
    }  # fmt: skip
    if len(conditions) != 1 or not all(k in (VECTOR, UNROLL) for k in inner):
        return None
    (cond,) = conditions
    if _loads(cond):
        return None
    pairs = [(x, isinstance(x, If) and x.cond is cond) for x in s.body.stmts]
    with_it = seq([x.then if mine and isinstance(x, If) else x for x, mine in pairs])
    without = seq([x for x, mine in pairs if not mine])
    return If(cond, s.with_(body=with_it), None if is_empty(without) else s.with_(body=without))


def _loop_for_each(s: For) -> Stmt | None:
    """for k: r[k] = select(c, a[k], b)   ->   if c: (for k: r[k] = a[k]) else: (for k: r[k] = b)"""
    chosen = next(_chosen_outside(s), None)
    if chosen is None:
        return None

    def other(e: Expr) -> Expr | None:
        return e.b if type(e) is Select and chosen <= {*conjuncts(e.cond)} else None

    bodies = _assume(s.body, chosen), map_exprs(s.body, lambda e: rewrite(e, other))
    cases = [s.with_(body=b) for b in bodies]
    left, right = ({c for found in _chosen_outside(x) for c in found} for x in cases)
    if left & right:
        return None  # choices of their own, each of which would double the code
    then, orelse = [_loop_for_each(x) or x for x in cases]
    return If(all_of(sorted(chosen, key=str)), then, orelse)


def _chosen_outside(s: For) -> Iterator[set[Expr]]:
    """Conditions by which a loop over vectors chooses what to load, and which are the same in all
    of it."""
    made = [*stores(s.body)]
    if s.kind is not SERIAL or s.tag or len(made) != 1 or made[0].buffer in read_buffers(s.body):
        return
    within = {x.var for x in statements(s) if isinstance(x, For)}
    for e in walk(made[0].value, into_loads=False):
        if type(e) is Select and (_loads(e.a) or _loads(e.b)):
            same = {c for c in conjuncts(e.cond) if not free_vars(c) & within and not _loads(c)}
            if same:
                yield same


def _under(conditions: list[Expr], body: Stmt) -> Stmt:
    for c in reversed(conditions):
        body = If(c, body)
    return body


def _loads(e: Expr) -> bool:
    return any(type(x) is Load for x in walk(e))


def unswitch(func: PrimFunc, ctx: object = None) -> PrimFunc:
    """tile nest with `if i*8 + j < n`   ->   if i*8 + 7 < n: tile nest without it; else: as it was.

    The same for loads along a vector at max(min(i*8 + j, n - 1), 0): a complete tile loads whole
    vectors. Numbers like min(i*8 + j, 3) are the same in all lanes of most vectors.
    A tile nest is a loop marked vector or unroll with only such loops inside. Where it is known
    which tiles along one loop are not complete, and these are few (those at the borders of an
    image), each gets code of its own, in which the conditions are decided while it is printed.
    """
    arith = arith_of_loops(func)

    def tile(s: Stmt) -> bool:
        return isinstance(s, For) and s.kind in (VECTOR, UNROLL)

    def visit(s: Stmt) -> Stmt:
        if tile(s):
            return _split_tile(s, arith)
        if isinstance(s, For):
            body = visit(s.body)
            return s if body is s.body else s.with_(body=body)
        if isinstance(s, Seq):
            return seq([visit(x) for x in s.stmts])
        if isinstance(s, If):
            return s.with_(then=visit(s.then), orelse=None if s.orelse is None else visit(s.orelse))
        if hasattr(s, "body"):
            return s.with_(body=visit(s.body))
        return s

    return func.with_(phases=tuple(p2 for p2 in map(visit, func.phases) if not is_empty(p2)))


def _split_tile(nest: Stmt, arith: Arith) -> Stmt:
    inner: set[Expr] = {x.var for x in statements(nest) if isinstance(x, For)}
    conditions: dict[Expr, None] = {}
    for x in statements(nest):
        if isinstance(x, If) and free_vars(x.cond) & inner:
            conditions[x.cond] = None
    lanes = {x.var for x in statements(nest) if isinstance(x, For) and x.kind is VECTOR}
    for st in stores(nest):
        conditions.update(dict.fromkeys(_same_in_all(st.value, lanes)))
        conditions.update(dict.fromkeys(_within(st.value, inner, lanes, arith)))
    whole: dict[Expr, Expr] = {}
    for c in conditions:
        for part in conjuncts(c):
            everywhere = _for_all(part, inner, arith)
            if everywhere is not None:
                whole[part] = everywhere
    whole = {part: c for part, c in whole.items() if c is not FALSE}
    if not whole:
        return nest
    asked = list(dict.fromkeys(c for c in whole.values() if c is not TRUE))
    if not asked:
        return _assume(nest, set(whole))
    if len(asked) > 8:
        return nest
    complete = _assume(nest, set(whole))
    incomplete = _exceptions(asked, arith)
    if incomplete is None:
        return If(all_of(asked), complete, _split_choice(nest, inner, arith))
    loops, places = incomplete
    rest = [c for c in asked if not free_vars(c) & set(loops)]
    made = If(all_of(rest), complete, nest) if rest else complete
    count = const_int(arith.simplify(arith.ranges[loops[0]][1] + 1)) if len(loops) == 1 else None
    for place in reversed(places):
        here = substitute_stmt(nest, {x: wrap(k) for x, k in zip(loops, place, strict=True)})
        there = all_of(eq(x, wrap(k)) for x, k in zip(loops, place, strict=True))
        made = here if count == len(places) and place is places[-1] else If(there, here, made)
    return made


def _split_choice(nest: Stmt, inner: set[Expr], arith: Arith) -> Stmt:
    """A vector of choices by position is asked whether it is their second case all through."""
    made = [*stores(nest)]
    chosen = made[0].value if len(made) == 1 else None
    if not isinstance(nest, For) or nest.kind is not VECTOR or not isinstance(chosen, Select):
        return nest
    never = [_for_all(logical_not(c), inner, arith) for c in conjuncts(chosen.cond)]
    other = chosen.b

    def one(s: Stmt) -> Stmt | None:
        return s.with_(value=other) if isinstance(s, Store) else None

    for cond in never:
        if cond is not None and cond is not FALSE:
            return If(cond, map_statements(nest, one), nest)
    return nest


def _same_in_all(e: Expr, lanes: set[Var]) -> Iterator[Expr]:
    """Conditions under which minima and maxima outside of indices (how many taps of a window are
    inside, say) are the same in all lanes."""
    for x in walk(e, into_loads=False):
        if type(x) is Binary and x.op in ("min", "max") and x.dtype.is_int:
            for same, other in ((x.a, x.b), (x.b, x.a)):
                if free_vars(other) & lanes and not free_vars(same) & lanes and not _limited(other):
                    yield same <= other if x.op == "min" else other <= same


def _limited(e: Expr) -> bool:
    return any(type(x) is Binary and x.op in ("min", "max") for x in walk(e))


def _exceptions(asked: list[Expr], arith: Arith) -> tuple[list[Var], list[tuple[int, ...]]] | None:
    """The only loop on which conditions depend, and its iterations in which they do not all hold,
    if these are few; or the only two loops, if it is one. Conditions on outer dimensions besides
    are left out."""
    loops = {v for c in asked for v in free_vars(c) if isinstance(v, Var) and v in arith.ranges}
    alone = [[v] for v in loops if any(free_vars(c) == {v} for c in asked)]
    pairs = {free_vars(c) for c in asked if len(free_vars(c)) == 2 and free_vars(c) <= loops}
    if len(alone) != 1 and (alone or len(pairs) != 1):
        return None
    chosen = set(alone[0]) if alone else next(iter(pairs))
    inward = [v for v in arith.ranges if isinstance(v, Var) and v in chosen]
    most = MOST_EXCEPTIONS if alone else 1
    places: set[tuple[int, ...]] = set()
    for c in asked:
        if free_vars(c) & chosen:
            wrong = _where_not(c, inward, arith)
            if wrong is None or len(wrong) > most:
                return None
            places.update(wrong)
    return (inward, sorted(places)) if len(places) <= most else None


def _where_not(cond: Expr, loops: list[Var], arith: Arith) -> list[tuple[int, ...]] | None:
    """The iterations of loops, each inside of those before it, in which a comparison that is linear
    in their variables does not hold; None where it is not linear, or there are many."""
    if type(cond) is not Binary or cond.op not in ("lt", "le"):
        return None
    line = arith.poly(cond.b - cond.a)  # slope * loop + ... + start, at least 0 or 1
    start = line.get((), 0) - (1 if cond.op == "lt" else 0)
    slopes = [line.get((x,), 0) for x in loops]
    if line.keys() - {(), *((x,) for x in loops)} or slopes[-1] == 0:
        return None
    extents = [arith.simplify(arith.ranges[x][1] + 1) for x in loops]
    counts = [const_int(n) for n in extents[:-1]]
    if None in counts or math.prod(n or 1 for n in counts) > MOST_TURNS:
        return None
    found: list[tuple[int, ...]] = []
    for before in itertools.product(*[range(n or 0) for n in counts]):
        here: dict[Expr, Expr] = {x: wrap(k) for x, k in zip(loops, before, strict=False)}
        n = const_int(arith.simplify(substitute(extents[-1], here)))
        if n is None:
            return None
        at, slope = start + sum(map(operator.mul, slopes, before)), slopes[-1]
        wrong = (
            range(min(n, max(0, -(at // slope))))
            if slope > 0
            else range(max(0, min(n, at // -slope + 1)), n)
        )
        found += [(*before, k) for k in wrong]
        if len(found) > MOST_EXCEPTIONS:
            return None
    return found


def _within(e: Expr, inner: set[Expr], lanes: set[Var], arith: Arith) -> list[Expr]:
    """The conditions under which, all through a tile, choices by position are their first case, and
    minima and maxima of indices are the operand that goes up with the lanes."""
    found: list[Expr] = []
    memo: dict[tuple[Expr, bool], Expr] = {}

    def known(parts: list[Expr]) -> bool:
        some = [c for c in parts if _for_all(c, inner, arith) not in (None, FALSE)]
        found.extend(some)
        return len(some) == len(parts)

    def go(e: Expr, indexing: bool) -> Expr:
        if (e, indexing) not in memo:
            memo[e, indexing] = visit(e, indexing)
        return memo[e, indexing]

    def visit(e: Expr, indexing: bool) -> Expr:
        if type(e) is Select and free_vars(e.cond) & inner:
            chooses = e.dtype is index or _loads(e.a) or _loads(e.b)
            if chooses and known([*conjuncts(e.cond)]):
                return go(e.a, indexing)  # what the other case would ask does not matter
        e = e.map(lambda x: go(x, indexing or type(e) is Load))
        if type(e) is not Binary or e.op not in ("min", "max") or not e.dtype.is_int:
            return e
        if not indexing or _loads(e) or not free_vars(e) & lanes:
            return e
        line = arith.poly(e.a - e.b)
        up = sum(line.get((v,), 0) for v in lanes) > 0
        kept, other = (e.a, e.b) if up else (e.b, e.a)
        return kept if known([kept <= other if e.op == "min" else other <= kept]) else e

    go(e, False)
    return found


def _for_all(cond: Expr, inner: set[Expr], arith: Arith) -> Expr | None:
    """The condition (without the inner variables) under which `cond` holds for all of them."""
    if (
        type(cond) is not Binary
        or cond.op not in ("lt", "le")
        or not cond.a.dtype.is_int
        or _loads(cond)
    ):
        return None
    least = arith.bound(cond.b - cond.a, inner, -1)
    if least is None or free_vars(least) & inner:
        return None
    return arith.simplify(least > ZERO if cond.op == "lt" else least >= ZERO)


def _assume(nest: Stmt, known: set[Expr]) -> Stmt:
    """The nest with some conditions known to hold."""

    def without(cond: Expr) -> Expr:
        return all_of(c for c in conjuncts(cond) if c not in known)

    def value(e: Expr) -> Expr | None:
        if type(e) is Select and any(c in known for c in conjuncts(e.cond)):
            rest = without(e.cond)
            return e.a if rest is TRUE else Select(rest, e.a, e.b)
        if type(e) is Binary and e.op in ("min", "max") and e.dtype.is_int:
            for least, most in ((e.a, e.b), (e.b, e.a)):
                if (least <= most) in known:
                    return least if e.op == "min" else most
        return None

    def one(s: Stmt) -> Stmt | None:
        if isinstance(s, If):
            rest = without(s.cond)
            if rest is TRUE:
                return s.then
            return s.with_(cond=rest) if rest is not s.cond else None
        if isinstance(s, Store):
            made = rewrite(s.value, value)
            return None if made is s.value else s.with_(value=made)
        return None

    return map_statements(nest, one)
