"""Operators: reference = interpreted TIR = compiled kernel. (Law 3, second half.)

Several samples of an operator are one graph with several results, so that compiling costs little.
Then the inputs that samples do not draw: NaN and infinities, every integer type, empty tensors.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tolerance import assert_close

import minicompiler.ops  # noqa: F401
from minicompiler.driver import compile
from minicompiler.errors import ShapeError
from minicompiler.ir import interp
from minicompiler.ir.expr import Const
from minicompiler.ir.graph import Function, Input, Item, Value, apply
from minicompiler.ir.op import REGISTRY, Arg, Op
from minicompiler.ir.types import DType, TensorType, dtype_of
from minicompiler.lower.to_tir import lower_function

Array = np.ndarray
Case = tuple[Op, Sequence[Array | None], Any]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINICOMPILER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def node_of(case: Case, prefix: str) -> tuple[list[Input], list[Value]]:
    """The inputs and results of one application."""
    op, arrays, attrs = case
    args = [
        None
        if a is None
        else Input(f"{prefix}_{k}", TensorType(tuple(map(Const, a.shape)), dtype_of(a)))
        for k, a in enumerate(arrays)
    ]
    node = apply(op, *args, attrs=attrs)
    results: list[Value] = [node]
    if isinstance(node.type, tuple):
        results = [Item(node, k) for k in range(len(node.type))]
    return [a for a in args if a is not None], results


def reference(case: Case) -> list[Array]:
    op, arrays, attrs = case
    with np.errstate(all="ignore"):
        got = op.reference(*arrays, attrs)
    return [np.asarray(r) for r in (got if isinstance(got, tuple) else (got,))]


def compiled(cases: Sequence[Case]) -> list[list[Array]]:
    """The results of each case, from one module."""
    params: list[Input] = []
    results: list[Value] = []
    feeds: list[Array] = []
    counts = []
    for n, case in enumerate(cases):
        inputs, values = node_of(case, f"x{n}")
        params += inputs
        results += values
        counts.append(len(values))
        feeds += [a for a in case[1] if a is not None]
    fn = Function("ops", tuple(params), tuple(results))
    module = compile(fn, threads=1, record=False)
    got = module(*feeds)
    flat = list(got) if isinstance(got, tuple | list) else [got]
    return [[flat.pop(0) for _ in range(n)] for n in counts]


def interpreted(case: Case) -> list[Array]:
    inputs, values = node_of(case, "x")
    func = lower_function(Function("ops", tuple(inputs), tuple(values)))
    return interp.run(func, [a for a in case[1] if a is not None])


def check(case: Case, got: Sequence[Array], want: Sequence[Array]) -> None:
    arrays = [a for a in case[1] if a is not None]
    sizes = [np.abs(a.astype(np.float64)) for a in arrays if a.size and a.dtype != bool]
    finite = [float(s[np.isfinite(s)].max()) for s in sizes if np.isfinite(s).any()]
    length = max((a.size for a in arrays), default=1)
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, length, max([1.0, *finite]))


def small(case: Case) -> bool:
    """Few enough steps for the interpreter."""
    return all(a is None or a.size <= 64 for a in case[1])


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_compiled_and_interpreted_results_equal_the_reference(name: str) -> None:
    op = REGISTRY[name]

    @settings(
        max_examples=2,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def law(data: st.DataObject) -> None:
        cases: list[Case] = [(op, *op.samples(data.draw)) for _ in range(4)]
        for case, got in zip(cases, compiled(cases), strict=True):
            check(case, got, reference(case))
        if small(cases[0]):
            check(cases[0], interpreted(cases[0]), reference(cases[0]))

    law()


# ---- what samples do not draw --------------------------------------------------------------------
def unary_float(op: Op) -> bool:
    """True for functions of one float tensor that keep its shape."""
    one = inspect.Parameter.POSITIONAL_OR_KEYWORD
    if [p.kind for p in inspect.signature(op.infer).parameters.values()] != [one, one]:
        return False
    try:
        t = op.infer(Arg(TensorType((Const(3),), DType("float32"))), op.attrs())
    except ShapeError:
        return False
    return isinstance(t, TensorType) and t.shape == (Const(3),)


VALUES = [math.nan, math.inf, -math.inf, -0.0, 0.0, 1, -1, 0.5, -0.5, 88, -88, 100, -100, 1e-10,
          -1e-10, 1e-4, 30.5, -30.5, 3e4, -3e4, 2.5, 3.5]  # fmt: skip
FLOATS = ("float32", "float64", "float16", "bfloat16")


@pytest.mark.parametrize("dtype", FLOATS)
def test_special_floats_of_one_argument(dtype: str) -> None:
    x = np.array(VALUES).astype(DType(dtype).numpy)
    cases: list[Case] = [
        (op, [x], op.attrs())
        for name, op in sorted(REGISTRY.items())
        if unary_float(op) and name != "bitcast"
    ]
    assert len(cases) > 40
    # Where the result is of the order of 1, exp(x) - 1 and the like cancel.
    at = 8 * float(ml_dtypes.finfo(x.dtype).eps)
    for case, got in zip(cases, compiled(cases), strict=True):
        (want,) = reference(case)
        assert got[0].dtype == want.dtype
        name = case[0].name
        with np.errstate(all="ignore"):
            np.testing.assert_allclose(
                got[0].astype(float), want.astype(float), rtol=4 * at, atol=at, err_msg=name
            )


@pytest.mark.parametrize("dtype", FLOATS)
def test_special_floats_of_two_arguments(dtype: str) -> None:
    some = [*VALUES[:11], 2.5, -7.25]
    x, y = (a.reshape(-1) for a in np.meshgrid(some, some))
    x, y = x.astype(DType(dtype).numpy), y.astype(DType(dtype).numpy)
    names = ("add", "sub", "mul", "div", "minimum", "maximum", "equal", "not_equal", "less",
             "less_equal", "greater", "greater_equal", "power", "fmod")  # fmt: skip
    cases: list[Case] = [(REGISTRY[n], [x, y], REGISTRY[n].attrs()) for n in names]
    for case, got in zip(cases, compiled(cases), strict=True):
        (want,) = reference(case)
        if case[0].name == "fmod":  # numpy's float16 fmod by an infinity is not C's
            keep = ~np.isinf(y.astype(float))
            assert_close(got[0][keep], want[keep])
        else:
            assert_close(got[0], want)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_reductions_and_products_carry_nan_and_infinities(dtype: str) -> None:
    x = np.linspace(-2, 2, 6 * 40).reshape(6, 40).astype(DType(dtype).numpy)
    x[1, 7], x[2, 33], x[3, 5], x[4, 2] = math.nan, math.inf, -math.inf, math.inf
    x[4, 39] = -math.inf
    cases: list[Case] = []
    for name in ("reduce_sum", "reduce_max", "reduce_min", "reduce_mean", "reduce_prod"):
        op = REGISTRY[name]
        cases += [(op, [x], op.attrs(axes=(k,), keepdims=False)) for k in (0, 1)]
    cases.append((REGISTRY["softmax"], [x], REGISTRY["softmax"].attrs(-1)))
    for case, got in zip(cases, compiled(cases), strict=True):
        assert_close(got[0], reference(case)[0], 40)


INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_wrap_and_never_trap(dtype: str) -> None:
    info = np.iinfo(dtype)
    some = [0, 1, 2, 3, 5, 7, 100, info.max, info.max - 1, info.min, info.min + 1, info.max // 2]
    if info.min:
        some += [-1, -2, -3, -7, -100]
    x, y = (a.reshape(-1) for a in np.meshgrid(np.array(some, dtype), np.array(some, dtype)))
    names = ("add", "sub", "mul", "div", "mod", "fmod", "minimum", "maximum", "equal", "less",
             "greater_equal", "bitwise_and", "bitwise_or", "bitwise_xor", "shift_left",
             "shift_right")  # fmt: skip
    cases: list[Case] = [(REGISTRY[n], [x, y], REGISTRY[n].attrs()) for n in names]
    for n in ("neg", "abs", "sign", "square", "relu", "bitwise_not"):
        if n != "neg" or info.min:
            cases.append((REGISTRY[n], [x], REGISTRY[n].attrs()))
    small_base = (x % 7, y % 5)
    cases.append((REGISTRY["power"], small_base, REGISTRY["power"].attrs()))
    for k in (0, 1):
        grid = x.reshape(len(some), -1)
        for n in ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod"):
            op = REGISTRY[n]
            cases.append((op, [grid], op.attrs(axes=(k,), keepdims=False)))
        for n in ("argmax", "argmin"):
            cases.append((REGISTRY[n], [grid], REGISTRY[n].attrs(axis=k)))
    for case, got in zip(cases, compiled(cases), strict=True):
        (want,) = reference(case)
        if case[0].name == "fmod":  # a remainder by zero is no number
            got[0][y == 0] = 0
        np.testing.assert_array_equal(got[0], want, err_msg=case[0].name)
        assert got[0].dtype == want.dtype


@pytest.mark.parametrize("dtype", INTEGERS)
def test_quotients_next_to_whole_numbers(dtype: str) -> None:
    """Where they are computed as floats, they must not be rounded to them."""
    most = np.iinfo(dtype).max
    by = np.unique(np.geomspace(1, most // 2, 200).astype(dtype))
    whole = most // by * by
    x = np.concatenate([whole, whole - 1, whole // 2 // by * by - 1]).astype(dtype)
    y = np.tile(by, 3)
    if np.iinfo(dtype).min:
        x, y = np.concatenate([x, -x, x]), np.concatenate([y, y, -y])
    cases: list[Case] = [(REGISTRY[n], [x, y], REGISTRY[n].attrs()) for n in ("div", "mod")]
    for case, got in zip(cases, compiled(cases), strict=True):
        np.testing.assert_array_equal(got[0], reference(case)[0], err_msg=case[0].name)


@pytest.mark.parametrize("source", [*INTEGERS, *FLOATS, "bool"])
def test_conversions_between_all_types(source: str) -> None:
    cast = REGISTRY["cast"]
    if "float" in source:
        values = [0, -0.0, 1, -1, 0.4, 2.6, 126.9, 300.4, 1.00390625, 1.01171875, 65520, 1e-7]
        with np.errstate(over="ignore"):
            x = np.array(values).astype(DType(source).numpy)
    elif source == "bool":
        x = np.array([False, True])
    else:
        top = np.iinfo(source).max
        x = np.array([0, 1, 2, 100, 127, top // 2, top, top - 1], source)
    targets = [*INTEGERS, *FLOATS, "bool"]
    cases: list[Case] = []
    for to in targets:
        inside = x
        if "float" in source and to in INTEGERS:  # what does not fit has no value
            low, high = (max(np.iinfo(to).min, -1), min(np.iinfo(to).max, 1 << 15))
            inside = x[(x.astype(float) >= low) & (x.astype(float) <= high)]
        cases.append((cast, [inside], cast.attrs(DType(to))))
    for case, got in zip(cases, compiled(cases), strict=True):
        (want,) = reference(case)
        np.testing.assert_array_equal(got[0], want, err_msg=f"{source} -> {want.dtype}")


def test_conversions_to_16_bits_round_once() -> None:
    """Halves between two numbers, and just beside, from float64."""
    rng = np.random.default_rng(2)
    base = rng.normal(0, 100, 4000).astype(np.float16).astype(np.float64)
    step = np.spacing(base.astype(np.float16)).astype(np.float64) / 2
    x = np.concatenate([base + step, base + step * (1 + 2.0**-40), base + step * (1 - 2.0**-40),
                        rng.normal(0, 1e-7, 1000), [65519.999999, 65520, 1e40, -1e40]])  # fmt: skip
    cast = REGISTRY["cast"]
    ((got,),) = compiled([(cast, [x], cast.attrs(DType("float16")))])
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(got, x.astype(np.float16))


def test_empty_tensors() -> None:
    f, i = np.zeros((0, 3), np.float32), np.zeros(0, np.int64)
    sums, cat = REGISTRY["reduce_sum"], REGISTRY["concat"]
    cases: list[Case] = [
        (REGISTRY["exp"], [f], REGISTRY["exp"].attrs()),
        (REGISTRY["add"], [f, np.ones(3, np.float32)], REGISTRY["add"].attrs()),
        (sums, [f], sums.attrs(axes=(0,), keepdims=False)),
        (sums, [f], sums.attrs(axes=(1,), keepdims=True)),
        (sums, [np.zeros((0, 4, 576), np.float32)], sums.attrs(axes=(2,), keepdims=False)),
        (REGISTRY["conv"], [np.zeros((0, 3, 9, 9), np.float32), np.ones((8, 3, 3, 3), np.float32)],
         REGISTRY["conv"].attrs()),
        (REGISTRY["matmul"], [np.zeros((2, 0), np.float32), f], REGISTRY["matmul"].attrs()),
        (REGISTRY["matmul"], [f, np.ones((3, 4), np.float32)], REGISTRY["matmul"].attrs()),
        (REGISTRY["softmax"], [f], REGISTRY["softmax"].attrs(-1)),
        (REGISTRY["gather"], [np.ones((4, 2), np.float32), i], REGISTRY["gather"].attrs(0)),
        (cat, [f, np.ones((2, 3), np.float32)], cat.attrs(0)),
        (REGISTRY["transpose"], [f], REGISTRY["transpose"].attrs((1, 0))),
    ]  # fmt: skip
    for case, got in zip(cases, compiled(cases), strict=True):
        assert_close(got[0], reference(case)[0])
