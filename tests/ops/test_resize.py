"""Resizing to sizes that no one knows while compiling: results, and what is done once per axis."""

from __future__ import annotations

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator
from onnx_models import model, node, numbers

import minicompiler as mc
from minicompiler import te
from minicompiler.ir.expr import Binary, Dim, Load, const_int, walk, wrap
from minicompiler.ir.graph import Function, Input, apply
from minicompiler.ir.tir import Block, PrimFunc, statements
from minicompiler.ir.types import TensorType, float32
from minicompiler.lower.to_tir import from_tensors
from minicompiler.ops.evaluate import run_reference
from minicompiler.ops.resize import ResizeAttrs, resize

H, W = Dim("h", 1, 512), Dim("w", 1, 512)


def attrs(*sizes: object, mode: str = "linear", coordinates: str = "half_pixel") -> ResizeAttrs:
    return ResizeAttrs((1, 3, *sizes), (), mode, coordinates)  # type: ignore[arg-type]


def lowered(height: object, width: object, a: ResizeAttrs) -> PrimFunc:
    x = te.placeholder("x", (1, 3, height, width), float32)  # type: ignore[arg-type]
    y = resize.computes[0].build(x, a)
    return from_tensors("f", [x], [y])


def blocks(func: PrimFunc) -> list[Block]:
    return [s for p in func.phases for s in statements(p) if isinstance(s, Block)]


def divides(b: Block) -> bool:
    return any(
        type(e) is Binary and e.op in ("floordiv", "mod") and const_int(e.b) is None
        for e in walk(b.body.value)
    )


def looks_up(b: Block) -> bool:
    """Whether elements that lie side by side are read from anywhere."""
    loads = [e for e in walk(b.body.value) if type(e) is Load]
    return any(type(e) is Load for x in loads for e in walk(x.indices[-1]))


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_places_are_computed_once_per_axis(mode: str) -> None:
    made = blocks(lowered(7, 9, attrs(H, W, mode=mode)))
    once = [b for b in made if divides(b)]
    assert len(once) == 4 and all(len(b.iters) == 1 for b in once)
    found = [b.body.buffer.shape[2:] for b in made if looks_up(b)]
    assert [(const_int(h), w) for h, w in found] == [(7, W)]


def test_nearest_places_are_computed_once_per_axis() -> None:
    once = [b for b in blocks(lowered(7, 9, attrs(H, W, mode="nearest"))) if divides(b)]
    assert len(once) == 2 and all(len(b.iters) == 1 for b in once)


def test_the_last_axis_is_done_where_there_are_fewest_lines() -> None:
    def height_then(*sizes: int) -> list[int | None]:
        made = blocks(lowered(16, 24, attrs(*sizes)))
        return [const_int(b.body.buffer.shape[2]) for b in made if len(b.iters) > 1]

    assert height_then(40, 60) == [16, 40]
    assert height_then(5, 7) == [5, 5]


def test_known_sizes_need_no_table() -> None:
    assert len(blocks(lowered(16, 24, attrs(32, 48)))) == 2


@pytest.mark.parametrize("mode", ["linear", "cubic", "nearest"])
@pytest.mark.parametrize("coordinates", ["half_pixel", "align_corners", "asymmetric"])
def test_one_module_resizes_to_all_sizes(mode: str, coordinates: str) -> None:
    x, like = (
        Input(name, TensorType(tuple(map(wrap, (1, 3, *sizes))), float32))
        for name, sizes in (("x", (5, 7)), ("like", (H, W)))
    )
    a = attrs(H, W, mode=mode, coordinates=coordinates)
    fn = Function("f", (x, like), (apply(resize, x, attrs=a),))
    m = mc.compile(fn, threads=2)
    data = np.random.default_rng(0).random((1, 3, 5, 7), np.float32)
    for sizes in ((5, 7), (1, 1), (3, 2), (20, 11), (40, 130)):
        other = np.zeros((1, 3, *sizes), np.float32)
        (right,) = run_reference(fn, [data, other])
        np.testing.assert_allclose(m(data, other)[0], right, atol=2e-6)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("scale", [0.625, 1.75])
@pytest.mark.parametrize("coordinates", ["half_pixel_symmetric", "align_corners"])
def test_positions_know_what_rounding_the_size_cut_off(
    mode: str, scale: float, coordinates: str
) -> None:
    """Of images whose sizes come with the call."""
    scales = np.array([1, 1, scale, 2 * scale], np.float32)
    resized = node(
        "Resize", "x - scales", "y",
        mode=mode, coordinate_transformation_mode=coordinates,
    )  # fmt: skip
    made = model([resized], {"x": numbers(1, 2, 5, 7)}, ["y"], {"scales": scales}, opset=19,
                 shapes={"x": ("n", 2, "h", "w")})  # fmt: skip
    module = mc.compile(made)
    for height, width in ((5, 7), (8, 11), (24, 13)):
        x = numbers(2, 2, height, width)
        want = ReferenceEvaluator(made).run(None, {"x": x})
        np.testing.assert_allclose(module(x)[0], want[0], atol=1e-5)
