"""Memory while compiling and afterwards, on a model of 100 MB."""

from __future__ import annotations

import mmap
import sys
import weakref
from pathlib import Path

import numpy as np
import onnx
import pytest
from memory_use import limits, measured
from onnx_models import model, node, numbers

import minicompiler as mc
from minicompiler.footprint import _resident
from minicompiler.prepare import _KEPT_MAPPED, _contiguous, settle
from minicompiler.runtime.pages import HUGE_PAGE, Pages, collapse, has_huge_pages, memory_of

SIZE = 2560


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_weights_are_held_once_and_packed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that is read by rows and, transposed, by a product; and two other products."""
    monkeypatch.setenv("MINICOMPILER_CACHE", str(tmp_path / "cache"))
    table, one, two = (numbers(SIZE * 2, SIZE) / SIZE for _ in range(3))
    nodes = [
        node("Gather", "table ids", "x"), node("MatMul", "x one", "a"),
        node("Relu", "a", "b"), node("MatMul", "b two", "c"),
        node("Transpose", "table", "t", perm=[1, 0]), node("MatMul", "c t", "y"),
    ]  # fmt: skip
    weights = {"table": table, "one": one.T, "two": two}
    weights = {k: np.ascontiguousarray(v) for k, v in weights.items()}
    proto = model(nodes, {"ids": np.arange(3)}, ["y"], weights)
    path = tmp_path / "net.onnx"
    onnx.save(proto, path)
    use = measured(str(path))
    peak, resident = limits(use)
    assert use["weights"] == pytest.approx(3 * SIZE * SIZE * 8, rel=0.01)
    assert use["peak"] <= peak
    # The table counts once: as it is read by rows, it stays in the mapped file.
    assert use["resident"] - use["baseline"] <= resident
    (y,) = mc.compile(path, record=False)(np.arange(3))
    want = np.maximum(table[:3] @ weights["one"], 0) @ two @ table.T
    np.testing.assert_allclose(y, want, atol=1e-4 * np.abs(want).max())


def test_a_small_constant_does_not_keep_the_file_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "data"
    np.arange(4000, dtype=np.float32).tofile(path)
    mapped = np.memmap(path, np.float32, "r")
    own = np.ones(3)
    kept, same = settle([mapped[5:9], own])
    assert isinstance(memory_of(kept), np.ndarray) and kept.tolist() == [5, 6, 7, 8]
    assert isinstance(memory_of(mapped), mmap.mmap) and same is own


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such advice")
def test_arrays_on_huge_pages_lie_side_by_side_and_stay() -> None:
    pages = Pages()
    sizes = (HUGE_PAGE // 4 - 5, 40_000, _KEPT_MAPPED // 4, 7, 50_000)
    arrays = [pages.empty((n,), np.dtype("float32")) for n in sizes]
    for k, a in enumerate(arrays):
        a[...] = k
    settled = settle(arrays)  # what is large is not taken for a part of a file
    assert all(a is b for a, b in zip(arrays, settled, strict=True))
    assert all((a == k).all() for k, a in enumerate(settled))
    first, second = (a.ctypes.data for a in arrays[:2])
    assert first % HUGE_PAGE == 0 and 0 <= second - first - 4 * sizes[0] < 64
    assert all(a.ctypes.data % 64 == 0 for a in arrays)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such advice")
def test_huge_pages_in_the_background_change_nothing_else() -> None:
    pages = Pages()
    arrays = [pages.empty((9_000_000,), np.dtype("float32")) for _ in range(3)]  # three blocks
    for k, a in enumerate(arrays):
        a[...] = k
    addresses = [a.ctypes.data for a in arrays]
    blocks = [weakref.ref(memory_of(a)) for a in arrays]
    before = _resident()
    thread = collapse([*arrays, np.ones(3)])
    del a, arrays[1]  # a block that is given back meanwhile
    if thread is None:
        assert not has_huge_pages()
        return
    thread.join()
    assert [a.ctypes.data for a in arrays] == addresses[::2]
    assert (arrays[0] == 0).all() and (arrays[1] == 2).all()
    assert [b() is None for b in blocks] == [False, True, False]
    assert _resident() - before < 2 * HUGE_PAGE


def test_arrays_elsewhere_stay_where_they_are(tmp_path: Path) -> None:
    np.zeros(3_000_000).tofile(tmp_path / "data")
    assert collapse([np.memmap(tmp_path / "data", np.float64, "r"), np.ones(3_000_000)]) is None


def test_a_transposed_matrix_is_copied_in_tiles() -> None:
    for shape in ((70, 200), (64, 64), (3, 500), (129, 65)):
        a = numbers(*shape)
        copied = _contiguous(a.T)
        assert copied.flags.c_contiguous
        np.testing.assert_array_equal(copied, a.T)
