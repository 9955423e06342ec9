"""The text of an expression: what `str` shows, in stages, messages and names.

text_of(i * 16 + 3)      'i*16 + 3'
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from .expr import ONE, Binary, Call, Cast, Const, Dim, Expr, Load, Ramp, Reduce, Select, Splat, Var

_SYMBOL = {
    "add": ("+", 4), "sub": ("-", 4), "mul": ("*", 5), "div": ("/", 5), "floordiv": ("//", 5),
    "mod": ("%", 5), "lt": ("<", 3), "le": ("<=", 3), "eq": ("==", 3), "ne": ("!=", 3),
    "and": ("and", 2), "or": ("or", 1),
}  # fmt: skip
_LONG = 1000
"""The text of an expression with more parts, shared ones counted as often as they are used, names
these."""


def text_of(e: Expr) -> str:
    """The text of an expression. A long one names what it uses several times, since it would double
    with each such use: `%0 * max(%0, 0.0) where %0 = x[i] + 1.0`."""
    sizes: dict[Expr, int] = {}  # inner expressions first
    uses: dict[Expr, int] = {}

    def size(x: Expr) -> int:
        uses[x] = uses.get(x, 0) + 1
        if x not in sizes:
            sizes[x] = 1 + sum(map(size, x.children()))
        return sizes[x]

    names: dict[Expr, str] = {}
    if size(e) <= _LONG:
        return _written(e, names)
    meanings = []
    for x in sizes:
        if uses[x] > 1 and x.children():
            name = f"%{len(names)}"
            meanings.append(f"{name} = {_written(x, names)}")
            names[x] = name
    where = f" where {', '.join(reversed(meanings))}" if meanings else ""
    return _written(e, names) + where


def _written(e: Expr, names: Mapping[Expr, str]) -> str:
    """The text of an expression, with names for some that it consists of."""

    def many(xs: Iterable[Expr]) -> str:
        return ", ".join(map(go, xs))

    def go(x: Expr, level: int = 0) -> str:
        if x in names:
            return names[x]
        if type(x) is Const:
            return _number(x)
        if isinstance(x, Var | Dim):
            return x.name
        if type(x) is Binary:
            if x.op not in _SYMBOL:
                return f"{x.op}({go(x.a)}, {go(x.b)})"
            symbol, mine = _SYMBOL[x.op]
            a, b = go(x.a, mine), go(x.b, mine + 1)
            tight = mine >= 5
            text = f"{a}{symbol}{b}" if tight else f"{a} {symbol} {b}"
            return f"({text})" if mine < level else text
        if type(x) is Cast:
            return f"{x.dtype}({go(x.a)})"
        if type(x) is Select:
            return f"select({many((x.cond, x.a, x.b))})"
        if type(x) is Call:
            return f"{x.fn}({many(x.args)})"
        if type(x) is Load:
            mask = "" if x.mask is None else f" if {go(x.mask)}"
            return f"{x.buffer.name}[{many(x.indices)}{mask}]"
        if type(x) is Ramp:
            step = "" if x.stride is ONE else f":{go(x.stride)}"
            return f"<{go(x.base)}..{step}x{x.lanes}>"
        if type(x) is Splat:
            return f"<{go(x.value)}>x{x.lanes}"
        if type(x) is Reduce:
            axes = ", ".join(f"{v}<{go(n)}" for v, n in zip(x.axes, x.extents, strict=True))
            return f"{x.combiner}({go(x.body)}, {axes})"
        raise TypeError(type(x).__name__)

    return go(e)


def _number(e: Const) -> str:
    if e.dtype.is_float:
        text = repr(e.value)
        if math.isfinite(e.value) and e.dtype.name == "float32":
            short = f"{e.value:.9g}"
            text = short if "." in short or "e" in short else short + ".0"
        return text if e.dtype.name == "float32" else f"{text}{e.dtype.name[0]}{e.dtype.bits}"
    return str(e.value)
