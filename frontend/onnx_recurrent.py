"""Converters of the recurrent ONNX operators: LSTM, GRU, RNN.

    LSTM(X, W, R, B, lengths, h0, c0, P)  ->  pre = matmul(X, W^T) + (Wb + Rb)     all steps at once
                                              y, y_h, y_c = lstm(pre, R, h0, c0, P, lengths)

per direction; both directions are put together afterwards. Everything that depends on weights alone
is constant and folds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minicompiler.ir.expr import Const, Expr, const_int
from minicompiler.ir.graph import Constant, Value, type_of
from minicompiler.ops import elementwise as el
from minicompiler.ops import index as ix
from minicompiler.ops import linalg
from minicompiler.ops import pieces as pc
from minicompiler.ops import recurrent as rc
from minicompiler.ops import shape as sh

from .onnx_math import Converter
from .onnx_node import OnnxNode, items


class _Direction:
    """The inputs of one direction of a node: its parts of weights, bias and states."""

    def __init__(self, n: OnnxNode, which: int, gates: int, attrs: rc.RecurrentAttrs) -> None:
        self.n, self.which, self.gates, self.attrs = n, which, gates, attrs
        size = const_int(n.shape(2, 3)[-1])
        given = n.attr("hidden_size", size)
        if given is None:
            n.fail(
                f"the recurrent weight of {n.op_type} is {n.type(2)}: its size has to be known",
                "give the dimension a value: dims={...}, or the node the attribute hidden_size",
            )
        self.hidden: int = given if size is None else size

    def part(self, k: int, axis: int = 0) -> Value | None:
        """This direction's part of input `k`, without the axis of directions."""
        v = self.n.opt(k)
        if v is None:
            return None
        return self.n.apply(
            ix.gather, v, self.n.constant(self.which), attrs=ix.GatherAttrs(axis), name=""
        )

    def state(self, k: int) -> Value | None:
        """An initial state [batch, hidden]."""
        return self.part(k, 1 if self.n.attr("layout", 0) else 0)

    def weight(self) -> Value:
        """The recurrent weight, a matrix per gate."""
        v = self.part(2)
        assert v is not None
        return self.reshaped(v, (self.gates, self.hidden, self.hidden))

    def reshaped(self, v: Value, shape: Sequence[int]) -> Value:
        attrs = sh.ReshapeAttrs(tuple(Const(s) for s in shape))
        return self.n.apply(sh.reshape, v, attrs=attrs, name="")

    def sized(self, v: Value, rows: int) -> Value:
        """`v` as a tensor of that many rows: checked at each call where that is not known."""
        first, *rest = type_of(v).shape
        if const_int(first) is not None:
            return v
        attrs = sh.ReshapeAttrs((Const(rows), *rest), True)
        return self.n.apply(sh.reshape, v, attrs=attrs, name="")

    def sliced(self, v: Value, begin: int, end: int) -> Value:
        """Elements or matrices begin .. end - 1 of the first axis."""
        attrs = pc.SliceAttrs((begin,), (end,), (0,))
        return self.n.apply(pc.strided_slice, v, attrs=attrs, name="")

    def biases(self) -> tuple[Value, Value] | None:
        """The bias of the inputs and that of the state, one after the other per gate."""
        b = self.part(3)
        if b is None:
            return None
        half = self.gates * self.hidden
        b = self.sized(b, 2 * half)
        return self.sliced(b, 0, half), self.sliced(b, half, 2 * half)

    def added(self, a: Value, b: Value) -> Value:
        return self.n.apply(el.add, a, b, name="")

    def inputs(self, x: Value, bias: Value | None) -> Value:
        """The products of all steps with the input weight, and the bias."""
        w = self.part(1)
        assert w is not None
        w = self.sized(w, self.gates * self.hidden)
        attrs = linalg.MatmulAttrs(transpose_b=True)
        pre = self.n.apply(linalg.matmul, x, w, attrs=attrs, name="")
        return pre if bias is None else self.added(pre, bias)


def _lengths(n: OnnxNode, steps: Expr) -> Value | None:
    """The lengths of the rows; None where all have all steps."""
    v = n.opt(4)
    known = const_int(steps)
    full = isinstance(v, Constant) and known is not None and bool(np.all(v.data == known))
    return None if full else v


def _attributes(n: OnnxNode, which: int, defaults: Sequence[str]) -> rc.RecurrentAttrs:
    """The attributes of direction `which`."""
    names = [_text(a).lower() for a in n.attr("activations", defaults)]
    alphas = [float(a) for a in n.attr("activation_alpha", ())]
    betas = [float(b) for b in n.attr("activation_beta", ())]
    count = len(defaults)
    if len(names) == count:
        names *= 2
    if len(names) != 2 * count:
        n.fail(f"{n.op_type} takes {count} activations per direction, got {len(names)}")
    constants = []
    for name in names:
        known = rc.ACTIVATIONS.get(name)
        if known is None:
            n.fail(f"{n.op_type} with the activation {name!r} is not supported")
        values = [*known.defaults]
        # Each function takes the next of the constants that it has.
        for k, given in enumerate((alphas, betas)):
            if k < len(values) and given:
                values[k] = given.pop(0)
        constants.append((*values, 0.0, 0.0)[:2])
    mine = slice(which * count, (which + 1) * count)
    return rc.RecurrentAttrs(
        tuple(names[mine]),
        tuple(c[0] for c in constants[mine]),
        tuple(c[1] for c in constants[mine]),
        float(n.attr("clip", 0.0)),
        which == 1 or _text(n.attr("direction", "forward")) == "reverse",
        bool(n.attr("input_forget", 0)),
    )


def _text(v: Any) -> str:
    return v.decode() if isinstance(v, bytes) else v


# ---- the three layers ---------------------------------------------------------------------------
def _lstm(n: OnnxNode, d: _Direction, x: Value, lengths: Value | None) -> Value:
    both = d.biases()
    holes = d.part(7)
    if holes is not None:
        holes = d.reshaped(holes, (3, d.hidden))
    pre = d.inputs(x, None if both is None else d.added(*both))
    return n.apply(
        rc.lstm, pre, d.weight(), d.state(5), d.state(6), holes, lengths, attrs=d.attrs, name=""
    )


def _gru(n: OnnxNode, d: _Direction, x: Value, lengths: Value | None) -> Value:
    both = d.biases()
    weight, size = d.weight(), d.hidden
    bias = inner = candidate = None
    if n.attr("linear_before_reset", 0):
        if both is not None:
            inner = d.sliced(both[1], 2 * size, 3 * size)
            zero = n.constant(np.zeros(size), type_of(inner).dtype.numpy)
            gates = d.sliced(both[1], 0, 2 * size)
            outer = n.apply(pc.concat, gates, zero, attrs=pc.ConcatAttrs(0), name="")
            bias = d.added(both[0], outer)
    else:
        bias = None if both is None else d.added(*both)
        candidate = d.reshaped(d.sliced(weight, 2, 3), (size, size))
        weight = d.sliced(weight, 0, 2)
    pre = d.inputs(x, bias)
    return n.apply(
        rc.gru, pre, weight, candidate, inner, d.state(5), lengths, attrs=d.attrs, name=""
    )


def _rnn(n: OnnxNode, d: _Direction, x: Value, lengths: Value | None) -> Value:
    both = d.biases()
    pre = d.inputs(x, None if both is None else d.added(*both))
    weight = d.reshaped(d.weight(), (d.hidden, d.hidden))
    return n.apply(rc.rnn, pre, weight, d.state(5), lengths, attrs=d.attrs, name="")


_RANKS = 3, 3, 3, 2, 1  # of x, the weights, the bias and the lengths


def _recurrent(layer: Callable[..., Any], gates: int, defaults: Sequence[str]) -> Converter:
    """A converter: the layer in each direction, then the axis of directions."""

    def convert(n: OnnxNode) -> tuple[Value | None, ...]:
        swapped = bool(n.attr("layout", 0))
        x = n.arg(0)
        for k, rank in enumerate(_RANKS):
            v = n.opt(k)
            if v is not None and type_of(v).rank != rank:
                n.fail(f"input {k} of {n.op_type} is {type_of(v)}: {rank} dimensions are needed")
        if swapped:
            x = n.apply(sh.transpose, x, attrs=sh.TransposeAttrs((1, 0, 2)), name="")
        lengths = _lengths(n, type_of(x).shape[0])
        both = _text(n.attr("direction", "forward")) == "bidirectional"
        made = []
        for which in range(2 if both else 1):
            d = _Direction(n, which, gates, _attributes(n, which, defaults))
            made.append(items(layer(n, d, x, lengths)))
        results: list[Value | None] = []
        for k, parts in enumerate(zip(*made, strict=True)):
            if not n.wants(k):
                results.append(None)
                continue
            axis = 1 if k == 0 else 0
            if swapped and k == 0:
                swap = sh.TransposeAttrs((1, 0, 2))
                parts = tuple(n.apply(sh.transpose, p, attrs=swap, name="") for p in parts)
            results.append(_together(n, parts, axis + 1 if swapped else axis, n.outputs[k]))
        return tuple(results[: len(n.outputs)])

    return convert


def _together(n: OnnxNode, parts: Sequence[Value], axis: int, name: str) -> Value:
    """The results of the directions along a new axis."""
    label = name if len(parts) == 1 else ""
    attrs = sh.UnsqueezeAttrs((axis,))
    made = [n.apply(sh.unsqueeze, p, attrs=attrs, name=label) for p in parts]
    if len(made) == 1:
        return made[0]
    return n.apply(pc.concat, *made, attrs=pc.ConcatAttrs(axis), name=name)


RECURRENT: dict[str, Converter] = {
    "GRU": _recurrent(_gru, 3, ("sigmoid", "tanh")),
    "LSTM": _recurrent(_lstm, 4, ("sigmoid", "tanh", "tanh")),
    "RNN": _recurrent(_rnn, 1, ("tanh",)),
}
