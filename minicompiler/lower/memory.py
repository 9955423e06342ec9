"""Kernel calls in order -> a Plan: where every value lives while the model runs.

    plan, constants = plan_memory(fn, [KernelCall("dense", (x, w), (h,), (n,), ZERO, ZERO), ...])

Outputs live in the caller's arrays, other values in one arena (places.py). A value is alive from
the call that makes it to the last one that reads it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from minicompiler.errors import InternalError, ShapeError
from minicompiler.ir.arith import Arith, dims_of
from minicompiler.ir.expr import (
    ZERO,
    Binary,
    Const,
    Dim,
    Expr,
    Select,
    Var,
    free_vars,
    substitute,
    wrap,
)
from minicompiler.ir.graph import (
    Constant,
    Function,
    Input,
    Item,
    Value,
    layout_of,
    type_of,
    without_choices,
)
from minicompiler.ir.types import TensorType
from minicompiler.lower.caches import cache_pairs
from minicompiler.runtime import plan as rt

from .places import Lifetime, largest, place


@dataclasses.dataclass(frozen=True, eq=False)
class KernelCall:
    """One kernel: its tensors (arrays: constants the compiler made), what it makes, its dimensions.

    shared, local: bytes of workspace, shared + threads * local. again: the result has been made
    before and is written anew. at: bytes from the start of the result's place.
    """

    kernel: str
    args: tuple[Value | np.ndarray, ...]
    results: tuple[Value, ...]
    dims: tuple[Dim, ...]
    shared: Expr
    local: Expr
    again: bool = False
    at: Expr = ZERO


@dataclasses.dataclass(frozen=True, eq=False)
class Alias:
    """`result` is `source` under another shape: both are the same bytes."""

    source: Value
    result: Value


@dataclasses.dataclass(frozen=True, eq=False)
class Reserve:
    """A place for a value that later steps write, each with `again`."""

    value: Value


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """Steps that are done if a bool tensor holds `wanted`, or repeated as long as it does.

    steps may be put in another order, last come after them. states: values made before that the
    steps write anew. results: other names for values, which are right once the region is done.
    """

    flag: Value
    wanted: bool
    repeat: bool
    steps: Sequence[Step]
    last: Sequence[Step]
    states: Sequence[Value]
    results: Sequence[Alias]


Step = KernelCall | Alias | Reserve | Region


@dataclasses.dataclass(frozen=True, eq=False)
class Count:
    """A dimension that is the value of an int64 tensor, and never larger than `most`.

    most: None for one without a limit; the tensor has to be an input then, which tells it before
    the first call.
    """

    dim: Dim
    value: Value
    most: Expr | None


def plan_memory(
    fn: Function,
    steps: Sequence[Step],
    guards: Sequence[tuple[Expr, str]] = (),
    counts: Sequence[Count] = (),
) -> tuple[rt.Plan, list[np.ndarray]]:
    """The plan of a function whose work is `steps`, and the constants it refers to.

    guards: comparisons of dimensions that hold or the call is refused, each with its origin.
    counts: dimensions that no input tells.
    Raises InternalError for steps that do not fit the function: a value read before it is made, a
    result that nothing makes, an input that becomes an output by an Alias alone.
    """
    return _Planner(fn, after_counts(steps, counts), counts).run(guards)


def after_counts(steps: Sequence[Step], counts: Sequence[Count]) -> Sequence[Step]:
    """The steps in an order in which a dimension is counted before a kernel takes it."""
    missing = {c.dim: _key(c.value) for c in counts if not isinstance(c.value, Input | Constant)}
    if not missing:
        return steps
    unmade = {_key(r) for s in steps for r in _results(s)}
    done: list[Step] = []
    rest = list(steps)
    while rest:
        waiting: list[Step] = []
        for s in rest:
            needs = {_key(a) for a in _operands(s)}
            needs |= {missing[d] for d in _dims(s) if d in missing}
            # What a region makes itself it need not wait for.
            if (needs - {_key(r) for r in _results(s)}) & unmade:
                waiting.append(s)
                continue
            if isinstance(s, Region):
                s = dataclasses.replace(s, steps=after_counts(s.steps, counts))
            done.append(s)
            unmade -= {_key(r) for r in _results(s)}
        if len(waiting) == len(rest):
            raise InternalError("kernels wait for each other's sizes")
        rest = waiting
    return done


def _inner(s: Region) -> tuple[Step, ...]:
    return (*s.steps, *s.last, *s.results)


def _results(s: Step) -> list[Value]:
    if isinstance(s, Region):
        return [r for x in _inner(s) for r in _results(x)]
    if isinstance(s, Reserve):
        return [s.value]
    return [s.result] if isinstance(s, Alias) else list(s.results)


def _operands(s: Step) -> list[Value]:
    if isinstance(s, Region):
        return [s.flag, *s.states, *[a for x in _inner(s) for a in _operands(x)]]
    if isinstance(s, Reserve):
        return []
    every = (s.source,) if isinstance(s, Alias) else s.args
    return [a for a in every if isinstance(a, Value)]


def _dims(s: Step) -> list[Dim]:
    if isinstance(s, Region):
        return [d for x in _inner(s) for d in _dims(x)]
    return [*s.dims, *dims_of([s.at])] if isinstance(s, KernelCall) else []


def kernel_calls(steps: Iterable[Step]) -> Iterator[KernelCall]:
    """The calls in all regions, in the order in which the plan lists them."""
    for s in steps:
        if isinstance(s, KernelCall):
            yield s
        elif isinstance(s, Region):
            yield from kernel_calls((*s.steps, *s.last))


# ---- the plan -----------------------------------------------------------------------------------
Key = tuple[int, int]


@dataclasses.dataclass(eq=False)
class _Group:
    """Values that are the same bytes: one, or several joined by Alias."""

    sizes: list[Expr]
    location: rt.Location | None = None
    start: int = -1  # the call that makes it
    end: int = -1
    parts: bool = False  # is written part by part


class _Planner:
    def __init__(self, fn: Function, steps: Sequence[Step], counts: Sequence[Count]) -> None:
        self.fn, self.steps = fn, steps
        given = {id(p): i for i, p in enumerate(fn.params)}
        self.given: dict[Dim, int] = {}  # the input that holds a dimension's value
        for c in counts:
            if c.most is None and id(c.value) not in given:
                raise ShapeError(
                    f"the size {c.dim.name} is computed from data, and nothing limits it",
                    hint="only an input of the model may tell a size without a limit",
                )
            if c.most is None:
                self.given[c.dim] = given[id(c.value)]
        self.caches = cache_pairs(fn)
        counts = [c for c in counts if c.most is not None]
        self.calls = list(kernel_calls(steps))
        self.counts = counts
        # Memory is reserved for the largest counts.
        self.most: dict[Expr, Expr] = {}
        for c in counts:
            assert c.most is not None
            self.most[c.dim] = substitute(c.most, self.most)
        self.early: set[Dim] = set()  # read as soon as they are known, because of a condition
        self.groups: dict[Key, _Group] = {}
        self.now = -1  # the number of the last call
        self.regions: list[tuple[Region, int, int]] = []  # with the calls it begins and ends before
        self.around: tuple[int, ...] = ()  # numbers of the regions that are being looked at
        self.home: dict[Key, tuple[int, ...]] = {}  # the regions in which a value is made
        self.touched: list[set[int]] = []  # per open region the groups in use, by id
        self.constants: list[np.ndarray] = []
        self.constant_at: dict[int, int] = {}
        for i, p in enumerate(fn.params):
            self.refuse_layout(p, f'input "{p.name}"')
            self.groups[_key(p)] = _Group([], ("input", i))

    def run(self, guards: Sequence[tuple[Expr, str]]) -> tuple[rt.Plan, list[np.ndarray]]:
        self.live(self.steps)
        outputs, results = self.outputs()
        placed = list({id(g): g for g in self.groups.values() if g.location is None}.values())
        placement = place([Lifetime(g.start, g.end, largest(g.sizes)) for g in placed])
        for g, offset in zip(placed, placement.offsets, strict=True):
            g.location = ("arena", to_size(offset))
        calls = []
        for c in self.calls:
            args = [self.location(a) for a in c.args]
            args += [self.part(self.location(r), c.at) for r in c.results]
            calls.append(rt.Call(c.kernel, tuple(args), tuple(d.name for d in c.dims)))
        shared = largest([substitute(c.shared, self.most) for c in self.calls])
        local = largest([substitute(c.local, self.most) for c in self.calls])
        checks = self.checked([g for g in guards if self.counted_in(g[0])])
        needed = [s for t in outputs for s in t.shape] + [g for g, _ in guards]
        needed += [placement.total, shared, local, *[s for g in placed for s in g.sizes]]
        needed += [d for c in self.calls for d in c.dims]
        dims, binds = self.bind([substitute(e, self.most) for e in needed])
        # What they read may be constants that no kernel has: these are numbered before the end.
        counts = tuple(x for c in self.counts if (x := self.counted(c)) is not None)
        regions = tuple(
            rt.Region(start, end, self.location(r.flag), r.wanted, r.repeat)
            for r, start, end in self.regions
        )
        plan = rt.Plan(
            inputs=tuple(_tensor(p.name, p.type) for p in self.fn.params),
            outputs=tuple(
                _tensor(name, t) for name, t in zip(self.result_names(), outputs, strict=True)
            ),
            dims=dims,
            binds=binds,
            guards=tuple(_guard(*g) for g in guards if not self.counted_in(g[0])),
            named=tuple((v.name, to_size(e)) for v, e in placement.named),
            calls=tuple(calls),
            results=tuple(results),
            constants=len(self.constants),
            arena=to_size(placement.total),
            shared=to_size(shared),
            local=to_size(local),
            counts=counts,
            checks=checks,
            caches=tuple(rt.Cache(i, o, axis) for i, o, axis, _ in self.caches),
            regions=regions,
        )
        return plan, self.constants

    def part(self, location: rt.Location, at: Expr) -> rt.Location:
        """A place inside of that of a value."""
        if at is ZERO:
            return location
        place, start = location
        if place != "arena":
            raise self.error(f"a part of {place} {start} is written")
        return place, ("add", start, to_size(at))

    def counted_in(self, condition: Expr) -> bool:
        """Whether a condition is on a dimension that kernels count."""
        return not self.most.keys().isdisjoint(free_vars(condition))

    def checked(self, guards: Sequence[tuple[Expr, str]]) -> tuple[rt.Guard, ...]:
        """Conditions that are looked at during a call."""
        for c in self.counts:
            users = [text for condition, text in guards if c.dim in free_vars(condition)]
            if users and self.home.get(_key(c.value), ()):
                raise ShapeError(
                    f"{users[0]}: one of them is counted in a branch or a loop, so this cannot be "
                    "checked"
                )
            if users:
                self.early.add(c.dim)
        return tuple(_guard(*g) for g in guards)

    def counted(self, c: Count) -> rt.Count | None:
        """Where a dimension is read; None if nothing needs it."""
        home = self.home.get(_key(c.value), ())
        users = [k for k, x in enumerate(self.calls) if c.dim in _dims(x)]
        if not users and home:
            return None
        before = users[0] if users else len(self.calls)
        if c.dim in self.early:  # no kernel may run with sizes that do not fit
            before = max(self.group(c.value).start, -1) + 1
        # Not inside a region that its value is not made in: it may be needed again later.
        for number, (_, start, end) in enumerate(self.regions):
            if number not in home and start <= before < end:
                before = start
                break
        most = to_size(self.most[c.dim])
        return rt.Count(c.dim.name, self.location(c.value), most, before, len(home))

    # ---- liveness -------------------------------------------------------------------------------
    def live(self, steps: Sequence[Step]) -> None:
        """Groups, and the calls between which each is alive."""
        for step in steps:
            if isinstance(step, Region):
                self.region(step)
            elif isinstance(step, Alias):
                group = self.group(step.source)
                if _key(step.result) in self.groups:
                    raise self.error(f"{_name(step.result)} is made twice")
                if type_of(step.source).dtype is not type_of(step.result).dtype:
                    raise self.error(f"{_name(step.result)} is an alias of another dtype")
                group.sizes.append(self.bytes_of(step.result))
                self.groups[_key(step.result)] = group
                self.home[_key(step.result)] = self.home.get(_key(step.source), ())
            elif isinstance(step, Reserve):
                self.make(step.value, self.now + 1)
            else:
                self.now += 1
                for a in step.args:
                    if isinstance(a, Value):
                        self.group(a).end = self.now
                for r in step.results:
                    if step.again:
                        group = self.group(r)
                        group.end = self.now
                        group.parts |= step.at is not ZERO
                    else:
                        self.make(r, self.now)

    def make(self, v: Value, start: int) -> None:
        if _key(v) in self.groups:
            raise self.error(f"{_name(v)} is made twice")
        self.groups[_key(v)] = _Group([self.bytes_of(v)], start=start, end=start)
        self.home[_key(v)] = self.around

    def region(self, r: Region) -> None:
        """What is made outside of a loop and used inside stays until its end."""
        outer, number, start = self.around, len(self.regions), self.now + 1
        self.regions.append((r, start, start))
        self.touched.append(set())
        self.group(r.flag)
        self.around = (*outer, number)
        for v in r.states:
            self.home[_key(v)] = self.around
        self.live((*r.steps, *r.last))
        self.group(r.flag)
        self.around = outer
        self.regions[number] = r, start, self.now + 1
        inside = self.touched.pop()
        for g in {id(g): g for g in self.groups.values() if id(g) in inside}.values():
            if g.start < start or g.parts:
                g.end = max(g.end, self.now)
        if self.touched:
            self.touched[-1] |= inside
        self.live(r.results)
        for alias in r.results:
            self.home[_key(alias.result)] = outer

    def bytes_of(self, v: Value) -> Expr:
        return substitute(_bytes(v), self.most)

    def group(self, v: Value) -> _Group:
        found = self.groups.get(_key(v))
        if found is None:
            if not isinstance(v, Constant):
                raise self.error(f"{_name(v)} is used before a step makes it")
            found = self.groups[_key(v)] = _Group([], self.constant(v.data))
        for inside in self.touched:
            inside.add(id(found))
        return found

    def constant(self, data: np.ndarray) -> rt.Location:
        """Where an array is; the same object is stored once."""
        at = self.constant_at.get(id(data))
        if at is None:
            at = self.constant_at[id(data)] = len(self.constants)
            self.constants.append(data)
        return "constant", at

    def outputs(self) -> tuple[list[TensorType], list[rt.Location]]:
        """Gives the groups of results their output buffers; where each result is."""
        types: list[TensorType] = []
        results: list[rt.Location] = []
        for i, r in enumerate(self.fn.results):
            self.refuse_layout(r, f"result {i}")
            group = self.group(r)
            if group.location is None:
                group.location = ("output", i)
            elif group.location[0] in ("input", "constant") and not isinstance(r, Input | Constant):
                raise self.error(
                    f"result {i} is {group.location[0]} data under another shape: copy it"
                )
            types.append(type_of(r))
            results.append(group.location)
        return types, results

    def location(self, v: Value | np.ndarray) -> rt.Location:
        at = self.constant(v) if isinstance(v, np.ndarray) else self.group(v).location
        assert at is not None
        return at

    # ---- names and dimensions -------------------------------------------------------------------
    def result_names(self) -> list[str]:
        names = self.fn.result_names
        return list(names) if names else [f"output{i}" for i in range(len(self.fn.results))]

    def bind(self, sizes: Iterable[Expr]) -> tuple[tuple[rt.DimSpec, ...], tuple[rt.Bind, ...]]:
        """The dimensions of the inputs and of other sizes, and the input axis that tells each."""
        at = {d: rt.Bind(d.name, i, rt.VALUE) for d, i in self.given.items()}
        at.update((room, rt.Bind(room.name, i, rt.ROOM)) for i, _, _, room in self.caches)
        for i, p in enumerate(self.fn.params):
            for axis, s in enumerate(p.type.shape):
                if isinstance(s, Dim):
                    at.setdefault(s, rt.Bind(s.name, i, axis))
        dims = dims_of([*at, *sizes, *[s for p in self.fn.params for s in p.type.shape]])
        for a, b in itertools.pairwise(dims):
            if a.name == b.name:
                raise self.error(f'two dimensions are called "{a.name}"')
        for d in dims:
            if d not in at:
                raise self.error(f'no axis of an input is dimension "{d.name}"')
        specs = tuple(rt.DimSpec(d.name, d.lo, d.hi, d.multiple_of) for d in dims)
        return specs, tuple(at[d] for d in dims)

    def refuse_layout(self, v: Value, what: str) -> None:
        layout = layout_of(v)
        if layout is not None and not layout.is_identity:
            raise self.error(f"{what} has the layout {layout}; it must be row-major")

    def error(self, message: str) -> InternalError:
        return InternalError(message, where=self.fn.name)


def to_size(e: Expr) -> rt.Size:
    """An index expression in the plan's notation. Raises InternalError for other operations."""
    if type(e) is Const:
        return int(e.value)
    if isinstance(e, Dim | Var):
        return e.name
    if type(e) is Binary and e.op in rt.OPERATIONS:
        return e.op, to_size(e.a), to_size(e.b)
    if type(e) is Select and (same := without_choices(e)) is not e:
        return to_size(same)
    raise InternalError(f"a plan cannot compute the size `{e}`")


def _guard(condition: Expr, text: str) -> rt.Guard:
    if type(condition) is not Binary or condition.op not in rt.RELATIONS:
        raise InternalError(f"a guard is a comparison, not `{condition}`")
    return rt.Guard(to_size(condition.a), condition.op, to_size(condition.b), text)


def _key(v: Value) -> Key:
    """Identity of a value; Items of one result are equal though they are different objects."""
    return (id(v.tuple), v.index) if isinstance(v, Item) else (id(v), 0)


def _name(v: Value) -> str:
    source = v.tuple if isinstance(v, Item) else v
    return f'value "{getattr(source, "name", "") or type(source).__name__}"'


def _bytes(v: Value) -> Expr:
    """Bytes of a value in its layout."""
    t, layout = type_of(v), layout_of(v)
    size: Expr = wrap(t.dtype.bytes)
    for s in t.shape if layout is None else layout.physical_shape(t.shape):
        size = size * s
    return size


def _tensor(name: str, t: TensorType) -> rt.Tensor:
    arith = Arith()
    # Only constants are folded: a Dim of one value keeps its name in messages.
    return rt.Tensor(
        name,
        t.dtype.name,
        tuple(to_size(s if isinstance(s, Dim) else arith.simplify(s)) for s in t.shape),
    )
