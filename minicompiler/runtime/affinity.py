"""Where and when the workers of a pool run, next to other busy threads of the machine.

MANAGED (Linux) and UNMANAGED (no CPU masks) are LLVM text, compiled with the code of `spmd`:

    apart(pool, n)             keeps the workers 1 .. n-1 off the CPU of the caller
    help(pool, n, spun) -> i1  lends the caller's CPU to workers that wait for theirs; true if any
    home(pool)                 takes it back
    enter(pool)                the calling thread is the caller of a region
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading

_SETATTR = {"x86_64": 314, "aarch64": 274, "riscv64": 274, "ppc64le": 355, "s390x": 345}
_SLICE_NANOSECONDS = 100_000  # the shortest that Linux grants


class _SchedAttr(ctypes.Structure):
    """struct sched_attr of the Linux kernel, its first version."""

    _fields_ = (
        ("size", ctypes.c_uint32), ("policy", ctypes.c_uint32), ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32), ("priority", ctypes.c_uint32), ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64), ("period", ctypes.c_uint64),
    )  # fmt: skip


def short_slices() -> None:
    """Asks for short turns of the calling thread, so that on a shared CPU it runs soon rather than
    long (Linux 6.12; before, it changes nothing). Its share of the processor stays the same, and so
    do its policy and niceness."""
    number = _SETATTR.get(platform.machine().lower())
    if sys.platform != "linux" or number is None:
        return
    thread = threading.get_native_id()
    try:
        policy, nice = os.sched_getscheduler(thread), os.getpriority(os.PRIO_PROCESS, thread)
    except OSError:  # a sandbox: the turns are as long as they are
        return
    if policy == os.SCHED_OTHER:
        size = ctypes.sizeof(_SchedAttr)
        wish = _SchedAttr(size=size, policy=policy, nice=nice, runtime=_SLICE_NANOSECONDS)
        ctypes.CDLL(None).syscall(ctypes.c_long(number), 0, ctypes.byref(wish), 0)


# On one CPU caller and worker wait for each other in turns; such a pair looks like one busy thread
# to the scheduler, which never separates it while another process keeps the other CPU busy. So
# workers stay apart from the caller. A worker that another thread keeps from running would then
# hold up everybody for milliseconds in each phase: a caller with nothing left to do looks whether
# its workers run, by the processor time they have used, lends them its CPU and sleeps.
MANAGED = """
declare i32 @sched_getcpu()
declare i32 @sched_getaffinity(i32, i64, ptr)
declare i32 @sched_setaffinity(i32, i64, ptr)
declare i32 @clock_gettime(i32, ptr)
declare i32 @memcmp(ptr, ptr, i64)
declare ptr @pthread_self()
declare i64 @llvm.ctpop.i64(i64)
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)

define internal void @clear(ptr %mask, i32 %bit) {
  %byte = lshr i32 %bit, 3
  %p = getelementptr i8, ptr %mask, i32 %byte
  %old = load i8, ptr %p, align 1
  %low = and i32 %bit, 7
  %one = shl i32 1, %low
  %bits = trunc i32 %one to i8
  %others = xor i8 %bits, -1
  %new = and i8 %old, %others
  store i8 %new, ptr %p, align 1
  ret void
}

define internal void @only(ptr %mask, i32 %bit) {
  call void @llvm.memset.p0.i64(ptr %mask, i8 0, i64 $MASK_BYTES, i1 false)
  %byte = lshr i32 %bit, 3
  %p = getelementptr i8, ptr %mask, i32 %byte
  %low = and i32 %bit, 7
  %one = shl i32 1, %low
  %bits = trunc i32 %one to i8
  store i8 %bits, ptr %p, align 1
  ret void
}

; The CPUs of worker w for a value of its word AWAY. Kept off a CPU: all the others, or, in a pool
; with a thread for every CPU, the w-th of the others. False if there are none.
define internal i1 @choose(ptr %all, i32 %size, i32 %w, i32 %away, ptr %mask) noinline {
  %lent = icmp slt i32 %away, 0
  br i1 %lent, label %hold, label %any
hold:
  %here = xor i32 %away, -1
  call void @only(ptr %mask, i32 %here)
  br label %yes
any:
  call void @llvm.memcpy.p0.p0.i64(ptr %mask, ptr %all, i64 $MASK_BYTES, i1 false)
  %none = icmp eq i32 %away, 0
  br i1 %none, label %yes, label %remove
remove:
  %cpu = sub i32 %away, 1
  call void @clear(ptr %mask, i32 %cpu)
  br label %count
count:
  %i = phi i64 [ 0, %remove ], [ %i8, %count ]
  %sum = phi i64 [ 0, %remove ], [ %sum1, %count ]
  %p = getelementptr i8, ptr %mask, i64 %i
  %word = load i64, ptr %p, align 8
  %ones = call i64 @llvm.ctpop.i64(i64 %word)
  %sum1 = add i64 %sum, %ones
  %i8 = add i64 %i, 8
  %more = icmp ult i64 %i8, $MASK_BYTES
  br i1 %more, label %count, label %counted
counted:
  %others = trunc i64 %sum1 to i32
  %workers = sub i32 %size, 1
  %exact = icmp eq i32 %others, %workers
  br i1 %exact, label %find, label %enough
enough:
  %spare = icmp ugt i32 %others, %workers
  ret i1 %spare
find:
  %b = phi i32 [ 0, %counted ], [ %b1, %find_next ]
  %rank = phi i32 [ 0, %counted ], [ %rank1, %find_next ]
  %byte = lshr i32 %b, 3
  %q = getelementptr i8, ptr %mask, i32 %byte
  %v = load i8, ptr %q, align 1
  %v32 = zext i8 %v to i32
  %low = and i32 %b, 7
  %shifted = lshr i32 %v32, %low
  %bit = and i32 %shifted, 1
  %rank1 = add i32 %rank, %bit
  %reached = icmp eq i32 %rank1, %w
  br i1 %reached, label %found, label %find_next
find_next:
  %b1 = add i32 %b, 1
  %in = icmp ult i32 %b1, $MASK_BITS
  br i1 %in, label %find, label %no
found:
  call void @only(ptr %mask, i32 %b)
  br label %yes
yes:
  ret i1 true
no:
  ret i1 false
}

; Gives worker w the CPUs for a new value of AWAY, unless another thread is at it. A mask that
; somebody else has set is respected, from then on. Nothing depends on its success.
define internal void @place(ptr %pool, i32 %w, i32 %away) noinline {
  %mask = alloca [$MASK_BYTES x i8], align 8
  %now = alloca [$MASK_BYTES x i8], align 8
  %boxes = getelementptr i8, ptr %pool, i64 $BOXES
  %size = load i32, ptr %pool, align 4
  %all = getelementptr i8, ptr %pool, i64 $MASK
  %box = getelementptr [128 x i8], ptr %boxes, i32 %w
  %p_thread = getelementptr i8, ptr %box, i64 $BOX_THREAD
  %p_away = getelementptr i8, ptr %box, i64 $BOX_AWAY
  %thread = load atomic i32, ptr %p_thread monotonic, align 4
  %old = load i32, ptr %p_away, align 4
  %same = icmp eq i32 %old, %away
  %unknown = icmp eq i32 %thread, 0
  %skip = or i1 %same, %unknown
  br i1 %skip, label %out, label %lock
lock:
  %p_placing = getelementptr i8, ptr %pool, i64 $PLACING
  %busy = atomicrmw xchg ptr %p_placing, i32 1 acquire
  %free = icmp eq i32 %busy, 0
  br i1 %free, label %check, label %out
check:
  %last = load i32, ptr %p_away, align 4
  %had = call i1 @choose(ptr %all, i32 %size, i32 %w, i32 %last, ptr %mask)
  call void @llvm.memset.p0.i64(ptr %now, i8 0, i64 $MASK_BYTES, i1 false)
  %r0 = call i32 @sched_getaffinity(i32 %thread, i64 $MASK_BYTES, ptr %now)
  %differs = call i32 @memcmp(ptr %mask, ptr %now, i64 $MASK_BYTES)
  %ours = icmp eq i32 %differs, 0
  br i1 %ours, label %move, label %leave
move:
  %has = call i1 @choose(ptr %all, i32 %size, i32 %w, i32 %away, ptr %mask)
  br i1 %has, label %set, label %leave
set:
  %r1 = call i32 @sched_setaffinity(i32 %thread, i64 $MASK_BYTES, ptr %mask)
  %failed = icmp ne i32 %r1, 0
  store i32 %away, ptr %p_away, align 4
  br i1 %failed, label %leave, label %unlock
leave:
  store atomic i32 0, ptr %p_thread monotonic, align 4
  br label %unlock
unlock:
  store atomic i32 0, ptr %p_placing release, align 4
  br label %out
out:
  ret void
}

define internal void @apart(ptr %pool, i32 %n) noinline {
  %cpu = call i32 @sched_getcpu()
  %known = icmp ult i32 %cpu, $MASK_BITS
  br i1 %known, label %start, label %out
start:
  %away = add i32 %cpu, 1
  br label %next
next:
  %w = phi i32 [ 1, %start ], [ %w1, %one ]
  %more = icmp slt i32 %w, %n
  br i1 %more, label %one, label %out
one:
  call void @place(ptr %pool, i32 %w, i32 %away)
  %w1 = add i32 %w, 1
  br label %next
out:
  ret void
}

; Nanoseconds that a thread has run.
define internal i64 @used(i32 %thread) {
  ; its clock as pthread_getcpuclockid gives it
  %inverse = xor i32 %thread, -1
  %high = shl i32 %inverse, 3
  %clock = or i32 %high, 6
  %ns = call i64 @read(i32 %clock)
  ret i64 %ns
}

; Nanoseconds of a clock.
define internal i64 @read(i32 %clock) noinline {
  %time = alloca [2 x i64], align 8
  store i64 0, ptr %time, align 8
  %nano = getelementptr i64, ptr %time, i64 1
  store i64 0, ptr %nano, align 8
  %r = call i32 @clock_gettime(i32 %clock, ptr %time)
  %s = load i64, ptr %time, align 8
  %ns = load i64, ptr %nano, align 8
  %scaled = mul i64 %s, 1000000000
  %sum = add i64 %scaled, %ns
  ret i64 %sum
}

; The thread has spun so many times; only the caller of the region lends. A worker that has not run
; since the last look waits for its turn on a CPU, or is just waking up and needs no help: so looks
; lie far apart, and leave out who is still asleep, until a worker was found that waits.
define internal i1 @help(ptr %pool, i32 %n, i32 %spun) {
  %p_caller = getelementptr i8, ptr %pool, i64 $CALLER
  %p_crowded = getelementptr i8, ptr %pool, i64 $CROWDED
  %caller = load ptr, ptr %p_caller, align 8
  %self = call ptr @pthread_self()
  %mine = icmp eq ptr %caller, %self
  br i1 %mine, label %waits, label %no
waits:
  %until = load atomic i64, ptr %p_crowded monotonic, align 8
  %calm = icmp eq i64 %until, 0
  %p_waking = getelementptr i8, ptr %pool, i64 $WAKING
  %waking = load i32, ptr %p_waking, align 4
  %within = and i32 %spun, %waking
  %later = icmp ne i32 %within, 0
  %early = and i1 %calm, %later
  %first = icmp eq i32 %spun, $PATIENCE
  br i1 %first, label %separate, label %due
due:
  br i1 %early, label %no, label %look
no:
  ret i1 false
separate:
  call void @apart(ptr %pool, i32 %n)
  br label %look
look:
  %cpu = call i32 @sched_getcpu()
  %here = xor i32 %cpu, -1
  %mark = add i32 %cpu, 1
  %boxes = getelementptr i8, ptr %pool, i64 $BOXES
  %p_lent = getelementptr i8, ptr %pool, i64 $LENT
  br label %next
next:
  %w = phi i32 [ 1, %look ], [ %w1, %done ]
  %any = phi i1 [ false, %look ], [ %any1, %done ]
  %more = icmp slt i32 %w, %n
  br i1 %more, label %one, label %out
one:
  %box = getelementptr [128 x i8], ptr %boxes, i32 %w
  %p_thread = getelementptr i8, ptr %box, i64 $BOX_THREAD
  %p_away = getelementptr i8, ptr %box, i64 $BOX_AWAY
  %p_used = getelementptr i8, ptr %box, i64 $BOX_USED
  %thread = load atomic i32, ptr %p_thread monotonic, align 4
  %away = load i32, ptr %p_away, align 4
  %apart = icmp eq i32 %away, %mark
  %known = icmp ne i32 %thread, 0
  %movable = and i1 %apart, %known
  %p_asleep = getelementptr i8, ptr %box, i64 $BOX_ASLEEP
  %asleep = load atomic i32, ptr %p_asleep monotonic, align 4
  %up = icmp eq i32 %asleep, 0
  %scarce = xor i1 %calm, true
  %counts = or i1 %up, %scarce
  %held = and i1 %movable, %counts
  br i1 %held, label %ask, label %done
ask:
  %before = load i64, ptr %p_used, align 8
  %now = call i64 @used(i32 %thread)
  store i64 %now, ptr %p_used, align 8
  %same = icmp eq i64 %before, %now
  %again = xor i1 %first, true
  %still = and i1 %same, %again
  br i1 %still, label %lend, label %done
lend:
  call void @crowd(ptr %pool)
  call void @place(ptr %pool, i32 %w, i32 %here)
  store atomic i32 %mark, ptr %p_lent seq_cst, align 4
  br label %done
done:
  %any1 = phi i1 [ %any, %one ], [ %any, %ask ], [ true, %lend ]
  %w1 = add i32 %w, 1
  br label %next
out:
  ret i1 %any
}

define internal void @home(ptr %pool) noinline {
  %size = load i32, ptr %pool, align 4
  %boxes = getelementptr i8, ptr %pool, i64 $BOXES
  %p_lent = getelementptr i8, ptr %pool, i64 $LENT
  %seen = load atomic i32, ptr %p_lent seq_cst, align 4
  %nothing = icmp eq i32 %seen, 0
  br i1 %nothing, label %out, label %take
take:
  %cpu = atomicrmw xchg ptr %p_lent, i32 0 seq_cst
  %late = icmp eq i32 %cpu, 0
  br i1 %late, label %out, label %next
next:
  %w = phi i32 [ 1, %take ], [ %w1, %done ]
  %more = icmp slt i32 %w, %size
  br i1 %more, label %one, label %out
one:
  %box = getelementptr [128 x i8], ptr %boxes, i32 %w
  %p_away = getelementptr i8, ptr %box, i64 $BOX_AWAY
  %away = load i32, ptr %p_away, align 4
  %lent = icmp slt i32 %away, 0
  br i1 %lent, label %send, label %done
send:
  call void @place(ptr %pool, i32 %w, i32 %cpu)
  br label %done
done:
  %w1 = add i32 %w, 1
  br label %next
out:
  ret void
}

; What was found of other busy threads holds for a while, then this is tried anew.
define internal void @crowd(ptr %pool) {
  %p_crowded = getelementptr i8, ptr %pool, i64 $CROWDED
  %until = load atomic i64, ptr %p_crowded monotonic, align 8
  %calm = icmp eq i64 %until, 0
  br i1 %calm, label %set, label %out
set:
  %now = call i64 @read(i32 1)
  %then = add i64 %now, $CROWDED_NANOSECONDS
  store atomic i64 %then, ptr %p_crowded monotonic, align 8
  br label %out
out:
  ret void
}

define internal void @enter(ptr %pool) {
  %p_caller = getelementptr i8, ptr %pool, i64 $CALLER
  %p_crowded = getelementptr i8, ptr %pool, i64 $CROWDED
  %self = call ptr @pthread_self()
  store ptr %self, ptr %p_caller, align 8
  %until = load atomic i64, ptr %p_crowded monotonic, align 8
  %calm = icmp eq i64 %until, 0
  br i1 %calm, label %out, label %look
look:
  %now = call i64 @read(i32 1)
  %over = icmp uge i64 %now, %until
  br i1 %over, label %clear, label %out
clear:
  store atomic i64 0, ptr %p_crowded monotonic, align 8
  br label %out
out:
  ret void
}
"""

UNMANAGED = """
define internal void @apart(ptr %pool, i32 %n) {
  ret void
}
define internal i1 @help(ptr %pool, i32 %n, i32 %spun) {
  ret i1 false
}
define internal void @home(ptr %pool) {
  ret void
}
define internal void @enter(ptr %pool) {
  ret void
}
"""
