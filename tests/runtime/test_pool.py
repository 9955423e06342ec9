"""The thread pool: regions, barriers, leases, fork, exit, and that idle workers cost nothing."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import llvmlite.binding as llvm
import pytest

from minicompiler.errors import RunError
from minicompiler.runtime import pool as pool_module
from minicompiler.runtime import spmd
from minicompiler.runtime.pool import Pool, available_threads, barrier_address, get_pool

CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1

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


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels()


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.001)


def checked_phases(kernels: Kernels, pool: Pool, nthreads: int, phases: int) -> None:
    words = Words(phases)
    assert pool.run(kernels.phases, words.address, nthreads) == nthreads
    assert words.errors == 0
    assert words.per_thread(nthreads) == [phases] * nthreads


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_region_runs_once_on_every_thread(
    size: int, kernels: Kernels, make_pool: Callable[[int], Pool]
) -> None:
    pool = make_pool(size)
    assert pool.size == size
    for nthreads in [*range(1, size + 1), size + 7]:
        words = Words()
        used = pool.run(kernels.tally, words.address, nthreads)
        assert used == min(nthreads, size)
        assert words.per_thread(size + 1) == [used] * used + [0] * (size + 1 - used)


def test_many_regions_lose_nothing(kernels: Kernels) -> None:
    pool, words = get_pool(2), Words()
    address = ctypes.cast(pool.region, ctypes.c_void_p)
    kernels.repeat(address, pool.handle, kernels.tally, words.address, 2, 100_000)
    assert words.per_thread(3) == [200_000, 200_000, 0]


def test_regions_of_changing_width_with_pauses(
    kernels: Kernels, make_pool: Callable[[int], Pool]
) -> None:
    # Pauses around the spin time meet workers that are just going to sleep.
    pool, words = make_pool(3), Words()
    expected = [0, 0, 0]
    for i in range(1500):
        nthreads = 1 + i % 3
        assert pool.run(kernels.tally, words.address, nthreads) == nthreads
        for tid in range(nthreads):
            expected[tid] += nthreads
        end = time.perf_counter() + (i % 100) * 2e-6
        while time.perf_counter() < end:
            pass
    assert words.per_thread(3) == expected


@pytest.mark.parametrize(
    ("nthreads", "phases"), [(1, 1000), (2, 50_000 if CPUS > 1 else 500), (3, 200), (8, 100)]
)
def test_no_thread_passes_a_barrier_early(
    nthreads: int, phases: int, kernels: Kernels, make_pool: Callable[[int], Pool]
) -> None:
    # More threads than cores must get through as well: waiting threads give up the processor.
    pool = make_pool(nthreads)
    for _ in range(3):
        checked_phases(kernels, pool, nthreads, phases)


def test_the_polling_fallback(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, make_pool: Callable[[int], Pool]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        native = spmd.Native()
    monkeypatch.setattr(pool_module, "_native", native)
    pool, own = make_pool(2), Kernels()
    for _ in range(5):
        words = Words(50)
        assert pool.run(own.phases, words.address) == 2
        assert (words.errors, words.per_thread(2)) == (0, [50, 50])
        time.sleep(0.001)


@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("machine", ["x86_64", "amd64", "aarch64", "arm64", "riscv64", "other"])
def test_the_native_text_is_valid_for_every_system(system: str, machine: str) -> None:
    module = llvm.parse_assembly(spmd._source(system, machine))
    module.verify()
    external = {f.name for f in module.functions if f.is_declaration}
    external = {name for name in external if not name.startswith("llvm.")}
    assert len(external & {"syscall", "usleep", "Sleep"}) == 1
    placing = {"sched_getcpu", "sched_getaffinity", "sched_setaffinity", "clock_gettime"}
    placing |= {"pthread_self", "memcmp"}
    assert external <= {"syscall", "usleep", "Sleep"} | placing
    assert "syscall" in external or not external & placing


def test_idle_workers_take_no_processor_time(kernels: Kernels) -> None:
    pool, words = get_pool(2), Words()
    pool.run(kernels.tally, words.address)
    time.sleep(0.02)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.02
    assert pool.run(kernels.tally, words.address) == 2


# Workers go on counting while their pool is shut down, so this must outlive every test.
SYSTEM_CALLS = ctypes.c_int64()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """Kernels of pools whose system calls are counted, not timed: other processes may slow this one
    down at any time."""
    at = f"inttoptr (i64 {ctypes.addressof(SYSTEM_CALLS)} to ptr)"
    number = itertools.count()

    def count(call: re.Match[str]) -> str:
        return f"  %count{next(number)} = atomicrmw add ptr {at}, i64 1 monotonic\n{call[0]}"

    calls = re.compile(
        r"^  %\w+ = call (i64 \(i64, \.\.\.\) @syscall|i32 @(sched|clock)_)", re.MULTILINE
    )
    for name in ("_FUTEX", "MANAGED"):
        monkeypatch.setattr(spmd, name, calls.sub(count, getattr(spmd, name)))
    assert next(number) == 7
    monkeypatch.setattr(pool_module, "_native", spmd.Native())
    return Kernels()


def system_calls(call: Callable[[], object]) -> int:
    before = SYSTEM_CALLS.value
    call()
    return SYSTEM_CALLS.value - before


def fewest(call: Callable[[], object], enough: int = 0) -> int:
    """The fewest system calls that `call` makes; it is tried until they are few enough."""
    deadline = time.monotonic() + 20.0
    least = system_calls(call)
    while least > enough and time.monotonic() < deadline:
        least = min(least, system_calls(call))
    return least


def crowded_until(pool: Pool) -> ctypes.c_int64:
    return ctypes.c_int64.from_address((pool.handle.value or 0) + spmd.LAYOUT["CROWDED"])


two_processors = pytest.mark.skipif(
    CPUS < 2 or sys.platform != "linux", reason="needs two processors and futex"
)


@two_processors
def test_hot_regions_and_barriers_make_no_system_call(
    counted: Kernels, make_pool: Callable[[int], Pool]
) -> None:
    pool, words, phases = make_pool(2), Words(), Words(1000)
    address = ctypes.cast(pool.region, ctypes.c_void_p)
    pool.run(counted.tally, words.address)
    time.sleep(0.02)
    woken = system_calls(lambda: pool.run(counted.tally, words.address))
    assert woken > 0, "a sleeping worker must have been woken"
    regions = (address, pool.handle, counted.tally, words.address, 2, 1000)
    # The worker may sleep before the first of the 1000 regions, so come from hot ones.
    assert fewest(lambda: counted.repeat(*regions)) <= 2
    assert fewest(lambda: pool.run(counted.phases, phases.address)) <= 2


@two_processors
def test_a_worker_sleeps_in_the_middle_of_a_call_only_where_cpus_are_scarce(
    counted: Kernels, make_pool: Callable[[int], Pool]
) -> None:
    pool, words = make_pool(2), Words(10)

    def call() -> None:
        assert pool.run(counted.alone, words.address) == 2

    assert fewest(call, 3) <= 3  # three to wake it at the start
    crowded = crowded_until(pool)
    crowded.value = 2**62
    assert any(system_calls(call) >= 10 for _ in range(20))
    crowded.value = 1  # long ago
    assert fewest(call, 3) <= 3
    assert crowded.value == 0


def test_threads_without_a_cpu_each_wait_briefly(make_pool: Callable[[int], Pool]) -> None:
    def waits(pool: Pool) -> tuple[int, int]:
        words = ((pool.handle.value or 0) + spmd.LAYOUT[name] for name in ("BRIEF", "WAIT"))
        brief, wait = (ctypes.c_int32.from_address(word).value for word in words)
        return brief, wait

    brief, wait = waits(make_pool(CPUS + 1))
    assert wait == brief
    if sys.platform == "linux":
        brief, wait = waits(make_pool(CPUS))
        assert wait > brief


def test_a_busy_pool_leaves_the_second_caller_alone(kernels: Kernels) -> None:
    pool, held = get_pool(2), Words()
    first: list[int] = []
    caller = threading.Thread(target=lambda: first.append(pool.run(kernels.hold, held.address)))
    caller.start()
    until(lambda: held.per_thread(2) == [1, 1])
    try:
        with pool.lease() as lease:
            assert lease is None
        words = Words(10)
        assert pool.run(kernels.phases, words.address) == 1
        assert (words.errors, words.per_thread(2)) == (0, [10, 0])
    finally:
        held.words[1] = 1
        caller.join()
    assert first == [2]
    checked_phases(kernels, pool, 2, 100)


def test_several_callers_at_once(kernels: Kernels) -> None:
    pool = get_pool(2)
    widths: list[tuple[int, list[int]]] = []

    def call() -> None:
        words = Words()
        total = 0
        for i in range(500):
            if i % 2:
                with pool.lease() as lease:
                    runner = lease or pool
                    total += runner.run(kernels.tally, words.address, 2 if lease else 1)
            else:
                total += pool.run(kernels.tally, words.address)
        widths.append((total, words.per_thread(2)))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(widths) == 4
    for total, (first, second) in widths:
        # 500 regions, of which total - 500 had two threads, which add 2 each.
        assert (first, second) == (500 + (total - 500), 2 * (total - 500))


def test_a_lease_ends_with_its_block(kernels: Kernels) -> None:
    pool, words = get_pool(2), Words()
    with pool.lease() as lease:
        assert lease is not None and lease.size == 2
        assert lease.run(kernels.tally, words.address) == 2
        assert pool.run(kernels.tally, words.address) == 1
        with pool.lease() as second:
            assert second is None
        assert lease.run(kernels.tally, words.address) == 2
    with pytest.raises(RunError, match="lease of the thread pool has ended"):
        lease.run(kernels.tally, words.address)
    assert pool.run(kernels.tally, words.address) == 2


def test_a_lease_whose_block_was_never_entered_is_given_back(kernels: Kernels) -> None:
    pool, words = get_pool(2), Words()
    lease = pool.lease()
    assert lease.__enter__() is lease  # as if Ctrl-C came right after it
    assert pool.run(kernels.tally, words.address) == 1
    del lease
    assert pool.run(kernels.tally, words.address) == 2
    with pool.lease() as other:
        assert other is not None


def test_exceptions_at_any_point_leave_the_pool_usable(kernels: Kernels) -> None:
    pool, words = get_pool(2), Words()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    interrupts = 0
    try:
        for i in range(200):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-4 + 1e-6 * i, 1.0)
                while True:
                    with pool.lease() as lease:
                        assert lease is not None
                        lease.run(kernels.tally, words.address)
                    pool.run(kernels.tally, words.address)
            except KeyboardInterrupt:
                interrupts += 1
            lease = None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert interrupts == 200
    with pool.lease() as lease:
        assert lease is not None
    checked_phases(kernels, pool, 2, 100)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_gets_pools_of_its_own(kernels: Kernels) -> None:
    pool, held = get_pool(2), Words()
    checked_phases(kernels, pool, 2, 10)
    # Another thread uses the pool at the time of the fork, and does not exist in the child.
    caller = threading.Thread(target=lambda: pool.run(kernels.hold, held.address))
    caller.start()
    until(lambda: held.per_thread(2) == [1, 1])
    child = os.fork()
    if child == 0:
        status = 1
        try:
            assert pool.size == 1
            with pool.lease() as lease:
                assert lease is not None
            checked_phases(kernels, pool, 1, 10)
            fresh = get_pool(2)
            assert fresh is not pool
            checked_phases(kernels, fresh, 2, 10)
            fresh.shutdown()
            status = 0
        finally:
            os._exit(status)
    held.words[1] = 1
    caller.join()
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert get_pool(2) is pool
    checked_phases(kernels, pool, 2, 10)


def test_shutdown_ends_the_workers(kernels: Kernels) -> None:
    pool = Pool(3)
    workers = pool._workers[3]
    assert all(worker.is_alive() for worker in workers)
    with pool.lease(), pytest.raises(RunError, match="still in use"):
        pool.shutdown()
    pool.shutdown()
    pool.shutdown()
    assert not any(worker.is_alive() for worker in workers)
    with pytest.raises(RunError, match="shut down"):
        pool.lease()
    checked_phases(kernels, pool, 1, 10)
    assert Words().errors == 0


def test_get_pool_keeps_one_pool_per_size() -> None:
    pool = get_pool(3)
    assert get_pool(3) is pool
    assert get_pool().size == available_threads()
    pool.shutdown()
    assert get_pool(3) is not pool
    get_pool(3).shutdown()


def test_an_unused_pool_ends_its_workers() -> None:
    pool = Pool(2)
    (worker,) = pool._workers[3]
    gone = weakref.ref(pool)
    del pool
    gc.collect()
    assert gone() is None
    assert not worker.is_alive()


@pytest.mark.parametrize("size", [0, -1, True, 2.0, "2", 1 << 20])
def test_impossible_sizes(size: object) -> None:
    with pytest.raises(RunError, match="is not possible"):
        Pool(size)  # type: ignore[arg-type]


def test_a_null_function_is_refused() -> None:
    with pytest.raises(RunError, match="null pointer"):
        get_pool(2).run(0)


def test_a_thread_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RunError, match="cannot start thread 2 of 3"):
        Pool(3)
    assert not started[0].is_alive()


def test_available_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "usable_cores", lambda: 4)
    assert available_threads() == 4
    assert [available_threads(n) for n in (0, 1, 3, 9)] == [1, 1, 3, 4]


@pytest.fixture
def my_cpus() -> Iterator[list[int]]:
    """The CPUs of this thread, which the test may change."""
    mine = os.sched_getaffinity(0)
    yield sorted(mine)
    os.sched_setaffinity(0, mine)


def masks(pool: Pool) -> list[set[int]]:
    return [os.sched_getaffinity(worker.native_id or 0) for worker in pool._workers[3]]


two_cpus = pytest.mark.skipif(
    CPUS < 2 or sys.platform != "linux", reason="needs two processors and affinity masks"
)


@two_cpus
def test_a_worker_is_woken_on_another_cpu_than_the_callers(
    kernels: Kernels, make_pool: Callable[[int], Pool], my_cpus: list[int]
) -> None:
    pool, full, words = make_pool(2), make_pool(CPUS), Words()
    for cpu in [*my_cpus[:2], my_cpus[-1], my_cpus[0]]:
        os.sched_setaffinity(0, {cpu})
        time.sleep(0.02)  # the workers sleep
        for p in (pool, full):
            assert p.run(kernels.tally, words.address) == p.size
        others = set(my_cpus) - {cpu}
        assert masks(pool) == [others]
        # With a thread for every CPU each worker has one of its own.
        assert all(len(mask) == 1 for mask in masks(full))
        assert set.union(*masks(full)) == others
        assert os.sched_getaffinity(0) == {cpu}


@two_cpus
@pytest.mark.parametrize("at_a_barrier", [False, True])
def test_a_caller_that_waits_for_a_worker_gets_out_of_its_way(
    at_a_barrier: bool, kernels: Kernels, make_pool: Callable[[int], Pool], my_cpus: list[int]
) -> None:
    pool = make_pool(2)
    worker = pool._workers[3][0].native_id or 0

    def moved(cpu: int) -> bool:
        words, others = Words(cpu), set(my_cpus) - {cpu}
        words.words[2] = worker if at_a_barrier else 0
        os.sched_setaffinity(0, others)
        pool.run(kernels.tally, Words().address)
        # Thread 0 moves to `cpu` in the middle of this region.
        pool.run(kernels.roam, words.address)
        if not at_a_barrier:
            return masks(pool) == [others]
        mask = int.from_bytes(bytes(words.words)[256:384], "little")
        return mask == sum(1 << other for other in others)

    for cpu in my_cpus[:2] * 2:
        # On a busy machine it may arrive there when the worker is done.
        assert any(moved(cpu) for _ in range(20))


@two_cpus
def test_a_waiting_caller_lends_its_cpu_to_a_worker_that_does_not_run(
    kernels: Kernels, make_pool: Callable[[int], Pool], my_cpus: list[int]
) -> None:
    pool, cpu = make_pool(2), my_cpus[0]
    os.sched_setaffinity(0, {cpu})
    pool.run(kernels.tally, Words().address)
    (others,) = masks(pool)
    # Programs that keep every other CPU busy, so that the worker has to wait for its turn.
    busy = [
        subprocess.Popen([sys.executable, "-c", BUSY.format(other)], stdout=subprocess.PIPE)
        for other in others
    ]
    try:
        for process in busy:
            assert process.stdout is not None and process.stdout.readline()
        for _ in range(20):
            words = Words(parameter=-1)
            pool.run(kernels.borrow, words.address)
            if words.words[2]:
                break
        else:
            pytest.fail("the worker never came to the caller's CPU")
        assert masks(pool) == [others]
        assert crowded_until(pool).value > 0, "for a while nobody spins for long"
    finally:
        for process in busy:
            process.kill()
            process.communicate()


BUSY = """
import os
os.sched_setaffinity(0, {{{}}})
print("busy", flush=True)
while True:
    pass
"""


@two_cpus
def test_a_worker_that_wakes_up_is_not_taken_for_one_that_waits_for_a_cpu(
    kernels: Kernels, make_pool: Callable[[int], Pool]
) -> None:
    pool, crowded = make_pool(2), []
    # The caller looks every few microseconds; to wake up takes longer.
    address = (pool.handle.value or 0) + spmd.LAYOUT["WAKING"]
    ctypes.c_int32.from_address(address).value = spmd.LAYOUT["IMPATIENCE"]
    while len(crowded) < 20 and all(crowded):
        time.sleep(0.005)
        crowded_until(pool).value = 0
        assert pool.run(kernels.tally, Words().address) == 2
        crowded.append(crowded_until(pool).value > 0)
    assert not all(crowded)


def test_no_two_words_of_the_pool_block_overlap() -> None:
    at = spmd.LAYOUT
    mask_end = at["MASK"] + at["MASK_BYTES"]
    head = [at[name] for name in ("OWNER", "DONE", "SLEEPERS", "BARRIER", "MASK")]
    assert head == sorted(head) and all(word % 128 == 0 for word in head)
    # The mailbox of worker 0, whom nobody sends anything, is there for its second line.
    second_line = at["BARRIER"] + at["CLAIMS"]
    assert mask_end <= second_line == at["BOXES"] + 64


@two_cpus
def test_cpu_masks_of_workers_that_are_left_alone(
    kernels: Kernels, make_pool: Callable[[int], Pool], my_cpus: list[int]
) -> None:
    words, first, last = Words(), my_cpus[0], my_cpus[-1]
    crowded, ours = make_pool(CPUS + 1), make_pool(2)
    os.sched_setaffinity(0, {first})
    time.sleep(0.02)
    for pool in (crowded, ours):
        pool.run(kernels.tally, words.address)
    assert masks(crowded) == [set(my_cpus)] * CPUS
    # A mask that somebody else gives a worker stays.
    os.sched_setaffinity(ours._workers[3][0].native_id or 0, {first})
    for cpu in (last, first):
        os.sched_setaffinity(0, {cpu})
        time.sleep(0.02)
        assert ours.run(kernels.tally, words.address) == 2
        assert masks(ours) == [{first}]


@pytest.mark.parametrize("ending", ["", "import sys; sys.exit(0)"])
def test_the_interpreter_exits_cleanly(ending: str) -> None:
    program = """
        import ctypes, threading
        import llvmlite.binding as llvm
        from minicompiler.runtime.pool import get_pool
        pool = get_pool(2)
        text = "define void @f(i32 %t, i32 %n, ptr %a, ptr %b) { ret void }"
        machine = llvm.Target.from_default_triple().create_target_machine()
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(text), machine)
        fn = engine.get_function_address("f")
        engine.detach()
        def use():
            while True:
                pool.run(fn)
        threading.Thread(target=use, daemon=True).start()
        for _ in range(100):
            pool.run(fn)
    """
    command = [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(program) + ending]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
