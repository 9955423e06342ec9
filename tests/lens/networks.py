"""Small models for the tests of explain and verify."""

from __future__ import annotations

import numpy as np

from minicompiler.frontend.builder import Builder
from minicompiler.ir.graph import Function

Array = np.ndarray


def drawn(rng: np.random.Generator, *shape: int) -> Array:
    """Weights whose products keep the size of what they are multiplied with."""
    terms = int(np.prod(shape[1:] if len(shape) == 4 else shape[:-1]))
    return (rng.standard_normal(shape) * max(terms, 1) ** -0.5).astype(np.float32)


def network() -> tuple[Function, dict[str, Array]]:
    """x[batch, 8, 5, 5] -> y[batch, 21]: something for every pass to do, and feeds for it."""
    rng = np.random.default_rng(0)
    net = Builder("net")
    x = net.input("x", ("batch", 8, 5, 5))
    pads = {"pads_begin": (1, 1), "pads_end": (1, 1)}
    norm = np.linspace(0.5, 2, 8, dtype=np.float32)
    h = net.conv(x, drawn(rng, 8, 8, 3, 3), **pads)
    h = net.relu(net.batch_norm(h, norm, norm, norm, norm))
    g = net.add(net.conv(h, drawn(rng, 8, 8, 3, 3), **pads), h)
    per_channel = net.constant(np.linspace(0, 1, 8, dtype=np.float32).reshape(8, 1, 1), "k")
    g = net.mul(g, net.exp(per_channel))
    g = net.add(net.leaky_relu(g, alpha=0.1), net.leaky_relu(g, alpha=0.3))
    p = net.reduce_mean(g, axes=(2, 3), keepdims=False)
    y = net.softmax(net.matmul(p, drawn(rng, 8, 21)))
    feeds = {"x": rng.uniform(-2, 2, (2, 8, 5, 5)).astype(np.float32)}
    return net.function(y=y), feeds


def scaled(factor: float = 2.0) -> Function:
    """y = x * factor, one kernel `fused_mul`."""
    net = Builder("scaled")
    x = net.input("x", ("n",))
    return net.function(y=net.mul(x, factor))
