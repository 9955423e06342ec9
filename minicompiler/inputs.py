"""What a user of the command line says about sizes and inputs.

parse_dims("batch=1..64,sequence=8..512:8")   {"batch": [(1, 64)], "sequence": [(8, 512, 8)]}
parse_dims("batch=1,8")                       {"batch": [1, 8]}
sizes_for(plan, {"batch": 8})                 a legal value for every dimension of a plan
random_inputs(plan, sizes, {})                arrays of these sizes, the same ones each time
"""

from __future__ import annotations

import itertools
import math
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minicompiler.errors import MinicompilerError, RunError
from minicompiler.runtime.plan import ROOM, Plan, evaluate, numpy_dtype

Bounds = int | tuple[int, int | None] | tuple[int, int | None, int]
_RANGE = re.compile(r"(\d+)(?:(\.\.)(\d*)(?::(\d+))?)?")
_SYNTAX = "write name=8, name=1..64, name=1.. or name=8..512:8 (multiples of 8), joined by commas"
SEED = 0


# ---- dimensions ----------------------------------------------------------------------------------
def parse_dims(texts: Sequence[str]) -> dict[str, list[Bounds]]:
    """The values given to each dimension, in order. Raises MinicompilerError for another syntax."""
    found: dict[str, list[Bounds]] = {}
    name = ""
    for part in ",".join(texts).split(",") if texts else []:
        before, equals, after = part.partition("=")
        if equals:
            name = before.strip()
            found[name] = []
        match = _RANGE.fullmatch((after if equals else part).strip())
        if match is None or not name:
            raise MinicompilerError(f'--dims: "{part}" is not understood', hint=_SYNTAX)
        lo, dots, hi, step = match.groups()
        if not dots:
            found[name].append(int(lo))
            continue
        top = int(hi) if hi else None
        if top is not None and top < int(lo):
            raise MinicompilerError(f"--dims: {name} from {lo} to {top} is empty", hint=_SYNTAX)
        found[name].append((int(lo), top, int(step)) if step else (int(lo), top))
    return found


def single(dims: Mapping[str, Sequence[Bounds]]) -> dict[str, Bounds]:
    """One value or range per dimension. Raises MinicompilerError where there are several."""
    for name, values in dims.items():
        if len(values) > 1:
            raise MinicompilerError(f"--dims: several values of {name} are for bench only")
    return {name: values[0] for name, values in dims.items()}


def cases(
    dims: Mapping[str, Sequence[Bounds]], fixed: bool
) -> tuple[dict[str, Bounds], list[dict[str, int]]]:
    """The bounds to compile for, and the sizes to look at: every combination of the given ones.

    {"batch": [1, 8]} gives {"batch": (1, 8)} and [{"batch": 1}, {"batch": 8}]; fixed: a compiled
    model, whose bounds are what they are.
    """
    bounds: dict[str, Bounds] = {}
    choices: dict[str, list[int]] = {}
    for name, values in dims.items():
        numbers = [v for v in values if isinstance(v, int)]
        ranges = [v for v in values if not isinstance(v, int)]
        if not fixed or ranges:
            several = (min(numbers), max(numbers)) if len(numbers) > 1 else None
            bounds[name] = ranges[0] if ranges else several or numbers[0]
        if numbers:
            choices[name] = numbers
    combinations = itertools.product(*choices.values())
    return bounds, [dict(zip(choices, c, strict=True)) for c in combinations]


def sizes_for(plan: Plan, wanted: Mapping[str, int]) -> dict[str, int]:
    """A legal value for every dimension: the wanted one, else the smallest."""
    unknown = [n for n in wanted if n not in {d.name for d in plan.dims}]
    if unknown:
        names = ", ".join(d.name for d in plan.dims) or "none"
        raise RunError(f"the model has no dimension {', '.join(unknown)}; it has: {names}")
    return {
        d.name: wanted.get(d.name, -(-d.lo // d.multiple_of) * d.multiple_of) for d in plan.dims
    }


# ---- arrays --------------------------------------------------------------------------------------
def read_inputs(pairs: Sequence[str], archive: str | None) -> dict[str, np.ndarray]:
    """Arrays of `--input name=file.npy` and `--inputs file.npz`. Raises MinicompilerError."""
    found: dict[str, np.ndarray] = {}
    if archive is not None:
        data = _numpy_file(archive)
        if not isinstance(data, np.lib.npyio.NpzFile):
            raise MinicompilerError(f"--inputs {archive} is a single array, not an .npz archive",
                                    hint="--input name=file.npy gives one array")  # fmt: skip
        found.update(data)
    for pair in pairs:
        name, equals, file = pair.partition("=")
        if not equals:
            raise MinicompilerError(f'--input "{pair}" is not understood', hint="--input x=x.npy")
        array = _numpy_file(file)
        if not isinstance(array, np.ndarray):
            raise MinicompilerError(f"--input {file} is an archive", hint=f"--inputs {file}")
        found[name] = array
    return found


def _numpy_file(path: str) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        known = isinstance(error, OSError) and error.strerror
        reason = known or "it is no .npy or .npz file of plain numbers, or is cut off"
        raise MinicompilerError(f"{path} cannot be read as numpy data: {reason}") from None


def sizes_of(plan: Plan, given: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The dimensions that given arrays decide."""
    found = {}
    for b in plan.binds:
        array = given.get(plan.inputs[b.input].name)
        if b.axis == ROOM:
            found[b.dim] = 0
        elif array is not None and b.axis < array.ndim:
            found[b.dim] = int(array.shape[b.axis])
    return found


def random_inputs(
    plan: Plan, sizes: Mapping[str, int], given: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """All inputs: the given ones, and random ones: floats in [-1, 1), integers 0 and 1."""
    rng = np.random.default_rng(SEED)
    names = dict(sizes)
    for name, size in plan.named:
        names[name] = evaluate(size, names)
    made = {}
    for t in plan.inputs:
        dtype = numpy_dtype(t.dtype)
        shape = tuple(evaluate(s, names) for s in t.shape)
        if t.name in given:
            made[t.name] = given[t.name]
        else:
            made[t.name] = random_array(rng, dtype, shape)
    return made


def random_array(
    rng: np.random.Generator, dtype: np.dtype[Any], shape: Sequence[int]
) -> np.ndarray:
    """Floats in [-1, 1); integers 0 and 1, because they are mostly indices and masks.

    Raises RunError for a size that no memory holds.
    """
    if math.prod(shape) * 8 > sys.maxsize:
        text = ", ".join(map(str, shape))
        raise RunError(
            f"there is no memory for a random input [{text}]", hint="choose smaller sizes: --dims"
        )
    if dtype.kind in "biu":
        return rng.integers(0, 2, shape).astype(dtype)
    return rng.uniform(-1, 1, shape).astype(dtype)


# ---- comparison ----------------------------------------------------------------------------------
def difference(got: np.ndarray, want: np.ndarray) -> float:
    """max |error| / max |reference|; infinity where shape, dtype kind or special values differ."""
    want = np.asarray(want)
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    if got.size == 0:
        return 0.0
    if got.dtype.kind in "biu":
        return 0.0 if np.array_equal(got, want) else float("inf")
    a, b = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    if not finite.any():
        return 0.0
    error = float(np.abs(a[finite] - b[finite]).max())
    largest = float(np.abs(b[finite]).max())
    if not np.isfinite(error):
        return float("inf")
    return error / largest if largest else error


def suffix_of(path: str) -> str:
    """`.mc` or `.onnx`; anything else is taken for ONNX, whose reader says what is wrong."""
    return ".mc" if Path(path).suffix == ".mc" else ".onnx"
