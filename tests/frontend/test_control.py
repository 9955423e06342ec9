"""If, Loop and Scan that data decides: compiled = numpy meaning of the graph = onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from onnx_models import NUMBER, graph, model, node, numbers
from tolerance import assert_close

import minicompiler as mc
from minicompiler.errors import ImportModelError, ShapeError
from minicompiler.frontend.onnx import load
from minicompiler.ops.evaluate import run_reference
from minicompiler.runtime.module import load as load_module

Array = np.ndarray


def check(m: onnx.ModelProto, *calls: Mapping[str, Array]) -> mc.Module:
    """Compiles once, and compares all calls with onnxruntime and the graph's numpy meaning."""
    session = ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"])
    fn = load(m)
    modules = [mc.compile(m, threads=t, checked=t == 1) for t in (1, 2)]
    for feeds in calls:
        want = session.run(None, dict(feeds))
        for got in (run_reference(fn, feeds), *[x.run(feeds).values() for x in modules]):
            for a, b in zip(got, want, strict=True):
                assert a.shape == b.shape and a.dtype == b.dtype
                assert_close(a, b, 64)
    return modules[0]


def collatz() -> onnx.ModelProto:
    """Steps until 1 is reached: the condition and the number of rows depend on data."""
    body = graph(
        "k:i go:b n:i",
        [
            node("Mod", "n two", "odd"), node("Equal", "odd one", "is_odd"),
            node("Div", "n two", "half"), node("Mul", "n three", "t"), node("Add", "t one", "up"),
            node("Where", "is_odd up half", "next"), node("Greater", "next one", "more"),
            node("Identity", "next", "row"),
        ],
        "more:b next:i row:i",
        {"one": 1, "two": 2, "three": 3},
    )  # fmt: skip
    loop = node("Loop", "most - n", "last rows", body=body)
    return model([loop], {"n": NUMBER}, ["last", "rows"], {"most": np.array(200)})


def test_a_condition_that_depends_on_data() -> None:
    check(collatz(), *[{"n": np.array(n)} for n in (6, 1, 27, 2)])


def summing(initial: bool = True) -> onnx.ModelProto:
    """The trip count is an input; w is read from around the loop."""
    body = graph(
        "k:i go:b s:f3",
        [
            node("Cast", "k", "f", to=TensorProto.FLOAT), node("Mul", "w f", "p"),
            node("Add", "s p", "t"), node("Identity", "go", "on"), node("Relu", "t", "row"),
        ],
        "on:b t:f3 row:f3",
    )  # fmt: skip
    nodes = [node("Neg", "x", "w"), node("Loop", f"n {'go' if initial else '-'} x", "y rows",
                                         body=body)]  # fmt: skip
    inputs = {"n": NUMBER, "x": numbers(3), **({"go": np.array(True)} if initial else {})}
    return model(nodes, inputs, ["y", "rows"])


def test_a_trip_count_that_is_an_input() -> None:
    x = numbers(3)
    check(summing(False), *[{"n": np.array(n), "x": x} for n in (3, 0, 1, 700)])


def test_zero_trips_by_the_first_condition() -> None:
    x = numbers(3)
    cases = [(4, True), (4, False), (0, True), (-2, True)]
    check(summing(), *[{"n": np.array(n), "x": x, "go": np.array(g)} for n, g in cases])


def test_a_trip_count_that_is_computed() -> None:
    """Without rows nothing needs a limit."""
    body = graph(
        "k:i go:b s:f", [node("Mul", "s s", "t"), node("Identity", "go", "on")], "on:b t:f"
    )
    nodes = [node("ReduceSum", "v", "n", keepdims=0), node("Loop", "n - x", "y", body=body)]
    m = model(nodes, {"v": np.array([1, 2]), "x": np.array(0, "f")}, ["y"])
    check(m, *[{"v": np.array(v), "x": np.array(1.1, "f")} for v in ([1, 2], [0, 0], [2, -1])])


def test_states_that_change_places() -> None:
    body = graph(
        "k:i go:b a:f2 b:f2 c:f2",
        [node("Add", "a b", "d"), node("Identity", "go", "on")],
        "on:b b:f2 d:f2 b:f2",
    )
    m = model(
        [node("Loop", "n - x y z", "p q r", body=body)],
        {"n": NUMBER, "x": numbers(2), "y": numbers(2), "z": numbers(2)},
        ["p", "q", "r"],
    )
    x, y, z = numbers(2), numbers(2) + 1, numbers(2) + 2
    check(m, *[{"n": np.array(n), "x": x, "y": y, "z": z.astype(np.float32)} for n in (0, 1, 5)])


@pytest.mark.parametrize("axis", [0, 1])
def test_a_state_that_grows(axis: int) -> None:
    """A sequence that is extended in each iteration, as in decoding with a cache."""
    body = graph(
        "k:i go:b s:f?,?",
        [
            node("ReduceSum", "s axis", "t"), node("Concat", "s t", "u", axis=axis),
            node("Identity", "go", "on"),
        ],
        "on:b u:f?,?",
        {"axis": np.array([axis])},
    )  # fmt: skip
    m = model([node("Loop", "n - x", "y", body=body)], {"n": NUMBER, "x": numbers(2, 3)}, ["y"])
    check(m, *[{"n": np.array(n), "x": numbers(2, 3)} for n in (0, 1, 4)])


def test_a_state_that_grows_until_a_condition_holds() -> None:
    body = graph(
        "k:i go:b s:f?",
        [
            node("ReduceSum", "s", "t"), node("Mul", "t half", "u"),
            node("Concat", "s u", "v", axis=0),
            node("ReduceSum", "v", "sum", keepdims=0), node("Less", "sum limit", "on"),
        ],
        "on:b v:f?",
        {"half": np.float32(0.5)},
    )  # fmt: skip
    nodes = [node("Loop", "most - x", "y", body=body)]
    feeds = {"x": np.ones(2, np.float32), "limit": np.array(9, "f")}
    m = model(nodes, feeds, ["y"], {"most": np.array(40)})
    check(m, feeds, {**feeds, "limit": np.array(900, "f")}, {**feeds, "limit": np.array(0, "f")})


def branches(shape: tuple[int, ...], *, other: str = "Sqrt") -> onnx.ModelProto:
    then = graph("", [node("Neg", "x", "a"), node("Mul", "a w", "t")], "t")
    els = graph("", [node(other, "x", "e")], "e")
    nodes = [
        node("ReduceMax", "x", "m", keepdims=0), node("Greater", "m zero", "c"),
        node("If", "c", "y", then_branch=then, else_branch=els), node("Add", "y x", "z"),
    ]  # fmt: skip
    known = {"zero": np.float32(0), "w": numbers(*shape)}
    return model(nodes, {"x": numbers(*shape)}, ["y", "z"], known)


def test_one_of_two_branches() -> None:
    x = numbers(3, 4)
    check(branches((3, 4), other="Exp"), {"x": x}, {"x": -np.abs(x) - 1})


def test_branches_of_different_sizes() -> None:
    then = graph("", [node("Concat", "x x", "t", axis=1)], "t:f?,?")
    els = graph("", [node("Slice", "x one two", "e")], "e:f?,?", {"one": [1], "two": [2]})
    m = model(
        [node("If", "c", "y", then_branch=then, else_branch=els), node("Relu", "y", "z")],
        {"x": numbers(3, 4), "c": np.array(True)},
        ["z"],
    )
    check(m, *[{"x": numbers(3, 4), "c": np.array(c)} for c in (True, False)])


def test_a_size_that_is_counted_in_a_branch() -> None:
    """Outside of the branch nobody knows it: not in what follows, nor where memory is reserved."""
    then = graph(
        "",
        [
            node("Greater", "x zero", "c"), node("Compress", "x c", "a", axis=0),
            node("Less", "a one", "d"), node("Compress", "a d", "t", axis=0),
        ],
        "t:f?",
    )  # fmt: skip
    els = graph("", [node("Slice", "x from to", "e")], "e:f?", {"from": [0], "to": [2]})
    nodes = [
        node("If", "go", "y", then_branch=then, else_branch=els),
        node("Slice", "y start end", "z"), node("Add", "z z", "w"),
    ]  # fmt: skip
    x = np.float32([0.5, -1, 2, 0.25, 0.75, 3])
    known = {"zero": np.float32(0), "one": np.float32(1), "start": np.array([0]), "end": [2]}
    known = {k: np.asarray(v) for k, v in known.items()}
    m = model(nodes, {"go": np.array(True), "x": x}, ["y", "w"], known)
    check(m, *[{"go": np.array(go), "x": v} for go in (True, False) for v in (x, -x, x * 9)])


def test_an_input_cannot_limit_a_loop_in_a_branch() -> None:
    body = graph(
        "k:i go:b s:f2", [node("Add", "s s", "t"), node("Identity", "go", "on")], "on:b t:f2"
    )
    then = graph("", [node("Loop", "n - x", "a", body=body)], "a:f2")
    els = graph("", [node("Neg", "x", "e")], "e:f2")
    nodes = [node("If", "c", "y", then_branch=then, else_branch=els)]
    m = model(nodes, {"n": NUMBER, "c": np.array(True), "x": numbers(2)}, ["y"])
    with pytest.raises(ShapeError, match=r"n\.value is computed from data, and nothing limits it"):
        mc.compile(m, threads=1)


def test_a_condition_inside_a_loop_inside_a_loop() -> None:
    then = graph("", [node("Add", "s x", "a")], "a:f2")
    els = graph("", [node("Mul", "s w", "b")], "b:f2")
    inner = graph(
        "k:i go:b s:f2",
        [
            node("ReduceSum", "s", "m", keepdims=0), node("Less", "m zero", "c"),
            node("If", "c", "t", then_branch=then, else_branch=els), node("Identity", "go", "on"),
        ],
        "on:b t:f2",
    )  # fmt: skip
    outer = graph(
        "i:i go2:b v:f2",
        [
            node("Add", "i one", "n1"), node("Loop", "n1 - v", "u", body=inner),
            node("Abs", "u", "row"), node("Identity", "go2", "on2"),
        ],
        "on2:b u:f2 row:f2",
        {"one": 1},
    )  # fmt: skip
    m = model(
        [node("Loop", "n - x", "y rows", body=outer)],
        {"n": NUMBER, "x": numbers(2)},
        ["y", "rows"],
        {"zero": np.float32(0), "w": np.float32([-0.5, 0.7])},
    )
    check(m, *[{"n": np.array(n), "x": numbers(2) - np.float32(0.3)} for n in (0, 1, 5)])


def test_a_count_inside_a_loop() -> None:
    """NonZero in each iteration: a size that is counted anew each time."""
    body = graph(
        "k:i go:b s:f4",
        [
            node("Cast", "k", "f", to=TensorProto.FLOAT), node("Greater", "s f", "c"),
            node("Compress", "s c", "p", axis=0), node("ReduceSum", "p", "r", keepdims=0),
            node("Add", "s step", "t"), node("Identity", "go", "on"),
        ],
        "on:b t:f4 r:f",
        {"step": np.float32([0.1, 0.6, 1.2, 2.0])},
    )  # fmt: skip
    m = model([node("Loop", "n - x", "y rows", body=body)], {"n": NUMBER, "x": numbers(4)},
              ["y", "rows"])  # fmt: skip
    check(m, *[{"n": np.array(n), "x": np.float32([1, 0, -1, 2])} for n in (1, 6, 0)])


def test_a_long_scan() -> None:
    """Over more elements than are repeated, forward and backward."""
    body = graph(
        "s:f3 x:f3", [node("Add", "s x", "t"), node("Tanh", "t", "u"), node("Neg", "u", "r")],
        "u:f3 r:f3",
    )  # fmt: skip
    scan = node(
        "Scan", "z x", "y rows", body=body, num_scan_inputs=1, scan_input_directions=[1],
        scan_output_directions=[1], scan_output_axes=[1],
    )  # fmt: skip
    m = model([scan], {"z": numbers(3), "x": numbers(700, 3)}, ["y", "rows"])
    check(m, {"z": numbers(3), "x": numbers(700, 3)})


def test_a_scan_over_a_symbolic_dimension() -> None:
    body = graph("s:f3 x:f3", [node("Max", "s x", "t"), node("Neg", "t", "r")], "t:f3 r:f3")
    m = model(
        [node("Scan", "z x", "y rows", body=body, num_scan_inputs=1)],
        {"z": numbers(3), "x": numbers(5, 3)},
        ["y", "rows"],
        shapes={"x": ("n", 3)},
    )
    check(m, *[{"z": numbers(3), "x": numbers(n, 3)} for n in (5, 1, 9)])


def test_a_trip_count_that_is_a_size() -> None:
    """A loop from 1 to the length of a sequence, one state of which grows by a row each time."""
    body = graph(
        "k:i go:b s:f3 all:f?,3",
        [
            node("Add", "k one", "at"), node("Gather", "x at", "row", axis=0),
            node("Max", "s row", "t"), node("Unsqueeze", "t zero", "u"),
            node("Concat", "all u", "more", axis=0), node("Identity", "go", "on"),
        ],
        "on:b t:f3 more:f?,3 row:f3",
        {"one": 1, "zero": np.array([0])},
    )  # fmt: skip
    nodes = [
        node("Shape", "x", "shape", end=1), node("Squeeze", "shape", "n"),
        node("Sub", "n first", "trips"), node("Loop", "trips - z empty", "y all rows", body=body),
    ]  # fmt: skip
    constants = {"first": np.array(1), "empty": np.zeros((0, 3), np.float32)}
    m = model(nodes, {"z": numbers(3), "x": numbers(5, 3)}, ["y", "all", "rows"], constants,
              shapes={"x": ("n", 3)})  # fmt: skip
    made = check(m, *[{"z": numbers(3), "x": numbers(n, 3, seed=n)} for n in (5, 2, 9)])
    assert made.outputs[2].shape == (("sub", "n", 1), 3)


@pytest.mark.parametrize("backward", [0, 1])
@pytest.mark.parametrize("lengths", [None, [4, 1, 2]])
@pytest.mark.parametrize("shape", [(3, 4, 2), (3, "steps", 2), ("batch", "steps", 2)])
def test_scans_of_opset_8(shape: Any, lengths: list[int] | None, backward: int) -> None:
    """Each element of a batch has states, elements and possibly a length of its own."""
    body = graph("s:f2 x:f2", [node("Add", "s x", "t"), node("Mul", "t x", "r")], "t:f2 r:f2")
    scan = node("Scan", f"{'lengths' if lengths else '-'} z x", "y rows", body=body,
                num_scan_inputs=1, directions=[backward])  # fmt: skip
    feeds = {"z": numbers(3, 2), "x": numbers(3, 4, 2, seed=1)}
    if lengths:
        feeds["lengths"] = np.array(lengths)
    shapes = {"x": shape, "z": (shape[0], 2), "lengths": shape[:1]}
    m = model([scan], feeds, ["y", "rows"], opset=8, shapes=shapes)
    if all(isinstance(s, int) for s in shape):
        check(m, feeds)
    else:
        longer = {k: np.repeat(v, 2, axis=1) if k == "x" else v for k, v in feeds.items()}
        check(m, feeds, longer)


def test_a_long_scan_of_opset_8() -> None:
    """Too many iterations in all to be repeated, though few for each element."""
    body = graph("s:f2 x:f2", [node("Max", "s x", "t"), node("Neg", "t", "r")], "t:f2 r:f2")
    scan = node("Scan", "- z x", "y rows", body=body, num_scan_inputs=1)
    feeds = {"z": numbers(30, 2), "x": numbers(30, 40, 2)}
    check(model([scan], feeds, ["y", "rows"], opset=8), feeds)


def test_a_saved_module_keeps_its_control_flow(tmp_path: Any) -> None:
    m = mc.compile(collatz())
    m.save(tmp_path / "m.mc")
    loaded = load_module(tmp_path / "m.mc")
    for n in (27, 1):
        for a, b in zip(loaded(np.array(n)), m(np.array(n)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_what_nothing_limits_is_refused() -> None:
    body = graph("k:i go:b s:f", [node("Identity", "go", "on"), node("Relu", "s", "t")],
                 "on:b s:f t:f")  # fmt: skip
    nodes = [node("ReduceSum", "v", "n", keepdims=0), node("Loop", "n - x", "y rows", body=body)]
    m = model(nodes, {"v": np.array([1, 2]), "x": np.array(0, "f")}, ["y", "rows"])
    with pytest.raises(ImportModelError, match=r"(?s)nothing limits the number of rows.*trip"):
        load(m)
    double = graph("k:i go:b s:f?",
                   [node("Identity", "go", "on"), node("Concat", "s s", "t", axis=0)],
                   "on:b t:f?")  # fmt: skip
    nodes = [node("Loop", "n - x", "y", body=double)]
    with pytest.raises(ImportModelError, match="not by the same number"):
        load(model(nodes, {"n": NUMBER, "x": numbers(2)}, ["y"]))


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_random_bodies(data: st.DataObject) -> None:
    """Loops of random elementwise bodies over two states, run as often as an input says."""
    ops = st.sampled_from(["Add", "Sub", "Max", "Min"])
    names, nodes = ["a", "b", "w"], []
    for k in range(data.draw(st.integers(1, 5))):
        read = [data.draw(st.sampled_from(names)) for _ in range(2)]
        nodes.append(node(data.draw(ops), " ".join(read), f"v{k}"))
        names.append(f"v{k}")
    outs = [data.draw(st.sampled_from(names)) for _ in range(3)]
    nodes += [node("Identity", o, f"o{k}") for k, o in enumerate(outs)]
    body = graph("k:i go:b a:f3 b:f3", [*nodes, node("Identity", "go", "on")],
                 "on:b o0:f3 o1:f3 o2:f3")  # fmt: skip
    m = model([node("Loop", "n - x y", "p q rows", body=body)],
              {"n": NUMBER, "x": numbers(3), "y": numbers(3)}, ["p", "q", "rows"],
              {"w": numbers(3)})  # fmt: skip
    feeds = {"x": numbers(3), "y": numbers(3) * 2}
    check(m, *[{"n": np.array(n), **feeds} for n in (0, 3)])
