"""The command line: `minicompiler COMMAND ...`; each command is a module of minicompiler.commands.

    minicompiler compile model.onnx -o model.mc --dims batch=1..64
    minicompiler run model.mc --input x=x.npy --output y.npz
    minicompiler bench model.onnx --threads 1,2 --against onnxruntime

To add one, write minicompiler/commands/NAME.py with a click command called `command`, and add NAME
to COMMANDS.
"""

from __future__ import annotations

import _thread
import contextlib
import importlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import click

# Nothing else is imported at the top, so that --help is quick.
from minicompiler import __version__
from minicompiler.commands.options import INTERNAL_ERROR, INTERRUPTED, JSON, USER_ERROR
from minicompiler.errors import InternalError, MinicompilerError

COMMANDS = ("demo", "compile", "run", "bench", "inspect", "profile", "explain", "verify", "cache")
"""In the order in which they are shown."""


class _Commands(click.Group):
    """A group whose commands end with a message, never with a traceback, on a user's mistake."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _no_lost_interrupts():
                return super().invoke(ctx)
        except MinicompilerError as error:
            _report(ctx, type(error).__name__, error.message, str(error))
            click.echo(f"{type(error).__name__}: {error}", err=True)
            ctx.exit(INTERNAL_ERROR if isinstance(error, InternalError) else USER_ERROR)
        except MemoryError as error:  # of numpy, in a reference: compiled code has its own check
            text = f"there is not enough memory{f': {error}' if str(error) else ''}"
            _report(ctx, "MemoryError", text, text)
            click.echo(f"MemoryError: {text}\n  hint: use smaller inputs (--dims)", err=True)
            ctx.exit(USER_ERROR)
        except KeyboardInterrupt:
            _report(ctx, "KeyboardInterrupt", "interrupted", "interrupted")
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)


@contextlib.contextmanager
def _no_lost_interrupts() -> Iterator[None]:
    """A Ctrl-C that arrives in a destructor cannot leave it: it is raised anew a moment later."""
    others = sys.unraisablehook

    def again() -> None:
        time.sleep(0.01)
        _thread.interrupt_main()

    def hook(lost: sys.UnraisableHookArgs) -> None:
        if lost.exc_type is KeyboardInterrupt:
            # Not through `threading`: the destructor may run while its lock is held.
            _thread.start_new_thread(again, ())
        else:
            others(lost)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = others


def _report(ctx: click.Context, kind: str, message: str, text: str) -> None:
    """With --json an error is the one document on standard output."""
    if ctx.meta.get(JSON):
        click.echo(json.dumps({"error": kind, "message": message, "text": text}, indent=2))


def _print_all(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from minicompiler.commands.reference import markdown

        click.echo(markdown(main), nl=False)
        ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("--help-all", is_flag=True, is_eager=True, expose_value=False, callback=_print_all,
              help="Show the help of all commands, as Markdown.")  # fmt: skip
def main() -> None:
    """A small tensor compiler: ONNX models to fast native kernels.

    MODEL is an .onnx file, or an .mc file that `compile` wrote. Start with `minicompiler demo`.

    Results go to standard output, remarks and progress to standard error. With --json, standard
    output is exactly one JSON document, also for an error: {"error", "message", "text"}. Colours
    and progress are for terminals only; NO_COLOR turns colours off.

    \b
    Exit codes:
      0    fine
      1    a check failed: a result differs from the one it was compared with
      2    wrong usage, or a model that cannot be read, compiled or run
      3    inspect: the model uses operators that are not supported (they are listed)
      4    a mistake of minicompiler itself: please report it
      130  Ctrl-C
    """


for _name in COMMANDS:
    main.add_command(importlib.import_module(f"minicompiler.commands.{_name}").command, _name)

if __name__ == "__main__":
    main(prog_name="minicompiler")
