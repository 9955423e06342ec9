"""Single operators against what the machine can do, numpy, and onnxruntime, alternating in one run.

    python benchmarks/kernels.py [GROUP or part of a case's name ...] [--threads 1,2] [--json FILE]

Groups: gemm, conv, math (functions of numbers that fit the caches), stream (results larger
than the caches), rows (softmax, normalisations), reduce, move (transposes, gather, concat, split),
pool. Bytes are those of the operands and results, once each. `copy`: fraction of the copy bandwidth
of the same turns; `el/ns`: elements of the result per nanosecond; x numpy and x ort: how many times
as fast a call is (medians over turns, quartiles in brackets). For gemm and conv, `FMA` is the rate
of the kernel alone over the highest FMA peak of the turns, x node how many times as fast it is as
the node in onnxruntime's own profile (layout conversions in neither).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import onnxruntime as ort
from machine import CopyRate
from nodes import compare
from onnx import ModelProto, NodeProto, helper, numpy_helper

import minicompiler as mc
from minicompiler.machine import Meter

BLAS_THREADS = int(os.environ["OPENBLAS_NUM_THREADS"])
Array = np.ndarray
TURN_SECONDS = 0.01  # of calls per runner and turn
COPY_BYTES = 64 << 20


@dataclass(frozen=True)
class Case:
    """One measured graph: ONNX nodes from the inputs to the outputs y0, y1, ...

    numpy: the same in numpy (None where numpy has no such function); flops: of a call, for what the
    FMA rate bounds; symbolic: whether sizes come with the call (equal ones have one name).
    """

    group: str
    name: str
    nodes: Sequence[NodeProto]
    inputs: Mapping[str, Array]
    outputs: Sequence[str] = ("y",)
    weights: Mapping[str, Array] = field(default_factory=dict)
    numpy: Callable[..., Any] | None = None
    tolerance: float = 2e-5
    flops: float = 0
    symbolic: bool = False

    def model(self) -> ModelProto:
        def value(name: str, a: Array) -> Any:
            kind = helper.np_dtype_to_tensor_dtype(a.dtype)
            shape = [f"n{n}" if self.symbolic and n > 3 else n for n in a.shape]
            return helper.make_tensor_value_info(name, kind, shape)

        graph = helper.make_graph(
            list(self.nodes),
            self.name,
            [value(n, a) for n, a in self.inputs.items()],
            [helper.make_empty_tensor_value_info(o) for o in self.outputs],
            [numpy_helper.from_array(a, n) for n, a in self.weights.items()],
        )
        opset = helper.make_opsetid("", 20)
        return helper.make_model(graph, opset_imports=[opset], ir_version=9)


def op(name: str, inputs: str, outputs: str = "y", **attrs: Any) -> NodeProto:
    """A node; two blanks between inputs leave one out."""
    made = outputs.split()
    return helper.make_node(name, inputs.split(" "), made, name=f"to_{made[0]}", **attrs)


# ---- the cases ----------------------------------------------------------------------------------
def draw(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def unary(group: str, name: str, shape: tuple[int, ...], f: Any, **attrs: Any) -> Case:
    label = "_".join([name.lower(), *[str(v) for v in attrs.values()], "x".join(map(str, shape))])
    x = np.abs(draw(*shape)) if name == "Log" else draw(*shape)
    return Case(group, label, [op(name, "x", **attrs)], {"x": x}, numpy=f)


def reduction(name: str, shape: tuple[int, ...], axes: tuple[int, ...], f: Any) -> Case:
    where = "all" if len(axes) == len(shape) else "axis" + "".join(map(str, axes))
    label = f"{name.lower()}_{where}_{'x'.join(map(str, shape))}"
    return Case(
        "reduce",
        label,
        [op(name, "x axes", keepdims=0)],
        {"x": draw(*shape)},
        weights={"axes": np.array(axes, np.int64)},
        numpy=lambda x, out: f(x, axis=axes, out=out),
        tolerance=1e-3,
    )


def transposed(*shape: int, perm: tuple[int, ...]) -> Case:
    label = f"transpose_{''.join(map(str, perm))}_{'x'.join(map(str, shape))}"
    return Case(
        "move",
        label,
        [op("Transpose", "x", perm=perm)],
        {"x": draw(*shape)},
        numpy=lambda x, out: np.copyto(out, x.transpose(perm)),
    )


def normalised(name: str, shape: tuple[int, ...], **attrs: Any) -> Case:
    channels = shape[1] if name in ("GroupNormalization", "InstanceNormalization") else shape[-1]
    scale, bias = draw(channels), draw(channels)
    inputs = "x scale" if name == "RMSNormalization" else "x scale bias"
    if name == "GroupNormalization":  # opset 18: one scale per group
        scale, bias = scale[: attrs["num_groups"]], bias[: attrs["num_groups"]]
    label = f"{name.lower().removesuffix('normalization')}_norm_{'x'.join(map(str, shape))}"
    weights = {"scale": scale, "bias": bias}
    weights = {n: w for n, w in weights.items() if n in inputs.split()}
    return Case("rows", label, [op(name, inputs, **attrs)], {"x": draw(*shape)}, weights=weights)


def rms_norm(*shape: int) -> Case:
    """As exporters write it before opset 23."""
    nodes = [
        op("Mul", "x x", "square"),
        op("ReduceMean", "square axes", "mean", keepdims=1),
        op("Add", "mean epsilon", "more"),
        op("Sqrt", "more", "root"),
        op("Div", "x root", "ratio"),
        op("Mul", "ratio scale", "y"),
    ]
    weights = {
        "axes": np.array([-1], np.int64), "epsilon": np.float32(1e-5), "scale": draw(shape[-1]),
    }  # fmt: skip
    return Case(
        "rows", f"rms_norm_{'x'.join(map(str, shape))}", nodes, {"x": draw(*shape)},
        weights={n: np.asarray(w) for n, w in weights.items()},
    )  # fmt: skip


def product(
    m: int, n: int, k: int, *, batch: int = 1, turned: bool = False, constant: bool = False
) -> Case:
    """A (m x k) by B (k x n, or given as n x k if `turned`), which may be a weight."""
    lead = (batch,) if batch > 1 else ()
    a, b = draw(*lead, m, k), draw(*lead, *((n, k) if turned else (k, n)))
    node = op("Gemm", "a b", transB=1) if turned else op("MatMul", "a b")
    right = b.swapaxes(-1, -2) if turned else b
    return Case(
        "gemm",
        "x".join(map(str, (*lead, m, n, k))) + "t" * turned + "_constant" * constant,
        [node],
        {"a": a} if constant else {"a": a, "b": b},
        weights={"b": b} if constant else {},
        numpy=lambda a, *_, out: np.matmul(a, right, out=out),
        flops=2.0 * batch * m * n * k,
    )


def convolution(
    c: int, o: int, size: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> Case:
    """From c to o channels on an image of size x size, with bias and ReLU."""
    weights = {"w": draw(o, c // groups, kernel, kernel), "b": draw(o)}
    pads, made = [kernel // 2] * 4, -(-size // stride)
    attrs = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": pads, "group": groups}
    return Case(
        "conv",
        f"conv_{kernel}x{kernel}" + f"s{stride}" * (stride > 1) + f"_{c}_to_{o}_{size}x{size}"
        + f"_g{groups}" * (groups > 1),
        [op("Conv", "x w b", "s", **attrs), op("Relu", "s")],
        {"x": draw(1, c, size, size)},
        weights=weights,
        flops=2.0 * weights["w"].size * made**2,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    for constant in (False, True):
        for shape in ((1024,) * 3, (2048,) * 3, (128, 3072, 768), (1, 2048, 2048)):
            yield product(*shape, constant=constant)
    yield product(128, 128, 64, batch=12, constant=False)
    yield convolution(3, 64, 224, 7, stride=2)
    yield convolution(64, 64, 56, 3)
    yield convolution(512, 512, 7, 3)
    yield convolution(64, 256, 56)
    yield convolution(1024, 256, 14)
    yield convolution(2048, 512, 7)
    yield convolution(144, 24, 56)
    yield convolution(512, 1024, 28, stride=2)
    yield convolution(144, 144, 56, 3, groups=144)
    cached, large, rows = (1 << 18,), (4096, 4096), (16384, 1024)
    for name, f in (
        ("Exp", np.exp), ("Log", np.log), ("Tanh", np.tanh), ("Erf", None), ("Sigmoid", None),
        ("Sin", np.sin), ("Cos", np.cos),
    ):  # fmt: skip
        yield unary("math", name, cached, f)
    yield unary("math", "Gelu", cached, None)
    yield unary("math", "Gelu", cached, None, approximate="tanh")
    for name, size in (("Exp", 1 << 15), ("Exp", 1 << 16), ("Gelu", 1 << 15)):
        yield unary("math", name, (size,), np.exp if name == "Exp" else None)
    yield unary("stream", "Relu", large, lambda x, out: np.maximum(x, 0, out=out))
    yield unary("stream", "Exp", large, np.exp)
    yield unary("stream", "Sigmoid", large, None)
    yield unary("stream", "Gelu", large, None)
    yield unary("stream", "Gelu", large, None, approximate="tanh")
    two = {"x": draw(*large), "z": draw(*large)}
    yield Case("stream", "add_4096x4096", [op("Add", "x z")], two, numpy=np.add)
    yield Case(
        "stream", "add_row_4096x4095", [op("Add", "x b")], {"x": draw(4096, 4095)},
        weights={"b": draw(4095)},
    )  # fmt: skip
    silu = [op("Sigmoid", "x", "s"), op("Mul", "x s")]
    yield Case("stream", "silu_4096x4096", silu, {"x": draw(*large)})
    for shape in (
        rows, (131072, 128), (16384, 1000), (8192, 2048), (4096, 4096), (1024, 16384)
    ):  # fmt: skip
        yield unary("rows", "Softmax", shape, None)
    for shape in ((64, 512, 512), (1, 21, 512, 512)):
        yield unary("rows", "Softmax", shape, None, axis=1)
    yield normalised("LayerNormalization", rows)
    yield normalised("LayerNormalization", (16384, 768))
    yield normalised("LayerNormalization", (4096, 4096))
    yield rms_norm(*rows)
    yield normalised("GroupNormalization", (16, 256, 64, 64), num_groups=32)
    yield normalised("InstanceNormalization", (16, 256, 64, 64))
    yield reduction("ReduceSum", large, (0,), np.sum)
    yield reduction("ReduceSum", large, (1,), np.sum)
    yield reduction("ReduceSum", large, (0, 1), np.sum)
    yield reduction("ReduceSum", (64, 512, 512), (1,), np.sum)
    yield reduction("ReduceSum", (64, 512, 512), (0, 2), np.sum)
    yield reduction("ReduceSum", (16777216,), (0,), np.sum)
    yield reduction("ReduceMax", large, (1,), np.max)
    yield reduction("ReduceMax", large, (0,), np.max)
    yield reduction("ReduceMean", (4096, 1024), (0,), np.mean)
    yield reduction("ReduceMean", (8, 512, 512), (1,), np.mean)
    yield reduction("ReduceMean", (4, 64, 56, 56), (1,), np.mean)
    yield reduction("ReduceMean", (512, 768), (1,), np.mean)
    yield reduction("ReduceMean", (1, 2048, 7, 7), (2, 3), np.mean)
    yield transposed(4096, 4096, perm=(1, 0))
    yield transposed(4095, 4097, perm=(1, 0))
    yield transposed(64, 512, 512, perm=(0, 2, 1))
    yield transposed(16, 512, 16, 64, perm=(0, 2, 1, 3))
    yield transposed(16, 16, 512, 64, perm=(0, 1, 3, 2))
    yield transposed(16, 224, 224, 3, perm=(0, 3, 1, 2))
    yield transposed(16, 56, 56, 256, perm=(0, 3, 1, 2))
    yield transposed(16, 256, 56, 56, perm=(0, 2, 3, 1))
    yield transposed(128, 768, perm=(1, 0))
    yield transposed(1, 128, 12, 64, perm=(0, 2, 1, 3))
    ids = np.random.default_rng(0).integers(0, 30522, (64, 128))
    yield Case(
        "move", "gather_64x128_of_30522x768", [op("Gather", "t i")], {"i": ids},
        weights={"t": draw(30522, 768)},
    )  # fmt: skip
    parts = {f"x{k}": draw(1, 64, 55, 55) for k in range(2)}
    join = lambda *xs, out: np.concatenate(xs, 1, out=out)  # noqa: E731
    yield Case("move", "concat_2_1x64x55x55", [op("Concat", "x0 x1", axis=1)], parts, numpy=join)
    parts = {f"x{k}": draw(32, 64, 55, 55) for k in range(2)}
    yield Case("move", "concat_2_32x64x55x55", [op("Concat", "x0 x1", axis=1)], parts, numpy=join)
    yield Case(
        "move", "split_3_4096x3072", [op("Split", "x", "y0 y1 y2", axis=1, num_outputs=3)],
        {"x": draw(4096, 3072)}, outputs=("y0", "y1", "y2"),
    )  # fmt: skip
    image = draw(1, 64, 112, 112)
    pool = {"kernel_shape": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1)}
    yield Case("pool", "max_pool_3s2_64x112x112", [op("MaxPool", "x", **pool)], {"x": image})
    yield Case(
        "pool", "max_pool_3s1_256x28x28",
        [op("MaxPool", "x", kernel_shape=(3, 3), pads=(1, 1, 1, 1))], {"x": draw(1, 256, 28, 28)},
    )  # fmt: skip
    yield Case("pool", "average_pool_3s2_64x112x112", [op("AveragePool", "x", **pool)],
               {"x": image})  # fmt: skip
    yield Case("pool", "global_average_2048x7x7", [op("GlobalAveragePool", "x")],
               {"x": draw(1, 2048, 7, 7)})  # fmt: skip
    yield Case("pool", "global_average_512x13x13", [op("GlobalAveragePool", "x")],
               {"x": draw(1, 512, 13, 13)})  # fmt: skip


# ---- runners ------------------------------------------------------------------------------------
Runner = Callable[[], Any]


def ours(case: Case, threads: int) -> tuple[Runner, list[Array]]:
    module = mc.compile(case.model(), threads=threads)
    given = list(case.inputs.values())
    made = module(*given)
    if not all(isinstance(n, int) for t in module.outputs for n in t.shape):
        return (lambda: module(*given)), list(made)  # sizes are known only afterwards
    out = tuple(map(aligned_like, made))
    return (lambda: module(*given, out=out)), list(out)


def onnxruntime(case: Case, threads: int) -> tuple[Runner, list[Array]]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    path = case.model().SerializeToString()
    session = ort.InferenceSession(path, options, ["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, a in case.inputs.items():
        binding.bind_cpu_input(name, a)
    out = [aligned_like(y) for y in session.run(None, dict(case.inputs))]
    for name, a in zip(case.outputs, out, strict=True):
        binding.bind_output(name, "cpu", 0, a.dtype, a.shape, a.ctypes.data)
    return (lambda: session.run_with_iobinding(binding)), out


def aligned_like(a: Array) -> Array:
    """An uninitialised array on whole pages."""
    raw = np.zeros(a.nbytes + 4096, np.uint8)
    start = -raw.ctypes.data % 4096
    return raw[start : start + a.nbytes].view(a.dtype).reshape(a.shape)


def turn(run: Runner, count: int) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - start) / count


def measure(
    case: Case, threads: int, turns: int, copy: CopyRate | None, meter: Meter
) -> dict[str, Any]:
    """One row of the table: all runners in turn, and what the machine could do at that time."""
    runners: dict[str, Runner] = {}
    runners["ours"], own = ours(case, threads)
    runners["ort"], theirs = onnxruntime(case, threads)
    if case.numpy is not None and len(own) == 1 and threads == BLAS_THREADS:
        given, out = list(case.inputs.values()), np.empty_like(own[0])
        function = case.numpy
        runners["numpy"] = lambda: function(*given, out=out)
    for run in runners.values():
        run()
    error = max(map(difference, own, theirs))
    if not error <= case.tolerance:
        raise ArithmeticError(f"{case.name}: differs from onnxruntime by {error:.1e}")
    read = {n: a.nbytes for n, a in {**case.inputs, **case.weights}.items()}
    if case.nodes[0].op_type == "Gather":
        read["t"] = own[0].nbytes
    size = sum(read.values()) + sum(y.nbytes for y in own)
    counts = {n: max(1, int(TURN_SECONDS / turn(run, 1))) for n, run in runners.items()}
    times: dict[str, list[float]] = {n: [] for n in runners}
    rates, peaks = [], []
    large = copy is not None and size > COPY_BYTES // 2
    for k in range(turns):
        names = list(runners)
        for n in names[k % len(names) :] + names[: k % len(names)]:
            times[n].append(turn(runners[n], counts[n]))
        if large and copy is not None:
            rates.append(copy())
        if case.flops:
            peaks.append(meter.flops())
    median = {n: statistics.median(t) for n, t in times.items()}
    row: dict[str, Any] = {
        "group": case.group,
        "case": case.name,
        "threads": threads,
        "microseconds": {n: t * 1e6 for n, t in median.items()},
        "elements_per_ns": sum(y.size for y in own) / median["ours"] / 1e9,
        "gigabytes_per_s": size / median["ours"] / 1e9,
        "error": error,
    }
    if large:
        each = [size / t / 1e9 / r for t, r in zip(times["ours"], rates, strict=True)]
        row["of_copy"] = quartiles(each)
    if case.flops:
        row["peak"] = max(peaks)
        row["of_peak"] = quartiles([case.flops / t / max(peaks) for t in times["ours"]])
    for n in ("numpy", "ort"):
        if n in times:
            row[f"times_{n}"] = quartiles(
                [b / a for a, b in zip(times["ours"], times[n], strict=True)]
            )
    return row


def difference(a: Array, b: Array) -> float:
    """The largest of two results, over the largest finite number of the second; infinities and NaN
    have to lie at the same places."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    known = np.isfinite(b)
    if a.shape != b.shape or not np.array_equal(a[~known], b[~known], equal_nan=True):
        return math.inf
    largest = np.abs(b[known]).max(initial=0.0) or 1.0
    return float(np.abs(a[known] - b[known]).max(initial=0.0) / largest)


def beside_node(case: Case, threads: int, peak: float) -> dict[str, Any]:
    """The kernel alone, against the FMA peak and the node in onnxruntime's profile."""
    (row,) = compare(case.model(), case.inputs, case.nodes[0].op_type, threads, rounds=3)
    return {
        "kernel": row["ours"] * 1e6,
        "kernel_of_peak": case.flops / row["ours"] / peak,
        "times_node": 1 / row["ratio"],
    }


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = (float(np.percentile(values, p)) for p in (25, 50, 75))
    return middle, low, high


def text(row: Mapping[str, Any]) -> str:
    def spread(key: str) -> str:
        if key not in row:
            return " " * 17
        middle, low, high = row[key]
        return f"{middle:5.2f} ({low:.2f}-{high:.2f})".ljust(17)

    line = (
        f"{row['case']:34} {row['threads']} {row['microseconds']['ours']:9.1f} us "
        f"{row['elements_per_ns']:6.2f} {row['gigabytes_per_s']:6.1f}  "
        f"{spread('of_copy')} {spread('times_numpy')} {spread('times_ort')}"
    )
    if "times_node" in row:
        line += f" {row['kernel_of_peak']:5.2f} {row['times_node']:6.2f}"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("which", nargs="*", help="groups, or parts of the names of cases")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    args = parser.parse_args()
    target = mc.Target.host()
    found = []
    print(f"{target.cpu_name}, {target.vector_bytes * 8}-bit vectors")
    head = f"{'case':34} t {'median':>12} {'el/ns':>6} {'GB/s':>6}"
    print(f"{head}  {'of copy':17} {'x numpy':17} {'x ort':17}   FMA x node")
    for threads in map(int, args.threads.split(",")):
        copy, meter = CopyRate(target, COPY_BYTES, threads), Meter(target, threads)
        for case in cases():
            if args.which and not any(w == case.group or w in case.name for w in args.which):
                continue
            try:
                row = measure(case, threads, args.turns, copy, meter)
            except ArithmeticError as e:
                raise SystemExit(str(e)) from None
            if case.flops:
                row |= beside_node(case, threads, row["peak"])
            found.append(row)
            print(text(row), flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
