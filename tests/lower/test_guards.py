"""Accesses that nothing proves to stay inside are clamped, and no others are touched."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import NodeProto
from onnx_models import attention, conv_net, mlp, model, node, numbers

import minicompiler as mc
from minicompiler import driver, pipeline, te
from minicompiler.errors import InternalError, VerifyError
from minicompiler.ir.expr import Const, Dim, cast
from minicompiler.ir.graph import Constant, Function, Input, applies, apply
from minicompiler.ir.interp import run
from minicompiler.ir.tir import PrimFunc, script
from minicompiler.ir.types import TensorType, float32, index, int64
from minicompiler.ir.verify_tir import verify_tir
from minicompiler.lower.guards import equal_sizes, guard_accesses, run_time_guards
from minicompiler.lower.to_tir import from_tensors, lower_function
from minicompiler.ops import activations, elementwise


def lookup() -> PrimFunc:
    """r0[i] = x[at[i]]: at may hold anything."""
    x, at = te.placeholder("x", (5,), float32), te.placeholder("at", (3,), int64)
    made = te.compute((3,), lambda i: x[(cast(at[(i,)], index),)], "lookup")
    return from_tensors("lookup", [x, at], [made])


def test_what_data_decides_is_clamped() -> None:
    func = lookup()
    with pytest.raises(VerifyError, match="not known to be >= 0"):
        verify_tir(func)
    guarded = guard_accesses(func)
    verify_tir(guarded)
    assert "max(min(p1[vi0], 4), 0)" in script(guarded)
    x = np.arange(5, dtype=np.float32)
    (got,) = run(guarded, [x, np.array([-7, 3, 99])])
    assert got.tolist() == [0, 3, 4]


def test_a_lookup_within_a_lookup() -> None:
    x, at = te.placeholder("x", (5,), float32), te.placeholder("at", (3,), int64)
    made = te.compute((3,), lambda i: x[(cast(at[(cast(at[(i,)], index),)], index),)], "twice")
    guarded = guard_accesses(from_tensors("twice", [x, at], [made]))
    verify_tir(guarded)
    (got,) = run(guarded, [np.arange(5, dtype=np.float32), np.array([1, 40, 2])])
    assert got.tolist() == [4, 2, 2]


AT = np.array([-7, 3, 99])


def test_of_what_may_be_empty_nothing_is_read_or_written() -> None:
    n = Dim("n", 0, 9)
    x, at = te.placeholder("x", (n,), float32), te.placeholder("at", (3,), int64)
    made = te.compute((3,), lambda i: x[(cast(at[(i,)], index),)], "lookup")
    guarded = guard_accesses(from_tensors("lookup", [x, at], [made]))
    verify_tir(guarded)
    for size, want in ((5, [0, 3, 4]), (0, [0, 0, 0])):
        (got,) = run(guarded, [np.arange(size, dtype=np.float32), AT], {"n": size})
        assert got.tolist() == want


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Gather", "x i", "y")],
        [node("GatherElements", "x j", "y")],
        [node("ScatterElements", "x j u", "y")],
        [node("ScatterND", "x k u", "y")],
        [node("Compress", "u c", "z", axis=0), node("Gather", "z i", "y")],
        [node("Compress", "u c", "z", axis=0), node("ScatterElements", "z j u", "y")],
    ],
)
def test_an_index_into_nothing_touches_no_memory(nodes: list[NodeProto]) -> None:
    inputs = {
        "x": np.zeros((0, 2), np.float32), "u": numbers(2, 2), "c": np.zeros(2, bool),
        "i": np.array([5, -1]), "j": np.ones((2, 2), np.int64), "k": np.ones((2, 1), np.int64),
    }  # fmt: skip
    read = [name for name in inputs if any(name in n.input for n in nodes)]
    m = mc.compile(model(nodes, {name: inputs[name] for name in read}, ["y"]))
    (y,) = m(*[inputs[name] for name in read])
    assert y.shape[1] == 2 and len(y) in (0, 2)


def test_a_result_larger_than_its_type_is_no_kernel() -> None:
    """It would be written past the end of its memory."""
    x = Input("x", TensorType((Const(3),), float32))
    y = apply(activations.relu, x).with_(type=TensorType((Const(2),), float32))
    with pytest.raises(InternalError, match="but computes"):
        lower_function(Function("f", (x,), (y,), fused=True), (False,))


@pytest.mark.parametrize("make", [mlp, conv_net, attention])
def test_proved_accesses_stay_as_they_are(make: object) -> None:
    fn = driver.import_model(make("n"))  # type: ignore[operator]
    fn = pipeline.run(pipeline.GRAPH_PASSES[3], fn, driver.Context(mc.Target.host()))
    kernels = 0
    for v in applies(fn):
        func = lower_function(v.op, tuple(isinstance(a, Constant) for a in v.args))
        assert guard_accesses(func, [fact for fact, _ in run_time_guards(v.op)]) is func
        kernels += 1
    assert kernels > 1


def test_equal_sizes_need_no_guard() -> None:
    """Add of [n + k] and [m]: the call is refused unless they are equal."""
    nodes = [node("Concat", "w x", "v", axis=0), node("Add", "v y", "z")]
    m = model(nodes, {"w": numbers(1), "x": numbers(2), "y": numbers(3)}, ["z"],
              shapes={"w": ("k",), "x": ("n",), "y": ("m",)})  # fmt: skip
    fn = pipeline.run(pipeline.GRAPH_PASSES[0], driver.import_model(m))
    (v,) = applies(fn)
    func = lower_function(v.op)
    facts = [fact for fact, _ in run_time_guards(v.op)]
    assert guard_accesses(func, facts) is func
    assert guard_accesses(func) is not func


def sum_of(*sizes: Dim | Const) -> Function:
    """The kernel that adds vectors of some sizes."""
    vectors = [Input(f"x{k}", TensorType((n,), float32)) for k, n in enumerate(sizes)]
    total = vectors[0]
    for x in vectors[1:]:
        total = apply(elementwise.add, total, x)  # type: ignore[assignment]
    return Function("sum", tuple(vectors), (total,))


def test_equal_sizes_have_one_name_in_a_kernel() -> None:
    n, m, k = Dim("n", 2), Dim("m", 1), Dim("k", 4)
    assert equal_sizes(sum_of(n, m, k)) == {n: k, m: k}
    assert equal_sizes(sum_of(n, m, Const(7))) == {n: Const(7), m: Const(7)}
    assert {b.shape for b in lower_function(sum_of(n, m, k)).params} == {(k,)}
