"""Converters of control flow, sequences and optionals, as far as it dissolves while importing.

Loop with a known trip count -> its body, repeated;  If with a known condition -> one branch
(the rest is in onnx_loop.py)
SequenceAt(SequenceConstruct(a, b), 1) -> b

A sequence is a Python tuple of graph values, an optional its value or `Nothing`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minicompiler.ir.arith import Arith
from minicompiler.ir.expr import ONE, ZERO, const_int
from minicompiler.ir.graph import Value, type_of
from minicompiler.ops import elementwise as el
from minicompiler.ops import index as ix
from minicompiler.ops import pieces as pc
from minicompiler.ops import shape as sh

from . import onnx_loop
from .onnx_math import Converter
from .onnx_node import Nothing, OnnxNode, Tensors

UNROLL_LIMIT = 512  # iterations of one Loop or Scan


# ---- control flow -------------------------------------------------------------------------------
def _if(n: OnnxNode) -> tuple[Any, ...]:
    """Exporters guard shapes with conditions that are known once the shapes are."""
    known = n.values.of(n.arg(0))
    if known is None:
        return onnx_loop.if_(n)
    return n.branch("then_branch" if known.all() else "else_branch", len(n.outputs))


def _loop(n: OnnxNode) -> tuple[Any, ...]:
    """The body once per iteration, as long as the condition is known to hold."""
    limit, start = (None if v is None else n.values.of(v) for v in (n.opt(0), n.opt(1)))
    if (limit is None and n.opt(0) is not None) or (start is None and n.opt(1) is not None):
        return onnx_loop.loop(n)
    trips = None if limit is None else int(limit.reshape(-1)[0])
    going = None if start is None else bool(start.all())
    state = [n.raw(k) for k in range(2, len(n.inputs))]
    stacked: list[list[Value]] = [[] for _ in range(len(n.outputs) - len(state))]
    k = 0
    while going in (None, True) and (trips is None or k < trips):
        if k == UNROLL_LIMIT:
            return onnx_loop.loop(n)
        first = [n.constant(k, np.int64), n.constant(True)]
        count = 1 + max(len(state), len(n.outputs))
        going_on, *results = n.branch("body", count, *first, *state)
        state, per_iteration = results[: len(state)], results[len(state) :]
        for made, values in zip(stacked, per_iteration, strict=True):
            values_of_one = n.apply(sh.unsqueeze, values, attrs=sh.UnsqueezeAttrs((0,)), name="")
            made.append(values_of_one)
        known = n.values.of(going_on)
        if known is None:
            return onnx_loop.loop(n)
        going, k = bool(known), k + 1
    if k == 0 and stacked:
        position, condition = n.constant(0, np.int64), n.constant(True)
        results = [*n.branch("body", 1 + len(n.outputs), position, condition, *state)]
        return (*state, *(_none_of(n, v) for v in results[1 + len(state) :]))
    return (*state, *(_joined(n, parts, 0) for parts in stacked))


def _none_of(n: OnnxNode, value: Value) -> Value:
    """No copies of a value, stacked."""
    t = type_of(value)
    return n.apply(sh.full, attrs=sh.FullAttrs((0, *t.shape), 0, t.dtype), name="")


def _scan(n: OnnxNode) -> tuple[Any, ...]:
    """The body once per element of the scanned inputs."""
    count = n.attr("num_scan_inputs")
    first = 1 if n.opset < 9 else 0  # older nodes begin with the lengths of the sequences
    values = list(n.inputs)[first:]
    if not 0 < count <= len(values):
        n.fail(f"Scan over {count} of {len(values)} inputs")
    state, scanned = values[: len(values) - count], values[len(values) - count :]
    given = [n.type(k) for k in range(first + len(state), first + len(values))]
    if len(n.outputs) < len(state):
        n.fail(f"Scan with {len(state)} states and {len(n.outputs)} outputs")
    if n.opset < 9:
        return _batched_scan(n, state, scanned)
    axes = n.per_axis("scan_input_axes", count, 0)
    outputs = len(n.outputs) - len(state)
    return _Scan(
        n,
        outputs,
        lambda *args: n.branch("body", len(n.outputs), *args),
        tuple(n.axis(a, t.rank) for a, t in zip(axes, given, strict=True)),
        n.per_axis("scan_input_directions", count, 0),
        n.per_axis("scan_output_axes", outputs, 0),
        n.per_axis("scan_output_directions", outputs, 0),
    ).run(state, scanned)


def _batched_scan(n: OnnxNode, state: list[Any], scanned: list[Any]) -> tuple[Any, ...]:
    """Scan of opset 8: one scan per element of a batch, which may have lengths of their own.

    Beyond its length an element keeps its states, and its rows are zeros.
    """
    backward = n.per_axis("directions", len(scanned), 0)
    outputs = len(n.outputs) - len(state)
    lengths = n.opt(0)
    short = next((t for t in map(type_of, scanned) if t.rank < 2), None)
    if short is not None:
        n.fail(f"Scan over {short}: a batch of sequences is expected")
    steps = type_of(scanned[0]).shape[1]
    if lengths is not None:
        ends = [onnx_loop.size_value(n, size) for size in (ZERO, steps, ONE)]
        position = n.apply(sh.arange, *ends, name="")
        turn = ix.ReverseAttrs(time=1, batch=0)
        scanned = [
            n.apply(ix.reverse_sequence, x, lengths, attrs=turn, name="") if back else x
            for x, back in zip(scanned, backward, strict=True)
        ]
        backward = (0,) * len(scanned)

    def one(*parts: Value) -> tuple[Any, ...]:
        """The scan of one element of the batch."""
        inside = dataclasses.replace(n, around=lambda: [*n.around(), *parts])
        if lengths is None:
            own, mine = parts[: len(state)], parts[len(state) :]
            return _Scan(inside, outputs, body, (0,) * len(mine), backward).run(own, mine)
        length, own, mine = parts[0], parts[1 : 1 + len(state)], parts[1 + len(state) :]

        def masked(*args: Value) -> tuple[Value, ...]:
            *known, at = args
            counts = n.apply(el.less, at, length, name="")
            made = n.branch("body", len(n.outputs), *known)
            zeros = [_zero(n, row) for row in made[len(state) :]]
            return tuple(
                n.apply(el.where, counts, new, old, name="")
                for new, old in zip(made, [*known[: len(state)], *zeros], strict=True)
            )

        scan = _Scan(inside, outputs, masked, (0,) * (len(mine) + 1), (0,) * (len(mine) + 1))
        return scan.run(own, (*mine, position))

    def body(*args: Value) -> tuple[Any, ...]:
        return n.branch("body", len(n.outputs), *args)

    whole = [*state, *scanned] if lengths is None else [lengths, *state, *scanned]
    zeros = (0,) * len(whole)
    return _Scan(n, len(n.outputs), one, zeros, zeros, inner=const_int(steps) or 1).run((), whole)


def _zero(n: OnnxNode, like: Value) -> Value:
    return n.constant(0, type_of(like).dtype.numpy)


@dataclasses.dataclass
class _Scan:
    """A repetition over the elements of tensors.

    Attributes:
        outputs: how many results are rows, stacked.
        body: (states, elements) -> (new states, rows).
        axes, backward: of each tensor scanned, its axis and whether it begins at the end.
        out_axes, reverse: of each stack of rows, its axis and whether the last row comes first;
            the first axis, and not, where nothing is said.
        inner: iterations inside of each one.
    """

    n: OnnxNode
    outputs: int
    body: Callable[..., tuple[Any, ...]]
    axes: Sequence[int]
    backward: Sequence[int]
    out_axes: Sequence[int] = ()
    reverse: Sequence[int] = ()
    inner: int = 1

    def run(self, state: Sequence[Any], scanned: Sequence[Value]) -> tuple[Any, ...]:
        """The last states and the stacked rows."""
        sizes = [type_of(x).shape[a] for x, a in zip(scanned, self.axes, strict=True)]
        trips = next((s for s in map(const_int, sizes) if s is not None), None)
        out_axes = self.out_axes or (0,) * self.outputs
        reverse = self.reverse or (0,) * self.outputs
        if trips is None or not 0 < trips * self.inner <= UNROLL_LIMIT:
            made = onnx_loop.scan(self.n, state, scanned, self.axes, self.backward, self.body)
            rows = made[len(state) :]
            how = zip(rows, out_axes, reverse, strict=True)
            return (*made[: len(state)], *(_turned(self.n, *one) for one in how))
        return self._repeated(trips, state, scanned, out_axes, reverse)

    def _repeated(
        self,
        trips: int,
        state: Sequence[Any],
        scanned: Sequence[Value],
        out_axes: Sequence[int],
        reverse: Sequence[int],
    ) -> tuple[Any, ...]:
        n = self.n
        stacked: list[list[Value]] = [[] for _ in range(self.outputs)]
        for k in range(trips):
            parts = [
                _element(n, x, a, trips - 1 - k if back else k)
                for x, a, back in zip(scanned, self.axes, self.backward, strict=True)
            ]
            results = self.body(*state, *parts)
            rows = results[len(state) :]
            state = results[: len(state)]
            for pile, value, axis in zip(stacked, rows, out_axes, strict=True):
                at = axis if axis >= 0 else axis + type_of(value).rank + 1
                pile.append(n.apply(sh.unsqueeze, value, attrs=sh.UnsqueezeAttrs((at,)), name=""))
        whole = []
        for pile, axis, back in zip(stacked, out_axes, reverse, strict=True):
            at = axis if axis >= 0 else axis + type_of(pile[0]).rank
            whole.append(_joined(n, pile[::-1] if back else pile, at))
        return (*state, *whole)


def _turned(n: OnnxNode, rows: Value, axis: int, back: int) -> Value:
    """Rows [k, ...] in the order and along the axis that a Scan wants."""
    t = type_of(rows)
    if back:
        last = Arith().simplify(t.shape[0] - 1)
        attrs = pc.SliceAttrs((last,), (-t.shape[0] - 1,), (0,), (-1,))
        rows = n.apply(pc.strided_slice, rows, attrs=attrs, name="")
    order = list(range(1, t.rank))
    order.insert(n.axis(axis, t.rank), 0)
    return n.apply(sh.transpose, rows, attrs=sh.TransposeAttrs(tuple(order)), name="")


def _element(n: OnnxNode, x: Value, axis: int, k: int) -> Value:
    """x[k] along an axis, which disappears."""
    at = n.axis(axis, type_of(x).rank)
    attrs = pc.SliceAttrs((k,), (k + 1,), (at,))
    part = n.apply(pc.strided_slice, x, attrs=attrs, name="")
    return n.apply(sh.squeeze, part, attrs=sh.SqueezeAttrs((at,)), name="")


def _joined(n: OnnxNode, parts: list[Any], axis: int) -> Value:
    if len(parts) == 1:
        return parts[0]
    return n.apply(pc.concat, *parts, attrs=pc.ConcatAttrs(axis), name="")


# ---- sequences ----------------------------------------------------------------------------------
def _sequence(n: OnnxNode, k: int = 0) -> tuple[Any, ...]:
    found = n.raw(k)
    if not isinstance(found, Tensors):
        n.fail(f"input {k} of {n.op_type} is not a sequence")
    return found.items


def _position(n: OnnxNode, k: int, length: int, default: int) -> int:
    given = n.scalar(k)
    at = default if given is None else int(given)
    at = at + length if at < 0 else at
    if not 0 <= at <= length:
        n.fail(f"{n.op_type}: position {given} in a sequence of {length}")
    return at


def _sequence_at(n: OnnxNode) -> Any:
    parts = _sequence(n)
    at = _position(n, 1, len(parts), 0)
    if at == len(parts):
        n.fail(f"SequenceAt: position {at} in a sequence of {at}")
    return parts[at]


def _sequence_insert(n: OnnxNode) -> Tensors:
    parts = _sequence(n)
    at = _position(n, 2, len(parts), len(parts))
    return Tensors((*parts[:at], n.arg(1), *parts[at:]))


def _sequence_erase(n: OnnxNode) -> Tensors:
    parts = _sequence(n)
    at = _position(n, 1, len(parts), len(parts) - 1)
    return Tensors((*parts[:at], *parts[at + 1 :]))


def _concat_from_sequence(n: OnnxNode) -> Value:
    parts, axis = list(_sequence(n)), n.attr("axis")
    if not parts:
        n.fail("ConcatFromSequence of an empty sequence")
    if n.attr("new_axis", 0):
        at = axis % (type_of(parts[0]).rank + 1)
        one = sh.UnsqueezeAttrs((at,))
        parts = [n.apply(sh.unsqueeze, p, attrs=one, name="") for p in parts]
        axis = at
    return n.apply(pc.concat, *parts, attrs=pc.ConcatAttrs(axis))


def _split_to_sequence(n: OnnxNode) -> Tensors:
    x, t = n.arg(0), n.type(0)
    axis = n.axis(n.attr("axis", 0), t.rank)
    size = const_int(t.shape[axis])
    if size is None:
        n.fail(f"SplitToSequence along an axis of {t.shape[axis]} elements")
    split = n.known(1)
    n.table(size)
    if split is None:
        parts = [1] * size
    elif split.ndim == 0:
        step = int(split)
        parts = [min(step, size - k) for k in range(0, size, step)]
    else:
        parts = [int(s) for s in split]
    made: list[Value] = []
    start = 0
    for length in parts:
        attrs = pc.SliceAttrs((start,), (start + length,), (axis,))
        part: Value = n.apply(pc.strided_slice, x, attrs=attrs, name="")
        if split is None and not n.attr("keepdims", 1):
            part = n.apply(sh.squeeze, part, attrs=sh.SqueezeAttrs((axis,)), name="")
        made.append(part)
        start += length
    return Tensors(tuple(made))


# ---- optionals ----------------------------------------------------------------------------------
def _optional(n: OnnxNode) -> Any:
    return Nothing() if n.raw(0) is None else n.raw(0)


def _optional_has_element(n: OnnxNode) -> Value:
    found = n.raw(0)
    return n.constant(not (found is None or isinstance(found, Nothing)), name=n.outputs[0])


def _optional_get_element(n: OnnxNode) -> Any:
    found = n.raw(0)
    if found is None or isinstance(found, Nothing):
        n.fail("OptionalGetElement of an empty optional")
    return found


CONTROL: dict[str, Converter] = {
    "ConcatFromSequence": _concat_from_sequence,
    "If": _if,
    "Loop": _loop,
    "Optional": _optional,
    "OptionalGetElement": _optional_get_element,
    "OptionalHasElement": _optional_has_element,
    "Scan": _scan,
    "SequenceAt": _sequence_at,
    "SequenceConstruct": lambda n: Tensors(tuple(n.inputs)),
    "SequenceEmpty": lambda n: Tensors(),
    "SequenceErase": _sequence_erase,
    "SequenceInsert": _sequence_insert,
    "SequenceLength": lambda n: n.constant(len(_sequence(n)), np.int64, n.outputs[0]),
    "SplitToSequence": _split_to_sequence,
}
