"""The container of saved modules: one JSON header and named blobs, checked and mapped, no pickle.

In:  write("m.mc", {"name": "mlp"}, {"w0": array, "code": b"..."})
Out: header, blobs = read("m.mc")     # arrays read-only, backed by the mapped file

    offset 0   preamble, 64 bytes: magic, version, lengths, checksum of the header and of itself
    offset 64  header, JSON: {"header": ..., "blobs": [{"name", "offset", "size", "crc32", ...}]}
    then       the blobs in order, each on a multiple of 64 bytes, with zeros in between

Whatever is wrong with a file raises RunError, before any of its content is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import secrets
import stat
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import numpy as np

from minicompiler.errors import RunError

Blob = bytes | bytearray | memoryview | np.ndarray

VERSION = 1
_MAGIC = b"\x89MCSAVE\n"
# magic, version, flags (0), header bytes, file bytes, digest of the header; then the digest of
# these 48 bytes. Later versions keep this layout, so that every version can be told from damage.
_PREAMBLE = struct.Struct("<8sIIQQ16s")
_PREAMBLE_BYTES = 64
_ALIGN = 64
_BINARY = getattr(os, "O_BINARY", 0)
_KINDS = "biufc"  # kinds of numpy dtypes that are plain numbers
_HINT = "save the module again, or copy the file again from where it came"


def write(
    path: str | os.PathLike[str],
    header: Mapping[str, Any],
    blobs: Mapping[str, Blob],
    *,
    durable: bool = True,
    mode: int = 0o666,
) -> None:
    """Replace `path` by a file with this content, atomically: readers see the old file or the new.

    Args:
        path: file to write; its folder must exist.
        header: anything JSON can express (tuples come back as lists).
        blobs: bytes, or arrays of plain numbers, which come back in native C order.
        durable: wait until the file is on the disk, so that it also survives a power failure.
        mode: permissions of the file; the process's umask is taken off.

    Raises:
        RunError: the content cannot be stored, or the file cannot be written.
    """
    path = os.path.realpath(path)
    header = dict(header)
    table: list[dict[str, Any]] = []
    data: list[memoryview] = []
    for name, blob in blobs.items():
        view, form = _flatten(path, name, blob)
        data.append(view)
        table.append({"name": name, "size": view.nbytes, "crc32": zlib.crc32(view), **form})
    text, length = _place(path, header, table)
    preamble = _PREAMBLE.pack(_MAGIC, VERSION, 0, len(text), length, _digest(text))

    def chunks() -> Iterator[bytes | memoryview]:
        yield preamble + _digest(preamble)
        yield text
        end = _PREAMBLE_BYTES + len(text)
        for entry, view in zip(table, data, strict=True):
            yield bytes(entry["offset"] - end)
            yield view
            end = entry["offset"] + entry["size"]

    try:
        _replace(path, chunks(), durable, mode)
    except OSError as error:
        raise RunError(
            f'cannot write "{path}": {error.strerror or error}',
            hint="check that the folder exists, is writable and has space left",
        ) from error


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header and the blobs of a file: read-only arrays, and memoryviews for bytes.

    The blobs stay valid after the file is replaced or deleted; truncating it in place is an error
    that no program can guard against.

    Raises:
        RunError: the file cannot be read, is damaged, or is no file of `write`.
    """
    path = os.fspath(path)
    try:
        # A pipe would block an ordinary open.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
    except OSError as error:
        raise RunError(
            f'cannot read "{path}": {error.strerror or error}',
            hint="Module.save and `minicompiler compile` write such files",
        ) from error
    try:
        return read_descriptor(descriptor, path)
    finally:
        os.close(descriptor)


def read_descriptor(descriptor: int, path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """`read` for a file that is already open; `path` is for the messages."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise RunError(
            f'cannot read "{path}": it is {what}', hint="name the file that Module.save wrote"
        )
    if status.st_size == 0:
        raise RunError(f'"{path}" is empty', hint=_HINT)
    try:
        content = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise RunError(f'cannot read "{path}": {error}') from error
    header_end = _check_preamble(content, path)
    try:
        document = json.loads(bytes(content[_PREAMBLE_BYTES:header_end]))
        header, table = document["header"], document["blobs"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, f"its header is not understood ({error})") from error
    if not isinstance(header, dict) or not isinstance(table, list):
        raise _damaged(path, "its header has another structure")
    blobs: dict[str, Any] = {}
    end = header_end
    for entry in table:
        name, offset, size = _check_entry(entry, end, len(content), path)
        if name in blobs:
            raise _damaged(path, f'it has two blobs "{name}"')
        if any(content[end:offset]):
            raise _damaged(path, f'the padding before blob "{name}" is not zero')
        view = content[offset : offset + size]
        if zlib.crc32(view) != entry.get("crc32"):
            raise _damaged(path, f'the checksum of blob "{name}" does not match')
        blobs[name] = _restore(view, entry, name, path)
        end = offset + size
    if end != len(content):
        raise _damaged(path, "it goes on after its last blob")
    return header, blobs


def _flatten(path: str, name: str, blob: Blob) -> tuple[memoryview, dict[str, Any]]:
    """A blob's bytes, and what the table says of its form."""
    if not isinstance(blob, np.ndarray):
        return memoryview(blob).cast("B"), {}
    if blob.dtype.kind not in _KINDS:
        raise RunError(
            f'cannot save "{path}": blob "{name}" has dtype {blob.dtype}',
            hint="store it as a view of an integer type of the same width",
        )
    array = np.asarray(blob, blob.dtype.newbyteorder("<"), order="C")
    form = {"dtype": array.dtype.str, "shape": list(array.shape)}
    # memoryview cannot flatten an array without elements.
    return array.reshape(-1).data.cast("B") if array.size else memoryview(b""), form


def _place(path: str, header: Mapping[str, Any], table: list[dict[str, Any]]) -> tuple[bytes, int]:
    """Set the offsets in the table; the header's text, and the length of the file."""
    # Offsets count from the end of the header's text, whose length depends on their digits; so
    # the text is padded to a length that is fixed first, with room for the longest offset.
    try:
        text = json.dumps({"header": header, "blobs": [{**e, "offset": 2**63} for e in table]})
    except (TypeError, ValueError, RecursionError) as error:
        raise RunError(
            f'cannot save "{path}": the header is not JSON ({error})',
            hint="use only dict, list, str, int, float, bool and None",
        ) from error
    end = _aligned(_PREAMBLE_BYTES + len(text))
    room = end - _PREAMBLE_BYTES
    for entry in table:
        entry["offset"] = _aligned(end)
        end = entry["offset"] + entry["size"]
    text = json.dumps({"header": header, "blobs": table})
    return text.ljust(room).encode("ascii"), end


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN


def _digest(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _replace(path: str, chunks: Iterator[bytes | memoryview], durable: bool, mode: int) -> None:
    folder, name = os.path.split(path)
    # os.replace is atomic only within a file system, so the temporary file lies beside the target.
    temporary = os.path.join(folder, f".{name[:100]}.{os.getpid()}.{secrets.token_hex(6)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY
    try:
        with open(os.open(temporary, flags, mode), "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if durable:
        # Not every system can sync a folder; the content itself is safe by now.
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _damaged(path: str, what: str) -> RunError:
    return RunError(f'"{path}" is damaged: {what}', hint=_HINT)


def _check_preamble(content: memoryview, path: str) -> int:
    """The offset at which the header ends."""
    if content[: len(_MAGIC)] != _MAGIC[: len(content)]:
        raise RunError(
            f'"{path}" is not a file saved by minicompiler',
            hint="load what Module.save wrote; a model file goes to minicompiler.compile",
        )
    if len(content) < _PREAMBLE_BYTES:
        raise _damaged(path, f"it is cut off after {len(content)} bytes")
    preamble = content[: _PREAMBLE.size]
    if _digest(preamble) != content[_PREAMBLE.size : _PREAMBLE_BYTES]:
        raise _damaged(path, "the checksum of its first 64 bytes does not match")
    _, version, _, header_bytes, length, digest = _PREAMBLE.unpack(preamble)
    if version > VERSION:
        raise RunError(
            f'"{path}" has format version {version}, this minicompiler reads up to {VERSION}',
            hint="update minicompiler, or save the module again with this version",
        )
    if version < 1:
        raise _damaged(path, f"format version {version} does not exist")
    if len(content) < length:
        raise _damaged(path, f"it is cut off: {len(content)} of {length} bytes are there")
    if len(content) > length:
        raise _damaged(path, f"it has {len(content)} bytes instead of {length}")
    end: int = _PREAMBLE_BYTES + header_bytes
    if end > length:
        raise _damaged(path, f"its header of {header_bytes} bytes does not fit into the file")
    if _digest(content[_PREAMBLE_BYTES:end]) != digest:
        raise _damaged(path, "the checksum of its header does not match")
    return end


def _check_entry(entry: Any, start: int, stop: int, path: str) -> tuple[str, int, int]:
    """Name, offset and size of a blob that lies within start .. stop."""
    if not isinstance(entry, dict):
        raise _damaged(path, "its table of blobs has another structure")
    name, offset, size = entry.get("name"), entry.get("offset"), entry.get("size")
    if not isinstance(name, str) or not _is_count(offset) or not _is_count(size):
        raise _damaged(path, "its table of blobs has another structure")
    # The blobs lie in order, without gaps: none overlaps another or the header.
    if offset != _aligned(start) or offset + size > stop:
        raise _damaged(path, f'blob "{name}" lies at an impossible place')
    return name, offset, size


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _restore(view: memoryview, entry: dict[str, Any], name: str, path: str) -> Any:
    if "dtype" not in entry:
        return view
    text, shape = entry["dtype"], entry.get("shape")
    try:
        dtype = np.dtype(text) if isinstance(text, str) else None
    except (TypeError, ValueError):
        dtype = None
    if dtype is None or dtype.kind not in _KINDS or dtype.str != text:
        raise _damaged(path, f'blob "{name}" has an unknown dtype')
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise _damaged(path, f'blob "{name}" has an impossible shape')
    count = 1
    for extent in shape:
        count *= extent
    if count * dtype.itemsize != len(view) or len(shape) > 64:
        raise _damaged(path, f'blob "{name}" has another size than its shape')
    try:
        array = np.frombuffer(view, dtype) if count else np.empty(0, dtype)
        array = array.reshape(shape)
    except ValueError as error:
        raise _damaged(path, f'blob "{name}" has an impossible shape') from error
    array.flags.writeable = False
    return array.astype(dtype.newbyteorder("="), copy=False)
