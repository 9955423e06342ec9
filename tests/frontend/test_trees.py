"""Ensembles of decision trees, against onnxruntime and onnx's reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from tolerance import assert_close

import minicompiler as mc
from minicompiler.errors import ImportModelError
from minicompiler.frontend import onnx
from minicompiler.ir.graph import applies
from minicompiler.ops.trees import EQUAL, GREATER, LESS, UNORDERED, trees

ROWS, WIDTH = 70, 5
DOMAIN = "ai.onnx.ml"
MODES = ("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ")
Array = np.ndarray
Attributes = dict[str, Any]


@dataclasses.dataclass
class Forest:
    """Random trees, in the form of the older operators: nodes_* and who is voted for where."""

    nodes: Attributes
    leaves: list[tuple[int, int]]  # tree, node


def forest(trees: int = 6, deepest: int = 5, modes: tuple[str, ...] = MODES[:1]) -> Forest:
    rng = np.random.default_rng(trees)
    names = ("treeids", "nodeids", "featureids", "truenodeids", "falsenodeids", "modes", "values")
    table: Attributes = {k: [] for k in names}
    leaves = []
    for tree in range(trees):
        open_, count = [(0, 0)], 1
        while open_:
            node, depth = open_.pop(0)
            inner = depth < deepest and (depth == 0 or rng.random() < 0.7)
            yes, no = (count, count + 1) if inner else (0, 0)
            if inner:
                open_ += [(yes, depth + 1), (no, depth + 1)]
                count += 2
            else:
                leaves.append((tree, node))
            mode = str(rng.choice(modes)) if inner else "LEAF"
            # Whole numbers, so that some features are equal to them.
            row = (tree, node, int(rng.integers(WIDTH)), yes, no, mode, float(rng.integers(-2, 3)))
            for k, v in zip(names, row, strict=True):
                table[k].append(v)
    nodes = {f"nodes_{k}": v for k, v in table.items()}
    nodes["nodes_missing_value_tracks_true"] = rng.integers(0, 2, len(table["modes"])).tolist()
    return Forest(nodes, leaves)


def votes(of: Forest, prefix: str, ids: str, targets: int, least: float = -1) -> Attributes:
    """Two votes of most leaves."""
    rng = np.random.default_rng(1)
    rows = [leaf for leaf in of.leaves for _ in range(2 if targets > 1 else 1)]
    return {
        f"{prefix}_treeids": [r[0] for r in rows],
        f"{prefix}_nodeids": [r[1] for r in rows],
        ids: [int(k) for k in rng.integers(0, targets, len(rows))],
        f"{prefix}_weights": [float(np.float32(v)) for v in rng.uniform(least, 1, len(rows))],
    }


def model(op: str, outputs: list[str], opset: int = 3, kind: int = 1, **attrs: Any) -> ModelProto:
    node = helper.make_node(op, ["x"], outputs, "n", domain=DOMAIN, **attrs)
    types = {"label": TensorProto.INT64}
    results = [helper.make_tensor_value_info(o, types.get(o, kind), None) for o in outputs]
    x = helper.make_tensor_value_info("x", kind, ["n", WIDTH])
    graph = helper.make_graph([node], "trees", [x], results)
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


def rows(missing: bool = False) -> Array:
    rng = np.random.default_rng(0)
    x = np.round(rng.uniform(-3, 3, (ROWS, WIDTH)) * 2).astype(np.float32) / 2
    x[rng.random(x.shape) < (0.2 if missing else 0)] = np.nan
    return x


def check(m: ModelProto, x: Array, peer: bool = True) -> list[Array]:
    """Compares with onnxruntime, or with onnx's reference where the two disagree."""
    got = mc.compile(m)(x)
    if peer:
        want = ort.InferenceSession(m.SerializeToString()).run(None, {"x": x})
    else:
        want = ReferenceEvaluator(m).run(None, {"x": x})
    for a, b in zip(got, want, strict=True):
        assert_close(a, b.reshape(a.shape), 16)
    return list(got)


@pytest.mark.parametrize("aggregate", ("SUM", "AVERAGE", "MIN", "MAX"))
@pytest.mark.parametrize("targets", (1, 3))
def test_regressor(aggregate: str, targets: int) -> None:
    trees = forest(8)
    more = votes(trees, "target", "target_ids", targets)
    base = [0.5, -0.25, 1.0][:targets]
    m = model(
        "TreeEnsembleRegressor", ["y"], n_targets=targets, aggregate_function=aggregate,
        base_values=base, **trees.nodes, **more,
    )  # fmt: skip
    check(m, rows())


@pytest.mark.parametrize(
    ("modes", "passing", "open_"),
    [(MODES[:1], LESS | EQUAL, 0), (MODES[3:4], GREATER, 0), (MODES[:2], LESS, EQUAL),
     (MODES, 0, LESS | EQUAL | GREATER)],
)  # fmt: skip
def test_nodes_are_asked_only_for_outcomes_in_which_they_differ(
    modes: tuple[str, ...], passing: int, open_: int
) -> None:
    of = forest(30, modes=modes)
    m = model("TreeEnsembleRegressor", ["y"], n_targets=1,
              **of.nodes, **votes(of, "target", "target_ids", 1))  # fmt: skip
    (found,) = (v.attrs for v in applies(onnx.load(m)) if v.op is trees)
    missing = UNORDERED if found.open & UNORDERED else 0  # some nodes of a random forest have it
    assert (found.passing, found.open & ~missing) == (passing, open_)


@pytest.mark.parametrize("modes", [(m,) for m in MODES] + [MODES], ids=lambda m: m[0] + str(len(m)))
def test_comparisons_and_missing_values(modes: tuple[str, ...]) -> None:
    trees = forest(9, modes=modes)
    more = votes(trees, "target", "target_ids", 1)
    m = model("TreeEnsembleRegressor", ["y"], n_targets=1, aggregate_function="SUM",
              **trees.nodes, **more)  # fmt: skip
    check(m, rows())
    check(m, rows(missing=True), peer=False)


@pytest.mark.parametrize("transform", ("NONE", "LOGISTIC", "SOFTMAX", "SOFTMAX_ZERO"))
@pytest.mark.parametrize("classes", (2, 4))
def test_classifier(transform: str, classes: int) -> None:
    trees = forest(7)
    more = votes(trees, "class", "class_ids", classes)
    m = model(
        "TreeEnsembleClassifier", ["label", "scores"], post_transform=transform,
        classlabels_int64s=[7, 3, 11, 5][:classes], **trees.nodes, **more,
    )  # fmt: skip
    # onnxruntime takes the second of two classes wherever its score is positive.
    label, _ = check(m, rows(), peer=classes > 2)
    assert len(np.unique(label)) > 1


@pytest.mark.parametrize("transform", ("NONE", "LOGISTIC", "SOFTMAX"))
@pytest.mark.parametrize("least", (-1, 0))
@pytest.mark.parametrize("labels", ([0, 1], [4, 9]))
def test_two_classes_of_which_one_is_voted_for(
    transform: str, least: float, labels: list[int]
) -> None:
    trees = forest(5)
    more = votes(trees, "class", "class_ids", 1, least)
    more["class_weights"] = [w / 5 for w in more["class_weights"]]
    m = model(
        "TreeEnsembleClassifier", ["label", "scores"], post_transform=transform,
        classlabels_int64s=labels, **trees.nodes, **more,
    )  # fmt: skip
    # Of votes that are probabilities onnxruntime makes no logistic scores.
    label, _ = check(m, rows(), peer=transform == "NONE" or (transform == "LOGISTIC" and least < 0))
    assert transform != "NONE" or len(np.unique(label)) > 1


def newer(of: Forest, kind: int = TensorProto.FLOAT, **attrs: Any) -> ModelProto:
    """The same trees as nodes and leaves apart."""
    number = helper.tensor_dtype_to_np_dtype(kind)
    places = list(zip(of.nodes["nodes_treeids"], of.nodes["nodes_nodeids"], strict=True))
    inner = [p for p in places if p not in set(of.leaves)]
    where = {p: k for k, p in enumerate(inner)} | {p: k for k, p in enumerate(of.leaves)}
    column = {k.removeprefix("nodes_"): v for k, v in of.nodes.items()}
    picked = [k for k, p in enumerate(places) if p in set(inner)]
    table: Attributes = {"nodes_featureids": [column["featureids"][k] for k in picked]}
    for side in ("true", "false"):
        children = [(places[k][0], column[f"{side}nodeids"][k]) for k in picked]
        table[f"nodes_{side}nodeids"] = [where[c] for c in children]
        table[f"nodes_{side}leafs"] = [int(c in set(of.leaves)) for c in children]
    modes = np.array([MODES.index(column["modes"][k]) for k in picked], np.uint8)
    splits = np.array([column["values"][k] for k in picked], number)
    more = votes(of, "t", "ids", 1)
    return model(
        "TreeEnsemble", ["y"], 5, kind, **table, n_targets=2,
        tree_roots=[where[p] for p in inner if p[1] == 0],
        leaf_targetids=[k % 2 for k in range(len(of.leaves))],
        nodes_modes=numpy_helper.from_array(modes),
        nodes_splits=numpy_helper.from_array(splits),
        leaf_weights=numpy_helper.from_array(np.array(more["t_weights"], number)), **attrs,
    )  # fmt: skip


@pytest.mark.parametrize("kind", (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16))
@pytest.mark.parametrize("aggregate", range(4))
def test_nodes_and_leaves_apart(kind: int, aggregate: int) -> None:
    m = newer(forest(6, modes=MODES[:4]), kind, aggregate_function=aggregate)
    x = rows().astype(helper.tensor_dtype_to_np_dtype(kind))
    (want,) = ReferenceEvaluator(m).run(None, {"x": x})
    want = np.where(np.abs(want) >= np.finfo(x.dtype).max, 0, want).astype(x.dtype)  # no votes
    assert_close(mc.compile(m)(x)[0], want, 16)


def test_threads_and_batches_change_no_bit() -> None:
    trees = forest(30)
    more = votes(trees, "target", "target_ids", 3)
    m = model("TreeEnsembleRegressor", ["y"], n_targets=3, **trees.nodes, **more)
    x = np.tile(rows(), (5, 1))
    one, two = (mc.compile(m, threads=t) for t in (1, 2))
    (want,) = one(x)
    assert np.array_equal(two(x)[0], want)
    assert np.array_equal(one(x[33:34])[0], want[33:34])


WRONG = {
    "a node": ({"nodes_truenodeids": 99}, "a node is named that is not there"),
    "a feature": ({"nodes_featureids": WIDTH}, "a feature is named"),
    "a circle": ({"nodes_falsenodeids": 0}, "nodes in a circle"),
    "a mode": ({"nodes_modes": "BRANCH"}, "nodes_modes are not"),
    "a length": ({"nodes_values": None}, "'nodes_values' of TreeEnsembleRegressor has"),
    "a target": ({"target_ids": 7}, "a target is named"),
    "a leaf": ({"target_nodeids": 5000}, "a leaf is named"),
}


@pytest.mark.parametrize("name", WRONG)
def test_tables_that_say_nothing_are_refused(name: str) -> None:
    trees, (changes, message) = forest(3), WRONG[name]
    attrs = trees.nodes | votes(trees, "target", "target_ids", 1)
    for k, value in changes.items():
        attrs[k] = attrs[k][1:] if value is None else [value, *attrs[k][1:]]
    with pytest.raises(ImportModelError, match=message):
        mc.compile(model("TreeEnsembleRegressor", ["y"], n_targets=1, **attrs))
