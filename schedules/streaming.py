"""Results that are larger than the caches are written past them.

    stream(block="relu", above=16777216)     r0[i] = ...   # streamed

An ordinary store first reads the line it changes, and drives something else out of the caches; a
streamed one does neither. Whoever reads the result later finds it in memory, which is where a large
one would be in any case. The sizes may be symbolic: then the kernel looks at them when it runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from minicompiler.ir.expr import FALSE, Expr, wrap
from minicompiler.ir.tir import UNROLL, VECTOR, Scope, Stmt
from minicompiler.target import LINE_BYTES

from . import analysis

if TYPE_CHECKING:
    from .schedule import Schedule


def apply(s: Schedule) -> None:
    """Marks every block that fills a result in the order of its memory."""
    above = _limit(s)
    for block in list(analysis.blocks(s.func)):
        if _reason(s, block.name) is None and _may_reach(s, block.name, above):
            s.stream(block.name, above)


def stream(s: Schedule, name: str, above: int) -> None:
    """The primitive: the stores of a block bypass the caches if their buffer has at least `above`
    bytes."""
    block, _ = s.block(name)
    reason = _reason(s, name)
    if reason is not None:
        s.refuse(reason, block)
    arith = analysis.arith_of(s.func)
    condition = arith.simplify(wrap(above) <= _bytes(s, name))

    def one(x: Stmt) -> Stmt | None:
        return x.with_(body=x.body.with_(stream=condition)) if x is block else None

    s.edit(one)


def _reason(s: Schedule, name: str) -> str | None:
    """Why a block cannot stream what it stores; None if it can."""
    block, path = s.block(name)
    buffer = block.body.buffer
    if buffer.scope is not Scope.PARAM:
        return f"{buffer.name} is no result"
    if any(x.buffer is buffer for b in analysis.blocks(s.func) for x in analysis.block_loads(b)):
        return f"{buffer.name} is read again"
    around = analysis.loops_in(path)
    if not around or around[-1].kind is not VECTOR:
        return f"block {name} stores no vectors"
    if len(around) > 1 and around[-2].kind is UNROLL:
        return f"block {name} stores tiles, which are pieces of cache lines"
    return None


def is_large(s: Schedule, name: str) -> bool:
    """True where a block is known to write more than stays in the caches."""
    return analysis.arith_of(s.func).prove(wrap(_limit(s)) <= _bytes(s, name)) is True


def broken_lines(s: Schedule, name: str, loop: str) -> int:
    """The elements of a cache line, where a block streams what it stores and iterations of an outer
    loop begin anywhere in one, so that instructions that write past the caches do not fit; else 0.
    `loop` is the innermost one."""
    block, _ = s.block(name)
    buffer = block.body.buffer
    line = LINE_BYTES // buffer.dtype.bytes
    if buffer.scope is not Scope.PARAM or buffer.layout is not None or not is_large(s, name):
        return 0
    arith, (inner, _) = analysis.arith_of(s.func), s.loop(loop)
    broken = arith.prove(wrap(0) < inner.extent % line) is True
    return line if broken else 0


def _limit(s: Schedule) -> int:
    return s.target.caches[2] // 2


def _may_reach(s: Schedule, name: str, above: int) -> bool:
    """False where the buffer is known to be smaller."""
    arith = analysis.arith_of(s.func)
    return arith.simplify(wrap(above) <= _bytes(s, name)) is not FALSE


def _bytes(s: Schedule, name: str) -> Expr:
    buffer = s.block(name)[0].body.buffer
    size: Expr = wrap(buffer.dtype.bytes)
    for n in buffer.physical_shape:
        size = size * n
    return size
