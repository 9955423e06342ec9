"""Branches that keep tails and borders out of the fast path change no result."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicompiler.ir import interp
from minicompiler.ir.expr import (
    Const,
    Expr,
    Load,
    Select,
    Var,
    all_of,
    const,
    eq,
    maximum,
    minimum,
    select,
    wrap,
)
from minicompiler.ir.tir import (
    SERIAL,
    UNROLL,
    VECTOR,
    Buffer,
    For,
    If,
    PrimFunc,
    Stmt,
    Store,
    seq,
    statements,
    stores,
)
from minicompiler.ir.types import float32
from minicompiler.lower.blocks import MOST_EXCEPTIONS, hoist_conditions, unswitch

v, w, i, j = Var("v"), Var("w"), Var("i"), Var("j")


def nest(extents: tuple[int, int, int], conditions: list[Expr]) -> PrimFunc:
    """r[v, w, i] = x[v, w, i] where the conditions hold, else 0; i is the tile."""
    x, r = (Buffer(n, float32, tuple(map(wrap, extents))) for n in ("x", "r"))
    at = (v, w, i)
    body: Stmt = Store(r, at, Load(x, at))
    for c in reversed(conditions):
        body = If(c, body)
    tile = For(i, Const(extents[2]), UNROLL, body)
    clear = For(j, Const(extents[2]), SERIAL, Store(r, (v, w, j), const(0.0, float32)))
    loops = For(v, Const(extents[0]), SERIAL, For(w, Const(extents[1]), SERIAL, seq([clear, tile])))
    return PrimFunc("f", (x, r), 1, (), (), (loops,))


def run(func: PrimFunc) -> np.ndarray:
    shape = tuple(n.value for n in func.params[0].shape)  # type: ignore[attr-defined]
    values = 1 + np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return interp.run(func, [values])[0]


def special(func: PrimFunc) -> list[str]:
    """The iterations that have code of their own."""
    return [str(s.cond) for s in statements(func) if isinstance(s, If) and "==" in str(s.cond)]


COEFFICIENT = st.integers(-3, 3)


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(
    st.tuples(st.integers(1, 7), st.integers(1, 3), st.integers(1, 4)),
    st.lists(st.tuples(COEFFICIENT, COEFFICIENT, COEFFICIENT, st.integers(-9, 9)), max_size=3),
)
def test_conditions_mean_the_same(
    extents: tuple[int, int, int], lines: list[tuple[int, int, int, int]]
) -> None:
    conditions = [v * a + w * b + i * c >= wrap(d) for a, b, c, d in lines]
    func = nest(extents, conditions)
    made = unswitch(hoist_conditions(func))
    np.testing.assert_array_equal(run(made), run(func))


def test_every_border() -> None:
    """A window of three along a line of any length, in tiles of any size."""
    for tiles, size, missing in itertools.product(range(1, 6), range(1, 5), range(3)):
        if missing >= size:
            continue
        inside = [v * size + i + w >= wrap(1), v * size + i + w < wrap(tiles * size - missing + 1)]
        func = nest((tiles, 3, size), inside)
        np.testing.assert_array_equal(run(unswitch(func)), run(func))


def test_tiles_at_both_ends_have_their_own_code() -> None:
    inside = [v * 4 + i >= wrap(1), v * 4 + i < wrap(39)]
    assert special(unswitch(nest((10, 1, 4), inside))) == ["v == 0", "v == 9"]
    assert special(unswitch(nest((2, 1, 4), [v * 4 + i >= wrap(1), v * 4 + i < wrap(7)]))) == [
        "v == 0"  # and the other one needs no question
    ]


AT = v * 4 + i - 3  # of 26 places around 20 elements
AWAY = maximum(AT, const(0) - AT)
MOVED = {
    "edge": maximum(minimum(AT, const(19)), 0),
    "reflected": minimum(AWAY, const(38) - AWAY),
    "once around": select(all_of([AT >= 0, AT < 20]), AT, select(AT < 0, AT + 20, AT - 20)),
}


@pytest.mark.parametrize("moved", MOVED.values(), ids=list(MOVED))
def test_only_tiles_at_the_ends_move_places_into_bounds(moved: Expr) -> None:
    x, r = Buffer("x", float32, (Const(20),)), Buffer("r", float32, (Const(26),))
    store = If(v * 4 + i < 26, Store(r, (v * 4 + i,), Load(x, (moved,))))
    tile = For(i, Const(4), VECTOR, store)
    func = PrimFunc("f", (x, r), 1, (), (), (For(v, Const(7), SERIAL, tile),))
    made = unswitch(func)
    assert special(made) == ["v == 0", "v == 5", "v == 6"]
    plain = [s for s in stores(made.phases[0]) if s.value is Load(x, (AT,))]
    assert len(plain) == 1
    values = np.arange(1, 21, dtype=np.float32)
    np.testing.assert_array_equal(*(interp.run(f, [values])[0] for f in (made, func)))


@pytest.mark.parametrize("less", [True, False])
def test_vectors_of_the_second_case_are_not_asked_lane_by_lane(less: bool) -> None:
    x, r = (Buffer(n, float32, (Const(20), Const(40))) for n in ("x", "r"))
    at = (w, v * 4 + i)
    cond = at[1] < w * 2 - 3 if less else w * 2 - 3 <= at[1]
    tile = For(i, Const(4), VECTOR, Store(r, at, select(cond, Load(x, at), const(0.0, float32))))
    loops = For(w, Const(20), SERIAL, For(v, Const(10), SERIAL, tile))
    func = PrimFunc("f", (x, r), 1, (), (), (loops,))
    made = unswitch(func)
    assert [type(s.value) for s in stores(made.phases[0])] == [Load, Const, Select]
    np.testing.assert_array_equal(run(made), run(func))


def test_many_incomplete_tiles_share_their_code() -> None:
    func = unswitch(nest((40, 1, 4), [v * 4 + i >= wrap(4 * MOST_EXCEPTIONS + 1)]))
    assert special(func) == []
    assert sum(isinstance(s, For) and s.kind is UNROLL for s in statements(func)) == 2


@pytest.mark.parametrize(("count", "place"), [(12, "v == 2 and w == 3"), (11, "v == 2 and w == 2")])
def test_the_last_tile_of_pieces_has_its_own_code(count: int, place: str) -> None:
    """Pieces of four tiles, the last one shorter: 11 of 12 tiles, and a part of the last one."""
    x, r = (Buffer(n, float32, (Const(48),)) for n in ("x", "r"))
    at = (v * 4 + w) * 4 + i
    store = If(at < wrap(count * 4 - 1), Store(r, (at,), Load(x, (at,))))
    tile = For(i, Const(4), UNROLL, store)
    clear = For(j, Const(48), SERIAL, Store(r, (j,), const(0.0, float32)))
    inner = For(w, minimum(Const(4), count - v * 4), SERIAL, tile)
    func = PrimFunc("f", (x, r), 1, (), (), (clear, For(v, Const(3), SERIAL, inner)))
    made = unswitch(func)
    assert special(made) == [place]
    values = np.arange(1, 49, dtype=np.float32)
    np.testing.assert_array_equal(*(interp.run(f, [values])[0] for f in (made, func)))


def test_conditions_leave_loops_that_they_do_not_concern() -> None:
    a, b, c = v >= wrap(1), w + i >= wrap(1), eq(w, wrap(1))
    func = hoist_conditions(nest((3, 3, 3), [b, a, c]))
    shown = [str(s.cond) for s in statements(func) if isinstance(s, If)]
    assert shown == [str(a), str(c), str(b)]


def test_an_innermost_loop_is_written_twice_where_a_part_of_it_depends_on_one_condition() -> None:
    x, r = (Buffer(n, float32, (Const(3), Const(4))) for n in ("x", "r"))
    first = If(eq(v, Const(1)), Store(r, (v, w), Load(x, (v, w))))
    twice = Store(r, (v, w), Load(r, (v, w)) + Load(x, (v, w)))
    loops = For(v, Const(3), SERIAL, For(w, Const(4), SERIAL, seq([first, twice])))
    func = PrimFunc("f", (x, r), 1, (), (), (loops,))
    made = hoist_conditions(func)
    inner = [s for s in statements(made) if isinstance(s, For) and s.var is w]
    assert len(inner) == 2
    assert not any(isinstance(s, If) for loop in inner for s in statements(loop))
    np.testing.assert_array_equal(run(made)[1], 2 * (5 + np.arange(4)))
