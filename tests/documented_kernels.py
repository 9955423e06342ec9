"""The kernels of docs/schedules.md that run: each gives the PrimFunc before scheduling."""

from __future__ import annotations

from collections.abc import Callable

from minicompiler import te
from minicompiler.ir.expr import Dim, Expr, const, maximum, select
from minicompiler.ir.layout import IndexMap
from minicompiler.ir.tir import PrimFunc
from minicompiler.ir.types import float32
from minicompiler.lower.to_tir import from_tensors
from minicompiler.ops.conv import conv
from minicompiler.ops.norm import layer_norm
from minicompiler.ops.recurrent import lstm


def gemm() -> PrimFunc:
    """relu(A @ B + bias) with any number of rows; B and bias are weights."""
    m = Dim("M", 1, 4096)
    a = te.placeholder("A", (m, 768), float32)
    b = te.placeholder("B", (768, 1024), float32)
    bias = te.placeholder("bias", (1024,), float32)
    (k,) = te.reduce_vars(1)
    c = te.compute((m, 1024), lambda i, j: a[i, k] * b[k, j], "C", ("sum", {k: 768}))
    d = te.map_elements(lambda x, y: maximum(x + y, 0.0), c, bias, name="D")
    return from_tensors("gemm", [a, b, bias], [d], [b, bias])


def _conv(name: str, channels: int, groups: int, size: int) -> PrimFunc:
    x = te.placeholder("x", (1, channels, size, size), float32)
    w = te.placeholder("w", (channels, channels // groups, 3, 3), float32)
    b = te.placeholder("b", (channels,), float32)
    attrs = conv.attrs(pads_begin=(1, 1), pads_end=(1, 1), groups=groups)
    y = te.map_elements(
        lambda v: maximum(v, 0.0), conv.computes[0].build(x, w, b, attrs), name="relu"
    )
    blocked = IndexMap.blocked(4, 1, 16)
    return from_tensors(name, [x, w, b], [y], [w, b], {x: blocked, y: blocked})


def conv3x3() -> PrimFunc:
    """3x3 convolution, bias, ReLU; activations in NCHW16c."""
    return _conv("conv3x3", 64, 1, 14)


def depthwise() -> PrimFunc:
    """Depthwise 3x3 convolution, bias, ReLU; activations in NCHW16c."""
    return _conv("depthwise", 32, 32, 14)


def layer_norm_rows() -> PrimFunc:
    """Layer normalisation over the last axis, scale and offset are weights."""
    s = Dim("S", 1, 512)
    x = te.placeholder("x", (s, 768), float32)
    scale, offset = (te.placeholder(n, (768,), float32) for n in ("scale", "offset"))
    y = layer_norm.computes[0].build(x, scale, offset, layer_norm.attrs(axis=-1))
    return from_tensors("layer_norm", [x, scale, offset], [y], [scale, offset])


def winograd() -> PrimFunc:
    """3x3 convolution by F(4x4, 3x3), bias, ReLU; activations in NCHW16c."""
    x = te.placeholder("x", (1, 256, 14, 14), float32)
    w = te.placeholder("w", (256, 256, 3, 3), float32)
    b = te.placeholder("b", (256,), float32)
    compute = next(c for c in conv.computes if c.name == "winograd4")
    attrs = conv.attrs(pads_begin=(1, 1), pads_end=(1, 1))
    y = te.map_elements(lambda v: maximum(v, 0.0), compute.build(x, w, b, attrs), name="relu")
    blocked = IndexMap.blocked(4, 1, 16)
    return from_tensors("winograd", [x, w, b], [y], [w, b], {x: blocked, y: blocked})


def lstm_loop() -> PrimFunc:
    """The time loop of an LSTM layer over given pre-activations; R are weights."""
    steps, hidden = 50, 256
    x = te.placeholder("x", (steps, 1, 4 * hidden), float32)
    r = te.placeholder("r", (4, hidden, hidden), float32)
    attrs = lstm.attrs(("sigmoid", "tanh", "tanh"), (0.0,) * 3, (0.0,) * 3)
    made = lstm.computes[0].build(x, r, *[None] * 4, attrs)
    return from_tensors("lstm", [x, r], made, [r])


def attention(
    queries: int | Expr,
    keys: int | Expr,
    heads: int,
    size: int,
    batch: int | Expr = 1,
    offset: int | Expr | None = None,
    low: float = float("-inf"),
) -> PrimFunc:
    """softmax(q k^T / 8 + mask) v per head, rows divided by their sums last. Heads lie side by
    side in q, k, v and the result. offset: scores are `low` where column > row + offset."""
    q = te.placeholder("q", (batch, queries, heads * size), float32)
    k, v = (te.placeholder(n, (batch, keys, heads * size), float32) for n in "kv")
    mask = te.placeholder("mask", (queries, keys), float32)
    (d,) = te.reduce_vars(1)
    (j,) = te.reduce_vars(1)

    def score(b: Expr, h: Expr, i: Expr, c: Expr) -> Expr:
        return q[b, i, h * size + d] * k[b, c, h * size + d]

    x = te.compute((batch, heads, queries, keys), score, "scores", ("sum", {d: size})) * 0.125

    def limited(x: te.Tensor) -> te.Tensor:
        if offset is None:
            return x
        return te.compute(
            x.shape,
            lambda b, h, i, c: select(c <= i + offset, x[b, h, i, c], const(low, float32)),
        )

    e = te.exp(limited(x + mask) - te.max(limited(x + mask), -1))
    total = te.sum(e, -1)

    def value(b: Expr, h: Expr, i: Expr, c: Expr) -> Expr:
        return e[b, h, i, j] * v[b, j, h * size + c]

    o = te.compute((batch, heads, queries, size), value, "values", ("sum", {j: keys})) / total

    def joined(b: Expr, i: Expr, c: Expr) -> Expr:
        return o[b, c // size, i, c % size]

    r = te.compute((batch, queries, heads * size), joined, "heads")
    return from_tensors("attention", [q, k, v, mask], [r])


def attention_heads() -> PrimFunc:
    """12 heads of 64, so many positions that a row of scores does not stay in cache."""
    return attention(16384, 16384, 12, 64)


KERNELS: dict[str, Callable[[], PrimFunc]] = {
    "gemm": gemm,
    "conv3x3": conv3x3,
    "depthwise": depthwise,
    "winograd": winograd,
    "layer_norm": layer_norm_rows,
    "lstm": lstm_loop,
    "attention": attention_heads,
}
