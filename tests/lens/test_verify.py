"""verify: rounding and bugs told apart, the guilty step named, reproducers that show it alone."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import onnx
import pytest
from lens.faults import FAULTS, Fault
from lens.networks import network
from onnx_models import conv_net, numbers

from minicompiler import driver
from minicompiler.context import Context, Options
from minicompiler.errors import MinicompilerError
from minicompiler.frontend.builder import Builder
from minicompiler.frontend.onnx import load
from minicompiler.frontend.onnx_ops import CONVERTERS
from minicompiler.ir.graph import Function
from minicompiler.ir.layout import IndexMap, axes
from minicompiler.lens.bisect import first_bad
from minicompiler.lens.compare import OK, ROUNDING, WRONG, deviation
from minicompiler.lens.evaluate import Values
from minicompiler.lens.kernel import making_of, run_plain
from minicompiler.lens.memory import from_memory, one_to_one, to_memory
from minicompiler.lens.peer import onnxruntime_values
from minicompiler.lens.reproduce import write
from minicompiler.lens.verify import verify
from minicompiler.target import Target

Array = np.ndarray


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINICOMPILER_CACHE", str(tmp_path / "cache"))


def context(threads: int = 1, level: int = 3) -> Context:
    return Context(Target.parse("cpu"), Options(threads=threads, level=level))


# ---- the whole ----------------------------------------------------------------------------------
@pytest.mark.parametrize("threads", [1, 2])
def test_a_right_model_has_no_culprit(threads: int) -> None:
    fn, feeds = network()
    report = verify(fn, feeds, context(threads))
    assert report.right and report.culprit is None and report.first is None
    assert {r.deviation.verdict for r in report.rows} == {OK}
    named = {r.value: r for r in report.rows}
    # Every value between kernels under the name of the model, then the output of the module.
    assert {"relu_1", "add_2", "matmul_1", "softmax_1"} <= named.keys()
    assert report.rows[-1].value == "y" and report.rows[-1].kernel == ""
    assert named["relu_1"].kernel.startswith("fused_conv")
    assert "batch_norm_1" in named["relu_1"].nodes
    assert all(0 <= r.deviation.relative < 1e-5 for r in report.rows)


ONE_OF_A_KIND = {f.kind: f for f in reversed(FAULTS)}.values()


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(f, id=str(f), marks=() if f in ONE_OF_A_KIND else pytest.mark.nightly)
        for f in FAULTS
    ],
)
def test_the_guilty_step_is_named_and_reproduced(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fn, feeds = network()
    with monkeypatch.context() as patch:
        fault.inject(patch)
        report = verify(fn, feeds, context())
        assert report.culprit is not None and not report.right
        assert (report.culprit.kind, report.culprit.name) == (fault.kind, fault.name)
        script = write(tmp_path / "reproducer", report, context())
        assert exit_code(script) == 1
    # The folder holds what the compiler was given, not what it made of it.
    assert exit_code(script) == 0


def exit_code(script: Path) -> int:
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    return int(stop.value.code or 0)


def test_an_import_that_onnxruntime_disagrees_with_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, feeds = conv_net(), {"x": numbers(1, 3, 13, 13)}
    path = tmp_path / "net.onnx"
    onnx.save(model, path)
    reference = onnxruntime_values(str(path), feeds)
    assert {"a", "c", "e", "y"} <= reference.keys()
    assert verify(load(str(path)), feeds, context(), reference).right

    monkeypatch.setitem(CONVERTERS, "Add", CONVERTERS["Sub"])
    report = verify(load(str(path)), feeds, context(), reference)
    assert report.culprit is not None
    assert (report.culprit.kind, report.culprit.name) == ("import", "sub")
    assert report.culprit.where == 'value "e"'
    assert report.first is not None and report.first.value == "e"


def test_a_fault_that_stops_the_compiler_later_is_still_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A wrong layout may fit no schedule: verify tells the pass, not the schedule's error."""
    fault = next(f for f in FAULTS if f.name == "convert_layout")
    fn, feeds = network()
    fault.inject(monkeypatch)
    with pytest.raises(MinicompilerError):
        driver.build_module(driver.optimise(fn, context()), context())
    report = verify(fn, feeds, context())
    assert report.rows == [] and report.culprit is not None
    assert report.culprit.name == "convert_layout"


# ---- rounding or a bug --------------------------------------------------------------------------
def test_an_ill_conditioned_sum_is_rounding() -> None:
    """Large terms that cancel: numpy and the kernel add in different orders, and both are about as
    far from the float64 result."""
    x = np.random.default_rng(3).uniform(-1e8, 1e8, (1, 4096)).astype(np.float32)
    x[0, -1] -= x.sum(dtype=np.float64)
    net = Builder("sums")
    fn = net.function(y=net.reduce_sum(net.input("x", (1, 4096)), axes=(1,)))
    report = verify(fn, {"x": x}, context())
    assert report.right and report.first is not None
    assert report.first.deviation.verdict == ROUNDING


def test_deviation_measures() -> None:
    want = np.array([1.0, -4.0, 0.5], np.float32)
    exact = want.astype(np.float64)
    same = deviation(want.copy(), want, exact)
    assert (same.absolute, same.relative, same.ulp, same.bound, same.verdict) == (0, 0, 0, 0, OK)
    near = deviation(np.nextafter(want, np.float32(9)), want, exact)
    assert near.ulp == 1.0 and near.verdict == OK
    far = want.copy()
    far[2] += np.float32(0.01)
    apart = deviation(far, want, exact)
    assert apart.verdict == WRONG and apart.bound > 1
    assert apart.absolute == pytest.approx(0.01, rel=1e-5)
    assert apart.relative == pytest.approx(0.0025, rel=1e-5)
    # The reference itself is as far off as the value is: nobody can say which one is right.
    assert deviation(far, want, exact + 0.005).verdict == ROUNDING


@pytest.mark.parametrize(
    "got",
    [
        np.array([1.0, np.inf], np.float32),
        np.array([np.nan, 2.0], np.float32),
        np.array([1.0, 2.0], np.float64),
        np.array([[1.0, 2.0]], np.float32),
    ],
)
def test_what_cannot_be_measured_is_infinitely_wrong(got: Array) -> None:
    want = np.array([1.0, 2.0], np.float32)
    assert deviation(got, want, want.astype(np.float64)).absolute == np.inf
    assert deviation(got, want).verdict == WRONG


def test_special_values_and_integers_are_compared_exactly() -> None:
    special = np.array([np.nan, np.inf, -np.inf, 1.0], np.float32)
    assert deviation(special.copy(), special).verdict == OK
    assert deviation(-special, special).verdict == WRONG
    counts = np.arange(4)
    assert deviation(counts.copy(), counts).verdict == OK
    assert deviation(counts + 1, counts).verdict == WRONG
    empty = np.zeros((0, 3), np.float32)
    assert deviation(empty, empty).verdict == OK


# ---- parts --------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 21])
def test_bisection_finds_the_first_bad_step(count: int) -> None:
    for first in range(count):
        asked: list[int] = []

        def bad(k: int, first: int = first, asked: list[int] = asked) -> bool:
            asked.append(k)
            return k >= first

        assert first_bad(count, bad) == first
        assert len(asked) <= count.bit_length()


def test_float64_values_keep_names_and_shapes() -> None:
    fn, feeds = network()
    narrow, wide = Values(fn, feeds), Values(fn, feeds, wide=True)
    (y,) = narrow.results
    (exact,) = wide.results
    assert y.dtype == np.float32 and exact.dtype == np.float64 and y.shape == exact.shape
    assert 0 < np.abs(y - exact).max() < 1e-6
    assert narrow.dims == {"batch": 2}


@pytest.mark.parametrize("level", [0, 3])
def test_every_state_of_a_kernel_computes_the_same(level: int) -> None:
    fn, feeds = network()
    ctx = context(level=level)
    graph = driver.optimise(fn, ctx)
    values = Values(graph, feeds)
    node = next(v for v in driver.applies(graph) if isinstance(v.op, Function))
    inputs = [values[a] for a in node.args if a is not None]
    constant = tuple(k > 0 for k in range(len(inputs)))
    states = making_of(node.op, constant, ctx).states
    assert states[0].name == "to_tir" and states[-1].name == "unswitch"
    assert ctx.target is not None
    for state in states:
        (got,) = run_plain(state.func, inputs, values.dims, ctx.target)
        assert deviation(got, values[node], length=72).verdict == OK, state.name


def test_memory_in_a_layout_and_back() -> None:
    x = np.arange(2 * 20 * 3, dtype=np.float32).reshape(2, 20, 3)
    blocked = IndexMap.blocked(3, 1, 8)
    raw = to_memory(x, blocked)
    assert raw.shape == (2, 3, 3, 8)
    assert np.isnan(raw).sum() == 2 * 4 * 3  # padding is poisoned
    np.testing.assert_array_equal(raw[1, 2, 0, :4], x[1, 16:20, 0])
    np.testing.assert_array_equal(from_memory(raw, x.shape, blocked), x)
    np.testing.assert_array_equal(from_memory(to_memory(x, None), x.shape, None), x)


def test_layouts_that_collide_are_found() -> None:
    d = axes(2)
    assert one_to_one(IndexMap.blocked(2, 0, 4), (10, 3))
    assert one_to_one(IndexMap.permuted((1, 0)), (10, 3))
    assert not one_to_one(IndexMap(2, (d[0] // 4, d[1], d[0] % 2)), (10, 3))
    assert not one_to_one(IndexMap(2, (d[0], d[0])), (10, 3))
    assert one_to_one(IndexMap(2, (d[0], d[0])), (10, 1))
