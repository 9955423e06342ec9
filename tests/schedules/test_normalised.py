"""Softmax and the other normalisations, over rows and over columns: right, and written well."""

from __future__ import annotations

import re

import numpy as np
import pytest
from one_operator import run

import minicompiler as mc
from minicompiler.frontend.builder import Builder
from minicompiler.ops.evaluate import run_reference


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


@pytest.mark.parametrize(
    ("channels", "groups", "known"),
    [(64, 32, True), (48, 16, True), (48, 1, True), (36, 2, True), (48, 16, False)],
    ids=lambda x: str(x),
)
def test_groups_of_channels_in_blocks(channels: int, groups: int, known: bool) -> None:
    """A block may hold several groups, or parts of some: channels are added up alone, in vectors,
    and then those of each group."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((2, 16, 9, 10), np.float32)
    weights = rng.standard_normal((2, channels * 16), np.float32) / 4
    into, out = weights[0].reshape(channels, 16, 1, 1), weights[1].reshape(16, channels, 1, 1)
    scale, bias = rng.standard_normal((2, channels)).astype(np.float32)
    net = Builder("norm")
    v = net.conv(net.input("x", x.shape if known else (2, 16, "H", "W")), into)
    v = net.relu(net.group_norm(v, scale, bias, groups=groups))
    fn = net.function(y=net.conv(v, out))
    m = mc.compile(fn, threads=2, checked=True)
    np.testing.assert_allclose(m(x)[0], run_reference(fn, [x])[0], rtol=1e-4, atol=1e-4)
    nest = next(s.text for s in m.stages if s.name == "schedule" and "mean_of_channel" in s.text)
    assert "block group_norm" not in nest  # it is a part of what follows
    assert re.search(r"vector \S+ in (8|16):\s+block variance_of_channel\(", nest)
