"""Law 1: printing is deterministic, and JSON gives back a structurally equal thing."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_graphs import graphs
from tir_samples import SAMPLES

from minicompiler.ir.equal import structurally_equal, tir_equal
from minicompiler.ir.expr import (
    Binary,
    Call,
    Cast,
    Const,
    Dim,
    Expr,
    Load,
    Ramp,
    Select,
    Splat,
    Var,
)
from minicompiler.ir.graph import Constant, Function, Input, apply
from minicompiler.ir.layout import IndexMap
from minicompiler.ir.serial import from_json, to_json
from minicompiler.ir.text import function_text
from minicompiler.ir.tir import Buffer, If, Seq, Store
from minicompiler.ir.types import Loc, TensorType, bool_, float32, int32
from minicompiler.ops import activations, shape
from minicompiler.schedules.cpu import schedule
from minicompiler.target import Target

CHECKED = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def again(obj: Any, arrays: list[np.ndarray] | None = None) -> Any:
    """The object by way of JSON text."""
    return from_json(json.loads(json.dumps(to_json(obj, arrays))), arrays or ())


# ---- expressions --------------------------------------------------------------------------------
LEAVES: st.SearchStrategy[Expr] = st.one_of(
    st.integers(-(2**40), 2**40).map(Const),
    st.floats(width=32).map(lambda v: Const(v, float32)),
    st.booleans().map(lambda v: Const(v, bool_)),
    st.sampled_from((Var("i"), Var("f", float32), Dim("n", 1, 64, 8), Dim("m"))),
)


def bigger(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    ops = st.sampled_from(("add", "mul", "floordiv", "max", "lt", "eq"))
    return st.one_of(
        st.tuples(ops, inner).map(lambda t: Binary(t[0], t[1], t[1])),
        inner.map(lambda e: Cast(int32, e)),
        inner.map(lambda e: Call("exp", (e,))),
        st.tuples(inner, inner).map(lambda t: Select(Const(True, bool_), *t)),
        inner.map(lambda e: Splat(e, 4)),
        inner.map(lambda e: Ramp(e, Const(2), 8)),
    )


@CHECKED
@given(st.recursive(LEAVES, bigger, max_leaves=20))
def test_an_expression_comes_back_as_the_same_object(e: Expr) -> None:
    """Expressions are interned, so equal means identical; nan and -0.0 included."""
    assert again(e) is e
    assert str(again(e)) == str(e)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0, 1e-45, 0.1])
def test_floats_keep_their_bits(value: float) -> None:
    assert again(Const(value, float32)) is Const(value, float32)


def test_layouts_and_types() -> None:
    blocked = IndexMap.blocked(4, 1, 16)
    assert again(blocked) == blocked
    t = TensorType((Dim("n", 1, 8), Const(3)), float32)
    assert again(t) == t
    assert again(float32.with_lanes(8)) is float32.with_lanes(8)


# ---- TIR ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SAMPLES)
def test_tir_comes_back(name: str) -> None:
    func = SAMPLES[name]().func
    assert tir_equal(again(func), func)
    assert str(again(func)) == str(func)
    assert json.dumps(to_json(func)) == json.dumps(to_json(SAMPLES[name]().func))


@pytest.mark.parametrize("name", ["matmul", "conv", "softmax", "transpose"])
def test_scheduled_tir_comes_back(name: str) -> None:
    func = schedule(SAMPLES[name]().func, Target.parse("cpu:avx2")).func
    assert tir_equal(again(func), func)


def test_buffers_stay_shared() -> None:
    b = Buffer("b", float32, (Const(4),), layout=IndexMap.blocked(1, 0, 2))
    i = Var("i")
    s = Seq(
        (Store(b, (i,), Load(b, (i + 1,), i < 3)), If(i < 2, Store(b, (i,), Const(0, float32))))
    )
    back = again(s)
    assert back.stmts[0].buffer is back.stmts[1].then.buffer is back.stmts[0].value.buffer


# ---- graphs -------------------------------------------------------------------------------------
@CHECKED
@given(st.data())
def test_a_graph_comes_back(data: st.DataObject) -> None:
    fn = data.draw(graphs(symbolic=data.draw(st.booleans())))
    arrays: list[np.ndarray] = []
    back = again(fn, arrays)
    assert structurally_equal(back, fn)
    assert function_text(back) == function_text(fn)


def test_constants_are_kept_by_reference() -> None:
    w = np.ones((2, 3), np.float32)
    x = Input("x", TensorType((Const(2), Const(3)), float32))
    y = apply(activations.relu, Constant(w, "w", locs=(Loc("w", "net.onnx", 3),)))
    arrays: list[np.ndarray] = []
    back = again(Function("net", (x,), (y, x)), arrays)
    assert arrays[0] is w and back.results[0].args[0].data is w
    assert back.results[1] is back.params[0]


def test_known_contents_come_back() -> None:
    x = Input("x", TensorType((Dim("n", 1, 8), Const(3)), float32))
    fn = Function("net", (x,), (apply(shape.shape_, x),))
    (back,) = again(fn).results
    assert [str(e) for e in back.contents[0]] == ["n", "3"]


def test_a_deep_graph_needs_no_deep_stack() -> None:
    x = Input("x", TensorType((Const(2),), float32))
    y: Any = x
    for _ in range(3000):
        y = apply(activations.relu, y)
    assert structurally_equal(again(Function("deep", (x,), (y,))), Function("deep", (x,), (y,)))


# ---- what is refused ----------------------------------------------------------------------------
def test_what_cannot_be_written() -> None:
    with pytest.raises(TypeError, match="no part of the IR"):
        to_json(object())
    with pytest.raises(ValueError, match="give a list"):
        to_json(Constant(np.zeros(2, np.float32)))


BAD: list[tuple[Any, str]] = [
    ({"nodes": [["Reduce", 1]], "root": None}, "no IR node is called 'Reduce'"),
    ({"nodes": [["__import__", "os"]], "root": None}, "no IR node"),
    ({"nodes": [["Cast", {"ref": 3}]], "root": None}, "before it is defined"),
    ({"nodes": [], "root": {"op": "frobnicate"}}, "not known to this version"),
    ({"nodes": [], "root": {"data": ["os.system", "true"]}}, "no record is called"),
    ({"nodes": [], "root": {"what": 1}}, "not a value"),
    ({"nodes": [], "root": {}}, "not a value"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda c: c[1])
def test_what_is_no_document(case: tuple[Any, str]) -> None:
    with pytest.raises(ValueError, match=case[1]):
        from_json(case[0])
