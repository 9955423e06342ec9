"""Weights cut out of the file before it is parsed, and models of more than 2 GB."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_models import model, node, numbers

import minicompiler as mc
from minicompiler.errors import ImportModelError
from minicompiler.frontend.onnx import load
from minicompiler.frontend.onnx_file import map_file, parse
from minicompiler.ir.graph import Constant, topological

WIDTH = 64


def proto() -> onnx.ModelProto:
    weights = {"w": numbers(40, 30), "v": numbers(3), "u": numbers(50, 41)}
    nodes = [node("MatMul", "x w", "a"), node("Add", "y u", "b"), node("Relu", "v", "c")]
    m = model(nodes, {"x": numbers(2, 40), "y": numbers(50, 41)}, ["a", "b", "c"], weights)
    m.model_version = 3  # a number in a field whose number means bytes in another message
    m.graph.initializer[1].ClearField("raw_data")
    m.graph.initializer[1].float_data.extend([1.0, 2.0, 3.0])
    return m


def test_weights_are_cut_out_and_the_rest_is_the_same() -> None:
    m = proto()
    raw = m.SerializeToString()
    slim, weights = parse(memoryview(raw), "net.onnx")
    assert len(slim.SerializeToString()) < 1000 < len(raw)
    assert [w is not None for w in weights] == [True, False, True]
    for t, w in zip(slim.graph.initializer, weights, strict=True):
        if w is not None:
            t.raw_data = bytes(w)
    assert slim == m


def test_constants_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(proto(), path)
    constants = {v.name: v for v in topological(load(path).results) if isinstance(v, Constant)}
    np.testing.assert_array_equal(constants["w"].data, numbers(40, 30))
    assert constants["w"].data.base is not None
    feeds = {"x": numbers(2, 40), "y": numbers(50, 41)}
    got = mc.compile(path, record=False).run(feeds)["a"]
    np.testing.assert_allclose(got, numbers(2, 40) @ numbers(40, 30), rtol=1e-4, atol=1e-4)


def test_an_empty_file_can_be_mapped(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert len(map_file(tmp_path / "empty")) == 0
    with pytest.raises(ImportModelError, match="cannot be read"):
        map_file(tmp_path / "absent")


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_damaged_files_are_refused_or_read_as_the_parser_reads_them(data: st.DataObject) -> None:
    raw = bytearray(proto().SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    try:
        got, weights = parse(memoryview(bytes(raw)), "net.onnx")
    except ImportModelError:
        return
    for t, w in zip(got.graph.initializer, weights, strict=True):
        if w is not None:
            t.raw_data = bytes(w)
    assert got == onnx.ModelProto.FromString(bytes(raw))


def tables(folder: Path, rows: int, count: int = 3) -> tuple[Path, list[np.ndarray]]:
    """A model that adds up rows of some tables, each in a sparse file; and the last rows."""
    nodes, last, ends = [], "zero", []
    m = model([], {"ids": np.arange(2)}, [], {"zero": np.zeros(1, np.float32)})
    for k in range(count):
        end = numbers(2, WIDTH) + np.float32(k)
        size = rows * WIDTH * 4
        with open(folder / f"t{k}.bin", "wb") as f:
            f.truncate(16 + size)
            f.seek(16 + size - end.nbytes)
            f.write(end.tobytes())
        t = TensorProto(name=f"t{k}", dims=[rows, WIDTH], data_type=TensorProto.FLOAT)
        t.data_location = TensorProto.EXTERNAL
        for key, value in (("location", f"t{k}.bin"), ("offset", "16"), ("length", str(size))):
            t.external_data.add(key=key, value=value)
        m.graph.initializer.append(t)
        nodes += [node("Gather", f"t{k} ids", f"g{k}"), node("Add", f"{last} g{k}", f"s{k}")]
        last = f"s{k}"
        ends.append(end)
    m.graph.node.extend(nodes)
    m.graph.output.append(helper.make_empty_tensor_value_info(last))
    onnx.save(m, folder / "net.onnx")
    return folder / "net.onnx", ends


@pytest.mark.parametrize("rows", [100, 3_500_000], ids=["small", "2.7 GB"])
def test_tables_in_files_beside_the_model(tmp_path: Path, rows: int) -> None:
    """Only the rows that are looked up are read."""
    path, ends = tables(tmp_path, rows)
    total = sum((tmp_path / f"t{k}.bin").stat().st_size for k in range(3))
    assert (total > 2**31) == (rows > 100)
    m = mc.compile(path, record=False)
    (y,) = m(np.array([rows - 2, rows - 1]))
    np.testing.assert_allclose(y, sum(ends), rtol=1e-6)
    (y,) = m(np.array([0, rows // 2]))
    assert not y.any()


@pytest.mark.nightly
def test_a_product_with_more_than_2_gb_of_weights(tmp_path: Path) -> None:
    """Weights that are packed: 2.1 GB, mostly zeros."""
    n, k = 33_000, 16_384
    with open(tmp_path / "w.bin", "wb") as f:
        f.truncate(n * k * 4)
        f.seek((n * k - 1) * 4)
        f.write(np.float32(2).tobytes())
    t = TensorProto(name="w", dims=[k, n], data_type=TensorProto.FLOAT)
    t.data_location = TensorProto.EXTERNAL
    t.external_data.add(key="location", value="w.bin")
    m = model([node("MatMul", "x w", "y")], {"x": numbers(1, k)}, ["y"])
    m.graph.initializer.append(t)
    onnx.save(m, tmp_path / "net.onnx")
    x = numbers(1, k)
    (y,) = mc.compile(tmp_path / "net.onnx", record=False)(x)
    assert np.flatnonzero(y).tolist() == [n - 1]
    assert y[0, -1] == pytest.approx(2 * x[0, -1])


def test_numpy_helper_reads_what_is_left() -> None:
    """Initializers that were not cut out are whole."""
    slim, weights = parse(memoryview(proto().SerializeToString()), "net.onnx")
    assert weights[1] is None
    assert numpy_helper.to_array(slim.graph.initializer[1]).tolist() == [1, 2, 3]
