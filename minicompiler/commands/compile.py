"""`minicompiler compile model.onnx -o model.mc`: a file that runs without the compiler."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import click

from minicompiler.commands import options
from minicompiler.errors import MinicompilerError


@click.command("compile")
@options.model
@click.option("-o", "--output", metavar="FILE", help="Default: MODEL with the ending .mc.")
@options.dims
@options.threads
@options.compiling
@options.limit
@options.as_json
def command(
    model: str,
    output: str | None,
    dims: Sequence[str],
    threads: int | None,
    target: str,
    level: int,
    limits: Sequence[str],
    as_json: bool,
) -> None:
    """Compile an ONNX model to a file that runs without the compiler.

    Dimensions without a name in the model are called INPUT.AXIS, such as x.0.
    """
    from minicompiler.inputs import parse_dims, single, suffix_of
    from minicompiler.limits import parse_limits
    from minicompiler.report import (
        Output,
        count_text,
        interface,
        open_model,
        say_interface,
        show_stages,
    )

    if suffix_of(model) == ".mc":
        raise MinicompilerError(f"{model} is compiled already")
    out = Output(as_json)
    path = output or str(Path(model).with_suffix(".mc"))
    if os.path.exists(path) and os.path.samefile(path, model):
        raise MinicompilerError(f"--output {path} is the model itself", hint="name another file")
    with out.busy(f"compiling {Path(model).name}"):
        opened = open_model(
            model, single(parse_dims(dims)), threads, target, level, parse_limits(limits)
        )
    module = opened.module
    module.save(path)
    size = os.path.getsize(path)
    show_stages(out, module)
    say_interface(out, opened)
    out.say(f"{path}: {count_text(size, 'B')}, {len(module.plan.kernels)} kernels, "
            f"compiled in {opened.seconds:.2f} s for {module.target}")  # fmt: skip
    out.finish({
        "output": path, "bytes": size, "kernels": len(module.plan.kernels),
        "seconds": opened.seconds, "target": str(module.target), **interface(opened),
    })  # fmt: skip
