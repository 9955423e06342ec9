"""What becomes one kernel, and what does not and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minicompiler.context import Context
from minicompiler.ir.expr import Const, Dim
from minicompiler.ir.graph import Apply, Constant, Function, Input, Item, Value, applies, apply
from minicompiler.ir.text import function_text
from minicompiler.ir.types import Loc, TensorType, float32
from minicompiler.ir.verify import verify_function
from minicompiler.ops import activations, conv, elementwise, linalg, norm, pieces, pool
from minicompiler.ops import reduce as red
from minicompiler.ops import shape as sh
from minicompiler.passes.fuse import fuse, fused_functions
from minicompiler.target import Target

SAME = conv.ConvAttrs((), (1, 1), (1, 1))


def tensor(name: str, *shape: Any) -> Input:
    sizes = tuple(s if isinstance(s, Dim) else Const(s) for s in shape)
    return Input(name, TensorType(sizes, float32))


def weight(*shape: int, name: str = "w") -> Constant:
    return Constant(np.ones(shape, np.float32), name)


X = tensor("x", 1, 8, 6, 6)


def make(*results: Value, params: tuple[Input, ...] = (X,)) -> Function:
    return Function("net", params, results)


def kernels(fn: Function, ctx: Any = None) -> list[str]:
    fused = fuse(fn, ctx)
    verify_function(fused)
    return [v.op.name for v in applies(fused)]


def conv_of(x: Value) -> Apply:
    return apply(conv.conv, x, weight(8, 8, 3, 3), None, attrs=SAME)


def test_elementwise_work_goes_onto_a_contraction(golden: Callable[[str, str], None]) -> None:
    y = apply(
        conv.conv, X, weight(8, 8, 3, 3), None, attrs=SAME, locs=(Loc("c", "net", 1, "Conv"),)
    )
    z = apply(elementwise.mul, y, weight(8, 1, 1, name="scale"), locs=(Loc("s", "net", 2, "Mul"),))
    r = apply(activations.relu, apply(elementwise.add, z, X), locs=(Loc("r", "net", 3, "Relu"),))
    fused = fuse(make(r), None)
    assert [v.op.name for v in applies(fused)] == ["fused_conv_mul_add_relu"]
    golden("passes/fuse_conv", function_text(fused))


def test_a_residual_sum_takes_one_of_two_convolutions() -> None:
    left, right = conv_of(X), conv_of(apply(activations.relu, X))
    fn = make(apply(activations.relu, apply(elementwise.add, left, right)))
    fused = fuse(fn, None)
    names = sorted(v.op.name for v in applies(fused))
    assert names == ["fused_conv", "fused_conv_add_relu", "fused_relu"]
    assert any("at most one contraction" in r or "another contraction" in r for r in fused.reasons)


def test_a_branch_and_its_join_are_one_kernel() -> None:
    a = apply(elementwise.exp, X)
    b, c = apply(elementwise.neg, a), apply(elementwise.tanh, a)
    assert kernels(make(apply(elementwise.add, b, c))) == ["fused_exp_neg_tanh_add"]


def test_a_value_with_readers_apart_stays_a_kernel() -> None:
    a = apply(elementwise.exp, X)
    left, right = conv_of(a), apply(elementwise.neg, a)
    assert kernels(make(left, right)) == ["fused_exp", "fused_conv", "fused_neg"]


def test_a_broadcast_does_not_repeat_a_contraction() -> None:
    x = tensor("x", 1, 4)
    y = apply(linalg.matmul, x, weight(4, 4))
    fn = make(apply(elementwise.add, y, tensor("b", 5, 4)), params=(x, tensor("b", 5, 4)))
    fn = fn.with_(params=(x, fn.results[0].args[1]))  # type: ignore[attr-defined]
    assert kernels(fn) == ["fused_matmul", "fused_add"]


def test_injective_operators_join_after_contractions() -> None:
    t = apply(sh.transpose, X, attrs=sh.TransposeAttrs((0, 2, 3, 1)))
    r = apply(sh.reshape, t, attrs=sh.ReshapeAttrs((1, 36, 8)))
    assert kernels(make(apply(elementwise.exp, r))) == ["fused_transpose_reshape_exp"]
    y = apply(sh.transpose, conv_of(X))
    assert kernels(make(y)) == ["fused_conv", "fused_transpose"]


def softmax_by_hand(x: Value, axis: int) -> Value:
    over = red.ReduceAttrs((axis,))
    e = apply(elementwise.exp, apply(elementwise.sub, x, apply(red.reduce_max, x, attrs=over)))
    return apply(elementwise.div, e, apply(red.reduce_sum, e, attrs=over))


def test_reductions_and_their_rows_are_one_kernel() -> None:
    x = tensor("x", Dim("n", 1, 64), 128)
    scaled = apply(elementwise.mul, x, weight(1))
    fn = make(softmax_by_hand(scaled, -1), params=(x,))
    assert kernels(fn) == ["fused_mul_reduce_max_sub_exp_reduce_sum_div"]
    normed = apply(norm.layer_norm, apply(elementwise.add, x, x), weight(128), weight(128))
    after = apply(activations.gelu, normed)
    assert kernels(make(after, params=(x,))) == ["fused_add_layer_norm_gelu"]


def test_rows_must_fit_the_cache_and_have_a_bound() -> None:
    x = tensor("x", 4, 4096)
    fn = make(softmax_by_hand(x, -1), params=(x,))
    small = Context(target=Target(caches=(32 << 10, 64 << 10, 1 << 20)))
    assert len(kernels(fn)) == 1
    fused = fuse(fn, small)
    assert len(list(applies(fused))) > 1
    assert any("does not fit half of the L2 cache (32768 bytes)" in r for r in fused.reasons)
    free = tensor("x", 4, Dim("n"))
    fused = fuse(make(softmax_by_hand(free, -1), params=(free,)), None)
    assert any("no upper bound" in r for r in fused.reasons)
    fused = fuse(make(softmax_by_hand(x, 0), params=(x,)), None)
    assert any("outermost axis" in r for r in fused.reasons)


def test_other_rows_stay_apart() -> None:
    x = tensor("x", 16, 16)
    t = apply(sh.transpose, apply(red.softmax, x))
    assert kernels(make(t, params=(x,))) == ["fused_softmax", "fused_transpose"]


def test_several_results_come_out_of_one_kernel() -> None:
    parts = apply(pieces.split, X, attrs=pieces.SplitAttrs(1, (4, 4)))
    left = apply(elementwise.exp, Item(parts, 0))
    fused = fuse(make(left, Item(parts, 1)), None)
    verify_function(fused)
    split = next(v for v in applies(fused) if not isinstance(v.type, TensorType))
    assert split.op.name == "fused_split"


def test_equal_groups_share_one_function() -> None:
    x: Value = X
    for k in range(4):
        y = apply(conv.conv, x, weight(8, 8, 3, 3, name=f"w{k}"), None, attrs=SAME)
        x = apply(activations.relu, y)
    fused = fuse(make(x), None)
    assert [f.name for f in fused_functions(fused)] == ["fused_conv_relu"]
    assert len(list(applies(fused))) == 4


def test_names_are_unique_and_short() -> None:
    a = apply(elementwise.exp, X)
    b = apply(elementwise.exp, tensor("y", 3))
    fn = make(a, b, params=(X, b.args[0]))  # type: ignore[arg-type]
    assert sorted(kernels(fn)) == ["fused_exp", "fused_exp_1"]
    x: Value = X
    for _ in range(30):
        x = apply(activations.thresholded_relu, x)
    (name,) = kernels(make(x))
    assert name == "fused_thresholded_relu_thresholded_relu_thresholded_relu_and_27_more"


def test_constants_are_parameters_and_single_numbers_literals() -> None:
    two = Constant(np.asarray(np.float32(2)))
    y = apply(elementwise.add, apply(elementwise.mul, X, two), weight(8, 1, 1))
    (call,) = applies(fuse(make(y), None))
    assert isinstance(call.op, Function)
    assert [type(a).__name__ for a in call.args] == ["Input", "Constant"]
    literals = [a for v in applies(call.op) for a in v.args if isinstance(a, Constant)]
    assert [a.data.item() for a in literals] == [2.0]


def test_a_pool_follows_a_convolution_apart() -> None:
    y = apply(
        pool.max_pool, apply(activations.relu, conv_of(X)), attrs=pool.PoolAttrs((2, 2), (2, 2))
    )
    assert kernels(make(y)) == ["fused_conv_relu", "fused_max_pool"]
