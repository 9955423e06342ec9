"""The primitive `rolling`: what depends on a running maximum is repaired instead of recomputed.

    for j: m = max(m, x[j])                 for j:
    for j: e[j] = exp(x[j] - m)       ->        f[j] = exp(m - max(m, x[j]))
    for j: s = s + e[j]                         s = s * f[j]    (0 if m is -inf)
                                                m = max(m, x[j])
                                                e[j] = exp(x[j] - m)
                                                s = s + e[j]
Legal because exp(x - m') = exp(x - m) * exp(m - m'): a sum that is linear in such terms becomes the
sum for the new maximum by one factor (Milakov and Gimelshein, arXiv:1805.02867). Terms of a maximum
of -inf are not numbers; they are dropped as soon as there is another one.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from minicompiler.ir.expr import (
    ZERO,
    Binary,
    Call,
    Const,
    Expr,
    Load,
    Select,
    all_of,
    binary,
    const,
    eq,
    free_vars,
    select,
    substitute,
    walk,
)
from minicompiler.ir.tir import (
    PARALLEL,
    SERIAL,
    Block,
    Buffer,
    For,
    Iter,
    Scope,
    Seq,
    Stmt,
    Store,
    seq,
    statements,
    substitute_stmt,
)

from . import analysis
from .blocks import element_conditions, wrap

if TYPE_CHECKING:
    from .schedule import Schedule

Row = tuple[int | Expr, ...]  # per axis of the maximum: an axis of another buffer, or an index


@dataclasses.dataclass
class _Group:
    """What is found out about the nests that become one, in order."""

    maximum: Block
    loop: For
    scaled: dict[Buffer, Row]  # buffers of this iteration that a new maximum scales
    makers: dict[Buffer, For]  # the loops that compute these
    sums: dict[str, Row]  # blocks that add up over the iterations, and where their factor is


def rolling(s: Schedule, name: str, loop_name: str) -> str:
    """See the module text. The loops beside `loop` that depend on the maximum become part of it:
    each runs over the same extent, computes terms exp(x - m) and what is linear in them, or adds
    these up. Returns the buffer of the factors, one per row and iteration.

    The maximum must take one value per row and iteration (`rfactor` sees to that), and no inits may
    be left (`decompose_reduction`).
    """
    block, path = s.block(name)
    loop, _ = s.loop(loop_name)
    around = analysis.loops_in(path)
    update = analysis.update_operand(block)
    if loop not in around or update is None or update[0] != "max" or block.init is not None:
        s.refuse(f"block {name} is no maximum over {loop_name} without an init", block)
    assert update is not None
    reduce = [i for i in block.iters if i.reduce]
    if [i.value for i in reduce] != [loop.var] or loop.var in free_vars(block.where):
        s.refuse(f"block {name} must reduce over {loop_name} alone, and all of it", block)
    analysis.refuse_parallel_below(s, loop)
    outer = path[: path.index(loop)]
    analysis.refuse_vector_around(s, path)
    beside, phases = _siblings(s, outer, loop)
    first = next(k for k, x in enumerate(beside) if x is loop)
    group = _Group(block, loop, {}, {}, {})
    inside, before = _dependents(s, group, beside[first:])
    last = beside.index(inside[-1])
    rest = [x for x in beside[first : last + 1] if x not in inside and x not in before]
    if rest:
        s.refuse(f"a statement between the loops does not depend on {name}", rest[0])
    factors = Buffer(
        s.fresh(block.body.buffer.name + "_f"),
        block.body.buffer.dtype,
        (*block.body.buffer.shape, loop.extent),
        Scope.GLOBAL,
    )
    parts: list[Stmt] = []
    repairs: list[Stmt] = []
    for x in inside:
        assert isinstance(x, For)
        body = substitute_stmt(x.body, {x.var: loop.var})
        for b in analysis.blocks(body):
            if b.name in group.sums:
                repairs.append(_repair_nest(s, group, b, body, factors))
        parts.append(body)
    parts = [_factor_nest(s, group, factors, update[1]), *repairs, *parts]
    merged = loop.with_(body=seq(parts))
    if phases is None:
        assert isinstance(outer[-1], Seq)
        s.swap(outer[-1], seq([*beside[:first], *before, merged, *beside[last + 1 :]]))
    else:  # the phases that the loops come from become one
        end = 1 + phases[last]
        rest = [x for x, p in zip(beside, phases, strict=True) if p < end][last + 1 :]
        one = seq([*beside[:first], *before, merged, *rest])
        start = phases[0]
        s.func = s.func.with_(phases=(*s.func.phases[:start], one, *s.func.phases[end:]))
    s.func = s.func.with_(buffers=(*s.func.buffers, factors))
    return factors.name


def _siblings(s: Schedule, outer: analysis.Path, loop: For) -> tuple[list[Stmt], list[int] | None]:
    """The statements among which a loop stands. At the root those of its phase and all later ones,
    with the number of the phase of each."""
    if len(outer) > 1 or (outer and not isinstance(outer[0], Seq)):
        if not isinstance(outer[-1], Seq):
            s.refuse(f"nothing stands beside {loop.var}", loop)
        assert isinstance(outer[-1], Seq)
        return list(outer[-1].stmts), None
    start = next(k for k, p in enumerate(s.func.phases) if analysis.contains(p, loop))
    found: list[Stmt] = []
    numbers: list[int] = []
    for k, p in enumerate(s.func.phases[start:], start):
        for x in p.stmts if isinstance(p, Seq) else (p,):
            if any(isinstance(y, For) and y.kind is PARALLEL for y in statements(x)):
                return found, numbers
            found.append(x)
            numbers.append(k)
    return found, numbers


def _dependents(s: Schedule, group: _Group, beside: list[Stmt]) -> tuple[list[Stmt], list[Stmt]]:
    """(the loops that become one, the inits that move before them)."""
    inside: list[Stmt] = [beside[0]]
    before: list[Stmt] = []
    why, at = "", None
    for x in beside[1:]:
        blocks = list(analysis.blocks(x))
        if all(b.tag == "init" for b in blocks):
            before.append(x)
            continue
        # The first statement that cannot be part of it comes after all that are.
        why, at = _classify(s, group, x, blocks), x
        if why:
            break
        inside.append(x)
    if not group.sums:
        why = why or "no sum depends on it"
        s.refuse(f"nothing that is added up over {group.loop.var} can be repaired: {why}", at)
    last = beside.index(inside[-1])
    before = [x for x in before if beside.index(x) < last]
    made = {b.body.buffer for x in inside for b in analysis.blocks(x)}
    for buffer in group.scaled:
        if buffer in s.func.params:
            s.refuse(f"{buffer.name} is a result: it needs the final maximum", at)
        for b in analysis.readers(s.func, buffer):
            if not any(analysis.contains(x, b) for x in inside):
                s.refuse(f"block {b.name} needs {buffer.name} for the final maximum: {why}", b)
    for x in before:
        for b in analysis.blocks(x):
            if b.body.buffer not in made or any(
                load.buffer in made for load in analysis.block_loads(b)
            ):
                s.refuse(f"block {b.name} cannot move before {group.loop.var}", b)
    return inside, before


def _classify(s: Schedule, group: _Group, x: Stmt, blocks: list[Block]) -> str:
    """Notes what a loop does with the terms: makes, combines or adds them up. Else: why not."""
    if not isinstance(x, For) or x.kind is not SERIAL or x.extent is not group.loop.extent:
        return f"it is no loop over {group.loop.extent}"
    (b,) = blocks if len(blocks) == 1 else (None,)
    if b is None:
        return "it holds several blocks"
    over = [i for i in b.iters if x.var in free_vars(i.value)]
    sums = any(i.reduce for i in over)
    if not over or any(i.reduce for i in over) != all(i.reduce for i in over):
        return f"{x.var} neither chooses what {b.name} computes nor is reduced"
    if sums and b.init is not None:
        return f"block {b.name} has an init"
    value = b.body.value
    if analysis.is_reduction(b):
        update = analysis.update_operand(b)
        if update is None or update[0] != "add":
            return f"block {b.name} is not a sum"
        value = update[1]
    rows = _rows(s, group, value)
    if rows is None:
        return f"block {b.name} is not linear in exp(x - {group.maximum.name})"
    for load in analysis.operand_loads(b):
        if load.buffer in group.scaled and not _same_iteration(s, group, x, load):
            return f"block {b.name} reads {load.buffer.name} of other iterations"
    own: list[int | Expr] = []
    for r in rows:
        axis = next((k for k, i in enumerate(b.body.indices) if i is r), None)
        if axis is None and not isinstance(r, Const):
            return f"block {b.name} sums over rows of {group.maximum.name}"
        own.append(r if axis is None else axis)
    if sums:
        group.sums[b.name] = tuple(own)
    else:
        group.scaled[b.body.buffer], group.makers[b.body.buffer] = tuple(own), x
    return ""


def _rows(s: Schedule, group: _Group, value: Expr) -> tuple[Expr, ...] | None:
    """The index of the maximum whose terms a value is linear in, in the block's iterators."""
    m = group.maximum.body.buffer
    incomplete = {m, *group.scaled, *[s.block(n)[0].body.buffer for n in group.sums]}
    found: set[tuple[Expr, ...]] = set()

    def constant(e: Expr) -> bool:
        return not any(type(x) is Load and x.buffer in incomplete for x in walk(e))

    def linear(e: Expr) -> bool:
        if type(e) is Load and e.buffer in group.scaled and e.mask is None:
            rows = group.scaled[e.buffer]
            found.add(tuple(e.indices[r] if isinstance(r, int) else r for r in rows))
            return True
        if type(e) is Call and e.fn == "exp" and type(e.args[0]) is Binary:
            x, load = e.args[0].a, e.args[0].b
            if e.args[0].op == "sub" and type(load) is Load and load.buffer is m:
                found.add(load.indices)
                return constant(x) and load.mask is None
        if type(e) is Binary and e.op == "mul":
            return (linear(e.a) and constant(e.b)) or (constant(e.a) and linear(e.b))
        if type(e) is Select and constant(e.cond):
            zero = const(0, e.dtype)
            return (linear(e.a) or e.a is zero) and (linear(e.b) or e.b is zero)
        return False

    return next(iter(found)) if linear(value) and len(found) == 1 else None


def _same_iteration(s: Schedule, group: _Group, x: For, load: Load) -> bool:
    """True when one iteration of the merged loop reads only what it has computed itself."""
    arith = analysis.arith_of(s.func)
    boxes = []
    for nest in (group.makers[load.buffer], x):
        body = substitute_stmt(nest.body, {nest.var: group.loop.var})
        inner = [y.var for y in analysis.loops(body)]
        boxes.append(
            [
                [arith.bound(i, inner, side) for i in access.indices for side in (-1, +1)]
                for access in analysis.accesses(body, arith, load.buffer)
            ]
        )
    made, *rest = [box for nest in boxes for box in nest]
    pairs = [(a, b) for other in rest for a, b in zip(made, other, strict=True)]
    return all(a is not None and b is not None and arith.simplify(a - b) is ZERO for a, b in pairs)


def _factor_nest(s: Schedule, group: _Group, factors: Buffer, operand: Expr) -> Stmt:
    """f = exp(m - max(m, x)) for every row."""
    block, loop = group.maximum, group.loop
    own = block.body
    old = Load(own.buffer, own.indices)
    (j,) = [i for i in block.iters if i.reduce]
    factor = Call("exp", (old - binary("max", old, operand),))
    nest, fresh = _loops_below(s, block, loop)
    iters = tuple(
        i.with_(var=s.fresh_var(i.var.name), value=substitute(i.value, fresh), reduce=False)
        for i in block.iters
    )
    names: dict[Expr, Expr] = {i.var: n.var for i, n in zip(block.iters, iters, strict=True)}
    at = tuple(substitute(i, names) for i in (*own.indices, j.var))
    body = Store(factors, at, substitute(factor, names))
    name = s.fresh(f"{block.name}_factor")
    where = substitute(block.where, fresh)
    return wrap(Block(name, iters, where, None, body), nest, fresh)


def _repair_nest(s: Schedule, group: _Group, b: Block, body: Stmt, factors: Buffer) -> Stmt:
    """s = s * f for every element of a sum, 0 as long as the maximum is -inf."""
    loop = group.loop
    nest, fresh = _loops_below(s, b, loop, body)
    own = b.body
    j = Iter(s.fresh_var(f"v{loop.var.name}"), loop.extent, True, loop.var)
    spatial = [i for i in b.iters if not i.reduce]
    iters = tuple(
        i.with_(var=s.fresh_var(i.var.name), value=substitute(i.value, fresh)) for i in spatial
    )
    names: dict[Expr, Expr] = {i.var: n.var for i, n in zip(spatial, iters, strict=True)}
    at = tuple(substitute(i, names) for i in own.indices)
    row = tuple(at[r] if isinstance(r, int) else r for r in group.sums[b.name])
    value = binary("mul", Load(own.buffer, at), Load(factors, (*row, j.var)))
    dtype = own.buffer.dtype
    none = eq(Load(group.maximum.body.buffer, row), const(float("-inf"), dtype))
    value = select(none, const(0, dtype), value)
    where = all_of(substitute(c, fresh) for c in element_conditions(b))
    name = s.fresh(f"{b.name}_repair")
    return wrap(Block(name, (*iters, j), where, None, Store(own.buffer, at, value)), nest, fresh)


def _loops_below(
    s: Schedule, b: Block, loop: For, body: Stmt | None = None
) -> tuple[list[For], dict[Expr, Expr]]:
    """The loops inside `loop` that choose the element of a block, and fresh variables for them."""
    loops = list(analysis.loops(loop.body if body is None else body))
    nest = analysis.spatial_loops(b, loops)
    return nest, {x.var: s.fresh_var(x.var.name) for x in nest}
