"""Work that only gives an array another shape runs over the axes of what it reads.

    for i in 50176: r[0, i] = f(x[0, i // 3136, i // 56 % 56, i % 56])
      ->   for c in 16: for h in 56: for w in 56: r[0, c, h, w] = f(x[0, c, h, w])

Memory stays as it is: the result gets the operand's shape, with the same elements in the same
order. Where the operand lies in blocks this is the copy out of them, which is tiled in registers;
by divisions of one index it was read element by element.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.arith import Arith
from ..ir.expr import ONE, TRUE, ZERO, Expr, Load, Var, eq, free_vars, loads, rewrite
from ..ir.tir import SERIAL, Block, For, Iter, PrimFunc, Stmt


def keep_shape(func: PrimFunc) -> PrimFunc:
    """The function over the axes of its operand in blocks, if it is one elementwise block that
    reads all operands at their elements with the result's number. No other function changes."""
    block = _only_block(func)
    if block is None or block.init is not None or block.where is not TRUE:
        return func
    result, found = block.body.buffer, list(loads(block.body.value))
    blocked = next((x.buffer for x in found if x.buffer.layout is not None), None)
    if result.layout is not None or blocked is None or blocked.shape == result.shape:
        return func
    arith = Arith({i.var: (ZERO, i.extent - 1) for i in block.iters})
    number = _number(block.body.indices, result.shape)
    for x in found:
        same = x.buffer.shape == blocked.shape and x.mask is None
        if not same or arith.prove(eq(_number(x.indices, x.buffer.shape), number)) is not True:
            return func
    rest = rewrite(
        block.body.value,
        lambda e: Load(e.buffer, (ZERO,) * len(e.indices)) if type(e) is Load else None,
    )
    if any(i.reduce for i in block.iters) or _mentions(rest, block.iters):
        return func
    shape = blocked.shape
    loops = [Var(f"i{k}") for k in range(len(shape))]
    inside = [Var(f"v{x.name}") for x in loops]
    at = tuple(ZERO if n is ONE else v for v, n in zip(inside, shape, strict=True))
    axes = [k for k, n in enumerate(shape) if n is not ONE]
    made = result.with_(shape=shape)
    value = rewrite(block.body.value, lambda e: Load(e.buffer, at) if type(e) is Load else None)
    nest: Stmt = block.with_(
        iters=tuple(Iter(inside[k], shape[k], False, loops[k]) for k in axes),
        body=block.body.with_(buffer=made, indices=at, value=value),
    )
    for k in reversed(axes):
        nest = For(loops[k], shape[k], SERIAL, nest)
    params = tuple(made if b is result else b for b in func.params)
    return func.with_(params=params, phases=(nest,))


def _only_block(func: PrimFunc) -> Block | None:
    """The block of a function that is nothing but loops around one."""
    if len(func.phases) != 1 or func.buffers or func.results != 1:
        return None
    s = func.phases[0]
    while isinstance(s, For):
        s = s.body
    return s if isinstance(s, Block) else None


def _number(indices: Sequence[Expr], shape: Sequence[Expr]) -> Expr:
    """The number of an element in row-major order."""
    number: Expr = ZERO
    for i, n in zip(indices, shape, strict=True):
        number = number * n + i
    return number


def _mentions(e: Expr, iters: Sequence[Iter]) -> bool:
    return bool(free_vars(e) & {i.var for i in iters})
