"""Sums of products by index letters, and windows laid back over an image.

einsum(a, b; "ij,jk->ik")          a letter twice in one operand reads its diagonal
col2im(x; image, kernel)           columns of patches -> image, overlaps are added
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import te
from ..errors import ShapeError
from ..ir.expr import ONE, Const, Expr, all_of, binary, const, eq, product, select, wrap
from ..ir.op import Arg, Op, Precision, register
from ..ir.types import TensorType
from .draws import Draw, array, choice, integer
from .rules import (
    broadcast_sizes,
    clamped,
    direct,
    fail,
    float32_inside,
    inside,
    need_dtype,
    need_rank,
    need_same,
    result,
    same_dtype,
    widened,
)

Array = np.ndarray


# ---- einsum -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class EinsumAttrs:
    """operands: index letters of each argument; output: those of the result. No ellipsis."""

    operands: tuple[str, ...] = ()
    output: str = ""


def _sizes(shapes: list[tuple[Expr, ...]], a: EinsumAttrs) -> dict[str, Expr]:
    """The size of each letter; sizes of 1 are repeated."""
    found: dict[str, Expr] = {}
    for letters, shape in zip(a.operands, shapes, strict=True):
        for letter, size in zip(letters, shape, strict=True):
            known = found.get(letter, ONE)
            (found[letter],) = broadcast_sizes("einsum", (known,), (size,))
    return found


def _einsum_infer(*args: Any) -> TensorType:
    *xs, a = args
    dtype = same_dtype("einsum", *xs)
    need_dtype("einsum", xs[0], "fi")
    if len(xs) != len(a.operands):
        fail(f"einsum: {len(xs)} operands for {','.join(a.operands)}")
    for x, letters in zip(xs, a.operands, strict=True):
        need_rank(f'einsum "{letters}"', x, len(letters), len(letters))
        own: dict[str, Expr] = {}
        for letter, size in zip(letters, x.type.shape, strict=True):
            first = own.setdefault(letter, size)
            need_same("einsum", f"the axes {letter} of {x.type}", first, size)
    sizes = _sizes([x.type.shape for x in xs], a)
    if any(c not in sizes for c in a.output) or len(set(a.output)) != len(a.output):
        fail(f"einsum: {','.join(a.operands)}->{a.output} has an unknown or repeated output")
    return result([sizes[c] for c in a.output], dtype)


def _einsum_compute(*args: Any) -> te.Tensor:
    *xs, a = args
    sources = [widened(x) for x in xs]
    sizes = _sizes([x.shape for x in xs], a)
    summed = [c for c in sizes if c not in a.output]
    taps = te.reduce_vars(len(summed))

    def body(*i: Expr) -> Expr:
        at: dict[str, Expr] = dict(zip([*a.output, *summed], [*i, *taps], strict=True))
        parts = [
            x[tuple(Const(0) if s is ONE else at[c] for c, s in zip(letters, x.shape, strict=True))]
            for x, letters in zip(sources, a.operands, strict=True)
        ]
        value = parts[0]
        for p in parts[1:]:
            value = value * p
        return value

    over = {t: sizes[c] for t, c in zip(taps, summed, strict=True)}
    made = te.compute([sizes[c] for c in a.output], body, "einsum", ("sum", over))
    return te.astype(made, xs[0].dtype)


def _einsum_reference(*args: Any) -> Array:
    *xs, a = args
    return np.asarray(np.einsum(f"{','.join(a.operands)}->{a.output}", *xs))


_EQUATIONS = (
    "ij,jk->ik", "bij,bjk->bik", "ii->i", "ij->", "i,j->ij", "ij->ji", "bii->bi", "bi,bi->",
)  # fmt: skip


def _einsum_samples(draw: Draw) -> tuple[list[Array], EinsumAttrs]:
    left, output = choice(draw, _EQUATIONS).split("->")
    size = {c: integer(draw, 1, 4) for c in "bijk"}
    dtype = choice(draw, ("float32", "float64", "float16", "int32"))
    operands = tuple(left.split(","))
    xs = [array(draw, [size[c] for c in letters], dtype) for letters in operands]
    return xs, EinsumAttrs(operands, output)


einsum = register(
    Op(
        "einsum",
        EinsumAttrs,
        _einsum_infer,
        direct(_einsum_compute),
        float32_inside(_einsum_reference),
        _einsum_samples,
        precision=Precision.LOW,
        variadic=True,
    )
)


# ---- col2im -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Col2ImAttrs:
    """Per spatial axis; the patches are those of a convolution with this kernel over the image."""

    image: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    pads_begin: tuple[int, ...] = ()
    pads_end: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()

    @property
    def patches(self) -> tuple[int, ...]:
        """The number of patches along each axis."""
        return tuple(
            (n + b + e - (k - 1) * d - 1) // s + 1
            for n, k, s, b, e, d in zip(
                self.image, self.kernel, self.strides, self.pads_begin, self.pads_end,
                self.dilations, strict=True,
            )
        )  # fmt: skip


def _col2im_infer(x: Arg, a: Col2ImAttrs) -> TensorType:
    need_dtype("col2im", x, "f")
    need_rank("col2im", x, 3, 3)
    for name in ("kernel", "strides", "pads_begin", "pads_end", "dilations"):
        if len(getattr(a, name)) != len(a.image):
            raise ShapeError(
                f"col2im: the image has {len(a.image)} axes, {name} {len(getattr(a, name))}",
                hint="one number per axis of the image",
            )
    need_same("col2im", "numbers of patches", x.type.shape[2], product(a.patches))
    count = product(a.kernel)
    need_same("col2im", f"channels modulo {count} and 0", x.type.shape[1] % count, 0)
    channels = x.type.shape[1] // count
    return result((x.type.shape[0], channels, *a.image), x.type.dtype)


def _col2im_compute(x: te.Tensor, a: Col2ImAttrs) -> te.Tensor:
    source = widened(x)
    taps = te.reduce_vars(len(a.kernel))
    count = product(a.kernel)

    def body(n: Expr, c: Expr, *i: Expr) -> Expr:
        tap: Expr = Const(0)
        patch: Expr = Const(0)
        conditions = []
        for k, at in enumerate(i):
            tap = tap * a.kernel[k] + taps[k]
            start = at + a.pads_begin[k] - taps[k] * a.dilations[k]
            which = start // a.strides[k]
            conditions.append(inside(which, a.patches[k]))
            if a.strides[k] > 1:
                conditions.append(eq(start - which * a.strides[k], 0))
            patch = patch * a.patches[k] + clamped(which, a.patches[k])
        value = source[(n, c * count + tap, patch)]
        return select(all_of(conditions), value, const(0, value.dtype))

    shape = (x.shape[0], binary("floordiv", x.shape[1], count), *map(wrap, a.image))
    over = {t: wrap(k) for t, k in zip(taps, a.kernel, strict=True)}
    return te.astype(te.compute(shape, body, "col2im", ("sum", over)), x.dtype)


def _col2im_reference(x: Array, a: Col2ImAttrs) -> Array:
    channels = x.shape[1] // int(np.prod(a.kernel))
    room = [n + b + e for n, b, e in zip(a.image, a.pads_begin, a.pads_end, strict=True)]
    made = np.zeros((x.shape[0], channels, *room), x.dtype)
    parts = x.reshape(x.shape[0], channels, *a.kernel, *a.patches)
    for tap in np.ndindex(*a.kernel):
        own: Any = tuple(
            slice(t * d, t * d + (p - 1) * s + 1, s)
            for t, d, p, s in zip(tap, a.dilations, a.patches, a.strides, strict=True)
        )
        made[(..., *own)] += parts[(slice(None), slice(None), *tap)]
    crop: Any = tuple(slice(b, b + n) for b, n in zip(a.pads_begin, a.image, strict=True))
    return made[(..., *crop)]


def _col2im_samples(draw: Draw) -> tuple[list[Array], Col2ImAttrs]:
    rank = integer(draw, 1, 2)

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(integer(draw, low, high) for _ in range(rank))

    kernel = each(1, 3)
    a = Col2ImAttrs(each(5, 7), kernel, each(1, 2), each(0, 1), each(0, 1), each(1, 2))
    columns = int(np.prod(a.patches))
    of = (integer(draw, 1, 2), 2 * int(np.prod(kernel)), columns)
    return [array(draw, of, choice(draw, ("float32", "float64")))], a


col2im = register(
    Op(
        "col2im",
        Col2ImAttrs,
        _col2im_infer,
        direct(_col2im_compute),
        float32_inside(_col2im_reference),
        _col2im_samples,
        precision=Precision.FLOAT32_INSIDE,
    )
)
