"""What checked mode knows of every kernel call: its tensors, and its meaning node by node.

    checks_of(fn, calls) -> one runtime.checked.CheckedCall per call of the plan

The meaning is each operator's numpy reference, so a node that makes NaN, or reads outside of its
data, can be named although a kernel holds many nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .errors import InternalError
from .ir.expr import Dim, Expr, Load, walk
from .ir.graph import Apply, Constant, Function, Item, Value, layout_of, topological, type_of
from .ir.op import Counted
from .ir.tir import PrimFunc, stores
from .lower.memory import KernelCall, to_size
from .lower.to_tir import lower_function
from .ops.evaluate import bind_attrs
from .runtime.checked import CheckedCall, Tensor

Replay = Callable[
    [Sequence[np.ndarray], Mapping[str, int]],
    Iterator[tuple[str, Sequence[np.ndarray], Sequence[np.ndarray]]],
]


def checks_of(fn: Function, calls: Sequence[KernelCall]) -> list[CheckedCall]:
    """The checks of an optimised graph, in the order of its kernels' calls."""
    nodes = [v for v in topological(fn.results) if isinstance(v, Apply)]
    return [_check(v, call) for v, call in zip(nodes, calls, strict=True)]


def _check(v: Apply, call: KernelCall) -> CheckedCall:
    assert isinstance(v.op, Function)
    tensors = [None if isinstance(a, np.ndarray) else _tensor(a) for a in call.args]
    sources: list[int | np.ndarray] = []
    for a in v.args:
        at = next((k for k, b in enumerate(call.args) if b is a), None)
        if at is not None:
            sources.append(at)
        elif isinstance(a, Constant):
            sources.append(a.data)
        else:
            raise InternalError(f"{call.kernel} does not take its argument {a}", v.locs)
    constant = tuple(isinstance(a, Constant) for a in v.args)
    return CheckedCall(
        (*tensors, *map(_tensor, call.results)),
        len(call.results),
        tuple(sources),
        _indexed(lower_function(v.op, constant)),
        _replay(v.op),
    )


def _tensor(v: Value) -> Tensor:
    t, layout = type_of(v), layout_of(v)
    parts = None if layout is None else layout.splits()
    return Tensor(t.dtype.name, tuple(map(to_size, t.shape)), parts)


def _indexed(func: PrimFunc) -> bool:
    """Whether an index depends on data."""
    indices: list[Expr] = []
    for s in stores(func):
        indices += s.indices
        for e in (s.value, *s.indices):
            indices += [i for x in walk(e) if type(x) is Load for i in x.indices]
    return any(type(x) is Load for i in indices for x in walk(i))


def _replay(fn: Function) -> Replay:
    def steps(
        arrays: Sequence[np.ndarray], given: Mapping[str, int]
    ) -> Iterator[tuple[str, Sequence[np.ndarray], Sequence[np.ndarray]]]:
        dims = dict(given)
        values: dict[int, Any] = {id(p): a for p, a in zip(fn.params, arrays, strict=True)}
        for v in topological(fn.results):
            if isinstance(v, Constant):
                values[id(v)] = v.data
            elif isinstance(v, Item):
                values[id(v)] = values[id(v.tuple)][v.index]
            elif isinstance(v, Apply):
                assert not isinstance(v.op, Function)
                node = str(v.locs[0]) if v.locs else v.op.name
                args = [None if a is None else values[id(a)] for a in v.args]
                if isinstance(v.attrs, Counted) and isinstance(v.attrs.dim, Dim):
                    dims[v.attrs.dim.name] = int(values[id(v.args[-1])])
                try:
                    with np.errstate(all="ignore"):
                        made = v.op.reference(*args, bind_attrs(v.attrs, dims))
                except IndexError as error:
                    raise IndexError(f"{node}: {error}") from error
                values[id(v)] = made
                results = made if isinstance(made, tuple) else (made,)
                yield node, [a for a in args if a is not None], [np.asarray(r) for r in results]

    return steps
