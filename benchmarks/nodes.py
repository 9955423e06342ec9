"""The kernels of a model against the nodes of onnxruntime's own profile, one by one.

    python benchmarks/nodes.py MODEL.onnx [--op Conv] [--threads 1] [--rounds 5] [--json FILE]

A kernel is compared with the sum of the nodes that it stands for: those whose names its own source
nodes bear. (onnxruntime joins an activation to the convolution before it, under the name of either
or of the value that they make; its layout conversions are not in a node's time.) Both sides
take turns, round by round. Prints the median microseconds of both, their ratio and ours in GFLOP/s,
and the geometric mean of the ratios.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from minicompiler import driver
from minicompiler.context import Context, Options
from minicompiler.ir.graph import Apply, topological
from minicompiler.runtime.plan import evaluate
from minicompiler.runtime.profile import profile
from minicompiler.target import Target

ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid")


def node_times(
    model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], threads: int
) -> dict[str, list[float]]:
    """Seconds per node of onnxruntime, by node name, several runs."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        path = model.SerializeToString()
        session = ort.InferenceSession(path, options, ["CPUExecutionProvider"])
        for _ in range(12):
            session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text())
    found: dict[str, list[float]] = collections.defaultdict(list)
    for e in events:
        if e.get("cat") == "Node" and e["name"].endswith("_kernel_time"):
            found[e["name"].removesuffix("_kernel_time")].append(e["dur"] * 1e-6)
    return {name: times[2:] for name, times in found.items()}


def compare(
    model: onnx.ModelProto,
    feeds: Mapping[str, np.ndarray],
    operator: str,
    threads: int,
    rounds: int,
) -> list[dict[str, Any]]:
    """One record per kernel that stands for at least one node of the operator."""
    ctx = Context(Target.host(), Options(threads=threads, record=False))
    fn = driver.optimise(driver.import_model(model, None, ctx), ctx)
    built = driver.build_kernels(fn, ctx)
    module = driver.assemble(fn, built, ctx)
    values = [feeds[i.name] for i in module.inputs]
    ours: list[list[float]] = []
    theirs: dict[str, list[float]] = collections.defaultdict(list)
    dims: dict[str, int] = {}
    for _ in range(rounds):
        times = profile(module, values, repeat=10)
        ours.append([t.seconds for t in times])
        dims = times[0].dims
        for name, found in node_times(model, feeds, threads).items():
            theirs[name] += found
    groups = [v for v in topological(fn.results) if isinstance(v, Apply)]
    # A convolution in a blocked layout is named after its result there, or that of the activation
    # that it is fused with.
    outputs = {n.name: [f"{o}_nchwc" for o in n.output] for n in model.graph.node}
    fused = {
        n.input[0]: f"{n.output[0]}_nchwc" for n in model.graph.node if n.op_type in ACTIVATIONS
    }
    behind = {n.name: [fused[o] for o in n.output if o in fused] for n in model.graph.node}
    rows = []
    for k, (group, call) in enumerate(zip(groups, built.calls, strict=True)):
        assert not isinstance(group.op, str)
        names = {loc.name: loc.op for loc in group.locs}
        if operator not in names.values():
            continue
        known = [n for name in names for n in (name, *outputs[name]) if n in theirs]
        known = known or [n for name in names for n in behind[name] if n in theirs]
        if not known:
            continue
        kernel = built.kernels[call.kernel]
        mine = statistics.median(r[k] for r in ours)
        other = sum(statistics.median(theirs[n]) for n in known)
        first = next(n for n, op in names.items() if op == operator)
        rows.append(
            {
                "node": first, "kernel": call.kernel, "result": str(group.type),
                "ours": mine, "theirs": other, "ratio": mine / other,
                "gflops": evaluate(kernel.flops, dims) / mine / 1e9,
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    parser.add_argument("--op", default="Conv")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    records = {}
    for model in args.models:
        arrays = np.load(Path(model).with_suffix(".npz"))
        feeds = {k[3:]: arrays[k] for k in arrays.files if k.startswith("in:")}
        rows = compare(onnx.load(model), feeds, args.op, args.threads, args.rounds)
        records[model] = rows
        print(f"{Path(model).stem}, {args.op}, {args.threads} thread(s)")
        for r in rows:
            print(
                f"  {r['node'][:34]:34} {r['result'][:30]:30} {r['ours'] * 1e6:9.1f} us  "
                f"onnxruntime {r['theirs'] * 1e6:9.1f} us  ratio {r['ratio']:.2f}  "
                f"{r['gflops']:6.1f} GFLOP/s  {r['kernel']}"
            )
        mean = math.exp(statistics.fmean(math.log(r["ratio"]) for r in rows))
        total = sum(r["ours"] for r in rows) / sum(r["theirs"] for r in rows)
        print(f"  geometric mean {mean:.3f}, sum over sum {total:.3f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
