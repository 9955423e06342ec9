"""Elementary functions: their error bounds in ulp, and special cases. Nightly: all 2**32 float32.

The unit is the distance of neighbouring numbers of the result's type at the exact result. Float32
functions are compared with numpy's float64 ones, float64 with longdouble (80 bits on x86).
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import minicompiler as mc
from minicompiler import te
from minicompiler.codegen import llvm_math
from minicompiler.codegen.llvm import emit
from minicompiler.codegen.native import compile_object
from minicompiler.frontend.builder import Builder
from minicompiler.ir.expr import Call, Const, Expr, binary
from minicompiler.ir.tir import VECTOR
from minicompiler.ir.types import DType, float32, float64
from minicompiler.lower.blocks import hoist_conditions, lower_blocks, unswitch
from minicompiler.lower.to_tir import from_tensors
from minicompiler.ops.evaluate import erf as erf_by_math
from minicompiler.runtime.loader import Library
from minicompiler.schedules.schedule import Schedule
from minicompiler.target import Target

Array = np.ndarray
HOST = Target.host()
CHUNK = 1 << 16
needs_x86 = pytest.mark.skipif(HOST.arch != "x86_64", reason="runs code for x86")
needs_fma = pytest.mark.skipif(not HOST.fma, reason="the bounds hold where fma is an instruction")


class Kernel:
    """An elementwise function of CHUNK numbers at a time, compiled."""

    def __init__(
        self,
        f: Callable[..., Expr],
        dtype: DType,
        args: int = 1,
        vectors: int = 1,
        target: Target = HOST,
        lanes: int | None = None,
    ) -> None:
        xs = [te.placeholder(f"x{k}", (CHUNK,), dtype) for k in range(args)]
        y = te.map_elements(f, *xs, name="y")
        s = Schedule(from_tensors("f", xs, [y]), target)
        (loop,) = s.loops_of("y")
        lanes = lanes or target.vector_bytes // dtype.bytes * vectors
        _, inner = s.split(loop, lanes, "perfect")
        s.mark(inner, VECTOR)
        func = s.func
        for step in (lower_blocks, hoist_conditions, unswitch):
            func = step(func)
        self.text = emit(func, target).text
        self.library = Library(compile_object(self.text, target), ["f"])
        kinds = [ctypes.c_int32, ctypes.c_int32, *[ctypes.c_void_p] * (args + 3)]
        self.call = ctypes.CFUNCTYPE(None, *kinds)(self.library.address("f"))
        self.buffers = [np.zeros(CHUNK, dtype.numpy) for _ in range(args + 1)]

    def run(self) -> None:
        self.call(0, 1, None, *[b.ctypes.data for b in self.buffers], None)

    def __call__(self, *xs: Array) -> Array:
        """The function of any number of values."""
        results = []
        for k in range(0, xs[0].size, CHUNK):
            count = min(CHUNK, xs[0].size - k)
            for b, x in zip(self.buffers, xs, strict=False):
                b[:count] = x[k : k + count]
            self.run()
            results.append(self.buffers[-1][:count].copy())
        return np.concatenate(results)


def largest_error(got: Array, exact: Array) -> tuple[float, int]:
    """(the largest error in ulp, where). `exact` has a longer type; specials must be the same."""
    t = got.dtype
    info = np.finfo(t)
    with np.errstate(all="ignore"):
        rounded = exact.astype(t)
        same_kind = np.isnan(exact) == np.isnan(got)
        same_kind &= np.isinf(rounded) == np.isinf(got)
        # Overflow may come one number early or late, as with any error of an ulp.
        edge = np.abs(exact) >= exact.dtype.type(info.max) * (1 - 4 * exact.dtype.type(info.eps))
        same_kind |= edge & ~np.isnan(got)
        ulp = np.ldexp(exact.dtype.type(info.eps), np.frexp(exact)[1] - 1)
        ulp = np.maximum(ulp, exact.dtype.type(info.smallest_subnormal))
        finite = np.isfinite(rounded) & np.isfinite(got)
        error = np.where(finite, np.abs(got.astype(exact.dtype) - exact) / ulp, 0)
        wrong_zero = (exact == 0) & (got == 0) & (np.signbit(exact) != np.signbit(got))
    error[~same_kind | wrong_zero] = np.inf
    at = int(np.argmax(error))
    return float(error[at]), at


def _sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1) / (1 + e)


def fn(name: str) -> Callable[..., Expr]:
    return lambda x: Call(name, (x,))


# name: (numpy's function, the bound for float32, the bound for float64)
BOUNDS: dict[str, tuple[Callable[..., Any], float, float]] = {
    "exp": (np.exp, 0.92, 1.0),
    "log": (np.log, 0.83, 1.0),
    "sigmoid": (_sigmoid, 5.6, 3.0),
    "tanh": (np.tanh, 4.9, 3.0),
    "erf": (erf_by_math, 6.0, 2.0),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 1.5, 1.5),
    "sin": (np.sin, 0.51, 1.0),
    "cos": (np.cos, 0.51, 1.0),
    "tan": (np.tan, 0.51, 2.0),
    "asin": (np.arcsin, 1.2, 2.0),
    "acos": (np.arccos, 1.2, 2.0),
    "atan": (np.arctan, 1.25, 2.0),
    "sinh": (np.sinh, 0.51, 3.0),
    "cosh": (np.cosh, 0.51, 3.0),
    "asinh": (np.arcsinh, 0.51, 3.0),
    "acosh": (np.arccosh, 0.51, 3.0),
    "atanh": (np.arctanh, 0.51, 3.0),
    "log1p": (np.log1p, 0.51, 2.0),
    "expm1": (np.expm1, 0.51, 2.0),
}

SPECIAL = np.array(
    [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1.1754942e-38,
     1.17549435e-38, 3.4028235e38, -3.4028235e38, 88.72283, 88.722839, 88.72284, -87.33654,
     -87.33655, -103.27893, -103.97208, -103.97209, 0.34657359, 0.625, 0.9277344, 0.5, 2.0,
     0.70710677, 0.70710683, 8388608.5, 2.0**40, 2.0**40 - 65536, 1.5707964, 3.1415927,
     16367173.0 * 2.0**72]
)  # fmt: skip


def around(points: Array, dtype: Any) -> Array:
    """Some numbers and their neighbours."""
    with np.errstate(all="ignore"):
        x = points.astype(dtype)
        sides = [np.nextafter(x, dtype(side)) for side in (np.inf, -np.inf)]
        return np.concatenate([x, *sides])


def sample32(step: int) -> Array:
    bits = np.arange(0, 1 << 32, step, dtype=np.uint64).astype(np.uint32)
    return np.concatenate([bits.view(np.float32), around(SPECIAL, np.float32)])


@needs_fma
@pytest.mark.parametrize("name", BOUNDS)
def test_float32_error_over_a_dense_sample(name: str) -> None:
    exact, bound, _ = BOUNDS[name]
    x = sample32(4099)
    got = Kernel(fn(name), float32)(x)
    with np.errstate(all="ignore"):
        error, at = largest_error(got, exact(x.astype(np.float64)))
    print(f"{name} float32: {error:.3f} ulp at {x[at]!r}")
    assert error <= bound, f"{name}({x[at]!r}) = {got[at]!r}: {error} ulp"


@pytest.mark.nightly
@needs_fma
@pytest.mark.parametrize("name", BOUNDS)
def test_float32_error_over_all_numbers(name: str) -> None:
    exact, bound, _ = BOUNDS[name]
    kernel = Kernel(fn(name), float32)
    worst = 0.0
    for start in range(0, 1 << 32, 1 << 22):
        x = np.arange(start, start + (1 << 22), dtype=np.uint64).astype(np.uint32).view(np.float32)
        with np.errstate(all="ignore"):
            error, at = largest_error(kernel(x), exact(x.astype(np.float64)))
        worst = max(worst, error)
        assert error <= bound, f"{name}({x[at]!r}): {error} ulp"
    print(f"{name} float32: {worst:.3f} ulp")


@needs_fma
def test_exponentials_of_differences() -> None:
    """Of what is never above 0. The error grows with the distance, as that of the argument does."""
    x = np.concatenate([-np.abs(sample32(1009)), np.linspace(-110, 0, 1 << 20, dtype=np.float32)])
    got = Kernel(fn("exp_nonpositive"), float32)(x)
    with np.errstate(all="ignore"):
        exact = np.exp(x.astype(np.float64))
        for low, bound in ((-2.0, 1.9), (-20.0, 2.6), (-math.inf, 4.8)):
            error, at = largest_error(got[~(x < low)], exact[~(x < low)])
            print(f"above {low}: {error:.3f} ulp")
            assert error <= bound, f"{x[~(x < low)][at]!r}: {error} ulp"
    assert np.all(got[x == 0] == 1)


@needs_fma
@pytest.mark.parametrize("factor", [0.70710678, -0.70710678, 3.0, 1e30, 0.0])
def test_erf_of_a_product(factor: float) -> None:
    """A constant factor goes into the polynomials."""
    x, c = sample32(8191), float(np.float32(factor))
    got = Kernel(lambda e: Call("erf", (e * factor,)), float32)(x)
    with np.errstate(all="ignore"):
        error, at = largest_error(got, erf_by_math(x.astype(np.float64) * c))
    # A product that is below the normal numbers is not formed, so it loses nothing there.
    print(f"erf(x * {c}): {error:.3f} ulp")
    assert error <= 6.0, f"erf({x[at]!r} * {c}) = {got[at]!r}: {error} ulp"


LONG = np.longdouble
long_enough = pytest.mark.skipif(np.finfo(LONG).nmant < 63, reason="longdouble is float64 here")


def sample64(name: str) -> Array:
    rng = np.random.default_rng(11)
    most = 2.0**40 if name in ("sin", "cos", "tan") else 1e308
    bits = rng.integers(0, 1 << 64, 60000, dtype=np.uint64, endpoint=False).view(np.float64)
    x = np.concatenate([bits, rng.uniform(-1.5, 1.5, 40000), rng.uniform(-30, 30, 40000),
                        rng.uniform(-760, 760, 20000), rng.uniform(0.99, 1.01, 20000),
                        around(SPECIAL, np.float64)])  # fmt: skip
    return x[~(np.abs(x) > most) | np.isinf(x)]


def erf_long(x: Array) -> Array:
    """math.erf is right to an ulp or so of float64: enough to see errors of several."""
    return erf_by_math(x.astype(np.float64)).astype(LONG)


@needs_fma
@long_enough
@pytest.mark.parametrize("name", BOUNDS)
def test_float64_error(name: str) -> None:
    exact, _, bound = BOUNDS[name]
    x = sample64(name)
    got = Kernel(fn(name), float64)(x)
    with np.errstate(all="ignore"):
        error, at = largest_error(got, (erf_long if name == "erf" else exact)(x.astype(LONG)))
    print(f"{name} float64: {error:.3f} ulp at {x[at]!r}")
    assert error <= bound, f"{name}({x[at]!r}) = {got[at]!r}: {error} ulp"


# ---- powers -------------------------------------------------------------------------------------
POWERS = [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 0.5, -0.5, 2.5, math.inf, -math.inf,
          math.nan, 1e-40, -1e-40, 1e38, -1e38, 1.0000001, 0.9999999, 127.0, 1e10 + 1,
          16777217.0]  # fmt: skip


@needs_fma
@long_enough
@pytest.mark.parametrize(("dtype", "bound"), [(float32, 0.9), (float64, 1.5)])
def test_powers(dtype: DType, bound: float) -> None:
    rng = np.random.default_rng(5)
    pairs = np.array(list(itertools.product(POWERS, POWERS)))
    spread = np.exp(rng.uniform(-80, 80, 50000))
    a = np.concatenate([pairs[:, 0], spread, rng.uniform(0.5, 2, 50000)])
    b = np.concatenate([pairs[:, 1], rng.uniform(-8, 8, 50000), rng.uniform(-700, 700, 50000)])
    a, b = a.astype(dtype.numpy), b.astype(dtype.numpy)
    got = Kernel(lambda x, y: binary("pow", x, y), dtype, 2)(a, b)
    wide = np.float64 if dtype is float32 else LONG
    with np.errstate(all="ignore"):
        error, at = largest_error(got, np.power(a.astype(wide), b.astype(wide)))
    print(f"pow {dtype}: {error:.3f} ulp at {a[at]!r} ** {b[at]!r}")
    assert error <= bound, f"{a[at]!r} ** {b[at]!r} = {got[at]!r}: {error} ulp"


@pytest.mark.parametrize("n", [-8, -3, -2, -1, -0.5, 0, 0.5, 1, 2, 3, 4, 5, 8])
def test_constant_powers(n: float) -> None:
    x = np.concatenate([np.linspace(0.1, 9, 4000), [0.0, -0.0, math.inf, -math.inf, math.nan, -2]])
    x = x.astype(np.float32)
    got = Kernel(lambda e: binary("pow", e, Const(n, float32)), float32)(x)
    with np.errstate(all="ignore"):  # (numpy takes a root where one exponent 0.5 is given)
        error, at = largest_error(got, np.power(x.astype(np.float64), np.full(x.size, float(n))))
    bound = 1.5 if n == -0.5 else max(1.0, abs(n))
    assert error <= bound, f"{x[at]!r} ** {n} = {got[at]!r}: {error} ulp"


@pytest.mark.parametrize("dtype", [float32, float64])
def test_float_remainders_are_exact(dtype: DType) -> None:
    rng = np.random.default_rng(3)
    pairs = np.array(list(itertools.product(POWERS, POWERS)))
    a = np.concatenate([pairs[:, 0], rng.normal(0, 1e6, 20000), np.exp(rng.uniform(-80, 80, 500))])
    b = np.concatenate([pairs[:, 1], rng.normal(0, 10, 20000), np.exp(rng.uniform(-80, 80, 500))])
    a, b = a.astype(dtype.numpy), b.astype(dtype.numpy)
    few = rng.normal(0, 10, 4000).astype(dtype.numpy)  # multiples, and their neighbours
    many = few * rng.integers(1, 1 << 27, 4000).astype(dtype.numpy)
    near = [many, *(np.nextafter(many, np.full_like(many, x)) for x in (-math.inf, math.inf))]
    a, b = np.concatenate([a, *near]), np.concatenate([b, few, few, few])
    # Of a finite number by an infinity of the other sign numpy says that infinity.
    keep = ~(np.isinf(b) & np.isfinite(a) & (np.signbit(a) != np.signbit(b)))
    a, b = a[keep], b[keep]
    got = Kernel(lambda x, y: binary("mod", x, y), dtype, 2)(a, b)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(got, np.remainder(a, b))


def test_remainders_are_vectors() -> None:
    """One division for each, and a call for each lane only where a quotient is large."""
    net = Builder("remainders")
    x, y = net.input("x", (64,)), net.input("y", (64,))
    module = mc.compile(net.function(y=net.fmod(x, y)), target="cpu:avx2", checked=True)
    (text,) = [s.text for s in module.stages if s.name == "llvm"]
    assert text.count("fdiv <") == text.count("fptosi <") == 1


@pytest.mark.parametrize(
    ("name", "limit"), [("exp", 22.0), ("exp", 66.0), ("sin", 2.0**40), ("cos", 2.0**40)]
)
def test_lanes_do_not_depend_on_their_neighbours(name: str, limit: float) -> None:
    """Whether lanes are within a limit is asked for many at once; all ways give the same bits."""
    rng = np.random.default_rng(11)
    groups = [
        np.full(32, limit / 2),  # only the sum of squares is above the limit's
        np.full(32, limit * 0.9999),
        rng.uniform(-limit, limit, 32),
        np.concatenate([rng.uniform(-1, 1, 31), [limit * 1.01]]),
        np.concatenate([rng.uniform(-1, 1, 31), [-math.inf]]),
        np.concatenate([rng.uniform(-1, 1, 31), [math.nan]]),
    ]
    x = np.concatenate(groups).astype(np.float32)
    kernel = Kernel(fn(name), float32, vectors=4)
    mixed = kernel(x)
    for value in np.unique(x):
        alone = kernel(np.full(32, value, np.float32))
        np.testing.assert_array_equal(mixed[x == value], alone[: np.count_nonzero(x == value)])


@needs_fma
def test_what_looks_like_a_shifted_number_is_not_taken_for_one() -> None:
    """The range of exp is asked by bits of a sum: numbers for which it is between 0 and 4, where
    some bits of what is in range are missing, are out of range."""
    near = [k * 2.0**e * math.log(2) / 8 for e in range(14, 24) for k in np.linspace(1, 4, 7)]
    x = np.concatenate([around(np.array(near + [-v for v in near]), np.float32), [-700000.0]])
    x = np.concatenate([x, np.linspace(-800000, -600000, 1 << 18), np.linspace(-100, 100, 1 << 12)])
    x = x.astype(np.float32)
    with np.errstate(all="ignore"):
        error, at = largest_error(Kernel(fn("exp"), float32)(x), np.exp(x.astype(np.float64)))
    assert error <= 0.92, f"exp({x[at]!r}): {error} ulp"


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize(
    "target", [HOST, pytest.param(Target.parse("cpu:sse"), marks=needs_x86)], ids=["host", "sse"]
)
@pytest.mark.parametrize("lanes", [1, 4, 8, 32])
def test_entries_of_a_table(count: int, target: Target, lanes: int) -> None:
    """From a register where there is such an instruction, else from memory; the low bits count."""
    table = [0x3F800000 + 977 * k * k for k in range(count)]
    index = np.random.default_rng(5).integers(0, 1 << 32, CHUNK, np.uint64)

    def pick(x: Expr) -> Expr:
        return llvm_math.bits(llvm_math.lookup(llvm_math.bits(x, llvm_math.UINT32), table), float32)

    kernel = Kernel(pick, float32, lanes=lanes, target=target)
    got = kernel(index.astype(np.uint32).view(np.float32))
    np.testing.assert_array_equal(got.view(np.uint32), np.array(table, np.uint32)[index % count])


def test_generated_code_calls_nothing() -> None:
    for name in BOUNDS:
        lines = [x for x in Kernel(fn(name), float32).text.splitlines() if x.startswith("declare")]
        assert all("@llvm." in x for x in lines), lines
