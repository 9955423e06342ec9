"""Law 2: simplify keeps the value under every assignment in bounds, prove claims nothing false,
bound is a bound. And the identities that schedules rely on."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicompiler.ir.arith import Arith, evaluate_int, keeping, knowing
from minicompiler.ir.expr import (
    COMPARE,
    ZERO,
    Const,
    Dim,
    Expr,
    Load,
    Var,
    all_of,
    binary,
    eq,
    free_vars,
    logical_not,
    maximum,
    minimum,
    select,
)
from minicompiler.ir.polynomials import Poly
from minicompiler.ir.proofs import Prover
from minicompiler.ir.tir import Buffer
from minicompiler.ir.types import int64

CHECKED = settings(max_examples=300, derandomize=True, deadline=None, database=None)
# An expression takes dozens of choices: one number that seeds them is drawn, which keeps this fast.
SEED = given(st.integers(0, 2**32 - 1))
N, M = Dim("n", 1, 9), Dim("m", 2, 6)
I, J, K, T = Var("i"), Var("j"), Var("k"), Var("t")
# k runs over tiles of n, t within one; j may be negative; the range of k names a Dim and t names k.
RANGES: dict[Expr, tuple[Expr, Expr]] = {
    I: (ZERO, Const(7)),
    J: (Const(-3), Const(4)),
    K: (ZERO, (N + 3) // 4 - 1),
    T: (ZERO, minimum(Const(4), N - K * 4) - 1),
}


def integers(rng: Random, depth: int) -> Expr:
    """A random index expression; divisors are positive."""
    kind = rng.randint(0, 9 if depth else 1)
    if kind == 0:
        return Const(rng.randint(-6, 17))
    if kind == 1 or depth == 0:
        return rng.choice((I, J, K, T, N, M))
    a = integers(rng, depth - 1)
    if kind in (2, 3):
        divisor = rng.choice((Const(2), Const(3), Const(4), Const(8), Const(12), N, M))
        return binary("floordiv" if kind == 2 else "mod", a, divisor)
    if kind == 4:
        return select(comparison(rng, depth - 1), a, integers(rng, depth - 1))
    if kind == 5:
        return a * Const(rng.choice((-4, -1, 2, 3, 4, 8, 12)))
    op = ("add", "sub", "min", "max")[kind - 6]
    return binary(op, a, integers(rng, depth - 1))


def comparison(rng: Random, depth: int) -> Expr:
    """A random condition."""
    a, b = integers(rng, depth), integers(rng, depth)
    made = binary(rng.choice(COMPARE), a, b)
    if depth and rng.randint(0, 3) == 0:
        made = binary(rng.choice(("and", "or")), made, comparison(rng, depth - 1))
    return logical_not(made) if rng.randint(0, 4) == 0 else made


def assignments(rng: Random, count: int = 15) -> list[dict[str, int]]:
    """Values in bounds for all variables."""
    found = []
    for _ in range(count):
        n, m = rng.choice((1, 2, 4, 5, 8, 9)), rng.randint(2, 6)
        k = rng.randint(0, (n + 3) // 4 - 1)
        t = rng.randint(0, min(4, n - 4 * k) - 1)
        found.append(
            {"i": rng.randint(0, 7), "j": rng.randint(-3, 4), "k": k, "t": t, "n": n, "m": m}
        )
    return found


@CHECKED
@SEED
def test_simplify_keeps_the_value(seed: int) -> None:
    rng = Random(seed)
    e = integers(rng, 4)
    simple = Arith(RANGES).simplify(e)
    for env in assignments(rng):
        assert evaluate_int(simple, env) == evaluate_int(e, env), (str(e), str(simple), env)


@CHECKED
@SEED
def test_simplify_keeps_conditions(seed: int) -> None:
    rng = Random(seed)
    e = comparison(rng, 3)
    simple = Arith(RANGES).simplify(e)
    for env in assignments(rng):
        same = bool(evaluate_int(simple, env)) == bool(evaluate_int(e, env))
        assert same, (str(e), str(simple), env)


@CHECKED
@SEED
def test_prove_claims_nothing_false(seed: int) -> None:
    rng = Random(seed)
    e = comparison(rng, 3)
    claim = Arith(RANGES).prove(e)
    if claim is not None:
        for env in assignments(rng):
            assert bool(evaluate_int(e, env)) is claim, (str(e), claim, env)


@CHECKED
@SEED
def test_prove_with_facts_claims_nothing_false(seed: int) -> None:
    rng = Random(seed)
    facts = [comparison(rng, 2) for _ in range(rng.randint(1, 3))]
    e = comparison(rng, 2)
    claim = Arith(RANGES, facts).prove(e)
    if claim is not None:
        for env in assignments(rng, 30):
            if all(evaluate_int(f, env) for f in facts):
                holds = bool(evaluate_int(e, env))
                assert holds is claim, ([str(f) for f in facts], str(e), claim, env)


@CHECKED
@SEED
def test_bound_is_a_bound(seed: int) -> None:
    rng = Random(seed)
    e = integers(rng, 3)
    over = rng.choice(((I,), (J,), (T,), (K, T), (I, J), (I, J, K, T)))
    arith = Arith(RANGES)
    for sign in (-1, 1):
        limit = arith.bound(e, over, sign)
        if limit is None:
            continue
        assert free_vars(limit).isdisjoint(over)
        for env in assignments(rng):
            got, most = evaluate_int(e, env), evaluate_int(limit, env)
            assert got * sign <= most * sign, (str(e), str(limit), over, sign, env)


@CHECKED
@SEED
def test_the_interval_holds_the_value(seed: int) -> None:
    rng = Random(seed)
    e = integers(rng, 3)
    arith = Arith(RANGES)
    low, high = arith.interval(arith.simplify(e))
    for env in assignments(rng):
        got = evaluate_int(e, env)
        assert (low is None or low <= got) and (high is None or got <= high), (str(e), low, high)


# ---- identities ---------------------------------------------------------------------------------
def below(extent: int | Expr) -> tuple[Expr, Expr]:
    return ZERO, (Const(extent) if isinstance(extent, int) else extent) - 1


A, B, F = Var("a"), Var("b"), Var("f")
X, Y = Var("x"), Var("y")
EQUAL: list[tuple[Expr, Expr]] = [
    ((A * 16 + B) // 16, A),
    ((A * 16 + B) % 16, B),
    ((A * 16 + B) // 4, A * 4 + B // 4),
    (B // 4 * 4 + B % 4, B),
    (F // N * N + F % N, F),
    (F // 3 // 4 * 12 + F // 3 % 4 * 3 + F % 3, F),
    ((X * 2 + Y) % 6, X % 3 * 2 + Y),
    ((X * 2 + Y) // 6, X // 3),
    (minimum(B, Const(20)), B),
    (maximum(B, ZERO), B),
    (select(B < 16, B, A), B),
    ((N * 8 + B % 8) // 8, N),
    ((X * N + F % N) // N, X),
    ((X * N + F % N) % N, F % N),
]


@pytest.mark.parametrize("pair", EQUAL, ids=lambda p: str(p[0]))
def test_equal_expressions_become_one(pair: tuple[Expr, Expr]) -> None:
    ranges = {A: below(1000), B: below(16), F: below(N * 12), X: below(9), Y: below(2)}
    arith = Arith(ranges)
    assert arith.simplify(pair[0]) is arith.simplify(pair[1])


TRUE_IN_RANGE: list[tuple[Expr, list[Expr]]] = [
    (A * 16 + B < 16000, []),
    (F // N < 12, []),
    (A * 16 + B < 1599, [A < 99]),
    ((A * 8 + B) // 3 // 4 < 3, [A * 8 + B < 36]),
    (A * 3 + B % 3 < 6, [A < 2]),
    (minimum(maximum(X - 2, 2 - X), 4 - maximum(X - 2, 2 - X)) >= 0, [X < 7]),
    (maximum(minimum(A - 7, Const(5)), ZERO) <= 5, []),
    (N // 8 * 8 + (N % 8 - 1) < N, []),
    ((N + 7) // 8 * 8 >= N, []),
    ((N + 7) // 8 * 8 < N + 8, []),
    (X * 4 + Y * 2 + B % 2 < 30, [X * 2 + Y < 15]),
]


@pytest.mark.parametrize("case", TRUE_IN_RANGE, ids=lambda c: str(c[0]))
def test_what_schedules_need_is_proved(case: tuple[Expr, list[Expr]]) -> None:
    ranges = {A: below(1000), B: below(16), F: below(N * 12), X: below(9), Y: below(2)}
    assert Arith(ranges, case[1]).prove(case[0]) is True


def test_bounds_are_tight_for_tiles() -> None:
    arith = Arith({A: below((N + 7) // 8), B: below(8), X: below(minimum(Const(8), N - A * 8))})
    assert arith.bound(A * 8 + B, (B,), 1) is arith.simplify(A * 8 + 7)
    assert arith.bound(B // 3, (B,), 1) is Const(2)
    assert arith.prove(A * 8 + X < N) is True
    # Blocks whose size is symbolic too.
    size = (N - 1) // M + 1
    arith = Arith({A: below((N + size - 1) // size), X: below(minimum(size, N - A * size))})
    assert arith.bound(A * size + X, (A, X), 1) is arith.simplify(N - 1)
    row = ((A * size + X) * 6 + 5) // M
    assert arith.bound(row, (A, X), 1) is arith.simplify((N * 6 - 1) // M)


def test_facts_about_ranges_do_not_go_round_in_circles() -> None:
    arith = Arith({A: below((N + 7) // 8), B: below(8)}, [A * 8 + B < N])
    assert arith.prove(A * 8 + B <= N - 1) is True
    assert arith.prove(all_of([eq(A, ZERO), A < 0])) is False


def test_facts_narrow_what_is_no_variable() -> None:
    n, i, k = Dim("n", 0, 99), Var("i"), Var("k")
    ranges = {i: (ZERO, Const(9)), k: (ZERO, Const(3))}
    high, low = (i - k) // 2, (k - i) // 3
    assert Arith(ranges).prove(high * 2 + low >= 0) is None
    assert Arith(ranges, [Const(0) <= high, Const(0) <= low]).prove(high * 2 + low >= 0) is True
    # n*6 - 6 > 0: n > 1
    assert Arith({}, [Const(0) < n * 6 - 6]).prove(n >= 2) is True
    assert Arith({}, [Const(0) < n * 6 - 6]).prove(n >= 3) is None
    # A product that is positive has no factor 0.
    assert Arith({}, [Const(0) < n * (n // 4)]).prove(n // 4 >= 1) is True
    assert Arith({}, [Const(0) < (n - 9) * (n // 4)]).prove(n // 4 >= 1) is None


def test_quotients_of_quotients_join_beside_multiples() -> None:
    """Points of fused axes reach a primitive in several forms, which must become one."""
    a, b = Var("a"), Var("b")
    arith = Arith({a: (Const(0), Const(4)), b: (Const(0), Const(90))})
    once = arith.simplify((a * 84 + b) // 81)
    assert arith.simplify((a * 84 + b) // 9 // 9) is once
    assert arith.simplify((a * 9 + (a * 3 + b) // 9) // 9) is once


def test_points_of_fused_axes_lie_below_the_product_of_their_sizes() -> None:
    h, w = (Dim(name) for name in "hw")
    for rows, columns in ((h, w), ((h + 1) // 2, w), ((h + 1) // 2, (w + 1) // 2)):
        point = (A * 404 + X) * 6 + B
        ranges = {A: (ZERO, (rows * columns + 2423) // 2424 - 1), X: below(404), B: below(6)}
        inside = [columns > ZERO, point // columns < rows, point // columns >= ZERO]
        assert Arith(ranges, inside).prove(point < rows * columns) is True
        assert Arith(ranges, inside).prove(point + 1 < rows * columns) is None


def test_points_of_fused_axes_whose_size_may_be_nothing() -> None:
    """A slice from `past` to the end has no rows where there are fewer; then nothing runs."""
    b, past, total = (Dim(name) for name in ("b", "past", "total"))
    rows = total - minimum(past, total)
    arith = Arith({I: (ZERO, b * rows - 1)}, [rows > ZERO])
    assert arith.prove(I // rows < b) is True
    assert arith.prove(I // rows + 1 < b) is None


def test_a_quotient_beside_another_one_of_it() -> None:
    """(x//3*8 + y)//5, whose canonical form is (x//3*3 + y)//5 + x//3."""
    x, y = Var("x"), Var("y")
    last = minimum(Const(8), 25 - x // 3 * 8) - 1
    arith = Arith({x: (ZERO, Const(11)), y: (ZERO, last)})
    assert arith.prove((x // 3 * 8 + y) // 5 < 5) is True
    assert arith.prove((x // 3 * 8 + y) // 5 < 4) is None


def test_all_iterations_but_the_last_stay_inside_fused_axes() -> None:
    """32 elements each of (3, n, 4), of which the last iteration alone asks which ones exist."""
    i = Var("i")
    arith = Arith({A: (ZERO, (N * 3 + 7) // 8 - 2), B: below(32)})
    assert arith.prove(i % 3 * 3 + (A * 32 + B) // (N * 4) < 9) is True
    assert arith.prove(i % 3 * 3 + (A * 32 + B) // (N * 4) < 8) is None


def test_a_product_of_sizes_less_one_is_positive() -> None:
    h, w, i = Dim("h", 2), Dim("w", 2), Var("i")
    rows, columns = h - 1, w - 1
    arith = Arith({i: below(N * rows * columns)})
    assert arith.prove(i // columns // rows < N) is True
    assert arith.prove(i // columns // rows + 1 < N) is None
    assert Arith().prove(h * w - h - w >= ZERO) is True
    assert Arith().prove(h * w - h - w >= 1) is None
    assert Arith({X: below(3)}).prove(N * 24 - N * X * 12 + 4 > 3) is True
    assert Arith({X: below(4)}).prove(N * 24 - N * X * 12 + 4 > 3) is None


def test_quotients_by_one_divisor_compare_as_dividends_do() -> None:
    last = (N * M + 15) // 16 * 16 - 1
    arith = Arith({A: below((N * M + 15) // 16), B: below(16)})
    assert arith.prove(last // N >= (A * 16 + B) // N) is True
    assert arith.prove(last // N > (A * 16 + B) // N) is None


@SEED
def test_lanes_leave_comparisons_of_whole_steps(seed: int) -> None:
    """The value for every assignment; a lane is left out where it cannot matter."""
    rng = Random(seed)
    step, lanes, start = rng.choice([3, 8, 16]), rng.choice([1, 2, 8, 16]), rng.randint(-20, 20)
    limit, op = rng.randint(-30, 160), rng.choice(["lt", "le"])
    arith = Arith({I: below(9), J: below(lanes)})
    cond = binary(op, I * step + J * rng.choice([1, -1]) + start, Const(limit))
    made = arith.simplify(cond)
    values = {(i, j): evaluate_int(cond, {"i": i, "j": j}) for i in range(9) for j in range(lanes)}
    assert values == {(i, j): evaluate_int(made, {"i": i, "j": j}) for i, j in values}
    if lanes <= step and all(len({values[i, j] for j in range(lanes)}) == 1 for i in range(9)):
        assert J not in free_vars(made)


def test_facts_times_sizes() -> None:
    """Where align_corners takes the last pixel from: (n - 1) * x // (2n - 1) with x < 2n."""
    x = A * 8 + B % 8
    arith = Arith({A: below((N + 3) // 4), B: below(16)}, [x < N * 2])
    assert arith.prove(x * (N - 1) // (N * 2 - 1) < N) is True
    assert arith.prove(x * (N - 1) // (N * 2 - 1) + 1 < N) is None


def test_a_third_of_a_size_lies_below_it() -> None:
    """The first of three parts, flattened."""
    arith = Arith({I: (ZERO, (M + 2) // 3 * N - 1)})
    assert arith.prove(I // N < M) is True
    assert arith.prove(I // N + 2 < M) is None
    # x // 4 is at most x / 4, but -x // 4 is not: the factor beside it may have either sign.
    arith = Arith({I: below(8), J: (Const(-20), Const(-10))})
    assert arith.prove(J * 4 * (I // 4) >= J * I) is None


def test_quotients_by_sums() -> None:
    """What a flattened and unfolded axis leads to: the sum of several terms divides exactly, or
    all but what is smaller than it."""
    b, t, i, j = Dim("b", 1, None), Dim("t", 1, None), Var("i"), Var("j")
    arith = Arith({i: (ZERO, b - 1), j: (ZERO, t)})
    assert arith.simplify((b * 384 + b * t * 384) // (b * 64 + b * t * 64)) is Const(6)
    assert arith.simplify((b * t + b) % (t + 1)) is Const(0)
    assert arith.simplify((i * (t + 1) + j) // (t + 1)) is i
    assert arith.simplify((i * (t + 1) + j) % (t + 1)) is j
    left_alone = arith.simplify((i * t) // (t + 1))
    assert evaluate_int(left_alone, {"i": 5, "t": 3}) == 15 // 4


# ---- questions whose answer is no ---------------------------------------------------------------
def steps_of_search(monkeypatch: pytest.MonkeyPatch, ask: Callable[[], object]) -> int:
    """How many polynomials are searched for a proof while something is asked."""
    steps = 0
    proved = Prover._proved

    def counted(self: Prover, arith: Arith, p: Poly, depth: int) -> bool:
        nonlocal steps
        steps += 1
        return proved(self, arith, p, depth)

    with monkeypatch.context() as m:
        m.setattr(Prover, "_proved", counted)
        ask()
    return steps


def test_a_pixel_beyond_one_line_is_refuted_without_a_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    h, w = Dim("h", 1, None), Dim("w", 1, None)
    for _ in range(5):
        h, w = (h + 1) // 2, (w + 1) // 2
    block, pixel = Var("block"), Var("pixel")
    ranges = {block: (ZERO, (h * w + 5) // 6 - 1), pixel: (ZERO, Const(5))}
    arith = Arith(ranges, [h > ZERO, w > ZERO, block * 6 + pixel < h * w])
    claim = block * 6 + pixel < w
    assert steps_of_search(monkeypatch, lambda: arith.prove(claim)) == 0
    assert arith.prove(claim) is None


@pytest.mark.parametrize("pieces", [4, 40])
def test_positions_from_data_are_refuted_without_a_search(
    monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    total: Expr = ZERO
    for k in range(pieces):
        total = total + minimum(Dim(f"n{k}", 0, 200), 100)
    position = Load(Buffer("positions", int64, (Const(9),)), (Var("i"),))
    clamped = maximum(minimum(position, total - 1), ZERO)
    arith = Arith({Var("i"): (ZERO, Const(8))})
    assert steps_of_search(monkeypatch, lambda: arith.simplify(clamped)) == 0


def test_a_position_within_one_of_several_counted_pieces_is_found_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def steps(pieces: int) -> int:
        starts: list[Expr] = [ZERO]
        for k in range(pieces):
            starts.append(starts[-1] + minimum(Dim(f"n{k}", 0, 50), 10))
        position = Load(Buffer("positions", int64, (Const(9),)), (Var("i"),))
        at = maximum(minimum(position, starts[-1] - 1), ZERO)
        arith = Arith({Var("i"): (ZERO, Const(8))}, [start <= at for start in starts[1:-1]])
        last = at - starts[-2]
        assert arith.holds(last >= ZERO)
        return steps_of_search(monkeypatch, lambda: arith.holds(last < 50))

    few, many = steps(8), steps(16)
    assert few > 0 and many <= 2 * few


def test_a_claim_about_many_counted_pieces_is_not_taken_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each minimum would be two cases."""
    sizes = [minimum(Dim(f"n{k}", 0, 50), Dim(f"m{k}", 0, 50)) for k in range(40)]
    total: Expr = ZERO
    for k, n in enumerate(sizes):
        total = total + n * (k % 3 - 1)
    arith = Arith({}, [total > ZERO])
    assert arith.prove(total * 2 > sizes[0]) is None
    assert steps_of_search(monkeypatch, lambda: arith.prove(total * 2 > sizes[1])) <= 4


def test_what_holds_is_what_is_proved_to_hold() -> None:
    n, i = Dim("n", 1, 64), Var("i")
    arith = Arith({i: (ZERO, n - 1)})
    for claim in (i < n, i <= n, n < i, i < 3, i >= ZERO, eq(i, n), (i < n) & (i >= ZERO)):
        assert arith.holds(claim) is (arith.prove(claim) is True)


def test_an_index_into_one_of_many_counted_pieces_is_proved_to_fit() -> None:
    sizes = [minimum(Dim(f"n{k}", 0, 300), 40) for k in range(40)]
    total = sizes[0]
    for n in sizes[1:]:
        total = total + n
    part, lane, i = Var("part"), Var("lane"), Var("i")
    arith = Arith({
        part: (ZERO, sizes[0] // 16 - 1), lane: (ZERO, Const(15)), i: (ZERO, total - 1),
    })  # fmt: skip
    assert arith.prove(i < total) is True
    assert arith.prove(part * 16 + lane < total) is True
    assert arith.prove(part * 16 + lane + 1 < total) is None  # all the other pieces may be empty


def test_what_was_found_out_is_kept_for_one_kernel() -> None:
    """And only for who knows the same."""
    i, j, n = Var("i"), Var("j"), Dim("n", 1, 64)
    ranges = {i: (ZERO, n - 1), j: (ZERO, Const(7))}
    with keeping():
        first = knowing(ranges)
        assert knowing(dict(ranges)) is first
        assert knowing({i: ranges[i]}) is not first
        some = knowing(ranges, [i < 3])
        assert some is not first and knowing(ranges, [i < 3]) is some
        assert (first.prove(i < 3), some.prove(i < 3)) == (None, True)
        with keeping():
            assert knowing(ranges) is not first
        assert knowing(ranges) is first
    assert knowing(ranges) is not first
