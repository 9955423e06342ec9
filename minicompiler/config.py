"""The environment variables, all in one place, read each time they are used.

MINICOMPILER_CACHE    folder of compiled kernels and tuning records (default: the user's cache)
MINICOMPILER_CHECKED  1: verify every step of the compiler, and every kernel while it runs (slow)
MINICOMPILER_DEBUG    0 to 6: how much the compiler tells on stderr; see docs/debugging.md
MINICOMPILER_DUMP     folder that every stage's artifact is written to
MINICOMPILER_OVERRIDE folder of artifacts that replace those of kernels
MINICOMPILER_THREADS  threads used by a module (default: the usable cores, see target.py)
"""

from __future__ import annotations

import os
from pathlib import Path

from minicompiler.errors import MinicompilerError

VERSION = "0.1.0"


def cache_dir() -> Path:
    """The folder of the disk cache; it need not exist yet."""
    value = os.environ.get("MINICOMPILER_CACHE")
    if value:
        return Path(value).expanduser()
    # Imported here so that a saved module loads without platformdirs when the folder is given.
    import platformdirs

    return Path(platformdirs.user_cache_dir("minicompiler", appauthor=False))


def checked() -> bool:
    """Whether every schedule step and pass is followed by a verification."""
    return _integer("MINICOMPILER_CHECKED", 0, 1) == 1


def debug() -> int:
    """How much the compiler tells on stderr, each level with those below it.

    0: nothing, 1: stages and their seconds, 2: the graph after each pass, 3: what was fused, what
    was not and why, 4: loop nests and schedule steps, 5: LLVM IR, 6: assembly.
    """
    return _integer("MINICOMPILER_DEBUG", 0, 6) or 0


def dump_dir() -> Path | None:
    """Where artifacts of stages are written, if anywhere."""
    return _folder("MINICOMPILER_DUMP")


def override_dir() -> Path | None:
    """Where artifacts lie that replace those of kernels, if anywhere."""
    return _folder("MINICOMPILER_OVERRIDE")


def threads() -> int | None:
    """The number of threads asked for, or None to use the usable cores."""
    return _integer("MINICOMPILER_THREADS", 1, 4096)


def _folder(name: str) -> Path | None:
    value = os.environ.get(name, "").strip()
    return Path(value).expanduser() if value else None


def _integer(name: str, lo: int, hi: int) -> int | None:
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and lo <= int(text) <= hi):
        raise MinicompilerError(
            f"environment variable {name}={text!r} is not an integer from {lo} to {hi}",
            hint=f"unset {name}, or give it such a value",
        )
    return int(text)
