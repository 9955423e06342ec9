"""What neighbouring iterations of a parallel loop compute alike.

    parallel u in 14:
        x[..] = f(u//2)         # memory of the thread
        r[u] = g(x, u%2)

A thread that goes on from u = 4 to u = 5 has x already. Loops are written like this where there are
more shares of work than parts that need x: which thread needs it again is known at run time only.
"""

from __future__ import annotations

from dataclasses import dataclass

from minicompiler.ir.expr import Binary, Const, Expr, Var, free_vars, rewrite
from minicompiler.ir.tir import (
    Alloc,
    Buffer,
    For,
    Scope,
    Seq,
    Stmt,
    map_exprs,
    read_buffers,
    written_buffers,
)


@dataclass(frozen=True)
class Repeated:
    """The body of a loop: what depends on `step` alone, and what follows."""

    step: Expr  # loop // number
    buffers: list[Buffer]  # allocated in the body
    first: list[Stmt]
    rest: list[Stmt]


def repeated(loop: For) -> Repeated | None:
    """The statements at the start of a loop's body that need not run again while `step` is the
    same: they write memory of the thread which nothing else writes. None where there are none."""
    buffers, stmts = _flat(loop.body)
    step = _step(stmts[0], loop.var)
    if step is None:
        return None
    count = 0
    while count < len(stmts) and _depends_on(stmts[count], loop.var) <= {step}:
        count += 1
    first, rest = stmts[:count], stmts[count:]
    made = {b for x in first for b in written_buffers(x)}
    needed = {b for x in first for b in read_buffers(x)}
    later = {b for x in rest for b in written_buffers(x)}
    private = all(b.scope in (Scope.LOCAL, Scope.REGISTER) for b in made)
    if not rest or not private or (made | needed) & later:
        return None
    return Repeated(step, buffers, first, rest)


def _flat(s: Stmt) -> tuple[list[Buffer], list[Stmt]]:
    """The buffers that a body allocates, and its statements in order."""
    if isinstance(s, Alloc):
        buffers, stmts = _flat(s.body)
        return [s.buffer, *buffers], stmts
    if isinstance(s, Seq):
        parts = [_flat(x) for x in s.stmts]
        return [b for p in parts for b in p[0]], [x for p in parts for x in p[1]]
    return [], [s]


def _step(s: Stmt, var: Var) -> Expr | None:
    """The one quotient of a loop variable that a statement depends on."""
    found = _depends_on(s, var)
    (step,) = found if len(found) == 1 else (None,)
    return step if step is not var else None


def _depends_on(s: Stmt, var: Var) -> set[Expr]:
    """The quotients of a loop variable in a statement, and the variable itself if it is used in any
    other way."""
    found: set[Expr] = set()

    def replace(e: Expr) -> Expr | None:
        if type(e) is Binary and e.op == "floordiv" and e.a is var and type(e.b) is Const:
            found.add(e)
            return Const(0)
        return None

    def look(e: Expr) -> Expr:
        if var in free_vars(rewrite(e, replace)):
            found.add(var)
        return e

    map_exprs(s, look)
    return found


__all__ = ["Repeated", "repeated"]
