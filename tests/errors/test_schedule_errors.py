"""What a wrong schedule step says: one golden text per kind of refusal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tir_samples import matmul_of, softmax_of

from minicompiler.errors import ScheduleError
from minicompiler.ir.types import Loc
from minicompiler.schedules.schedule import Schedule
from minicompiler.target import Target

LOCS = (Loc("fc1", "mlp.onnx", 1, "MatMul"), Loc("act", "mlp.onnx", 2, "Relu"))


def matmul() -> Schedule:
    return Schedule(matmul_of(5, 7, 6).with_(locs=LOCS), Target.parse("cpu:avx2"))


def not_perfect() -> None:
    matmul().split("k0", 4)


def no_such_loop() -> None:
    matmul().mark("j", "vector")


def vector_over_a_reduction() -> None:
    matmul().mark("k0", "vector")


def threads_inside_a_spatial_loop() -> None:
    matmul().mark("i1", "parallel")


def inline_a_reduction() -> None:
    matmul().inline("matmul")


def not_nested() -> None:
    matmul().fuse("i0", "k0")


def consumer_too_early() -> None:
    Schedule(softmax_of(3, 10), Target.parse("cpu:avx2")).compute_at("div", "i0_2")


def unknown_choice() -> None:
    s = Schedule(matmul_of(5, 7, 6), Target.parse("cpu:avx2"), {"rows": 99})
    s.choose("rows", (1, 2, 4), 2)


def layout_of_another_rank() -> None:
    matmul().stage("p1", None, "global", [[0, 1, 0]])


WRONG = [
    not_perfect, no_such_loop, vector_over_a_reduction, threads_inside_a_spatial_loop,
    inline_a_reduction, not_nested, consumer_too_early, unknown_choice, layout_of_another_rank,
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_a_wrong_step(wrong: Callable[[], None], golden: Callable[[str, str], None]) -> None:
    with pytest.raises(ScheduleError) as caught:
        wrong()
    golden(f"schedules/errors/{wrong.__name__}", f"ScheduleError: {caught.value}")
