"""Single operators along every axis against onnxruntime, alternating in one run.

    python benchmarks/operators.py [part of a case's name ...] [--dtype float32] [--threads 1]
                                   [--turns 9] [--symbolic] [--json FILE]

The first column is our time over onnxruntime's, the median over turns with quartiles in brackets:
below 1, minicompiler is faster. Sizes are small enough for the caches, so that code is compared
rather than memory. At the end come the geometric mean, the cases above 1, and those that failed: a
refusal, or results that differ by more than a tolerance. What onnxruntime has no kernel for with
this type is left out. With --symbolic both are compiled for any size (above 3).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import onnxruntime as ort
from kernels import Array, Case, measure, op
from onnx import NodeProto, TensorProto

import minicompiler as mc

# How far results may lie apart, over the largest one; integers that were rounded from fractions may
# differ by one in ROUNDED.
TOLERANCE = {"float16": 1e-2, "float32": 5e-4, "float64": 1e-12}
ROUNDED, MAY_ROUND = 0.04, ("AveragePool", "Resize", "QuantizeLinear", "DynamicQuantizeLinear")
Draw = Callable[..., Array]
Axes = tuple[int, ...]
SHAPES = {"2d": (2048, 512), "3d": (8, 512, 256), "4d": (4, 64, 56, 56)}
CUBE, IMAGES, ODD_IMAGE = SHAPES["3d"], SHAPES["4d"], (1, 32, 113, 113)
EVERY_AXIS = [(s, a) for s, shape in SHAPES.items() for a in range(len(shape))]


def drawn(dtype: np.dtype) -> Draw:
    """draw(*shape, low=-3): numbers of the type, normally distributed, none below `low`; integers
    are ten times as large, unsigned ones positive."""

    def draw(*shape: int, low: float = -math.inf) -> Array:
        x = np.random.default_rng(0).standard_normal(shape, np.float32)
        x = np.maximum(np.abs(x), low) if low >= 0 or dtype.kind == "u" else np.maximum(x, low)
        return np.asarray(x if dtype.kind == "f" else x * 10).astype(dtype)

    return draw


def case(label: str, node: NodeProto, x: Array | Mapping[str, Array], **weights: Any) -> Case:
    inputs = x if isinstance(x, Mapping) else {"x": x}
    given = {n: np.asarray(w) for n, w in weights.items()}
    name = re.sub(r",?[()]", "", f"{node.op_type} {label}".strip()).replace(", ", ",")
    return Case("", name, [node], inputs, tuple(node.output), given)


def places(high: int, *shape: int) -> Array:
    return np.random.default_rng(1).integers(0, high, shape)


# ---- the cases ----------------------------------------------------------------------------------
def reductions(draw: Draw) -> Iterator[Case]:
    sets: dict[str, Sequence[Axes]] = {
        "2d": [(0,), (1,), (0, 1)],
        "3d": [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)],
        "4d": [(1,), (2,), (3,), (0, 1), (2, 3), (0, 2, 3)],
    }
    names = "Mean Max Min Sum Prod L1 SumSquare".split()
    for name in names + (["L2", "LogSum", "LogSumExp"] if draw().dtype.kind == "f" else []):
        for shape, all_axes in sets.items():
            x = draw(*SHAPES[shape], low=0.5)
            x = np.ones_like(x) if name == "Prod" else x  # others overflow, or become slow numbers
            for axes in all_axes:
                node = op(f"Reduce{name}", "x axes", keepdims=0)
                yield case(f"{shape} {axes}", node, x, axes=axes)
    for name, (shape, axis) in product(("ArgMax", "ArgMin"), EVERY_AXIS):
        node = op(name, "x", axis=axis, keepdims=0)
        yield case(f"{shape} {axis}", node, draw(*SHAPES[shape]))
    yield case("", op("GlobalMaxPool", "x"), draw(*IMAGES))


def rows(draw: Draw) -> Iterator[Case]:
    """What gives as many numbers as it reads along an axis."""
    for name, (shape, axis) in product(("Softmax", "LogSoftmax", "Hardmax"), EVERY_AXIS):
        yield case(f"{shape} {axis}", op(name, "x", axis=axis), draw(*SHAPES[shape]))
    for shape, axis in EVERY_AXIS:
        yield case(f"{shape} {axis}", op("CumSum", "x axis"), draw(*SHAPES[shape]), axis=axis)
    for k, axis in product((1, 5, 50), (0, 1)):
        node = op("TopK", "x k", "y i", axis=axis)
        yield case(f"{k} {axis}", node, draw(*SHAPES["2d"]), k=[k])
    rows, channels, cube, images = draw(256), draw(64), draw(*CUBE), draw(*IMAGES)
    yield case("", op("LayerNormalization", "x g b"), cube, g=rows, b=rows)
    whole = draw(*CUBE[1:])
    yield case("1", op("LayerNormalization", "x g b", axis=1), cube, g=whole, b=whole)
    yield case("", op("InstanceNormalization", "x g b"), images, g=channels, b=channels)
    two = {"g": channels, "b": channels, "m": channels, "v": draw(64, low=0.1)}
    yield case("", op("BatchNormalization", "x g b m v"), images, **two)
    yield case("", op("LRN", "x", size=5), images)
    for axis in (1, 2):
        yield case(f"{axis}", op("LpNormalization", "x", axis=axis), cube)
    yield case("", op("MeanVarianceNormalization", "x", axes=[0, 2, 3]), images)
    yield case("", op("Unique", "x"), places(100, 5000).astype(cube.dtype))
    yield case("", op("NonZero", "x"), places(2, 512, 512).astype(cube.dtype))


def moves(draw: Draw) -> Iterator[Case]:
    cube, images, odd = draw(*CUBE), draw(*IMAGES), draw(*ODD_IMAGE)
    for mode in ("constant", "reflect", "edge", "wrap"):
        node = op("Pad", "x p", mode=mode)
        yield case(f"{mode} odd image", node, odd, p=[0, 0, 3, 3, 0, 0, 3, 3])
        yield case(f"{mode} 3d inner", node, cube, p=[0, 0, 5, 0, 0, 2])
    for perm in ((0, 2, 1), (1, 0, 2), (2, 1, 0), (2, 0, 1), (1, 2, 0)):
        yield case(f"3d {perm}", op("Transpose", "x", perm=perm), cube)
    for perm in ((0, 2, 3, 1), (0, 3, 1, 2), (0, 2, 1, 3), (3, 2, 1, 0), (1, 0, 2, 3)):
        yield case(f"4d {perm}", op("Transpose", "x", perm=perm), images)
    for axis in (0, 1, 2):
        rows, small = places(8, 64), places(8, 8, 8, 8)
        yield case(f"3d {axis}", op("Gather", "x i", axis=axis), {"x": cube, "i": rows})
        node = op("GatherElements", "x i", axis=axis)
        yield case(f"3d {axis}", node, {"x": cube, "i": places(8, *CUBE)})
        node = op("ScatterElements", "x i u", axis=axis)
        yield case(f"3d {axis}", node, {"x": cube, "i": small, "u": draw(8, 8, 8)})
        yield case(f"3d {axis}", op("Concat", "x z", axis=axis), {"x": cube, "z": draw(*CUBE)})
        yield case(f"3d {axis}", op("Split", "x", "y z", axis=axis, num_outputs=2), cube)
        cut = op("Slice", "x s e a t")
        yield case(f"3d {axis} step 2", cut, cube, s=[1], e=[10000], a=[axis], t=[2])
        yield case(f"3d {axis} step -1", cut, cube, s=[10000], e=[-10000], a=[axis], t=[-1])
    lengths = np.full(512, 5)
    node = op("ReverseSequence", "x l", time_axis=0, batch_axis=1)
    yield case("3d", node, {"x": cube, "l": lengths})
    for count in (500, 20000):
        yield case(f"{count} rows", op("GatherND", "x i"), {"x": cube, "i": places(8, count, 2)})
    at = {"x": cube, "i": places(8, 100, 2), "u": draw(100, 256)}
    for reduction in ("none", "add") if cube.dtype.kind == "f" else ("none",):
        yield case(f"{reduction} 100 rows", op("ScatterND", "x i u", reduction=reduction), at)
    boxes = {"x": draw(8400, 4), "i": places(8400, 500, 1), "u": draw(500, 4)}
    yield case("boxes", op("ScatterND", "x i u"), boxes)
    for count in (1, 16):  # of positions of a cache of keys
        at = {"x": draw(1, 1024, 8, 64), "u": draw(1, count, 8, 64)}
        at["i"] = np.stack([np.zeros(count, int), np.arange(count)], -1)[None]
        yield case(f"cache {count}", op("ScatterND", "x i u"), at)
    for sizes in ((255, 1), (77, 51), (80, 4, 1)):
        names = [f"x{k}" for k in range(len(sizes))]
        given = {n: draw(8, 512, size) for n, size in zip(names, sizes, strict=True)}
        yield case(f"odd {sizes}", op("Concat", " ".join(names), axis=2), given)
        node = op("Split", "x s", " ".join(names), axis=2)
        yield case(f"odd {sizes}", node, draw(8, 512, sum(sizes)), s=np.array(sizes))
    yield case("3d", op("Tile", "x r"), draw(4, 128, 64), r=[2, 2, 2])
    yield case("3d odd", op("Tile", "x r"), draw(8, 128, 37), r=[2, 2, 2])
    yield case("3d row", op("Expand", "x r"), draw(1, 512, 1), r=CUBE)
    yield case("3d outer", op("Expand", "x r"), draw(1, 512, 256), r=CUBE)
    for mode in ("DCR", "CRD"):
        yield case(mode, op("DepthToSpace", "x", blocksize=2, mode=mode), images)
    yield case("", op("SpaceToDepth", "x", blocksize=2), images)
    values = np.array([0, 1], cube.dtype)
    yield case("512", op("OneHot", "x d v"), {"x": places(512, 4096)}, d=512, v=values)
    for upper, (count, size), k in product((0, 1), ((8, 512), (12, 77), (1, 2048)), (0, 5)):
        node = op("Trilu", "x k", upper=upper)
        yield case(f"{count}x{size} upper={upper} k={k}", node, draw(count, size, size), k=k)
    for equation, shapes in (
        ("bij,bjk->bik", ((8, 128, 64), (8, 64, 128))),
        ("bhid,bhjd->bhij", ((2, 8, 128, 64),) * 2),
        ("bhwc,hkc->bhwk", ((8, 14, 14, 64), (14, 14, 64))),
        ("ij->ji", ((1024, 1024),)),
        ("bii->bi", ((64, 128, 128),)),
    ):
        given = {f"x{k}": draw(*shape) for k, shape in enumerate(shapes)}
        yield case(equation, op("Einsum", " ".join(given), equation=equation), given)


POSITIVE = ("Log", "Sqrt", "Acosh", "Pow")
FUNCTIONS = """Relu Sigmoid Tanh Exp Log Sqrt Erf Abs Neg Floor Ceil Round Sign Reciprocal Softplus
Softsign HardSigmoid HardSwish Elu Celu Selu LeakyRelu ThresholdedRelu Mish Gelu Sin Cos Tan
Asin Acos Atan Sinh Cosh Asinh Acosh Atanh IsNaN IsInf""".split()
CASTS = "float16 float64 int64 int32 uint8 bool".split()


def functions(draw: Draw) -> Iterator[Case]:
    x, large = draw(*CUBE), draw(*CUBE, low=1.1)
    for name in FUNCTIONS:
        limit = 0.99 if name in ("Asin", "Acos", "Atanh") else np.inf
        given = large if name in POSITIVE else np.clip(x, -limit, limit).astype(x.dtype)
        yield case("", op(name, "x"), given)
    others = {
        "row": (256,),
        "col": (512, 1),
        "outer": (8, 1, 1),
        "same": CUBE,
        "cross": (8, 1, 256),
    }
    names = "Add Sub Mul Div Mod Max Min".split() + ["Pow"] * (x.dtype.kind == "f")
    for name, (label, shape) in product(names, others.items()):
        fmod = {"fmod": 1} if name == "Mod" else {}
        given = {"x": large, "z": draw(*shape, low=1)}
        yield case(f"3d {label}", op(name, "x z", **fmod), given)
    for exponent in (-1, 0.5, 2, 2.5, 3):
        if x.dtype.kind == "f":
            given = np.asarray(exponent, x.dtype)
            yield case(f"3d {exponent}", op("Pow", "x z"), large, z=given)
    for name in "Greater Less Equal GreaterOrEqual".split():
        yield case("3d", op(name, "x z"), {"x": x, "z": large})
    true = places(2, *CUBE) > 0
    for name in "And Or Xor".split():
        yield case("3d", op(name, "x z"), {"x": true, "z": ~true})
    yield case("3d", op("Where", "c x z"), {"c": true, "x": x, "z": large})
    yield case("3d row", op("Where", "c x z"), {"c": true[0, :, :1], "x": x, "z": large[0, 0, :1]})
    yield case("", op("Clip", "x a b"), x, a=np.asarray(1, x.dtype), b=np.asarray(2, x.dtype))
    yield case("", op("PRelu", "x s"), draw(*IMAGES), s=draw(64, 1, 1))
    for to in CASTS:
        kind = TensorProto.DataType.Value(to.upper().replace("FLOAT64", "DOUBLE"))
        yield case(f"to {to}", op("Cast", "x", to=kind), np.abs(x) * x.dtype.type(9))
    scale, zero = np.float32(0.1), np.uint8(128)
    if x.dtype == np.float32:
        yield case("", op("QuantizeLinear", "x s z"), x, s=scale, z=zero)
        yield case("", op("DynamicQuantizeLinear", "x", "y s z"), x)
    if x.dtype == np.uint8:
        yield case("", op("DequantizeLinear", "x s z"), x, s=scale, z=zero)


def windows(draw: Draw) -> Iterator[Case]:
    images = {"4d": draw(*IMAGES), "odd image": draw(*ODD_IMAGE)}
    sizes = ((3, 1, 1), (3, 2, 1), (2, 2, 0), (5, 1, 2), (7, 1, 3))
    for name, (k, s, p) in product(("MaxPool", "AveragePool"), sizes):
        for label, x in images.items():
            node = op(name, "x", kernel_shape=[k] * 2, strides=[s] * 2, pads=[p] * 4)
            yield case(f"{k}s{s} {label}", node, x)
    yield case("1d", op("MaxPool", "x", kernel_shape=[3], strides=[2]), draw(8, 128, 1000))
    for name, k in (("AveragePool", 2), ("MaxPool", 3)):
        node = op(name, "x", kernel_shape=[k] * 3, strides=[2] * 3)
        yield case("volume", node, draw(1, 32, 16, 56, 56))
    yield case("3", op("LpPool", "x", kernel_shape=[3, 3]), images["4d"])
    for mode, where, scale in product(
        ("nearest", "linear", "cubic"),
        ("half_pixel", "align_corners", "asymmetric"),
        (2, 0.5, 1.75),
    ):
        node = op("Resize", "x  s", mode=mode, coordinate_transformation_mode=where)
        to = np.array([1, 1, scale, scale], np.float32)
        yield case(f"{mode} {where} {scale}", node, draw(1, 32, 56, 56), s=to)
    grid = np.clip(draw(1, 56, 56, 2), -1, 1)
    for mode, channels in product(("linear", "nearest"), (1, 3, 32)):
        node = op("GridSample", "x g", mode=mode)
        yield case(f"{mode} {channels}", node, {"x": draw(1, channels, 56, 56), "g": grid})
    corners = np.arange(50)[:, None] / 10 + np.array([0, 0, 30, 30])
    given = {"x": draw(1, 64, 56, 56), "r": corners.astype(grid.dtype), "b": np.zeros(50, np.int64)}
    node = op("RoiAlign", "x r b", output_height=7, output_width=7, sampling_ratio=2)
    yield case("7x7", node, given)


CONVOLUTIONS = (  # channels in and out, window, stride, groups, height and width
    (64, 64, 3, 1, 1, 56), (3, 64, 7, 2, 1, 224), (64, 64, 3, 1, 64, 56), (64, 256, 1, 1, 1, 56),
    (64, 64, 5, 1, 1, 28), (64, 64, 3, 1, 4, 28), (32, 32, 3, 1, 32, 113), (64, 64, 3, 2, 64, 56),
    (1, 16, 3, 1, 1, 112), (16, 3, 3, 1, 1, 112),
)  # fmt: skip


def products(draw: Draw) -> Iterator[Case]:
    yield case("256", op("MatMul", "x z"), {"x": draw(256, 256), "z": draw(256, 256)})
    for i, o, k, s, g, size in CONVOLUTIONS:
        node = op("Conv", "x w", strides=[s, s], group=g, pads=[k // 2] * 4)
        yield case(f"{i} to {o} {k}s{s}g{g} {size}", node, draw(1, i, size, size),
                   w=draw(o, i // g, k, k))  # fmt: skip
    image, line = draw(1, 64, 28, 28), draw(1, 128, 1000)
    for k in ((1, 7), (7, 1)):
        node = op("Conv", "x w", pads=[k[0] // 2, k[1] // 2] * 2)
        yield case(f"{k} 28", node, image, w=draw(64, 64, *k))
    weight = draw(64, 64, 3, 3)
    yield case("weight given", op("Conv", "x w", pads=[1] * 4), {"x": image, "w": weight})
    yield case("dilated", op("Conv", "x w", pads=[2] * 4, dilations=[2, 2]), image, w=weight)
    yield case("line", op("Conv", "x w", pads=[4, 4]), line, w=draw(128, 128, 9))
    yield case("line g128", op("Conv", "x w", pads=[15, 15], group=128), line, w=draw(128, 1, 31))
    yield case("volume", op("Conv", "x w", pads=[1] * 6), draw(1, 16, 8, 28, 28),
               w=draw(32, 16, 3, 3, 3))  # fmt: skip
    up = op("ConvTranspose", "x w", strides=[2, 2], pads=[1] * 4)
    yield case("4s2", up, image, w=draw(64, 32, 4, 4))
    up = op("ConvTranspose", "x w", strides=[2, 2], group=64)
    yield case("2s2 g64", up, image, w=draw(64, 1, 2, 2))
    for (name, gates), (batch, width) in product(
        (("LSTM", 4), ("GRU", 3), ("RNN", 1)), ((1, 128), (16, 64))
    ):
        weight = draw(1, gates * width, width) / np.asarray(width).astype(image.dtype)
        node = op(name, "x w r", hidden_size=width)
        yield case(f"{width} batch {batch}", node, draw(50, batch, width), w=weight, r=weight)


PARTS = (reductions, rows, moves, functions, windows, products)


# ---- the table ----------------------------------------------------------------------------------
def has_kernel(case: Case) -> bool:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        ort.InferenceSession(case.model().SerializeToString(), options, ["CPUExecutionProvider"])
    except Exception:  # onnxruntime has a class per kind of refusal, none in public
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", nargs="*", help="parts of the names of cases")
    parser.add_argument("--dtype", default="float32",
                        choices="float32 float16 float64 int32 int64 uint8".split())  # fmt: skip
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--symbolic", action="store_true", help="sizes come with the call")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    args = parser.parse_args()
    found, missing, failed = [], [], []
    draw = drawn(np.dtype(args.dtype))
    print(f"{'over onnxruntime':18} {'case':36} {'ours, us':>9} {'its, us':>9}")
    for made in (c for part in PARTS for c in part(draw)):
        if args.which and not any(w in made.name for w in args.which):
            continue
        if not has_kernel(made):
            missing.append(made.name)
            continue
        try:
            found.append(measured(made, args))
        except (ArithmeticError, mc.MinicompilerError) as e:
            failed.append(f"{made.name}: {str(e).splitlines()[0]}")
            print(failed[-1])
        else:
            print(text(found[-1]), flush=True)
    mean = math.exp(np.mean([math.log(r["ratio"][0]) for r in found] or [math.nan]))
    print(f"{len(found)} cases, geometric mean {mean:.2f}; {len(missing)} not in onnxruntime")
    above = sorted((r for r in found if r["ratio"][0] > 1), key=lambda r: -r["ratio"][0])
    print(f"above 1: {len(above)}", *map(text, above), sep="\n")
    print(f"failed: {len(failed)}", *failed, sep="\n")
    if args.json:
        with open(args.json, "w") as file:
            result = {"cases": found, "not in onnxruntime": missing, "failed": failed}
            json.dump(result, file, indent=1)
    return bool(failed)


def measured(made: Case, args: argparse.Namespace) -> dict[str, Any]:
    exact = made.nodes[0].op_type not in MAY_ROUND
    tolerance = max(TOLERANCE.get(args.dtype, 0.0), 0.0 if exact else ROUNDED)
    made = dataclasses.replace(made, tolerance=tolerance, symbolic=args.symbolic)
    row = measure(made, args.threads, args.turns, None, None)
    middle, low, high = row.pop("times_ort")
    return row | {"ratio": (1 / middle, 1 / high, 1 / low)}


def text(row: Mapping[str, Any]) -> str:
    middle, low, high = row["ratio"]
    ours, its = row["microseconds"]["ours"], row["microseconds"]["ort"]
    return (
        f"{middle:5.2f} ({low:.2f}-{high:.2f})".ljust(19)
        + f"{row['case']:36} {ours:9.1f} {its:9.1f}"
    )


if __name__ == "__main__":
    sys.exit(main())
