"""Primitives that change loops: split, fuse, reorder, compute_with, separate, mark, relayout.
Blocks keep their meaning throughout."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from minicompiler.ir.arith import Arith
from minicompiler.ir.expr import (
    TRUE,
    Binary,
    Const,
    Expr,
    Load,
    Var,
    all_of,
    binary,
    ceildiv,
    conjuncts,
    const_int,
    free_vars,
    maximum,
    minimum,
    rewrite,
    substitute,
)
from minicompiler.ir.layout import IndexMap
from minicompiler.ir.tir import (
    PARALLEL,
    SCAN,
    SERIAL,
    UNROLL,
    VECTOR,
    Alloc,
    Block,
    Buffer,
    For,
    LoopKind,
    Prefetch,
    Scope,
    Seq,
    Stmt,
    Store,
    map_statements,
    read_buffers,
    seq,
    statements,
    substitute_stmt,
    written_buffers,
)

from . import analysis

if TYPE_CHECKING:
    from .schedule import Schedule

TAILS = ("perfect", "mask", "guard", "even", "overlap")
MAX_UNROLL = 4096


def split(s: Schedule, name: str, factor: int, tail: str, multiple: int = 1) -> tuple[str, str]:
    """i -> i_o, i_i with i = i_o * factor + i_i.

        for i in 100:          ->   for i_o in 13:
            C[i] = ...                  for i_i in 8:
                                            C[i_o*8 + i_i] = ...   where i_o*8 + i_i < 100   (mask)

    tail: what happens when `factor` does not divide the extent.
      perfect  refuse unless it is known to divide
      mask     blocks below get a condition (vector stores are masked)
      guard    the inner loop runs min(factor, rest) times (no condition in its body)
      even     as guard, but the blocks are of equal size and have at most `factor` iterations;
               there are as few as that allows, or the next `multiple` of a number
      overlap  the last iterations begin earlier, so that they end with the extent: of some elements
               they compute once more what is there. Where the extent may be less than `factor`,
               blocks below get a condition for that
    """
    loop, _ = s.loop(name)
    if tail not in TAILS:
        s.refuse(f"unknown tail {tail!r}", loop, f"one of: {', '.join(TAILS)}")
    for what, n in (("factor", factor), ("multiple", multiple)):
        if not isinstance(n, int) or n < 1:
            s.refuse(f"the {what} must be a positive integer, got {n!r}", loop)
    if loop.kind is not SERIAL:
        s.refuse(f"loop {name} is marked {loop.kind.value} already", loop, "split before mark")
    keep_order(s, loop)
    arith = analysis.arith_of(s.func)
    extent = arith.simplify(loop.extent)
    divides = multiple == 1 and arith.simplify(extent % factor) is Const(0)
    outer, inner = s.fresh_var(name + "_o"), s.fresh_var(name + "_i")
    index = outer * factor + inner
    body = substitute_stmt(loop.body, {loop.var: index})
    if divides:
        s.swap(
            loop,
            For(
                outer,
                arith.simplify(extent // factor),
                SERIAL,
                For(inner, Const(factor), SERIAL, body),
            ),
        )
        return outer.name, inner.name
    if tail == "perfect":
        s.refuse(
            f"{factor} is not known to divide the extent {extent}",
            loop,
            'use tail="mask", or a factor that divides it',
        )
    blocks_outer = arith.simplify(ceildiv(extent, factor))
    if tail == "even":
        number = arith.simplify(ceildiv(extent, factor * multiple) * multiple)
        each = arith.simplify(maximum(ceildiv(extent, maximum(number, 1)), 1))
        if multiple > 1:  # rounding up may leave the last ones without iterations
            blocks_outer = arith.simplify(ceildiv(extent, each))
        body = substitute_stmt(loop.body, {loop.var: outer * each + inner})
        rest = minimum(each, extent - outer * each)
        s.swap(loop, For(outer, blocks_outer, SERIAL, For(inner, rest, SERIAL, body)))
    elif tail == "mask":
        body = add_condition(body, index < extent)
        s.swap(loop, For(outer, blocks_outer, SERIAL, For(inner, Const(factor), SERIAL, body)))
    elif tail == "guard":
        rest = minimum(Const(factor), extent - outer * factor)
        s.swap(loop, For(outer, blocks_outer, SERIAL, For(inner, rest, SERIAL, body)))
    else:
        reason = _once_only(loop)
        long = arith.prove(factor <= extent)
        if reason or long is False:
            s.refuse(reason or f"the extent {extent} does not reach {factor}", loop)
        start = minimum(outer * factor, extent - factor)
        index = (start if long else maximum(start, 0)) + inner
        body = substitute_stmt(loop.body, {loop.var: index})
        body = body if long else add_condition(body, index < extent)
        s.swap(loop, For(outer, blocks_outer, SERIAL, For(inner, Const(factor), SERIAL, body)))
    return outer.name, inner.name


def _once_only(loop: For) -> str:
    """Why iterations of a loop may not be run again; empty where they make the same anew."""
    inner = list(analysis.blocks(loop.body))
    if any(analysis.is_reduction(b) for b in inner):
        return "there is a reduction inside, which would add its terms again"
    if read_buffers(loop.body) & written_buffers(loop.body):
        return f"{loop.var} reads what it writes, which may be of a later iteration"
    return ""


def split_at_lines(s: Schedule, name: str, factor: int, block: str, line: int) -> tuple[str, str]:
    """i -> i_o, i_i with i = i_o * factor + i_i - e, so that the first iteration begins at a
    multiple of `line` elements in what a block writes.

        for i in 2:                ->   for i in 2:
            for j in 99:                    for j_o in 15:
                C[i, j] = ...                   for j_i in 8:
                                                    j = j_o*8 + j_i - (i*99 - i*99//16*16)
                                                    C[i, j] = ...   where 0 <= j and j < 99

    Blocks below get a condition at both ends.
    """
    loop, _ = s.loop(name)
    for what, n in (("factor", factor), ("line", line)):
        if not isinstance(n, int) or n < 2:
            s.refuse(f"the {what} must be an integer above 1, got {n!r}", loop)
    if loop.kind is not SERIAL:
        s.refuse(f"loop {name} is marked {loop.kind.value} already", loop, "split before mark")
    keep_order(s, loop)
    arith = analysis.arith_of(s.func)
    writer, path = s.block(block)
    if loop not in path:
        s.refuse(f"block {block} is not inside loop {name}", loop)
    at = substitute(writer.body.buffer.offset(writer.body.indices), analysis.values_of(writer))
    start = arith.simplify(substitute(at, {loop.var: Const(0)}))
    if arith.simplify(at - start) is not loop.var:
        s.refuse(f"neighbouring iterations of {name} do not write neighbouring elements", writer)
    inner_loops = {x.var for x in statements(loop.body) if isinstance(x, For)}
    if free_vars(start) & inner_loops:
        s.refuse(f"where {name} begins depends on loops inside it", loop)
    outer, inner = s.fresh_var(name + "_o"), s.fresh_var(name + "_i")
    extent = arith.simplify(loop.extent)
    index = outer * factor + inner - (start - start // line * line)
    body = substitute_stmt(loop.body, {loop.var: index})
    body = add_condition(body, binary("and", Const(0) <= index, index < extent))
    trips = arith.simplify(ceildiv(extent + (line - 1), factor))
    s.swap(loop, For(outer, trips, SERIAL, For(inner, Const(factor), SERIAL, body)))
    return outer.name, inner.name


def split_by_period(s: Schedule, name: str, block: str) -> tuple[str, str]:
    """i -> i_o, i_i with i = i_o * n + i_i, where `block` reads x[i % n] and n, which may be a size
    that comes with the call, divides the extent.

        for i in 2*n:              ->   for i_o in 2:
            C[i] = D[i % n]                 for i_i in n:
                                                C[i_o*n + i_i] = D[i_i]
    """
    loop, _ = s.loop(name)
    reader, around = s.block(block)
    if loop.kind is not SERIAL:
        s.refuse(f"loop {name} is marked {loop.kind.value} already", loop, "split before mark")
    keep_order(s, loop)
    if loop not in around:
        s.refuse(f"block {block} is not inside loop {name}", loop)
    arith = analysis.arith_of(s.func)
    n = analysis.period(reader, loop, arith)
    if n is None:
        s.refuse(f"what {block} reads does not begin again after a part of {name}", reader)
    assert n is not None
    outer, inner = s.fresh_var(name + "_o"), s.fresh_var(name + "_i")

    def straight(x: Stmt) -> Stmt | None:
        """A block that reads at the place in a period."""
        if not isinstance(x, Block):
            return None
        values = analysis.values_of(x)

        def one(e: Expr) -> Expr | None:
            again = type(e) is Binary and e.op == "mod" and e.b is n
            return inner if again and values.get(e.a) is loop.var else None  # type: ignore[attr-defined]

        return x.with_(body=x.body.with_(value=rewrite(x.body.value, one)))

    body = substitute_stmt(map_statements(loop.body, straight), {loop.var: outer * n + inner})
    again = arith.simplify(loop.extent // n)
    s.swap(loop, For(outer, again, SERIAL, For(inner, n, SERIAL, body)))
    return outer.name, inner.name


def keep_order(s: Schedule, *around: For) -> None:
    """The iterations of a recurrence stay as they are."""
    for x in around:
        if x.tag == SCAN:
            s.refuse(
                f"{x.var} is a recurrence: each iteration needs the one before",
                x,
                "schedule the loops inside it",
            )


def add_condition(body: Stmt, cond: Expr) -> Stmt:
    """Every block below runs only where `cond` holds too."""

    def one(x: Stmt) -> Stmt | None:
        return x.with_(where=binary("and", x.where, cond)) if isinstance(x, Block) else None

    return map_statements(body, one)


def fuse(s: Schedule, names: list[str]) -> str:
    """Directly nested loops a, b -> one loop f with a = f // extent(b), b = f % extent(b)."""
    if len(names) < 2:
        s.refuse("needs at least two loops")
    chain = [s.loop(n)[0] for n in names]
    keep_order(s, *chain)
    for a, b in itertools.pairwise(chain):
        if a.body is not b:
            s.refuse(f"loop {b.var} is not directly inside {a.var}", b, "reorder first")
        if a.kind is not SERIAL or b.kind is not SERIAL:
            s.refuse("only serial loops can be fused", a)
        if a.var in free_vars(b.extent):
            s.refuse(f"the extent of {b.var} depends on {a.var}", b)
    arith = analysis.arith_of(s.func)
    fused = s.fresh_var("_".join(names) if sum(map(len, names)) < 20 else names[0] + "_f")
    extent: Expr = Const(1)
    for x in chain:
        extent = extent * x.extent
    mapping: dict[Expr, Expr] = {}
    rest: Expr = fused
    for x in reversed(chain[1:]):
        mapping[x.var] = rest % x.extent
        rest = rest // x.extent
    mapping[chain[0].var] = rest
    body = substitute_stmt(chain[-1].body, mapping)
    s.swap(chain[0], For(fused, arith.simplify(extent), SERIAL, body))
    return fused.name


def reorder(s: Schedule, names: list[str]) -> None:
    """Loops of one nest exchanged: any order of a block's iterations computes the same elements,
    and
    the init of a reduction still comes first because it belongs to reduction index zero."""
    if len(set(names)) != len(names) or len(names) < 2:
        s.refuse("needs at least two different loops")
    found = [s.loop(n) for n in names]
    depth = {x.var.name: len(path) for x, path in found}
    outermost = min(found, key=lambda f: len(f[1]))[0]
    innermost = max(found, key=lambda f: len(f[1]))[0]
    chain: list[For] = []
    here: Stmt = outermost
    while True:
        if not isinstance(here, For):
            s.refuse("the loops do not form one nest without statements between", here)
        assert isinstance(here, For)
        chain.append(here)
        if here is innermost:
            break
        here = here.body
    if any(n not in [x.var.name for x in chain] for n in names):
        s.refuse("the loops do not stand in one nest", outermost)
    keep_order(s, *chain)
    for x in chain:
        if x.kind not in (SERIAL, UNROLL):
            s.refuse(f"loop {x.var} is marked {x.kind.value} already", x, "reorder before mark")
        for b in analysis.blocks(x.body):
            if analysis.is_reduction(b) and analysis.repeats(b, x):
                s.refuse(f"loop {x.var} repeats all of the reduction {b.name}", x)
            if b.init is not None and analysis.mixed_loops(b, [x]):
                s.refuse(
                    f"loop {x.var} chooses the element of {b.name} and reduces: its order matters",
                    x,
                )
    below = list(analysis.blocks(innermost.body))
    if len(below) > 1:
        for x in chain:
            for b in below:
                if analysis.reduce_loops(b, [x]):
                    s.refuse(
                        f"{x.var} is a reduction loop of {b.name}, and other blocks stand below it",
                        x,
                    )
    slots = [k for k, x in enumerate(chain) if x.var.name in depth and x.var.name in names]
    by_name = {x.var.name: x for x in chain}
    order = list(chain)
    for k, n in zip(slots, names, strict=True):
        order[k] = by_name[n]
    for k, x in enumerate(order):
        inner = {y.var for y in order[k + 1 :]}
        if inner & free_vars(x.extent):
            s.refuse(f"the extent of {x.var} depends on a loop that would come inside it", x)
    body = innermost.body
    for x in reversed(order):
        body = x.with_(body=body)
    s.swap(outermost, body)


def compute_with(s: Schedule, name: str, other: str) -> None:
    """Iteration i of loop `name` runs right after iteration i of the loop `other` before it:

    (for k: E[k] = ..; for k: sum += E[k])   ->   for k: (E[k] = ..; sum += E[k])
    """
    refused = kept_apart(s, name, other)
    (second, path), (first, _) = s.loop(name), s.loop(other)
    if refused:
        s.refuse(refused, second)
    around = path[-1]
    assert isinstance(around, Seq)
    body = substitute_stmt(second.body, {second.var: first.var})
    joined = first.with_(body=seq([first.body, body]))
    rest = [joined if x is second else x for x in around.stmts if x is not first]
    s.swap(around, seq(rest))


def kept_apart(s: Schedule, name: str, other: str) -> str:
    """Why iterations of loop `name` cannot run right after those of `other`; "" where they can."""
    (second, path), (first, _) = s.loop(name), s.loop(other)
    around = path[-1] if path else None
    stmts = list(around.stmts) if isinstance(around, Seq) else []
    at = {id(x): k for k, x in enumerate(stmts)}
    start, end = at.get(id(first), -1), at.get(id(second), -1)
    if start < 0 or start >= end:
        return f"loop {other} does not stand before {name} in one sequence"
    if first.kind is not SERIAL or second.kind is not SERIAL:
        return "only serial loops can run together"
    arith = analysis.arith_of(s.func)
    if arith.simplify(first.extent - second.extent) is not Const(0):
        return f"loops {other} and {name} have different extents"
    same: dict[Expr, Expr] = {second.var: first.var}
    body = substitute_stmt(second.body, same)
    between = seq(stmts[start + 1 : end])
    made, read = written_buffers(first), read_buffers(first)
    if written_buffers(between) & (made | read) or written_buffers(body) & made:
        return f"what {other} reads or writes is written again up to {name}"
    for buffer in sorted(written_buffers(body) & read, key=lambda b: b.name):
        if not _own_places(body, first.body, buffer, same, arith):
            return f"what {other} reads is written in another iteration of {name}"
    if made & read_buffers(between):
        return f"what {other} writes is read before {name}"
    for buffer in sorted(made & read_buffers(body), key=lambda b: b.name):
        if not _own_places(first.body, body, buffer, same, arith):
            return f"iterations of {name} do not read what the same of {other} writes"
    return ""


def _own_places(
    writer: Stmt, reader: Stmt, buffer: Buffer, same: dict[Expr, Expr], arith: Arith
) -> bool:
    """True when iterations of a loop write apart from each other, and each reads of a buffer only
    what lies where it writes itself. same: the variable of one loop -> that of the other."""
    (var,) = same.values()
    stores = [a for a in analysis.accesses(writer, arith, buffer) if a.is_store]
    loads = [a for a in analysis.accesses(reader, arith, buffer) if not a.is_store]
    made, used = (
        [(substitute(low, same), substitute(size, same)) for low, size in box]
        for box in (
            analysis.region(writer, buffer, arith, stores),
            analysis.region(reader, buffer, arith, loads),
        )
    )
    return any(_apart(m, u, var, arith) for m, u in zip(made, used, strict=True))


def _apart(made: tuple[Expr, Expr], used: tuple[Expr, Expr], var: Expr, arith: Arith) -> bool:
    """True when iterations of a loop write apart from each other along an axis, where (lowest,
    extent) of one is `made`, and what is used lies within that."""
    (low, size), (start, count) = made, used
    step = arith.simplify(substitute(low, {var: var + 1}) - low)
    conditions = (step >= size, start >= low, start + count <= low + size)
    return all(arith.prove(arith.simplify(c)) is True for c in conditions)


def separate(s: Schedule, name: str) -> None:
    """The root statement with block `name`, and what follows it, become a phase of their own:
    all threads meet before it.

    (for k: P[k] = ..; for k: C += P[k])   ->   for k: P[k] = ..  ---  for k: C += P[k]
    """
    block, path = s.block(name)
    chain = (*path, block)
    if not isinstance(chain[0], Seq) or chain[1] is chain[0].stmts[0]:
        s.refuse(f"block {name} does not follow another statement at the root of its phase", block)
    assert isinstance(chain[0], Seq)
    stmts = chain[0].stmts
    cut = next(k for k, x in enumerate(stmts) if x is chain[1])
    phases: list[Stmt] = []
    for p in s.func.phases:
        phases += [seq(stmts[:cut]), seq(stmts[cut:])] if p is chain[0] else [p]
    s.func = s.func.with_(phases=tuple(phases))


def mark(s: Schedule, name: str, kind: LoopKind) -> None:
    """PARALLEL and VECTOR need iterations that do not touch each other's results; VECTOR and
    UNROLL a constant extent. A VECTOR loop may also combine all its lanes into one element."""
    loop, path = s.loop(name)
    keep_order(s, loop)
    if kind in (VECTOR, UNROLL):
        extent = const_int(loop.extent)
        if extent is None or extent > MAX_UNROLL:
            s.refuse(
                f"{kind.value} needs a constant extent of at most {MAX_UNROLL}, not {loop.extent}",
                loop,
            )
    if kind in (PARALLEL, VECTOR) and const_int(loop.extent) != 1:
        local = {x.buffer for x in statements(loop.body) if isinstance(x, Alloc)}
        for b in analysis.blocks(loop.body):
            if b.body.buffer in local:
                continue
            if kind is VECTOR and _adds_lanes(b, loop):
                continue
            if analysis.reduce_loops(b, [loop]):
                s.refuse(
                    f"block {b.name} reduces over {name}: its iterations add to one element",
                    loop,
                    "rfactor makes a reduction loop independent",
                )
            if not analysis.spatial_loops(b, [loop]) and not _moves_on(s, b, loop):
                s.refuse(
                    f"every iteration of {name} writes the same elements of {b.body.buffer.name}",
                    loop,
                )
            if any(_meets(s, i.value, loop.var) for i in b.iters if not i.reduce):
                s.refuse(
                    f"the last iterations of {name} write some elements of {b.body.buffer.name} "
                    "twice",
                    loop,
                    'split with another tail than "overlap"',
                )
    if kind is PARALLEL:
        # Loops around it must not carry anything from one thread to another: every thread runs them
        # all, on its own share of the elements, so they may only be reduction loops. The statements
        # of a recurrence are phases, with all threads meeting after each.
        scan = analysis.scan_around(path)
        if scan is not None:
            path = path[path.index(scan) + 1 :]
            path = path[1:] if path and isinstance(path[0], Seq) else path
        outside = analysis.loops_in(path)
        below = list(analysis.blocks(loop.body))
        carried = [x for x in outside if any(analysis.spatial_loops(b, [x]) for b in below)]
        if carried or any(isinstance(x, Seq) for x in path):
            s.refuse(
                "a parallel loop must be the outermost of its phase but for reduction loops, "
                f"{name} is not",
                loop,
                "reorder it outwards, or fuse it with the loops around it",
            )
    if kind is VECTOR and any(isinstance(x, For) for x in statements(loop.body)):
        inner = [x for x in statements(loop.body) if isinstance(x, For) and x.kind not in (UNROLL,)]
        if inner:
            s.refuse(f"a vector loop must be innermost; {inner[0].var} stands inside {name}", loop)
    if kind is VECTOR and any(isinstance(x, Prefetch) for x in statements(loop.body)):
        s.refuse(f"a prefetch stands inside {name}", loop, "mark before prefetch")
    s.swap(loop, loop.with_(kind=kind))


def _meets(s: Schedule, value: Expr, var: Var) -> bool:
    """True for min(i*8, n - 8) + j: it stays where it is while `i` goes on."""
    poly = analysis.arith_of(s.func).poly(value)
    moving = [a for m in poly for a in m if var in free_vars(a)]
    return bool(moving) and all(type(a) is Binary and a.op in ("min", "max") for a in moving)


def _adds_lanes(block: Block, loop: For) -> bool:
    """True for a nest that only combines a power of two of numbers into one element: as a vector
    it does so pairwise, halves first."""
    extent = const_int(loop.extent) or 0
    return (
        loop.body is block
        and block.init is None
        and block.where is TRUE
        and extent & (extent - 1) == 0
        and not analysis.spatial_loops(block, [loop])
        and analysis.update_operand(block) is not None
    )


def _moves_on(s: Schedule, block: Block, loop: For) -> bool:
    """True when no two iterations store to one element: a staged buffer written back, whose place
    the store itself names. Where the loop is several fused ones, its digits i // n and i % n may
    each choose the place along an axis of their own."""
    arith = analysis.arith_of(s.func)
    inner = [x.var for x in analysis.loops(loop.body)]
    values = analysis.values_of(block)
    digits: set[Expr] = set()
    for index in block.body.indices:
        at = arith.simplify(substitute(index, values))
        moving = {a for m in arith.poly(at) for a in m if loop.var in free_vars(a)}
        if len(moving) != 1:
            continue
        digit = moving.pop()
        place = Var("_digit")
        low, high = (arith.bound(rewrite(at, {digit: place}.get), inner, k) for k in (-1, +1))
        if low is not None and high is not None:
            following = substitute(low, {place: place + 1})
            if arith.prove(high < following) is True:
                digits.add(digit)

    def told(e: Expr) -> bool:
        return e in digits or any(
            type(d) is Binary and d.op == "mod" and d.a is e and told(arith.simplify(e // d.b))
            for d in digits
        )

    return told(loop.var)


def relayout(s: Schedule, name: str, layout: IndexMap) -> None:
    """A workspace buffer is kept in another order: C[i, j] of layout (i, j) -> (j, i), say."""
    buffer = s.buffer(name)
    if buffer.scope is Scope.PARAM:
        s.refuse(f"{name} belongs to the caller", hint="stage makes a copy with another layout")
    if layout.rank != len(buffer.shape):
        s.refuse(f"the layout is for {layout.rank} axes, {name} has {len(buffer.shape)}")
    new = buffer.with_(layout=layout)
    arith = analysis.arith_of(s.func)
    for had, has in zip(buffer.padded_shape, new.padded_shape, strict=True):
        if arith.prove(had <= has) is not True:
            s.refuse(
                f"{name} has memory up to {had} along an axis and would have it up to {has}",
                hint="relayout before the padding is filled",
            )

    def load(e: Expr) -> Expr | None:
        return Load(new, e.indices, e.mask) if type(e) is Load and e.buffer is buffer else None

    def store(x: Store) -> Store:
        value = rewrite(x.value, load)
        return x.with_(buffer=new if x.buffer is buffer else x.buffer, value=value)

    def one(x: Stmt) -> Stmt | None:
        if isinstance(x, Block):
            return x.with_(init=None if x.init is None else store(x.init), body=store(x.body))
        if isinstance(x, Alloc) and x.buffer is buffer:
            return x.with_(buffer=new)
        if isinstance(x, Prefetch):
            return x.with_(place=rewrite(x.place, load))
        return None

    s.edit(one)
    s.func = s.func.with_(buffers=tuple(new if b is buffer else b for b in s.func.buffers))


def drop_conditions(where: Expr, parts: list[Expr]) -> Expr:
    """A conjunction without some of its parts."""
    return all_of(c for c in conjuncts(where) if c not in parts)
