"""`minicompiler cache info | clear`: the compiled kernels kept on disk."""

from __future__ import annotations

import click

from minicompiler.commands import options


@click.group("cache")
def command() -> None:
    """The compiled kernels kept on disk (folder: MINICOMPILER_CACHE)."""


@command.command()
@options.as_json
def info(as_json: bool) -> None:
    """Show where the cache is and how full."""
    from minicompiler.report import Output, count_text
    from minicompiler.runtime.diskcache import DiskCache

    state = DiskCache().info()
    out = Output(as_json)
    out.say(f"{state.folder}: {state.entries} entries, {count_text(state.bytes, 'B')} "
            f"of {count_text(state.limit, 'B')}")  # fmt: skip
    out.finish({
        "folder": str(state.folder), "entries": state.entries, "bytes": state.bytes,
        "limit": state.limit,
    })  # fmt: skip


@command.command()
@options.as_json
def clear(as_json: bool) -> None:
    """Delete all cached kernels."""
    from minicompiler.report import Output
    from minicompiler.runtime.diskcache import DiskCache

    count = DiskCache().clear()
    out = Output(as_json)
    out.say(f"{count} entries deleted")
    out.finish({"deleted": count})
