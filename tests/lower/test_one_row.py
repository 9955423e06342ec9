"""Attention of any number of rows has loops of its own for a single row."""

from __future__ import annotations

import numpy as np

import minicompiler as mc
from minicompiler import driver
from minicompiler.context import Context, Options
from minicompiler.frontend.builder import Builder
from minicompiler.ir import interp
from minicompiler.ir.expr import Dim
from minicompiler.ir.graph import Apply, Function, topological
from minicompiler.ir.verify_tir import verify_tir
from minicompiler.lens.kernel import making_of
from minicompiler.target import Target

RNG = np.random.default_rng(0)
BATCH, NEW, ALL = Dim("batch", 1, None), Dim("new", 1, None), Dim("all", 1, None)


def attention(batch: int | Dim, rows: int | Dim, columns: int | Dim) -> Function:
    net = Builder("attention")
    q = net.input("q", (batch, 2, rows, 16))
    k, v = (net.input(n, (batch, 2, columns, 16)) for n in "kv")
    scores = net.softmax(net.matmul(q, net.transpose(k, perm=(0, 1, 3, 2))))
    return net.function(y=net.matmul(scores, v))


def numpy_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    e = np.exp(q.astype(np.float64) @ k.swapaxes(2, 3))
    return e / e.sum(-1, keepdims=True) @ v


def doubled(fn: Function) -> bool:
    module = mc.compile(fn, threads=1)
    return any("if new == 1" in s.text for s in module.stages if s.name == "lift_constants")


def test_only_where_one_row_meets_many_columns() -> None:
    assert doubled(attention(1, NEW, ALL))
    assert doubled(attention(BATCH, NEW, 100))
    assert not doubled(attention(1, NEW, NEW))  # one token by itself
    assert not doubled(attention(1, Dim("new", 2, None), ALL))
    assert not doubled(attention(1, 1, ALL))


def test_both_forms_are_right_for_any_number_of_threads() -> None:
    modules = [mc.compile(attention(BATCH, NEW, ALL), threads=t) for t in (1, 2)]
    for batch, rows, columns in ((1, 1, 1), (3, 1, 77), (40, 1, 300), (3, 2, 77), (1, 13, 5)):
        sizes = (rows, columns, columns)
        q, k, v = (RNG.standard_normal((batch, 2, n, 16), np.float32) for n in sizes)
        (one,), (two,) = (m(q, k, v) for m in modules)
        np.testing.assert_allclose(one, numpy_attention(q, k, v), rtol=1e-4, atol=1e-5)
        assert one.tobytes() == two.tobytes()


def test_loops_with_both_forms_verify() -> None:
    fn = attention(1, NEW, 40)
    ctx = Context(Target.host(), Options())
    (group,) = [v for v in topological(driver.optimise(fn, ctx).results) if isinstance(v, Apply)]
    assert isinstance(group.op, Function)
    states = making_of(group.op, (False,) * len(group.args), ctx).states
    for state in states:
        if state.kind == "tir pass":
            verify_tir(state.func, bounds=state.name == "lift_constants")
    for rows in (1, 2):
        arrays = [RNG.standard_normal((1, 2, n, 16), np.float32) for n in (rows, 40, 40)]
        (found,) = interp.run(states[-1].func, arrays, {"new": rows})
        np.testing.assert_allclose(found, numpy_attention(*arrays), rtol=1e-4, atol=1e-5)
