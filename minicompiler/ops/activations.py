"""Activation functions, most with parameters: more rows of the table in elementwise.py.

leaky_relu = unary("leaky_relu", lambda e, a: select(e < 0.0, e * a.alpha, e), ...)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import te
from ..ir.expr import Call, Expr, const, maximum, minimum, select
from ..ir.op import Arg, NoAttrs, Op, register
from ..ir.types import TensorType
from .draws import FLOATS, Draw, array, choice, flag, shape
from .elementwise import magnitude, softplus_of, unary
from .evaluate import erf as np_erf
from .evaluate import sigmoid as np_sigmoid
from .rules import (
    broadcast,
    direct,
    elements,
    fail,
    float32_inside,
    need_dtype,
    same_dtype,
    unequal,
)

Array = np.ndarray


def _exp(e: Expr) -> Expr:
    return Call("exp", (e,))


def _np_softplus(x: Array) -> Array:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


@dataclass(frozen=True)
class AlphaAttrs:
    alpha: float = 1.0


@dataclass(frozen=True)
class LeakyReluAttrs:
    alpha: float = 0.01


@dataclass(frozen=True)
class SeluAttrs:
    alpha: float = 1.6732632423543772
    gamma: float = 1.0507009873554805


@dataclass(frozen=True)
class HardSigmoidAttrs:
    alpha: float = 0.2
    beta: float = 0.5


@dataclass(frozen=True)
class ShrinkAttrs:
    bias: float = 0.0
    lambd: float = 0.5


@dataclass(frozen=True)
class GeluAttrs:
    """approximate: "none" is x/2 * (1 + erf(x / sqrt 2)); "tanh" the usual approximation of it."""

    approximate: str = "none"


# ---- without parameters -------------------------------------------------------------------------
relu = unary("relu", lambda e, a: maximum(e, 0), lambda x, a: np.maximum(x, 0), kinds="fi")
softplus = unary(
    "softplus", lambda e, a: softplus_of(e), lambda x, a: _np_softplus(x), domain=(-9, 9)
)
softsign = unary("softsign", lambda e, a: e / (magnitude(e) + 1.0), lambda x, a: x / (1 + abs(x)))
hard_swish = unary(
    "hard_swish",
    lambda e, a: e * maximum(minimum(e * (1 / 6) + 0.5, 1.0), 0.0),
    lambda x, a: x * np.clip(x / 6 + 0.5, 0, 1),
    domain=(-5, 5),
)
mish = unary(
    "mish",
    lambda e, a: e * Call("tanh", (softplus_of(e),)),
    lambda x, a: x * np.tanh(_np_softplus(x)),
)


# ---- with parameters ----------------------------------------------------------------------------
def _draw_alpha(draw: Draw) -> AlphaAttrs:
    return AlphaAttrs(choice(draw, (1.0, 0.3, 1.7)))


leaky_relu = unary(
    "leaky_relu",
    lambda e, a: select(e < 0.0, e * a.alpha, e),
    lambda x, a: np.where(x < 0, x * np.asarray(a.alpha, x.dtype), x),
    attrs=LeakyReluAttrs,
)
elu = unary(
    "elu",
    lambda e, a: select(e < 0.0, (_exp(minimum(e, 0.0)) - 1.0) * a.alpha, e),
    lambda x, a: np.where(x < 0, a.alpha * np.expm1(np.minimum(x, 0)), x),
    attrs=AlphaAttrs,
    draw_attrs=_draw_alpha,
)
selu = unary(
    "selu",
    lambda e, a: select(e <= 0.0, (_exp(minimum(e, 0.0)) - 1.0) * a.alpha, e) * a.gamma,
    lambda x, a: a.gamma * np.where(x <= 0, a.alpha * np.expm1(np.minimum(x, 0)), x),
    attrs=SeluAttrs,
)
celu = unary(
    "celu",
    lambda e, a: maximum(e, 0.0) + (_exp(minimum(e, 0.0) / a.alpha) - 1.0) * a.alpha,
    lambda x, a: np.maximum(x, 0) + a.alpha * np.expm1(np.minimum(x, 0) / a.alpha),
    attrs=AlphaAttrs,
    draw_attrs=_draw_alpha,
)
thresholded_relu = unary(
    "thresholded_relu",
    lambda e, a: select(const(a.alpha, e.dtype) < e, e, const(0, e.dtype)),
    lambda x, a: np.where(x > a.alpha, x, 0),
    attrs=AlphaAttrs,
    draw_attrs=_draw_alpha,
)
hard_sigmoid = unary(
    "hard_sigmoid",
    lambda e, a: maximum(minimum(e * a.alpha + a.beta, 1.0), 0.0),
    lambda x, a: np.clip(x * a.alpha + a.beta, 0, 1),
    attrs=HardSigmoidAttrs,
    domain=(-5, 5),
)
swish = unary(
    "swish",
    lambda e, a: e * Call("sigmoid", (e * a.alpha,)),
    lambda x, a: x * np_sigmoid(np.asarray(x * np.asarray(a.alpha, x.dtype))),
    attrs=AlphaAttrs,
    draw_attrs=_draw_alpha,
)


def _shrink_formula(e: Expr, a: ShrinkAttrs) -> Expr:
    rest = select(const(a.lambd, e.dtype) < e, e - a.bias, const(0, e.dtype))
    return select(e < -a.lambd, e + a.bias, rest)


shrink = unary(
    "shrink",
    _shrink_formula,
    lambda x, a: np.where(x < -a.lambd, x + a.bias, np.where(x > a.lambd, x - a.bias, 0)),
    attrs=ShrinkAttrs,
    draw_attrs=lambda draw: ShrinkAttrs(choice(draw, (0.0, 0.7)), choice(draw, (0.5, 1.5))),
)


def _gelu_formula(e: Expr, a: GeluAttrs) -> Expr:
    if a.approximate == "tanh":  # (1 + tanh(y)) / 2 is sigmoid(2 * y)
        c = math.sqrt(8 / math.pi)
        return e * Call("sigmoid", (e * (e * e * (0.044715 * c) + c),))
    half = e * 0.5
    return half * Call("erf", (e * math.sqrt(0.5),)) + half


def _gelu_reference(x: Array, a: GeluAttrs) -> Any:
    if a.approximate == "tanh":
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x / 2 * (1 + np_erf(x / math.sqrt(2)))


gelu = unary(
    "gelu",
    _gelu_formula,
    _gelu_reference,
    attrs=GeluAttrs,
    draw_attrs=lambda draw: GeluAttrs("tanh" if flag(draw) else "none"),
)


# ---- prelu --------------------------------------------------------------------------------------
def _prelu_infer(x: Arg, slope: Arg, a: NoAttrs) -> TensorType:
    need_dtype("prelu", x, "f")
    got = broadcast("prelu", x, slope)
    sizes = zip(got, x.type.shape, strict=False)
    if len(got) != x.type.rank or any(unequal(p, q) for p, q in sizes):
        fail(f"prelu: the slope {slope.type} does not broadcast to {x.type}")
    return TensorType(got, same_dtype("prelu", x, slope))


def _prelu_compute(x: te.Tensor, slope: te.Tensor, a: NoAttrs) -> te.Tensor:
    return elements(lambda e, s: select(e < 0.0, e * s, e), x, slope, name="prelu")


def _prelu_reference(x: Array, slope: Array, a: NoAttrs) -> Array:
    return np.where(x < 0, x * slope, x)


def _prelu_samples(draw: Draw) -> tuple[list[Array], NoAttrs]:
    of = shape(draw, 1)
    some = tuple(1 if flag(draw) else s for s in of)[choice(draw, (0, len(of) - 1)) :]
    dtype = choice(draw, FLOATS)
    return [array(draw, of, dtype), array(draw, some, dtype)], NoAttrs()


prelu = register(
    Op(
        "prelu",
        NoAttrs,
        _prelu_infer,
        direct(_prelu_compute),
        float32_inside(_prelu_reference),
        _prelu_samples,
    )
)
