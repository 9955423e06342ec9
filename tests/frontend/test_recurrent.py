"""LSTM, GRU and RNN nodes: all attributes, against onnxruntime and onnx's reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from minicompiler.driver import compile
from minicompiler.errors import ImportModelError, RunError

Array = np.ndarray
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
STEPS, BATCH, INPUTS, HIDDEN = 5, 3, 4, 10


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINICOMPILER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def model_of(
    op: str,
    extra: tuple[str, ...] = (),
    batch: int | str = BATCH,
    hidden: int = HIDDEN,
    steps: int | str = STEPS,
    **attrs: Any,
) -> onnx.ModelProto:
    """A model of one node. extra: optional inputs that it has: B, lengths, h0, c0, P."""
    rng = np.random.default_rng(0)
    directions = 2 if attrs.get("direction") == "bidirectional" else 1
    gates, swapped = GATES[op], attrs.get("layout", 0)
    state = (batch, directions, hidden) if swapped else (directions, batch, hidden)
    shapes = {
        "W": (directions, gates * hidden, INPUTS),
        "R": (directions, gates * hidden, hidden),
        "B": (directions, 2 * gates * hidden),
        "P": (directions, 3 * hidden),
    }
    scale = (HIDDEN / hidden) ** 0.5  # so that rounding errors do not grow from step to step
    order = ["X", "W", "R", "B", "lengths", "h0", "c0", "P"][: 8 if op == "LSTM" else 6]
    names = [n if n in ("X", "W", "R", *extra) else "" for n in order]
    weights = [
        numpy_helper.from_array((rng.uniform(-1, 1, shapes[n]) * scale).astype(np.float32), n)
        for n in names
        if n in shapes
    ]
    x = (batch, steps, INPUTS) if swapped else (steps, batch, INPUTS)
    inputs = [helper.make_tensor_value_info("X", TensorProto.FLOAT, x)]
    for n in names:
        if n in ("h0", "c0"):
            inputs.append(helper.make_tensor_value_info(n, TensorProto.FLOAT, state))
        elif n == "lengths":
            inputs.append(helper.make_tensor_value_info(n, TensorProto.INT32, (batch,)))
    results = ["Y", "Y_h", "Y_c"][: 3 if op == "LSTM" else 2]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in results]
    node = helper.make_node(op, names, results, hidden_size=hidden, **attrs)
    graph = helper.make_graph([node], op, inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)


def feeds_of(model: onnx.ModelProto, steps: int = STEPS, batch: int = BATCH) -> dict[str, Array]:
    """Inputs; steps and batch are for the dimensions of these names."""
    rng = np.random.default_rng(1)
    sizes = {"steps": steps, "batch": batch}
    feeds = {}
    for v in model.graph.input:
        dims = v.type.tensor_type.shape.dim
        shape = [d.dim_value or sizes[d.dim_param] for d in dims]
        if v.name == "lengths":
            feeds[v.name] = rng.integers(1, steps + 1, shape).astype(np.int32)
        else:
            feeds[v.name] = rng.uniform(-1, 1, shape).astype(np.float32)
    return feeds


def close(got: Any, want: Any) -> None:
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-6)


def check(model: onnx.ModelProto, threads: int = 1, sizes: Any = ((STEPS, BATCH),)) -> None:
    """Agrees with onnxruntime, for all of some (steps, batch)."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    module = compile(model, threads=threads, record=False, checked=True)
    for steps, batch in sizes:
        feeds = feeds_of(model, steps, batch)
        close(module(*feeds.values()), session.run(None, feeds))


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("op", GATES)
def test_directions_and_lengths(op: str, direction: str) -> None:
    check(model_of(op, direction=direction))
    check(model_of(op, ("B", "lengths", "h0", "c0", "P"), direction=direction))


@pytest.mark.parametrize("op", GATES)
def test_every_input_may_have_its_own_name_for_the_batch(op: str) -> None:
    named = model_of(op, ("lengths", "h0", "c0"), batch="batch", steps="steps")
    for k, v in enumerate(named.graph.input):
        for d in v.type.tensor_type.shape.dim:
            d.dim_param += str(k) if d.dim_param == "batch" else ""
    module = compile(named, record=False, checked=True)
    plain = model_of(op, ("lengths", "h0", "c0"))
    session = ort.InferenceSession(plain.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = feeds_of(plain)
    close(module(*feeds.values()), session.run(None, feeds))
    with pytest.raises(RunError, match=r"batch[12] = batch0"):
        module(*feeds_of(model_of(op, batch=2)).values(), *list(feeds.values())[1:])


@pytest.mark.parametrize("op", GATES)
def test_clip(op: str) -> None:
    check(model_of(op, ("B", "h0", "c0", "P"), clip=0.3))


def test_coupled_gates() -> None:
    check(model_of("LSTM", ("B", "c0"), input_forget=1))


@pytest.mark.parametrize("extra", [("B", "h0"), ("B", "lengths"), ()], ids=str)
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_reset_after_the_product(direction: str, extra: tuple[str, ...]) -> None:
    check(model_of("GRU", extra, linear_before_reset=1, direction=direction))


FUNCTIONS = ["Relu", "Tanh", "Sigmoid", "Softsign", "Softplus", "Affine", "LeakyRelu",
             "ThresholdedRelu", "ScaledTanh", "HardSigmoid", "Elu"]  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
def test_activations(function: str) -> None:
    constants = {"activation_alpha": [0.7], "activation_beta": [0.4]}
    check(model_of("RNN", ("B",), activations=[function], **constants))


def test_each_function_takes_the_constants_it_has() -> None:
    names = ["HardSigmoid", "Tanh", "LeakyRelu", "Sigmoid", "Affine", "HardSigmoid"]
    constants = {"activation_alpha": [0.3, 0.2, 0.9, 0.25], "activation_beta": [0.45, 0.1, 0.6]}
    check(model_of("LSTM", ("B",), direction="bidirectional", activations=names, **constants))


@pytest.mark.parametrize("op", GATES)
def test_batch_first(op: str) -> None:
    model = model_of(op, ("B", "h0", "c0"), layout=1)
    feeds = feeds_of(model)
    got = compile(model, threads=1, record=False)(*feeds.values())
    close(got, ReferenceEvaluator(model).run(None, feeds))


def test_batch_first_in_both_directions() -> None:
    plain = model_of("LSTM", ("B", "h0", "c0"), direction="bidirectional")
    swapped = model_of("LSTM", ("B", "h0", "c0"), direction="bidirectional", layout=1)
    feeds = feeds_of(plain)
    want = compile(plain, threads=1)(*feeds.values())
    got = compile(swapped, threads=1)(*(f.swapaxes(0, 1).copy() for f in feeds.values()))
    np.testing.assert_allclose(got[0], want[0].transpose(2, 0, 1, 3), rtol=1e-6)
    for g, w in zip(got[1:], want[1:], strict=True):
        np.testing.assert_allclose(g, w.swapaxes(0, 1), rtol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("op", GATES)
def test_any_number_of_steps_and_rows(op: str, direction: str) -> None:
    sizes = [(1, 1), (7, 3), (4, 9)]
    some = model_of(op, ("B",), steps="steps", batch="batch", direction=direction)
    check(some, sizes=sizes)
    every = ("B", "h0", "lengths")
    check(model_of(op, every, "batch", 20, "steps", direction=direction), sizes=sizes)


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("op", GATES)
def test_tiles_of_rows(op: str, batch: int) -> None:
    check(model_of(op, ("B", "h0"), batch, 37))


@pytest.mark.parametrize(
    ("op", "attrs"),
    [("LSTM", {}), ("GRU", {}), ("GRU", {"linear_before_reset": 1}), ("RNN", {})],
    ids=str,
)
def test_threads_share_each_step(op: str, attrs: dict[str, Any]) -> None:
    """Large enough to be shared; the same bits whatever the number of threads. Three blocks of 40
    units would be unequal shares, so the rows of a batch are shared out as well."""
    check_threads(model_of(op, ("B", "h0"), batch=3, hidden=250, **attrs))
    check_threads(model_of(op, ("B", "h0"), batch=24, hidden=40, **attrs))


def check_threads(model: onnx.ModelProto) -> None:
    feeds = list(feeds_of(model).values())
    one, *others = (compile(model, threads=t, record=False)(*feeds) for t in (1, 2, 3))
    for other in others:
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
    check(model, threads=2)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["Gelu", "Tanh"], "activation 'gelu' is not supported"),
        (["Tanh"] * 3, "takes 2 activations"),
    ],
)
def test_refusals(names: list[str], message: str) -> None:
    with pytest.raises(ImportModelError, match=message):
        compile(model_of("GRU", activations=names))


def test_lengths_that_are_all_steps_cost_nothing() -> None:
    model = model_of("LSTM", ("B",))
    full = numpy_helper.from_array(np.full(BATCH, STEPS, np.int32), "lengths")
    model.graph.initializer.append(full)
    model.graph.node[0].input[4] = "lengths"
    stages = compile(model, threads=1).stages
    assert not any("int32" in s.text for s in stages if s.name == "to_tir")
    check(model)


@pytest.mark.parametrize("op", GATES)
def test_weights_of_symbolic_sizes(op: str) -> None:
    """The attribute hidden_size says what the shapes of the weights leave open."""
    rng = np.random.default_rng(2)
    rows, names = GATES[op] * HIDDEN, ["X", "W", "R", "B"]
    shapes = {"X": ("steps", BATCH, "inputs"), "W": (2, "rows", "inputs"),
              "R": (2, "rows", "hidden"), "B": (2, "both")}  # fmt: skip
    of = {"X": (STEPS, BATCH, INPUTS), "W": (2, rows, INPUTS), "R": (2, rows, HIDDEN),
          "B": (2, 2 * rows)}  # fmt: skip
    feeds = {n: rng.uniform(-1, 1, of[n]).astype(np.float32) for n in names}

    def whole(**attrs: Any) -> onnx.ModelProto:
        inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shapes[n]) for n in names]
        results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("Y", "Yh")]
        made = helper.make_node(op, names, ["Y", "Yh"], direction="bidirectional", **attrs)
        graph = helper.make_graph([made], "g", inputs, results)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    m = whole(hidden_size=HIDDEN)
    session = ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"])
    for got, want in zip(compile(m).run(feeds).values(), session.run(None, feeds), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    with pytest.raises(ImportModelError, match=r"its size has to be known(?s:.)*hidden_size"):
        compile(whole())
