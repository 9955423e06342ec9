"""Faults injected into the compiler, each with the step that `verify` has to name.

@pytest.mark.parametrize("fault", FAULTS)     fault.inject(monkeypatch); fault.name
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from minicompiler import driver, pipeline, prepare
from minicompiler.codegen import llvm_values
from minicompiler.ir.expr import ZERO, Binary, Const, const
from minicompiler.ir.graph import Apply, rebuild
from minicompiler.ir.layout import IndexMap, axes
from minicompiler.ir.tir import Block, If, PrimFunc, Seq, Stmt, map_statements
from minicompiler.lower import places, to_tir
from minicompiler.ops import elementwise
from minicompiler.passes import clean, fold, fold_bn, fuse, layout
from minicompiler.schedules import blocks, loops, reductions, staging
from minicompiler.schedules.schedule import Schedule

Patch = pytest.MonkeyPatch


@dataclasses.dataclass(frozen=True)
class Fault:
    """One miscompilation: what it is, how it comes in, which step `verify` has to blame."""

    title: str
    kind: str
    name: str
    inject: Callable[[Patch], None]

    def __str__(self) -> str:
        return self.title.replace(" ", "-")


# ---- graph passes -------------------------------------------------------------------------------
def folds_wrongly(patch: Patch) -> None:
    real = fold.compute

    def wrong(*args: Any) -> tuple[np.ndarray, ...]:
        return tuple(a + a.dtype.type(1) for a in real(*args))

    patch.setattr(fold, "compute", wrong)


def forgets_attributes(patch: Patch) -> None:
    patch.setattr(clean, "attrs_key", lambda attrs: "")


def wrong_epsilon(patch: Patch) -> None:
    real = fold_bn._affine

    def wrong(v: Apply, *rest: Any) -> Any:
        if hasattr(v.attrs, "epsilon"):
            v = v.with_(attrs=dataclasses.replace(v.attrs, epsilon=1e-2))
        return real(v, *rest)

    patch.setattr(fold_bn, "_affine", wrong)


def wrong_block(patch: Patch) -> None:
    real = layout._layout

    def wrong(v: Apply, *args: Any) -> IndexMap | None:
        if real(v, *args) is None:
            return None
        d = axes(4)
        return IndexMap(4, (d[0], d[1] // 8, d[2], d[3], d[1] % 4))

    patch.setattr(layout, "_layout", wrong)


def drops_an_add(patch: Patch) -> None:
    real = fuse._function

    def wrong(group: Any, results: Any) -> Any:
        made, args = real(group, results)

        def change(v: Any, operands: Any) -> Any:
            return operands[0] if isinstance(v, Apply) and v.op is elementwise.add else None

        return rebuild(made, change), args

    patch.setattr(fuse, "_function", wrong)


# ---- lowering and schedules ---------------------------------------------------------------------
def wrong_identity(patch: Patch) -> None:
    patch.setattr(to_tir, "identity_of", lambda combiner, dtype: const(1, dtype))


def split_drops_the_tail(patch: Patch) -> None:
    real = loops.split

    def wrong(s: Schedule, name: str, factor: int, tail: str, multiple: int = 1) -> tuple[str, str]:
        extent = s.loop(name)[0].extent
        outer, inner = real(s, name, factor, tail, multiple)
        loop, _ = s.loop(outer)
        tail_is_needed = isinstance(extent, Const) and extent.value % factor
        if tail_is_needed and extent.value > factor and not name.startswith("k"):
            s.swap(loop, loop.with_(extent=Const(extent.value // factor)))
        return outer, inner

    patch.setattr(loops, "split", wrong)


def fuse_is_one_short(patch: Patch) -> None:
    real = loops.fuse

    def wrong(s: Schedule, names: list[str]) -> str:
        made = real(s, names)
        loop, _ = s.loop(made)
        if made.endswith("_o"):  # the loops over tiles: rules look at the others again
            s.swap(loop, loop.with_(extent=loop.extent - 1))
        return made

    patch.setattr(loops, "fuse", wrong)


def stage_forgets_to_load(patch: Patch) -> None:
    real = staging.stage

    def wrong(s: Schedule, *args: Any) -> str:
        made = real(s, *args)
        s.edit(lambda x: Seq(()) if isinstance(x, Block) and x.tag == "copy_in" else None)
        return made

    patch.setattr(staging, "stage", wrong)


def starts_at_one(patch: Patch) -> None:
    real = reductions.decompose_reduction

    def wrong(s: Schedule, *args: Any) -> str:
        made = real(s, *args)

        def one(x: Stmt) -> Stmt | None:
            if isinstance(x, Block) and x.tag == "init":
                return x.with_(body=x.body.with_(value=const(1, x.body.value.dtype)))
            return None

        s.edit(one)
        return made

    patch.setattr(reductions, "decompose_reduction", wrong)


def computes_at_the_wrong_point(patch: Patch) -> None:
    real = blocks.compute_at

    def wrong(s: Schedule, block: str, loop: str) -> None:
        real(s, block, loop)
        moved, _ = s.block(block)

        def late(x: Stmt) -> Stmt | None:
            if isinstance(x, Block) and x.name == moved.name and x.init is None:
                return x.with_(where=Binary("and", x.where, Binary("lt", ZERO, x.iters[0].value)))
            return None

        s.edit(late)

    patch.setattr(blocks, "compute_at", wrong)


# ---- after the schedule -------------------------------------------------------------------------
def _broken(patch: Patch, name: str, edit: Callable[[Stmt], Stmt | None]) -> None:
    """A TIR pass whose result is edited."""

    def wrap(real: Any) -> Any:
        @functools.wraps(real)
        def wrong(func: PrimFunc, ctx: object = None) -> PrimFunc:
            made = real(func, ctx)
            return made.with_(phases=tuple(map_statements(p, edit) for p in made.phases))

        return wrong if real.__name__ == name else real

    patch.setattr(pipeline, "TIR_PASSES", tuple(map(wrap, pipeline.TIR_PASSES)))


def wrong_mask(patch: Patch) -> None:
    def stricter(s: Stmt) -> Stmt | None:
        if isinstance(s, If) and isinstance(s.cond, Binary) and s.cond.op == "lt":
            return s.with_(cond=s.cond.a + 1 < s.cond.b)
        return None

    _broken(patch, "lower_blocks", stricter)


def loses_a_branch(patch: Patch) -> None:
    def edit(s: Stmt) -> Stmt | None:
        return s.with_(orelse=None) if isinstance(s, If) and s.orelse is not None else None

    _broken(patch, "unswitch", edit)


def prepares_backwards(patch: Patch) -> None:
    real = prepare._run

    def wrong(*args: Any) -> np.ndarray:
        made = real(*args)
        return np.ascontiguousarray(made[..., ::-1])

    patch.setattr(prepare, "_run", wrong)


def subtracts(patch: Patch) -> None:
    table = next(t for t in vars(llvm_values).values()
                 if isinstance(t, dict) and t.get("add") == "fadd contract")  # fmt: skip
    patch.setitem(table, "add", "fsub contract")


def overlapping_memory(patch: Patch) -> None:
    patch.setattr(places._Placer, "offset", lambda self, size, taken: ZERO)


def skips_the_last_call(patch: Patch) -> None:
    real = driver.emit_main

    def wrong(plan: Any) -> str:
        return real(dataclasses.replace(plan, calls=plan.calls[:-1]))

    patch.setattr(driver, "emit_main", wrong)


FAULTS = (
    Fault("folds wrongly", "graph pass", "fold_constants", folds_wrongly),
    Fault("forgets attributes", "graph pass", "eliminate_common_subexpr", forgets_attributes),
    Fault("wrong epsilon", "graph pass", "fold_batch_norm", wrong_epsilon),
    Fault("wrong block of channels", "graph pass", "convert_layout", wrong_block),
    Fault("drops an add", "graph pass", "fuse", drops_an_add),
    Fault("wrong identity", "lowering", "to_tir", wrong_identity),
    Fault("split drops the tail", "schedule step", "split", split_drops_the_tail),
    Fault("fuse is one short", "schedule step", "fuse", fuse_is_one_short),
    Fault("stage forgets to load", "schedule step", "stage", stage_forgets_to_load),
    Fault("starts at one", "schedule step", "decompose_reduction", starts_at_one),
    Fault("computes at the wrong point", "schedule step", "compute_at",
          computes_at_the_wrong_point),
    Fault("wrong mask", "tir pass", "lower_blocks", wrong_mask),
    Fault("loses a branch", "tir pass", "unswitch", loses_a_branch),
    Fault("prepares backwards", "constant preparation", "prepare", prepares_backwards),
    Fault("subtracts", "code generation", "llvm", subtracts),
    Fault("overlapping memory", "memory plan", "plan_memory", overlapping_memory),
    Fault("skips the last call", "native main", "emit_main", skips_the_last_call),
)  # fmt: skip
