"""Converters of ONNX operators that resample images, and of Fourier transforms.

Resize{cubic} -> resample(x, weights, positions) per axis;  DFT -> products with cosines and sines

What depends on sizes alone is computed here with numpy, once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minicompiler.ir.expr import Expr, const_int, maximum
from minicompiler.ir.graph import Value, type_of
from minicompiler.ir.types import DType
from minicompiler.ops import elementwise as el
from minicompiler.ops import index as ix
from minicompiler.ops import linalg
from minicompiler.ops import max_roi as mr
from minicompiler.ops import pieces as pc
from minicompiler.ops import resize as rs
from minicompiler.ops import roi as ro
from minicompiler.ops import sample as sp
from minicompiler.ops import shape as sh

from .onnx_data import element_type
from .onnx_math import Converter, cast_to, rounding_integers
from .onnx_nn import padding
from .onnx_node import OnnxNode, sizes_of
from .onnx_shape import one_per_axis, positions
from .onnx_shape import resize as plain_resize

MOST_TAPS = 1 << 16  # elements in one weighted mean
FARTHEST = 1 << 40  # from the first element: positions that a region of interest may ask for


# ---- resize -------------------------------------------------------------------------------------
def _resize(n: OnnxNode) -> Value:
    """Simple forms are index arithmetic; all others are weighted sums along each axis."""
    modes = n.attr("coordinate_transformation_mode", "half_pixel")
    special = (
        n.opset >= 11
        and (
            # Tables of weights are faster, but need sizes that are numbers.
            (n.attr("mode", "nearest") == "cubic" and _numbers(n))
            or n.attr("antialias", 0)
            or n.attr("exclude_outside", 0)
            or n.attr("keep_aspect_ratio_policy", "stretch") != "stretch"
            or modes == "tf_crop_and_resize"
        )
    )  # fmt: skip
    return _weighted(n) if special else plain_resize(n)


def _numbers(n: OnnxNode) -> bool:
    sizes = sizes_of(n.arg(3)) if _given(n, 3) else n.type(0).shape
    return sizes is not None and all(const_int(s) is not None for s in (*sizes, *n.type(0).shape))


def _given(n: OnnxNode, k: int) -> bool:
    return n.opt(k) is not None and const_int(n.type(k).shape[0]) != 0


def _weighted(n: OnnxNode) -> Value:
    x, t = n.arg(0), n.type(0)
    axes = [n.axis(a, t.rank) for a in n.attr("axes", range(t.rank))]
    sizes = sizes_of(n.arg(3)) if _given(n, 3) else None
    scales = n.known(2) if sizes is None else None
    roi = n.known(1) if _given(n, 1) else None
    if sizes is None and scales is None:
        n.fail("Resize needs scales or sizes that are constants")
    if sizes is not None:
        one_per_axis(n, "sizes", len(sizes), len(axes))
    for what, given, wanted in (("scales", scales, 1), ("roi", roi, 2)):
        if given is not None:
            one_per_axis(n, what, given.size, wanted * len(axes))
            if not np.isfinite(given).all() or (what == "scales" and not np.all(given > 0)):
                n.fail(f"the {what} of Resize are {given.tolist()}")
    crop = n.attr("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    policy = n.attr("keep_aspect_ratio_policy", "stretch")
    plan: list[tuple[int, int, int, float, tuple[float, float]]] = []
    for k, axis in enumerate(axes):
        part = (0.0, 1.0)
        if crop and roi is not None:
            part = roi[k], roi[k + len(axes)]  # of their own type: ties depend on its rounding
        same = scales[k] == 1 if sizes is None else sizes[k] is t.shape[axis]  # type: ignore[index]
        if same and part == (0.0, 1.0) and policy == "stretch":
            continue
        size = const_int(t.shape[axis])
        if not size:
            n.fail(f"this form of Resize needs the size of axis {axis}, which is {t.shape[axis]}")
        if sizes is not None:
            known = const_int(sizes[k])
            if known is None:
                n.fail(f"this form of Resize needs sizes that are numbers, one is {sizes[k]}")
            out, scale = known, known / size
        else:
            assert scales is not None
            scale = float(scales[k])
            out = math.floor(scale * size)
        plan.append((axis, size, out, scale, part))
    if sizes is not None and policy != "stretch":
        scale = (min if policy == "not_larger" else max)(p[3] for p in plan)
        plan = [(a, s, math.floor(scale * s + 0.5), scale, r) for a, s, _, _, r in plan]
    result, outside = x, None
    for axis, size, out, scale, part in plan:
        if scale == 1.0 and out == size and part == (0.0, 1.0):
            continue
        weights, positions, out_of_range = _table(n, size, out, scale, part)
        made = n.constant(weights, np.float32), n.constant(positions, np.int64)
        result = n.apply(rs.resample, result, *made, attrs=rs.ResampleAttrs(axis), name="")
        if out_of_range.any():
            line = out_of_range.reshape([-1 if k == axis else 1 for k in range(t.rank)])
            outside = line if outside is None else outside | line
    if outside is None:
        return result if result is not x else n.apply(el.identity, x)
    dtype = t.dtype.numpy
    value = n.constant(n.attr("extrapolation_value", 0.0), dtype)
    return n.apply(el.where, n.constant(outside), value, result)


def _table(
    n: OnnxNode, size: int, out: int, scale: float, roi: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights and positions [out, taps] along an axis, and which results lie outside of x."""
    mode = n.attr("coordinate_transformation_mode", "half_pixel")
    full = scale * size
    rows: list[np.ndarray] = []
    places: list[np.ndarray] = []
    outside = []
    for o in range(out):
        n.table(len(rows[0]) if rows else 1)
        at = _coordinate(mode, o, size, out, scale, full, roi)
        if not abs(at) < FARTHEST:
            n.fail(f"Resize reads position {at} of an axis of {size}")
        outside.append(mode == "tf_crop_and_resize" and not 0 <= at <= size - 1)
        weights, taps = _taps(n, at, scale)
        if n.attr("exclude_outside", 0):
            weights = np.where((taps < 0) | (taps >= size), 0, weights)
            weights = weights / weights.sum()
        rows.append(weights)
        places.append(np.clip(taps, 0, size - 1))
    shape = out, len(rows[0]) if rows else 1
    return np.reshape(rows, shape), np.reshape(places, shape), np.array(outside)


def _coordinate(
    mode: str, o: int, size: int, out: int, scale: float, full: float, roi: tuple[float, float]
) -> float:
    if mode == "align_corners":
        return 0.0 if full == 1 else o * (size - 1) / (full - 1)
    if mode == "asymmetric":
        return o / scale
    if mode == "tf_crop_and_resize":
        if full == 1:
            return float((roi[0] + roi[1]) * (size - 1) / 2)
        return float(o * (roi[1] - roi[0]) * (size - 1) / (full - 1) + roi[0] * (size - 1))
    if mode == "pytorch_half_pixel" and full == 1:
        return -0.5
    at = (o + 0.5) / scale - 0.5
    if mode == "half_pixel_symmetric":
        at += size / 2 * (1 - out / full)
    return at


def _taps(n: OnnxNode, at: float, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """The weights of the elements around a position, and which elements these are."""
    mode, low = n.attr("mode", "nearest"), math.floor(at)
    t = at - low
    if mode == "nearest":
        rounding = n.attr("nearest_mode", "round_prefer_floor")
        up = {"floor": 0, "ceil": math.ceil(at) - low, "round_prefer_floor": int(t > 0.5)}
        chosen = up.get(rounding, int(t >= 0.5))
        return np.ones(1), np.array([low + chosen])
    shrink = min(scale, 1.0) if n.attr("antialias", 0) else 1.0
    reach = 1 if mode == "linear" else 2
    first = math.floor(-reach / shrink) + 1 if shrink > 0 else -MOST_TAPS
    if first <= -MOST_TAPS:
        n.fail(f"Resize would shrink an axis to {scale} of its size: too many elements in a mean")
    taps = np.arange(first, 2 - first)
    distance = np.abs((taps - t) * shrink)
    if mode == "linear":
        weights = np.clip(1 - distance, 0, 1)
    else:
        a = n.attr("cubic_coeff_a", -0.75)
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0))
    return weights / weights.sum(), low + taps


# ---- positions in data --------------------------------------------------------------------------
_GRID_MODES = {"bilinear": "linear", "bicubic": "cubic"}


def _grid_sample(n: OnnxNode) -> Value:
    mode = n.attr("mode", "linear")
    attrs = sp.GridSampleAttrs(
        _GRID_MODES.get(mode, mode),
        n.attr("padding_mode", "zeros"),
        bool(n.attr("align_corners", 0)),
    )
    return n.apply(sp.grid_sample, n.arg(0), cast_to(n, n.arg(1), n.type(0).dtype), attrs=attrs)


def _roi_align(n: OnnxNode) -> Value:
    default = "half_pixel" if n.opset >= 16 else "output_half_pixel"
    half = n.attr("coordinate_transformation_mode", default) == "half_pixel"
    attrs = ro.RoiAlignAttrs(
        n.attr("output_height", 1), n.attr("output_width", 1), n.attr("sampling_ratio", 0),
        n.attr("spatial_scale", 1.0), half, n.attr("mode", "avg") == "max",
    )  # fmt: skip
    return n.apply(ro.roi_align, n.arg(0), n.arg(1), n.arg(2), attrs=attrs)


def _max_roi_pool(n: OnnxNode) -> Value:
    height, width = n.per_axis("pooled_shape", 2, 1)
    attrs = mr.MaxRoiPoolAttrs(height, width, n.attr("spatial_scale", 1.0))
    return n.apply(mr.max_roi_pool, n.arg(0), n.arg(1), attrs=attrs)


def _affine_grid(n: OnnxNode) -> Value:
    """theta[n, d, d + 1] times (x, y, ..., 1) at each point of an image, x along its last axis."""
    theta, t, sizes = n.arg(0), n.type(0), sizes_of(n.arg(1))
    if sizes is None:
        n.fail("AffineGrid needs a size that is known while importing")
    d = len(sizes) - 2
    if d < 1 or t.rank != 3 or [const_int(s) for s in t.shape[1:]] != [d, d + 1]:
        n.fail(f"AffineGrid for {len(sizes)} dimensions of images with theta {t}")
    total: Value | None = None
    for k in range(d + 1):
        column = pc.SliceAttrs((k,), (k + 1,), (2,))
        term: Value = n.apply(pc.strided_slice, theta, attrs=column, name="")
        shape = sh.ReshapeAttrs((t.shape[0], *(1,) * d, d))
        term = n.apply(sh.reshape, term, attrs=shape, name="")
        if k < d:
            line = _coordinates(n, sizes[-1 - k], t.dtype)
            along = tuple(sizes[-1 - k] if axis == d - 1 - k else 1 for axis in range(d))
            line = n.apply(sh.reshape, line, attrs=sh.ReshapeAttrs((*along, 1)), name="")
            term = n.apply(el.mul, term, line, name="")
        total = term if total is None else n.apply(el.add, total, term)
    assert total is not None
    return total


def _coordinates(n: OnnxNode, size: Expr, dtype: DType) -> Value:
    """-1 to 1 in equal steps: the centres of pixels, or with align_corners the ends as well."""
    aligned = n.attr("align_corners", 0)
    line = cast_to(n, positions(n, size), dtype)
    steps = maximum(size - 1, 1) if aligned else size
    count = n.apply(sh.shape_, attrs=sh.ShapeAttrs(values=(steps,)), name="")
    two = n.apply(el.mul, line, n.constant(2, dtype.numpy), name="")
    if not aligned:
        two = n.apply(el.add, two, n.constant(1, dtype.numpy), name="")
    share = n.apply(el.div, two, cast_to(n, count, dtype), name="")
    return n.apply(el.sub, share, n.constant(1, dtype.numpy), name="")


def _deform_conv(n: OnnxNode) -> Value:
    kernel = [const_int(s) for s in n.type(1).shape[2:]]
    d = len(kernel)
    strides = tuple(n.attr("strides", (1,) * d))
    dilations = tuple(n.attr("dilations", (1,) * d))
    begin, _ = padding(n, len(kernel))
    attrs = sp.DeformConvAttrs(
        strides, begin, dilations, n.attr("group", 1), n.attr("offset_group", 1)
    )
    args = n.arg(0), n.arg(1), n.arg(2), n.opt(4), n.opt(3)
    return n.apply(sp.deform_conv, *args, attrs=attrs)


# ---- Fourier transforms -------------------------------------------------------------------------
def _dft(n: OnnxNode) -> Value:
    axis = n.attr("axis", 1) if n.opset < 20 else n.scalar(2)
    length, t = n.scalar(1), n.type(0)
    at = n.axis(-2 if axis is None else int(axis), t.rank)
    if at == t.rank - 1:
        n.fail("DFT along the axis of real and imaginary parts")
    inverse, onesided = bool(n.attr("inverse", 0)), bool(n.attr("onesided", 0))
    return _transformed(n, n.arg(0), at, length, inverse, onesided)


def _transformed(
    n: OnnxNode, x: Value, axis: int, length: int | None, inverse: bool, onesided: bool
) -> Value:
    """The discrete Fourier transform along an axis; the last axis holds real and imaginary part."""
    t = type_of(x)
    size, parts = const_int(t.shape[axis]), const_int(t.shape[-1])
    if size is None or parts not in (1, 2):
        n.fail(f"{n.op_type} along an axis of {t.shape[axis]} elements of {t.shape[-1]} numbers")
    halved = inverse and onesided  # x holds one half of a symmetric spectrum
    count = length if length is not None else 2 * (size - 1) if halved else size
    if count < 1:
        n.fail(f"{n.op_type} of {count} elements")
    used = min(size, count // 2 + 1 if halved else count)
    if used < size:
        x = _cut(n, x, axis, used)
    n.table(3 * used * count)
    k = np.arange(count // 2 + 1 if onesided and not inverse else count)
    angle = 2 * np.pi * (np.outer(np.arange(used), k) % count) / count
    factor = np.full((used, 1), 1 / count if inverse else 1.0)
    if halved:  # every frequency but the first and the middle one stands for two
        factor[1 : (count + 1) // 2] *= 2
    dtype = t.dtype.numpy
    cosine = n.constant(np.cos(angle) * factor, dtype)
    sine = n.constant(np.sin(angle) * factor * (1 if inverse else -1), dtype)
    order = tuple(a for a in range(t.rank - 1) if a != axis)
    back = tuple(np.argsort((*order, axis)))

    def part(which: int) -> Value:
        one = _cut(n, x, t.rank - 1, which + 1, which)
        flat = n.apply(sh.squeeze, one, attrs=sh.SqueezeAttrs((t.rank - 1,)), name="")
        return n.apply(sh.transpose, flat, attrs=sh.TransposeAttrs((*order, axis)), name="")

    def times(v: Value, table: Value) -> Value:
        return n.apply(linalg.matmul, v, table, name="")

    real = part(0)
    results = [times(real, cosine), times(real, sine)]
    if parts == 2:
        imaginary = part(1)
        results[0] = n.apply(el.sub, results[0], times(imaginary, sine), name="")
        results[1] = n.apply(el.add, results[1], times(imaginary, cosine), name="")
    last = sh.UnsqueezeAttrs((t.rank - 1,))
    done = []
    for v in results[:1] if halved else results:
        v = n.apply(sh.transpose, v, attrs=sh.TransposeAttrs(tuple(int(b) for b in back)), name="")
        done.append(n.apply(sh.unsqueeze, v, attrs=last, name=""))
    if len(done) == 1:
        return done[0]
    return n.apply(pc.concat, *done, attrs=pc.ConcatAttrs(t.rank - 1))


def _cut(n: OnnxNode, x: Value, axis: int, end: int, start: int = 0) -> Value:
    return n.apply(pc.strided_slice, x, attrs=pc.SliceAttrs((start,), (end,), (axis,)), name="")


def _stft(n: OnnxNode) -> Value:
    """Frames of the signal, times the window, transformed."""
    t, step, window = n.type(0), n.scalar(1), n.opt(2)
    size = const_int(n.shape(0, 3)[1])
    length = n.scalar(3)
    if length is None and window is not None:
        length = const_int(n.shape(2, 1)[0])
    if size is None or step is None or step < 1:
        n.fail(f"STFT of a signal {t} in steps of {step}: its length has to be known")
    length = size if length is None else int(length)
    if not 1 <= length <= size:
        n.fail(f"STFT of frames of {length} elements of a signal of {size}")
    frames = (size - length) // step + 1
    n.table(frames * length)
    where = np.arange(frames)[:, None] * step + np.arange(length)
    x: Value = n.apply(
        ix.gather, n.arg(0), n.constant(where, np.int64), attrs=ix.GatherAttrs(1), name=""
    )
    if window is not None:
        column = n.apply(sh.unsqueeze, window, attrs=sh.UnsqueezeAttrs((1,)), name="")
        x = n.apply(el.mul, x, column, name="")
    return _transformed(n, x, 2, length, False, bool(n.attr("onesided", 1)))


def _mel_weights(n: OnnxNode) -> Value:
    """Triangular filters, evenly spaced on the mel scale."""
    found: list[Any] = [n.scalar(k) for k in range(5)]
    bins, length, rate, low, high = found
    if None in found or bins < 0 or length < 1 or rate < 1 or not 0 <= low <= high < np.inf:
        n.fail(f"MelWeightMatrix of bins, length, rate, lowest, highest frequency {found}")
    rows = length // 2 + 1
    n.table(rows * bins)
    mels = [2595 * np.log10(1 + f / 700) for f in (low, high)]
    points = mels[0] + np.arange(bins + 2) * (mels[1] - mels[0]) / (bins + 2)
    hertz = 700 * (10 ** (points / 2595) - 1)
    edges = ((length + 1) * hertz // rate).astype(int)
    table = np.zeros((rows, bins))
    if edges[-1] > rows or (bins and edges[-2] >= rows):
        n.fail(f"MelWeightMatrix of {high} Hz at {rate} numbers a second: at most half is possible")
    for k in range(bins):
        left, centre, right = edges[k : k + 3]
        _ramp(table[:, k], left, centre)
        if right > centre:
            table[centre:right, k] = (right - np.arange(centre, right)) / (right - centre)
    code = n.attr("output_datatype", 1)
    dtype = element_type(code, "the result of MelWeightMatrix", n.loc.file)
    return n.constant(table, dtype.numpy, n.outputs[0])


def _ramp(column: np.ndarray, left: int, centre: int) -> None:
    if left == centre:
        column[centre] = 1
    else:
        column[left : centre + 1] = np.arange(centre - left + 1) / (centre - left)


IMAGE: dict[str, Converter] = {
    "AffineGrid": _affine_grid,
    "DFT": _dft,
    "DeformConv": _deform_conv,
    "GridSample": _grid_sample,
    "MaxRoiPool": _max_roi_pool,
    "MelWeightMatrix": _mel_weights,
    "Resize": rounding_integers(_resize),
    "RoiAlign": _roi_align,
    "STFT": _stft,
}
