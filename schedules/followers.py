"""What waits for the sum of a contraction: the blocks that read it, and what follows them.

    c[i, j] = sum over k ..;  r[i, j] = max(c[i, j] + bias[j], 0)

Computed tile by tile, they find the sum in registers.
"""

from __future__ import annotations

import math

from minicompiler.ir.expr import Expr, const_int
from minicompiler.ir.tir import Block, Iter

from . import analysis
from .schedule import Schedule

_COPIES = 4  # elements that a block may make of each one of a tile: they are unrolled


def can_follow(s: Schedule, main: Block) -> bool:
    """Whether all that waits for the sum reads it (and what follows it) at its own points."""
    arith = analysis.arith_of(s.func)
    every = list(analysis.blocks(s.func))
    later = {b.body.buffer for b in every[every.index(main) :]}
    waiting = [s.block(n)[0] for n in of(s, main.name)]
    made = {b.body.buffer for b in (main, *waiting)}
    for block in waiting:
        # A sum of its own has more loops than the tile.
        if analysis.is_reduction(block):
            return False
        own: dict[Expr, Iter] = {i.var: i for i in block.iters if not i.reduce}
        for load in analysis.block_loads(block):
            if load.buffer not in made:
                if load.buffer in later:
                    return False
                continue
            for index, size in zip(load.indices, load.buffer.shape, strict=True):
                it = own.get(index)
                if it is None and const_int(index) is None:
                    return False
                if it is not None and not analysis.stays_within(it, size, arith):
                    return False
    return True


def near(s: Schedule, main: str) -> list[str]:
    """Of the blocks that read the sum those computed tile by tile: up to the first one that makes
    many elements of one, r[i, j, k] = f(c[i, j], x[i, j, k])."""
    made = {s.block(main)[0].body.buffer}
    found = list[str]()
    for name in of(s, main):
        block, _ = s.block(name)
        at = {i for x in analysis.block_loads(block) if x.buffer in made for i in x.indices}
        copies = [const_int(i.extent) or math.inf for i in block.iters if i.var not in at]
        if math.prod(copies) > _COPIES:
            break
        found.append(name)
        made.add(block.body.buffer)
    return found


def of(s: Schedule, main: str) -> list[str]:
    """Blocks of phases of their own that read the sum (or what follows it), in order."""
    names = [b.name for b in analysis.blocks(s.func)]
    if main not in names:
        # The buffer that holds the tile: blocks reading it are inside already.
        return [
            b.name
            for b in analysis.blocks(s.func)
            if any(x.buffer.name == main for x in analysis.block_loads(b))
            and b.tag == ""
            and not analysis.product_loads(b)
        ]
    buffers = {s.block(main)[0].body.buffer}
    found = []
    for b in analysis.blocks(s.func):
        if b.name != main and any(x.buffer in buffers for x in analysis.block_loads(b)):
            found.append(b.name)
            buffers.add(b.body.buffer)
    return found
