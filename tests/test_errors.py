"""How errors read, and that they survive a process boundary."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

import pytest

from minicompiler import errors
from minicompiler.errors import MinicompilerError, RunError, ScheduleError, ShapeError

pytestmark = pytest.mark.smoke


@dataclass(frozen=True)
class Loc:
    name: str
    file: str = ""
    line: int = 0
    op: str = ""


ERRORS = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, MinicompilerError)
]


def test_the_text_names_place_excerpt_and_hint() -> None:
    error = ScheduleError(
        'split("k", 48, tail="perfect"): 48 is not known to divide the extent 100',
        locs=[Loc("fc1/MatMul", "mlp.onnx", op="MatMul"), Loc("fc1/Relu", "mlp.onnx", op="Relu")],
        excerpt="    for j in 64:\n>     for k in 100:          # reduce\n",
        hint='use tail="mask", or a factor that divides 100',
        where="fused_dense_relu_2",
    )
    assert str(error) == (
        'split("k", 48, tail="perfect"): 48 is not known to divide the extent 100\n'
        '  in fused_dense_relu_2, from MatMul "fc1/MatMul" (mlp.onnx) + Relu "fc1/Relu"\n'
        "      for j in 64:\n"
        "  >     for k in 100:          # reduce\n"
        '  hint: use tail="mask", or a factor that divides 100'
    )


def test_a_bare_message_stays_as_it_is() -> None:
    assert str(MinicompilerError("no")) == "no"


def test_a_place_can_be_added_further_out() -> None:
    with pytest.raises(ShapeError, match=r'(?s)no\n  from "x" \(net.py:7\)') as caught:
        try:
            raise ShapeError("no")
        except ShapeError as error:
            error.locs = (Loc("x", "net.py", 7),)
            raise
    assert caught.value.args == ("no",)


def test_a_file_is_named_when_it_changes_and_long_lists_are_cut() -> None:
    locs = [Loc(f"n{i}", "ab"[i // 3 % 2]) for i in range(9)]
    wanted = '"n0" (a) + "n1" + "n2" + "n3" (b) + "n4" + "n5" + 3 more'
    assert errors.format_locs(locs) == wanted


@pytest.mark.parametrize("kind", ERRORS)
def test_pickling_keeps_everything(kind: type[MinicompilerError]) -> None:
    error = kind("m", [Loc("n", "f", 1, "Add")], "e", "h", "w")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert vars(copy) == vars(error)
    assert str(copy) == str(error)


def test_callers_may_catch_the_usual_python_errors() -> None:
    assert issubclass(ShapeError, ValueError)
    assert issubclass(RunError, RuntimeError)
