"""Converters of ONNX operators that sort, scatter, or follow positions in data; Einsum.

TopK(x, 3) -> topk(x){k=3}       Einsum("ij,jk,kl->il") -> two einsums of two operands
"""

from __future__ import annotations

import numpy as np

from minicompiler.errors import ImportModelError
from minicompiler.ir.expr import const_int, product
from minicompiler.ir.graph import Value, type_of
from minicompiler.ir.op import Op
from minicompiler.ops import contract, linalg, padding
from minicompiler.ops import elementwise as el
from minicompiler.ops import index as ix
from minicompiler.ops import order as od
from minicompiler.ops import reduce as red
from minicompiler.ops import scatter as sc
from minicompiler.ops import shape as sh

from .onnx_data import element_type
from .onnx_math import Converter, cast_to
from .onnx_node import OnnxNode, sizes_of


# ---- scatter ------------------------------------------------------------------------------------
def _scatter(op: Op) -> Converter:
    def convert(n: OnnxNode) -> Value:
        attrs = sc.ScatterAttrs(n.attr("axis", 0), n.attr("reduction", "none"))
        return n.apply(op, n.arg(0), n.arg(1), n.arg(2), attrs=attrs)

    return convert


def _tensor_scatter(n: OnnxNode) -> Value:
    start = n.opt(2)
    if start is None:
        batch = const_int(n.type(0).shape[0])
        if batch is None:
            n.fail("TensorScatter without write_indices needs a constant batch size")
        n.table(batch)
        start = n.constant(np.zeros(batch, np.int64))
    attrs = sc.WriteAtAttrs(n.attr("axis", -2), n.attr("mode", "linear") == "circular")
    return n.apply(sc.write_at, n.arg(0), n.arg(1), start, attrs=attrs)


def _max_unpool(n: OnnxNode) -> Value:
    """Values go where the indices say in a flat image; a larger output has zeros around it."""
    t = n.type(0)
    d = len(n.attr("kernel_shape"))
    if t.rank != 2 + d:
        n.fail(f"MaxUnpool of {t} with a window of {d} dimensions")
    kernel, strides = n.attr("kernel_shape"), n.per_axis("strides", d, 1)
    pads = n.per_axis("pads", 2 * d, 0)
    spatial = [
        (t.shape[2 + k] - 1) * strides[k] - (pads[k] + pads[k + d]) + kernel[k] for k in range(d)
    ]
    shape = (*t.shape[:2], *spatial)
    flat = sh.ReshapeAttrs((product(t.shape),))
    count = product(shape)
    zeros = n.apply(sh.full, attrs=sh.FullAttrs((count,), 0, t.dtype), name="")
    x = n.apply(sh.reshape, n.arg(0), attrs=flat, name="")
    where = n.apply(sh.reshape, n.arg(1), attrs=flat, name="")
    made = n.apply(sc.scatter_elements, zeros, where, x, attrs=sc.ScatterAttrs(0), name="")
    image = n.apply(sh.reshape, made, attrs=sh.ReshapeAttrs(shape))
    if n.opt(2) is None:
        return image
    wanted = sizes_of(n.arg(2))
    if wanted is None:
        n.fail("the output shape of MaxUnpool has to be known")
    after = tuple(w - s for w, s in zip(wanted, shape, strict=True))
    return n.apply(padding.pad, image, attrs=padding.PadAttrs((0,) * (d + 2), after, "constant", 0))


# ---- sorting ------------------------------------------------------------------------------------
def _topk(n: OnnxNode) -> Value:
    if n.opset < 10:
        k: object = n.attr("k")
    else:
        sizes = sizes_of(n.arg(1))
        if sizes is None:
            n.fail("TopK needs a number k that is known while importing")
        k = sizes[0]
    assert k is not None
    attrs = od.OrderAttrs(n.attr("axis", -1), bool(n.attr("largest", 1)), k)  # type: ignore[arg-type]
    return n.apply(od.topk, n.arg(0), attrs=attrs)


def _hardmax(n: OnnxNode) -> Value:
    """1 at the first maximum along the axis, else 0; before opset 13 the axes from `axis` on."""
    x, t = n.arg(0), n.type(0)
    axis = n.attr("axis", -1 if n.opset >= 13 else 1) % max(t.rank, 1)
    if any(const_int(s) == 0 for s in t.shape):
        return n.apply(el.identity, x)
    if n.opset < 13:
        rows = (product(t.shape[:axis]), product(t.shape[axis:]))
        x = n.apply(sh.reshape, x, attrs=sh.ReshapeAttrs(rows), name="")
        axis = 1
    at = n.apply(red.argmax, x, attrs=red.ArgAttrs(axis, False, False), name="")
    values = n.constant([0, 1], t.dtype.numpy)
    attrs = ix.OneHotAttrs(type_of(x).shape[axis], axis)
    made = n.apply(ix.one_hot, at, values, attrs=attrs)
    return made if n.opset >= 13 else n.apply(sh.reshape, made, attrs=sh.ReshapeAttrs(t.shape))


def _reverse_sequence(n: OnnxNode) -> Value:
    attrs = ix.ReverseAttrs(n.attr("time_axis", 0), n.attr("batch_axis", 1))
    return n.apply(ix.reverse_sequence, n.arg(0), n.arg(1), attrs=attrs)


def _array_feature_extractor(n: OnnxNode) -> Value:
    made = n.apply(ix.gather, n.arg(0), n.arg(1), attrs=ix.GatherAttrs(-1))
    rows = product(n.type(0).shape[:-1])
    if n.type(0).rank == 1:
        return made
    return n.apply(sh.reshape, made, attrs=sh.ReshapeAttrs((rows, product(n.type(1).shape))))


# ---- einsum -------------------------------------------------------------------------------------
_SPARE = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _equation(n: OnnxNode) -> tuple[list[str], str]:
    """Index letters of the operands and of the result, the ellipsis spelled out."""
    text = n.attr("equation").replace(" ", "")
    left, arrow, output = text.partition("->")
    terms = left.split(",")
    if len(terms) != len(n.inputs):
        n.fail(f'Einsum "{text}" for {len(n.inputs)} operands')
    spare = [c for c in _SPARE if c not in text]
    most = 0
    done = []
    for k, term in enumerate(terms):
        extra = n.type(k).rank - len(term.replace("...", ""))
        if extra < 0 or (extra > 0 and "..." not in term):
            n.fail(f'Einsum: the operand "{term}" is {n.type(k)}')
        most = max(most, extra)
        done.append(term.replace("...", "\0" * extra))
    dots = "".join(spare[:most])
    done = [t.replace("\0" * t.count("\0"), dots[most - t.count("\0") :], 1) for t in done]
    if arrow:
        return done, output.replace("...", dots)
    letters = "".join(terms).replace(".", "")
    return done, dots + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))


def _einsum(n: OnnxNode) -> Value:
    """Operands are combined two at a time, from the left."""
    terms, output = _equation(n)
    values = [n.arg(k) for k in range(len(terms))]
    while len(values) > 2:
        later = "".join(terms[2:]) + output
        kept = "".join(dict.fromkeys(c for c in terms[0] + terms[1] if c in later))
        attrs = contract.EinsumAttrs(tuple(terms[:2]), kept)
        values = [n.apply(contract.einsum, *values[:2], attrs=attrs, name=""), *values[2:]]
        terms = [kept, *terms[2:]]
    return n.apply(contract.einsum, *values, attrs=contract.EinsumAttrs(tuple(terms), output))


# ---- others -------------------------------------------------------------------------------------
def _bitcast(n: OnnxNode) -> Value:
    dtype = element_type(n.attr("to"), "the result of BitCast", n.loc.file)
    return n.apply(el.bitcast, n.arg(0), attrs=el.CastAttrs(dtype))


def _binarizer(n: OnnxNode) -> Value:
    limit = n.constant(n.attr("threshold", 0.0), n.type(0).dtype.numpy)
    return cast_to(n, n.apply(el.greater, n.arg(0), limit, name=""), n.type(0).dtype, n.outputs[0])


def _col2im(n: OnnxNode) -> Value:
    image, kernel = n.known(1), n.known(2)
    if image is None or kernel is None:
        raise ImportModelError("Col2Im needs the shapes of image and block", (n.loc,))
    d = image.size
    pads = tuple(n.attr("pads", (0,) * 2 * d))
    attrs = contract.Col2ImAttrs(
        tuple(int(v) for v in image),
        tuple(int(v) for v in kernel),
        tuple(n.attr("strides", (1,) * d)),
        pads[:d],
        pads[d:],
        tuple(n.attr("dilations", (1,) * d)),
    )
    return n.apply(contract.col2im, n.arg(0), attrs=attrs)


INDEX: dict[str, Converter] = {
    "BitCast": _bitcast,
    "Col2Im": _col2im,
    "Det": lambda n: n.apply(linalg.det, n.arg(0)),
    "Einsum": _einsum,
    "Hardmax": _hardmax,
    "MaxUnpool": _max_unpool,
    "ReverseSequence": _reverse_sequence,
    "Scatter": _scatter(sc.scatter_elements),
    "ScatterElements": _scatter(sc.scatter_elements),
    "ScatterND": _scatter(sc.scatter_nd),
    "TensorScatter": _tensor_scatter,
    "TopK": _topk,
    "ai.onnx.ml.ArrayFeatureExtractor": _array_feature_extractor,
    "ai.onnx.ml.Binarizer": _binarizer,
}
