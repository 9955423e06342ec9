"""Blocks of channels: which values get them, where copies stand, and that the results stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import GraphProto, ModelProto
from onnx_models import graph, model, node, numbers, reference_of
from tolerance import assert_close

import minicompiler as mc
from minicompiler.context import Context, Options
from minicompiler.frontend.builder import Builder
from minicompiler.ir.graph import Apply, Function, applies, layout_of
from minicompiler.ir.layout import IndexMap
from minicompiler.ops import conv, elementwise
from minicompiler.ops.evaluate import run_reference
from minicompiler.passes.layout import convert_layout
from minicompiler.target import Target

RNG = np.random.default_rng(0)


def weight(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, np.float32) / np.float32(np.prod(shape[1:]) ** 0.5)


def head() -> Function:
    """Tokens become images of two sizes, which are joined and convolved."""
    net = Builder("head")
    small, large = net.input("a", (1, 16, 32)), net.input("b", (1, 64, 32))
    images = [
        net.reshape(net.transpose(x, perm=(0, 2, 1)), shape=(1, 32, n, n))
        for x, n in ((small, 4), (large, 8))
    ]
    grown = net.resize(images[0], sizes=(1, 32, 8, 8), mode="linear")
    joined = net.concat(grown, images[1], axis=1)
    return net.function(y=net.relu(net.conv(joined, weight(32, 64, 1, 1))))


def pieces() -> Function:
    """Halves of the channels, one of them with a border of copies."""
    net = Builder("pieces")
    x = net.relu(net.conv(net.input("x", (2, 3, 12, 12)), weight(32, 3, 3, 3)))
    left, right = net.split(x, axis=1, sizes=(16, 16))
    wide = net.pad(left, begin=(0, 0, 1, 1), end=(0, 0, 1, 1), mode="edge")
    return net.function(
        a=net.conv(wide, weight(16, 16, 3, 3)), b=net.conv(right, weight(8, 16, 1, 1))
    )


def lines() -> Function:
    net = Builder("lines")
    x = net.conv(net.input("x", (2, 16, 50)), weight(32, 16, 5), strides=(2,))
    return net.function(y=net.conv(net.gelu(x), weight(16, 32, 3), pads_begin=(1,), pads_end=(1,)))


def volumes() -> Function:
    net = Builder("volumes")
    x = net.relu(net.conv(net.input("x", (1, 8, 6, 6, 6)), weight(16, 8, 3, 3, 3)))
    x = net.max_pool(x, kernel=(2, 2, 2), strides=(2, 2, 2))
    return net.function(
        y=net.reduce_mean(net.conv(x, weight(16, 16, 1, 1, 1)), axes=(2, 3, 4), keepdims=False)
    )


NETWORKS = {f.__name__: f() for f in (head, pieces, lines, volumes)}


def convolutions(fn: Function) -> list[Apply]:
    return [v for v in applies(convert_layout(fn, None)) if v.op is conv.conv]


@pytest.mark.parametrize("name", NETWORKS)
def test_results(name: str) -> None:
    fn = NETWORKS[name]
    xs = [
        RNG.standard_normal([n.value for n in p.type.shape]).astype(np.float32)  # type: ignore[attr-defined]
        for p in fn.params
    ]
    one, two = (mc.compile(fn, threads=n)(*xs) for n in (1, 2))
    for a, b, want in zip(one, two, run_reference(fn, xs), strict=True):
        assert a.tobytes() == b.tobytes()
        assert_close(a, want, 1000)


@pytest.mark.parametrize("name", NETWORKS)
def test_convolutions_read_blocks(name: str) -> None:
    for v in convolutions(NETWORKS[name]):
        x = v.args[0]
        assert x is not None
        few = x.type.shape[1].value < 8  # type: ignore[union-attr]
        assert few == (layout_of(x) is None)


def test_ends_are_copied_once() -> None:
    net = Builder("ends")
    x = net.input("x", (1, 16, 8, 8))
    fn = net.function(a=net.conv(x, weight(16, 16, 1, 1)), b=net.conv(x, weight(32, 16, 3, 3)))
    laid = convert_layout(fn, None)
    copies = [v for v in applies(laid) if v.op is elementwise.identity]
    assert [v.layouts[0] for v in copies].count(IndexMap.blocked(4, 1, 16)) == 1  # of x
    assert [layout_of(r) for r in laid.results] == [None, None]
    again = convert_layout(laid, None)
    assert len(list(applies(again))) == len(list(applies(laid)))


def test_products_between_rows_need_no_blocks() -> None:
    def layouts(size: int, taps: int) -> list[IndexMap | None]:
        net = Builder("alone")
        x = net.add(net.input("x", (1, 16, size, size)), np.float32(1))
        y = net.conv(net.relu(net.conv(x, weight(32, 16, 1, 1))), weight(16, 32, taps, taps))
        return [v.layouts[0] for v in convolutions(net.function(y=y))]

    blocked = IndexMap.blocked(4, 1, 16)
    assert layouts(8, 1) == [None, None]
    assert layouts(8, 3) == [blocked, blocked]  # a window reads what the first one makes
    assert layouts(7, 1) == [blocked, blocked]  # 49 pixels leave a quarter of 4 vectors empty


def test_what_becomes_row_major_is_a_kernel_of_its_own() -> None:
    net = Builder("last")
    y = net.relu(net.conv(net.input("x", (1, 16, 8, 8)), weight(16, 16, 3, 3)))
    module = mc.compile(net.function(y=y))
    assert {"fused_conv", "fused_relu"} <= {s.subject for s in module.stages}


def test_workspace_and_sums_follow_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINICOMPILER_CACHE", str(tmp_path))
    net = Builder("grown")
    tokens = net.transpose(net.input("x", (1, 64, 32)), perm=(0, 2, 1))
    image = net.reshape(tokens, shape=(1, 32, 8, 8))
    large = net.resize(image, sizes=(1, 32, 32, 32), mode="linear")
    y = net.reduce_mean(net.conv(large, weight(16, 32, 1, 1)), axes=(2, 3), keepdims=False)
    stages = mc.compile(net.function(y=y), target="cpu:avx2").stages
    texts = {s.subject: s.text for s in stages if s.name == "schedule"}
    (resized,) = [t for n, t in texts.items() if n.endswith("resize")]
    (workspace,) = [x for x in resized.splitlines() if x.strip().startswith("resize: float32")]
    assert workspace.endswith("(d0, d1//16, d2, d3, d1%16)")
    assert "sum_rf" not in texts["fused_reduce_mean"]  # sums of 16 channels side by side


# ---- control flow -------------------------------------------------------------------------------
IMAGE = "f?,?,?,?"
WEIGHTS = {"w": weight(16, 3, 3, 3), "u": weight(8, 16, 3, 3)}
POOL = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}


def branches() -> ModelProto:
    """A convolution that both branches read, and one that reads what they make."""

    def branch(*ops: str) -> GraphProto:
        nodes = [node(op, "v", f"{op}_v", **(POOL if op == "MaxPool" else {})) for op in ops]
        return graph("", nodes, " ".join(f"{op}_v:{IMAGE}" for op in ops))

    ways = {"then_branch": branch("Neg", "Relu"), "else_branch": branch("Relu", "MaxPool")}
    nodes = [node("Conv", "x w", "v", pads=[1, 1, 1, 1]), node("If", "c", "p q", **ways),
             node("Conv", "p u", "y"), node("Conv", "q u", "z")]  # fmt: skip
    inputs = {"x": numbers(1, 3, 9, 9), "c": np.array(True)}
    return model(nodes, inputs, ["y", "z"], WEIGHTS)


def iterations() -> ModelProto:
    """A convolution that a loop begins with and reads in each iteration."""
    step = [node("Identity", "go", "on"), node("Sigmoid", "s", "r"), node("Add", "r v", "t")]
    body = graph(f"k:i go:b s:{IMAGE}", step, f"on:b t:{IMAGE}")
    nodes = [node("Conv", "x w", "v", pads=[1, 1, 1, 1]), node("Loop", "c - v", "p", body=body),
             node("Conv", "p u", "y")]  # fmt: skip
    return model(nodes, {"x": numbers(1, 3, 9, 9), "c": np.array(3)}, ["y"], WEIGHTS)


@pytest.mark.parametrize(
    ("make", "decides"), [(branches, True), (branches, False), (iterations, 3)]
)
def test_control_flow_reads_rows(make: Callable[[], ModelProto], decides: bool | int) -> None:
    feeds = {"x": numbers(1, 3, 9, 9), "c": np.array(decides)}
    found = mc.compile(make()).run(feeds)
    for got, want in zip(found.values(), reference_of(make(), feeds), strict=True):
        assert_close(got, want, 27 * 144)


@pytest.mark.parametrize(("group", "block"), [(24, 24), (40, 40), (48, 16), (56, 16), (8, 16)])
def test_blocks_make_up_groups(group: int, block: int) -> None:
    """What a convolution with groups reads and makes lies in blocks that belong to one group, where
    there are such ones of several vectors."""
    net = Builder("groups")
    channels = 16 * group
    x = net.relu(net.conv(net.input("x", (1, 3, 12, 12)), weight(channels, 3, 3, 3)))
    y = net.conv(x, weight(channels, group, 3, 3), strides=(2, 2), groups=16)
    fn = net.function(y=net.conv(net.relu(y), weight(8, channels, 1, 1)))
    made = convert_layout(fn, Context(Target.parse("cpu:avx2"), Options()))
    _, grouped, last = [v for v in applies(made) if v.op is conv.conv]
    want = IndexMap.blocked(4, 1, block)
    assert [layout_of(v) for v in (grouped, grouped.args[0], last.args[0]) if v] == 3 * [want]
