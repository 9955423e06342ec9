"""Random graphs of real operators, drawn by Hypothesis, for the laws that hold for every graph.

@given(graphs()) def test(fn): ...        one float32 input x[b, c, h, w] of constant size
feeds(fn)                                 values for its inputs
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from minicompiler.ir.expr import Const, Dim, Expr, const_int
from minicompiler.ir.graph import (
    Constant,
    Function,
    Input,
    Item,
    Value,
    apply,
    operands,
    type_of,
)
from minicompiler.ir.types import Loc, TensorType, float32
from minicompiler.ops import activations as act
from minicompiler.ops import conv as cv
from minicompiler.ops import elementwise as el
from minicompiler.ops import linalg, norm
from minicompiler.ops import pieces as pc
from minicompiler.ops import pool as pl
from minicompiler.ops import reduce as red
from minicompiler.ops import shape as sh

UNARY = (act.relu, el.tanh, el.neg, el.abs_, el.identity, el.square, act.gelu, el.sigmoid)
BINARY = (el.add, el.sub, el.mul, el.maximum_)


class Builder:
    """Grows a graph value by value."""

    def __init__(self, draw: Callable[[Any], Any], symbolic: bool) -> None:
        self.draw = draw
        batch: Expr = Dim("batch", 1, 8) if symbolic else Const(self.number(1, 2))
        sizes = (self.number(1, 2) * 8, self.number(1, 4), self.number(1, 4))
        self.x = Input("x", TensorType((batch, *map(Const, sizes)), float32))
        self.values: list[Value] = [self.x]
        self.count = 0

    def number(self, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high)))

    def pick(self, options: Any) -> Any:
        return options[self.number(0, len(options) - 1)]

    def constant(self, *shape: int, low: float = -1, high: float = 1) -> Constant:
        rng = np.random.default_rng(self.number(0, 1 << 16))
        self.count += 1
        return Constant(rng.uniform(low, high, shape).astype(np.float32), f"c{self.count}")

    def add(self, op: Any, *args: Value | None, attrs: Any = None) -> Value:
        self.count += 1
        loc = Loc(f"n{self.count}", "random", self.count, op.name)
        made = apply(op, *args, attrs=attrs, locs=(loc,), name=f"v{self.count}")
        if isinstance(made.type, TensorType):
            self.values.append(made)
        else:
            self.values.extend(Item(made, k) for k in range(len(made.type)))
        return self.values[-1]

    def step(self) -> None:
        x = self.pick(self.values[-4:])  # recent ones, so that chains grow
        kind = self.pick(
            "unary unary binary binary scale scalar conv conv norm pool reduce softmax moved view "
            "concat split product layer_norm clip constants".split()
        )
        getattr(self, f"_{kind}")(x, type_of(x))

    def _unary(self, x: Value, t: TensorType) -> None:
        self.add(self.pick(UNARY), x)

    def _binary(self, x: Value, t: TensorType) -> None:
        same = [v for v in self.values if type_of(v) == t]
        self.add(self.pick(BINARY), x, self.pick(same))

    def _channels(self, t: TensorType) -> int | None:
        return const_int(t.shape[1]) if t.rank == 4 else None

    def _scale(self, x: Value, t: TensorType) -> None:
        c = self._channels(t)
        if c is not None:
            self.add(self.pick(BINARY), x, self.constant(c, 1, 1))

    def _scalar(self, x: Value, t: TensorType) -> None:
        op = self.pick((*BINARY, el.div, el.power))
        value = np.float32(self.pick((0, 1, 2, 0.5, 4)))
        if op is el.div and value == 0:
            value = np.float32(1)
        if op is el.power and value not in (1, 2):
            value = np.float32(2)
        self.add(op, x, Constant(np.asarray(value)))

    def _clip(self, x: Value, t: TensorType) -> None:
        self.add(
            el.clip, x, attrs=el.ClipAttrs(self.pick((None, -1, 0)), self.pick((None, 0.5, 2)))
        )

    def _conv(self, x: Value, t: TensorType) -> None:
        c = self._channels(t)
        if c is None:
            return
        out, k = self.pick((3, 8, 16)), self.pick((1, 3))
        pads = (k // 2, k // 2)
        bias = self.constant(out) if self.number(0, 1) else None
        weight = self.constant(out, c, k, k)
        self.add(cv.conv, x, weight, bias, attrs=cv.ConvAttrs((), pads, pads))

    def _norm(self, x: Value, t: TensorType) -> None:
        c = self._channels(t)
        if c is not None:
            params = [self.constant(c) for _ in range(3)]
            self.add(norm.batch_norm, x, *params, self.constant(c, low=0.5, high=2))

    def _pool(self, x: Value, t: TensorType) -> None:
        if t.rank == 4:
            op = self.pick((pl.max_pool, pl.avg_pool))
            self.add(op, x, attrs=pl.PoolAttrs((3, 3), (), (1, 1), (1, 1)))

    def _axis(self, t: TensorType) -> int:
        return self.number(-t.rank, t.rank - 1)

    def _reduce(self, x: Value, t: TensorType) -> None:
        if t.rank:
            attrs = red.ReduceAttrs((self._axis(t),), bool(self.number(0, 1)))
            self.add(self.pick((red.reduce_mean, red.reduce_max)), x, attrs=attrs)

    def _softmax(self, x: Value, t: TensorType) -> None:
        if t.rank:
            self.add(red.softmax, x, attrs=red.AxisAttrs(self._axis(t)))

    def _layer_norm(self, x: Value, t: TensorType) -> None:
        if t.rank:
            self.add(norm.layer_norm, x, None, None, attrs=norm.RowNormAttrs(self._axis(t), 0.1))

    def _moved(self, x: Value, t: TensorType) -> None:
        perm = tuple(self.draw(st.permutations(range(t.rank))))
        if perm:
            self.add(sh.transpose, x, attrs=sh.TransposeAttrs(perm))

    def _view(self, x: Value, t: TensorType) -> None:
        if t.rank < 2:
            self.add(sh.unsqueeze, x, attrs=sh.UnsqueezeAttrs((0,)))
        else:
            k = self.number(0, t.rank - 2)
            joined = (*t.shape[:k], t.shape[k] * t.shape[k + 1], *t.shape[k + 2 :])
            self.add(sh.reshape, x, attrs=sh.ReshapeAttrs(joined))

    def _concat(self, x: Value, t: TensorType) -> None:
        same = [v for v in self.values if type_of(v) == t]
        if t.rank:
            parts = [self.pick(same) for _ in range(self.number(1, 3))]
            self.add(pc.concat, *parts, attrs=pc.ConcatAttrs(self._axis(t)))

    def _split(self, x: Value, t: TensorType) -> None:
        axes = [k for k, s in enumerate(t.shape) if (const_int(s) or 0) >= 2]
        if axes:
            axis = self.pick(axes)
            size = const_int(t.shape[axis])
            assert size is not None
            first = self.number(1, size - 1)
            self.add(pc.split, x, attrs=pc.SplitAttrs(axis, (first, size - first)))

    def _product(self, x: Value, t: TensorType) -> None:
        k = const_int(t.shape[-1]) if t.rank >= 2 else None
        if k is not None:
            self.add(linalg.matmul, x, self.constant(k, self.pick((1, 3, 8))))

    def _constants(self, x: Value, t: TensorType) -> None:
        k = const_int(t.shape[-1]) if t.rank else None
        if k is not None:
            a = self.add(el.exp, self.constant(k))
            self.add(el.add, x, a)


@st.composite
def graphs(draw: Callable[[Any], Any], most: int = 12, symbolic: bool = False) -> Function:
    """A graph of up to `most` operators; what nothing reads is a result, and one value more."""
    b = Builder(draw, symbolic)
    for _ in range(b.number(1, most)):
        b.step()
    read = {id(o) for v in b.values for o in operands(v)}
    read |= {id(o) for v in b.values if isinstance(v, Item) for o in operands(v.tuple)}
    ends = [v for v in b.values if id(v) not in read and not isinstance(v, Item)]
    results = {id(v): v for v in (*ends, b.pick(b.values))}
    return Function("random", (b.x,), tuple(results.values()))


def feeds(fn: Function, batch: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs for a random graph."""
    rng = np.random.default_rng(seed)
    made = {}
    for p in fn.params:
        shape = [batch if isinstance(s, Dim) else s.value for s in p.type.shape]
        made[p.name] = rng.uniform(-1, 1, shape).astype(np.float32)
    return made
