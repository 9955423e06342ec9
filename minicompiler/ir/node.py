"""How IR nodes behave, decided once.

`@node` turns a class with annotated fields into a frozen, slotted dataclass with identity equality
and two derived traversals: `children()` yields the nodes held in fields (also inside tuples),
`map(f)` rebuilds the node with `f` applied to each child and returns the node itself when nothing
changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T")


class Node:
    """Base of every non-interned IR node. Equality and hash are by identity."""

    __slots__ = ("__weakref__",)

    def children(self) -> Iterator[Any]:
        """The IR nodes in this node's fields, in field order."""
        for name in self.__dataclass_fields__:  # type: ignore[attr-defined]
            value = getattr(self, name)
            if isinstance(value, tuple):
                for item in value:
                    if is_ir(item):
                        yield item
            elif is_ir(value):
                yield value

    def map(self: T, f: Callable[[Any], Any]) -> T:
        """This node with `f` applied to every child; `self` when all results are the same
        objects."""
        changed: dict[str, Any] = {}
        for name in self.__dataclass_fields__:  # type: ignore[attr-defined]
            old = getattr(self, name)
            if isinstance(old, tuple):
                new: Any = tuple([f(x) if is_ir(x) else x for x in old])
                if any(a is not b for a, b in zip(old, new, strict=True)):
                    changed[name] = new
            elif is_ir(old):
                new = f(old)
                if new is not old:
                    changed[name] = new
        return dataclasses.replace(self, **changed) if changed else self  # type: ignore[type-var]

    def with_(self: T, **fields: Any) -> T:
        """A copy with the named fields replaced."""
        kept = {n: getattr(self, n) for n in self.__dataclass_fields__}  # type: ignore[attr-defined]
        return type(self)(**(kept | fields))


def is_ir(value: object) -> bool:
    """True for what `children` yields: nodes and expressions."""
    return isinstance(value, Node) or hasattr(type(value), "__expr__")


@dataclass_transform(frozen_default=True, eq_default=False)
def node(cls: type[T]) -> type[T]:
    """Class decorator: a frozen, slotted dataclass with identity equality (see the module text)."""
    return dataclasses.dataclass(frozen=True, slots=True, eq=False)(cls)
