"""What the threads of a pool do while they wait: system calls, and CPUs left to others."""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from pool_kernels import Kernels, Words

from minicompiler.runtime import pool as pool_module
from minicompiler.runtime import spmd
from minicompiler.runtime.pool import Pool, get_pool

CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1

two_processors = pytest.mark.skipif(
    CPUS < 2 or sys.platform != "linux", reason="needs two processors, futex and affinity masks"
)


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


@pytest.fixture
def my_cpus() -> Iterator[list[int]]:
    """The CPUs of this thread, which the test may change."""
    mine = os.sched_getaffinity(0)
    yield sorted(mine)
    os.sched_setaffinity(0, mine)


def masks(pool: Pool) -> list[set[int]]:
    return [os.sched_getaffinity(worker.native_id or 0) for worker in pool._workers[3]]


@two_processors
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


@two_processors
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


@two_processors
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


@two_processors
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


@two_processors
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
