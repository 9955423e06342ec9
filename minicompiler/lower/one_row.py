"""A kernel for any number of rows with loops of their own for a single one.

    one = of_one_row(func, n)             a copy of the plain loops where n is 1, scheduled alone
    one_or_many(one, func, n)             if n == 1:  one  else:  func

A schedule that shares what it reads between rows (packs a matrix, keeps a tile of rows in
registers) may read it in another order where there is one row: a decoder's next token, say.
"""

from __future__ import annotations

from itertools import zip_longest

from minicompiler.ir.arith import Arith
from minicompiler.ir.expr import ONE, Dim, Expr, Var, eq, substitute
from minicompiler.ir.tir import (
    Block,
    Buffer,
    For,
    If,
    PrimFunc,
    Stmt,
    map_exprs,
    map_statements,
    seq,
    statements,
    with_buffers,
)


def of_one_row(func: PrimFunc, rows: Dim) -> PrimFunc:
    """Plain loops where `rows` is 1, with names that `func` does not have."""
    arith = Arith({})
    taken = {b.name for b in (*func.params, *func.buffers)} | {d.name for d in func.dims}
    for s in statements(func):
        taken |= {s.var.name} if isinstance(s, For) else set()
        taken |= {s.name, *(i.var.name for i in s.iters)} if isinstance(s, Block) else set()

    def fresh(name: str) -> str:
        new = f"{name}_one"
        while new in taken:
            new += "_one"
        return new

    mapping: dict[Expr, Expr] = {rows: ONE}
    for s in statements(func):
        for v in (s.var,) if isinstance(s, For) else (i.var for i in getattr(s, "iters", ())):
            mapping[v] = Var(fresh(v.name), v.dtype)

    def expr(e: Expr) -> Expr:
        return arith.simplify(substitute(e, mapping))

    def own(b: Buffer) -> Buffer:
        return b.with_(name=fresh(b.name), shape=tuple(map(expr, b.shape)))

    def named(s: Stmt) -> Stmt | None:
        if isinstance(s, For):
            return s.with_(var=mapping[s.var])
        if isinstance(s, Block):
            iters = tuple(i.with_(var=mapping[i.var]) for i in s.iters)
            return s.with_(name=fresh(s.name), iters=iters)
        return None

    buffers = {b: own(b) for b in (*func.params, *func.buffers)}
    phases = [map_statements(map_exprs(p, expr), named) for p in func.phases]
    return func.with_(
        params=tuple(buffers[b] for b in func.params),
        buffers=tuple(buffers[b] for b in func.buffers),
        dims=tuple(d for d in func.dims if d is not rows),
        phases=tuple(with_buffers(p, buffers) for p in phases),
    )


def one_or_many(one: PrimFunc, many: PrimFunc, rows: Dim) -> PrimFunc:
    """One function whose phases are those of `one` where there is one row, else those of `many`."""
    params = dict(zip(one.params, many.params, strict=True))
    single = eq(rows, ONE)
    phases = [
        If(single, with_buffers(a or seq(()), params), b)
        for a, b in zip_longest(one.phases, many.phases)
    ]
    return many.with_(buffers=(*many.buffers, *one.buffers), phases=tuple(phases))
