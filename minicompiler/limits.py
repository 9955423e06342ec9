"""What a model may cost while it is compiled: a bound on damage by models from strangers.

    mc.compile("model.onnx", limits=mc.Limits(nodes=10_000, seconds=60))

    LimitError: the model needs 10001 nodes, the limit is 10000
      from Add "block7/Add" (model.onnx:10001)
      hint: if you trust this model, raise the limit: Limits(nodes=20002), --limit nodes=20002

The defaults are far above what today's largest networks need. A Budget counts one compilation.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from .errors import LimitError, MinicompilerError, SourceLoc


@dataclasses.dataclass(frozen=True)
class Limits:
    """The most of each that one compilation may use.

    Attributes:
        nodes: nodes imported; those of subgraphs, of functions and of each unrolled iteration
            count every time they are put into the graph.
        model_bytes: bytes of the model's file and of the weights in files beside it.
        rank: dimensions of a tensor.
        fold_bytes: bytes of all constants that are computed while compiling.
        fold_operations: steps (points of loop nests) spent on computing them.
        operations: steps of one call of the module where its dimensions are smallest. Loops whose
            end depends on data are counted as one iteration.
        seconds: time from the start of the import. Looked at between nodes, passes, kernels and
            steps of a schedule.
    """

    nodes: int = 500_000
    model_bytes: int = 256 << 30
    rank: int = 32
    fold_bytes: int = 8 << 30
    fold_operations: int = 20_000_000_000
    operations: int = 10**16
    seconds: float = 3600.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            kinds = (int, float) if name == "seconds" else (int,)
            if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
                raise MinicompilerError(
                    f"the limit {name} is {value!r}, not a positive number",
                    hint=f"the default is {Limits.__dataclass_fields__[name].default}",
                )


def parse_limits(texts: Sequence[str]) -> Limits:
    """Limits from `nodes=10000`, `seconds=60`. Raises MinicompilerError for anything else."""
    fields = {f.name: f for f in dataclasses.fields(Limits)}
    given: dict[str, int | float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            if name not in fields:
                raise ValueError
            given[name] = float(value) if name == "seconds" else int(value)
        except ValueError:
            raise MinicompilerError(
                f'the limit "{text}" is not understood',
                hint=f"write NAME=NUMBER; the limits are {', '.join(fields)}",
            ) from None
    return Limits(**given)  # type: ignore[arg-type]


_TEXTS = {
    "nodes": "the model needs {} nodes",
    "model_bytes": "the model and its weights take {} bytes",
    "rank": "a tensor has {} dimensions",
    "fold_bytes": "constants computed while compiling take {} bytes",
    "fold_operations": "computing constants while compiling takes {} operations",
    "operations": "one call takes {} operations",
    "seconds": "compiling has taken {} seconds",
}


class Budget:
    """What one compilation has used of its limits."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.used = dict.fromkeys(_TEXTS, 0)
        self._start = time.monotonic()

    def use(self, name: str, amount: int, locs: Sequence[SourceLoc] = ()) -> None:
        """Counts `amount` more. Raises LimitError when the sum exceeds the limit."""
        self.used[name] += amount
        if self.used[name] > getattr(self.limits, name):
            self._stop(name, self.used[name], locs)

    def check(self, name: str, value: int, locs: Sequence[SourceLoc] = ()) -> None:
        """Raises LimitError when a single value exceeds the limit."""
        if value > getattr(self.limits, name):
            self._stop(name, value, locs)

    def check_time(self, locs: Sequence[SourceLoc] = (), where: str = "") -> None:
        """Raises LimitError when the time is over."""
        elapsed = time.monotonic() - self._start
        if elapsed > self.limits.seconds:
            self._stop("seconds", elapsed, locs, where)

    def _stop(self, name: str, value: float, locs: Sequence[SourceLoc], where: str = "") -> None:
        shown = str(value) if isinstance(value, int) else f"{value:.1f}"
        more = 2 * value if isinstance(value, int) else round(2 * value + 1)
        raise LimitError(
            f"{_TEXTS[name].format(shown)}, the limit is {getattr(self.limits, name)}",
            tuple(locs),
            hint="if you trust this model, raise the limit: "
            f"Limits({name}={more}), --limit {name}={more}",
            where=where,
        )
