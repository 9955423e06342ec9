"""ResNet-18 built by hand, with seeded weights: what `minicompiler demo` compiles.

    fn = resnet18(224)          a graph Function: x[1, 3, 224, 224] -> logits[1, 1000]

He et al., "Deep Residual Learning for Image Recognition" (2015), table 1; weights scaled as in
He et al., "Delving Deep into Rectifiers" (2015), so that activations keep their size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minicompiler.frontend.builder import Builder
from minicompiler.ir.graph import Function, Value

WIDTHS = (64, 128, 256, 512)
BLOCKS_PER_STAGE = 2


def resnet18(size: int = 224, classes: int = 1000, seed: int = 0) -> Function:
    """ResNet-18 for images of size x size pixels; the same seed gives the same weights."""
    net = _Net(seed)
    x = net.input("x", (1, 3, size, size))
    y = net.relu(net.conv_norm(x, 3, 64, 7, 2, "stem"), name="stem.relu")
    y = net.max_pool(y, kernel=(3, 3), strides=(2, 2), pads=(1, 1), name="stem.pool")
    channels = 64
    for stage, width in enumerate(WIDTHS):
        for block in range(BLOCKS_PER_STAGE):
            stride = 2 if stage > 0 and block == 0 else 1
            y = net.block(y, channels, width, stride, f"layer{stage + 1}.{block}")
            channels = width
    y = net.reduce_mean(y, axes=(2, 3), keepdims=False, name="pool")
    weight = net.normal((channels, classes), channels)
    logits = net.add(net.matmul(y, weight, name="fc"), net.normal((classes,), classes), name="bias")
    return net.function(logits=logits)


class _Net(Builder):
    """A builder that draws weights and knows the repeated parts of the network."""

    def __init__(self, seed: int) -> None:
        super().__init__("resnet18")
        self.rng = np.random.default_rng(seed)

    def normal(self, shape: tuple[int, ...], fan_in: int) -> np.ndarray:
        scale = np.float32(np.sqrt(2 / fan_in))
        return self.rng.standard_normal(shape, np.float32) * scale

    def conv_norm(self, x: Value, c: int, o: int, kernel: int, stride: int, name: str) -> Any:
        """Convolution and batch normalisation, which the compiler folds into one."""
        weight = self.normal((o, c, kernel, kernel), c * kernel * kernel)
        pads = (kernel // 2, kernel // 2)
        y = self.conv(x, weight, strides=(stride, stride), pads=pads, name=f"{name}.conv")
        scale, var = (self.rng.uniform(0.5, 1.5, o).astype(np.float32) for _ in range(2))
        shift, mean = (self.normal((o,), 50) for _ in range(2))
        return self.batch_norm(y, scale, shift, mean, var, name=f"{name}.norm")

    def block(self, x: Value, c: int, o: int, stride: int, name: str) -> Any:
        """Two convolutions and the way around them."""
        y = self.relu(self.conv_norm(x, c, o, 3, stride, f"{name}.1"), name=f"{name}.1.relu")
        y = self.conv_norm(y, o, o, 3, 1, f"{name}.2")
        if stride != 1 or c != o:
            x = self.conv_norm(x, c, o, 1, stride, f"{name}.skip")
        return self.relu(self.add(y, x, name=f"{name}.add"), name=f"{name}.relu")


def image(size: int = 224, seed: int = 1) -> np.ndarray:
    """A random input of the network."""
    return np.random.default_rng(seed).standard_normal((1, 3, size, size), np.float32)
