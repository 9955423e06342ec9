"""Activations of convolutional chains lie in blocks of channels, so that a vector holds 16 of them.

    %0 = conv(%x, @w) : float32[1, 64, 56, 56]      ->  ... @(d0, d1//16, d2, d3, d1%16)
    %1 = relu(%0) : float32[1, 64, 56, 56]          ->  ... @(d0, d1//16, d2, d3, d1%16)
Only results of nodes change their place in memory: operators see logical indices, and a kernel
reads any layout through its index map, so no conversions are inserted. Inputs and results of the
model stay row-major.
"""

from __future__ import annotations

from typing import Any

from ..ir.expr import const_int
from ..ir.graph import (
    Apply,
    Function,
    Item,
    Value,
    layout_of,
    rebuild,
    type_of,
    with_args,
)
from ..ir.layout import IndexMap, axes
from ..ir.op import Kind
from ..ir.types import TensorType
from ..ops import conv, pieces, pool
from ..target import Target
from .kind import kind_of

BLOCKS = (16, 24, 40, 8)
_RANK = 4
# Operators that walk over windows of each channel: where blocked data pays and begins.
_SPATIAL = (conv.conv, conv.conv_transpose, pool.max_pool, pool.avg_pool, pool.lp_pool)


def convert_layout(fn: Function, ctx: Any) -> Function:
    """Gives convolutions, pools and the elementwise work behind them a blocked layout."""
    blocks = blocks_for(None if ctx is None else ctx.target)
    results = {id(r.tuple if isinstance(r, Item) else r) for r in fn.results}

    def change(v: Value, args: tuple[Value | None, ...]) -> Value | None:
        if not isinstance(v, Apply) or isinstance(v.op, Function) or id(v) in results:
            return None
        wanted = _layout(v, args, blocks)
        if wanted is None or wanted == v.layouts[0]:
            return None
        now = v if args == v.args else with_args(v, args)
        return now.with_(layouts=(wanted,))

    return rebuild(fn, change)


def blocks_for(target: Target | None) -> tuple[int, ...]:
    """The sizes of blocks of channels, the best ones first. One of several vectors, but no power of
    two, makes full tiles of channels that 16 does not divide; a tile needs two rows at least."""
    lanes = 0 if target is None else target.vector_bytes // 4
    return tuple(
        b
        for b in BLOCKS
        if not b & (b - 1)
        or (target is not None and b % lanes == 0 and target.registers > 3 * (b // lanes))
    )


def _layout(v: Apply, args: tuple[Value | None, ...], blocks: tuple[int, ...]) -> IndexMap | None:
    t = v.type
    if not isinstance(t, TensorType) or t.rank != _RANK:
        return None
    if v.op in _SPATIAL:
        channels = const_int(t.shape[1])
        # A few lanes left empty in the last block cost less than shorter blocks.
        fits = (b for b in blocks if channels is not None and -channels % b <= channels // 32)
        block = next(fits, None)
        return None if block is None else IndexMap.blocked(_RANK, 1, block)
    if v.op is pieces.concat:
        return _joined(v, args)
    follow = next(
        (
            layout_of(a)
            for a in args
            if a is not None and type_of(a).shape == t.shape and layout_of(a) is not None
        ),
        None,
    )
    return follow if follow is not None and kind_of(v) <= Kind.BROADCAST else None


def _joined(v: Apply, args: tuple[Value | None, ...]) -> IndexMap | None:
    """Blocked parts concatenate block by block, when the seams lie between blocks."""
    layouts = [layout_of(a) for a in args if a is not None]
    first = layouts[0]
    if first is None or any(m != first for m in layouts):
        return None
    block = max(first.factor(d) for d in axes(first.rank))
    sizes = [const_int(type_of(a).shape[1]) for a in args if a is not None]
    return first if all(s is not None and s % block == 0 for s in sizes) else None
