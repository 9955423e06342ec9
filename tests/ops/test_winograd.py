"""Winograd convolution: the matrices are exact, the stated error holds, and it compiles at odd
sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minicompiler as mc
from minicompiler.ir.expr import Const, Dim, Expr
from minicompiler.ir.graph import Apply, Constant, Function, Input, apply
from minicompiler.ir.op import Compute, Op
from minicompiler.ir.types import TensorType, float32
from minicompiler.lower import to_tir
from minicompiler.ops import winograd
from minicompiler.ops.activations import relu
from minicompiler.ops.conv import ConvAttrs, conv
from minicompiler.ops.elementwise import add


@pytest.mark.parametrize("m", [2, 4])
def test_matrices_compute_a_correlation(m: int) -> None:
    at, g, bt = (np.array(x) for x in winograd.matrices(m))
    rng = np.random.default_rng(0)
    d, w = rng.standard_normal(m + 2), rng.standard_normal(3)
    want = [d[i : i + 3] @ w for i in range(m)]
    np.testing.assert_allclose(at @ ((g @ w) * (bt @ d)), want, rtol=1e-12)


@pytest.mark.parametrize("m", [2, 4])
def test_whole_matrices_compute_a_multiple(m: int) -> None:
    matrices = [np.array(x) for x in winograd.matrices(m, whole=True)]
    at, g, bt = (x.astype(np.int64) for x in matrices)
    assert all((x == whole).all() for x, whole in zip(matrices, (at, g, bt), strict=True))
    rng = np.random.default_rng(0)
    d, w = rng.integers(-255, 256, m + 2), rng.integers(-128, 128, 3)
    want = [winograd.MULTIPLE[m] * int(d[i : i + 3] @ w) for i in range(m)]
    np.testing.assert_array_equal(at @ ((g @ w) * (bt @ d)), want)


def _block(
    channels: int, size: tuple[int, ...], batch: int, seed: int, number: Expr | None = None,
    kernel: tuple[int, ...] = (3, 3), groups: int = 1,
) -> tuple[Function, np.ndarray, np.ndarray]:  # fmt: skip
    """relu(conv(x) + bias + y) and its inputs, which have one size. number: of images, as the model
    says it."""
    rng = np.random.default_rng(seed)
    shape = (batch, channels, *size)
    sizes = (Const(batch) if number is None else number, *map(Const, shape[1:]))
    x, y = (Input(n, TensorType(sizes, float32)) for n in "xy")
    w = rng.standard_normal((channels, channels // groups, *kernel)).astype(np.float32)
    b = rng.standard_normal(channels).astype(np.float32)
    border = tuple(k // 2 for k in kernel)
    attrs = conv.attrs(pads_begin=border, pads_end=border, groups=groups)
    z = apply(relu, apply(add, apply(conv, x, Constant(w, "w"), Constant(b, "b"), attrs=attrs), y))
    a, c = (rng.standard_normal(shape).astype(np.float32) for _ in "xy")
    return Function("block", (x, y), (z,), result_names=("z",)), a, c


@pytest.mark.parametrize(
    ("channels", "size", "batch", "kernel"),
    [
        (64, (28, 28), 1, (3, 3)),
        (32, (27, 30), 2, (3, 3)),
        (64, (13, 9), 3, (3, 3)),
        (48, (8, 8), 1, (3, 3)),
        (512, (14, 14), 1, (3, 3)),
        (16, (36, 36), 1, (3, 3)),  # three lines of nine tiles make a block
        (16, (12, 12), 14, (3, 3)),  # seven images of nine tiles make a block
        (64, (4, 20, 20), 1, (3, 3, 3)),  # several planes make a block
        (128, (3, 14, 14), 2, (3, 3, 3)),  # filters that are transformed by each call
        (32, (5, 9, 9), 1, (1, 3, 3)),
        (64, (9, 6, 7), 1, (3, 1, 1)),
        (64, (11, 12), 2, (5, 3)),
        (128, (17, 9), 1, (1, 3)),
        (384, (8, 8), 1, (3, 1)),
        (64, (40,), 2, (3,)),
        (40, (14, 14), 1, (3, 3)),  # one block of five vectors
        (52, (28, 28), 1, (3, 3)),  # half of a vector is left empty
    ],
)
def test_compiled_agrees_with_direct(
    channels: int,
    size: tuple[int, ...],
    batch: int,
    kernel: tuple[int, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What comes from the cache has no stages to look at.
    monkeypatch.setenv("MINICOMPILER_CACHE", str(tmp_path))
    fn, x, y = _block(channels, size, batch, 1, kernel=kernel)
    fast, exact = mc.compile(fn, threads=2), mc.compile(fn, threads=1, max_error=0.0)
    (a,), (b,) = fast(x, y), exact(x, y)
    assert any("winograd" in s.text for s in fast.stages), (
        "the cost estimate should choose Winograd here"
    )
    assert not any("winograd" in s.text for s in exact.stages)
    error = np.abs(a - b).max() / np.abs(b).max()
    assert error <= max(winograd.ERROR.values()), error
    assert error > 0, "the two algorithms should not round alike"


@pytest.mark.parametrize(
    ("groups", "channels", "size"),
    [
        (2, 128, (28, 28)),
        (5, 120, (13, 14)),  # blocks of 24 channels, as many as a group has
        (8, 448, (14, 14)),  # 56 channels: vectors of 8, as no block fits
        (16, 128, (28, 28)),  # two groups in a block
        (3, 96, (3, 12, 12)),
        (4, 256, (40,)),
    ],
)
def test_groups_agree_with_direct(
    groups: int, channels: int, size: tuple[int, ...], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each group reads channels of its own; one and two threads get the same bits."""
    monkeypatch.setenv("MINICOMPILER_CACHE", str(tmp_path))
    kernel = (3,) * len(size)
    fn, x, y = _block(channels, size, 2, 1, kernel=kernel, groups=groups)
    one, two = mc.compile(fn, threads=1), mc.compile(fn, threads=2)
    (want,) = mc.compile(fn, threads=1, max_error=0.0)(x, y)
    made = [s for s in one.stages if s.name == "schedule" and "winograd" in s.text]
    assert [s.details["rule"] for s in made] == ["transformed"]
    (got,) = one(x, y)
    assert 0 < np.abs(got - want).max() <= max(winograd.ERROR.values()) * np.abs(want).max()
    assert got.tobytes() == two(x, y)[0].tobytes()


@pytest.mark.parametrize(
    ("channels", "size"), [(64, (28, 28)), (256, (14, 14)), (64, (3, 12, 12)), (64, (33,))]
)
def test_same_bits_for_any_threads_and_batch(channels: int, size: tuple[int, ...]) -> None:
    """With filters that are transformed while compiling, and with those that are not."""
    kernel = (3,) * len(size)
    fn, x, y = _block(channels, size, 4, 2, kernel=kernel)
    one, two = mc.compile(fn, threads=1), mc.compile(fn, threads=2)
    together = one(x, y)[0]
    assert together.tobytes() == two(x, y)[0].tobytes()
    # The same seed gives the same weights; inputs come after them.
    alone = mc.compile(_block(channels, size, 1, 2, kernel=kernel)[0], threads=1)
    dynamic, _, _ = _block(channels, size, 1, 2, Dim("n", 1, 8), kernel)
    any_number = mc.compile(dynamic, threads=2)
    for k in range(len(x)):
        assert alone(x[k : k + 1], y[k : k + 1])[0].tobytes() == together[k].tobytes()
    for several in (x, y), (x[:3], y[:3]):
        assert any_number(*several)[0].tobytes() == together[: len(several[0])].tobytes()


def test_large_filters_are_not_kept_transformed() -> None:
    weights = 256 * 256 * 9 * 4
    module = mc.compile(_block(256, (14, 14), 1, 3)[0], threads=1)
    held = sum(a.nbytes for a in module._constants)
    assert weights < held < 1.01 * weights


LARGE = st.integers(7, 11)  # two tiles without a border


@st.composite
def windows(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], ConvAttrs]:
    """(sizes, kernel, attributes) of a convolution with one or two axes to transform."""
    rank = draw(st.integers(1, 3))
    moved = draw(st.sets(st.integers(0, rank - 1), min_size=1, max_size=2))
    kernel = [3 if k in moved else draw(st.integers(1, 5)) for k in range(rank)]
    strides = [1 if k in moved else draw(st.integers(1, 2)) for k in range(rank)]
    sizes = [draw(LARGE) if k in moved or n > 2 else draw(st.integers(n, 4))
             for k, n in enumerate(kernel)]  # fmt: skip
    borders = [tuple(draw(st.integers(0, n // 2)) for n in kernel) for _ in "be"]
    return tuple(sizes), tuple(kernel), ConvAttrs(tuple(strides), *borders)


@settings(max_examples=16, deadline=None, derandomize=True)
@given(
    windows(),
    st.integers(1, 3),
    st.lists(st.sampled_from([8, 16, 24, 36, 58]), min_size=2, max_size=2),
    st.sampled_from([2, 4]),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.sampled_from([1, 1, 2, 3]),
)
def test_any_windows(
    case: tuple[tuple[int, ...], tuple[int, ...], ConvAttrs],
    batch: int,
    channels: list[int],
    m: int,
    threads: int,
    symbolic: bool,
    groups: int,
) -> None:
    """Whatever the other axes of the windows are, and whether sizes are known while compiling: the
    numbers of the direct sum."""
    sizes, kernel, attrs = case
    if groups > 1:  # of whole vectors
        channels = [n - n % 8 for n in channels]
        attrs = dataclasses.replace(attrs, groups=groups)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, groups * channels[0], *sizes)).astype(np.float32)
    w = rng.standard_normal((groups * channels[1], channels[0], *kernel)).astype(np.float32)
    shape: list[Expr] = [Const(n) for n in x.shape]
    if symbolic:
        for k in winograd.transformed(attrs.windows("conv", kernel)):
            shape[2 + k] = Dim(f"s{k}", 6, 40)
    held = Input("x", TensorType(tuple(shape), float32))
    z = apply(relu, apply(conv, held, Constant(w, "w"), attrs=attrs))
    want = np.maximum(conv.reference(x, w, attrs), 0)
    (wanted,) = [c for c in conv.computes if c.name == f"winograd{m}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_tir, "choose_compute", lambda v, *_: _only(v, wanted))
        made = mc.compile(Function("f", (held,), (z,), result_names=("z",)), threads=threads,
                          record=False)  # fmt: skip
        (got,) = made(x)
    assert np.abs(got - want).max() <= winograd.ERROR[m] * np.abs(want).max()


def _only(v: Apply, compute: Compute) -> Compute:
    assert isinstance(v.op, Op)
    return compute if v.op is conv else v.op.computes[0]


@pytest.mark.parametrize(("channels", "kernel"), [(32, (3, 3)), (256, (3, 3)), (32, (3,))])
def test_sizes_may_be_symbolic(channels: int, kernel: tuple[int, ...]) -> None:
    """The same bits as in a model of known sizes, for any number of threads."""
    dims = [Dim(n, 6, 100) for n in "hw"[: len(kernel)]]
    rng = np.random.default_rng(3)
    w = rng.standard_normal((channels, channels, *kernel)).astype(np.float32)

    def compiled(sizes: Sequence[Expr], threads: int) -> mc.Module:
        x = Input("x", TensorType((Const(2), Const(channels), *sizes), float32))
        attrs = conv.attrs(pads_begin=(1,), pads_end=(1,))
        z = apply(relu, apply(conv, x, Constant(w, "w"), attrs=attrs))
        return mc.compile(Function("f", (x,), (z,), result_names=("z",)), threads=threads)

    one, two = compiled(dims, 1), compiled(dims, 2)
    for sizes in [(28, 20), (7, 90), (61, 6)]:
        x = rng.standard_normal((2, channels, *sizes[: len(kernel)])).astype(np.float32)
        (got,) = one(x)
        assert got.tobytes() == two(x)[0].tobytes()
        (want,) = compiled([*map(Const, x.shape[2:])], 1)(x)
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
