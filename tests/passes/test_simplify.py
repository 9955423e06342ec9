"""Each rule of the table: what fires, and what looks alike and must not."""

from __future__ import annotations

import ast
from typing import Any

import numpy as np
import pytest

from minicompiler.ir.expr import Const
from minicompiler.ir.graph import Apply, Constant, Function, Input, Item, Value, applies, apply
from minicompiler.ir.types import TensorType, bool_, float32, int32
from minicompiler.ops import activations as act
from minicompiler.ops import elementwise as el
from minicompiler.ops import norm, padding
from minicompiler.ops import pieces as pc
from minicompiler.ops import reduce as red
from minicompiler.ops import shape as sh
from minicompiler.ops.evaluate import run_reference
from minicompiler.passes.simplify import simplify


def tensor(*shape: int, dtype: Any = float32) -> Input:
    return Input("x", TensorType(tuple(map(Const, shape)), dtype))


X, ONE_ROW = tensor(2, 3, 4), tensor(1, 4)
INTS, BOOLS = tensor(2, 3, dtype=int32), tensor(2, 3, dtype=bool_)


def c(value: Any, dtype: Any = np.float32) -> Constant:
    return Constant(np.asarray(value, dtype))


def simple(result: Value, x: Input = X) -> Value:
    return simplify(Function("f", (x,), (result,)), None).results[0]


def ops(result: Value, x: Input = X) -> list[str]:
    return [v.op.name for v in applies(simplify(Function("f", (x,), (result,)), None))]


def transposed(x: Value, *perm: int) -> Value:
    return apply(sh.transpose, x, attrs=sh.TransposeAttrs(perm))


def reshaped(x: Value, *sizes: int) -> Value:
    return apply(sh.reshape, x, attrs=sh.ReshapeAttrs(sizes))


GONE = {
    "x + 0": apply(el.add, X, c(0)),
    "0 + x": apply(el.add, c(0), X),
    "x - 0": apply(el.sub, X, c([0, 0, 0, 0])),
    "x * 1": apply(el.mul, X, c(1)),
    "1 * x": apply(el.mul, c([[1]]), X),
    "x / 1": apply(el.div, X, c(1)),
    "x ** 1": apply(el.power, X, c(1)),
    "neg neg": apply(el.neg, apply(el.neg, X)),
    "cast to same": apply(el.cast_, X, attrs=el.CastAttrs(float32)),
    "transposed back": transposed(transposed(X, 1, 2, 0), 2, 0, 1),
    "transpose of nothing": transposed(X, 0, 1, 2),
    "reshaped back": reshaped(reshaped(X, 6, 4), 2, 3, 4),
    "squeezed back": apply(sh.squeeze, apply(sh.unsqueeze, X), attrs=sh.SqueezeAttrs((0,))),
    "whole slice": apply(pc.strided_slice, X, attrs=pc.SliceAttrs((0,), (1 << 40,), (1,), (1,))),
    "padding of 0": apply(padding.pad, X, attrs=padding.PadAttrs((0, 0, 0), (0, 0, 0))),
    "concat of one": apply(pc.concat, X),
    "expand to same": apply(sh.expand, X, attrs=sh.ExpandAttrs((1, 3, 4))),
    "where True": apply(el.where, c([[True]], bool), X, apply(el.neg, X)),
    "equal branches": apply(el.where, apply(el.less, X, c(0)), X, X),
}  # fmt: skip


@pytest.mark.parametrize("name", GONE)
def test_what_changes_nothing_goes(name: str) -> None:
    assert simple(GONE[name]) is X


def test_all_parts_of_a_split_joined_are_the_whole() -> None:
    parts = apply(pc.split, X, attrs=pc.SplitAttrs(2, (1, 3)))
    joined = apply(pc.concat, Item(parts, 0), Item(parts, 1), attrs=pc.ConcatAttrs(-1))
    assert simple(joined) is X
    swapped = apply(pc.concat, Item(parts, 1), Item(parts, 0), attrs=pc.ConcatAttrs(-1))
    assert ops(swapped) == ["split", "concat"]


KEPT = {
    "x + 0 that broadcasts": (apply(el.add, ONE_ROW, c(np.zeros((5, 4)))), ONE_ROW),
    "0 - x": (apply(el.sub, c(0), X), X),
    "1 / x": (apply(el.div, c(1), X), X),
    "x / 3": (apply(el.div, X, c(3)), X),
    "integer / 2": (apply(el.div, INTS, c(2, np.int32)), INTS),
    "x / 2**-140": (apply(el.div, X, c(2.0**-140)), X),
    "reversed slice": (
        apply(pc.strided_slice, X, attrs=pc.SliceAttrs((-1,), (-100,), (0,), (-1,))),
        X,
    ),
    "neg abs": (apply(el.neg, apply(el.abs_, X)), X),
    "x ** 0.5": (apply(el.power, X, c(0.5)), X),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_only_looks_neutral_stays(name: str) -> None:
    result, x = KEPT[name]
    assert simple(result, x) is result


def test_the_nan_guard_of_softmax_stays() -> None:
    """Rows of -inf make softmax NaN, so the exporter's guard does something."""
    s = apply(red.softmax, X)
    guarded = apply(el.where, apply(el.isnan, s), c(0), s)
    assert simple(guarded) is guarded


def test_powers_become_products() -> None:
    assert ops(apply(el.power, X, c(2))) == ["mul"]
    assert ops(apply(el.power, X, c(3))) == ["mul", "mul"]


@pytest.mark.parametrize(
    "form", ["x * 0.5 * (1 + t)", "(t + 1) * (0.5 * x)", "x * (0.5 * (1 + t))"]
)
def test_gelu_as_exporters_write_it_is_a_sigmoid(form: str) -> None:
    names = {"x": X, "t": apply(el.tanh, apply(el.exp, X))}

    def build(e: ast.expr) -> Value:
        if isinstance(e, ast.BinOp):
            return apply(
                el.mul if isinstance(e.op, ast.Mult) else el.add, *map(build, (e.left, e.right))
            )
        return names[e.id] if isinstance(e, ast.Name) else c(ast.literal_eval(e))

    whole = build(ast.parse(form, mode="eval").body)
    assert ops(whole) == ["exp", "mul", "sigmoid", "mul"]


def test_what_is_no_half_of_tanh_stays() -> None:
    t = apply(el.tanh, X)
    for one, half in ((2, 0.5), (1, 0.25)):
        whole = apply(el.mul, apply(el.mul, X, c(half)), apply(el.add, t, c(one)))
        assert "tanh" in ops(whole)
    assert "tanh" in ops(apply(el.mul, apply(el.mul, X, c(0.5)), apply(el.add, X, t)))


def test_division_by_a_power_of_two_is_a_product() -> None:
    made = simple(apply(el.div, X, c(8)))
    assert made.op is el.mul and made.args[1].data.item() == 0.125  # type: ignore[attr-defined]


def test_views_of_views_are_one() -> None:
    a = apply(sh.reshape, X, attrs=sh.ReshapeAttrs((6, 4)))
    b = apply(
        sh.unsqueeze,
        apply(sh.reshape, a, attrs=sh.ReshapeAttrs((-1,))),
        attrs=sh.UnsqueezeAttrs((0,)),
    )
    made = simple(b)
    assert made.op is sh.reshape and made.args == (X,)  # type: ignore[attr-defined]
    assert made.type == b.type  # type: ignore[attr-defined]


def test_transposes_join_and_those_of_single_rows_are_views() -> None:
    made = simple(transposed(transposed(X, 1, 0, 2), 2, 1, 0))
    assert made.op is sh.transpose and made.attrs.perm == (2, 0, 1)  # type: ignore[attr-defined]
    row = tensor(1, 3, 4)
    assert ops(transposed(row, 1, 0, 2), row) == ["reshape"]


def test_nested_concats_and_clips_join() -> None:
    inner = apply(pc.concat, X, X, attrs=pc.ConcatAttrs(1))
    made = simple(apply(pc.concat, inner, X, attrs=pc.ConcatAttrs(-2)))
    assert made.args == (X, X, X)  # type: ignore[attr-defined]
    other = apply(pc.concat, inner, inner, attrs=pc.ConcatAttrs(0))
    assert ops(other) == ["concat", "concat"]
    clipped = apply(
        el.clip, apply(el.clip, X, attrs=el.ClipAttrs(0, None)), attrs=el.ClipAttrs(-1, 6)
    )
    assert simple(clipped).attrs == el.ClipAttrs(0, 6)  # type: ignore[attr-defined]
    empty = apply(
        el.clip, apply(el.clip, X, attrs=el.ClipAttrs(5, None)), attrs=el.ClipAttrs(None, 1)
    )
    assert ops(empty) == ["clip", "clip"]


def test_logic_with_constants() -> None:
    yes, no = c(True, bool), c(np.zeros((2, 3)), bool)
    assert simple(apply(el.logical_and, yes, BOOLS), BOOLS) is BOOLS
    assert simple(apply(el.logical_and, BOOLS, no), BOOLS) is no
    assert simple(apply(el.logical_or, BOOLS, no), BOOLS) is BOOLS
    negated = apply(el.where, apply(el.logical_not, BOOLS), c(np.ones((2, 3))), c(np.zeros((2, 3))))
    made = simple(negated, BOOLS)
    assert made.args[0] is BOOLS and made.args[1].data[0, 0] == 0  # type: ignore[attr-defined]


def test_relu_twice_is_relu() -> None:
    assert ops(apply(act.relu, apply(act.relu, X))) == ["relu"]


@pytest.mark.parametrize(
    ("shape", "parts", "own", "groups"),
    [((2, 12, 5, 3), 4, 0, 4), ((2, 12, 7), 12, 3, 3), ((2, 12, 5, 3), 1, 0, 1)],
)
def test_groups_that_are_normalised_as_channels(
    shape: tuple[int, ...], parts: int, own: int, groups: int
) -> None:
    """As exporters write GroupNorm: the reshapes go, and each parameter is that of its channels."""
    rng = np.random.default_rng(0)
    x, values = tensor(*shape), rng.standard_normal(shape).astype(np.float32)
    parameters = [c(rng.standard_normal(parts)) for _ in range(2)]
    attrs = norm.GroupNormAttrs(own, 1e-3)
    view = reshaped(x, shape[0], parts, -1)
    back = reshaped(apply(norm.group_norm, view, *parameters, attrs=attrs), *shape)
    found = simple(back, x)
    assert isinstance(found, Apply)
    assert found.op is norm.group_norm
    assert found.attrs.groups == groups
    got, want = (run_reference(Function("f", (x,), (r,)), [values])[0] for r in (found, back))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_groups_that_are_no_channels_of_the_result_stay() -> None:
    x = tensor(2, 12, 5)
    for view, back in (((4, 6, 5), (2, 12, 5)), ((2, 5, 12), (2, 12, 5)), ((2, 4, 15), (2, 15, 4))):
        ones = [c(np.ones(view[1])) for _ in range(2)]
        normal = apply(norm.group_norm, reshaped(x, *view), *ones, attrs=norm.GroupNormAttrs())
        assert ops(reshaped(normal, *back), x) == ["reshape", "group_norm", "reshape"]
