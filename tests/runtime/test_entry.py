"""Calls that native code makes without Python: which they are, and that all others are refused."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx_models import numbers

import minicompiler as mc
from minicompiler.errors import RunError
from minicompiler.frontend.builder import Builder
from minicompiler.ir.expr import Dim
from minicompiler.ir.graph import Function
from minicompiler.runtime import entry
from minicompiler.runtime.module import Module
from minicompiler.runtime.plan import Bind, DimSpec, Plan, Size, Tensor
from minicompiler.runtime.pool import region_address
from minicompiler.runtime.shapes import Shapes

HEADS, WIDTH, LAYERS = 2, 8, 3
refused = entry.entry.__wrapped__


def two_by_two() -> Function:
    """a[n, 4], b[n, 4] -> a + b, and the sum of a along the rows."""
    net = Builder("pair")
    n = Dim("n", 1, 64)
    a, b = net.input("a", (n, 4)), net.input("b", (n, 4))
    return net.function(y=net.add(a, b), s=net.reduce_sum(a, axes=(1,)))


def layers(past: int | Dim) -> Function:
    net = Builder("layers")
    q, k, v = (net.input(n, (1, HEADS, 1, WIDTH)) for n in "qkv")
    outputs: dict[str, Any] = {}
    for i in range(LAYERS):
        keys = net.concat(net.input(f"keys{i}", (1, HEADS, past, WIDTH)), k, axis=2)
        values = net.concat(net.input(f"values{i}", (1, HEADS, past, WIDTH)), v, axis=2)
        scores = net.softmax(net.matmul(q, net.transpose(keys, perm=(0, 1, 3, 2))))
        q = net.matmul(scores, values)
        outputs |= {f"keys{i}_": keys, f"values{i}_": values}
    return net.function(y=q, **outputs)


@pytest.fixture
def module() -> Module:
    return mc.compile(two_by_two(), threads=1)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[Module]:
    """The modules of calls that Python makes."""
    seen: list[Module] = []
    usual = Module._call_checked

    def call(self: Module, *arguments: Any) -> Any:
        seen.append(self)
        return usual(self, *arguments)

    monkeypatch.setattr(Module, "_call_checked", call)
    return seen


def test_usual_calls_need_no_python(module: Module, checked: list[Module]) -> None:
    for n in (3, 3, 5, 64, 3):  # new sizes too
        a, b = numbers(n, 4, seed=n), numbers(n, 4, seed=n + 1)
        y, s = np.empty((n, 4), np.float32), np.empty((n, 1), np.float32)
        for out in (None, [y, s], (y, s), [None, s], [y, None]):
            got = module(a, b, out=out)
            np.testing.assert_array_equal(got[0], a + b)
            np.testing.assert_allclose(got[1], a.sum(1, keepdims=True), rtol=1e-5)
            assert out is None or all(o is None or g is o for g, o in zip(got, out, strict=True))
        named = module.run({"b": b, "a": a}, out={"s": s})
        np.testing.assert_array_equal(named["y"], a + b)
        assert named["s"] is s
        module(a, a)  # inputs may overlap each other
    assert not checked


def test_arrays_that_pickle_read_need_no_python(module: Module, checked: list[Module]) -> None:
    """Their dtype is an object of its own. Another byte order or type is not alike."""
    module(A, B)
    a, b = pickle.loads(pickle.dumps((A, B)))
    y = pickle.loads(pickle.dumps(np.zeros((3, 4), np.float32)))
    assert a.dtype is not A.dtype
    np.testing.assert_array_equal(module(a, b, out=[y, None])[0], A + B)
    assert not checked
    for other in (">f4", np.float64, np.int32):
        c = A.astype(pickle.loads(pickle.dumps(np.dtype(other))))
        with contextlib.suppress(RunError):
            np.testing.assert_array_equal(module(c, b)[0], np.asarray(c, np.float32) + B)
    assert len(checked) == 3


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.bool_, ml_dtypes.bfloat16])
def test_other_dtypes_and_fixed_sizes(dtype: Any, checked: list[Module]) -> None:
    net = Builder("same")
    x = net.input("x", (2, 1, 3), np.dtype(dtype).name)
    module = mc.compile(net.function(y=net.transpose(x, perm=(2, 1, 0))))
    given = numbers(2, 1, 3).astype(dtype)
    first, _, last = given.strides
    odd = np.lib.stride_tricks.as_strided(given, given.shape, (first, 1, last))
    assert odd.flags.c_contiguous  # no stride matters along an axis of size 1
    for x_ in (given, odd, given.copy()):
        np.testing.assert_array_equal(module(x_)[0], given.transpose(2, 1, 0))
    assert not checked


class Sub(np.ndarray):
    """A subclass of ndarray."""


A, B = numbers(3, 4), numbers(3, 4, seed=1)
READ_ONLY = np.zeros((3, 4), np.float32)
READ_ONLY.flags.writeable = False
MEMORY = np.zeros(24, np.float32)
INPUTS = {
    "list": A.tolist(),
    "subclass": A.view(Sub),
    "order": np.asfortranarray(A),
    "every second": np.repeat(A, 2, 1)[:, ::2],
    "backwards": A[::-1].copy()[::-1],
    "bytes": A.astype(">f4"),
}
OUTPUTS: dict[str, tuple[Any, str]] = {
    "no list": (np.zeros((2, 3, 4), np.float32), "expected a list or tuple"),
    "one": ([None], "1 outputs given"),
    "dtype": ([np.zeros((3, 4), np.int32), None], "dtype int32"),
    "shape": ([np.zeros((3, 5), np.float32), None], r"shape \[3, 5\]"),
    "rank": ([np.zeros((3, 4, 1), np.float32), None], r"shape \[3, 4, 1\]"),
    "order": ([np.zeros((4, 3), np.float32).T, None], "not C-contiguous"),
    "read-only": ([READ_ONLY, None], "read-only"),
    "no array": ([A.tolist(), None], "is list"),
    "an input": ([A, None], 'overlaps input "a"'),
    "part of an input": ([MEMORY[4:16].reshape(3, 4), None], 'overlaps input "b"'),
    "each other": ([MEMORY[12:].reshape(3, 4), MEMORY[21:].reshape(3, 1)], "overlaps out="),
}


@pytest.mark.parametrize("given", INPUTS.values(), ids=INPUTS.keys())
def test_unusual_inputs_are_read_by_python(
    given: Any, module: Module, checked: list[Module]
) -> None:
    module(A, B)
    for inputs in ((given, B), (A, given)):
        a, b = (np.asarray(x, np.float32) for x in inputs)
        np.testing.assert_array_equal(module(*inputs)[0], a + b)
    assert len(checked) == 2


@pytest.mark.parametrize(("out", "message"), OUTPUTS.values(), ids=OUTPUTS.keys())
def test_outputs_that_do_not_fit_are_refused(
    out: Any, message: str, module: Module, checked: list[Module]
) -> None:
    inputs = (A, MEMORY[:12].reshape(3, 4))
    before = module(*inputs)[0]
    with pytest.raises(RunError, match=message):
        module(*inputs, out=out)
    assert len(checked) == 1
    np.testing.assert_array_equal(module(*inputs)[0], before)


def test_wrong_inputs_are_refused_after_right_ones(module: Module) -> None:
    module(A, B)
    cases: list[tuple[Sequence[np.ndarray], str]] = [
        ((A,), "1 inputs given"),
        ((A, B, B), "3 inputs given"),
        ((A, B[:2]), '"b": axis 0 has size 2, expected 3'),
        ((A, B[0]), '"b" has 1 dimensions'),
        ((numbers(65, 4), numbers(65, 4)), "was compiled for from 1 to 64"),
        ((numbers(3, 5), B), '"a": axis 1 has size 5'),
        ((A.astype(np.int32), B), '"a" has dtype int32'),
    ]
    for inputs, message in cases:
        with pytest.raises(RunError, match=message):
            module(*inputs)
        np.testing.assert_array_equal(module(A, B)[0], A + B)


@pytest.mark.parametrize("past", [6, Dim("past", 0, 64)], ids=["fixed", "growing"])
def test_caches_in_place_need_no_python(past: int | Dim, checked: list[Module]) -> None:
    fn = layers(past)
    grown, plain = mc.compile(fn, caches=True), mc.compile(fn)
    room = numbers(2 * LAYERS, 1, HEADS, 20, WIDTH)
    step = [numbers(1, HEADS, 1, WIDTH, seed=k) for k in range(3)]
    for n in (6, 6) if isinstance(past, int) else (0, 1, 2, 3, 2, 10, 19):
        want = plain(*step, *[np.ascontiguousarray(r) for r in room[:, :, :, :n]])
        got = grown(*step, *room[:, :, :, :n], out=[None, *room[:, :, :, : n + 1]])
        assert all(a.tobytes() == b.tobytes() for a, b in zip(got, want, strict=True))
    assert grown not in checked


def test_caches_that_lie_elsewhere_are_copied_by_python(checked: list[Module]) -> None:
    module = mc.compile(layers(Dim("past", 0, 64)), caches=True)
    step = [numbers(1, HEADS, 1, WIDTH, seed=k) for k in range(3)]
    room = numbers(2 * LAYERS, 1, HEADS, 20, WIDTH)
    out = [None, *room[:, :, :, :6]]
    want = [a.copy() for a in module(*step, *room[:, :, :, :5], out=out)]
    assert not checked
    copies = list(room[:, :, :, :5].copy())
    moved = [*room[1:, :, :, :5], room[0, :, :, :5]]  # the right places in a wrong order
    for past in (copies, [*copies[:1], *room[1:, :, :, :5]]):
        got = module(*step, *past, out=out)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(got, want, strict=True))
    with pytest.raises(RunError, match="overlaps"):
        module(*step, *moved, out=out)
    assert len(checked) == 3


def test_sizes_beyond_64_bits_are_for_python() -> None:
    def plan(size: Size) -> Plan:
        x, y = Tensor("x", "bool", ("n",)), Tensor("y", "bool", (size,))
        n, bind = DimSpec("n", 0, None, 1), Bind("n", 0, 0)
        return Plan((x,), (y,), (n,), (bind,), (), (), (), (("input", 0),), 0, 0, 0, 0)

    assert Shapes(plan(2**64), 1).signature is None
    shapes = Shapes(plan(("mul", "n", 2**62)), 1)
    assert shapes.signature is not None
    for n in (1, 4):
        sizes = shapes.measure([(n,)])
        assert sizes.outputs[0][0] == (n * 2**62,)
        assert (sizes.words is None) == (n == 4)


def test_ten_thousand_calls_keep_no_references(module: Module) -> None:
    y, s = np.empty((3, 4), np.float32), np.empty((3, 1), np.float32)
    objects = (A, B, y, s, A.dtype, None, entry.DONE)
    module(A, B, out=[y, s])
    before = [sys.getrefcount(x) for x in objects]
    for _ in range(10_000):
        module(A, B, out=[y, None])
        module(A, B)
    after = [sys.getrefcount(x) for x in objects]
    assert all(abs(p - q) < 50 for p, q in zip(before, after, strict=True))


def test_where_the_layout_of_arrays_is_another_one(
    module: Module, monkeypatch: pytest.MonkeyPatch, checked: list[Module]
) -> None:
    monkeypatch.setattr(entry, "_layout_is_known", lambda: False)
    module._enter = refused(region_address())
    y = np.empty((3, 4), np.float32)
    for out in (None, [y, None]):
        np.testing.assert_array_equal(module(A, B, out=out)[0], A + B)
    with pytest.raises(RunError, match='overlaps input "a"'):
        module(A, B, out=[A, None])
    assert len(checked) == 3


def test_daemon_threads_end_with_the_process() -> None:
    program = """
        import threading, time
        import numpy as np
        import minicompiler as mc
        from onnx_models import mlp, numbers

        m = mc.compile(mlp("n"), threads=2)
        x = numbers(3, 20)

        def work():
            while True:
                m(x)

        for _ in range(4):
            threading.Thread(target=work, daemon=True).start()
        time.sleep(0.1)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (0, "")
