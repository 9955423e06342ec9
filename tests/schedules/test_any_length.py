"""Lines whose length comes with the call: whole vectors wherever a line has room for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from one_operator import AVX2, scheduled
from tolerance import assert_close

import minicompiler as mc
from minicompiler import te
from minicompiler.codegen.llvm import emit
from minicompiler.frontend.builder import Builder
from minicompiler.ir.expr import Dim, Expr, loads
from minicompiler.ir.tir import VECTOR, For, If, PrimFunc, statements, stores
from minicompiler.ir.types import float32
from minicompiler.lower.blocks import hoist_conditions, lower_blocks, unswitch
from minicompiler.target import Target

N, D = Dim("n", 1, 1 << 20), Dim("d", 1, 1 << 20)
LENGTHS = (1, 2, 5, 7, 8, 9, 15, 31, 32, 33, 40, 63, 64, 77, 100, 131)


def lowered(f: PrimFunc) -> PrimFunc:
    for step in (lower_blocks, hoist_conditions, unswitch):
        f = step(f)
    return f


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# How a builder makes it of x and y, both of (n, d), and what it is.
CASES: dict[str, tuple[Callable[..., Any], Callable[..., np.ndarray]]] = {
    "rows": (
        lambda net, x, y: net.gather(x, np.array([0, 0, -1]), axis=0),
        lambda x, y: x[[0, 0, -1]],
    ),
    "joined": (
        lambda net, x, y: net.concat(x, y, x, axis=1),
        lambda x, y: np.concatenate([x, y, x], 1),
    ),
    "repeated": (lambda net, x, y: net.tile(x, repeats=(2, 3)), lambda x, y: np.tile(x, (2, 3))),
    "around": (
        lambda net, x, y: net.pad(x, begin=(0, 1), end=(0, 1), mode="wrap"),
        lambda x, y: np.pad(x, ((0, 0), (1, 1)), "wrap"),
    ),
    "triangle": (lambda net, x, y: net.trilu(x, upper=False), lambda x, y: np.tril(x)),
    "added": (lambda net, x, y: net.add(net.gather(x, np.array(0), axis=0), y),
              lambda x, y: x[0] + y),
    "maxima": (lambda net, x, y: net.reduce_max(x, axes=(0,)), lambda x, y: x.max(0)[None]),
    "softmax": (lambda net, x, y: net.softmax(x, axis=-1), lambda x, y: softmax(x)),
    "running": (lambda net, x, y: net.cumsum(x, axis=0), lambda x, y: np.cumsum(x, 0)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8", "int64"])
@pytest.mark.parametrize("name", CASES)
def test_lines_of_any_length(name: str, dtype: str) -> None:
    make, want = CASES[name]
    if name == "softmax" and dtype in ("uint8", "int64"):
        dtype = "float64"
    net = Builder("any", {"n": (1, 1000), "d": (1, 1 << 16)})
    x, y = (net.input(k, ("n", "d"), dtype) for k in "xy")
    fn = net.function(z=make(net, x, y))
    one, two = (mc.compile(fn, threads=t) for t in (1, 2))
    rng = np.random.default_rng(0)
    for d in LENGTHS:
        given = [rng.integers(0, 9, (3, d)).astype(dtype) for _ in range(2)]
        (z,) = one(*given)
        assert z.tobytes() == two(*given)[0].tobytes()
        assert_close(z, want(*given).astype(dtype), 8, largest=1.0)


def copied() -> PrimFunc:
    x = te.placeholder("x", (N, D), float32)
    return scheduled(te.compute((N, D), lambda i, j: x[N - 1 - i, j], "y"), x)


def test_copies_are_four_vectors_at_a_time_and_end_with_the_line() -> None:
    f = copied()
    vectors = [str(s.extent) for s in statements(f) if isinstance(s, For) and s.kind is VECTOR]
    assert vectors == ["32", "8", "8"]
    asked = [s for s in statements(lowered(f)) if isinstance(s, If)]
    assert len(asked) == 2  # whether a line has room for a vector, and for each element if not
    text = emit(lowered(f), AVX2).text
    assert text.count("@llvm.masked.store.v8f32") == 2 and "masked.store.v32" not in text
    # Lines are streamed where all of them begin alike, so only the last vector's address is asked.
    assert text.count("ptrtoint") == 2


def test_all_lines_are_shared() -> None:
    """There may be a single image: threads need its lines."""
    x = te.placeholder("x", (N, 64, D), float32)

    def body(i: Expr, j: Expr, k: Expr) -> Expr:
        return x[i, 63 - j, k]

    f = scheduled(te.compute((N, 64, D), body, "y"), x)
    first = next(s for s in statements(f) if isinstance(s, For))
    assert first.kind.value == "parallel" and str(first.extent) == "n*64"


def test_lines_that_are_repeated_are_read_from_their_start() -> None:
    x = te.placeholder("x", (N, D), float32)
    f = lowered(scheduled(te.compute((N * 2, D * 3), lambda i, j: x[i % N, j % D], "y"), x))
    places = [e.indices[1] for s in stores(f.phases[0]) for e in loads(s.value)]
    assert places and not any("%" in str(p) for p in places)


def test_a_line_is_cut_where_it_begins_again() -> None:
    x = te.placeholder("x", (N, D), float32)
    f = lowered(scheduled(te.compute((N, D + 7), lambda i, j: x[i, (j - 5) % D], "y"), x))
    wide = [s for s in statements(f) if isinstance(s, For) and str(s.extent) == "32"]
    assert wide and not any("%" in str(e.indices[1]) for w in wide for s in stores(w)
                            for e in loads(s.value))  # fmt: skip


@pytest.mark.parametrize("level", ["avx2", "sse"])
def test_what_lies_behind_a_line_is_not_fetched_one_by_one(level: str) -> None:
    """Where masks cost nothing: x[min(i + lane, n - 1)] is a masked vector."""
    x = te.placeholder("x", (N, D), float32)
    f = lowered(scheduled(te.max(x, 0, keepdims=False), x))
    limited = [e for p in f.phases for s in stores(p) for e in loads(s.value)
               if any("min(" in str(i) for i in e.indices)]  # fmt: skip
    assert limited
    text = emit(f, Target.parse(f"cpu:{level}")).text
    lane_by_lane = text.count("insertelement <16 x float>") >= 16
    assert lane_by_lane == (level == "sse")
