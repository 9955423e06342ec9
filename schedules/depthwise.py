"""The rule for windows that slide over each channel by itself: depthwise convolutions, pooling.

    C[.., c, h, w] = sum over a, b of X[.., c, h*s + a*d, w*s + b*d] * W[c, a, b]

All operands are vectors along the axis that is contiguous in the result, so nothing is broadcast: a
tile is a few neighbours along a line, held in registers while the window is walked through; what
neighbours share of their windows is loaded once. Padding is no phase of its own: taps that lie in
a border of zeros are skipped, and the tiles at both ends of a line get code of their own.
"""

from __future__ import annotations

import dataclasses

from minicompiler.ir.expr import Call, Const, Load, Select, Var, const_int, free_vars, walk
from minicompiler.ir.layout import IndexMap
from minicompiler.ir.tir import UNROLL, VECTOR, Block, Buffer, Iter, Scope

from . import analysis, contraction, elementwise, reductions
from .schedule import Schedule

TILE = 8  # vectors that are summed up at once: enough to hide the latency of an addition
WRITTEN_OUT = 16  # taps along a line that are repeated in the code


@dataclasses.dataclass
class _Nest:
    """What the rule found out: the operands and the role of each iterator."""

    block: Block
    weights: list[Load]
    layout: IndexMap  # of the result that the sum becomes
    vector: Iter
    line: Iter  # the axis that a tile runs along
    order: list[Iter]  # the axes of the result as they lie in memory
    taps: list[Iter]  # the axes of the window, outermost first
    along: list[Iter]  # those of them that slide along a line


def applies(s: Schedule) -> bool:
    """The only reduction is over windows, and what follows it is elementwise."""
    every = list(analysis.blocks(s.func))
    sums = [b for b in every if analysis.is_reduction(b)]
    if len(sums) != 1 or _analyse(s, sums[0]) is None:
        return False
    followers = _followers(s, sums[0])
    if every[every.index(sums[0]) + 1 :] != followers:
        return False
    made = {sums[0].body.buffer}
    for b in followers:
        made.add(b.body.buffer)
        at = [i for x in analysis.block_loads(b) if x.buffer in made for i in x.indices]
        if any(const_int(i) is None and i not in b.body.indices for i in at):
            return False
    return True


def _analyse(s: Schedule, block: Block) -> _Nest | None:
    update = analysis.update_operand(block)
    if update is None or any(type(e) is Call for e in walk(update[1])):
        return None
    if not block.body.indices or any(not isinstance(i.value, Var) for i in block.iters):
        return None
    spatial = {i.var: i for i in block.iters if not i.reduce}
    reduce = {i.var: i for i in block.iters if i.reduce}
    layout = _result_layout(s, block.body.buffer)
    at = block.body.indices
    last = at[layout.splits()[-1][0]]
    in_memory = [at[axis] for axis, _, modulus in layout.splits() if modulus == 0]
    order = [spatial[i] for i in in_memory if i in spatial]
    if last not in spatial or len(order) != len(spatial):
        return None
    vector = spatial[last]
    # Every operand is a window or has just the axes of the vector and the window.
    windows: list[Load] = []
    weights: list[Load] = []
    for load in analysis.operand_loads(block):
        used = frozenset().union(*map(free_vars, load.indices), frozenset())
        if vector.var not in load.indices:
            return None
        (weights if used <= {vector.var, *reduce} else windows).append(load)
    if len({x.indices for x in windows}) != 1 or len({x.buffer for x in windows}) != 1:
        return None
    moving = [free_vars(i) for i in windows[0].indices]
    slides = {v for used in moving if used & spatial.keys() for v in used & reduce.keys()}
    # A tile runs along the innermost axis that matters to what the windows slide over.
    lines = [i for i in order if i is not vector and any(i.var in used for used in moving)]
    if slides != reduce.keys() or not lines:
        return None
    line = lines[-1]
    along = [i for i in reduce.values() if any({i.var, line.var} <= used for used in moving)]
    taps = [i for i in reduce.values() if i not in along] + along
    return _Nest(block, weights, layout, vector, line, order, taps, along)


def _result_layout(s: Schedule, buffer: Buffer) -> IndexMap:
    """The layout of a sum, or else of the result that it becomes."""
    for b in (buffer, *[x.body.buffer for x in analysis.readers(s.func, buffer)]):
        if b.layout is not None and b.shape == buffer.shape:
            return b.layout
    return IndexMap.identity(len(buffer.shape))


def _reduction(s: Schedule) -> Block:
    return next(b for b in analysis.blocks(s.func) if analysis.is_reduction(b))


def apply(s: Schedule) -> None:
    main = _reduction(s)
    border = _border(s, main)
    if border is not None:
        s.inline(border)
        main = _reduction(s)
    nest = _analyse(s, main)
    assert nest is not None
    name = main.name
    followers = [b.name for b in _followers(s, main)]
    others = [b.name for b in analysis.blocks(s.func) if b.name not in (name, *followers)]
    for b in others:
        contraction.follow_reader_layout(s, b)
    # ---- loops: result in memory order, window, tile --------------------------------------------
    lanes = s.target.lanes(main.body.buffer.dtype.bytes)
    block = nest.layout.splits()[-1][2] or lanes  # channels that lie side by side
    outer, lane = s.split(_loop(nest.vector), block, "mask")
    parts = []
    if block > lanes:
        part, lane = s.split(lane, lanes, "mask")
        parts = [part]
    line, column = s.split(_loop(nest.line), _columns(s, nest), "mask")
    place = {id(nest.vector): outer, id(nest.line): line}
    order = [place.get(id(i)) or _loop(i) for i in nest.order]
    short = [i for i in nest.along if (const_int(i.extent) or WRITTEN_OUT + 1) <= WRITTEN_OUT]
    unrolled = [_loop(i) for i in short]
    taps = [n for n in map(_loop, nest.taps) if n not in unrolled] + unrolled
    s.reorder(*order, *parts, *taps, column, lane)
    # ---- weights, what comes after, the register tile -------------------------------------------
    packed = [_pack(s, nest, x, block) for x in nest.weights if _can_pack(s, x)]
    home = [*order, *parts][-1]
    for b in followers:
        s.compute_at(b, home)
    init = s.decompose_reduction(name, taps[0])
    # Tiles at borders that are known only at run time choose terms, which takes no branches.
    moving = s.loop(column)[0].var if const_int(nest.line.extent) is None else None
    if reductions.needed_terms(s.block(name)[0], moving)[0]:
        s.skip(name, None if moving is None else column)
    tile = s.stage(main.body.buffer.name, home, Scope.REGISTER)
    for n in (*unrolled, column):
        s.mark(n, UNROLL)
    s.mark(lane, VECTOR)
    below = [b.name for b in analysis.blocks(s.loop(home)[0])]
    for b in (init, f"{tile}_out", *followers):
        if b in below:
            elementwise.vector_tile(s, b, home)
    # ---- threads --------------------------------------------------------------------------------
    elementwise.threads_over(s, order[: order.index(line)], name)
    for b in (*others, *packed):
        elementwise.one_block(s, b)


def _border(s: Schedule, main: Block) -> str | None:
    """The block that puts a border around what the windows slide over, if it does nothing else."""
    for load in analysis.operand_loads(main):
        for b in analysis.writers(s.func, load.buffer):
            value = b.body.value
            copies = type(value) is Select and type(value.a) is Load and type(value.b) is Const
            if copies and analysis.readers(s.func, load.buffer) == [main]:
                return b.name
    return None


def _followers(s: Schedule, main: Block) -> list[Block]:
    """The blocks that read the sum, or what is made of it, in order."""
    found: list[Block] = []
    made = {main.body.buffer}
    for b in analysis.blocks(s.func):
        if b.name != main.name and any(x.buffer in made for x in analysis.block_loads(b)):
            found.append(b)
            made.add(b.body.buffer)
    return found


def _loop(it: Iter) -> str:
    assert isinstance(it.value, Var)
    return it.value.name


def _columns(s: Schedule, nest: _Nest) -> int:
    """How many neighbours along a line are one tile: what takes the least time, when each tile
    takes as long as one neighbour more."""
    extent = const_int(nest.line.extent)
    best = TILE
    if extent is not None:
        best = min(range(1, TILE + 1), key=lambda n: -(-extent // n) * (n + 1))
    return s.choose("columns", tuple(range(1, 2 * TILE + 1)), best)


def _can_pack(s: Schedule, weights: Load) -> bool:
    return weights.buffer.scope is Scope.PARAM and not analysis.writers(s.func, weights.buffer)


def _pack(s: Schedule, nest: _Nest, weights: Load, block: int) -> str:
    """Puts the weights of neighbouring channels side by side; the block that does so."""
    axis = weights.indices.index(nest.vector.var)
    others = [[k, 1, 0] for k in range(len(weights.indices)) if k != axis]
    layout = [[axis, block, 0], *others, [axis, 1, block]]
    return s.stage(weights.buffer.name, None, Scope.GLOBAL, layout) + "_in"
