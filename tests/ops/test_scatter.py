"""Scattered updates: strips of rows, positions that a whole row shares, any number of threads."""

from __future__ import annotations

import numpy as np
import pytest

import minicompiler as mc
from minicompiler.frontend.builder import Builder
from minicompiler.ir.graph import Function, applies
from minicompiler.passes.simplify import simplify

RNG = np.random.default_rng(0)


def rows(width: int, how: str) -> Function:
    """300 updates of 50 rows; `elements` repeats the position of a row for each of its elements."""
    net = Builder("rows")
    x, u = net.input("x", (50, width)), net.input("u", (300, width))
    i = net.input("i", (300, 1), "int64")
    if how == "elements":
        y = net.scatter_elements(x, net.expand(i, shape=(300, width)), u, axis=0, reduction="add")
    else:
        y = net.scatter_nd(x, i, u, reduction="add")
    return net.function(y=y)


@pytest.mark.parametrize("width", [1, 16, 40, 64, 100, 129, 200])
@pytest.mark.parametrize("how", ["elements", "rows"])
def test_strips_of_any_width(width: int, how: str) -> None:
    x, u = (RNG.standard_normal((n, width)).astype(np.float32) for n in (50, 300))
    i = RNG.integers(-50, 50, (300, 1))
    wanted = x.copy()
    np.add.at(wanted, i[:, 0], u)  # in the same order, so with the same bits
    for threads in (1, 2, 3):
        m = mc.compile(rows(width, how), threads=threads)
        assert np.array_equal(m.run({"x": x, "u": u, "i": i})["y"], wanted)


def test_rows_of_symbolic_sizes() -> None:
    net = Builder("symbolic")
    x, i = net.input("x", ("nodes", "width")), net.input("i", ("edges", 1), "int64")
    y = net.scatter_nd(x, i, net.input("u", ("edges", "width")), reduction="add")
    m = mc.compile(net.function(y=y), threads=2)
    for nodes, edges, width in ((7, 1, 5), (1, 9, 70), (40, 300, 129)):
        a = RNG.standard_normal((nodes, width)).astype(np.float32)
        u = RNG.standard_normal((edges, width)).astype(np.float32)
        at = RNG.integers(0, nodes, (edges, 1))
        wanted = a.copy()
        np.add.at(wanted, at[:, 0], u)
        assert np.array_equal(m.run({"x": a, "i": at, "u": u})["y"], wanted)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_positions_of_their_own_for_all_elements(axis: int) -> None:
    of, own = [5, 40, 70], [4, 33, 66]
    x = RNG.standard_normal(of).astype(np.float32)
    u = RNG.standard_normal(own).astype(np.float32)
    i = RNG.integers(-of[axis], of[axis], own)
    wanted, at = x.copy(), list(np.indices(own))
    at[axis] = i
    np.add.at(wanted, tuple(at), u)
    net = Builder("elements")
    places = net.input("x", of), net.input("i", own, "int64"), net.input("u", own)
    y = net.scatter_elements(*places, axis=axis, reduction="add")
    for threads in (1, 2):
        m = mc.compile(net.function(y=y), threads=threads)
        assert np.array_equal(m.run({"x": x, "i": i, "u": u})["y"], wanted)


def test_a_position_that_a_row_shares_is_read_once() -> None:
    fn = simplify(rows(64, "elements"), None)
    assert [v.op.name for v in applies(fn)] == ["scatter_nd"]


def test_what_lies_at_one_position_is_one_axis() -> None:
    net = Builder("boxes")
    x, u, i = net.input("x", (9, 4, 8)), net.input("u", (6, 4, 8)), net.input("i", (6, 1), "int64")
    fn = simplify(net.function(y=net.scatter_nd(x, i, u)), None)
    assert [v.op.name for v in applies(fn)] == ["scatter_nd"]
    at, new = np.array([[3], [-1], [0], [3], [8], [5]]), RNG.standard_normal((6, 4, 8), np.float32)
    given = {"x": RNG.standard_normal((9, 4, 8), np.float32), "i": at, "u": new}
    wanted = given["x"].copy()
    wanted[at[:, 0]] = new
    for threads in (1, 2):
        m = mc.compile(fn, threads=threads)
        assert np.array_equal(m.run(given)["y"], wanted)
