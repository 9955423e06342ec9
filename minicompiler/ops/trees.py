"""Ensembles of decision trees.

    trees(x, tables...)     of each row x[n, :], what the leaves that it reaches vote for

A node asks how one feature compares with its number and names the node to go to; a leaf names
itself, so every row takes as many steps as its tree is deep, and no branch depends on data. Some
rows take each step together, since one alone would wait for memory at every step; blocks of rows go
through one tree before the next one, so that its tables are in the caches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import te
from ..ir.expr import (
    FALSE,
    Const,
    Expr,
    Load,
    binary,
    cast,
    ceildiv,
    const,
    eq,
    minimum,
    ne,
    select,
)
from ..ir.op import Arg, Op, register
from ..ir.tir import PARALLEL, SERIAL, UNROLL, Alloc, Buffer, For, Scope, Stmt, Store, seq
from ..ir.types import DType, TensorType, index
from .draws import Draw, array, choice, integer
from .rules import clamped, direct, fail, need_dtype, need_rank, need_same, result, same_dtype
from .scatter import Fresh, over

Array = np.ndarray
BLOCK = 32  # rows
TOGETHER = 8  # of them
LESS, EQUAL, GREATER, UNORDERED = 1, 2, 4, 8  # how a feature compares with the number of a node
AGGREGATES = {"sum": "add", "min": "min", "max": "max"}
_ONLY = (Const(0),)
_NP = {"sum": np.add, "min": np.minimum, "max": np.maximum}


# ---- trees --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TreesAttrs:
    """targets: numbers per row. aggregate: sum, min or max of the votes for each of them; 0 where
    there are none. passing: outcomes of the comparison that pass at every node; open: those that
    pass at some.

    The tables: roots[t] and depths[t] of the trees; of each node splits[m], asks[m], which is 16
    times its feature plus the open outcomes that pass, and the next node: next[m, 0] where it
    passes, else next[m, 1]; votes first[m] to first[m + 1] are those of a leaf; whom[v] and
    weights[v] of each vote.
    """

    targets: int = 1
    aggregate: str = "sum"
    passing: int = 0
    open: int = LESS | EQUAL | GREATER | UNORDERED


def _start(aggregate: str, dtype: np.dtype) -> float:
    """The number before the first vote."""
    limits = np.finfo(dtype)
    return {"sum": 0.0, "min": float(limits.max), "max": float(limits.min)}[aggregate]


def _trees_infer(
    x: Arg, roots: Arg, depths: Arg, splits: Arg, asks: Arg, next_: Arg, first: Arg, whom: Arg,
    weights: Arg, a: TreesAttrs,
) -> TensorType:  # fmt: skip
    need_rank("trees", x, 2, 2)
    for t in (roots, depths, asks, next_, first, whom):
        need_rank("trees", t, *((2, 2) if t is next_ else (1, 1)))
        need_dtype("trees", t, "i")
    for t in (splits, weights):
        need_rank("trees", t, 1, 1)
    need_dtype("trees", x, "f")
    need_dtype("trees", weights, "f")
    if x.type.dtype.bits < 32 or weights.type.dtype.bits < 32:
        fail("trees: 16-bit floats are not supported", "cast them to float32")
    same_dtype("trees", x, splits)
    for t in (asks, next_):
        need_same("trees", "nodes", t.type.shape[0], splits.type.shape[0])
    need_same("trees", "ways to go on", next_.type.shape[1], 2)
    need_same("trees", "nodes and first votes", splits.type.shape[0] + 1, first.type.shape[0])
    need_same("trees", "votes", whom.type.shape[0], weights.type.shape[0])
    need_same("trees", "trees", roots.type.shape[0], depths.type.shape[0])
    if a.aggregate not in AGGREGATES or a.targets < 1:
        fail(f"trees: {a.targets} targets, {a.aggregate!r} of the votes")
    return result((x.type.shape[0], a.targets), weights.type.dtype)


def _passed(value: Expr, split: Expr, asked: Expr, a: TreesAttrs) -> Expr:
    """Whether a node passes. No choices: under a condition everything would be read once more."""
    certain = {
        LESS | EQUAL: value <= split, GREATER | EQUAL: split <= value, LESS: value < split,
        EQUAL: eq(value, split), GREATER: split < value, UNORDERED: ne(value, value),
    }  # fmt: skip
    passed: Expr = FALSE
    left = a.passing
    for outcomes, holds in certain.items():
        if outcomes & left == outcomes:
            passed, left = binary("or", passed, holds), left & ~outcomes
    for outcome in (LESS, EQUAL, GREATER, UNORDERED):
        if a.open & outcome:
            wanted = ne(binary("and", asked, outcome), 0)
            passed = binary("or", passed, binary("and", certain[outcome], wanted))
    return passed


def _trees_compute(x: te.Tensor, *rest: Any) -> te.Tensor:
    *tables, a = rest
    dtype: DType = tables[-1].dtype

    def build(ins: list[Buffer], outs: list[Buffer], fresh: Fresh) -> Stmt:
        data, roots, depths, splits, asks, next_, first, whom, weights = ins
        (made,) = outs
        rows, nodes = data.shape[0], splits.shape[0]
        node = Buffer(fresh("node").name, index, (Const(TOGETHER),), Scope.REGISTER)
        leaf = Buffer(fresh("leaf").name, index, (Const(TOGETHER),), Scope.LOCAL)
        block, group, t, d, i, v = (fresh(s) for s in ("block", "group", "t", "d", "i", "v"))
        top = block * BLOCK + group * TOGETHER

        def number(table: Buffer, *where: Expr) -> Expr:
            return cast(Load(table, where), index)

        def together(to: Buffer, value: Callable[[Expr], Expr]) -> Stmt:
            """to[lane] = value(lane), for the rows of a group."""
            lane = fresh("lane")
            return For(lane, Const(TOGETHER), UNROLL, Store(to, (lane,), value(lane)))

        def following(lane: Expr) -> Expr:
            """The node after the one that a row has come to; rows behind the last are as this."""
            at = (clamped(Load(node, (lane,)), nodes),)
            asked = number(asks, *at)
            row = minimum(top + lane, rows - 1)
            value = Load(data, (row, clamped(binary("shr", asked, 4), data.shape[1])))
            split = Load(splits, at)
            passed = _passed(value, split, asked, a)
            return number(next_, *at, select(passed, const(0), const(1)))

        at = (clamped(Load(leaf, (i,)), nodes),)
        vote = clamped(number(first, *at) + v, whom.shape[0])
        place = (top + i, clamped(number(whom, vote), a.targets))
        combined = binary(AGGREGATES[a.aggregate], Load(made, place), Load(weights, (vote,)))
        votes = number(first, at[0] + 1) - number(first, *at)
        count = For(v, votes, SERIAL, Store(made, place, combined))
        one = seq(
            [
                together(node, lambda lane: number(roots, t)),
                For(d, number(depths, t), SERIAL, together(node, following)),
                together(leaf, lambda lane: Load(node, (lane,))),
                For(i, minimum(rows - top, TOGETHER), SERIAL, count),
            ]
        )
        most = minimum(rows - block * BLOCK, BLOCK)
        start = const(_start(a.aggregate, dtype.numpy), dtype)

        def clear(k: Expr, c: Expr) -> Stmt:
            return Store(made, (block * BLOCK + k, c), start)

        def finish(k: Expr, c: Expr) -> Stmt:
            found = Load(made, (block * BLOCK + k, c))
            return Store(made, (block * BLOCK + k, c), select(eq(found, start), zero, found))

        zero = const(0, dtype)
        part = (most, Const(a.targets))
        every = For(t, roots.shape[0], SERIAL, For(group, ceildiv(most, TOGETHER), SERIAL, one))
        nest = seq([over(part, fresh, clear), every])
        if a.aggregate != "sum":
            nest = seq([nest, over(part, fresh, finish)])
        return For(block, ceildiv(rows, BLOCK), PARALLEL, Alloc(node, Alloc(leaf, nest)))

    shape = (x.shape[0], Const(a.targets))
    return te.extern("trees", (x, *tables), [(shape, dtype)], build)[0]


def _trees_reference(
    x: Array, roots: Array, depths: Array, splits: Array, asks: Array, next_: Array, first: Array,
    whom: Array, weights: Array, a: TreesAttrs,
) -> Array:  # fmt: skip
    start = weights.dtype.type(_start(a.aggregate, weights.dtype))
    made = np.full((len(x), a.targets), start)
    rows = np.arange(len(x))
    for root, depth in zip(roots, depths, strict=True):
        at = np.full(len(x), root)
        for _ in range(depth):
            value, split = x[rows, asks[at] >> 4], splits[at]
            relation = (
                LESS * (value < split) + EQUAL * (value == split) + GREATER * (value > split)
                + UNORDERED * np.isnan(value)
            )  # fmt: skip
            at = next_[at, np.where(relation & (asks[at] & a.open | a.passing), 0, 1)]
        for row, leaf in enumerate(at):
            for v in range(first[leaf], first[leaf + 1]):
                old = made[row, whom[v]]
                made[row, whom[v]] = _NP[a.aggregate](old, weights[v])
    return np.where(made == start, 0, made)


def _trees_samples(draw: Draw) -> tuple[list[Array], TreesAttrs]:
    """Complete trees: the children of node k stand at 2 k + 1 and 2 k + 2 behind its root."""
    count, width, targets = integer(draw, 1, 3), integer(draw, 1, 4), integer(draw, 1, 3)
    sizes = [integer(draw, 0, 3) for _ in range(count)]
    tables: dict[str, list[int]] = {k: [] for k in ("roots", "next", "first")}
    votes = 0
    for depth in sizes:
        root = len(tables["next"]) // 2
        tables["roots"].append(root)
        inner = 2**depth - 1
        for k in range(2 * inner + 1):
            children = [root + k] * 2 if k >= inner else [root + 2 * k + 1, root + 2 * k + 2]
            tables["next"] += children
            tables["first"].append(votes)
            votes += 0 if k < inner else integer(draw, 0, 2)
    tables["first"].append(votes)
    nodes, room = len(tables["first"]) - 1, max(votes, 1)
    numbers = {k: np.array(v, np.int32) for k, v in tables.items()}
    dtype, most = choice(draw, ("float32", "float64")), 16 * width - 1
    x = np.round(array(draw, (integer(draw, 1, 40), width), dtype, -2, 2))
    x[array(draw, x.shape, low=0, high=1) < 0.1] = np.nan
    return [
        x, numbers["roots"], np.array(sizes, np.int32),
        np.round(array(draw, (nodes,), dtype, -2, 2)), array(draw, (nodes,), "int32", 0, most),
        numbers["next"].reshape(-1, 2), numbers["first"],
        array(draw, (room,), "int32", 0, targets - 1),
        array(draw, (room,), choice(draw, ("float32", "float64"))),
    ], TreesAttrs(
        targets, choice(draw, sorted(AGGREGATES)), integer(draw, 0, 15), choice(draw, (0, 8, 15))
    )  # fmt: skip


trees = register(
    Op("trees", TreesAttrs, _trees_infer, direct(_trees_compute), _trees_reference, _trees_samples)
)
