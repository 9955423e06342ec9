"""Primitives for reductions: decompose_reduction (the init becomes a block), skip (terms that
change nothing are left out), rfactor (partial results)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from minicompiler.ir.expr import (
    TRUE,
    ZERO,
    Binary,
    Call,
    Cast,
    Expr,
    Load,
    Select,
    Var,
    all_of,
    binary,
    conjuncts,
    const,
    eq,
    factors,
    free_vars,
    select,
    substitute,
    walk,
)
from minicompiler.ir.tir import (
    SERIAL,
    Alloc,
    Block,
    Buffer,
    For,
    Iter,
    Scope,
    Stmt,
    Store,
    seq,
)
from minicompiler.lower.to_tir import COMBINE, identity_of

from . import analysis
from .blocks import outer_vars, stays_private

if TYPE_CHECKING:
    from .schedule import Schedule

COMBINER = {op: name for name, op in COMBINE.items()}


# ---- decompose_reduction ------------------------------------------------------------------------
def decompose_reduction(s: Schedule, name: str, loop_name: str) -> str:
    """for k: block C (init, body)   ->   block C_init; for k: block C (body)

    The init runs just before `loop`, over the loops below it that choose the element, and only in
    the first iteration of reduction loops further out.
    """
    block, path = s.block(name)
    loop, _ = s.loop(loop_name)
    if block.init is None:
        s.refuse(f"block {name} has no init", block)
    assert block.init is not None
    around = analysis.loops_in(path)
    if loop not in around:
        s.refuse(f"loop {loop_name} is not around block {name}", loop)
    analysis.refuse_parallel_below(s, loop)
    outside, inside = around[: around.index(loop)], around[around.index(loop) :]
    for x in inside:
        if analysis.repeats(block, x):
            s.refuse(f"loop {x.var} repeats all of the reduction {name}", x)
    stays_private(s, block, path[: path.index(loop)], block.body.buffer, reads=False)
    used = frozenset[Expr]().union(*map(free_vars, (block.init.value, *block.init.indices)))
    if used & {x.var for x in inside}:
        s.refuse(
            f"where block {name} stores depends on the loops around it",
            block,
            "do this before staging",
        )
    made = _init_nest(s, block, outside, inside)
    s.edit(
        lambda x: x.with_(init=None) if x is block else None,
    )
    new_loop, _ = s.loop(loop_name)
    s.swap(new_loop, seq([made[0], new_loop]))
    return made[1]


def _init_nest(
    s: Schedule, block: Block, outside: list[For], inside: list[For]
) -> tuple[Stmt, str]:
    assert block.init is not None
    arith = analysis.arith_of(s.func)
    spatial = [x for x in inside if x in analysis.spatial_loops(block, inside)]
    reducing = analysis.reduce_loops(block, inside)
    for x in spatial:
        if any(r.var in free_vars(x.extent) for r in reducing):
            s.refuse(f"the extent of {x.var} depends on a reduction loop", x)
    if any(x in reducing for x in spatial):
        s.refuse(f"block {block.name} has a loop that is both spatial and reducing", block)
    mapping: dict[Expr, Expr] = {x.var: s.fresh_var(x.var.name) for x in spatial}
    first: dict[Expr, Expr] = {x.var: ZERO for x in reducing}
    conditions = []
    for i in block.iters:
        if i.reduce:
            cond = eq(arith.simplify(substitute(i.value, first)), ZERO)
            if arith.prove(cond) is not True:
                conditions.append(arith.simplify(cond))
    # A condition on the reduction index (a masked tail) does not concern the init. One on a loop
    # that runs over both, elements and reduction, does.
    choosing = {x.var for x in analysis.spatial_loops(block, outside + inside)}
    only = {x.var for x in analysis.reduce_loops(block, outside + inside)} - choosing
    for part in analysis.where_parts(block):
        if only.isdisjoint(free_vars(part)):
            conditions.append(substitute(part, mapping))
    name = s.fresh(block.name + "_init")
    iters = tuple(i.with_(value=substitute(i.value, mapping)) for i in block.iters if not i.reduce)
    inner: Stmt = Block(name, iters, all_of(conditions), None, block.init, "init")
    for x in reversed(spatial):
        inner = For(mapping[x.var], substitute(x.extent, mapping), x.kind, inner)  # type: ignore[arg-type]
    return inner, name


# ---- skip ---------------------------------------------------------------------------------------
def skip(s: Schedule, name: str, keep: str | None = None) -> None:
    """C[i] = C[i] + select(i + k >= 1, x[i + k - 1], 0) * w[k]

    ->   C[i] = C[i] + x[i + k - 1] * w[k]   where i + k >= 1

    Terms that change nothing are left out: those that a condition makes the combiner's identity, or
    (of a sum) a product with zero, whatever the other factor, so that 0 * inf counts as 0 here.
    Conditions that change with the loop `keep` stay choices. The init must be a block of its own.
    """
    block, _ = s.block(name)
    if block.init is not None:
        s.refuse(f"block {name} has an init", block, "decompose_reduction makes it a block")
    wanted, operand = needed_terms(block, None if keep is None else s.loop(keep)[0].var)
    if not wanted:
        s.refuse(f"no term of {name} is known to change nothing", block)
    values = analysis.values_of(block)
    where = all_of([*analysis.where_parts(block), *[substitute(c, values) for c in wanted]])
    own = block.body.value
    assert isinstance(own, Binary)
    body = block.body.with_(value=Binary(own.op, own.a, operand))
    s.swap(block, block.with_(where=where, body=body))


def needed_terms(block: Block, keep: Var | None = None) -> tuple[list[Expr], Expr]:
    """The conditions on a reduction's indices without which a term changes nothing, but those that
    change with the loop over `keep`, and the term where they hold. No conditions: not a reduction,
    or all terms are needed."""
    update = analysis.update_operand(block)
    if update is None or update[0] not in COMBINER or not analysis.is_reduction(block):
        return [], block.body.value
    identity = identity_of(COMBINER[update[0]], block.body.buffer.dtype)
    reducing = {i.var for i in block.iters if i.reduce}
    values = analysis.values_of(block)

    def ours(c: Expr) -> bool:
        changes = not reducing.isdisjoint(free_vars(c)) and not _reads(c)
        return changes and keep not in free_vars(substitute(c, values))

    wanted, term = _needed(update[1], identity, ours)
    return list(dict.fromkeys(wanted)), term


def _needed(e: Expr, identity: Expr, ours: Callable[[Expr], bool]) -> tuple[list[Expr], Expr]:
    """Those of our conditions without which `e` is the identity, and what it is where they hold."""
    if type(e) is Select and e.b is const(identity.value, e.dtype):  # type: ignore[attr-defined]
        parts = conjuncts(e.cond)
        found = [c for c in parts if ours(c)]
        rest = all_of(c for c in parts if c not in found)
        inner, value = _needed(e.a, identity, ours)
        return [*found, *inner], value if rest is TRUE else select(rest, value, e.b)
    if identity.value == 0:  # type: ignore[attr-defined]
        sides = factors(e)
        if sides is not None:
            (p, a), (q, b) = (_needed(x, identity, ours) for x in sides)
            changed = Call(e.fn, (a, b)) if type(e) is Call else Binary("mul", a, b)
            return [*p, *q], changed if p or q else e
        if type(e) is Cast:
            p, a = _needed(e.a, identity, ours)
            return p, Cast(e.dtype, a) if p else e
    return [], e


def _reads(e: Expr) -> bool:
    return any(type(x) is Load for x in walk(e))


# ---- rfactor ------------------------------------------------------------------------------------
def rfactor(s: Schedule, name: str, loop_name: str, first: bool = False) -> tuple[str, str]:
    """C[i] = sum over k_o, k_i   ->   P[i, k_i] = sum over k_o;  C[i] = sum over k_i of P[i, k_i]

    first: the partial results are P[k_i, i], so that those of one k_i lie together.

    A masked tail of the reduction becomes the combiner's identity, so each partial result is
    defined.
    """
    block, path = s.block(name)
    loop, _ = s.loop(loop_name)
    update = analysis.update_operand(block)
    if block.init is None or update is None or update[0] not in COMBINER:
        s.refuse(f"block {name} is not a reduction with a known combiner", block)
    assert block.init is not None and update is not None
    around = analysis.loops_in(path)
    reducing = analysis.reduce_loops(block, around)
    if loop not in reducing:
        s.refuse(f"block {name} does not reduce over {loop_name}", loop)
    combiner, operand = update
    top = around[around.index(reducing[0])]
    analysis.refuse_parallel_below(s, top)
    analysis.refuse_vector_around(s, path)
    _can_rfactor(s, block, loop, top, path)
    identity = identity_of(COMBINER[combiner], block.body.buffer.dtype)
    dtype = block.body.buffer.dtype
    spatial = [i for i in block.iters if not i.reduce]
    # Partial block: one reduce iterator per remaining reduction loop, the factored loop is spatial.
    lane = Iter(s.fresh_var("v" + loop_name), loop.extent, False, loop.var)
    others = [
        Iter(s.fresh_var("v" + x.var.name), x.extent, True, x.var)
        for x in reducing
        if x is not loop
    ]
    to_iters: dict[Expr, Expr] = {loop.var: lane.var, **{i.value: i.var for i in others}}
    mapping: dict[Expr, Expr] = {
        i.var: substitute(i.value, to_iters) for i in block.iters if i.reduce
    }
    value = substitute(operand, mapping)
    keep: list[Expr] = []
    masks: list[Expr] = []
    reduce_vars = {x.var for x in reducing}
    for part in analysis.where_parts(block):
        (masks if reduce_vars & free_vars(part) else keep).append(part)
    if masks:
        spatial_of: dict[Expr, Expr] = {i.value: i.var for i in spatial if isinstance(i.value, Var)}
        cond = substitute(all_of(masks), {**to_iters, **spatial_of})
        value = select(cond, value, identity)

    def placed(rest: list[Expr], own: Expr) -> tuple[Expr, ...]:
        return (own, *rest) if first else (*rest, own)

    shape = placed([i.extent for i in spatial], loop.extent)
    partial = Buffer(s.fresh(block.body.buffer.name + "_rf"), dtype, shape, Scope.GLOBAL)
    at = placed([i.var for i in spatial], lane.var)
    rf_name = s.fresh(name + "_rf")
    rf_block = Block(
        rf_name,
        (*spatial, lane, *others),
        all_of(keep),
        Store(partial, at, identity) if others else None,
        Store(partial, at, binary(combiner, Load(partial, at), value) if others else value),
    )
    # The loops from the outermost reducing one on are repeated for the combining block.
    cut = around.index(reducing[0])
    inside = [x for x in around[cut:] if x not in reducing]
    fresh: dict[Expr, Expr] = {x.var: s.fresh_var(x.var.name) for x in inside}
    last = s.fresh_var(loop_name)
    last_iter = Iter(s.fresh_var("v" + loop_name), loop.extent, True, last)
    final_iters = (*[i.with_(value=substitute(i.value, fresh)) for i in spatial], last_iter)
    own = block.body
    final: Stmt = Block(
        name,
        final_iters,
        substitute(all_of(keep), fresh),
        block.init,
        own.with_(
            value=binary(
                combiner,
                Load(own.buffer, own.indices),
                Load(partial, placed([i.var for i in spatial], last_iter.var)),
            )
        ),
    )
    final = For(last, loop.extent, SERIAL, final)
    for x in reversed(inside):
        final = For(fresh[x.var], substitute(x.extent, fresh), SERIAL, final)  # type: ignore[arg-type]
    s.edit(lambda x: rf_block if x is block else None)
    moved, _ = s.loop(top.var.name)
    s.swap(moved, seq([moved, final]))
    s.func = s.func.with_(buffers=(*s.func.buffers, partial))
    return rf_name, partial.name


def _can_rfactor(s: Schedule, block: Block, loop: For, top: For, path: analysis.Path) -> None:
    """The combining block comes after `top`, the outermost reducing loop: it must find all it
    needs there, and nothing inside may wait for it."""
    if len(analysis.writers(s.func, block.body.buffer)) > 1:
        s.refuse(f"several blocks write {block.body.buffer.name}", block)
    above = path[: path.index(top)]
    around = analysis.loops_in(path)
    reducing = analysis.reduce_loops(block, around)
    if analysis.mixed_loops(block, around):
        s.refuse(f"block {block.name} has a loop that is both spatial and reducing", block)
    if free_vars(loop.extent) - set(s.func.dims):
        s.refuse(f"the extent of {loop.var} varies: {loop.extent}", loop)
    if outer_vars(s, block) - {x.var for x in analysis.loops_in(above)}:
        s.refuse(
            f"where block {block.name} stores depends on the loops around it",
            block,
            "do this before staging",
        )
    for x in around[around.index(top) :]:
        if x not in reducing and any(r.var in free_vars(x.extent) for r in reducing):
            s.refuse(f"the extent of {x.var} depends on a reduction loop", x)
    own = block.body.buffer
    if own.scope in (Scope.LOCAL, Scope.REGISTER) and not any(
        isinstance(x, Alloc) and x.buffer is own for x in above
    ):
        s.refuse(f"{own.name} is private to the inside of {top.var}", block)
    for b in analysis.blocks(top):
        if b is not block and (
            b.body.buffer is own or any(x.buffer is own for x in analysis.block_loads(b))
        ):
            s.refuse(
                f"block {b.name} inside {top.var} uses {own.name} before all of it is added up", b
            )
