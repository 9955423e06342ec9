"""Constants, batch norms, repeated work and layouts: the smaller graph passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tolerance import assert_close

from minicompiler.context import Context, Options
from minicompiler.ir.expr import Const, Dim
from minicompiler.ir.graph import Apply, Constant, Function, Input, Item, Value, applies, apply
from minicompiler.ir.layout import IndexMap
from minicompiler.ir.text import function_text
from minicompiler.ir.types import TensorType, float32, int64
from minicompiler.ops import activations, conv, elementwise, linalg, norm, pieces, pool
from minicompiler.ops import reduce as red
from minicompiler.ops import shape as sh
from minicompiler.ops.evaluate import run_reference
from minicompiler.passes.clean import drop_identities, eliminate_common_subexpr
from minicompiler.passes.fold import fold_constants
from minicompiler.passes.fold_bn import fold_batch_norm
from minicompiler.passes.layout import convert_layout

X = Input("x", TensorType(tuple(map(Const, (2, 16, 5, 5))), float32))
RNG = np.random.default_rng(7)


def c(*shape: int, low: float = -1) -> Constant:
    return Constant(RNG.uniform(low, 2, shape).astype(np.float32), "c")


def make(*results: Value, params: tuple[Input, ...] = (X,)) -> Function:
    return Function("net", params, results)


def names(fn: Function) -> list[str]:
    return [v.op.name for v in applies(fn)]


def same(a: Function, b: Function) -> None:
    x = RNG.uniform(-1, 1, (2, 16, 5, 5)).astype(np.float32)
    for got, want in zip(run_reference(b, [x]), run_reference(a, [x]), strict=True):
        assert_close(got, want, 1024, largest=4)


# ---- fold_constants -----------------------------------------------------------------------------
def test_work_on_constants_is_done_while_compiling() -> None:
    parts = apply(
        pieces.split, apply(elementwise.exp, c(16, 1, 2)), attrs=pieces.SplitAttrs(2, (1, 1))
    )
    fn = make(apply(elementwise.mul, X, Item(parts, 1)))
    folded = fold_constants(fn, None)
    assert names(folded) == ["mul"]
    same(fn, folded)


def test_known_shapes_become_constants() -> None:
    batch = Input("x", TensorType((Dim("n"), Const(3), Const(4)), float32))
    sizes = apply(sh.shape_, batch)
    tail = apply(pieces.strided_slice, sizes, attrs=pieces.SliceAttrs((1,), (3,), (0,), (1,)))
    (result,) = fold_constants(make(tail, params=(batch,)), None).results
    assert isinstance(result, Constant) and result.data.tolist() == [3, 4]
    whole = fold_constants(make(sizes, params=(batch,)), None)
    assert names(whole) == ["shape"]  # n is not known


def test_large_results_are_not_stored() -> None:
    one = Constant(np.ones((1, 1), np.float32))
    big = apply(sh.expand, one, attrs=sh.ExpandAttrs((1000, 1000)))
    tight = Context(options=Options(fold_bytes=1000))
    assert names(fold_constants(make(big), tight)) == ["expand"]
    assert names(fold_constants(make(big), None)) == []


# ---- clean --------------------------------------------------------------------------------------
def test_equal_work_is_done_once() -> None:
    a = apply(elementwise.add, apply(elementwise.exp, X), Constant(np.ones(5, np.float32), "one"))
    b = apply(elementwise.add, apply(elementwise.exp, X), Constant(np.ones(5, np.float32), "uno"))
    fn = eliminate_common_subexpr(make(apply(elementwise.mul, a, b)), None)
    assert names(fn) == ["exp", "add", "mul"]
    different = apply(
        elementwise.mul, apply(red.softmax, X), apply(red.softmax, X, attrs=red.AxisAttrs(1))
    )
    assert len(names(eliminate_common_subexpr(make(different), None))) == 3


def test_equal_splits_are_one() -> None:
    two = [apply(pieces.split, X, attrs=pieces.SplitAttrs(1, (8, 8))) for _ in range(2)]
    fn = make(apply(elementwise.add, Item(two[0], 0), Item(two[1], 0)))
    assert names(eliminate_common_subexpr(fn, None)) == ["split", "add"]


def test_identities_go() -> None:
    y = apply(elementwise.identity, apply(elementwise.exp, apply(elementwise.identity, X)))
    assert names(drop_identities(make(y), None)) == ["exp"]


# ---- fold_batch_norm ----------------------------------------------------------------------------
def batch_normed(x: Value, channels: int = 8) -> Apply:
    return apply(norm.batch_norm, x, c(channels), c(channels), c(channels), c(channels, low=0.5))


CONVS: list[tuple[str, Callable[[], Apply]]] = [
    ("plain", lambda: apply(conv.conv, X, c(8, 16, 3, 3), None)),
    ("biased", lambda: apply(conv.conv, X, c(8, 16, 1, 1), c(8))),
    ("grouped", lambda: apply(conv.conv, X, c(8, 4, 3, 3), None, attrs=conv.ConvAttrs(groups=4))),
    ("transposed", lambda: apply(conv.conv_transpose, X, c(16, 8, 3, 3), c(8))),
]


@pytest.mark.parametrize("make_conv", [f for _, f in CONVS], ids=[n for n, _ in CONVS])
def test_scales_and_offsets_move_into_the_weights(make_conv: Callable[[], Apply]) -> None:
    first = make_conv()
    y = apply(elementwise.mul, batch_normed(first), c(8, 1, 1))
    y = apply(elementwise.add, c(1, 8, 1, 1), y)
    y = apply(elementwise.sub, apply(elementwise.div, y, c(1)), c(8, 1, 1))
    fn = make(apply(activations.relu, y))
    folded = fold_batch_norm(fn, None)
    assert names(folded) == [first.op.name, "relu"]
    same(fn, folded)


def test_a_product_takes_scales_of_its_columns() -> None:
    y = apply(linalg.matmul, X, c(5, 7))
    fn = make(apply(elementwise.add, apply(elementwise.mul, y, c(7)), c(7)))
    folded = fold_batch_norm(fn, None)
    assert names(folded) == ["matmul", "add"]
    same(fn, folded)


@pytest.mark.parametrize(
    "case",
    ["two readers", "result too", "not per channel", "weight from data", "grouped transposed"],
)
def test_what_must_not_be_folded(case: str) -> None:
    y = apply(conv.conv, X, c(8, 16, 3, 3), None)
    extra: list[Value] = []
    params: tuple[Input, ...] = (X,)
    last = c(8, 1, 1)
    if case == "two readers":
        extra = [apply(elementwise.exp, y)]
    elif case == "result too":
        extra = [y]
    elif case == "not per channel":
        last = c(3, 3)
    elif case == "weight from data":
        w = Input("w", TensorType(tuple(map(Const, (8, 16, 3, 3))), float32))
        params, y = (X, w), apply(conv.conv, X, w, None)
    else:
        attrs = conv.ConvTransposeAttrs(groups=2)
        y = apply(conv.conv_transpose, X, c(16, 4, 3, 3), None, attrs=attrs)
    fn = make(apply(elementwise.mul, y, last), *extra, params=params)
    assert fold_batch_norm(fn, None) is fn


# ---- convert_layout -----------------------------------------------------------------------------
def test_chains_of_convolutions_are_blocked(golden: Callable[[str, str], None]) -> None:
    y = apply(activations.relu, apply(conv.conv, X, c(32, 16, 1, 1), None))
    z = apply(conv.conv, y, c(24, 32, 1, 1), None)
    p = apply(pool.max_pool, z, attrs=pool.PoolAttrs((2, 2)))
    odd = apply(conv.conv, p, c(12, 24, 1, 1), None)
    flat = apply(
        sh.reshape, apply(elementwise.mul, p, c(1, 24, 1, 1)), attrs=sh.ReshapeAttrs((2, -1))
    )
    golden("passes/layout", function_text(convert_layout(make(flat, odd), None)))


def test_results_and_other_operators_stay_row_major() -> None:
    y = apply(conv.conv, X, c(16, 16, 1, 1), None)
    fn = make(
        y, apply(red.softmax, apply(conv.conv, X, c(16, 16, 1, 1), None), attrs=red.AxisAttrs(1))
    )
    laid = convert_layout(fn, None)
    assert laid.results[0].layouts == (None,)  # type: ignore[attr-defined]
    assert laid.results[1].layouts == (None,)  # type: ignore[attr-defined]
    inner = laid.results[1].args[0]  # type: ignore[attr-defined]
    assert inner.layouts == (IndexMap.blocked(4, 1, 16),)


def test_blocked_parts_concatenate_to_blocked_ones() -> None:
    def joined(a: int, b: int) -> Any:
        parts = [apply(conv.conv, X, c(n, 16, 1, 1), None) for n in (a, b)]
        y = apply(pieces.concat, *parts, attrs=pieces.ConcatAttrs(1))
        (laid,) = convert_layout(make(apply(elementwise.exp, y)), None).results
        return laid.args[0].layouts[0]  # type: ignore[attr-defined]

    assert joined(32, 16) == IndexMap.blocked(4, 1, 16)
    assert joined(8, 24) == IndexMap.blocked(4, 1, 8)
    assert joined(16, 8) is None


def test_integers_are_folded_exactly() -> None:
    big = Constant(np.array([2**62], np.int64))
    y = apply(elementwise.add, big, Constant(np.array([2**61], np.int64)))
    (result,) = fold_constants(make(y), None).results
    assert isinstance(result, Constant)
    assert result.type.dtype is int64 and result.data.item() == 2**62 + 2**61
