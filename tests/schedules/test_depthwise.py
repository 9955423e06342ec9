"""Windows that slide over each channel by itself: every size, stride, dilation and border gives
what the plain nest gives, no copy with a border is made, and taps in a border are not touched."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
from random_steps import step
from tir_samples import SAMPLES, Sample, relu, tensor
from tolerance import assert_close

import minicompiler as mc
from minicompiler.frontend.builder import Builder
from minicompiler.ir import interp
from minicompiler.ir.expr import TRUE, Dim, Expr, free_vars
from minicompiler.ir.graph import Function
from minicompiler.ir.layout import IndexMap
from minicompiler.ir.op import REGISTRY
from minicompiler.ir.tir import UNROLL, Block, For, If, PrimFunc, statements
from minicompiler.ir.verify_tir import verify_tir
from minicompiler.lower.blocks import hoist_conditions, lower_blocks, unswitch
from minicompiler.lower.to_tir import from_tensors
from minicompiler.ops.evaluate import run_reference
from minicompiler.schedules.cpu import schedule
from minicompiler.schedules.schedule import Schedule, layout_from
from minicompiler.target import Target

AVX2, AVX512 = Target.parse("cpu:avx2"), Target.parse("cpu:avx512")


def windows(
    op: str,
    size: tuple[int | Expr, ...],
    kernel: tuple[int, ...],
    channels: int = 8,
    layout: IndexMap | None = None,
    **attrs: Any,
) -> PrimFunc:
    """An operator on windows over [1, channels, *size], each channel by itself, then ReLU. Without
    a layout the channels lie in blocks of 8."""
    x = tensor("x", 1, channels, *size)
    args = [x]
    if op == "conv":
        args.append(tensor("w", channels, 1, *kernel))
        attrs["groups"] = channels
    else:
        attrs["kernel"] = kernel
    made = relu(REGISTRY[op].computes[0].build(*args, REGISTRY[op].attrs(**attrs)))
    held = layout or IndexMap.blocked(2 + len(size), 1, 8)
    return from_tensors(op, args, [made], args[1:], {x: held, made: held})


def lowered(func: PrimFunc) -> PrimFunc:
    return unswitch(hoist_conditions(lower_blocks(func)))


def border(*pads: int) -> dict[str, Any]:
    return {"pads_begin": pads, "pads_end": pads}


CHANNELS_LAST = layout_from([[0, 1, 0], [2, 1, 0], [3, 1, 0], [1, 1, 0]])
ALL = ("conv", "max_pool", "avg_pool")
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "odd": (ALL, {"size": (5, 13), "kernel": (3, 3), **border(1, 1)}),
    "one_sided": (
        ALL, {"size": (6, 9), "kernel": (3, 3), "pads_begin": (0, 2), "pads_end": (1, 0)},
    ),
    "strided": (ALL, {"size": (6, 11), "kernel": (3, 5), "strides": (2, 3), **border(1, 2)}),
    "dilated": (("conv",), {"size": (6, 9), "kernel": (3, 3), "dilations": (4, 4), **border(4, 4)}),
    "larger_than_the_image": (("conv",), {"size": (2, 4), "kernel": (5, 7), **border(2, 3)}),
    "line": (ALL, {"size": (19,), "kernel": (4,), "pads_begin": (2,), "pads_end": (1,)}),
    "volume": (ALL, {"size": (2, 3, 9), "kernel": (3, 2, 3), **border(1, 0, 1)}),
    "no_border": (ALL, {"size": (4, 15), "kernel": (3, 3)}),
    "channels_last": (
        ("conv",),
        {"size": (3, 9), "kernel": (3, 3), "channels": 11, "layout": CHANNELS_LAST, **border(1, 1)},
    ),
    "dynamic": (
        ("conv",),
        {"size": (Dim("h", 3, 30), Dim("w", 3, 30)), "kernel": (3, 3), **border(1, 1)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case, op", [(c, op) for c, (ops, _) in CASES.items() for op in ops])
def test_every_window(case: str, op: str) -> None:
    sample = Sample(windows(op, **CASES[case][1]), {"h": 4, "w": 19}, length=64)
    for target in (AVX2, AVX512):
        s = schedule(sample.func, target, after_step=verify_tir)
        assert s.rule == "depthwise"
        verify_tir(s.func, finished=True)
    for f in (s.func, lowered(s.func)):
        for got, want in zip(sample.run(f), sample.run(), strict=True):
            assert_close(got, want, sample.length, largest=1.0)


@pytest.mark.parametrize("columns", (3, 5, 8))
def test_taps_in_a_border_are_skipped(columns: int) -> None:
    """An infinite weight makes an infinite or undefined result of all that it is multiplied with:
    the first tap of a window, at the upper and the left edge, must not be multiplied with zero."""
    func = windows("conv", (4, 15), (3, 3), **border(1, 1))
    s = schedule(func, AVX2, {"columns": columns})
    assert len(s.func.buffers) == 1  # the packed weights: there is no copy with a border
    x, w = np.ones((1, 8, 4, 15), np.float32), np.ones((8, 1, 3, 3), np.float32)
    w[:, :, 0, 0] = np.inf
    (y,) = interp.run(lowered(s.func), [x, w])
    assert np.isfinite(y[:, :, 0, :]).all() and np.isfinite(y[:, :, :, 0]).all()
    assert np.isinf(y[:, :, 1:, 1:]).all()


def test_tiles_at_the_ends_of_a_line_have_their_own_code() -> None:
    """40 columns are five tiles: the first and the last know their place, others ask nothing."""
    done = lowered(schedule(windows("conv", (4, 40), (3, 3), **border(1, 1)), AVX2).func)
    asked = [str(s.cond) for s in statements(done) if isinstance(s, If)]
    places = [c for c in asked if c.startswith("i3_2_o ==")]
    assert [c.split(" == ")[1] for c in places] == ["0", "4"]
    lines = [c for c in asked if "i3" in c and c not in places]
    assert all("i3_2_i" in c and "i3_2_o" not in c for c in lines)  # unrolled: decided in the code


def test_tiles_of_lines_of_any_length_do_not_branch() -> None:
    """Which taps lie in a border is chosen, not asked: only whole lines are left out."""
    unknown = {"size": (Dim("h", 3, 30), Dim("w", 3, 30)), "kernel": (3, 3), **border(1, 1)}
    s = schedule(windows("conv", **unknown), AVX2)
    tiled = {x.var for x in statements(s.func) if isinstance(x, For) and x.kind is UNROLL}
    (block,) = [b for b in statements(s.func) if isinstance(b, Block) and b.name == "conv"]
    assert block.where is not TRUE and not tiled & free_vars(block.where)
    known = schedule(windows("conv", (4, 40), (3, 3), **border(1, 1)), AVX2)
    assert "keep=None" in "\n".join(map(str, known.steps))


@pytest.mark.parametrize("seed", range(40))
def test_random_steps_keep_the_result(seed: int) -> None:
    """Law 6 where a reduction has conditions on its own indices."""
    sample, rng = SAMPLES["conv"](), Random(seed)
    s = Schedule(sample.func, AVX2)
    s.inline("pad")
    s.decompose_reduction("conv", "k0")
    s.skip("conv")
    for _ in range(12):
        if step(s, lambda options: rng.choice(list(options))):
            for got, want in zip(sample.run(s.func), sample.run(), strict=True):
                assert_close(got, want, sample.length, largest=1.0)


def chain(rng: Random) -> tuple[Function, np.ndarray]:
    """Products over channels around a depthwise convolution, so that its values are in a blocked
    layout, and an input."""
    channels, height, width = rng.choice((8, 16, 24)), rng.randint(1, 9), rng.randint(1, 40)
    kernel = rng.randint(1, 5), rng.randint(1, 5)
    strides, dilations = [(rng.randint(1, n), rng.randint(1, n)) for n in (3, 2)]
    begin, end = [], []
    for n, k, d in zip((height, width), kernel, dilations, strict=True):
        reach = (k - 1) * d
        begin.append(rng.randint(0, reach))
        end.append(max(reach + 1 - n - begin[-1], rng.randint(0, reach)))
    random = np.random.default_rng(rng.randint(0, 99))

    def uniform(*shape: int) -> np.ndarray:
        return random.uniform(-1, 1, shape).astype(np.float32)

    net = Builder("chain")
    x = net.conv(net.input("x", (2, 3, height, width)), uniform(channels, 3, 1, 1))
    weight, bias = uniform(channels, 1, *kernel), uniform(channels)
    x = net.conv(
        x, weight, bias, strides=strides, dilations=dilations, groups=channels,
        pads_begin=tuple(begin), pads_end=tuple(end),
    )  # fmt: skip
    y = net.conv(net.relu(x), uniform(4, channels, 1, 1))
    return net.function(y=y), uniform(2, 3, height, width)


@pytest.mark.parametrize("seed", range(12))
def test_compiled(seed: int) -> None:
    fn, x = chain(Random(seed))
    for got, want in zip(mc.compile(fn, threads=2)(x), run_reference(fn, [x]), strict=True):
        assert_close(got, want, 128, largest=float(np.abs(want).max()))
