"""Scales and offsets per channel move into the constant weights of what comes before.

    %0 = conv(%x, @w)                               %0 = conv(%x, @w*scale, @offset)
    %1 = batch_norm(%0, @s, @b, @mean, @var)   ->   return %0
Also for mul, div, add and sub with a constant that has one value per output channel, after conv,
conv_transpose and (scales only) matmul. The folded weights are computed in float64.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from ..ir.graph import (
    Apply,
    Constant,
    Function,
    Value,
    apply,
    operands,
    rebuild,
    topological,
    type_of,
)
from ..ops import conv, elementwise, linalg, norm

Array = np.ndarray


def fold_batch_norm(fn: Function, ctx: Any) -> Function:
    """Folds where the contraction's result has no other reader."""
    uses = Counter(id(o) for v in topological(fn.results) for o in operands(v))
    uses.update(id(r) for r in fn.results)

    def change(v: Value, args: tuple[Value | None, ...]) -> Value | None:
        if not isinstance(v, Apply) or v.op not in _AFFINE:
            return None
        for k in range(2 if v.op in (elementwise.add, elementwise.mul) else 1):
            old, x = v.args[k], args[k]
            if old is None or uses[id(old)] != 1 or not isinstance(x, Apply) or x.op not in _AXES:
                continue
            affine = _affine(v, args, k, x)
            if affine is not None:
                return _folded(v, x, *affine)
        return None

    return rebuild(fn, change)


_AXES = (conv.conv, conv.conv_transpose, linalg.matmul)
_AFFINE = (norm.batch_norm, elementwise.mul, elementwise.div, elementwise.add, elementwise.sub)


def _affine(
    v: Apply, args: tuple[Value | None, ...], k: int, x: Apply
) -> tuple[Array | None, Array | None] | None:
    """(factor, offset) per channel, float64, such that v = x * factor + offset; None: not so."""
    rest = [a for j, a in enumerate(args) if j != k]
    constants = [a.data.astype(np.float64) for a in rest if isinstance(a, Constant)]
    if len(constants) != len(rest) or not type_of(x).dtype.is_float or v.type != x.type:
        return None
    if v.op is norm.batch_norm:
        if x.op is linalg.matmul and type_of(x).rank != 2:
            return None  # the channels of a batch norm are not the columns of the product
        scale, bias, mean, var = constants
        factor = scale / np.sqrt(var + v.attrs.epsilon)
        return factor, bias - mean * factor
    channel = _per_channel(constants[0], x)
    if channel is None:
        return None
    if v.op is elementwise.mul:
        return channel, None
    if v.op is elementwise.div:
        return (1 / channel, None) if np.all(channel != 0) else None
    return None, (channel if v.op is elementwise.add else -channel)


def _per_channel(c: Array, x: Apply) -> Array | None:
    """A constant that broadcasts over all but the channel axis, as a vector over the channels."""
    t = type_of(x)
    axis = t.rank - 1 if x.op is linalg.matmul else 1
    if c.ndim > t.rank:
        return None
    full = c.reshape((1,) * (t.rank - c.ndim) + c.shape)
    if any(s != 1 for k, s in enumerate(full.shape) if k != axis):
        return None
    channels = getattr(t.shape[axis], "value", None)
    return None if channels is None else np.broadcast_to(full.reshape(-1), (channels,))


def _folded(v: Apply, x: Apply, factor: Array | None, offset: Array | None) -> Value | None:
    """x * factor + offset with the constants inside x."""
    weight = x.args[1]
    if not isinstance(weight, Constant) or isinstance(x.op, Function):
        return None
    locs = (*x.locs, *(loc for loc in v.locs if loc not in x.locs))
    scaled = weight if factor is None else _scaled(x, weight, factor)
    if scaled is None:
        return None
    dtype = weight.data.dtype
    if x.op is linalg.matmul:
        if factor is None:
            return None  # an addition is fused onto the product anyway
        made = apply(x.op, x.args[0], scaled, attrs=x.attrs, locs=locs, name=v.name)
        if offset is None:
            return made
        added = Constant(offset.astype(dtype), f"{weight.name}.offset", locs=weight.locs)
        return apply(elementwise.add, made, added, locs=v.locs, name=v.name)
    bias = x.args[2] if len(x.args) > 2 else None
    if bias is not None and not isinstance(bias, Constant):
        return None
    if bias is None and offset is None:
        return apply(x.op, x.args[0], scaled, None, attrs=x.attrs, locs=locs, name=v.name)
    total = np.zeros(1) if bias is None else bias.data.astype(np.float64)
    total = total if factor is None else total * factor
    total = total if offset is None else total + offset
    name = f"{weight.name}.bias" if bias is None else bias.name
    moved = Constant(total.astype(dtype), name, locs=weight.locs)
    return apply(x.op, x.args[0], scaled, moved, attrs=x.attrs, locs=locs, name=v.name)


def _scaled(x: Apply, weight: Constant, factor: Array) -> Constant | None:
    """The weight with each output channel multiplied by its factor."""
    data = weight.data
    if x.op is conv.conv:
        axis = 0
    elif x.op is conv.conv_transpose:
        if x.attrs.groups != 1:
            return None
        axis = 1
    else:
        if data.ndim != 2:
            return None
        axis = 0 if x.attrs.transpose_b else 1
    shape = [1] * data.ndim
    shape[axis] = data.shape[axis]
    made = (data.astype(np.float64) * factor.reshape(shape)).astype(data.dtype)
    return Constant(made, weight.name, weight.layout, weight.locs)
