"""Constant positions that form a pattern: rules of `simplify` for gathering and scattering.

    gather(%x: [512], @i: [7, 64])                 with i[a, b] = 32*a + b    (windows that overlap)
        -> read_affine(%x) {shape=(7, 64), starts=(0,), steps=((32, 1),)}
    scatter_nd(%x: [4, 9], @i: [4, 3, 2], %u)      with i[a, b] = (a, 2*b + 1)
        -> assign_slice(%x, %u) {starts=(0, 1), steps=(1, 2)}
Exporters write windows, slices with several axes and assignments to slices as tables of positions.
Without the table a load is contiguous, and what makes or takes the elements may fuse with it.
"""

from __future__ import annotations

import numpy as np

from ..ir.expr import const_int
from ..ir.graph import Apply, Constant, Value, apply, type_of
from ..ops import affine, shape

Array = np.ndarray


def gathered(v: Apply) -> Value | None:
    """gather along an axis: the positions are one affine function."""
    x, where = v.args
    assert x is not None
    return _read(v, x, v.attrs.axis % type_of(x).rank, where, None)


def gathered_points(v: Apply) -> Value | None:
    """gather_nd: one affine function per number of a position."""
    x, where = v.args
    assert x is not None and where is not None
    depth = const_int(type_of(where).shape[-1])
    return None if v.attrs.batch_dims or not depth else _read(v, x, 0, where, depth)


def _read(v: Apply, x: Value, axis: int, where: Value | None, depth: int | None) -> Value | None:
    table = _positions(x, axis, where, depth)
    if table is None:
        return None
    found = [_affine(p) for p in table]
    known = [f for f in found if f is not None]
    if len(known) < len(found):
        return None
    starts, steps = (tuple(part) for part in zip(*known, strict=True))
    attrs = affine.AffineAttrs(axis, table.shape[1:], starts, steps)
    return apply(affine.read_affine, x, attrs=attrs, locs=v.locs, name=v.name)


def assigned(v: Apply) -> Value | None:
    """scatter_nd to a box: each axis of the positions moves along one axis of what is written."""
    x, where, updates = v.args
    assert x is not None and where is not None and updates is not None
    depth = const_int(type_of(where).shape[-1])
    if v.attrs.reduction != "none" or not depth:
        return None
    table = _positions(x, 0, where, depth)
    if table is None:
        return None
    lead, depth = table.ndim - 1, len(table)
    rest, kept = type_of(updates).shape[lead:], type_of(x).shape[depth:]
    starts, steps, sizes, order = [], [], [], []
    for p in table:
        found = _affine(p)
        moving = [] if found is None else [k for k, step in enumerate(found[1]) if step]
        if found is None or len(moving) > 1 or any(found[1][k] < 0 for k in moving):
            return None
        starts.append(found[0])
        steps.append(found[1][moving[0]] if moving else 1)
        sizes.append(table.shape[1 + moving[0]] if moving else 1)
        order += moving
    # An axis that moves along nothing, or along two, writes an element twice or a diagonal.
    if sorted(order) != [k for k in range(lead) if table.shape[1 + k] > 1] or rest != kept:
        return None
    box: Value = updates
    if order != sorted(order):
        ones = [k for k in range(lead) if k not in order]
        turned = shape.TransposeAttrs((*ones, *order, *range(lead, lead + len(rest))))
        box = apply(shape.transpose, box, attrs=turned, locs=v.locs)
    whole = shape.ReshapeAttrs((*sizes, *rest), allow_zero=True)
    box = apply(shape.reshape, box, attrs=whole, locs=v.locs)
    attrs = affine.AssignAttrs((*starts, *(0 for _ in rest)), (*steps, *(1 for _ in rest)))
    return apply(affine.assign_slice, x, box, attrs=attrs, locs=v.locs, name=v.name)


def _positions(x: Value, axis: int, where: Value | None, depth: int | None) -> Array | None:
    """[axes of x, *shape]: where constant positions point, counted from the start. None where they
    are not known, lie outside or are a single one (a number in the kernel already)."""
    if not isinstance(where, Constant) or where.data.size <= (depth or 1):
        return None
    sizes = [const_int(s) for s in type_of(x).shape[axis : axis + (depth or 1)]]
    rooms = [s for s in sizes if s is not None]
    if len(rooms) < len(sizes):
        return None
    data = where.data.astype(np.int64)
    table = data[None] if depth is None else np.moveaxis(data, -1, 0)
    room = np.array(rooms).reshape(-1, *(1,) * (table.ndim - 1))
    table = np.where(table < 0, table + room, table)
    return table if bool(np.all((table >= 0) & (table < room))) else None


def _affine(p: Array) -> tuple[int, tuple[int, ...]] | None:
    """(start, step per axis) of an array that is an affine function of the index."""
    first = int(p.flat[0])
    steps = tuple(
        int(p[tuple(int(j == k) for j in range(p.ndim))]) - first if n > 1 else 0
        for k, n in enumerate(p.shape)
    )
    made = np.full((1,) * p.ndim, first)
    for k, step in enumerate(steps):
        line = np.arange(p.shape[k]).reshape([-1 if j == k else 1 for j in range(p.ndim)])
        made = made + step * line
    return (first, steps) if np.array_equal(made, p) else None
