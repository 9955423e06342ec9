"""What a compilation carries along: target, options, tuning database, and the record of its stages.

ctx = Context(target, Options(level=2))
pipeline.run(GRAPH_PASSES[2], fn, ctx)
ctx.stages[-1].text        the graph after the last pass, as `ir.text` prints it
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import config
from .extensions import Extensions
from .limits import Budget, Limits

if TYPE_CHECKING:
    from .target import Target


@dataclasses.dataclass(frozen=True)
class Options:
    """What the caller of `compile` chose.

    Attributes:
        level: 0 (no optimisation) to 3.
        threads: threads of the module; 0: the usable cores.
        checked: verify the IR after every pass and schedule step, and every kernel while it runs.
        max_error: algorithms that trade accuracy for fewer multiplications (Winograd convolution)
        may
            be chosen when their stated error, relative to the largest result, is at most this.
        caches: outputs that append to an input are written in place (passes/caches.py).
        fold_bytes: how much larger a folded constant may be than what it is computed from.
        record: keep the text of every stage (a little slower on large models).
        limits: what compiling the model may cost.
        extensions: operators, passes, rules and a backend of the user's own.
        cache: take kernels from the disk cache, where they have no stages to look at.
        dump: folder that every stage's artifact is written to (None: MINICOMPILER_DUMP).
        override: folder of artifacts that replace those of kernels (None: MINICOMPILER_OVERRIDE).
    """

    level: int = 3
    threads: int = 0
    checked: bool = dataclasses.field(default_factory=config.checked)
    max_error: float = 1e-4
    caches: bool = False
    fold_bytes: int = 16 << 20
    record: bool = True
    limits: Limits = dataclasses.field(default_factory=Limits)
    extensions: Extensions = dataclasses.field(default_factory=Extensions)
    cache: bool = True
    dump: Path | None = None
    override: Path | None = None


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a compilation.

    Attributes:
        subject: what was worked on: the model's or the kernel's name.
        level: the kind of artifact: "graph", "tir", "code", "plan".
        name: the pass.
        text: the artifact after the step; "" when it is the same as before.
        seconds: the time the step took.
        details: what the text does not say, JSON-able: the source nodes of a kernel ("nodes", of
            to_tir), the "rule", "steps" and "choices" of a schedule, "kernels" and "refused" of
            fusion.
    """

    subject: str
    level: str
    name: str
    text: str
    seconds: float
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Context:
    """One compilation. Passes read `target` and `options`; `stages` grow through
    `artifacts.record` alone.

    guards: comparisons of dimensions to be checked at every call, each with the node that needs it.
    budget: what has been used of `options.limits`; its time runs from here on.
    """

    target: Target | None = None
    options: Options = dataclasses.field(default_factory=Options)
    database: Any = None
    stages: list[Stage] = dataclasses.field(default_factory=list)
    guards: list[tuple[Any, str]] = dataclasses.field(default_factory=list)
    budget: Budget = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.budget = Budget(self.options.limits)
