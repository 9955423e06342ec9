"""What a kernel has to do, counted on its loops before they are scheduled.

    flops(func)      2*batch*m*n*k + batch*m*n      floating-point operations, over the dimensions
    moved(func)      4*(m*k + k*n + m*n)            bytes of its tensors, each touched once

An addition, a multiplication, a division and a function such as exp count as one each; a
comparison, min and max count nothing. The padding of a convolution counts as if it was data. Given
the loops of an operator's first compute, this is the work that a rate in GFLOP/s refers to.
"""

from __future__ import annotations

from minicompiler.ir.expr import ZERO, Binary, Call, Expr, loads, product, walk
from minicompiler.ir.tir import Block, PrimFunc, statements

_COUNTED = ("add", "sub", "mul", "div", "pow")


def flops(func: PrimFunc) -> Expr:
    """Floating-point operations of one call; what depends on constants alone is done before."""
    known = {b for b in func.params if b.constant}
    total: Expr = ZERO
    for s in statements(func):
        if not isinstance(s, Block):
            continue
        if known.issuperset(x.buffer for x in loads(s.body.value) if x.buffer is not s.body.buffer):
            known.add(s.body.buffer)
        else:
            total = total + product(i.extent for i in s.iters) * _operations(s.body.value)
    return total


def moved(func: PrimFunc) -> Expr:
    """Bytes of parameters and results, which pass through memory at least once."""
    total: Expr = ZERO
    for b in func.params:
        total = total + product(b.shape) * b.dtype.bytes
    return total


def _operations(value: Expr) -> int:
    """Operations per element; an expression that occurs twice is computed once."""
    return sum(
        e.dtype.is_float and (type(e) is Call or (type(e) is Binary and e.op in _COUNTED))
        for e in walk(value)
    )
