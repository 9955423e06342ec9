"""All values of a graph in numpy, in the graph's own types or in float64.

values = Values(graph, {"x": x})      values[v] of every node and Item
exact = Exact(graph, {"x": x})        the same with every float a float64
exact.spread(v)                       how far rounding in the graph's types may move a value

Fused functions are evaluated as one node, with their operators' references inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minicompiler.errors import RunError
from minicompiler.ir.expr import Dim
from minicompiler.ir.graph import (
    Apply,
    Constant,
    Function,
    Item,
    Value,
    applies,
    nested_functions,
    topological,
)
from minicompiler.ir.op import Counted
from minicompiler.ir.types import TensorType
from minicompiler.ops.evaluate import bind_attrs
from minicompiler.tolerance import epsilon

Array = np.ndarray
_RUNS = 2


class Values:
    """The arrays of a graph's nodes for some inputs, by node. `dims`: sizes of its dimensions."""

    def __init__(
        self,
        fn: Function,
        feeds: Mapping[str, Array],
        wide: bool = False,
        dims: Mapping[str, int] | None = None,
        noise: np.random.Generator | None = None,
    ) -> None:
        """dims: sizes that the inputs do not tell. noise: disturbs each element of each value by
        about as much as rounding it to its type would. Raises RunError where an input is missing.
        """
        missing = [p.name for p in fn.params if p.name not in feeds]
        if missing:
            raise RunError(f"{fn.name}: no value was given for {', '.join(missing)}")
        self.wide, self.noise = wide, noise
        self.dims = dict(dims or {})
        self._found: dict[int, Any] = {}
        self._kept = fn  # ids of its nodes are the keys
        self.results = self._run(fn, [np.asarray(feeds[p.name]) for p in fn.params], self._found)

    def __getitem__(self, v: Value) -> Array:
        """The array of a node with one result."""
        if isinstance(v, Constant):
            return self._float(v.data, v.type)
        if isinstance(v, Item):
            array: Array = self._found[id(v.tuple)][v.index]
            return array
        array = self._found[id(v)]
        return array

    def _float(self, a: Any, t: TensorType) -> Array:
        a = np.asarray(a)
        if not self.wide or not t.dtype.is_float:
            return a
        a = a.astype(np.float64)
        if self.noise is not None:
            a = a * (1 + epsilon(t.dtype.name) * self.noise.standard_normal(a.shape))
        return a

    def _run(self, fn: Function, arrays: Sequence[Array], found: dict[int, Any]) -> list[Array]:
        for p, a in zip(fn.params, arrays, strict=True):
            for size, got in zip(p.type.shape, a.shape, strict=True):
                if isinstance(size, Dim):
                    self.dims.setdefault(size.name, got)
            found[id(p)] = self._float(a, p.type)
        # A node may use a counted size without reading what tells it, so these come first.
        counted = [v for v in applies(fn) if _counts(v)]
        for v in topological((*counted, *fn.results)):
            if isinstance(v, Constant):
                found[id(v)] = self._float(v.data, v.type)
            elif isinstance(v, Item):
                found[id(v)] = found[id(v.tuple)][v.index]
            elif isinstance(v, Apply):
                found[id(v)] = self._apply(v, [None if a is None else found[id(a)] for a in v.args])
        return [found[id(r)] for r in fn.results]

    def _apply(self, v: Apply, args: list[Array | None]) -> Any:
        if isinstance(v.op, Function):
            results = self._run(v.op, [a for a in args if a is not None], {})
            return results[0] if len(results) == 1 else tuple(results)
        if isinstance(v.attrs, Counted) and isinstance(v.attrs.dim, Dim):
            count = args[-1]
            assert count is not None
            self.dims[v.attrs.dim.name] = max(int(count.reshape(-1)[0]), v.attrs.dim.lo)
        more: list[Any] = []
        if nested_functions(v.attrs):
            more.append(lambda f, arrays: self._run(f, arrays, {}))
        with np.errstate(all="ignore"):
            got = v.op.reference(*args, bind_attrs(v.attrs, self.dims), *more)
        if isinstance(v.type, tuple):
            return tuple(self._float(a, t) for a, t in zip(got, v.type, strict=True))
        return self._float(got, v.type)


def _counts(v: Apply) -> bool:
    """Whether a node, or one that is fused into it, tells a size."""
    inner = applies(v.op) if isinstance(v.op, Function) else [v]
    return any(isinstance(x.attrs, Counted) for x in inner)


class Exact:
    """The float64 values of a graph, and how far rounding may move them.

    The spread is what Monte Carlo arithmetic shows (D. S. Parker, 1997): the graph is evaluated
    again with every value disturbed by a random rounding error of its type.
    """

    def __init__(
        self, fn: Function, feeds: Mapping[str, Array], dims: Mapping[str, int] | None = None
    ) -> None:
        self._arguments = fn, feeds, True, dims
        self._values = Values(*self._arguments)
        self._disturbed: list[Values] = []
        self.results, self.dims = self._values.results, self._values.dims

    def __getitem__(self, v: Value) -> Array:
        return self._values[v]

    def spread(self, v: Value) -> float:
        """The largest distance of an element of a value from its float64 value."""
        return max(_distance(d[v], self[v]) for d in self._runs())

    def result_spread(self, k: int) -> float:
        """The same of result k."""
        return max(_distance(d.results[k], self.results[k]) for d in self._runs())

    def _runs(self) -> list[Values]:
        if not self._disturbed:
            draws = [np.random.default_rng(seed) for seed in range(_RUNS)]
            self._disturbed = [Values(*self._arguments, noise) for noise in draws]
        return self._disturbed


def _distance(a: Array, b: Array) -> float:
    if a.shape != b.shape or a.dtype.kind != "f":
        return 0.0
    apart = np.abs(a - b)
    return float(apart[np.isfinite(apart)].max(initial=0.0))
