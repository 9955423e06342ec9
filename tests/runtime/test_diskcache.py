"""The kernel cache on disk: concurrent writers, killed writers, damage, permissions, eviction."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest

from minicompiler.runtime import diskcache
from minicompiler.runtime.diskcache import DiskCache, Entry

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "cache" / "kernels")


@pytest.fixture(autouse=True)
def forget_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diskcache, "_warned", set())


def files(cache: DiskCache) -> list[Path]:
    return sorted(cache.folder.iterdir())


def test_what_is_stored_comes_back(cache: DiskCache) -> None:
    assert cache.get(b"key") is None
    cache.put(b"key", b"value", {"seconds": 0.5, "steps": [1, 2]})
    cache.put(b"", b"")
    assert cache.get(b"key") == Entry(b"value", {"seconds": 0.5, "steps": [1, 2]})
    assert cache.get(b"") == Entry(b"", {})
    assert cache.get(b"key2") is None
    cache.put(b"key", b"other")
    assert DiskCache(cache.folder).get(b"key") == Entry(b"other", {})
    assert cache.info().entries == 2


def test_the_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINICOMPILER_CACHE", str(tmp_path))
    assert DiskCache().folder == tmp_path / "kernels"


def test_keys_are_compared_and_not_only_hashed(
    cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DiskCache, "_path", lambda self, key: self.folder / "same.mck")
    cache.put(b"one", b"1")
    assert cache.get(b"two") is None
    assert cache.get(b"one") == Entry(b"1", {})
    cache.put(b"two", b"2")
    assert cache.get(b"one") is None
    assert cache.get(b"two") == Entry(b"2", {})


def test_damage_is_a_miss_and_is_deleted(cache: DiskCache) -> None:
    cache.put(b"key", b"value")
    (path,) = files(cache)
    good = path.read_bytes()
    for position in range(len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        assert cache.get(b"key") is None
        assert not path.exists()
        path.write_bytes(damaged[:position])
        path.chmod(0o600)
        assert cache.get(b"key") is None
        assert not path.exists()
        path.touch(0o600)
    cache.put(b"key", b"again")
    assert cache.get(b"key") == Entry(b"again", {})


@posix
def test_files_of_others_are_not_trusted(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put(b"key", b"value")
    (path,) = files(cache)
    assert path.stat().st_mode & 0o777 == 0o600
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    for mode in (0o620, 0o602, 0o666):
        path.chmod(mode)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert cache.get(b"key") is None
        assert len(caught) == (mode == 0o620)
    path.chmod(0o644)
    assert cache.get(b"key") == Entry(b"value", {})
    target = path.with_name("target")
    path.rename(target)
    path.symlink_to(target)
    assert cache.get(b"key") is None
    monkeypatch.setattr(os, "geteuid", lambda: path.parent.stat().st_uid + 1)
    with pytest.warns(RuntimeWarning, match="is not used"):
        DiskCache(path.parent.parent).get(b"key")


@posix
def test_a_folder_that_others_may_write_is_not_used(cache: DiskCache) -> None:
    cache.put(b"key", b"value")
    cache.folder.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="nobody else may write") as caught:
        assert cache.get(b"key") is None
        cache.put(b"key", b"new")
        assert cache.get(b"key") is None
    assert len(caught) == 1
    cache.folder.chmod(0o700)
    assert cache.get(b"key") == Entry(b"value", {})


def test_a_folder_that_cannot_be_made_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = DiskCache(tmp_path / "file" / "kernels")
    with pytest.warns(RuntimeWarning, match="cannot use the cache folder") as caught:
        for _ in range(3):
            cache.put(b"key", b"value")
            assert cache.get(b"key") is None
            DiskCache(cache.folder).put(b"other", b"value")
    assert len(caught) == 1
    assert cache.info().entries == 0
    assert cache.clear() == 0


def test_a_full_disk_is_told_once(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put(b"old", b"value")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(RuntimeWarning, match="No space left on device") as caught:
        cache.put(b"key", b"value")
        cache.put(b"key", b"value")
    assert len(caught) == 1
    assert len(files(cache)) == 1
    assert cache.get(b"old") == Entry(b"value", {})


def test_what_was_unused_for_longest_is_evicted(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, limit=64_000)
    now = time.time()
    for i in range(16):
        cache.put(b"%d" % i, bytes(3000))
        os.utime(cache._path(b"%d" % i), (now - 1000 + i, now - 1000 + i))
    assert cache.get(b"0") is not None  # reading makes it young again
    for i in range(16, 24):
        cache.put(b"%d" % i, bytes(3000))
    info = cache.info()
    assert info.bytes < 64_000 * 9 / 8  # 24 entries need more than 80,000 bytes
    assert info.entries >= 10
    assert cache.get(b"0") is not None
    assert cache.get(b"1") is None
    assert cache.get(b"23") is not None


def test_the_folder_is_not_scanned_on_each_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans: list[Path] = []
    evict = DiskCache._evict

    def counted(cache: DiskCache) -> None:
        scans.append(cache.folder)
        evict(cache)

    monkeypatch.setattr(DiskCache, "_evict", counted)
    cache = DiskCache(tmp_path)
    for i in range(50):
        cache.put(b"%d" % i, bytes(1000))
    assert len(scans) == 1


def test_only_stale_temporary_files_are_removed(tmp_path: Path) -> None:
    old, new, other = tmp_path / ".a.tmp", tmp_path / ".b.tmp", tmp_path / "notes.txt"
    for path in (old, new, other):
        path.write_bytes(b"x")
    long_ago = time.time() - 7200
    os.utime(old, (long_ago, long_ago))
    os.utime(other, (long_ago, long_ago))
    cache = DiskCache(tmp_path)
    cache.put(b"key", b"value")
    assert not old.exists() and new.exists() and other.exists()
    assert cache.clear() == 1
    assert files(cache) == [other]


# Writes entries whose value follows from the key and the round, over and over.
WRITER = """
    import sys
    from minicompiler.runtime.diskcache import DiskCache
    cache = DiskCache(sys.argv[1])
    print("ready", flush=True)
    for i in range(int(sys.argv[2])):
        for key in range(5):
            cache.put(b"key%d" % key, bytes([i % 251]) * (20_000 + 4096 * (i % 9)), {"round": i})
            entry = cache.get(b"key%d" % key)
            assert entry is not None and set(entry.value) == {entry.metadata["round"] % 251}
"""


def start_writer(cache: DiskCache, rounds: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(cache.folder), str(rounds)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
    return writer


def check_all_rounds(cache: DiskCache) -> int:
    found = 0
    for key in range(5):
        entry = cache.get(b"key%d" % key)
        if entry is not None:
            i = entry.metadata["round"]
            assert entry.value == bytes([i % 251]) * (20_000 + 4096 * (i % 9))
            found += 1
    return found


def test_concurrent_writers_and_readers(cache: DiskCache) -> None:
    writers = [start_writer(cache, 60) for _ in range(3)]
    while any(writer.poll() is None for writer in writers):
        check_all_rounds(cache)
    for writer in writers:
        _, errors = writer.communicate()
        assert (writer.returncode, errors) == (0, b"")
    assert check_all_rounds(cache) == 5
    assert len(files(cache)) == 5


def test_killed_writers_leave_only_good_entries(cache: DiskCache) -> None:
    for i in range(6):
        writer = start_writer(cache, 1_000_000)
        time.sleep(0.02 + 0.007 * i)
        writer.kill()
        writer.communicate()
        names = [path.name for path in files(cache) if path.suffix == ".mck"]
        check_all_rounds(cache)
        # No entry was damaged: none has been deleted.
        assert [path.name for path in files(cache) if path.suffix == ".mck"] == names
    cache.put(b"key0", b"new")
    assert cache.get(b"key0") == Entry(b"new", {})
    cache.clear()
    assert files(cache) == []
