"""Options that several commands share, and the exit codes.

@click.command("compile")
@options.model
@options.compiling
@options.as_json
def command(model: str, target: str, level: int, as_json: bool) -> None: ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

CHECK_FAILED = 1
"""A result is wrong: `--check`, or what the demo and `verify` compare."""
USER_ERROR = 2
"""Wrong usage, or a model that cannot be read, compiled or run. click uses the same number."""
UNSUPPORTED = 3
"""`inspect`: the model is fine, but uses operators that minicompiler lacks."""
INTERNAL_ERROR = 4
"""A mistake of minicompiler itself."""
INTERRUPTED = 130
"""Ctrl-C."""

JSON = "minicompiler.json"
"""Key of `click.Context.meta`: whether `--json` was given."""


def together(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, shown in this order by --help."""

    def add(f: F) -> F:
        for decorator in reversed(decorators):
            f = decorator(f)
        return f

    return add


def _remember_json(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    """Tells the group, which writes the errors, that a machine reads them."""
    ctx.meta[JSON] = value
    return value


model = click.argument("model", type=click.Path(exists=True, dir_okay=False))
as_json = click.option("--json", "as_json", is_flag=True, callback=_remember_json,
                       help="Print one JSON object instead of text.")  # fmt: skip
threads = click.option("--threads", type=click.IntRange(1), help="Default: the usable cores.")
dims = click.option(
    "--dims",
    multiple=True,
    metavar="NAME=SIZE,...",
    help="Sizes of named dimensions: batch=8, batch=1..64, sequence=8..512:8 (multiples of 8).",
)
limit = click.option(
    "--limit",
    "limits",
    multiple=True,
    metavar="NAME=VALUE",
    help="What compiling may cost: nodes, model_bytes, rank, fold_bytes, fold_operations, "
    "operations, seconds.",
)
several_dims = click.option(
    "--dims",
    multiple=True,
    metavar="NAME=SIZE,...",
    help="As for compile; several sizes (batch=1,8) are looked at in turn.",
)
compiling = together(
    click.option("--target", default="cpu", show_default=True, help="cpu, cpu:avx2, ..."),
    click.option("--level", type=click.IntRange(0, 3), default=3, show_default=True,
                 help="Optimisation; 0 is none."),
)  # fmt: skip
feeding = together(
    click.option("--input", "pairs", multiple=True, metavar="NAME=FILE.npy", help="One input."),
    click.option("--inputs", "archive", metavar="FILE.npz", help="Inputs by name."),
)


def fail_unless(fine: bool, message: str) -> None:
    """Ends the command with CHECK_FAILED and a message on standard error."""
    if not fine:
        click.echo(f"check failed: {message}", err=True)
        raise click.exceptions.Exit(CHECK_FAILED)
