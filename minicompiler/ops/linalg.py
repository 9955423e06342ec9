"""Matrix products.

    matmul(a[..., m, k], b[..., k, n]) -> [..., m, n]     numpy's semantics, batches broadcast
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .. import te
from ..ir.expr import ONE, Const, Expr
from ..ir.op import Arg, Op, Precision, register
from ..ir.types import TensorType
from .draws import Draw, array, broadcastable, choice, flag, integer
from .rules import (
    Shape,
    broadcast_sizes,
    direct,
    fail,
    float32_inside,
    need_dtype,
    need_rank,
    result,
    same_dtype,
    unequal,
    widened,
)


# ---- matmul -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class MatmulAttrs:
    """transpose_a, transpose_b: the last two axes of an operand are taken the other way round."""

    transpose_a: bool = False
    transpose_b: bool = False


def _matrices(
    a: Shape, b: Shape, attrs: MatmulAttrs
) -> tuple[Shape, Expr, Expr, Expr, Expr, Shape]:
    """(batch of a, m, k of a, k of b, n, batch of b); a 1-d operand is a row, or a column."""
    la = a[-2:] if len(a) > 1 else (ONE, a[0])
    lb = b[-2:] if len(b) > 1 else (b[0], ONE)
    if attrs.transpose_a and len(a) > 1:
        la = la[::-1]
    if attrs.transpose_b and len(b) > 1:
        lb = lb[::-1]
    return a[:-2], la[0], la[1], lb[0], lb[1], b[:-2]


def _product_shape(a: Shape, b: Shape, attrs: MatmulAttrs) -> Shape:
    batch_a, m, _, _, n, batch_b = _matrices(a, b, attrs)
    batch = broadcast_sizes("matmul", batch_a, batch_b)
    return (*batch, *((m,) if len(a) > 1 else ()), *((n,) if len(b) > 1 else ()))


def _matmul_infer(a: Arg, b: Arg, attrs: MatmulAttrs) -> TensorType:
    need_rank("matmul", a, 1)
    need_rank("matmul", b, 1)
    need_dtype("matmul", a, "fi")
    _, _, ka, kb, _, _ = _matrices(a.type.shape, b.type.shape, attrs)
    if unequal(ka, kb):
        fail(
            f"matmul of {a.type} and {b.type}: the inner sizes {ka} and {kb} differ",
            "transpose an operand, or check the layout of the weight",
        )
    return result(_product_shape(a.type.shape, b.type.shape, attrs), same_dtype("matmul", a, b))


def _matmul_compute(a: te.Tensor, b: te.Tensor, attrs: MatmulAttrs) -> te.Tensor:
    shape = _product_shape(a.shape, b.shape, attrs)
    _, _, ka, kb, _, _ = _matrices(a.shape, b.shape, attrs)
    (k,) = te.reduce_vars(1)
    rows, columns = len(a.shape) > 1, len(b.shape) > 1
    left, right = widened(a), widened(b)

    def element(x: te.Tensor, batch: tuple[Expr, ...], matrix: tuple[Expr, ...]) -> Expr:
        lead = len(x.shape) - len(matrix)
        own = zip(x.shape[:lead], batch[len(batch) - lead :], strict=True)
        return x[(*(Const(0) if s is ONE else i for s, i in own), *matrix)]

    def body(*i: Expr) -> Expr:
        batch = i[: len(i) - rows - columns]
        inner = i[len(batch) :]
        at_a: tuple[Expr, ...] = (inner[0], k) if rows else (k,)
        at_b: tuple[Expr, ...] = (k, inner[-1]) if columns else (k,)
        if attrs.transpose_a:
            at_a = at_a[::-1]
        if attrs.transpose_b:
            at_b = at_b[::-1]
        return element(left, batch, at_a) * element(right, batch, at_b)

    # Where only one inner size is a constant, the loop runs over that one.
    extent = kb if type(kb) is Const else ka
    return te.astype(te.compute(shape, body, "matmul", reduce=("sum", {k: extent})), a.dtype)


def _matmul_reference(a: np.ndarray, b: np.ndarray, attrs: MatmulAttrs) -> np.ndarray:
    a = a.swapaxes(-1, -2) if attrs.transpose_a and a.ndim > 1 else a
    b = b.swapaxes(-1, -2) if attrs.transpose_b and b.ndim > 1 else b
    return np.asarray(np.matmul(a, b))


def _matmul_samples(draw: Draw) -> tuple[list[np.ndarray], MatmulAttrs]:
    m, k, n = (integer(draw, 1, 5) for _ in range(3))
    attrs = MatmulAttrs(flag(draw), flag(draw)) if flag(draw) else MatmulAttrs()
    batch_a, batch_b = broadcastable(draw, 2)
    of_a: tuple[int, ...] = (*batch_a, *((k, m) if attrs.transpose_a else (m, k)))
    of_b: tuple[int, ...] = (*batch_b, *((n, k) if attrs.transpose_b else (k, n)))
    if integer(draw, 0, 4) == 0:
        of_a = (k,)
    if integer(draw, 0, 4) == 0:
        of_b = (k,)
    dtype = choice(draw, ("float32", "float32", "float64", "float16", "bfloat16", "int32"))
    return [array(draw, of_a, dtype), array(draw, of_b, dtype)], attrs


matmul = register(
    Op(
        "matmul",
        MatmulAttrs,
        _matmul_infer,
        direct(_matmul_compute),
        float32_inside(_matmul_reference),
        _matmul_samples,
        precision=Precision.LOW,
    )
)
