"""The thread pool: regions, barriers, leases, fork and exit."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable

import llvmlite.binding as llvm
import pytest
from pool_kernels import Kernels, Words

from minicompiler.errors import RunError
from minicompiler.runtime import pool as pool_module
from minicompiler.runtime import spmd
from minicompiler.runtime.pool import Pool, available_threads, get_pool

CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


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


def test_no_two_words_of_the_pool_block_overlap() -> None:
    at = spmd.LAYOUT
    mask_end = at["MASK"] + at["MASK_BYTES"]
    head = [at[name] for name in ("OWNER", "DONE", "SLEEPERS", "BARRIER", "MASK")]
    assert head == sorted(head) and all(word % 128 == 0 for word in head)
    # The mailbox of worker 0, whom nobody sends anything, is there for its second line.
    second_line = at["BARRIER"] + at["CLAIMS"]
    assert mask_end <= second_line == at["BOXES"] + 64


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
