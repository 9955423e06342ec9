"""Tensor expressions -> one PrimFunc: a block per stage, in row-major loops, nothing scheduled yet.

    A = te.placeholder(...); C = matmul(A, B); D = relu(C + bias)
    from_tensors("fused_matmul_add_relu", [A, B, bias], [D])

Cheap elementwise stages are inlined where that repeats no work worth naming; what remains are the
results, reductions, and values that several stages share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minicompiler import te
from minicompiler.errors import InternalError
from minicompiler.ir.arith import Arith, dims_of
from minicompiler.ir.expr import (
    ONE,
    TRUE,
    ZERO,
    Binary,
    Call,
    Expr,
    Load,
    Reduce,
    Select,
    Var,
    binary,
    const,
    const_int,
    eq,
    factors,
    free_vars,
    group_along,
    rewrite,
    select,
    substitute,
    walk,
)
from minicompiler.ir.graph import (
    Apply,
    Constant,
    Function,
    Item,
    applies,
    layout_of,
    topological,
    type_of,
)
from minicompiler.ir.layout import IndexMap
from minicompiler.ir.op import Compute, Op
from minicompiler.ir.tir import (
    SCAN,
    SERIAL,
    Block,
    Buffer,
    For,
    Iter,
    PrimFunc,
    Scope,
    Stmt,
    Store,
    seq,
)
from minicompiler.ir.types import DType, Loc
from minicompiler.ops.evaluate import map_sizes

from .guards import equal_sizes

COMBINE = {
    "sum": "add", "prod": "mul", "max": "max", "maxnum": "maxnum", "min": "min", "and": "and",
    "or": "or",
}  # fmt: skip
GROUP = 8  # neighbours that read the same: fewer may as well compute it each
CHEAP = 6  # arithmetic operations worth repeating rather than storing
LOOKUP = 4  # what an element counts that does not lie beside that of the neighbour
DEAR = 7  # from here on, a division alone, they are done once for all who need the same


def from_tensors(
    name: str,
    params: Sequence[te.Tensor],
    results: Sequence[te.Tensor],
    constants: Sequence[te.Tensor] = (),
    layouts: Mapping[te.Tensor, IndexMap | None] | None = None,
    locs: tuple[Loc, ...] = (),
) -> PrimFunc:
    """One function computing `results` from `params`. Layouts apply to params and results.

    constants: the params that are known while compiling (weights).
    """
    layouts = layouts or {}
    order = _reductions_late(_inline(list(te.closure(results)), results))
    buffers: dict[te.Tensor, Buffer] = {}
    names: set[str] = set()

    def unique(base: str) -> str:
        made, k = base, 2
        while made in names:
            made, k = f"{base}_{k}", k + 1
        names.add(made)
        return made

    every = [x for t in order for x in ((t,) if t.source is None else t.source.outputs)]
    # A scale may depend on a size that no tensor here has.
    bodies = [t.body for t in order if t.body is not None]
    dims = dims_of([*[s for t in (*params, *every) for s in t.shape], *bodies])
    names.update(d.name for d in dims)
    for k, p in enumerate(params):
        buffers[p] = Buffer(
            unique(f"p{k}"), p.dtype, p.shape, Scope.PARAM, layouts.get(p), p in constants
        )
    for k, r in enumerate(results):
        if r in buffers:
            raise ValueError("a result must be computed, not a parameter")
        buffers[r] = Buffer(unique(f"r{k}"), r.dtype, r.shape, Scope.PARAM, layouts.get(r))
    internal = []
    externs = [t.source for t in order if isinstance(t.source, te.Extern)]
    changed = {x.inputs[0]: x.outputs[0] for x in externs if x.changes}
    for t in order:
        for x in (t,) if t.source is None else t.source.outputs:
            if x.body is None and x.source is None:
                continue
            home = changed.get(x, x)
            if home not in buffers:
                buffers[home] = Buffer(unique(home.name), x.dtype, x.shape, Scope.GLOBAL)
                internal.append(buffers[home])
            buffers[x] = buffers[home]
    phases: list[Stmt] = []
    done: set[te.Extern | te.Scan] = set()
    for t in order:
        if t.body is not None:
            if ZERO not in t.shape:  # an empty tensor has no elements to compute
                phases.append(_stage(t, buffers, unique))
        elif t.source is not None and t.source not in done:
            done.add(t.source)
            if isinstance(t.source, te.Scan):
                statements, inside = _scan(t.source, buffers, unique)
                phases += statements
                internal += inside
            else:
                phases.append(_extern(t.source, buffers, unique))
    outs = tuple(buffers[r] for r in results)
    return PrimFunc(
        name,
        (*[buffers[p] for p in params], *outs),
        len(outs),
        tuple(dims),
        tuple(internal),
        tuple(phases),
        locs,
    )


def lower_function(fn: Function, constant: Sequence[bool] = (), max_error: float = 0.0) -> PrimFunc:
    """The PrimFunc of a fused Function.

    constant: per parameter, whether the caller passes a constant (all are run-time values if
    empty).
    max_error: which reduced-multiplication algorithms may be chosen, by their stated error.
    """
    made: dict[int, Any] = {}
    placeholders: list[te.Tensor] = []
    layouts: dict[te.Tensor, IndexMap | None] = {}
    known_constant = {id(p) for p, c in zip(fn.params, constant, strict=False) if c}
    equal = equal_sizes(fn)
    for p in fn.params:
        shape = tuple(substitute(size, equal) for size in p.type.shape)
        t = te.placeholder(p.name, shape, p.type.dtype)
        made[id(p)] = t
        placeholders.append(t)
        layouts[t] = p.layout
    for v in topological(fn.results):
        if id(v) in made:
            continue
        if isinstance(v, Constant):
            made[id(v)] = _literal(v)
        elif isinstance(v, Item):
            made[id(v)] = made[id(v.tuple)][v.index]
        elif isinstance(v, Apply):
            assert isinstance(v.op, Op)
            args = [None if a is None else made[id(a)] for a in v.args]
            attrs = map_sizes(v.attrs, lambda size: substitute(size, equal)) if equal else v.attrs
            made[id(v)] = choose_compute(v, known_constant, max_error).build(*args, attrs)
            _check_shapes(v, made[id(v)])
    results: list[te.Tensor] = []
    for r in fn.results:
        t = made[id(r)]
        # A parameter passed through, or the same value twice.
        if (t.body is None and t.source is None) or t in results:
            source = t
            t = te.compute(source.shape, lambda *i, source=source: source[i], "copy")
        results.append(t)
        layouts[t] = layout_of(r)
    known = [t for t, c in zip(placeholders, constant, strict=False) if c]
    locs = tuple(
        dict.fromkeys(
            loc for v in topological(fn.results) if isinstance(v, Apply) for loc in v.locs
        )
    )
    return from_tensors(fn.name, placeholders, results, known, layouts, locs)


def is_exact(fn: Function, constant: Sequence[bool], max_error: float) -> bool:
    """Whether every node of a fused Function is computed as its operator defines it."""
    known = {id(p) for p, c in zip(fn.params, constant, strict=False) if c}
    return all(choose_compute(v, known, max_error) is v.op.computes[0] for v in applies(fn))  # type: ignore[union-attr]


def _check_shapes(v: Apply, made: Any) -> None:
    """A result that is larger than its type says would be written past the end of its memory."""
    types = v.type if isinstance(v.type, tuple) else (v.type,)
    for t, tensor in zip(types, made if isinstance(made, tuple) else (made,), strict=True):
        pairs = list(zip(t.shape, tensor.shape, strict=True))
        if any(a is not b and Arith().prove(eq(a, b)) is False for a, b in pairs):
            raise InternalError(f"{v.op.name} is {t}, but computes {list(tensor.shape)}", v.locs)


def choose_compute(v: Apply, constant: set[int], max_error: float) -> Compute:
    """The cheapest way, by the operator's own estimate, to compute a node. Nothing that varies at
    run time takes part in the choice, so equal sizes give equal bits."""
    assert isinstance(v.op, Op)
    first, *others = v.op.computes
    types = [None if a is None else type_of(a) for a in v.args]
    if v.args and v.args[0] is not None and layout_of(v.args[0]) is not None:
        for c in others:
            if c.blocked and (c.applies is None or c.applies(types, v.attrs)):
                return c
    if first.cost is None:
        return first
    best, least = first, first.cost(types, v.attrs)
    for c in others:
        known = all(k < len(v.args) and id(v.args[k]) in constant for k in c.constants)
        if known and c.error <= max_error and (c.applies is None or c.applies(types, v.attrs)):
            assert c.cost is not None
            time = c.cost(types, v.attrs)
            if time < least:
                best, least = c, time
    return best


def _literal(v: Constant) -> te.Tensor:
    """A small constant as an expression of its indices."""
    data = v.data
    dtype = v.type.dtype
    if data.size == 1:
        value = data.reshape(-1)[0]
        return te.compute(data.shape, lambda *i: const(value, dtype), "constant")
    raise InternalError(f"a constant of {data.size} elements inside a fused function", v.locs)


def _reductions_late(order: list[te.Tensor]) -> list[te.Tensor]:
    """A topological order in which what does not wait for a reduction comes before it, so that a
    consumer moved to its reduction finds its other operands there."""
    after: set[te.Tensor] = set()
    for t in order:
        if any(i in after for i in te.inputs(t)) or type(t.body) is Reduce:
            after.add(t)
    return [t for t in order if t not in after] + [t for t in order if t in after]


# ---- inlining -----------------------------------------------------------------------------------
def _inline(order: list[te.Tensor], results: Sequence[te.Tensor]) -> list[te.Tensor]:
    """The tensors that stay stages, with the others substituted into their bodies.

    Two readers of a stage may have become one, which makes it worth inlining after all.
    """
    while True:
        fewer = _inline_once(order, results)
        if len(fewer) == len(order):
            return fewer
        order = fewer


def _inline_once(order: list[te.Tensor], results: Sequence[te.Tensor]) -> list[te.Tensor]:
    uses: dict[te.Tensor, list[te.Tensor]] = {}
    for t in order:
        for i in te.inputs(t):
            uses.setdefault(i, []).append(t)
    bodies: dict[te.Tensor, te.Tensor] = {}
    inlined: dict[te.Tensor, te.Tensor] = {}

    def one(e: Expr) -> Expr | None:
        if type(e) is Load:
            if e.buffer in inlined:
                source = inlined[e.buffer]
                assert source.body is not None
                value = substitute(source.body, dict(zip(source.axes, e.indices, strict=True)))
                return value if e.mask is None else select(e.mask, value, const(0, value.dtype))
            if e.buffer in bodies:
                return Load(bodies[e.buffer], e.indices, e.mask)
        return None

    named = {*results, *(i for t in order if t.source is not None for i in t.source.inputs)}
    stay = []
    for t in order:
        new = t
        if t.body is not None:
            body = rewrite(t.body, one)
            if body is not t.body:
                new = te.Tensor(t.name, t.shape, t.dtype, t.axes, body)
                new.kept = t.kept
        free = t.body is not None and t not in named and not t.kept
        if free and _worth_inlining(new, t, uses.get(t, [])):
            inlined[t] = new
        else:
            if t not in named:
                bodies[t] = new
            stay.append((t, new))
    # Results, and what externs read, keep their identity: their new bodies are put in place.
    final = []
    for t, new in stay:
        if new is not t and t in named:
            t.body = new.body
            new = t
        final.append(new)
    return final


def _in_columns(t: te.Tensor, consumer: te.Tensor) -> bool:
    """True where a reader uses an element of t for many of its own, but no two neighbours use the
    same, so that what is computed once for each stays no number outside of a loop."""
    if consumer.body is None or not consumer.axes:
        return False
    loads = [e for e in walk(consumer.body) if type(e) is Load and e.buffer is t]
    used = frozenset[Expr]().union(*map(free_of, loads))
    return consumer.axes[-1] in used and not set(consumer.axes) <= used | _unit_axes(consumer)


def _worth_inlining(t: te.Tensor, original: te.Tensor, consumers: list[te.Tensor]) -> bool:
    assert t.body is not None
    if type(t.body) is Reduce:
        return False
    cost = 0
    gathers = divides = False
    for e in walk(t.body):
        if e.dtype.is_float:
            cost += 1 if type(e) is Binary else 12 if type(e) is Call else 0
            cost += 6 if type(e) is Binary and e.op in ("div", "pow") else 0
        elif type(e) is Select and any(type(x) is Load for x in walk(e)):
            gathers = True
        elif type(e) is Binary and e.op in ("floordiv", "mod") and const_int(e.b) is None:
            divides = True
        cost += 2 if type(e) is Select else 0
        if type(e) is Load and any(type(x) is Load for i in e.indices for x in walk(i)):
            gathers = True
            # Neighbours from anywhere are loaded one by one.
            cost += LOOKUP if any(type(x) is Load for x in walk(e.indices[-1])) else 0
    if divides and not te.inputs(t):  # a table of places
        return False
    if _turns(t) and any(_by_lines(c, original) for c in consumers):
        return False
    lines = cost >= DEAR and any(_by_lines(t, i) for i in te.inputs(t))
    if lines and any(_turns(c, original) for c in consumers):
        return False
    total = any(type(i.body) is Reduce for i in te.inputs(t))
    if total and cost >= DEAR and any(_in_columns(original, c) for c in consumers):
        return False
    for c in consumers:
        sites = (
            sum(1 for e in walk(c.body) if type(e) is Load and e.buffer is original)
            if c.body is not None
            else 0
        )
        if sites > 1 and cost * sites > CHEAP:
            return False
        if sites > 1 and len(_reads(t, None)) > 1 and _looks_up(c, original):
            return False
        if c.body is not None and type(c.body) is Reduce:
            once = all(
                set(c.axes) | set(c.body.axes) <= _told_apart(e) | _unit_axes(c)
                for e in walk(c.body) if type(e) is Load and e.buffer is original
            )  # fmt: skip
            if not once and (cost > 0 or gathers):
                return False
            if not _linear(c.body, original) and (cost > 0 or (not once and _has_gaps(t.body))):
                return False
    return len(consumers) <= 1 or cost <= CHEAP


def _reads(t: te.Tensor, source: te.Tensor | None) -> list[Load]:
    """The loads of t, or only those of one source."""
    every = () if t.body is None else walk(t.body)
    return [e for e in every if type(e) is Load and (source is None or e.buffer is source)]


def _looks_up(t: te.Tensor, source: te.Tensor) -> bool:
    """Whether t reads a source lane by lane: neighbours are looked for, each from anywhere."""
    return any(type(x) is Load for e in _reads(t, source) for x in walk(e.indices[-1]))


def _by_lines(t: te.Tensor, source: te.Tensor) -> bool:
    """Whether data decides which elements of a source t reads, several for each of its own, and all
    those along t's last axis lie side by side."""
    chosen = [
        e for e in _reads(t, source) if any(type(x) is Load for i in e.indices for x in walk(i))
    ]
    return len(chosen) > 1 and bool(t.axes) and all(e.indices[-1] is t.axes[-1] for e in chosen)


def _turns(t: te.Tensor, source: te.Tensor | None = None) -> bool:
    """Whether neighbours along t's last axis lie apart in what it reads."""
    return bool(t.axes) and any(
        t.axes[-1] in free_of(e) and t.axes[-1] not in free_vars(e.indices[-1])
        for e in _reads(t, source)
    )


def _has_gaps(e: Expr) -> bool:
    """True for a load that leaves elements out: read often in place, it shares the caches with
    them."""
    return type(e) is Load and any(type(i) is Binary and i.op == "mul" for i in e.indices)


def free_of(e: Load) -> frozenset[Expr]:
    """The variables in a load's indices."""
    return frozenset().union(*[free_vars(i) for i in e.indices], frozenset())


def _told_apart(e: Load) -> frozenset[Expr]:
    """The variables in a load's indices but for those that only tell groups of neighbours."""
    return frozenset(v for v in free_of(e) if (group_along(e, v) or 1) < GROUP)


def _unit_axes(t: te.Tensor) -> set[Expr]:
    return {a for a, s in zip(t.axes, t.shape, strict=True) if s is ONE}


def _linear(body: Reduce, operand: te.Tensor) -> bool:
    """False for a contraction (a product of two loads): its operands stay plain loads, because that
    is what packing and vectorising need to see."""
    a, b = factors(body.body) or (None, None)
    return not (type(a) is Load and type(b) is Load and a.buffer is not b.buffer)


# ---- one stage ----------------------------------------------------------------------------------
def identity_of(combiner: str, dtype: DType) -> Expr:
    """The neutral element of a combiner."""
    if combiner in ("max", "maxnum", "min"):
        if dtype.is_float:
            return const(float("inf") if combiner == "min" else float("-inf"), dtype)
        if dtype.is_bool:
            return const(combiner == "min", dtype)
        low = -(1 << (dtype.bits - 1)) if dtype.is_signed else 0
        high = (1 << (dtype.bits - (1 if dtype.is_signed else 0))) - 1
        return const(high if combiner == "min" else low, dtype)
    return const({"sum": 0, "prod": 1, "and": True, "or": False}[combiner], dtype)


def _stage(  # type: ignore[no-untyped-def]
    t: te.Tensor, buffers: Mapping[te.Tensor, Buffer], unique,
    around: Var | None = None, shift: int = 0, name: str = "",
) -> Stmt:  # fmt: skip
    """The loops and the block that compute one tensor.

    around: the loop of the first axis, which stands outside; it stores `shift` further on.
    """
    assert t.body is not None
    target = buffers[t]
    loops: list[tuple[Var, Expr]] = []
    iters: list[Iter] = []
    mapping: dict[Expr, Expr] = {}

    def iterate(var: Var, extent: Expr, letter: str, reduce: bool) -> None:
        if extent is ONE:
            mapping[var] = ZERO
            return
        loop = unique(letter)
        loops.append((Var(loop), extent))
        v = Var(unique("v" + loop))
        iters.append(Iter(v, extent, reduce, Var(loop)))
        mapping[var] = v

    for k, (a, extent) in enumerate(zip(t.axes, t.shape, strict=True)):
        if k == 0 and around is not None:
            v = Var(unique("v" + around.name))
            iters.append(Iter(v, extent, False, around))
            mapping[a] = v
        else:
            iterate(a, extent, f"i{k}", False)
    body = t.body
    if type(body) is Reduce:
        for k, (a, extent) in enumerate(zip(body.axes, body.extents, strict=True)):
            iterate(a, extent, f"k{k}", True)

    def to_buffers(e: Expr) -> Expr | None:
        return Load(buffers[e.buffer], e.indices, e.mask) if type(e) is Load else None

    at = tuple(mapping[a] + shift if shift and k == 0 else mapping[a] for k, a in enumerate(t.axes))
    init = None
    if type(body) is Reduce:
        value = substitute(rewrite(body.body, to_buffers), mapping)
        own = Load(target, at)
        if any(i.reduce for i in iters):
            init = Store(target, at, identity_of(body.combiner, t.dtype))
            value = binary(COMBINE[body.combiner], own, value)
    else:
        value = substitute(rewrite(body, to_buffers), mapping)
    # A block is called like the buffer it fills; the block of a result like its tensor.
    name = name or (target.name if target.scope is Scope.GLOBAL else unique(t.name))
    result: Stmt = Block(name, tuple(iters), TRUE, init, Store(target, at, value))
    for var, extent in reversed(loops):
        result = For(var, extent, SERIAL, result)
    return result


def _scan(  # type: ignore[no-untyped-def]
    scan: te.Scan, buffers: dict[te.Tensor, Buffer], unique
) -> tuple[list[Stmt], list[Buffer]]:
    """The statements of a recurrence, and the buffers of what a step computes on its way.

        for i: h[0, i] = init[i]
        for t in steps:  # scan
            for i, k: a[t, i] = a[t, i] + h[t, k] * r[i, k]
            for i: h[t + 1, i] = tanh(a[t, i])

    Every tensor of a step has the steps as an axis, so each element is computed once, as anywhere
    else; schedules shrink what lives within a step.
    """
    now: dict[te.Tensor, tuple[te.Tensor, int]] = {}  # tensor of a step -> with all steps, shift
    now.update((p, (h, 0)) for p, h in zip(scan.prev, scan.outputs, strict=True))

    def in_time(e: Expr) -> Expr | None:
        if type(e) is Load and e.buffer in now:
            whole, shift = now[e.buffer]
            return Load(whole, (scan.t + shift if shift else scan.t, *e.indices), e.mask)
        return None

    starts = []
    for x, h in zip(scan.init, scan.outputs, strict=True):
        first = x if x.body is not None else te.compute(x.shape, lambda *i, x=x: x[i])
        if ZERO in x.shape:
            continue
        axes = (*te.axis_vars(1), *first.axes)
        start = te.Tensor(x.name, (ONE, *x.shape), x.dtype, axes, first.body)
        name = unique(f"{buffers[h].name}_start")
        starts.append(_stage(start, {**buffers, start: buffers[h]}, unique, name=name))
    if scan.steps is ZERO or all(ZERO in x.shape for x in scan.next):
        return starts, []
    loop = Var(unique("t"))
    nests, inside = [], []
    for x in _reductions_late(_inline(list(scan.stages), scan.next)):
        shift = 1 if x in scan.next else 0
        assert x.body is not None
        body = rewrite(x.body, in_time)
        timed = te.Tensor(x.name, (scan.steps, *x.shape), x.dtype, (scan.t, *x.axes), body)
        if shift:
            whole = scan.outputs[scan.next.index(x)]
            buffers[timed] = buffers[whole]
        else:
            whole = timed
            buffers[timed] = Buffer(unique(x.name), x.dtype, timed.shape, Scope.GLOBAL)
            inside.append(buffers[timed])
        now[x] = (whole, shift)
        nests.append(_stage(timed, buffers, unique, loop, shift))
    return [*starts, For(loop, scan.steps, SERIAL, seq(nests), SCAN)], inside


def _extern(source: te.Extern, buffers: Mapping[te.Tensor, Buffer], unique) -> Stmt:  # type: ignore[no-untyped-def]
    """The statement that an extern stands for."""
    ins, outs = ([buffers[t] for t in ts] for ts in (source.inputs, source.outputs))
    return source.build(ins, outs, lambda stem: Var(unique(stem)))
