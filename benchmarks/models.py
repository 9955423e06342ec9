"""Whole models against other runtimes, in turns within one process per case.

    python benchmarks/models.py DIR/*.onnx [--threads 1,2] [--against onnxruntime,openvino]
                                [--seconds 2] [--json FILE] [--back-to-back]

Beside each MODEL.onnx lies MODEL.npz with its inputs (`in:NAME`) and expected outputs (`out:NAME`);
MODEL.1.npz and so on are further input sets. Prints, per model, input set and thread count, the
median milliseconds of each runtime, our time over each other's and over the best of them (quartiles
of the turns in brackets), the largest error, and the geometric means over all cases. A runtime that
refuses a model is named and left out. torch compiles MODEL.pt2 (what torch.export.save wrote of the
module that the file was exported from) where there is one.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

OWN = "minicompiler"


def input_sets(model: Path) -> list[Path]:
    """MODEL.npz, MODEL.1.npz, ... as far as they exist."""
    return [
        p
        for p in [model.with_suffix(".npz"), *sorted(model.parent.glob(model.stem + ".[0-9]*.npz"))]
        if p.exists()
    ]


def measure(
    model: Path, data: Path, threads: int, against: list[str], seconds: float, back_to_back: bool
) -> dict[str, Any]:
    """One case, in this process."""
    import minicompiler as mc
    from minicompiler.bench import compare, peer, ratios
    from minicompiler.errors import MinicompilerError

    arrays = np.load(data)
    feeds = {k[3:]: arrays[k] for k in arrays.files if k.startswith("in:")}
    module = mc.compile(str(model), threads=threads)
    found = module.run(feeds)
    errors = [0.0]
    for name, value in found.items():
        want = arrays["out:" + name].astype(np.float64)
        if want.size:
            errors.append(float(np.abs(value - want).max() / max(np.abs(want).max(), 1e-30)))
    values = [feeds[i.name] for i in module.inputs]
    runners = {OWN: lambda: module(*values)}
    refused = {}
    for name in against:
        try:
            runners[name] = peer(name, str(model), threads)(feeds)
        except MinicompilerError as error:
            refused[name] = str(error)
    times = compare(runners, seconds, back_to_back)
    case: dict[str, Any] = {
        "model": model.stem, "inputs": data.stem, "threads": threads, "error": max(errors),
        "milliseconds": {n: t.summary()["median"] * 1e3 for n, t in times.items()},
        "ratio": {}, "refused": refused,
    }  # fmt: skip
    for name in [n for n in against if n in runners]:
        middle, low, high = ratios(times[OWN], times[name])
        case["ratio"][name] = [1 / middle, 1 / high, 1 / low]
    if case["ratio"]:
        case["best"] = max(r[0] for r in case["ratio"].values())
    return case


def line(case: dict[str, Any]) -> str:
    """One row of the table."""
    parts = [f"{case['inputs']:16} {case['threads']}  "]
    parts += [f"{name} {ms:9.3f} ms  " for name, ms in case["milliseconds"].items()]
    parts += [f"/{name} {r:.2f} ({a:.2f}-{b:.2f})  " for name, (r, a, b) in case["ratio"].items()]
    parts += [f"{name} does not run it  " for name in case["refused"]]
    return "".join(parts) + f"error {case['error']:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--against", default="onnxruntime,openvino")
    parser.add_argument("--seconds", type=float, default=2.0, help="of counted calls per runtime")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--back-to-back", action="store_true",
                        help="one call each in turn, without a pause")  # fmt: skip
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # in a child: this input set
    args = parser.parse_args()
    against = [x for x in args.against.split(",") if x]
    if args.one:
        case = measure(
            args.models[0], args.one, int(args.threads), against, args.seconds, args.back_to_back
        )
        print(json.dumps(case))
        return
    cases = []
    for model in args.models:
        for data in input_sets(model):
            for threads in args.threads.split(","):
                # A process of its own, so that no runtime's threads or memory meet the next case.
                command = [
                    sys.executable, __file__, str(model), "--one", str(data), "--threads", threads,
                    "--against", args.against, "--seconds", str(args.seconds),
                    *["--back-to-back"] * args.back_to_back,
                ]  # fmt: skip
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                cases.append(json.loads(done.stdout.splitlines()[-1]))
                print(line(cases[-1]), flush=True)
    for threads in args.threads.split(","):
        for name in [*against, *(["best"] if against else [])]:
            some = [c for c in cases if c["threads"] == int(threads)]
            each = (
                [c["best"] for c in some if "best" in c]
                if name == "best"
                else [c["ratio"][name][0] for c in some if name in c["ratio"]]
            )
            if not each:
                continue
            mean = math.exp(statistics.fmean(math.log(x) for x in each))
            label = "the best of them" if name == "best" else name
            few = f" ({len(each)} of {len(some)} cases)" if len(each) < len(some) else ""
            print(f"{threads} threads, geometric mean over {label}: {mean:.3f}{few}")
    if args.json:
        args.json.write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
