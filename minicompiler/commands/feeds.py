"""The inputs of one call: files that the user named, random values for the rest.

feeds(out, opened, {"batch": 8}, {})      {"x": float32[8, 20]}, and a remark that it is random
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from minicompiler.errors import MinicompilerError
from minicompiler.inputs import Bounds, random_inputs, sizes_for, sizes_of
from minicompiler.report import Opened, Output


def single_sizes(opened: Opened, wanted: Mapping[str, Bounds]) -> dict[str, int]:
    """The wanted sizes of dimensions that the compiled model still has.

    Of an ONNX model, a dimension with one size is a constant by now. For a saved module every
    name is kept, so that a wrong one is refused later.
    """
    left = {d.name for d in opened.module.plan.dims} if opened.graph is not None else set(wanted)
    return {n: b for n, b in wanted.items() if isinstance(b, int) and n in left}


def feeds(
    out: Output, opened: Opened, wanted: Mapping[str, Bounds], given: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """All inputs of a call; says which ones are made up. Raises MinicompilerError."""
    plan = opened.module.plan
    unknown = [n for n in given if n not in {t.name for t in plan.inputs}]
    if unknown:
        names = ", ".join(t.name for t in plan.inputs)
        raise MinicompilerError(
            f"the model has no input {', '.join(unknown)}", hint=f"it has: {names}"
        )
    sizes = sizes_for(plan, single_sizes(opened, wanted) | sizes_of(plan, given))
    missing = [t.name for t in plan.inputs if t.name not in given]
    if missing:
        chosen = ", ".join(f"{n}={v}" for n, v in sizes.items())
        at = f" (with {chosen})" if chosen else ""
        out.remark(
            f"random values for {', '.join(missing)}{at}: floats in [-1, 1), integers 0 and 1"
        )
    return random_inputs(plan, sizes, given)
