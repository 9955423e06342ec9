"""SPMD thread pool: run one native function on n threads, with a barrier between its phases.

In:  the address of `void fn(i32 tid, i32 nthreads, ptr arg, ptr barrier)` and of its argument.
Out: the function has run on every thread when `region` returns; the caller is thread 0.

    pool = get_pool(2)
    pool.region(pool.handle, fn, arg, 2)   # raw ctypes pointer, the hot path; gives threads used
    with pool.lease() as lease: ...        # several regions that nobody else may interleave

Workers are Python daemon threads that stay inside one native loop without the GIL: they spin for
at most 500 us after a region and then sleep. A busy pool never queues: the other caller runs alone.
The CPU masks of workers follow the caller (see `affinity`); the caller's own is never touched.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
import time
import weakref
from typing import Any

from minicompiler.errors import RunError
from minicompiler.runtime.affinity import short_slices
from minicompiler.runtime.spmd import LAYOUT, Native
from minicompiler.target import usable_cores

_MAX_THREADS = 4096
# At exit a daemon thread may hold a pool for ever; then its workers are left as they are.
_END_SECONDS = 1.0

_lock = threading.RLock()
_native: Native | None = None
_pools: dict[int, Pool] = {}
_living: weakref.WeakSet[Pool] = weakref.WeakSet()
_process = os.getpid()
# Who holds a pool: 0 nobody, 1 a call that gives it back in native code, else a lease's token.
_tokens = itertools.count(2)


def _code() -> Native:
    global _native
    with _lock:
        if _native is None:
            _native = Native()
        return _native


def barrier_address() -> int:
    """Address of `void mc_barrier(ptr block, i32 nthreads)`, for generated code; the block is the
    `barrier` that a region's function receives."""
    return _code().barrier


def region_address() -> int:
    """Address of `i32 mc_run(ptr pool, ptr fn, ptr arg, i32 nthreads)`: `Pool.region` for native
    code."""
    return _code().run_address


def kernel_symbols() -> dict[str, int]:
    """What generated code may call: `mc_barrier`, and `{i64, i64} mc_claim(ptr block, i32 tid,
    i32 nthreads, i64 extent, ptr own)`, whose block is the `barrier` of a region."""
    return {"mc_barrier": _code().barrier, "mc_claim": _code().claim}


class Pool:
    """`size` threads, the caller included. Use `get_pool`, which keeps one pool per size.

    `region(handle, fn, arg, nthreads)` is the hot path: a ctypes function that takes addresses,
    runs fn on min(nthreads, size) threads, or on this thread alone while another call holds the
    pool, and returns the number of threads used.
    """

    def __init__(self, size: int) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= _MAX_THREADS:
            raise RunError(
                f"a thread pool of {size!r} threads is not possible",
                hint=f"ask for 1 to {_MAX_THREADS} threads",
            )
        code = _code()
        # The first 128 bytes of a ctypes buffer are not aligned: one line more, start at a line.
        buffer = ctypes.create_string_buffer(LAYOUT["BOXES"] + 128 * (size + 1))
        block = -(-ctypes.addressof(buffer) // 128) * 128
        self.region = code.run
        self.handle = ctypes.c_void_p(block)
        self._code = code
        self._size = ctypes.c_int32.from_buffer(buffer, block - ctypes.addressof(buffer))
        self._owner = ctypes.c_int64.from_address(block + LAYOUT["OWNER"])
        cpus = _cpus_to_manage(size)
        # Without a CPU for everyone, who waits may hold the one that another thread needs.
        wait = code.wait if cpus else code.brief
        for name, spins in (("BRIEF", code.brief), ("WAIT", wait), ("WAKING", code.waking)):
            ctypes.c_int32.from_address(block + LAYOUT[name]).value = spins
        ctypes.memmove(block + LAYOUT["MASK"], cpus, len(cpus))
        self._size.value = 1
        self._leases: dict[int, weakref.ref[Lease]] = {}
        self._stopped = False
        threads: list[threading.Thread] = []
        for tid in range(1, size):
            thread = threading.Thread(
                target=_work,
                args=(code.worker, buffer, block, tid, bool(cpus)),
                name=f"minicompiler-{tid}",
                daemon=True,
            )
            try:
                thread.start()
            except RuntimeError as error:
                _end(code, buffer, block, threads)
                raise RunError(
                    f"cannot start thread {tid} of {size}: {error}",
                    hint="use fewer threads or raise the limit of processes (ulimit -u)",
                ) from error
            threads.append(thread)
            self._size.value = tid + 1
        # Ends the workers of a pool that nobody uses any more, at the latest at exit.
        self._workers = (code, buffer, block, threads)
        self._finalizer = weakref.finalize(self, _end, *self._workers)
        _living.add(self)

    @property
    def size(self) -> int:
        """Threads of a region: 1 after `shutdown`, and in a child process after a fork."""
        return self._size.value

    def run(self, fn: int, arg: int | None = None, nthreads: int | None = None) -> int:
        """`region` with defaults, for calls that are not hot. Returns the threads used."""
        if not fn:
            raise RunError("a region needs the address of a function, got a null pointer")
        self._reclaim()
        return int(self.region(self.handle, fn, arg, self.size if nthreads is None else nthreads))

    def lease(self) -> Lease:
        """`with pool.lease() as lease:` holds the pool, or gives None if it is busy."""
        if self._stopped:
            raise RunError(
                f"this pool of threads is shut down ({self!r})",
                hint="get_pool(n) makes a new one",
            )
        self._reclaim()
        return Lease(self)

    def shutdown(self) -> None:
        """End the workers once the running call is over. Later regions run on the caller alone.

        Raises:
            RunError: a call or lease has held the pool for a second; it goes on working.
        """
        if self._stopped:
            return
        with _lock:
            for size, pool in list(_pools.items()):
                if pool is self:
                    del _pools[size]
        if not _end(*self._workers):
            raise RunError(
                f"{self!r} is still in use and cannot be shut down",
                hint="end its calls and leases first",
            )
        self._stopped = True
        self._finalizer.detach()

    def __repr__(self) -> str:
        return f"Pool(size={self.size}{', stopped' if self._stopped else ''})"

    def _reclaim(self) -> None:
        """Free the pool from a lease that no longer exists.

        Ctrl-C can strike between the native call and the Python instruction after it, so that a
        lease is taken but its `with` block never ends. (A `__del__` would swallow a Ctrl-C.)
        """
        owner = self._owner.value
        if owner > 1:
            lease = self._leases.get(owner)
            if lease is None or lease() is None:
                self._code.release(self.handle, owner)

    def _forget_workers(self) -> None:
        """In the child of a fork: no worker exists here, and whoever held the pool does not."""
        self._size.value = 1
        self._owner.value = 0
        self._leases.clear()


class Lease:
    """The right to use a pool; see `Pool.lease`. Given back at the end of the `with` block."""

    __slots__ = ("__weakref__", "_pool", "_token")

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._token = next(_tokens)

    @property
    def size(self) -> int:
        return self._pool.size

    def run(self, fn: int, arg: int | None = None, nthreads: int | None = None) -> int:
        """Run fn on min(nthreads, size) threads; returns their number."""
        pool = self._pool
        if pool._owner.value != self._token:
            raise RunError("this lease of the thread pool has ended", hint="take a new lease")
        if not fn:
            raise RunError("a region needs the address of a function, got a null pointer")
        threads = pool.size if nthreads is None else nthreads
        return int(pool._code.region(pool.handle, fn, arg, threads))

    def __enter__(self) -> Lease | None:
        pool = self._pool
        pool._leases[self._token] = weakref.ref(self)
        return self if pool._code.acquire(pool.handle, self._token) else None

    def __exit__(self, *_: object) -> None:
        # Compares the token, so it is harmless where the lease was not granted.
        self._pool._code.release(self._pool.handle, self._token)
        self._pool._leases.pop(self._token, None)


def get_pool(size: int | None = None) -> Pool:
    """The process's pool of `size` threads, by default as many as `available_threads()`."""
    if _process != os.getpid():
        _after_fork()
    if size is None:
        size = available_threads()
    pool = _pools.get(size)
    if pool is None:
        with _lock:
            pool = _pools.get(size)
            if pool is None:
                pool = _pools[size] = Pool(size)
    return pool


def available_threads(requested: int | None = None) -> int:
    """Threads worth starting: the usable cores (affinity, container quota), at most `requested`."""
    cores = usable_cores()
    return cores if requested is None else max(1, min(cores, requested))


def _cpus_to_manage(size: int) -> bytes:
    """The affinity mask, if it has a CPU for every thread of a pool; else nothing.

    With fewer CPUs than threads, or without masks, workers go where the scheduler puts them.
    """
    try:
        cpus = os.sched_getaffinity(0)
    except (AttributeError, OSError):  # another system, or a sandbox
        return b""
    if size > len(cpus) or max(cpus) >= LAYOUT["MASK_BITS"]:
        return b""
    return sum(1 << cpu for cpu in cpus).to_bytes(LAYOUT["MASK_BYTES"], "little")


def _work(loop: Any, buffer: object, block: int, tid: int, managed: bool) -> None:
    """Body of a worker; `buffer` is here to keep the memory of the block alive."""
    if managed:
        box = block + LAYOUT["BOXES"] + 128 * tid
        ctypes.c_int32.from_address(box + LAYOUT["BOX_THREAD"]).value = threading.get_native_id()
    short_slices()
    loop(block, tid)


def _end(code: Native, buffer: object, block: int, threads: list[threading.Thread]) -> bool:
    """End the workers and wait for them; false if the pool stays busy."""
    deadline = time.monotonic() + _END_SECONDS
    while not code.acquire(block, 1):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    code.stop(block)
    code.release(block, 1)
    for thread in threads:
        thread.join(_END_SECONDS)
    return True


def _after_fork() -> None:
    global _lock, _process
    _lock = threading.RLock()
    _process = os.getpid()
    _pools.clear()
    for pool in list(_living):
        pool._forget_workers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
