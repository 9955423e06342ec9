"""Primitives that move, split or rehouse blocks: inline, compute_at, decompose_reduction, stage, rfactor."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from minicompiler.ir.arith import Arith
from minicompiler.ir.expr import (
    TRUE,
    ZERO,
    Binary,
    Const,
    Expr,
    Load,
    Var,
    all_of,
    binary,
    const,
    const_int,
    eq,
    free_vars,
    minimum,
    rewrite,
    select,
    substitute,
    walk,
)
from minicompiler.ir.layout import IndexMap
from minicompiler.ir.tir import (
    SERIAL,
    Alloc,
    Block,
    Buffer,
    For,
    Iter,
    Scope,
    Seq,
    Stmt,
    Store,
    is_empty,
    map_statements,
    seq,
    statements,
    written_buffers,
)
from minicompiler.lower.to_tir import COMBINE, identity_of

from . import analysis
from .loops import drop_conditions

if TYPE_CHECKING:
    from .schedule import Schedule

COMBINER = {op: name for name, op in COMBINE.items()}


# ---- inline -----------------------------------------------------------------------------------------
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
    if _outer_vars(s, block):
        s.refuse(f"what block {name} computes depends on the loops around it", block, "inline before staging")
    axes = [_plain_iter(block, i) for i in block.body.indices]
    if any(a is None and i is not ZERO for a, i in zip(axes, block.body.indices, strict=True)) or any(
        i not in axes for i in block.iters
    ):
        s.refuse(f"block {name} does not store at plain iterators", block)
    for r in analysis.readers(s.func, buffer):
        _stays_private(s, block, s.block(r.name)[1])

    def one(e: Expr) -> Expr | None:
        if type(e) is Load and e.buffer is buffer:
            mapping = {a.var: i for a, i in zip(axes, e.indices, strict=True) if a is not None}
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


def _outer_vars(s: Schedule, block: Block) -> frozenset[Expr]:
    """The loop variables that the body itself mentions (staging makes its indices relative to them)."""
    used: frozenset[Expr] = frozenset()
    for store in (block.init, block.body):
        if store is not None:
            used = used.union(*map(free_vars, (store.value, *store.indices)))
    return used - {i.var for i in block.iters} - set(s.func.dims)


def _plain_iter(block: Block, index: Expr) -> Iter | None:
    return next((i for i in block.iters if i.var is index and not i.reduce), None)


# ---- compute_at -------------------------------------------------------------------------------------
def compute_at(s: Schedule, name: str, loop_name: str) -> None:
    """Moves a block into a loop, over just the part its partner there needs or makes.

    producer: before its first reader in the loop, over what the readers below touch.
    consumer: after the last writer in the loop, over what was written below; under a reduction loop of
      the writer it runs on the last iteration only.
    """
    block, _ = s.block(name)
    loop, path = s.loop(loop_name)
    if analysis.contains(loop, block):
        s.refuse(f"block {name} is inside {loop_name} already", block)
    analysis.refuse_parallel_below(s, loop)
    analysis.refuse_vector_around(s, (*path, loop))
    _can_move(s, block, (*path, loop))
    arith = analysis.arith_of(s.func)
    analysis.refuse_leaving_scan(s, block, (*path, loop))
    # In a recurrence a block may be both: what it makes is read below, but by the next iteration.
    needed = block.body.buffer in _loaded(loop.body)
    if needed and not analysis.made_below(s, block, loop, arith):
        nest, place = _as_producer(s, block, loop, arith)
    else:
        nest, place = _as_consumer(s, block, loop, path, arith)
    s.edit(lambda x: Seq(()) if x is block else None)
    target, _ = s.loop(loop_name)
    parts = list(target.body.stmts) if isinstance(target.body, Seq) else [target.body]
    parts.insert(place, nest)
    s.swap(target, target.with_(body=seq(parts)))


def _can_move(s: Schedule, block: Block, to: analysis.Path) -> None:
    """Refuses unless all that the block mentions is there below `to`, and its conditions say no more
    than that its iterators are in range."""
    missing = _outer_vars(s, block) - {x.var for x in analysis.loops_in(to)}
    if missing:
        names = ", ".join(sorted(map(str, missing)))
        s.refuse(f"what block {block.name} computes depends on {names}", block, "move it before staging")
    for b in [block.body.buffer, *[x.buffer for x in analysis.block_loads(block)]]:
        if b.scope in (Scope.LOCAL, Scope.REGISTER):
            s.refuse(f"block {block.name} uses the staged buffer {b.name}", block, "move it before staging")
    own = _own_conditions(s, block)
    if own:
        s.refuse(f"block {block.name} has a condition of its own: {own[0]}", block)


def _stays_private(s: Schedule, block: Block, to: analysis.Path, *also: Buffer, reads: bool = True) -> None:
    """Refuses unless the private buffers that a block reads (and some others) are those below `to`."""
    here = {x.buffer for x in to if isinstance(x, Alloc)}
    for b in [*also, *[x.buffer for x in analysis.block_loads(block) if reads]]:
        if b.scope in (Scope.LOCAL, Scope.REGISTER) and b not in here:
            s.refuse(f"block {block.name} uses {b.name}, which is private to where it stands", block)


def _own_conditions(s: Schedule, block: Block) -> list[Expr]:
    """The conditions of a block that do not follow from its iterators being in range."""
    parts = analysis.where_parts(block)
    if not parts:
        return []
    in_range = [i.value < i.extent for i in block.iters] + [i.value >= ZERO for i in block.iters]
    arith = Arith(analysis.arith_of(s.func).ranges, in_range)
    return [c for c in parts if arith.prove(c) is not True]


def _children(s: Stmt) -> list[Stmt]:
    return list(s.stmts) if isinstance(s, Seq) else [s]


def _as_producer(s: Schedule, block: Block, loop: For, arith: Arith) -> tuple[Stmt, int]:
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
    nest = _nest(s, block, bind, arith, [])
    kids = _children(loop.body)
    first = next(k for k, x in enumerate(kids) if buffer in _loaded(x))
    return nest, first


def _loaded(s: Stmt) -> set[Buffer]:
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
        return same, 1 + max(k for k, x in enumerate(kids) if {m.buffer for m in mine} & written_buffers(x))
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
                    s.refuse(f"block {block.name} reads {load.buffer.name} at `{index}`, not at a plain iterator",
                             block)  # fmt: skip
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
    """An elementwise consumer of one block takes over the loops of its maker, so that it runs at exactly
    the points just computed, whatever shape their set has. None when it is not of that kind."""
    if len({x.buffer for x in mine}) > 1 or len(mine) > 1 or any(i.reduce for i in block.iters):
        return None
    makers = [w for w in analysis.writers(s.func, mine[0].buffer) if w.tag != "init"]
    if len(makers) != 1 or not analysis.contains(loop, makers[0]):
        return None
    maker = makers[0]
    values = analysis.values_of(maker)
    bound: dict[Expr, Expr] = {}
    for mine_index, made_index in zip(mine[0].indices, maker.body.indices, strict=True):
        it = _plain_iter(block, mine_index)
        if it is not None:
            bound[it.var] = arith.simplify(substitute(made_index, values))
        elif mine_index is not ZERO or made_index is not ZERO:
            return None
    if len(bound) != len(block.iters):
        return None
    fresh, inner = _inner_loops(s, maker, loop)
    there = {x.var for x in (*around, *inner)} | set(s.func.dims)
    if any(not free_vars(e) <= there for e in bound.values()):
        return None
    where = [eq(r.var, arith.simplify(r.extent - 1)) for r in analysis.reduce_loops(maker, around)]
    where += [substitute(c, fresh) for c in _element_conditions(maker)]
    iters = tuple(i.with_(value=substitute(bound[i.var], fresh)) for i in block.iters)
    inside = Arith({**arith.ranges, **{fresh[x.var]: arith.ranges[x.var] for x in inner}}, where)
    where += [i.value < i.extent for i in iters if inside.prove(i.value < i.extent) is not True]
    return _wrap(block.with_(iters=iters, where=all_of(where)), inner, fresh)


def _inner_loops(s: Schedule, block: Block, at: For) -> tuple[dict[Expr, Expr], list[For]]:
    """The loops between `at` and a block that choose the element, and fresh variables for them."""
    _, path = s.block(block.name)
    below = analysis.loops_in(path)
    inner = analysis.spatial_loops(block, below[below.index(at) + 1 :])
    return {x.var: s.fresh_var(x.var.name) for x in inner}, inner


def _wrap(body: Stmt, inner: list[For], fresh: dict[Expr, Expr]) -> Stmt:
    """`body` under copies of some loops."""
    for x in reversed(inner):
        body = For(fresh[x.var], substitute(x.extent, fresh), SERIAL, body)  # type: ignore[arg-type]
    return body


def _element_conditions(block: Block) -> list[Expr]:
    """The conditions of a block that may say which elements it computes."""
    reducing = frozenset().union(*[free_vars(i.value) for i in block.iters if i.reduce], frozenset())
    spatial = frozenset().union(*[free_vars(i.value) for i in block.iters if not i.reduce], frozenset())
    parts = analysis.where_parts(block)
    return [c for c in parts if not reducing & free_vars(c) and spatial & free_vars(c)]


def _tail_conditions(block: Block, arith: Arith) -> list[Expr]:
    """The conditions of a block that only keep its iterators in range: those of tails."""
    parts = _element_conditions(block)
    if not parts:
        return []
    spatial = [i for i in block.iters if not i.reduce]
    in_range = [i.value < i.extent for i in spatial] + [i.value >= ZERO for i in spatial]
    inside = Arith(arith.ranges, in_range)
    return [c for c in parts if inside.prove(c) is True]


def _nest(
    s: Schedule,
    block: Block,
    bind: dict[Expr, tuple[Expr, Expr]],
    arith: Arith,
    conditions: list[Expr],
) -> Stmt:
    """The block under new loops: bound iterators run over (lowest, extent), the others over everything."""
    loops: list[tuple[Var, Expr]] = []
    iters = []
    where = [*conditions]
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
        for cond in (value < it.extent, ZERO <= value):
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


# ---- decompose_reduction ------------------------------------------------------------------------------
def decompose_reduction(s: Schedule, name: str, loop_name: str) -> str:
    """for k: block C (init, body)   ->   block C_init; for k: block C (body)

    The init runs just before `loop`, over the loops below it that choose the element, and only in the
    first iteration of reduction loops further out.
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
    _stays_private(s, block, path[: path.index(loop)], block.body.buffer, reads=False)
    if _outer_vars(s, block) & {x.var for x in inside}:
        s.refuse(f"where block {name} stores depends on the loops around it", block, "do this before staging")
    made = _init_nest(s, block, outside, inside)
    s.edit(
        lambda x: x.with_(init=None) if x is block else None,
    )
    new_loop, _ = s.loop(loop_name)
    s.swap(new_loop, seq([made[0], new_loop]))
    return made[1]


def _init_nest(s: Schedule, block: Block, outside: list[For], inside: list[For]) -> tuple[Stmt, str]:
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
    # A condition on the reduction index (a masked tail) does not concern the init.
    for part in analysis.where_parts(block):
        if not any(r.var in free_vars(part) for r in analysis.reduce_loops(block, outside + inside)):
            conditions.append(substitute(part, mapping))
    name = s.fresh(block.name + "_init")
    iters = tuple(i.with_(value=substitute(i.value, mapping)) for i in block.iters if not i.reduce)
    inner: Stmt = Block(name, iters, all_of(conditions), None, block.init, "init")
    for x in reversed(spatial):
        inner = For(mapping[x.var], substitute(x.extent, mapping), x.kind, inner)  # type: ignore[arg-type]
    return inner, name


# ---- stage -----------------------------------------------------------------------------------------------
def stage(s: Schedule, name: str, at: str | None, scope: Scope, layout: IndexMap | None) -> str:
    """for i_o: for i_i: ... B[i_o*8 + i_i] ...   ->   for i_o: alloc T[8]
                                                          T[j] = B[i_o*8 + j]      (if read before written)
                                                          for i_i: ... T[i_i] ...
                                                          B[i_o*8 + j] = T[j]      (if used afterwards)

    The new buffer covers the whole box that is touched, masked iterations included: conditions on the
    element are dropped from blocks that write it (what lies beyond the original is never written
    back; their other loads are clamped to memory), and what is loaded beyond the original is zero.
    """
    buffer = s.buffer(name)
    arith = analysis.arith_of(s.func)
    if layout is not None and layout.rank != len(buffer.shape):
        s.refuse(f"the layout is for {layout.rank} axes, {name} has {len(buffer.shape)}")
    if at is None:
        return _stage_root(s, buffer, scope, layout, arith)
    loop, path = s.loop(at)
    if scope not in (Scope.LOCAL, Scope.REGISTER):
        s.refuse(f"inside a loop a buffer is local or register, not {scope.value}", loop)
    analysis.refuse_parallel_below(s, loop)
    analysis.refuse_vector_around(s, (*path, loop))
    found = analysis.accesses(loop.body, arith, buffer)
    if not found:
        s.refuse(f"nothing in {at} touches {name}", loop)
    if scope is Scope.REGISTER and layout is None:  # a layout speaks of the buffer's own axes
        tiled = _stage_tile(s, buffer, loop, path, found, arith)
        if tiled is not None:
            return tiled
    box = analysis.region(loop.body, buffer, arith, found)
    outer = {x.var for x in analysis.loops_in(path)} | {loop.var}
    for low, extent in box:
        if scope is Scope.REGISTER and const_int(extent) is None:
            s.refuse(f"a register buffer needs constant extents; {at} touches {extent} of {name}", loop)
        if any(v in outer for v in free_vars(extent)):
            s.refuse(f"what {at} touches of {name} varies in size: {extent}", loop)
        del low
    new = Buffer(s.fresh(buffer.name + "_s"), buffer.dtype, tuple(x for _, x in box), scope, layout)
    writing = [a for a in found if a.is_store]
    body = _redirect(s, loop.body, buffer, new, [low for low, _ in box], arith, bool(writing))
    parts: list[Stmt] = []
    copy_in = _read_first(s, loop, path, buffer, arith, found)
    if copy_in is not None:
        parts.append(_copy(s, new, buffer, box, arith, copy_in, into=True))
    parts.append(body)
    if writing and _live_after(s, loop, path, buffer, box):
        parts.append(_copy(s, new, buffer, box, arith, TRUE, into=False))
    s.swap(loop, loop.with_(body=Alloc(new, seq(parts))))
    _forget_unused(s, buffer)
    return new.name


def _stage_tile(
    s: Schedule, buffer: Buffer, loop: For, path: analysis.Path, found: list[analysis.Access], arith: Arith
) -> str | None:
    """Staging when every access below runs through the same points: the new buffer has one axis per loop,
    whatever shape the set of points has (a row of pixels that wraps around). None where it does not apply."""
    shape: tuple[Expr, ...] | None = None
    points: tuple[Expr, ...] | None = None
    chosen: dict[int, list[For]] = {}
    for a in found:
        _, block_path = s.block(a.block.name)
        below = analysis.loops_in(block_path)
        inner = analysis.spatial_loops(a.block, below[below.index(loop) + 1 :])
        canonical: dict[Expr, Expr] = {x.var: Var(f"_t{k}") for k, x in enumerate(inner)}
        here = tuple(substitute(i, canonical) for i in a.indices)
        size = tuple(x.extent for x in inner)
        if any(not {x.var for x in below[below.index(loop) + 1 :]}.isdisjoint(free_vars(i)) for i in here):
            return None
        if any(const_int(x) is None for x in size) or shape not in (None, size) or points not in (None, here):
            return None
        if any(x.var in free_vars(i) for x in analysis.reduce_loops(a.block, below[below.index(loop) + 1 :])
               for i in a.indices):  # fmt: skip
            return None
        told = frozenset().union(*map(free_vars, here), frozenset())
        if any(canonical[x.var] not in told and const_int(x.extent) != 1 for x in inner):
            return None  # several points are one element
        shape, points = size, here
        chosen[id(a.block)] = inner
    assert shape is not None
    new = Buffer(s.fresh(buffer.name + "_s"), buffer.dtype, shape, Scope.REGISTER)
    writers = [a.block for a in found if a.is_store]
    pattern = next((w for w in writers if w.tag != "init"), found[0].block)
    tail = _element_conditions(pattern)
    if tail != _tail_conditions(pattern, arith) or not _points_inside(points or (), shape, buffer, tail, chosen, pattern, arith):
        return None

    def go(x: Stmt) -> Stmt | None:
        if id(x) not in chosen:
            return None
        assert isinstance(x, Block)
        at = tuple(loop.var for loop in chosen[id(x)])

        def one(e: Expr) -> Expr | None:
            return Load(new, at, e.mask) if type(e) is Load and e.buffer is buffer else None

        def store(st: Store | None) -> Store | None:
            if st is None:
                return None
            mine = st.buffer is buffer
            return Store(new if mine else st.buffer, at if mine else st.indices, rewrite(st.value, one))

        made = dataclasses.replace(x, init=store(x.init), body=store(x.body))
        return _unconditional(made, new, arith) if x.body.buffer is buffer else made

    copy_in = _read_first(s, loop, path, buffer, arith, found, pointwise=True)
    live = bool(writers) and _live_after(s, loop, path, buffer, [(p, ZERO) for p in points or ()])

    def copy(cond: Expr, into: bool) -> Stmt:
        fresh, inner = _inner_loops(s, pattern, loop)
        access = next(a for a in found if a.block is pattern)
        index = [substitute(i, fresh) for i in access.indices]
        iters = tuple(
            Iter(s.fresh_var(f"v{new.name}_{d}"), n, False, i)
            for d, (i, n) in enumerate(zip(index, buffer.shape, strict=True))
        )
        at = tuple(fresh[x.var] for x in inner)
        old = tuple(i.var for i in iters)
        conds = [substitute(c, fresh) for c in tail]
        body = Store(new, at, Load(buffer, old)) if into else Store(buffer, old, Load(new, at))
        name = s.fresh(f"{new.name}_{'in' if into else 'out'}")
        tag = "copy_in" if into else "copy_out"
        return _wrap(Block(name, iters, all_of([cond, *conds]), None, body, tag), inner, fresh)

    parts = [map_statements(loop.body, go)]
    if copy_in is not None:
        parts.insert(0, copy(copy_in, True))
    if live:
        parts.append(copy(TRUE, False))
    s.swap(loop, loop.with_(body=Alloc(new, seq(parts))))
    _forget_unused(s, buffer)
    return new.name


def _points_inside(
    points: tuple[Expr, ...], shape: tuple[Expr, ...], buffer: Buffer, tail: list[Expr],
    chosen: dict[int, list[For]], pattern: Block, arith: Arith,
) -> bool:  # fmt: skip
    """True when the points of a tile are known to lie in the buffer where the tail's conditions hold."""
    if any(type(x) is Load for p in points for x in walk(p)):
        return False
    canonical: dict[Expr, Expr] = {x.var: Var(f"_t{k}") for k, x in enumerate(chosen[id(pattern)])}
    ranges = {Var(f"_t{k}"): (ZERO, n - 1) for k, n in enumerate(shape)}
    conditions = [substitute(c, canonical) for c in tail]
    inside = Arith({**arith.ranges, **ranges}, conditions)
    # Where `p < n` holds p is min(p, n - 1), also where p is taken apart (p // w, p % w).
    capped = {
        inside.simplify(c.a): minimum(c.a, c.b - 1)
        for c in conditions
        if type(c) is Binary and c.op == "lt" and c.a.dtype.is_int
    }

    def within(p: Expr, n: Expr) -> bool:
        if inside.prove(p >= ZERO) is not True:
            return False
        return inside.prove(p < n) is True or inside.prove(rewrite(inside.simplify(p), capped.get) < n) is True

    return all(within(p, n) for p, n in zip(points, buffer.shape, strict=True))


def _forget_unused(s: Schedule, buffer: Buffer) -> None:
    """Drops a workspace buffer that nothing touches any more."""
    for b in analysis.blocks(s.func):
        if b.body.buffer is buffer or any(x.buffer is buffer for x in analysis.block_loads(b)):
            return
    s.func = s.func.with_(buffers=tuple(b for b in s.func.buffers if b is not buffer))


def _stage_root(s: Schedule, buffer: Buffer, scope: Scope, layout: IndexMap | None, arith: Arith) -> str:
    if scope is not Scope.GLOBAL:
        s.refuse("staging for the whole function needs the global scope")
    if analysis.writers(s.func, buffer):
        s.refuse(f"{buffer.name} is written by this function", hint="stage it inside a loop")
    new = Buffer(s.fresh(buffer.name + "_s"), buffer.dtype, buffer.shape, scope, layout)
    box = [(ZERO, x) for x in buffer.shape]
    low = [ZERO] * len(box)
    first = next((k for k, p in enumerate(s.func.phases) if buffer in _loaded(p)), None)
    if first is None:
        s.refuse(f"nothing reads {buffer.name}")
    assert first is not None
    phases = [
        _redirect(s, p, buffer, new, low, arith, False) if buffer in _loaded(p) else p for p in s.func.phases
    ]
    phases.insert(first, _copy(s, new, buffer, box, arith, TRUE, into=True))
    s.func = s.func.with_(phases=tuple(phases), buffers=(*s.func.buffers, new))
    return new.name


def _redirect(
    s: Schedule, body: Stmt, old: Buffer, new: Buffer, low: list[Expr], arith: Arith, written: bool
) -> Stmt:
    """Accesses of `old` go to `new`, relative to the lowest index."""

    def shift(indices: tuple[Expr, ...]) -> tuple[Expr, ...]:
        return tuple(i if lo is ZERO else i - lo for i, lo in zip(indices, low, strict=True))

    def one(e: Expr) -> Expr | None:
        if type(e) is Load and e.buffer is old:
            return Load(new, shift(e.indices), e.mask)
        return None

    def store(x: Store | None) -> Store | None:
        if x is None:
            return None
        indices = shift(x.indices) if x.buffer is old else x.indices
        return Store(new if x.buffer is old else x.buffer, indices, rewrite(x.value, one))

    def go(x: Stmt) -> Stmt | None:
        if not isinstance(x, Block):
            return None
        made = dataclasses.replace(x, init=store(x.init), body=store(x.body))
        if written and x.body.buffer is old:
            made = _unconditional(made, new, arith)
        return made

    return map_statements(body, go)


def _unconditional(block: Block, tile: Buffer, arith: Arith) -> Block:
    """Drops the conditions on which element is computed: a tile has room for all, and nothing beyond
    the original is written back. Loads of other buffers that could then leave them are clamped."""
    dropped = _tail_conditions(block, arith)
    if not dropped:
        return block
    mapping = analysis.values_of(block)
    # `p < n` holds for min(p, n - 1): with that in place of p (wherever p is taken apart, p // w, p % w)
    # the load is the one of the last valid point.
    capped = {c.a: minimum(c.a, c.b - 1) for c in dropped if type(c) is Binary and c.op == "lt"}

    def cap(e: Expr) -> Expr | None:
        return capped.get(e)

    inside = Arith({**arith.ranges, **{i.var: (ZERO, i.extent - 1) for i in block.iters}})

    tail_iters = {
        i.var for i in block.iters if any(x in capped for x in walk(i.value))
    }

    def clamp(e: Expr) -> Expr | None:
        if type(e) is not Load or e.buffer is tile or e.mask is not None:
            return None
        moved: list[bool] = []
        indices = []
        for i, room in zip(e.indices, e.buffer.padded_shape, strict=True):
            value = substitute(i, mapping)
            safe = inside.prove(arith.simplify(value) < room)
            if safe is not True:
                limited = rewrite(value, cap)
                safe = inside.prove(inside.simplify(limited) < room)
                i = limited if safe is True and limited is not value else minimum(i, room - 1)
                moved.append(True)
            indices.append(i)
        if moved:  # one index capped: cap all that depend on the same point
            indices = [rewrite(substitute(i, mapping), cap) if free_vars(i) & tail_iters else i for i in indices]
        return Load(e.buffer, tuple(indices))

    body = block.body.with_(value=rewrite(block.body.value, clamp))
    init = None if block.init is None else block.init.with_(value=rewrite(block.init.value, clamp))
    iters = tuple(_widened(i, arith) for i in block.iters)
    return Block(block.name, iters, drop_conditions(block.where, dropped), init, body, block.tag)


def _widened(it: Iter, arith: Arith) -> Iter:
    """The iterator of a block that lost its conditions: it may run past its extent."""
    if it.reduce or arith.prove(it.value < it.extent) is True:
        return it
    inner = [v for v in free_vars(it.value) if v in arith.ranges]
    most = arith.bound(it.value, inner, +1)
    return it if most is None else it.with_(extent=arith.simplify(most + 1))


def _read_first(
    s: Schedule, loop: For, path: analysis.Path, buffer: Buffer, arith: Arith, found: list[analysis.Access],
    pointwise: bool = False,
) -> Expr | None:  # fmt: skip
    """None: everything is written before it is read. Otherwise the condition under which the old
    content is needed (TRUE: always). pointwise: the new buffer holds just the points accessed."""
    around = [*analysis.loops_in(path), loop]
    first = next(b for b in analysis.blocks(loop.body) if any(a.block is b for a in found))
    own = [a for a in found if a.block is first]
    reads_other = any(
        x.buffer is buffer and x.indices != first.body.indices for x in analysis.block_loads(first)
    )
    if first.body.buffer is not buffer or reads_other or not any(a.is_store for a in own):
        return TRUE
    if first.init is None and any(x.buffer is buffer for x in analysis.block_loads(first)):
        return TRUE
    _, above = s.block(first.name)
    for x in analysis.loops_in(above[above.index(loop) + 1 :]):
        if arith.prove(x.extent > 0) is not True:
            return TRUE  # it may not run at all
    # Written first: by an init (in the first reduction iteration only) or by a plain store, to all
    # of the box but for tails, which the staged buffer has room for.
    mine = [a for a in own if a.is_store]
    boxes = [analysis.region(loop.body, buffer, arith, x) for x in (mine, found)]
    if boxes[0] != boxes[1] or not (pointwise or all(analysis.dense(loop.body, a, arith) for a in mine)):
        return TRUE
    tail = _tail_conditions(first, arith)
    reducing = {x.var for x in analysis.reduce_loops(first, list(analysis.loops(s.func)))}
    conditions = [c for c in analysis.where_parts(first) if c not in tail and not reducing & free_vars(c)]
    if first.init is not None:
        inner = {x.var: ZERO for x in analysis.loops(loop.body)}
        for i in first.iters:
            if i.reduce:
                conditions.append(eq(arith.simplify(substitute(i.value, dict(inner))), ZERO))
    outer_vars = {x.var for x in around}
    if any(not free_vars(c) <= outer_vars for c in conditions if arith.prove(c) is not True):
        return TRUE
    needed = [c for c in conditions if arith.prove(c) is not True]
    if not needed:
        return None
    return arith.simplify(~all_of(needed)) if len(needed) == 1 else ~all_of(needed)


def _live_after(s: Schedule, loop: For, path: analysis.Path, buffer: Buffer, box: analysis.Box) -> bool:
    """True when what was written in one iteration of `loop` is used after it."""
    if buffer in s.func.params:
        return True
    inside = {id(b) for b in analysis.blocks(loop.body)}
    for b in analysis.blocks(s.func):
        if id(b) not in inside and buffer in {
            *(x.buffer for x in analysis.block_loads(b)), b.body.buffer
        }:  # fmt: skip
            return True
    # A loop around that does not move the box comes back to the same elements (a reduction loop).
    moved = frozenset().union(*[free_vars(low) for low, _ in box], frozenset())
    writing = [b for b in analysis.blocks(loop.body) if b.body.buffer is buffer]
    return any(
        const_int(x.extent) != 1 and (x.var not in moved or any(analysis.mixed_loops(b, [x]) for b in writing))
        for x in [*analysis.loops_in(path), loop]
        if any(analysis.reduce_loops(b, [x]) for b in writing)
    )


def _copy(
    s: Schedule, new: Buffer, old: Buffer, box: analysis.Box, arith: Arith, cond: Expr, into: bool
) -> Stmt:
    """The block that fills the staged buffer, or writes it back."""
    name = s.fresh(f"{new.name}_{'in' if into else 'out'}")
    iters: list[Iter] = []
    loops: list[tuple[Var, Expr]] = []
    inside: list[Expr] = []
    old_index: list[Expr] = []
    for d, ((low, extent), room) in enumerate(zip(box, new.padded_shape, strict=True)):
        span = room if into else extent
        if span is Const(1):
            value: Expr = ZERO
        else:
            var = s.fresh_var(f"{new.name}_{d}")
            loops.append((var, span))
            value = var
            arith.ranges[var] = (ZERO, span - 1)
        it = Iter(s.fresh_var(f"v{new.name}_{d}"), span, False, value)
        iters.append(it)
        at = it.var if low is ZERO else low + it.var
        old_index.append(at)
        absolute = arith.simplify(low + value)
        for c in (absolute < old.shape[d], ZERO <= absolute):
            if arith.prove(c) is not True:
                inside.append(c)
    local = tuple(it.var for it in iters)
    if into:
        in_iters = {it.value: it.var for it in iters if isinstance(it.value, Var)}
        guard = substitute(all_of(inside), in_iters)  # type: ignore[arg-type]
        value = select(guard, Load(old, tuple(old_index)), const(0, old.dtype))
        body = Store(new, local, value)
        where = cond
    else:
        body = Store(old, tuple(old_index), Load(new, local))
        where = binary("and", cond, all_of(inside))
    inner: Stmt = Block(name, tuple(iters), where, None, body, "copy_in" if into else "copy_out")
    for var, extent in reversed(loops):
        inner = For(var, extent, SERIAL, inner)
    return inner


# ---- rfactor -----------------------------------------------------------------------------------------------
def rfactor(s: Schedule, name: str, loop_name: str) -> tuple[str, str]:
    """C[i] = sum over k_o, k_i   ->   P[i, k_i] = sum over k_o;  C[i] = sum over k_i of P[i, k_i]

    A masked tail of the reduction becomes the combiner's identity, so each partial result is defined.
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
    others = [Iter(s.fresh_var("v" + x.var.name), x.extent, True, x.var) for x in reducing if x is not loop]
    to_iters: dict[Expr, Expr] = {loop.var: lane.var, **{i.value: i.var for i in others}}
    mapping = {i.var: substitute(i.value, to_iters) for i in block.iters if i.reduce}
    value = substitute(operand, mapping)
    keep, masks = [], []
    reduce_vars = {x.var for x in reducing}
    for part in analysis.where_parts(block):
        (masks if reduce_vars & free_vars(part) else keep).append(part)
    if masks:
        spatial_of = {i.value: i.var for i in spatial if isinstance(i.value, Var)}
        cond = substitute(all_of(masks), {**to_iters, **spatial_of})
        value = select(cond, value, identity)
    partial = Buffer(s.fresh(block.body.buffer.name + "_rf"), dtype,
                     (*[i.extent for i in spatial], loop.extent), Scope.GLOBAL)  # fmt: skip
    at = (*[i.var for i in spatial], lane.var)
    rf_name = s.fresh(name + "_rf")
    rf_block = Block(
        rf_name, (*spatial, lane, *others), all_of(keep),
        Store(partial, at, identity) if others else None,
        Store(partial, at, binary(combiner, Load(partial, at), value) if others else value),
    )  # fmt: skip
    # The loops from the outermost reducing one on are repeated for the combining block.
    cut = around.index(reducing[0])
    inside = [x for x in around[cut:] if x not in reducing]
    fresh: dict[Expr, Expr] = {x.var: s.fresh_var(x.var.name) for x in inside}
    last = s.fresh_var(loop_name)
    last_iter = Iter(s.fresh_var("v" + loop_name), loop.extent, True, last)
    final_iters = (*[i.with_(value=substitute(i.value, fresh)) for i in spatial], last_iter)
    own = block.body
    final: Stmt = Block(
        name, final_iters, substitute(all_of(keep), fresh), block.init,
        own.with_(value=binary(combiner, Load(own.buffer, own.indices),
                               Load(partial, (*[i.var for i in spatial], last_iter.var)))),
    )  # fmt: skip
    final = For(last, loop.extent, SERIAL, final)
    for x in reversed(inside):
        final = For(fresh[x.var], substitute(x.extent, fresh), SERIAL, final)  # type: ignore[arg-type]
    s.edit(lambda x: rf_block if x is block else None)
    moved, _ = s.loop(top.var.name)
    s.swap(moved, seq([moved, final]))
    s.func = s.func.with_(buffers=(*s.func.buffers, partial))
    return rf_name, partial.name


def _can_rfactor(s: Schedule, block: Block, loop: For, top: For, path: analysis.Path) -> None:
    """The combining block comes after `top`, the outermost reducing loop: it must find all it needs there,
    and nothing inside may wait for it."""
    if len(analysis.writers(s.func, block.body.buffer)) > 1:
        s.refuse(f"several blocks write {block.body.buffer.name}", block)
    above = path[: path.index(top)]
    around = analysis.loops_in(path)
    reducing = analysis.reduce_loops(block, around)
    if analysis.mixed_loops(block, around):
        s.refuse(f"block {block.name} has a loop that is both spatial and reducing", block)
    if free_vars(loop.extent) - set(s.func.dims):
        s.refuse(f"the extent of {loop.var} varies: {loop.extent}", loop)
    if _outer_vars(s, block) - {x.var for x in analysis.loops_in(above)}:
        s.refuse(f"where block {block.name} stores depends on the loops around it", block, "do this before staging")
    for x in around[around.index(top) :]:
        if x not in reducing and any(r.var in free_vars(x.extent) for r in reducing):
            s.refuse(f"the extent of {x.var} depends on a reduction loop", x)
    own = block.body.buffer
    if own.scope in (Scope.LOCAL, Scope.REGISTER) and not any(
        isinstance(x, Alloc) and x.buffer is own for x in above
    ):
        s.refuse(f"{own.name} is private to the inside of {top.var}", block)
    for b in analysis.blocks(top):
        if b is not block and (b.body.buffer is own or any(x.buffer is own for x in analysis.block_loads(b))):
            s.refuse(f"block {b.name} inside {top.var} uses {own.name} before all of it is added up", b)


__all__ = ["compute_at", "decompose_reduction", "inline", "is_empty", "rfactor", "stage"]
