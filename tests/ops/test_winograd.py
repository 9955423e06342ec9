"""Winograd convolution: the matrices are exact, the stated error holds, and it compiles at odd
sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import minicompiler as mc
from minicompiler.ir.expr import Const, Dim, Expr
from minicompiler.ir.graph import Constant, Function, Input, apply
from minicompiler.ir.types import TensorType, float32
from minicompiler.ops import winograd
from minicompiler.ops.activations import relu
from minicompiler.ops.conv import conv
from minicompiler.ops.elementwise import add


@pytest.mark.parametrize("m", [2, 4])
def test_matrices_compute_a_correlation(m: int) -> None:
    at, g, bt = (np.array(x) for x in winograd.matrices(m))
    rng = np.random.default_rng(0)
    d, w = rng.standard_normal(m + 2), rng.standard_normal(3)
    want = [d[i : i + 3] @ w for i in range(m)]
    np.testing.assert_allclose(at @ ((g @ w) * (bt @ d)), want, rtol=1e-12)


def _block(
    channels: int, size: tuple[int, int], batch: int, seed: int, number: Expr | None = None
) -> tuple[Function, np.ndarray, np.ndarray]:
    """relu(conv(x) + bias + y) and its inputs. number: of images, as the model says it."""
    rng = np.random.default_rng(seed)
    shape = (batch, channels, *size)
    sizes = (Const(batch) if number is None else number, *map(Const, shape[1:]))
    x, y = (Input(n, TensorType(sizes, float32)) for n in "xy")
    w = rng.standard_normal((channels, channels, 3, 3)).astype(np.float32)
    b = rng.standard_normal(channels).astype(np.float32)
    attrs = conv.attrs(pads_begin=(1, 1), pads_end=(1, 1))
    z = apply(relu, apply(add, apply(conv, x, Constant(w, "w"), Constant(b, "b"), attrs=attrs), y))
    a, c = (rng.standard_normal(shape).astype(np.float32) for _ in "xy")
    return Function("block", (x, y), (z,), result_names=("z",)), a, c


@pytest.mark.parametrize(
    ("channels", "size", "batch"),
    [
        (64, (28, 28), 1),
        (32, (27, 30), 2),
        (64, (13, 9), 3),
        (48, (8, 8), 1),
        (512, (14, 14), 1),
        (16, (36, 36), 1),  # three lines of nine tiles make a block
        (16, (12, 12), 14),  # seven images of nine tiles make a block
    ],
)
def test_compiled_agrees_with_direct(
    channels: int,
    size: tuple[int, int],
    batch: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What comes from the cache has no stages to look at.
    monkeypatch.setenv("MINICOMPILER_CACHE", str(tmp_path))
    fn, x, y = _block(channels, size, batch, 1)
    fast, exact = mc.compile(fn, threads=2), mc.compile(fn, threads=1, max_error=0.0)
    (a,), (b,) = fast(x, y), exact(x, y)
    assert any("winograd" in s.text for s in fast.stages), (
        "the cost estimate should choose Winograd here"
    )
    assert not any("winograd" in s.text for s in exact.stages)
    error = np.abs(a - b).max() / np.abs(b).max()
    assert error <= max(winograd.ERROR.values()), error
    assert error > 0, "the two algorithms should not round alike"


@pytest.mark.parametrize(("channels", "size"), [(64, 28), (256, 14)])
def test_same_bits_for_any_threads_and_batch(channels: int, size: int) -> None:
    """With filters that are transformed while compiling, and with those that are not."""
    fn, x, y = _block(channels, (size, size), 4, 2)
    one, two = mc.compile(fn, threads=1), mc.compile(fn, threads=2)
    together = one(x, y)[0]
    assert together.tobytes() == two(x, y)[0].tobytes()
    # The same seed gives the same weights; inputs come after them.
    alone = mc.compile(_block(channels, (size, size), 1, 2)[0], threads=1)
    any_number = mc.compile(_block(channels, (size, size), 1, 2, Dim("n", 1, 8))[0], threads=2)
    for k in range(len(x)):
        assert alone(x[k : k + 1], y[k : k + 1])[0].tobytes() == together[k].tobytes()
    for several in (x, y), (x[:3], y[:3]):
        assert any_number(*several)[0].tobytes() == together[: len(several[0])].tobytes()


def test_large_filters_are_not_kept_transformed() -> None:
    weights = 256 * 256 * 9 * 4
    module = mc.compile(_block(256, (14, 14), 1, 3)[0], threads=1)
    held = sum(a.nbytes for a in module._constants)
    assert weights < held < 1.01 * weights
