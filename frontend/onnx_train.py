"""Converters of ONNX's training steps: optimizers, and batch statistics.

Momentum(rate, step, x, gradient, v) -> (x - rate * v', v' = alpha * v + beta * gradient)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minicompiler.ir.expr import ONE
from minicompiler.ir.graph import Value, type_of
from minicompiler.ir.op import Op
from minicompiler.ops import elementwise as el
from minicompiler.ops import norm
from minicompiler.ops import reduce as red
from minicompiler.ops import shape as sh

from .onnx_math import Converter, cast_to
from .onnx_node import OnnxNode


class _Number:
    """A graph value with arithmetic; Python numbers become constants of its type."""

    def __init__(self, n: OnnxNode, value: Value) -> None:
        self.n, self.value = n, value

    def _do(self, op: Op, a: Any, b: Any) -> _Number:
        dtype = type_of(self.value).dtype.numpy
        values = [x.value if isinstance(x, _Number) else self.n.constant(x, dtype) for x in (a, b)]
        return _Number(self.n, self.n.apply(op, *values, name=""))

    def __add__(self, o: Any) -> _Number:
        return self._do(el.add, self, o)

    def __radd__(self, o: Any) -> _Number:
        return self._do(el.add, o, self)

    def __sub__(self, o: Any) -> _Number:
        return self._do(el.sub, self, o)

    def __rsub__(self, o: Any) -> _Number:
        return self._do(el.sub, o, self)

    def __mul__(self, o: Any) -> _Number:
        return self._do(el.mul, self, o)

    def __rmul__(self, o: Any) -> _Number:
        return self._do(el.mul, o, self)

    def __truediv__(self, o: Any) -> _Number:
        return self._do(el.div, self, o)

    def __rpow__(self, o: Any) -> _Number:
        return self._do(el.power, o, self)

    def sqrt(self) -> _Number:
        return _Number(self.n, self.n.apply(el.sqrt, self.value, name=""))

    def where_positive(self, test: _Number, other: _Number | float) -> _Number:
        """self where test > 0, else other."""
        wanted = test._do(el.greater, test, 0).value
        rest = other.value if isinstance(other, _Number) else self.n.constant(
            other, type_of(self.value).dtype.numpy)  # fmt: skip
        return _Number(self.n, self.n.apply(el.where, wanted, self.value, rest, name=""))


Step = Callable[..., tuple[_Number, ...]]


def _optimizer(step: Step, states: int) -> Converter:
    """One step for each of several tensors: inputs and results are grouped by their role."""

    def convert(n: OnnxNode) -> tuple[Value, ...]:
        count = (len(n.inputs) - 2) // (2 + states)
        dtype = n.type(2).dtype
        rate, t = (_Number(n, cast_to(n, n.arg(k), dtype)) for k in range(2))
        results = []
        for k in range(count):
            own = [_Number(n, n.arg(2 + k + role * count)) for role in range(2 + states)]
            results.append(step(n, rate, t, *own))
        return tuple(r[role].value for role in range(1 + states) for r in results)

    return convert


def _momentum(
    n: OnnxNode, rate: _Number, t: _Number, x: _Number, g: _Number, v: _Number
) -> tuple[_Number, ...]:
    alpha, beta = n.attr("alpha"), n.attr("beta")
    g = n.attr("norm_coefficient") * x + g
    new = alpha * v + (g * beta).where_positive(t, g)  # the first gradient counts in full
    if n.attr("mode") == "nesterov":
        return x - rate * (g + alpha * new), new
    return x - rate * new, new


def _adagrad(
    n: OnnxNode, rate: _Number, t: _Number, x: _Number, g: _Number, h: _Number
) -> tuple[_Number, ...]:
    rate = rate / (1 + t * n.attr("decay_factor", 0.0))
    g = n.attr("norm_coefficient", 0.0) * x + g
    new = h + g * g
    return x - rate * g / (new.sqrt() + n.attr("epsilon", 1e-6)), new


def _adam(
    n: OnnxNode, rate: _Number, t: _Number, x: _Number, g: _Number, v: _Number, h: _Number
) -> tuple[_Number, ...]:
    alpha, beta = n.attr("alpha", 0.9), n.attr("beta", 0.999)
    g = n.attr("norm_coefficient", 0.0) * x + g
    v_new = alpha * v + (1 - alpha) * g
    h_new = beta * h + (1 - beta) * (g * g)
    corrected = rate * (1 - beta**t).sqrt() / (1 - alpha**t)
    rate = corrected.where_positive(t, rate)
    x_new = x - rate * (v_new / (h_new.sqrt() + n.attr("epsilon", 1e-6)))
    return (1 - n.attr("norm_coefficient_post", 0.0)) * x_new, v_new, h_new


def _batch_norm(n: OnnxNode) -> tuple[Value, ...]:
    """Statistics of the batch itself, and running ones that take part of them."""
    x, t = n.arg(0), n.type(0)
    if t.rank < 2:
        n.fail(f"BatchNormalization of {t}, which has no channels")
    over = red.ReduceAttrs((0, *range(2, t.rank)), True)
    mean = _Number(n, n.apply(red.reduce_mean, x, attrs=over, name=""))
    away = _Number(n, x) - mean
    variance = _Number(n, n.apply(red.reduce_mean, (away * away).value, attrs=over, name=""))
    channel = sh.ReshapeAttrs((t.shape[1],))
    line = sh.ReshapeAttrs((t.shape[1], *(ONE,) * (t.rank - 2)))

    def along(k: int) -> _Number:
        value = cast_to(n, n.arg(k), t.dtype)
        return _Number(n, n.apply(sh.reshape, value, attrs=line, name=""))

    y = away / (variance + n.attr("epsilon", 1e-5)).sqrt() * along(1) + along(2)
    keep = n.attr("momentum", 0.9)
    running = []
    for k, found in ((3, mean), (4, variance)):
        flat = n.apply(sh.reshape, found.value, attrs=channel, name="")
        fresh = _Number(n, cast_to(n, flat, n.type(k).dtype))
        running.append((_Number(n, n.arg(k)) * keep + fresh * (1 - keep)).value)
    return (y.value, *running)


def _any_batch_norm(n: OnnxNode) -> Any:
    if n.attr("training_mode", 0):
        return _batch_norm(n)
    if any(n.outputs[1:]):
        n.fail("BatchNormalization with more than one result needs training_mode = 1")
    if not n.attr("spatial", 1):
        n.fail("BatchNormalization with spatial = 0 is not supported")
    # Newer opsets let the statistics have a wider type than the data.
    args = [cast_to(n, n.arg(k), n.type(0).dtype) for k in range(5)]
    return n.apply(norm.batch_norm, *args, attrs=norm.EpsilonAttrs(n.attr("epsilon", 1e-5)))


_DOMAIN = "ai.onnx.preview.training"
TRAIN: dict[str, Converter] = {
    "BatchNormalization": _any_batch_norm,
    f"{_DOMAIN}.Adagrad": _optimizer(_adagrad, 1),
    f"{_DOMAIN}.Adam": _optimizer(_adam, 2),
    f"{_DOMAIN}.Momentum": _optimizer(_momentum, 1),
}
