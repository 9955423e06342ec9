"""Time a model, and other runtimes on the same model, so that the ratio means something.

    runners = {"minicompiler": lambda: m(x), "onnxruntime": peer("onnxruntime", path, 2)(feeds)}
    compare(runners, seconds=3.0)        {"minicompiler": Times(...), "onnxruntime": Times(...)}

The runners take turns in short blocks, so that whatever else the machine does meets all of them;
each block begins with calls that are not counted. The ratio is taken per turn.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minicompiler.errors import MinicompilerError

Runner = Callable[[], Sequence[np.ndarray]]
Prepare = Callable[[Mapping[str, np.ndarray]], Runner]  # inputs -> what runs the model on them
_BLOCK_SECONDS = 0.05  # of counted calls per turn
_MIN_TURNS = 5
_PAUSE_SECONDS = 0.05  # other runtimes' threads spin for a while after a call


@dataclass(frozen=True)
class Times:
    """Seconds of the counted calls, turn by turn."""

    turns: tuple[tuple[float, ...], ...]

    @property
    def calls(self) -> list[float]:
        return [t for turn in self.turns for t in turn]

    def summary(self) -> dict[str, float]:
        """Seconds: mean, median, p90, p99, best; calls per second; number of calls."""
        calls = self.calls
        p50, p90, p99 = (float(np.percentile(calls, p)) for p in (50, 90, 99))
        mean = statistics.fmean(calls)
        return {
            "mean": mean, "median": p50, "p90": p90, "p99": p99, "best": min(calls),
            "calls_per_second": 1 / mean, "calls": len(calls),
        }  # fmt: skip


def compare(runners: Mapping[str, Runner], seconds: float) -> dict[str, Times]:
    """Times all runners in turn, each for about `seconds` in all."""
    for run in runners.values():  # the first call may start threads and allocate
        run()
    turns: dict[str, list[tuple[float, ...]]] = {name: [] for name in runners}
    counts = {name: _count(run) for name, run in runners.items()}
    started = time.perf_counter()
    budget = seconds * len(runners)
    k = 0
    while k < _MIN_TURNS or time.perf_counter() - started < budget:
        # The order changes, so that nobody always follows the same neighbour.
        order = list(runners)
        for name in order[k % len(order) :] + order[: k % len(order)]:
            time.sleep(_PAUSE_SECONDS)
            turns[name].append(_block(runners[name], counts[name]))
        k += 1
    return {name: Times(tuple(found)) for name, found in turns.items()}


def ratios(own: Times, other: Times) -> tuple[float, float, float]:
    """How many times as fast `own` is: median over the turns, and the quartiles around it."""
    each = [
        statistics.median(b) / statistics.median(a)
        for a, b in zip(own.turns, other.turns, strict=True)
    ]
    low, middle, high = (float(np.percentile(each, p)) for p in (25, 50, 75))
    return middle, low, high


def _count(run: Runner) -> int:
    """Calls per turn."""
    start = time.perf_counter()
    run()
    return max(1, int(_BLOCK_SECONDS / (time.perf_counter() - start)))


def _block(run: Runner, count: int) -> tuple[float, ...]:
    for _ in range(max(1, count // 10)):  # warm-up
        run()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return tuple(times)


# ---- other runtimes ------------------------------------------------------------------------------
def peer(name: str, path: str, threads: int) -> Prepare:
    """Another runtime with a model loaded: inputs -> runner. Raises MinicompilerError."""
    if name not in PEERS:
        raise MinicompilerError(f"unknown runtime {name}", hint=f"known: {', '.join(PEERS)}")
    build, packages = PEERS[name]
    try:
        modules = [importlib.import_module(package) for package in packages]
    except ImportError as error:
        raise MinicompilerError(
            f"{' and '.join(packages)} must be installed to run the model with {name}: {error}",
            hint=f"pip install {' '.join(packages)}",
        ) from None
    try:
        return build(path, threads, *modules)
    except Exception as error:  # a foreign package raises what it likes
        raise MinicompilerError(f"{name} cannot load {path}: {error}") from error


def _onnxruntime(path: str, threads: int, ort: Any) -> Prepare:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, ["CPUExecutionProvider"])
    return lambda feeds: lambda: session.run(None, dict(feeds))


def _openvino(path: str, threads: int, openvino: Any) -> Prepare:
    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }  # fmt: skip
    request = core.compile_model(path, "CPU", settings).create_infer_request()

    def prepare(feeds: Mapping[str, np.ndarray]) -> Runner:
        def run() -> list[np.ndarray]:
            found = request.infer(dict(feeds), share_inputs=True, share_outputs=True)
            return [found[k] for k in range(len(found))]

        return run

    return prepare


def _torch(path: str, threads: int, torch: Any, onnx2torch: Any) -> Prepare:
    import onnx

    names = [i.name for i in onnx.load(path, load_external_data=False).graph.input]
    network = onnx2torch.convert(path).eval()

    def prepare(feeds: Mapping[str, np.ndarray]) -> Runner:
        tensors = [torch.from_numpy(feeds[n]) for n in names if n in feeds]

        def run() -> list[np.ndarray]:
            torch.set_num_threads(threads)
            with torch.inference_mode():
                found = network(*tensors)
            return [t.numpy() for t in (found if isinstance(found, tuple | list) else [found])]

        return run

    return prepare


# name -> (how to load a model, the packages of that name that pip installs)
PEERS: dict[str, tuple[Callable[..., Prepare], tuple[str, ...]]] = {
    "onnxruntime": (_onnxruntime, ("onnxruntime",)),
    "openvino": (_openvino, ("openvino",)),
    "torch": (_torch, ("torch", "onnx2torch")),
}
