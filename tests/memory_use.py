"""How much memory compiling a model takes, measured in a process of its own (Linux).

    python tests/memory_use.py bert.onnx        one line per model

weights, peak, resident, baseline, arena in bytes. peak: the most this process held until the end
of `compile`, interpreter and imports included. resident: what it holds afterwards; baseline: what
it held after a tiny model had been compiled.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PEAK, PEAK_SLACK, RESIDENT = 2.2, 300 << 20, 1.3


def measured(path: str) -> dict[str, int]:
    """The numbers of one model. Raises CalledProcessError when it cannot be compiled."""
    command = [sys.executable, __file__, "--child", path]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


def limits(use: dict[str, int]) -> tuple[float, float]:
    """The most that `peak` and `resident - baseline` may be."""
    return PEAK * use["weights"] + PEAK_SLACK, RESIDENT * use["weights"] + use["arena"]


def _child(path: str) -> dict[str, int]:
    import numpy as np

    import minicompiler as mc
    from minicompiler.frontend.builder import Builder
    from minicompiler.frontend.onnx import load
    from minicompiler.ir.graph import Constant, topological

    net = Builder("tiny")
    tiny = mc.compile(net.function(y=net.matmul(net.input("x", (4, 4)), np.eye(4, dtype="f4"))))
    tiny(np.eye(4, dtype="f4"))
    baseline = _status("VmRSS")
    module = mc.compile(path, record=False)
    gc.collect()
    # What was freed goes back to the system, so that only what is held counts.
    ctypes.CDLL(None).malloc_trim(0)
    peak, resident = _status("VmHWM"), _status("VmRSS")
    constants: dict[int, Any] = {
        id(v.data): v.data for v in topological(load(path).results) if isinstance(v, Constant)
    }
    arena = module.plan.arena
    return {
        "weights": sum(a.nbytes for a in constants.values()),
        "peak": peak, "resident": resident, "baseline": baseline,
        "arena": arena if isinstance(arena, int) else 0,
    }  # fmt: skip


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise KeyError(name)


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        print(json.dumps(_child(sys.argv[2])))
    else:
        for name in sys.argv[1:]:
            use = measured(name)
            most = limits(use)
            mb = {k: round(v / 2**20) for k, v in use.items()}
            print(f"{Path(name).name}: weights {mb['weights']} MiB, peak {mb['peak']} "
                  f"(limit {most[0] / 2**20:.0f}), resident {mb['resident']} - "
                  f"{mb['baseline']} before (limit {most[1] / 2**20:.0f})")  # fmt: skip
