"""Tensors in memory as a kernel sees them: logical arrays to bytes in a layout, and back.

raw = to_memory(x, layout)                      x[n, c, h, w] as NCHW16c, padding poisoned
x = from_memory(raw, (1, 20, 7, 7), layout)     the logical elements
one_to_one(layout, (1, 20, 7, 7))               False when two elements share a place
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minicompiler.ir.arith import sizes
from minicompiler.ir.layout import IndexMap

Array = np.ndarray
POISON = 0xFF  # as bytes: NaN in every float type, -1 in integers


def physical_shape(shape: Sequence[int], layout: IndexMap | None) -> tuple[int, ...]:
    """Extents in memory, padding included."""
    return tuple(shape) if layout is None else tuple(sizes(layout.physical_shape(tuple(shape)), {}))


def poisoned(shape: Sequence[int], dtype: np.dtype) -> Array:
    """Memory that nobody has written."""
    made = np.empty(shape, dtype)
    made.reshape(-1).view(np.uint8)[:] = POISON
    return made


def to_memory(array: Array, layout: IndexMap | None) -> Array:
    """A contiguous array in its layout."""
    if layout is None or layout.is_identity:
        return np.ascontiguousarray(array)
    raw = poisoned(physical_shape(array.shape, layout), array.dtype)
    raw[_places(array.shape, layout)] = array
    return raw


def from_memory(raw: Array, shape: Sequence[int], layout: IndexMap | None) -> Array:
    """The logical array of memory in a layout; a copy."""
    if layout is None or layout.is_identity:
        return raw.reshape(shape).copy()
    picked: Array = raw.reshape(physical_shape(shape, layout))[_places(shape, layout)]
    return picked.copy()


def one_to_one(layout: IndexMap, shape: Sequence[int]) -> bool:
    """Whether every element has a place of its own."""
    for axis, extent in enumerate(shape):
        index = np.arange(extent)
        parts = [_part(index, d, m) for a, d, m in layout.splits() if a == axis]
        places = np.stack(parts) if parts else np.zeros((1, extent), np.int64)
        if np.unique(places, axis=1).shape[1] != extent:
            return False
    return True


def _places(shape: Sequence[int], layout: IndexMap) -> tuple[Array, ...]:
    """Per physical dimension the index of every logical element, broadcast over the axes."""
    found = []
    for axis, divisor, modulus in layout.splits():
        index = _part(np.arange(shape[axis]), divisor, modulus)
        found.append(index.reshape([-1 if k == axis else 1 for k in range(len(shape))]))
    return tuple(np.broadcast_arrays(*found)) if found else ()


def _part(index: Array, divisor: int, modulus: int) -> Array:
    index = index // divisor
    return index % modulus if modulus else index
