"""What this machine can do at most, measured by generated code and kept on disk.

    m = peaks(target, threads=2)       measured once per processor and number of threads
    m.flops                            1.2e11: float32 fused multiply-adds, two operations each
    m.level(300_000).read              bytes per second from the memory that holds 300 kB
    m.launch                           seconds to start all threads on an empty function and join

Kernels are compared with these rates: a "roofline", Williams et al., "Roofline: an insightful
visual performance model for multicore architectures" (2009).
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from minicompiler.codegen.native import compile_object
from minicompiler.errors import RunError
from minicompiler.runtime.diskcache import DiskCache
from minicompiler.runtime.loader import Library
from minicompiler.runtime.pool import get_pool
from minicompiler.target import Target

_VERSION = 1  # of the measurement; a change makes what is on disk invalid
_CHAINS = 12  # independent sums: more than latency times issue width, and they fit the registers
_ALIGN = 4096
_RUN_SECONDS = 2e-3  # of one measured run
_RUNS = 9  # the fastest counts: a peak is what the machine can do, not what it does on average
_LARGEST = 256 << 20
_TOO_LOW = 1.05  # times the kept rate: above, it was measured on a busy machine


@dataclasses.dataclass(frozen=True)
class Level:
    """One memory: what fits in `bytes` (all threads together) is read and written at these rates,
    in bytes per second of all threads."""

    name: str
    bytes: int
    read: float
    write: float


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Rates of all threads together. flops: per second; levels: fastest memory first; launch:
    seconds."""

    threads: int
    flops: float
    levels: tuple[Level, ...]
    launch: float

    def level(self, size: float) -> Level:
        """The fastest memory that holds `size` bytes; the last one holds everything."""
        return next((x for x in self.levels if size <= x.bytes), self.levels[-1])

    @property
    def memory(self) -> Level:
        """The slowest one, outside of the caches."""
        return self.levels[-1]

    def to_json(self) -> dict[str, Any]:
        """JSON types only; `_from_json` is the inverse."""
        return dataclasses.asdict(self)


def peaks(target: Target, threads: int, again: bool = False) -> Peaks:
    """The peaks of `threads` threads that use the instructions of `target`, which this machine must
    have. Taken from the disk cache if they were measured before, unless `again`; measured again
    also when they turn out to be too low, because the machine was busy then.

    Raises RunError while another call uses the threads.
    """
    key = f"machine {_VERSION} {threads} {json.dumps(target.to_json(), sort_keys=True)}".encode()
    cache = DiskCache()
    entry = None if again else cache.get(key)
    if entry is not None:
        found = _from_json(entry.metadata)
        if flops_now(target, threads) <= _TOO_LOW * found.flops:
            return found
    found = measure(target, threads)
    cache.put(key, b"", found.to_json())
    return found


def flops_now(target: Target, threads: int) -> float:
    """The rate of fused multiply-adds at this moment: lower than the peak while other programs use
    the machine, or while it is hot."""
    return Meter(target, threads).flops()


def measure(target: Target, threads: int) -> Peaks:
    """The measurement itself, about a second. Raises RunError as `peaks`."""
    meter = Meter(target, threads)
    levels = [meter.level(name, size) for name, size in _sizes(target, threads).items()]
    return Peaks(threads, meter.flops(), tuple(levels), meter.launch())


def _from_json(data: Mapping[str, Any]) -> Peaks:
    levels = tuple(Level(**level) for level in data["levels"])
    return Peaks(data["threads"], data["flops"], levels, data["launch"])


class Meter:
    """The generated functions, ready to run on some threads.

    Raises RunError if this machine cannot run code for the target.
    """

    def __init__(self, target: Target, threads: int) -> None:
        target.check_host(f"code for {target}")
        self.lanes, self.threads = target.vector_bytes // 4, threads
        symbols = ["mc_fma", "mc_read", "mc_write"]
        self.library = Library(compile_object(_text(target), target), symbols)

    def seconds(self, symbol: str, *words: int) -> float:
        """One run on all threads."""
        table = (ctypes.c_int64 * len(words))(*words)
        with get_pool(self.threads).lease() as lease:
            if lease is None:
                raise RunError(
                    "another call is using the threads", hint="measure while nothing runs"
                )
            address, argument = self.library.address(symbol), ctypes.addressof(table)
            start = time.perf_counter()
            lease.run(address, argument, self.threads)
            return time.perf_counter() - start

    def launch(self) -> float:
        return min(self.seconds("mc_fma", 0) for _ in range(500))

    def flops(self) -> float:
        rounds = _rate(lambda n: self.seconds("mc_fma", n), 1000)
        return rounds * 2 * self.lanes * _CHAINS * self.threads

    def level(self, name: str, size: int) -> Level:
        """The rates of a block of memory of about `size` bytes, a part of it for each thread."""
        block = self.lanes * 4 * _CHAINS
        each = max(size // self.threads // block, 1) * block
        # Written to, or all pages would be one and the same page of zeros.
        raw = np.ones(each * self.threads + _ALIGN, np.uint8)
        base = raw.ctypes.data + -raw.ctypes.data % _ALIGN

        def rate(symbol: str) -> float:
            passes = _rate(lambda n: self.seconds(symbol, n, base, each), 1)
            return each * self.threads * passes

        return Level(name, size, rate("mc_read"), rate("mc_write"))


def _sizes(target: Target, threads: int) -> dict[str, int]:
    """Bytes to measure each memory with. Caches also hold other things, hence three quarters. L1 is
    left out: what a kernel reads was written by another one, mostly on another core."""
    _, l2, l3 = target.caches
    found = {"L2": l2 * threads * 3 // 4, "L3": l3 * 3 // 4}
    return found | {"memory": min(4 * max(l3, l2 * threads), _LARGEST)}


def _rate(run: Callable[[int], float], rounds: int) -> float:
    """Rounds per second; `run` takes a number of rounds and gives seconds."""
    while (seconds := run(rounds)) < _RUN_SECONDS:
        rounds = max(rounds * 2, int(rounds * _RUN_SECONDS / max(seconds, 1e-7)))
    return rounds / min(run(rounds) for _ in range(_RUNS))


# ---- generated code ------------------------------------------------------------------------------
def _text(target: Target) -> str:
    """Three functions that a region can run, each repeating its loop: fused multiply-adds in
    registers, and reading and writing a thread's part of a block of memory.

    words[0]: how often; words[1], words[2]: where the memory is, and its bytes per thread.
    """
    lanes = target.vector_bytes // 4
    reals, whole = f"<{lanes} x float>", f"<{lanes} x i32>"
    chains = range(_CHAINS)
    fma = f"@llvm.fma.v{lanes}f32"
    start = [f"  %a{k} = phi {reals} [ splat (float {k}.0), %entry ], [ %b{k}, %loop ]"
             for k in chains]  # fmt: skip
    step = [f"  %b{k} = call {reals} {fma}({reals} %a{k}, {reals} %m, {reals} %c)" for k in chains]
    out = [f"  store volatile {reals} %b{k}, ptr %keep, align 4" for k in chains]
    head = "i32 %tid, i32 %n, ptr %words, ptr %barrier"
    # The factors come from memory, so that the loop is not folded away.
    compute = f"""
declare {reals} {fma}({reals}, {reals}, {reals})
define void @mc_fma({head}) #0 {{
entry:
  %keep = alloca {reals}, align 64
  store volatile {reals} splat (float 0.5), ptr %keep, align 4
  %m = load volatile {reals}, ptr %keep, align 4
  %c = load volatile {reals}, ptr %keep, align 4
  %times = load i64, ptr %words, align 8
  %any = icmp sgt i64 %times, 0
  br i1 %any, label %loop, label %done
loop:
  %i = phi i64 [ 0, %entry ], [ %j, %loop ]
{_lines(start)}
{_lines(step)}
  %j = add i64 %i, 1
  %more = icmp slt i64 %j, %times
  br i1 %more, label %loop, label %end
end:
{_lines(out)}
  br label %done
done:
  ret void
}}
"""
    address = [f"  %p{k} = getelementptr {whole}, ptr %at, i64 {k}" for k in chains]
    load = [f"  %v{k} = load {whole}, ptr %p{k}, align 4" for k in chains]
    sums = [f"  %s{k} = phi {whole} [ zeroinitializer, %round ], [ %t{k}, %loop ]" for k in chains]
    adds = [f"  %t{k} = or {whole} %s{k}, %v{k}" for k in chains]
    kept = [f"  store volatile {whole} %t{k}, ptr %keep, align 4" for k in chains]
    stores = [f"  store {whole} splat (i32 1), ptr %p{k}, align 4" for k in chains]
    walk = _WALK.replace("BLOCK", str(target.vector_bytes * _CHAINS)).replace("HEAD", head)
    for name, phis, body, end in (("read", sums, [*load, *adds], kept), ("write", [], stores, [])):
        function = walk.replace("NAME", f"mc_{name}").replace("TYPE", whole)
        function = function.replace("PHIS", _lines(phis)).replace("END", _lines(end))
        compute += function.replace("BODY", _lines([*address, *body]))
    return compute


def _lines(lines: list[str]) -> str:
    return "\n".join(lines)


_WALK = """
define void @NAME(HEAD) #0 {
entry:
  %keep = alloca TYPE, align 64
  %times = load i64, ptr %words, align 8
  %base.at = getelementptr i64, ptr %words, i64 1
  %first = load ptr, ptr %base.at, align 8
  %bytes.at = getelementptr i64, ptr %words, i64 2
  %bytes = load i64, ptr %bytes.at, align 8
  %mine = sext i32 %tid to i64
  %skip = mul i64 %mine, %bytes
  %base = getelementptr i8, ptr %first, i64 %skip
  br label %round
round:
  %r = phi i64 [ 0, %entry ], [ %next, %finish ]
  br label %loop
loop:
  %offset = phi i64 [ 0, %round ], [ %after, %loop ]
PHIS
  %at = getelementptr i8, ptr %base, i64 %offset
BODY
  %after = add i64 %offset, BLOCK
  %more = icmp slt i64 %after, %bytes
  br i1 %more, label %loop, label %finish
finish:
END
  %next = add i64 %r, 1
  %again = icmp slt i64 %next, %times
  br i1 %again, label %round, label %done
done:
  ret void
}
"""
