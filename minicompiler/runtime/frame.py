"""What native code knows of a call before it sees the arguments; `entry` compares them with it.

    s = signature([Argument(float32, ((-1, -1), (4, 4))), ...], inputs=1)      once per model
    f = Frame(table, (pool, main, threads), s)                                 per running call
    f.expect(words_of([3]))              from now on calls with arrays of the shape (3, 4) fit

All of it is 64-bit words.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# A frame: the words of HEAD, one per argument for the bytes that it covers, and the table.
HEAD = {
    "SIGNATURE": 0,  # address of what `signature` makes
    "SIZES": 1,  # address of the sizes that the signature refers to; 0: every call is refused
    "POOL": 2,  # address of a pool's block
    "MAIN": 3,  # address of the native main
    "THREADS": 4,
    "SPANS": 5,
}
# An argument of a signature, and behind all of them two words per axis: size and capacity.
RECORD = {
    "DTYPE": 0,  # address of the numpy dtype
    "RANK": 1,
    "ITEMSIZE": 2,
    "WRITES": 3,  # 1 for an output, which must be writeable
    "OPTIONAL": 4,  # 1 where None stands for a new array
    "TWIN": 5,  # the earlier argument that has to start at the same address, or -1
    "COVERED": 6,  # 1 where an output covers this input, as its twin
    "AXES": 7,  # where in the signature its axes are
}
RECORD_WORDS = len(RECORD)

Words = ctypes.Array[ctypes.c_int64]


class Argument(NamedTuple):
    """What a call expects of an array.

    axes: for each its size and its capacity, the number of positions in the memory that it is the
    first part of. Both are numbers, or -1 - k for entry k of the sizes of a call. The other fields:
    see RECORD.
    """

    dtype: np.dtype[Any]
    axes: tuple[tuple[int, int], ...]
    writes: bool = False
    optional: bool = False
    twin: int = -1
    covered: bool = False


def signature(arguments: Sequence[Argument], inputs: int) -> Words:
    """What `enter` compares calls with: the inputs, then the outputs. Whoever keeps it keeps the
    dtypes."""
    words = [inputs, len(arguments)] + [0] * (RECORD_WORDS - 2)
    axes: list[int] = []
    first = RECORD_WORDS * (len(arguments) + 1)
    for a in arguments:
        words += [id(a.dtype), len(a.axes), a.dtype.itemsize, a.writes, a.optional, a.twin]
        words += [a.covered, first + len(axes)]
        axes += [word for pair in a.axes for word in pair]
    return words_of([*words, *axes])


def words_of(numbers: Sequence[int]) -> Words:
    """Numbers for native code to read. Raises OverflowError for one beyond 64 bits."""
    # One word more, because an empty buffer has no address.
    return (ctypes.c_int64 * (len(numbers) + 1)).from_buffer(array("q", [*numbers, 0]))


class Frame:
    """What `enter` knows of one call that runs, and the table of its native main.

    Attributes:
        address: of the frame.
        table: the words of the table; table_address: where they are.
    """

    __slots__ = ("_signature", "_sizes", "_words", "address", "table", "table_address")

    def __init__(
        self,
        template: Sequence[int],
        callee: tuple[int, int, int] = (0, 0, 0),
        signature: Words | None = None,
    ) -> None:
        """callee: pool, main and threads. Without a signature every call is refused."""
        head = [0, 0, *callee]
        if signature is not None:
            head = [ctypes.addressof(signature), *head[1:], *[0] * signature[1]]
        self._words = words_of([*head, *template])
        # Native code holds no references.
        self._signature = signature
        self._sizes: Words | None = None
        self.address = ctypes.addressof(self._words)
        self.table = (ctypes.c_int64 * len(template)).from_buffer(self._words, 8 * len(head))
        self.table_address = ctypes.c_void_p(self.address + 8 * len(head))

    def expect(self, sizes: Words | None) -> None:
        """Calls of these sizes fit from now on; None: no call does."""
        if sizes is None or self._signature is None:
            self._words[HEAD["SIZES"]] = 0
        else:
            self._words[HEAD["SIZES"]] = ctypes.addressof(sizes)
        self._sizes = sizes
