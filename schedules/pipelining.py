"""The primitive `delay`: the end of an iteration runs beside the beginning of the next one.

    for t in 8:                             A[0]
        A[t]                                for t in 7:
        for k: r[t, k] = a[t] * x[t, k]  ->     for k: r[t, k] = a[t] * x[t, k]
                                                A[t + 1]
                                            for k: r[7, k] = a[7] * x[7, k]

A loop that reads a row from memory, computes, and writes a row keeps the memory waiting while it
computes. Once what writes row t stands beside what computes row t + 1, the two can run together
(`compute_with`): software pipelining (M. Lam, PLDI 1988).
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from minicompiler.ir.expr import ONE, ZERO, Expr
from minicompiler.ir.tir import (
    PARALLEL,
    SCAN,
    SERIAL,
    Alloc,
    Buffer,
    Seq,
    Stmt,
    read_buffers,
    seq,
    substitute_stmt,
    written_buffers,
)

from . import analysis
from .cutting import renamed

if TYPE_CHECKING:
    from .schedule import Schedule


def delay(s: Schedule, name: str, loop_name: str, before: str) -> None:
    """See the module text. The statement with the block is the last one in `loop`; it comes to
    stand just before the loop `before`, which belongs to the next iteration. Buffers that are
    allocated around all statements of an iteration outlast it."""
    reason = not_delayed(s, name, loop_name, before)
    loop, _ = s.loop(loop_name)
    if reason:
        s.refuse(reason, loop)
    arith = analysis.arith_of(s.func)
    (allocs, body), (later, _) = _body(loop.body), s.loop(before)
    assert isinstance(body, Seq)
    moved = body.stmts[-1]

    def at(x: Stmt, value: Expr) -> Stmt:
        return substitute_stmt(x, {loop.var: value})

    def place(x: Stmt) -> Stmt:
        """A statement of the next iteration, with the last one of this one put into it."""
        if x is later:
            return seq([at(moved, loop.var), at(x, loop.var + 1)])
        if isinstance(x, Alloc) and analysis.contains(x, later):
            return x.with_(body=place(x.body))
        if isinstance(x, Seq) and analysis.contains(x, later):
            return seq([place(y) for y in x.stmts])
        return at(x, loop.var + 1)

    rest = seq(body.stmts[:-1])
    last = arith.simplify(loop.extent - 1)
    parts = [
        renamed(s, at(rest, ZERO), "first"),
        loop.with_(extent=last, body=place(rest)),
        renamed(s, at(moved, last), "last"),
    ]
    made = seq(parts)
    for buffer in reversed(allocs):
        made = Alloc(buffer, made)
    s.swap(loop, made)


def not_delayed(s: Schedule, name: str, loop_name: str, before: str) -> str:
    """Why `delay` is not possible; "" where it is."""
    (loop, _), (block, _), (later, inner) = s.loop(loop_name), s.block(name), s.loop(before)
    if loop.kind is not SERIAL or loop.tag == SCAN:
        return f"loop {loop_name} is marked {loop.tag or loop.kind.value} already"
    if any(x.kind is PARALLEL for x in analysis.loops(loop.body)):
        return f"threads share a loop in {loop_name}"
    body = _body(loop.body)[1]
    if not isinstance(body, Seq) or not analysis.contains(body.stmts[-1], block):
        return f"block {name} is not in the last one of several statements in {loop_name}"
    if loop not in inner or analysis.contains(body.stmts[-1], later):
        return f"loop {before} does not stand before block {name} in {loop_name}"
    between = inner[inner.index(loop) + 1 :]
    if any(not isinstance(x, Alloc | Seq) for x in between):
        return f"loop {before} is not directly in {loop_name}"
    arith = analysis.arith_of(s.func)
    if arith.prove(loop.extent >= ONE) is not True:
        return f"{loop_name} may have no iteration"
    moved = body.stmts[-1]
    before_it: list[Stmt] = []
    for outer, inside in itertools.pairwise((*between, later)):
        if isinstance(outer, Seq):
            before_it += outer.stmts[: outer.stmts.index(inside)]
    earlier = seq(before_it)
    used, made = read_buffers(moved), written_buffers(moved)
    if (used | made) & written_buffers(earlier) or made & read_buffers(earlier):
        return f"what stands before {before} changes or reads what block {name} uses"
    return ""


def _body(x: Stmt) -> tuple[list[Buffer], Stmt]:
    """The buffers allocated around all of an iteration, and what it does."""
    buffers: list[Buffer] = []
    while isinstance(x, Alloc):
        buffers.append(x.buffer)
        x = x.body
    return buffers, x
