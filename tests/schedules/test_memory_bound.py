"""Transposes, long reductions, normalisations and streamed results: right, and the same bits for
any number of threads."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from one_operator import run

import minicompiler as mc
from minicompiler import te
from minicompiler.codegen.llvm import emit
from minicompiler.errors import ScheduleError
from minicompiler.frontend.builder import Builder
from minicompiler.ir import interp
from minicompiler.ir.expr import (
    FALSE,
    TRUE,
    Const,
    Dim,
    Expr,
    Load,
    binary,
    cast,
    const,
    loads,
    select,
)
from minicompiler.ir.layout import IndexMap
from minicompiler.ir.tir import (
    PARALLEL,
    UNROLL,
    VECTOR,
    Buffer,
    For,
    If,
    PrimFunc,
    Stmt,
    Store,
    statements,
    stores,
)
from minicompiler.ir.types import DType, float16, float32, int64
from minicompiler.ir.verify_tir import verify_tir
from minicompiler.lower.blocks import hoist_conditions, lower_blocks, unswitch
from minicompiler.lower.to_tir import from_tensors
from minicompiler.lower.wraps import unwrap_lines
from minicompiler.ops.rules import clamped
from minicompiler.schedules.cpu import schedule
from minicompiler.schedules.elementwise import MOST_UNEVEN
from minicompiler.schedules.schedule import Schedule
from minicompiler.target import Target

AVX2 = Target.parse("cpu:avx2")


def scheduled(y: te.Tensor, x: te.Tensor) -> PrimFunc:
    s = schedule(from_tensors("f", [x], [y]), AVX2, after_step=verify_tir)
    return s.func


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


@pytest.mark.parametrize("groups", [3, 12])
def test_a_group_norm_is_one_loop_over_groups(groups: int) -> None:
    x = np.random.default_rng(2).standard_normal((2, 12, 9, 11), np.float32)
    net = Builder("norm")
    v = net.input("x", x.shape)
    ones = np.ones(12, np.float32)
    fn = net.function(y=net.group_norm(v, ones, ones, groups=groups))
    m = mc.compile(fn, threads=2, checked=True)
    rows = x.astype(np.float64).reshape(2, groups, -1)
    rows = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(m(x)[0], rows.reshape(x.shape) + 1, rtol=1e-4, atol=1e-5)
    (nest,) = [s.text for s in m.stages if s.name == "schedule"]
    assert "---" not in nest


@pytest.mark.parametrize("rows", [50, 1])
def test_a_normalisation_of_a_normalisation(rows: int) -> None:
    """The second one's rows are added up where they are made; the distances from their mean are
    not."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, 128)).astype(np.float32)
    scale = (rng.random((2, 128)) + 0.5).astype(np.float32)
    net = Builder("twice")
    v = net.input("x", x.shape)
    for k in range(2):
        v = net.layer_norm(v, scale[k], scale[1 - k], axis=1, epsilon=1e-5)
    want = x.astype(np.float64)
    for k in range(2):
        centred = want - want.mean(1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
        want = centred / deviation * scale[k] + scale[1 - k]
    found = mc.compile(net.function(y=v), threads=2, checked=True)(x)[0]
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [31, 100, 1000])
def test_the_row_of_a_softmax_is_not_copied(columns: int) -> None:
    """Its vectors end beyond the row; what they read there is not wanted."""
    net = Builder("softmax")
    m = mc.compile(net.function(y=net.softmax(net.input("x", (50, columns)))), checked=True)
    (nest,) = [s.text for s in m.stages if s.name == "schedule"]
    assert "block exp_s_in" not in nest
    x = np.random.default_rng(3).standard_normal((50, columns), np.float32)
    e = np.exp(x.astype(np.float64))
    np.testing.assert_allclose(m(x)[0], e / e.sum(-1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize("shape", [(600, 128), (3, "n", 100)])
def test_short_rows_are_worked_on_together(shape: tuple[int | str, ...]) -> None:
    """Four of them, and what is left at the end; each has the bits that it has alone."""
    net = Builder("norm")
    x = net.input("x", shape)
    ones = np.ones(shape[-1], np.float32)
    y = net.layer_norm(x, ones, ones)
    m = mc.compile(net.function(y=net.softmax(x), z=y), threads=2, checked=True)
    assert any("in 4:" in s.text or "min(4, " in s.text for s in m.stages if s.name == "schedule")
    size = [203 if n == "n" else n for n in shape]
    v = np.random.default_rng(7).standard_normal(size, np.float32)
    got, normed = m(v)
    e = np.exp(v.astype(np.float64))
    e /= e.sum(-1, keepdims=True)
    np.testing.assert_allclose(got, e, rtol=1e-5)
    e = v.astype(np.float64)
    e = (e - e.mean(-1, keepdims=True)) / np.sqrt(e.var(-1, keepdims=True) + 1e-5) + 1
    np.testing.assert_allclose(normed, e, rtol=1e-4, atol=1e-5)
    if "n" in shape:
        for n in (1, 2, 5):
            for a, b in zip(m(v[:, -n:]), (got, normed), strict=True):
                np.testing.assert_array_equal(a, b[:, -n:])


@pytest.mark.parametrize("shape", [(1, 49, 49), (3, 20, 20), (24, 24)])
def test_the_transpose_of_a_square_softmax(shape: tuple[int, ...]) -> None:
    """Its rows are not those of the softmax, though there are as many."""
    net = Builder("square")
    x = net.input("x", shape)
    *outer, a, b = range(len(shape))
    m = mc.compile(net.function(y=net.transpose(net.softmax(x), perm=(*outer, b, a))), threads=1)
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    e = np.exp(values - values.max(-1, keepdims=True))
    want = (e / e.sum(-1, keepdims=True)).swapaxes(-1, -2)
    np.testing.assert_allclose(m(values)[0], want, rtol=1e-5)


def test_a_softmax_of_what_is_no_number() -> None:
    """NaN anywhere in a row makes all of it NaN, although the maximum ignores NaN."""
    x = np.random.default_rng(5).standard_normal((5, 1000), np.float32)
    x[0, 3], x[1, 999], x[2] = np.nan, np.nan, -np.inf
    x[3, :500] = -np.inf
    y = run("softmax", x, axis=1)
    assert np.isnan(y[:3]).all()
    e = np.exp(x[3:].astype(np.float64) - x[3:].max(1, keepdims=True))
    np.testing.assert_allclose(y[3:], e / e.sum(1, keepdims=True), rtol=1e-6, atol=1e-9)


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
    ("lead", "sizes", "rest"),
    [(8, (6, 9), (5, 7)), (3, (4, 7), (3,)), (16, (64, 64), (30, 31)), (1, (32, 96), (33, 9))],
)
def test_concatenations(lead: int, sizes: tuple[int, ...], rest: tuple[int, ...]) -> None:
    rng = np.random.default_rng(2)
    parts = [rng.standard_normal((lead, n, *rest), np.float32) for n in sizes]
    net = Builder("joined")
    given = [net.input(f"x{k}", p.shape) for k, p in enumerate(parts)]
    fn = net.function(y=net.concat(*given, axis=1))
    for threads in (1, 2):
        (y,) = mc.compile(fn, threads=threads, checked=True)(*parts)
        np.testing.assert_array_equal(y, np.concatenate(parts, 1))


def test_a_concatenation_copies_long_pieces() -> None:
    a, b = (te.placeholder(n, (64, 64, 15, 15), float32) for n in "ab")
    y = te.compute(
        (64, 128, 15, 15), lambda n, c, h, w: select(c < 64, a[n, c, h, w], b[n, c - 64, h, w]), "y"
    )
    func = schedule(from_tensors("f", [a, b], [y]), AVX2, after_step=verify_tir).func
    loops = [x for x in statements(func) if isinstance(x, For)]
    assert max(int(str(x.extent)) for x in loops) == 64 * 15 * 15 // 32


@pytest.mark.parametrize("sizes", [(255, 1), (77, 51), (128, 129), (80, 4, 1)])
def test_uneven_pieces_of_a_line_have_no_tails(sizes: tuple[int, ...]) -> None:
    parts = [te.placeholder(f"x{k}", (512, n), float32) for k, n in enumerate(sizes)]

    def body(i: Expr, j: Expr) -> Expr:
        start = sum(sizes) - sizes[-1]
        value: Expr = parts[-1][i, j - start]
        for part, n in zip(parts[-2::-1], sizes[-2::-1], strict=True):
            start -= n
            value = select(j < start + n, part[i, j - start], value)
        return value

    func = from_tensors("f", parts, [te.compute((512, sum(sizes)), body, "y")])
    made = hoist_conditions(lower_blocks(schedule(func, AVX2, after_step=verify_tir).func))
    assert not any(isinstance(s, If) for s in statements(made))
    assert all(type(s.value) is Load for p in made.phases for s in stores(p))
    given = [np.random.default_rng(0).standard_normal((512, n), np.float32) for n in sizes]
    np.testing.assert_array_equal(interp.run(made, given)[0], np.concatenate(given, 1))


def test_rows_that_are_repeated_are_copied_one_after_the_other() -> None:
    """No vector runs over the end of a row of 37."""
    x = te.placeholder("x", (64, 37), float32)
    f = scheduled(te.compute((128, 111), lambda i, j: x[i % 64, j % 37], "y"), x)
    for step in (lower_blocks, hoist_conditions, unwrap_lines, unswitch):
        f = step(f)
    loops = [s for s in statements(f) if isinstance(s, For)]
    assert [str(s.extent) for s in loops] == ["128", "3", "5", "8"]
    assert not any("%" in str(e.indices[1]) for s in stores(f.phases[0]) for e in loads(s.value))
    given = np.random.default_rng(0).standard_normal((64, 37), np.float32)
    np.testing.assert_array_equal(interp.run(f, [given])[0], np.tile(given, (2, 3)))


@pytest.mark.parametrize("then", [0, 1])
def test_what_statements_change_is_copied_ahead(then: int) -> None:
    """The copy lies in the memory of the result and is a block like any other."""
    x = te.placeholder("x", (64, 32), float32)

    def build(ins: list[Buffer], outs: list[Buffer], fresh: Any) -> Stmt:
        return Store(outs[0], (Const(3), Const(5)), const(1.0, float32))

    y = te.changed("marked", x * 2, (), build)
    func = from_tensors("f", [x], [y + 1] if then else [y])
    assert (len(func.phases), len(func.buffers)) == (2 + then, then)
    made = schedule(func, AVX2, after_step=verify_tir).func
    assert [str(s.extent) for s in statements(made.phases[0]) if isinstance(s, For)] == ["256", "8"]
    given = np.random.default_rng(0).standard_normal((64, 32), np.float32)
    want = given * 2
    want[3, 5] = 1
    np.testing.assert_array_equal(interp.run(made, [given])[0], want + then)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bool", "int64"])
@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("size", [77, 300])
def test_triangles_are_copied_and_filled(size: int, upper: bool, dtype: str) -> None:
    """Only the vector on the diagonal of a row asks each element, and without masked loads."""
    t = DType(dtype)
    x, zero = te.placeholder("x", (3, size, size), t), str(const(0, t))

    def body(b: Expr, i: Expr, j: Expr) -> Expr:
        return select(i + 1 <= j if upper else j <= i + 1, x[b, i, j], const(0, t))

    func = scheduled(te.compute(x.shape, body, "y"), x)
    for step in (lower_blocks, hoist_conditions, unswitch):
        func = step(func)
    values = [str(x.value) for p in func.phases for x in stores(p)]
    assert [v.split("[")[0].split("(")[0] for v in values] == ["p0", zero, "select"]
    assert "masked.load" not in emit(func, AVX2).text

    given = np.random.default_rng(0).integers(0, 2, (3, size, size)).astype(dtype)
    want = (np.triu if upper else np.tril)(given, 1)
    for dynamic in (False, True):
        np.testing.assert_array_equal(run("trilu", given, dynamic, upper=upper, k=1), want)


def test_rows_that_data_picks_are_copied_in_long_pieces() -> None:
    """Where a row lies is worked out once for each piece."""
    x, at = te.placeholder("x", (8, 64, 256), float32), te.placeholder("at", (50, 2), int64)
    y = te.compute((50, 256), lambda i, j: x[clamped(at[i, 0], 8), clamped(at[i, 1], 64), j], "y")
    func = schedule(from_tensors("f", [x, at], [y]), AVX2, after_step=verify_tir).func
    vectors = [str(s.extent) for s in statements(func) if isinstance(s, For) and s.kind is VECTOR]
    assert vectors == ["32"]


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
    ("top", "bottom", "width", "unrolled"),
    [
        (7, 12, 95, True),
        (3, 2, 40, True),
        (1, 2, 96, False),  # each twice: a vector that is spread
        (4, 2, 40, False),  # every second
        (7, 12, MOST_UNEVEN + 1, False),  # too much code
    ],
)
def test_places_that_are_divided_are_numbers_in_short_rows(
    top: int, bottom: int, width: int, unrolled: bool
) -> None:
    x = te.placeholder("x", (9, 2000), float32)
    y = te.compute((9, width), lambda i, j: x[i, j * top // bottom], "y")
    func = scheduled(y, x)
    assert any(isinstance(s, For) and s.kind is UNROLL for s in statements(func)) == unrolled
    values = np.random.default_rng(0).standard_normal((9, 2000), np.float32)
    want = values[:, np.arange(width) * top // bottom]
    np.testing.assert_array_equal(interp.run(func, [values])[0], want)


@pytest.mark.parametrize("dynamic", [False, True])
def test_images_made_larger_by_a_fraction(dynamic: bool) -> None:
    x = np.random.default_rng(0).standard_normal((3, 2, 20, 20), np.float32)
    got = run("resize", x, dynamic, scales=(1.0, 1.0, 1.7, 1.7))
    at = np.ceil((np.arange(34) + 0.5) * 20 / 34 - 1).astype(int)
    np.testing.assert_array_equal(got, x[:, :, at[:, None], at])


def test_rows_from_many_tables_side_by_side() -> None:
    """Each piece of a concatenation is a copy of its own, the last and shorter one too; that the
    sign of a position is looked at does not matter."""
    rng = np.random.default_rng(0)
    net = Builder("tables")
    places, more = net.input("i", (40, 11), "int64"), net.input("x", (40, 13))
    tables = [rng.standard_normal((50, 16)).astype(np.float32) for _ in range(11)]
    columns = [net.gather(places, np.int64(k), axis=1) for k in range(11)]
    parts = [net.gather(t, c, axis=0) for t, c in zip(tables, columns, strict=True)]
    fn = net.function(y=net.concat(*parts, more, axis=1))
    i = rng.integers(-50, 50, (40, 11))
    x = rng.standard_normal((40, 13)).astype(np.float32)
    wanted = np.concatenate([*(t[i[:, k]] for k, t in enumerate(tables)), x], 1)
    m = mc.compile(fn, threads=2)
    assert np.array_equal(m(i, x)[0], wanted)


def test_pieces_are_cut_beside_conditions_on_data() -> None:
    """Two pieces of 16 and one of 13: a row of a table at a place that may count from the end."""
    at, a = te.placeholder("at", (40,), int64), te.placeholder("a", (50, 16), float32)
    b, c = (te.placeholder(n, (40, m), float32) for n, m in (("b", 16), ("c", 13)))

    def body(i: Any, j: Any) -> Any:
        place = select(at[i] < 0, at[i] + 50, at[i])
        row = binary("max", binary("min", place, 49), 0)
        return select(j < 16, a[row, j], select(j < 32, b[i, j - 16], c[i, j - 32]))

    y = te.compute((40, 45), body, "y")
    func = schedule(from_tensors("f", [at, a, b, c], [y]), AVX2, after_step=verify_tir).func
    assert [(str(x.extent), x.kind) for x in statements(func) if isinstance(x, For)][1:] == [
        ("16", VECTOR), ("16", VECTOR), ("13", VECTOR)
    ]  # fmt: skip


def test_several_rows_of_what_is_not_reduced() -> None:
    """Each row of the products begins with a vector, however many rows there are."""
    x = np.random.default_rng(4).standard_normal((3, 9, 14, 33), np.float32)
    net = Builder("gated", {"n": (1, 5000)})
    v = net.input("x", (3, 9, "n", 33))
    fn = net.function(y=net.softmax(net.mul(net.tanh(v), v)))
    wide = np.tanh(x.astype(np.float64)) * x
    e = np.exp(wide - wide.max(-1, keepdims=True))
    for threads in (1, 2):
        (y,) = mc.compile(fn, threads=threads, checked=True)(x)
        np.testing.assert_allclose(y, e / e.sum(-1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((21, 8, 5, 15), (2,)),  # less than a vector: another rule, with several rows
        ((2, 3, 5, 40), (2,)),
        ((2, 21, 40, 50), (1,)),
        ((1, 19, 64, 65), (1,)),
        ((5, 2100), (0,)),
        ((2, 9, 10, 33), (1, 2)),
        ((3, 4, 5, 6, 21), (1, 3)),
    ],
)
def test_normalisations_over_other_axes_than_the_last(
    shape: tuple[int, ...], axes: tuple[int, ...], dynamic: bool
) -> None:
    x = np.random.default_rng(5).standard_normal(shape, np.float32)
    last = len(shape) - 1
    net = Builder("norm", {"n": (1, 5000)})
    v = net.input("x", (*shape[:last], "n" if dynamic else shape[last]))
    d = net.sub(v, net.reduce_mean(v, axes=axes, keepdims=True))
    variance = net.reduce_mean(net.mul(d, d), axes=axes, keepdims=True)
    deviation = net.sqrt(net.add(variance, net.constant(np.float32(1e-3))))
    fn = net.function(y=net.div(d, deviation))
    wide = x - x.astype(np.float64).mean(axes, keepdims=True)
    wide /= np.sqrt((wide * wide).mean(axes, keepdims=True) + 1e-3)
    found = [mc.compile(fn, threads=t, checked=True)(x)[0] for t in (1, 2)]
    np.testing.assert_allclose(found[0], wide, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(*found)


def test_a_softmax_over_channels_goes_row_by_row() -> None:
    """One nest for all passes, vectors along memory, the sums of four or three rows at a time."""
    net = Builder("classes")
    v = net.input("x", (1, 21, 64, 96))
    m = mc.compile(net.function(y=net.softmax(v, axis=1)), checked=True)
    (nest,) = [s.text for s in m.stages if s.name == "schedule"]
    assert "---" not in nest and "parallel" in nest
    assert nest.count("1.0/") == 1 and "block inverse" in nest  # a division per column
    x = np.random.default_rng(6).standard_normal((1, 21, 64, 96), np.float32)
    e = np.exp(x.astype(np.float64))
    np.testing.assert_allclose(m(x)[0], e / e.sum(1, keepdims=True), rtol=1e-5)


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
    ("shape", "axis", "late"),
    [
        ((2048, 4096), 1, True),
        ((2049, 4099), 1, True),  # a tail, and a last share of one row
        ((4096, 1024), 1, False),  # short rows wait for nothing
        ((64, 4096), 1, False),  # results that fit the caches
        ((24, 256, 1024), 1, True),  # down the columns
    ],
)
def test_long_rows_are_written_while_the_next_one_is_computed(
    shape: tuple[int, ...], axis: int, late: bool
) -> None:
    def softmax(shape: tuple[int, ...], x: np.ndarray) -> tuple[str, np.ndarray]:
        net = Builder("rows")
        fn = net.function(y=net.softmax(net.input("x", shape), axis=axis))
        m = mc.compile(fn, target="cpu:avx2,cores=2", threads=2, checked=True)
        (nest,) = [s.text for s in m.stages if s.name == "schedule"]
        return nest, m(x)[0]

    x = np.random.default_rng(7).standard_normal(shape, np.float32)
    nest, y = softmax(shape, x)
    assert ("_last in" in nest) == late
    few = slice(1, 3)
    np.testing.assert_array_equal(y[few], softmax(x[few].shape, x[few])[1])  # for any batch
    e = np.exp(x[-3:].astype(np.float64))
    np.testing.assert_allclose(y[-3:], e / e.sum(axis, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize(("columns", "placed"), [(900, False), (2048, True)])
def test_local_arrays_begin_in_the_middle_of_a_page(columns: int, placed: bool) -> None:
    """What results, which begin at its start, never lie just before."""
    net = Builder("row")
    fn = net.function(y=net.softmax(net.input("x", (8, columns))))
    (code,) = [s.text for s in mc.compile(fn, checked=True).stages if s.name == "llvm"]
    found = re.findall(r"(%\S+) = alloca \[(\d+) x i8\], align 4096", code)
    assert len(found) == placed
    for name, size in found:
        assert int(size) == columns * 4 + 2048
        assert f"getelementptr i8, ptr {name}, i64 2048" in code
