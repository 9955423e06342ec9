"""Matrix products of two run-time operands against the FMA peak of one thread, alternating in one
run.

    python benchmarks/gemm.py 1024 1000 1023 512 64x3072x768 [--rounds 30] [--against numpy]

Packing is inside the measured call. Prints, per size MxNxK: the median and best GFLOP/s, as a
fraction of
the highest peak seen in the same run; with --against numpy the ratio of medians to OpenBLAS, one
thread.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from machine import FmaPeak

import minicompiler as mc
from minicompiler.ir.expr import Const
from minicompiler.ir.graph import Function, Input, apply
from minicompiler.ir.types import TensorType, float32
from minicompiler.ops.linalg import matmul


def product(m: int, n: int, k: int) -> Function:
    """The graph of one matrix product."""
    a = Input("a", TensorType((Const(m), Const(k)), float32))
    b = Input("b", TensorType((Const(k), Const(n)), float32))
    return Function("product", (a, b), (apply(matmul, a, b),), result_names=("c",))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("sizes", nargs="+", help="N (a cube) or MxNxK")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--against", choices=["numpy"], default=None)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    target = mc.Target.host()
    peak = FmaPeak(target)
    print(f"{target.cpu_name}, {target.vector_bytes * 8}-bit vectors, one thread")
    for text in args.sizes:
        parts = [int(x) for x in text.split("x")]
        m, n, k = parts if len(parts) == 3 else parts * 3
        module = mc.compile(product(m, n, k), threads=1)
        a, b = (rng.standard_normal(s).astype(np.float32) for s in ((m, k), (k, n)))
        out = np.empty((m, n), np.float32)
        want = a.astype(np.float64) @ b
        module(a, b, out=(out,))
        error = np.abs(out - want).max() / np.abs(want).max()
        flops = 2.0 * m * n * k
        repeat = max(1, int(2e-3 * 50e9 / flops))
        peaks, ours, theirs = [], [], []
        for _ in range(args.rounds):
            peaks.append(peak())
            start = time.perf_counter()
            for _ in range(repeat):
                module(a, b, out=(out,))
            ours.append(flops * repeat / (time.perf_counter() - start) / 1e9)
            if args.against:
                start = time.perf_counter()
                for _ in range(repeat):
                    np.matmul(a, b, out=out)
                theirs.append(flops * repeat / (time.perf_counter() - start) / 1e9)
        top = max(peaks)
        middle, best = np.median(ours), max(ours)
        line = (
            f"{m}x{n}x{k}: median {middle:.1f}, best {best:.1f} GFLOP/s; peak {top:.1f}; fraction "
            f"of the highest peak: median {middle / top:.3f}, best {best / top:.3f}; "
            f"error {error:.1e}"
        )
        if theirs:
            line += f"; over OpenBLAS {middle / np.median(theirs):.3f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
