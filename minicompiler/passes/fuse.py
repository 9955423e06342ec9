"""Fusion: which operators become one kernel. Relay's algorithm, and one phase more.

    %0 = conv(%x, @w)                         %0 = fused_conv_relu(%x, @w) {
    %1 = relu(%0)                               %0 = conv(%p0, %p1)
    return %1                          ->       %1 = relu(%0)
                                                return %1
                                              }
Nodes merge into their post-dominator, so a group has one sink, all paths inside end there, and no
groups depend on each other in a circle. A refused merge leaves its reason in `Function.reasons`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ..ir.arith import Arith
from ..ir.equal import attrs_key, structural_key
from ..ir.expr import Expr, product
from ..ir.graph import (
    Apply,
    Constant,
    Function,
    Input,
    Item,
    Value,
    applies,
    layout_of,
    nested_functions,
    topological,
    type_of,
)
from ..ir.op import Kind
from ..ir.types import TensorType
from .kind import Reads, reads

MAX_GROUP = 64  # operators in one kernel: beyond it, compile time grows and nothing is gained
_DEFAULT_L2 = 1 << 20
_NAME_LENGTH = 60


def fuse(fn: Function, ctx: Any) -> Function:
    """Every Apply of an operator becomes part of exactly one fused Function."""
    nodes = [v for v in topological(fn.results) if isinstance(v, Apply)]
    if all(isinstance(v.op, Function) for v in nodes):
        return fn
    target = getattr(ctx, "target", None)
    partition = _Partition(fn, nodes, target.caches[1] if target is not None else _DEFAULT_L2)
    partition.run()
    return _build(fn, nodes, partition)


@dataclasses.dataclass
class _Group:
    """A set in the union-find forest; the fields are those of the root."""

    parent: int
    kind: Kind
    members: list[int]


class _Partition:
    """Nodes by topological number, their post-dominators, and the groups so far."""

    def __init__(self, fn: Function, nodes: list[Apply], l2_bytes: int) -> None:
        self.nodes = nodes
        self.row_limit = l2_bytes // 2
        self.number = {id(v): k for k, v in enumerate(nodes)}
        self.info: list[Reads] = _analysed(nodes)
        self.groups = [_Group(k, info.kind, [k]) for k, info in enumerate(self.info)]
        # consumers[n]: (consumer, argument position)
        self.consumers: list[list[tuple[int, int]]] = [[] for _ in nodes]
        for k, v in enumerate(nodes):
            for position, a in enumerate(v.args):
                source = _source(a)
                if source is not None:
                    self.consumers[self.number[id(source)]].append((k, position))
        self.returned = {self.number[id(s)] for r in fn.results if (s := _source(r)) is not None}
        self.refused: dict[int, str] = {}
        self.dominator: list[int | None] = [None] * len(nodes)
        self.edge_kind: list[Kind] = [Kind.OPAQUE] * len(nodes)
        self._dominators()

    # ---- post-dominators ------------------------------------------------------------------------
    def _dominators(self) -> None:
        """The post-dominator of each node, and the largest edge kind on the way to it."""
        depth = [1] * len(self.nodes)
        for n in range(len(self.nodes) - 1, -1, -1):
            if n in self.returned or not self.consumers[n]:
                continue
            kind = Kind.ELEMWISE
            best: int | None = self.consumers[n][0][0]
            for c, _ in self.consumers[n]:
                kind = max(kind, self.info[c].kind)
                best, passed = self._common(best, c, depth)
                kind = max(kind, passed)
            self.dominator[n], self.edge_kind[n] = best, kind
            depth[n] = 1 if best is None else depth[best] + 1

    def _common(self, a: int | None, b: int | None, depth: list[int]) -> tuple[int | None, Kind]:
        kind = Kind.ELEMWISE
        while a != b:
            if a is None or b is None:
                return None, Kind.OPAQUE
            if depth[a] >= depth[b]:
                kind = max(kind, self.edge_kind[a])
                up_a = self.dominator[a]
                if depth[a] == depth[b]:
                    kind = max(kind, self.edge_kind[b])
                    b = self.dominator[b]
                a = up_a
            else:
                kind = max(kind, self.edge_kind[b])
                b = self.dominator[b]
        return a, kind

    # ---- phases ---------------------------------------------------------------------------------
    def run(self) -> None:
        for phase in (self._finish_contractions, self._merge_injective, self._merge_rows):
            for n in range(len(self.nodes)):
                sink = self.dominator[n]
                if sink is None or self.find(n) == self.find(sink):
                    continue
                if Kind.OPAQUE in (self.info[n].kind, self.info[sink].kind):
                    self.refused[n] = "it has no tensor expression to fuse with"
                    continue
                reason = phase(n, sink)
                if reason is None:
                    self._merge(n, sink)
                elif reason:
                    self.refused[n] = reason

    def _finish_contractions(self, n: int, sink: int) -> str | None:
        """Phase 0. A reason, "" for "not now", None to merge."""
        kind, edge = self.root(n).kind, self.edge_kind[n]
        if kind is Kind.OUT_FUSABLE:
            if edge > Kind.BROADCAST:
                return f"a contraction takes only elementwise work onto its output, not {edge.name}"
            shape = _shapes(self.nodes[n])
            if any(_shapes(self.nodes[k]) != shape for k in (*self.between(n, sink), sink)):
                return "the contraction's result would be repeated by a broadcast"
            if layout_of(self.nodes[n]) not in (None, layout_of(self.nodes[sink])):
                return "the contraction's result would be stored in another layout"
            return self._path(n, sink, lambda k, _: k <= Kind.BROADCAST)
        if kind > Kind.BROADCAST:
            return ""
        return self._elementwise(n, sink)

    def _elementwise(self, n: int, sink: int) -> str | None:
        """What is at most BROADCAST goes into what reads it once, or into a reduction."""
        if self.edge_kind[n] not in (Kind.ELEMWISE, Kind.BROADCAST, Kind.INJECTIVE, Kind.REDUCTION):
            return (
                "the operands of a contraction are read many times, so they are computed before it"
            )
        return self._path(
            n, sink, lambda k, last: k <= Kind.INJECTIVE or (last and k <= Kind.OUT_FUSABLE)
        )

    def _merge_injective(self, n: int, sink: int) -> str | None:
        """Phase 1: after the contractions have taken what follows them."""
        kind = self.root(n).kind
        if kind <= Kind.BROADCAST:
            return self._elementwise(n, sink)
        if kind is not Kind.INJECTIVE:
            return ""
        return self._path(n, sink, lambda k, _: k <= Kind.INJECTIVE)

    def _merge_rows(self, n: int, sink: int) -> str | None:
        """Phase 2: reductions and what uses them, when each row is complete in cache."""
        members = self._members(self._roots(n, sink))
        kinds = [self.info[k].kind for k in members]
        if max(kinds) > Kind.REDUCTION:
            # The reason of an earlier phase says more.
            return self.refused.get(n, "one of the groups holds a contraction")
        if self.edge_kind[n] > Kind.REDUCTION:
            return "a contraction lies on the way"
        inside = set(members)
        rows = min(
            (
                self.info[c].prefixes[position]
                for k in members
                for c, position in self.consumers[k]
                if c in inside
            ),
            default=0,
        )
        if rows == 0:
            return "the reduction runs over the outermost axis: there are no independent rows"
        leading = _shapes(self.nodes[sink])[0][:rows]
        if any(shape[:rows] != leading for k in members for shape in _shapes(self.nodes[k])):
            return "the operators do not have the same rows"
        size = self._row_bytes(members, rows)
        if size is None:
            return "the size of a row has no upper bound"
        if size > self.row_limit:
            return (
                f"a row of {size} bytes does not fit half of the L2 cache ({self.row_limit} bytes)"
            )
        return self._path(n, sink, lambda k, _: k <= Kind.REDUCTION)

    def _row_bytes(self, members: list[int], rows: int) -> int | None:
        """The largest size of one row of everything the group computes and reads."""
        total = 0
        arith = Arith()
        types = {id(v): v for k in members for v in self.nodes[k].args if v is not None}
        shapes = [type_of(v) for v in types.values()]
        shapes += [t for k in members for t in _types(self.nodes[k])]
        for t in shapes:
            high = arith.interval(product(t.shape[rows:]))[1]
            if high is None:
                return None
            total += high * t.dtype.bytes
        return total

    # ---- groups ---------------------------------------------------------------------------------
    def find(self, n: int) -> int:
        while self.groups[n].parent != n:
            self.groups[n].parent = self.groups[self.groups[n].parent].parent
            n = self.groups[n].parent
        return n

    def root(self, n: int) -> _Group:
        return self.groups[self.find(n)]

    def between(self, n: int, sink: int) -> list[int]:
        """The nodes on the paths from n to its post-dominator, both excluded."""
        seen: set[int] = set()
        stack = [c for c, _ in self.consumers[n]]
        while stack:
            k = stack.pop()
            if k != sink and k not in seen:
                seen.add(k)
                stack.extend(c for c, _ in self.consumers[k])
        return sorted(seen)

    def _roots(self, n: int, sink: int) -> set[int]:
        return {self.find(k) for k in (n, *self.between(n, sink), sink)}

    def _path(self, n: int, sink: int, allowed: Callable[[Kind, bool], bool]) -> str | None:
        """None when the groups of all nodes on the way satisfy the rule (kind, is the sink)."""
        roots = self._roots(n, sink)
        for k in (*self.between(n, sink), sink):
            if not allowed(self.root(k).kind, k == sink):
                if self.root(k).kind is Kind.OUT_FUSABLE:
                    return f"`{self.nodes[k].op.name}` is fused with another contraction"
                kind = self.root(k).kind.name
                return f"`{self.nodes[k].op.name}` on the way is in a group of kind {kind}"
        if sum(self.info[k].kind is Kind.OUT_FUSABLE for k in self._members(roots)) > 1:
            return "a kernel holds at most one contraction"
        if sum(len(self.groups[r].members) for r in roots) > MAX_GROUP:
            return f"a kernel holds at most {MAX_GROUP} operators"
        return None

    def _members(self, roots: set[int]) -> list[int]:
        return sorted(k for r in roots for k in self.groups[r].members)

    def _merge(self, n: int, sink: int) -> None:
        into = self.find(sink)
        for r in self._roots(n, sink) - {into}:
            self.groups[r].parent = into
            self.groups[into].members += self.groups[r].members
            self.groups[into].kind = max(self.groups[into].kind, self.groups[r].kind)

    def reasons(self) -> tuple[str, ...]:
        """One sentence per node that stayed apart from its post-dominator."""
        found = []
        for n, reason in self.refused.items():
            sink = self.dominator[n]
            assert sink is not None
            if self.find(n) != self.find(sink):
                found.append(f"{_title(self.nodes[n])} with {_title(self.nodes[sink])}: {reason}")
        return tuple(found)


def _analysed(nodes: list[Apply]) -> list[Reads]:
    """`reads` of each node; nodes alike in operator, attributes and argument types share it."""
    known: dict[tuple[Any, ...], Reads] = {}
    found = []
    for v in nodes:
        types = tuple(None if a is None else type_of(a) for a in v.args)
        key = (v.op, attrs_key(v.attrs), types)
        if key not in known:
            known[key] = reads(v)
        found.append(known[key])
    return found


# ---- groups to functions ------------------------------------------------------------------------
def _build(fn: Function, nodes: list[Apply], partition: _Partition) -> Function:
    members: dict[int, list[Apply]] = {}
    for k, v in enumerate(nodes):
        members.setdefault(partition.find(k), []).append(v)
    last = {id(group[-1]): group for group in members.values()}
    outside = _used_outside(fn, nodes, partition)
    new: dict[int, Value] = {}  # old value -> the value that replaces it
    shared: dict[str, Function] = {}
    names: set[str] = set()

    def current(v: Value) -> Value:
        if id(v) not in new and isinstance(v, Item):
            source = current(v.tuple)
            assert isinstance(source, Apply)
            new[id(v)] = Item(source, v.index)
        return new.get(id(v), v)

    for v in nodes:
        group = last.get(id(v))
        if group is None:
            continue
        if isinstance(v.op, Function) or nested_functions(v.attrs):
            # A kernel already, or control flow, whose functions are fused on their own.
            new[id(v)] = v.with_(args=tuple(None if a is None else current(a) for a in v.args))
            names.add(v.op.name)
            continue
        results = [r for member in group for r in outside[id(member)]]
        inner, args = _function(group, results)
        key = structural_key(inner)
        if key in shared:
            inner = shared[key]
        else:
            name = _name(group, names)
            inner = shared[key] = inner.with_(name=name)
        call = _call(inner, tuple(current(a) for a in args), group, results)
        if isinstance(call.type, TensorType):
            new[id(results[0])] = call
        else:
            for k, r in enumerate(results):
                new[id(r)] = Item(call, k)
    done = tuple(current(r) for r in fn.results)
    return fn.with_(results=done, reasons=(*fn.reasons, *partition.reasons()))


def _used_outside(
    fn: Function, nodes: list[Apply], partition: _Partition
) -> dict[int, list[Value]]:
    """Per node the results (the node itself, or its Items) that other groups or the caller read."""
    group = {id(v): partition.find(k) for k, v in enumerate(nodes)}
    found: dict[int, list[Value]] = {id(v): [] for v in nodes}
    seen: set[int] = set()

    def use(a: Value | None, reader: int | None) -> None:
        source = _source(a)
        if (
            a is not None
            and source is not None
            and group[id(source)] != reader
            and id(a) not in seen
        ):
            seen.add(id(a))
            found[id(source)].append(a)

    for v in nodes:
        for a in v.args:
            use(a, group[id(v)])
    for r in fn.results:
        use(r, None)
    for results in found.values():
        results.sort(key=lambda r: r.index if isinstance(r, Item) else 0)
    return found


def _function(group: list[Apply], results: list[Value]) -> tuple[Function, list[Value]]:
    """The group as a Function, and the outside values for its parameters, in order of use."""
    inside = {id(v) for v in group}
    params: dict[int, Input] = {}
    args: list[Value] = []
    new: dict[int, Value] = {}

    def inner(a: Value) -> Value:
        if id(a) in new:
            return new[id(a)]
        source = _source(a)
        if source is not None and id(source) in inside:
            assert isinstance(a, Item)
            tuple_value = new[id(a.tuple)]
            assert isinstance(tuple_value, Apply)
            made: Value = Item(tuple_value, a.index)
        elif isinstance(a, Constant) and a.data.size == 1:  # becomes a literal of the kernel
            made = a
        else:
            made = params[id(a)] = Input(f"p{len(params)}", type_of(a), layout_of(a))
            args.append(a)
        new[id(a)] = made
        return made

    for v in group:
        new[id(v)] = v.with_(args=tuple(None if a is None else inner(a) for a in v.args))
    made = Function("fused", tuple(params.values()), tuple(inner(r) for r in results), fused=True)
    return made, args


def _call(op: Function, args: tuple[Value, ...], group: list[Apply], results: list[Value]) -> Apply:
    locs = tuple(dict.fromkeys(loc for v in group for loc in v.locs))
    types = tuple(type_of(r) for r in results)
    layouts = tuple(layout_of(r) for r in results)
    contents = tuple(
        r.contents[0]
        if isinstance(r, Apply)
        else r.tuple.contents[r.index]
        if isinstance(r, Item)
        else None
        for r in results
    )
    first = _source(results[0])
    return Apply(
        op,
        args,
        None,
        types[0] if len(types) == 1 else types,
        locs,
        contents,
        layouts,
        first.name if first is not None else "",
    )


def _name(group: list[Apply], taken: set[str]) -> str:
    """`fused_conv_add_relu`, cut when long, numbered when taken by another structure."""
    parts = [v.op.name for v in group]
    shown = list(parts)
    while len("_".join(shown)) > _NAME_LENGTH:
        shown.pop()
    rest = f"_and_{len(parts) - len(shown)}_more" if len(shown) < len(parts) else ""
    stem = "fused_" + "_".join(shown) + rest
    name, k = stem, 1
    while name in taken:
        name, k = f"{stem}_{k}", k + 1
    taken.add(name)
    return name


# ---- small views --------------------------------------------------------------------------------
def _source(a: Value | None) -> Apply | None:
    """The Apply that computes a value, None for Inputs and Constants."""
    if isinstance(a, Item):
        return a.tuple
    return a if isinstance(a, Apply) else None


def _types(v: Apply) -> tuple[TensorType, ...]:
    return v.type if isinstance(v.type, tuple) else (v.type,)


def _shapes(v: Apply) -> list[tuple[Expr, ...]]:
    return [t.shape for t in _types(v)]


def _title(v: Apply) -> str:
    place = v.locs[0].name if v.locs else v.name
    return f'{v.op.name} "{place}"' if place else v.op.name


def decisions(fn: Function) -> dict[str, Any]:
    """What was fused, as JSON-able data: the calls of each of "kernels", each with its source
    nodes, and what was "refused", with the reason."""
    kernels: dict[str, list[str]] = {}
    for v in applies(fn):
        if isinstance(v.op, Function):
            nodes = [f'{loc.op} "{loc.name}"' for loc in v.locs] or [_title(v)]
            kernels.setdefault(v.op.name, []).append(" + ".join(nodes))
    return {"kernels": kernels, "refused": list(fn.reasons)}


def fused_functions(fn: Function) -> list[Function]:
    """The distinct fused Functions in order of first use."""
    found: dict[int, Function] = {}
    for v in topological(fn.results):
        if isinstance(v, Apply) and isinstance(v.op, Function):
            found.setdefault(id(v.op), v.op)
    return list(found.values())
