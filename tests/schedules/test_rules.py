"""Law 7: every point of a rule's space verifies or is refused, a sample computes the right answer.
Names never matter to a rule, and every rule serves several operators."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import numpy as np
import pytest
from documented_kernels import attention
from hypothesis import given, settings
from hypothesis import strategies as st
from tir_samples import SAMPLES, Sample, matmul_of, product, relu, softmax_of, tensor
from tolerance import assert_close

import minicompiler.ops  # noqa: F401
from minicompiler import te
from minicompiler.errors import InternalError, ScheduleError
from minicompiler.ir.arith import Arith
from minicompiler.ir.expr import Dim, Expr, Load, Var, maximum, rewrite, substitute
from minicompiler.ir.layout import IndexMap
from minicompiler.ir.op import REGISTRY
from minicompiler.ir.tir import (
    Alloc,
    Block,
    Buffer,
    For,
    PrimFunc,
    Stmt,
    Store,
    map_exprs,
    map_statements,
    statements,
)
from minicompiler.ir.types import DType, float32, int32
from minicompiler.ir.verify_tir import verify_tir
from minicompiler.lower.to_tir import from_tensors
from minicompiler.ops.conv import ConvAttrs
from minicompiler.ops.pool import PoolAttrs
from minicompiler.ops.reduce import ArgAttrs, AxisAttrs, ReduceAttrs
from minicompiler.schedules.cpu import RULES, Rule, schedule
from minicompiler.target import Target

AVX512, AVX2, SSE = (Target.parse(f"cpu:{n}") for n in ("avx512", "avx2", "sse"))
NCHW8C = IndexMap.blocked(4, 1, 8)
SAME = {"pads_begin": (1, 1), "pads_end": (1, 1)}


# ---- functions ----------------------------------------------------------------------------------
def operator(
    name: str,
    shapes: list[tuple[int | Expr, ...]],
    attrs: Any = None,
    which: str = "direct",
    layouts: Mapping[int, IndexMap] | None = None,
    then_relu: bool = False,
    dtype: DType = float32,
) -> PrimFunc:
    """One operator of the registry on tensors of one type; layouts: by argument, -1 is the result.
    All but the first argument are constants."""
    op = REGISTRY[name]
    args = [tensor(f"x{k}", *s, dtype=dtype) for k, s in enumerate(shapes)]
    compute = next(c for c in op.computes if c.name == which)
    made = compute.build(*args, op.attrs() if attrs is None else attrs)
    result = made[0] if isinstance(made, tuple) else made
    result = relu(result) if then_relu else result
    held = {(result if k < 0 else args[k]): m for k, m in (layouts or {}).items()}
    return from_tensors(name, args, [result], args[1:], held)


def conv(groups: int = 1, channels: int = 8, **kwargs: Any) -> PrimFunc:
    shapes: list[tuple[int | Expr, ...]] = [(1, 8, 4, 7), (channels, 8 // groups, 3, 3)]
    return operator("conv", shapes, ConvAttrs(groups=groups, **SAME), **kwargs)


def grouped(block: int) -> PrimFunc:
    """Two groups of 8 channels, in blocks of so many."""
    shapes: list[tuple[int | Expr, ...]] = [(1, 16, 4, 7), (16, 8, 3, 3)]
    layout = IndexMap.blocked(4, 1, block)
    return operator("conv", shapes, ConvAttrs(groups=2, **SAME), layouts={0: layout, -1: layout})


def winograd(
    m: int, sizes: tuple[int | Expr, ...], kernel: tuple[int, ...], in_pairs: bool = False,
    groups: int = 1, block: int = 8,
) -> PrimFunc:  # fmt: skip
    """Of groups of 8 channels; the border keeps the size."""
    shapes: list[tuple[int | Expr, ...]] = [(1, 8 * groups, *sizes), (8 * groups, 8, *kernel)]
    layout = IndexMap.blocked(2 + len(sizes), 1, block)
    border = tuple(k // 2 for k in kernel)
    attrs = ConvAttrs(pads_begin=border, pads_end=border, in_pairs=in_pairs, groups=groups)
    held = {0: layout, -1: layout}
    if not in_pairs:
        return operator("conv", shapes, attrs, f"winograd{m}", held)
    return operator("conv", shapes, attrs, f"winograd{m}_pairs", held, dtype=int32)


def recurrence(name: str, gates: int) -> PrimFunc:
    """lstm or gru over three steps, without biases, peepholes or lengths."""
    op, hidden = REGISTRY[name], 9
    x, r = tensor("x", 3, 2, gates * hidden), tensor("r", gates, hidden, hidden)
    names = ("sigmoid", "tanh", "tanh")[: gates - 1]
    zeros = (0.0,) * len(names)
    results = op.computes[0].build(x, r, *[None] * 4, op.attrs(names, zeros, zeros))
    return from_tensors(name, [x, r], results, [r])


def two_products() -> PrimFunc:
    a, b, c = tensor("a", 5, 6), tensor("b", 6, 7), tensor("c", 7, 4)
    return from_tensors("two_products", [a, b, c], [product(product(a, b), c)])


def normalised_products() -> PrimFunc:
    """Rows of a product, divided by their largest absolute sums, weight those of another."""
    a, b, c = tensor("a", 9, 12), tensor("b", 12, 21), tensor("c", 21, 19)
    x = te.map_elements(lambda e: maximum(e, -e), product(a, b))
    return from_tensors("normalised", [a, b, c], [product(x / te.sum(x, -1), c)])


def normalised_channels(axes: tuple[int, ...], *shape: int | Expr) -> PrimFunc:
    """Less its mean over some axes, divided by its deviation over them."""
    x = tensor("x", *shape)
    count = te.sum(te.map_elements(lambda e: e * 0.0 + 1.0, x), axes)
    d = x - te.sum(x, axes) / count
    deviation = te.sqrt(te.sum(d * d, axes) / count + 1e-5)
    return from_tensors("normalised", [x], [d / deviation])


LENGTH = 128
BIG: dict[str, Callable[[], Sample]] = {
    "matmul_big": lambda: Sample(matmul_of(13, 40, 35)),
    "matmul_dynamic_big": lambda: Sample(matmul_of(Dim("n", 1, 64), 18, 35), {"n": 11}),
    "matmul_row": lambda: Sample(matmul_of(1, 40, 35)),
    "two_products": lambda: Sample(two_products()),
    "conv_plain": lambda: Sample(conv(channels=5)),
    "conv_blocked": lambda: Sample(conv(layouts={0: NCHW8C, -1: NCHW8C}, then_relu=True)),
    "conv_depthwise": lambda: Sample(conv(groups=8, layouts={0: NCHW8C, -1: NCHW8C})),
    "conv_groups": lambda: Sample(grouped(8)),
    "conv_groups_in_a_block": lambda: Sample(grouped(16)),
    "winograd_groups": lambda: Sample(winograd(2, (4, 4), (3, 3), groups=2)),
    "winograd_groups_in_a_block": lambda: Sample(winograd(2, (4, 4), (3, 3), groups=2, block=16)),
    "winograd_groups_volume": lambda: Sample(winograd(2, (3, 3, 4), (3, 3, 3), groups=2, block=16)),
    "winograd_groups_dynamic": lambda: Sample(
        winograd(2, (Dim("h", 1, 64), 4), (3, 3), groups=3), {"h": 5}
    ),
    "winograd2": lambda: Sample(winograd(2, (4, 4), (3, 3))),
    "winograd4": lambda: Sample(winograd(4, (5, 5), (3, 3))),
    "winograd_pairs": lambda: Sample(winograd(4, (5, 5), (3, 3), True)),
    "winograd_volume": lambda: Sample(winograd(2, (3, 3, 4), (3, 3, 3))),
    "winograd_planes": lambda: Sample(winograd(2, (3, 4, 4), (1, 3, 3))),
    "winograd_column": lambda: Sample(winograd(4, (5, 3), (3, 1))),
    "winograd_line": lambda: Sample(winograd(2, (9,), (3,))),
    "winograd_dynamic": lambda: Sample(
        winograd(2, (Dim("h", 1, 64), Dim("w", 1, 64)), (3, 3)), {"h": 5, "w": 3}
    ),
    "attention": lambda: Sample(attention(7, 21, 2, 8)),
    "attention_tails": lambda: Sample(attention(3, 35, 1, 12)),
    "attention_one_row": lambda: Sample(attention(1, 37, 3, 16)),
    "attention_dynamic": lambda: Sample(
        attention(Dim("n", 1, 64), Dim("m", 1, 64), 2, 8, Dim("b", 1, 8)),
        {"n": 7, "m": 18, "b": 2},
    ),
    "normalised_products": lambda: Sample(normalised_products()),
    "softmax_big": lambda: Sample(softmax_of(5, 45)),
    "softmax_of_columns": lambda: Sample(operator("softmax", [(2, 9, 35)], AxisAttrs(1))),
    "softmax_of_long_columns": lambda: Sample(operator("softmax", [(6, 1300)], AxisAttrs(0))),
    "softmax_of_points": lambda: Sample(operator("softmax", [(2, 3, 40, 41)], AxisAttrs(1))),
    "log_softmax_of_columns_dynamic": lambda: Sample(
        operator("log_softmax", [(Dim("n", 1, 64), 5, Dim("m", 1, 4096))], AxisAttrs(1)),
        {"n": 2, "m": 519},
    ),
    "normalised_channels": lambda: Sample(normalised_channels((1,), 2, 5, 4, 19)),
    "normalised_pixels": lambda: Sample(normalised_channels((1, 2), 2, 3, 5, 19)),
    "max_pool": lambda: Sample(
        operator("max_pool", [(1, 8, 6, 6)], PoolAttrs(kernel=(2, 2), strides=(2, 2)))
    ),
    "max_pool_blocked": lambda: Sample(
        operator(
            "max_pool",
            [(1, 8, 5, 9)],
            PoolAttrs(kernel=(3, 3), strides=(1, 2), **SAME),
            layouts={0: NCHW8C, -1: NCHW8C},
        )
    ),
    "max_pool_dynamic": lambda: Sample(  # of one column, which is all border
        operator("max_pool", [(2, 1, Dim("n", 1, 64))], PoolAttrs((3,), (), (1,), (1,))), {"n": 1}
    ),
    "conv_one_pixel": lambda: Sample(  # 4 * 5 weights of a channel are no whole vectors
        operator("conv", [(1, 4, 1), (4, 4, 5)], ConvAttrs((), (2,), (2,)))
    ),
    "sum_of_columns_dynamic": lambda: Sample(
        operator(
            "reduce_sum",
            [(Dim("n", 1, 64), Dim("m", 1, 64), Dim("k", 1, 64))],
            ReduceAttrs((1,), False),
        ),
        {"n": 2, "m": 9, "k": 11},
    ),
    "argmax_dynamic": lambda: Sample(
        operator("argmax", [(2, Dim("n", 1, 64))], ArgAttrs(1, False, True)), {"n": 19}
    ),
    "lstm": lambda: Sample(recurrence("lstm", 4)),
    "gru": lambda: Sample(recurrence("gru", 3)),
    "exp": lambda: Sample(operator("exp", [(3, 4, 9)])),
}
CASES: dict[str, Callable[[], Sample]] = {**SAMPLES, **BIG}
case = functools.cache(lambda name: CASES[name]())
wanted = functools.cache(lambda name: case(name).run())


def right(name: str, func: PrimFunc) -> None:
    """Computes what the unscheduled function does."""
    for got, want in zip(case(name).run(func), wanted(name), strict=True):
        assert_close(got, want, LENGTH, largest=max(1.0, float(np.abs(want).max())))


# ---- law 7 --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CASES)
def test_the_default_is_right(name: str) -> None:
    for target in (AVX2, SSE):
        s = schedule(case(name).func, target, after_step=verify_tir)
        verify_tir(s.func, finished=True)
    right(name, s.func)


@pytest.mark.parametrize("name", CASES)
def test_vectors_may_be_wider(name: str) -> None:
    """Than the blocks and groups that they are made of."""
    verify_tir(schedule(case(name).func, AVX512).func, finished=True)


@functools.cache
def space(name: str, target: Target) -> dict[str, tuple[Any, ...]]:
    """The decisions that the rule asks for, with their options."""
    return {c.name: c.options for c in schedule(case(name).func, target).choices}


@pytest.mark.parametrize("name", CASES)
def test_every_point_verifies(name: str) -> None:
    if not space(name, AVX2):
        return

    @settings(max_examples=8, derandomize=True, deadline=None, database=None)
    @given(st.integers(0, 2**32 - 1))
    def check(seed: int) -> None:
        rng = Random(seed)
        target = rng.choice((AVX2, SSE))
        decisions = {n: rng.choice(options) for n, options in space(name, target).items()}
        try:
            s = schedule(case(name).func, target, decisions)
        except ScheduleError:
            return
        verify_tir(s.func, finished=True)
        if rng.randint(0, 3) == 0:
            right(name, s.func)

    check()


def test_decisions_that_are_no_option_are_refused() -> None:
    with pytest.raises(ScheduleError, match="choice rows = 99"):
        schedule(matmul_of(13, 40, 35), AVX2, {"rows": 99})


def test_a_rule_that_fails_is_a_mistake_of_the_compiler() -> None:
    rule = Rule("hasty", lambda s: True, lambda s: s.mark("k0", "vector"))
    with pytest.raises(InternalError, match="schedule rule 'hasty' failed: mark") as caught:
        schedule(matmul_of(5, 7, 6), AVX2, rules=(rule,))
    assert ">" in caught.value.excerpt and "report" in caught.value.hint


# ---- names --------------------------------------------------------------------------------------
def renamed(func: PrimFunc, name: Callable[[str, int], str]) -> PrimFunc:
    """`func` with every name replaced by name(kind, number); numbers count in program order."""
    variables: dict[Expr, Expr] = {}
    buffers: dict[Buffer, Buffer] = {}
    blocks: dict[str, str] = {}

    def buffer(b: Buffer) -> Buffer:
        return buffers.setdefault(b, b.with_(name=name("b", len(buffers))))

    for b in (*func.params, *func.buffers):
        buffer(b)
    for s in statements(func):
        if isinstance(s, For):
            variables.setdefault(s.var, Var(name("i", len(variables))))
        elif isinstance(s, Alloc):
            buffer(s.buffer)
        elif isinstance(s, Block):
            blocks.setdefault(s.name, name("s", len(blocks)))
            for i in s.iters:
                variables.setdefault(i.var, Var(name("i", len(variables))))

    def load(e: Expr) -> Expr | None:
        return Load(buffers[e.buffer], e.indices, e.mask) if type(e) is Load else None

    def store(s: Store) -> Store:
        return s.with_(buffer=buffers[s.buffer])

    def one(s: Stmt) -> Stmt | None:
        if isinstance(s, For):
            return s.with_(var=variables[s.var])
        if isinstance(s, Alloc):
            return s.with_(buffer=buffers[s.buffer])
        if isinstance(s, Store):
            return store(s)
        if isinstance(s, Block):
            iters = tuple(i.with_(var=variables[i.var]) for i in s.iters)
            init = None if s.init is None else store(s.init)
            return s.with_(name=blocks[s.name], iters=iters, init=init, body=store(s.body))
        return None

    def expression(e: Expr) -> Expr:
        return Arith().simplify(substitute(rewrite(e, load), variables))

    phases = tuple(map_statements(map_exprs(p, expression), one) for p in func.phases)
    return func.with_(
        name=name("f", 0),
        params=tuple(map(buffer, func.params)),
        buffers=tuple(map(buffer, func.buffers)),
        phases=phases,
    )


def plain(func: PrimFunc) -> str:
    """The text of a function up to names."""
    return str(renamed(func, lambda kind, k: f"{kind}{k}"))


SCRAMBLES: dict[str, Callable[[str, int], str]] = {
    "reversed": lambda kind, k: f"{kind}{900 - k}",
    "shuffled": lambda kind, k: f"{'zqa'[k % 3]}{kind}{k * 37 % 101}_{k}",
}


@pytest.mark.parametrize("scramble", SCRAMBLES)
@pytest.mark.parametrize("name", CASES)
def test_names_do_not_matter(name: str, scramble: str) -> None:
    func = case(name).func
    other = renamed(func, SCRAMBLES[scramble])
    assert plain(other) == plain(func)
    a, b = schedule(renamed(func, lambda kind, k: f"{kind}{k}"), AVX2), schedule(other, AVX2)
    assert a.rule == b.rule
    assert a.choices == b.choices
    assert [s.primitive for s in a.steps] == [s.primitive for s in b.steps]
    assert plain(a.func) == plain(b.func)


# ---- rules --------------------------------------------------------------------------------------
@pytest.mark.parametrize("rule", [r.name for r in RULES])
def test_a_rule_serves_several_operators(rule: str) -> None:
    served = {name for name in CASES if schedule(case(name).func, AVX2).rule == rule}
    assert len(served) >= 2, f"{rule} serves only {served}"
