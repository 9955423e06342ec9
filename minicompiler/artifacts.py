"""Every stage's artifact as it passes by: recorded, shown, written to a folder, or replaced.

    record(ctx, Stage("fused_conv", "tir", "to_tir", text, 0.01), func)
        appends to ctx.stages; prints for MINICOMPILER_DEBUG; with MINICOMPILER_DUMP=DIR writes
        DIR/fused_conv/to_tir.txt to read, and DIR/fused_conv/to_tir.json
    Overrides.read(ctx).of("fused_conv").tir("to_tir")
        the function of DIR/fused_conv/to_tir.json for MINICOMPILER_OVERRIDE=DIR, or None

Both folders have the same layout: copy a file of a dump, change it, name it in an override.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import config
from .context import Context, Stage
from .errors import MinicompilerError
from .ir.serial import from_json, to_json
from .ir.tir import PrimFunc
from .ir.verify_tir import verify_tir

# What a file in an override folder may replace; other files of a dump are for reading.
REPLACEABLE = ("to_tir.json", "schedule.steps.json", "schedule.json", "llvm.ll")
ASSEMBLY_LEVEL = 6
_SHOWN_OPTIONS = 8
_KERNEL_LEVEL = 4  # from here on, MINICOMPILER_DEBUG shows what happens inside of kernels


# ---- recording -----------------------------------------------------------------------------------
def record(ctx: Context, stage: Stage, artifact: Any = None) -> None:
    """Adds a stage to the record of a compilation, and shows and writes it where that is asked.

    artifact: the PrimFunc after the step, if it is one; it is written as JSON beside the text.
    """
    ctx.stages.append(stage)
    _show(stage, config.debug())
    folder = dump_folder(ctx)
    if folder is not None:
        _dump(folder, stage, artifact, len(ctx.stages))


def unless_same(ctx: Context, subject: str, level: str, text: str) -> str:
    """`text`, or "" when the previous stage of the subject left the same."""
    if not text:
        return ""
    before = (s.text for s in reversed(ctx.stages) if (s.subject, s.level) == (subject, level))
    return "" if next(filter(None, before), None) == text else text


def keeps_texts(ctx: Context) -> bool:
    """Whether stages need the text of their artifact."""
    return ctx.options.record or config.debug() > 1 or dump_folder(ctx) is not None


def keeps_kernels(ctx: Context) -> bool:
    """Whether kernels belong into the disk cache: its keys do not say what checked mode adds, nor
    what a user's rules or backend do."""
    options = ctx.options
    return options.cache and not options.checked and not options.extensions.changes_kernels


def reads_cache(ctx: Context) -> bool:
    """Whether kernels may come from the disk cache: not when somebody wants to see their stages."""
    hidden = config.debug() < _KERNEL_LEVEL and dump_folder(ctx) is None
    return keeps_kernels(ctx) and hidden


def wants_assembly(ctx: Context) -> bool:
    """Whether kernels are also compiled to assembly text."""
    return config.debug() >= ASSEMBLY_LEVEL or dump_folder(ctx) is not None


def dump_folder(ctx: Context) -> Path | None:
    """Where artifacts are written: the option, else the environment variable."""
    return ctx.options.dump or config.dump_dir()


def _show(stage: Stage, level: int) -> None:
    """The stage on stderr, as far as the debug level goes. The ladder is in config.debug."""
    if not level:
        return
    lines = [f"[{stage.level}] {stage.subject}: {stage.name} ({stage.seconds * 1e3:.1f} ms)"]
    if stage.name == "fuse" and level >= 3:
        lines += fusion_lines(stage.details)
    if stage.name == "schedule" and level >= _KERNEL_LEVEL:
        lines += schedule_lines(stage.details)
    needed = {"graph": 2, "tir": _KERNEL_LEVEL, "code": 5}.get(stage.level, 1)
    if level >= (ASSEMBLY_LEVEL if stage.name == "asm" else needed):
        lines += stage.text.splitlines()
    sys.stderr.write("\n  ".join(lines) + "\n")


def fusion_lines(details: Mapping[str, Any]) -> list[str]:
    """The decisions of `fuse`, from the details of its stage: each kernel, each refusal."""
    lines = [f"{name} = {call}" for name, calls in details["kernels"].items() for call in calls]
    return lines + [f"not fused: {reason}" for reason in details["refused"]]


def schedule_lines(details: Mapping[str, Any]) -> list[str]:
    """A schedule, from the details of its stage: the rule, its choices, its steps as calls."""
    lines = [f"rule: {details['rule']}"] if details.get("rule") else []
    for choice in details.get("choices", ()):
        lines.append(f"{choice['name']}: {choice['chosen']} of {_options(choice['options'])}")
    for step in details.get("steps", ()):
        args = ", ".join(f"{k}={v!r}" for k, v in step["args"].items())
        made = f"{', '.join(step['made'])} = " if step["made"] else ""
        lines.append(f"{made}{step['primitive']}({args})")
    return lines


def _options(options: Sequence[Any]) -> str:
    if len(options) > _SHOWN_OPTIONS:
        return f"{len(options)}, {options[0]} to {options[-1]}"
    return ", ".join(map(str, options))


def _dump(folder: Path, stage: Stage, artifact: Any, number: int) -> None:
    if not stage.text:
        return
    try:
        if stage.level == "graph":
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:02}-{stage.name}.txt").write_text(stage.text)
            return
        place = folder / stage.subject
        place.mkdir(parents=True, exist_ok=True)
        ending = {"llvm": "ll", "asm": "s"}.get(stage.name, "txt")
        (place / f"{stage.name}.{ending}").write_text(stage.text)
        if isinstance(artifact, PrimFunc):
            (place / f"{stage.name}.json").write_text(json.dumps(to_json(artifact)))
        if stage.name == "schedule":
            steps = json.dumps(stage.details["steps"], indent=1)
            (place / "schedule.steps.json").write_text(steps)
    except OSError as e:
        raise MinicompilerError(f"the dump folder {folder} cannot be written: {e}") from None


# ---- replacing -----------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class KernelOverride:
    """The files that replace artifacts of one kernel, by name; none for most kernels."""

    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.files)

    def key(self) -> str:
        """What is part of the kernel's symbol, so that it is not taken for the one it replaces."""
        parts = [f"{name}\n{_read(path)}" for name, path in sorted(self.files.items())]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()

    def tir(self, stage: str, like: PrimFunc) -> PrimFunc | None:
        """The function that replaces `like` after a stage. Raises MinicompilerError where the file
        holds none, or one with other parameters; VerifyError where it is not well formed."""
        data = self._json(f"{stage}.json")
        if data is None:
            return None
        path = self.files[f"{stage}.json"]
        try:
            func = from_json(data)
        except (ValueError, TypeError, KeyError, IndexError) as e:
            raise MinicompilerError(f"{path} is no loop nest: {e}") from None
        if not isinstance(func, PrimFunc):
            raise MinicompilerError(f"{path} holds a {type(func).__name__}, not a loop nest")
        if _signature(func) != _signature(like):
            raise MinicompilerError(
                f"{path} has other parameters than the kernel that it replaces",
                excerpt=f"given: {_signature(func)}\nkernel: {_signature(like)}",
                hint="an override keeps the parameters, results and dimensions of its kernel",
            )
        verify_tir(func)
        return func

    def steps(self) -> list[dict[str, Any]] | None:
        """The schedule steps to apply instead of the rule's."""
        found = self._json("schedule.steps.json")
        if found is None:
            return None
        if not isinstance(found, list) or not all(
            isinstance(s, dict) and {"primitive", "args"} <= s.keys() for s in found
        ):
            path = self.files["schedule.steps.json"]
            raise MinicompilerError(f'{path} is no list of steps {{"primitive": ..., "args": ...}}')
        return found

    def llvm(self, suffix: str) -> str | None:
        """The LLVM IR of the kernel (not of what prepares its constants); its symbol gets the
        suffix of this compilation."""
        path = self.files.get("llvm.ll")
        if path is None:
            return None
        name = path.parent.name
        return re.sub(rf"@{re.escape(name)}\b", f"@{name}{suffix}", _read(path))

    def _json(self, file: str) -> Any:
        path = self.files.get(file)
        if path is None:
            return None
        try:
            return json.loads(_read(path))
        except ValueError as e:
            raise MinicompilerError(f"{path} is not JSON: {e}") from None


NOTHING = KernelOverride()


@dataclasses.dataclass(frozen=True)
class Overrides:
    """The kernels that have files in the override folder."""

    kernels: Mapping[str, KernelOverride] = dataclasses.field(default_factory=dict)

    @staticmethod
    def read(ctx: Context, names: Iterable[str]) -> Overrides:
        """The override folder of a compilation whose kernels are `names`.

        Raises MinicompilerError when it is no folder, or one of its entries names no kernel or no
        artifact that can be replaced.
        """
        folder = ctx.options.override or config.override_dir()
        if folder is None:
            return Overrides()
        if not folder.is_dir():
            raise MinicompilerError(f"the override folder {folder} does not exist")
        known = set(names)
        found = {}
        for place in sorted(folder.iterdir()):
            if place.name not in known or not place.is_dir():
                raise MinicompilerError(
                    f'the override "{place}" names no kernel of this model',
                    hint=f"its kernels: {', '.join(sorted(known))}",
                )
            files = {f.name: f for f in sorted(place.iterdir())}
            for name, path in files.items():
                if name not in REPLACEABLE:
                    raise MinicompilerError(
                        f'the override "{path}" is no artifact that can be replaced',
                        hint=f"these can: {', '.join(REPLACEABLE)}",
                    )
            found[place.name] = KernelOverride(files)
        return Overrides(found)

    def of(self, kernel: str) -> KernelOverride:
        """The files for one kernel."""
        return self.kernels.get(kernel, NOTHING)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise MinicompilerError(f"{path} cannot be read: {e}") from None


def _signature(func: PrimFunc) -> str:
    params = ", ".join(str(b) for b in func.params)
    return f"({params}) -> {func.results} results; dims {', '.join(d.name for d in func.dims)}"
