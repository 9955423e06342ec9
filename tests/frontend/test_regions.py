"""RoiAlign: all attributes, against onnxruntime, onnx's reference and sums written out here."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import ModelProto
from onnx.reference import ReferenceEvaluator
from onnx_models import Array, model, node
from tolerance import assert_close

import minicompiler as mc
from minicompiler.errors import LimitError
from minicompiler.frontend.onnx import load
from minicompiler.ops.evaluate import run_reference

HEIGHT, WIDTH = 12, 17
# x, y, x, y: inside, over two borders, less than a pixel, outside, larger than the image
RECTANGLES = np.array(
    [
        [2, 3, 9, 8], [-4.5, -3, 5.25, 6], [11, 7, 30, 25], [3.2, 4.1, 3.3, 4.9],
        [40, 40, 60, 50], [-20, -30, 50, 40], [0.3, 0.7, 16.9, 11.8],
    ],
    np.float32,
)  # fmt: skip


def images(channels: int = 3, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(0).standard_normal((2, channels, HEIGHT, WIDTH)).astype(dtype)


def inputs_of(x: Array, rectangles: Array) -> dict[str, Array]:
    which = np.arange(len(rectangles), dtype=np.int64) % len(x)
    return {"x": x, "r": rectangles.astype(x.dtype), "b": which}


def roi_align(inputs: dict[str, Array], opset: int = 16, **attrs: Any) -> ModelProto:
    attrs = {"output_height": 3, "output_width": 4} | attrs
    return model([node("RoiAlign", "x r b", "y", **attrs)], inputs, ["y"], opset=opset)


@pytest.mark.parametrize("ratio", (0, 1, 3))
@pytest.mark.parametrize("mode", ("avg", "max"))
@pytest.mark.parametrize("coordinates", ("half_pixel", "output_half_pixel"))
def test_attributes(ratio: int, mode: str, coordinates: str) -> None:
    inputs = inputs_of(images(), RECTANGLES)
    m = roi_align(
        inputs, sampling_ratio=ratio, mode=mode, spatial_scale=0.75,
        coordinate_transformation_mode=coordinates,
    )  # fmt: skip
    (got,) = mc.compile(m)(*inputs.values())
    (want,) = ReferenceEvaluator(m).run(None, inputs)
    assert_close(got, want, 36, largest=4.0)
    session = ort.InferenceSession(m.SerializeToString())
    assert_close(got, session.run(None, inputs)[0], 36, largest=4.0)
    assert_close(got, run_reference(load(m), list(inputs.values()))[0], 36, largest=4.0)


@pytest.mark.parametrize("channels", (1, 16, 21))
@pytest.mark.parametrize("dtype", (np.float32, np.float64, np.float16))
def test_channels_and_types(channels: int, dtype: Any) -> None:
    inputs = inputs_of(images(channels, dtype), RECTANGLES)
    m = roi_align(inputs, opset=22)
    (want,) = run_reference(load(m), list(inputs.values()))
    assert_close(mc.compile(m)(*inputs.values())[0], want, 36, largest=4.0)


def test_before_opset_16_nothing_is_shifted() -> None:
    inputs = inputs_of(images(), RECTANGLES)
    same = {"coordinate_transformation_mode": "output_half_pixel"}
    old, new = (mc.compile(roi_align(inputs, k, **a)) for k, a in ((10, {}), (16, same)))
    assert np.array_equal(old(*inputs.values())[0], new(*inputs.values())[0])


@pytest.mark.parametrize("mode", ("avg", "max"))
def test_sizes_are_told_by_the_call_and_threads_change_nothing(mode: str) -> None:
    inputs = inputs_of(images(33), np.tile(RECTANGLES, (9, 1)))
    nodes = [node("RoiAlign", "x r b", "y", mode=mode, output_height=7, output_width=7)]
    shapes = {"x": ("n", 33, "h", "w"), "r": ("rois", 4), "b": ("rois",)}
    m = model(nodes, inputs, ["y"], shapes=shapes)
    one, two = (mc.compile(m, threads=t)(*inputs.values())[0] for t in (1, 2))
    assert np.array_equal(one, two)
    fixed = roi_align(inputs, mode=mode, output_height=7, output_width=7)
    assert np.array_equal(one, mc.compile(fixed)(*inputs.values())[0])
    for row in (0, len(one) - 1):
        single = {"x": inputs["x"], "r": inputs["r"][[row]], "b": inputs["b"][[row]]}
        assert np.array_equal(mc.compile(m)(*single.values())[0][0], one[row])
    none = {"x": inputs["x"], "r": inputs["r"][:0], "b": inputs["b"][:0]}
    some = mc.compile(m, dims={"rois": (0, 100)})
    assert some(*none.values())[0].shape == (0, 33, 7, 7)
    assert np.array_equal(some(*inputs.values())[0], one)


@pytest.mark.parametrize("mode", ("avg", "max"))
def test_samples_of_a_rectangle_far_larger_than_the_image(mode: str) -> None:
    inputs = inputs_of(images(2), np.array([[-900, -300, 1500, 450]]))
    m = roi_align(inputs, mode=mode, output_height=1, output_width=1)
    (want,) = ReferenceEvaluator(m).run(None, inputs)
    assert_close(mc.compile(m)(*inputs.values())[0], want, 200)


def test_rectangles_that_are_none() -> None:
    """Each ends at once; what lies in no image is 0."""
    wild = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e30, 1e9, -1e9, 0.0]
    corners = [(a, b) for a in wild for b in wild]
    rows = np.array([(a, 1.0, b, 5.0) for a, b in corners] + [(1, a, 4, b) for a, b in corners])
    inputs = inputs_of(images(), np.concatenate([rows, [[9, 9, 2, 2]]]))
    for mode in ("avg", "max"):
        for ratio in (0, 2):
            m = roi_align(inputs, mode=mode, sampling_ratio=ratio)
            (got,) = mc.compile(m)(*inputs.values())
            assert np.abs(got).max() < 5.0  # nothing that an image does not hold
            if ratio == 0:
                assert not got[-1].any()  # its borders are swapped: no sample


def test_a_number_of_samples_is_no_way_around_the_limit() -> None:
    inputs = inputs_of(images(), RECTANGLES)
    m = roi_align(inputs, sampling_ratio=1 << 16)
    with pytest.raises(LimitError, match="operations"):
        mc.compile(m, limits=mc.Limits(operations=10**9))


@pytest.mark.parametrize("channels", (1, 3, 21))
@pytest.mark.parametrize("scale", (1.0, 0.5))
def test_maxima_of_regions(channels: int, scale: float) -> None:
    """Both ends belong to a rectangle; of what lies outside of the image nothing is seen."""
    x = images(channels)
    which = np.arange(len(RECTANGLES)) % len(x)
    rois = np.column_stack([which, RECTANGLES]).astype(np.float32)
    pool = node("MaxRoiPool", "x r", "y", pooled_shape=[3, 4], spatial_scale=scale)
    m = model([pool], {"x": x, "r": rois}, ["y"], opset=20)
    want = ort.InferenceSession(m.SerializeToString()).run(None, {"x": x, "r": rois})[0]
    np.testing.assert_array_equal(mc.compile(m, threads=2)(x, rois)[0], want)
    np.testing.assert_array_equal(run_reference(load(m), [x, rois])[0], want)
