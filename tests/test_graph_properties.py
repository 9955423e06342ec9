"""Laws that hold for every graph: printing is deterministic, passes preserve the result and are
idempotent, fusion puts every operator into exactly one kernel and the kernels have an order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from random_graphs import feeds, graphs
from tolerance import assert_close

from minicompiler.context import Context, Options
from minicompiler.ir import graph
from minicompiler.ir.equal import structural_key, structurally_equal
from minicompiler.ir.graph import Apply, Function, Value, applies, topological
from minicompiler.ir.op import Kind
from minicompiler.ir.text import function_text
from minicompiler.ir.verify import verify_function
from minicompiler.ops.evaluate import run_reference
from minicompiler.passes.fuse import fuse, fused_functions
from minicompiler.passes.kind import kind_of
from minicompiler.pipeline import GRAPH_PASSES, run

PASSES = {p.__name__: p for level in GRAPH_PASSES.values() for p in level}
quick = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def same_results(a: Function, b: Function, batch: int = 2) -> None:
    values = feeds(a, batch)
    for got, want in zip(run_reference(b, values), run_reference(a, values), strict=True):
        assert_close(np.asarray(got), np.asarray(want), 4096, largest=1)


def copied(fn: Function) -> Function:
    """The same graph in other objects."""
    new: dict[int, Value] = {}
    for v in topological(fn.results):
        if isinstance(v, Apply):
            made: Any = v.with_(args=tuple(None if a is None else new[id(a)] for a in v.args))
        elif isinstance(v, graph.Item):
            made = graph.Item(new[id(v.tuple)], v.index)  # type: ignore[arg-type]
        else:
            made = dataclasses.replace(v)
        new[id(v)] = made
    params = tuple(new.get(id(p), p) for p in fn.params)
    return fn.with_(params=params, results=tuple(new[id(r)] for r in fn.results))


# ---- law 1 --------------------------------------------------------------------------------------
@quick
@given(graphs())
def test_printing_is_deterministic_and_equality_structural(fn: Function) -> None:
    other = copied(fn)
    assert function_text(fn) == function_text(other)
    assert structural_key(fn) == structural_key(other)
    assert structurally_equal(fn, other)
    verify_function(fn)


# ---- law 4 --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(PASSES))
def test_a_pass_preserves_the_result_and_is_idempotent(name: str) -> None:
    step: Callable[[Function, Any], Function] = PASSES[name]

    @quick
    @given(graphs())
    def law(fn: Function) -> None:
        once = step(fn, None)
        verify_function(once)
        same_results(fn, once)
        assert function_text(step(once, None)) == function_text(once)

    law()


@pytest.mark.parametrize("level", sorted(GRAPH_PASSES))
def test_a_whole_pipeline_preserves_the_result(level: int) -> None:
    @quick
    @given(graphs())
    def law(fn: Function) -> None:
        ctx = Context(options=Options(level=level, checked=True))
        done = run(GRAPH_PASSES[level], fn, ctx)
        same_results(fn, done)
        assert [s.name for s in ctx.stages] == [p.__name__ for p in GRAPH_PASSES[level]]

    law()


@quick
@given(graphs(symbolic=True))
def test_the_pipeline_preserves_the_result_for_every_batch(fn: Function) -> None:
    done = run(GRAPH_PASSES[3], fn)
    verify_function(done)
    for batch in (1, 3, 8):
        same_results(fn, done, batch)


# ---- law 5 --------------------------------------------------------------------------------------
@quick
@given(graphs(most=16))
def test_fusion_laws(fn: Function) -> None:
    fused = fuse(fn, None)
    kernels = list(applies(fused))
    assert all(isinstance(k.op, Function) and k.op.fused for k in kernels)
    # Every operator in exactly one kernel (`applies` ends, so the kernels have an order).
    inside = sorted(v.op.name for k in kernels for v in applies(k.op))  # type: ignore[arg-type]
    assert inside == sorted(v.op.name for v in applies(fn))
    for function in fused_functions(fused):
        kinds = [kind_of(v) for v in applies(function)]
        assert sum(k is Kind.OUT_FUSABLE for k in kinds) <= 1
        assert Kind.OPAQUE not in kinds or len(kinds) == 1
        names = [p.name for p in function.params]
        assert names == [f"p{k}" for k in range(len(names))]
    # One name, one structure.
    keys = {f.name: structural_key(f) for f in fused_functions(fused)}
    assert len(set(keys.values())) == len(keys) == len(fused_functions(fused))
