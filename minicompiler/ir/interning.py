"""One object for each expression: structurally equal ones are identical.

found = table.get(key)            a weak reference, dead where nobody holds the expression any more
made(cls, key, fields)            the expression, in the table from now on
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .expr import Expr

_lock = threading.RLock()
table: dict[tuple[Any, ...], weakref.ref[Expr]] = {}
_limit = _FEWEST = 20_000
"""So many entries make the next expression sweep the table."""


def made(cls: type[Expr], key: tuple[Any, ...], fields: tuple[Any, ...]) -> Any:
    """The one object of an expression that `table` may lack. Only this takes a lock: two threads
    that compile at the same time must not make two objects of one expression, because identity is
    equality."""
    with _lock:
        ref = table.get(key)
        found = None if ref is None else ref()
        if found is None:
            found = object.__new__(cls)
            found._fields = fields
            found._free = found._text = None
            found._init(*fields)
            table[key] = weakref.ref(found)
            if len(table) > _limit:
                _sweep()
        return found


def _sweep() -> None:
    """Drops the entries of dead expressions, all at once: a callback for each, as a
    WeakValueDictionary has it, costs time and swallows a Ctrl-C that arrives during it."""
    global _limit
    keys = list(table)
    # From the newest on, because an entry's key keeps the expression's children alive.
    while keys:
        key = keys.pop()
        if table[key]() is None:
            del table[key]
    _limit = max(_FEWEST, 2 * len(table))
