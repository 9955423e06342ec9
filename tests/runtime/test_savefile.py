"""The container of saved modules: what is written comes back, and no damage goes unnoticed."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minicompiler.errors import RunError
from minicompiler.runtime import savefile

HEADER = {"name": "mlp", "dims": [1, 64], "nested": {"ä": None, "x": 0.1}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.mc"


def small(path: Path) -> bytes:
    blobs: dict[str, savefile.Blob] = {
        "w": np.arange(5, dtype=np.float32),
        "code": b"\x7fELF",
        "empty": b"",
    }
    savefile.write(path, HEADER, blobs)
    return path.read_bytes()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1),
        np.arange(10, dtype=np.int8)[::-3],
        np.zeros((0, 4), np.float64),
        np.array(3.5),
        np.array(True),
        np.array([1 + 2j], np.complex64),
        np.array([np.nan, -0.0, np.inf], np.float16),
        np.arange(3, dtype=">u2"),
    ],
    ids=str,
)
def test_arrays_come_back(path: Path, array: np.ndarray) -> None:
    savefile.write(path, {}, {"a": array, "b": array})
    _, blobs = savefile.read(path)
    for name in ("a", "b"):
        result = blobs[name]
        assert (result.shape, result.dtype) == (array.shape, array.dtype.newbyteorder("="))
        assert result.tobytes() == array.astype(result.dtype).tobytes()
        assert not result.flags.writeable and result.flags.c_contiguous
        assert result.size == 0 or result.ctypes.data % 64 == 0
        if result.size:
            with pytest.raises(ValueError, match="WRITEABLE"):
                result.flags.writeable = True


def test_bytes_and_header_come_back(path: Path) -> None:
    blobs: dict[str, savefile.Blob] = {
        "a": b"abc",
        "b": bytearray(b""),
        "c": memoryview(b"\0" * 1000),
        "d": b"\1",
    }
    savefile.write(path, HEADER, blobs)
    header, result = savefile.read(path)
    assert header == HEADER
    assert list(result) == list(blobs)
    for name, blob in blobs.items():
        assert isinstance(result[name], memoryview) and result[name].readonly
        assert result[name] == blob


def test_no_blobs(path: Path) -> None:
    savefile.write(path, HEADER, {})
    assert savefile.read(path) == (HEADER, {})


def test_writing_is_deterministic(path: Path) -> None:
    assert small(path) == small(path)


def test_every_flipped_bit_is_noticed(path: Path) -> None:
    good = small(path)
    for position in range(len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(RunError, match=r"model\.mc"):
            savefile.read(path)


def test_every_truncation_is_noticed(path: Path) -> None:
    good = small(path)
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(RunError, match=r"is damaged: it is cut off|is empty") as caught:
            savefile.read(path)
        assert caught.value.hint
    path.write_bytes(good + b"\0")
    with pytest.raises(RunError, match="bytes instead of"):
        savefile.read(path)


def test_two_swapped_blocks_are_noticed(path: Path) -> None:
    savefile.write(path, {}, {"a": b"a" * 64, "b": b"b" * 64})
    content = path.read_bytes()
    path.write_bytes(content[:-128] + content[-64:] + content[-128:-64])
    with pytest.raises(RunError, match='checksum of blob "a"'):
        savefile.read(path)


def forge(
    path: Path,
    document: Any,
    data: bytes = b"",
    change: Callable[[list[Any]], None] = lambda fields: None,
) -> None:
    """A file whose checksums are right, whatever its content: what a hostile author can make."""
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    text = text.ljust(-(-len(text) // 64) * 64)
    digest = hashlib.blake2b(text, digest_size=16).digest()
    fields = [b"\x89MCSAVE\n", 1, 0, len(text), 64 + len(text) + len(data), digest]
    change(fields)
    preamble = struct.pack("<8sIIQQ16s", *fields)
    path.write_bytes(preamble + hashlib.blake2b(preamble, digest_size=16).digest() + text + data)


def entry(**changes: Any) -> dict[str, Any]:
    data = b"x" * 64
    return {"name": "a", "offset": 320, "size": 64, "crc32": zlib.crc32(data)} | changes


def test_the_forged_base_is_accepted(path: Path) -> None:
    # 256 bytes of header: the offsets in the next test are wrong for the reason they state.
    forge(path, json.dumps({"header": {}, "blobs": [entry()]}).ljust(256).encode(), b"x" * 64)
    header, blobs = savefile.read(path)
    assert (header, bytes(blobs["a"])) == ({}, b"x" * 64)


@pytest.mark.parametrize(
    "table",
    [
        [entry(offset=0)],
        [entry(offset=256)],
        [entry(offset=319)],
        [entry(offset=384)],
        [entry(offset=-64)],
        [entry(offset=2**63)],
        [entry(offset=10**40)],
        [entry(offset="320")],
        [entry(offset=320.0)],
        [entry(size=65)],
        [entry(size=2**64)],
        [entry(size=-1)],
        [entry(size=True)],
        [entry(size=0)],
        [entry(), entry()],
        [entry(), entry(name="b")],
        [entry(), entry(offset=384, size=0, crc32=0)],
        [entry(name=7)],
        [entry(crc32="")],
        [entry(dtype="<f4", shape=[17])],
        [entry(dtype="<f4", shape=[-4, -4])],
        [entry(dtype="<f4", shape=[4.0, 4])],
        [entry(dtype="<f4", shape=16)],
        [entry(dtype="<f4")],
        [entry(dtype="<f4", shape=[16] + [1] * 70)],
        [entry(dtype="|O", shape=[8])],
        [entry(dtype="<f4,<f4", shape=[8])],
        [entry(dtype="|S64", shape=[1])],
        [entry(dtype="<M8[s]", shape=[8])],
        [entry(dtype="nonsense", shape=[8])],
        [entry(dtype=["<f4"], shape=[16])],
        ["a"],
        [None],
        {},
        None,
        [],
    ],
    ids=str,
)
def test_impossible_tables_are_refused(path: Path, table: Any) -> None:
    text = json.dumps({"header": {}, "blobs": table})
    forge(path, text.ljust(256 if len(text) <= 256 else 512).encode(), b"x" * 64)
    with pytest.raises(RunError, match="is damaged"):
        savefile.read(path)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"not JSON",
        b"[]",
        b"7",
        b"{}",
        b'{"header": 1, "blobs": []}',
        b'{"header": {}, "blobs": {}}',
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"header": {}, "blobs": [' + b"9" * 5000 + b"]}",
    ],
    ids=range(10),
)
def test_impossible_headers_are_refused(path: Path, text: bytes) -> None:
    forge(path, text)
    with pytest.raises(RunError, match="is damaged"):
        savefile.read(path)


@pytest.mark.parametrize("header_bytes", [2**64 - 1, 2**63, 64 * 1024, 65])
def test_an_absurd_header_length_is_refused(path: Path, header_bytes: int) -> None:
    forge(path, b"{}", change=lambda fields: fields.__setitem__(3, header_bytes))
    with pytest.raises(RunError, match="does not fit into the file"):
        savefile.read(path)


def test_versions(path: Path) -> None:
    forge(path, b"{}", change=lambda fields: fields.__setitem__(1, 2))
    with pytest.raises(
        RunError, match="format version 2, this minicompiler reads up to 1"
    ) as caught:
        savefile.read(path)
    assert "update minicompiler" in caught.value.hint
    forge(path, b"{}", change=lambda fields: fields.__setitem__(1, 0))
    with pytest.raises(RunError, match="version 0 does not exist"):
        savefile.read(path)


def test_other_files_are_told_apart(path: Path, tmp_path: Path) -> None:
    path.write_bytes(b"\x08\x07\x12\x07pytorch" * 20)
    with pytest.raises(RunError, match="is not a file saved by minicompiler"):
        savefile.read(path)
    path.write_bytes(b"x")
    with pytest.raises(RunError, match="is not a file saved by minicompiler"):
        savefile.read(path)
    with pytest.raises(RunError, match="No such file"):
        savefile.read(tmp_path / "missing.mc")
    with pytest.raises(RunError, match="is a folder"):
        savefile.read(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_at_once(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(RunError, match="not a regular file"):
        savefile.read(path)


@pytest.mark.parametrize(
    ("header", "blobs", "message"),
    [
        ({"a": {1, 2}}, {}, "the header is not JSON"),
        ({}, {"a": np.array(["x"], object)}, "dtype object"),
        ({}, {"a": np.zeros(2, [("x", "f4")])}, "has dtype"),
        ({}, {"a": np.array(["2020"], "M8[s]")}, "has dtype"),
    ],
)
def test_content_that_cannot_be_stored(
    path: Path, header: dict[str, Any], blobs: dict[str, Any], message: str
) -> None:
    with pytest.raises(RunError, match=message):
        savefile.write(path, header, blobs)
    assert not list(path.parent.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = small(path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match="No space left on device"):
            savefile.write(path, {}, {"a": b"new"})
    assert path.read_bytes() == good
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(RunError, match="No such file"):
        savefile.write(path.parent / "missing" / "a.mc", {}, {})
    path.unlink()
    path.mkdir()
    with pytest.raises(RunError, match="cannot write"):
        savefile.write(path, {}, {})


def test_blobs_survive_the_replacement_of_their_file(path: Path) -> None:
    savefile.write(path, {}, {"a": np.arange(100_000)})
    _, blobs = savefile.read(path)
    savefile.write(path, {}, {"a": blobs["a"][::-1]})
    assert np.array_equal(blobs["a"], np.arange(100_000))
    _, reversed_blobs = savefile.read(path)
    path.unlink()
    assert np.array_equal(reversed_blobs["a"], np.arange(100_000)[::-1])


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions and links")
def test_permissions_and_links(path: Path, tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        savefile.write(path, {}, {})
        savefile.write(tmp_path / "private.mc", {}, {}, mode=0o600)
    finally:
        os.umask(previous)
    assert path.stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "private.mc").stat().st_mode & 0o777 == 0o600
    link = tmp_path / "link.mc"
    link.symlink_to(path)
    savefile.write(link, {"new": True}, {})
    assert link.is_symlink() and savefile.read(path)[0] == {"new": True}
