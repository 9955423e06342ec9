"""What iterations of a parallel loop compute alike is found, and done once per thread."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import minicompiler as mc
from minicompiler.codegen.repeats import repeated
from minicompiler.frontend.builder import Builder
from minicompiler.ir.expr import Expr, Load, Var, wrap
from minicompiler.ir.graph import Function
from minicompiler.ir.tir import PARALLEL, SERIAL, Alloc, Buffer, For, Scope, Store, seq
from minicompiler.ir.types import float32
from minicompiler.schedules.shares import even

U, K = Var("u"), Var("k")
X = Buffer("x", float32, (wrap(8),), Scope.PARAM)
R = Buffer("r", float32, (wrap(14), wrap(4)), Scope.PARAM)
T = Buffer("t", float32, (wrap(4),), Scope.LOCAL)


def _loop(index: Expr, made: Buffer = T, result: Buffer = R) -> For:
    """t[k] = x[index]; r[u, k] = t[k]"""
    first = For(K, wrap(4), SERIAL, Store(made, (K,), Load(X, (index,))))
    at = (U, K) if result is R else (K,)
    rest = For(K, wrap(4), SERIAL, Store(result, at, Load(made, (K,))))
    return For(U, wrap(14), PARALLEL, Alloc(made, seq([first, rest])))


def test_what_depends_on_a_quotient_alone_is_repeated() -> None:
    found = repeated(_loop(U // 2))
    assert found is not None and found.step is U // 2
    assert found.buffers == [T] and len(found.first) == len(found.rest) == 1


@pytest.mark.parametrize(
    "loop",
    [
        _loop(U // 2 + U % 2),
        _loop(U),
        _loop(wrap(3)),
        _loop(U // 2 + U // 3),
        _loop(U // 2, made=dataclasses.replace(T, scope=Scope.GLOBAL)),
        _loop(U // 2, result=X),
    ],
    ids=["remainder", "itself", "nothing", "two quotients", "shared memory", "changed later"],
)
def test_nothing_else_is(loop: For) -> None:
    assert repeated(loop) is None


def test_parts_make_shares_even() -> None:
    options = (1, 2, 4, 8)
    assert even(7, options, 2) == 2
    assert even(7, options, 8) == 8
    assert even(8, options, 2) == 1
    assert even(31, options, 2) == 1  # one of 32 is little
    assert even(3, (1, 3, 5), 2) == 5  # none is even: the best


def _network(size: int) -> Function:
    net = Builder("net")
    rng = np.random.default_rng(1)
    w = rng.standard_normal((32, 16, 3, 3), np.float32)
    x = net.input("x", (1, 16, size, size))
    return net.function(y=net.relu(net.conv(x, w, pads_begin=(1, 1), pads_end=(1, 1))))


@pytest.mark.parametrize("size", [28, 56])  # seven blocks of tiles
def test_a_block_that_threads_share_has_the_same_bits(size: int) -> None:
    x = np.random.default_rng(2).standard_normal((1, 16, size, size), np.float32)
    modules = [mc.compile(_network(size), threads=n) for n in (1, 2, 3)]
    first, *others = [m(x)[0] for m in modules]
    assert all(first.tobytes() == y.tobytes() for y in others)
    exact = mc.compile(_network(size), threads=1, max_error=0.0)(x)[0]
    assert np.abs(first - exact).max() <= 1e-4 * np.abs(exact).max()
