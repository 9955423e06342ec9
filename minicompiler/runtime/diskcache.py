"""The kernel cache on disk: bytes by content key, shared by all processes of one user.

In:  cache = DiskCache(); cache.put(key, code, {"seconds": 0.02})
Out: entry = cache.get(key)            # Entry(value, metadata), or None

The key is the full text that decides the value; a file is named by its hash and holds it whole,
so two keys never mix. Entries replace each other atomically, and one that is damaged is a miss.
Files that another user owns or may write are not trusted. A cache that does not work (folder not
writable, disk full) never raises: it warns once and the caller compiles as if there was none.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicompiler import config
from minicompiler.errors import RunError
from minicompiler.runtime import savefile

_SUFFIX = ".mck"
_TEMPORARY = ".tmp"
# A temporary file this old was left behind by a process that was killed.
_STALE_SECONDS = 3600.0
# Reading touches an entry for the eviction, but not on each of many reads in a row.
_TOUCH_SECONDS = 60.0

_OPEN = os.O_RDONLY
for _name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):  # not every system has all of them
    _OPEN |= getattr(os, _name, 0)

_warned: set[tuple[Path, str]] = set()


@dataclass(frozen=True)
class Entry:
    """What `put` stored."""

    value: bytes
    metadata: dict[str, Any]


@dataclass(frozen=True)
class CacheInfo:
    """State of the cache folder; `bytes` counts the entries only."""

    folder: Path
    entries: int
    bytes: int
    limit: int


class DiskCache:
    """A folder of entries, by default `kernels` in `config.cache_dir()`.

    When the entries exceed `limit` bytes, those unused for longest are deleted. That is looked at
    once per process and after each sixteenth of the limit written, so the limit is not exact.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, limit: int = 512 << 20):
        self.folder = config.cache_dir() / "kernels" if folder is None else Path(folder)
        self.limit = limit
        self._unchecked = limit  # bytes written since the size was last looked at

    def get(self, key: bytes) -> Entry | None:
        """The entry of exactly this key, or None."""
        path = self._path(key)
        try:
            if not self._folder_is_ours():
                return None
            descriptor = os.open(path, _OPEN)
        except OSError:
            return None
        try:
            return self._load(descriptor, path, key)
        finally:
            os.close(descriptor)

    def put(self, key: bytes, value: bytes, metadata: Mapping[str, Any] | None = None) -> None:
        """Store an entry in place of an earlier one; `metadata` must be JSON."""
        path = self._path(key)
        header = {"metadata": dict(metadata or {})}
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._folder_is_ours():
                return
            # Not synced to the disk: after a power failure an incomplete entry is a miss.
            blobs: dict[str, savefile.Blob] = {"key": key, "value": value}
            savefile.write(path, header, blobs, durable=False, mode=0o600)
        except OSError as error:
            self._warn("write", f'cannot use the cache folder "{self.folder}": {error}')
            return
        except RunError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            self._warn("write", f"cannot store a kernel: {error.message}")
            return
        self._unchecked += len(key) + len(value)
        if self._unchecked > self.limit // 16:
            self._unchecked = 0
            self._evict()

    def info(self) -> CacheInfo:
        """Counts what is there now."""
        sizes = [status.st_size for path, status in self._files() if path.suffix == _SUFFIX]
        return CacheInfo(self.folder, len(sizes), sum(sizes), self.limit)

    def clear(self) -> int:
        """Delete all entries and what killed processes left; returns the number of entries."""
        count = 0
        for path, _ in self._files():
            with contextlib.suppress(OSError):
                path.unlink()
                count += path.suffix == _SUFFIX
        return count

    def _load(self, descriptor: int, path: Path, key: bytes) -> Entry | None:
        # Checks the open file, not the path: that may be another file by now.
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or not _is_ours(status):
            self._warn("trust", f'"{path}" is ignored: another user owns it or may write it')
            return None
        try:
            header, blobs = savefile.read_descriptor(descriptor, str(path))
            stored, value, metadata = blobs["key"], blobs["value"], header["metadata"]
        except (RunError, KeyError):
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        if bytes(stored) != key:
            return None
        if time.time() - status.st_mtime > _TOUCH_SECONDS:
            with contextlib.suppress(OSError):
                os.utime(path)
        return Entry(bytes(value), metadata)

    def _path(self, key: bytes) -> Path:
        return self.folder / (hashlib.blake2b(key, digest_size=20).hexdigest() + _SUFFIX)

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        """Entries and temporary files; nothing else in the folder is ever touched."""
        found = []
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    temporary = entry.name.startswith(".") and entry.name.endswith(_TEMPORARY)
                    if temporary or entry.name.endswith(_SUFFIX):
                        # Another process may have deleted it since.
                        with contextlib.suppress(OSError):
                            found.append((Path(entry.path), entry.stat(follow_symlinks=False)))
        except OSError:
            return []
        return found

    def _evict(self) -> None:
        files = sorted(self._files(), key=lambda file: file[1].st_mtime)
        now = time.time()
        total = sum(status.st_size for _, status in files)
        # Down to three quarters, so that the next look finds nothing to do.
        goal = self.limit * 3 // 4 if total > self.limit else total
        for path, status in files:
            if path.suffix == _TEMPORARY:
                doomed = now - status.st_mtime > _STALE_SECONDS
            else:
                doomed = total > goal
            if doomed:
                with contextlib.suppress(OSError):
                    path.unlink()
                    total -= status.st_size

    def _folder_is_ours(self) -> bool:
        status = os.lstat(self.folder)
        if stat.S_ISDIR(status.st_mode) and _is_ours(status):
            return True
        self._warn(
            "trust",
            f'the cache folder "{self.folder}" is not used: it must be a folder that you own and '
            "that nobody else may write (chmod go-w)",
        )
        return False

    def _warn(self, topic: str, message: str) -> None:
        if (self.folder, topic) not in _warned:
            _warned.add((self.folder, topic))
            warnings.warn(f"minicompiler: {message}", RuntimeWarning, stacklevel=4)


def _is_ours(status: os.stat_result) -> bool:
    """Owned by this user and writable by nobody else; true where files have no such owner."""
    if not hasattr(os, "geteuid"):
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
