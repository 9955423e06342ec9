"""`minicompiler run model`: one call; prints what came out, and compares it if asked to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minicompiler.commands import options
from minicompiler.errors import MinicompilerError

if TYPE_CHECKING:
    import numpy as np

    from minicompiler.report import Opened


@click.command("run")
@options.model
@options.feeding
@click.option("--output", metavar="FILE.npz", help="Where to write the outputs.")
@click.option("--check", type=click.Choice(["onnxruntime", "reference"]),
              help="Compare with onnxruntime or a numpy evaluation of the graph.")  # fmt: skip
@click.option("--tolerance", type=float, default=1e-4, show_default=True,
              help="For --check: max |error| / max |result|.")  # fmt: skip
@options.dims
@options.threads
@options.compiling
@click.option(
    "--checked", is_flag=True, help="Verify every compiler step and every kernel's result."
)
@options.as_json
def command(
    model: str,
    pairs: Sequence[str],
    archive: str | None,
    output: str | None,
    check: str | None,
    tolerance: float,
    dims: Sequence[str],
    threads: int | None,
    target: str,
    level: int,
    checked: bool,
    as_json: bool,
) -> None:
    """Run a model once; inputs that are not given are random."""
    import numpy as np

    from minicompiler.commands.feeds import feeds
    from minicompiler.inputs import difference, parse_dims, read_inputs, single
    from minicompiler.report import Output, open_model

    out = Output(as_json)
    wanted = single(parse_dims(dims))
    given = read_inputs(pairs, archive)
    with out.busy(f"preparing {Path(model).name}"):
        opened = open_model(model, wanted, threads, target, level, checked=checked)
    arrays = feeds(out, opened, wanted, given)
    results = opened.module.run(arrays)
    if output:
        try:
            with open(output, "wb") as file:
                np.savez(file, **results)
        except OSError as error:
            raise MinicompilerError(f"{output} cannot be written: {error.strerror}") from None
    rows = [_statistics(name, a) for name, a in results.items()]
    columns = ("name", "type", "min", "mean", "max")
    cells = [[r.get(c, "") for c in columns] for r in rows]
    out.table("Outputs", ["name", "type", ">min", ">mean", ">max"], cells)
    report: dict[str, Any] = {"outputs": rows}
    errors: dict[str, float] = {}
    if check:
        expected = _expected(check, opened, arrays)
        for (name, a), want in zip(results.items(), expected, strict=True):
            errors[name] = e = difference(a, want)
            out.say(f"{name}: max |error| / max |{check}| = {e:.2e} (limit {tolerance:.0e})")
        report["check"] = {"against": check, "limit": tolerance, "errors": errors}
    out.finish(report)
    wrong = [name for name, e in errors.items() if e > tolerance]
    options.fail_unless(not wrong, f"{', '.join(wrong)} differs from {check}")


def _expected(check: str, opened: Opened, arrays: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
    """The outputs that something else computes."""
    if opened.graph is None:
        raise MinicompilerError(f"--check needs the original model, not {opened.path}")
    if check == "reference":
        from minicompiler.ops.evaluate import run_reference

        return run_reference(opened.graph, arrays)
    from minicompiler.bench import peer

    return peer(check, opened.path, 1)(arrays)()


def _statistics(name: str, a: np.ndarray) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "type": f"{a.dtype}{list(a.shape)}"}
    if a.size and a.dtype.kind != "b":
        wide = a.astype("float64")
        row |= {
            "min": f"{wide.min():.6g}",
            "mean": f"{wide.mean():.6g}",
            "max": f"{wide.max():.6g}",
        }
    return row
