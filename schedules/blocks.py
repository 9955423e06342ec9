"""Primitives that move blocks: inline, compute_at."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minicompiler.ir.arith import Arith, knowing
from minicompiler.ir.expr import (
    TRUE,
    ZERO,
    Binary,
    Const,
    Expr,
    Load,
    Var,
    all_of,
    const,
    const_int,
    eq,
    free_vars,
    rewrite,
    select,
    substitute,
)
from minicompiler.ir.tir import (
    PARALLEL,
    SERIAL,
    VECTOR,
    Alloc,
    Block,
    Buffer,
    For,
    Iter,
    Scope,
    Seq,
    Stmt,
    seq,
    written_buffers,
)

from . import analysis

if TYPE_CHECKING:
    from .schedule import Schedule


# ---- inline -------------------------------------------------------------------------------------
def inline(s: Schedule, name: str) -> None:
    """P[i] = f(i); C[j] = g(P[h(j)])   ->   C[j] = g(f(h(j)))"""
    block, _ = s.block(name)
    buffer = block.body.buffer
    if analysis.is_reduction(block):
        s.refuse(f"block {name} is a reduction", block, "compute_at moves it instead")
    if buffer in s.func.params:
        s.refuse(f"{buffer.name} is a result of the function", block)
    if len(analysis.writers(s.func, buffer)) > 1 or block.where is not TRUE:
        s.refuse(f"block {name} does not define all of {buffer.name} by itself", block)
    if outer_vars(s, block):
        s.refuse(
            f"what block {name} computes depends on the loops around it",
            block,
            "inline before staging",
        )
    axes = [_plain_iter(block, i) for i in block.body.indices]
    if any(
        a is None and i is not ZERO for a, i in zip(axes, block.body.indices, strict=True)
    ) or any(i not in axes for i in block.iters):
        s.refuse(f"block {name} does not store at plain iterators", block)
    for r in analysis.readers(s.func, buffer):
        stays_private(s, block, s.block(r.name)[1])

    def one(e: Expr) -> Expr | None:
        if type(e) is Load and e.buffer is buffer:
            mapping: dict[Expr, Expr] = {
                a.var: i for a, i in zip(axes, e.indices, strict=True) if a is not None
            }
            value = substitute(block.body.value, mapping)
            return value if e.mask is None else select(e.mask, value, const(0, value.dtype))
        return None

    def into(x: Stmt) -> Stmt | None:
        if x is block:
            return Seq(())
        if isinstance(x, Alloc) and x.buffer is buffer:
            return x.body
        if isinstance(x, Block) and any(ld.buffer is buffer for ld in analysis.block_loads(x)):
            return x.with_(body=x.body.with_(value=rewrite(x.body.value, one)))
        return None

    s.edit(into)
    s.func = s.func.with_(buffers=tuple(b for b in s.func.buffers if b is not buffer))


def outer_vars(s: Schedule, block: Block) -> frozenset[Expr]:
    """The loop variables that the body itself mentions (staging makes its indices relative to
    them)."""
    used: frozenset[Expr] = frozenset()
    for store in (block.init, block.body):
        if store is not None:
            used = used.union(*map(free_vars, (store.value, *store.indices)))
    return used - {i.var for i in block.iters} - set(s.func.dims)


def _plain_iter(block: Block, index: Expr) -> Iter | None:
    return next((i for i in block.iters if i.var is index and not i.reduce), None)


# ---- compute_at ---------------------------------------------------------------------------------
def compute_at(s: Schedule, name: str, loop_name: str, once_name: str | None = None) -> None:
    """Moves a block into a loop, over just the part its partner there needs or makes.

    producer: before its first reader in the loop, over what the readers below touch.
    consumer: after the last writer in the loop, over what was written below; under a reduction
    loop of
      the writer it runs on the last iteration only.
    once: a loop around (or `loop` itself), in whose first iteration alone a producer runs: the
      others need the same again.
    """
    block, _ = s.block(name)
    loop, path = s.loop(loop_name)
    if analysis.contains(loop, block):
        s.refuse(f"block {name} is inside {loop_name} already", block)
    analysis.refuse_parallel_below(s, loop)
    analysis.refuse_vector_around(s, (*path, loop))
    _can_move(s, block, (*path, loop), once_name is not None)
    arith = analysis.arith_of(s.func)
    analysis.refuse_leaving_scan(s, block, (*path, loop))
    # In a recurrence a block may be both: what it makes is read below, but by the next iteration.
    needed = block.body.buffer in loaded(loop.body)
    if needed and not analysis.made_below(s, block, loop, arith):
        first = [] if once_name is None else [_first_iteration(s, block, once_name, loop, path)]
        nest, place = _as_producer(s, block, loop, arith, first)
    elif once_name is not None:
        s.refuse(f"block {name} makes nothing that is read in {loop_name}", block)
    else:
        nest, place = _as_consumer(s, block, loop, path, arith)
    s.edit(lambda x: Seq(()) if x is block else None)
    target, _ = s.loop(loop_name)
    parts: list[Stmt] = [*target.body.stmts] if isinstance(target.body, Seq) else [target.body]
    parts.insert(place, nest)
    s.swap(target, target.with_(body=seq(parts)))


def _can_move(s: Schedule, block: Block, to: analysis.Path, inwards: bool) -> None:
    """Refuses unless all that the block mentions is there below `to`, and its conditions say no
    more than that its iterators are in range. inwards: private buffers that stand around `to` may
    be used."""
    missing = outer_vars(s, block) - {x.var for x in analysis.loops_in(to)}
    if missing:
        names = ", ".join(sorted(map(str, missing)))
        s.refuse(
            f"what block {block.name} computes depends on {names}", block, "move it before staging"
        )
    around = {x.buffer for x in to if isinstance(x, Alloc)} if inwards else set()
    for b in [block.body.buffer, *[x.buffer for x in analysis.block_loads(block)]]:
        if b.scope in (Scope.LOCAL, Scope.REGISTER) and b not in around:
            s.refuse(
                f"block {block.name} uses the staged buffer {b.name}",
                block,
                "move it before staging",
            )
    own = own_conditions(s, block)
    if own:
        s.refuse(f"block {block.name} has a condition of its own: {own[0]}", block)


def stays_private(
    s: Schedule, block: Block, to: analysis.Path, *also: Buffer, reads: bool = True
) -> None:
    """Refuses unless the private buffers that a block reads (and some others) are those below
    `to`."""
    here = {x.buffer for x in to if isinstance(x, Alloc)}
    for b in [*also, *[x.buffer for x in analysis.block_loads(block) if reads]]:
        if b.scope in (Scope.LOCAL, Scope.REGISTER) and b not in here:
            s.refuse(
                f"block {block.name} uses {b.name}, which is private to where it stands", block
            )


def own_conditions(s: Schedule, block: Block) -> list[Expr]:
    """The conditions of a block that do not follow from its iterators being in range."""
    parts = analysis.where_parts(block)
    if not parts:
        return []
    in_range = [i.value < i.extent for i in block.iters] + [i.value >= ZERO for i in block.iters]
    arith = knowing(analysis.arith_of(s.func).ranges, in_range)
    return [c for c in parts if arith.prove(c) is not True]


def _children(s: Stmt) -> list[Stmt]:
    return list(s.stmts) if isinstance(s, Seq) else [s]


def _first_iteration(
    s: Schedule, block: Block, once_name: str, loop: For, path: analysis.Path
) -> Expr:
    """The condition that a loop is in its first iteration. Refuses unless the buffer of a block
    outlives that loop, and all its iterations need the same of it."""
    once, above = s.loop(once_name)
    buffer = block.body.buffer
    nest = [*analysis.loops_in(path), loop]
    if once not in nest:
        s.refuse(f"{once_name} is not a loop around {loop.var}", loop)
    below = nest[nest.index(once) :]
    private = buffer.scope in (Scope.LOCAL, Scope.REGISTER)
    if private and not any(isinstance(x, Alloc) and x.buffer is buffer for x in above):
        s.refuse(f"{buffer.name} is new in every iteration of {once_name}", once)
    if any(analysis.writers(s.func, x.buffer) for x in analysis.block_loads(block)):
        s.refuse(f"what block {block.name} reads is written by this function", block)
    if any(x.kind in (PARALLEL, VECTOR) for x in below) or analysis.enclosing_condition(path):
        s.refuse(f"the first iteration of {once_name} need not come first", once)
    box = analysis.region(loop.body, buffer, analysis.arith_of(s.func))
    moved = [e for side in box for e in side] + [x.extent for x in below[1:]]
    if any(once.var in free_vars(e) for e in moved):
        s.refuse(f"iterations of {once_name} need different parts of {buffer.name}", once)
    return eq(once.var, ZERO)


def _as_producer(
    s: Schedule, block: Block, loop: For, arith: Arith, conditions: list[Expr]
) -> tuple[Stmt, int]:
    buffer = block.body.buffer
    if buffer in s.func.params:
        s.refuse(f"{buffer.name} is a result of the function: all of it must be computed", block)
    if len(analysis.writers(s.func, buffer)) > 1:
        s.refuse(f"several blocks write {buffer.name}", block)
    for r in analysis.readers(s.func, buffer):
        if not analysis.contains(loop, r):
            s.refuse(f"block {r.name} outside of {loop.var} reads {buffer.name} too", r)
    box = analysis.region(loop.body, buffer, arith)
    bind: dict[Expr, tuple[Expr, Expr]] = {}
    for d, index in enumerate(block.body.indices):
        it = _plain_iter(block, index)
        if it is not None:
            bind[it.var] = box[d]
        elif index is not ZERO:
            s.refuse(f"block {block.name} does not store at plain iterators", block)
    nest = _nest(s, block, bind, arith, conditions)
    kids = _children(loop.body)
    first = next(k for k, x in enumerate(kids) if buffer in loaded(x))
    return nest, first


def loaded(s: Stmt) -> set[Buffer]:
    return {x.buffer for b in analysis.blocks(s) for x in analysis.block_loads(b)}


def _as_consumer(
    s: Schedule, block: Block, loop: For, path: analysis.Path, arith: Arith
) -> tuple[Stmt, int]:
    kids = _children(loop.body)
    mine = analysis.made_below(s, block, loop, arith)
    if not mine:
        s.refuse(f"block {block.name} neither reads nor makes anything that {loop.var} does", block)
    bind: dict[Expr, tuple[Expr, Expr]] = {}
    conditions: list[Expr] = []
    around = [*analysis.loops_in(path), loop]
    for w in analysis.writers(s.func, block.body.buffer):
        if w is not block and (analysis.contains(loop, w) or analysis.comes_after(s, w, loop)):
            s.refuse(f"several blocks write {block.body.buffer.name}", block)
    for load in analysis.operand_loads(block):
        for w in analysis.writers(s.func, load.buffer):
            waits = analysis.depends(s, load, block, w, arith)
            if waits and not analysis.contains(loop, w) and analysis.comes_after(s, w, loop):
                s.refuse(f"block {w.name}, which {block.name} reads, runs after {loop.var}", block)
            if analysis.contains(loop, w) and analysis.mixed_loops(w, around):
                s.refuse(f"block {w.name} has a loop that is both spatial and reducing", w)
    same = _same_points(s, block, mine, loop, around, arith)
    if same is not None:
        return same, 1 + max(
            k for k, x in enumerate(kids) if {m.buffer for m in mine} & written_buffers(x)
        )
    for load in mine:
        writers = analysis.writers(s.func, load.buffer)
        makers = [w for w in writers if analysis.depends(s, load, block, w, arith)]
        if any(not analysis.contains(loop, w) for w in makers):
            s.refuse(f"{load.buffer.name} is also written outside of {loop.var}", block)
        made = [a for a in analysis.accesses(loop.body, arith, load.buffer) if a.is_store]
        box = analysis.region(loop.body, load.buffer, arith, made)
        for d, index in enumerate(load.indices):
            it = _plain_iter(block, index)
            if type(index) is Binary and index.op == "add" and const_int(index.b) is not None:
                it = _plain_iter(block, index.a)  # the entry that a recurrence has just made
                box[d] = arith.simplify(box[d][0] - index.b), box[d][1]
            if it is None:
                if const_int(index) is None:
                    s.refuse(
                        f"block {block.name} reads {load.buffer.name} at `{index}`, "
                        "not at a plain iterator",
                        block,
                    )
            elif not analysis.stays_within(it, load.buffer.shape[d], arith):
                # It goes on where this buffer ends: once all of that axis is there, over all of it.
                if box[d] != (ZERO, load.buffer.shape[d]):
                    s.refuse(f"block {block.name} runs further than {load.buffer.name}", block)
            elif bind.setdefault(it.var, box[d]) != box[d]:
                s.refuse(f"block {block.name} needs two different regions along {it.var}", block)
        for w in makers:
            for r in analysis.reduce_loops(w, around):
                conditions.append(eq(r.var, arith.simplify(r.extent - 1)))
    nest = _nest(s, block, bind, arith, list(dict.fromkeys(conditions)))
    last = max(k for k, x in enumerate(kids) if {x2.buffer for x2 in mine} & written_buffers(x))
    return nest, last + 1


def _same_points(
    s: Schedule, block: Block, mine: list[Load], loop: For, around: list[For], arith: Arith
) -> Stmt | None:
    """An elementwise consumer of one block takes over the loops of its maker, so that it runs at
    exactly the points just computed, whatever shape their set has. None when it is not of that
    kind."""
    if len({x.buffer for x in mine}) > 1 or len(mine) > 1 or any(i.reduce for i in block.iters):
        return None
    makers = [w for w in analysis.writers(s.func, mine[0].buffer) if w.tag != "init"]
    if len(makers) != 1 or not analysis.contains(loop, makers[0]):
        return None
    maker = makers[0]
    values = analysis.values_of(maker)
    bound: dict[Expr, Expr] = {}
    sizes = mine[0].buffer.shape
    for mine_index, made_index, size in zip(
        mine[0].indices, maker.body.indices, sizes, strict=True
    ):
        it = _plain_iter(block, mine_index)
        if it is not None:
            if not analysis.stays_within(it, size, arith):
                return None
            bound[it.var] = arith.simplify(substitute(made_index, values))
        elif mine_index is not ZERO or made_index is not ZERO:
            return None
    if len(bound) != len(block.iters):
        return None
    fresh, inner = inner_loops(s, maker, loop)
    there = {x.var for x in (*around, *inner)} | set(s.func.dims)
    if any(not free_vars(e) <= there for e in bound.values()):
        return None
    where = [eq(r.var, arith.simplify(r.extent - 1)) for r in analysis.reduce_loops(maker, around)]
    where += [substitute(c, fresh) for c in element_conditions(maker)]
    iters = tuple(i.with_(value=substitute(bound[i.var], fresh)) for i in block.iters)
    inside = knowing({**arith.ranges, **{fresh[x.var]: arith.ranges[x.var] for x in inner}}, where)
    where += [i.value < i.extent for i in iters if inside.prove(i.value < i.extent) is not True]
    return wrap(block.with_(iters=iters, where=all_of(where)), inner, fresh)


def inner_loops(s: Schedule, block: Block, at: For) -> tuple[dict[Expr, Expr], list[For]]:
    """The loops between `at` and a block that choose the element, and fresh variables for them."""
    _, path = s.block(block.name)
    below = analysis.loops_in(path)
    inner = analysis.spatial_loops(block, below[below.index(at) + 1 :])
    return {x.var: s.fresh_var(x.var.name) for x in inner}, inner


def wrap(body: Stmt, inner: list[For], fresh: dict[Expr, Expr]) -> Stmt:
    """`body` under copies of some loops."""
    for x in reversed(inner):
        body = For(fresh[x.var], substitute(x.extent, fresh), SERIAL, body)  # type: ignore[arg-type]
    return body


def element_conditions(block: Block) -> list[Expr]:
    """The conditions of a block that may say which elements it computes."""
    reducing = frozenset().union(
        *[free_vars(i.value) for i in block.iters if i.reduce], frozenset()
    )
    spatial = frozenset().union(
        *[free_vars(i.value) for i in block.iters if not i.reduce], frozenset()
    )
    parts = analysis.where_parts(block)
    return [c for c in parts if not reducing & free_vars(c) and spatial & free_vars(c)]


def tail_conditions(block: Block, arith: Arith) -> list[Expr]:
    """The conditions of a block that only keep its iterators, or the element that it stores, below
    an end: those of tails."""
    parts = [c for c in element_conditions(block) if not (type(c) is Binary and c.op == "le")]
    if not parts:
        return []
    spatial = [i for i in block.iters if not i.reduce]
    # No block runs where an extent is 0, so what divides by one is known to be positive.
    in_range = [i.extent > ZERO for i in spatial]
    in_range += [i.value < i.extent for i in spatial] + [i.value >= ZERO for i in spatial]
    # A buffer may hold only a part of what the iterators run over.
    values = analysis.values_of(block)
    element = [substitute(i, values) for i in block.body.indices]
    in_range += [i < n for i, n in zip(element, block.body.buffer.shape, strict=True)]
    inside = knowing(arith.ranges, in_range)
    return [c for c in parts if inside.prove(c) is True]


def _nest(
    s: Schedule,
    block: Block,
    bind: dict[Expr, tuple[Expr, Expr]],
    arith: Arith,
    conditions: list[Expr],
) -> Stmt:
    """The block under new loops: bound iterators run over (lowest, extent), the others over
    everything."""
    loops: list[tuple[Var, Expr]] = []
    iters = []
    where = [*conditions]
    # No block runs where an extent is 0, so what divides by one is known to be positive.
    arith = Arith(arith.ranges, [i.extent > ZERO for i in block.iters])
    for it in block.iters:
        low, extent = bind.get(it.var, (ZERO, it.extent))
        extent = arith.simplify(extent)
        if extent is Const(1):
            value = low
        else:
            var = s.fresh_var(_base(it.var.name))
            loops.append((var, extent))
            arith.ranges[var] = (ZERO, extent - 1)
            value = arith.simplify(low + var)
        iters.append(it.with_(value=value))
        for cond in (value < it.extent, value >= ZERO):
            if arith.prove(cond) is not True:
                where.append(cond)
    inner: Stmt = block.with_(iters=tuple(iters), where=all_of(where))
    # Reduction loops inside, in their original order.
    reduce = {it.var for it in block.iters if it.reduce}
    by_reduce = [
        (v, x) for v, x in loops if any(v in free_vars(i.value) for i in iters if i.var in reduce)
    ]
    ordered = [t for t in loops if t not in by_reduce] + by_reduce
    for var, extent in reversed(ordered):
        inner = For(var, extent, SERIAL, inner)
    return inner


def _base(name: str) -> str:
    """The loop name that goes with an iterator variable."""
    return name[1:] if name.startswith("v") and len(name) > 1 else name
