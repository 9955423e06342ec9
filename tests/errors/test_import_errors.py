"""What a user reads when a model cannot be imported: one golden text per mistake."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_models import model, node, numbers

from minicompiler.errors import MinicompilerError
from minicompiler.frontend.onnx import load

X = numbers(2, 3)
Golden = Callable[[str, str], None]


def saved(folder: Path, m: onnx.ModelProto) -> Path:
    path = folder / "net.onnx"
    path.write_bytes(m.SerializeToString())
    return path


def unsupported() -> onnx.ModelProto:
    nodes = [node("Relu", "x", "a")]
    nodes += [node("Reluu", "a", f"r{k}") for k in range(5)]
    nodes += [node("Fancy", "r0", "y", domain="com.acme")]
    m = model(nodes, {"x": X}, ["y"])
    m.opset_import.append(helper.make_opsetid("com.acme", 1))
    return m


def two_definitions() -> onnx.ModelProto:
    return model([node("Relu", "x", "y"), node("Neg", "x", "y")], {"x": X}, ["y"])


def cycle() -> onnx.ModelProto:
    return model([node("Add", "x b", "a"), node("Relu", "a", "b")], {"x": X}, ["b"])


def missing_value() -> onnx.ModelProto:
    return model([node("Add", "x wieght", "y")], {"x": X}, ["y"], {"weight": X})


def missing_output() -> onnx.ModelProto:
    return model([node("Relu", "x", "yy")], {"x": X}, ["y"])


def wrong_shapes() -> onnx.ModelProto:
    nodes = [node("Relu", "x", "a"), node("MatMul", "a w", "y")]
    return model(nodes, {"x": X}, ["y"], {"w": numbers(4, 5)})


def wrong_channels() -> onnx.ModelProto:
    return model(
        [node("Conv", "x w", "y")], {"x": numbers(1, 3, 8, 8)}, ["y"], {"w": numbers(4, 2, 3, 3)}
    )


def data_dependent_shape() -> onnx.ModelProto:
    nodes = [node("Cast", "x", "i", to=TensorProto.INT64), node("Reshape", "x i", "y")]
    return model(nodes, {"x": numbers(2)}, ["y"])


def future_opset() -> onnx.ModelProto:
    m = model([node("Relu", "x", "y")], {"x": X}, ["y"])
    m.opset_import[0].version = 1000
    return m


def no_opset() -> onnx.ModelProto:
    m = model([node("Relu", "x", "y")], {"x": X}, ["y"])
    del m.opset_import[:]
    return m


def old_opset() -> onnx.ModelProto:
    return model([node("Relu", "x", "y")], {"x": X}, ["y"], opset=5)


def text_input() -> onnx.ModelProto:
    m = model([node("Identity", "x", "y")], {"x": X}, ["y"])
    m.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING
    return m


def shapeless_input() -> onnx.ModelProto:
    m = model([node("Relu", "x", "y")], {"x": X}, ["y"])
    m.graph.input[0].type.tensor_type.ClearField("shape")
    return m


def sequence_input() -> onnx.ModelProto:
    m = model([node("Relu", "x", "y")], {"x": X}, ["y"])
    m.graph.input[0].CopyFrom(helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, None))
    return m


def training_dropout() -> onnx.ModelProto:
    constants = {"ratio": np.float32(0.5), "training": np.array(True)}
    return model([node("Dropout", "x ratio training", "y")], {"x": numbers(2, 3)}, ["y"], constants)


def missing_attribute() -> onnx.ModelProto:
    return model([node("MaxPool", "x", "y")], {"x": numbers(1, 1, 4, 4)}, ["y"])


def short_weight() -> onnx.ModelProto:
    m = model([node("Add", "x w", "y")], {"x": X}, ["y"], {"w": X})
    m.graph.initializer[0].raw_data = b"\0" * 8
    return m


def symbolic() -> onnx.ModelProto:
    return model([node("Relu", "x", "y")], {"x": X}, ["y"], shapes={"x": ("batch", 3)})


MISTAKES = [
    unsupported, two_definitions, cycle, missing_value, missing_output, wrong_shapes,
    wrong_channels,
    data_dependent_shape, no_opset, text_input, shapeless_input, sequence_input,
    training_dropout, missing_attribute, short_weight,
]  # fmt: skip


@pytest.mark.parametrize("make", MISTAKES, ids=lambda f: f.__name__)
def test_a_broken_model(
    make: Callable[[], onnx.ModelProto], tmp_path: Path, golden: Golden
) -> None:
    with pytest.raises(MinicompilerError) as caught:
        load(saved(tmp_path, make()))
    golden(f"import/{make.__name__}", f"{type(caught.value).__name__}: {caught.value}")


def test_an_opset_from_the_future() -> None:
    with pytest.raises(MinicompilerError, match="uses opset 1000; 6 to"):
        load(future_opset())
    with pytest.raises(MinicompilerError, match="uses opset 5; 6 to"):
        load(old_opset())


@pytest.mark.parametrize(
    ("name", "dims"),
    [
        ("dims_unknown", {"bach": 4}),
        ("dims_reversed", {"batch": (8, 4)}),
        ("dims_no_multiple", {"batch": (9, 15, 16)}),
        ("dims_negative", {"batch": -1}),
        ("dims_text", {"batch": "4"}),
    ],
)
def test_wrong_dims(name: str, dims: Any, tmp_path: Path, golden: Golden) -> None:
    with pytest.raises(MinicompilerError) as caught:
        load(saved(tmp_path, symbolic()), dims)
    golden(f"import/{name}", str(caught.value))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("not_a_model", b"\x89PNG\r\n\x1a\n" + bytes(range(256))),
        ("truncated", symbolic().SerializeToString()[:-20]),
        ("empty_file", b""),
    ],
)
def test_files_that_are_no_models(name: str, data: bytes, tmp_path: Path, golden: Golden) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(data)
    with pytest.raises(MinicompilerError) as caught:
        load(path)
    golden(f"import/{name}", str(caught.value))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MinicompilerError, match=r"absent\.onnx cannot be read: No such file"):
        load(tmp_path / "absent.onnx")


@pytest.mark.parametrize("seed", range(40))
def test_damaged_files_never_crash_with_another_error(seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray(
        missing_value().SerializeToString() if seed % 2 else wrong_shapes().SerializeToString()
    )
    for at in rng.integers(0, len(data), 4):
        data[at] = rng.integers(0, 256)
    with contextlib.suppress(MinicompilerError):
        load(bytes(data))
