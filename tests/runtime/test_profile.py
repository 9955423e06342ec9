"""Times per kernel: one for each call of the plan, on the right arguments, without side effects."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx_models import attention, conv_net, mlp, model, node, numbers

import minicompiler as mc
from minicompiler.errors import RunError
from minicompiler.runtime.pool import get_pool
from minicompiler.runtime.profile import profile


@pytest.mark.parametrize("threads", [1, 2])
def test_every_call_is_timed_in_order(threads: int) -> None:
    dims = {"batch": (1, 8), "sequence": (1, 16)}
    module = mc.compile(attention("batch", "sequence"), dims=dims, threads=threads)
    x = numbers(2, 7, 24)
    (before,) = module(x)
    times = profile(module, [x], repeat=3)
    assert [t.kernel for t in times] == [c.kernel for c in module.plan.calls]
    assert all(t.dims == {"batch": 2, "sequence": 7} for t in times)
    assert all(0 <= t.seconds < 1 for t in times) and any(t.seconds for t in times)
    np.testing.assert_array_equal(module(x)[0], before)


def test_more_work_takes_longer() -> None:
    module = mc.compile(conv_net("batch"), dims={"batch": (1, 256)}, threads=1)
    few, many = (
        sum(t.seconds for t in profile(module, [numbers(n, 3, 13, 13)], repeat=5)) for n in (1, 256)
    )
    assert many > 5 * few


def test_a_saved_module_can_be_profiled(tmp_path: object) -> None:
    path = f"{tmp_path}/m.mc"
    mc.compile(mlp()).save(path)
    # A list of numbers is an argument like any other.
    assert len(profile(mc.load(path), [numbers(1, 20).tolist()])) == 2


def test_what_cannot_be_profiled_is_refused() -> None:
    module = mc.compile(mlp(), threads=2)
    with pytest.raises(RunError, match="dtype"):
        profile(module, [np.zeros((1, 20))])
    with get_pool(2).lease(), pytest.raises(RunError, match="another call is using the threads"):
        profile(module, [numbers(1, 20)])


def test_control_flow_is_followed() -> None:
    """Calls in a loop are made as often as it runs, those in a branch only if it is taken."""
    body = helper.make_graph(
        [node("Mul", "s s", "t"), node("Identity", "go", "on")],
        "body",
        [
            helper.make_tensor_value_info("k", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, [3]),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("t", TensorProto.FLOAT, [3]),
        ],
    )
    nodes = [node("ReduceSum", "v", "n", keepdims=0), node("Loop", "n - x", "y", body=body)]
    module = mc.compile(model(nodes, {"v": np.array([1, 2]), "x": numbers(3)}, ["y"]), threads=2)
    x = np.array([1.1, 1.2, 0.3], np.float32)
    (y,) = module(np.array([3, 2]), x)
    np.testing.assert_allclose(y, x**32, rtol=1e-5)
    for trips in (5, 0):
        found = profile(module, [np.array([trips, 0]), x], repeat=2)
        inside = module.plan.regions[0]
        assert {t.times for t in found[inside.start : inside.end]} == {trips}
        assert {t.times for t in found[: inside.start]} == {1}
        assert all(t.seconds == 0 for t in found if not t.times)
