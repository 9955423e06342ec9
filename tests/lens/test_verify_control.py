"""verify of models with branches and loops: their results, and all around them, are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lens.faults import FAULTS
from lens.test_verify import context, exit_code
from onnx import ModelProto, TensorProto
from onnx_models import NUMBER, graph, model, node, numbers

from minicompiler.codegen import llvm_values
from minicompiler.frontend.onnx import load
from minicompiler.ir.graph import Apply, rebuild
from minicompiler.lens.compare import OK
from minicompiler.lens.reproduce import write
from minicompiler.lens.verify import verify
from minicompiler.ops import elementwise
from minicompiler.passes import fuse

X = numbers(4, 5, low=-1, high=1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINICOMPILER_CACHE", str(tmp_path / "cache"))


def looping() -> ModelProto:
    """A product, a loop whose end depends on data, and a softmax of its rows and last state."""
    body = graph(
        "k:i go:b s:f4,5",
        [
            node("Tanh", "s", "t"), node("Add", "t w", "next"), node("Mul", "next two", "row"),
            node("ReduceMax", "next", "top", keepdims=0), node("Less", "top limit", "more"),
        ],
        "more:b next:f4,5 row:f4,5",
        {"two": np.float32(2), "limit": np.float32(2.5)},
    )  # fmt: skip
    nodes = [
        node("MatMul", "x m", "w"), node("Loop", "most - w", "last rows", body=body),
        node("ReduceSum", "rows", "total", keepdims=0, axes=[0]), node("Sub", "total last", "d"),
        node("Softmax", "d", "y"),
    ]  # fmt: skip
    known = {"m": np.abs(numbers(5, 5)), "most": np.array(40)}
    return model(nodes, {"x": X}, ["y", "rows"], known, opset=12)


def branching() -> ModelProto:
    """A branch within a branch; what is not taken would divide by zero."""
    inner = [graph("", [node(op, "a b", "z")], "z") for op in ("Mul", "Div")]
    inside = node("If", "large", "q", then_branch=inner[0], else_branch=inner[1])
    then = graph("", [node("Exp", "a", "e"), inside, node("Add", "e q", "r")], "r")
    other = graph("", [node("Identity", "a", "r")], "r")
    nodes = [
        node("Relu", "x", "a"), node("Sub", "a a", "b"), node("ReduceMax", "a", "top", keepdims=0),
        node("Greater", "top zero", "some"), node("Greater", "top half", "large"),
        node("If", "some", "c", then_branch=then, else_branch=other), node("Neg", "c", "y"),
    ]  # fmt: skip
    return model(nodes, {"x": X}, ["y"], {"zero": np.float32(0), "half": np.float32(0.5)})


def scanning() -> ModelProto:
    """The number of iterations is an input; a state grows."""
    body = graph(
        "k:i go:b s:f?,5",
        [node("Concat", "s a", "t", axis=0), node("Identity", "go", "on"),
         node("Cast", "k", "f", to=TensorProto.FLOAT), node("Add", "f one", "row")],
        "on:b t:f?,5 row:f",
        {"one": np.float32(1)},
    )  # fmt: skip
    nodes = [node("Exp", "x", "a"), node("Loop", "n - a", "b rows", body=body),
             node("Sqrt", "b", "y")]  # fmt: skip
    return model(nodes, {"n": NUMBER, "x": X}, ["y", "rows"])


CASES: dict[str, tuple[ModelProto, dict[str, Any]]] = {
    "loop": (looping(), {"x": X}),
    "both branches": (branching(), {"x": X}),
    "one branch": (branching(), {"x": X / 2}),
    "no branch": (branching(), {"x": -np.abs(X)}),
    "trips": (scanning(), {"x": X, "n": np.array(3)}),
    "no trips": (scanning(), {"x": X, "n": np.array(0)}),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_a_right_model_has_no_culprit(name: str, threads: int) -> None:
    m, feeds = CASES[name]
    report = verify(load(m), feeds, context(threads))
    assert report.right and report.first is None
    assert {r.deviation.verdict for r in report.rows} == {OK}


def test_values_around_a_loop_and_its_results_are_compared() -> None:
    report = verify(load(looping()), {"x": X}, context())
    names = [r.value for r in report.rows]
    found = [k for k, r in enumerate(report.rows) if r.kernel == "loop"]
    assert [names[k] for k in found] == ["loop.0", "loop.1", "loop.2"]  # count, state, rows
    assert all("Loop" in report.rows[k].nodes for k in found)
    assert names.index("w") < found[0] and found[-1] < names.index("y")


@pytest.mark.parametrize(
    ("op", "first", "kind"),
    [
        ("Relu", "a", "code generation"),
        ("Abs", "cond", "control flow"),
        ("Neg", "y", "code generation"),
    ],
)
def test_the_first_wrong_value_names_the_node(op: str, first: str, kind: str, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Only one operator of the model multiplies: in front of the branch, inside, or behind it."""
    names = {"Relu": ("x", "a"), "Abs": ("a", "r"), "Neg": ("c", "y")}
    made = {
        kind: node("Mul", f"{x} k", y) if kind == op else node(kind, x, y)
        for kind, (x, y) in names.items()
    }
    branches = graph("", [made["Abs"]], "r"), graph("", [node("Identity", "a", "r")], "r")
    m = model(
        [made["Relu"], node("ReduceMax", "a", "top", keepdims=0),
         node("Greater", "top zero", "some"),
         node("If", "some", "c", then_branch=branches[0], else_branch=branches[1]), made["Neg"]],
        {"x": X}, ["y"], {"zero": np.float32(0), "k": numbers(4, 5, seed=2)},
    )  # fmt: skip
    table = next(t for t in vars(llvm_values).values()
                 if isinstance(t, dict) and t.get("mul") == "fmul contract")  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setitem(table, "mul", "fadd contract")
        report = verify(load(m), {"x": X}, context())
        assert report.first is not None and report.first.value == first and not report.right
        assert report.culprit is not None
        assert report.culprit.kind == kind
        script = write(tmp_path / "reproducer", report, context())
        assert exit_code(script) == 1
    assert exit_code(script) == 0


def test_a_pass_that_is_wrong_in_a_body_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fuse._function

    def drops_a_product(group: Any, results: Any) -> Any:
        made, args = real(group, results)

        def change(v: Any, operands: Any) -> Any:
            return operands[0] if isinstance(v, Apply) and v.op is elementwise.mul else None

        return rebuild(made, change), args

    with monkeypatch.context() as patch:
        patch.setattr(fuse, "_function", drops_a_product)
        report = verify(load(looping()), {"x": X}, context())
        assert report.culprit is not None
        assert (report.culprit.kind, report.culprit.name) == ("graph pass", "optimise_bodies")
        script = write(tmp_path / "reproducer", report, context())
        assert exit_code(script) == 1
    assert exit_code(script) == 0


def test_a_faulty_native_main_is_told_from_a_faulty_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = next(f for f in FAULTS if f.kind == "native main")
    fault.inject(monkeypatch)
    report = verify(load(looping()), {"x": X}, context())
    assert report.culprit is not None and report.culprit.kind == "native main"
