"""Why a kernel takes the time it takes: measured, against its loops and the machine.

    d = diagnose(work, seconds, peaks, resident)
    d.percent        62.0: of the roofline
    d.reasons        ("masked tail: 1.28 points computed per point needed", ...), largest cost first

A reason is a share of the measured time that a fact accounts for; the facts come from
kernel_facts.py, the rates from machine.py. Where no fact accounts for it, that is what is said.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from minicompiler.kernel_facts import Work
from minicompiler.machine import Peaks

_WORTH_NAMING = 0.1  # share of the time from which on a reason is given
_NEAR = 70.0  # percent of the roofline from which on a kernel counts as fast
_SMALL = 4  # times the time to start the threads: below, starting them is what counts
_BOUND = 0.4  # share of the time that moving data must account for to be called its bound
_MOST = 2  # reasons given


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Attributes:
    bound: "memory", "compute" or "launch": what limits the kernel at best.
    best: seconds at the limit of the machine, the larger of the two times of the roofline.
    percent: of the roofline: 100 * best / measured.
    reasons: what the measured time is spent on beyond that, largest first.
    """

    bound: str
    best: float
    percent: float
    reasons: tuple[str, ...]

    @property
    def text(self) -> str:
        """All in one line."""
        return "; ".join(self.reasons)


def diagnose(work: Work, seconds: float, peaks: Peaks, resident: int) -> Diagnosis:
    """`seconds`: measured. `resident`: bytes of all constants and intermediate values of the model,
    which decide the memory that weights come from."""
    compute, memory = work.performed / peaks.flops, _memory(work, peaks, resident)
    best = max(compute, memory)
    percent = 100 * best / seconds if seconds > 0 else 0.0
    if seconds < _SMALL * peaks.launch:
        reason = (
            f"small: {seconds * 1e6:.1f} us of work, and starting or joining "
            f"{_threads(peaks.threads)} takes {peaks.launch * 1e6:.1f}"
        )
        return Diagnosis("launch", best, percent, (reason,))
    bound = "memory" if memory >= compute else "compute"
    shares = sorted(_shares(work, seconds, peaks, resident), reverse=True)
    reasons = [text for share, text in shares if share >= _WORTH_NAMING][:_MOST]
    if percent >= _NEAR:
        what = "arithmetic" if bound == "compute" else _slowest(work, peaks, resident)
        reasons = [f"near the limit ({what})", *reasons][:_MOST]
    return Diagnosis(bound, best, percent, tuple(reasons or [_unexplained(work, seconds, peaks)]))


def _memory(work: Work, peaks: Peaks, resident: int) -> float:
    """Seconds to move what the kernel reads and writes once: activations from the memory that holds
    them, weights from that which holds the whole model."""
    near, far = peaks.level(work.read + work.written), peaks.level(resident)
    return work.read / near.read + work.written / near.write + work.weights / far.read


def _shares(work: Work, seconds: float, peaks: Peaks, resident: int) -> Iterator[tuple[float, str]]:
    """(share of the measured time, what it is spent on)."""
    threads = peaks.threads
    lanes = max(1.0, work.vector_lanes)
    arithmetic = work.instructions * 2 / peaks.flops  # at full rate: one slot is an FMA
    scalar = 1 - work.vectors
    slots = (
        arithmetic * (scalar * lanes + work.vectors / max(work.lanes, 1e-9)) if arithmetic else 0
    )
    slots /= work.busy(threads)
    memory = _memory(work, peaks, resident)
    if work.only_moves:
        yield (
            max(memory / seconds, _WORTH_NAMING),
            f"layout conversion or copy: moves data only ({_bytes(work.moved)})",
        )
    elif memory >= max(slots, _BOUND * seconds):
        rate, most = work.moved / seconds / 1e9, work.moved / memory / 1e9
        name = _slowest(work, peaks, resident)
        yield memory / seconds, f"memory-bound: {rate:.1f} of at most {most:.1f} GB/s ({name})"
    held = sum(work.workspace.values())
    if held:
        level = peaks.level(held)
        spent = held / level.write + held / level.read
        names = ", ".join(work.workspace)
        yield spent / seconds, f"writes and reads {_bytes(held)} of workspace ({names})"
    if work.opaque and threads > 1 and all(p.iterations == 1 for p in work.phases):
        yield 1 - 1 / threads, "one thread: its order depends on the data"
    elif (idle := 1 - work.busy(threads)) > 0:
        yield idle, f"too little parallelism: {_uneven(work, threads)}"
    if slots > memory:
        yield (
            (1 - 1 / work.tail) * min(1.0, slots / seconds),
            f"masked tail: {work.tail:.2f} points computed per point needed",
        )
        wide = scalar * lanes + work.vectors
        yield (
            scalar * lanes / wide * min(1.0, slots / seconds),
            f"scalar code: {100 * scalar:.0f}% of the work is not in vector loops",
        )
        yield (
            work.vectors * (1 - work.lanes) * min(1.0, slots / seconds),
            f"narrow vectors: {100 * work.lanes:.0f}% of the lanes are used",
        )
        yield (
            work.same / work.instructions * min(1.0, slots / seconds),
            f"not hoisted: {100 * work.same / work.instructions:.0f}% of the instructions give the "
            "same for every element of the inner loop",
        )
        functions = sum(work.functions.values())
        yield (
            functions / work.instructions * min(1.0, slots / seconds),
            f"transcendental: {100 * functions / work.instructions:.0f}% of the instructions are "
            f"{', '.join(sorted(work.functions))}",
        )


def _uneven(work: Work, threads: int) -> str:
    """The phase that leaves most time unused."""
    worst = max(
        work.phases,
        key=lambda p: p.cost * (math.ceil(p.iterations / threads) / p.iterations - 1 / threads),
    )
    many = "iterations" if worst.iterations > 1 else "iteration"
    return (
        f"{worst.iterations} parallel {many} on {_threads(threads)}, "
        f"{100 * work.busy(threads):.0f}% busy"
    )


def _unexplained(work: Work, seconds: float, peaks: Peaks) -> str:
    """For a kernel that is slow for none of the known reasons."""
    used = 100 * work.instructions * 2 / peaks.flops / seconds
    if work.strided:
        name, step = next(iter(work.strided.items()))
        return f"strided loads: elements of {name} lie {step} bytes apart"
    return f"no single cause: arithmetic runs at {used:.0f}% of the full rate"


def _slowest(work: Work, peaks: Peaks, resident: int) -> str:
    """The memory that the kernel's data comes from, or most of it by time."""
    near, far = peaks.level(work.read + work.written), peaks.level(resident)
    weights = work.weights / far.read
    return far.name if weights > _memory(work, peaks, resident) / 2 else near.name


def _threads(n: int) -> str:
    return f"{n} thread{'s' if n > 1 else ''}"


def _bytes(n: float) -> str:
    return f"{n / 1e6:.1f} MB" if n >= 1e5 else f"{n / 1e3:.1f} kB"
