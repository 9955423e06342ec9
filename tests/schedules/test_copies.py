"""What is put together, repeated, picked or left out: long copies without a choice per element."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from one_operator import AVX2, run, scheduled

import minicompiler as mc
from minicompiler import te
from minicompiler.codegen.llvm import emit
from minicompiler.frontend.builder import Builder
from minicompiler.ir import interp
from minicompiler.ir.expr import (
    Const,
    Expr,
    Load,
    binary,
    const,
    loads,
    select,
)
from minicompiler.ir.tir import (
    UNROLL,
    VECTOR,
    Buffer,
    For,
    If,
    Stmt,
    Store,
    statements,
    stores,
)
from minicompiler.ir.types import DType, float32, int64
from minicompiler.ir.verify_tir import verify_tir
from minicompiler.lower.blocks import hoist_conditions, lower_blocks, unswitch
from minicompiler.lower.to_tir import from_tensors
from minicompiler.lower.wraps import unwrap_lines
from minicompiler.ops.evaluate import run_reference
from minicompiler.ops.rules import clamped
from minicompiler.schedules.cpu import schedule
from minicompiler.schedules.elementwise import MOST_UNEVEN


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


@pytest.mark.parametrize("count", [5, 20])
def test_parts_in_blocks_of_channels_have_loops_of_their_own(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which part a block of channels belongs to is asked once per line of pixels."""
    monkeypatch.setenv("MINICOMPILER_CACHE", str(tmp_path))  # what comes from it has no stages
    rng = np.random.default_rng(0)
    net = Builder("dense")
    x = net.input("x", (1, 3, 8, 8))
    parts = [net.conv(x, rng.standard_normal((32, 3, 3, 3), np.float32)) for _ in range(count)]
    z = net.conv(
        net.relu(net.concat(*parts, axis=1)),
        rng.standard_normal((16, 32 * count, 3, 3), np.float32) / 64,
    )
    fn = net.function(z=z)
    module = mc.compile(fn, threads=1)
    made = [s.text for s in module.stages if s.name == "hoist_conditions" and "concat" in s.text]
    assert made
    assert "select" not in made[-1]
    assert made[-1].count("max(p") == count
    given = rng.standard_normal((1, 3, 8, 8), np.float32)
    (want,) = run_reference(fn, [given])
    np.testing.assert_allclose(module(given)[0], want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_rows_that_are_repeated_are_copied_one_after_the_other() -> None:
    """No vector runs over the end of a row of 37."""
    x = te.placeholder("x", (64, 37), float32)
    f = scheduled(te.compute((128, 111), lambda i, j: x[i % 64, j % 37], "y"), x)
    for step in (lower_blocks, hoist_conditions, unwrap_lines, unswitch):
        f = step(f)
    loops = [s for s in statements(f) if isinstance(s, For)]
    assert [str(s.extent) for s in loops] == ["128", "3", "4", "8", "1", "8"]
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
