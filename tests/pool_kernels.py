"""Native functions for tests to run on the threads of a pool."""

from __future__ import annotations

import ctypes
import sys

import llvmlite.binding as llvm

from minicompiler.runtime.pool import barrier_address

# The argument of every kernel is an array of i32: word 0 counts errors, word 1 is a parameter,
# and from word 16 on each thread has a word of its own, 16 words apart.
KERNELS = """
define internal ptr @slot(ptr %arg, i32 %tid) {
  %i = mul i32 %tid, 16
  %j = add i32 %i, 16
  %p = getelementptr i32, ptr %arg, i32 %j
  ret ptr %p
}

; Adds the number of threads to the thread's word.
define void @tally(i32 %tid, i32 %n, ptr %arg, ptr %barrier) {
  %p = call ptr @slot(ptr %arg, i32 %tid)
  %old = atomicrmw add ptr %p, i32 %n monotonic
  ret void
}

; Word 1 phases. In each, a thread publishes the phase and passes the barrier; then every other
; thread must have published it, and can be at most one phase ahead.
define void @phases(i32 %tid, i32 %n, ptr %arg, ptr %barrier) {
  %p_last = getelementptr i32, ptr %arg, i32 1
  %last = load i32, ptr %p_last
  %mine = call ptr @slot(ptr %arg, i32 %tid)
  br label %phase
phase:
  %k = phi i32 [ 1, %0 ], [ %k1, %end ]
  store atomic i32 %k, ptr %mine monotonic, align 4
  call void inttoptr (i64 BARRIER to ptr)(ptr %barrier, i32 %n)
  br label %look
look:
  %t = phi i32 [ 0, %phase ], [ %t1, %next ]
  %other = call ptr @slot(ptr %arg, i32 %t)
  %v = load atomic i32, ptr %other monotonic, align 4
  %ahead = sub i32 %v, %k
  %bad = icmp ugt i32 %ahead, 1
  br i1 %bad, label %error, label %next
error:
  %e = atomicrmw add ptr %arg, i32 1 monotonic
  br label %next
next:
  %t1 = add i32 %t, 1
  %more = icmp slt i32 %t1, %n
  br i1 %more, label %look, label %end
end:
  %k1 = add i32 %k, 1
  %again = icmp sle i32 %k1, %last
  br i1 %again, label %phase, label %out
out:
  ret void
}

; Tells in the thread's word that it runs, then waits until word 1 is set.
define void @hold(i32 %tid, i32 %n, ptr %arg, ptr %barrier) {
  %p = call ptr @slot(ptr %arg, i32 %tid)
  store atomic i32 1, ptr %p monotonic, align 4
  %go = getelementptr i32, ptr %arg, i32 1
  br label %wait
wait:
  %v = load atomic volatile i32, ptr %go monotonic, align 4
  %set = icmp ne i32 %v, 0
  br i1 %set, label %out, label %wait
out:
  ret void
}

; Word 1 times: the other threads wait while thread 0 works for some 100 us.
define void @alone(i32 %tid, i32 %n, ptr %arg, ptr %barrier) {
  %scratch = alloca i32
  %p_times = getelementptr i32, ptr %arg, i32 1
  %times = load i32, ptr %p_times
  %first = icmp eq i32 %tid, 0
  br label %phase
phase:
  %k = phi i32 [ 1, %0 ], [ %k1, %meet ]
  br i1 %first, label %work, label %meet
work:
  %i = phi i32 [ 0, %phase ], [ %i1, %work ]
  store volatile i32 %i, ptr %scratch
  %i1 = add i32 %i, 1
  %more = icmp slt i32 %i1, 400000
  br i1 %more, label %work, label %meet
meet:
  call void inttoptr (i64 BARRIER to ptr)(ptr %barrier, i32 %n)
  %k1 = add i32 %k, 1
  %again = icmp sle i32 %k1, %times
  br i1 %again, label %phase, label %out
out:
  ret void
}

; Calls region(pool, fn, arg, n) %count times without Python in between.
define void @repeat(ptr %region, ptr %pool, ptr %fn, ptr %arg, i32 %n, i32 %count) {
  br label %call
call:
  %i = phi i32 [ 0, %0 ], [ %i1, %call ]
  %r = call i32 %region(ptr %pool, ptr %fn, ptr %arg, i32 %n)
  %i1 = add i32 %i, 1
  %more = icmp slt i32 %i1, %count
  br i1 %more, label %call, label %out
out:
  ret void
}
"""


LINUX_KERNELS = """
; Thread 0 moves to the CPU of word 1. If word 2 is set, it waits for the other one at a barrier
; and then puts the CPU mask of the thread whose id is word 2 at word 64; else it waits at the end
; of the region. The other one takes longer than the scheduler lets it run on a CPU that it shares.
define void @roam(i32 %tid, i32 %n, ptr %arg, ptr %barrier) {
  %mask = alloca [128 x i8], align 8
  call void @llvm.memset.p0.i64(ptr %mask, i8 0, i64 128, i1 false)
  %first = icmp eq i32 %tid, 0
  br i1 %first, label %move, label %work
move:
  %p_cpu = getelementptr i32, ptr %arg, i32 1
  %cpu = load i32, ptr %p_cpu
  %word = lshr i32 %cpu, 3
  %low = and i32 %cpu, 7
  %one = shl i32 1, %low
  %bit = trunc i32 %one to i8
  %p_byte = getelementptr i8, ptr %mask, i32 %word
  store i8 %bit, ptr %p_byte
  %r = call i32 @sched_setaffinity(i32 0, i64 128, ptr %mask)
  br label %worked
work:
  %i = phi i32 [ 0, %0 ], [ %i1, %work ]
  %v = load atomic volatile i32, ptr %arg monotonic, align 4
  %i1 = add i32 %i, 1
  %more = icmp slt i32 %i1, 20000000
  br i1 %more, label %work, label %worked
worked:
  %p_meet = getelementptr i32, ptr %arg, i32 2
  %meet = load i32, ptr %p_meet
  %meets = icmp ne i32 %meet, 0
  br i1 %meets, label %wait, label %out
wait:
  call void inttoptr (i64 BARRIER to ptr)(ptr %barrier, i32 %n)
  br i1 %first, label %tell, label %out
tell:
  %p_mask = getelementptr i32, ptr %arg, i32 64
  %r1 = call i32 @sched_getaffinity(i32 %meet, i64 128, ptr %p_mask)
  br label %out
out:
  ret void
}

; Thread 1 works until it is on the CPU of thread 0, which waits for it: then word 2 is set.
define void @borrow(i32 %tid, i32 %n, ptr %arg, ptr %barrier) {
  %p_cpu = getelementptr i32, ptr %arg, i32 1
  %p_met = getelementptr i32, ptr %arg, i32 2
  %here = call i32 @sched_getcpu()
  %first = icmp eq i32 %tid, 0
  br i1 %first, label %tell, label %work
tell:
  store atomic i32 %here, ptr %p_cpu monotonic, align 4
  br label %out
work:
  %i = phi i32 [ 0, %0 ], [ %i1, %on ]
  %cpu = call i32 @sched_getcpu()
  %wanted = load atomic i32, ptr %p_cpu monotonic, align 4
  %met = icmp eq i32 %cpu, %wanted
  br i1 %met, label %reached, label %on
on:
  %i1 = add i32 %i, 1
  %more = icmp slt i32 %i1, 50000000
  br i1 %more, label %work, label %out
reached:
  store i32 1, ptr %p_met
  br label %out
out:
  call void inttoptr (i64 BARRIER to ptr)(ptr %barrier, i32 %n)
  ret void
}
declare i32 @sched_getcpu()
declare i32 @sched_getaffinity(i32, i64, ptr)
declare i32 @sched_setaffinity(i32, i64, ptr)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
"""


class Kernels:
    def __init__(self) -> None:
        linux = sys.platform == "linux"
        text = KERNELS + LINUX_KERNELS if linux else KERNELS
        text = text.replace("BARRIER", str(barrier_address()))
        machine = llvm.Target.from_default_triple().create_target_machine()
        self.engine = llvm.create_mcjit_compiler(llvm.parse_assembly(text), machine)
        self.engine.finalize_object()
        for name in ("tally", "phases", "hold", "alone", *["roam", "borrow"] * linux):
            setattr(self, name, self.engine.get_function_address(name))
        pointer, word = ctypes.c_void_p, ctypes.c_int32
        prototype = ctypes.CFUNCTYPE(None, pointer, pointer, pointer, pointer, word, word)
        self.repeat = prototype(self.engine.get_function_address("repeat"))

    tally: int
    phases: int
    hold: int
    alone: int
    roam: int
    borrow: int


class Words:
    """The argument of a kernel, for up to 64 threads."""

    def __init__(self, parameter: int = 0) -> None:
        self.words = (ctypes.c_int32 * (16 * 65))()
        self.words[1] = parameter
        self.address = ctypes.addressof(self.words)

    @property
    def errors(self) -> int:
        return self.words[0]

    def per_thread(self, count: int) -> list[int]:
        return [self.words[16 + 16 * tid] for tid in range(count)]
