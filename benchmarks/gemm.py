"""Matrix products against the FMA peak, OpenBLAS and onnxruntime, alternating in one run.

    python benchmarks/gemm.py [SIZE ...] [--b runtime,constant] [--turns 9] [--json FILE]

A size is N (a cube), MxNxK or BATCHxMxNxK; a `t` behind it: B is given as N x K. Without sizes, a
sweep of 30. B comes in with each call (`runtime`; packing it is part of the call) or is a weight of
the model (`constant`; numpy cannot use that). FMA is the rate of a call over the highest peak of
its turns; the other columns are our time over theirs, medians of turns. At the end their geometric
means. OPENBLAS_NUM_THREADS (default 1) sets the threads of all.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from kernels import BLAS_THREADS, measure, product

import minicompiler as mc
from minicompiler.machine import Meter

SWEEP = """64 96 128 192 256 384 512 768 1024 1536 2048
127 129 255 257 511 513 1023 1025
64x64x2048 4x1024x1024 16x2048x512 2048x16x512 1024x1024x64
12x128x128x64 12x128x64x128 32x64x64x64
1x1024x1024 1x2048x2048 1x2048x2048t""".split()


def over(row: dict[str, Any], other: str) -> float:
    return float(row["microseconds"]["ours"] / row["microseconds"][other])


def over_better(row: dict[str, Any]) -> float:
    """Our time over the better one's."""
    return max(over(row, "numpy"), over(row, "ort"))


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("sizes", nargs="*", default=SWEEP)
    parser.add_argument("--b", default="runtime,constant")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    args = parser.parse_args()
    target = mc.Target.host()
    meter = Meter(target, BLAS_THREADS)
    rows = []
    print(f"{target.cpu_name}, {target.vector_bytes * 8}-bit vectors, {BLAS_THREADS} thread(s)")
    print(f"{'MxNxK':28} {'median us':>10} {'GFLOP/s':>8} {'FMA':>5}  OpenBLAS onnxruntime better")
    for kind in args.b.split(","):
        for size in args.sizes:
            parts = [int(x) for x in size.removesuffix("t").split("x")]
            *batch, m, n, k = parts if len(parts) > 1 else parts * 3
            case = product(
                m, n, k, batch=math.prod(batch),
                turned=size.endswith("t"), constant=kind == "constant",
            )  # fmt: skip
            row = measure(case, BLAS_THREADS, args.turns, None, meter)
            rows.append(row | {"b": kind})
            time = row["microseconds"]["ours"]
            print(
                f"{case.name:28} {time:10.1f} {case.flops / time / 1e3:8.1f} "
                f"{row['of_peak'][0]:5.2f} {over(row, 'numpy'):9.2f} {over(row, 'ort'):11.2f} "
                f"{over_better(row):6.2f}",
                flush=True,
            )
        of_kind = [over_better(row) for row in rows if row["b"] == kind]
        print(f"{kind} B: geometric mean over the better of both {geometric_mean(of_kind):.3f}")
    print(f"all: {geometric_mean([over_better(row) for row in rows]):.3f}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
