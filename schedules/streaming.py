"""Results that are larger than the caches are written past them.

    stream(block="relu", above=16777216)     r0[i] = ...   # streamed

An ordinary store first reads the line it changes, and drives something else out of the caches; a
streamed one does neither. Whoever reads the result later finds it in memory, which is where a large
one would be in any case. The sizes may be symbolic: then the kernel looks at them when it runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from minicompiler.ir.expr import (
    FALSE,
    TRUE,
    ZERO,
    Binary,
    Dim,
    Expr,
    all_of,
    eq,
    free_vars,
    substitute,
    wrap,
)
from minicompiler.ir.tir import UNROLL, VECTOR, Scope, Stmt
from minicompiler.target import LINE_BYTES, STREAMED

from . import analysis

if TYPE_CHECKING:
    from .schedule import Schedule


def apply(s: Schedule) -> None:
    """Marks every block that fills a result in the order of its memory."""
    for block in list(analysis.blocks(s.func)):
        if _reason(s, block.name) is None and may_be_large(s, block.name):
            s.stream(block.name, _limit(s))


def stream(s: Schedule, name: str, above: int) -> None:
    """The primitive: the stores of a block bypass the caches if their buffer has at least `above`
    bytes."""
    block, _ = s.block(name)
    reason = _reason(s, name)
    if reason is not None:
        s.refuse(reason, block)
    condition = all_of(
        [analysis.arith_of(s.func).simplify(wrap(above) <= _bytes(s, name)), *_fits(s, name)]
    )

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
    if FALSE in _fits(s, name):
        return f"lines that block {name} writes begin anywhere in memory"
    if len(around) > 1 and around[-2].kind is UNROLL:
        return f"block {name} stores tiles, which are pieces of cache lines"
    return None


def _fits(s: Schedule, name: str) -> list[Expr]:
    """What must hold for all lines that a block writes to begin where instructions that write past
    the caches can store. If only some did, they would write to cache lines of which ordinary stores
    write the rest, and such a line goes to memory twice."""
    block, path = s.block(name)
    arith, buffer = analysis.arith_of(s.func), block.body.buffer
    offset = substitute(buffer.offset(block.body.indices), analysis.values_of(block))
    lane = analysis.loops_in(path)[-1].var
    found: dict[Expr, None] = {}
    for atoms, factor in arith.poly(offset).items():
        if any(lane in free_vars(a) or _ends_with_line(a) for a in atoms):
            continue
        step: Expr = wrap(factor)
        for a in atoms:
            step = step * a if type(a) is Dim else step
        found[arith.simplify(eq(step % (STREAMED[0] // buffer.dtype.bytes), ZERO))] = None
    return [c for c in found if c is not TRUE]


def _ends_with_line(e: Expr) -> bool:
    """True for where the vectors of a line begin, of which the last one ends with the line."""
    return type(e) is Binary and e.op in ("min", "max")


def is_large(s: Schedule, name: str) -> bool:
    """True where a block is known to write more than stays in the caches."""
    return analysis.arith_of(s.func).prove(wrap(_limit(s)) <= _bytes(s, name)) is True


def may_be_large(s: Schedule, name: str) -> bool:
    """True unless a block is known to write less."""
    arith = analysis.arith_of(s.func)
    return arith.simplify(wrap(_limit(s)) <= _bytes(s, name)) is not FALSE


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


def _bytes(s: Schedule, name: str) -> Expr:
    buffer = s.block(name)[0].body.buffer
    size: Expr = wrap(buffer.dtype.bytes)
    for n in buffer.physical_shape:
        size = size * n
    return size
