"""Tensors of an ONNX model as numpy arrays, without copies where the format allows.

    tensor_array(proto, folder, file)     raw bytes are viewed in place, external data is mapped

External data comes from whoever made the model, so a file is opened only when it lies inside the
model's folder: no absolute path, no `..`, no link that leads out.
"""

from __future__ import annotations

import os
import stat
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from minicompiler.errors import ImportModelError
from minicompiler.ir.types import DTYPE_NAMES, DType, dtype_of

_TEXT = (
    "cut the model where the strings end (onnx.utils.extract_model), and run that part in Python"
)


def element_type(code: int, what: str, file: str) -> DType:
    """The DType of an ONNX element type. Raises ImportModelError for one without counterpart."""
    try:
        found = dtype_of(helper.tensor_dtype_to_np_dtype(code))
    except (TypeError, KeyError):
        known = (
            TensorProto.DataType.Name(code) if code in TensorProto.DataType.values() else str(code)
        )
        raise ImportModelError(
            f"{file}: {what} has elements of type {known}, which is not supported",
            hint=_TEXT if code == TensorProto.STRING else f"supported: {', '.join(DTYPE_NAMES)}",
        ) from None
    return found


def tensor_array(
    tensor: TensorProto, folder: Path | None, file: str, raw: memoryview | None = None
) -> np.ndarray:
    """The value of a tensor. `folder` is the model's (None: external data is refused).

    raw: the tensor's raw data, where it was cut out of the message.
    """
    what = f"tensor {tensor.name!r}"
    dtype = element_type(tensor.data_type, what, file).numpy
    shape = tuple(tensor.dims)
    if any(d < 0 for d in shape):
        raise ImportModelError(f"{file}: {what} has the shape {list(shape)}")
    size = prod(shape) * dtype.itemsize
    if tensor.data_location == TensorProto.EXTERNAL:
        return _external(tensor, folder, file, dtype, shape, size)
    if raw is not None or tensor.HasField("raw_data"):
        data = tensor.raw_data if raw is None else raw
        if len(data) != size:
            raise ImportModelError(
                f"{file}: {what} of shape {list(shape)} needs {size} bytes, found {len(data)}",
                hint="the file may be truncated",
            )
        return np.frombuffer(data, dtype).reshape(shape)
    try:
        return np.asarray(numpy_helper.to_array(tensor)).astype(dtype, copy=False)
    except (ValueError, TypeError) as e:
        raise ImportModelError(f"{file}: {what} of shape {list(shape)} cannot be read: {e}") from e


def _external(
    tensor: TensorProto,
    folder: Path | None,
    file: str,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    size: int,
) -> np.ndarray:
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    what = f"{file}: the data of tensor {tensor.name!r}"
    if folder is None:
        raise ImportModelError(
            f"{what} lies in the file {location!r}, but the model was not given as a path",
            hint="load the model by its path, so that files beside it can be found",
        )
    numbers = [entries.get("offset", "0"), entries.get("length", str(size))]
    if not all(n.isascii() and n.isdigit() for n in numbers):
        raise ImportModelError(f"{what}: offset and length are {numbers}, not numbers")
    offset, length = int(numbers[0]), int(numbers[1])
    if length != size:
        raise ImportModelError(f"{what} takes {length} bytes, its shape {list(shape)} needs {size}")
    path = _inside(folder, location, what)
    # Checked on the open file, so that the file cannot be exchanged in between.
    try:
        handle = os.open(
            path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        )
    except OSError as e:
        raise ImportModelError(
            f"{what} is missing: {location!r} cannot be opened ({e.strerror})"
        ) from e
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise ImportModelError(f"{what}: {location!r} is not a regular file")
    with os.fdopen(handle, "rb") as opened:
        if status.st_nlink > 1:
            raise ImportModelError(
                f"{what}: {location!r} is a hard link, which may lead out of the model's folder",
                hint="copy the file",
            )
        if offset + size > status.st_size:
            raise ImportModelError(
                f"{what} ends at byte {offset + size}, but {location!r} has {status.st_size}",
                hint="the file may be truncated",
            )
        if size == 0:
            return np.empty(shape, dtype)
        return np.memmap(opened, dtype, "r", offset, shape)


def _inside(folder: Path, location: str, what: str) -> Path:
    """The path of an external file. Raises ImportModelError when it leads out of the folder."""
    absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).drive
    parts = PureWindowsPath(location).parts  # splits at both kinds of slashes
    if (
        not location
        or "\0" in location
        or absolute
        or PureWindowsPath(location).root
        or ".." in parts
    ):
        raise ImportModelError(
            f"{what} is said to lie in {location!r}, which is not a path inside the model's folder",
            hint="external data is only read from the folder of the model",
        )
    real = Path(os.path.realpath(folder / location))
    if not real.is_relative_to(os.path.realpath(folder)):
        raise ImportModelError(
            f"{what}: {location!r} is a link that leads out of the model's folder",
            hint="copy the file into the folder",
        )
    return real
