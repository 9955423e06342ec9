"""Converters of ONNX operators whose results have as many elements as the data decides.

NonZero(x) -> head(positions, n; axis=1) with positions, n = nonzero(x)
"""

from __future__ import annotations

import numpy as np

from minicompiler.ir.expr import Expr, const_int, minimum, product
from minicompiler.ir.graph import Apply, Value, type_of
from minicompiler.ops import count as ct
from minicompiler.ops import index as ix
from minicompiler.ops import pieces as pc
from minicompiler.ops import shape as sh
from minicompiler.ops.rules import known_nonneg

from .onnx_math import Converter
from .onnx_node import OnnxNode, items
from .onnx_shape import positions


def _head(n: OnnxNode, x: Value, count: Value, axis: int, name: str | None = None) -> Value:
    """The first `count` indices along an axis; their number is a dimension of its own."""
    axis = n.axis(axis, type_of(x).rank)
    most = type_of(x).shape[axis]
    dim = n.dim(f"{n.loc.name or n.outputs[0]}.count", const_int(most))
    return n.apply(ct.head, x, count, attrs=ct.HeadAttrs(dim, most, axis), name=name)


def _nonzero(n: OnnxNode) -> Value:
    """Where the numbers are always the same, so are the places. Exporters write the positions
    along an axis as those of a line of ones, whose length may be symbolic."""
    x = n.arg(0)
    t = type_of(x)
    if isinstance(x, Apply) and x.op is sh.full and t.rank == 1 and x.attrs.value:
        return n.apply(sh.unsqueeze, positions(n, t.shape[0]), attrs=sh.UnsqueezeAttrs((0,)))
    known = n.values.of(x)
    if known is not None:
        n.table(known.size * t.rank)
        places = np.array(np.nonzero(np.atleast_1d(known)))[: t.rank]
        return n.constant(places, np.int64, n.outputs[0])
    found, count = items(n.apply(ct.nonzero, x, name=""))
    return _head(n, found, count, 1)


def _compress(n: OnnxNode) -> Value:
    """The indices along an axis where the condition holds; what it says beyond its end is void."""
    x, axis = n.arg(0), n.attr("axis", None)
    if axis is None:
        x, axis = _flat(n, x), 0
    size = type_of(x).shape[n.axis(axis, type_of(x).rank)]
    (length,) = n.shape(1, 1)
    condition = n.arg(1)
    if not known_nonneg(size - length):
        most = pc.SliceAttrs((0,), (minimum(length, size),), (0,), (1,))
        condition = n.apply(pc.strided_slice, condition, attrs=most, name="")
    known = n.values.of(condition)
    if known is not None:
        always = n.constant(np.flatnonzero(known), np.int64)
        return n.apply(ix.gather, x, always, attrs=ix.GatherAttrs(axis))
    places, count = items(n.apply(ct.nonzero, condition, name=""))
    where = n.apply(sh.squeeze, places, attrs=sh.SqueezeAttrs((0,)), name="")
    chosen = _head(n, where, count, 0, "")
    return n.apply(ix.gather, x, chosen, attrs=ix.GatherAttrs(axis))


def _flat(n: OnnxNode, x: Value) -> Value:
    return n.apply(sh.reshape, x, attrs=sh.ReshapeAttrs((product(type_of(x).shape),)), name="")


def _unique(n: OnnxNode) -> tuple[Value, ...]:
    x, axis = n.arg(0), n.attr("axis", None)
    if axis is None:
        x, axis = _flat(n, x), 0
    shape = type_of(x).shape
    at = n.axis(axis, len(shape))
    front = (at, *(k for k in range(len(shape)) if k != at))
    rest: tuple[Expr, ...] = tuple(shape[k] for k in front[1:])
    rows = n.apply(sh.transpose, x, attrs=sh.TransposeAttrs(front), name="")
    rows = n.apply(sh.reshape, rows, attrs=sh.ReshapeAttrs((shape[at], product(rest))), name="")
    attrs = ct.UniqueAttrs(bool(n.attr("sorted", 1)))
    first, group, size, count = items(n.apply(ct.unique, rows, attrs=attrs, name=""))
    chosen = _head(n, first, count, 0, "")
    y = n.apply(ix.gather, x, chosen, attrs=ix.GatherAttrs(at))
    return y, chosen, group, _head(n, size, count, 0, "")


def _non_max_suppression(n: OnnxNode) -> Value:
    most, overlap, score = n.scalar(2), n.scalar(3), n.scalar(4)
    attrs = ct.SuppressionAttrs(
        int(most or 0), float(overlap or 0), score, bool(n.attr("center_point_box", 0))
    )
    made = n.apply(ct.non_max_suppression, n.arg(0), n.arg(1), attrs=attrs, name="")
    places, count = items(made)
    return _head(n, places, count, 0)


COUNT: dict[str, Converter] = {
    "Compress": _compress,
    "NonMaxSuppression": _non_max_suppression,
    "NonZero": _nonzero,
    "Unique": _unique,
}
