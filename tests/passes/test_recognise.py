"""Attention is found in what exporters write, becomes one kernel, and means the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx_models import numbers
from tolerance import assert_close

import minicompiler as mc
from minicompiler.frontend.builder import Builder
from minicompiler.ir.expr import Dim
from minicompiler.ir.graph import Function, Value, applies
from minicompiler.ir.text import function_text
from minicompiler.ir.verify import verify_function
from minicompiler.lower.to_tir import lower_function
from minicompiler.ops.evaluate import run_reference
from minicompiler.passes.fold import fold_constants
from minicompiler.passes.recognise import recognise
from minicompiler.runtime.plan import evaluate
from minicompiler.schedules.cpu import schedule
from minicompiler.target import Target

Size = int | Dim
HEADS, WIDTH = 3, 8


def heads(net: Builder, x: Value, perm: tuple[int, ...] = (0, 2, 1, 3)) -> Value:
    """x[batch, positions, 24] as [batch, 3, positions, 8], or with the last two exchanged."""
    return net.transpose(net.reshape(x, shape=(0, 0, HEADS, WIDTH)), perm=perm)


def inputs(net: Builder, batch: Size, queries: Size, keys: Size) -> tuple[Value, Value, Value]:
    size = HEADS * WIDTH
    return (
        net.input("q", (batch, queries, size)),
        net.input("k", (batch, keys, size)),
        net.input("v", (batch, keys, size)),
    )


def newer_exporter(batch: Size = 2, queries: Size = 5, keys: Size = 7) -> Function:
    """Both operands scaled, an additive mask, rows of NaN replaced by zeros."""
    net = Builder("newer")
    q, k, v = inputs(net, batch, queries, keys)
    mask = net.input("mask", (batch, 1, queries, keys))
    half = np.float32(8**-0.25)
    scores = net.matmul(net.mul(heads(net, q), half), net.mul(heads(net, k, (0, 2, 3, 1)), half))
    p = net.softmax(net.add(scores, mask))
    p = net.where(net.isnan(p), np.zeros((), np.float32), p)
    o = net.transpose(net.matmul(p, heads(net, v)), perm=(0, 2, 1, 3))
    return net.function(y=net.reshape(o, shape=(0, 0, HEADS * WIDTH)))


def older_exporter(batch: Size = 2, queries: Size = 5, keys: Size = 7) -> Function:
    """Scores divided, then masked by a choice."""
    net = Builder("older")
    q, k, v = inputs(net, batch, queries, keys)
    mask = net.input("mask", (queries, keys), "bool")
    scores = net.matmul(heads(net, q), heads(net, k, (0, 2, 3, 1)))
    scores = net.div(scores, np.float32(8**0.5))
    low = np.full((), -1e9, np.float32)
    p = net.softmax(net.where(mask, scores, low))
    o = net.transpose(net.matmul(p, heads(net, v)), perm=(0, 2, 1, 3))
    return net.function(y=net.reshape(o, shape=(0, 0, HEADS * WIDTH)))


def softcapped(batch: Size = 2, queries: Size = 5, keys: Size = 7) -> Function:
    """Scores bounded by tanh, key and value heads shared by all query heads, nothing joined."""
    net = Builder("softcapped")
    q, k, v = inputs(net, batch, queries, keys)
    shared = [net.expand(heads(net, x), shape=(1, HEADS, 1, 1)) for x in (k, v)]
    scores = net.matmul(heads(net, q), net.transpose(shared[0], perm=(0, 1, 3, 2)))
    scores = net.mul(net.tanh(net.div(scores, np.float32(4))), np.float32(4))
    return net.function(y=net.matmul(net.softmax(scores), shared[1]))


GRAPHS: dict[str, Callable[..., Function]] = {
    f.__name__: f for f in (newer_exporter, older_exporter, softcapped)
}


def feeds(fn: Function, batch: int = 2, queries: int = 5, keys: int = 7) -> list[np.ndarray]:
    """q, k, v and a mask that removes some positions, all of them for one row."""
    size = HEADS * WIDTH
    made: list[Any] = [
        numbers(batch, queries, size, seed=1),
        numbers(batch, keys, size, seed=2),
        numbers(batch, keys, size, seed=3),
    ]
    if len(fn.params) == 4:
        keep = np.random.default_rng(4).random((queries, keys)) < 0.7
        if fn.params[3].type.dtype.is_float:
            keep[queries - 1] = False
            every = np.where(keep, 0, -np.inf).astype(np.float32)
            made.append(np.broadcast_to(every, (batch, 1, queries, keys)).copy())
        else:
            made.append(keep)
    return made


def kernels(fn: Function) -> list[str]:
    return [v.op.name for v in applies(fn)]


@pytest.mark.parametrize("name", GRAPHS)
def test_attention_is_one_kernel(name: str) -> None:
    fn = GRAPHS[name]()
    found = recognise(fn, None)
    verify_function(found)
    assert kernels(found)[-1] == "fused_attention"
    assert sum(n == "fused_attention" for n in kernels(found)) == 1
    assert not {"softmax", "matmul", "transpose"} & set(kernels(found))
    for got, want in zip(
        run_reference(found, feeds(fn)), run_reference(fn, feeds(fn)), strict=True
    ):
        assert_close(got, want, 16)


def test_the_function_reads_operands_apart(golden: Callable[[str, str], None]) -> None:
    golden("passes/recognise", function_text(recognise(newer_exporter(), None)))


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 2), (2, 5, 7), (1, 1, 40), (3, 37, 37), (1, 70, 150), (1, 5, 6000)]
)
def test_compiled_attention_is_right(name: str, sizes: tuple[int, int, int]) -> None:
    fn = GRAPHS[name](*sizes)
    values = feeds(fn, *sizes)
    (want,) = run_reference(fn, values)
    for threads in (1, 2):
        (got,) = mc.compile(fn, threads=threads)(*values)
        assert_close(got, want, 256, largest=1)


@pytest.mark.parametrize("name", GRAPHS)
def test_the_same_bits_for_any_batch_and_threads(name: str) -> None:
    fn = GRAPHS[name](Dim("batch", 1, 8), Dim("queries", 1, 64), Dim("keys", 1, 64))
    one, two = (mc.compile(fn, threads=t) for t in (1, 2))
    values = feeds(fn, 3, 21, 33)
    (want,) = one(*values)
    assert_close(want, run_reference(fn, values)[0], 256, largest=1)
    (other,) = two(*values)
    assert other.tobytes() == want.tobytes()
    for b in range(3):
        (part,) = one(*[x[b : b + 1] if len(x) == 3 else x for x in values])
        assert part.tobytes() == want[b : b + 1].tobytes()
    fixed = GRAPHS[name](3, 21, 33)
    (static,) = mc.compile(fixed, threads=1)(*values)
    assert static.tobytes() == want.tobytes()


def test_rows_without_a_key_are_zero() -> None:
    fn = newer_exporter()
    (got,) = mc.compile(fn)(*feeds(fn))
    assert not np.isnan(got).any()
    assert (got[:, 4] == 0).all()


def test_memory_is_linear_in_the_sequence() -> None:
    n_dim = Dim("n", 1, 4096)
    module = mc.compile(newer_exporter(1, n_dim, n_dim), threads=1)
    sizes = []
    for n in (1024, 2048, 4096):
        names, plan = {"n": n}, module.plan
        for name, size in plan.named:
            names[name] = evaluate(size, names)
        sizes.append(sum(evaluate(s, names) for s in (plan.arena, plan.shared, plan.local)))
    assert sizes[2] <= 2.2 * sizes[1] <= 2.2 * 2.2 * sizes[0]


# ---- the ONNX operator ---------------------------------------------------------------------------
OPERATOR: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "plain": ({"q": (2, 3, 4, 8), "k": (2, 3, 6, 8), "v": (2, 3, 6, 8)}, {}),
    "mask": ({"q": (2, 3, 4, 8), "k": (2, 3, 6, 8), "v": (2, 3, 6, 8), "mask": (4, 6)}, {}),
    "causal": ({"q": (1, 3, 6, 8), "k": (1, 3, 6, 8), "v": (1, 3, 6, 8)}, {"is_causal": 1}),
    "softcap": (
        {"q": (1, 3, 4, 8), "k": (1, 3, 6, 8), "v": (1, 3, 6, 8)},
        {"scale": 0.3, "softcap": 2.0},
    ),
    "grouped": ({"q": (2, 6, 4, 8), "k": (2, 3, 6, 8), "v": (2, 3, 6, 8)}, {}),
    "grouped_rows": (
        {"q": (2, 4, 48), "k": (2, 6, 24), "v": (2, 6, 24)},
        {"q_num_heads": 6, "kv_num_heads": 3},
    ),
}


@pytest.mark.parametrize("case", OPERATOR)
def test_the_onnx_operator_is_one_kernel(case: str) -> None:
    shapes, attributes = OPERATOR[case]
    values = {n: numbers(*s, seed=k) for k, (n, s) in enumerate(shapes.items())}
    proto = helper.make_node("Attention", [*shapes], ["y"], **attributes)
    ports = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, v.shape) for n, v in values.items()
    ]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([proto], "attention", ports, [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    (want,) = ReferenceEvaluator(model).run(None, values)
    module = mc.compile(model)
    (got,) = module(*values.values())
    assert_close(got, want, 64, largest=1)
    assert sum("fused_attention" in c.kernel for c in module.plan.calls) == 1
    assert not any("softmax" in c.kernel or "matmul" in c.kernel for c in module.plan.calls)


# ---- causal masks --------------------------------------------------------------------------------
def rows_and_columns(net: Builder, queries: Size, keys: Size) -> tuple[Value, Value]:
    """Positions of queries, which are the last ones of the keys, as a column; of keys as a row."""
    past = keys - queries
    start = net.arange(start=past, limit=past + queries)
    return net.unsqueeze(start, axes=(1,)), net.unsqueeze(net.arange(limit=keys), axes=(0,))


def stored(net: Builder, x: Value, n: int, m: int) -> Value:
    return net.add(x, np.triu(np.full((1, 1, n, m), -np.inf, np.float32), m - n + 1))


def stored_finite(net: Builder, x: Value, n: int, m: int) -> Value:
    lowest = np.finfo(np.float32).min
    return net.add(x, np.triu(np.full((n, m), lowest, np.float32), m - n + 1))


def stored_condition(net: Builder, x: Value, n: int, m: int) -> Value:
    kept = np.tril(np.ones((n, m), bool), m - n)
    return net.where(kept, x, np.full((), -np.inf, np.float32))


def triangle(net: Builder, x: Value, n: int, m: int) -> Value:
    low = net.full(shape=(n, m), value=float("-inf"))
    return net.add(x, net.trilu(low, k=m - n + 1))


def compared(net: Builder, x: Value, n: Size, m: Size) -> Value:
    rows, columns = rows_and_columns(net, n, m)
    kept = net.greater_equal(rows, columns)
    zero, low = (np.full((), v, np.float32) for v in (0, -np.inf))
    return net.add(x, net.where(kept, zero, low))


def chosen(net: Builder, x: Value, n: Size, m: Size) -> Value:
    rows, columns = rows_and_columns(net, n, m)
    return net.where(net.less(rows, columns), np.full((), -1e10, np.float32), x)


CAUSAL = {f.__name__: f for f in (
    stored, stored_finite, stored_condition, triangle, compared, chosen
)}  # fmt: skip


def causal(mask: Callable[..., Value], n: Size, m: Size, batch: Size = 2) -> Function:
    net = Builder("causal")
    q, k, v = inputs(net, batch, n, m)
    x = net.mul(net.matmul(heads(net, q), heads(net, k, (0, 2, 3, 1))), np.float32(8**-0.5))
    return net.function(y=net.matmul(net.softmax(mask(net, x, n, m)), heads(net, v)))


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("sizes", [(7, 7), (5, 9), (40, 40)])
def test_a_causal_mask_is_a_condition(name: str, sizes: tuple[int, int]) -> None:
    fn = causal(CAUSAL[name], *sizes)
    found = recognise(fn, None)
    verify_function(found)
    assert "trilu" in function_text(found)
    *_, call = applies(found)
    assert len(call.args) == 3  # no mask is read
    values = feeds(fn, 2, *sizes)
    (want,) = run_reference(fn, values)
    assert_close(run_reference(found, values)[0], want, 64, largest=1)
    one, two = (mc.compile(fn, threads=t)(*values)[0] for t in (1, 2))
    assert_close(one, want, 64, largest=1)
    assert one.tobytes() == two.tobytes()


def test_causal_for_any_number_of_positions() -> None:
    """The same bits for any batch, and as for fixed sizes; the mask takes no memory."""
    n, past = Dim("n", 1, 256), Dim("past", 0, 256)
    net = Builder("decoder")
    size = HEADS * WIDTH
    q = net.input("q", (Dim("batch", 1, 8), n, size))
    k, v = (net.input(x, (q.type.shape[0], past + n, size)) for x in "kv")
    old = net.input("old", (past,))
    x = net.mul(net.matmul(heads(net, q), heads(net, k, (0, 2, 3, 1))), np.float32(8**-0.5))
    y = net.matmul(net.softmax(compared(net, x, n, past + n)), heads(net, v))
    module = mc.compile(net.function(y=y, old=old), threads=1)
    assert sum(c.kernel.startswith("fused_attention") for c in module.plan.calls) == 1
    assert len(module.plan.calls) == 1
    for rows, before in ((1, 0), (1, 30), (33, 0), (50, 14)):
        fixed = causal(compared, rows, rows + before)
        values = feeds(fixed, 2, rows, rows + before)
        got = module(*values, np.zeros(before, np.float32))[0]
        (want,) = run_reference(fixed, values)
        assert_close(got, want, 256, largest=1)
        part = [x[1:] for x in values]
        assert module(*part, np.zeros(before, np.float32))[0].tobytes() == got[1:].tobytes()


def with_padding(low: float, n: Size) -> Function:
    """Any batch and number of positions; some of the first are padding."""
    net = Builder("with_padding")
    batch = Dim("batch", 1, 8)
    q, k, v = inputs(net, batch, n, n)
    real = net.unsqueeze(net.input("real", (batch, n), "bool"), axes=(1, 2))
    rows, columns = rows_and_columns(net, n, n)
    kept = net.logical_and(net.greater_equal(rows, columns), real)
    mask = net.where(kept, np.zeros((), np.float32), np.full((), low, np.float32))
    x = net.matmul(heads(net, q), heads(net, k, (0, 2, 3, 1)))
    return net.function(y=net.matmul(net.softmax(net.add(x, mask)), heads(net, v)))


@pytest.mark.parametrize("low", [-np.inf, -1e9])
def test_a_mask_of_rows_and_columns_needs_no_memory(low: float) -> None:
    fn = with_padding(low, Dim("n", 2, 4096))
    module = mc.compile(fn, threads=2)
    assert all("attention" in c.kernel or "unsqueeze" in c.kernel for c in module.plan.calls)
    memory = []
    for n in (1024, 2048, 4096):
        names = {"batch": 2, "n": n}
        for name, size in module.plan.named:
            names[name] = evaluate(size, names)
        memory.append(sum(evaluate(s, names) for s in (module.plan.arena, module.plan.shared)))
    assert memory[2] <= 2.2 * memory[1] <= 2.2 * 2.2 * max(memory[0], 1)
    size = HEADS * WIDTH
    values: list[np.ndarray] = [numbers(2, 37, size, seed=k) for k in range(3)]
    real = np.ones((2, 37), bool)
    real[1, 1:5] = False
    (want,) = run_reference(fn, [*values, real])
    (got,) = module(*values, real)
    assert_close(got, want, 256, largest=1)


@pytest.mark.parametrize("n", [Dim("n", 2, 4096), 40])
def test_padding_beside_a_causal_mask_leaves_half_out(n: Size) -> None:
    fn = fold_constants(with_padding(-np.inf, n), None)  # 40: the triangle is stored by then
    *_, call = applies(recognise(fn, None))
    assert isinstance(call.op, Function)
    s = schedule(lower_function(call.op), Target.parse("cpu:avx2"))
    assert "truncate" in [step.primitive for step in s.steps]


def other_triangle(net: Builder, x: Value, n: int, m: int) -> Value:
    """Rows up to the diagonal are masked, and only it is left of the last one."""
    return net.add(x, np.tril(np.full((n, m), -np.inf, np.float32), -1))


def not_one(net: Builder, x: Value, n: int, m: int) -> Value:
    mask = np.triu(np.full((n, m), -np.inf, np.float32), 1)
    mask[2, 4] = 0
    return net.add(x, mask)


def without_a_row(net: Builder, x: Value, n: int, m: int) -> Value:
    """The first row has no column: it is not a number, which must not change."""
    return net.add(x, np.triu(np.full((n, m), -np.inf, np.float32), 0))


def small_numbers(net: Builder, x: Value, n: int, m: int) -> Value:
    """Scores may be lower than this."""
    return net.add(x, np.triu(np.full((n, m), -1e4, np.float32), 1))


def padded(net: Builder, x: Value, n: int, m: int) -> Value:
    """With a second mask, all of a row may be masked by finite numbers: its mean is taken."""
    x = net.add(x, np.triu(np.full((n, m), -1e9, np.float32), 1))
    padding = np.zeros((1, m), bool)
    padding[0, :2] = True
    return net.where(padding, np.full((), -1e9, np.float32), x)


@pytest.mark.parametrize("mask", [other_triangle, not_one, without_a_row, small_numbers, padded])
def test_another_mask_is_read(mask: Callable[..., Value]) -> None:
    fn = causal(mask, 6, 6)
    found = recognise(fn, None)
    assert kernels(found)[-1] == "fused_attention"
    assert "trilu" not in function_text(found)
    values = feeds(fn, 2, 6, 6)
    with np.errstate(all="ignore"):
        (want,) = run_reference(fn, values)
        (got,) = mc.compile(fn)(*values)
    assert (np.isnan(got) == np.isnan(want)).all()
    assert_close(np.nan_to_num(got), np.nan_to_num(want), 64, largest=1)


# ---- what stays apart ----------------------------------------------------------------------------
def test_weights_that_are_returned_stay() -> None:
    net = Builder("returned")
    q, k, v = inputs(net, 2, 5, 7)
    p = net.softmax(net.matmul(heads(net, q), heads(net, k, (0, 2, 3, 1))))
    fn = net.function(y=net.matmul(p, heads(net, v)), p=p)
    assert recognise(fn, None) is fn


def test_a_softmax_over_another_axis_stays() -> None:
    net = Builder("axis")
    q, k, v = inputs(net, 2, 5, 7)
    p = net.softmax(net.matmul(heads(net, q), heads(net, k, (0, 2, 3, 1))), axis=1)
    fn = net.function(y=net.matmul(p, heads(net, v)))
    assert recognise(fn, None) is fn


def test_products_with_weights_stay() -> None:
    net = Builder("weights")
    x = net.input("x", (5, 8))
    p = net.softmax(net.matmul(x, numbers(8, 9)))
    fn = net.function(y=net.matmul(p, numbers(9, 4)))
    assert recognise(fn, None) is fn


def test_a_mask_that_adds_a_batch_stays() -> None:
    net = Builder("widened")
    q, k = net.input("q", (1, 5, 8)), net.input("k", (1, 8, 7))
    v, mask = net.input("v", (3, 7, 4)), net.input("mask", (3, 5, 7))
    p = net.softmax(net.add(net.matmul(q, k), mask))
    fn = net.function(y=net.matmul(p, v))
    assert recognise(fn, None) is fn


def test_attention_in_front_of_a_convolution() -> None:
    """Over the pixels of an image; the convolution asks for blocks of channels."""
    net = Builder("visformer")
    q, k, v = (net.input(x, (1, HEADS, 16, 36)) for x in "qkv")
    p = net.softmax(net.matmul(net.transpose(q, perm=(0, 1, 3, 2)), k))
    y = net.matmul(p, net.transpose(v, perm=(0, 1, 3, 2)))
    image = net.reshape(net.transpose(y, perm=(0, 1, 3, 2)), shape=(1, 16 * HEADS, 6, 6))
    weights = np.random.default_rng(0).standard_normal((32, 16 * HEADS, 1, 1), np.float32)
    fn = net.function(y=net.conv(image, weights))
    module = mc.compile(fn, threads=1)
    assert sum(c.kernel.startswith("fused_attention") for c in module.plan.calls) == 1
    values = [numbers(1, HEADS, 16, 36, seed=seed) for seed in range(3)]
    assert_close(module(*values)[0], run_reference(fn, values)[0], 256, largest=8)
