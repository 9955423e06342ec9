"""Scheduled blocks -> plain statements, and branches that keep tails out of the fast path.

    block C(vi = i_o*8 + i_i) where i_o*8 + i_i < n:      ->    if i_o*8 + i_i < n:
        C[vi] = ...                                                 C[i_o*8 + i_i] = ...

`lower_blocks` substitutes iterators by their values; `unswitch` asks once per tile whether all of
it is inside, so that only the last tile pays for conditions.
"""

from __future__ import annotations

from minicompiler.ir.arith import Arith
from minicompiler.ir.expr import (
    TRUE,
    ZERO,
    Binary,
    Expr,
    Load,
    Select,
    all_of,
    conjuncts,
    eq,
    free_vars,
    rewrite,
    substitute,
    walk,
)
from minicompiler.ir.tir import (
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
    map_statements,
    seq,
    statements,
    stores,
)


def _arith(func: PrimFunc) -> Arith:
    return Arith({s.var: (ZERO, s.extent - 1) for s in statements(func) if isinstance(s, For)})


def lower_blocks(func: PrimFunc, ctx: object = None) -> PrimFunc:
    """Blocks become stores under conditions; an init still inside a block runs at reduction index
    0."""
    arith = _arith(func)

    def one(s: Stmt) -> Stmt | None:
        if not isinstance(s, Block):
            return None
        mapping: dict[Expr, Expr] = {i.var: i.value for i in s.iters}

        def place(x: Store) -> Store:
            return Store(
                x.buffer,
                tuple(arith.simplify(substitute(i, mapping)) for i in x.indices),
                arith.simplify(substitute(x.value, mapping)),
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
    """An If whose condition does not depend on the loop directly around it moves out of that
    loop."""

    def one(s: Stmt) -> Stmt | None:
        if isinstance(s, For) and isinstance(s.body, If) and s.body.orelse is None:
            if s.var not in free_vars(s.body.cond) and not _loads(s.body.cond):
                inner = s.with_(body=s.body.then)
                again = one(inner)
                return s.body.with_(then=inner if again is None else again)
            if isinstance(s.body.then, If) and s.body.then.orelse is None:
                # if a: if b: ...   where only b can move
                inner_if = s.body.then
                if s.var not in free_vars(inner_if.cond) and not _loads(inner_if.cond):
                    inner = s.with_(body=s.body.with_(then=inner_if.then))
                    again = one(inner)
                    return inner_if.with_(then=inner if again is None else again)
        return None

    return func.with_(phases=tuple(map_statements(p, one) for p in func.phases))


def _loads(e: Expr) -> bool:
    return any(type(x) is Load for x in walk(e))


def unswitch(func: PrimFunc, ctx: object = None) -> PrimFunc:
    """tile nest with `if i*8 + j < n`   ->   if i*8 + 7 < n: tile nest without it; else: as it was.

    A tile nest is a loop marked vector or unroll with only such loops inside.
    """
    arith = _arith(func)

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
    for st in stores(nest):
        for e in walk(st.value):
            if type(e) is Select and free_vars(e.cond) & inner and (_loads(e.a) or _loads(e.b)):
                conditions.update(dict.fromkeys(conjuncts(e.cond)))
    whole: dict[Expr, Expr] = {}
    for c in conditions:
        for part in conjuncts(c):
            everywhere = _for_all(part, inner, arith)
            if everywhere is not None:
                whole[part] = everywhere
    if not whole:
        return nest
    asked = list(dict.fromkeys(c for c in whole.values() if c is not TRUE))
    if not asked:
        return _assume(nest, set(whole))
    if len(asked) > 8:
        return nest
    return If(all_of(asked), _assume(nest, set(whole)), nest)


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
