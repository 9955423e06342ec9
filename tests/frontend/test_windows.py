"""Images: windows over symbolic axes and such as do not fit, grids of points, norms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator
from onnx_models import model, node, numbers
from tolerance import assert_close

import minicompiler as mc
from minicompiler.errors import ImportModelError
from minicompiler.frontend.onnx import load
from minicompiler.ops.evaluate import run_reference


def both(op: str, x: np.ndarray, symbolic: bool, **attributes: Any) -> Any:
    inputs = "x w" if op.startswith("Conv") else "x"
    known = {"w": numbers(3, 3, 3, 2)} if inputs != "x" else {}
    shapes = {"x": (*x.shape[:2], "h", "w")} if symbolic else None
    return model([node(op, inputs, "y", **attributes)], {"x": x}, ["y"], known, shapes=shapes)


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("Conv", {}), ("ConvTranspose", {}), ("MaxPool", {}), ("LpPool", {}),
        ("AveragePool", {}), ("AveragePool", {"count_include_pad": 1}),
    ],
)  # fmt: skip
def test_the_border_of_a_symbolic_image_is_that_of_its_size(
    op: str, attributes: dict[str, int], mode: str
) -> None:
    """One module has the borders that models of each size have."""
    attributes |= {"kernel_shape": [3, 2], "strides": [2, 3], "auto_pad": mode}
    m = mc.compile(both(op, numbers(2, 3, 6, 6), True, **attributes), dims={"h": (1, 20)})
    for h, w in ((6, 6), (7, 8), (8, 7), (1, 1), (13, 20)):
        x = numbers(2, 3, h, w)
        (want,) = run_reference(load(both(op, x, False, **attributes)), [x])
        assert_close(m(x)[0], want, 18)


def test_the_largest_of_a_border_is_no_number_of_the_image() -> None:
    x = -np.abs(numbers(1, 1, 4, 6)) - 1
    attributes = {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"}
    assert mc.compile(both("MaxPool", x, True, **attributes))(x)[0].max() < -1


def test_positions_of_maxima_need_sizes_that_are_known() -> None:
    nodes = [node("MaxPool", "x", "y i", kernel_shape=[3], strides=[2], auto_pad="SAME_UPPER")]
    m = model(nodes, {"x": numbers(1, 1, 6)}, ["y", "i"], shapes={"x": (1, 1, "n")})
    with pytest.raises(ImportModelError, match="positions that MaxPool finds"):
        mc.compile(m)


@pytest.mark.parametrize("ceil_mode", [0, 1])
@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "LpPool"])
def test_windows_that_do_not_fit_are_none(op: str, ceil_mode: int) -> None:
    """With ceil_mode the first one may run over the end."""
    for size, windows in ((1, 0), (2, ceil_mode)):
        x = numbers(2, 3, 8, size)
        found = both(op, x, False, kernel_shape=[2, 3], strides=[1, 2], ceil_mode=ceil_mode)
        assert mc.compile(found)(x)[0].shape == (2, 3, 7, windows)


def test_no_positions_where_no_window_fits() -> None:
    nodes = [node("MaxPool", "x", "y i", kernel_shape=[5])]
    y, i = mc.compile(model(nodes, {"x": numbers(1, 2, 4)}, ["y", "i"]))(numbers(1, 2, 4))
    assert y.shape == i.shape == (1, 2, 0)
    assert i.dtype == np.int64


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_an_image_that_shrinks_to_nothing(mode: str) -> None:
    x = numbers(1, 1, 3, 3)
    scales = np.array([1, 1, 0.2, 1], np.float32)
    m = model([node("Resize", "x - s", "y", mode=mode)], {"x": x}, ["y"], {"s": scales})
    assert mc.compile(m)(x)[0].shape == (1, 1, 0, 3)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32"])
@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_integers_between_others_are_rounded_and_saturated(mode: str, dtype: str) -> None:
    x = np.random.default_rng(0).integers(-128, 127, (1, 2, 9, 7)).astype(dtype)
    scales = np.array([1, 1, 1.75, 3], np.float32)
    m = model([node("Resize", "x - s", "y", mode=mode)], {"x": x}, ["y"], {"s": scales})
    (got,), (want,) = mc.compile(m)(x), ReferenceEvaluator(m).run(None, {"x": x})
    assert got.dtype == want.dtype == dtype
    assert np.abs(got.astype(np.int64) - want).max() <= 1  # halves may lie a rounding error apart


@pytest.mark.parametrize("align_corners", [0, 1])
@pytest.mark.parametrize("spatial", [(4, 5), (3, 4, 5)])
def test_points_of_an_image_that_an_affine_map_moves(
    spatial: tuple[int, ...], align_corners: int
) -> None:
    """For one image and for several: the definition by other operators has no axis for one."""
    d = len(spatial)
    lines = [
        np.linspace(-1, 1, n) if align_corners else (2 * np.arange(n) + 1) / n - 1 for n in spatial
    ]
    points = np.stack([*np.meshgrid(*lines, indexing="ij")[::-1], np.ones(spatial)], -1)
    for images in (1, 3):
        theta = numbers(images, d, d + 1)
        size = {"s": np.array([images, 2, *spatial])}
        grid = node("AffineGrid", "t s", "y", align_corners=align_corners)
        (got,) = mc.compile(model([grid], {"t": theta}, ["y"], size, opset=20))(theta)
        want = np.einsum("nij,...j->n...i", theta, points)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_points_of_an_image_of_any_size() -> None:
    nodes = [node("Shape", "x", "s"), node("AffineGrid", "t s", "g"),
             node("GridSample", "x g", "y")]  # fmt: skip
    x, t = numbers(2, 3, 4, 6), np.tile(np.eye(2, 3, dtype=np.float32), (2, 1, 1))
    shapes = {"t": ("n", 2, 3), "x": ("n", 3, "h", "w")}
    m = mc.compile(model(nodes, {"t": t, "x": x}, ["y"], opset=20, shapes=shapes))
    for image in (x, numbers(2, 3, 7, 5)):
        np.testing.assert_allclose(m(t, image)[0], image, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_norms_of_whole_images(p: int) -> None:
    x = numbers(2, 5, 7, 3)
    (got,) = mc.compile(model([node("GlobalLpPool", "x", "y", p=p)], {"x": x}, ["y"]))(x)
    want = (np.abs(x) ** p).sum((2, 3), keepdims=True) ** (1 / p)
    np.testing.assert_allclose(got, want, rtol=1e-5)
