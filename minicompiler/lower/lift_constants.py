"""Compile-time blocks: what a scheduled function computes from constants alone is taken out of it.

    W_s = stage(W, root, layout=(k, n) -> (n//16, k, n%16))     # W is constant
    func(x, W) { W_s = ...; y = ... W_s ... }   ->   func(x, W_s) { y = ... W_s ... }
                                                     prepare(W) { W_s = ... }

The driver runs `prepare` once while compiling and passes its result in place of the constant.
"""

from __future__ import annotations

import dataclasses

from minicompiler.ir.expr import Dim, Expr, free_vars
from minicompiler.ir.tir import (
    Alloc,
    Buffer,
    For,
    PrimFunc,
    Scope,
    Stmt,
    read_buffers,
    statements,
    stores,
    with_buffers,
    written_buffers,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A constant that the kernel reads instead of others: the parameter, and what computes it."""

    buffer: Buffer
    func: PrimFunc


def lift_constants(func: PrimFunc) -> tuple[PrimFunc, tuple[Prepared, ...]]:
    """The function without its compile-time phases, and these. Prepared buffers come first among
    the results' neighbours: params are (remaining inputs..., prepared..., results...)."""
    ready: set[Buffer] = {p for p in func.params if p.constant}
    prepared: list[Prepared] = []
    rest: list[Stmt] = []
    later = [written_buffers(p) for p in func.phases]
    for k in range(len(func.phases)):
        phase = func.phases[k]  # with what was prepared before in place
        own = {s.buffer for s in statements(phase) if isinstance(s, Alloc)}
        written, read = written_buffers(phase) - own, read_buffers(phase) - own
        inputs = read - written
        alone = all(written.isdisjoint(w) for w in later[k + 1 :] + later[:k])
        if (
            inputs <= ready
            and inputs
            and alone
            and len(written) == 1  # there is no workspace while compiling
            and written <= set(func.buffers)
            and not _sizes(phase)
        ):
            (b,) = written
            new = b.with_(scope=Scope.PARAM, constant=True)
            body = with_buffers(phase, {b: new})
            name = f"{func.name}_prepare_{len(prepared)}"
            sources = tuple(
                p for p in (*func.params, *[x.buffer for x in prepared]) if p in read_buffers(body)
            )
            prepared.append(
                Prepared(new, PrimFunc(name, (*sources, new), 1, (), (), (body,), func.locs))
            )
            ready.add(new)
            later = [({new if x is b else x for x in w}) for w in later]
            func = func.with_(
                phases=tuple(with_buffers(p, {b: new}) for p in func.phases),
                buffers=tuple(x for x in func.buffers if x is not b),
            )
        else:
            rest.append(func.phases[k])
    # Phases after a lifted one were rewritten to read the new parameter.
    done = {id(p) for p in rest}
    kept = [p for p in func.phases if id(p) in done or not _computes_prepared(p, prepared)]
    used = set().union(*[read_buffers(p) for p in kept]) if kept else set()
    count = len(func.params) - func.results
    inputs_left = [p for p in func.params[:count] if p in used or not p.constant]
    extra = [x.buffer for x in prepared if x.buffer in used]
    params = (*inputs_left, *extra, *func.params[count:])
    return func.with_(params=params, phases=tuple(kept)), tuple(prepared)


def _sizes(phase: Stmt) -> bool:
    """True when a phase depends on a size that is known only at run time."""
    found: list[Expr] = [
        e for s in statements(phase) if isinstance(s, For) for e in free_vars(s.extent)
    ]
    for s in stores(phase):
        found += [e for x in (*s.indices, s.value, *s.buffer.shape) for e in free_vars(x)]
    return any(isinstance(e, Dim) for e in found)


def _computes_prepared(phase: Stmt, prepared: list[Prepared]) -> bool:
    return any(s.buffer is p.buffer for p in prepared for s in stores(phase))
