"""Images of any height and width: the schedules of known sizes, but for what needs the numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tolerance import assert_close

import minicompiler as mc
from minicompiler import te
from minicompiler.codegen.llvm import emit
from minicompiler.frontend.builder import Builder
from minicompiler.ir.expr import Dim, Expr
from minicompiler.ir.graph import Function
from minicompiler.ir.layout import IndexMap
from minicompiler.ir.op import REGISTRY
from minicompiler.ir.tir import PrimFunc
from minicompiler.ir.types import float32
from minicompiler.ir.verify_tir import verify_tir
from minicompiler.lower.blocks import hoist_conditions, lower_blocks, unswitch
from minicompiler.lower.to_tir import from_tensors
from minicompiler.ops.evaluate import run_reference
from minicompiler.schedules.cpu import schedule
from minicompiler.target import Target

AVX2 = Target.parse("cpu:avx2")
H, W = Dim("h", 1, 4096), Dim("w", 1, 4096)


def network(kernel: int, stride: int, groups: int = 1, channels: int = 32) -> Function:
    """A convolution of images of any number and size between two others."""
    net = Builder("any")
    rng = np.random.default_rng(kernel)

    def weight(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) / np.float32(np.prod(shape[1:]) ** 0.5)

    x = net.input("x", (Dim("n", 1, 64), 8, H, W))
    first = net.relu(net.conv(x, weight(channels, 8, 1, 1)))
    pads = (kernel // 2,) * 2
    second = net.conv(
        first, weight(channels, channels // groups, kernel, kernel),
        strides=(stride, stride), pads_begin=pads, pads_end=pads, groups=groups,
    )  # fmt: skip
    return net.function(y=net.conv(net.relu(second), weight(24, channels, 1, 1)))


NETWORKS = {
    "pointwise": (1, 1, 1),
    "strided": (3, 2, 1),
    "winograd": (3, 1, 1),
    "depthwise": (5, 1, 32),
    "strided_depthwise": (3, 2, 32),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_results(name: str) -> None:
    kernel, stride, groups = NETWORKS[name]
    fn = network(kernel, stride, groups)
    one, two = (mc.compile(fn, threads=n) for n in (1, 2))
    rng = np.random.default_rng(1)
    for size in [(1, 1, 1), (3, 2, 1), (1, 7, 7), (2, 14, 13), (1, 5, 40), (2, 33, 1)]:
        n, h, w = size
        x = rng.standard_normal((n, 8, h, w), np.float32)
        (y,) = one(x)
        assert y.tobytes() == two(x)[0].tobytes()
        assert_close(y, run_reference(fn, [x])[0], kernel * kernel * 32, largest=4.0)
        assert y[:1].tobytes() == one(x[:1])[0].tobytes()


def test_small_images_of_many_channels_are_shared_by_channels() -> None:
    """One block of tiles is all of a small image: its outputs are a group for each thread."""
    net = Builder("deep")
    w = np.random.default_rng(2).standard_normal((256, 256, 3, 3), np.float32) / np.float32(48)
    x = net.input("x", (Dim("n", 1, 64), 256, H, W))
    fn = net.function(y=net.relu(net.conv(x, w, pads_begin=(1, 1), pads_end=(1, 1))))
    one, two = (mc.compile(fn, target=f"cpu:avx2,cores={n}", threads=n) for n in (1, 2))
    texts = [s.text for s in two.stages if s.name == "schedule"]
    shared = [x for t in texts for x in t.splitlines() if x.lstrip().startswith("parallel i0_8_f")]
    assert [x.endswith("*n*2:") for x in shared] == [True]
    for n, h, w in [(1, 7, 7), (2, 5, 9)]:
        given = np.random.default_rng(h).standard_normal((n, 256, h, w), np.float32)
        (y,) = two(given)
        assert y.tobytes() == one(given)[0].tobytes()
        assert_close(y, run_reference(fn, [given])[0], 9 * 256, largest=4.0)


def schedules(fn: Function, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("MINICOMPILER_CACHE", str(tmp_path))
    module = mc.compile(fn, target="cpu:avx2")
    return [s.text for s in module.stages if s.name == "schedule"]


def test_rows_of_an_image_lie_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images of a batch stay a loop of their own, since blocks of channels lie between them:
    no pixel is divided by the size of an image."""
    texts = schedules(network(1, 1), tmp_path, monkeypatch)
    (middle,) = [t for t in texts if "p0: float32[n, 32, h, w]" in t and "r0: float32[n, 32" in t]
    assert "unroll i2_i3_i" in middle and "i0_i2_i3_i" not in middle


def blocked_conv(height: int | Expr, width: int | Expr) -> PrimFunc:
    x, w = (
        te.placeholder("x", (1, 16, height, width), float32),
        te.placeholder("w", (16, 16, 3, 3), float32),
    )
    conv = REGISTRY["conv"]
    attrs = conv.attrs(strides=(2, 2), pads_begin=(1, 1), pads_end=(1, 1))
    y = conv.computes[0].build(x, w, attrs)
    held = IndexMap.blocked(4, 1, 16)
    return from_tensors("conv", [x, w], [y], [w], {x: held, y: held})


def test_a_tile_divides_once() -> None:
    """The rows of a register tile count on from the first, which alone is divided by the length of
    a line."""
    s = schedule(blocked_conv(H, W), AVX2, {"rows": 6}, after_step=verify_tir)
    text = emit(unswitch(hoist_conditions(lower_blocks(s.func)))).text
    divisions = [x for x in text.splitlines() if "div i64" in x or "rem i64" in x]
    by_sizes = [x for x in divisions if x.rsplit(", ", 1)[1].startswith("%")]
    assert 0 < len(by_sizes) <= 8


def test_images_are_one_line_where_all_operands_step_through_them_as_one() -> None:
    x, b = te.placeholder("x", (8, 16, H, W), float32), te.placeholder("b", (16,), float32)
    y = te.compute((8, 16, H, W), lambda n, c, i, j: x[n, c, i, j] + b[c], "y")
    s = schedule(from_tensors("f", [x, b], [y]), AVX2, after_step=verify_tir)
    assert "fuse(names=['i2', 'i3'])" in "\n".join(map(str, s.steps))
    z = te.compute((8, 16, W, H), lambda n, c, i, j: x[n, c, j, i], "z")
    s = schedule(from_tensors("f", [x], [z]), AVX2, after_step=verify_tir)
    assert "fuse(names=['i2', 'i3'])" not in "\n".join(map(str, s.steps))
