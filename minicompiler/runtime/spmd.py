"""The native half of the thread pool: fork and join, the worker's loop, the barrier.

In:  a pool block (memory laid out as LAYOUT says), the address of a function to run.
Out: `Native`, ctypes functions over LLVM code that is compiled once per process.

A region writes the job into the mailboxes of its workers, runs thread 0's share and waits for the
count of completions. Who waits spins and then sleeps on a futex: to wake a thread takes longer than
most kernels run, so it spins for long unless CPUs are scarce. Who signals makes a system call only
if somebody sleeps. So a hot region costs two cache line transfers per worker.

On which CPUs the workers may run is decided in `affinity`.
"""

from __future__ import annotations

import ctypes
import platform
import string
import sys
import time
from typing import Any

import llvmlite.binding as llvm

from minicompiler.runtime.affinity import MANAGED, UNMANAGED

# For how long a thread spins before it sleeps, and that where other threads want its CPU.
_WAIT_SECONDS = 500e-6
_BRIEF_SECONDS = 50e-6

# Pool block. Words that different threads write lie 128 bytes apart, because x86 prefetches lines
# in pairs. Each worker has a mailbox of its own, so that a region of few threads leaves the other
# workers asleep, and a worker fetches the whole job with one cache line.
LAYOUT = {
    "SIZE": 0,  # i32: threads of the pool, 1 once its workers are gone
    "BRIEF": 4,  # i32: spins that take about _BRIEF_SECONDS
    "WAIT": 8,  # i32: spins that take about _WAIT_SECONDS; BRIEF without a CPU for every thread
    "WAKING": 12,  # i32: minus 1, the power of two of spins in which a thread surely wakes up
    "OWNER": 128,  # i64: 0 when free, else the token of the call that holds the pool
    "EPOCH": 136,  # i32: number of the last region; only the owner touches it
    "TARGET": 140,  # i32: value of DONE that completes that region; only the owner touches it
    "CALLER": 144,  # ptr: pthread_self of the thread that runs the region
    "LENT": 152,  # i32: 1 + the CPU that the caller has lent to workers, 0 for none
    "PLACING": 156,  # i32: 1 while somebody moves a worker
    "CROWDED": 160,  # i64: 0, or till when CPUs are taken to be scarce (CLOCK_MONOTONIC, ns)
    "DONE": 256,  # i32: completions by workers since the start, wraps around
    "WAITING": 260,  # i32: 1 while the owner sleeps on DONE
    "SLEEPERS": 384,  # i32: workers that sleep or are about to
    "BARRIER": 512,
    "MASK": 640,  # the CPUs that workers may use, in the format of sched_setaffinity
    "BOXES": 1664,  # + 128 * tid: the mailboxes of the workers 1, 2, ...; their words:
    "BOX_EPOCH": 0,  # i32: number of the last region this worker takes part in
    "BOX_NTHREADS": 4,
    "BOX_FN": 8,
    "BOX_ARG": 16,
    "BOX_TARGET": 24,
    "BOX_ASLEEP": 28,
    "BOX_THREAD": 32,  # i32: the worker's thread id, 0: leave its CPU mask alone
    # i32: 1 + the CPU it is kept off, 0 for none; -1 - the CPU that was lent to it
    "BOX_AWAY": 36,
    "BOX_USED": 40,  # i64: nanoseconds it had run when the caller last looked
    # Barrier block, all in one line: the last thread to arrive already owns what it writes.
    "BAR_COUNT": 0,  # i32: threads that have arrived
    "BAR_GENERATION": 4,  # i32: barriers passed so far
    "BAR_SLEEPERS": 8,  # i32
    "POOL": -512,  # relative to the barrier block
    # The same, + 128 * tid: the second line of a mailbox.
    "CLAIMS": 1216,  # i64: how many parts of a thread's share are taken, below the phase's number
    "SHARES": 8,  # parts of a thread's share
    # Spins, some 5 us, after which a waiting thread thinks again; and minus 1.
    "PATIENCE": 128,
    "IMPATIENCE": 127,
    "CROWDED_NANOSECONDS": 50_000_000,
    "MASK_BYTES": 1024,  # CPUs beyond 8192 are not managed
    "MASK_BITS": 8192,
}

_FUTEX_NUMBER = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}

_PAUSE = {
    "x86_64": ("declare void @llvm.x86.sse2.pause()", "call void @llvm.x86.sse2.pause()"),
    "amd64": ("declare void @llvm.x86.sse2.pause()", "call void @llvm.x86.sse2.pause()"),
    "aarch64": ("declare void @llvm.aarch64.hint(i32)", "call void @llvm.aarch64.hint(i32 1)"),
    "arm64": ("declare void @llvm.aarch64.hint(i32)", "call void @llvm.aarch64.hint(i32 1)"),
}

_FUTEX = """
declare i64 @syscall(i64, ...)
define internal void @park(ptr %word, i32 %expected) noinline {
  %v = zext i32 %expected to i64
  ; FUTEX_WAIT | FUTEX_PRIVATE_FLAG: sleeps only if the word still holds the expected value
  %r = call i64 (i64, ...) @syscall(i64 $NUMBER, ptr %word, i64 128, i64 %v, i64 0, i64 0, i64 0)
  ret void
}
define internal void @unpark(ptr %word) noinline {
  ; FUTEX_WAKE | FUTEX_PRIVATE_FLAG, all sleepers
  %r = call i64 (i64, ...) @syscall(i64 $NUMBER, ptr %word, i64 129, i64 2147483647,
                                    i64 0, i64 0, i64 0)
  ret void
}
"""

# Without futex a sleeper polls: every caller of park re-reads the word in a loop.
_POLL = """
declare i32 @$SLEEP(i32)
define internal void @park(ptr %word, i32 %expected) noinline {
  %r = call i32 @$SLEEP(i32 $AMOUNT)
  ret void
}
define internal void @unpark(ptr %word) noinline {
  ret void
}
"""

_CODE = """
declare i64 @llvm.umax.i64(i64, i64)
declare i64 @llvm.umin.i64(i64, i64)

; Whether a thread that has spun so many times now sleeps; n: threads of the region it waits for.
define internal i1 @tired(ptr %pool, i32 %n, i32 %spun) noinline {
  %lent = call i1 @help(ptr %pool, i32 %n, i32 %spun)
  %p_wait = getelementptr i8, ptr %pool, i64 $WAIT
  %p_brief = getelementptr i8, ptr %pool, i64 $BRIEF
  %p_crowded = getelementptr i8, ptr %pool, i64 $CROWDED
  %wait = load i32, ptr %p_wait, align 4
  %brief = load i32, ptr %p_brief, align 4
  %until = load atomic i64, ptr %p_crowded monotonic, align 8
  %calm = icmp eq i64 %until, 0
  %most = select i1 %calm, i32 %wait, i32 %brief
  %over = icmp uge i32 %spun, %most
  %tired = or i1 %lent, %over
  ret i1 %tired
}

define void @mc_barrier(ptr %b, i32 %n) {
  %alone = icmp sle i32 %n, 1
  br i1 %alone, label %out, label %arrive
arrive:
  %pool = getelementptr i8, ptr %b, i64 $POOL
  %count = getelementptr i8, ptr %b, i64 $BAR_COUNT
  %word = getelementptr i8, ptr %b, i64 $BAR_GENERATION
  %sleepers = getelementptr i8, ptr %b, i64 $BAR_SLEEPERS
  ; the generation cannot change before this thread has arrived
  %g = load atomic i32, ptr %word monotonic, align 4
  %before = atomicrmw add ptr %count, i32 1 acq_rel
  %others = sub i32 %n, 1
  %last = icmp eq i32 %before, %others
  br i1 %last, label %open, label %spin
open:
  store atomic i32 0, ptr %count monotonic, align 4
  %next = add i32 %g, 1
  %old = atomicrmw xchg ptr %word, i32 %next seq_cst
  %s = load atomic i32, ptr %sleepers seq_cst, align 4
  %nobody = icmp eq i32 %s, 0
  br i1 %nobody, label %out, label %wake
wake:
  call void @unpark(ptr %word)
  call void @home(ptr %pool)
  br label %out
spin:
  %i = phi i32 [ 0, %arrive ], [ %i1, %again ], [ %i1, %think ]
  %now = load atomic i32, ptr %word acquire, align 4
  %go = icmp ne i32 %now, %g
  br i1 %go, label %out, label %again
again:
  $PAUSE
  %i1 = add i32 %i, 1
  %within = and i32 %i1, $IMPATIENCE
  %long = icmp eq i32 %within, 0
  br i1 %long, label %think, label %spin
think:
  %tired = call i1 @tired(ptr %pool, i32 %n, i32 %i1)
  br i1 %tired, label %sleep, label %spin
sleep:
  %t0 = atomicrmw add ptr %sleepers, i32 1 seq_cst
  br label %check
check:
  %cur = load atomic i32, ptr %word seq_cst, align 4
  %done = icmp ne i32 %cur, %g
  br i1 %done, label %awake, label %doze
doze:
  call void @park(ptr %word, i32 %g)
  br label %check
awake:
  %t1 = atomicrmw sub ptr %sleepers, i32 1 seq_cst
  call void @home(ptr %pool)
  br label %out
out:
  ret void
}

; The next iterations [first, second) of a parallel loop for a thread, none if they are equal.
; Each thread takes its own share part by part, then what others have not come to: one that is held
; up does not hold up the rest, and undisturbed threads stay with the same elements from phase to
; phase, whose lines are in their caches. A count of parts is worth nothing in another phase: it
; carries the barrier's generation. own: a word of the thread, zero at first, for a lone thread.
define { i64, i64 } @mc_claim(ptr %b, i32 %tid, i32 %n, i64 %extent, ptr %own) {
  %many = icmp sgt i32 %n, 1
  br i1 %many, label %start, label %alone
alone:
  %first = load i64, ptr %own, align 8
  store i64 %extent, ptr %own, align 8
  %l0 = insertvalue { i64, i64 } poison, i64 %first, 0
  %l1 = insertvalue { i64, i64 } %l0, i64 %extent, 1
  ret { i64, i64 } %l1
start:
  %p_generation = getelementptr i8, ptr %b, i64 $BAR_GENERATION
  %g32 = load atomic i32, ptr %p_generation monotonic, align 4
  %g64 = zext i32 %g32 to i64
  %g = shl i64 %g64, 32
  %claims = getelementptr i8, ptr %b, i64 $CLAIMS
  %count = zext i32 %n to i64
  br label %victim
victim:
  %k = phi i32 [ 0, %start ], [ %k1, %next ]
  %t0 = add i32 %tid, %k
  %over = icmp uge i32 %t0, %n
  %t1 = sub i32 %t0, %n
  %t = select i1 %over, i32 %t1, i32 %t0
  %t64 = zext i32 %t to i64
  %a = mul i64 %t64, %extent
  %low = udiv i64 %a, %count
  %a1 = add i64 %a, %extent
  %high = udiv i64 %a1, %count
  %share = sub i64 %high, %low
  %part = udiv i64 %share, $SHARES
  %some = call i64 @llvm.umax.i64(i64 %part, i64 1)
  %p = getelementptr [128 x i8], ptr %claims, i32 %t
  %seen = load atomic i64, ptr %p monotonic, align 8
  br label %try
try:
  %old = phi i64 [ %seen, %victim ], [ %found, %take ]
  %mark = and i64 %old, -4294967296
  %fresh = icmp eq i64 %mark, %g
  %low32 = and i64 %old, 4294967295
  %taken = select i1 %fresh, i64 %low32, i64 0
  %skip = mul i64 %taken, %some
  %from = add i64 %low, %skip
  %left = icmp ult i64 %from, %high
  br i1 %left, label %take, label %next
take:
  %taken1 = add i64 %taken, 1
  %new = or i64 %g, %taken1
  %pair = cmpxchg weak ptr %p, i64 %old, i64 %new monotonic monotonic
  %found = extractvalue { i64, i1 } %pair, 0
  %ok = extractvalue { i64, i1 } %pair, 1
  br i1 %ok, label %mine, label %try
mine:
  %to0 = add i64 %from, %some
  %to = call i64 @llvm.umin.i64(i64 %to0, i64 %high)
  %m0 = insertvalue { i64, i64 } poison, i64 %from, 0
  %m1 = insertvalue { i64, i64 } %m0, i64 %to, 1
  ret { i64, i64 } %m1
next:
  %k1 = add i32 %k, 1
  %others = icmp ult i32 %k1, %n
  br i1 %others, label %victim, label %none
none:
  ret { i64, i64 } zeroinitializer
}

; Gives fn to the workers 1 .. n-1 and wakes those that sleep. A null fn ends a worker.
define internal i32 @post(ptr %pool, ptr %fn, ptr %arg, i32 %n) {
  %boxes = getelementptr i8, ptr %pool, i64 $BOXES
  %p_epoch = getelementptr i8, ptr %pool, i64 $EPOCH
  %p_target = getelementptr i8, ptr %pool, i64 $TARGET
  %p_sleepers = getelementptr i8, ptr %pool, i64 $SLEEPERS
  %e0 = load i32, ptr %p_epoch, align 4
  %e = add i32 %e0, 1
  store i32 %e, ptr %p_epoch, align 4
  %t0 = load i32, ptr %p_target, align 4
  %workers = sub i32 %n, 1
  %t = add i32 %t0, %workers
  store i32 %t, ptr %p_target, align 4
  br label %fill
fill:
  %w = phi i32 [ 1, %0 ], [ %w1, %fill_one ]
  %more = icmp slt i32 %w, %n
  br i1 %more, label %fill_one, label %filled
fill_one:
  %box = getelementptr [128 x i8], ptr %boxes, i32 %w
  %b_n = getelementptr i8, ptr %box, i64 $BOX_NTHREADS
  %b_fn = getelementptr i8, ptr %box, i64 $BOX_FN
  %b_arg = getelementptr i8, ptr %box, i64 $BOX_ARG
  %b_t = getelementptr i8, ptr %box, i64 $BOX_TARGET
  store i32 %n, ptr %b_n, align 4
  store ptr %fn, ptr %b_fn, align 8
  store ptr %arg, ptr %b_arg, align 8
  store i32 %t, ptr %b_t, align 4
  store atomic i32 %e, ptr %box release, align 4
  %w1 = add i32 %w, 1
  br label %fill
filled:
  ; a worker raises the count of sleepers, fences and looks at its mailbox once more;
  ; this side fills the mailbox, fences and looks at the count: one of the two sees the other
  fence seq_cst
  %s = load atomic i32, ptr %p_sleepers monotonic, align 4
  %nobody = icmp eq i32 %s, 0
  br i1 %nobody, label %out, label %asleep
asleep:
  call void @apart(ptr %pool, i32 %n)
  br label %wake
wake:
  %v = phi i32 [ 1, %asleep ], [ %v1, %wake_next ]
  %left = icmp slt i32 %v, %n
  br i1 %left, label %look, label %out
look:
  %vbox = getelementptr [128 x i8], ptr %boxes, i32 %v
  %v_asleep = getelementptr i8, ptr %vbox, i64 $BOX_ASLEEP
  %a = load atomic i32, ptr %v_asleep monotonic, align 4
  %sleeps = icmp ne i32 %a, 0
  br i1 %sleeps, label %wake_one, label %wake_next
wake_one:
  call void @unpark(ptr %vbox)
  br label %wake_next
wake_next:
  %v1 = add i32 %v, 1
  br label %wake
out:
  ret i32 %t
}

; Runs fn on min(n, size) threads; the caller must hold the pool. Returns the threads used.
define i32 @mc_region(ptr %pool, ptr %fn, ptr %arg, i32 %n) {
  %barrier = getelementptr i8, ptr %pool, i64 $BARRIER
  %size = load i32, ptr %pool, align 4
  %fits = icmp slt i32 %n, %size
  %k = select i1 %fits, i32 %n, i32 %size
  %alone = icmp sle i32 %k, 1
  br i1 %alone, label %single, label %fork
single:
  call void %fn(i32 0, i32 1, ptr %arg, ptr %barrier)
  ret i32 1
fork:
  %p_done = getelementptr i8, ptr %pool, i64 $DONE
  %p_waiting = getelementptr i8, ptr %pool, i64 $WAITING
  call void @enter(ptr %pool)
  ; a phase of its own: nothing of its loops is taken yet
  %p_generation = getelementptr i8, ptr %barrier, i64 $BAR_GENERATION
  %generation = load i32, ptr %p_generation, align 4
  %generation1 = add i32 %generation, 1
  store atomic i32 %generation1, ptr %p_generation monotonic, align 4
  %target = call i32 @post(ptr %pool, ptr %fn, ptr %arg, i32 %k)
  call void %fn(i32 0, i32 %k, ptr %arg, ptr %barrier)
  br label %spin
spin:
  %i = phi i32 [ 0, %fork ], [ %i1, %again ], [ %i1, %think ]
  %d = load atomic i32, ptr %p_done acquire, align 4
  %joined = icmp eq i32 %d, %target
  br i1 %joined, label %out, label %again
again:
  $PAUSE
  %i1 = add i32 %i, 1
  %within = and i32 %i1, $IMPATIENCE
  %long = icmp eq i32 %within, 0
  br i1 %long, label %think, label %spin
think:
  %tired = call i1 @tired(ptr %pool, i32 %k, i32 %i1)
  br i1 %tired, label %sleep, label %spin
sleep:
  store atomic i32 1, ptr %p_waiting monotonic, align 4
  fence seq_cst
  br label %check
check:
  %d1 = load atomic i32, ptr %p_done acquire, align 4
  %joined1 = icmp eq i32 %d1, %target
  br i1 %joined1, label %awake, label %doze
doze:
  call void @park(ptr %p_done, i32 %d1)
  br label %check
awake:
  store atomic i32 0, ptr %p_waiting monotonic, align 4
  call void @home(ptr %pool)
  br label %out
out:
  ret i32 %k
}

; Takes the pool for one region. If another call holds it, runs fn on this thread alone.
define i32 @mc_run(ptr %pool, ptr %fn, ptr %arg, i32 %n) {
  %single = icmp sle i32 %n, 1
  br i1 %single, label %alone, label %try
try:
  %got = call i32 @mc_acquire(ptr %pool, i64 1)
  %ok = icmp ne i32 %got, 0
  br i1 %ok, label %held, label %alone
held:
  %k = call i32 @mc_region(ptr %pool, ptr %fn, ptr %arg, i32 %n)
  call void @mc_release(ptr %pool, i64 1)
  ret i32 %k
alone:
  %barrier = getelementptr i8, ptr %pool, i64 $BARRIER
  call void %fn(i32 0, i32 1, ptr %arg, ptr %barrier)
  ret i32 1
}

define i32 @mc_acquire(ptr %pool, i64 %token) {
  %owner = getelementptr i8, ptr %pool, i64 $OWNER
  %pair = cmpxchg ptr %owner, i64 0, i64 %token acquire monotonic
  %ok = extractvalue { i64, i1 } %pair, 1
  %r = zext i1 %ok to i32
  ret i32 %r
}

; Does nothing unless the token holds the pool.
define void @mc_release(ptr %pool, i64 %token) {
  %owner = getelementptr i8, ptr %pool, i64 $OWNER
  %pair = cmpxchg ptr %owner, i64 %token, i64 0 release monotonic
  ret void
}

; Ends all workers; the caller must hold the pool.
define void @mc_stop(ptr %pool) {
  %n = load i32, ptr %pool, align 4
  %t = call i32 @post(ptr %pool, ptr null, ptr null, i32 %n)
  store i32 1, ptr %pool, align 4
  ret void
}

define void @mc_worker(ptr %pool, i32 %tid) {
  %barrier = getelementptr i8, ptr %pool, i64 $BARRIER
  %p_done = getelementptr i8, ptr %pool, i64 $DONE
  %p_waiting = getelementptr i8, ptr %pool, i64 $WAITING
  %p_sleepers = getelementptr i8, ptr %pool, i64 $SLEEPERS
  %boxes = getelementptr i8, ptr %pool, i64 $BOXES
  %box = getelementptr [128 x i8], ptr %boxes, i32 %tid
  %p_fn = getelementptr i8, ptr %box, i64 $BOX_FN
  %p_arg = getelementptr i8, ptr %box, i64 $BOX_ARG
  %p_n = getelementptr i8, ptr %box, i64 $BOX_NTHREADS
  %p_target = getelementptr i8, ptr %box, i64 $BOX_TARGET
  %p_asleep = getelementptr i8, ptr %box, i64 $BOX_ASLEEP
  br label %idle
idle:
  %seen = phi i32 [ 0, %0 ], [ %e, %call ], [ %e, %last_done ], [ %e, %tell ], [ %seen, %awake ]
  br label %spin
spin:
  %i = phi i32 [ 0, %idle ], [ %i1, %again ], [ %i1, %think ]
  %e = load atomic i32, ptr %box acquire, align 4
  %new = icmp ne i32 %e, %seen
  br i1 %new, label %work, label %again
again:
  $PAUSE
  %i1 = add i32 %i, 1
  %within = and i32 %i1, $IMPATIENCE
  %long = icmp eq i32 %within, 0
  br i1 %long, label %think, label %spin
think:
  %tired = call i1 @tired(ptr %pool, i32 1, i32 %i1)
  br i1 %tired, label %sleep, label %spin
sleep:
  store atomic i32 1, ptr %p_asleep monotonic, align 4
  %s0 = atomicrmw add ptr %p_sleepers, i32 1 seq_cst
  fence seq_cst
  %e1 = load atomic i32, ptr %box monotonic, align 4
  %late = icmp ne i32 %e1, %seen
  br i1 %late, label %awake, label %doze
doze:
  call void @park(ptr %box, i32 %seen)
  br label %awake
awake:
  store atomic i32 0, ptr %p_asleep monotonic, align 4
  %s1 = atomicrmw sub ptr %p_sleepers, i32 1 seq_cst
  br label %idle
work:
  %fn = load ptr, ptr %p_fn, align 8
  %stop = icmp eq ptr %fn, null
  br i1 %stop, label %out, label %call
call:
  %arg = load ptr, ptr %p_arg, align 8
  %n = load i32, ptr %p_n, align 4
  %target = load i32, ptr %p_target, align 4
  call void %fn(i32 %tid, i32 %n, ptr %arg, ptr %barrier)
  %d0 = atomicrmw add ptr %p_done, i32 1 seq_cst
  %d = add i32 %d0, 1
  %last = icmp eq i32 %d, %target
  br i1 %last, label %last_done, label %idle
last_done:
  %w = load atomic i32, ptr %p_waiting seq_cst, align 4
  %nobody = icmp eq i32 %w, 0
  br i1 %nobody, label %idle, label %tell
tell:
  call void @unpark(ptr %p_done)
  br label %idle
out:
  ret void
}

; Spins n times on a word that does not change: how long a spin takes is measured with it.
define void @mc_spin(ptr %word, i32 %n) {
  br label %spin
spin:
  %i = phi i32 [ 0, %0 ], [ %i1, %spin ]
  %v = load atomic i32, ptr %word acquire, align 4
  $PAUSE
  %i1 = add i32 %i, 1
  %more = icmp ult i32 %i1, %n
  br i1 %more, label %spin, label %out
out:
  ret void
}
"""


class Native:
    """The compiled functions above; built once per process and never freed."""

    def __init__(self) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        module = llvm.parse_assembly(_source(sys.platform, platform.machine().lower()))
        machine = llvm.Target.from_default_triple().create_target_machine(opt=2)
        engine = llvm.create_mcjit_compiler(module, machine)
        engine.finalize_object()
        address = engine.get_function_address
        word, long, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
        self.barrier = address("mc_barrier")
        self.claim = address("mc_claim")
        self.run_address = address("mc_run")
        self.run = _function(self.run_address, word, pointer, pointer, pointer, word)
        self.region = _function(address("mc_region"), word, pointer, pointer, pointer, word)
        self.acquire = _function(address("mc_acquire"), word, pointer, long)
        self.release = _function(address("mc_release"), None, pointer, long)
        self.stop = _function(address("mc_stop"), None, pointer)
        self.worker = _function(address("mc_worker"), None, pointer, word)
        spin = _function(address("mc_spin"), None, pointer, word)
        self.brief = _spins_within(_BRIEF_SECONDS, spin)
        self.wait = round(self.brief * _WAIT_SECONDS / _BRIEF_SECONDS)
        self.waking = (1 << (self.wait // 2).bit_length() - 1) - 1
        # Workers may still run this code while the interpreter takes itself apart.
        engine.detach()


def _function(address: int, result: Any, *arguments: Any) -> Any:
    return ctypes.CFUNCTYPE(result, *arguments)(address)


def _source(system: str, machine: str) -> str:
    """The LLVM text for an operating system (`sys.platform`) and a machine (`platform`)."""
    declaration, pause = _PAUSE.get(machine, ("", ""))
    values: dict[str, int | str] = {**LAYOUT, "PAUSE": pause}
    if system == "linux" and machine in _FUTEX_NUMBER:
        # The bits of a mask are found bytewise: not on a big-endian machine.
        sleep = _FUTEX + (UNMANAGED if machine == "s390x" else MANAGED)
        values["NUMBER"] = _FUTEX_NUMBER[machine]
    elif system == "win32":
        sleep = _POLL + UNMANAGED
        values["SLEEP"], values["AMOUNT"] = "Sleep", 1  # milliseconds
    else:
        sleep = _POLL + UNMANAGED
        values["SLEEP"], values["AMOUNT"] = "usleep", 200  # microseconds
    return declaration + string.Template(sleep + _CODE).substitute(values)


def _spins_within(seconds: float, spin: Any) -> int:
    count, word, times = 1000, ctypes.c_int64(), []
    for _ in range(5):
        start = time.perf_counter()
        spin(ctypes.addressof(word), count)
        times.append(time.perf_counter() - start)
    return max(100, int(count * seconds / min(times)))
