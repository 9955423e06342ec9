"""The one scalar expression language: shapes, loop indices and kernel arithmetic.

Expressions are interned, so `a is b` means structurally equal and `a == b` is the same test.
`a + b`, `a < b`, ... build nodes (integer constants fold at once); `bool(expr)` raises.

    i, n = Var("i"), Dim("n", 1, 64)
    str(i * 16 + 3)            'i*16 + 3'
    free_vars(i * n)           {i, n}
    substitute(i + 1, {i: n})  n + 1
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Union

from .interning import made, table
from .types import DType, bool_, index, int64

Value = Union["Expr", int, float, bool]


class Expr:
    """Base of all expressions. Fields are positional and immutable; `dtype` is derived."""

    __slots__ = ("__weakref__", "_fields", "_free", "_text", "dtype")
    _free: frozenset[Expr] | None
    _text: str | None
    __expr__: ClassVar[bool] = True
    names: ClassVar[tuple[str, ...]] = ()
    dtype: DType
    _fields: tuple[Any, ...]

    def __new__(cls, *fields: Any) -> Any:
        key = (cls, *fields)
        ref = table.get(key)
        found = None if ref is None else ref()
        return made(cls, key, fields) if found is None else found

    def _init(self, *fields: Any) -> None:
        raise NotImplementedError

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._fields

    def children(self) -> Iterable[Expr]:
        """The expressions in this one's fields, in order."""
        for f in self._fields:
            if isinstance(f, Expr):
                yield f
            elif isinstance(f, tuple):
                for x in f:
                    if isinstance(x, Expr):
                        yield x

    def map(self, f: Callable[[Expr], Expr]) -> Expr:
        """This node with `f` applied to each child (rebuilt through the folding constructors)."""
        fields = []
        same = True
        for x in self._fields:
            y: Any
            if isinstance(x, Expr):
                y = f(x)
                same = same and y is x
            elif isinstance(x, tuple) and x and isinstance(x[0], Expr):
                y = tuple([f(z) for z in x])
                same = same and all(a is b for a, b in zip(x, y, strict=True))
            else:
                y = x
            fields.append(y)
        if same:
            return self
        if type(self) is Select:
            return select(fields[0], fields[1], fields[2])
        if type(self) is Cast:
            return cast(fields[1], fields[0])
        return type(self)(*fields)

    def __bool__(self) -> bool:
        raise TypeError(f"the truth value of the expression `{self}` is not known while compiling")

    def __str__(self) -> str:
        if self._text is None:
            from .expr_text import text_of

            self._text = text_of(self)
        return self._text

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"

    # `==` and hash stay object identity, which interning makes structural equality.
    def __add__(self, o: Value) -> Expr:
        return binary("add", self, o)

    def __radd__(self, o: Value) -> Expr:
        return binary("add", o, self)

    def __sub__(self, o: Value) -> Expr:
        return binary("sub", self, o)

    def __rsub__(self, o: Value) -> Expr:
        return binary("sub", o, self)

    def __mul__(self, o: Value) -> Expr:
        return binary("mul", self, o)

    def __rmul__(self, o: Value) -> Expr:
        return binary("mul", o, self)

    def __truediv__(self, o: Value) -> Expr:
        return binary("div", self, o)

    def __rtruediv__(self, o: Value) -> Expr:
        return binary("div", o, self)

    def __floordiv__(self, o: Value) -> Expr:
        return binary("floordiv", self, o)

    def __rfloordiv__(self, o: Value) -> Expr:
        return binary("floordiv", o, self)

    def __mod__(self, o: Value) -> Expr:
        return binary("mod", self, o)

    def __rmod__(self, o: Value) -> Expr:
        return binary("mod", o, self)

    def __lt__(self, o: Value) -> Expr:
        return binary("lt", self, o)

    def __le__(self, o: Value) -> Expr:
        return binary("le", self, o)

    def __gt__(self, o: Value) -> Expr:
        return binary("lt", o, self)

    def __ge__(self, o: Value) -> Expr:
        return binary("le", o, self)

    def __neg__(self) -> Expr:
        return binary("sub", const(0, self.dtype), self)

    def __and__(self, o: Value) -> Expr:
        return binary("and", self, o)

    def __or__(self, o: Value) -> Expr:
        return binary("or", self, o)

    def __invert__(self) -> Expr:
        return logical_not(self)


class Leaf(Expr):
    """An expression without others in it."""

    __slots__ = ()

    def children(self) -> Iterable[Expr]:
        return ()

    def map(self, f: Callable[[Expr], Expr]) -> Expr:
        return self


class Const(Leaf):
    """A literal. Floats are interned by their bits, so -0.0 and NaN are told apart."""

    __slots__ = ("value",)
    names = ("value",)
    value: Any

    def __new__(cls, value: Any, dtype: DType = index) -> Any:
        if dtype.is_float:
            value = float(value)
            key: tuple[Any, ...] = (cls, struct.pack("<d", value), dtype)
        else:
            value = bool(value) if dtype.is_bool else int(value)
            key = (cls, value, dtype)
        ref = table.get(key)
        found = None if ref is None else ref()
        return made(cls, key, (value, dtype)) if found is None else found

    def _init(self, *fields: Any) -> None:
        self.value, self.dtype = fields


class Var(Leaf):
    """A named scalar: a loop variable, a tensor-expression axis, a let-bound value."""

    __slots__ = ("name",)
    names = ("name",)
    name: str

    def __new__(cls, name: str, dtype: DType = index) -> Any:
        return super().__new__(cls, name, dtype)

    def _init(self, *fields: Any) -> None:
        self.name, self.dtype = fields


class Dim(Leaf):
    """A symbolic dimension, `lo <= name <= hi` (hi None: unbounded), a multiple of
    `multiple_of`."""

    __slots__ = ("hi", "lo", "multiple_of", "name")
    names = ("name",)
    name: str
    lo: int
    hi: int | None
    multiple_of: int

    def __new__(cls, name: str, lo: int = 1, hi: int | None = None, multiple_of: int = 1) -> Any:
        return super().__new__(cls, name, lo, hi, multiple_of)

    def _init(self, *fields: Any) -> None:
        self.name, self.lo, self.hi, self.multiple_of = fields
        self.dtype = int64


COMPARE = ("lt", "le", "eq", "ne")
LOGIC = ("and", "or")


class Binary(Expr):
    """`op` of two operands of one dtype.

    add sub mul min max, maxnum (b if b > a else a: ignores what is NaN in b), div (floats: IEEE;
    integers: toward zero), floordiv and mod (floor, as in Python), pow, lt le eq ne (result bool),
    and or xor (bool or integer), shl shr (integers).
    Integer arithmetic wraps; division by zero is undefined.
    """

    __slots__ = ("a", "b", "op")
    names = ("op", "a", "b")
    op: str
    a: Expr
    b: Expr

    def _init(self, *fields: Any) -> None:
        self.op, self.a, self.b = fields
        self.dtype = bool_.with_lanes(self.a.dtype.lanes) if self.op in COMPARE else self.a.dtype

    # As in Expr, but most expressions are of this kind.
    def children(self) -> Iterable[Expr]:
        return self.a, self.b

    def map(self, f: Callable[[Expr], Expr]) -> Expr:
        a, b = f(self.a), f(self.b)
        return self if a is self.a and b is self.b else binary(self.op, a, b)


class Cast(Expr):
    """Conversion as numpy's `astype`; float to integer truncates toward zero."""

    __slots__ = ("a",)
    names = ("dtype", "a")
    a: Expr

    def _init(self, *fields: Any) -> None:
        self.dtype, self.a = fields


class Select(Expr):
    """`a` where `cond`, else `b`. Both sides may be evaluated, so both must be safe to evaluate,
    except loads, which are done only on their own side."""

    __slots__ = ("a", "b", "cond")
    names = ("cond", "a", "b")
    cond: Expr
    a: Expr
    b: Expr

    def _init(self, *fields: Any) -> None:
        self.cond, self.a, self.b = fields
        self.dtype = self.a.dtype


class Call(Expr):
    """A scalar function: exp log tanh erf sqrt floor ceil fma(a, b, c) bitcast ... Lanewise on
    vectors. dot_pairs(a, b): the sum of the products of two pairs of int16, each in an int32."""

    __slots__ = ("args", "fn")
    names = ("fn", "args")
    fn: str
    args: tuple[Expr, ...]

    def __new__(cls, fn: str, args: tuple[Expr, ...], dtype: DType | None = None) -> Any:
        if dtype is None:
            dtype = bool_.with_lanes(args[0].dtype.lanes) if fn in PREDICATES else args[0].dtype
        return super().__new__(cls, fn, args, dtype)

    def _init(self, *fields: Any) -> None:
        self.fn, self.args, self.dtype = fields


PREDICATES = ("isnan", "isinf")


def factors(e: Expr) -> tuple[Expr, Expr] | None:
    """The two operands of a product, be it of numbers or of pairs; None for anything else."""
    if type(e) is Binary and e.op == "mul":
        return e.a, e.b
    return (e.args[0], e.args[1]) if type(e) is Call and e.fn == "dot_pairs" else None


class Load(Expr):
    """One element of a buffer at logical indices; zero where `mask` is false."""

    __slots__ = ("buffer", "indices", "mask")
    names = ("buffer", "indices", "mask")
    buffer: Any
    indices: tuple[Expr, ...]
    mask: Expr | None

    def __new__(cls, buffer: Any, indices: tuple[Expr, ...], mask: Expr | None = None) -> Any:
        return super().__new__(cls, buffer, indices, mask)

    def _init(self, *fields: Any) -> None:
        self.buffer, self.indices, self.mask = fields
        lanes = max([i.dtype.lanes for i in self.indices], default=1)
        self.dtype = self.buffer.dtype.with_lanes(lanes)


class Ramp(Expr):
    """The vector base, base + stride, ..., base + (lanes - 1) * stride."""

    __slots__ = ("base", "lanes", "stride")
    names = ("base", "stride", "lanes")
    base: Expr
    stride: Expr
    lanes: int

    def _init(self, *fields: Any) -> None:
        self.base, self.stride, self.lanes = fields
        self.dtype = self.base.dtype.with_lanes(self.lanes)


class Splat(Expr):
    """One scalar in every lane."""

    __slots__ = ("lanes", "value")
    names = ("value", "lanes")
    value: Expr
    lanes: int

    def _init(self, *fields: Any) -> None:
        self.value, self.lanes = fields
        self.dtype = self.value.dtype.with_lanes(self.lanes)


class Reduce(Expr):
    """`combiner` of `body` over `axes` ((var, extent) pairs). Only in tensor expressions, at the
    top.

    combiner: sum prod max maxnum min and or. `acc_dtype` is the dtype the running value is kept in.
    """

    __slots__ = ("axes", "body", "combiner", "extents")
    names = ("combiner", "axes", "extents", "body")
    combiner: str
    axes: tuple[Var, ...]
    extents: tuple[Expr, ...]
    body: Expr

    def _init(self, *fields: Any) -> None:
        self.combiner, self.axes, self.extents, self.body = fields
        self.dtype = self.body.dtype


# ---- constructors that fold -------------------------------------------------------------------
def const(value: Any, dtype: DType = index) -> Expr:
    """A literal, splatted when `dtype` has several lanes."""
    if dtype.lanes > 1:
        return Splat(Const(value, dtype.scalar), dtype.lanes)
    return Const(value, dtype)


def wrap(value: Value, dtype: DType = index) -> Expr:
    """An Expr from a Python number (numbers take `dtype`)."""
    return value if isinstance(value, Expr) else const(value, dtype)


ZERO, ONE = Const(0), Const(1)
TRUE, FALSE = Const(True, bool_), Const(False, bool_)


def fold(op: str, a: Any, b: Any, dtype: DType) -> Any:
    """The value of an integer or bool operation on Python numbers; None when undefined."""
    if op in ("floordiv", "mod", "div") and b == 0:
        return None
    result = _FOLD[op](a, b)
    return wrapped(result, dtype) if dtype.is_int and op not in COMPARE else result


def wrapped(value: int, dtype: DType) -> int:
    """The number of an integer type that `value` is after overflow."""
    span = 1 << dtype.bits
    value &= span - 1
    return value - span if dtype.is_signed and value >= span >> 1 else value


_FOLD: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "div": lambda a, b: (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1),
    "floordiv": lambda a, b: a // b, "mod": lambda a, b: a % b,
    "min": min, "max": max, "maxnum": max, "pow": lambda a, b: a**b if b >= 0 else 0,
    "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: a << b, "shr": lambda a, b: a >> b,
}  # fmt: skip


def binary(op: str, a: Value, b: Value) -> Expr:
    """`Binary(op, a, b)`; numbers take the other side's dtype, integer constants fold."""
    x = a if isinstance(a, Expr) else const(a, b.dtype if isinstance(b, Expr) else index)
    y = b if isinstance(b, Expr) else const(b, x.dtype)
    if x.dtype is not y.dtype:
        if x.dtype.lanes == 1:
            x = Splat(x, y.dtype.lanes) if y.dtype.lanes > 1 else x
        elif y.dtype.lanes == 1:
            y = Splat(y, x.dtype.lanes)
        if x.dtype is not y.dtype:
            raise TypeError(f"{op} of {x.dtype} `{x}` and {y.dtype} `{y}`")
    if not x.dtype.is_float:
        if isinstance(y, Const):
            if isinstance(x, Const):
                value = fold(op, x.value, y.value, x.dtype)
                if value is not None:
                    return Const(value, bool_ if op in COMPARE else x.dtype)
            else:
                short = _right_identity(op, x, y.value)
                if short is not None:
                    return short
        elif isinstance(x, Const) and op in ("add", "mul", "and", "or", "min", "max"):
            short = _right_identity(op, y, x.value)
            if short is not None:
                return short
        if x is y and op in ("min", "max", "and", "or"):
            return x
        if x is y and op in ("eq", "le"):
            return const(True, bool_.with_lanes(x.dtype.lanes))
    return Binary(op, x, y)


def _right_identity(op: str, a: Expr, value: Any) -> Expr | None:
    """`a op value` where that is `a` itself or a constant; None otherwise."""
    if a.dtype.is_bool:
        if op == "and":
            return a if value else const(False, a.dtype)
        if op == "or":
            return const(True, a.dtype) if value else a
        return None
    if value == 0:
        if op in ("add", "sub", "or", "shl", "shr"):
            return a
        if op in ("mul", "and"):
            return const(0, a.dtype)
    if value == 1:
        if op in ("mul", "div", "floordiv"):
            return a
        if op == "mod":
            return const(0, a.dtype)
    return None


def minimum(a: Value, b: Value) -> Expr:
    return binary("min", a, b)


def maximum(a: Value, b: Value) -> Expr:
    return binary("max", a, b)


def eq(a: Value, b: Value) -> Expr:
    return binary("eq", a, b)


def ne(a: Value, b: Value) -> Expr:
    return binary("ne", a, b)


def logical_not(a: Expr) -> Expr:
    """Negation of a bool; comparisons of integers are flipped rather than wrapped."""
    if type(a) is Const:
        return Const(not a.value, bool_)
    if type(a) is Binary and not a.a.dtype.is_float:
        if a.op == "lt":
            return binary("le", a.b, a.a)
        if a.op == "le":
            return binary("lt", a.b, a.a)
        if a.op in ("eq", "ne"):
            return binary("ne" if a.op == "eq" else "eq", a.a, a.b)
    return Call("not", (a,))


def select(cond: Expr, a: Expr, b: Expr) -> Expr:
    """`Select`, decided at once where the condition is a constant, or the result."""
    if type(cond) is Const:
        return a if cond.value else b
    if a is TRUE and b is FALSE:
        return cond
    return a if a is b else Select(cond, a, b)


def cast(a: Expr, dtype: DType) -> Expr:
    """`Cast` to `dtype` (lane count follows `a`); folds integer constants."""
    dtype = dtype.with_lanes(a.dtype.lanes)
    if a.dtype is dtype:
        return a
    if type(a) is Const and not a.dtype.is_float and (dtype.is_float or 0 <= a.value < 128):
        return Const(a.value, dtype)
    return Cast(dtype, a)


def all_of(conds: Iterable[Expr]) -> Expr:
    """The conjunction of bools; TRUE when there are none."""
    result: Expr = TRUE
    for c in conds:
        result = binary("and", result, c)
    return result


def conjuncts(cond: Expr) -> list[Expr]:
    """The parts of a conjunction, in order; [] for TRUE."""
    if cond is TRUE:
        return []
    if type(cond) is Binary and cond.op == "and":
        return conjuncts(cond.a) + conjuncts(cond.b)
    return [cond]


def product(values: Iterable[Value]) -> Expr:
    """The product of index expressions; 1 when there are none."""
    result: Expr = ONE
    for v in values:
        result = result * v
    return result


def ceildiv(a: Value, b: Value) -> Expr:
    """ceil(a / b) for b > 0."""
    a, b = wrap(a), wrap(b)
    return (a + (b - 1)) // b


def const_int(e: Expr | int) -> int | None:
    """The value of an integer constant, else None."""
    if isinstance(e, int):
        return e
    return e.value if type(e) is Const else None


# ---- traversal ----------------------------------------------------------------------------------
_EMPTY: frozenset[Expr] = frozenset()


def free_vars(e: Expr) -> frozenset[Expr]:
    """The Vars and Dims in `e` (the axes of a Reduce excluded)."""
    if e._free is None:
        if isinstance(e, Var | Dim):
            e._free = frozenset((e,))
        else:
            parts = [free_vars(c) for c in e.children()]
            free = parts[0] if len(parts) == 1 else _EMPTY.union(*parts)
            e._free = free - frozenset(e.axes) if type(e) is Reduce else free
    return e._free


def substitute(e: Expr, mapping: Mapping[Expr, Expr]) -> Expr:
    """`e` with all keys (Vars or Dims) replaced at once."""
    keys = frozenset(mapping)
    memo: dict[Expr, Expr] = {}

    def go(x: Expr) -> Expr:
        if keys.isdisjoint(free_vars(x)):
            return x
        done = memo.get(x)
        if done is None:
            done = mapping[x] if isinstance(x, Var | Dim) else x.map(go)
            memo[x] = done
        return done

    return go(e)


def rewrite(
    e: Expr, f: Callable[[Expr], Expr | None], memo: dict[Expr, Expr] | None = None
) -> Expr:
    """Bottom-up: `f` sees each node after its children and returns a replacement or None."""
    memo = {} if memo is None else memo

    def go(x: Expr) -> Expr:
        done = memo.get(x)
        if done is None:
            y = x.map(go)
            z = f(y)
            done = memo[x] = y if z is None else z
        return done

    return go(e)


def walk(e: Expr, into_loads: bool = True) -> Iterator[Expr]:
    """Every distinct subexpression once, parents before children. into_loads: also what tells
    where a load reads."""
    seen: set[Expr] = set()
    stack = [e]
    while stack:
        x = stack.pop()
        if x not in seen:
            seen.add(x)
            yield x
            if into_loads or type(x) is not Load:
                stack.extend(x.children())


def loads(e: Expr) -> list[Load]:
    """The distinct loads in `e`."""
    return [x for x in walk(e) if type(x) is Load]


def group_along(load: Load, var: Expr) -> int | None:
    """How many neighbours along an axis read the same elements, those of a group: 8 of
    `x[i // 8 * 4 + k]`. 1 where none do; None where all do, as `i` has no part in the indices."""
    uses = [e for i in load.indices for e in walk(i) if var in e.children()]
    groups = [
        e.b.value
        for e in uses
        if type(e) is Binary and e.op == "floordiv" and e.a is var and type(e.b) is Const
    ]
    if var in load.indices or len(groups) < len(uses):
        return 1
    return math.gcd(*groups) if groups else None
