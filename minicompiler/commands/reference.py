"""The help texts of all commands as one Markdown document: docs/commands.md.

    minicompiler --help-all > docs/commands.md

tests/test_commands.py compares the file with what this gives, so it cannot fall behind.
"""

from __future__ import annotations

from collections.abc import Iterator

import click

_WIDTH = 96
_HEAD = """# Commands

The help text of every command, written by `minicompiler --help-all > docs/commands.md`.
"""


def markdown(group: click.Group) -> str:
    """A section per command, in the order of the group; commands of a group follow it."""
    parts = [_HEAD]
    for path, command in _commands("minicompiler", group):
        # Fixed, so that the text does not depend on the terminal.
        ctx = click.Context(command, info_name=path, terminal_width=_WIDTH)
        ctx.help_option_names = ["-h", "--help"]
        parts.append(f"## {path}\n\n```text\n{command.get_help(ctx).rstrip()}\n```\n")
    return "\n".join(parts)


def _commands(path: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            yield from _commands(f"{path} {name}", command.commands[name])
