"""The machine that is compiled for: instruction set, vector width, caches, cores.

In: nothing (`Target.host()`), a string (`Target.parse("cpu:avx2,cores=4")`) or JSON. Out: a frozen,
hashable Target, whose JSON is part of every tuning and binary key. Named targets ("cpu:avx2") are
fixed descriptions, the same on every machine; "cpu" is this machine, detected.
  >>> str(Target.parse("cpu:avx2"))
  'cpu:avx2,cores=8'
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from minicompiler import config
from minicompiler.errors import MinicompilerError, RunError

# Only features that generated code may use: others (rdrand, sse4a, ...) would needlessly tie a
# saved module to one vendor's machines. Backends enable exactly `Target.features`, and use
# `cpu_name` for instruction scheduling ("tune-cpu") only.
_FEATURES: dict[str, frozenset[str]] = {
    "x86_64": frozenset(
        "sse3 ssse3 sse4.1 sse4.2 popcnt avx avx2 fma f16c bmi bmi2 lzcnt movbe "
        "avxvnni avxvnniint8 avxneconvert avxifma "
        "avx512f avx512cd avx512bw avx512dq avx512vl avx512vbmi avx512vbmi2 avx512ifma "
        "avx512vnni avx512bitalg avx512vpopcntdq avx512bf16 avx512fp16 "
        "amx-tile amx-int8 amx-bf16 amx-fp16".split()
    ),
    "aarch64": frozenset(
        "neon fp-armv8 fullfp16 fp16fml dotprod bf16 i8mm sve sve2 lse rdm complxnum jsconv".split()
    ),
}
_SSE = ("popcnt", "sse3", "sse4.1", "sse4.2", "ssse3")
_AVX = ("avx", *_SSE)
_AVX2 = ("avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", *_AVX)
_AVX512 = ("avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl", *_AVX2)

# name -> (arch, LLVM's processor name, features); the x86-64 levels v2 to v4 of the System V ABI.
_NAMED: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "sse": ("x86_64", "x86-64-v2", _SSE),
    "avx": ("x86_64", "sandybridge", _AVX),
    "avx2": ("x86_64", "x86-64-v3", _AVX2),
    "avx512": ("x86_64", "x86-64-v4", _AVX512),
    "neon": ("aarch64", "generic", ("fp-armv8", "neon")),
}
_NAMED_CORES = 8
# What a thread that is awake needs to join in, and fetches from another's caches, takes about as
# long as storing so many elements.
WORTH_SHARING = 1024
LINE_BYTES = 64  # of a cache line
STREAMED = 16, 32  # bytes: the alignments that stores past the caches need, and of whole registers
_DEFAULT_CACHES = (32 << 10, 1 << 20, 32 << 20)
_SYS_CPU = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Target:
    """One machine, as far as code generation and schedules care.

    Attributes:
        kind: "cpu".
        arch: "x86_64" or "aarch64".
        features: instruction sets that generated code may use, LLVM's names, sorted.
        vector_bytes: width of the widest vector register.
        cores: cores that may be used at once.
        caches: bytes of L1 data, L2 and L3 cache that one core sees.
        fma: whether a fused multiply-add is one instruction.
        registers: number of vector registers.
        cpu_name: LLVM's name of the processor, for instruction scheduling.
    """

    kind: str = "cpu"
    arch: str = "x86_64"
    features: tuple[str, ...] = ()
    vector_bytes: int = 16
    cores: int = 1
    caches: tuple[int, int, int] = _DEFAULT_CACHES
    fma: bool = False
    registers: int = 16
    cpu_name: str = "x86-64"

    @classmethod
    def host(cls) -> Self:
        """This machine, with the cores that this process may use."""
        arch, cpu_name, features = _host_cpu()
        return cls._of(arch, cpu_name, features, usable_cores(), _host_caches())

    @classmethod
    def parse(cls, text: str) -> Self:
        """The target named by `cpu[:level][,cores=N]`.

        Raises:
            MinicompilerError: the text is none of these; the message lists what is accepted.
        """
        name, *options = [part.strip() for part in text.split(",")]
        kind, _, level = name.partition(":")
        if kind != "cpu" or (level not in _NAMED and name != "cpu"):
            raise _unknown(text)
        if level:
            arch, cpu_name, features = _NAMED[level]
            target = cls._of(arch, cpu_name, features, _NAMED_CORES, _DEFAULT_CACHES)
        else:
            target = cls.host()
        for option in options:
            key, _, value = option.partition("=")
            if key != "cores" or not (value.isascii() and value.isdigit() and int(value) > 0):
                raise _unknown(text)
            target = replace(target, cores=int(value))
        return target

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; also accepts the lists that JSON makes of tuples.

        Raises:
            MinicompilerError: a field is missing, unknown or of another type.
        """
        try:
            values = dict(data)
            l1, l2, l3 = values["caches"]
            values["caches"] = (int(l1), int(l2), int(l3))
            values["features"] = tuple(str(feature) for feature in values["features"])
            names = {field.name for field in fields(cls)}
            if values.keys() != names:
                raise ValueError(f"fields {sorted(values.keys() ^ names)}")
            for name, value in values.items():
                if type(value) is not type(getattr(cls(), name)):
                    raise TypeError(f"{name} {value!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise MinicompilerError(f"not a description of a target: {error}") from error
        return cls(**values)

    @classmethod
    def _of(
        cls,
        arch: str,
        cpu_name: str,
        features: Iterable[str],
        cores: int,
        caches: tuple[int, int, int],
    ) -> Self:
        have = frozenset(features)
        if "avx512f" in have:
            vector_bytes = 64
        elif "avx" in have:
            vector_bytes = 32
        else:
            vector_bytes = 16
        return cls(
            kind="cpu",
            arch=arch,
            features=tuple(sorted(have)),
            vector_bytes=vector_bytes,
            cores=cores,
            caches=caches,
            fma="fma" in have or arch == "aarch64",
            registers=32 if "avx512f" in have or arch == "aarch64" else 16,
            cpu_name=cpu_name,
        )

    @property
    def level(self) -> str:
        """The widest named instruction set whose features this target all has."""
        for name in ("avx512", "avx2", "avx", "neon"):
            arch, _, features = _NAMED[name]
            if arch == self.arch and self.has(*features):
                return name
        return "sse" if self.arch == "x86_64" else "neon"

    @property
    def llvm_features(self) -> str:
        """The features in LLVM's syntax, `+avx,+avx2,...`."""
        return ",".join(f"+{feature}" for feature in self.features)

    def lanes(self, size: int) -> int:
        """How many numbers of `size` bytes a register computes with: those of fewer than 4 are
        widened for it."""
        return self.vector_bytes // max(4, size)

    def has(self, *features: str) -> bool:
        """Whether generated code may use all of these instruction sets."""
        return all(feature in self.features for feature in features)

    def missing_features(self, host: Target) -> list[str]:
        """What `host` lacks to run code compiled for this target; empty if it can run it."""
        if host.arch != self.arch:
            return [self.arch]
        return [feature for feature in self.features if feature not in host.features]

    def check_host(self, what: str) -> None:
        """Raises RunError if this machine cannot run `what`, code for the target."""
        missing = self.missing_features(self.host())
        if missing:
            raise RunError(
                f"{what} uses instructions that this processor lacks: {', '.join(missing)}",
                hint='compile it for this machine, or for an older one such as target="cpu:avx2"',
            )

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON types."""
        data = asdict(self)
        return data | {"features": list(self.features), "caches": list(self.caches)}

    def __str__(self) -> str:
        return f"{self.kind}:{self.level},cores={self.cores}"


def usable_cores() -> int:
    """Physical cores this process may keep busy, at least 1.

    The cores of its CPU affinity, two hardware threads of one core counting once (they share the
    multiply-add units), but no more than the container's CPU quota, rounded down: a spinning
    thread beyond the quota gets the others throttled. MINICOMPILER_THREADS overrides it.
    """
    asked = config.threads()
    if asked is not None:
        return asked
    if hasattr(os, "sched_getaffinity"):
        cpus = os.sched_getaffinity(0)
    else:
        cpus = set(range(os.cpu_count() or 1))
    # CPUs whose siblings are unknown count as cores of their own.
    cores = {_read(_SYS_CPU / f"cpu{n}/topology/thread_siblings_list") or str(n) for n in cpus}
    quota = _cgroup_quota()
    return max(1, len(cores) if quota is None else min(len(cores), int(quota)))


def _unknown(text: str) -> MinicompilerError:
    names = ", ".join(["cpu", *(f"cpu:{name}" for name in _NAMED)])
    return MinicompilerError(
        f'unknown target "{text}"', hint=f'use one of {names}; each may be followed by ",cores=N"'
    )


@functools.cache
def _host_cpu() -> tuple[str, str, tuple[str, ...]]:
    # Imported here so that a saved CUDA module loads without llvmlite.
    from llvmlite import binding as llvm

    machine = platform.machine().lower()
    arch = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    if arch not in _FEATURES:
        raise MinicompilerError(
            f'this processor\'s architecture "{arch}" is not supported',
            hint="x86_64 and aarch64 are; name a target such as cpu:avx2 to compile for another",
        )
    try:
        detected = llvm.get_host_cpu_features()
    except RuntimeError:
        # LLVM cannot tell on some systems; the baseline of the architecture always holds.
        detected = {}
    have = {name for name, on in detected.items() if on} & _FEATURES[arch]
    if arch == "aarch64":
        have |= {"neon", "fp-armv8"}
    return arch, llvm.get_host_cpu_name(), tuple(sorted(have))


@functools.cache
def _host_caches() -> tuple[int, int, int]:
    sizes = dict(zip((1, 2, 3), _DEFAULT_CACHES, strict=True))
    # CPU 0 may be outside the affinity, but sysfs describes it all the same.
    for index in sorted((_SYS_CPU / "cpu0/cache").glob("index*")):
        level, size = _read(index / "level"), _read(index / "size")
        if level in ("1", "2", "3") and _read(index / "type") != "Instruction":
            number, unit = size[:-1], size[-1:]
            if number.isdigit() and unit in "KM":
                sizes[int(level)] = int(number) << (10 if unit == "K" else 20)
    return sizes[1], sizes[2], sizes[3]


def _cgroup_quota() -> float | None:
    """CPUs' worth of time the control groups of this process allow, None if unlimited."""
    quotas: list[float] = []
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = _CGROUP / controllers if controllers else _CGROUP
        inner = Path(path.lstrip("/"))
        # Every ancestor may set a limit; a container often sees its own group as the root.
        for group in (inner, *inner.parents):
            if controllers:
                quota = _read(root / group / "cpu.cfs_quota_us")
                period = _read(root / group / "cpu.cfs_period_us")
            else:
                quota, _, period = _read(root / group / "cpu.max").partition(" ")
            if quota.isdigit() and period.isdigit() and int(period) > 0:
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
