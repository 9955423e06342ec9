"""Products of few rows with weights that come from memory, as in a decoder's step for a few texts,
against onnxruntime and OpenVINO, in turns within one process.

    python benchmarks/few_rows.py [KxN ...] [--rows 1,2,4,6,8,12,16,24,32] [--threads 1,2]
                                  [--against onnxruntime,openvino] [--megabytes 56] [--seconds 0.3]

A model has as many weights of K x N as make so many megabytes, each multiplied by the same rows.
Minicompiler's times are those of a model whose number of rows is known, and of one for any number;
the others know it. Prints the rate at which weights are read, and our times over theirs.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import minicompiler as mc
from minicompiler.bench import compare, peer, ratios

KNOWN, ANY = "rows known", "any rows"


def stack(rows: int | str, depth: int, columns: int, count: int) -> onnx.ModelProto:
    """x (rows x depth) by each of `count` weights."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.standard_normal((depth, columns), np.float32), f"w{i}")
        for i in range(count)
    ]
    nodes = [helper.make_node("MatMul", ["x", w.name], [f"y_{w.name}"]) for w in weights]
    kind = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", kind, (rows, depth))],
        [helper.make_tensor_value_info(n.output[0], kind, (rows, columns)) for n in nodes],
        weights,
    )
    opset = helper.make_opsetid("", 20)
    return helper.make_model(graph, opset_imports=[opset], ir_version=9)


def measure(
    rows: int,
    depth: int,
    columns: int,
    count: int,
    either: mc.Module,
    threads: int,
    others: list[str],
    seconds: float,
) -> str:
    """The rest of a line: `either` is the model for any number of rows."""
    model = stack(rows, depth, columns, count)
    known = mc.compile(model, threads=threads)
    x = np.random.default_rng(1).standard_normal((rows, depth), np.float32)
    runners = {KNOWN: lambda: known(x), ANY: lambda: either(x)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "products.onnx")
        onnx.save(model, path)
        for name in others:
            runners[name] = peer(name, str(path), threads)({"x": x})
        times = compare(runners, seconds)
    parts = []
    for own in (KNOWN, ANY):
        rate = 4 * depth * columns * count / times[own].summary()["median"] / 1e9
        over = [f"{1 / ratios(times[own], times[n])[0]:.2f}" for n in others]
        parts.append(f"{own} {rate:5.1f} GB/s, {' '.join(over)}")
    return ";  ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sizes", nargs="*", default=["768x3072", "3072x768", "2048x2048"])
    parser.add_argument("--rows", default="1,2,4,6,8,12,16,24,32")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--against", default="onnxruntime,openvino")
    parser.add_argument("--megabytes", type=float, default=56)
    parser.add_argument("--seconds", type=float, default=0.3, help="of counted calls per runtime")
    args = parser.parse_args()
    others = [x for x in args.against.split(",") if x]
    for size in args.sizes:
        depth, columns = map(int, size.split("x"))
        count = max(1, round(args.megabytes * 1e6 / (4 * depth * columns)))
        for threads in map(int, args.threads.split(",")):
            either = mc.compile(stack("n", depth, columns, count), threads=threads)
            for rows in map(int, args.rows.split(",")):
                found = measure(rows, depth, columns, count, either, threads, others, args.seconds)
                print(f"{size:10} {threads} thread(s), {rows:3} rows:  {found}", flush=True)


if __name__ == "__main__":
    main()
