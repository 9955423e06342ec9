"""Sliding windows over spatial axes: what convolution and pooling share.

w = Windows.of("conv", 2, kernel=(3, 3), strides=(2,), pads_begin=(1, 1))
w.output((224, 224))            (112, 112); also for symbolic sizes, ceil_mode included
padded(x, 2, w, value=0)        te tensor with a border wherever a window may leave x
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence

import numpy as np

from .. import te
from ..ir.expr import Const, Expr, all_of, binary, ceildiv, minimum, select, wrap
from .rules import fail, inside, simplified, unequal


@dataclasses.dataclass(frozen=True)
class Windows:
    """Per spatial axis: kernel extent, stride, padding at both ends, dilation."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]
    dilations: tuple[int, ...]
    ceil_mode: bool = False

    @staticmethod
    def of(
        op: str,
        rank: int,
        kernel: Sequence[int],
        strides: Sequence[int],
        pads_begin: Sequence[int],
        pads_end: Sequence[int],
        dilations: Sequence[int],
        ceil_mode: bool = False,
    ) -> Windows:
        """Attributes with defaults filled in: () is 1 (0 for pads), one number serves all axes."""

        def full(what: str, given: Sequence[int], default: int, least: int) -> tuple[int, ...]:
            got = tuple(given) or (default,)
            got = got * rank if len(got) == 1 else got
            if len(got) != rank:
                fail(f"{op}: {what} {tuple(given)} for {rank} spatial dimensions")
            if min(got, default=least) < least:
                fail(f"{op}: {what} {got} must be at least {least}")
            return got

        return Windows(
            full("kernel", kernel, 1, 1),
            full("strides", strides, 1, 1),
            full("pads_begin", pads_begin, 0, 0),
            full("pads_end", pads_end, 0, 0),
            full("dilations", dilations, 1, 1),
            ceil_mode,
        )

    @property
    def rank(self) -> int:
        return len(self.kernel)

    def span(self, k: int) -> int:
        """Input positions from the first to the last tap of a window."""
        return (self.kernel[k] - 1) * self.dilations[k] + 1

    def output(self, sizes: Sequence[Expr]) -> tuple[Expr, ...]:
        """The number of windows per axis."""
        found = []
        for k, size in enumerate(sizes):
            whole = size + (self.begin[k] + self.end[k])
            room = whole - self.span(k)
            stride = self.strides[k]
            if self.ceil_mode:
                # The last window has to start inside the input or the padding before it.
                starts = ceildiv(size + self.begin[k], stride)
                count = binary("min", ceildiv(room, stride) + 1, starts)
            else:
                count = room // stride + 1
            found.append(simplified(count))
        return tuple(found)

    def check(self, op: str, sizes: Sequence[Expr], x: object) -> tuple[Expr, ...]:
        """`output`, refusing windows larger than the padded input."""
        found = self.output(sizes)
        for k, n in enumerate(found):
            if unequal(minimum(n, 1), 1):
                fail(
                    f"{op}: a window of {self.span(k)} does not fit spatial axis {k} of {x} with "
                    f"padding {self.begin[k]} and {self.end[k]}"
                )
        return found

    def extent(self, sizes: Sequence[Expr]) -> tuple[Expr, ...]:
        """The padded sizes that windows read: at least begin + size, more where they run over."""
        return tuple(
            simplified((n - 1) * self.strides[k] + self.span(k))
            for k, n in enumerate(self.output(sizes))
        )

    def needs_padding(self) -> bool:
        return self.ceil_mode or any(self.begin) or any(self.end)

    def position(self, k: int, out: Expr, tap: Expr) -> Expr:
        """The padded position of a tap."""
        return out * self.strides[k] + tap * self.dilations[k]

    def taps(self) -> tuple[tuple[Expr, ...], dict]:
        """Tap indices per axis and the reduction variables among them (extents of 1 need none)."""
        names = iter(te.reduce_vars(self.rank))
        over: dict = {}
        index: list[Expr] = []
        for n in self.kernel:
            v = next(names)
            if n == 1:
                index.append(Const(0))
            else:
                index.append(v)
                over[v] = n
        return tuple(index), over


def padded(x: te.Tensor, lead: int, w: Windows, value: Expr) -> te.Tensor:
    """`x` with a border of `value` around the axes from `lead` on; `x` itself if none is needed."""
    if not w.needs_padding():
        return x
    sizes = x.shape[lead:]
    # Windows that stop short of the end leave a rest that needs no memory.
    shape = (*x.shape[:lead], *w.extent(sizes))

    def body(*i: Expr) -> Expr:
        at = [p - b for p, b in zip(i[lead:], w.begin, strict=True)]
        conds = []
        for k, p in enumerate(at):
            if w.begin[k] or w.end[k] or w.ceil_mode:
                conds.append(inside(p, sizes[k]))
        return select(all_of(conds), x[(*i[:lead], *at)], value)

    return te.compute(shape, body, "pad")


def np_padded(x: np.ndarray, lead: int, w: Windows, value: float) -> np.ndarray:
    """The numpy counterpart of `padded`; the border at the end is large enough for every window."""
    extra = [(0, 0)] * lead
    for k in range(w.rank):
        extra.append((w.begin[k], w.end[k] + w.strides[k]))
    size = math.prod(n + sum(e) for n, e in zip(x.shape, extra, strict=True))
    if size * x.itemsize > sys.maxsize:
        raise MemoryError(f"an array with its border of {size} elements")
    return np.pad(x, extra, constant_values=value)


def np_windows(x: np.ndarray, lead: int, w: Windows, counts: Sequence[int]) -> np.ndarray:
    """A view of shape (*lead, *counts, *kernel) on a padded array."""
    strides = [x.strides[lead + k] * w.strides[k] for k in range(w.rank)]
    taps = [x.strides[lead + k] * w.dilations[k] for k in range(w.rank)]
    shape = (*x.shape[:lead], *counts, *w.kernel)
    return np.lib.stride_tricks.as_strided(x, shape, (*x.strides[:lead], *strides, *taps))


def np_counts(w: Windows, sizes: Sequence[int]) -> tuple[int, ...]:
    """`Windows.output` on numbers."""
    return tuple(e.value for e in w.output([wrap(s) for s in sizes]))  # type: ignore[attr-defined]
