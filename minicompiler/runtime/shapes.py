"""The sizes of a call: read from the shapes of its arguments, checked, computed once and kept.

    shapes = Shapes(plan, threads=2)
    shapes.measure([(3, 12)])            Sizes, or RunError where a shape does not fit
    shapes.follow(inputs, outputs)       Sizes that a few axes tell; the others are not looked at

What `follow` leaves out, native code compares with `signature` (see entry), which states every axis
in terms of the few sizes in `Sizes.words`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minicompiler.errors import RunError
from minicompiler.runtime import caches
from minicompiler.runtime.frame import Argument, Words, signature, words_of
from minicompiler.runtime.plan import (
    RELATIONS,
    ROOM,
    VALUE,
    DimSpec,
    Plan,
    Size,
    Tensor,
    evaluate,
    names_in,
    nbytes,
    numpy_dtype,
    size_text,
)

KEPT = 512
"""Combinations of dimensions, and of shapes, whose sizes are remembered."""

_CACHE_LINE = 64

Shape = tuple[int, ...]
Output = tuple[Shape, np.dtype[Any], int]
"""Shape, dtype and bytes."""


class Sizes:
    """What follows from the dimensions of a call.

    Attributes:
        dims: their values, in the order of the plan.
        outputs: those whose size is counted at their largest.
        arena, memory: bytes of intermediate values; and with the workspace of all threads.
        known: every size with a name; counted ones at their largest.
        words: what a signature refers to; None where one of them is more than any array has.
    """

    __slots__ = ("arena", "dims", "known", "memory", "outputs", "words")

    def __init__(
        self,
        dims: Shape,
        outputs: list[Output],
        arena: int,
        memory: int,
        known: dict[str, int],
    ) -> None:
        self.dims, self.outputs, self.arena, self.memory = dims, outputs, arena, memory
        self.known = known
        self.words: Words | None = None


class Shapes:
    """The shapes of a plan's inputs and outputs.

    Attributes:
        dtypes, out_dtypes: those of the inputs and outputs.
        telling: inputs of one integer that tell a dimension.
        counted: outputs whose size is known only after a call; they get room for the most.
        signature: for `entry`; None where shapes do not tell all that is to compare.
    """

    def __init__(self, plan: Plan, threads: int) -> None:
        self._plan, self._threads = plan, threads
        self.dtypes = [numpy_dtype(t.dtype) for t in plan.inputs]
        self._dtype = {t.dtype: numpy_dtype(t.dtype) for t in plan.outputs}
        self.out_dtypes = [self._dtype[t.dtype] for t in plan.outputs]
        self.telling = [b.input for b in plan.binds if b.axis == VALUE]
        counts = {c.dim for c in plan.counts}
        self.counted = [
            i
            for i, t in enumerate(plan.outputs)
            if any(not counts.isdisjoint(names_in(s)) for s in t.shape)
        ]
        self._origins = {b.dim: self._origin(b.input, b.axis) for b in plan.binds}
        self._room = next((b.dim for b in plan.binds if b.axis == ROOM), None)
        # The sizes of axes that are no numbers, in order; True: with the room behind a cache.
        self._symbolic: dict[tuple[Size, bool], int] = {}
        # Outputs of one dtype and shape share an entry, as the caches of all layers do.
        self._forms: dict[tuple[str, Shape], int] = {}
        self._form = [
            self._forms.setdefault((t.dtype, tuple(map(self._word, t.shape))), len(self._forms))
            for t in plan.outputs
        ]
        self.signature: Words | None = None
        if not self.telling and not self.counted:
            with contextlib.suppress(OverflowError):  # sizes that no array has
                self.signature = signature(self._arguments(), len(plan.inputs))
        self._by_dims: dict[Shape, Sizes] = {}
        self._by_shapes: dict[tuple[Shape, ...], Sizes] = {}

    def __len__(self) -> int:
        """Combinations that are remembered."""
        return max(len(self._by_dims), len(self._by_shapes))

    def follow(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Sizes | None:
        """The sizes for arguments of any type; None where they cannot be told or are not allowed,
        or there is no signature."""
        if self.signature is None:
            return None
        try:
            values = tuple(
                [
                    inputs[b.input].shape[b.axis] if b.axis != ROOM else self._room_behind(outputs)
                    for b in self._plan.binds
                ]
            )
            sizes = self._by_dims.get(values)
            if sizes is None:
                dims = dict(zip([d.name for d in self._plan.dims], values, strict=True))
                self._check_ranges(dims)
                self._check_guards(dims)
                sizes = self._compute(dims)
        except (AttributeError, IndexError, TypeError, ArithmeticError, RunError):
            return None  # an argument is no array, or a size is not allowed: `measure` tells
        return sizes

    def measure(self, shapes: Sequence[Shape], told: Shape = ()) -> Sizes:
        """The sizes for shapes of inputs.

        told: the values of the inputs that tell a dimension, then the room behind caches.
        Raises RunError where something does not fit.
        """
        key = (*shapes, told)
        sizes = self._by_shapes.get(key)
        if sizes is None:
            sizes = self._compute(self._bind(shapes, told))
            if len(self._by_shapes) >= KEPT:
                self._by_shapes.clear()
            self._by_shapes[key] = sizes
        return sizes

    def measure_arrays(self, arrays: Sequence[np.ndarray]) -> Sizes:
        """The same for inputs, without room behind caches."""
        told = tuple([number_in(arrays[i]) for i in self.telling])
        return self.measure([a.shape for a in arrays], told)

    # ---- computing ------------------------------------------------------------------------------
    def _word(self, size: Size, room: bool = False) -> int:
        """A size as a signature has it."""
        if isinstance(size, int):
            return size
        return -1 - self._symbolic.setdefault((size, room), len(self._symbolic))

    def _arguments(self) -> list[Argument]:
        """What a signature says of the inputs and outputs."""
        plan = self._plan
        behind = {c.input: (c.axis, plan.outputs[c.output]) for c in plan.caches}
        grown = {c.output: (c.axis, plan.outputs[c.output]) for c in plan.caches}
        twins = {c.output: c.input for c in plan.caches}

        def axes(t: Tensor, cache: tuple[int, Tensor] | None) -> tuple[tuple[int, int], ...]:
            pairs = [(self._word(s), self._word(s)) for s in t.shape]
            if cache is not None:
                axis, whole = cache
                pairs[axis] = (pairs[axis][0], self._word(whole.shape[axis], room=True))
            return tuple(pairs)

        inputs = [
            Argument(dtype, axes(t, behind.get(i)), covered=i in behind)
            for i, (t, dtype) in enumerate(zip(plan.inputs, self.dtypes, strict=True))
        ]
        outputs = [
            Argument(
                dtype, axes(t, grown.get(i)), writes=True, optional=i not in grown,
                twin=twins.get(i, -1),
            )
            for i, (t, dtype) in enumerate(zip(plan.outputs, self.out_dtypes, strict=True))
        ]  # fmt: skip
        return inputs + outputs

    def _compute(self, dims: Mapping[str, int]) -> Sizes:
        """The sizes for dimensions that have been checked. Raises RunError for a negative one."""
        plan = self._plan
        values = tuple([dims[d.name] for d in plan.dims])
        known = self._known(dims)
        # The shapes of arrays do not hold the room behind them.
        shown = known if self._room is None else self._known({**dims, self._room: 0})
        words = [evaluate(s, known if room else shown) for s, room in self._symbolic]
        made: list[Output] = []
        for k, (name, form) in enumerate(self._forms):
            shape = tuple([word if word >= 0 else words[~word] for word in form])
            if min(shape, default=0) < 0:
                t = plan.outputs[self._form.index(k)]
                raise RunError(
                    f'output "{t.name}" would have the shape {shape_text(shape)}, declared {t}',
                    hint="the inputs are too small for the operators of this model",
                )
            dtype = self._dtype[name]
            made.append((shape, dtype, nbytes(shape, dtype)))
        outputs = [made[k] for k in self._form]
        shared, local = evaluate(plan.shared, known), evaluate(plan.local, known)
        arena = -(-evaluate(plan.arena, known) // _CACHE_LINE) * _CACHE_LINE
        memory = arena + shared + self._threads * local
        sizes = Sizes(values, outputs, arena, memory, known)
        with contextlib.suppress(OverflowError):
            sizes.words = words_of(words)
        if len(self._by_dims) >= KEPT:
            self._by_dims.clear()
        self._by_dims[values] = sizes
        return sizes

    def _known(self, dims: Mapping[str, int]) -> dict[str, int]:
        """Every size with a name."""
        known = dict(dims)
        for name, size in self._plan.named:
            known[name] = evaluate(size, known)
        for c in self._plan.counts:
            known[c.dim] = evaluate(c.most, known)
        return known

    def _room_behind(self, outputs: Sequence[Any]) -> int:
        """The room that the first of the caches shows."""
        rooms = (caches.room_behind(outputs[c.output], c.axis, "") for c in self._plan.caches)
        return next((room for room in rooms if room is not None), 0)

    # ---- checking -------------------------------------------------------------------------------
    def _bind(self, shapes: Sequence[Shape], told: Shape) -> dict[str, int]:
        """The dimensions of a call. Raises RunError when a shape does not fit."""
        if self.telling and not told:
            names = ", ".join(f'"{self._plan.inputs[i].name}"' for i in self.telling)
            raise RunError(f"sizes depend on the values of {names}, not on shapes alone")
        values = iter(told)
        for t, shape in zip(self._plan.inputs, shapes, strict=True):
            if len(shape) != len(t.shape):
                raise RunError(
                    f'input "{t.name}" has {len(shape)} dimensions, {len(t.shape)} are expected: '
                    f"shape {shape_text(shape)}, declared {t}",
                    hint=_rank_hint(t, shape),
                )
        dims: dict[str, int] = {}
        for b in self._plan.binds:
            if b.axis == VALUE:
                dims[b.dim] = next(values)
            elif b.axis == ROOM:  # comes after all values
                dims[b.dim] = told[-1] if told else 0
            else:
                dims[b.dim] = shapes[b.input][b.axis]
        self._check_ranges(dims)
        for t, shape in zip(self._plan.inputs, shapes, strict=True):
            for axis, (size, got) in enumerate(zip(t.shape, shape, strict=True)):
                expected = evaluate(size, dims)
                if got != expected:
                    why = "" if isinstance(size, int) else f" ({size_text(size)})"
                    hint = "; ".join(
                        f"{n} = {dims[n]} is {self._origins[n]}" for n in names_in(size)
                    )
                    hint = hint or "this size is fixed in the model"
                    raise RunError(
                        f'input "{t.name}": axis {axis} has size {got}, expected {expected}{why}: '
                        f"shape {shape_text(shape)}, declared {t}",
                        hint=hint,
                    )
        self._check_guards(dims)
        return dims

    def _check_ranges(self, dims: Mapping[str, int]) -> None:
        for d in self._plan.dims:
            _check_range(d, dims[d.name], self._origins[d.name])

    def _check_guards(self, dims: Mapping[str, int]) -> None:
        for g in self._plan.guards:
            try:
                left, right = evaluate(g.left, dims), evaluate(g.right, dims)
            except ZeroDivisionError:
                raise RunError(
                    f"these inputs do not fit together: a size would be divided by 0 ({g.text})",
                    hint=self._origins_of(dims),
                ) from None
            if not RELATIONS[g.relation][1](left, right):
                raise g.error(dims, "these inputs", self._origins_of(dims))

    def _origins_of(self, dims: Mapping[str, int]) -> str:
        return ", ".join(f"{n} = {v} is {self._origins[n]}" for n, v in dims.items())

    def _origin(self, i: int, axis: int) -> str:
        """Where a dimension comes from, as text."""
        name = f'input "{self._plan.inputs[i].name}"'
        places = {VALUE: "the value of", ROOM: "the room behind"}
        return f"{places.get(axis, f'axis {axis} of')} {name}"


def number_in(array: np.ndarray) -> int:
    """The size, at least 1, that an input of one integer tells; another shape is refused when it
    is checked."""
    return max(int(array.reshape(-1)[0]), 1) if array.size else 1


def shape_text(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _rank_hint(t: Tensor, shape: tuple[int, ...]) -> str:
    """What may bring an array to the declared number of dimensions."""
    name = t.name if t.name.isidentifier() else "array"
    if len(shape) + 1 == len(t.shape):
        return f"for a batch of one: {name}[None]"
    if len(shape) == len(t.shape) + 1 and 1 in shape:
        return f"to drop a dimension of size 1: {name}.squeeze({shape.index(1)})"
    return f"{name}.reshape(...)"


def _check_range(d: DimSpec, value: int, origin: str) -> None:
    if value < d.lo or (d.hi is not None and value > d.hi):
        limits = f"at least {d.lo}" if d.hi is None else f"from {d.lo} to {d.hi}"
        raise RunError(
            f'dimension "{d.name}" is {value} ({origin}), the model was compiled for {limits}',
            hint="compile it with a wider range: dims={...}"
            + ("; windows of the model may need that much" if value < d.lo and d.lo > 1 else ""),
        )
    if value % d.multiple_of:
        raise RunError(
            f'dimension "{d.name}" is {value} ({origin}), not a multiple of {d.multiple_of}',
            hint=f"pad that axis to {-(-value // d.multiple_of) * d.multiple_of}",
        )
