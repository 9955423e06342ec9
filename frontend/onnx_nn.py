"""Converters of ONNX operators of neural networks: convolution, pooling, products, norms.

Conv(x, w, b){auto_pad=SAME_UPPER} -> conv(x, w, b) with explicit padding
Gemm{transB=1} -> add(matmul(a, b){transpose_b=True}, c)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minicompiler.ir.expr import Const, Expr, ceildiv, const_int, maximum, product, wrap
from minicompiler.ir.graph import Constant, Value, type_of
from minicompiler.ir.op import Op
from minicompiler.ir.types import int64
from minicompiler.ops import conv as cv
from minicompiler.ops import elementwise as el
from minicompiler.ops import linalg, norm
from minicompiler.ops import padding as pd
from minicompiler.ops import pool as pl
from minicompiler.ops import reduce as red
from minicompiler.ops import shape as sh
from minicompiler.ops.rules import Size, lowest, simplified

from .onnx_math import Converter
from .onnx_node import OnnxNode

# ---- windows ------------------------------------------------------------------------------------
_SAME = ("SAME_UPPER", "SAME_LOWER")


def padding(n: OnnxNode, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The padding before and after each spatial axis that a node states: none with `auto_pad`."""
    if n.type(0).rank != rank + 2:
        n.fail(f"{n.op_type} has a kernel of {rank} axes and an input of {n.type(0).rank}")
    if n.attr("auto_pad", "NOTSET") not in ("NOTSET", ""):
        return (0,) * rank, (0,) * rank
    pads = tuple(n.attr("pads", (0,) * (2 * rank)))
    if len(pads) != 2 * rank:
        n.fail(f"{n.op_type} with {rank} spatial axes has {len(pads)} pads")
    return pads[:rank], pads[rank:]


def bordered(
    n: OnnxNode,
    x: Value,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    value: float = 0,
) -> tuple[Value, tuple[int, ...], tuple[int, ...]]:
    """`x` and its padding before and after each spatial axis, from `pads` or `auto_pad`.

    Where `auto_pad` depends on a symbolic size, the border of `value`s is already in the `x` that
    is returned.
    """
    begin, end = map(list, padding(n, len(kernel)))
    mode, sizes = n.attr("auto_pad", "NOTSET"), type_of(x).shape
    if mode not in _SAME:
        return x, tuple(begin), tuple(end)
    before: list[Size] = [0] * len(sizes)
    after: list[Size] = [0] * len(sizes)
    for k, stride in enumerate(strides):
        # With stride 1 the padding does not depend on the size.
        size = wrap(1) if stride == 1 else sizes[2 + k]
        span = (kernel[k] - 1) * dilations[k] + 1
        covered = ceildiv(size, stride) * stride + (span - stride)
        # Windows that are no shorter than their distance reach the end.
        total = simplified((covered if span >= stride else maximum(covered, size)) - size)
        first = simplified((total if mode == "SAME_UPPER" else total + 1) // 2)
        last = simplified(total - first)
        if type(first) is Const and type(last) is Const:
            begin[k], end[k] = int(first.value), int(last.value)
        else:
            before[2 + k], after[2 + k] = first, last
    if any(isinstance(s, Expr) for s in before):
        attrs = pd.PadAttrs(tuple(before), tuple(after), "constant", value)
        x = n.apply(pd.pad, x, attrs=attrs, name="")
    return x, tuple(begin), tuple(end)


def _ones(n: OnnxNode, name: str, rank: int) -> tuple[int, ...]:
    return n.per_axis(name, rank, 1)


def _kernel(n: OnnxNode, w: Value) -> tuple[int, ...]:
    sizes = [const_int(s) for s in type_of(w).shape[2:]]
    if None in sizes:
        n.fail(
            f"the weight of {n.op_type} has the shape {type_of(w)}: the kernel has to be constant"
        )
    kernel = tuple(s for s in sizes if s is not None)
    said = n.attr("kernel_shape", None)
    if said is not None and tuple(said) != kernel:
        n.fail(f"kernel_shape is {list(said)}, but the weight is {type_of(w)}")
    return kernel


def _conv(n: OnnxNode) -> Value:
    return convolution(n, n.arg(0), n.arg(1), n.opt(2))


def convolution(n: OnnxNode, x: Value, w: Value, bias: Value | None) -> Value:
    """A convolution with the attributes of a node."""
    kernel = _kernel(n, w)
    strides, dilations = _ones(n, "strides", len(kernel)), _ones(n, "dilations", len(kernel))
    x, begin, end = bordered(n, x, kernel, strides, dilations)
    attrs = cv.ConvAttrs(strides, begin, end, dilations, n.attr("group", 1))
    return n.apply(cv.conv, x, w, bias, attrs=attrs)


def _conv_transpose(n: OnnxNode) -> Value:
    kernel = _kernel(n, n.arg(1))
    rank = len(kernel)
    strides, dilations = _ones(n, "strides", rank), _ones(n, "dilations", rank)
    extra = n.per_axis("output_padding", rank, 0)
    mode, wanted = n.attr("auto_pad", "NOTSET"), n.attr("output_shape", None)
    if wanted is None and mode in ("NOTSET", "", "VALID"):
        begin, end = padding(n, rank)
    else:
        begin, end, extra = _transposed_padding(n, kernel, strides, dilations, extra, wanted)
    attrs = cv.ConvTransposeAttrs(strides, begin, end, dilations, extra, n.attr("group", 1))
    return n.apply(cv.conv_transpose, n.arg(0), n.arg(1), n.opt(2), attrs=attrs)


def _transposed_padding(
    n: OnnxNode,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    extra: Sequence[int],
    wanted: Sequence[int] | None,
) -> tuple[tuple[int, ...], ...]:
    """Padding, and output_padding, that give the stated shape (auto_pad: size times stride)."""
    begin, end, after = [], [], []
    if wanted is not None and len(wanted) - len(kernel) not in (0, 2):
        n.fail(f"'output_shape' of ConvTranspose has {len(wanted)} numbers")
    for k, size in enumerate(n.shape(0, 2 + len(kernel))[2:]):
        number = const_int(size)
        span = (kernel[k] - 1) * dilations[k] + 1
        spare = extra[k] + span - strides[k]
        if wanted is not None:
            if number is None:
                n.fail(f"ConvTranspose needs the size of spatial axis {k}, which is {size}")
            spare += number * strides[k] - wanted[len(wanted) - len(kernel) + k]
        after.append(extra[k] + max(-spare, 0))
        total = max(spare, 0)
        small = total // 2
        upper = n.attr("auto_pad", "NOTSET") == "SAME_UPPER"
        begin.append(small if upper else total - small)
        end.append(total - begin[-1])
    return tuple(begin), tuple(end), tuple(after)


def _pool(op: Op) -> Converter:
    def convert(n: OnnxNode) -> Value:
        kernel = tuple(n.attr("kernel_shape"))
        strides, dilations = _ones(n, "strides", len(kernel)), _ones(n, "dilations", len(kernel))
        low = lowest(n.type(0).dtype).value if op is pl.max_pool else 0
        x, begin, end = bordered(n, n.arg(0), kernel, strides, dilations, low)
        given = (
            kernel,
            strides,
            begin,
            end,
            dilations,
            bool(n.attr("ceil_mode", 0)),
            bool(n.attr("count_include_pad", 0)),
            n.attr("p", 2),
        )
        indexed = op is pl.max_pool and n.wants(1)
        attrs = pl.PoolAttrs(*given)
        sizes = attrs.windows(n.op_type).output(type_of(x).shape[2:])
        if any(type(s) is Const and s.value < 1 for s in sizes):
            return _no_windows(n, sizes, indexed)
        if indexed:
            if x is not n.arg(0):
                n.fail("the positions that MaxPool finds need sizes that are known with auto_pad")
            columns = bool(n.attr("storage_order", 0))
            return n.apply(pl.max_pool_indices, x, attrs=pl.IndexedPoolAttrs(*given, columns))
        if op is not pl.avg_pool or x is n.arg(0) or n.attr("count_include_pad", 0):
            return n.apply(op, x, attrs=attrs)
        # The mean over the border as well, by the share of the window that is not border.
        ones = sh.FullAttrs((1, 1, *n.type(0).shape[2:]), 1, n.type(0).dtype)
        line = n.apply(sh.full, attrs=ones, name="")
        share, _, _ = bordered(n, line, kernel, strides, dilations)
        mean = n.apply(op, x, attrs=attrs, name="")
        return n.apply(el.div, mean, n.apply(op, share, attrs=attrs, name=""))

    return convert


def _no_windows(n: OnnxNode, sizes: Sequence[Expr], indexed: bool) -> Any:
    """The empty results of windows that do not fit."""
    shape = *n.type(0).shape[:2], *(maximum(s, 0) for s in sizes)
    empty = n.apply(sh.full, attrs=sh.FullAttrs(shape, 0, n.type(0).dtype))
    if not indexed:
        return empty
    return empty, n.apply(sh.full, attrs=sh.FullAttrs(shape, 0, int64), name=n.outputs[1])


# ---- matrix products ----------------------------------------------------------------------------
def _gemm(n: OnnxNode) -> Value:
    attrs = linalg.MatmulAttrs(bool(n.attr("transA", 0)), bool(n.attr("transB", 0)))
    alpha, beta = n.attr("alpha", 1.0), n.attr("beta", 1.0)
    c = n.opt(2) if beta != 0 else None
    result = n.apply(linalg.matmul, n.arg(0), n.arg(1), attrs=attrs, name="" if c else None)
    dtype = type_of(result).dtype.numpy
    if alpha != 1.0:
        result = n.apply(el.mul, result, n.constant(alpha, dtype))
    if c is None:
        return result
    if beta != 1.0:
        c = n.apply(el.mul, c, n.constant(beta, dtype), name="")
    return n.apply(el.add, result, c)


# ---- norms --------------------------------------------------------------------------------------
def _instance_norm(n: OnnxNode) -> Value:
    attrs = norm.GroupNormAttrs(0, n.attr("epsilon", 1e-5))
    return n.apply(norm.group_norm, n.arg(0), n.arg(1), n.arg(2), attrs=attrs)


def _group_norm(n: OnnxNode) -> Value:
    groups = n.attr("num_groups")
    scale, bias = n.arg(1), n.arg(2)
    if n.type(0).rank < 3 or groups < 1:
        n.fail(f"GroupNormalization of {n.type(0)} in {groups} groups")
    channels = const_int(n.type(0).shape[1])
    if n.opset < 21 and channels is not None and channels != groups:
        # Until opset 20 the parameters were per group.
        scale, bias = (_repeated(n, v, channels // groups) for v in (scale, bias))
    attrs = norm.GroupNormAttrs(groups, n.attr("epsilon", 1e-5))
    return n.apply(norm.group_norm, n.arg(0), scale, bias, attrs=attrs)


def _repeated(n: OnnxNode, v: Value, times: int) -> Value:
    if not isinstance(v, Constant):
        n.fail("the parameters of GroupNormalization per group have to be constants")
    return n.constant(np.repeat(v.data, times), name=v.name)


def _row_norm(op: Op) -> Converter:
    def convert(n: OnnxNode) -> Value:
        attrs = norm.RowNormAttrs(n.attr("axis", -1), n.attr("epsilon", 1e-5))
        return n.apply(op, n.arg(0), n.opt(1), n.opt(2), attrs=attrs)

    return convert


def _lrn(n: OnnxNode) -> Value:
    attrs = norm.LrnAttrs(
        n.attr("size"), n.attr("alpha", 1e-4), n.attr("beta", 0.75), n.attr("bias", 1.0)
    )
    return n.apply(norm.lrn, n.arg(0), attrs=attrs)


def _softmax(op: Op) -> Converter:
    """Before opset 13 the axes from `axis` on are one."""

    def convert(n: OnnxNode) -> Value:
        x, t = n.arg(0), n.type(0)
        axis = n.attr("axis", -1 if n.opset >= 13 else 1)
        if n.opset >= 13 or axis in (-1, t.rank - 1):
            return n.apply(op, x, attrs=red.AxisAttrs(axis))
        at = n.axis(axis, t.rank)
        rows: tuple[Expr, ...] = (product(t.shape[:at]), product(t.shape[at:]))
        flat = n.apply(sh.reshape, x, attrs=sh.ReshapeAttrs(rows), name="")
        done = n.apply(op, flat, attrs=red.AxisAttrs(-1), name="")
        return n.apply(sh.reshape, done, attrs=sh.ReshapeAttrs(t.shape))

    return convert


def _or_body(convert: Converter) -> Converter:
    """For a second result the node is expanded through its definition."""
    return lambda n: n.expand() if any(n.outputs[1:]) else convert(n)


NN: dict[str, Converter] = {
    "AveragePool": _pool(pl.avg_pool),
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LRN": _lrn,
    "LayerNormalization": _or_body(_row_norm(norm.layer_norm)),
    "LogSoftmax": _softmax(red.log_softmax),
    "LpPool": _pool(pl.lp_pool),
    "MatMul": lambda n: n.apply(linalg.matmul, n.arg(0), n.arg(1)),
    "MaxPool": _pool(pl.max_pool),
    "RMSNormalization": _row_norm(norm.rms_norm),
    "Softmax": _softmax(red.softmax),
}
