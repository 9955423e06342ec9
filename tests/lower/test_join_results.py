"""Axes of results that are one axis of what they are made of: which are joined, and the numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tolerance import assert_close

import minicompiler as mc
from minicompiler import te
from minicompiler.frontend.builder import Builder
from minicompiler.ir import interp
from minicompiler.ir.expr import Dim, Expr
from minicompiler.ir.graph import Function
from minicompiler.ir.tir import PrimFunc
from minicompiler.ir.types import float32
from minicompiler.ir.verify_tir import verify_tir
from minicompiler.lower.join_results import join_results
from minicompiler.lower.to_tir import from_tensors
from minicompiler.ops.evaluate import run_reference

RNG = np.random.default_rng(4)


def sums(lines: Expr | int, pixels: Expr | int, beside: str = "") -> PrimFunc:
    """r[h, w, c] = sum over k of x[h*pixels + w, k, c], times something at h or at w."""
    x = te.placeholder("x", (lines * pixels, 3, 5), float32)
    s = te.placeholder("s", (lines if beside == "h" else pixels,), float32)
    (k,) = te.reduce_vars(1)
    y = te.compute((lines * pixels, 5), lambda f, c: x[f, k, c], "y", ("sum", {k: 3}))

    def body(h: Expr, w: Expr, c: Expr) -> Expr:
        value = y[h * pixels + w, c]
        return value * s[h if beside == "h" else w] if beside else value

    z = te.compute((lines, pixels, 5), body, "z")
    return from_tensors("f", [x, s] if beside else [x], [z])


@pytest.mark.parametrize("pixels", [7, Dim("w", 1, 9)])
def test_rows_of_the_result_are_those_of_what_it_reads(pixels: Expr | int) -> None:
    func = sums(6, pixels)
    joined = join_results(func)
    verify_tir(joined)
    assert len(joined.params[-1].shape) == 2
    x = RNG.standard_normal((42, 3, 5)).astype(np.float32)
    sizes = [] if isinstance(pixels, int) else [7]
    (got,) = interp.run(joined, [x], *([{"w": 7}] if sizes else []))
    np.testing.assert_allclose(got.reshape(6, 7, 5), x.sum(1).reshape(6, 7, 5), rtol=1e-5)


@pytest.mark.parametrize("beside", ["h", "w"])
def test_what_is_read_at_a_part_of_them_keeps_them_apart(beside: str) -> None:
    func = sums(6, 7, beside)
    assert join_results(func) is func


def attention() -> Function:
    """Heads of 16 channels over 36 tokens, whose result is an image of 6x6 pixels."""
    net = Builder("attention")
    given = [net.reshape(net.input(n, (1, 36, 64)), shape=(1, 36, 4, 16)) for n in "qkv"]
    q, k, v = (net.transpose(x, perm=(0, 2, 1, 3)) for x in given)
    scores = net.softmax(net.matmul(q, net.transpose(k, perm=(0, 1, 3, 2))), axis=-1)
    tokens = net.transpose(net.matmul(scores, v), perm=(0, 2, 1, 3))
    return net.function(y=net.reshape(tokens, shape=(1, 6, 6, 64)))


def test_attention_that_becomes_an_image_is_tiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINICOMPILER_CACHE", str(tmp_path))  # what comes from it has no stages
    fn = attention()
    xs = [RNG.standard_normal((1, 36, 64)).astype(np.float32) for _ in "qkv"]
    module = mc.compile(fn, threads=1)
    assert [s.details["rule"] for s in module.stages if s.name == "schedule"] == ["attention"]
    assert_close(module(*xs)[0], run_reference(fn, xs)[0], 1000)
