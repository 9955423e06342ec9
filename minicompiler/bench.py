"""Time a model, and other runtimes on the same model, so that the ratio means something.

    runners = {"minicompiler": lambda: m(x), "onnxruntime": peer("onnxruntime", path, 2)(feeds)}
    compare(runners, seconds=3.0)        {"minicompiler": Times(...), "onnxruntime": Times(...)}

The runners take turns in short blocks, so that whatever else the machine does meets all of them;
each block begins with calls that are not counted. The ratio is taken per turn. Several runners
under one name are concurrent callers, each in a thread of its own.
"""

from __future__ import annotations

import importlib
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minicompiler.errors import MinicompilerError

Runner = Callable[[], Sequence[np.ndarray]]
Prepare = Callable[[Mapping[str, np.ndarray]], Runner]  # inputs -> what runs the model on them
_BLOCK_SECONDS = 0.05  # of counted calls per turn
_MIN_TURNS = 5
_SLOWER = 0.95  # ratio below which another runtime counts as faster
_NOISY = 2.0  # p99 by median above which a measurement counts as disturbed
_PAUSE_SECONDS = 0.05  # other runtimes' threads spin for a while after a call


@dataclass(frozen=True)
class Times:
    """Seconds of the counted calls, turn by turn. walls: how long the calls of each turn took
    together, which is less than their sum where callers run at the same time (default: their sum).
    """

    turns: tuple[tuple[float, ...], ...]
    walls: tuple[float, ...] = ()

    @property
    def calls(self) -> list[float]:
        return [t for turn in self.turns for t in turn]

    def summary(self) -> dict[str, float]:
        """Seconds: mean, median, p90, p99, best; calls per second; number of calls."""
        calls = self.calls
        p50, p90, p99 = (float(np.percentile(calls, p)) for p in (50, 90, 99))
        wall = sum(self.walls) if self.walls else sum(calls)
        return {
            "mean": statistics.fmean(calls), "median": p50, "p90": p90, "p99": p99,
            "best": min(calls), "calls_per_second": len(calls) / wall, "calls": len(calls),
        }  # fmt: skip

    def paces(self) -> list[float]:
        """Per turn, the seconds that count for a ratio: the median call of a single caller, the
        time of all calls by their number where there are several."""
        if not self.walls:
            return [statistics.median(turn) for turn in self.turns]
        return [wall / len(turn) for wall, turn in zip(self.walls, self.turns, strict=True)]


def compare(
    runners: Mapping[str, Runner | Sequence[Runner]], seconds: float, back_to_back: bool = False
) -> dict[str, Times]:
    """Times all runners in turn, each for about `seconds` in all. back_to_back: a turn is one call,
    without pause or warm-up, while threads of the call before may still be busy."""
    callers = {name: [r] if callable(r) else list(r) for name, r in runners.items()}
    for together in callers.values():  # the first call may start threads and allocate
        for run in together:
            run()
    turns: dict[str, list[tuple[float, ...]]] = {name: [] for name in runners}
    walls: dict[str, list[float]] = {name: [] for name in runners}
    counts = {
        name: 1 if back_to_back else _count(together[0]) for name, together in callers.items()
    }
    started = time.perf_counter()
    budget = seconds * len(runners)
    k = 0
    while k < _MIN_TURNS or time.perf_counter() - started < budget:
        # The order changes, so that nobody always follows the same neighbour.
        order = list(runners)
        for name in order[k % len(order) :] + order[: k % len(order)]:
            if not back_to_back:
                time.sleep(_PAUSE_SECONDS)
            warm_up = 0 if back_to_back else max(1, counts[name] // 10)
            if len(callers[name]) == 1:
                turns[name].append(_block(callers[name][0], counts[name], warm_up))
            else:
                times, wall = _together(callers[name], counts[name], warm_up)
                turns[name].append(times)
                walls[name].append(wall)
        k += 1
    return {name: Times(tuple(turns[name]), tuple(walls[name])) for name in runners}


def ratios(own: Times, other: Times) -> tuple[float, float, float]:
    """How many times as fast `own` is: median over the turns, and the quartiles around it."""
    each = [b / a for a, b in zip(own.paces(), other.paces(), strict=True)]
    low, middle, high = (float(np.percentile(each, p)) for p in (25, 50, 75))
    return middle, low, high


def _count(run: Runner) -> int:
    """Calls per turn. The first calls after a pause are slower than the rest."""
    times: list[float] = []
    while sum(times) < _BLOCK_SECONDS / 5:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return max(1, int(_BLOCK_SECONDS / statistics.median(times)))


def _block(run: Runner, count: int, warm_up: int) -> tuple[float, ...]:
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return tuple(times)


def _together(
    runners: Sequence[Runner], count: int, warm_up: int
) -> tuple[tuple[float, ...], float]:
    """A block of each runner, all at the same time: seconds of all calls, and from the first to the
    last."""
    ready = threading.Barrier(len(runners))

    def block(run: Runner) -> list[tuple[float, float]]:
        for _ in range(warm_up):
            run()
        ready.wait()
        spans = []
        for _ in range(count):
            start = time.perf_counter()
            run()
            spans.append((start, time.perf_counter()))
        return spans

    with ThreadPoolExecutor(len(runners)) as pool:
        spans = [span for found in pool.map(block, runners) for span in found]
    wall = max(end for _, end in spans) - min(start for start, _ in spans)
    return tuple(end - start for start, end in spans), wall


# ---- what to try next ----------------------------------------------------------------------------
@dataclass(frozen=True)
class Measured:
    """One setting and its result. dims: sizes that were asked for; open_dims: dimensions that could
    be fixed; ratios: how many times as fast minicompiler is as each other runtime."""

    threads: int
    dims: Mapping[str, int]
    open_dims: Sequence[str]
    summary: Mapping[str, float]
    ratios: Mapping[str, float]


def hint(results: Sequence[Measured], cores: int, streams: int, model: str) -> str:
    """One line that says what is worth trying next, from what was measured."""
    for r in results:
        for name, ratio in r.ratios.items():
            if ratio < _SLOWER:
                return (
                    f"{name} is {1 / ratio:.2f} times as fast on {_threads(r.threads)}: "
                    f"`minicompiler profile {model} --threads {r.threads}` shows where it is slow"
                )
    noisy = next((r for r in results if r.summary["p99"] > _NOISY * r.summary["median"]), None)
    if noisy is not None:
        times = noisy.summary["p99"] / noisy.summary["median"]
        return (
            f"p99 is {times:.1f} times the median on {_threads(noisy.threads)}: other programs "
            "disturb, so stop them, use fewer --threads, or measure longer with --seconds 10"
        )
    tried = sorted({r.threads for r in results})
    if len(tried) > 1:
        same = [r for r in results if r.dims == results[0].dims]
        best = max(same, key=lambda r: r.summary["calls_per_second"])
        if best.threads < tried[-1]:
            more = f"; --streams {cores} --threads 1 runs several calls at once"
            return (
                f"--threads {best.threads} is best, more do not pay at this size"
                f"{more if streams == 1 else ''}"
            )
    elif tried[0] < cores:
        return f"this machine has {cores} cores: --threads {tried[0]},{cores} compares"
    loose = next((r for r in results if r.open_dims), None)
    if loose is not None and len(results) == len(tried):
        sizes = ",".join(f"{n}={loose.dims.get(n, 1)}" for n in loose.open_dims)
        return (
            f"compiled for every size of {', '.join(loose.open_dims)}: with a fixed size "
            f"(--dims {sizes}) kernels may be faster, with several (batch=1,8) they are compared"
        )
    if streams == 1 and cores > 1:
        return (
            f"for throughput rather than latency, try --streams {cores} --threads 1; "
            f"`minicompiler profile {model}` shows where the time goes"
        )
    return f"`minicompiler profile {model}` shows where the time goes"


def _threads(n: int) -> str:
    return f"{n} thread{'s' if n > 1 else ''}"


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
        prepare = build(path, threads, *modules)
    except MinicompilerError:
        raise
    except Exception as error:  # a foreign package raises what it likes
        lower = "set model.ir_version to a version that it supports, and save the model again"
        raise MinicompilerError(
            f"{name} cannot load {path}: {error}", hint=lower if "IR version" in str(error) else ""
        ) from error

    def checked(feeds: Mapping[str, np.ndarray]) -> Runner:
        try:
            run = prepare(feeds)
            run()
        except Exception as error:  # as above
            raise MinicompilerError(f"{name} cannot run {path}: {error}") from error
        return run

    return checked


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
    compiled = core.compile_model(path, "CPU", settings)

    def prepare(feeds: Mapping[str, np.ndarray]) -> Runner:
        request = compiled.create_infer_request()  # serves one caller at a time

        def run() -> list[np.ndarray]:
            found = request.infer(dict(feeds), share_inputs=True, share_outputs=True)
            return [found[k] for k in range(len(found))]

        return run

    return prepare


def _torch(path: str, threads: int, torch: Any) -> Prepare:
    """torch.compile of the program MODEL.pt2 beside MODEL.onnx (what `torch.export.save` wrote of
    the module that the file was exported from), or else of what onnx2torch makes of the file."""
    import onnx

    names = [i.name for i in onnx.load(path, load_external_data=False).graph.input]
    program = Path(path).with_suffix(".pt2")
    if program.exists():
        exported = torch.export.load(program)
        # The exported call: a graph file knows no lists or keywords, only its flat inputs.
        structure = exported.call_spec.in_spec
        network = exported.module()
    else:
        structure = None
        network = _converted(path)
    compiled = torch.compile(network)

    def prepare(feeds: Mapping[str, np.ndarray]) -> Runner:
        import torch._inductor.config as settings
        from torch.utils import _pytree as pytree

        settings.freezing = True  # weights are constants, as they are to the others
        tensors = [torch.from_numpy(feeds[n]) for n in names if n in feeds]
        args, kwargs = pytree.tree_unflatten(tensors, structure) if structure else (tensors, {})

        def run() -> list[np.ndarray]:
            torch.set_num_threads(threads)
            with torch.inference_mode():
                found = pytree.tree_leaves(compiled(*args, **kwargs))
            return [t.numpy() for t in found]

        return run

    return prepare


def _converted(path: str) -> Any:
    try:
        onnx2torch = importlib.import_module("onnx2torch")
    except ImportError:
        raise MinicompilerError(
            f"onnx2torch must be installed to run {path} with torch",
            hint="pip install onnx2torch, or write the module that the file was exported from "
            f"with torch.export.save to {Path(path).with_suffix('.pt2').name} beside it",
        ) from None
    return onnx2torch.convert(path).eval()


# name -> (how to load a model, the packages of that name that pip installs)
PEERS: dict[str, tuple[Callable[..., Prepare], tuple[str, ...]]] = {
    "onnxruntime": (_onnxruntime, ("onnxruntime",)),
    "openvino": (_openvino, ("openvino",)),
    "torch": (_torch, ("torch",)),
}
