"""Key/value caches: what a decoder appends is written behind what the caller's memory holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx_models import numbers

import minicompiler as mc
from minicompiler.errors import MinicompilerError, RunError
from minicompiler.frontend.builder import Builder
from minicompiler.ir.expr import Dim
from minicompiler.ir.graph import Function
from minicompiler.runtime import caches

HEADS, WIDTH = 3, 8


def decoder(batch: int = 2, new: int | Dim = 1, past: int | Dim | None = None) -> Function:
    """Attention of some new positions to those before and themselves, for one layer."""
    before = Dim("past", 0, 64) if past is None else past
    net = Builder("decoder")
    q, k, v = (net.input(n, (batch, HEADS, new, WIDTH)) for n in "qkv")
    keys = net.concat(net.input("keys", (batch, HEADS, before, WIDTH)), k, axis=2)
    values = net.concat(net.input("values", (batch, HEADS, before, WIDTH)), v, axis=2)
    scores = net.matmul(q, net.transpose(keys, perm=(0, 1, 3, 2)))
    return net.function(y=net.matmul(net.softmax(scores), values), keys=keys, values=values)


def step(batch: int = 2, new: int = 1, seed: int = 0) -> list[np.ndarray]:
    return [numbers(batch, HEADS, new, WIDTH, seed=seed + k) for k in range(3)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 2])
def test_steps_in_one_array(threads: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as with new arrays in each step; nothing but the new positions is written."""
    fn = decoder(batch, Dim("new", 1, 8))
    grown, plain = (mc.compile(fn, threads=threads, caches=c) for c in (True, False))
    room = np.full((2, batch, HEADS, 20, WIDTH), np.nan, np.float32)
    past = [np.zeros((batch, HEADS, 0, WIDTH), np.float32)] * 2
    copies = []
    first_part = caches.first_part
    monkeypatch.setattr(caches, "first_part", lambda *a: copies.append(a) or first_part(*a))
    n = 0
    for k, new in enumerate((4, 1, 1, 3, 1)):
        values = step(batch, new, 10 * k)
        out = [None, *room[:, :, :, : n + new]]
        y, keys, values_ = grown(*values, *room[:, :, :, :n], out=out)
        want = plain(*values, *past)
        assert keys is out[1] and values_ is out[2]
        for got, other in zip((y, keys, values_), want, strict=True):
            assert got.tobytes() == other.tobytes()
        past, n = list(want[1:]), n + new
        assert np.isnan(room[:, :, :, n:]).all()
    assert not copies


def test_other_arrays_work_as_well() -> None:
    fn = decoder()
    grown, plain = mc.compile(fn, caches=True), mc.compile(fn)
    past = [numbers(2, HEADS, 5, WIDTH, seed=k) for k in (7, 8)]
    want = plain(*step(), *past)
    larger = np.zeros((2, 2, HEADS, 9, WIDTH), np.float32)
    apart = [np.empty((2, HEADS, 6, WIDTH), np.float32) for _ in range(2)]
    transposed = [np.ascontiguousarray(p.swapaxes(0, 1)).swapaxes(0, 1) for p in past]
    for given, out in (
        (past, None),
        (past, [None, *apart]),
        (past, [None, *larger[:, :, :, :6]]),
        (transposed, None),
    ):
        for got, other in zip(grown(*step(), *given, out=out), want, strict=True):
            assert got.tobytes() == other.tobytes()


def test_a_saved_module_appends(tmp_path: Path) -> None:
    mc.compile(decoder(), caches=True).save(tmp_path / "decoder.mc")
    module = mc.load(tmp_path / "decoder.mc")
    room = np.zeros((2, 2, HEADS, 20, WIDTH), np.float32)
    room[:, :, :, :3] = numbers(2, 2, HEADS, 3, WIDTH)
    want = mc.compile(decoder())(*step(), *room[:, :, :, :3])
    got = module(*step(), *room[:, :, :, :3], out=[None, *room[:, :, :, :4]])
    assert all(a.tobytes() == b.tobytes() for a, b in zip(got, want, strict=True))


def test_positions_in_front() -> None:
    """Along the first axis any array may follow the past: no stride tells how large it is."""
    net = Builder("log")
    past, x = net.input("past", (Dim("past", 0, 64), 4)), net.input("x", (1, 4))
    every = net.concat(past, x, axis=0)
    module = mc.compile(
        net.function(every=every, sums=net.reduce_sum(every, axes=(0,))), caches=True
    )
    room = np.full((9, 4), np.nan, np.float32)
    for n in range(8):
        every, sums = module(room[:n], numbers(1, 4, seed=n), out=[room[: n + 1], None])
        assert np.array_equal(every[n:], numbers(1, 4, seed=n))
        np.testing.assert_allclose(sums[0] if sums.ndim > 1 else sums, every.sum(0), rtol=1e-5)
    assert np.isnan(room[8:]).all()


def test_fixed_sizes_and_wide_heads() -> None:
    """The room is a dimension of the kernels also where the model has none."""
    fn = decoder(past=6)
    grown, plain = mc.compile(fn, caches=True), mc.compile(fn)
    assert "room + 7" in str(grown.outputs[1])
    for count in (7, 8, 100):
        room = numbers(2, 2, HEADS, count, WIDTH)
        want = plain(*step(), *room[:, :, :, :6])
        got = grown(*step(), *room[:, :, :, :6], out=[None, *room[:, :, :, :7]])
        assert all(a.tobytes() == b.tobytes() for a, b in zip(got, want, strict=True))


# ---- what does not fit ---------------------------------------------------------------------------
def test_memory_that_overlaps_otherwise() -> None:
    module = mc.compile(decoder(), caches=True)
    room = np.zeros((2, 2, HEADS, 20, WIDTH), np.float32)
    past = room[:, :, :, :3]
    with pytest.raises(RunError, match='out= for output "keys" overlaps input "keys"'):
        module(*step(), *past, out=[None, room[0, :, :, 1:5], room[1, :, :, :4]])
    with pytest.raises(RunError, match='out= for output "values" overlaps out= for output "keys"'):
        module(*step(), *past, out=[None, room[0, :, :, :4], room[0, :, :, :4]])
    q, _, v = step()
    k = room[0].reshape(-1)[: q.size].reshape(q.shape)
    with pytest.raises(RunError, match='out= for output "keys" overlaps input "k"'):
        module(q, k, v, *past, out=[None, *room[:, :, :, :4]])


def test_strides_that_tell_no_room() -> None:
    module = mc.compile(decoder(), caches=True)
    room = np.zeros((2, 2, HEADS, 20, WIDTH), np.float32)
    past = [numbers(2, HEADS, 3, WIDTH, seed=k) for k in (7, 8)]
    every_second = np.zeros((2, HEADS, 4, 2 * WIDTH), np.float32)[..., ::2]
    turned = np.zeros((HEADS, 2, 4, WIDTH), np.float32).swapaxes(0, 1)
    for wrong in (every_second, turned, room[0, :, :, 3::-1], room[0, :, :, 0:8:2]):
        with pytest.raises(RunError, match="is not the first part, along axis 2, of a C-contig"):
            module(*step(), *past, out=[None, wrong, room[1, :, :, :4]])
    other = np.zeros((2, HEADS, 30, WIDTH), np.float32)
    with pytest.raises(RunError, match=r'"keys" has room for 16 more positions, .*"values" for 26'):
        module(*step(), *past, out=[None, room[0, :, :, :4], other[:, :, :4]])
    with pytest.raises(RunError, match="has shape"):
        module(*step(), *past, out=[None, *room[:, :, :, :5]])
    room.flags.writeable = False
    with pytest.raises(RunError, match="read-only"):
        module(*step(), *past, out=[None, *room[:, :, :, :4]])


def test_models_without_caches() -> None:
    net = Builder("plain")
    x = net.input("x", (2, 3))
    with pytest.raises(MinicompilerError, match="no output is the concatenation"):
        mc.compile(net.function(y=net.exp(x)), caches=True)
    with pytest.raises(MinicompilerError, match="cannot be checked"):
        mc.compile(decoder(), caches=True, checked=True)


def test_an_input_that_others_read_is_copied() -> None:
    """It might be read after it was overwritten."""
    net = Builder("read")
    past, x = net.input("past", (2, 3, 4)), net.input("x", (2, 1, 4))
    fn = net.function(every=net.concat(past, x, axis=1), twice=net.add(past, past))
    with pytest.raises(MinicompilerError, match="no output is the concatenation"):
        mc.compile(fn, caches=True)
