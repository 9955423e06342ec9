"""What happens to a model, in order: read this first.

    run(GRAPH_PASSES[level], fn, ctx)       a pass takes the graph and the context, gives a graph

The record of every step is a Stage in `ctx.stages`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from .artifacts import keeps_texts, record
from .context import Context, Stage
from .ir.graph import Function
from .ir.text import function_text
from .ir.tir import PrimFunc
from .ir.verify import verify_function
from .lower.blocks import hoist_conditions, lower_blocks, unswitch
from .lower.few_rows import few_rows
from .lower.wraps import unwrap_lines
from .passes.caches import append_in_place
from .passes.clean import drop_identities, eliminate_common_subexpr
from .passes.fold import fold_constants
from .passes.fold_bn import fold_batch_norm
from .passes.fuse import decisions, fuse
from .passes.integers import multiply_pairs
from .passes.layout import convert_layout
from .passes.phases import convolve_phases
from .passes.recognise import recognise
from .passes.rounding import round_in_place
from .passes.simplify import simplify
from .passes.widen import widen_attention, widen_products

T = TypeVar("T", bound=Any)
Pass = Callable[[T, Any], T]

_CLEAN: tuple[Pass[Function], ...] = (
    drop_identities,
    multiply_pairs,
    fold_constants,
    eliminate_common_subexpr,
    simplify,
    round_in_place,
)
_TIDY: tuple[Pass[Function], ...] = (fold_constants, eliminate_common_subexpr)

GRAPH_PASSES: dict[int, tuple[Pass[Function], ...]] = {
    0: (drop_identities, append_in_place, fuse),
    1: (*_CLEAN, append_in_place, fuse),
    2: (
        *_CLEAN,
        fold_batch_norm,
        convolve_phases,
        *_TIDY,
        widen_attention,
        widen_products,
        append_in_place,
        recognise,
        fuse,
    ),
    3: (
        *_CLEAN,
        fold_batch_norm,
        convolve_phases,
        *_TIDY,
        widen_attention,
        widen_products,
        convert_layout,
        append_in_place,
        recognise,
        fuse,
    ),
}
TIR_PASSES: tuple[Pass[PrimFunc], ...] = (
    lower_blocks,
    hoist_conditions,
    few_rows,
    unwrap_lines,
    unswitch,
)


def run(passes: Sequence[Pass[T]], subject: T, ctx: Context | None = None) -> T:
    """Applies passes in order; with a context, records each as a Stage, verified if checked."""
    before = None
    if ctx is not None and ctx.options.checked and isinstance(subject, Function):
        verify_function(subject)
    if ctx is not None and keeps_texts(ctx) and isinstance(subject, Function):
        before = function_text(subject)
    for step in passes:
        if ctx is not None:
            ctx.budget.check_time(where=step.__name__)
        given, start = subject, time.perf_counter()
        subject = step(subject, ctx)
        seconds = time.perf_counter() - start
        if ctx is None:
            continue
        if ctx.options.checked and isinstance(subject, Function):
            verify_function(subject)
        text = ""
        if keeps_texts(ctx) and isinstance(subject, Function) and subject is not given:
            now = function_text(subject)
            text, before = ("" if now == before else now), now
        details = decisions(subject) if step is fuse else {}
        record(ctx, Stage(subject.name, "graph", step.__name__, text, seconds, details))
    return subject
