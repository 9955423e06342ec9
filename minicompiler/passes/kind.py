"""How an operator reads its arguments, derived from its tensor expressions and never from its name.

In: an Apply. Out, from index analysis of `op.computes[0]`:
    kind_of(relu)     ELEMWISE        out[i, j] = f(x[i, j])
    kind_of(softmax)  REDUCTION       a stage sums over its own axis
    kind_of(matmul)   OUT_FUSABLE     operands of a sum depend on different axes: they are reused
    reads(softmax)    Reads(kind, prefixes=(2,)): of x[b, s, d], result [b, s, :] needs x[b, s, :]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .. import te
from ..ir.arith import Arith
from ..ir.expr import ONE, ZERO, Const, Expr, Load, Reduce, Select, Var, free_vars, loads
from ..ir.graph import Apply, Function, type_of
from ..ir.op import Kind

ALL = 1 << 20  # a prefix that no rank reaches: the result does not read the argument at all


@dataclasses.dataclass(frozen=True)
class Reads:
    """What fusion needs to know of a node.

    Attributes:
        kind: the fusion kind.
        prefixes: per argument, how many leading axes of the result index it in the same way
            (`ALL` when it is not read).
    """

    kind: Kind
    prefixes: tuple[int, ...]


def kind_of(v: Apply) -> Kind:
    """The fusion kind of a node."""
    return reads(v).kind


def reads(v: Apply) -> Reads:
    """The analysis of a node. Fused functions and operators without a compute are OPAQUE."""
    if isinstance(v.op, Function) or v.op.kind is Kind.OPAQUE or not v.op.computes:
        return Reads(Kind.OPAQUE, (0,) * len(v.args))
    placeholders, results = expressions(v)
    if any(t.source is not None for t in te.closure(results)):
        return Reads(Kind.OPAQUE, (0,) * len(v.args))
    kind: Kind = Kind.ELEMWISE if v.op.kind is None else v.op.kind
    prefix: dict[te.Tensor, dict[te.Tensor, int]] = {}
    for t in te.closure(results):
        if t.body is None:
            prefix[t] = {t: ALL}
            continue
        stage = _Stage(t)
        kind = max(kind, stage.kind())
        found: dict[te.Tensor, int] = {}
        for load in stage.loads:
            same = stage.common_prefix(load)
            for source, inner in prefix[load.buffer].items():
                found[source] = min(found.get(source, ALL), inner, same)
        prefix[t] = found
    per_argument = []
    for p in placeholders:
        known = [prefix[r][p] for r in results if p is not None and p in prefix[r]]
        per_argument.append(min(known, default=ALL))
    return Reads(kind, tuple(per_argument))


def expressions(v: Apply) -> tuple[list[te.Tensor | None], tuple[te.Tensor, ...]]:
    """The node's meaning: a placeholder per argument (None: absent), a tensor per result."""
    assert not isinstance(v.op, Function)
    placeholders: list[te.Tensor | None] = []
    for k, a in enumerate(v.args):
        if a is None:
            placeholders.append(None)
        else:
            t = type_of(a)
            placeholders.append(te.placeholder(f"p{k}", t.shape, t.dtype))
    made = v.op.computes[0].build(*placeholders, v.attrs)
    return placeholders, made if isinstance(made, tuple) else (made,)


class _Stage:
    """One tensor expression: its loads, with indices in canonical form."""

    def __init__(self, t: te.Tensor) -> None:
        assert t.body is not None
        self.t = t
        self.reduce = t.body if type(t.body) is Reduce else None
        self.body: Expr = t.body if self.reduce is None else self.reduce.body
        self.loads = loads(self.body)
        ranges: dict[Expr, tuple[Expr, Expr]] = {
            a: (ZERO, s - 1) for a, s in zip(t.axes, t.shape, strict=True)
        }
        if self.reduce is not None:
            ranges.update(
                (a, (ZERO, s - 1))
                for a, s in zip(self.reduce.axes, self.reduce.extents, strict=True)
            )
        self._arith = Arith(ranges)

    def kind(self) -> Kind:
        if self.reduce is not None:
            return Kind.OUT_FUSABLE if self._reuses() else Kind.REDUCTION
        if _most_reads(self.body) > 1:
            return Kind.REDUCTION  # a window written out: an input element has several readers
        return max((self._access(load) for load in self.loads), default=Kind.ELEMWISE)

    def _reuses(self) -> bool:
        """A contraction: two reduced operands depend on different axes of the result."""
        assert self.reduce is not None
        reduced, axes = frozenset(self.reduce.axes), frozenset(self.t.axes)
        seen = [frozenset().union(*map(free_vars, load.indices)) for load in self.loads]
        return len({variables & axes for variables in seen if variables & reduced}) > 1

    def _access(self, load: Load) -> Kind:
        indices = self._indices(load)
        axes = self.t.axes
        if len(indices) == len(axes) and self.common_prefix(load) == len(axes):
            return Kind.ELEMWISE
        last = -1
        for i in indices:
            if i is ZERO:
                continue
            if i not in axes or axes.index(i) <= last:
                return Kind.INJECTIVE
            last = axes.index(i)
        return Kind.BROADCAST

    def common_prefix(self, load: Load) -> int:
        """How many leading indices are the result's own, position by position."""
        count = 0
        for i, axis, extent in zip(self._indices(load), self.t.axes, self.t.shape, strict=False):
            if i is not axis and not (i is ZERO and extent is ONE):
                break
            count += 1
        return count

    def _indices(self, load: Load) -> Sequence[Expr]:
        return [i if type(i) in (Var, Const) else self._arith.simplify(i) for i in load.indices]


def _most_reads(e: Expr) -> int:
    """The largest number of distinct elements of one buffer that a single evaluation reads."""
    memo: dict[Expr, Elements] = {}

    def go(x: Expr) -> Elements:
        done = memo.get(x)
        if done is None:
            parts = [go(c) for c in x.children()]
            if type(x) is Select:  # only one side is read
                cond, a, b = parts
                larger = {
                    k: max(a.get(k, _NONE), b.get(k, _NONE), key=len) for k in a.keys() | b.keys()
                }
                parts = [cond, larger]
            done = {x.buffer: frozenset((x,))} if type(x) is Load else {}
            for part in parts:
                for buffer, found in part.items():
                    done[buffer] = done.get(buffer, _NONE) | found
            memo[x] = done
        return done

    return max((len(found) for found in go(e).values()), default=0)


Elements = dict[object, frozenset[Expr]]
_NONE: frozenset[Expr] = frozenset()
