"""The primitive `slide`: neighbouring windows share what is combined across the line they slide on.

    C[h, w] = max over a, b of X[h + a, w + b]      T[h, j] = max over a of X[h + a, j]
                                               ->   C[h, w] = max over b of T[h, w + b]

Legal because the combiner is associative and the operand knows the window and its taps along the
line by their sum only. A window of k * k elements takes 2k steps instead of k * k.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from minicompiler.ir.arith import Arith
from minicompiler.ir.expr import (
    TRUE,
    Binary,
    Expr,
    Load,
    Var,
    binary,
    const_int,
    free_vars,
    substitute,
    wrap,
)
from minicompiler.ir.tir import SERIAL, Block, Buffer, For, Iter, Scope, Seq, Stmt, Store
from minicompiler.ir.types import index
from minicompiler.lower.to_tir import identity_of

from . import analysis
from .reductions import COMBINER

if TYPE_CHECKING:
    from .schedule import Schedule

Steps = dict[Expr, int]  # elements that the operand moves by with each iterator along the line


def slide(s: Schedule, name: str, loop_name: str) -> tuple[str, str]:
    """See the module text; `loop` is that of w. (The block of T, its buffer.) Changes the order of
    summation."""
    block, path = s.block(name)
    loop, _ = s.loop(loop_name)
    update = analysis.update_operand(block)
    if block.init is None or update is None or update[0] not in COMBINER:
        s.refuse(f"block {name} is not a reduction with a known combiner", block)
    assert update is not None and block.init is not None
    nest = analysis.loops_in(path)
    if [x for x in path if not isinstance(x, Seq)] != nest or isinstance(path[-1], Seq):
        s.refuse(f"block {name} is not alone in its loops", block)
    if {i.value for i in block.iters} != {x.var for x in nest} or block.where is not TRUE:
        s.refuse(f"the loops of block {name} are split already", block)
    if any(x.kind is not SERIAL for x in nest):
        s.refuse(f"the loops of block {name} are marked already", block, "slide before mark")
    line = next((i for i in block.iters if i.value is loop.var and not i.reduce), None)
    if line is None or loop not in nest or line.var not in block.body.indices:
        s.refuse(f"block {name} has no windows along {loop_name}", loop)
    assert line is not None
    steps = line_steps(block, line, analysis.arith_of(s.func))
    if steps is None:
        s.refuse(f"windows of block {name} along {loop_name} have nothing in common", block)
    assert steps is not None
    return _two_nests(s, block, nest, line, steps)


def line_steps(block: Block, line: Iter, arith: Arith) -> Steps | None:
    """How the windows of a reduction move along a line; None where they share nothing across it:
    no taps on it or none across, or not their sum alone chooses the element."""
    update = analysis.update_operand(block)
    taps = {i.var for i in block.iters if i.reduce}
    steps: Steps = {}
    for load in analysis.operand_loads(block):
        for at in load.indices:
            if line.var in free_vars(at):
                along = {line.var, *(free_vars(at) & taps)}
                steps = {v: arith.poly(at).get((v,), 0) for v in along}
    if update is None or len(steps) < 2 or min(steps.values()) < 1 or not taps - steps.keys():
        return None
    value = _at(update[1], steps, line, Var("j"), arith)
    return None if free_vars(value) & steps.keys() else steps


def _at(e: Expr, steps: Steps, line: Iter, place: Expr, arith: Arith) -> Expr:
    """An operand for `place` on the line instead of for a window and its taps. It still mentions
    these where it uses them in another way than by their sum."""
    if not free_vars(e) & steps.keys():
        return e
    if e.dtype is index and isinstance(e, Binary):
        times = arith.poly(e).get((line.var,), 0) // steps[line.var]
        made = arith.simplify(e + (place - _position(steps)) * times)
        if not free_vars(made) & steps.keys():
            return made
    return e.map(lambda x: _at(x, steps, line, place, arith))


def _position(steps: Steps) -> Expr:
    """Of a tap of a window on the line."""
    return sum((v * n for v, n in steps.items()), start=wrap(0))


def _two_nests(
    s: Schedule, block: Block, nest: list[For], line: Iter, steps: Steps
) -> tuple[str, str]:
    update = analysis.update_operand(block)
    assert update is not None and block.init is not None
    arith = analysis.arith_of(s.func)
    own = block.body
    extent = line.extent * steps[line.var] - steps[line.var] + 1
    for i in block.iters:
        if i.reduce and i.var in steps:
            extent = extent + (i.extent - 1) * steps[i.var]
    extent = arith.simplify(extent)
    # ---- T: the line's loop runs over places instead of windows ---------------------------------
    fresh: dict[Expr, Var] = {x.var: s.fresh_var(x.var.name) for x in nest}
    place = s.fresh_var(line.var.name)
    iters = tuple(
        i.with_(
            var=place if i is line else i.var,
            extent=extent if i is line else i.extent,
            value=substitute(i.value, fresh),
        )
        for i in block.iters
        if i is line or i.var not in steps
    )
    value = _at(update[1], steps, line, place, arith)
    at = tuple(i.var for i in iters if not i.reduce)
    shape = tuple(i.extent for i in iters if not i.reduce)
    across = Buffer(s.fresh(own.buffer.name + "_across"), own.buffer.dtype, shape, Scope.GLOBAL)
    identity = identity_of(COMBINER[update[0]], across.dtype)
    made = s.fresh(block.name + "_across")
    first: Stmt = Block(
        made,
        iters,
        TRUE,
        Store(across, at, identity),
        Store(across, at, binary(update[0], Load(across, at), value)),
    )
    kept = [x for x in nest if any(i.value is fresh[x.var] for i in iters)]
    for x in reversed(kept):
        long = extent if x.var is line.value else x.extent
        first = For(fresh[x.var], long, SERIAL, first)
    # ---- C: only the taps on the line are left --------------------------------------------------
    spot = arith.simplify(_position(steps))
    read = Load(across, tuple(spot if v is place else v for v in at))
    again = tuple(i for i in block.iters if not i.reduce or i.var in steps)
    last: Stmt = block.with_(
        iters=again,
        body=own.with_(value=binary(update[0], Load(own.buffer, own.indices), read)),
    )
    for x in reversed([x for x in nest if any(i.value is x.var for i in again)]):
        last = For(x.var, x.extent, SERIAL, last)
    s.swap(nest[0], Seq((first, last)))
    s.func = s.func.with_(buffers=(*s.func.buffers, across))
    return made, across.name


def saves(block: Block, line: Iter, arith: Arith) -> bool:
    """Whether windows have fewer taps on a line and across it than in all."""
    steps = line_steps(block, line, arith)
    if steps is None:
        return False
    sizes = {i.var: const_int(i.extent) or 0 for i in block.iters if i.reduce}
    on = math.prod(n for v, n in sizes.items() if v in steps)
    off = math.prod(n for v, n in sizes.items() if v not in steps)
    return on + off < on * off
