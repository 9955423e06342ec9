"""Compiled modules: results, arguments and their errors, threads, memory, save and load.

The models are chains of kernels straight from tensor expressions, with dynamic dimensions.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from minicompiler import te
from minicompiler.codegen.launch import emit_main
from minicompiler.codegen.llvm import emit
from minicompiler.codegen.native import compile_object
from minicompiler.errors import RunError
from minicompiler.ir.expr import Dim, Expr, eq, wrap
from minicompiler.ir.graph import Apply, Constant, Function, Input, Item, NoAttrs, Value, type_of
from minicompiler.ir.tir import PARALLEL, For, PrimFunc
from minicompiler.ir.types import DType, TensorType, bfloat16, float32, int64
from minicompiler.lower.blocks import hoist_conditions, lower_blocks, unswitch
from minicompiler.lower.memory import Alias, KernelCall, plan_memory
from minicompiler.lower.to_tir import from_tensors
from minicompiler.runtime import savefile, shapes
from minicompiler.runtime.module import Module, load
from minicompiler.runtime.plan import (
    OPERATIONS,
    Bind,
    Call,
    DimSpec,
    Plan,
    Size,
    Tensor,
    evaluate,
)
from minicompiler.target import Target

HOST = Target.host()
Shape = Sequence[Expr | int]


class Builder:
    """A model under construction: inputs, kernels given as tensor expressions, aliases."""

    def __init__(self) -> None:
        self.params: list[Input] = []
        self.steps: list[KernelCall | Alias] = []
        self.objects: dict[str, bytes] = {}

    def input(self, name: str, shape: Shape, dtype: DType = float32) -> Input:
        self.params.append(Input(name, TensorType(tuple(map(wrap, shape)), dtype)))
        return self.params[-1]

    def call(self, compute: Callable[..., Any], *args: Value | np.ndarray) -> Any:
        """The value (or values) that a kernel made from `compute` gives."""
        name = f"kernel{len(self.objects)}"
        nodes = [Constant(a) if isinstance(a, np.ndarray) else a for a in args]
        tensors = [
            te.placeholder(f"a{k}", type_of(a).shape, type_of(a).dtype) for k, a in enumerate(nodes)
        ]
        made = compute(*tensors)
        results = made if isinstance(made, tuple) else (made,)
        func = parallel(from_tensors(name, tensors, results))
        for step in (lower_blocks, hoist_conditions, unswitch):
            func = step(func)
        emitted = emit(func)
        self.objects[name] = compile_object(emitted.text, HOST)
        types = tuple(TensorType(t.shape, t.dtype) for t in results)
        fused = Function(name, (), (), fused=True)
        several = len(types) > 1
        node = Apply(
            fused, tuple(nodes), NoAttrs(), types if several else types[0],
            layouts=(None,) * len(types),
        )  # fmt: skip

        def values() -> tuple[Value, ...]:
            return tuple(Item(node, k) for k in range(len(types))) if several else (node,)

        self.steps.append(
            KernelCall(name, args, values(), func.dims, emitted.shared, emitted.local)
        )
        # Later users refer to other Item objects of the same result.
        return values() if several else node

    def reshape(self, source: Value, shape: Shape) -> Value:
        made = TensorType(tuple(map(wrap, shape)), type_of(source).dtype)
        result = Apply(Function("view", (), (), fused=True), (source,), NoAttrs(), made)
        self.steps.append(Alias(source, result))
        return result

    def build(
        self, *results: Value, guards: Sequence[tuple[Expr, str]] = (), threads: int = 1
    ) -> Module:
        names = tuple(f"y{k}" for k in range(len(results)))
        fn = Function("model", tuple(self.params), results, result_names=names)
        plan, constants = plan_memory(fn, self.steps, guards)
        main = compile_object(emit_main(plan), HOST)
        return Module(plan, self.objects, main, constants, HOST, threads)


def parallel(func: PrimFunc) -> PrimFunc:
    """The outermost loop of each phase over the threads (it is never a reduction here)."""
    phases = [p.with_(kind=PARALLEL) if isinstance(p, For) else p for p in func.phases]
    return func.with_(phases=tuple(phases))


def matmul(a: te.Tensor, b: te.Tensor) -> te.Tensor:
    (k,) = te.reduce_vars(1)
    shape = (a.shape[0], b.shape[1])
    return te.compute(shape, lambda i, j: a[i, k] * b[k, j], "mm", ("sum", {k: a.shape[1]}))


def softmax(x: te.Tensor) -> te.Tensor:
    e = te.exp(x - te.max(x, -1))
    return e / te.sum(e, -1)


RNG = np.random.default_rng(0)
W = RNG.standard_normal((12, 20)).astype(np.float32)
V = RNG.standard_normal((20, 20)).astype(np.float32)


@pytest.fixture(scope="module")
def mlp() -> Module:
    """x[n, 12] -> h = relu(x W), y0 = h V + h, y1 = softmax(y0); n is 1 to 64."""
    b = Builder()
    x = b.input("x", (Dim("n", 1, 64), 12))
    mm = b.call(matmul, x, W)
    h = b.call(lambda t: te.where(te.map_elements(lambda e: wrap(0.0, float32) < e, t), t, 0.0), mm)
    y = b.call(lambda t, h: t + h, b.call(matmul, h, V), h)
    return b.build(y, b.call(softmax, y))


def mlp_reference(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    h = np.maximum(x @ W, 0)
    y = h @ V + h
    e = np.exp(y - y.max(-1, keepdims=True))
    return y, e / e.sum(-1, keepdims=True)


def with_threads(m: Module, threads: int) -> Module:
    return Module(m.plan, m._objects, m._main_object, m._constants, m.target, threads)


def rows(n: int) -> np.ndarray:
    return np.random.default_rng(n).standard_normal((n, 12)).astype(np.float32)


def same(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> bool:
    return all(np.array_equal(p, q) for p, q in zip(a, b, strict=True))


# ---- results ------------------------------------------------------------------------------------
@pytest.mark.smoke
def test_a_chain_of_kernels_computes_for_every_size(mlp: Module) -> None:
    for n in (1, 2, 7, 64, 3, 1):
        for got, expected in zip(mlp(rows(n)), mlp_reference(rows(n)), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_intermediate_values_share_the_arena(mlp: Module) -> None:
    n = 8
    one = n * 20 * 4
    context_bytes = mlp._shapes.measure([(n, 12)]).arena
    assert one <= context_bytes <= 3 * (one + 64)


def test_one_and_two_threads_give_the_same_bits(mlp: Module) -> None:
    two = with_threads(mlp, 2)
    for n in (1, 5, 64):
        assert same(mlp(rows(n)), two(rows(n)))


def test_threads_wait_for_one_another_between_kernels() -> None:
    n = Dim("n", 1, None)
    b = Builder()
    t: Any = b.input("x", (n, 64))
    for _ in range(8):  # each kernel reads what the other thread wrote

        def reverse(t: te.Tensor) -> te.Tensor:
            return te.compute((n, 64), lambda i, j: t[n - 1 - i, j] + 1.0, "reverse")

        t = b.call(reverse, t)
    m = b.build(t, threads=2)
    x = np.random.default_rng(1).standard_normal((90, 64)).astype(np.float32)
    expected = m(x)[0]
    np.testing.assert_allclose(expected, x + 8, rtol=1e-5)
    for _ in range(100):
        assert np.array_equal(m(x)[0], expected)


def test_results_by_name(mlp: Module) -> None:
    results = mlp.run({"x": rows(3)})
    assert list(results) == ["y0", "y1"]
    assert same(list(results.values()), mlp(rows(3)))


def test_multiple_results_aliases_and_copies() -> None:
    n = Dim("n", 0, 8)
    b = Builder()
    x = b.input("x", (n, 4))
    k = np.arange(4, dtype=np.float32)
    up, down = b.call(lambda t: (t + 1.0, t - 1.0), x)
    flat = b.reshape(up, (n * 4,))
    twice = b.call(lambda t: t * 2.0, b.reshape(down, (n, 2, 2)))
    # Item objects are made anew by graph passes; x, k and `twice` are outputs as they are.
    m = b.build(Item(up.tuple, 0), flat, twice, x, Constant(k), twice, b.reshape(twice, (4 * n,)))
    for size in (3, 0):
        a = np.arange(size * 4, dtype=np.float32).reshape(size, 4)
        got = m(a)
        doubled = ((a - 1) * 2).reshape(size, 2, 2)
        assert same(got, [a + 1, (a + 1).ravel(), doubled, a, k, doubled, doubled.ravel()])
        assert not np.may_share_memory(got[3], a)
        assert not np.may_share_memory(got[2], got[5]) or size == 0


def test_sizes_that_are_expressions() -> None:
    n, m = Dim("n", 1, 9), Dim("m", 1, 9)
    b = Builder()
    x, y = b.input("x", (n, m)), b.input("y", (m * 2 + 1, n // 2 + 1))
    both = b.call(lambda p, q: (te.sum(p, 1), te.sum(q, 0)), x, y)
    module = b.build(*both)
    p = np.ones((5, 4), np.float32)
    q = np.ones((9, 3), np.float32)
    assert same(module(p, q), (np.full((5, 1), 4, "f"), np.full((1, 3), 9, "f")))
    with pytest.raises(RunError, match=r"axis 0 has size 8, expected 9 \(m\*2 \+ 1\)"):
        module(p, q[:8])


def test_sizes_that_cannot_be_compared_while_compiling() -> None:
    n, m = Dim("n", 1, None), Dim("m", 1, None)
    b = Builder()
    x, y = b.input("x", (n,)), b.input("y", (m,))
    steps = [x, y]
    for k in range(4):  # all alive until the end
        steps += [b.call(lambda t, k=k: t + float(k + 1), t) for t in (x, y)]
    steps += [
        b.call(lambda t: te.compute((t.shape[0] // 2 + 1,), lambda i: t[i * 0], "h"), steps[2])
    ]
    total = steps[-1]
    for t in steps[2:-1]:
        total = b.call(lambda t, s: te.map_elements(lambda a, b: a + b, te.sum(t, 0), s), t, total)
    module = b.build(total)
    assert module.plan.named
    for p, q in ((1, 1), (1, 500), (500, 1), (77, 78)):
        (got,) = module(np.full(p, 1, np.float32), np.full(q, 10, np.float32))
        expected = 2 + sum(p * (1 + k) + q * (10 + k) for k in range(1, 5))
        assert got.tolist() == [expected] * (p // 2 + 1)


PROBE = """
define void @probe(i32 %tid, i32 %n, ptr %barrier, ptr %at, ptr %out, ptr %ws) #0 {
  %word = ptrtoint ptr %at to i64
  store i64 %word, ptr %out
  ret void
}
"""


def test_native_offsets_are_those_of_the_plan() -> None:
    big: Size = ("sub", "n", 20)  # negative for small n
    sizes: list[Size] = [0, 64, "n", "$0", big]
    sizes += [(op, a, b) for op in OPERATIONS for a in ("n", big) for b in (7, "$0")]
    sizes += [("floordiv", "n", -3), ("mod", big, -8), ("max", ("mul", "n", "n"), ("mod", "n", 4))]
    plan = Plan(
        inputs=(Tensor("x", "bool", ("n",)),),
        outputs=tuple(Tensor(f"y{k}", "int64", ()) for k in range(len(sizes))),
        dims=(DimSpec("n", 0, None, 1),),
        binds=(Bind("n", 0, 0),),
        guards=(),
        named=(("$0", ("add", ("mul", "n", 3), 1)),),
        calls=tuple(Call("probe", (("arena", s), ("output", k)), ()) for k, s in enumerate(sizes)),
        results=tuple(("output", k) for k in range(len(sizes))),
        constants=0,
        arena=64,
        shared=0,
        local=0,
    )
    main = compile_object(emit_main(plan), HOST)
    m = Module(plan, {"probe": compile_object(PROBE, HOST)}, main, [], HOST, 1)
    for n in (0, 1, 13, 20, 1000):
        got = [int(r) for r in m(np.zeros(n, bool))]
        env = {"n": n, "$0": 3 * n + 1}
        assert [g - got[0] for g in got] == [evaluate(s, env) for s in sizes]


def test_bfloat16_and_bool_constants_survive_a_file(tmp_path: Path) -> None:
    b = Builder()
    x = b.input("x", (4,), bfloat16)
    w = np.array([1, 2, 3, 4], ml_dtypes.bfloat16)
    mask = np.array([True, False, True, True])
    y = b.call(lambda x, w, c: te.where(c, x, w), x, w, mask)
    m = b.build(y, b.call(lambda i: i + 1, np.array([1, 2], np.int64)))
    a = np.array([1, 1, 0.5, -2], ml_dtypes.bfloat16)
    expected = np.array([1, 2, 0.5, -2], ml_dtypes.bfloat16)
    m.save(tmp_path / "m.mc")
    for each in (m, load(tmp_path / "m.mc")):
        got, ints = each(a)
        assert got.dtype == ml_dtypes.bfloat16
        assert np.array_equal(got, expected)
        assert ints.tolist() == [2, 3]


# ---- arguments ----------------------------------------------------------------------------------
def test_other_forms_of_an_input(mlp: Module) -> None:
    a = rows(4)
    expected = mlp(a)
    swapped = a.astype(a.dtype.newbyteorder())
    frozen = a.copy()
    frozen.flags.writeable = False
    unaligned = np.frombuffer(b"x" + a.tobytes(), np.uint8)[1:].view(np.float32).reshape(4, 12)
    for given in (np.asfortranarray(a), swapped, frozen, unaligned, a.tolist(), a.view(Sub)):
        assert same(mlp(given), expected)
    assert same(mlp(Capsule(a)), expected)
    with pytest.raises(RunError, match=r'"x": Capsule cannot be read as an array: no export'):
        mlp(Capsule(None))


class Sub(np.ndarray):
    """A subclass of ndarray."""


class Capsule:
    """An object with nothing but DLPack."""

    def __init__(self, array: np.ndarray | None) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        if self.array is None:
            raise BufferError("no export")
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return (1, 0)


def test_python_numbers_take_the_dtype_only_if_they_fit() -> None:
    b = Builder()
    x, i = b.input("x", ()), b.input("i", (2,), int64)
    m = b.build(b.call(lambda t: t * 2.0, x), b.call(lambda t: t + 1, i))
    assert [r.tolist() for r in m(1.5, [1, 2])] == [3.0, [2, 3]]
    assert [r.tolist() for r in m(3, (True, 2))] == [6.0, [2, 3]]
    assert [r.tolist() for r in m(np.float32(3), np.array([1, 2]))] == [6.0, [2, 3]]
    for x_value, i_value in (
        (1e300, [1, 2]),
        (2**24 + 1, [1, 2]),
        (1.0, [1.5, 2]),
        (1.0, [2**70, 1]),
    ):
        with pytest.raises(RunError, match="do not fit into"):
            m(x_value, i_value)
    with pytest.raises(RunError, match="not a tensor"):
        m(1.0, [[1], [2, 3]])


@pytest.mark.parametrize(
    ("arrays", "phrase"),
    [
        ((), r"0 inputs given, the model has 1: x: float32\[n, 12\]"),
        ((rows(2), rows(2)), "2 inputs given"),
        ((rows(2).astype(np.float64),), '"x" has dtype float64, expected float32'),
        ((rows(2)[0],), r'"x" has 1 dimensions, 2 are expected: shape \[12\]'),
        ((np.zeros((2, 13), np.float32),), r"axis 1 has size 13, expected 12: shape \[2, 13\]"),
        (
            (rows(65),),
            r'"n" is 65 \(axis 0 of input "x"\), the model was compiled for from 1 to 64',
        ),
        ((rows(0),), '"n" is 0'),
    ],
)
def test_a_wrong_argument_is_refused(mlp: Module, arrays: Any, phrase: str) -> None:
    with pytest.raises(RunError, match=phrase):
        mlp(*arrays)


def test_wrong_names_are_refused(mlp: Module) -> None:
    with pytest.raises(RunError, match='no input "X"'):
        mlp.run({"x": rows(1), "X": rows(1)})
    with pytest.raises(RunError, match='input "x" is missing'):
        mlp.run({})
    with pytest.raises(RunError, match='no output "z"'):
        mlp.run({"x": rows(1)}, out={"z": rows(1)})


def test_dimensions_must_agree() -> None:
    n, m = Dim("n", 4, 16, 4), Dim("m", 1, 16)
    b = Builder()
    x, y, z = b.input("x", (n,)), b.input("y", (n,)), b.input("z", (m,))
    total = b.call(lambda a, b, c: a + b + te.sum(c, 0), x, y, z)
    module = b.build(total, guards=[(eq(n, m), "Add at line 3")])
    ones = np.ones(16, np.float32)
    assert module(ones[:8], ones[:8], ones[:8])[0].tolist() == [10.0] * 8
    with pytest.raises(RunError, match=r'"y": axis 0 has size 4, expected 8 \(n\)') as e:
        module(ones[:8], ones[:4], ones[:8])
    assert 'n = 8 is axis 0 of input "x"' in e.value.hint
    with pytest.raises(RunError, match="not a multiple of 4"):
        module(ones[:6], ones[:6], ones[:6])
    with pytest.raises(RunError, match=r"n == m must hold, but they are 8 and 4 \(Add at line 3\)"):
        module(ones[:8], ones[:8], ones[:4])


def test_results_go_into_the_callers_arrays(mlp: Module) -> None:
    expected = mlp(rows(3))
    y0, y1 = np.empty((3, 20), np.float32), np.empty((3, 20), np.float32)
    got = mlp(rows(3), out=[y0, None])
    assert got[0] is y0
    assert same(got, expected)
    named = mlp.run({"x": rows(3)}, out={"y1": y1})
    assert named["y1"] is y1
    assert same([y0, y1], expected)


def test_a_large_result_starts_at_a_cache_line() -> None:
    b = Builder()
    x = b.input("x", (Dim("n", 1, None),))
    m = b.build(b.call(lambda t: t + 1.0, x))
    for n in range(20_000, 20_008):
        (y,) = m(np.zeros(n, np.float32))
        assert y.ctypes.data % 64 == 0
        assert (y.shape, y.flags.writeable, bool((y == 1).all())) == ((n,), True, True)


def test_unsuitable_arrays_for_results_are_refused(mlp: Module) -> None:
    a = np.zeros((3, 20), np.float32)
    x = rows(3)
    frozen = a.copy()
    frozen.flags.writeable = False
    cases: list[tuple[Any, str]] = [
        (a, "expected a list or tuple"),
        ([a], "1 outputs given"),
        ([a.tolist(), None], '"y0" is list, expected a numpy array'),
        ([a.astype(np.float64), None], "dtype float64, expected float32"),
        ([a.astype(">f4"), None], "dtype >f4"),
        ([a[:2], None], r"has shape \[2, 20\], expected \[3, 20\]"),
        ([np.asfortranarray(a), None], "not C-contiguous"),
        ([frozen, None], "read-only"),
        ([a, a], 'overlaps out= for output "y0"'),
    ]
    for given, phrase in cases:
        with pytest.raises(RunError, match=phrase):
            mlp(x, out=given)
    whole = np.zeros(96, np.float32)
    with pytest.raises(RunError, match='overlaps input "x"'):
        mlp(whole[:36].reshape(3, 12), out=[whole[30:90].reshape(3, 20), None])


# ---- threads, memory, processes -----------------------------------------------------------------
def test_many_python_threads_at_once(mlp: Module) -> None:
    m = with_threads(mlp, 2)
    expected = {n: m(rows(n)) for n in range(1, 9)}
    wrong: list[int] = []

    def work(first: int) -> None:
        for k in range(40):
            n = (first + k) % 8 + 1
            if not same(m(rows(n)), expected[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []
    assert 1 <= len(m._free) <= 8


def test_varying_sizes_do_not_leak(mlp: Module) -> None:
    n, k = Dim("n", 1, 3000), Dim("k", 1, 4)
    b = Builder()
    x = b.input("x", (n, k))
    m = b.build(b.call(lambda t: te.sum(t, 0), b.call(lambda t: t + 1.0, x)))
    big = np.ones((3000, 4), np.float32)
    m(big)
    before = resident()
    for step in range(10_000):
        (y,) = m(big[: step % 2999 + 1])
    assert y[0, 0] == 2.0 * (9_999 % 2999 + 1)
    assert len(m._shapes) <= shapes.KEPT
    assert resident() - before < 8 << 20


def resident() -> int:
    """Bytes of memory this process uses."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        pytest.skip("the system does not tell")


def test_an_arena_beyond_the_memory_is_refused_before_it_is_taken() -> None:
    n = Dim("n", 1, None)
    b = Builder()
    x = b.input("x", (n,))
    outer = b.call(lambda t: te.compute((n, n), lambda i, j: t[i] * t[j], "outer"), x)
    m = b.build(b.call(lambda t: te.sum(t, (0, 1)), outer))
    with pytest.raises(RunError, match=r"needs 3725\.\d\d GiB for intermediate values"):
        m(np.ones(1_000_000, np.float32))
    assert m(np.ones(8, np.float32))[0].item() == 64


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_works(mlp: Module) -> None:
    m = with_threads(mlp, 2)
    expected = m(rows(5))
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if same(m(rows(5)), expected) and m._pool.size == 2 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert same(m(rows(5)), expected)


def test_ctrl_c_leaves_the_module_usable(mlp: Module) -> None:
    m = with_threads(mlp, 2)
    expected = m(rows(64))
    # Processes that a shell starts in the background ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    for delay in range(20):
        timer = threading.Timer(0.0005 * delay, signal.raise_signal, [signal.SIGINT])
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            while True:
                m(rows(64))
        timer.join()
    signal.signal(signal.SIGINT, before)
    assert same(m(rows(64)), expected)
    assert same(m(rows(2)), mlp(rows(2)))


# ---- files --------------------------------------------------------------------------------------
def test_a_saved_module_gives_the_same_bits(mlp: Module, tmp_path: Path) -> None:
    path = tmp_path / "mlp.mc"
    mlp.save(path)
    for threads in (1, 2):
        loaded = load(path, threads=threads)
        assert loaded.threads == threads
        assert loaded.plan == mlp.plan
        assert loaded.inputs == mlp.inputs
        assert not loaded._constants[0].flags.owndata
        for n in (1, 13, 64):
            assert same(loaded(rows(n)), mlp(rows(n)))
    loaded.save(path)  # over the file that its constants are mapped from
    assert same(load(path)(rows(4)), mlp(rows(4)))


def test_loading_imports_no_part_of_the_compiler(mlp: Module, tmp_path: Path) -> None:
    mlp.save(tmp_path / "m.mc")
    np.save(tmp_path / "x.npy", rows(3))
    program = """
        import sys
        import numpy as np
        import minicompiler
        m = minicompiler.load("m.mc", threads=1)
        np.save("y.npy", m(np.load("x.npy"))[1])
        parts = ("ir", "ops", "passes", "lower", "codegen", "schedules", "frontend", "te", "driver")
        print([n for n in sys.modules if n.startswith(tuple(f"minicompiler.{p}" for p in parts))])
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (run.stdout.strip(), run.stderr) == ("[]", "")
    assert np.array_equal(np.load(tmp_path / "y.npy"), mlp(rows(3))[1])


def test_a_file_for_another_processor_is_refused(mlp: Module, tmp_path: Path) -> None:
    other = dataclasses.replace(HOST, features=(*HOST.features, "avx1024"))
    m = Module(mlp.plan, mlp._objects, mlp._main_object, mlp._constants, other)
    m.save(tmp_path / "m.mc")
    with pytest.raises(RunError, match=r'"m.mc" uses instructions .* lacks: avx1024'):
        load(tmp_path / "m.mc")
    with pytest.raises(RunError, match=r"this module uses instructions .*avx1024"):
        m(rows(1))


def test_a_file_with_another_content_is_refused(mlp: Module, tmp_path: Path) -> None:
    path = tmp_path / "m.mc"
    savefile.write(path, {"module": 99}, {})
    with pytest.raises(RunError, match="no compiled model that this minicompiler can load"):
        load(path)
    mlp.save(path)
    header, blobs = savefile.read(path)
    blobs = {name: bytes(b) if isinstance(b, memoryview) else b for name, b in blobs.items()}
    for name in ("main", "constant/0", "kernel/kernel1"):
        savefile.write(path, header, {k: v for k, v in blobs.items() if k != name})
        with pytest.raises(RunError, match="not a complete saved module"):
            load(path)
    header["plan"]["calls"][0][1][0] = ["input", 7]
    savefile.write(path, header, blobs)
    with pytest.raises(RunError, match="input 7"):
        load(path)


def test_text(mlp: Module) -> None:
    assert repr(mlp) == (
        "Module(x: float32[n, 12] -> y0: float32[n, 20], y1: float32[n, 20]; "
        f"{HOST.level}, threads=1)"
    )
    with pytest.raises(RunError, match="0 threads"):
        with_threads(mlp, 0)
