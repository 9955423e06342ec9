"""Fuzzing of model files and saved modules: every file gives a MinicompilerError or a right result.

    python tests/fuzz.py --count 100000 --seed 1 --folder findings      about 20 ms a file
    python tests/fuzz.py --folder findings --case 4711 --seed 1         one case again, in full

Files are damaged as tests/mutations.py says, read, compiled and run in child processes with a limit
of memory and time for each file. Anything else than a right result or a proper error is kept under
`--folder`: crashes, hangs, other exceptions, wrong numbers, files opened outside the model's folder
and the cache, and memory that grows. A crash loses one case: the next child goes on after it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import faulthandler
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mutations import mutated_model, mutated_module

BATCH = 1000  # cases of one child
SECONDS = 20  # of processor time for one case
IDLE = 3600  # seconds by the clock for a child: more means that it waits for something
ADDRESS_SPACE = 8 << 30
ELEMENTS = 1 << 22  # larger models are imported, but not run
OPERATIONS = 1 << 28  # of one run: about 2 seconds of the slowest kernels
GROWTH = 150 << 20  # bytes that a child may grow by between its first quarter and its end
MODULES = 0.05  # share of the cases that are saved modules
PACKAGES = tuple(p for p in map(os.path.realpath, sys.path) if p.endswith("site-packages"))
KEPT = 3  # files kept of each kind of finding


@dataclasses.dataclass(frozen=True)
class Finding:
    """A case that ended badly: `state` says how, `mark` groups findings with one cause."""

    case: int
    state: str
    mark: str
    message: str


# ---- seeds ---------------------------------------------------------------------------------------
def seed_models(backend: bool) -> list[bytes]:
    """The models to damage: three small networks and, if wanted, ONNX's own test models."""
    from onnx_models import attention, conv_net, mlp

    found = [m.SerializeToString() for m in (mlp("n"), conv_net("n"), attention(2, "s"), mlp(3))]
    if not backend:
        return found
    from backend_suite import data_sets, load_cases, model_of

    from minicompiler.frontend.onnx_known import needed_inputs, nested_inputs, with_values

    for case in load_cases(kinds=("node", "simple", "pytorch-operator", "pytorch-converted")):
        model = model_of(case)
        if model.ByteSize() > 1 << 14 or nested_inputs(model):
            continue
        inputs, _ = next(iter(data_sets(case, model)), ([], []))
        names = [v.name for v in model.graph.input]
        known = {n: a for n, a in zip(names, inputs, strict=False) if n in needed_inputs(model)}
        found.append(with_values(model, known).SerializeToString())
    return found


def seed_modules() -> list[bytes]:
    """Saved modules to damage."""
    import tempfile

    from onnx_models import conv_net, mlp

    import minicompiler as mc

    found = []
    with tempfile.TemporaryDirectory() as folder:
        for model in (mlp("n"), conv_net(1)):
            path = Path(folder, "m.mc")
            mc.compile(model, threads=1).save(path)
            found.append(path.read_bytes())
    return found


def write_seeds(folder: Path, backend: bool) -> None:
    """Keeps the seeds in files, so that every child damages the same ones."""
    folder.mkdir(parents=True)
    for kind, files in (("onnx", seed_models(backend)), ("mc", seed_modules())):
        for k, data in enumerate(files):
            (folder / f"{k:05}.{kind}").write_bytes(data)


def read_seeds(folder: Path) -> tuple[list[bytes], list[bytes]]:
    models, modules = (
        [path.read_bytes() for path in sorted(folder.glob(f"*.{kind}"))] for kind in ("onnx", "mc")
    )
    return models, modules


# ---- one case ------------------------------------------------------------------------------------
class Wrong(Exception):
    """A result that differs from the reference."""


def make_case(
    seed: int, case: int, models: list[bytes], modules: list[bytes]
) -> tuple[bytes, str, bool]:
    """The file of a case, its suffix, and whether it is a saved module with forged checksums."""
    rng = np.random.default_rng([seed, case])
    if rng.random() < MODULES:
        data, forged = mutated_module(rng, modules[int(rng.integers(0, len(modules)))])
        return data, ".mc", forged
    base = models[int(rng.integers(0, len(models)))]
    return mutated_model(rng, base, models), ".onnx", False


def try_model(path: Path) -> str:
    """Imports, compiles and runs a model; "right", or "large" where it was not run."""
    import minicompiler as mc
    from minicompiler.context import Context, Options
    from minicompiler.driver import build_module, import_model, optimise
    from minicompiler.inputs import random_inputs, sizes_for
    from minicompiler.ir.arith import evaluate_int
    from minicompiler.ir.graph import applies, function_dims
    from minicompiler.ir.verify import verify_function
    from minicompiler.limits import Limits
    from minicompiler.ops.evaluate import run_reference
    from minicompiler.target import Target

    limits = Limits(
        nodes=3000,
        fold_bytes=1 << 24,
        fold_operations=1 << 24,
        operations=OPERATIONS,
        seconds=SECONDS / 2,
    )
    target = Target.parse("cpu")
    checked = path.stat().st_size % 4 == 0  # slow, so not for all
    ctx = Context(target, Options(threads=1, record=False, limits=limits, checked=checked))
    fn = import_model(path, None, ctx)
    verify_function(fn)
    dims = {d.name: max(d.lo, 1) for d in function_dims(fn)}
    sizes = 0
    for v in [*fn.params, *applies(fn)]:
        for t in v.type if isinstance(v.type, tuple) else (v.type,):
            count = 1
            for s in t.shape:
                count *= evaluate_int(s, collections.defaultdict(lambda: 64, dims))
            sizes += count
    if sizes > ELEMENTS:
        return "large"
    module = build_module(optimise(fn, ctx), ctx)
    assert isinstance(module, mc.Module)
    feeds = random_inputs(module.plan, sizes_for(module.plan, {}), {})
    got = module.run(feeds)
    try:
        want = run_reference(fn, feeds)
    except IndexError:
        return "right"  # numpy refuses positions that compiled code moves into the tensor
    except MemoryError:
        return "large"  # numpy stores what compiled code never does, such as padding
    for name, a, b in zip(got, got.values(), want, strict=True):
        compare(name, a, np.asarray(b))
    return "right"


def compare(name: str, got: np.ndarray, want: np.ndarray) -> None:
    """Raises Wrong where two results differ by more than rounding can explain."""
    if got.shape != want.shape or got.dtype != want.dtype:
        raise Wrong(f"{name}: {got.dtype}{got.shape} for {want.dtype}{want.shape}")
    if got.dtype.kind not in "fc" or got.dtype.itemsize < 4:
        return  # quantised and 16-bit values may differ by a step
    with np.errstate(all="ignore"):
        finite = np.isfinite(want) & np.isfinite(got)
        scale = np.abs(want[finite]).max(initial=0)
        if scale > 1e30 or not finite.any():
            return  # overflow depends on the order of a sum
        error = np.abs(got[finite] - want[finite]).max(initial=0)
    if error > 1e-3 * max(scale, 1e-30):
        raise Wrong(f"{name}: error {error} at magnitude {scale}")


def try_module(path: Path, forged: bool) -> str:
    """Loads a saved module; runs it unless its header is forged: it then is another program."""
    import minicompiler as mc

    module = mc.load(path, threads=1)
    if not forged:
        raise Wrong("damage went unnoticed" if module else "")
    return "large"


def attempt(path: Path, forged: bool) -> tuple[str, str, str]:
    """(state, mark, message) of a file; good are right, large and errors that blame the model."""
    from minicompiler.errors import (
        CodegenError,
        InternalError,
        MinicompilerError,
        ScheduleError,
        VerifyError,
    )

    try:
        state = try_module(path, forged) if path.suffix == ".mc" else try_model(path)
        return state, "", ""
    except (InternalError, VerifyError, ScheduleError, CodegenError) as e:
        # Errors of the compiler, not of the model.
        return "internal", f"{type(e).__name__} {_place(e)}", str(e)
    except MinicompilerError as e:
        return type(e).__name__, "", ""
    except Wrong as e:
        return "wrong", "wrong", str(e)
    except Exception as e:
        return "raised", f"{type(e).__name__} {_place(e)}", traceback.format_exc()


def _place(error: BaseException) -> str:
    """The innermost function of the package that an exception passed through."""
    place, step = "", error.__traceback__
    while step is not None:
        if str(step.tb_frame.f_globals.get("__name__", "")).startswith("minicompiler."):
            code = step.tb_frame.f_code
            place = f"{Path(code.co_filename).name}:{code.co_name}"
        step = step.tb_next
    return place


# ---- a child process -----------------------------------------------------------------------------
_outside: set[str] = set()


def watch_files(allowed: list[Path]) -> None:
    """Notes every file that Python code opens outside the allowed folders."""
    roots = tuple(os.path.realpath(p) for p in allowed)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "subprocess.Popen", "os.system", "os.exec"):
            _outside.add(event)
        if event != "open" or not isinstance(args[0], str | bytes | os.PathLike):
            return
        path = os.path.realpath(os.fsdecode(args[0]))
        # Tracebacks read the sources of packages.
        places = (sys.prefix, sys.base_prefix, *PACKAGES, "/proc/", "/sys/", "/dev/null")
        system = path.startswith(places)
        if (system and not args[2] & writing) or path.startswith(roots):
            return
        _outside.add(path)

    sys.addaudithook(hook)


def child(folder: Path, seed: int, start: int, stop: int) -> None:
    """Runs the cases start .. stop - 1; states and findings go to stdout, one JSON a line."""
    models, modules = read_seeds(folder / "seeds")
    own = folder / f"child-{os.getpid()}"
    own.mkdir()
    import minicompiler.driver

    # A process that is stopped for a while is not slow: the limit counts processor time as well.
    minicompiler.limits.time = types.SimpleNamespace(monotonic=time.process_time)  # type: ignore[assignment]
    package = Path(minicompiler.driver.__file__).parent
    cache = Path(os.environ["MINICOMPILER_CACHE"])
    allowed = [own, cache, package, package.parent, folder / "position"]
    if sys.pycache_prefix is not None:
        allowed.append(Path(sys.pycache_prefix))
    watch_files(allowed)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    # Time of this process alone: a busy machine is no hang.
    faulthandler.register(signal.SIGPROF, chain=True)
    position = os.open(folder / "position", os.O_RDWR | os.O_CREAT)
    quarter = 0
    for case in range(start, stop):
        os.pwrite(position, b"%020d" % case, 0)
        if case == start + (stop - start) // 4:
            quarter = resident()
        data, suffix, forged = make_case(seed, case, models, modules)
        path = own / f"model{suffix}"
        path.unlink(missing_ok=True)  # a mapped file must not change
        path.write_bytes(data)
        _outside.clear()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        state, mark, message = attempt(path, forged)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps({"done": state}), flush=True)
        if _outside:
            tell(Finding(case, "access", "access", ", ".join(sorted(_outside))))
        if mark:
            tell(Finding(case, state, mark, message))
    grown = resident() - quarter if quarter else 0
    if grown > GROWTH:
        tell(Finding(start, "leak", "leak", f"{grown >> 20} MiB in cases {start} to {stop}"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(json.dumps({"memory": {"MiB grown, most": grown >> 20, "MiB peak": peak}}), flush=True)


def tell(finding: Finding) -> None:
    print(json.dumps(dataclasses.asdict(finding)), flush=True)


def resident() -> int:
    """Bytes of memory this process uses."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- the parent ----------------------------------------------------------------------------------
def findings_of(
    folder: Path, seed: int, start: int, stop: int, counts: collections.Counter[str]
) -> Iterator[Finding]:
    """Runs cases in children until all are done."""
    environment = {**os.environ, "MINICOMPILER_CACHE": str(folder / "cache")}
    while start < stop:
        end = min(start + BATCH, stop)
        command = [sys.executable, "-X", "faulthandler", __file__, "--child", f"{start}:{end}"]
        command += ["--folder", str(folder), "--seed", str(seed)]
        (folder / "position").write_bytes(b"%020d" % start)
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as done:
            try:
                text, errors = done.communicate(timeout=IDLE)
            except subprocess.TimeoutExpired:
                done.send_signal(signal.SIGPROF)  # as if its processor time was over
                text, errors = done.communicate()
        for old in folder.glob("child-*"):
            shutil.rmtree(old)
        for line in text.splitlines():
            record = json.loads(line)
            if "done" in record:
                counts[record["done"]] += 1
            elif "memory" in record:
                for name, size in record["memory"].items():
                    counts[name] = max(counts[name], size)
            else:
                yield Finding(**record)
        if done.returncode == 0:
            start = end
            continue
        at = int((folder / "position").read_bytes())
        hung = -done.returncode == signal.SIGPROF
        frames = [line for line in errors.splitlines() if "minicompiler" in line]
        mark = " ".join(frames[0].split()[-3:]) if frames else ""
        state = "hang" if hung else "crash"
        counts[state] += 1
        yield Finding(at, state, f"{state} {mark}", errors[-4000:])
        start = at + 1


def fuzz(folder: Path, seed: int, start: int, count: int, backend: bool = True) -> dict[str, Any]:
    """Runs `count` cases, keeps what was found in `folder`, returns the counts and findings."""
    if not (folder / "seeds").exists():
        write_seeds(folder / "seeds", backend)
    models, modules = read_seeds(folder / "seeds")
    counts: collections.Counter[str] = collections.Counter()
    marks: collections.Counter[str] = collections.Counter()
    found: list[Finding] = []
    begin = time.monotonic()
    for finding in findings_of(folder, seed, start, start + count, counts):
        found.append(finding)
        marks[finding.mark] += 1
        if marks[finding.mark] <= KEPT:
            data, suffix, _ = make_case(seed, finding.case, models, modules)
            stem = folder / f"{finding.state}-{seed}-{finding.case}"
            stem.with_suffix(suffix).write_bytes(data)
            stem.with_suffix(".txt").write_text(f"{finding.mark}\n{finding.message}\n")
            print(f"case {finding.case}: {finding.mark}", file=sys.stderr, flush=True)
    return {
        "cases": count,
        "seconds": round(time.monotonic() - begin, 1),
        "counts": dict(counts),
        "findings": dict(marks.most_common()),
    }


def again(folder: Path, seed: int, case: int) -> None:
    """One case in this process, with its traceback."""
    data, suffix, forged = make_case(seed, case, *read_seeds(folder / "seeds"))
    path = folder / f"again{suffix}"
    path.write_bytes(data)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    faulthandler.register(signal.SIGPROF, chain=True)
    if suffix == ".onnx":
        import onnx

        with contextlib.suppress(Exception):
            print(str(onnx.load(path, load_external_data=False))[:4000])
    print(*attempt(path, forged), sep="\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="seeds, cache and findings")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this case alone, in this process")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        start, stop = map(int, args.child.split(":"))
        child(args.folder, args.seed, start, stop)
        return 0
    if args.case is not None:
        again(args.folder, args.seed, args.case)
        return 0
    args.folder.mkdir(parents=True, exist_ok=True)
    report = fuzz(args.folder, args.seed, args.start, args.count)
    print(json.dumps(report, indent=2))
    return 1 if report["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
