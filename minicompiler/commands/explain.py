"""`minicompiler explain model`: what each stage of the compiler did, as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import click

from minicompiler.commands import options
from minicompiler.errors import MinicompilerError


@click.command("explain")
@options.model
@click.option("--kernel", metavar="NAME", help="One kernel, with its loop nests.")
@click.option("--stage", type=click.Choice(["graph", "fuse", "tir", "schedule", "llvm", "asm"]),
              help="One stage; default: all but llvm and asm.")  # fmt: skip
@options.dims
@options.compiling
@options.as_json
def command(
    model: str,
    kernel: str | None,
    stage: str | None,
    dims: Sequence[str],
    target: str,
    level: int,
    as_json: bool,
) -> None:
    """Show what each stage of the compiler did, and why.

    Lines that a stage added are marked with +, those it removed with -. Without --kernel: the graph
    after each pass, the kernels with their source nodes, why neighbours were not fused, and the
    schedule of each kernel. --json has the texts and the schedule's steps.
    """
    from minicompiler import driver
    from minicompiler.context import Context, Options
    from minicompiler.inputs import parse_dims, single, suffix_of
    from minicompiler.lens.explain import compile_stages, explain, of_kernel
    from minicompiler.report import Output
    from minicompiler.target import Target

    if suffix_of(model) == ".mc":
        raise MinicompilerError(
            f"{model} is compiled: how it was made is not stored in it",
            hint="explain the model that it was compiled from",
        )
    out = Output(as_json)
    wanted = single(parse_dims(dims))
    ctx = Context(Target.parse(target), Options(level=level))
    with out.busy(f"compiling {Path(model).name}"):
        stages = compile_stages(driver.import_model(model, wanted), ctx, kernel, stage)
    for line in explain(stages, kernel, stage):
        out.marked(line.mark, line.text)
    shown = stages if kernel is None else of_kernel(stages, kernel)
    out.finish({"model": model, "stages": [dataclasses.asdict(s) for s in shown]})
