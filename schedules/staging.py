"""The primitive `stage`: what one iteration touches of a buffer is held in another (packing,
register
tiles, thread-local memory), loaded if it is read before it is written, written back if used later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from minicompiler.ir.arith import Arith, knowing
from minicompiler.ir.expr import (
    ONE,
    TRUE,
    ZERO,
    Binary,
    Const,
    Expr,
    Load,
    Select,
    Var,
    all_of,
    binary,
    const,
    const_int,
    eq,
    free_vars,
    maximum,
    minimum,
    rewrite,
    select,
    substitute,
    walk,
)
from minicompiler.ir.layout import IndexMap
from minicompiler.ir.tir import (
    SCAN,
    SERIAL,
    Alloc,
    Block,
    Buffer,
    For,
    Iter,
    Scope,
    Stmt,
    Store,
    map_statements,
    seq,
    written_buffers,
)

from . import analysis
from .blocks import (
    element_conditions,
    inner_loops,
    loaded,
    own_conditions,
    tail_conditions,
    wrap,
)
from .loops import drop_conditions

if TYPE_CHECKING:
    from .schedule import Schedule


# ---- stage --------------------------------------------------------------------------------------
def stage(s: Schedule, name: str, at: str | None, scope: Scope, layout: IndexMap | None) -> str:
    """for i_o: for i_i: ... B[i_o*8 + i_i] ...   ->   for i_o: alloc T[8]
                                                          T[j] = B[i_o*8 + j]      (if read before
                                                          written)
                                                          for i_i: ... T[i_i] ...
                                                          B[i_o*8 + j] = T[j]      (if used
                                                          afterwards)

    The new buffer covers the whole box that is touched, masked iterations included: conditions on
    the element are dropped from blocks that write it (what lies beyond the original is never
    written back; their other loads are clamped to memory), and what is loaded beyond the original
    is zero.

    at: a loop; None is the whole function, or for the other scopes the phase that writes it, which
    becomes the body of a loop of one iteration.
    """
    buffer = s.buffer(name)
    arith = analysis.arith_of(s.func)
    if layout is not None and layout.rank != len(buffer.shape):
        s.refuse(f"the layout is for {layout.rank} axes, {name} has {len(buffer.shape)}")
    if at is None and scope is Scope.GLOBAL:
        return _stage_root(s, buffer, layout, arith)
    loop, path = _whole_phase(s, buffer) if at is None else s.loop(at)
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
    room = []
    for _, extent in box:
        if scope is Scope.REGISTER and const_int(extent) is None:
            s.refuse(
                f"a register buffer needs constant extents; {at} touches {extent} of {name}", loop
            )
        varying = [v for v in free_vars(extent) if v in outer]
        most = arith.bound(extent, varying, +1)  # the last part of an axis may be smaller
        if most is None:
            s.refuse(f"what {at} touches of {name} varies in size: {extent}", loop)
        room.append(arith.simplify(most) if varying else extent)
    new = Buffer(s.fresh(buffer.name + "_s"), buffer.dtype, tuple(room), scope, layout)
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
    s: Schedule,
    buffer: Buffer,
    loop: For,
    path: analysis.Path,
    found: list[analysis.Access],
    arith: Arith,
) -> str | None:
    """Staging when every access below runs through the same points: the new buffer has one axis
    per loop, whatever shape the set of points has (a row of pixels that wraps around). None where
    it does not apply."""
    shape: tuple[Expr, ...] | None = None
    points: tuple[Expr, ...] | None = None
    chosen: dict[int, list[For]] = {}
    for a in found:
        _, block_path = s.block(a.block.name)
        below = analysis.loops_in(block_path)
        inner = analysis.spatial_loops(a.block, below[below.index(loop) + 1 :])
        canonical: dict[Expr, Expr] = {x.var: Var(f"_t{k}") for k, x in enumerate(inner)}
        here = tuple(arith.simplify(substitute(i, canonical)) for i in a.indices)
        size = tuple(x.extent for x in inner)
        if any(
            not {x.var for x in below[below.index(loop) + 1 :]}.isdisjoint(free_vars(i))
            for i in here
        ):
            return None
        if (
            any(const_int(x) is None for x in size)
            or shape not in (None, size)
            or points not in (None, here)
        ):
            return None
        if any(
            x.var in free_vars(i)
            for x in analysis.reduce_loops(a.block, below[below.index(loop) + 1 :])
            for i in a.indices
        ):
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
    tail = element_conditions(pattern)
    private = _only_stores_ask(found, pattern, chosen)
    if (not private and tail != tail_conditions(pattern, arith)) or not _points_inside(
        points or (), shape, buffer, tail, chosen, pattern, arith
    ):
        return None

    def go(x: Stmt) -> Stmt | None:
        if id(x) not in chosen:
            return None
        assert isinstance(x, Block)
        at = tuple(loop.var for loop in chosen[id(x)])

        def one(e: Expr) -> Expr | None:
            return Load(new, at, e.mask) if type(e) is Load and e.buffer is buffer else None

        def store(st: Store) -> Store:
            mine = st.buffer is buffer
            return Store(
                new if mine else st.buffer, at if mine else st.indices, rewrite(st.value, one)
            )

        made = x.with_(init=x.init and store(x.init), body=store(x.body))
        mine = x.body.buffer is buffer
        if not mine:
            return made
        dropped = element_conditions(x) if private else tail_conditions(x, arith)
        return _unconditional(made, dropped, new, arith)

    copy_in = _read_first(s, loop, path, buffer, arith, found, pointwise=True)
    live = bool(writers) and _live_after(s, loop, path, buffer, [(p, ZERO) for p in points or ()])

    def copy(cond: Expr, into: bool) -> Stmt:
        fresh, inner = inner_loops(s, pattern, loop)
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
        return wrap(Block(name, iters, all_of([cond, *conds]), None, body, tag), inner, fresh)

    parts = [map_statements(loop.body, go)]
    if copy_in is not None:
        parts.insert(0, copy(copy_in, True))
    if live:
        parts.append(copy(TRUE, False))
    s.swap(loop, loop.with_(body=Alloc(new, seq(parts))))
    _forget_unused(s, buffer)
    return new.name


def _only_stores_ask(
    found: list[analysis.Access], pattern: Block, chosen: dict[int, list[For]]
) -> bool:
    """True when the points that a block leaves out (those of the next tile, say) are left out by
    all others too, so that a tile may hold anything there."""
    asked: list[frozenset[Expr]] = []
    for a in found:
        canonical: dict[Expr, Expr] = {
            x.var: Var(f"_t{k}") for k, x in enumerate(chosen[id(a.block)])
        }
        conditions = element_conditions(a.block)
        if any(type(c) is not Binary or c.op != "lt" for c in conditions):
            return False
        asked.append(frozenset(substitute(c, canonical) for c in conditions))
    own = asked[next(k for k, a in enumerate(found) if a.block is pattern)]
    made = [x for a, x in zip(found, asked, strict=True) if a.is_store]
    return all(x == own for x in made) and all(x >= own for x in asked)


def _points_inside(
    points: tuple[Expr, ...],
    shape: tuple[Expr, ...],
    buffer: Buffer,
    tail: list[Expr],
    chosen: dict[int, list[For]],
    pattern: Block,
    arith: Arith,
) -> bool:
    """True when the points of a tile are known to lie in the buffer where the tail's conditions
    hold."""
    if any(type(x) is Load for p in points for x in walk(p)):
        return False
    canonical: dict[Expr, Expr] = {x.var: Var(f"_t{k}") for k, x in enumerate(chosen[id(pattern)])}
    ranges = {Var(f"_t{k}"): (ZERO, n - 1) for k, n in enumerate(shape)}
    conditions = [substitute(c, canonical) for c in tail]
    some = [i.extent > ZERO for i in pattern.iters]  # or nothing runs
    inside = knowing({**arith.ranges, **ranges}, [*some, *conditions])
    # Where `p < n` holds p is min(p, n - 1), also where p is taken apart (p // w, p % w).
    capped = {
        inside.simplify(c.a): minimum(c.a, c.b - 1)
        for c in conditions
        if type(c) is Binary and c.op == "lt" and c.a.dtype.is_int
    }

    def within(p: Expr, n: Expr) -> bool:
        if inside.prove(p >= ZERO) is not True:
            return False
        return (
            inside.prove(p < n) is True
            or inside.prove(rewrite(inside.simplify(p), capped.get) < n) is True
        )

    return all(within(p, n) for p, n in zip(points, buffer.shape, strict=True))


def _forget_unused(s: Schedule, buffer: Buffer) -> None:
    """Drops a workspace buffer that nothing touches any more."""
    for b in analysis.blocks(s.func):
        if b.body.buffer is buffer or any(x.buffer is buffer for x in analysis.block_loads(b)):
            return
    s.func = s.func.with_(buffers=tuple(b for b in s.func.buffers if b is not buffer))


def _whole_phase(s: Schedule, buffer: Buffer) -> tuple[For, analysis.Path]:
    """A loop of one iteration around the only phase that writes a buffer."""
    writing = [p for p in s.func.phases if buffer in written_buffers(p)]
    if len(writing) != 1:
        s.refuse(f"{len(writing)} phases write {buffer.name}", hint="stage it inside a loop")
    if any(x.tag == SCAN for x in analysis.loops(writing[0])):
        s.refuse(f"{buffer.name} is part of a recurrence", writing[0], "stage it inside a loop")
    loop = For(s.fresh_var("once"), ONE, SERIAL, writing[0])
    s.swap(writing[0], loop)
    return loop, ()


def _stage_root(s: Schedule, buffer: Buffer, layout: IndexMap | None, arith: Arith) -> str:
    if analysis.writers(s.func, buffer):
        s.refuse(f"{buffer.name} is written by this function", hint="stage it inside a loop")
    new = Buffer(s.fresh(buffer.name + "_s"), buffer.dtype, buffer.shape, Scope.GLOBAL, layout)
    box = [(ZERO, x) for x in buffer.shape]
    low = [ZERO] * len(box)
    first = next((k for k, p in enumerate(s.func.phases) if buffer in loaded(p)), None)
    if first is None:
        s.refuse(f"nothing reads {buffer.name}")
    assert first is not None
    phases = [
        _redirect(s, p, buffer, new, low, arith, False) if buffer in loaded(p) else p
        for p in s.func.phases
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

    def store(x: Store) -> Store:
        indices = shift(x.indices) if x.buffer is old else x.indices
        buffer = new if x.buffer is old else x.buffer
        return x.with_(buffer=buffer, indices=indices, value=rewrite(x.value, one))

    def go(x: Stmt) -> Stmt | None:
        if not isinstance(x, Block):
            return None
        made = x.with_(init=x.init and store(x.init), body=store(x.body))
        if written and x.body.buffer is old:
            made = _unconditional(made, tail_conditions(x, arith), new, arith)
        return made

    return map_statements(body, go)


def _unconditional(block: Block, dropped: list[Expr], tile: Buffer, arith: Arith) -> Block:
    """Drops the conditions on which element is computed: a tile has room for all, and nothing
    beyond the original is written back. Loads of other buffers that could then leave them are
    clamped."""
    if not dropped:
        return block
    mapping = analysis.values_of(block)
    # `p < n` holds for min(p, n - 1): with that in place of p (wherever p is taken apart, p // w,
    # p % w)
    # the load is the one of the last valid point.
    capped = {c.a: minimum(c.a, c.b - 1) for c in dropped if type(c) is Binary and c.op == "lt"}

    def cap(e: Expr) -> Expr | None:
        return capped.get(e)

    lasts = {c.a: c.b - 1 for c in dropped if type(c) is Binary and c.op == "lt"}

    def at_last(e: Expr) -> Expr | None:
        return lasts.get(e)

    kept = [c for c in analysis.where_parts(block) if c not in dropped]
    inside = knowing({**arith.ranges, **{i.var: (ZERO, i.extent - 1) for i in block.iters}}, kept)

    tail_iters = {i.var for i in block.iters if any(x in capped for x in walk(i.value))}

    def clamped(e: Expr, inside: Arith, memo: dict[Expr, Expr]) -> Expr:
        if e not in memo and type(e) is Select:  # what is not chosen is not loaded
            there = knowing(inside.ranges, [*kept, substitute(e.cond, mapping)])
            cond, b = (clamped(x, inside, memo) for x in (e.cond, e.b))
            memo[e] = select(cond, clamped(e.a, there, {}), b)
        elif e not in memo:
            memo[e] = clamp(e.map(lambda x: clamped(x, inside, memo)), inside)
        return memo[e]

    def clamp(e: Expr, inside: Arith) -> Expr:
        if type(e) is not Load or e.buffer is tile or e.mask is not None:
            return e
        moved: list[bool] = []
        indices = []
        for i, room in zip(e.indices, e.buffer.padded_shape, strict=True):
            value = substitute(i, mapping)
            safe = inside.prove(arith.simplify(value) < room)
            if safe is not True:
                limited = rewrite(value, cap)
                safe = inside.prove(inside.simplify(limited) < room)
                usable = safe is True and limited is not value
                i = capped_index(i) if usable else minimum(i, room - 1)
                moved.append(True)
            indices.append(i)
        if moved:  # one index capped: cap all that depend on the same point
            indices = [capped_index(i) if free_vars(i) & tail_iters else i for i in indices]
        return Load(e.buffer, tuple(indices))

    def capped_index(i: Expr) -> Expr:
        value = substitute(i, mapping)
        made = rewrite(value, cap)
        # What guards the load (padding) is asked of the point beyond, not of the last valid one.
        last = rewrite(value, at_last)
        return made if inside.prove(last >= ZERO) is True else maximum(made, ZERO)

    memo: dict[Expr, Expr] = {}
    body = block.body.with_(value=clamped(block.body.value, inside, memo))
    init = (
        None
        if block.init is None
        else block.init.with_(value=clamped(block.init.value, inside, memo))
    )
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
    s: Schedule,
    loop: For,
    path: analysis.Path,
    buffer: Buffer,
    arith: Arith,
    found: list[analysis.Access],
    pointwise: bool = False,
) -> Expr | None:
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
    if boxes[0] != boxes[1] or not (
        pointwise or all(analysis.dense(loop.body, a, arith) for a in mine)
    ):
        return TRUE
    tail = tail_conditions(first, arith)
    reducing = {x.var for x in analysis.reduce_loops(first, list(analysis.loops(s.func)))}
    conditions = [
        c for c in analysis.where_parts(first) if c not in tail and not reducing & free_vars(c)
    ]
    if first.init is not None:
        inner: dict[Expr, Expr] = {x.var: ZERO for x in analysis.loops(loop.body)}
        for i in first.iters:
            if i.reduce:
                conditions.append(eq(arith.simplify(substitute(i.value, inner)), ZERO))
    outer_vars = {x.var for x in around}
    if any(not free_vars(c) <= outer_vars for c in conditions if arith.prove(c) is not True):
        return TRUE
    needed = [c for c in conditions if arith.prove(c) is not True]
    if not needed:
        return None
    return arith.simplify(~all_of(needed)) if len(needed) == 1 else ~all_of(needed)


def _live_after(
    s: Schedule, loop: For, path: analysis.Path, buffer: Buffer, box: analysis.Box
) -> bool:
    """True when what was written in one iteration of `loop` is used after it."""
    if buffer in s.func.params:
        return True
    inside = {id(b) for b in analysis.blocks(loop.body)}
    for b in analysis.blocks(s.func):
        if id(b) not in inside and buffer in {
            *(x.buffer for x in analysis.block_loads(b)),
            b.body.buffer,
        }:
            return True
    # What is written in some iterations only, and read in others, stays from one to the next. (An
    # update that leaves out terms does not count, nor an init: see the loops below.)
    for w in analysis.writers(s.func, buffer):
        plain = w.tag != "init" and not analysis.is_reduction(w)
        for c in own_conditions(s, w) if plain else ():
            if any(c not in analysis.where_parts(r) for r in analysis.readers(s.func, buffer)):
                return True
    # A loop around that does not move the box comes back to the same elements (a reduction loop).
    moved = frozenset().union(*[free_vars(low) for low, _ in box], frozenset())
    writing = [b for b in analysis.blocks(loop.body) if b.body.buffer is buffer]
    return any(
        const_int(x.extent) != 1
        and (x.var not in moved or any(analysis.mixed_loops(b, [x]) for b in writing))
        for x in [*analysis.loops_in(path), loop]
        if any(analysis.reduce_loops(b, [x]) for b in writing)
    )


def _copy(
    s: Schedule, new: Buffer, old: Buffer, box: analysis.Box, arith: Arith, cond: Expr, into: bool
) -> Stmt:
    """The block that fills the staged buffer, or writes it back."""
    name = s.fresh(f"{new.name}_{'in' if into else 'out'}")
    arith = Arith(arith.ranges)  # of its own: it learns of new loops
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
        for c in (absolute < old.shape[d], absolute >= ZERO):
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
