"""Operations and bytes of kernels, against counts done by hand."""

from __future__ import annotations

from minicompiler import te
from minicompiler.ir.arith import evaluate_int
from minicompiler.ir.expr import Call, Dim
from minicompiler.ir.types import float32, int32
from minicompiler.lower.cost import flops, moved, points
from minicompiler.lower.to_tir import from_tensors

N = Dim("n", 1, 64)


def product() -> tuple[te.Tensor, te.Tensor, te.Tensor, te.Tensor]:
    """relu-like epilogue of x[n, 16] * w[16, 8] + b[8]"""
    x = te.placeholder("x", (N, 16), float32)
    w = te.placeholder("w", (16, 8), float32)
    b = te.placeholder("b", (8,), float32)
    (k,) = te.reduce_vars(1)
    y = te.compute((N, 8), lambda i, j: x[i, k] * w[k, j], "y", reduce=("sum", {k: 16}))
    return x, w, b, y + b


def test_a_matrix_product_with_a_bias() -> None:
    x, w, b, y = product()
    func = from_tensors("dense", [x, w, b], [y], [w, b])
    assert evaluate_int(flops(func), {"n": 5}) == 5 * 8 * (2 * 16 + 1)
    assert evaluate_int(moved(func), {"n": 5}) == 4 * (5 * 16 + 16 * 8 + 8 + 5 * 8)


def test_points_count_every_loop() -> None:
    x, w, b, y = product()
    func = from_tensors("dense", [x, w, b], [y], [w, b])
    assert evaluate_int(points(func), {"n": 5}) == 5 * 8 * (16 + 1)


def test_work_on_constants_is_not_counted() -> None:
    x = te.placeholder("x", (N, 8), float32)
    w = te.placeholder("w", (8,), float32)
    scale = te.map_elements(lambda e: 1.0 / Call("sqrt", (e,)), w, name="scale")
    (k,) = te.reduce_vars(1)
    total = te.compute((8,), lambda i: scale[i] * w[k], "total", reduce=("sum", {k: 8}))
    y = te.compute((N, 8), lambda i, j: x[i, j] * total[j], "y")
    constant = from_tensors("scaled", [x, w], [y], [w])
    assert evaluate_int(flops(constant), {"n": 3}) == 3 * 8
    assert evaluate_int(flops(from_tensors("scaled", [x, w], [y])), {"n": 3}) > 3 * 8 + 2 * 64


def test_integers_count_and_their_indices_do_not() -> None:
    """A product of two pairs: two multiplications, an addition, and one to what was summed up."""
    x, w = (te.placeholder(n, (N if n == "x" else 8, 16), int32) for n in "xw")
    (k,) = te.reduce_vars(1)
    single = te.compute((N, 8), lambda i, j: x[i, k] * w[j, k], "y", ("sum", {k: 16}))
    pairs = te.compute(
        (N, 8), lambda i, j: Call("dot_pairs", (x[i, k], w[j, k])), "y", ("sum", {k: 16})
    )
    turned = te.compute((N, 8), lambda i, j: x[i, 15 - j * 2], "y")
    counts = [flops(from_tensors("f", [x, w], [y])) for y in (single, pairs, turned)]
    assert [evaluate_int(n, {"n": 3}) for n in counts] == [3 * 8 * 16 * 2, 3 * 8 * 16 * 4, 0]


def test_comparisons_and_moves_are_no_operations() -> None:
    x = te.placeholder("x", (N, 8), float32)
    y = te.compute((8, N), lambda i, j: x[j, i], "transposed")
    func = from_tensors("move", [x], [y])
    assert evaluate_int(flops(func), {"n": 3}) == 0
    assert evaluate_int(moved(func), {"n": 3}) == 2 * 4 * 3 * 8
