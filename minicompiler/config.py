"""The environment variables, all in one place, read each time they are used.

MINICOMPILER_CACHE    folder of compiled kernels and tuning records (default: the user's cache)
MINICOMPILER_CHECKED  1: verify every IR after every step (slow; always on in the tests)
MINICOMPILER_DEBUG    0: quiet, 1: a line per stage on stderr, 2: also each stage's text
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
    """How much the compiler tells on stderr: 0, 1 or 2."""
    return _integer("MINICOMPILER_DEBUG", 0, 2) or 0


def threads() -> int | None:
    """The number of threads asked for, or None to use the usable cores."""
    return _integer("MINICOMPILER_THREADS", 1, 4096)


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
