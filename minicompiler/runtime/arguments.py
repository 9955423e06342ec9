"""What a caller gives: Python values, DLPack tensors and arrays, as the arrays that a call needs.

as_input([1, 2], int64, t)                  array([1, 2])
check_out(t, y, (2, 3), float32)            RunError where y has another shape, or is read-only
check_names("input", ["x"], {"X": x}, ...)  RunError: the model has no input "X"; did you mean 'x'?
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minicompiler.errors import RunError
from minicompiler.runtime.plan import Tensor
from minicompiler.runtime.shapes import shape_text


def as_input(value: Any, dtype: np.dtype[Any], t: Tensor) -> np.ndarray:
    """An argument as a contiguous array in native byte order, copied only if it is not one."""
    if type(value) is np.ndarray and value.dtype is dtype and value.flags.c_contiguous:
        return value
    return np.asarray(as_array(value, dtype, t), order="C")


def as_array(value: Any, dtype: np.dtype[Any], t: Tensor) -> np.ndarray:
    """An argument as an array in native byte order, with any strides."""
    if isinstance(value, bool | int | float | list | tuple):
        return _from_numbers(value, dtype, t)
    if isinstance(value, np.ndarray) or not hasattr(value, "__dlpack__"):
        array = np.asarray(value)
    else:
        try:
            array = np.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise RunError(
                f'input "{t.name}": {type(value).__name__} cannot be read as an array: {error}',
                hint="give a numpy array, or a tensor in CPU memory of a dtype that numpy has",
            ) from error
    if array.dtype.kind not in "biufcV":
        raise RunError(
            f'input "{t.name}" is {type(value).__name__}, no numbers: expected {t}',
            hint="give a numpy array; numpy.load reads one from a file",
        )
    if array.dtype.newbyteorder("=") != dtype:
        raise RunError(
            f'input "{t.name}" has dtype {array.dtype}, expected {dtype}: {t}',
            hint=f'convert it: {t.name}.astype("{dtype}")' if t.name.isidentifier() else "",
        )
    return np.asarray(array, dtype)


def _from_numbers(value: Any, dtype: np.dtype[Any], t: Tensor) -> np.ndarray:
    """Python numbers take the input's dtype if it can hold them; floats are rounded to it."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise RunError(f'input "{t.name}": not a tensor: {error}') from None
    kind = "f" if t.dtype.startswith(("float", "bfloat")) else "i" if dtype.kind in "iu" else "b"
    fits = array.size == 0 or array.dtype.kind in {"b": "b", "i": "biu", "f": "biuf"}[kind]
    if fits:
        with np.errstate(over="ignore"):
            made = np.asarray(array.astype(dtype), order="C")
        if array.dtype.kind == "f":
            same = np.isfinite(made.astype(np.float64)) == np.isfinite(array)
        else:
            same = made.astype(array.dtype) == array
        if array.size == 0 or bool(np.all(same)):
            return made
    raise RunError(
        f'input "{t.name}" is given as Python values of type {array.dtype}, which do not fit '
        f"into {dtype}: {t}",
        hint="give a numpy array of that dtype",
    )


def check_out(
    t: Tensor, array: Any, shape: tuple[int, ...], dtype: np.dtype[Any], parts: bool = False
) -> None:
    """Raises RunError unless an output can be written to `array`. parts: it may be a part of
    another array; `caches` looks at its strides."""
    if type(array) is np.ndarray and array.dtype is dtype and array.shape == shape:
        flags = array.flags
        if flags.c_contiguous and flags.writeable:
            return
    what = f'out= for output "{t.name}"'
    if not isinstance(array, np.ndarray):
        raise RunError(f"{what} is {type(array).__name__}, expected a numpy array")
    if array.dtype != dtype:
        raise RunError(
            f"{what} has dtype {array.dtype}, expected {dtype}",
            hint=f'np.empty({list(shape)}, "{dtype}")',
        )
    if array.shape != shape:
        raise RunError(
            f"{what} has shape {shape_text(array.shape)}, expected {shape_text(shape)}",
            hint=f'np.empty({list(shape)}, "{dtype}")',
        )
    if not parts and not array.flags.c_contiguous:
        raise RunError(f"{what} is not C-contiguous", hint="use np.empty, and copy afterwards")
    if not array.flags.writeable:
        raise RunError(f"{what} is read-only", hint="give an array that may be written, or a copy")


def check_names(
    kind: str, known: Sequence[str], given: Mapping[str, Any], *, complete: bool
) -> None:
    """Raises RunError for names that a model has not; complete: and for those that are missing."""
    unknown = [n for n in given if n not in known]
    if unknown:
        names = ", ".join(f'"{n}"' for n in unknown)
        near = difflib.get_close_matches(unknown[0].lower(), [k.lower() for k in known], 1)
        mean = next((f"; did you mean {k!r}?" for k in known if near and k.lower() == near[0]), "")
        hint = f"its {kind}s: {', '.join(known)}{mean}"
        raise RunError(f"the model has no {kind} {names}", hint=hint)
    missing = [n for n in known if n not in given]
    if complete and missing:
        names = ", ".join(f'"{n}"' for n in missing)
        raise RunError(f"{kind} {names} is missing", hint=f"the {kind}s: {', '.join(known)}")
