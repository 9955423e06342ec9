"""Converters of the ONNX operators that move elements, and of those that compute with shapes.

Reshape(x, [0, -1]) -> reshape(x){shape=(0, -1)}       shape arguments end up in attributes
Constant -> a Constant of the graph, no node
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from minicompiler.ir.arith import Arith
from minicompiler.ir.expr import ZERO, Const, Expr, product, wrap
from minicompiler.ir.graph import Constant, Value, type_of
from minicompiler.ir.op import Op
from minicompiler.ops import elementwise as el
from minicompiler.ops import index as ix
from minicompiler.ops import padding
from minicompiler.ops import pieces as pc
from minicompiler.ops import reduce as red
from minicompiler.ops import resize as rs
from minicompiler.ops import shape as sh
from minicompiler.ops.rules import Size

from .onnx_data import element_type
from .onnx_math import Converter, rounding_integers
from .onnx_node import OnnxNode, sizes_of

# ---- constants ----------------------------------------------------------------------------------
_CONSTANT_KINDS = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


def _constant(n: OnnxNode) -> Constant:
    if "value" in n.attributes:
        return Constant(n.attr("value"), n.outputs[0], locs=(n.loc,))
    for name, dtype in _CONSTANT_KINDS.items():
        if name in n.attributes:
            return n.constant(n.attr(name), dtype, n.outputs[0])
    n.fail(f"Constant with {', '.join(n.attributes) or 'no value'} is not supported")


def _constant_of_shape(n: OnnxNode) -> Value:
    value = np.asarray(n.attr("value", np.zeros(1, np.float32))).reshape(-1)
    dtype = type_of(n.constant(value)).dtype
    return n.apply(sh.full, n.arg(0), attrs=sh.FullAttrs((), value[0].item(), dtype))


def positions(n: OnnxNode, size: Size) -> Value:
    """0, 1, ... size - 1 as int64, for any size."""
    line = n.apply(sh.shape_, attrs=sh.ShapeAttrs(values=(wrap(size),)), name="")
    end = n.apply(sh.squeeze, line, attrs=sh.SqueezeAttrs((0,)), name="")
    ends = n.constant(0, np.int64), end, n.constant(1, np.int64)
    return n.apply(sh.arange, *ends, name="")


def _range(n: OnnxNode) -> Value:
    if not n.type(0).dtype.is_float:
        return n.apply(sh.arange, *(n.arg(k) for k in range(3)))
    start, limit, step = ends = [n.scalar(k) for k in range(3)]
    if None in ends or not np.isfinite(ends).all() or step == 0:
        n.fail(f"Range from {start} to {limit} in steps of {step}")
    count = (limit - start) / step
    n.table(math.ceil(max(min(count, 2**62), 0)))
    values = np.arange(start, limit, step) if count > 0 else ()
    return n.constant(values, n.type(0).dtype.numpy, n.outputs[0])


def _eye_like(n: OnnxNode) -> Value:
    dtype = n.type(0).dtype
    if n.attr("dtype", None) is not None:
        dtype = element_type(n.attr("dtype"), "the result of EyeLike", n.loc.file)
    rows, columns = (positions(n, s) for s in n.shape(0, 2))
    diagonal = n.apply(el.add, rows, n.constant(n.attr("k", 0), np.int64), name="")
    diagonal = n.apply(sh.unsqueeze, diagonal, attrs=sh.UnsqueezeAttrs((1,)), name="")
    ones = n.apply(el.equal, diagonal, columns, name="")
    return n.apply(el.cast_, ones, attrs=el.CastAttrs(dtype))


# ---- shapes -------------------------------------------------------------------------------------
def _shape(n: OnnxNode) -> Value:
    return n.apply(
        sh.shape_, n.arg(0), attrs=sh.ShapeAttrs(n.attr("start", 0), n.attr("end", None))
    )


def _size(n: OnnxNode) -> Value:
    sizes = n.apply(sh.shape_, n.arg(0), name="")
    return n.apply(red.reduce_prod, sizes, attrs=red.ReduceAttrs(None, False))


def _reshape(n: OnnxNode) -> Value:
    attrs = sh.ReshapeAttrs(allow_zero=bool(n.attr("allowzero", 0)))
    return n.apply(sh.reshape, n.arg(0), n.arg(1), attrs=attrs)


def _flatten(n: OnnxNode) -> Value:
    t = n.type(0)
    axis = n.attr("axis", 1)
    at = axis + t.rank if axis < 0 else axis
    target = (product(t.shape[:at]), product(t.shape[at:]))
    return n.apply(sh.reshape, n.arg(0), attrs=sh.ReshapeAttrs(target, True))


def _transpose(n: OnnxNode) -> Value:
    return n.apply(sh.transpose, n.arg(0), attrs=sh.TransposeAttrs(tuple(n.attr("perm", ()))))


def _squeeze(n: OnnxNode) -> Value:
    return n.apply(sh.squeeze, n.arg(0), attrs=sh.SqueezeAttrs(n.ints(1, "axes")))


def _unsqueeze(n: OnnxNode) -> Value:
    axes = n.ints(1, "axes")
    if axes is None:
        n.fail("Unsqueeze needs axes")
    return n.apply(sh.unsqueeze, n.arg(0), attrs=sh.UnsqueezeAttrs(axes))


def _concat(n: OnnxNode) -> Value:
    args = [n.arg(k) for k in range(len(n.inputs))]
    return n.apply(pc.concat, *args, attrs=pc.ConcatAttrs(n.attr("axis", 1)))


def _split(n: OnnxNode) -> Any:
    axis, sizes = n.attr("axis", 0), n.ints(1, "split")
    parts = n.attr("num_outputs", len(n.outputs))
    if parts != len(n.outputs):
        n.fail(f"Split into {parts} parts, {len(n.outputs)} of which have names")
    attrs = pc.SplitAttrs(axis, sizes) if sizes else pc.SplitAttrs(axis, (), parts)
    return n.apply(pc.split, n.arg(0), attrs=attrs)


def _tile(n: OnnxNode) -> Value:
    return n.apply(pc.tile, n.arg(0), n.arg(1))


def _expand(n: OnnxNode) -> Value:
    return n.apply(sh.expand, n.arg(0), n.arg(1))


# ---- slices and padding -------------------------------------------------------------------------
def _slice(n: OnnxNode) -> Value:
    if n.opset < 10:
        axes = tuple(n.attr("axes", ()))
        attrs = pc.SliceAttrs(tuple(n.attr("starts")), tuple(n.attr("ends")), axes)
        return n.apply(pc.strided_slice, n.arg(0), attrs=attrs)
    return n.apply(pc.strided_slice, n.arg(0), *(n.opt(k) for k in range(1, 5)))


def _pad(n: OnnxNode) -> Value:
    mode = n.attr("mode", "constant")
    rank = n.type(0).rank
    if n.opset < 11:
        pads = tuple(n.attr("pads"))
        attrs = padding.PadAttrs(pads[:rank], pads[rank:], mode, n.attr("value", 0.0))
        return n.apply(padding.pad, n.arg(0), attrs=attrs)
    value = n.scalar(2) if mode == "constant" else None
    axes = n.known(3)
    attrs = padding.PadAttrs(mode=mode, value=0 if value is None else value)
    if axes is None:
        return n.apply(padding.pad, n.arg(0), n.arg(1), attrs=attrs)
    sizes = sizes_of(n.arg(1))
    if sizes is None:
        n.fail("the padding is computed from data", "only shapes and constants may determine it")
    if len(sizes) != 2 * axes.size:
        n.fail(f"Pad has {len(sizes)} pads for {axes.size} axes", "two for each axis are needed")
    begin: list[Any] = [0] * rank
    end: list[Any] = [0] * rank
    for k, axis in enumerate(n.axis(int(a), rank) for a in axes.reshape(-1)):
        begin[axis], end[axis] = sizes[k], sizes[k + axes.size]
    attrs = padding.PadAttrs(tuple(begin), tuple(end), mode, attrs.value)
    return n.apply(padding.pad, n.arg(0), attrs=attrs)


def _trilu(n: OnnxNode) -> Value:
    upper, k = bool(n.attr("upper", 1)), n.opt(1)
    if k is None or n.values.of(k) is not None:
        return n.apply(pc.trilu, n.arg(0), attrs=pc.TriluAttrs(upper, n.scalar(1) or 0))
    # A diagonal that data decides.
    rows, columns = (positions(n, s) for s in n.type(0).shape[-2:])
    rows = n.apply(sh.unsqueeze, rows, attrs=sh.UnsqueezeAttrs((1,)), name="")
    diagonal = n.apply(sh.reshape, k, attrs=sh.ReshapeAttrs((1,)), name="")
    first = n.apply(el.add, rows, diagonal, name="")
    kept = n.apply(el.less_equal, *((first, columns) if upper else (columns, first)), name="")
    return n.apply(el.where, kept, n.arg(0), n.constant(0, n.type(0).dtype.numpy))


def _blocks(op: Op) -> Converter:
    def convert(n: OnnxNode) -> Value:
        channels_first = n.attr("mode", "DCR") == "CRD"
        return n.apply(op, n.arg(0), attrs=pc.BlockAttrs(n.attr("blocksize"), channels_first))

    return convert


# ---- indices ------------------------------------------------------------------------------------
def _gather(op: Op) -> Converter:
    def convert(n: OnnxNode) -> Value:
        return n.apply(op, n.arg(0), n.arg(1), attrs=ix.GatherAttrs(n.attr("axis", 0)))

    return convert


def _gather_nd(n: OnnxNode) -> Value:
    attrs = ix.GatherNdAttrs(n.attr("batch_dims", 0))
    return n.apply(ix.gather_nd, n.arg(0), n.arg(1), attrs=attrs)


def _one_hot(n: OnnxNode) -> Value:
    depth = sizes_of(n.arg(1))
    size = depth[0] if depth is not None else int(n.scalar(1))
    attrs = ix.OneHotAttrs(size, n.attr("axis", -1))
    return n.apply(ix.one_hot, n.arg(0), n.arg(2), attrs=attrs)


# ---- resampling ---------------------------------------------------------------------------------
def resize(n: OnnxNode) -> Value:
    """Resize by index arithmetic; sizes may be symbolic."""
    if n.opset < 11:
        return _upsample(n)
    t = n.type(0)
    axes = [n.axis(a, t.rank) for a in n.attr("axes", range(t.rank))]
    sizes = (
        sizes_of(n.arg(3)) if n.opt(3) is not None and n.type(3).shape[0] is not Const(0) else None
    )
    coordinates = n.attr("coordinate_transformation_mode", "half_pixel")
    how: dict[str, Any] = {
        "mode": n.attr("mode", "nearest"),
        "coordinates": coordinates,
        "rounding": n.attr("nearest_mode", "round_prefer_floor"),
        "cubic": n.attr("cubic_coeff_a", -0.75),
    }
    if sizes is None and n.opt(2) is not None and n.values.of(n.arg(2)) is None:
        sizes = _scaled(n, 2, axes)
    if sizes is not None:
        full = list(t.shape)
        one_per_axis(n, "sizes", len(sizes), len(axes))
        for axis, size in zip(axes, sizes, strict=True):
            full[axis] = size
        return n.apply(rs.resize, n.arg(0), attrs=rs.ResizeAttrs(sizes=tuple(full), **how))
    scales = n.known(2)
    if scales is None:
        n.fail("Resize needs scales or sizes that are constants or computed from shapes")
    factors = [1.0] * t.rank
    one_per_axis(n, "scales", scales.size, len(axes))
    for axis, scale in zip(axes, scales.reshape(-1), strict=True):
        factors[axis] = float(scale)
    return n.apply(rs.resize, n.arg(0), attrs=rs.ResizeAttrs(scales=tuple(factors), **how))


def _scaled(n: OnnxNode, k: int, axes: Sequence[int]) -> list[Expr]:
    """The sizes that scales (input `k`) lead to which are quotients of sizes themselves."""
    scales = n.quotients.of(n.arg(k))
    if scales is None:
        n.fail(f"the scales of {n.op_type} are computed from data",
               "only shapes and constants may determine them")  # fmt: skip
    one_per_axis(n, "scales", scales.size, len(axes))
    arith, sizes = Arith(), []
    for axis, scale in zip(axes, scales.flat, strict=True):
        whole = n.type(0).shape[axis] * scale.top
        if arith.simplify(whole % scale.bottom) is not ZERO:
            n.fail(
                f"{n.op_type} would make ({whole})/({scale.bottom}) elements of axis {axis}, "
                "which may be no whole number",
                "give it sizes instead of scales, or the dimensions a value: dims={...}",
            )
        sizes.append(arith.simplify(whole // scale.bottom))
    return sizes


def one_per_axis(n: OnnxNode, what: str, got: int, wanted: int) -> None:
    """Refuses lists of another length than the number of axes resized."""
    if got != wanted:
        n.fail(f"{n.op_type} of {wanted} axes has {got} {what}")


def _upsample(n: OnnxNode) -> Value:
    """Upsample, and Resize of opset 10: positions are scaled without an offset."""
    given = n.attributes.get("scales")
    known = n.values.of(n.arg(1)) if given is None else np.asarray(given)
    how: dict[str, Any] = {
        "mode": n.attr("mode", "nearest"), "coordinates": "asymmetric", "rounding": "floor",
    }  # fmt: skip
    if known is None:
        how["sizes"] = tuple(_scaled(n, 1, range(n.type(0).rank)))
    else:
        how["scales"] = tuple(float(s) for s in known.reshape(-1))
    return n.apply(rs.resize, n.arg(0), attrs=rs.ResizeAttrs(**how))


SHAPE: dict[str, Converter] = {
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "DepthToSpace": _blocks(pc.depth_to_space),
    "EyeLike": _eye_like,
    "Flatten": _flatten,
    "Gather": _gather(ix.gather),
    "GatherElements": _gather(ix.gather_elements),
    "GatherND": _gather_nd,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "SpaceToDepth": _blocks(pc.space_to_depth),
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
    "Upsample": rounding_integers(_upsample),
}
