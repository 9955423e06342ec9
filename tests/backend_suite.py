"""onnx's backend test suite on minicompiler, in processes that may crash or hang without harm.

    python tests/backend_suite.py --json out.json            all cases
    python tests/backend_suite.py --filter resize --verbose  names that hold "resize"

Each case ends as passed, refused (a clean error for what is not supported), failed (wrong result
or an unexpected error), crashed or timeout. The command prints counts by category, then the
operators of the cases that did not pass.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import glob
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

KINDS = ("node", "simple", "pytorch-operator", "pytorch-converted", "real")
STATES = ("passed", "failed", "refused", "crashed", "timeout")


@dataclasses.dataclass
class Outcome:
    """How one case ended."""

    name: str
    kind: str
    ops: list[str]
    state: str
    message: str = ""
    seconds: float = 0.0


# ---- cases --------------------------------------------------------------------------------------
def load_cases(pattern: str = "", kinds: Sequence[str] = KINDS) -> list[Any]:
    """The cases whose name matches, sorted by kind and name."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = [c for kind in kinds for c in load_model_tests(kind=kind)]
    cases = [c for c in cases if re.search(pattern, c.name)]
    return sorted(cases, key=lambda c: (KINDS.index(c.kind), c.name))


def model_of(case: Any) -> onnx.ModelProto:
    """The model of a case; those of kind "real" come with the package onnx."""
    if case.model is not None:
        return case.model
    return onnx.load(_model_path(case))


def _model_path(case: Any) -> str:
    if case.model_dir is not None:
        return os.path.join(case.model_dir, "model.onnx")
    top = os.path.dirname(os.path.dirname(os.path.abspath(onnx.__file__)))
    return os.path.join(top, *case.url.split("/"))


def data_sets(case: Any, model: onnx.ModelProto) -> Iterator[tuple[list[Any], list[Any]]]:
    """(inputs, expected outputs) of a case."""
    if case.data_sets is not None:
        for inputs, outputs in case.data_sets:
            yield [_array(a) for a in inputs], [_array(a) for a in outputs]
    elif case.model_dir is not None:
        for folder in sorted(glob.glob(os.path.join(case.model_dir, "test_data_set*"))):
            yield (
                _stored(folder, "input", model.graph.input),
                _stored(folder, "output", model.graph.output),
            )
    else:
        fixed = {t.name for t in model.graph.initializer}
        inputs = [_dummy(v) for v in model.graph.input if v.name not in fixed]
        stem = os.path.splitext(_model_path(case))[0]
        yield inputs, [_tensor(f"{stem}_output_{k}.pb") for k in range(len(model.graph.output))]


def _array(a: Any) -> Any:
    return numpy_helper.to_array(a) if isinstance(a, onnx.TensorProto) else a


def _tensor(path: str) -> np.ndarray:
    with open(path, "rb") as f:
        return numpy_helper.to_array(onnx.TensorProto.FromString(f.read()))


def _stored(folder: str, prefix: str, infos: Any) -> list[Any]:
    found: list[Any] = []
    for k in range(len(glob.glob(os.path.join(folder, f"{prefix}_*.pb")))):
        path = os.path.join(folder, f"{prefix}_{k}.pb")
        if infos[k].type.HasField("sequence_type"):
            with open(path, "rb") as f:
                found.append(numpy_helper.to_list(onnx.SequenceProto.FromString(f.read())))
        else:
            found.append(_tensor(path))
    return found


def _dummy(v: onnx.ValueInfoProto) -> np.ndarray:
    """What onnx's own runner feeds to the models of kind "real"."""
    dims = v.type.tensor_type.shape.dim
    shape = tuple(d.dim_value if d.HasField("dim_value") else 1 for d in dims)
    n = int(np.prod(shape))
    return (np.arange(n).reshape(shape) / n).astype(np.float32)


def operators(model: onnx.ModelProto) -> list[str]:
    """The distinct operators of a model, those of subgraphs included."""
    found: dict[str, None] = {}
    stack = list(model.graph.node)
    while stack:
        n = stack.pop()
        found[f"{n.domain}.{n.op_type}" if n.domain else n.op_type] = None
        for a in n.attribute:
            for g in (a.g, *a.graphs):
                stack.extend(g.node)
    return list(found)


# ---- one case -----------------------------------------------------------------------------------
def run_case(case: Any) -> Outcome:
    """Compiles and runs one case in this process."""
    from minicompiler.errors import CodegenError, InternalError, MinicompilerError, ScheduleError
    from minicompiler.frontend.onnx_backend import Backend

    start = time.perf_counter()
    made = Outcome(case.name, case.kind, [], "passed")
    try:
        model = model_of(case)
        made.ops = operators(model)
        rep = Backend.prepare(model, record=False)
        for inputs, wanted in data_sets(case, model):
            _compare(rep.run(inputs), wanted, case.rtol, case.atol)
    except (InternalError, CodegenError, ScheduleError) as e:
        made.state, made.message = "failed", _message(e)
    except MinicompilerError as e:
        made.state, made.message = "refused", _message(e)
    except Exception as e:  # the suite reports whatever a case raises
        made.state, made.message = "failed", _message(e)
    made.seconds = round(time.perf_counter() - start, 2)
    return made


def _message(e: BaseException) -> str:
    return f"{type(e).__name__}: {e}"[:600]


def _compare(got: Sequence[Any], wanted: Sequence[Any], rtol: float, atol: float) -> None:
    """The comparison of onnx's own runner."""
    assert len(got) == len(wanted), f"{len(got)} results, expected {len(wanted)}"
    for k, (a, b) in enumerate(zip(got, wanted, strict=True)):
        if isinstance(b, list):
            _compare(a, b, rtol, atol)
            continue
        assert a.shape == b.shape, f"output {k} has shape {a.shape}, expected {b.shape}"
        assert a.dtype == b.dtype, f"output {k} has dtype {a.dtype}, expected {b.dtype}"
        if b.dtype == object:
            np.testing.assert_array_equal(a, b)
            continue
        allowed = rtol
        if a.dtype.name == "bfloat16":
            allowed = max(rtol, 2**-6)
            a, b = a.astype(np.float32), b.astype(np.float32)
        np.testing.assert_allclose(a, b, rtol=allowed, atol=atol)


# ---- processes ----------------------------------------------------------------------------------
def _worker(cases: Sequence[Any], out: Connection) -> None:
    # What kernels or LLVM print does not belong into the report.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    warnings.simplefilter("ignore")
    for case in cases:
        out.send(("start", case.name))
        out.send(("done", run_case(case)))
    out.close()


def run_chunk(cases: Sequence[Any], timeout: float) -> Iterator[Outcome]:
    """The outcomes of some cases, run in a process that is replaced when it dies or hangs."""
    context = multiprocessing.get_context("fork")
    rest = list(cases)
    while rest:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_worker, args=(rest, theirs), daemon=True)
        process.start()
        theirs.close()
        while rest:
            limit = timeout * (10 if rest[0].kind == "real" else 1)
            try:
                if not ours.poll(limit):
                    state = "timeout"
                    break
                what, value = ours.recv()
            except EOFError:
                state = "crashed"
                break
            if what == "done":
                rest.pop(0)
                yield value
        else:
            process.join()
            return
        process.kill()
        process.join()
        case = rest.pop(0)
        message = f"exit code {process.exitcode}" if state == "crashed" else f"over {limit} s"
        yield Outcome(case.name, case.kind, operators(model_of(case)), state, message)


def run_suite(cases: Sequence[Any], chunk: int, timeout: float, jobs: int) -> Iterator[Outcome]:
    """The outcomes of all cases, in chunks of `chunk` cases per process."""
    from concurrent.futures import ThreadPoolExecutor

    chunks = [cases[k : k + chunk] for k in range(0, len(cases), chunk)]
    with ThreadPoolExecutor(jobs) as pool:
        for done in pool.map(lambda c: list(run_chunk(c, timeout)), chunks):
            yield from done


# ---- report -------------------------------------------------------------------------------------
def report(outcomes: Sequence[Outcome], verbose: bool) -> str:
    """Counts by category, and the operators of the cases that did not pass."""
    lines = [f"{'category':18}" + "".join(f"{s:>9}" for s in (*STATES, "total"))]
    for kind in (*KINDS, "all"):
        own = [o for o in outcomes if kind in (o.kind, "all")]
        if own:
            counts = collections.Counter(o.state for o in own)
            numbers = [*(counts[s] for s in STATES), len(own)]
            lines.append(f"{kind:18}" + "".join(f"{n:9}" for n in numbers))
    for state in STATES[1:]:
        blamed = collections.Counter(" ".join(o.ops[:3]) for o in outcomes if o.state == state)
        if blamed:
            listed = ", ".join(f"{op} {n}" for op, n in blamed.most_common())
            lines.append(f"{state}: {listed}")
    if verbose:
        lines += [
            f"{o.state:8} {o.name} ({o.seconds} s): {' '.join(o.message.split())[:240]}"
            for o in outcomes
            if o.state != "passed"
        ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="onnx's backend test suite on minicompiler")
    parser.add_argument("--chunk", type=int, default=200, help="cases per process")
    parser.add_argument("--filter", default="", help="a regular expression for names")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only these kinds")
    parser.add_argument("--json", help="file for the outcomes")
    parser.add_argument("--timeout", type=float, default=20, help="seconds per case")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--verbose", action="store_true", help="a line per case not passed")
    args = parser.parse_args()
    os.environ.setdefault("MINICOMPILER_THREADS", "1")
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("MINICOMPILER_CACHE", cache)
        cases = load_cases(args.filter, args.kind or KINDS)
        outcomes = list(run_suite(cases, args.chunk, args.timeout, args.jobs))
    print(report(outcomes, args.verbose))
    if args.json:
        with open(args.json, "w") as f:
            json.dump([dataclasses.asdict(o) for o in outcomes], f, indent=1)
    return 0 if all(o.state not in ("crashed", "timeout") for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
