"""Converters of attention and embeddings in onnxruntime's own domain; see onnx_contrib.py.

    MultiHeadAttention(q, k, v) -> softmax(q k' * scale + masks) v, written out for each head

`recognise` finds the products and the softmax again, whoever wrote them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from minicompiler.ir.expr import ONE, Expr, const_int, wrap
from minicompiler.ir.graph import Value, type_of
from minicompiler.ir.types import int64
from minicompiler.ops import elementwise as el
from minicompiler.ops import index as ix
from minicompiler.ops import linalg, norm, padding
from minicompiler.ops import pieces as pc
from minicompiler.ops import reduce as red
from minicompiler.ops import scatter as sc
from minicompiler.ops import shape as sh
from minicompiler.ops.rules import Size

from .onnx_math import Converter, cast_to
from .onnx_node import OnnxNode
from .onnx_shape import positions


# ---- moving elements ----------------------------------------------------------------------------
def _reshaped(n: OnnxNode, x: Value, *shape: Size) -> Value:
    return n.apply(sh.reshape, x, attrs=sh.ReshapeAttrs(shape), name="")


def _heads(n: OnnxNode, x: Value, heads: int) -> Value:
    """[batch, positions, heads * size] as [batch, heads, positions, size]."""
    t = type_of(x)
    width = const_int(t.shape[-1])
    if t.rank != 3 or width is None or heads < 1 or width % heads:
        n.fail(f"{n.op_type} of {t} with {heads} heads")
    split = _reshaped(n, x, *t.shape[:2], heads, width // heads)
    return n.apply(sh.transpose, split, attrs=sh.TransposeAttrs((0, 2, 1, 3)), name="")


def _joined(n: OnnxNode, x: Value) -> Value:
    """The inverse of `_heads`."""
    batch, heads, length, size = type_of(x).shape
    back = n.apply(sh.transpose, x, attrs=sh.TransposeAttrs((0, 2, 1, 3)), name="")
    return n.apply(sh.reshape, back, attrs=sh.ReshapeAttrs((batch, length, heads * size)))


def _part(n: OnnxNode, x: Value, start: Size, end: Size, axis: int) -> Value:
    attrs = pc.SliceAttrs((start,), (end,), (axis,))
    return n.apply(pc.strided_slice, x, attrs=attrs, name="")


def _concat(n: OnnxNode, *xs: Value, axis: int, name: str = "") -> Value:
    return n.apply(pc.concat, *xs, attrs=pc.ConcatAttrs(axis), name=name)


def _thirds(n: OnnxNode, x: Value, axis: int) -> list[Value]:
    """Three equal parts along an axis."""
    width = const_int(type_of(x).shape[axis])
    if width is None or width % 3:
        n.fail(f"{n.op_type} takes query, key and value from {type_of(x)}")
    return [_part(n, x, k * width // 3, (k + 1) * width // 3, axis) for k in range(3)]


def _size(n: OnnxNode, size: Expr) -> Value:
    """A size as a number."""
    return n.apply(sh.shape_, attrs=sh.ShapeAttrs(values=(size,)), name="")


# ---- scores -------------------------------------------------------------------------------------
def _attend(
    n: OnnxNode, q: Value, k: Value, v: Value, bias: Sequence[Value], kept: Sequence[Value]
) -> Value:
    """Heads of softmax(q k' * scale + bias) v; where one of `kept` is false nothing counts."""
    dtype = type_of(q).dtype.numpy
    size = const_int(type_of(q).shape[-1]) or 1
    scale = n.attr("scale", 0.0) or 1 / math.sqrt(size)
    turned = linalg.MatmulAttrs(False, True)
    scores: Value = n.apply(linalg.matmul, q, k, attrs=turned, name="")
    scores = n.apply(el.mul, scores, n.constant(scale, dtype), name="")
    cap = n.attr("softcap", 0.0)
    if cap:
        share = n.apply(el.div, scores, n.constant(cap, dtype), name="")
        bounded = n.apply(el.tanh, share, name="")
        scores = n.apply(el.mul, bounded, n.constant(cap, dtype), name="")
    for b in bias:
        scores = n.apply(el.add, scores, b, name="")
    for condition in kept:
        scores = n.apply(el.where, condition, scores, n.constant(-np.inf, dtype), name="")
    weights = n.apply(red.softmax, scores, attrs=red.AxisAttrs(-1), name="")
    return n.apply(linalg.matmul, weights, v, name="")


def _causal(n: OnnxNode, queries: Expr, keys: Expr, past: Expr) -> Value:
    """[queries, keys]: a query sees the past, and what is not behind itself."""
    rows = n.apply(el.add, positions(n, queries), _size(n, past), name="")
    column = _reshaped(n, rows, queries, 1)
    return n.apply(el.less_equal, positions(n, keys), column, name="")


def _padding(n: OnnxNode, mask: Value, keys: Expr, dtype: Any) -> Value:
    """What is added to the scores for a mask: of each key, or where the keys of an image end."""
    t = type_of(mask)
    if t.rank == 1:
        end = _reshaped(n, cast_to(n, mask, int64), t.shape[0], 1, 1, 1)
        seen = n.apply(el.less, positions(n, keys), end, name="")
    elif t.rank in (2, 3):
        shape = (t.shape[0], 1, *((1,) if t.rank == 2 else ()), *t.shape[1:])
        mask = _reshaped(n, mask, *shape)
        seen = n.apply(el.greater, mask, n.constant(0, t.dtype.numpy), name="")
    else:
        n.fail(f"{n.op_type} with a mask {t} is not supported")
    low = n.constant(n.attr("mask_filter_value", -10000.0), dtype)
    return n.apply(el.where, seen, n.constant(0, dtype), low, name="")


def _masked(n: OnnxNode, q: Value, k: Value, v: Value, mask: int, added: int, past: Expr) -> Value:
    """Attention with the masks of inputs `mask` and `added`, its heads joined."""
    keys, queries, dtype = type_of(k).shape[2], type_of(q).shape[2], type_of(q).dtype.numpy
    bias = []
    padding, bonus = n.opt(mask), n.opt(added)
    if padding is not None:
        batch = const_int(type_of(q).shape[0])
        if type_of(padding).rank == 1 and const_int(type_of(padding).shape[0]) != batch:
            n.fail(f"{n.op_type} with a mask {type_of(padding)} is not supported")
        bias.append(_padding(n, padding, keys, dtype))
    if bonus is not None:
        bias.append(bonus)
    causal = [_causal(n, queries, keys, past)] if n.attr("unidirectional", 0) else []
    return _joined(n, _attend(n, q, k, v, bias, causal))


# ---- operators ----------------------------------------------------------------------------------
def _attention(n: OnnxNode) -> Any:
    """Query, key and value are one product of the input."""
    if n.attr("qkv_hidden_sizes", None) or n.attr("do_rotary", 0) or n.opt(6) is not None:
        n.fail("this form of Attention is not supported")
    product = n.apply(linalg.matmul, n.arg(0), n.arg(1), name="")
    bias = n.opt(2)
    product = product if bias is None else n.apply(el.add, product, bias, name="")
    q, k, v = (_heads(n, x, n.attr("num_heads")) for x in _thirds(n, product, 2))
    past, before = n.opt(4), wrap(0)
    if past is not None:
        before = n.shape(4, 5)[3]
        k, v = (
            _concat(n, n.apply(ix.gather, past, n.constant(j, np.int64),
                               attrs=ix.GatherAttrs(0), name=""), x, axis=2)
            for j, x in enumerate((k, v))
        )  # fmt: skip
    made = _masked(n, q, k, v, 3, 5, before)
    if not n.wants(1):
        return made
    both = (n.apply(sh.unsqueeze, x, attrs=sh.UnsqueezeAttrs((0,)), name="") for x in (k, v))
    return made, _concat(n, *both, axis=0, name=n.outputs[1])


def _multi_head(n: OnnxNode) -> Any:
    """Query, key and value come apart; keys and values may have their heads already."""
    heads = n.attr("num_heads")
    if n.opt(1) is None or n.opt(2) is None or n.opt(8) is not None or n.wants(3):
        n.fail("this form of MultiHeadAttention is not supported")
    given = [n.arg(0), n.arg(1), n.arg(2)]
    bias = n.opt(3)
    if bias is not None:
        if any(type_of(x).rank != 3 for x in given):
            n.fail("MultiHeadAttention with a bias for keys that have heads is not supported")
        own = [const_int(type_of(x).shape[2]) or 0 for x in given]
        ends = np.cumsum([0, *own]).tolist()
        parts = [_part(n, bias, a, b, 0) for a, b in itertools.pairwise(ends)]
        given = [n.apply(el.add, x, b, name="") for x, b in zip(given, parts, strict=True)]
    q, k, v = (x if type_of(x).rank == 4 else _heads(n, x, heads) for x in given)
    before = wrap(0)
    if n.opt(6) is not None:
        before = n.shape(6, 4)[2]
        k = _concat(n, n.arg(6), k, axis=2)
        v = _concat(n, n.arg(7), v, axis=2)
    made = _masked(n, q, k, v, 4, 5, before)
    return (made, k, v)[: len(n.outputs)]


def _turned(n: OnnxNode, x: Value, cos: Value, sin: Value, interleaved: bool) -> Value:
    """x[batch, heads, positions, size] with pairs of elements turned by angles [.., pairs]."""
    shape = type_of(x).shape
    pairs = const_int(type_of(cos).shape[-1]) or 0
    used = _part(n, x, 0, 2 * pairs, 3)
    if interleaved:
        split = _reshaped(n, used, *shape[:3], pairs, 2)
        a, b = (_reshaped(n, _part(n, split, k, k + 1, 4), *shape[:3], pairs) for k in (0, 1))
    else:
        a, b = _part(n, used, 0, pairs, 3), _part(n, used, pairs, 2 * pairs, 3)

    def times(p: Value, q: Value) -> Value:
        return n.apply(el.mul, p, q, name="")

    first = n.apply(el.sub, times(a, cos), times(b, sin), name="")
    second = n.apply(el.add, times(a, sin), times(b, cos), name="")
    if interleaved:
        both = (_reshaped(n, p, *shape[:3], pairs, 1) for p in (first, second))
        made = _reshaped(n, _concat(n, *both, axis=4), *shape[:3], 2 * pairs)
    else:
        made = _concat(n, first, second, axis=3)
    if const_int(shape[3]) == 2 * pairs:
        return made
    return _concat(n, made, _part(n, x, 2 * pairs, shape[3], 3), axis=3)


def _angles(n: OnnxNode, table: Value, at: Value) -> Value:
    """Rows of a table of positions as [batch, 1, positions, pairs]."""
    rows = n.apply(ix.gather, table, at, attrs=ix.GatherAttrs(0), name="")
    return n.apply(sh.unsqueeze, rows, attrs=sh.UnsqueezeAttrs((1,)), name="")


def _rotary(n: OnnxNode) -> Value:
    """Positions are given for each element, or that of the first one for all."""
    x, at, t = n.arg(0), n.arg(1), n.type(0)
    if n.attr("is_packed_batching", 0) or n.attr("scale", 1.0) != 1.0 or t.rank not in (3, 4):
        n.fail("this form of RotaryEmbedding is not supported")
    pairs = const_int(n.type(2).shape[-1]) or 0
    width = const_int(t.shape[-1]) or 0
    heads = n.attr("num_heads", 0) or (width // (2 * pairs) if pairs else 0)
    split = x if t.rank == 4 else _heads(n, x, heads)
    if n.type(1).rank == 1:
        at = n.apply(el.add, positions(n, type_of(split).shape[2]), at, name="")
        at = _reshaped(n, at, 1, type_of(split).shape[2])
    cos, sin = (_angles(n, n.arg(k), at) for k in (2, 3))
    made = _turned(n, split, cos, sin, bool(n.attr("interleaved", 0)))
    return made if t.rank == 4 else _joined(n, made)


def _grouped(n: OnnxNode) -> Any:
    """Several heads of queries share one of keys. `seqlens_k` counts the positions that each
    sequence has in the end, less one: what is new stands behind its own past."""
    heads, shared = n.attr("num_heads"), n.attr("kv_num_heads")
    if any(n.opt(k) is not None for k in range(9, len(n.inputs))) or n.attr("smooth_softmax", 0):
        n.fail("this form of GroupQueryAttention is not supported")
    if heads < 1 or shared < 1 or heads % shared:
        n.fail(f"GroupQueryAttention with {heads} heads of queries and {shared} of keys")
    if n.opt(1) is None:
        width = const_int(n.type(0).shape[-1]) or 0
        size = width // (heads + 2 * shared)
        ends = (0, heads * size, (heads + shared) * size, width)
        given = [_part(n, n.arg(0), ends[j], ends[j + 1], 2) for j in range(3)]
    else:
        given = [n.arg(0), n.arg(1), n.arg(2)]
    q, k, v = (_heads(n, x, h) for x, h in zip(given, (heads, shared, shared), strict=True))
    batch, _, length, _ = type_of(k).shape
    total = _reshaped(n, cast_to(n, n.arg(5), int64), batch)
    first = n.apply(el.sub, n.apply(el.add, total, n.constant(1, np.int64), name=""),
                    _size(n, length), name="")  # fmt: skip
    first = n.apply(el.maximum_, first, n.constant(0, np.int64), name="")
    at = n.apply(el.add, _reshaped(n, first, batch, 1), positions(n, length), name="")
    if n.attr("do_rotary", 0):
        cos, sin = (_angles(n, n.arg(j), at) for j in (7, 8))
        turn = bool(n.attr("rotary_interleaved", 0))
        q, k = (_turned(n, x, cos, sin, turn) for x in (q, k))
    if n.opt(3) is not None:
        k, v = (_appended(n, n.arg(3 + j), x, first) for j, x in enumerate((k, v)))
    keys = type_of(k).shape[2]
    rows = _reshaped(n, at, batch, 1, length, 1)
    kept = [n.apply(el.less_equal, positions(n, keys), rows, name="")]
    window = n.attr("local_window_size", -1)
    if window > 0:
        reach = n.apply(el.sub, rows, n.constant(window, np.int64), name="")
        kept.append(n.apply(el.less, reach, positions(n, keys), name=""))
    wide_k, wide_v = (_repeated(n, x, heads // shared) for x in (k, v))
    made = _joined(n, _attend(n, q, wide_k, wide_v, [], kept))
    return (made, k, v)[: len(n.outputs)]


def _appended(n: OnnxNode, past: Value, x: Value, first: Value) -> Value:
    """What is new behind what each sequence has."""
    shape, after = type_of(past).shape, type_of(x).shape[2]
    attrs = padding.PadAttrs((0,) * 4, (0, 0, after, 0), "constant", 0)
    room = n.apply(padding.pad, past, attrs=attrs, name="")
    if len(shape) != 4:
        n.fail(f"{n.op_type} with a past {type_of(past)}")
    return n.apply(sc.write_at, room, x, first, attrs=sc.WriteAtAttrs(2), name="")


def _repeated(n: OnnxNode, x: Value, times: int) -> Value:
    """Each head as often as there are heads of queries for it."""
    if times == 1:
        return x
    batch, heads, length, size = type_of(x).shape
    apart = _reshaped(n, x, batch, heads, 1, length, size)
    wide = sh.ExpandAttrs((batch, heads, times, length, size))
    return _reshaped(
        n, n.apply(sh.expand, apart, attrs=wide, name=""), batch, heads * times, length, size
    )


def _embedding(n: OnnxNode) -> Any:
    """The normalised sum of up to three embeddings, and how many tokens each row has."""
    t = n.type(0)
    tables = [(n.arg(0), n.arg(2))]
    if n.opt(8) is not None:
        at = n.arg(8)
    else:
        at = _reshaped(n, positions(n, t.shape[1]), ONE, t.shape[1])
    tables.append((at, n.arg(3)))
    segments = n.opt(1)
    if segments is not None:
        tables.append((segments, n.arg(4)))
    rows = [n.apply(ix.gather, v, i, attrs=ix.GatherAttrs(0), name="") for i, v in tables]
    total = rows[0]
    for r in rows[1:]:
        total = n.apply(el.add, total, r, name="")
    attrs = norm.RowNormAttrs(-1, n.attr("epsilon", 1e-12))
    made = n.apply(norm.layer_norm, total, n.arg(5), n.arg(6), attrs=attrs)
    mask = n.opt(7)
    if not n.wants(1):
        counts: Value | None = None
    elif mask is None:
        n.fail("EmbedLayerNormalization counts no tokens without a mask")
    else:
        over = red.ReduceAttrs((1,), False)
        counts = n.apply(red.reduce_sum, mask, attrs=over, name=n.outputs[1])
    return (made, counts, total)[: len(n.outputs)]


ATTENTION: dict[str, Converter] = {
    "com.microsoft.Attention": _attention,
    "com.microsoft.EmbedLayerNormalization": _embedding,
    "com.microsoft.GroupQueryAttention": _grouped,
    "com.microsoft.MultiHeadAttention": _multi_head,
    "com.microsoft.RotaryEmbedding": _rotary,
}
