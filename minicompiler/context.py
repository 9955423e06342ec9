"""What a compilation carries along: target, options, tuning database, and the record of its stages.

ctx = Context(target, Options(level=2))
pipeline.run(GRAPH_PASSES[2], fn, ctx)
ctx.stages[-1].text        the graph after the last pass, as `ir.text` prints it
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .target import Target


@dataclasses.dataclass(frozen=True)
class Options:
    """What the caller of `compile` chose.

    Attributes:
        level: 0 (no optimisation) to 3.
        threads: threads of the module; 0: the usable cores.
        checked: verify the IR after every pass and schedule step.
        max_error: algorithms that trade accuracy for fewer multiplications (Winograd convolution)
        may
            be chosen when their stated error, relative to the largest result, is at most this.
        fold_bytes: how much larger a folded constant may be than what it is computed from.
        record: keep the text of every stage (a little slower on large models).
    """

    level: int = 3
    threads: int = 0
    checked: bool = False
    max_error: float = 1e-4
    fold_bytes: int = 16 << 20
    record: bool = True


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a compilation.

    Attributes:
        subject: what was worked on: the model's or the kernel's name.
        level: the kind of artifact: "graph", "tir", "code", "plan".
        name: the pass.
        text: the artifact after the step; "" when it is the same as before.
        seconds: the time the step took.
    """

    subject: str
    level: str
    name: str
    text: str
    seconds: float


@dataclasses.dataclass
class Context:
    """One compilation. Passes read `target` and `options`; only the pipeline adds `stages`.

    guards: comparisons of dimensions to be checked at every call, each with the node that needs it.
    """

    target: Target | None = None
    options: Options = dataclasses.field(default_factory=Options)
    database: Any = None
    stages: list[Stage] = dataclasses.field(default_factory=list)
    guards: list[tuple[Any, str]] = dataclasses.field(default_factory=list)
