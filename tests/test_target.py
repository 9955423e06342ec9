"""Targets: detection, names, JSON, and what a lesser machine lacks; the environment variables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from minicompiler import config, target
from minicompiler.errors import MinicompilerError
from minicompiler.target import Target, usable_cores

pytestmark = pytest.mark.smoke

NAMED = ["cpu:sse", "cpu:avx", "cpu:avx2", "cpu:avx512", "cpu:neon"]


def test_the_host_is_plausible() -> None:
    host = Target.host()
    assert host.vector_bytes in (16, 32, 64)
    assert host.cores == usable_cores() >= 1
    assert all(size >= 8 << 10 for size in host.caches)
    assert host.cpu_name
    assert host == Target.parse("cpu")
    assert hash(host) == hash(Target.host())
    assert host.missing_features(host) == []


@pytest.mark.parametrize(
    ("text", "vector_bytes", "registers", "fma"),
    [
        ("cpu:sse", 16, 16, False),
        ("cpu:avx", 32, 16, False),
        ("cpu:avx2", 32, 16, True),
        ("cpu:avx512", 64, 32, True),
        ("cpu:neon", 16, 32, True),
    ],
)
def test_named_targets(text: str, vector_bytes: int, registers: int, fma: bool) -> None:
    named = Target.parse(text)
    assert (named.vector_bytes, named.registers, named.fma) == (vector_bytes, registers, fma)


@pytest.mark.parametrize("text", NAMED)
def test_the_text_parses_to_the_same_target(text: str) -> None:
    named = Target.parse(f"{text},cores=3")
    assert str(named) == f"{text},cores=3"
    assert Target.parse(str(named)) == named


@pytest.mark.parametrize("text", ["cpu", *NAMED])
def test_json_round_trip(text: str) -> None:
    wanted = Target.parse(text)
    assert Target.from_json(json.loads(json.dumps(wanted.to_json()))) == wanted


def test_json_of_another_shape_is_refused() -> None:
    data = Target.parse("cpu:avx2").to_json()
    for bad in ({}, data | {"caches": [1]}, data | {"colour": "red"}, {"caches": [1, 2, 3]}):
        with pytest.raises(MinicompilerError, match="not a description of a target"):
            Target.from_json(bad)


@pytest.mark.parametrize(
    "text", ["", "gpu", "cpu:", "cpu:avx3", "cpu:avx2,cores=0", "cpu,threads=2", "CPU"]
)
def test_an_unknown_target_lists_the_accepted_ones(text: str) -> None:
    with pytest.raises(MinicompilerError, match=r"(?s)unknown target.*cpu:sse, .*cpu:avx512"):
        Target.parse(text)


def test_missing_features_name_what_a_lesser_machine_lacks() -> None:
    avx2, avx512 = Target.parse("cpu:avx2"), Target.parse("cpu:avx512")
    assert avx2.missing_features(avx512) == []
    assert "avx512f" in avx512.missing_features(avx2)
    assert Target.parse("cpu:neon").missing_features(avx2) == ["aarch64"]
    assert avx2.missing_features(replace(avx2, cores=1)) == []


def fake_system(
    monkeypatch: pytest.MonkeyPatch, root: Path, cpus: set[int], files: dict[str, str]
) -> None:
    """Lets target.py see `files` as /sys and /proc, and an affinity of `cpus`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    monkeypatch.delenv("MINICOMPILER_THREADS", raising=False)
    monkeypatch.setattr(target, "_read", lambda path: _read_below(root, path))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: cpus, raising=False)


def _read_below(root: Path, path: Path) -> str:
    inner = root / path.relative_to("/")
    return inner.read_text().strip() if inner.is_file() else ""


SMT = {
    f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n % 4},{n % 4 + 4}"
    for n in range(8)
}


@pytest.mark.parametrize(
    ("cpus", "files", "cores"),
    [
        ({0, 1, 2}, {}, 3),
        (set(range(8)), SMT, 4),
        ({0, 4, 1}, SMT, 2),
        (
            set(range(8)),
            {"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "350000 100000"},
            3,
        ),
        (
            set(range(8)),
            {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"},
            1,
        ),
        (
            set(range(8)),
            {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"},
            8,
        ),
        (
            set(range(8)),
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/box\n2:memory:/box\n0::/",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000",
            },
            2,
        ),
    ],
)
def test_usable_cores_honour_affinity_siblings_and_quota(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cpus: set[int],
    files: dict[str, str],
    cores: int,
) -> None:
    fake_system(monkeypatch, tmp_path, cpus, files)
    assert usable_cores() == cores
    monkeypatch.setenv("MINICOMPILER_THREADS", "5")
    assert usable_cores() == 5


def test_environment_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINICOMPILER_CACHE", str(tmp_path))
    monkeypatch.setenv("MINICOMPILER_CHECKED", "1")
    monkeypatch.setenv("MINICOMPILER_DEBUG", "2")
    assert (config.cache_dir(), config.checked(), config.debug()) == (tmp_path, True, 2)
    for name in ("CACHE", "CHECKED", "DEBUG"):
        monkeypatch.delenv(f"MINICOMPILER_{name}")
    assert config.cache_dir().name == "minicompiler"
    assert (config.checked(), config.debug()) == (False, 0)


@pytest.mark.parametrize("value", ["yes", "3", "-1", "0.5"])
def test_a_malformed_variable_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MINICOMPILER_CHECKED", value)
    with pytest.raises(MinicompilerError, match="MINICOMPILER_CHECKED="):
        config.checked()
