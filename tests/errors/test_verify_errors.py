"""What the verifier says about broken graphs: one golden text per rule."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from minicompiler.errors import VerifyError
from minicompiler.ir.expr import Const, Dim
from minicompiler.ir.graph import Apply, Constant, Function, Input, Item, apply
from minicompiler.ir.layout import IndexMap
from minicompiler.ir.types import Loc, TensorType, float32
from minicompiler.ir.verify import verify_function
from minicompiler.ops import activations, elementwise, pieces
from minicompiler.ops import reduce as red


def tensor(name: str, *shape: int) -> Input:
    return Input(name, TensorType(tuple(map(Const, shape)), float32))


X = tensor("x", 2, 3)
LOC = (Loc("act", "net.onnx", 4, "Relu"),)


def relu(x: Input | Apply = X) -> Apply:
    return apply(activations.relu, x, locs=LOC, name="y")


def wrong_type() -> Function:
    bad = relu(apply(elementwise.exp, X)).with_(type=TensorType((Const(2),), float32))
    return Function("net", (X,), (apply(elementwise.neg, bad),))


def refused_arguments() -> Function:
    add = apply(elementwise.add, X, X, locs=LOC)
    return Function("net", (X,), (add.with_(args=(X, Constant(np.zeros(4, np.float32), "c"))),))


def undeclared_input() -> Function:
    return Function("net", (X,), (apply(elementwise.add, X, tensor("z", 2, 3)),))


def twin_parameters() -> Function:
    return Function("net", (X, tensor("x", 2)), (relu(),))


def twin_dims() -> Function:
    a = Input("a", TensorType((Dim("n", 1, 8),), float32))
    b = Input("b", TensorType((Dim("n", 1, 9),), float32))
    return Function("net", (a, b), (apply(elementwise.exp, a),))


def cyclic() -> Function:
    y = relu()
    z = apply(elementwise.add, y, X)
    object.__setattr__(y, "args", (z,))
    return Function("net", (X,), (z,))


def item_out_of_range() -> Function:
    parts = apply(pieces.split, X, attrs=pieces.SplitAttrs(1, (1, 2)), locs=LOC)
    return Function("net", (X,), (Item(parts, 2),))


def tuple_as_value() -> Function:
    parts = apply(pieces.split, X, attrs=pieces.SplitAttrs(1, (1, 2)), locs=LOC)
    return Function("net", (X,), (relu().with_(args=(parts,)),))


def returned_tuple() -> Function:
    parts = apply(pieces.split, X, attrs=pieces.SplitAttrs(1, (1, 2)), locs=LOC)
    return Function("net", (X,), (parts,))


def layout_of_another_rank() -> Function:
    return Function("net", (X,), (relu().with_(layouts=(IndexMap.blocked(4, 1, 8),)),))


def wrong_attributes() -> Function:
    return Function("net", (X,), (relu().with_(attrs=red.AxisAttrs()),))


def kernel_arguments() -> Function:
    p = tensor("p0", 2, 4)
    inner = Function("fused_exp", (p,), (apply(elementwise.exp, p),), fused=True)
    call = Apply(inner, (X,), None, TensorType((Const(2), Const(4)), float32), LOC)
    return Function("net", (X,), (call,))


def result_names() -> Function:
    return Function("net", (X,), (relu(),), result_names=("a", "b"))


BROKEN = [
    wrong_type, refused_arguments, undeclared_input, twin_parameters, twin_dims, cyclic,
    item_out_of_range, tuple_as_value, returned_tuple, layout_of_another_rank, wrong_attributes,
    kernel_arguments, result_names,
]  # fmt: skip


@pytest.mark.parametrize("make", BROKEN, ids=lambda f: f.__name__)
def test_a_broken_graph(make: Callable[[], Function], golden: Callable[[str, str], None]) -> None:
    with pytest.raises(VerifyError) as caught:
        verify_function(make())
    golden(f"verify/{make.__name__}", f"VerifyError: {caught.value}")


def test_a_thousand_layers_are_no_problem() -> None:
    y: Input | Apply = X
    for _ in range(3000):
        y = apply(activations.relu, y)
    verify_function(Function("deep", (X,), (y,)))
