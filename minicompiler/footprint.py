"""How much memory a process needs that loads a compiled model and calls it, and how much it takes.

    predict(module, {"batch": 8})                {"weights": 46_800_000, "arena": ..., ...}, bytes
    measure("resnet18.mc", threads=2, dims={})   resident bytes that one call adds

A prediction is made from the plan, before anything runs. Both leave out what Python, numpy and
LLVM take by themselves.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from minicompiler.errors import RunError
from minicompiler.inputs import random_inputs
from minicompiler.runtime.module import Module, load
from minicompiler.runtime.pages import HUGE_PAGE, has_huge_pages
from minicompiler.runtime.plan import Plan, Tensor, evaluate, nbytes, numpy_dtype

_STATUS = Path("/proc/self/status")
_CODE_COPIES = 3  # the file's pages, the object in memory, and the linked code


def named_sizes(plan: Plan, dims: Mapping[str, int]) -> dict[str, int]:
    """Every size that has a name; those that kernels count are at their largest."""
    names = dict(dims)
    for name, size in plan.named:
        names[name] = evaluate(size, names)
    return names | {c.dim: evaluate(c.most, names) for c in plan.counts}


def predict(module: Module, dims: Mapping[str, int]) -> dict[str, int]:
    """Bytes of each part of one call's memory. weights: as the kernels read them, packed; arena:
    intermediate values; workspace: what kernels use inside; pages: rounding up to huge pages."""
    plan = module.plan
    names = named_sizes(plan, dims)
    arena = evaluate(plan.arena, names)
    workspace = evaluate(plan.shared, names) + module.threads * evaluate(plan.local, names)
    held = arena + workspace
    huge = held >= HUGE_PAGE and has_huge_pages()
    objects = [*module._objects.values(), module._main_object]
    return {
        "weights": sum(c.nbytes for c in module._constants),
        "code": _CODE_COPIES * sum(map(len, objects)),
        "arena": arena,
        "workspace": workspace,
        "pages": -held % HUGE_PAGE if huge else 0,
        "inputs": sum(_bytes(t, names) for t in plan.inputs),
        "outputs": sum(_bytes(t, names) for t in plan.outputs),
    }


def _bytes(t: Tensor, names: Mapping[str, int]) -> int:
    return nbytes(tuple(evaluate(s, names) for s in t.shape), numpy_dtype(t.dtype))


# ---- measured ------------------------------------------------------------------------------------
def measure(path: str, threads: int, dims: Mapping[str, int]) -> int:
    """Bytes of resident memory that loading a saved module and calling it once add to a process.

    Raises RunError where the system does not tell (it needs /proc), or the child fails.
    """
    if not _STATUS.exists():
        raise RunError("this system does not tell how much memory a process has")
    arguments = json.dumps([path, threads, dict(dims)])
    command = [sys.executable, "-m", __name__, arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"the process that runs {path} failed", excerpt=done.stderr.strip()[-2000:])
    return int(done.stdout)


def _child(path: str, threads: int, dims: Mapping[str, int]) -> int:
    """What `measure` runs in a process of its own."""
    import numpy as np

    from minicompiler.runtime.entry import entry
    from minicompiler.runtime.pool import get_pool, region_address

    # What every module shares is there before: random numbers, the threads, LLVM and its linker.
    np.random.default_rng(0).uniform(size=8)
    with get_pool(threads).lease():
        pass
    entry(region_address())
    before = _resident()
    module = load(path, threads)
    arrays = random_inputs(module.plan, dims, {})
    results = module.run(arrays)
    after = _resident()
    del results
    return after - before


def _resident() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise RunError(f"{_STATUS} does not say how much memory is resident")


if __name__ == "__main__":
    print(_child(*json.loads(sys.argv[1])))
