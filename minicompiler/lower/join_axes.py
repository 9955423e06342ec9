"""Lines and pixels of an image that a reduction walks through as one are one axis.

    for o: for h in 28: for w in 28: for c: r[o, h, w] += x[c, h, w] * p[o, c]
      ->   for o: for f in 784: for c: r[o, f] += x[c, f] * p[o, c]

Memory stays as it is: parameters get another shape, with the same elements in the same order. What
is left of a convolution with one tap is a matrix product, whose tiles do not end with each line.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..ir.expr import ZERO, Binary, Expr, Load, factors, free_vars, loads, rewrite
from ..ir.tir import SERIAL, Block, Buffer, For, Iter, PrimFunc, Seq, Stmt, Store, map_statements
from ..ir.tir import statements as every_statement

Pair = tuple[Iter, Iter]
Access = tuple[Buffer, tuple[Expr, ...]]


def join_axes(func: PrimFunc) -> PrimFunc:
    """Joins the last two axes of what a product or another reduction gives, where all buffers that
    share them can follow, and again as long as that works (a volume has three)."""
    while True:
        found = [s for s in every_statement(func) if isinstance(s, Block) and s.init is not None]
        first = next(filter(_is_product, found), found[0] if found else None)
        pairs = _pairs(func, first) if first is not None else None
        if not pairs:
            return func
        func = _joined(func, pairs)


def _is_product(s: Block) -> bool:
    """A block that sums products of two loads."""
    if type(s.body.value) is not Binary:
        return False
    term = s.body.value.b
    return factors(term) is not None and len(list(loads(term))) == 2


def _accesses(block: Block) -> Iterator[Access]:
    for store in (block.init, block.body):
        if store is not None:
            yield store.buffer, store.indices
            yield from ((x.buffer, x.indices) for x in loads(store.value))


def _pairs(func: PrimFunc, reduction: Block) -> dict[Block, Pair] | None:
    """Per block the iterators that become one; None where a block does not walk through both axes
    of all it touches as through one, or there is more than loops and blocks."""
    parts = list(every_statement(func))
    if not all(isinstance(s, Block | For | Seq) for s in parts):
        return None
    nested = {(s.var, s.body.var) for s in parts if isinstance(s, For) and isinstance(s.body, For)}
    blocks = [s for s in parts if isinstance(s, Block)]
    shared, found = {reduction.body.buffer}, dict[Block, Pair]()
    while True:
        before = len(shared), len(found)
        for block in blocks:
            walked = {at[-2:] for buffer, at in _accesses(block) if buffer in shared}
            pair = found.get(block) or _pair_of(block, walked)
            if walked and pair is None:
                return None
            if pair is None:
                continue
            if (pair[0].value, pair[1].value) not in nested or not _walks(block, pair):
                return None
            found[block] = pair
            own = {i.var for i in pair}
            shared.update(b for b, at in _accesses(block) if any(own & free_vars(i) for i in at))
        if before == (len(shared), len(found)):
            return found


def _pair_of(block: Block, walked: set[tuple[Expr, ...]]) -> Pair | None:
    if len(walked) != 1:
        return None
    (indices,) = walked
    its = [i for at in indices for i in block.iters if i.var is at and not i.reduce]
    return (its[0], its[1]) if len(its) == 2 and its[0] is not its[1] else None


def _walks(block: Block, pair: Pair) -> bool:
    """Whether the two iterators only occur as the last indices of whole buffers in rows."""
    u, v = pair
    for buffer, at in _accesses(block):
        if any({u.var, v.var} & free_vars(i) for i in at):
            plain = buffer.layout is None and at[-2:] == (u.var, v.var)
            if not plain or buffer.shape[-2:] != (u.extent, v.extent):
                return False
            if any({u.var, v.var} & free_vars(i) for i in at[:-2]):
                return False
    outside = [rewrite(s.value, _without) for s in (block.init, block.body) if s is not None]
    return not any({u.var, v.var} & free_vars(e) for e in (*outside, block.where))


def _without(e: Expr) -> Expr | None:
    return Load(e.buffer, (ZERO,) * len(e.indices)) if type(e) is Load and e.mask is None else None


def _joined(func: PrimFunc, pairs: dict[Block, Pair]) -> PrimFunc:
    """The first iterator of each pair, and its loop, now count all points; the second is gone."""
    shared = {x for b, (u, _) in pairs.items() for x, at in _accesses(b) if u.var in at}
    new = {b: b.with_(shape=(*b.shape[:-2], b.shape[-2] * b.shape[-1])) for b in shared}
    loops = {u.value for u, _ in pairs.values()}

    def load(e: Expr) -> Expr | None:
        return Load(new[e.buffer], e.indices[:-1]) if type(e) is Load and e.buffer in new else None

    def store(s: Store) -> Store:
        indices = s.indices[:-1] if s.buffer in new else s.indices
        return s.with_(
            buffer=new.get(s.buffer, s.buffer), indices=indices, value=rewrite(s.value, load)
        )

    def one(s: Stmt) -> Stmt | None:
        if isinstance(s, Block) and s in pairs:
            u, v = pairs[s]
            whole = u.with_(extent=u.extent * v.extent)
            return s.with_(
                iters=tuple(whole if i is u else i for i in s.iters if i is not v),
                init=None if s.init is None else store(s.init),
                body=store(s.body),
            )
        if isinstance(s, For) and s.var in loops:
            assert isinstance(s.body, For)
            return For(s.var, s.extent * s.body.extent, SERIAL, s.body.body)
        return None

    return func.with_(
        params=tuple(new.get(b, b) for b in func.params),
        buffers=tuple(new.get(b, b) for b in func.buffers),
        phases=tuple(map_statements(p, one) for p in func.phases),
    )
