"""The bytes of an ONNX model -> its message without the large weights, and these as views.

    model, weights = parse(data, "net.onnx")       weights[k] belongs to model.graph.initializer[k]

A protobuf parser copies every weight, and refuses files over 2 GB. So the raw data of initializers
is cut out first: ModelProto.graph is field 7, GraphProto.initializer field 5, TensorProto.raw_data
field 9. Wire format: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import onnx

from minicompiler.errors import ImportModelError

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
_CUT = 1 << 12  # bytes of a weight from here on
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def map_file(path: Path) -> memoryview:
    """The bytes of a file, which are read when they are looked at. Raises ImportModelError."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return memoryview(b"")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as e:
        raise ImportModelError(
            f"{path} cannot be read: {e.strerror or e}", hint="name the .onnx file of the model"
        ) from e


def parse(data: memoryview, file: str) -> tuple[onnx.ModelProto, list[memoryview | None]]:
    """A model and the data of its initializers, None for those that the model still holds.

    Raises ImportModelError for what is not a model.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        text, weights = _without_weights(data)
    except _OtherError:  # what is damaged or unusual is left to the parser
        text, weights = bytes(data), []
    try:
        model = onnx.ModelProto.FromString(text)
    except DecodeError as e:
        raise ImportModelError(
            f"{file} is not an ONNX model, or is truncated ({len(data)} bytes)",
            hint="export the model again, or check the download",
        ) from e
    if not model.HasField("graph") or not model.graph.output:
        raise ImportModelError(f"{file} is not an ONNX model: it has no graph with outputs")
    return model, weights or [None] * len(model.graph.initializer)


class _OtherError(Exception):
    """The bytes are not laid out as this module expects."""


def _without_weights(data: memoryview) -> tuple[bytes, list[memoryview | None]]:
    graphs = [(a, b) for field, _, a, b in _fields(data, _GRAPH) if field == _GRAPH]
    if len(graphs) != 1:
        raise _OtherError
    ((start, end),) = graphs
    graph = data[start:end]
    parts: list[bytes | memoryview] = []
    weights: list[memoryview | None] = []
    for field, begin, a, b in _fields(graph, _INITIALIZER):
        if field != _INITIALIZER:
            parts.append(graph[begin:b])
            continue
        tensor, weight = _without_raw_data(graph[a:b])
        parts += [_key(_INITIALIZER, len(tensor)), tensor]
        weights.append(weight)
    inner = b"".join(parts)
    whole: list[bytes | memoryview] = []
    for field, begin, _, b in _fields(data, _GRAPH):
        whole += [_key(_GRAPH, len(inner)), inner] if field == _GRAPH else [data[begin:b]]
    return b"".join(whole), weights


def _without_raw_data(tensor: memoryview) -> tuple[bytes, memoryview | None]:
    if len(tensor) < _CUT:
        return bytes(tensor), None
    every = _fields(tensor, _RAW_DATA)
    found = [(begin, a, b) for field, begin, a, b in every if field == _RAW_DATA]
    if len(found) != 1 or found[0][2] - found[0][1] < _CUT:
        return bytes(tensor), None
    begin, a, b = found[0]
    return bytes(tensor[:begin]) + bytes(tensor[b:]), tensor[a:b]


def _fields(data: memoryview, wanted: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, where its key starts, where its value starts, where it ends) of each field.

    The field `wanted` has to consist of bytes.
    """
    at = 0
    while at < len(data):
        begin = at
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _BYTES:
            length, at = _varint(data, at)
            end = at + length
        elif kind == _VARINT:
            _, end = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            end = at + (8 if kind == _FIXED64 else 4)
        else:
            raise _OtherError
        if end > len(data) or (key >> 3 == wanted and kind != _BYTES):
            raise _OtherError
        yield key >> 3, begin, at, end
        at = end


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number of up to 64 bits, 7 in each byte, and where it ends."""
    value = 0
    for k in range(10):
        if at + k >= len(data):
            break
        byte = data[at + k]
        value |= (byte & 127) << 7 * k
        if byte < 128:
            return value, at + k + 1
    raise _OtherError


def _key(field: int, length: int) -> bytes:
    """The bytes before a value of some length."""
    made = bytearray([field << 3 | _BYTES])
    while length > 127:
        made.append(length & 127 | 128)
        length >>= 7
    made.append(length)
    return bytes(made)
