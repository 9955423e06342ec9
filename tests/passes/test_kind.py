"""The fusion kind follows from what is computed, whatever the operator is called."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from minicompiler import te
from minicompiler.ir.expr import Const, Dim, maximum
from minicompiler.ir.graph import Apply, Input, apply
from minicompiler.ir.op import Compute, Kind, NoAttrs, Op
from minicompiler.ir.types import TensorType, float32, int64
from minicompiler.ops import activations, conv, elementwise, index, linalg, norm, pieces, pool
from minicompiler.ops import reduce as red
from minicompiler.ops import shape as sh
from minicompiler.passes.kind import ALL, kind_of, reads


def tensor(*shape: Any, dtype: Any = float32) -> Input:
    sizes = tuple(s if isinstance(s, Dim) else Const(s) for s in shape)
    return Input("x", TensorType(sizes, dtype))


N = Dim("n", 1, 64)
X = tensor(N, 8, 6, 4)
CHANNEL = tensor(8, 1, 1)
VECTOR = tensor(8)
DEPTHWISE = conv.ConvAttrs(groups=8)
KINDS: list[tuple[Apply, Kind]] = [
    (apply(activations.relu, X), Kind.ELEMWISE),
    (apply(elementwise.add, X, X), Kind.ELEMWISE),
    (apply(activations.gelu, X), Kind.ELEMWISE),
    (apply(elementwise.add, X, CHANNEL), Kind.BROADCAST),
    (apply(norm.batch_norm, X, VECTOR, VECTOR, VECTOR, VECTOR), Kind.BROADCAST),
    (apply(sh.transpose, X, attrs=sh.TransposeAttrs((0, 2, 1, 3))), Kind.INJECTIVE),
    (apply(sh.reshape, X, attrs=sh.ReshapeAttrs((0, -1))), Kind.INJECTIVE),
    (apply(pieces.concat, X, X, attrs=pieces.ConcatAttrs(1)), Kind.INJECTIVE),
    (apply(pieces.split, X, attrs=pieces.SplitAttrs(1, (3, 5))), Kind.INJECTIVE),
    (apply(index.gather, X, tensor(3, dtype=int64)), Kind.INJECTIVE),
    (apply(red.reduce_mean, X, attrs=red.ReduceAttrs((1,))), Kind.REDUCTION),
    (apply(red.softmax, X), Kind.REDUCTION),
    (apply(norm.layer_norm, X, None, None), Kind.REDUCTION),
    (apply(pool.max_pool, X, attrs=pool.PoolAttrs((2, 2))), Kind.REDUCTION),
    (apply(conv.conv, X, tensor(5, 8, 3, 3), None), Kind.OUT_FUSABLE),
    (apply(conv.conv, X, tensor(8, 1, 3, 3), VECTOR, attrs=DEPTHWISE), Kind.OUT_FUSABLE),
    (apply(conv.conv_transpose, X, tensor(8, 2, 3, 3), None), Kind.OUT_FUSABLE),
    (apply(linalg.matmul, X, tensor(4, 9)), Kind.OUT_FUSABLE),
]  # fmt: skip


@pytest.mark.parametrize(("v", "kind"), KINDS, ids=[f"{v.op.name}-{k.name}" for v, k in KINDS])
def test_the_kind_is_derived(v: Apply, kind: Kind) -> None:
    assert kind_of(v) is kind


@pytest.mark.parametrize(("v", "kind"), KINDS, ids=[f"{v.op.name}-{k.name}" for v, k in KINDS])
def test_names_do_not_matter(v: Apply, kind: Kind) -> None:
    assert isinstance(v.op, Op)
    assert kind_of(v.with_(op=dataclasses.replace(v.op, name="scrambled"))) is kind


def test_a_declared_kind_may_only_be_more_conservative() -> None:
    relu = dataclasses.replace(activations.relu, kind=Kind.OPAQUE)
    assert kind_of(apply(relu, X)) is Kind.OPAQUE
    soft = dataclasses.replace(red.softmax, kind=Kind.ELEMWISE)
    assert kind_of(apply(soft, X)) is Kind.REDUCTION
    unknown = dataclasses.replace(activations.relu, computes=())
    assert kind_of(apply(unknown, X)) is Kind.OPAQUE


def test_a_window_written_out_counts_as_a_reduction() -> None:
    def build(x: te.Tensor, a: NoAttrs) -> te.Tensor:
        return te.compute((3,), lambda i: maximum(x[i], x[i + 1]), "pairs")

    op = dataclasses.replace(activations.relu, computes=(Compute("direct", build),))
    assert kind_of(apply(op, tensor(4))) is Kind.REDUCTION


def test_prefixes_tell_which_rows_depend_on_which() -> None:
    assert reads(apply(red.softmax, X)).prefixes == (3,)
    assert reads(apply(red.softmax, X, attrs=red.AxisAttrs(1))).prefixes == (1,)
    assert reads(apply(norm.layer_norm, X, tensor(4), None)).prefixes == (3, 0, ALL)
    assert reads(apply(sh.reshape, X, attrs=sh.ReshapeAttrs((0, 8, 24)))).prefixes == (2,)
    assert reads(apply(linalg.matmul, X, tensor(4, 9))).prefixes == (3, 0)
