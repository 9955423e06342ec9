"""Which stages of a kernel are stored, and which are computed where they are read."""

from __future__ import annotations

import pytest

from minicompiler import te
from minicompiler.ir.expr import Call, Expr, cast
from minicompiler.ir.tir import Block, statements
from minicompiler.ir.types import float32, index, int64
from minicompiler.lower.to_tir import from_tensors


def sampled(channels_last: bool) -> list[str]:
    """The blocks of y[c, p] = mean of two rows x[., c] that data picks for each p."""
    x = te.placeholder("x", (32, 64), float32)  # channels, pixels
    at = te.placeholder("at", (100,), float32)
    pixels = te.compute((64, 32), lambda p, c: x[c, p], "pixels")

    def mean(p: Expr, c: Expr) -> Expr:
        first = cast(Call("floor", (at[p],)), index)
        return (pixels[first, c] + pixels[first + 1, c]) / Call("sqrt", (at[p],))

    if channels_last:
        made = te.compute((100, 32), mean, "mean")
        y = te.compute((32, 100), lambda c, p: made[p, c], "turned")
    else:
        y = te.compute((32, 100), lambda c, p: mean(p, c), "turned")
    func = from_tensors("sampled", [x, at], [y])
    return [b.name for p in func.phases for b in statements(p) if isinstance(b, Block)]


def test_lines_that_data_picks_are_read_whole() -> None:
    assert sampled(channels_last=True) == ["pixels", "mean", "turned"]


def test_elements_that_data_picks_one_by_one_are_not_moved_before() -> None:
    assert sampled(channels_last=False) == ["turned"]


@pytest.mark.parametrize(("several", "want"), [(True, ["terms", "mixed"]), (False, ["mixed"])])
def test_what_is_looked_up_twice_is_made_of_one_load(several: bool, want: list[str]) -> None:
    """Lines of sums are made before their elements are looked up one by one."""
    x, z = (te.placeholder(n, (32, 64), float32) for n in "xz")
    at = te.placeholder("at", (100,), int64)

    def term(i: Expr, j: Expr) -> Expr:
        return x[i, j] + z[i, j] if several else x[i, j] + 1.0

    terms = te.compute((32, 64), term, "terms")
    y = te.compute((32, 100), lambda i, p: terms[i, at[p]] - terms[i, at[p] + 1], "mixed")
    func = from_tensors("looked_up", [x, z, at], [y])
    assert [b.name for p in func.phases for b in statements(p) if isinstance(b, Block)] == want
