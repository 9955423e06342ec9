"""Recurrent layers over pre-activations: what is left when the products with the inputs are done.

    x = matmul(inputs[T, B, I], w[4 * H, I]^T) + bias        one contraction for all steps
    y[T, B, H], y_h[B, H], y_c[B, H] = lstm(x[T, B, 4 * H], r[4, H, H], h0, c0, peepholes, lengths)

Gates come in the order of ONNX: lstm i o f c, gru z r h. `r` holds a matrix [H, H] per gate, from
the previous state to the gate. A row b with lengths[b] < T keeps its state from that step on, and
its y is 0 there; the order of its steps is reversed within its length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import te
from ..ir.expr import Call, Expr, cast, const, maximum, minimum, select
from ..ir.op import Arg, Op, register
from ..ir.types import DType, TensorType, index
from .draws import Draw, array, choice, flag, integer
from .elementwise import softplus_of
from .evaluate import sigmoid as np_sigmoid
from .rules import (
    Size,
    clamped,
    direct,
    float32_inside,
    need_const,
    need_dtype,
    need_rank,
    need_same,
    result,
    same_dtype,
    wide,
    widened,
)

Array = np.ndarray
Function = Callable[[Any, float, float], Any]


# ---- activations --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Activation:
    """A function of an element and of none, one or two constants, as an expression and in numpy,
    with the values that ONNX gives to these constants."""

    expr: Function
    numpy: Function
    defaults: tuple[float, ...] = ()


def _call(name: str) -> Function:
    return lambda e, a, b: Call(name, (e,))


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(lambda e, a, b: maximum(e, 0.0), lambda x, a, b: np.maximum(x, 0)),
    "tanh": Activation(_call("tanh"), lambda x, a, b: np.tanh(x)),
    "sigmoid": Activation(_call("sigmoid"), lambda x, a, b: np_sigmoid(x)),
    "affine": Activation(lambda e, a, b: e * a + b, lambda x, a, b: x * a + b, (1.0, 0.0)),
    "leakyrelu": Activation(
        lambda e, a, b: select(e < 0.0, e * a, e),
        lambda x, a, b: np.where(x < 0, x * a, x),
        (0.01,),
    ),
    "thresholdedrelu": Activation(
        lambda e, a, b: select(e < a, const(0, e.dtype), e),
        lambda x, a, b: np.where(x < a, x.dtype.type(0), x),
        (1.0,),
    ),
    "scaledtanh": Activation(
        lambda e, a, b: Call("tanh", (e * b,)) * a,
        lambda x, a, b: np.tanh(x * b) * a,
        (1.0, 1.0),
    ),
    "hardsigmoid": Activation(
        lambda e, a, b: minimum(maximum(e * a + b, 0.0), 1.0),
        lambda x, a, b: np.clip(x * a + b, 0, 1),
        (0.2, 0.5),
    ),
    "elu": Activation(
        lambda e, a, b: select(e < 0.0, Call("expm1", (e,)) * a, e),
        lambda x, a, b: np.where(x < 0, np.expm1(x) * a, x),
        (1.0,),
    ),
    "softsign": Activation(
        lambda e, a, b: e / (Call("abs", (e,)) + 1.0), lambda x, a, b: x / (1 + np.abs(x))
    ),
    "softplus": Activation(
        lambda e, a, b: softplus_of(e),
        lambda x, a, b: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))),
    ),
}


@dataclass(frozen=True)
class RecurrentAttrs:
    """activations: names in ACTIVATIONS with their constants. clip: bound of what goes into them
    (0: none). reverse: from the last step to the first. coupled: lstm's forget gate is 1 - i.
    """

    activations: tuple[str, ...] = ()
    alphas: tuple[float, ...] = ()
    betas: tuple[float, ...] = ()
    clip: float = 0.0
    reverse: bool = False
    coupled: bool = False


def _activate(a: RecurrentAttrs, which: int, e: Expr) -> Expr:
    """Activation number `which` of a clipped element."""
    if a.clip:
        e = minimum(maximum(e, -a.clip), a.clip)
    return ACTIVATIONS[a.activations[which]].expr(e, a.alphas[which], a.betas[which])


def _np_activate(a: RecurrentAttrs, which: int, x: Array) -> Array:
    if a.clip:
        x = np.clip(x, -a.clip, a.clip)
    return ACTIVATIONS[a.activations[which]].numpy(x, a.alphas[which], a.betas[which])


# ---- time ---------------------------------------------------------------------------------------
class _Clock:
    """Which time each row is at after how many steps."""

    def __init__(self, steps: Size, lengths: te.Tensor | None, reverse: bool) -> None:
        self.steps, self.lengths, self.reverse = steps, lengths, reverse

    def length(self, b: Expr) -> Expr:
        assert self.lengths is not None
        return cast(self.lengths[b], index)

    def time(self, t: Expr, b: Expr) -> Expr:
        """The time of step t, and the step of time t: the order is its own inverse."""
        if not self.reverse:
            return t
        if self.lengths is None:
            return self.steps - 1 - t
        return clamped(self.length(b) - 1 - t, self.steps)

    def alive(self, t: Expr, b: Expr, new: Expr, old: Expr) -> Expr:
        """`new` for the steps or times within the length of a row, else `old`."""
        return new if self.lengths is None else select(t < self.length(b), new, old)


def _start(given: te.Tensor | None, shape: Sequence[Expr], dtype: DType) -> te.Tensor:
    if given is not None:
        return widened(given)
    return te.compute(shape, lambda *i: const(0, dtype), "zero")


def _outputs(x: te.Tensor, clock: _Clock, histories: Sequence[te.Tensor]) -> tuple[te.Tensor, ...]:
    """y, then the last entry of each history."""
    h, steps = histories[0], x.shape[0]

    def output(t: Expr, b: Expr, i: Expr) -> Expr:
        e = h[clock.time(t, b) + 1, b, i]
        return cast(clock.alive(t, b, e, const(0, e.dtype)), x.dtype)

    y = te.compute((steps, *h.shape[1:]), output, "y")
    last = [
        te.compute(s.shape[1:], lambda b, i, s=s: cast(s[steps, b, i], x.dtype), f"y_{name}")
        for s, name in zip(histories, ("h", "c"), strict=False)
    ]
    return (y, *last)


def _np_outputs(
    x: Array,
    states: Sequence[Array],
    lengths: Array | None,
    reverse: bool,
    step: Callable[..., Sequence[Array]],
) -> tuple[Array, ...]:
    """Runs `step(x of the time, *states)` over all times."""
    steps, batch = x.shape[:2]
    sizes = np.full(batch, steps) if lengths is None else lengths.astype(np.int64)
    y = np.zeros((steps, *states[0].shape), x.dtype)
    rows = np.arange(batch)
    for t in range(steps):
        alive = t < sizes
        time = np.where(alive, sizes - 1 - t if reverse else t, 0)
        new = step(x[time, rows], *states)
        states = [np.where(alive[:, None], n, s) for n, s in zip(new, states, strict=True)]
        y[time[alive], rows[alive]] = states[0][alive]
    return (y, *(s.astype(x.dtype) for s in states))


# ---- type rules ---------------------------------------------------------------------------------
def _infer_states(
    name: str, x: Arg, weights: Sequence[Arg | None], gates: int, states: Sequence[Arg | None],
    lengths: Arg | None, results: int,
) -> tuple[TensorType, ...]:  # fmt: skip
    """Checks what the operators have in common; weights end in [H, H]."""
    need_dtype(name, x, "f")
    need_rank(name, x, 3, 3)
    dtype = same_dtype(name, x, *weights, *states)
    steps, batch, width = x.type.shape
    first = weights[0]
    assert first is not None
    hidden = need_const(name, "the hidden size", first.type.shape[-1])
    for w in weights:
        if w is not None:
            need_same(name, "the sizes of a recurrent weight", w.type.shape[-2], hidden)
    need_same(name, "the gates", width, gates * hidden)
    for s in states:
        if s is not None:
            need_rank(name, s, 2, 2)
            need_same(name, "the batch sizes", s.type.shape[0], batch)
            need_same(name, "the hidden sizes", s.type.shape[1], hidden)
    if lengths is not None:
        need_dtype(name, lengths, "i")
        need_rank(name, lengths, 1, 1)
        need_same(name, "the batch sizes", lengths.type.shape[0], batch)
    last = result((batch, hidden), dtype)
    return (result((steps, batch, hidden), dtype), *(last,) * (results - 1))


# ---- samples ------------------------------------------------------------------------------------
def _draw_attrs(draw: Draw, count: int, defaults: Sequence[str]) -> dict[str, Any]:
    names = list(defaults)
    if flag(draw):
        names = [choice(draw, sorted(ACTIVATIONS)) for _ in range(count)]
    known = [(*ACTIVATIONS[n].defaults, 0.0, 0.0) for n in names]
    return {
        "activations": tuple(names),
        "alphas": tuple(k[0] for k in known),
        "betas": tuple(k[1] for k in known),
        "clip": choice(draw, (0.0, 0.0, 0.5)),
        "reverse": flag(draw),
    }


def _maybe(draw: Draw, of: Sequence[int], dtype: str) -> Array | None:
    return array(draw, of, dtype, -1, 1) if flag(draw) else None


def _draw_inputs(draw: Draw, gates: int) -> tuple[tuple[int, int, int], str, Array, Array | None]:
    """(steps, batch, hidden size), dtype, x, lengths."""
    steps, batch, hidden = integer(draw, 1, 4), integer(draw, 1, 3), integer(draw, 1, 5)
    dtype = choice(draw, ("float32", "float32", "float64", "float16"))
    x = array(draw, (steps, batch, gates * hidden), dtype, -1, 1)
    lengths = array(draw, (batch,), "int32", 1, steps) if flag(draw) else None
    return (steps, batch, hidden), dtype, x, lengths


# ---- lstm ---------------------------------------------------------------------------------------
def _lstm_infer(
    x: Arg, r: Arg, h0: Arg | None, c0: Arg | None, p: Arg | None, lengths: Arg | None,
    a: RecurrentAttrs,
) -> tuple[TensorType, ...]:  # fmt: skip
    found = _infer_states("lstm", x, [r], 4, [h0, c0], lengths, 3)
    need_same("lstm", "the gates", r.type.shape[0], 4)
    if p is not None:
        need_rank("lstm", p, 2, 2)
        need_same("lstm", "the peepholes", p.type.shape[0], 3)
        need_same("lstm", "the peepholes", p.type.shape[1], r.type.shape[-1])
    return found


def _lstm_compute(
    x: te.Tensor, r: te.Tensor, h0: te.Tensor | None, c0: te.Tensor | None, p: te.Tensor | None,
    lengths: te.Tensor | None, a: RecurrentAttrs,
) -> tuple[te.Tensor, ...]:  # fmt: skip
    steps, batch, _ = x.shape
    hidden = r.shape[-1]
    dtype, clock = wide(x.dtype), _Clock(steps, lengths, a.reverse)
    weights, peep = widened(r), None if p is None else widened(p)
    shape = (batch, hidden)

    def step(t: Expr, states: tuple[te.Tensor, ...]) -> list[te.Tensor]:
        h, c = states
        (k,) = te.reduce_vars(1)
        sums = te.compute(
            (batch, 4, hidden), lambda b, g, i: h[b, k] * weights[g, i, k], "gates",
            ("sum", {k: hidden}),
        )  # fmt: skip

        def gate(which: int, hole: int, cell: te.Tensor | None, b: Expr, i: Expr) -> Expr:
            e = cast(x[clock.time(t, b), b, i + which * hidden], dtype) + sums[b, which, i]
            if peep is not None and cell is not None:
                e = e + peep[hole, i] * cell[b, i]
            return _activate(a, 1 if which == 3 else 0, e)

        def cell(b: Expr, i: Expr) -> Expr:
            enter = gate(0, 0, c, b, i)
            forget = const(1, dtype) - enter if a.coupled else gate(2, 2, c, b, i)
            new = forget * c[b, i] + enter * gate(3, 0, None, b, i)
            return clock.alive(t, b, new, c[b, i])

        new_c = te.compute(shape, cell, "c")

        def state(b: Expr, i: Expr) -> Expr:
            raw = ACTIVATIONS[a.activations[2]].expr(new_c[b, i], a.alphas[2], a.betas[2])
            return clock.alive(t, b, gate(1, 1, new_c, b, i) * raw, h[b, i])

        return [te.compute(shape, state, "h"), new_c]

    start = [_start(h0, shape, dtype), _start(c0, shape, dtype)]
    return _outputs(x, clock, te.scan(steps, start, step, "lstm"))


def _lstm_reference(
    x: Array, r: Array, h0: Array | None, c0: Array | None, p: Array | None,
    lengths: Array | None, a: RecurrentAttrs,
) -> tuple[Array, ...]:  # fmt: skip
    hidden = r.shape[-1]
    holes = np.zeros((3, hidden), x.dtype) if p is None else p
    zero = np.zeros((x.shape[1], hidden), x.dtype)

    def step(now: Array, h: Array, c: Array) -> list[Array]:
        i, o, f, z = (now[:, k * hidden : (k + 1) * hidden] + h @ r[k].T for k in range(4))
        i = _np_activate(a, 0, i + holes[0] * c)
        f = 1 - i if a.coupled else _np_activate(a, 0, f + holes[2] * c)
        c = f * c + i * _np_activate(a, 1, z)
        o = _np_activate(a, 0, o + holes[1] * c)
        return [o * ACTIVATIONS[a.activations[2]].numpy(c, a.alphas[2], a.betas[2]), c]

    start = [zero if s is None else s for s in (h0, c0)]
    return _np_outputs(x, start, lengths, a.reverse, step)


def _lstm_samples(draw: Draw) -> tuple[list[Array | None], RecurrentAttrs]:
    (_, batch, hidden), dtype, x, lengths = _draw_inputs(draw, 4)
    r = array(draw, (4, hidden, hidden), dtype, -1, 1)
    h0, c0 = (_maybe(draw, (batch, hidden), dtype) for _ in range(2))
    p = _maybe(draw, (3, hidden), dtype)
    attrs = _draw_attrs(draw, 3, ("sigmoid", "tanh", "tanh"))
    return [x, r, h0, c0, p, lengths], RecurrentAttrs(**attrs, coupled=flag(draw))


lstm = register(
    Op(
        "lstm",
        RecurrentAttrs,
        _lstm_infer,
        direct(_lstm_compute),
        float32_inside(_lstm_reference),
        _lstm_samples,
    )
)


# ---- gru ----------------------------------------------------------------------------------------
def _gru_infer(
    x: Arg, r: Arg, r_h: Arg | None, bias: Arg | None, h0: Arg | None, lengths: Arg | None,
    a: RecurrentAttrs,
) -> tuple[TensorType, ...]:  # fmt: skip
    """r_h: the candidate's weight where the reset gate applies to the state; where it applies to
    the product of state and weight plus `bias`, `r` holds that weight too."""
    need_same("gru", "the gates", r.type.shape[0], 3 if r_h is None else 2)
    if bias is not None:
        need_rank("gru", bias, 1, 1)
        need_same("gru", "the sizes of the bias", bias.type.shape[0], r.type.shape[-1])
    return _infer_states("gru", x, [r, r_h], 3, [h0], lengths, 2)


def _gru_compute(
    x: te.Tensor, r: te.Tensor, r_h: te.Tensor | None, bias: te.Tensor | None,
    h0: te.Tensor | None, lengths: te.Tensor | None, a: RecurrentAttrs,
) -> tuple[te.Tensor, ...]:  # fmt: skip
    steps, batch, _ = x.shape
    hidden = r.shape[-1]
    dtype, clock = wide(x.dtype), _Clock(steps, lengths, a.reverse)
    weights = widened(r)
    weights_h = None if r_h is None else widened(r_h)
    added = None if bias is None else widened(bias)
    shape = (batch, hidden)

    def step(t: Expr, states: tuple[te.Tensor, ...]) -> list[te.Tensor]:
        (h,) = states
        k, j = te.reduce_vars(2)
        sums = te.compute(
            (batch, r.shape[0], hidden), lambda b, g, i: h[b, k] * weights[g, i, k], "gates",
            ("sum", {k: hidden}),
        )  # fmt: skip

        def input_of(which: int, b: Expr, i: Expr) -> Expr:
            return cast(x[clock.time(t, b), b, i + which * hidden], dtype)

        def gate(which: int, b: Expr, i: Expr) -> Expr:
            return _activate(a, 0, input_of(which, b, i) + sums[b, which, i])

        inner = None
        if weights_h is not None:
            reset = te.compute(shape, lambda b, i: gate(1, b, i) * h[b, i], "reset")
            inner = te.compute(
                shape, lambda b, i: reset[b, j] * weights_h[i, j], "inner", ("sum", {j: hidden})
            )

        def candidate(b: Expr, i: Expr) -> Expr:
            if inner is not None:
                return inner[b, i]
            own = sums[b, 2, i]
            return gate(1, b, i) * (own if added is None else own + added[i])

        def state(b: Expr, i: Expr) -> Expr:
            update = gate(0, b, i)
            new = _activate(a, 1, input_of(2, b, i) + candidate(b, i))
            mixed = (const(1, dtype) - update) * new + update * h[b, i]
            return clock.alive(t, b, mixed, h[b, i])

        return [te.compute(shape, state, "h")]

    return _outputs(x, clock, te.scan(steps, [_start(h0, shape, dtype)], step, "gru"))


def _gru_reference(
    x: Array, r: Array, r_h: Array | None, bias: Array | None, h0: Array | None,
    lengths: Array | None, a: RecurrentAttrs,
) -> tuple[Array, ...]:  # fmt: skip
    hidden = r.shape[-1]

    def step(now: Array, h: Array) -> list[Array]:
        xz, xr, xh = (now[:, k * hidden : (k + 1) * hidden] for k in range(3))
        z = _np_activate(a, 0, xz + h @ r[0].T)
        reset = _np_activate(a, 0, xr + h @ r[1].T)
        if r_h is not None:
            inner = (reset * h) @ r_h.T
        else:
            inner = reset * (h @ r[2].T + (0 if bias is None else bias))
        return [(1 - z) * _np_activate(a, 1, xh + inner) + z * h]

    start = np.zeros((x.shape[1], hidden), x.dtype) if h0 is None else h0
    return _np_outputs(x, [start], lengths, a.reverse, step)


def _gru_samples(draw: Draw) -> tuple[list[Array | None], RecurrentAttrs]:
    (_, batch, hidden), dtype, x, lengths = _draw_inputs(draw, 3)
    before = flag(draw)
    r = array(draw, (3 if before else 2, hidden, hidden), dtype, -1, 1)
    r_h = None if before else array(draw, (hidden, hidden), dtype, -1, 1)
    bias = _maybe(draw, (hidden,), dtype) if before else None
    h0 = _maybe(draw, (batch, hidden), dtype)
    attrs = _draw_attrs(draw, 2, ("sigmoid", "tanh"))
    return [x, r, r_h, bias, h0, lengths], RecurrentAttrs(**attrs)


gru = register(
    Op(
        "gru",
        RecurrentAttrs,
        _gru_infer,
        direct(_gru_compute),
        float32_inside(_gru_reference),
        _gru_samples,
    )
)


# ---- rnn ----------------------------------------------------------------------------------------
def _rnn_infer(
    x: Arg, r: Arg, h0: Arg | None, lengths: Arg | None, a: RecurrentAttrs
) -> tuple[TensorType, ...]:
    return _infer_states("rnn", x, [r], 1, [h0], lengths, 2)


def _rnn_compute(
    x: te.Tensor, r: te.Tensor, h0: te.Tensor | None, lengths: te.Tensor | None, a: RecurrentAttrs
) -> tuple[te.Tensor, ...]:
    steps, batch, hidden = x.shape
    dtype, clock = wide(x.dtype), _Clock(steps, lengths, a.reverse)
    weights = widened(r)
    shape = (batch, hidden)

    def step(t: Expr, states: tuple[te.Tensor, ...]) -> list[te.Tensor]:
        (h,) = states
        (k,) = te.reduce_vars(1)
        sums = te.compute(
            shape, lambda b, i: h[b, k] * weights[i, k], "sums", ("sum", {k: r.shape[-1]})
        )

        def state(b: Expr, i: Expr) -> Expr:
            new = _activate(a, 0, cast(x[clock.time(t, b), b, i], dtype) + sums[b, i])
            return clock.alive(t, b, new, h[b, i])

        return [te.compute(shape, state, "h")]

    return _outputs(x, clock, te.scan(steps, [_start(h0, shape, dtype)], step, "rnn"))


def _rnn_reference(
    x: Array, r: Array, h0: Array | None, lengths: Array | None, a: RecurrentAttrs
) -> tuple[Array, ...]:
    start = np.zeros((x.shape[1], r.shape[-1]), x.dtype) if h0 is None else h0
    step = lambda now, h: [_np_activate(a, 0, now + h @ r.T)]  # noqa: E731
    return _np_outputs(x, [start], lengths, a.reverse, step)


def _rnn_samples(draw: Draw) -> tuple[list[Array | None], RecurrentAttrs]:
    (_, batch, hidden), dtype, x, lengths = _draw_inputs(draw, 1)
    r = array(draw, (hidden, hidden), dtype, -1, 1)
    attrs = _draw_attrs(draw, 1, ("tanh",))
    return [x, r, _maybe(draw, (batch, hidden), dtype), lengths], RecurrentAttrs(**attrs)


rnn = register(
    Op(
        "rnn",
        RecurrentAttrs,
        _rnn_infer,
        direct(_rnn_compute),
        float32_inside(_rnn_reference),
        _rnn_samples,
    )
)
