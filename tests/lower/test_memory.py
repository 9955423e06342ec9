"""The memory plan: live buffers never overlap, memory is reused, aliases share it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicompiler.errors import InternalError
from minicompiler.ir.arith import Arith, evaluate_int
from minicompiler.ir.expr import ZERO, Const, Dim, Expr, maximum, wrap
from minicompiler.ir.graph import Apply, Constant, Function, Input, Item, NoAttrs, Value, type_of
from minicompiler.ir.layout import IndexMap
from minicompiler.ir.types import TensorType, float32, int32
from minicompiler.lower.memory import Alias, KernelCall, plan_memory
from minicompiler.lower.places import ALIGN, Lifetime, largest, place
from minicompiler.runtime.plan import Location, Plan, evaluate

N, M, K = Dim("n", 1, 64), Dim("m", 0, None), Dim("k", 8, None, 8)


@st.composite
def sizes(draw: st.DrawFn) -> Expr:
    """Bytes of a buffer: constant, or depending on dimensions in the ways that models have."""
    c = draw(st.sampled_from([1, 4, 12, 64, 100, 256, 4000]))
    forms = [
        wrap(draw(st.integers(0, 5000))),
        N * c,
        M * c + 4,
        N * M * c,
        K * K * 4,
        (N + 15) // 16 * c,
        maximum(N * c, K),
        (M + 1) // 2 * (N + 2) * c,
    ]
    return draw(st.sampled_from(forms))


@st.composite
def lifetimes(draw: st.DrawFn) -> Lifetime:
    start = draw(st.integers(0, 12))
    return Lifetime(start, start + draw(st.integers(0, 5)), draw(sizes()))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(lifetimes(), max_size=14),
    st.lists(
        st.tuples(st.integers(1, 64), st.integers(0, 300), st.integers(1, 40)),
        min_size=1,
        max_size=5,
    ),
)
def test_live_buffers_never_overlap(
    buffers: list[Lifetime], samples: list[tuple[int, int, int]]
) -> None:
    placement = place(buffers)
    for n, m, k in samples:
        env = {"n": n, "m": m, "k": 8 * k}
        sizes = [evaluate_int(b.size, env) for b in buffers]
        for name, value in placement.named:
            env[name.name] = evaluate_int(value, env)
        offsets = [evaluate_int(e, env) for e in placement.offsets]
        total = evaluate_int(placement.total, env)
        for i, a in enumerate(buffers):
            assert offsets[i] >= 0
            assert offsets[i] % ALIGN == 0
            assert offsets[i] + sizes[i] <= total
            for j, b in enumerate(buffers[:i]):
                if a.start <= b.end and b.start <= a.end:
                    assert (
                        offsets[i] + sizes[i] <= offsets[j] or offsets[j] + sizes[j] <= offsets[i]
                    )


@given(st.lists(st.builds(Lifetime, st.just(0), st.just(1), st.integers(0, 999).map(Const))))
def test_constant_offsets_are_numbers_without_gaps(buffers: list[Lifetime]) -> None:
    placement = place(buffers)
    assert placement.named == ()
    sizes = [evaluate_int(b.size, {}) for b in buffers]
    assert placement.total is Const(sum(-(-s // 64) * 64 for s in sizes))


def test_a_gap_is_used() -> None:
    # The large one in the middle is gone when the small one of step 2 comes.
    buffers = [Lifetime(0, 3, Const(512)), Lifetime(0, 1, Const(256)), Lifetime(1, 3, Const(128)),
               Lifetime(2, 3, Const(192))]  # fmt: skip
    assert [str(o) for o in place(buffers).offsets] == ["0", "512", "768", "512"]


def test_sizes_in_one_dimension_are_packed_like_constants() -> None:
    chain = [Lifetime(i, i + 1, N * c) for i, c in enumerate((4000, 8192, 2048, 4000, 2048))]
    placement = place(chain)
    assert placement.named == ()
    assert evaluate_int(placement.total, {"n": 10}) == 10 * (8192 + 4032)


def test_a_thousand_layers_take_little_time() -> None:
    chain = [Lifetime(i, i + 1 + i % 3, N * M * (64 + i % 7 * 32)) for i in range(1000)]
    assert evaluate_int(place(chain).total, {"n": 1, "m": 1}) <= 6 * 256


# ---- plans --------------------------------------------------------------------------------------
def tensor(*shape: Expr | int) -> TensorType:
    return TensorType(tuple(map(wrap, shape)), float32)


def node(*types: TensorType, layout: IndexMap | None = None) -> Apply:
    """Some value that a kernel makes."""
    made = types if len(types) > 1 else types[0]
    op = Function("fused", (), (), fused=True)
    return Apply(op, (), NoAttrs(), made, layouts=(layout,) * len(types))


def call(
    kernel: str, args: Sequence[Value | np.ndarray], *results: Value, local: Expr = ZERO
) -> KernelCall:
    return KernelCall(kernel, tuple(args), results, (N,), ZERO, local)


X = Input("x", tensor(N, 16))


def plan(results: Sequence[Value], *steps: KernelCall | Alias) -> tuple[Plan, list[np.ndarray]]:
    return plan_memory(Function("f", (X,), tuple(results)), steps)


def test_places_of_a_chain() -> None:
    w = np.ones(3, np.float32)
    a, b, c = node(tensor(N, 16)), node(tensor(N, 16)), node(tensor(N, 4))
    got, constants = plan(
        [c],
        call("k0", [X, w, Constant(w)], a),
        call("k1", [a, Constant(w.copy())], b, local=N * 64),
        call("k2", [b, w], c, local=Const(128)),
    )
    assert [x is w for x in constants] == [True, False]
    zero: Location = ("arena", 0)
    above: Location = ("arena", ("mul", "n", 64))
    assert [c.args for c in got.calls] == [
        (("input", 0), ("constant", 0), ("constant", 0), zero),
        (zero, ("constant", 1), above),
        (above, ("constant", 0), ("output", 0)),
    ]
    assert got.results == (("output", 0),)
    assert evaluate(got.arena, {"n": 3}) == 3 * 128
    assert [evaluate(got.local, {"n": n}) for n in (1, 9)] == [128, 576]
    assert (got.dims[0].name, got.dims[0].hi, got.binds[0].axis) == ("n", 64, 0)


def test_an_alias_shares_and_stays_alive() -> None:
    a, view, b, c = node(tensor(N, 16)), node(tensor(N * 16)), node(tensor(N, 16)), node(tensor(N))
    flat_x, out = node(tensor(N * 16)), node(tensor(N, 1))
    got, _ = plan(
        [out, c],
        Alias(X, flat_x),
        call("k0", [flat_x], a),
        Alias(a, view),
        call("k1", [a], b),
        call("k2", [view, b], c),
        Alias(c, out),
    )
    k0, k1, k2 = (c.args for c in got.calls)
    assert k0[0] == ("input", 0)
    assert k1[0] == k2[0] == k0[1]
    assert k1[1] != k0[1]
    assert k2[2] == ("output", 0)
    assert got.results == (("output", 0), ("output", 0))


def test_results_that_no_kernel_writes() -> None:
    a, k = node(tensor(N), tensor(N)), Constant(np.ones(3, np.float32))
    got, _ = plan([Item(a, 1), X, k, Item(a, 1)], call("k0", [X], Item(a, 0), Item(a, 1)))
    assert got.results == (("output", 0), ("input", 0), ("constant", 0), ("output", 0))
    assert got.calls[0].args == (("input", 0), ("arena", 0), ("output", 0))


def test_a_layout_counts_with_its_padding() -> None:
    blocked = IndexMap.blocked(2, 1, 16)
    a, b = node(tensor(4, 17), layout=blocked), node(tensor(4, 17))
    got, _ = plan([b], call("k0", [X], a), call("k1", [a], b))
    assert got.arena == 4 * 32 * 4


def test_steps_that_do_not_fit_are_refused() -> None:
    a, b = node(tensor(N, 16)), node(tensor(N * 16))
    blocked = node(tensor(N, 16), layout=IndexMap.blocked(2, 1, 16))
    cases: list[tuple[str, list[Value], list[KernelCall | Alias]]] = [
        ("used before", [a], []),
        ("used before", [a], [call("k", [b], a)]),
        ("made twice", [a], [call("k", [X], a), call("k", [X], a)]),
        ("made twice", [a], [call("k", [X], a), Alias(X, a)]),
        ("another dtype", [a], [Alias(X, node(TensorType(type_of(X).shape, int32)))]),
        ("input data under another shape", [b], [Alias(X, b)]),
        ("constant data", [b], [Alias(Constant(np.ones(3, np.float32)), b)]),
        ("must be row-major", [blocked], [call("k", [X], blocked)]),
        ('no axis of an input is dimension "m"', [node(tensor(M))], []),
        ('two dimensions are called "n"', [node(tensor(Dim("n", 1, 2)))], []),
    ]
    for phrase, results, steps in cases:
        if not steps and "used" not in phrase:
            steps = [call("k", [X], results[0])]
        with pytest.raises(InternalError, match=phrase):
            plan(results, *steps)


def test_the_largest_of_many_sizes_is_searched_among_few_pairs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sizes that halve an image a few times are compared at samples only."""
    asked: list[Expr] = []
    holds = Arith.holds

    def counted(self: Arith, cond: Expr) -> bool:
        asked.append(cond)
        return holds(self, cond)

    monkeypatch.setattr(Arith, "holds", counted)
    h, w = Dim("h", 33, None), Dim("w", 33, None)
    sizes: list[Expr] = []
    for k in range(12):
        sizes.append(h * w * (k + 1))  # each is below the next one
        h, w = ((h + 1) // 2, (w + 1) // 2) if k % 4 == 3 else (h, w)
    found = largest(sizes)
    assert len(asked) < len(sizes)
    for env in ({"h": 33, "w": 500}, {"h": 64, "w": 33}, {"h": 1000, "w": 999}):
        assert evaluate_int(found, env) == max(evaluate_int(s, env) for s in sizes)
