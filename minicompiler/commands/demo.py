"""`minicompiler demo`: build, compile, check and time a ResNet-18 with random weights.

Nothing is downloaded. The result is compared with a numpy evaluation of the same graph.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import click

from minicompiler.commands import options

DEMO_LIMIT = 5e-5


@click.command("demo")
@options.threads
@click.option("--size", type=click.IntRange(32), default=224, show_default=True, help="Pixels.")
@options.as_json
def command(threads: int | None, size: int, as_json: bool) -> None:
    """Compile and check a ResNet-18 with random weights.

    The network is built in Python, so nothing is downloaded. Its result is compared with a plain
    numpy evaluation of the same graph; an error above 5e-5 of the largest result fails.
    Rates count the operations of plain convolution, whatever algorithm a kernel uses.
    """
    from minicompiler.demo import image, resnet18
    from minicompiler.inputs import difference
    from minicompiler.ops.evaluate import run_reference
    from minicompiler.report import (
        Output,
        compiled,
        count_text,
        kernel_rows,
        show_kernels,
        show_stages,
    )
    from minicompiler.runtime.profile import profile

    out = Output(as_json)
    fn, x = resnet18(size), image(size)
    with out.busy("compiling ResNet-18"):
        opened = compiled("resnet18", fn, threads, "cpu", 3, time.perf_counter())
    module = opened.module
    (y,) = module(x)
    with out.busy("evaluating it with numpy"):
        start = time.perf_counter()
        (want,) = run_reference(fn, [x])
        numpy_seconds = time.perf_counter() - start
    error = difference(y, want)
    seconds = _median_seconds(lambda: module(x))
    rows = kernel_rows(opened, profile(module, [x]))
    flops = opened.flops({}) or 0
    out.say(f"ResNet-18, {size}x{size} pixels, for {module.target}; {module.threads} threads")
    show_stages(out, module)
    show_kernels(out, rows)
    out.say(f"compiled in   {opened.seconds:.2f} s")
    out.say(f"latency       {seconds * 1e3:.2f} ms (numpy: {numpy_seconds * 1e3:.0f} ms)")
    out.say(f"speed         {flops / seconds / 1e9:.1f} GFLOP/s ({count_text(flops, 'FLOP')})")
    out.say(f"max |error| / max |reference|  {error:.2e} (limit {DEMO_LIMIT:.0e})")
    out.finish({
        "compile_seconds": opened.seconds, "latency_seconds": seconds, "flops": flops,
        "numpy_seconds": numpy_seconds, "error": error, "limit": DEMO_LIMIT,
        "target": str(module.target), "threads": module.threads, "kernels": rows,
    })  # fmt: skip
    options.fail_unless(error <= DEMO_LIMIT, "the result is wrong")


def _median_seconds(run: Callable[[], object], budget: float = 1.0) -> float:
    run()
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
