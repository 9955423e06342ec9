"""Checked mode: each test makes one kind of mistake that goes unnoticed without checked=True."""

from __future__ import annotations

import ctypes
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from onnx import ModelProto
from onnx_models import attention, conv_net, mlp, model, node, numbers

import minicompiler as mc
from minicompiler import cli, driver, kernel, pipeline
from minicompiler.errors import InternalError, RunError, VerifyError
from minicompiler.ir.expr import TRUE
from minicompiler.ir.graph import Apply, Function, rebuild
from minicompiler.ir.tir import Block, PrimFunc, map_statements
from minicompiler.ir.types import TensorType, float64
from minicompiler.ir.verify_tir import verify_tir
from minicompiler.lower.guards import guard_accesses
from minicompiler.lower.to_tir import lower_function
from minicompiler.passes.fuse import fused_functions
from minicompiler.runtime import checked
from minicompiler.runtime.checked import CheckedModule
from minicompiler.runtime.plan import numpy_dtype
from minicompiler.schedules.schedule import Schedule


def chain() -> ModelProto:
    """Three kernels in a row, two values in the arena."""
    nodes = [node("MatMul", "x w", "a"), node("MatMul", "a w", "b"), node("MatMul", "b w", "y")]
    return model(nodes, {"x": numbers(4, 6)}, ["y"], {"w": numbers(6, 6)})


def logarithm() -> ModelProto:
    nodes = [node("Add", "x x", "a"), node("Log", "a", "b"), node("Neg", "b", "y")]
    return model(nodes, {"x": numbers(4)}, ["y"])


def lookup() -> ModelProto:
    nodes = [node("Gather", "table i", "a"), node("Relu", "a", "y")]
    return model(nodes, {"i": np.zeros(2, np.int64)}, ["y"], {"table": numbers(5, 3)})


def selection() -> ModelProto:
    nodes = [node("Compress", "x c", "z", axis=0), node("Relu", "z", "y")]
    return model(nodes, {"x": numbers(4, 3), "c": np.zeros(4, bool)}, ["y"])


# ---- while compiling ----------------------------------------------------------------------------
def test_a_pass_that_breaks_the_graph_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget_types(fn: Function, ctx: Any) -> Function:
        def change(v: Any, args: Any) -> Any:
            wrong = isinstance(v, Apply) and v.op.name == "log"
            return v.with_(args=args, type=TensorType(v.type.shape, float64)) if wrong else None

        return rebuild(fn, change)

    passes = {**pipeline.GRAPH_PASSES, 3: (forget_types, *pipeline.GRAPH_PASSES[3])}
    monkeypatch.setattr(pipeline, "GRAPH_PASSES", passes)
    with pytest.raises(VerifyError, match='Log "n_b"'):
        mc.compile(logarithm(), checked=True)


def test_a_step_that_leaves_a_buffer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A primitive that forgets what a tail is: the last block of eight reaches over the end."""

    def forget(x: Any) -> Any:
        return x.with_(where=TRUE) if isinstance(x, Block) else None

    def one_mark_too_far(s: Schedule, *args: Any) -> None:
        right(s, *args)
        s.func = s.func.with_(phases=tuple(map_statements(p, forget) for p in s.func.phases))

    right = Schedule.mark
    monkeypatch.setattr(Schedule, "mark", one_mark_too_far)
    m = model([node("Log", "x", "y")], {"x": numbers(13)}, ["y"], shapes={"x": ("n",)})
    with pytest.raises(VerifyError, match="not known to be below"):
        mc.compile(m, checked=True)


def test_sizes_that_the_plan_compares_are_taken_as_equal() -> None:
    """The sum has k + n rows and the result m: only the guard on the call tells that they are
    equal."""
    m = model(
        [node("Concat", "w x", "v", axis=0), node("Add", "v y", "z")],
        {"w": numbers(1), "x": numbers(2), "y": numbers(3)}, ["z"],
        shapes={"w": ("k",), "x": ("n",), "y": ("m",)},
    )  # fmt: skip
    module = mc.compile(m, checked=True)
    assert module(numbers(1), numbers(2), numbers(3))[0].shape == (3,)
    fn = driver.import_model(m)
    (fused,) = fused_functions(pipeline.run(pipeline.GRAPH_PASSES[0], fn))
    with pytest.raises(VerifyError):
        verify_tir(lower_function(fused, (False, False, False)))


def test_what_an_extern_looks_up_in_its_tables_is_guarded() -> None:
    m = model([node("NonZero", "x", "y")], {"x": numbers(2, 3)}, ["y"])
    fn = pipeline.run(pipeline.GRAPH_PASSES[0], driver.import_model(m))
    func = lower_function(next(f for f in fused_functions(fn) if "nonzero" in f.name), (False,))
    with pytest.raises(VerifyError, match="stores to r0"):
        verify_tir(func)
    verify_tir(guard_accesses(func))
    x = np.array([[0, 1, 0], [2, 0, 3]], np.float32)
    assert mc.compile(m, checked=True)(x)[0].tolist() == np.array(np.nonzero(x)).tolist()


def test_a_kernel_from_the_cache_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    mc.compile(logarithm(), checked=False)
    seen: list[PrimFunc] = []
    monkeypatch.setattr(kernel, "verify_tir", lambda f, *args, **how: seen.append(f))
    mc.compile(logarithm(), checked=True)
    assert seen


# ---- while running ------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [mlp, conv_net, attention])
@pytest.mark.parametrize("threads", [1, 2])
def test_checking_changes_no_result(make: Callable[..., ModelProto], threads: int) -> None:
    checked = mc.compile(make("n"), checked=True, threads=threads)
    plain = mc.compile(make("n"), threads=threads)
    assert isinstance(checked, CheckedModule) and not isinstance(plain, CheckedModule)
    for n in (1, 3):
        x = numbers(*[n if isinstance(s, str) else s for s in plain.inputs[0].shape])
        assert np.array_equal(checked(x)[0], plain(x)[0])


def test_an_index_out_of_range_names_its_node() -> None:
    m = mc.compile(lookup(), checked=True)
    assert m(np.array([4, -5]))[0].shape == (2, 3)
    with pytest.raises(RunError, match=r'Gather "n_a" \(net:1\): index 7 is out of bounds') as e:
        m(np.array([1, 7]))
    assert e.value.where.startswith("fused_gather")
    mc.compile(lookup())(np.array([1, 7]))  # moved to the edge


def test_the_first_node_that_makes_nan_is_named() -> None:
    x = np.array([1, 2, -1, 3], np.float32)
    with pytest.raises(RunError, match=r'Log "n_b" \(net:2\) makes NaN'):
        mc.compile(logarithm(), checked=True)(x)
    assert np.isnan(mc.compile(logarithm())(x)[0][2])
    # What comes in may go out.
    given = np.array([1, np.nan, 2, 3], np.float32)
    assert np.isnan(mc.compile(logarithm(), checked=True)(given)[0][1])


def test_the_first_node_that_makes_infinities_is_named() -> None:
    m = mc.compile(logarithm(), checked=True)
    with pytest.warns(RuntimeWarning, match=r'Log "n_b" \(net:2\) makes infinities'):
        m(np.array([1, 0, 1, 3], np.float32))


def test_a_mask_of_minus_infinity_is_no_news() -> None:
    m = model([node("Where", "c x low", "y")], {"c": np.ones(3, bool), "x": numbers(3)}, ["y"],
              {"low": np.float32(-np.inf)})  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (y,) = mc.compile(m, checked=True)(np.array([True, False, True]), numbers(3))
    assert np.isneginf(y[1])


def changed(right: CheckedModule, order: tuple[int, ...], **plan: Any) -> CheckedModule:
    """The module with its calls in another order, and another plan."""
    calls = plan.pop("calls", right.plan.calls)
    made = dataclasses.replace(right.plan, calls=tuple(calls[k] for k in order), **plan)
    parts = (made, right._objects, right._main_object, right._constants, right.target, 1)
    return CheckedModule(*parts, checks=[right.checks[k] for k in order])


def test_a_read_before_a_value_is_made_is_seen() -> None:
    right = mc.compile(chain(), checked=True, threads=1)
    assert isinstance(right, CheckedModule)
    assert changed(right, (0, 1, 2))(numbers(4, 6))[0].shape == (4, 6)
    with pytest.raises(InternalError, match="reads memory that holds no value"):
        changed(right, (1, 0, 2))(numbers(4, 6))


def test_a_read_after_the_end_of_a_lifetime_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that ends the lifetime of every value at once."""
    right = mc.compile(chain(), checked=True, threads=1)
    monkeypatch.setattr(checked._Run, "_needed", lambda *args: False)
    with pytest.raises(InternalError, match="reads memory that holds no value"):
        right(numbers(4, 6))


def test_values_die_with_their_last_reader() -> None:
    m = mc.compile(chain(), checked=True, threads=1)
    m(numbers(4, 6))
    (context,) = m._free
    assert context.memory is not None
    size = m.plan.arena
    assert isinstance(size, int) and size > 0
    arena = (ctypes.c_uint8 * size).from_address(context.memory.address)
    assert (np.frombuffer(arena, np.uint16) == checked.POISON).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_pattern_is_nan_in_every_type(dtype: str) -> None:
    words = np.full(8, checked.POISON, np.uint16)
    assert np.isnan(words.view(numpy_dtype(dtype)).astype(np.float64)).all()


# ---- how to ask for it --------------------------------------------------------------------------
def test_the_environment_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINICOMPILER_CHECKED", "1")
    assert isinstance(mc.compile(lookup()), CheckedModule)


def test_the_command_line_asks_for_it(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(lookup().SerializeToString())
    np.save(tmp_path / "i.npy", np.array([0, 9]))
    args = ["run", str(path), "--input", f"i={tmp_path / 'i.npy'}"]
    result = CliRunner().invoke(cli.main, [*args, "--checked"])
    assert result.exit_code == 2 and 'Gather "n_a"' in result.stderr
    assert CliRunner().invoke(cli.main, args).exit_code == 0


def test_a_saved_module_runs_unchecked(tmp_path: Path) -> None:
    mc.compile(lookup(), checked=True).save(tmp_path / "m.mc")
    assert mc.load(tmp_path / "m.mc")(np.array([0, 9]))[0].shape == (2, 3)


def test_a_selection_of_nothing_is_no_mistake() -> None:
    """Where no element counts, memory holds nothing."""
    m = mc.compile(selection(), checked=True)
    assert m(numbers(4, 3), np.zeros(4, bool))[0].shape == (0, 3)
    assert np.array_equal(m(np.ones((4, 3), np.float32), np.ones(4, bool))[0], np.ones((4, 3)))


def test_a_value_that_is_needed_behind_one_that_is_not_counted_yet() -> None:
    """How large the positions are is not known when the last reader of the rows is looked for."""
    nodes = [
        node("Compress", "x c", "y", axis=1), node("Tile", "x twice", "u"),
        node("NonZero", "u", "p"), node("Transpose", "p", "q"), node("GatherND", "u q", "z"),
    ]  # fmt: skip
    x, c = np.arange(640).reshape(5, 8, 16) % 7 - 3, np.arange(8) % 3 > 0
    m = model(nodes, {"x": x, "c": c}, ["y", "z"], {"twice": np.array([2, 1, 1])})
    y, z = mc.compile(m, threads=1, checked=True)(x, c)
    np.testing.assert_array_equal(y, x[:, c])
    np.testing.assert_array_equal(z, np.tile(x[x != 0], 2))
