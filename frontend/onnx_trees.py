"""Converters of decision trees (domain ai.onnx.ml): what gradient boosting and forests export.

TreeEnsemble, TreeEnsembleRegressor, TreeEnsembleClassifier -> trees(x, tables), then the transform

The three say the same in two ways; both become the tables of `ops.trees`. A node that asks for a
set becomes a chain of nodes that ask for one number each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from minicompiler.ir.expr import const_int
from minicompiler.ir.graph import Value, type_of
from minicompiler.ir.types import DType, float32, float64
from minicompiler.ops import elementwise as el
from minicompiler.ops import index as ix
from minicompiler.ops import pieces as pc
from minicompiler.ops import reduce as red
from minicompiler.ops.trees import EQUAL, GREATER, LESS, UNORDERED, TreesAttrs, trees

from .onnx_math import Converter, cast_to
from .onnx_node import OnnxNode

Array = np.ndarray
MODES = ("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ")
# A missing value passes where the node says so, whatever the comparison.
PASSES = (LESS | EQUAL, LESS, GREATER | EQUAL, GREATER, EQUAL, LESS | GREATER)
MEMBER = 6
DEEPEST = 1 << 12  # levels of a tree
TRANSFORMS = ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT")
AGGREGATES = ("AVERAGE", "SUM", "MIN", "MAX")


@dataclasses.dataclass
class _Forest:
    """The tables of `ops.trees` but for the depths; votes are sorted by their leaf."""

    roots: Array
    features: Array
    splits: Array
    passes: Array
    yes: Array
    no: Array
    leaf: Array  # of each vote
    whom: Array
    weights: Array


# ---- reading ------------------------------------------------------------------------------------
def _table(n: OnnxNode, name: str, size: int, dtype: Any, default: int | None = None) -> Array:
    """An attribute with `size` numbers; in doubles where the model gives it as a tensor."""
    found = n.attributes.get(f"{name}_as_tensor", n.attributes.get(name))
    if found is None and default is not None:
        return np.full(size, default, dtype)
    if found is None:
        n.fail(f"{n.op_type} needs the attribute {name!r}")
    made = np.asarray(found).reshape(-1)
    if made.size != size:
        n.fail(f"{name!r} of {n.op_type} has {made.size} elements, not {size}")
    return made if dtype is None else made.astype(dtype)


def _listed(n: OnnxNode, votes: str, whom: str) -> _Forest:
    """Nodes that name their tree and their number within it."""
    size = len(n.attr("nodes_treeids"))
    n.table(10 * size)
    tree, own, yes, no, features = (
        _table(n, f"nodes_{k}", size, np.int64)
        for k in ("treeids", "nodeids", "truenodeids", "falsenodeids", "featureids")
    )
    missing = _table(n, "nodes_missing_value_tracks_true", size, bool, 0)
    modes = [str(m) for m in n.attr("nodes_modes")]
    if len(modes) != size or any(m not in (*MODES, "LEAF") for m in modes):
        n.fail(f"{n.op_type}: nodes_modes are not {size} of {', '.join(MODES)} and LEAF")
    place = {key: k for k, key in enumerate(zip(tree.tolist(), own.tolist(), strict=True))}
    leaves = np.array([m == "LEAF" for m in modes])
    passes = np.array([0 if m == "LEAF" else PASSES[MODES.index(m)] for m in modes], np.uint8)
    passes[missing & ~leaves] |= UNORDERED

    def places(trees_: Array, nodes: Array) -> Array:
        found = [place.get(key, -1) for key in zip(trees_.tolist(), nodes.tolist(), strict=True)]
        return np.array(found, np.int64)

    self_ = np.arange(size)
    # Nodes of a tree stand together, its root first.
    _, roots = np.unique(tree, return_index=True)
    count = len(n.attr(f"{votes}_treeids"))
    n.table(4 * count)
    leaf = places(*(_table(n, f"{votes}_{k}", count, np.int64) for k in ("treeids", "nodeids")))
    return _Forest(
        np.sort(roots), np.where(leaves, 0, features),
        _table(n, "nodes_values", size, None), passes,
        np.where(leaves, self_, places(tree, yes)), np.where(leaves, self_, places(tree, no)),
        leaf, _table(n, whom, count, np.int64), _table(n, f"{votes}_weights", count, None),
    )  # fmt: skip


def _indexed(n: OnnxNode) -> _Forest:
    """Nodes and leaves in tables of their own; a leaf is numbered behind the nodes here."""
    size, leaves = len(n.attr("nodes_featureids")), len(n.attr("leaf_targetids"))
    n.table(10 * (size + leaves))
    modes = _table(n, "nodes_modes", size, np.int64)
    features = _table(n, "nodes_featureids", size, np.int64)
    splits = _table(n, "nodes_splits", size, None)
    missing = _table(n, "nodes_missing_value_tracks_true", size, bool, 0)
    if not np.isin(modes, range(MEMBER + 1)).all():
        n.fail(f"{n.op_type}: nodes_modes are not from 0 to {MEMBER}")
    passes = np.array([*PASSES, EQUAL], np.uint8)[modes]
    passes[missing] |= UNORDERED
    ways = []
    for side in ("true", "false"):
        child = _table(n, f"nodes_{side}nodeids", size, np.int64)
        is_leaf = _table(n, f"nodes_{side}leafs", size, bool)
        if (child < 0).any() or (child >= np.where(is_leaf, leaves, size)).any():
            n.fail(f"{n.op_type}: nodes_{side}nodeids point to nowhere")
        ways.append(np.where(is_leaf, child + size, child))
    self_ = np.arange(size, size + leaves)
    forest = _Forest(
        np.asarray(n.attr("tree_roots"), np.int64),
        np.concatenate([features, np.zeros(leaves, np.int64)]),
        np.concatenate([splits, np.zeros(leaves, splits.dtype)]),
        np.concatenate([passes, np.zeros(leaves, np.uint8)]),
        np.concatenate([ways[0], self_]), np.concatenate([ways[1], self_]),
        self_, _table(n, "leaf_targetids", leaves, np.int64),
        _table(n, "leaf_weights", leaves, None),
    )  # fmt: skip
    return _with_sets(n, forest, np.flatnonzero(modes == MEMBER))


def _with_sets(n: OnnxNode, forest: _Forest, asking: Array) -> _Forest:
    """Each node that asks for a set as one that asks for its first number, and more behind it."""
    if not asking.size:
        return forest
    values = np.asarray(n.attr("membership_values")).reshape(-1)
    ends = np.flatnonzero(np.isnan(values))
    if len(ends) != len(asking):
        n.fail(f"{n.op_type}: {len(asking)} nodes ask for a set, and there are {len(ends)}")
    n.table(6 * values.size)
    added: list[tuple[int, float, int, int]] = []  # feature, number, yes, no
    for k, start, end in zip(asking, [0, *ends[:-1] + 1], ends, strict=True):
        members, last = values[start:end], forest.no[k]
        if not members.size:
            forest.passes[k] &= UNORDERED
            continue
        forest.splits[k] = members[0]
        here = len(forest.yes) + len(added)
        if members.size > 1:
            forest.no[k] = here
        for j, number in enumerate(members[1:], 1):
            following = here + j if j + 1 < members.size else last
            added.append((forest.features[k], number, forest.yes[k], following))
    for k, name in enumerate(("features", "splits", "yes", "no")):
        old = getattr(forest, name)
        more = np.array([a[k] for a in added], old.dtype)
        setattr(forest, name, np.concatenate([old, more]))
    forest.passes = np.concatenate([forest.passes, np.full(len(added), EQUAL, np.uint8)])
    return forest


def _depths(n: OnnxNode, forest: _Forest) -> Array:
    """The number of steps after which every way through a tree has come to a leaf."""
    self_ = np.arange(len(forest.yes))
    inner = (forest.yes != self_) | (forest.no != self_)
    depths = np.zeros(len(forest.roots), np.int32)
    tree, at = np.arange(len(forest.roots)), forest.roots
    for level in range(DEEPEST + 1):
        going = inner[at]
        if not going.any():
            return depths
        tree, at = tree[going], at[going]
        depths[tree] = level + 1
        n.table(4 * at.size)
        both = np.concatenate([forest.yes[at], forest.no[at]])
        pairs = np.unique(np.stack([np.concatenate([tree, tree]), both]), axis=1)
        tree, at = pairs[0], pairs[1]
    n.fail(f"{n.op_type}: a tree has more than {DEEPEST} levels, or nodes in a circle")


# ---- votes --------------------------------------------------------------------------------------
def _votes(n: OnnxNode, forest: _Forest, targets: int, aggregate: str) -> Value:
    """[rows, targets], in the type of the weights; forests compare in the wider type."""
    t = n.type(0)
    n.shape(0, 2)
    width, nodes = const_int(t.shape[1]), len(forest.yes)
    for what, found, most in (
        ("feature", forest.features, width), ("node", forest.yes, nodes),
        ("node", forest.no, nodes), ("root", forest.roots, nodes), ("leaf", forest.leaf, nodes),
        ("target", forest.whom, targets),
    ):  # fmt: skip
        if (found < 0).any() or (most is not None and (found >= most).any()):
            n.fail(f"{n.op_type}: a {what} is named that is not there")
    if not len(forest.roots):
        n.fail(f"{n.op_type} without trees")
    exact = float64 if float64 in (t.dtype, _dtype(forest.splits)) else float32
    sums = float64 if _dtype(forest.weights) is float64 else float32
    order = np.argsort(forest.leaf, kind="stable")
    first = np.searchsorted(forest.leaf[order], np.arange(nodes + 1))
    if not order.size:  # no leaf votes: a vote that none has
        order, forest.whom, forest.weights = np.zeros(1, int), np.zeros(1, int), np.zeros(1)
    tables = [
        *[n.constant(a, np.int32) for a in (forest.roots, _depths(n, forest))],
        n.constant(forest.splits, exact.numpy),
        n.constant(forest.features * 16 + forest.passes, np.int32),
        n.constant(np.stack([forest.yes, forest.no], 1), np.int32),
        n.constant(first, np.int32), n.constant(forest.whom[order], np.int32),
        n.constant(forest.weights[order], sums.numpy),
    ]  # fmt: skip
    kind = "sum" if aggregate == "AVERAGE" else aggregate.lower()
    x = cast_to(n, n.arg(0), exact)
    attrs = TreesAttrs(targets, kind, *_outcomes(forest))
    made: Value = n.apply(trees, x, *tables, attrs=attrs, name="")
    if aggregate == "AVERAGE":
        made = n.apply(el.mul, made, n.constant(1 / len(forest.roots), sums.numpy), name="")
    return made


def _outcomes(forest: _Forest) -> tuple[int, int]:
    """The outcomes of comparisons that pass at every node, and those that pass at some."""
    own = np.arange(len(forest.yes))
    passes = forest.passes[(forest.yes != own) | (forest.no != own)].astype(np.int64)
    always, ever = np.bitwise_and.reduce(passes), np.bitwise_or.reduce(passes)
    return (int(always), int(always ^ ever)) if passes.size else (0, 0)


def _dtype(a: Array) -> DType:
    return DType(a.dtype.name)


def _base(n: OnnxNode, scores: Value, sizes: Sequence[int]) -> Value:
    """Plus the numbers that a prediction starts from."""
    base = n.attributes.get("base_values_as_tensor", n.attributes.get("base_values"))
    if base is None or not np.size(base):
        return scores
    if np.size(base) not in sizes:
        n.fail(f"'base_values' of {n.op_type} has {np.size(base)} elements")
    kind = type_of(scores).dtype.numpy
    return n.apply(el.add, scores, n.constant(np.reshape(base, -1), kind), name="")


def transformed(n: OnnxNode, scores: Value, transform: str, output: int) -> Value:
    name = n.outputs[output] if n.wants(output) else ""
    last = red.AxisAttrs(-1)
    if transform == "NONE":
        return n.apply(el.identity, scores, name=name)
    if transform == "LOGISTIC":
        return n.apply(el.sigmoid, scores, name=name)
    if transform == "SOFTMAX":
        return n.apply(red.softmax, scores, attrs=last, name=name)
    if transform != "SOFTMAX_ZERO":
        n.fail(f"{n.op_type} with the transform {transform}")
    # Scores that are zero stay so, and the others share the rest.
    number = type_of(scores).dtype.numpy
    top = n.apply(red.reduce_max, scores, attrs=red.ReduceAttrs((-1,), True), name="")
    e = n.apply(el.exp, n.apply(el.sub, scores, top, name=""), name="")
    small = n.apply(el.exp, n.apply(el.neg, top, name=""), name="")
    size = n.apply(el.abs_, scores, name="")
    some = n.apply(el.less, n.constant(1e-7, number), size, name="")
    e = n.apply(el.where, some, e, n.apply(el.mul, scores, small, name=""), name="")
    total = n.apply(red.reduce_sum, e, attrs=red.ReduceAttrs((-1,), True), name="")
    return n.apply(el.div, e, total, name=name)


# ---- the operators ------------------------------------------------------------------------------
def _tree_ensemble(n: OnnxNode) -> Value:
    kinds = [n.attr("aggregate_function", 1), n.attr("post_transform", 0)]
    if kinds[0] not in range(len(AGGREGATES)) or kinds[1] not in range(len(TRANSFORMS)):
        n.fail(f"TreeEnsemble with the aggregate {kinds[0]} and the transform {kinds[1]}")
    made = _votes(n, _indexed(n), n.attr("n_targets", 1), AGGREGATES[kinds[0]])
    return cast_to(n, transformed(n, made, TRANSFORMS[kinds[1]], 0), n.type(0).dtype)


def _regressor(n: OnnxNode) -> Value:
    targets, aggregate = n.attr("n_targets", 1), n.attr("aggregate_function", "SUM")
    if aggregate not in AGGREGATES:
        n.fail(f"{n.op_type} with the aggregate {aggregate}")
    made = _votes(n, _listed(n, "target", "target_ids"), targets, aggregate)
    made = _base(n, made, (1, targets))
    return cast_to(n, transformed(n, made, n.attr("post_transform", "NONE"), 0), float32)


def _classifier(n: OnnxNode) -> tuple[Value, ...]:
    """Labels and scores. A single class that is voted for is the second of two."""
    labels = n.attributes.get("classlabels_int64s")
    if labels is None and n.wants(0):
        n.fail(f"{n.op_type} with labels that are strings", "use the scores alone")
    count = len(labels if labels is not None else n.attr("classlabels_strings"))
    forest, transform = _listed(n, "class", "class_ids"), n.attr("post_transform", "NONE")
    if count <= 2 and len(set(forest.whom.tolist())) == 1:
        positive = bool((forest.weights >= 0).all())
        forest.whom = np.zeros_like(forest.whom)
        scores = _binary(n, _base(n, _votes(n, forest, 1, "SUM"), (1,)), positive, transform)
        labels = [0, *labels] if labels is not None and count == 1 else labels
    else:
        scores = _base(n, _votes(n, forest, count, "SUM"), (1, count))
    made = cast_to(n, transformed(n, scores, transform, 1), float32)
    best = n.apply(red.argmax, scores, attrs=red.ArgAttrs(-1, False, False), name="")
    if labels is None:
        return best, made
    names = n.constant(labels, np.int64)
    return n.apply(ix.gather, names, best, attrs=ix.GatherAttrs(0)), made


def _binary(n: OnnxNode, score: Value, positive: bool, transform: str) -> Value:
    """The scores of two classes from that of the second: probabilities, if no vote is negative
    (which the specification leaves open; onnxruntime does so)."""
    if positive and transform == "NONE":
        number = type_of(score).dtype.numpy
        other = n.apply(el.sub, n.constant([[1]], number), score, name="")
    else:
        other = n.apply(el.neg, score, name="")
    return n.apply(pc.concat, other, score, attrs=pc.ConcatAttrs(1), name="")


TREES: dict[str, Converter] = {
    "ai.onnx.ml.TreeEnsemble": _tree_ensemble,
    "ai.onnx.ml.TreeEnsembleClassifier": _classifier,
    "ai.onnx.ml.TreeEnsembleRegressor": _regressor,
}
