"""Plans: sizes, their text, and the round trip through JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicompiler.errors import RunError
from minicompiler.runtime.plan import (
    OPERATIONS,
    Bind,
    Call,
    DimSpec,
    Guard,
    Plan,
    Size,
    Tensor,
    evaluate,
    numpy_dtype,
    size_text,
)

PLAN = Plan(
    inputs=(Tensor("x", "float32", ("n", 12)), Tensor("k", "bfloat16", (("mul", 2, "n"),))),
    outputs=(Tensor("y", "bool", ("n",)), Tensor("z", "int64", ())),
    dims=(DimSpec("n", 1, None, 4),),
    binds=(Bind("n", 0, 0),),
    guards=(Guard("n", "le", ("add", "n", 1), "Add"),),
    named=(("$0", ("max", "n", 64)),),
    calls=(
        Call("a", (("input", 0), ("constant", 0), ("arena", ("add", "$0", 64))), ("n",)),
        Call("b", (("arena", 0), ("output", 0)), ()),
        Call("a", (("input", 0), ("constant", 1), ("arena", 0)), ("n",)),
    ),
    results=(("output", 0), ("input", 1)),
    constants=2,
    arena=("mul", "$0", 48),
    shared=0,
    local=64,
)

SIZES = st.recursive(
    st.integers(-50, 50) | st.sampled_from(["n", "m"]),
    lambda inner: st.tuples(st.sampled_from(sorted(OPERATIONS)), inner, inner),
    max_leaves=8,
)


@given(SIZES, st.integers(1, 100), st.integers(1, 100))
def test_the_text_of_a_size_means_its_value(size: Size, n: int, m: int) -> None:
    names = {"n": n, "m": m, "min": min, "max": max}
    try:
        expected = evaluate(size, {"n": n, "m": m})
    except ZeroDivisionError:
        return
    assert eval(size_text(size), {"__builtins__": {}}, names) == expected


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (("mul", 2, ("add", "n", 1)), "2*(n + 1)"),
        (("sub", "a", ("sub", "b", "c")), "a - (b - c)"),
        (("floordiv", ("add", "n", 15), 16), "(n + 15)//16"),
        (("max", ("add", "n", 1), "m"), "max(n + 1, m)"),
    ],
)
def test_text(size: Size, text: str) -> None:
    assert size_text(size) == text


def test_json_keeps_everything() -> None:
    text = json.dumps(PLAN.to_json())
    assert Plan.from_json(json.loads(text)) == PLAN
    assert json.dumps(PLAN.to_json()) == text


def test_the_table_has_a_slot_for_everything() -> None:
    table = PLAN.table()
    assert PLAN.kernels == ("a", "b")
    assert table.kernels == {"a": 10, "b": 11}
    assert (table.inputs, table.outputs, table.arena, table.workspace) == (0, 2, 4, 5)
    assert (table.dims, table.failed, table.constants, table.length) == (6, 7, 8, 12)


def test_texts_and_dtypes() -> None:
    assert str(PLAN.inputs[1]) == "k: bfloat16[2*n]"
    assert str(PLAN.outputs[1]) == "z: int64[]"
    assert numpy_dtype("bfloat16").itemsize == 2


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"arena": "m"}, "dimension m"),
        ({"named": []}, r"dimension \$0"),
        ({"binds": [["n", 0, 2]]}, "bound to no axis"),
        ({"binds": []}, "what binds them"),
        ({"results": [["output", 0]]}, "where they are differ"),
        ({"results": [["output", 0], ["constant", 2]]}, "constant 2"),
        ({"results": [["output", 0], ["attic", 2]]}, "place attic"),
        ({"local": ["pow", 1, 2]}, "operation pow"),
        ({"local": None}, "NoneType"),
        ({"guards": [["n", "is", 1, ""]]}, "relation is"),
        ({"calls": [["a", [], ["k"]]]}, "dimension k"),
        ({"inputs": [["x", "float33", []]]}, "float33"),
    ],
)
def test_other_data_is_refused(change: dict[str, Any], phrase: str) -> None:
    with pytest.raises(RunError, match=phrase):
        Plan.from_json(PLAN.to_json() | change)


def test_a_missing_field_is_refused() -> None:
    data = PLAN.to_json()
    assert set(data) == {f.name for f in dataclasses.fields(Plan)}
    for name in data:
        with pytest.raises(RunError, match=name):
            Plan.from_json({k: v for k, v in data.items() if k != name})
