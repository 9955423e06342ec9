"""Channels in blocks that are no power of two, or do not fill their last one: nobody reads the
memory behind them."""

from __future__ import annotations

import numpy as np
import pytest
from tolerance import assert_close

import minicompiler as mc
from minicompiler.frontend.builder import Builder
from minicompiler.ir.graph import Function, Value
from minicompiler.ops.evaluate import run_reference


def net(channels: int) -> Function:
    """Convolutions of every kind that read and write padded blocks, a pool, a join, a sum."""
    rng = np.random.default_rng(0)
    b = Builder("padded")

    def weight(*shape: int) -> np.ndarray:
        scale = np.sqrt(np.prod(shape[1:]))
        return (rng.standard_normal(shape) / scale).astype(np.float32)

    def conv(x: Value, w: np.ndarray, groups: int = 1, stride: int = 1) -> Value:
        pad = ((w.shape[2] - 1) // 2,) * 2
        return b.conv(
            x, w, weight(w.shape[0], 1)[:, 0], groups=groups, strides=(stride,) * 2,
            pads_begin=pad, pads_end=pad,
        )  # fmt: skip

    x = b.input("x", (2, 32, 9, 9))
    first = b.relu(conv(x, weight(channels, 32, 1, 1)))
    deep = b.relu(conv(first, weight(channels, 1, 3, 3), groups=channels))
    both = b.add(conv(deep, weight(channels, channels, 3, 3)), first)
    small = conv(both, weight(channels, channels, 3, 3), stride=2)
    joined = b.concat(small, conv(small, weight(32, channels, 1, 1)), axis=1)
    pooled = b.max_pool(b.relu(joined), kernel=(2, 2))
    return b.function(mean=b.reduce_mean(pooled, axes=(2, 3)), pooled=pooled)


@pytest.mark.parametrize("channels", [24, 40, 63, 72, 95, 100, 120, 127])
def test_padded_blocks(channels: int) -> None:
    fn = net(channels)
    x = np.random.default_rng(1).standard_normal((2, 32, 9, 9)).astype(np.float32)
    module = mc.compile(fn, threads=2)
    for got, want in zip(module(x), run_reference(fn, [x]), strict=True):
        assert_close(got, want, 9 * channels)
