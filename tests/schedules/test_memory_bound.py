"""Transposes, long reductions, elementwise work and streamed results: right, and the same bits for
any number of threads."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from one_operator import AVX2, run, scheduled

import minicompiler as mc
from minicompiler import te
from minicompiler.codegen.llvm import emit
from minicompiler.errors import ScheduleError
from minicompiler.frontend.builder import Builder
from minicompiler.ir import interp
from minicompiler.ir.expr import (
    FALSE,
    TRUE,
    ZERO,
    Dim,
    Expr,
    binary,
    cast,
    select,
)
from minicompiler.ir.layout import IndexMap
from minicompiler.ir.tir import (
    PARALLEL,
    UNROLL,
    VECTOR,
    For,
    statements,
    stores,
)
from minicompiler.ir.types import DType, float16, float32
from minicompiler.ir.verify_tir import verify_tir
from minicompiler.lower.blocks import hoist_conditions, lower_blocks, unswitch
from minicompiler.lower.to_tir import from_tensors
from minicompiler.schedules.cpu import schedule
from minicompiler.schedules.schedule import Schedule
from minicompiler.target import Target


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("shape", "perm"),
    [
        ((37, 101), (1, 0)),
        ((16, 16), (1, 0)),
        ((5, 19, 77), (0, 2, 1)),
        ((3, 9, 7, 21), (0, 3, 1, 2)),
        ((3, 21, 7, 9), (0, 2, 3, 1)),
        ((2, 17, 33, 9), (3, 2, 1, 0)),
        ((40, 49, 21), (0, 2, 1)),  # more than one thread's
        ((300, 5, 12), (0, 2, 1)),
        ((2, 7, 100), (0, 2, 1)),
        ((4, 6, 7, 8), (1, 2, 3, 0)),
    ],
)
def test_transposes(shape: tuple[int, ...], perm: tuple[int, ...], dynamic: bool) -> None:
    rng = np.random.default_rng(0)
    for dtype in ("float32", "float64", "int8", "bool", "float16"):
        x = (rng.standard_normal(shape) * 9).astype(dtype)
        np.testing.assert_array_equal(run("transpose", x, dynamic, perm=perm), x.transpose(perm))


@pytest.mark.parametrize(("dtype", "lanes"), [("float32", ["8", "16"]), ("uint8", ["8", "32"])])
def test_a_transpose_reads_and_writes_vectors(dtype: str, lanes: list[str]) -> None:
    x = te.placeholder("x", (64, 96), DType(dtype))
    f = scheduled(te.compute((96, 64), lambda i, j: x[j, i], "y"), x)
    loops = [s for s in statements(f) if isinstance(s, For)]
    into, out_of = (str(s.extent) for s in loops if s.kind is VECTOR)
    assert [into, out_of] == lanes
    assert sum(s.kind is UNROLL for s in loops) == 2


@pytest.mark.parametrize(
    ("shape", "tile"), [((64, 12, 49), 8), ((64, 5, 100), 4), ((64, 100, 7), 4), ((3, 20, 20), 8)]
)
def test_small_matrices_are_turned_without_masks(shape: tuple[int, int, int], tile: int) -> None:
    """The last tile of a line begins where it ends with it."""
    n, rows, columns = shape
    x = te.placeholder("x", shape, float32)
    f = scheduled(te.compute((n, columns, rows), lambda b, i, j: x[b, j, i], "y"), x)
    text = str(f)
    assert "where" not in text and f"float32[{tile}, {tile}] register" in text, text
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    np.testing.assert_array_equal(interp.run(f, [values])[0], values.transpose(0, 2, 1))


@pytest.mark.parametrize("channels", [32, 24, 58])
@pytest.mark.parametrize("size", [8, 13])
def test_blocks_of_channels_become_rows(channels: int, size: int) -> None:
    """With the sum of two images: both are read in vectors of channels, written in pixels."""
    x, y = (te.placeholder(n, (2, channels, size, size), float32) for n in "xy")
    total = te.compute(x.shape, lambda *i: x[i] + y[i], "total")
    blocked = IndexMap.blocked(4, 1, 24 if channels == 24 else 16)
    f = from_tensors("f", [x, y], [total], layouts={x: blocked, y: blocked})
    made = schedule(f, AVX2).func
    verify_tir(made)
    loops = [s for s in statements(made) if isinstance(s, For)]
    assert sum(s.kind is VECTOR for s in loops) == 3  # into two tiles, and out of them
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal((2, channels, size, size), np.float32) for _ in range(2))
    np.testing.assert_array_equal(interp.run(made, [a, b])[0], a + b)


@pytest.mark.parametrize("op", ["reduce_sum", "reduce_max", "reduce_mean"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((37, 1001), (0,)),
        ((133, 519), (0,)),
        ((3, 101, 77), (1,)),
        ((70_001,), (0,)),
        ((301, 333), (0, 1)),
        ((33, 65, 5), (0, 1)),
        ((5, 6, 7, 7), (2, 3)),
    ],
)
def test_reductions(shape: tuple[int, ...], axes: tuple[int, ...], dynamic: bool, op: str) -> None:
    x = np.random.default_rng(1).standard_normal(shape, np.float32)
    got = run(op, x, dynamic, axes=axes)
    wide = {"reduce_sum": np.sum, "reduce_max": np.max, "reduce_mean": np.mean}[op](
        x.astype(np.float64), axis=axes, keepdims=got.ndim == x.ndim
    )
    np.testing.assert_allclose(got, wide, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", [float32, float16])
def test_what_follows_a_reduction_of_columns(dtype: DType) -> None:
    """Rows are read as they lie, whatever is done with the numbers that they are reduced to."""
    x = te.placeholder("x", (3, 200, 96), dtype)
    (k,) = te.reduce_vars(1)
    total = te.compute((3, 96), lambda b, d: cast(x[b, k, d], float32), "total", ("sum", {k: 200}))
    y = te.compute((3, 96), lambda b, d: cast(total[b, d] / 200.0, dtype), "y")
    func = scheduled(y, x)
    for step in (lower_blocks, hoist_conditions, unswitch):
        func = step(func)
    text = emit(func).text
    assert "load <" in text and not re.search(r"load (float|half),", text)


# ---- threads ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("rows", "shared"), [(40, True), (10, False)])
def test_a_batch_of_one_is_shared_where_it_is_worth_it(rows: int, shared: bool) -> None:
    batch = Dim("n", 1, 1000)
    x = te.placeholder("x", (batch, 40, rows), float32)
    y = te.compute((batch, rows, 40), lambda n, i, j: x[n, j, i], name="y")
    two = dataclasses.replace(AVX2, cores=2)
    every = statements(
        schedule(from_tensors("f", [x], [y]), two, after_step=verify_tir).func.phases[0]
    )
    (loop,) = [s for s in every if isinstance(s, For) and s.kind is PARALLEL]
    assert (loop.extent is not batch) == shared


# ---- streamed results ---------------------------------------------------------------------------
def streamed(rows: int | Dim) -> list[Any]:
    x = te.placeholder("x", (rows, 1024), float32)
    y = te.map_elements(lambda e: e + 1.0, x, name="y")
    return [s.stream for s in stores(scheduled(y, x))]


def test_results_larger_than_the_caches_are_streamed() -> None:
    limit = AVX2.caches[2] // 2 // 4096
    assert streamed(limit) == [TRUE]
    assert streamed(limit - 1) == [FALSE]
    assert streamed(Dim("n", 1, limit - 1)) == [FALSE]
    (condition,) = streamed(Dim("n", 1, 2 * limit))
    assert condition not in (TRUE, FALSE)


@pytest.mark.parametrize("offset", [0, 1, 4, 12])  # numpy aligns to 16 bytes
@pytest.mark.parametrize("columns", [1024, 1023, 1020])
def test_streamed_results_are_right_at_any_address(offset: int, columns: int) -> None:
    rows = Target.host().caches[2] // 2 // 4 // columns + 1
    net = Builder("big", {"N": (1, 1 << 20)})
    m = mc.compile(net.function(y=net.relu(net.input("x", ("N", columns)))), threads=2)
    x = np.random.default_rng(4).standard_normal((rows, columns), np.float32)
    out = np.empty(rows * columns + offset, np.float32)[offset:].reshape(rows, columns)
    m(x, out=[out])
    np.testing.assert_array_equal(out, np.maximum(x, 0))


@pytest.mark.parametrize("offset", [0, 1, 4, 12])
@pytest.mark.parametrize("columns", [1023, 1020, 1024])
def test_rows_that_end_within_a_line_are_streamed_from_line_to_line(
    offset: int, columns: int
) -> None:
    rows = Target.host().caches[2] // 2 // 4 // columns + 1
    a, b = te.placeholder("a", (rows, columns), float32), te.placeholder("b", (columns,), float32)
    func = from_tensors("f", [a, b], [te.elementwise("add", a, b)])
    steps = [step.primitive for step in schedule(func, Target.host(), after_step=verify_tir).steps]
    assert ("split_at_lines" in steps) == (columns % 16 != 0)
    net = Builder("big")
    bias = np.random.default_rng(5).standard_normal(columns, np.float32)
    m = mc.compile(net.function(y=net.add(net.input("x", (rows, columns)), bias)), threads=2)
    x = np.random.default_rng(4).standard_normal((rows, columns), np.float32)
    out = np.full(rows * columns + offset + 16, 7, np.float32)
    m(x, out=[out[offset : offset + rows * columns].reshape(rows, columns)])
    np.testing.assert_array_equal(out[offset : offset + x.size].reshape(x.shape), x + bias)
    assert np.all(out[:offset] == 7) and np.all(out[offset + x.size :] == 7)


def test_what_is_read_again_is_not_streamed() -> None:
    x = te.placeholder("x", (4, 64), float32)
    s = Schedule(from_tensors("f", [x], [te.sum(x, 1, keepdims=False)]), AVX2)
    with pytest.raises(ScheduleError, match="is read again"):
        s.stream("sum", 1)


# ---- the primitives that long reductions need ---------------------------------------------------
def test_lanes_are_combined_only_by_a_plain_reduction() -> None:
    x = te.placeholder("x", (4, 24), float32)
    s = Schedule(from_tensors("f", [x], [te.sum(x, 1, keepdims=False)]), AVX2)
    loop = s.loops_of("sum")[-1]
    s.decompose_reduction("sum", loop)
    with pytest.raises(ScheduleError, match="reduces over"):
        s.mark(loop, VECTOR)  # 24 lanes are no power of two
    _, inner = s.split(loop, 8, "perfect")
    s.mark(inner, VECTOR)
    verify_tir(s.func)


def test_separate_needs_a_statement_before() -> None:
    x = te.placeholder("x", (64,), float32)
    s = Schedule(from_tensors("f", [x], [te.sum(x, 0, keepdims=False)]), AVX2)
    with pytest.raises(ScheduleError, match="does not follow"):
        s.separate("sum")
    outer, _ = s.split(s.loops_of("sum")[0], 8, "perfect")
    s.rfactor("sum", outer)
    s.separate("sum")
    assert len(s.func.phases) == 2


@pytest.mark.parametrize(
    ("shape", "other", "line"),
    [
        ((2, 64, 55, 55), (64, 1, 1), 55 * 55),
        ((8, 3, 19, 5, 7), (1, 19, 5, 7), 19 * 5 * 7),
        ((64, 40, 600), (64, 1, 1), 600),  # a line that is long already
        ((2, 3, 100, 100), (3, 1, 1), 100),  # the threads need more to share
        ((64, 9, 9), (9, 1), 9),  # what is added changes with each row
    ],
)
def test_short_rows_are_one_line(shape: tuple[int, ...], other: tuple[int, ...], line: int) -> None:
    x, z = te.placeholder("x", shape, float32), te.placeholder("z", other, float32)

    def added(*at: Any) -> Any:
        near = at[len(shape) - len(other) :]
        return x[at] + z[tuple(0 if n == 1 else i for n, i in zip(other, near, strict=True))]

    s = schedule(from_tensors("f", [x, z], [te.compute(shape, added, "y")]), AVX2)
    *_, last = (x for x in statements(s.func) if isinstance(x, For) and x.kind is not VECTOR)
    assert int(str(last.extent)) == (line if line <= 16 else -(-line // 8))

    net = Builder("added")
    a, b = net.input("x", shape), net.input("z", other)
    given = [np.random.default_rng(1).standard_normal(n, np.float32) for n in (shape, other)]
    fn = net.function(y=net.add(a, b))
    for threads in (1, 2):
        (y,) = mc.compile(fn, threads=threads, checked=True)(*given)
        np.testing.assert_array_equal(y, given[0] + given[1])


@pytest.mark.parametrize(
    ("dtype", "to", "lanes"),
    [
        ("uint8", "uint8", 32),
        ("uint8", "float32", 8),
        ("float32", "bool", 32),
        ("int64", "bool", 32),
    ],
)
def test_small_numbers_fill_vectors(dtype: str, to: str, lanes: int) -> None:
    x, z = (te.placeholder(n, (4096,), DType(dtype)) for n in "xz")
    made = {"uint8": lambda e: e, "float32": lambda e: cast(e, float32), "bool": lambda e: e < 3}
    y = te.compute((4096,), lambda i: made[to](binary("max", x[i], z[i])), "y")
    func = schedule(from_tensors("f", [x, z], [y]), AVX2).func
    (vector,) = (s for s in statements(func) if isinstance(s, For) and s.kind is VECTOR)
    assert str(vector.extent) == str(lanes)


def test_what_an_expression_shares_is_looked_at_once() -> None:
    """As a tree this one has 2**60 leaves."""
    x = te.placeholder("x", (64, 9, 9), float32)

    def body(c: Expr, h: Expr, w: Expr) -> Expr:
        e: Expr = x[c, h, w]
        for _ in range(60):
            e = e * binary("max", e, 0.5)
        return e

    s = schedule(from_tensors("f", [x], [te.compute((64, 9, 9), body, "y")]), AVX2)
    assert unswitch(lower_blocks(s.func)).phases


@pytest.mark.parametrize("extent", [3136, 3000, 5000])
def test_columns_are_cut_evenly(extent: int) -> None:
    x = te.placeholder("x", (64, extent), float32)
    (k,) = te.reduce_vars(1)
    y = te.compute((extent,), lambda j: x[k, j], "y", ("sum", {k: 64}))
    text = str(schedule(from_tensors("f", [x], [y]), AVX2).func)
    size = {3136: 448, 3000: 1024, 5000: 1024}[extent]
    assert f"float32[{size}] local" in text, text


def test_a_row_whose_number_is_used_stays_a_row() -> None:
    x, z = te.placeholder("x", (64, 20, 20), float32), te.placeholder("z", (64,), float32)
    y = te.compute((64, 20, 20), lambda c, h, w: select(h < w, x[c, h, w], z[c]), "y")
    func = schedule(from_tensors("f", [x, z], [y]), AVX2).func
    *_, row = (x for x in statements(func) if isinstance(x, For) and x.kind is not VECTOR)
    assert str(row.extent) == "3"  # vectors of 8


@pytest.mark.parametrize(
    ("op", "rows", "wanted"),
    [
        ("exp", 4096, {512}),
        ("exp", 64, set()),
        ("neg", 4096, set()),
        ("layer_norm", 4096, {512, 4096}),
    ],
)
def test_large_operands_are_asked_for_early(op: str, rows: int, wanted: set[int]) -> None:
    """Where an element takes a while, and in the first and last pass over rows."""
    net = Builder("large")
    x = net.input("x", (rows, 4096))
    ones = np.ones(4096, np.float32)
    y = net.layer_norm(x, ones, ones) if op == "layer_norm" else getattr(net, op)(x)
    (nest,) = [
        s.text for s in mc.compile(net.function(y=y), checked=True).stages if s.name == "schedule"
    ]
    distances = re.findall(r"prefetch p0\[.*\] \+ (\d+)", nest)
    assert {int(d) // 512 * 512 for d in distances} == wanted  # of the first of some lines


@pytest.mark.parametrize(
    ("width", "streams"),
    [(1024, "streamed\n"), (1000, "streamed\n"), (1001, ""), (Dim("d", 1, 10**6), "d%4 == 0")],
)
def test_lines_are_streamed_if_all_begin_where_that_can_be_done(
    width: int | Expr, streams: str
) -> None:
    """Else some lines would be, of which others write the rest of a cache line in another way."""
    x = te.placeholder("x", (20_000, width), float32)
    total = te.sum(x, 1)
    y = te.compute((20_000, width), lambda i, j: x[i, j] / total[i, ZERO], "y")
    text = str(scheduled(y, x))
    assert streams in text if streams else "streamed" not in text
