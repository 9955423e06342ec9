"""The rules of TIR, checked: raises VerifyError with the offending statement marked.

    VerifyError: block C loads A at `vm + 1`, which is not known to be below 4
      in matmul
        > block C(vm = m, reduce vk = k):
One namespace holds loop variables, iterators and dims; a variable is in scope below its loop. The
two sides of an If may use the same names. An index is proved from loop and iterator ranges, `where`
and the conditions of the Selects and Ifs around it. A loaded value inside an index may be any
integer: a data-dependent index must be clamped where it is used, or stand under a condition.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from ..errors import VerifyError
from .arith import Arith
from .expr import (
    ZERO,
    Binary,
    Const,
    Dim,
    Expr,
    Load,
    Reduce,
    Select,
    Var,
    conjuncts,
    const_int,
    free_vars,
    logical_not,
    rewrite,
    substitute,
    walk,
)
from .node import Node
from .proofs import Patience
from .tir import (
    PARALLEL,
    SCAN,
    SERIAL,
    UNROLL,
    VECTOR,
    Alloc,
    Block,
    Buffer,
    For,
    If,
    Prefetch,
    PrimFunc,
    Scope,
    Seq,
    Stmt,
    Store,
    script,
    statements,
)
from .types import index

Access = tuple[Buffer, tuple[Expr, ...], tuple[Expr, ...], str]  # indices, conditions, verb


def verify_tir(
    func: PrimFunc, finished: bool = False, facts: Sequence[Expr] = (), bounds: bool = True
) -> None:
    """Checks one function. Raises VerifyError naming what is wrong.

    finished: the schedule is complete, so register buffers have constant indices once unrolled
    loops are repeated and vector loops are lanes. facts: conditions on dimensions that are checked
    at run time before the function is called. bounds: prove that indices stay inside; where a pass
    has moved conditions away from what they protect, only the rest can be checked.
    """
    _Verifier(func, finished, tuple(facts), bounds).run()


def unproved_accesses(
    func: PrimFunc, facts: Sequence[Expr] = ()
) -> dict[tuple[Buffer, tuple[Expr, ...]], set[int]]:
    """The loads and stores that may leave their buffer, as (buffer, indices), and at which axes.

    Raises VerifyError for all other mistakes.
    """
    verifier = _Verifier(func, False, tuple(facts), True)
    verifier.unproved = {}
    verifier.run()
    return verifier.unproved


@dataclasses.dataclass(frozen=True)
class _Place:
    """What stands around a statement."""

    above: tuple[Stmt, ...] = ()
    facts: tuple[Expr, ...] = ()
    buffers: frozenset[Buffer] = frozenset()

    @property
    def loops(self) -> list[For]:
        return [s for s in self.above if isinstance(s, For)]


class _Verifier:
    def __init__(
        self, func: PrimFunc, finished: bool, facts: tuple[Expr, ...], bounds: bool
    ) -> None:
        self.func, self.finished, self.facts, self.bounds = func, finished, facts, bounds
        self.equal = _equalities(facts)
        self.unproved: dict[tuple[Buffer, tuple[Expr, ...]], set[int]] | None = None
        self.ranges: dict[Expr, tuple[Expr, Expr]] = {}
        self.ariths: dict[object, Arith] = {}
        self.patience = Patience(1000)  # an index that is not proved is clamped: no harm is done
        self.variables: set[str] = set()  # loops and dims met so far
        self.blocks: set[str] = set()
        self.buffers: set[str] = set()
        self.iterators: set[str] = set()
        inputs = func.params[: len(func.params) - func.results]
        self.read_only = frozenset(inputs)

    def fail(self, message: str, at: Node | None = None, hint: str = "") -> None:
        excerpt = script(self.func, at)
        raise VerifyError(message, self.func.locs, excerpt, hint, where=self.func.name)

    # ---- declarations ---------------------------------------------------------------------------
    def run(self) -> None:
        func = self.func
        for d in func.dims:
            self.declare(self.variables, d.name, "dim", None)
        if not 0 < func.results <= len(func.params):
            self.fail(f"{func.results} of {len(func.params)} parameters are results")
        for b in (*func.params, *func.buffers):
            self.buffer(b, None)
            wanted = Scope.PARAM if b in func.params else Scope.GLOBAL
            if b.scope is not wanted:
                self.fail(f"buffer {b.name} has scope {b.scope.value}, not {wanted.value}")
        for s in statements(func):
            if isinstance(s, Block):
                self.iterators.update(i.var.name for i in s.iters)
        declared = frozenset((*func.params, *func.buffers))
        for phase in func.phases:
            self.stmt(phase, _Place(facts=self.facts, buffers=declared))

    def declare(self, names: set[str], name: str, what: str, at: Node | None) -> None:
        if name in names:
            self.fail(f"{what} {name} is defined twice", at)
        names.add(name)

    def buffer(self, b: Buffer, at: Node | None) -> None:
        self.declare(self.buffers, b.name, "buffer", at)
        for n in b.shape:
            for v in free_vars(n):
                if v not in self.func.dims:
                    self.fail(f"the shape of buffer {b.name} needs {v}, which is no dim", at)
            self.index_type(n, f"the shape of buffer {b.name}", at)
        if b.layout is not None and b.layout.rank != len(b.shape):
            self.fail(f"buffer {b.name} has {len(b.shape)} axes, its layout {b.layout.rank}", at)
        if b.scope is Scope.REGISTER and any(const_int(n) is None for n in b.shape):
            self.fail(f"register buffer {b.name} has no constant shape", at)

    # ---- statements -----------------------------------------------------------------------------
    def stmt(self, s: Stmt, p: _Place) -> None:
        inside = dataclasses.replace(p, above=(*p.above, s))
        if isinstance(s, For):
            self.loop(s, p)
            self.ranges[s.var] = (ZERO, s.extent - 1)
            if const_int(s.extent) is None and self.arith((), {}).prove(s.extent > ZERO) is None:
                inside = dataclasses.replace(inside, facts=(*p.facts, s.extent > ZERO))
            if const_int(s.extent) != 0:  # the main part of a cut that is all tail never runs
                self.stmt(s.body, inside)
        elif isinstance(s, Seq):
            for x in s.stmts:
                self.stmt(x, inside)
        elif isinstance(s, If):
            self.scope(s.cond, p, (), "the condition", s)
            self.accesses_of(s.cond, p, {}, s)
            before = set(self.variables), set(self.blocks), set(self.buffers)
            self.stmt(s.then, dataclasses.replace(inside, facts=(*p.facts, s.cond)))
            if s.orelse is not None:
                after = self.variables, self.blocks, self.buffers
                self.variables, self.blocks, self.buffers = before
                negated = logical_not(s.cond)
                self.stmt(s.orelse, dataclasses.replace(inside, facts=(*p.facts, negated)))
                for mine, theirs in zip(
                    (self.variables, self.blocks, self.buffers), after, strict=True
                ):
                    mine.update(theirs)
        elif isinstance(s, Alloc):
            if s.buffer.scope not in (Scope.LOCAL, Scope.REGISTER):
                self.fail(f"{s.buffer.name} of scope {s.buffer.scope.value} is allocated here", s)
            self.buffer(s.buffer, s)
            self.stmt(s.body, dataclasses.replace(inside, buffers=p.buffers | {s.buffer}))
        elif isinstance(s, Block):
            self.block(s, p)
        elif isinstance(s, Prefetch):
            for e in (s.place, s.ahead):
                self.scope(e, p, (), "a prefetch", s)
            self.accesses_of(s.place, p, {}, s)
            self.index_type(s.ahead, "the distance of a prefetch", s)
        else:
            self.store(s, p, {}, s)

    def loop(self, s: For, p: _Place) -> None:
        self.declare(self.variables, s.var.name, "loop variable", s)
        if s.var.name in self.iterators:
            self.fail(f"{s.var} is a loop variable and a block iterator", s)
        self.scope(s.extent, p, (), f"the extent of loop {s.var}", s)
        self.accesses_of(s.extent, p, {}, s)
        self.index_type(s.extent, f"the extent of loop {s.var}", s)
        self.index_type(s.var, f"loop variable {s.var}", s)
        if s.kind in (VECTOR, UNROLL) and const_int(s.extent) is None:
            self.fail(f"{s.kind.value} loop {s.var} has the extent {s.extent}, no constant", s)
        if s.kind is VECTOR:
            below = [x for x in statements(s.body) if isinstance(x, For) and x.kind is not UNROLL]
            if below:
                self.fail(f"{below[0].kind.value} loop {below[0].var} stands inside a vector", s)
        if s.kind is PARALLEL:
            self.parallel(s, p)

    def parallel(self, s: For, p: _Place) -> None:
        """Every thread runs what stands above, so that may only be what all of them repeat. The
        statements of a recurrence are phases."""
        above = p.above
        if above and isinstance(above[0], For) and above[0].tag == SCAN:
            above = above[2:] if isinstance(above[0].body, Seq) else above[1:]
        for x in above:
            if isinstance(x, Seq | Alloc):
                what = "other statements" if isinstance(x, Seq) else f"a private {x.buffer.name}"
                self.fail(f"parallel loop {s.var} shares its phase with {what}", s)
            if not isinstance(x, For):
                continue
            if x.kind is not SERIAL:
                self.fail(f"parallel loop {s.var} stands inside the {x.kind.value} {x.var}", s)
            for b in statements(s.body):
                if not isinstance(b, Block):
                    continue
                choosing = [i.value for i in b.iters if not i.reduce]
                if any(x.var in free_vars(v) for v in choosing):
                    self.fail(
                        f"parallel loop {s.var} stands inside {x.var}, which is no reduction loop"
                        f" of block {b.name}",
                        s,
                    )

    # ---- blocks ---------------------------------------------------------------------------------
    def block(self, b: Block, p: _Place) -> None:
        self.declare(self.blocks, b.name, "block", b)
        own: dict[Expr, Expr] = {}
        ranges = dict(self.ranges)
        for i in b.iters:
            if i.var in own:
                self.fail(f"block {b.name} has two iterators {i.var}", b)
            if i.var.name in self.variables:
                self.fail(f"iterator {i.var} of block {b.name} shadows a variable", b)
            self.scope(i.value, p, (), f"the value of iterator {i.var}", b)
            self.scope(i.extent, p, (), f"the extent of iterator {i.var}", b)
            self.index_type(i.value, f"the value of iterator {i.var}", b)
            own[i.var] = i.value
            ranges[i.var] = (ZERO, i.extent - 1)
        self.scope(b.where, p, (), f"the condition of block {b.name}", b)
        if not b.where.dtype.is_bool:
            self.fail(f"the condition of block {b.name} is no bool: {b.where}", b)
        self.accesses_of(b.where, p, {}, b)
        self.combining(b)
        if self.arith((), self.ranges).prove(b.where) is False:
            return  # it never runs: the init of a tail that does not hold the first index
        inner = dataclasses.replace(p, facts=(*p.facts, *conjuncts(b.where)))
        arith = self.arith(inner.facts, self.ranges)
        for i in b.iters:
            if arith.prove(i.value >= ZERO) is not True:
                self.fail(f"block {b.name}: {i.var} = {i.value} is not known to be >= 0", b)
            if arith.prove(i.value < i.extent) is not True:
                self.fail(
                    f"block {b.name}: {i.var} = {i.value} is not known to be below {i.extent}", b
                )
        for store in (b.init, b.body):
            if store is not None:
                self.store(store, inner, own, b, ranges)

    def combining(self, b: Block) -> None:
        """Reduce iterators, init and body belong together."""
        reduce = {i.var for i in b.iters if i.reduce}
        at = frozenset().union(*[free_vars(i) for i in b.body.indices], frozenset())
        if reduce & at:
            self.fail(f"block {b.name} stores at a reduce iterator", b)
        reads_back = any(
            type(x) is Load and x.buffer is b.body.buffer and x.indices == b.body.indices
            for x in walk(b.body.value)
        )
        if reduce and not reads_back:
            self.fail(f"block {b.name} reduces but does not read back what it stores", b)
        if b.init is None:
            return
        if not reduce:
            self.fail(f"block {b.name} has an init but no reduce iterator", b)
        if b.init.buffer is not b.body.buffer or b.init.indices != b.body.indices:
            self.fail(f"block {b.name} does not initialise the element that it updates", b)
        if any(type(x) is Load and x.buffer is b.init.buffer for x in walk(b.init.value)):
            self.fail(f"the init of block {b.name} reads what it initialises", b)
        if reduce & free_vars(b.init.value):
            self.fail(f"the init of block {b.name} depends on a reduce iterator", b)

    def store(
        self,
        s: Store,
        p: _Place,
        own: dict[Expr, Expr],
        at: Node,
        ranges: dict[Expr, tuple[Expr, Expr]] | None = None,
    ) -> None:
        if s.buffer in self.read_only:
            self.fail(f"{s.buffer.name} is an input, stored to", at)
        if s.value.dtype is not s.buffer.dtype:
            self.fail(f"{s.value.dtype} is stored to {s.buffer.name} of {s.buffer.dtype}", at)
        for e in (*s.indices, s.value):
            self.scope(e, p, own, f"`{e}`", at)
            self.accesses_of(e, p, own, at, ranges)
        self.access((s.buffer, s.indices, (), "stores to"), p, own, at, ranges)

    # ---- accesses -------------------------------------------------------------------------------
    def accesses_of(
        self,
        e: Expr,
        p: _Place,
        own: dict[Expr, Expr],
        at: Node,
        ranges: dict[Expr, tuple[Expr, Expr]] | None = None,
    ) -> None:
        for a in _loads_under(e, (), set()):
            self.access(a, p, own, at, ranges)

    def access(
        self,
        a: Access,
        p: _Place,
        own: dict[Expr, Expr],
        at: Node,
        ranges: dict[Expr, tuple[Expr, Expr]] | None,
    ) -> None:
        """One load or store: a declared buffer, scalar int64 indices inside its memory."""
        buffer, indices, conditions, verb = a
        name = f"block {at.name}" if isinstance(at, Block) else "this"
        if buffer not in p.buffers:
            self.fail(f"{name} {verb} {buffer.name}, which is not declared around it", at)
        if len(indices) != len(buffer.shape):
            self.fail(
                f"{name} {verb} {buffer.name} at {len(indices)} indices,"
                f" it has {len(buffer.shape)}",
                at,
            )
        for axis, (i, room) in enumerate(zip(indices, buffer.padded_shape, strict=True)):
            self.index_type(i, f"the index `{i}` of {buffer.name}", at)
            if type(i) is Const and type(room) is Const and 0 <= i.value < room.value:
                continue
            if not self.bounds:
                continue
            bad = self.outside(i, room, conditions, p, own, ranges)
            if bad and self.unproved is not None:
                self.unproved.setdefault((buffer, indices), set()).add(axis)
            elif bad:
                why = f" where {' and '.join(map(str, conditions))}" if conditions else ""
                self.fail(f"{name} {verb} {buffer.name} at `{i}`, not known to be {bad}{why}", at)
        if self.finished and buffer.scope is Scope.REGISTER:
            self.register(a, p, own, at, name)

    def outside(
        self,
        i: Expr,
        room: Expr,
        conditions: tuple[Expr, ...],
        p: _Place,
        own: dict[Expr, Expr],
        ranges: dict[Expr, tuple[Expr, Expr]] | None,
    ) -> str:
        """ "" when 0 <= i < room is proved, else what could not be. Iterator ranges say it most
        simply; where they do not, the iterators' values and `where` may. A clamp is simplest
        without the conditions, under which it is none."""
        low = high = False
        for e, facts, known in self.attempts(i, conditions, own, ranges or self.ranges):
            facts = (*p.facts, *facts)
            if self.equal:
                e, room = self.same(e), self.same(room)
                facts = tuple(map(self.same, facts))
                known = {v: (self.same(lo), self.same(hi)) for v, (lo, hi) in known.items()}
            arith = self.arith(facts, known)
            low = low or arith.holds(e >= ZERO)
            high = high or arith.holds(e < room)
            if low and high:
                return ""
        choice = next((x for x in walk(i) if type(x) is Select), None)
        if choice is not None:  # each branch fits where it is chosen
            for branch, c in (choice.a, choice.cond), (choice.b, logical_not(choice.cond)):
                only: dict[Expr, Expr] = {choice: branch}
                e = rewrite(i, only.get)
                if bad := self.outside(e, room, (*conditions, *conjuncts(c)), p, own, ranges):
                    return bad
            return ""
        return f"below {room}" if low else ">= 0"

    def attempts(
        self,
        i: Expr,
        conditions: tuple[Expr, ...],
        own: dict[Expr, Expr],
        ranges: dict[Expr, tuple[Expr, Expr]],
    ) -> Iterator[tuple[Expr, tuple[Expr, ...], dict[Expr, tuple[Expr, Expr]]]]:
        """An index in several forms, each with what is known of it; usually the first will do."""
        yield i, conditions, ranges
        if own:
            values = tuple(substitute(c, own) for c in conditions)
            yield substitute(i, own), values, self.ranges
        if conditions:
            yield i, (), ranges
        rest = {
            x: (Var(f"rest.{k}"), x.b)
            for k, x in enumerate(dict.fromkeys(walk(i)))
            if type(x) is Binary and x.op == "mod" and type(x.b) is Const and x.b.value > 0
        }
        if rest:  # i % 4 times a size: all that counts is that it is at most 3 times the size
            known = {v: (ZERO, n - 1) for v, n in rest.values()}
            names: dict[Expr, Expr] = {x: v for x, (v, _) in rest.items()}
            yield rewrite(i, names.get), conditions, {**ranges, **known}

    def same(self, e: Expr) -> Expr:
        """`e` with one name for dimensions that are equal."""
        return rewrite(e, self.equal.get)

    def register(self, a: Access, p: _Place, own: dict[Expr, Expr], at: Node, name: str) -> None:
        repeated = {
            x.var for x in p.loops if x.kind in (UNROLL, VECTOR) or const_int(x.extent) == 1
        }
        arith = self.arith((), self.ranges)
        for i in a[1]:
            for v in free_vars(arith.simplify(substitute(i, own))):
                if v not in repeated:
                    self.fail(
                        f"{name} {a[3]} register buffer {a[0].name} at `{i}`,"
                        f" but loop {v} is neither unrolled nor a vector",
                        at,
                    )

    # ---- expressions ----------------------------------------------------------------------------
    def arith(self, facts: Iterable[Expr], ranges: dict[Expr, tuple[Expr, Expr]]) -> Arith:
        """What is known at a place. One for all accesses there: it remembers what it found out."""
        known = tuple(dict.fromkeys(c for f in facts for c in conjuncts(f)))
        key = known, tuple(ranges.items())
        if key not in self.ariths:
            self.ariths[key] = Arith(ranges, known, self.patience)
        return self.ariths[key]

    def scope(self, e: Expr, p: _Place, own: Iterable[Expr], what: str, at: Node | None) -> None:
        """Every variable of `e` is defined around it, and `e` holds nothing that is not TIR."""
        known = {*own, *self.func.dims, *(x.var for x in p.loops)}
        for v in sorted(free_vars(e), key=str):
            if v not in known:
                self.fail(f"{what} uses {v}, which is not defined here", at)
        if any(type(x) is Reduce for x in walk(e)):
            self.fail(f"{what} holds a reduction of a tensor expression", at)

    def index_type(self, e: Expr, what: str, at: Node | None) -> None:
        if e.dtype is not index:
            self.fail(f"{what} is {e.dtype}, not {index}", at)


def _equalities(facts: Sequence[Expr]) -> dict[Expr, Expr]:
    """What dimensions are equal to, where facts say so."""
    found: dict[Expr, Expr] = {}
    for fact in facts:
        for c in conjuncts(fact):
            if type(c) is not Binary or c.op != "eq":
                continue
            a, b = substitute(c.a, found), substitute(c.b, found)
            if not isinstance(a, Dim):
                a, b = b, a
            if not isinstance(a, Dim):
                continue
            if a in free_vars(b):  # n == min(512, n)
                found[b] = a
            else:
                found = {v: substitute(e, {a: b}) for v, e in found.items()} | {a: b}
    return found


def _loads_under(
    e: Expr, facts: tuple[Expr, ...], seen: set[tuple[Expr, tuple[Expr, ...]]]
) -> Iterator[Access]:
    """Every load in `e` with the conditions under which it is done (outer ones first)."""
    if (e, facts) in seen:
        return
    seen.add((e, facts))
    if type(e) is Select:
        yield from _loads_under(e.cond, facts, seen)
        yield from _loads_under(e.a, (*facts, *conjuncts(e.cond)), seen)
        yield from _loads_under(e.b, (*facts, *conjuncts(logical_not(e.cond))), seen)
        return
    if type(e) is Load:
        under = facts
        if e.mask is not None:
            yield from _loads_under(e.mask, facts, seen)
            under = (*facts, *conjuncts(e.mask))
        yield e.buffer, e.indices, under, "loads"
        for i in e.indices:
            yield from _loads_under(i, under, seen)
        return
    for c in e.children():
        yield from _loads_under(c, facts, seen)
