"""Activations of convolutional chains lie in blocks of channels, so that a vector holds 16 of them.

    %0 = conv(%x, @w) : float32[1, 64, 56, 56]      ->  ... @(d0, d1//16, d2, d3, d1%16)
    %1 = relu(%0) : float32[1, 64, 56, 56]          ->  ... @(d0, d1//16, d2, d3, d1%16)
Results of nodes change their place in memory: operators see logical indices, and a kernel reads any
layout through its index map. Inputs and results of the model stay row-major, as does what bodies of
control flow read and make; an identity beside a convolution copies them where both sides of it have
blocks. Where all there is between them are convolutions of one tap, nothing is copied: these are
products of matrices, and stay in rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..ir.expr import const_int, product
from ..ir.graph import (
    Apply,
    Constant,
    Function,
    Input,
    Item,
    Value,
    apply,
    layout_of,
    nested_functions,
    rebuild,
    topological,
    type_of,
    with_args,
)
from ..ir.layout import IndexMap, axes
from ..ir.op import Kind
from ..ir.types import TensorType
from ..ops import conv, elementwise, padding, pieces, pool, resize
from ..target import Target
from .kind import kind_of

BLOCKS = (16, 24, 40, 8)
_RANKS = (3, 4, 5)  # lines, images, volumes
_CONVOLUTIONS = (conv.conv, conv.conv_transpose)
# Operators that walk over windows of each channel: where blocked data pays and begins.
_SPATIAL = (*_CONVOLUTIONS, pool.max_pool, pool.avg_pool, pool.lp_pool)

# How many lanes of the last block may be left empty, as parts (one in so many) of the channels: a
# few cost less than shorter blocks, some less than none. Where a convolution reads blocks, even
# many cost less than vectors of pixels, which lie apart there.
_FEW, _SOME, _MANY = 32, 8, 3

_PIXELS = 32  # one in so many may be missing in the last vectors of a product

Place = tuple[int, int]  # id of a node, number of its result
Wish = tuple[int, int]  # one lane in so many may be empty (as above), channels of a group (0: any)
Blocks = tuple[tuple[int, int], ...]  # how many lanes may be empty (as above), size of a block


def convert_layout(fn: Function, ctx: Any) -> Function:
    """Gives convolutions, pools and what lies between them a blocked layout."""
    blocks = blocks_for(None if ctx is None else ctx.target)
    results = {_place(r) for r in fn.results}
    products = _products(fn)
    wanted = _wanted(fn, products)
    copies: dict[int, Value] = {}

    def change(v: Value, args: tuple[Value | None, ...]) -> Value | None:
        if not isinstance(v, Apply) or isinstance(v.op, Function):
            return None
        if nested_functions(v.attrs):
            return with_args(v, tuple(a if a is None else _in_rows(a, copies) for a in args))
        rows = id(v) in products and (id(v), 0) not in wanted and _layouts(args)[0] is None
        if v.op in _CONVOLUTIONS and not rows:
            args = (_copied(args[0], blocks, copies), *args[1:])
        if isinstance(v.type, tuple):
            each = [_block_layout(t, blocks, *wanted[id(v), k])
                    if (id(v), k) in wanted and (id(v), k) not in results
                    else None for k, t in enumerate(v.type)]  # fmt: skip
            layouts = tuple(old or new for old, new in zip(v.layouts, each, strict=True))
        elif rows or ((id(v), 0) in results and v.op not in _CONVOLUTIONS):
            layouts = v.layouts
        else:
            layouts = (_layout(v, args, blocks, wanted.get((id(v), 0))) or v.layouts[0],)
        if layouts == v.layouts and args == v.args:
            return None
        now = v if args == v.args else with_args(v, args)
        now = now.with_(layouts=layouts)
        if (id(v), 0) in results and now.layouts[0] is not None:
            return apply(elementwise.identity, now, locs=v.locs, name=v.name)
        return now

    return rebuild(fn, change)


def blocks_for(target: Target | None) -> Blocks:
    """The sizes of blocks of channels, the best ones first. One of several vectors, but no power of
    two, makes full tiles of channels that 16 does not divide; a tile needs two rows at least. One
    shorter than a vector leaves lanes of its own empty."""
    lanes = 0 if target is None else target.vector_bytes // 4
    sizes = [
        b
        for b in BLOCKS
        if not b & (b - 1)
        or (target is not None and b % lanes == 0 and target.registers > 3 * (b // lanes))
    ]
    return tuple((n, b) for n in (_FEW, _SOME, _MANY) for b in sizes if n == _FEW or b >= lanes)


def _wanted(fn: Function, products: set[int]) -> dict[Place, Wish]:
    """The values that convolutions and pools read, directly or through what keeps the channels,
    how many lanes may be empty there, many where one reader sums over the channels, and the groups
    in which they are read."""
    wanted: dict[Place, Wish] = {}
    for v in reversed(list(topological(fn.results))):
        if not isinstance(v, Apply):
            continue
        own = wanted.get((id(v), 0))
        if own is not None:
            asked, (empty, group) = _passed_on(v), own
        else:
            asked = v.args[:1] if v.op in _SPATIAL and id(v) not in products else ()
            empty, group = _SOME, 0
        if v.op in _SPATIAL:
            dense = v.op in _CONVOLUTIONS and v.attrs.groups == 1
            empty, group = _MANY if dense else _SOME, _groups(v, made=False)
        for a in asked:
            if a is not None and type_of(a).rank in _RANKS:
                before = wanted.get(_place(a), (_FEW, 0))
                wanted[_place(a)] = min(before[0], empty), math.gcd(before[1], group)
    return wanted


def _groups(v: Apply, made: bool) -> int:
    """The channels of a group that a convolution reads (made: makes); 0: of all, or of one."""
    if v.op is not conv.conv or v.attrs.groups == 1:
        return 0
    x = v.args[0]
    assert x is not None
    channels = const_int(type_of(v if made else x).shape[1])
    return 0 if channels in (None, v.attrs.groups) else (channels or 0) // v.attrs.groups


def _products(fn: Function) -> set[int]:
    """The convolutions that are products of matrices, channels by pixels, and read what lies in
    rows anyway: inputs of the model, with elementwise work and other products on the way."""
    rows: dict[int, bool] = {}
    found = set()
    for v in topological(fn.results):
        if not isinstance(v, Apply) or isinstance(v.op, Function):
            rows[id(v)] = isinstance(v, Input | Constant)
        elif v.op is conv.conv:
            x = v.args[0]
            assert x is not None
            rows[id(v)] = rows[id(x)] and _is_product(v)
            found.update([id(v)] if rows[id(v)] else [])
        else:
            same = [rows[id(a)] for a in _passed_on(v) if a is not None]
            rows[id(v)] = bool(same) and all(same) and kind_of(v) <= Kind.BROADCAST
    return found


def _is_product(v: Apply) -> bool:
    """Whether a convolution has one tap at each pixel, and the pixels fill vectors."""
    x, w = v.args[:2]
    assert x is not None and w is not None
    shape, taps = type_of(x).shape, const_int(product(type_of(w).shape[2:]))
    pixels = const_int(product(shape[2:]))
    if pixels is None or taps != 1 or v.attrs.groups > 1 or type_of(v).shape[2:] != shape[2:]:
        return False
    return -pixels % BLOCKS[0] <= pixels // _PIXELS


def _passed_on(v: Apply) -> Sequence[Value | None]:
    """The arguments whose channels are those of the result."""
    if isinstance(v.type, tuple):
        return ()
    if v.op in _SPATIAL or v.op in (padding.pad, resize.resize):
        return v.args[:1]
    if v.op is pieces.concat:
        return v.args
    return [a for a in v.args if a is not None and type_of(a).shape == type_of(v).shape]


def _layouts(args: Sequence[Value | None]) -> list[IndexMap | None]:
    return [layout_of(a) for a in args if a is not None]


def _place(v: Value) -> Place:
    return (id(v.tuple), v.index) if isinstance(v, Item) else (id(v), 0)


def _block_layout(
    t: TensorType, blocks: Blocks, empty: int = _SOME, group: int = 0
) -> IndexMap | None:
    """The layout in blocks of channels, where the channels fill some but for one in `empty`; in
    blocks of several vectors that make up groups, if there are such ones."""
    channels = const_int(t.shape[1]) if t.rank in _RANKS else None
    if channels is None:
        return None
    fits = [b for part, b in blocks if part >= empty and -channels % b <= channels // part]
    whole = (b for b in fits if group and group % b == 0 and b > min(BLOCKS))
    block = next(whole, next(iter(fits), None))
    return None if block is None else IndexMap.blocked(t.rank, 1, block)


def _copied(x: Value | None, blocks: Blocks, copies: dict[int, Value]) -> Value | None:
    """What a convolution reads, in blocks of channels."""
    assert x is not None
    layout = _block_layout(type_of(x), blocks, _MANY) if layout_of(x) is None else None
    if layout is None:
        return x
    if id(x) not in copies:
        copies[id(x)] = apply(elementwise.identity, x).with_(layouts=(layout,))
    return copies[id(x)]


def _in_rows(x: Value, copies: dict[int, Value]) -> Value:
    """What control flow reads: its bodies are functions of their own, with row-major parameters."""
    if layout_of(x) is None:
        return x
    if id(x) not in copies:
        copies[id(x)] = apply(elementwise.identity, x)
    return copies[id(x)]


def _layout(
    v: Apply, args: tuple[Value | None, ...], blocks: Blocks, wanted: Wish | None
) -> IndexMap | None:
    t = v.type
    if not isinstance(t, TensorType) or t.rank not in _RANKS:
        return None
    if v.op in _SPATIAL:
        x = args[0]
        dense = v.op in _CONVOLUTIONS and x is not None and layout_of(x) is not None
        group = math.gcd(_groups(v, made=True), wanted[1] if wanted else 0)
        return _block_layout(t, blocks, _MANY if dense else _SOME, group)
    follow = _joined(v, args) if v.op is pieces.concat else _followed(v, t, args)
    if follow is None and wanted is not None and kind_of(v) is not Kind.OPAQUE:
        return _block_layout(t, blocks, *wanted)
    return follow


def _followed(v: Apply, t: TensorType, args: tuple[Value | None, ...]) -> IndexMap | None:
    """Elementwise work keeps the layout of an argument of its size."""
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
    layouts = _layouts(args)
    first = layouts[0]
    if first is None or any(m != first for m in layouts):
        return None
    block = max(first.factor(d) for d in axes(first.rank))
    sizes = [const_int(type_of(a).shape[1]) for a in args if a is not None]
    return first if all(s is not None and s % block == 0 for s in sizes) else None
