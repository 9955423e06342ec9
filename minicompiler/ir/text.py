"""The printed form of IR: deterministic, so that stage records and golden tests can compare it.

In: a graph Function. Out, from `function_text(fn)`:
    fn net(%x: float32[n, 3, 8, 8]) {  # n in 1..64
      @conv.weight : float32[4, 3, 3, 3]
      %0 = conv(%x, @conv.weight) {pads=((1, 1), (1, 1))} : float32[n, 4, 8, 8]  # Conv "conv"
      %1 = relu(%0) : float32[n, 4, 8, 8]  # Relu "act"
      return y=%1
    }
An Apply of a fused Function is followed by that function's body, indented.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .expr import Dim, Expr
from .graph import Apply, Constant, Function, Input, Item, Value, function_dims, topological
from .layout import IndexMap
from .types import DType, Loc

_MAX_LOCS = 4


def function_text(fn: Function) -> str:
    """The whole function, one line per node, fused functions nested below their use."""
    return "\n".join(line for line, _ in function_lines(fn)) + "\n"


def function_lines(fn: Function, locs: bool = True) -> list[tuple[str, Value | None]]:
    """The printed lines, each with the node it defines (None for the lines around them).

    Bodies of fused functions are printed without locations: equal kernels share one body, so its
    locations are those of the first use.
    """
    order = topological(fn.results)
    names = value_names(fn, order)
    dims = ", ".join(map(dim_text, function_dims(fn)))
    params = ", ".join(_param(p, names[id(p)]) for p in fn.params)
    lines: list[tuple[str, Value | None]] = [
        (f"fn {fn.name}({params}) {{" + (f"  # {dims}" if dims else ""), None)
    ]
    for v in order:
        if isinstance(v, Constant) and v.data.size != 1:
            lines.append((f"  {names[id(v)]} : {v.type}{_layout(v.layout)}", v))
    for v in order:
        if not isinstance(v, Apply):
            continue
        where = f"  # {locs_text(v.locs)}" if locs and v.locs else ""
        lines.append((f"  {_apply(v, names)}{where}", v))
        if isinstance(v.op, Function):
            lines.extend(("  " + line, None) for line, _ in function_lines(v.op, False)[1:])
    results = [names.get(id(r), "?") for r in fn.results]
    if len(fn.result_names) == len(results):
        labels = [r.lstrip("%@") for r in results]
        results = [
            r if label == name else f"{_plain(name)}={r}"
            for name, r, label in zip(fn.result_names, results, labels, strict=True)
        ]
    lines.append((f"  return {', '.join(results)}", None))
    lines.extend((f"  # not fused: {reason}", None) for reason in fn.reasons)
    lines.append(("}", None))
    return lines


def value_names(fn: Function, order: Sequence[Value]) -> dict[int, str]:
    """id(value) -> its printed name: `%input`, `@constant`, `%3` for the fourth Apply, `%3.1`."""
    names: dict[int, str] = {}
    taken: set[str] = set()

    def fresh(sigil: str, wanted: str) -> str:
        name, k = sigil + wanted, 1
        while name in taken:
            name, k = f"{sigil}{wanted}.{k}", k + 1
        taken.add(name)
        return name

    for p in fn.params:
        names[id(p)] = fresh("%", _plain(p.name))
    counter = 0
    for v in order:
        if id(v) in names:
            continue
        if isinstance(v, Apply):
            names[id(v)] = f"%{counter}"
            counter += 1
        elif isinstance(v, Item):
            names[id(v)] = f"{names[id(v.tuple)]}.{v.index}"
        elif isinstance(v, Constant):
            names[id(v)] = (
                scalar_text(v.data) if v.data.size == 1 else fresh("@", _plain(v.name) or "c")
            )
        else:
            assert isinstance(v, Input)
            names[id(v)] = fresh("%", _plain(v.name))
    return names


def scalar_text(data: np.ndarray) -> str:
    """A one-element tensor as a literal: `2.0`, `int64 [3]` when it has axes."""
    text = f"{data.dtype} {data.reshape(-1)[0]}"
    return text if not data.ndim else f"{data.dtype} {data.tolist()}"


def dim_text(d: Dim) -> str:
    """`n in 1..64`, `n in 1..` without an upper bound, `n in 8..64 step 8`."""
    step = f" step {d.multiple_of}" if d.multiple_of != 1 else ""
    return f"{d.name} in {d.lo}..{'' if d.hi is None else d.hi}{step}"


def attrs_text(attrs: Any) -> str:
    """` {name=value, ...}` of the attributes that differ from their defaults; "" when none does."""
    if not dataclasses.is_dataclass(attrs):
        return ""
    parts = []
    for f in dataclasses.fields(attrs):
        value = getattr(attrs, f.name)
        if f.default is not dataclasses.MISSING and _same(value, f.default):
            continue
        parts.append(f"{f.name}={value_text(value)}")
    return f" {{{', '.join(parts)}}}" if parts else ""


def value_text(value: Any) -> str:
    """An attribute's value."""
    if isinstance(value, Function):
        return function_text(value)
    if isinstance(value, Expr | DType | IndexMap):
        return str(value)
    if isinstance(value, tuple | list):
        inner = ",".join(map(value_text, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    return repr(value)


def content_text(content: np.ndarray) -> str:
    """The known value of a shape tensor: `[n, 12, 64]`."""
    if content.ndim == 0:
        return str(content.item())
    rows = [content_text(r) if isinstance(r, np.ndarray) else str(r) for r in content]
    return f"[{', '.join(rows)}]"


def locs_text(locs: Sequence[Loc]) -> str:
    """`Conv "conv1" + Relu "act1"`."""
    shown = [f'{loc.op} "{loc.name}"'.strip() for loc in locs[:_MAX_LOCS]]
    more = [f"{len(locs) - _MAX_LOCS} more"] if len(locs) > _MAX_LOCS else []
    return " + ".join(shown + more)


def _same(value: Any, default: Any) -> bool:
    if isinstance(value, np.ndarray) or isinstance(default, np.ndarray):
        return value is default
    return type(value) is type(default) and bool(value == default)


def _param(p: Input, name: str) -> str:
    return f"{name}: {p.type}{_layout(p.layout)}"


def _apply(v: Apply, names: Mapping[int, str]) -> str:
    args = ", ".join("_" if a is None else names[id(a)] for a in v.args)
    types = v.type if isinstance(v.type, tuple) else (v.type,)
    typed = ", ".join(f"{t}{_layout(m)}" for t, m in zip(types, v.layouts, strict=True))
    if isinstance(v.type, tuple):
        typed = f"({typed})"
    text = f"{names[id(v)]} = {v.op.name}({args}){attrs_text(v.attrs)} : {typed}"
    if len(v.contents) == 1 and v.contents[0] is not None:
        text += f" = {content_text(v.contents[0])}"
    if isinstance(v.op, Function):
        text += " {"
    return text


def _layout(m: IndexMap | None) -> str:
    if m is None:
        return ""
    return f" @({', '.join(map(str, m.exprs))})"


def _plain(name: str) -> str:
    """A name without what would make the text ambiguous."""
    return re.sub(r"[\s,(){}:%@#=]+", "_", name)
