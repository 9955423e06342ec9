"""What proofs cost: claims that are false or beyond the prover must not hold up a compilation."""

from __future__ import annotations

import pytest

from minicompiler import te
from minicompiler.ir.arith import Arith
from minicompiler.ir.expr import Const, Dim, Expr, Var, maximum, minimum, select
from minicompiler.ir.proofs import Patience, Prover
from minicompiler.ir.types import float32, index
from minicompiler.ir.verify_tir import unproved_accesses
from minicompiler.lower.to_tir import from_tensors
from minicompiler.ops.rules import unequal
from minicompiler.ops.shape import ReshapeAttrs, reshaped

BATCH, HEIGHT, WIDTH = Dim("batch"), Dim("height"), Dim("width")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by one with every step of a search for a proof."""
    made: list[object] = []
    proved = Prover._proved

    def counted(self: Prover, *args: object) -> bool:
        made.append(args)
        return proved(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Prover, "_proved", counted)
    return made


def padded(size: Expr) -> Expr:
    """A size of windows of 7, the last one completed."""
    return size // 4 + (Const(0) - size // 4 % 7) % 7


def shifted_windows() -> Arith:
    """The window of an image, of which three rows come from the other side (Swin)."""
    v, w = Var("v", index), Var("w", index)
    windows = padded(HEIGHT) // 7 * (padded(WIDTH) // 7)
    across = padded(WIDTH) // 7
    place = (v // across % (padded(HEIGHT) // 7) * 7 + w // 7) * padded(WIDTH)
    place = place + v % across * 7 + w % 7
    facts = [
        Const(0) < windows * BATCH,
        padded(HEIGHT) - 3 <= place // padded(WIDTH),
        place // padded(WIDTH) + 3 - padded(HEIGHT) < HEIGHT // 4,
        place % padded(WIDTH) < padded(WIDTH) - 3,
    ]
    return Arith({v: (Const(0), windows * BATCH - 1), w: (Const(0), Const(48))}, facts)


def test_what_is_false_is_refuted_where_the_facts_hold(steps: list[object]) -> None:
    """They hold at none of the points that are always tried."""
    arith = shifted_windows()
    v = next(x for x in arith.ranges if str(x) == "v")
    assert arith.prove(v // (padded(WIDTH) // 7) < padded(HEIGHT) // 7) is None
    assert len(steps) < 400


def test_claims_without_a_proof_cost_less_and_less(steps: list[object]) -> None:
    i, j = Var("i", index), Var("j", index)
    rows = (HEIGHT // 80 + 1) // 2
    arith = Arith({i: (Const(0), rows - 1), j: (Const(0), rows * 2 - 1)})
    bound = maximum(minimum(rows + 4998, 9999) - minimum(9999, maximum(5001 - rows, 0)), 0) + 1
    for k in range(8):
        place = rows * i * 2 + j - i * 3 + k
        place = place % (rows + 1) + place // (rows + 1) * rows + rows - place // (rows + 1) - 1
        assert arith.prove(place // bound < rows * 3 + 9) is None
    assert len(steps) < 2000


def test_patience_is_shared_and_ends() -> None:
    patience = Patience(1000)
    for _ in range(20):
        patience.lost()
    assert patience.terms == Patience.LEAST


def test_a_condition_is_learned_once_for_all_accesses_under_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learned: list[Expr] = []
    learn = Arith._learn
    monkeypatch.setattr(Arith, "_learn", lambda self, f: learned.append(f) or learn(self, f))
    n = Dim("n")
    x = te.placeholder("x", (n,), float32)

    def element(i: Expr) -> Expr:
        total = x[(i + 1,)]
        for k in range(2, 30):
            total = total + x[(i + k,)]
        return select(i + 30 < n, total, x[(i,)])

    func = from_tensors("f", [x], [te.compute((n,), element, "sums")])
    assert not unproved_accesses(func)
    assert len(learned) < 10


def test_sizes_are_compared_once(steps: list[object]) -> None:
    """However often the types of a graph are inferred again."""
    side = (HEIGHT // 4 + 1) // 2
    shape = (BATCH, side * side, Const(64))
    attrs = ReshapeAttrs((-1, padded(HEIGHT), side))
    first = reshaped(shape, attrs)
    before = len(steps)
    assert reshaped(shape, attrs) == first
    assert unequal(side % 5, 7) == unequal(side % 5, 7)
    assert len(steps) == before
