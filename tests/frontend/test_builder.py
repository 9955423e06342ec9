"""Models built by hand: operators as methods, names and places kept, clear errors."""

from __future__ import annotations

import numpy as np
import pytest

from minicompiler.errors import MinicompilerError, ShapeError
from minicompiler.frontend.builder import Builder
from minicompiler.ir.expr import Dim
from minicompiler.ir.graph import Apply, Constant, Function, applies, type_of
from minicompiler.ir.verify import verify_function
from minicompiler.ops.evaluate import run_reference


def small() -> Function:
    net = Builder("small", dims={"batch": (1, 8)})
    x = net.input("x", ("batch", 3))
    w = net.constant(np.arange(6, dtype=np.float32).reshape(3, 2), "w")
    h = net.add(net.matmul(x, w), 0.5, name="hidden")
    a, b = net.split(net.relu(h), axis=1, parts=2)
    return net.function(net.mul(2, a), b=b)


def test_a_model_computes_what_was_written() -> None:
    fn = small()
    verify_function(fn)
    x = np.array([[1, -1, 0], [0, 1, 1]], np.float32)
    first, second = run_reference(fn, {"x": x})
    h = np.maximum(x @ np.arange(6, dtype=np.float32).reshape(3, 2) + 0.5, 0)
    np.testing.assert_array_equal(first, 2 * h[:, :1])
    np.testing.assert_array_equal(second, h[:, 1:])


def test_names_dimensions_and_places_are_kept() -> None:
    fn = small()
    assert fn.result_names == ("output0", "b")
    assert fn.params[0].type.shape[0] is Dim("batch", 1, 8)
    nodes = {v.name: v for v in applies(fn)}
    assert set(nodes) == {"matmul_1", "hidden", "relu_1", "split_1", "mul_1"}
    (loc,) = nodes["hidden"].locs
    assert (loc.name, loc.op, loc.file) == ("hidden", "add", "test_builder.py")
    line = small.__code__.co_firstlineno + 4
    assert loc.line == line
    weight = nodes["matmul_1"].args[1]
    assert isinstance(weight, Constant) and weight.name == "w"


def test_numbers_take_the_type_of_the_tensor() -> None:
    net = Builder()
    x = net.input("x", (2,), "float16")
    y = net.mul(3, x)
    assert isinstance(y, Apply) and type_of(y).dtype.name == "float16"
    assert type_of(net.cast(x, dtype="int32")).dtype.name == "int32"


def test_pads_and_lists() -> None:
    net = Builder()
    x = net.input("x", (1, 2, 5, 5))
    weight = np.zeros((4, 2, 3, 3), np.float32)
    y = net.conv(x, weight, strides=[2, 2], pads=(1, 1))
    assert [str(s) for s in type_of(y).shape] == ["1", "4", "3", "3"]
    assert y.attrs.pads_begin == y.attrs.pads_end == (1, 1)


def test_mistakes_are_named() -> None:
    net = Builder("net")
    x = net.input("x", (2, 3))
    with pytest.raises(ShapeError, match=r"(?s)matmul.*test_builder.py:\d+"):
        net.matmul(x, np.zeros((4, 2), np.float32), name="fc")
    with pytest.raises(
        ShapeError, match=r"(?s)softmax has no attribute axes.*its attributes: axis"
    ):
        net.softmax(x, axes=1)
    with pytest.raises(AttributeError, match="no operator 'matmull'; near: matmul"):
        net.matmull(x, x)
    with pytest.raises(MinicompilerError, match='"x" is used twice in "net"'):
        net.input("x", (1,))
    with pytest.raises(MinicompilerError, match="has no result"):
        net.function()
    assert {"conv", "softmax", "input"} <= set(dir(net))
