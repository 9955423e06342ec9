"""Every access of a kernel stays inside its buffer: what cannot be proved is clamped.

    guard_accesses(func)      order[k] as an index of p0[n]   ->   max(min(order[k], n - 1), 0)

Done before scheduling, where loops are still simple; primitives keep the meaning, so this as well.
Nearly everything is proved. What is left are tables that externs look up, and sizes that a type
rule should have compared: there a mistake gives a wrong number, not a crash.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.expr import ZERO, Expr, Load, maximum, minimum
from ..ir.tir import PrimFunc, Stmt, Store, map_exprs, map_statements
from ..ir.verify_tir import unproved_accesses


def guard_accesses(func: PrimFunc, facts: Sequence[Expr] = ()) -> PrimFunc:
    """Clamps indices that are not proved to be in range.

    facts: conditions on dimensions that are checked at run time before the function is called.
    """
    found = unproved_accesses(func, facts)
    if not found:
        return func
    inner: dict[tuple[object, tuple[Expr, ...]], tuple[Expr, ...]] = {}
    for (buffer, indices), axes in found.items():
        inner[buffer, indices] = tuple(
            maximum(minimum(i, size - 1), ZERO) if axis in axes else i
            for axis, (i, size) in enumerate(zip(indices, buffer.shape, strict=True))
        )

    memo: dict[Expr, Expr] = {}

    def fixed(e: Expr) -> Expr:
        done = memo.get(e)
        if done is None:
            if type(e) is Load:
                indices = inner.get((e.buffer, e.indices), e.indices)
                mask = None if e.mask is None else fixed(e.mask)
                done = Load(e.buffer, tuple(map(fixed, indices)), mask)
            else:
                done = e.map(fixed)
            memo[e] = done
        return done

    def store(s: Stmt) -> Stmt | None:
        wanted = inner.get((s.buffer, s.indices)) if isinstance(s, Store) else None
        return None if wanted is None else s.with_(indices=wanted)

    phases = [map_exprs(map_statements(p, store), fixed) for p in func.phases]
    return func.with_(phases=tuple(phases))
