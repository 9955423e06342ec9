"""Copies that give an array another shape: over the axes of an operand in blocks."""

from __future__ import annotations

import numpy as np
import pytest

import minicompiler as mc
from minicompiler.frontend.builder import Builder
from minicompiler.ir.expr import Const
from minicompiler.ir.graph import Function, Input, Value, apply
from minicompiler.ir.layout import IndexMap
from minicompiler.ir.types import TensorType, float32
from minicompiler.lower.reshaped import keep_shape
from minicompiler.lower.to_tir import lower_function
from minicompiler.ops import activations, shape
from minicompiler.ops.evaluate import run_reference

SHAPE = (1, 32, 6, 10)


def copied(blocked: bool, *sizes: int, turned: bool = False) -> tuple[int, ...]:
    """The shape of the result in the loops of relu(reshape(x))."""
    layout = IndexMap.blocked(4, 1, 16) if blocked else None
    x = Input("x", TensorType(tuple(map(Const, SHAPE)), float32), layout)
    y: Value = x
    if turned:
        y = apply(shape.transpose, y, attrs=shape.TransposeAttrs((0, 2, 3, 1)))
    y = apply(shape.reshape, y, attrs=shape.ReshapeAttrs(sizes))
    fn = Function("f", (x,), (apply(activations.relu, y),), fused=True)
    func = keep_shape(lower_function(fn, (False,), 0.0))
    return tuple(int(str(n)) for n in func.params[-1].shape)


@pytest.mark.parametrize("sizes", [(1, 1, 1920), (1, 4, 480), (32, 60), (2, 16, 3, 20)])
def test_the_axes_of_blocks_are_kept(sizes: tuple[int, ...]) -> None:
    assert copied(True, *sizes) == SHAPE
    assert copied(False, *sizes) == sizes  # in rows it is one long copy anyway


def test_another_order_is_no_view() -> None:
    assert copied(True, 1, 60, 32, turned=True) == (1, 60, 32)


@pytest.mark.parametrize("groups", [1, 4, 20])
def test_group_norm_as_exporters_write_it(groups: int) -> None:
    net = Builder("norm")
    rng = np.random.default_rng(0)
    w = rng.standard_normal((40, 16, 3, 3)).astype(np.float32)
    y = net.conv(net.input("x", (2, 16, 9, 9)), w)
    y = net.exp(net.reshape(net.relu(y), shape=(2, groups, 49 * 40 // groups)))
    y = net.div(y, net.reduce_sum(y, axes=(2,), keepdims=True))
    fn = net.function(y=net.reshape(y, shape=(2, 40, 7, 7)))
    x = rng.standard_normal((2, 16, 9, 9)).astype(np.float32) * np.float32(0.1)
    (wanted,) = run_reference(fn, [x])
    for threads in (1, 2):
        (made,) = mc.compile(fn, threads=threads)(x)
        np.testing.assert_allclose(made, wanted, rtol=1e-4, atol=1e-7)
