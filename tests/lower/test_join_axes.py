"""Joined axes: which functions change, and that they compute the same."""

from __future__ import annotations

import numpy as np
import pytest
from tolerance import assert_close

import minicompiler as mc
from minicompiler import te
from minicompiler.frontend.builder import Builder
from minicompiler.ir import interp
from minicompiler.ir.expr import Dim, Expr
from minicompiler.ir.graph import Function
from minicompiler.ir.tir import Block, PrimFunc, statements
from minicompiler.ir.types import float32
from minicompiler.ir.verify_tir import verify_tir
from minicompiler.lower.join_axes import join_axes
from minicompiler.lower.to_tir import from_tensors
from minicompiler.ops.evaluate import run_reference

RNG = np.random.default_rng(3)
Shape = tuple[int | Expr, ...]


def products(space: Shape, taps: int = 1, scaled: Shape | None = None) -> PrimFunc:
    """sum over c of x[c, *at] * w[o, c], times a tensor of shape `scaled` that is read at its last
    axes; with `taps`, windows along the last axis."""
    x, w = te.placeholder("x", (3, *space), float32), te.placeholder("w", (4, 3), float32)
    c, t = te.reduce_vars(2)
    out = (4, *space[:-1], space[-1] if taps == 1 else space[-1] - taps + 1)
    over = {c: 3, **({t: taps} if taps > 1 else {})}

    def body(o: Expr, *at: Expr) -> Expr:
        last = at[-1] + t if taps > 1 else at[-1]
        return x[(c, *at[:-1], last)] * w[o, c]

    y = te.compute(out, body, "product", ("sum", over))
    if scaled is None:
        return from_tensors("f", [x, w], [y])
    s = te.placeholder("s", scaled, float32)
    z = te.compute(out, lambda *at: y[at] * s[at[len(at) - len(scaled) :]], "scaled")
    return from_tensors("f", [x, w, s], [z])


def shapes(func: PrimFunc) -> list[int]:
    return [len(b.shape) for b in func.params]


def iterators(func: PrimFunc) -> list[int]:
    return [len(s.iters) for s in statements(func) if isinstance(s, Block)]


JOINED = {
    "image": (products((5, 7)), [2, 2, 2]),
    "volume": (products((2, 5, 7)), [2, 2, 2]),
    "volume, lines scaled": (products((2, 5, 7), scaled=(5, 7)), [3, 2, 1, 3]),
    "image, scaled": (products((5, 7), scaled=(4, 5, 7)), [2, 2, 2, 2]),
}
KEPT = {
    "line": products((7,)),
    "windows": products((5, 7), taps=3),
    "scaled by column": products((5, 7), scaled=(7,)),
}


@pytest.mark.parametrize("name", JOINED)
def test_same_elements_in_fewer_axes(name: str) -> None:
    func, ranks = JOINED[name]
    joined = join_axes(func)
    assert shapes(joined) == ranks
    assert sum(iterators(joined)) < sum(iterators(func))
    verify_tir(joined)
    inputs = [RNG.standard_normal([n.value for n in b.shape]) for b in func.params[:-1]]  # type: ignore[attr-defined]
    views = [
        a.reshape([n.value for n in b.shape])  # type: ignore[attr-defined]
        for a, b in zip(inputs, joined.params, strict=False)
    ]
    (want,), (got,) = interp.run(func, inputs), interp.run(joined, views)
    assert got.tobytes() == want.tobytes()
    assert join_axes(joined) is joined


@pytest.mark.parametrize("name", KEPT)
def test_what_does_not_walk_as_one(name: str) -> None:
    assert join_axes(KEPT[name]) is KEPT[name]


def test_symbolic_sizes() -> None:
    func = products((Dim("h", 1, 9), Dim("w", 1, 9)))
    joined = join_axes(func)
    verify_tir(joined)
    dims = {"h": 4, "w": 3}
    x, w = RNG.standard_normal((3, 4, 3)), RNG.standard_normal((4, 3))
    (want,), (got,) = (
        interp.run(f, [a, w], dims) for f, a in ((func, x), (joined, x.reshape(3, 12)))
    )
    assert got.tobytes() == want.tobytes()


def pixels(images: int | Dim = 1) -> Function:
    """Two convolutions of one tap, with a sum of images of their size between them."""
    net = Builder("pixels")
    x, y = (net.input(n, (images, 24, 12, 20)) for n in "xy")
    a, b = (RNG.standard_normal((*s, 1, 1), np.float32) for s in ((24, 24), (40, 24)))
    bias = RNG.standard_normal(40, np.float32)
    return net.function(z=net.relu(net.conv(net.add(net.conv(x, a), y), b, bias)))


def test_results_of_products_of_pixels() -> None:
    xs = [RNG.standard_normal((1, 24, 12, 20), np.float32) for _ in range(2)]
    fn = pixels()
    want = run_reference(fn, xs)
    one, two = (mc.compile(fn, threads=n)(*xs) for n in (1, 2))
    assert one[0].tobytes() == two[0].tobytes()
    assert_close(one[0], want[0], 24 * 24)


def test_any_number_of_images_has_the_same_bits() -> None:
    module = mc.compile(pixels(Dim("n", 1, 8)))
    xs = [RNG.standard_normal((3, 24, 12, 20), np.float32) for _ in range(2)]
    (whole,) = module(*xs)
    for k in range(3):
        (alone,) = module(*(x[k : k + 1] for x in xs))
        assert alone.tobytes() == whole[k : k + 1].tobytes()
