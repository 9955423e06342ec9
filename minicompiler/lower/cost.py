"""What a kernel has to do, counted on its loops before they are scheduled.

    flops(func)      2*batch*m*n*k + batch*m*n      operations on numbers, over the dimensions
    moved(func)      4*(m*k + k*n + m*n)            bytes it reads and writes, each touched once
    points(func)     m*n*k + m*n                    iterations of its loops, whatever they do

An addition, a multiplication, a division and a function such as exp count as one each, of floats
and of integers that are no indices; a comparison, min and max count nothing. The padding of a
convolution counts as if it was data. Of a table that is looked up only the rows that are read
count. Given the loops of an operator's first compute, this is the work that a rate in GFLOP/s
refers to.
"""

from __future__ import annotations

from minicompiler.ir.expr import (
    ONE,
    ZERO,
    Binary,
    Call,
    Const,
    Dim,
    Expr,
    factors,
    free_vars,
    loads,
    minimum,
    product,
    walk,
)
from minicompiler.ir.tir import (
    Block,
    Buffer,
    For,
    PrimFunc,
    Stmt,
    Store,
    statements,
    sub_statements,
)
from minicompiler.ir.types import index

_COUNTED = ("add", "sub", "mul", "div", "pow")


def flops(func: PrimFunc) -> Expr:
    """Operations of one call; what depends on constants alone is done before."""
    known = {b for b in func.params if b.constant}
    total: Expr = ZERO
    for s in statements(func):
        if not isinstance(s, Block):
            continue
        if known.issuperset(x.buffer for x in loads(s.body.value) if x.buffer is not s.body.buffer):
            known.add(s.body.buffer)
        else:
            total = total + _operations(s)
    return total


def points(func: PrimFunc) -> Expr:
    """How often the statements of the loops run at least: what bounds the time of a call.

    A loop whose extent depends on data or on another loop counts as one iteration.
    """

    def within(s: Stmt) -> Expr:
        inner = sub_statements(s)
        if not inner:
            return ONE
        total: Expr = ZERO
        for x in inner:
            total = total + within(x)
        known = isinstance(s, For) and all(
            isinstance(e, Const | Dim | Binary) for e in walk(s.extent)
        )
        return s.extent * total if isinstance(s, For) and known else total

    total: Expr = ZERO
    for phase in func.phases:
        total = total + within(phase)
    return total


def moved(func: PrimFunc) -> Expr:
    """Bytes of parameters and results, which pass through memory at least once."""
    total: Expr = ZERO
    for part in traffic(func):
        for n in part.values():
            total = total + n
    return total


def traffic(func: PrimFunc) -> tuple[dict[Buffer, Expr], dict[Buffer, Expr]]:
    """Bytes read of each parameter and bytes written of each result, no element counted twice."""
    count = len(func.params) - func.results
    sizes = {b: product(b.shape) * b.dtype.bytes for b in func.params}
    read: dict[Buffer, Expr] = {}
    for s in statements(func):
        if isinstance(s, Block):
            extents = {i.var: i.extent for i in s.iters}
            for x in [y for e in (s.body.value, *s.body.indices) for y in loads(e)]:
                # As many elements as there are combinations of what its indices depend on.
                used = frozenset().union(*map(free_vars, x.indices), frozenset())
                touched = product(n for v, n in extents.items() if v in used)
                read[x.buffer] = read.get(x.buffer, ZERO) + touched * x.buffer.dtype.bytes
        elif isinstance(s, Store):  # statements of an extern, which may loop over data
            read |= {x.buffer: sizes.get(x.buffer, ZERO) for x in loads(s.value)}
    return (
        {b: minimum(read[b], sizes[b]) for b in func.params[:count] if b in read},
        {b: sizes[b] for b in func.params[count:]},
    )


def _operations(block: Block) -> Expr:
    """Operations of a block. An expression that occurs twice is computed once, and one that does
    not depend on an iterator is computed once for all its values: 1/sum[i] once per row."""
    total: Expr = ZERO
    for e in walk(block.body.value):
        if is_number(e) and (type(e) is Call or (type(e) is Binary and e.op in _COUNTED)):
            of_pairs = type(e) is Call and factors(e) is not None
            total = total + evaluations(block, e) * (3 if of_pairs else 1)
    return total


def is_number(e: Expr) -> bool:
    """Whether an expression's arithmetic is the work of a kernel: not that of an index."""
    return e.dtype.is_float or (e.dtype.is_int and e.dtype.scalar is not index)


def evaluations(block: Block, e: Expr) -> Expr:
    """How many different values a part of a block's body takes."""
    # The step of a reduction is made for each of its iterations, whatever it adds.
    everything = e is block.body.value and any(i.reduce for i in block.iters)
    used = free_vars(e)
    # Indices of registers are written in loop variables, not iterators.
    return product(
        i.extent
        for i in block.iters
        if everything or i.var in used or not used.isdisjoint(free_vars(i.value))
    )
