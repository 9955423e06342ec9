"""Strided windows whose input is padded block by block of lines: the results are those of the
reference, with the same bits for any threads and batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tolerance import assert_close

import minicompiler as mc
from minicompiler.frontend.builder import Builder
from minicompiler.ir.expr import Dim, Expr
from minicompiler.ir.graph import Function
from minicompiler.ops.evaluate import run_reference


def network(
    batch: int | Expr,
    channels: int,
    outputs: int,
    size: tuple[int, int],
    kernel: int,
    stride: int,
    groups: int = 1,
) -> Function:
    """Such a convolution between two others, with which it shares the layout."""
    net = Builder("strided")
    rng = np.random.default_rng(channels)

    def weight(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) / np.float32(np.prod(shape[1:]) ** 0.5)

    first = net.relu(net.conv(net.input("x", (batch, 8, *size)), weight(channels, 8, 1, 1)))
    pads = (kernel // 2,) * 2
    second = net.conv(
        first, weight(outputs, channels // groups, kernel, kernel), weight(outputs, 1)[:, 0],
        strides=(stride, stride), pads_begin=pads, pads_end=pads, groups=groups,
    )  # fmt: skip
    return net.function(y=net.conv(net.relu(second), weight(8, outputs, 1, 1)))


CASES = [
    (1, 64, 64, (56, 56), 3, 2),  # tiles of the last block reach beyond its lines
    (1, 32, 48, (48, 40), 5, 2),
    (2, 64, 32, (32, 28), 3, 2),
    (1, 40, 24, (33, 30), 5, 1),
    (1, 100, 64, (40, 56), 3, 3),
]


def test_groups() -> None:
    """Parts of the channels of several groups do not lie together: the input is padded whole."""
    fn = network(1, 120, 120, (56, 56), 3, 2, 5)
    x = np.random.default_rng(1).standard_normal((1, 8, 56, 56), np.float32)
    (got,) = mc.compile(fn, target="cpu:avx2,cores=2", max_error=0.0)(x)
    assert_close(got, run_reference(fn, [x])[0], 3 * 3 * 24)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results(case: tuple[int, int, int, tuple[int, int], int, int]) -> None:
    fn = network(*case)
    batch, channels, _, size, kernel, _ = case
    x = np.random.default_rng(1).standard_normal((batch, 8, *size), np.float32)
    one, two = (mc.compile(fn, threads=n, max_error=0.0)(x)[0] for n in (1, 2))
    assert one.tobytes() == two.tobytes()
    assert_close(one, run_reference(fn, [x])[0], kernel * kernel * channels)


def test_any_number_of_images() -> None:
    _, *rest = CASES[0]
    several = mc.compile(network(Dim("n", 1, 4), *rest), max_error=0.0)
    alone = mc.compile(network(1, *rest), max_error=0.0)
    x = np.random.default_rng(1).standard_normal((3, 8, 56, 56), np.float32)
    (together,) = several(x)
    for k in range(3):
        assert alone(x[k : k + 1])[0].tobytes() == together[k : k + 1].tobytes()


def test_what_a_block_reads_stays_with_its_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINICOMPILER_CACHE", str(tmp_path))
    module = mc.compile(network(*CASES[2]), target="cpu:avx2", max_error=0.0)
    texts = [s.text for s in module.stages if s.name == "schedule"]
    assert any("alloc pad_s: float32[1, 16, 7, 29] local" in t for t in texts)
