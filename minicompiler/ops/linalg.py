"""Matrix products.

matmul(a[..., m, k], b[..., k, n]) -> [..., m, n]     numpy's semantics, batches broadcast
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .. import te
from ..ir.expr import ONE, Const, Expr, Load, const, ne
from ..ir.op import Arg, NoAttrs, Op, Precision, register
from ..ir.tir import SERIAL, Alloc, Buffer, For, If, Scope, Stmt, Store, seq
from ..ir.types import TensorType, index
from .draws import Draw, array, broadcastable, choice, flag, integer
from .elementwise import magnitude
from .pairs import INT32, multiply, need_int32, np_multiplied
from .rules import (
    Shape,
    broadcast_sizes,
    direct,
    fail,
    float32_inside,
    need_dtype,
    need_rank,
    need_same,
    result,
    same_dtype,
    unequal,
    widened,
)
from .scatter import Fresh, over


# ---- matmul -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class MatmulAttrs:
    """transpose_a, transpose_b: the last two axes of an operand are taken the other way round.

    in_pairs: elements are pairs of numbers along the inner axis (see pairs.py)."""

    transpose_a: bool = False
    transpose_b: bool = False
    in_pairs: bool = False


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
    dtype = same_dtype("matmul", a, b)
    if attrs.in_pairs:
        need_int32("matmul", dtype)
    return result(_product_shape(a.type.shape, b.type.shape, attrs), dtype)


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
        return multiply(element(left, batch, at_a), element(right, batch, at_b), attrs.in_pairs)

    # Where only one inner size is a constant, the loop runs over that one.
    extent = kb if type(kb) is Const else ka
    return te.astype(te.compute(shape, body, "matmul", reduce=("sum", {k: extent})), a.dtype)


def _matmul_reference(a: np.ndarray, b: np.ndarray, attrs: MatmulAttrs) -> np.ndarray:
    a = a.swapaxes(-1, -2) if attrs.transpose_a and a.ndim > 1 else a
    b = b.swapaxes(-1, -2) if attrs.transpose_b and b.ndim > 1 else b
    return np_multiplied(np.matmul, a, b) if attrs.in_pairs else np.asarray(np.matmul(a, b))


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
    if dtype == "int32" and flag(draw):
        attrs = replace(attrs, in_pairs=True)
        return [array(draw, of, dtype, *INT32) for of in (of_a, of_b)], attrs
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


# ---- det ----------------------------------------------------------------------------------------
def _det_infer(x: Arg, a: NoAttrs) -> TensorType:
    need_dtype("det", x, "f")
    need_rank("det", x, 2)
    need_same("det", "the sizes of a matrix", x.type.shape[-1], x.type.shape[-2])
    return TensorType(x.type.shape[:-2], x.type.dtype)


def _det_compute(x: te.Tensor, a: NoAttrs) -> te.Tensor:
    """Gaussian elimination with the largest pivot of each column."""
    source = widened(x)
    n = x.shape[-1]
    lead = len(x.shape) - 2

    def build(ins: list[Buffer], outs: list[Buffer], fresh: Fresh) -> Stmt:
        made, m = outs
        best = Buffer(fresh("best").name, index, (ONE,), Scope.LOCAL)
        spare = Buffer(fresh("spare").name, source.dtype, (ONE,), Scope.LOCAL)
        zero = (Const(0),)

        def matrix(*b: Expr) -> Stmt:
            k, r, c, i, j = (fresh(s) for s in "krcij")

            def at(row: Expr, column: Expr) -> Expr:
                return Load(m, (*b, row, column))

            pivot, below = Load(best, zero), k + 1 + r
            row = k + 1 + i
            larger = magnitude(at(pivot, k)) < magnitude(at(below, k))
            find = For(r, n - 1 - k, SERIAL, If(larger, Store(best, zero, below)))
            swap: list[Stmt] = [
                Store(spare, zero, at(k, c)),
                Store(m, (*b, k, c), at(pivot, c)),
                Store(m, (*b, pivot, c), Load(spare, zero)),
            ]
            turn = Store(made, b, Load(made, b) * -1.0)
            exchange = If(ne(pivot, k), seq([For(c, n, SERIAL, seq(swap)), turn]))
            # Columns from the right: column k itself is read until the end.
            column = n - 1 - j
            lower = at(row, column) - at(k, column) * at(row, k) / at(k, k)
            clear = For(j, n - 1 - k, SERIAL, Store(m, (*b, row, column), lower))
            regular = ne(at(k, k), 0.0)
            steps: list[Stmt] = [
                Store(best, zero, k), find, exchange,
                Store(made, b, Load(made, b) * at(k, k)),
                If(regular, For(i, n - 1 - k, SERIAL, clear)),
            ]  # fmt: skip
            loop = For(k, n, SERIAL, seq(steps))
            copy = over((n, n), fresh, lambda *o: Store(m, (*b, *o), Load(ins[0], (*b, *o))))
            return seq([copy, Store(made, b, const(1, source.dtype)), loop])

        return Alloc(best, Alloc(spare, over(x.shape[:lead], fresh, matrix)))

    shapes = [(x.shape[:lead], source.dtype), (x.shape, source.dtype)]
    return te.astype(te.extern("det", (source,), shapes, build)[0], x.dtype)


def _det_reference(x: np.ndarray, a: NoAttrs) -> np.ndarray:
    return np.asarray(np.linalg.det(x))


def _det_samples(draw: Draw) -> tuple[list[np.ndarray], NoAttrs]:
    n = integer(draw, 1, 4)
    batch = tuple(integer(draw, 1, 2) for _ in range(integer(draw, 0, 2)))
    return [array(draw, (*batch, n, n), choice(draw, ("float32", "float64")))], NoAttrs()


det = register(
    Op(
        "det",
        NoAttrs,
        _det_infer,
        direct(_det_compute),
        float32_inside(_det_reference),
        _det_samples,
        precision=Precision.FLOAT32_INSIDE,
    )
)
