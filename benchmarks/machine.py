"""What this machine can do at most: float32 FMA rate and memory bandwidth, measured.

peak = FmaPeak(target); peak()      GFLOP/s of one thread, one short run
"""

from __future__ import annotations

import ctypes
import time

from minicompiler.codegen.native import compile_object
from minicompiler.runtime.loader import Library
from minicompiler.target import Target

_ROUNDS = 200_000


class FmaPeak:
    """Independent fused multiply-adds in registers; calling it gives GFLOP/s of one run (about 1
    ms)."""

    def __init__(self, target: Target) -> None:
        lanes = target.vector_bytes // 4
        chains = 12
        ty = f"<{lanes} x float>"
        phis, fmas = [], []
        for k in range(chains):
            phis.append(f"  %a{k} = phi {ty} [ splat (float {k}.0), %entry ], [ %b{k}, %loop ]")
            fmas.append(f"  %b{k} = call {ty} @llvm.fma({ty} %a{k}, {ty} %m, {ty} %c)")
        total = "%b0"
        ends = []
        for k in range(1, chains):
            ends.append(f"  %s{k} = fadd {ty} {total}, %b{k}")
            total = f"%s{k}"
        suffix = f"v{lanes}f32"
        text = f"""
declare {ty} @llvm.fma.{suffix}({ty}, {ty}, {ty})
define void @fma_peak(i64 %n, ptr %out) #0 {{
entry:
  %m = load {ty}, ptr %out, align 4
  %p = getelementptr i8, ptr %out, i64 256
  %c = load {ty}, ptr %p, align 4
  br label %loop
loop:
  %i = phi i64 [ 0, %entry ], [ %j, %loop ]
{chr(10).join(phis)}
{chr(10).join(fmas).replace("@llvm.fma(", f"@llvm.fma.{suffix}(")}
  %j = add i64 %i, 1
  %more = icmp slt i64 %j, %n
  br i1 %more, label %loop, label %done
done:
{chr(10).join(ends)}
  store {ty} {total}, ptr %out, align 4
  ret void
}}
"""
        self._library = Library(compile_object(text, target), ["fma_peak"])
        self._call = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_void_p)(
            self._library.address("fma_peak")
        )
        self._memory = (ctypes.c_float * 256)()
        self._flops = 2.0 * lanes * chains * _ROUNDS

    def __call__(self) -> float:
        for k in range(256):
            self._memory[k] = 0.5
        start = time.perf_counter()
        self._call(_ROUNDS, ctypes.addressof(self._memory))
        return self._flops / (time.perf_counter() - start) / 1e9
