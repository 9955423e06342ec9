"""What type rules and computes share: sizes that may be symbolic, broadcasting, accumulators.

same_size(n, 4)              None: undecided until run time (True, False: proven)
broadcast("add", a, b)       numpy's rule on Args, or ShapeError naming both shapes
axis_of(-1, 4, "softmax")    3
elements(f, x, y)            te tensor of f(x[i], y[i]); 16-bit floats are computed in float32
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import numpy as np

from .. import te
from ..errors import ShapeError
from ..ir.arith import Arith
from ..ir.expr import Const, Expr, binary, cast, const, const_int, eq, select, wrap
from ..ir.op import Arg, Compute, assume_equal
from ..ir.types import DType, TensorType, float32, int32, int64

Size = Expr | int
Shape = tuple[Expr, ...]


# ---- refusing -----------------------------------------------------------------------------------
def fail(message: str, hint: str = "") -> NoReturn:
    """Refuses the arguments of an operator."""
    raise ShapeError(message, hint=hint)


def text(shape: Iterable[Size]) -> str:
    """`[batch, 3, 224]`."""
    return f"[{', '.join(map(str, shape))}]"


def need_rank(op: str, x: Arg, least: int, most: int | None = None) -> int:
    """The rank of `x` where it lies in range; ShapeError otherwise."""
    rank = x.type.rank
    if rank < least or (most is not None and rank > most):
        if most == least:
            wanted = str(least)
        else:
            wanted = f"at least {least}" if most is None else f"{least} to {most}"
        fail(f"{op} takes {wanted} dimensions, got {rank}: {x.type}")
    return rank


def need_dtype(op: str, x: Arg, kinds: str) -> None:
    """Checks the element type. kinds: letters of f(loat) i(nteger) b(ool) c(oded: only stored)."""
    t = x.type.dtype
    if ("f" if t.is_float else "b" if t.is_bool else "i" if t.is_int else "c") not in kinds:
        names = {"f": "float", "i": "integer", "b": "bool", "c": "stored"}
        wanted = " or ".join(names[k] for k in kinds)
        fail(f"{op} takes {wanted} elements, got {t}", "insert a Cast")


def same_dtype(op: str, *args: Arg | None) -> DType:
    """The element type that all arguments share."""
    types = [a.type.dtype for a in args if a is not None]
    if any(t is not types[0] for t in types):
        fail(f"{op} of different element types: {', '.join(map(str, types))}", "insert a Cast")
    return types[0]


def axis_of(axis: int, rank: int, op: str) -> int:
    """A non-negative axis number."""
    if not -rank <= axis < rank:
        fail(f"{op}: axis {axis} is out of range for {rank} dimensions")
    return axis % rank


def axes_of(axes: Sequence[int] | None, rank: int, op: str) -> tuple[int, ...]:
    """Sorted non-negative axis numbers; None means all."""
    if axes is None:
        return tuple(range(rank))
    found = [axis_of(a, rank, op) for a in axes]
    if len(set(found)) != len(found):
        fail(f"{op}: axes {tuple(axes)} name a dimension twice")
    return tuple(sorted(found))


# ---- sizes --------------------------------------------------------------------------------------
# Every pass and every kernel infers types again, of many nodes with the same sizes: what was found
# out about them is remembered.
_remembered = functools.lru_cache(maxsize=4096)


@_remembered
def simplified(e: Size) -> Expr:
    """The canonical form of a size."""
    return e if type(e) is Const else Arith().simplify(wrap(e))


@_remembered
def same_size(a: Size, b: Size) -> bool | None:
    """True: always equal. False: never. None: known only at run time."""
    return Arith().prove(eq(wrap(a), wrap(b)))


@_remembered
def surely_equal(a: Size, b: Size) -> bool:
    """True where `same_size` is, without the search for a proof that two sizes never are equal."""
    arith = Arith()
    return arith.poly(wrap(a)) == arith.poly(wrap(b))


def unequal(a: Size, b: Size) -> bool:
    """True when two sizes can never be equal. Undecided ones are taken to be equal from here on,
    and
    checked at every call."""
    same = same_size(a, b)
    if same is None:
        assume_equal(wrap(a), wrap(b))
    return same is False


@_remembered
def known_nonneg(e: Size) -> bool:
    """True when a size expression cannot be negative."""
    return Arith().prove(Const(0) <= wrap(e)) is True


def need_same(op: str, what: str, a: Size, b: Size) -> None:
    """Refuses sizes that can never be equal; undecided ones are left to the run-time guards."""
    if unequal(a, b):
        fail(f"{op}: {what} do not match: {a} and {b}")


def need_const(op: str, what: str, e: Size) -> int:
    """A size that has to be known while compiling."""
    value = const_int(e)
    if value is None:
        hint = "give the dimension a value"
        fail(f"{op}: {what} is {e}, but has to be known while compiling", hint)
    return value


def broadcast(op: str, *args: Arg) -> Shape:
    """The shape of an elementwise result (numpy's rule).

    Sizes that may or may not be equal are taken to be equal; which one names the result agrees
    with `te.broadcast_shape`.
    """
    return broadcast_sizes(op, *(a.type.shape for a in args))


def broadcast_sizes(op: str, *shapes: Shape) -> Shape:
    """`broadcast` on bare shapes."""
    result = te.broadcast_shape(shapes)
    for s in shapes:
        for got, size in zip(result[len(result) - len(s) :], s, strict=True):
            if const_int(size) != 1 and unequal(got, size):
                fail(
                    f"{op}: shapes {' and '.join(map(text, shapes))} cannot be broadcast",
                    f"sizes {got} and {size} differ and neither is 1",
                )
    return result


def content_sizes(op: str, what: str, arg: Arg | None) -> tuple[Expr, ...]:
    """The elements of a shape argument as expressions."""
    if arg is None or arg.content is None:
        fail(f"{op}: {what} is computed from data", "only shapes and constants may determine it")
    return tuple(arg.content.reshape(-1))


def content_ints(op: str, what: str, arg: Arg | None) -> tuple[int, ...]:
    """The elements of a shape argument, which have to be constants."""
    return tuple(need_const(op, what, e) for e in content_sizes(op, what, arg))


# ---- element types ------------------------------------------------------------------------------
def is_low(dtype: DType) -> bool:
    """True for the 16-bit floats, which are computed in float32."""
    return dtype.is_float and dtype.bits == 16


def wide(dtype: DType) -> DType:
    """The type that sums and functions of `dtype` are computed in."""
    return float32 if is_low(dtype) else dtype


def short_index(size: Expr) -> DType:
    """The shortest type that positions on an axis of this size are computed in. (Vectors of int32
    have twice as many lanes, and there is an instruction for their minimum.)"""
    return int32 if Arith().prove(size < (1 << 31) - 1) else int64


def widened(x: te.Tensor) -> te.Tensor:
    """`x` in the type it is computed in."""
    return te.astype(x, wide(x.dtype))


def elements(f: Callable[..., Expr], *xs: te.Operand, name: str) -> te.Tensor:
    """f on corresponding elements; 16-bit floats are widened before and results narrowed after."""
    first = next(x for x in xs if isinstance(x, te.Tensor))
    if not is_low(first.dtype):
        return te.map_elements(f, *xs, name=name)

    def inside(*e: Expr) -> Expr:
        result = f(*(cast(v, wide(v.dtype)) for v in e))
        return cast(result, first.dtype) if result.dtype is float32 else result

    return te.map_elements(inside, *xs, name=name)


def lowest(dtype: DType) -> Const:
    """The identity of max."""
    if dtype.is_float:
        return Const(float("-inf"), dtype)
    if dtype.is_bool:
        return Const(False, dtype)
    return Const(-(1 << (dtype.bits - 1)) if dtype.is_signed else 0, dtype)


def number(e: Expr, dtype: DType) -> Expr:
    """An index expression as a number of `dtype` (constants fold)."""
    return Const(e.value, dtype) if type(e) is Const else cast(e, dtype)


def inside(index: Expr, size: Size) -> Expr:
    """The condition 0 <= index < size."""
    return binary("and", const(0) <= index, index < wrap(size))


def clamped(index: Expr, size: Size) -> Expr:
    """`index` moved into 0 .. size - 1."""
    return binary("max", binary("min", index, wrap(size) - 1), 0)


def wrapped(index: Expr, size: Size) -> Expr:
    """A data-dependent index: negative ones count from the end, all stay within the tensor."""
    index = cast(index, Const(0).dtype)
    return clamped(select(index < 0, index + size, index), size)


# ---- building operators -------------------------------------------------------------------------
def direct(build: Callable[..., Any]) -> tuple[Compute, ...]:
    """The `computes` of an operator with one."""
    return (Compute("direct", build),)


def float32_inside(f: Callable[..., Any]) -> Callable[..., Any]:
    """A numpy reference that computes 16-bit floats in float32 and rounds once at the end."""

    def reference(*args: Any) -> Any:
        *arrays, attrs = args
        first = next((a for a in arrays if a is not None and _low_array(a)), None)
        if first is None:
            return f(*args)
        up = [a.astype(np.float32) if a is not None and _low_array(a) else a for a in arrays]
        result = f(*up, attrs)
        if isinstance(result, tuple):
            return tuple(_narrow(r, first.dtype) for r in result)
        return _narrow(result, first.dtype)

    return reference


def _low_array(a: np.ndarray) -> bool:
    return a.dtype.itemsize == 2 and a.dtype.kind not in "iub"


def _narrow(a: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return np.asarray(a).astype(dtype) if np.asarray(a).dtype == np.float32 else a


def symbolic(*arrays: Any) -> bool:
    """True when a reference is called on contents (object arrays of expressions)."""
    return any(isinstance(a, np.ndarray) and a.dtype == object for a in arrays)


def on_contents(f: Callable[..., Expr], *arrays: np.ndarray) -> np.ndarray:
    """f on corresponding elements of contents, with numpy broadcasting."""
    lifted = np.frompyfunc(lambda *e: simplified(f(*map(wrap, e))), len(arrays), 1)
    return np.asarray(lifted(*arrays), dtype=object)


def optional(rest: Sequence[Any], count: int = 1) -> tuple[Any, ...]:
    """(optional arguments, None where absent, attrs) of what follows the arguments proper."""
    *given, attrs = rest
    return (*given, *(None,) * (count - len(given)), attrs)


def result(shape: Iterable[Size], dtype: DType) -> TensorType:
    """A TensorType with simplified sizes."""
    return TensorType(tuple(simplified(s) for s in shape), dtype)
