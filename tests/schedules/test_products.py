"""Matrix products of all proportions: the way their second operand takes, and their numbers."""

from __future__ import annotations

import numpy as np
import pytest

import minicompiler as mc
from minicompiler.context import Context, Options
from minicompiler.frontend.builder import Builder
from minicompiler.ir.expr import Const, Dim, Expr, const_int
from minicompiler.ir.graph import Constant, Function, Input, apply
from minicompiler.ir.layout import IndexMap
from minicompiler.ir.tir import UNROLL, VECTOR, Prefetch, PrimFunc, Scope, statements
from minicompiler.ir.types import TensorType, float32
from minicompiler.kernel import lower_kernel
from minicompiler.ops.conv import ConvAttrs, conv
from minicompiler.ops.evaluate import run_reference
from minicompiler.ops.linalg import MatmulAttrs, matmul
from minicompiler.schedules import analysis
from minicompiler.schedules.cpu import schedule
from minicompiler.target import Target

AVX2 = Target.parse("cpu:avx2")


def product(m: Expr | int, n: Expr | int, k: Expr | int, turned: bool = False) -> Function:
    m, n, k = (Const(x) if isinstance(x, int) else x for x in (m, n, k))
    a = Input("a", TensorType((m, k), float32))
    b = Input("b", TensorType((n, k) if turned else (k, n), float32))
    attrs = MatmulAttrs(transpose_b=turned)
    return Function("product", (a, b), (apply(matmul, a, b, attrs=attrs),), result_names=("c",))


def scheduled(fn: Function, weights: bool = False) -> PrimFunc:
    ctx = Context(AVX2, Options(threads=1))
    return schedule(lower_kernel(fn, (False, weights), ctx), AVX2).func


def scopes(func: PrimFunc) -> list[Scope]:
    return [b.body.buffer.scope for b in analysis.blocks(func) if b.name.startswith("p1_s")]


def test_many_rows_pack_next_to_their_tiles() -> None:
    assert scopes(scheduled(product(96, 200, 300))) == [Scope.LOCAL]


def test_few_rows_stream_the_matrix() -> None:
    func = scheduled(product(8, 512, 512))
    assert scopes(func) == []
    outermost = next(analysis.loops(func))
    assert outermost.var.name.startswith("k0")


@pytest.mark.parametrize("far", [False, True])
def test_one_row_reads_more_rows_of_a_matrix_from_memory(far: bool) -> None:
    n = 2048  # columns; so many rows are a quarter of the last-level cache
    k = AVX2.caches[2] // 4 // (4 * n) + (64 if far else 0)
    loops = {str(x.var): x.extent for x in analysis.loops(scheduled(product(1, n, k)))}
    assert loops["k0_o"] is Const(k // (8 if far else 4))


def test_one_row_times_rows_packs_nothing() -> None:
    func = scheduled(product(1, 512, 512, turned=True))
    assert scopes(func) == []
    assert any(b.name == "matmul_rf" for b in analysis.blocks(func))


def test_a_matrix_from_near_is_packed_by_the_first_tiles() -> None:
    """And one from far before them, in long pieces of its rows."""
    for size, woven in ((200, True), (1500, False)):
        func = scheduled(product(size, size, size))
        (copy,) = (b for b in analysis.blocks(func) if b.name == "p1_s_in")
        assert bool(analysis.where_parts(copy)) == woven
        hints = [x for x in statements(func) if isinstance(x, Prefetch)]
        assert bool(hints) != woven


def test_one_tile_of_rows_reads_weights_as_one_stream() -> None:
    """And asks for the lines that come soon; several tiles ask for the next panel, in turns."""
    for rows, depth, near in ((5, 1920, True), (12, 960, False), (100, 320, False)):
        func = scheduled(product(rows, 1024, 1920), weights=True)
        loops = {x.var.name: x.extent for x in analysis.loops(func)}
        assert loops["k0_o" if near else "k0_i_o"] is Const(depth // 4)
        hints = [x.ahead for x in statements(func) if isinstance(x, Prefetch)]
        assert hints and all(type(x) is Const for x in hints) == near


def test_few_rows_read_rows_of_a_matrix_once() -> None:
    loops = [x.var.name for x in analysis.loops(scheduled(product(3, 512, 512, turned=True)))]
    assert loops[0] == "i1_o" and loops.index("i0") > loops.index("k0_o")


@pytest.mark.parametrize(
    "shape",
    [
        (1, 300, 500), (1, 64, 4096), (2, 130, 1000), (7, 2048, 77), (12, 500, 700),
        (13, 1024, 300), (40, 17, 1030), (97, 33, 5), (300, 16, 600), (64, 64, 2049), (65, 129, 1),
        (4, 77, 513), (3, 2, 40), (4, 3, 1), (2, 1, 5), (60, 200, 3), (100, 90, 700),
    ],
    ids=lambda s: "x".join(map(str, s)),
)  # fmt: skip
@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
def test_products_of_all_proportions(shape: tuple[int, int, int], turned: bool) -> None:
    m, n, k = shape
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(s, np.float32) for s in ((m, k), (k, n)))
    module = mc.compile(product(m, n, k, turned), threads=1)
    (got,) = module(a, np.ascontiguousarray(b.T) if turned else b)
    want = a.astype(np.float64) @ b
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.sqrt(k) * np.abs(want).max())


def test_sizes_that_are_known_only_when_called() -> None:
    m, n, k = (Dim(x, 1, 3000) for x in "MNK")
    module = mc.compile(product(m, n, k), threads=2)
    rng = np.random.default_rng(0)
    for rows, columns, depth in ((1, 1, 1), (50, 70, 90), (7, 33, 1100), (130, 20, 513)):
        a, b = (rng.standard_normal(s, np.float32) for s in ((rows, depth), (depth, columns)))
        (got,) = module(a, b)
        np.testing.assert_allclose(got, a @ b, rtol=0, atol=1e-3)


def test_pixels_that_a_strided_convolution_reads_lie_side_by_side() -> None:
    rng = np.random.default_rng(0)
    x = Input("x", TensorType((Const(1), Const(8), Const(9), Const(11)), float32))
    w = Input("w", TensorType((Const(64), Const(8), Const(1), Const(1)), float32))
    y = apply(conv, x, w, attrs=ConvAttrs(strides=(2, 3)))
    fn = Function("strided", (x, w), (y,), result_names=("y",))
    lowered = lower_kernel(fn, (False, True), Context(AVX2, Options()))
    assert "picked" in [b.name for b in analysis.blocks(lowered)]
    value = rng.standard_normal((1, 8, 9, 11)).astype(np.float32)
    weight = rng.standard_normal((64, 8, 1, 1), np.float32)
    (got,) = mc.compile(fn, threads=1)(value, weight)
    want = np.einsum("oc,nchw->nohw", weight[:, :, 0, 0], value[:, :, ::2, ::3])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [8, 56, 72])
def test_tiles_of_several_blocks_of_channels(channels: int) -> None:
    """Blocks of 8 are joined in a tile, also where the last group is not complete."""
    rng = np.random.default_rng(0)
    x = Input("x", TensorType((Const(1), Const(16), Const(7), Const(5)), float32))
    weights = [
        Constant(rng.standard_normal((o, c, 1, 1)).astype(np.float32))
        for o, c in ((channels, 16), (16, channels))
    ]
    y = apply(conv, apply(conv, x, weights[0]), weights[1])
    module = mc.compile(Function("chain", (x,), (y,), result_names=("y",)), threads=1)
    value = rng.standard_normal((1, 16, 7, 5)).astype(np.float32)
    (got,) = module(value)
    matrix = weights[1].data[:, :, 0, 0] @ weights[0].data[:, :, 0, 0]
    np.testing.assert_allclose(got, np.einsum("oc,nchw->nohw", matrix, value), rtol=0, atol=1e-3)


@pytest.mark.parametrize("case", ["behind", "before", "padded", "both", "sum"])
def test_what_goes_on_beyond_a_sum_is_complete(case: str) -> None:
    """A concat or pad that was fused with a sum has more elements than the sum has."""
    net = Builder("beyond")
    shapes = (6, 50, 1), (6, 50, 20), (6, 20)
    x, w, z = (net.input(name, shape) for name, shape in zip("xwz", shapes, strict=True))
    summed = net.reduce_sum(w if case == "sum" else net.mul(x, w), axes=(1,), keepdims=False)
    y = {
        "behind": lambda: net.concat(summed, z, axis=1),
        "before": lambda: net.concat(z, summed, axis=1),
        "padded": lambda: net.pad(summed, begin=(0, 0), end=(0, 9)),
        "both": lambda: net.concat(summed, net.reduce_max(w, axes=(1,), keepdims=False), axis=1),
        "sum": lambda: net.pad(net.exp(net.mul(summed, np.float32(0.1))), begin=(0, 2), end=(0, 9)),
    }[case]()
    fn = net.function(y=y)
    rng = np.random.default_rng(0)
    given = [rng.standard_normal(s).astype(np.float32) for s in shapes]
    (wanted,) = run_reference(fn, given)
    for threads in (1, 2):
        (made,) = mc.compile(fn, threads=threads)(*given)
        np.testing.assert_allclose(made, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("known", [True, False], ids=["", "any size"])
@pytest.mark.parametrize("axes", [(3,), (2, 3)], ids=["lines", "images"])
def test_lines_are_weighed_and_scale_what_is_larger(axes: tuple[int, ...], known: bool) -> None:
    """The last axis of the sums is one of both operands: both are read along their lines, nothing
    is packed, and the elements that a sum scales are no part of its tile."""
    sizes = 20, 4, 130
    net = Builder("weighed")
    c, h, w = sizes if known else (Dim(x, 1, 1000) for x in "CHW")
    x, p, z = (net.input(n, (1, k, h, w)) for n, k in (("x", c), ("p", 1), ("z", c)))
    y = net.mul(net.reduce_sum(net.mul(x, p), axes=axes), net.relu(z))
    fn = net.function(y=y)
    func = scheduled(fn)
    assert scopes(func) == []
    assert any("_rf" in b.name for b in analysis.blocks(func))
    inner = [x.extent for x in analysis.loops(func) if x.kind in (VECTOR, UNROLL)]
    assert all(const_int(n) is not None and const_int(n) <= 64 for n in inner)
    rng = np.random.default_rng(0)
    given = [rng.standard_normal((1, n, *sizes[1:]), np.float32) for n in (sizes[0], 1, sizes[0])]
    (wanted,) = run_reference(fn, given)
    for threads in (1, 2):
        (made,) = mc.compile(fn, threads=threads)(*given)
        np.testing.assert_allclose(made, wanted, rtol=1e-4, atol=1e-4)


def test_a_matrix_product_that_is_repeated_is_a_loop_of_its_own() -> None:
    """Elements that are made of each one of a tile are not all unrolled."""
    net = Builder("repeated")
    a, b, c = (net.input(*of) for of in (("a", (24, 40)), ("b", (40, 24)), ("c", (24, 24, 200))))
    fn = net.function(y=net.mul(net.reshape(net.matmul(a, b), shape=(24, 24, 1)), c))
    func = scheduled(fn)
    inner = [const_int(x.extent) or 0 for x in analysis.loops(func) if x.kind in (VECTOR, UNROLL)]
    assert max(inner) <= 64
    rng = np.random.default_rng(0)
    given = [rng.standard_normal(s, np.float32) for s in ((24, 40), (40, 24), (24, 24, 200))]
    (wanted,) = run_reference(fn, given)
    (made,) = mc.compile(fn, threads=1)(*given)
    np.testing.assert_allclose(made, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("group", "block", "lanes"),
    [(48, 16, 16), (56, 16, 8), (24, 24, 8), (40, 40, 8), (4, 16, 16)],
)
def test_a_tile_has_outputs_of_one_group(group: int, block: int, lanes: int) -> None:
    """Its vectors then share what they read of the input. Groups of 4 are no whole vectors."""
    layout = IndexMap.blocked(4, 1, block)
    x = Input("x", TensorType(tuple(map(Const, (1, 6 * group, 15, 15))), float32), layout)
    w = Input("w", TensorType(tuple(map(Const, (6 * group, group, 3, 3))), float32))
    made = apply(conv, x, w, attrs=ConvAttrs(strides=(2, 2), groups=6)).with_(layouts=(layout,))
    func = scheduled(Function("f", (x, w), (made,), result_names=("y",)), weights=True)
    path = analysis.find_block(func, "conv")
    assert path is not None
    tile = [x for x in analysis.loops_in(path[1]) if x.kind in (UNROLL, VECTOR)]
    assert const_int(tile[-1].extent) == lanes
