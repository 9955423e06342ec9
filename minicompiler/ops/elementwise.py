"""Operators with one formula per element, numpy broadcasting included: table rows.

    relu = _unary("relu", lambda e, a: maximum(e, 0), lambda x, a: np.maximum(x, 0), kinds="fi")

A row holds the name, the formula over scalar expressions, the numpy meaning, the element types it
takes (f float, i integer, b bool) and, for samples, the range of inputs. Rows with `content` also
compute on the values of shape tensors. Activations with parameters lie in activations.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import te
from ..ir.expr import (
    Binary,
    Call,
    Expr,
    binary,
    cast,
    const,
    const_int,
    eq,
    maximum,
    minimum,
    ne,
    select,
    wrap,
)
from ..ir.op import Arg, NoAttrs, Op, Precision, register
from ..ir.types import CODED, DType, TensorType, bool_, dtype_of, float32, uint8
from . import codes
from .draws import FLOATS, INTS, Draw, array, broadcastable, choice, flag, integer, shape
from .evaluate import erf as np_erf
from .evaluate import sigmoid as np_sigmoid
from .evaluate import truncated_div
from .rules import (
    broadcast,
    direct,
    elements,
    fail,
    float32_inside,
    known_nonneg,
    need_dtype,
    on_contents,
    same_dtype,
    symbolic,
)

Formula = Callable[..., Expr]
SIGNED = ("int64", "int32", "int8")


def unary(
    name: str,
    formula: Formula,
    meaning: Callable[..., Any],
    kinds: str = "f",
    attrs: type = NoAttrs,
    domain: tuple[float, float] = (-3, 3),
    ints: tuple[str, ...] = INTS,
    to: DType | None = None,
    content: Formula | None = None,
    draw_attrs: Callable[[Draw], Any] | None = None,
) -> Op:
    """Registers a function of one tensor: formula(element, attrs) and meaning(array, attrs)."""

    def infer(x: Arg, a: Any) -> TensorType:
        need_dtype(name, x, kinds)
        return TensorType(x.type.shape, to or x.type.dtype)

    def compute(x: te.Tensor, a: Any) -> te.Tensor:
        return elements(lambda e: formula(e, a), x, name=name)

    def reference(x: np.ndarray, a: Any) -> np.ndarray:
        if content is not None and symbolic(x):
            return on_contents(content, x)
        return np.asarray(meaning(x, a), dtype=bool if to is bool_ else x.dtype)

    def samples(draw: Draw) -> tuple[list[np.ndarray], Any]:
        a = draw_attrs(draw) if draw_attrs else attrs()
        return [array(draw, shape(draw), choice(draw, dtypes_of(kinds, ints)), *domain)], a

    return register(
        Op(
            name,
            attrs,
            infer,
            direct(compute),
            float32_inside(reference),
            samples,
            precision=Precision.FLOAT32_INSIDE if kinds == "f" else Precision.FOLLOW,
            shape_math=content is not None,
        )
    )


def dtypes_of(kinds: str, ints: tuple[str, ...] = INTS) -> tuple[str, ...]:
    """Element types to draw for a row."""
    by_kind = {"f": FLOATS, "i": ints, "b": ("bool",), "c": ()}
    return tuple(t for k in kinds for t in by_kind[k])


def _operator(
    name: str,
    formula: Callable[[Expr, Expr], Expr],
    meaning: Callable[[Any, Any], Any],
    kinds: str,
    domain: tuple[float, float] = (-3, 3),
    second: tuple[float, float] | None = None,
    ints: tuple[str, ...] = INTS,
    to: DType | None = None,
    content: Callable[[Expr, Expr], Expr] | None = None,
    divides: bool = False,
) -> Op:
    """Registers a function of two tensors of one element type, with broadcasting.

    divides: a size that is divided by 0 is no size.
    """

    def infer(x: Arg, y: Arg, a: NoAttrs) -> TensorType:
        need_dtype(name, x, kinds)
        dtype = same_dtype(name, x, y)
        return TensorType(broadcast(name, x, y), to or dtype)

    def compute(x: te.Tensor, y: te.Tensor, a: NoAttrs) -> te.Tensor:
        return elements(formula, x, y, name=name)

    def reference(x: np.ndarray, y: np.ndarray, a: NoAttrs) -> np.ndarray | None:
        if content is not None and symbolic(x, y):
            if divides and any(const_int(wrap(e)) == 0 for e in y.flat):
                return None  # no size; as data it has some value
            return on_contents(content, x, y)
        return np.asarray(meaning(x, y), dtype=bool if to is bool_ else x.dtype)

    def samples(draw: Draw) -> tuple[list[np.ndarray], NoAttrs]:
        dtype = choice(draw, dtypes_of(kinds, ints))
        first, other = broadcastable(draw, 2)
        xs = [array(draw, first, dtype, *domain), array(draw, other, dtype, *(second or domain))]
        return xs, NoAttrs()

    shape_math = content is not None
    return register(
        Op(
            name,
            NoAttrs,
            infer,
            direct(compute),
            float32_inside(reference),
            samples,
            shape_math=shape_math,
        )
    )


def _call(name: str, fn: Callable[..., Any], domain: tuple[float, float] = (-3, 3)) -> Op:
    """A row whose formula is the scalar function of the same name."""
    return unary(name, lambda e, a: Call(name, (e,)), lambda x, a: fn(x), domain=domain)


def _float_call(name: str, fn: Callable[..., Any]) -> Op:
    """A rounding function: integers stay as they are."""

    def formula(e: Expr, a: NoAttrs) -> Expr:
        return Call(name, (e,)) if e.dtype.is_float else e

    return unary(name, formula, lambda x, a: fn(x), kinds="fi", domain=(-5, 5))


def magnitude(e: Expr) -> Expr:
    """|e|."""
    if e.dtype.is_float:
        return Call("abs", (e,))
    return maximum(e, const(0, e.dtype) - e) if e.dtype.is_signed else e


def log1p(u: Expr) -> Expr:
    """log(1 + u), also accurate for small u: the rounding error of 1 + u is divided out again."""
    w = u + 1.0
    return select(eq(w, 1.0), u, Call("log", (w,)) * u / (w - 1.0))


def softplus_of(e: Expr) -> Expr:
    """log(1 + exp(e)) without overflow."""
    return maximum(e, 0.0) + log1p(Call("exp", (minimum(e, e * -1.0),)))


# ---- unary math ---------------------------------------------------------------------------------
exp = _call("exp", np.exp)
log = _call("log", np.log, (0.01, 5))
sqrt = _call("sqrt", np.sqrt, (0, 9))
rsqrt = _call("rsqrt", lambda x: 1 / np.sqrt(x), (0.1, 9))
erf = _call("erf", np_erf)
tanh = _call("tanh", np.tanh)
sigmoid = _call("sigmoid", np_sigmoid, (-6, 6))
sin = _call("sin", np.sin)
cos = _call("cos", np.cos)
tan = _call("tan", np.tan, (-1, 1))
asin = _call("asin", np.arcsin, (-0.9, 0.9))
acos = _call("acos", np.arccos, (-0.9, 0.9))
atan = _call("atan", np.arctan)
sinh = _call("sinh", np.sinh)
cosh = _call("cosh", np.cosh)
asinh = _call("asinh", np.arcsinh)
acosh = _call("acosh", np.arccosh, (1.1, 5))
atanh = _call("atanh", np.arctanh, (-0.9, 0.9))
floor = _float_call("floor", np.floor)
ceil = _float_call("ceil", np.ceil)
round_ = _float_call("round", np.rint)  # half to even
trunc = _float_call("trunc", np.trunc)
abs_ = unary("abs", lambda e, a: magnitude(e), lambda x, a: np.abs(x), kinds="fi")
neg = unary(
    "neg",
    lambda e, a: e * -1.0 if e.dtype.is_float else const(0, e.dtype) - e,
    lambda x, a: np.negative(x),
    kinds="fi",
    ints=SIGNED,
    content=lambda e: const(0) - e,
)
sign = unary(
    "sign",
    # A NaN fails both comparisons and stays itself, as in numpy.
    lambda e, a: select(
        const(0, e.dtype) < e,
        const(1, e.dtype),
        select(e < 0, const(-1, e.dtype), e) if e.dtype.is_signed else e,
    ),
    lambda x, a: np.sign(x),
    kinds="fi",
)
reciprocal = unary("reciprocal", lambda e, a: 1.0 / e, lambda x, a: 1 / x, domain=(0.1, 3))
square = unary("square", lambda e, a: e * e, lambda x, a: x * x, kinds="fi")
isnan = unary("isnan", lambda e, a: Call("isnan", (e,)), lambda x, a: np.isnan(x), to=bool_)


@dataclass(frozen=True)
class IsInfAttrs:
    positive: bool = True
    negative: bool = True


def _isinf_formula(e: Expr, a: IsInfAttrs) -> Expr:
    found = Call("isinf", (e,))
    if a.positive and a.negative:
        return found
    return binary("and", found, const(0, e.dtype) < e if a.positive else e < 0.0)


isinf = unary(
    "isinf",
    _isinf_formula,
    lambda x, a: (a.positive & np.isposinf(x)) | (a.negative & np.isneginf(x)),
    attrs=IsInfAttrs,
    to=bool_,
    draw_attrs=lambda draw: choice(
        draw, (IsInfAttrs(), IsInfAttrs(negative=False), IsInfAttrs(positive=False))
    ),
)
logical_not = unary(
    "logical_not",
    lambda e, a: Call("not", (e,)),
    lambda x, a: np.logical_not(x),
    kinds="b",
    to=bool_,
    content=lambda e: ~truth(e),
)


def _all_ones(dtype: DType) -> Expr:
    return const(-1 if dtype.is_signed else (1 << dtype.bits) - 1, dtype)


bitwise_not = unary(
    "bitwise_not",
    lambda e, a: Binary("xor", e, _all_ones(e.dtype)),
    lambda x, a: np.bitwise_not(x),
    kinds="i",
)


# ---- two operands -------------------------------------------------------------------------------
def truth(e: Expr) -> Expr:
    """The content of a bool tensor as a bool expression."""
    return e if e.dtype.is_bool else ne(e, 0)


def _content_div(a: Expr, b: Expr) -> Expr:
    """The quotient towards zero, by the division downwards that Arith reasons about."""
    if not known_nonneg(b) or (const_int(a) is not None and const_int(b) is not None):
        return binary("div", a, b)
    if known_nonneg(a):
        return a // b
    return maximum(a, 0) // b - maximum(const(0) - a, 0) // b


def _div(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return truncated_div(a, b) if a.dtype.kind in "iu" else a / b


def _fmod(a: Expr, b: Expr) -> Expr:
    """The remainder with the sign of the dividend."""
    if a.dtype.is_int:
        return a - binary("div", a, b) * b
    r = binary("mod", magnitude(a), magnitude(b))
    return r * select(a < 0.0, const(-1.0, a.dtype), const(1.0, a.dtype))


def _mod(a: Expr, b: Expr) -> Expr:
    """The remainder with the sign of the divisor."""
    if a.dtype.is_int:
        return binary("mod", a, b)
    r = _fmod(a, b)
    apart = binary("or", binary("and", r < 0.0, b > 0.0), binary("and", b < 0.0, r > 0.0))
    return select(apart, r + b, r)


def _bin(op: str) -> Callable[[Expr, Expr], Expr]:
    return lambda a, b: binary(op, a, b)


_NONZERO = (1, 5)
add = _operator("add", _bin("add"), np.add, "fi", content=_bin("add"))
sub = _operator("sub", _bin("sub"), np.subtract, "fi", content=_bin("sub"))
mul = _operator("mul", _bin("mul"), np.multiply, "fi", content=_bin("mul"))
div = _operator(
    "div", _bin("div"), _div, "fi", (-9, 9), _NONZERO, content=_content_div, divides=True
)
power = _operator("power", _bin("pow"), np.power, "fi", (0.1, 3), (0, 3))
mod = _operator(
    "mod", _mod, np.remainder, "fi", (-9, 9), _NONZERO, content=_bin("mod"), divides=True
)
fmod = _operator("fmod", _fmod, np.fmod, "fi", (-9, 9), _NONZERO)
minimum_ = _operator("minimum", minimum, np.minimum, "fi", content=minimum)
maximum_ = _operator("maximum", maximum, np.maximum, "fi", content=maximum)


def _compare(name: str, formula: Callable[[Expr, Expr], Expr], meaning: Any, kinds: str) -> Op:
    def on_sizes(a: Expr, b: Expr) -> Expr:
        return formula(truth(a), truth(b)) if bool_ in (a.dtype, b.dtype) else formula(a, b)

    return _operator(name, formula, meaning, kinds, to=bool_, content=on_sizes)


equal = _compare("equal", eq, np.equal, "fib")
not_equal = _compare("not_equal", ne, np.not_equal, "fib")
less = _compare("less", lambda a, b: a < b, np.less, "fi")
less_equal = _compare("less_equal", lambda a, b: a <= b, np.less_equal, "fi")
greater = _compare("greater", lambda a, b: b < a, np.greater, "fi")
greater_equal = _compare("greater_equal", lambda a, b: b <= a, np.greater_equal, "fi")


def _logic(name: str, op: str, meaning: Any, content: bool = True) -> Op:
    on_sizes = (lambda a, b: binary(op, truth(a), truth(b))) if content else None
    return _operator(name, _bin(op), meaning, "b", to=bool_, content=on_sizes)


logical_and = _logic("logical_and", "and", np.logical_and)
logical_or = _logic("logical_or", "or", np.logical_or)
logical_xor = _logic("logical_xor", "xor", np.logical_xor, content=False)
bitwise_and = _operator("bitwise_and", _bin("and"), np.bitwise_and, "i")
bitwise_or = _operator("bitwise_or", _bin("or"), np.bitwise_or, "i")
bitwise_xor = _operator("bitwise_xor", _bin("xor"), np.bitwise_xor, "i")
_SHIFTED = ("uint8",)
shift_left = _operator("shift_left", _bin("shl"), np.left_shift, "i", (0, 7), (0, 3), _SHIFTED)
shift_right = _operator("shift_right", _bin("shr"), np.right_shift, "i", (0, 99), (0, 3), _SHIFTED)


# ---- where --------------------------------------------------------------------------------------
def _where_infer(cond: Arg, x: Arg, y: Arg, a: NoAttrs) -> TensorType:
    need_dtype("where", cond, "b")
    return TensorType(broadcast("where", cond, x, y), same_dtype("where", x, y))


def _where_compute(cond: te.Tensor, x: te.Tensor, y: te.Tensor, a: NoAttrs) -> te.Tensor:
    return te.map_elements(select, cond, x, y, name="where")


def _where_reference(cond: Any, x: Any, y: Any, a: NoAttrs) -> np.ndarray:
    if symbolic(cond, x, y):
        return on_contents(lambda c, p, q: select(truth(c), p, q), cond, x, y)
    return np.where(cond, x, y)


def _where_samples(draw: Draw) -> tuple[list[np.ndarray], NoAttrs]:
    dtype = choice(draw, dtypes_of("fib"))
    of = broadcastable(draw, 3)
    return [array(draw, of[0], "bool"), *(array(draw, s, dtype) for s in of[1:])], NoAttrs()


where = register(
    Op(
        "where",
        NoAttrs,
        _where_infer,
        direct(_where_compute),
        _where_reference,
        _where_samples,
        shape_math=True,
    )
)


# ---- cast ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class CastAttrs:
    """saturate, rounding: for types of at most 8 bits, see codes.py."""

    dtype: DType = float32
    saturate: bool = True
    rounding: str = "nearest"


def _cast_infer(x: Arg, a: CastAttrs) -> TensorType:
    return TensorType(x.type.shape, a.dtype)


def _cast_compute(x: te.Tensor, a: CastAttrs) -> te.Tensor:
    if a.dtype is x.dtype:
        return te.map_elements(lambda e: e, x, name="cast")

    def formula(e: Expr) -> Expr:
        if e.dtype.is_coded:
            e = codes.decode(e)
        if a.dtype.is_coded:
            return codes.encode(e, a.dtype, a.saturate, a.rounding)
        return ne(e, 0) if a.dtype.is_bool and not e.dtype.is_bool else cast(e, a.dtype)

    return te.map_elements(formula, x, name="cast")


def _cast_reference(x: np.ndarray, a: CastAttrs) -> np.ndarray:
    if symbolic(x):
        if a.dtype.is_bool:
            return on_contents(truth, x)
        return on_contents(lambda e: cast(e, const(0).dtype) if e.dtype.is_bool else e, x)
    if dtype_of(x).is_coded and x.dtype != a.dtype.numpy:
        x = codes.np_decode(x)
    if a.dtype.is_coded and x.dtype != a.dtype.numpy:
        return codes.np_encode(x, a.dtype, a.saturate, a.rounding)
    return np.asarray(x.astype(a.dtype.numpy))


def _cast_samples(draw: Draw) -> tuple[list[np.ndarray], CastAttrs]:
    names = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool")
    if integer(draw, 0, 3) == 0:
        return _coded_samples(draw)
    source = choice(draw, names)
    x = array(draw, shape(draw), source, 0 if flag(draw) else -3, 3)
    to = choice(draw, names)
    # A negative number has no value as an unsigned one.
    return [np.abs(x) if to == "uint8" and source != "bool" else x], CastAttrs(DType(to))


def _coded_samples(draw: Draw) -> tuple[list[np.ndarray], CastAttrs]:
    code = DType(choice(draw, CODED))
    x = array(draw, shape(draw), "float32", 0 if "u" in code.name[:4] else -5, 700)
    if "int" in code.name:
        x = np.asarray(np.rint(x / 100))
    a = CastAttrs(code, flag(draw), choice(draw, ("nearest", "up", "down")))
    if flag(draw):
        return [_cast_reference(x, a)], CastAttrs(DType(choice(draw, ("float32", "float16"))))
    return [np.abs(x) if "e8m0" in code.name else x], a


cast_ = register(
    Op(
        "cast",
        CastAttrs,
        _cast_infer,
        direct(_cast_compute),
        _cast_reference,
        _cast_samples,
        shape_math=True,
    )
)


# ---- clip ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ClipAttrs:
    """Bounds; None: none on that side."""

    low: float | int | None = None
    high: float | int | None = None


def _clip_formula(e: Expr, a: ClipAttrs) -> Expr:
    if a.low is not None:
        e = maximum(e, a.low)
    return e if a.high is None else minimum(e, a.high)


def _clip_reference(x: np.ndarray, a: ClipAttrs) -> np.ndarray:
    x = x if a.low is None else np.maximum(x, np.asarray(a.low, x.dtype))
    return x if a.high is None else np.minimum(x, np.asarray(a.high, x.dtype))


clip = unary(
    "clip",
    _clip_formula,
    _clip_reference,
    kinds="fi",
    attrs=ClipAttrs,
    draw_attrs=lambda draw: ClipAttrs(choice(draw, (None, 0, 1)), choice(draw, (None, 2, 6))),
)


# ---- identity -----------------------------------------------------------------------------------
identity = unary("identity", lambda e, a: e, lambda x, a: x, kinds="fibc", content=lambda e: e)


# ---- bitcast ------------------------------------------------------------------------------------
def _bitcast_infer(x: Arg, a: CastAttrs) -> TensorType:
    if x.type.dtype.bits != a.dtype.bits:
        fail(f"bitcast: the elements of {x.type} have another size than {a.dtype}")
    return TensorType(x.type.shape, a.dtype)


def _bitcast_formula(e: Expr, dtype: DType) -> Expr:
    if dtype.is_bool:
        return ne(codes.bits_of(e, uint8), 0)
    if e.dtype.is_bool:
        e = cast(e, uint8)
    return e if e.dtype is dtype else codes.bits_of(e, dtype)


def _bitcast_compute(x: te.Tensor, a: CastAttrs) -> te.Tensor:
    return te.map_elements(lambda e: _bitcast_formula(e, a.dtype), x, name="bitcast")


def _bitcast_reference(x: np.ndarray, a: CastAttrs) -> np.ndarray:
    return np.ascontiguousarray(x).view(a.dtype.numpy).reshape(x.shape)


def _bitcast_samples(draw: Draw) -> tuple[list[np.ndarray], CastAttrs]:
    pairs = (("float32", "int32"), ("int64", "float64"), ("uint16", "float16"), ("bool", "int8"))
    source, to = choice(draw, pairs)
    return [array(draw, shape(draw), source, 0, 9)], CastAttrs(DType(to))


bitcast = register(
    Op(
        "bitcast",
        CastAttrs,
        _bitcast_infer,
        direct(_bitcast_compute),
        _bitcast_reference,
        _bitcast_samples,
    )
)
