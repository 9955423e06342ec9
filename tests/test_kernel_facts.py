"""What is read off loop nests, and the reasons that follow from it, on kernels made for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from minicompiler import driver, te
from minicompiler.context import Context, Options
from minicompiler.diagnose import diagnose
from minicompiler.frontend.builder import Builder
from minicompiler.ir.expr import Call, Dim
from minicompiler.ir.graph import Apply, Function, topological
from minicompiler.ir.types import float32, int32
from minicompiler.kernel_facts import Nest, Phase, Work, read_nest
from minicompiler.lower.lift_constants import lift_constants
from minicompiler.lower.to_tir import from_tensors
from minicompiler.machine import Level, Peaks
from minicompiler.schedules.cpu import schedule
from minicompiler.target import Target

AVX2 = Target.parse("cpu:avx2")
N = Dim("n", 1, 4096)
# 100 GFLOP/s: 50 billion vector slots of one element; 10 GB/s from memory, ten times that from L2.
PEAKS = Peaks(2, 1e11, (Level("L2", 10**6, 1e11, 1e11), Level("memory", 10**9, 1e10, 1e10)), 1e-6)


def nest(
    inputs: list[te.Tensor], outputs: list[te.Tensor], constants: list[te.Tensor] | None = None
) -> Nest:
    """As `read_nest` makes it, for a kernel written as tensor expressions."""
    func = from_tensors("kernel", inputs, outputs, constants or [])
    s = schedule(func, AVX2)
    scheduled, _ = lift_constants(s.func)
    return Nest(func, func, scheduled, s.rule, tuple(map(str, s.steps)), (), AVX2)


def product(m: int, n: int, k: int) -> Nest:
    """x[m, k] times constant w[k, n]."""
    x = te.placeholder("x", (m, k), float32)
    w = te.placeholder("w", (k, n), float32)
    (r,) = te.reduce_vars(1)
    y = te.compute((m, n), lambda i, j: x[i, r] * w[r, j], "y", reduce=("sum", {r: k}))
    return nest([x, w], [y], [w])


def each(f: Callable[..., object], *shape: int | Dim) -> Nest:
    """A function of every element."""
    x = te.placeholder("x", shape, float32)
    return nest([x], [te.map_elements(f, x, name="y")])


# ---- counts --------------------------------------------------------------------------------------
def test_products_of_pairs_are_instructions() -> None:
    x, w = te.placeholder("x", (60, 32), int32), te.placeholder("w", (32, 64), int32)
    (r,) = te.reduce_vars(1)
    y = te.compute(
        (60, 64), lambda i, j: Call("dot_pairs", (x[i, r], w[r, j])), "y", ("sum", {r: 32})
    )
    found = nest([x, w], [y], [w]).work({})
    assert (found.flops, found.instructions) == (60 * 64 * 32 * 4, 60 * 64 * 32)
    assert not found.functions and not found.only_moves


def test_attention_of_one_row_is_read_off_its_own_loops() -> None:
    rows, columns = Dim("new", 1, None), Dim("all", 1, None)
    net = Builder("attention")
    q = net.input("q", (1, 2, rows, 16))
    k, v = (net.input(n, (1, 2, columns, 16)) for n in "kv")
    scores = net.softmax(net.matmul(q, net.transpose(k, perm=(0, 1, 3, 2))))
    ctx = Context(AVX2, Options())
    fn = driver.optimise(net.function(y=net.matmul(scores, v)), ctx)
    (group,) = [x for x in topological(fn.results) if isinstance(x, Apply)]
    assert isinstance(group.op, Function)
    kernel = read_nest(group.op, (False,) * len(group.args), AVX2)
    one, many = (kernel.at({"new": n, "all": 64}) for n in (1, 6))
    assert many is kernel and one.steps != many.steps
    work = kernel.work({"new": 1, "all": 64})
    assert work.tail == 1 and work.flops == one.work({"new": 1, "all": 64}).flops > 0
    assert work.instructions < kernel.work({"new": 2, "all": 64}).instructions


def test_a_product_that_fits_its_tiles() -> None:
    w = product(60, 64, 32).work({})
    assert w.flops == w.performed == 60 * 64 * 32 * 2
    assert w.instructions == 60 * 64 * 32  # fused multiply-adds
    assert (w.read, w.weights, w.written) == (4 * 60 * 32, 4 * 32 * 64, 4 * 60 * 64)
    assert w.vectors > 0.95 and w.lanes == 1 and not w.functions and not w.opaque


def test_a_tail_is_computed_and_counted() -> None:
    fitting, over = product(60, 64, 32).work({}), product(61, 64, 32).work({})
    assert fitting.tail == 1
    assert 1 < over.tail < 1.5
    assert over.instructions == pytest.approx(over.tail * 61 * 64 * 32, rel=0.05)


def test_functions_are_what_they_expand_to() -> None:
    add = each(lambda e: e + 1.0, 1000).work({})
    exp = each(lambda e: Call("exp", (e,)), 1000).work({})
    assert add.instructions == 1000 and not add.functions
    assert exp.flops == add.flops == 1000
    assert exp.functions["exp"] == exp.instructions > 5 * add.instructions


def test_what_is_the_same_in_all_lanes_is_told() -> None:
    """x[i, j] / sqrt(s[i]): the root of a row is computed once for each vector of the row."""
    x, s = te.placeholder("x", (50, 640), float32), te.placeholder("s", (50,), float32)
    y = te.compute((50, 640), lambda i, j: x[i, j] / Call("sqrt", (s[i],)), "y")
    w = nest([x, s], [y]).work({})
    assert 0 < w.same < w.instructions / 2
    assert each(lambda e: e / Call("sqrt", (e,)), 50, 640).work({}).same == 0


def test_sizes_are_those_of_the_call() -> None:
    kernel = each(lambda e: e * 2.0, N, 16)
    assert kernel.work({"n": 10}).written == 10 * 16 * 4
    assert kernel.work({"n": 1000}).flops == 16000


def test_a_transposition_only_moves() -> None:
    x = te.placeholder("x", (64, 48), float32)
    w = nest([x], [te.compute((48, 64), lambda i, j: x[j, i], "y")]).work({})
    assert w.only_moves and w.flops == 0 and w.moved == 2 * 4 * 64 * 48
    # Whichever side is contiguous, the other one is not.
    assert not each(lambda e: e + 1.0, 100).work({}).only_moves


def test_threads_that_cannot_share_evenly() -> None:
    phases = (Phase(3, 100.0), Phase(1, 50.0))
    w = dataclasses.replace(product(8, 8, 8).work({}), phases=phases)
    assert w.busy(1) == 1
    # Three iterations on two threads: one does two thirds; then one works alone.
    assert w.busy(2) == pytest.approx(150 / (2 * (100 * 2 / 3 + 50)))
    assert dataclasses.replace(w, phases=(Phase(4, 7.0),)).busy(4) == 1


# ---- reasons -------------------------------------------------------------------------------------
def work(**changes: object) -> Work:
    """A kernel of 1e6 multiply-adds on 100 kB, which keeps all threads and lanes busy."""
    plain = Work(
        flops=2_000_000, performed=2_000_000, instructions=1e6, same=0.0, functions={}, read=50_000,
        written=50_000, weights=0, workspace={}, phases=(Phase(1000, 1e6),), tail=1.0,
        vectors=1.0, lanes=1.0, vector_lanes=8, strided={}, opaque=False,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "seconds", "reason"),
    [
        ({}, 22e-6, "near the limit (arithmetic)"),
        ({"flops": 1000, "performed": 1000, "instructions": 500.0, "read": 10**7}, 1.2e-3,
         "near the limit (memory)"),
        ({"flops": 1000, "performed": 1000, "instructions": 500.0, "read": 10**7}, 2e-3,
         "memory-bound: 5.0 of at most 10.0 GB/s (memory)"),
        ({"flops": 0, "performed": 0, "instructions": 0.0, "read": 5 * 10**6}, 2e-3,
         "layout conversion or copy: moves data only (5.0 MB)"),
        ({"phases": (Phase(3, 1e6),)}, 40e-6, "3 parallel iterations on 2 threads, 75% busy"),
        ({"phases": (Phase(1, 1e6),)}, 40e-6, "1 parallel iteration on 2 threads, 50% busy"),
        ({"tail": 1.5}, 40e-6, "masked tail: 1.50 points computed per point needed"),
        ({"vectors": 0.2}, 140e-6, "scalar code: 80% of the work is not in vector loops"),
        ({"lanes": 0.5}, 45e-6, "narrow vectors: 50% of the lanes are used"),
        ({"same": 4e5}, 30e-6, "not hoisted: 40% of the instructions give the same"),
        ({"functions": {"exp": 9e5}}, 30e-6, "transcendental: 90% of the instructions are exp"),
        ({"workspace": {"pad": 10**7}}, 5e-3, "writes and reads 10.0 MB of workspace (pad)"),
        ({"opaque": True, "phases": (Phase(1, 0.0),)}, 1e-3, "one thread: its order depends"),
        ({"strided": {"p0": 224}}, 1e-3, "strided loads: elements of p0 lie 224 bytes apart"),
        ({}, 1e-3, "no single cause: arithmetic runs at 2% of the full rate"),
        ({}, 2e-6, "small: 2.0 us of work"),
    ],
)  # fmt: skip
def test_the_reason_follows_from_the_facts(
    changes: dict[str, object], seconds: float, reason: str
) -> None:
    found = diagnose(work(**changes), seconds, PEAKS, 10**8)
    assert reason in found.text, found.text
    assert len(found.reasons) <= 2


def test_the_roofline_is_the_larger_of_both_times() -> None:
    compute = diagnose(work(), 40e-6, PEAKS, 0)
    assert (compute.bound, compute.best) == ("compute", pytest.approx(20e-6))
    assert compute.percent == pytest.approx(50)
    memory = diagnose(work(read=10**6, written=10**6), 400e-6, PEAKS, 0)
    assert (memory.bound, memory.best) == ("memory", pytest.approx(200e-6))
    # Weights come from the memory that holds the whole model.
    near, far = (diagnose(work(weights=10**6), 1e-3, PEAKS, r).best for r in (10**5, 10**8))
    assert far == pytest.approx(10**6 / 1e10 + 10**5 / 1e11) and near < far
