"""What a call costs, and what a second thread costs and brings.

    python benchmarks/threads.py [--rounds 15] [--json FILE]

Prints the time of a call with almost nothing to compute, the time to start and join all threads and
to pass a barrier while they run, the processor time of an idle pool, and for five compute-bound
kernels the time on one thread over the time on two. Two threads share the clock's boost, the
memory, and what else runs on the machine, so that the same ratio of independent multiply-adds in
registers is what a kernel can reach. A virtual machine's two processors are at times two halves of
one core: a turn counts if the multiply-adds right before and right after it had both.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import minicompiler as mc
from minicompiler.codegen.native import compile_object
from minicompiler.frontend.builder import Builder
from minicompiler.ir.graph import Function
from minicompiler.machine import Meter
from minicompiler.runtime.loader import Library
from minicompiler.runtime.pool import barrier_address, get_pool
from minicompiler.target import Target

THREADS = 2
TURN_SECONDS = 0.03  # of calls per kernel, number of threads, and turn
WHOLE = 1.85  # times the rate of one thread: that of multiply-adds with two cores

# Word 0 of the argument counts what is repeated.
_TEXT = """
define void @nothing(i32 %tid, i32 %n, ptr %arg, ptr %barrier) #0 {
  ret void
}
define void @barriers(i32 %tid, i32 %n, ptr %arg, ptr %barrier) #0 {
entry:
  %count = load i64, ptr %arg
  br label %loop
loop:
  %i = phi i64 [ 0, %entry ], [ %j, %loop ]
  call void inttoptr (i64 BARRIER to ptr)(ptr %barrier, i32 %n)
  %j = add i64 %i, 1
  %more = icmp slt i64 %j, %count
  br i1 %more, label %loop, label %done
done:
  ret void
}
define void @regions(i64 %count, ptr %pool, ptr %arg, i32 %n) #0 {
entry:
  br label %loop
loop:
  %i = phi i64 [ 0, %entry ], [ %j, %loop ]
  %used = call i32 inttoptr (i64 REGION to ptr)(ptr %pool, ptr @nothing, ptr %arg, i32 %n)
  %j = add i64 %i, 1
  %more = icmp slt i64 %j, %count
  br i1 %more, label %loop, label %done
done:
  ret void
}
"""


# ---- the pool ------------------------------------------------------------------------------------
class Pool:
    """Times of the pool's own work, in seconds."""

    def __init__(self, target: Target) -> None:
        self.pool = get_pool(THREADS)
        region = ctypes.cast(self.pool.region, ctypes.c_void_p).value
        text = _TEXT.replace("BARRIER", str(barrier_address())).replace("REGION", str(region))
        self.library = Library(compile_object(text, target), ["barriers", "regions"])
        kinds = (ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32)
        self._regions = ctypes.CFUNCTYPE(None, *kinds)(self.library.address("regions"))
        self.count = ctypes.c_int64()

    def region(self, count: int = 20_000) -> float:
        """One fork and join of threads that are awake."""
        start = time.perf_counter()
        self._regions(count, self.pool.handle, ctypes.addressof(self.count), THREADS)
        return (time.perf_counter() - start) / count

    def barrier(self, count: int = 50_000) -> float:
        """One barrier while all threads run."""
        self.count.value = count
        start = time.perf_counter()
        address = self.library.address("barriers")
        self.pool.region(self.pool.handle, address, ctypes.addressof(self.count), THREADS)
        return (time.perf_counter() - start) / count

    def idle(self, seconds: float = 0.5) -> float:
        """Processor time of this process while nothing runs, as a share of one core."""
        self.region(1)
        start = time.process_time()
        time.sleep(seconds)
        return (time.process_time() - start) / seconds


# ---- calls ---------------------------------------------------------------------------------------
def calls(rounds: int, count: int = 10_000) -> dict[str, float]:
    """Seconds of a call that adds two arrays of 4 numbers, on one thread: with the caller's array
    for the result, with a new one, and the same of numpy."""
    net = Builder("add")
    y = net.add(net.input("a", (4,)), net.input("b", (4,)))
    module = mc.compile(net.function(y=y), threads=1)
    a, b, out = (np.ones(4, np.float32) for _ in range(3))
    runs: dict[str, Callable[[], Any]] = {
        "call, out= given": lambda: module(a, b, out=[out]),
        "call, new result": lambda: module(a, b),
        "numpy.add, out= given": lambda: np.add(a, b, out=out),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(count):
                run()
            times[name].append((time.perf_counter() - start) / count)
    return {name: statistics.median(of) for name, of in times.items()}


# ---- kernels that compute ------------------------------------------------------------------------
def product(n: int) -> Function:
    net = Builder(f"matmul_{n}")
    return net.function(y=net.matmul(net.input("a", (n, n)), net.input("b", (n, n))))


def convolution(channels: int, size: int, window: int) -> Function:
    net = Builder(f"conv_{window}x{window}_{channels}_{size}x{size}")
    rng = np.random.default_rng(1)
    w = rng.standard_normal((channels, channels, window, window), np.float32)
    pads = (window // 2,) * 2
    x = net.input("x", (1, channels, size, size))
    return net.function(y=net.relu(net.conv(x, w, pads_begin=pads, pads_end=pads)))


def attention(heads: int, positions: int) -> Function:
    net = Builder(f"attention_{heads}_{positions}")
    q, k, v = (net.input(n, (1, heads, positions, 64)) for n in "qkv")
    weights = net.softmax(net.matmul(q, net.transpose(k, perm=(0, 1, 3, 2))))
    return net.function(y=net.matmul(weights, v))


def kernels() -> list[Function]:
    return [
        product(1024), product(2048), convolution(256, 56, 3), convolution(512, 28, 1),
        attention(12, 512),
    ]  # fmt: skip


def runner(fn: Function, threads: int) -> Callable[[], float]:
    """Seconds per call of one turn."""
    module = mc.compile(fn, threads=threads)
    rng = np.random.default_rng(0)
    given = [rng.standard_normal([int(n) for n in t.shape], np.float32) for t in module.inputs]
    out = module(*given)
    start = time.perf_counter()
    module(*given, out=out)
    count = max(1, round(TURN_SECONDS / (time.perf_counter() - start)))

    def run() -> float:
        start = time.perf_counter()
        for _ in range(count):
            module(*given, out=out)
        return (time.perf_counter() - start) / count

    return run


def speedups(fn: Function, alone: tuple[Meter, Meter], rounds: int) -> dict[str, Any]:
    """How many times as fast two threads are, for the kernel and for multiply-adds alone."""
    one, two = runner(fn, 1), runner(fn, THREADS)
    ratios, peaks, times = [], [], []
    for _ in range(rounds):
        single, first = alone[0].flops(), alone[1].flops()
        turn = one(), two()
        peak = min(first, alone[1].flops()) / single
        if peak >= WHOLE:
            peaks.append(peak)
            times.append(turn)
            ratios.append(turn[0] / turn[1])
    found: dict[str, Any] = {"kernel": fn.name, "turns": len(times)}
    if times:
        found |= {
            "milliseconds": [statistics.median(t) * 1e3 for t in zip(*times, strict=True)],
            "speedup": [float(np.percentile(ratios, p)) for p in (50, 25, 75)],
            "peak": [float(np.percentile(peaks, p)) for p in (50, 25, 75)],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    target = Target.host()
    print(f"{target.cpu_name}, {THREADS} threads")
    pool = Pool(target)
    found: dict[str, Any] = {
        "region": statistics.median(pool.region() for _ in range(args.rounds)),
        "barrier": statistics.median(pool.barrier() for _ in range(args.rounds)),
        "idle": pool.idle(),
        "calls": calls(args.rounds),
    }
    for name, seconds in found["calls"].items():
        print(f"{name:28} {seconds * 1e9:8.0f} ns")
    print(f"start and join all threads   {found['region'] * 1e9:8.0f} ns")
    print(f"barrier                      {found['barrier'] * 1e9:8.0f} ns")
    print(f"idle pool                    {found['idle'] * 100:8.2f} % of a core")
    found["kernels"] = []
    alone = Meter(target, 1), Meter(target, THREADS)
    for fn in kernels():
        row = speedups(fn, alone, args.rounds)
        found["kernels"].append(row)
        if not row["turns"]:
            print(f"{fn.name:28} not measured: no turn had two whole cores", flush=True)
            continue
        one, two = row["milliseconds"]
        (a, low, high), (b, *_) = row["speedup"], row["peak"]
        print(
            f"{fn.name:28} {one:8.2f} ms, {two:8.2f} on two threads: {a:.2f} times as fast "
            f"({low:.2f}-{high:.2f}; {row['turns']} turns), multiply-adds {b:.2f}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
