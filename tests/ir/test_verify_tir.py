"""Each rule of the TIR verifier fails on a function made up to break it, and on no right one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tir_samples import SAMPLES

from minicompiler.errors import VerifyError
from minicompiler.ir.expr import (
    TRUE,
    ZERO,
    Cast,
    Const,
    Dim,
    Expr,
    Load,
    Var,
    binary,
    const,
    maximum,
    minimum,
    select,
)
from minicompiler.ir.layout import IndexMap
from minicompiler.ir.tir import (
    PARALLEL,
    SERIAL,
    UNROLL,
    VECTOR,
    Alloc,
    Block,
    Buffer,
    For,
    If,
    Iter,
    LoopKind,
    PrimFunc,
    Scope,
    Stmt,
    Store,
    seq,
)
from minicompiler.ir.types import float32, int32, int64
from minicompiler.ir.verify_tir import verify_tir

I, J, K, V, W = (Var(x) for x in ("i", "j", "k", "v", "w"))
X = Buffer("x", float32, (Const(8), Const(4)))
Y = Buffer("y", float32, (Const(8), Const(4)))
AT = Buffer("at", int64, (Const(8),))
TILE = Buffer("t", float32, (Const(4),), Scope.REGISTER)
LOCAL = Buffer("l", float32, (Const(4),), Scope.LOCAL)


def func(*phases: Stmt, results: int = 1, params: tuple[Buffer, ...] = (X, AT, Y)) -> PrimFunc:
    return PrimFunc("f", params, results, (), (), phases)


def loops(body: Stmt, i: int = 8, j: int = 4, kind: LoopKind = SERIAL) -> Stmt:
    return For(I, Const(i), SERIAL, For(J, Const(j), kind, body))


def block(
    name: str = "b",
    v: Expr = I,
    w: Expr = J,
    where: Expr = TRUE,
    value: Expr | None = None,
    at: tuple[Expr, ...] = (V, W),
) -> Block:
    """y[v, w] = x[v, w] unless told otherwise."""
    iters = (Iter(V, Const(8), False, v), Iter(W, Const(4), False, w))
    return Block(
        name, iters, where, None, Store(Y, at, Load(X, (V, W)) if value is None else value)
    )


def total(**changes: object) -> Block:
    """y[v, 0] = sum over w of x[v, w]"""
    iters = (Iter(V, Const(8), False, I), Iter(W, Const(4), True, J))
    own = Load(Y, (V, ZERO))
    made = Block(
        "sum", iters, TRUE, Store(Y, (V, ZERO), const(0, float32)),
        Store(Y, (V, ZERO), own + Load(X, (V, W))),
    )  # fmt: skip
    return made.with_(**changes)


SHIFTED = Load(X, (V - 1, W))
INDEX = Load(AT, (V,))
GOOD: dict[str, Callable[[], PrimFunc]] = {
    "copy": lambda: func(loops(block())),
    "reduction": lambda: func(loops(total())),
    "reduction outside of threads": lambda: func(
        For(J, Const(4), SERIAL, For(I, Const(8), PARALLEL, total()))
    ),
    "tail": lambda: func(loops(block(where=I < 8), i=9)),
    "load under a condition": lambda: func(
        loops(block(value=select(V >= 1, SHIFTED, const(0, float32))))
    ),
    "load with a mask": lambda: func(loops(block(value=Load(X, (V - 1, W), V >= 1)))),
    "load in the other branch": lambda: func(
        loops(block(value=select(V < 1, const(0, float32), SHIFTED)))
    ),
    "an index chosen by position": lambda: func(
        loops(block(value=Load(X, (select(V < 7, V + 1, V - 7), W))))
    ),
    "clamped index": lambda: func(
        loops(block(value=Load(X, (maximum(minimum(INDEX, Const(7)), ZERO), W))))
    ),
    "tile": lambda: func(
        For(I, Const(8), SERIAL, Alloc(TILE, For(J, Const(4), UNROLL, Store(TILE, (J,), _one()))))
    ),
}


GOOD["an extent that is data"] = lambda: func(
    loops(For(K, Load(AT, (I,)), SERIAL, Store(Y, (I, J), _one())))
)


def _one() -> Expr:
    return const(1, float32)


def padded() -> PrimFunc:
    z = Buffer("z", float32, (Const(7),), Scope.PARAM, IndexMap.blocked(1, 0, 4))
    return func(For(I, Const(8), SERIAL, Store(z, (I,), _one())), params=(X, z))


GOOD["padding"] = padded
GOOD["the same names on both sides"] = lambda: func(
    For(K, Const(2), SERIAL, If(K < 1, loops(block()), loops(block())))
)


@pytest.mark.parametrize("name", GOOD)
def test_a_right_function_passes(name: str) -> None:
    verify_tir(GOOD[name](), finished=True)


@pytest.mark.parametrize("name", SAMPLES)
def test_what_lowering_makes_passes(name: str) -> None:
    verify_tir(SAMPLES[name]().func, finished=True)


def undefined(what: str) -> PrimFunc:
    n = Dim("n", 1, 8)
    return {
        "body": lambda: func(loops(block(value=Load(X, (K, W))))),
        "value": lambda: func(For(I, Const(8), SERIAL, block())),
        "extent": lambda: func(For(I, K, SERIAL, block(w=ZERO))),
        "condition": lambda: func(loops(block(where=K < 3))),
        "dim": lambda: func(For(I, n, SERIAL, block(w=ZERO))),
        "shape": lambda: func(params=(X, Buffer("y", float32, (n,)))),
        "after its loop": lambda: func(seq([loops(block()), Store(Y, (I, ZERO), _one())])),
    }[what]()


WRONG: dict[str, tuple[Callable[[], PrimFunc], str]] = {
    **{
        f"undefined in {x}": (lambda x=x: undefined(x), "not defined|no dim")  # type: ignore[misc]
        for x in ("body", "value", "extent", "condition", "dim", "shape", "after its loop")
    },
    "loop shadows": (lambda: func(For(I, Const(2), SERIAL, loops(block()))), "defined twice"),
    "loop defined twice": (lambda: func(loops(block()), loops(block("c"))), "variable i is"),
    "block defined twice": (
        lambda: func(seq([loops(block()), For(K, Const(8), SERIAL, block(v=K, w=ZERO))])),
        "block b is defined twice",
    ),
    "buffer defined twice": (lambda: func(params=(X, X, Y)), "buffer x is defined twice"),
    "iterator is a loop": (
        lambda: func(For(V, Const(8), SERIAL, block(v=V, w=ZERO))), "loop variable and a block",
    ),
    "two iterators of a name": (
        lambda: func(loops(block().with_(iters=(Iter(V, Const(8), False, I),) * 2))),
        "two iterators",
    ),
    "undeclared buffer": (
        lambda: func(loops(block(value=Load(X.with_(name="z"), (V, W))))), "not declared",
    ),
    "buffer outside of its alloc": (
        lambda: func(seq([Alloc(LOCAL, loops(Store(LOCAL, (J,), _one()))),
                          For(K, Const(4), SERIAL, Store(LOCAL, (K,), _one()))])),
        "not declared",
    ),
    "a parameter is allocated": (
        lambda: func(Alloc(X.with_(name="z"), loops(block()))), "scope param is allocated",
    ),
    "scope of a parameter": (lambda: func(params=(LOCAL, Y)), "scope local, not param"),
    "layout of another rank": (
        lambda: func(params=(X, Y.with_(layout=IndexMap.blocked(1, 0, 4)))), "its layout 1",
    ),
    "no results": (lambda: func(results=0), "0 of 3 parameters"),
    "too few indices": (lambda: func(loops(block(value=Load(X, (V,))))), "1 indices, it has 2"),
    "index of int32": (
        lambda: func(loops(block(value=Load(X, (Cast(int32, V), W))))), "is int32, not int64",
    ),
    "extent read outside of its buffer": (
        lambda: func(For(I, Const(8), SERIAL, For(K, Load(AT, (I + 1,)), SERIAL, Store(
            Y, (I, ZERO), _one())))), "this loads at at `i \\+ 1`, not known to be below 8",
    ),
    "extent of int32": (
        lambda: func(For(I, const(8, int32), SERIAL, block(w=ZERO))), "is int32, not int64",
    ),
    "stored dtype": (
        lambda: func(loops(block(value=const(1, int32)))), "int32 is stored to y of float32",
    ),
    "store to an input": (lambda: func(loops(Store(X, (I, J), _one()))), "x is an input"),
    "vector of no constant extent": (
        lambda: func(For(K, Const(3), SERIAL, For(I, K + 1, VECTOR, block(w=ZERO)))), "no constant",
    ),
    "unrolled by no constant": (
        lambda: func(For(K, Const(3), SERIAL, For(I, K + 1, UNROLL, block(w=ZERO)))), "no constant",
    ),
    "loop inside a vector": (
        lambda: func(For(I, Const(8), VECTOR, For(J, Const(4), SERIAL, block()))),
        "stands inside a vector",
    ),
    "threads inside a spatial loop": (lambda: func(loops(block(), kind=PARALLEL)), "no reduction"),
    "threads inside threads": (
        lambda: func(For(I, Const(8), PARALLEL, For(J, Const(4), PARALLEL, block()))),
        "inside the parallel i",
    ),
    "threads beside other work": (
        lambda: func(seq([For(I, Const(8), PARALLEL, block(w=ZERO)),
                          For(K, Const(8), SERIAL, block("c", K, ZERO))])),
        "shares its phase",
    ),
    "threads around private memory": (
        lambda: func(Alloc(LOCAL, For(I, Const(8), PARALLEL, block(w=ZERO)))), "a private l",
    ),
    "register buffer in a plain loop": (
        lambda: func(Alloc(TILE, For(I, Const(4), SERIAL, Store(TILE, (I,), _one())))),
        "neither unrolled nor a vector",
    ),
    "register buffer of no constant shape": (
        lambda: func(Alloc(TILE.with_(shape=(Dim("n"),)), loops(block()))), "no dim",
    ),
    "iterator beyond its extent": (lambda: func(loops(block(), i=9)), "not known to be below 8"),
    "iterator below zero": (lambda: func(loops(block(v=I - 1))), "not known to be >= 0"),
    "condition too weak": (
        lambda: func(loops(block(where=I < 9), i=10)), "not known to be below 8",
    ),
    "load beyond": (
        lambda: func(loops(block(value=Load(X, (V + 1, W))))),
        "loads x at `v \\+ 1`, not known to be below 8",
    ),
    "load before": (lambda: func(loops(block(value=SHIFTED))), "not known to be >= 0"),
    "load under the wrong condition": (
        lambda: func(loops(block(value=select(V >= 1, _one(), SHIFTED)))), "not known to be >= 0",
    ),
    "one branch of an index beyond": (
        lambda: func(loops(block(value=Load(X, (select(V < 7, V + 1, V + 1 - W), W))))),
        "loads x at .*, not known to be below 8",
    ),
    "store beyond": (lambda: func(loops(block(at=(V, W + 1)))), "stores to y at `w \\+ 1`"),
    "data as an index": (
        lambda: func(loops(block(value=Load(X, (INDEX, W))))), "loads x at `at\\[v\\]`",
    ),
    "index of an index": (
        lambda: func(loops(block(value=Load(X, (
            maximum(minimum(Load(AT, (V + 1,)), Const(7)), ZERO), W))))),
        "loads at at `v \\+ 1`",
    ),
    "condition of no bool": (lambda: func(loops(block(where=Const(1)))), "no bool"),
    "init without a reduction": (
        lambda: func(loops(block().with_(init=Store(Y, (V, W), _one())))), "no reduce iterator",
    ),
    "reduction that forgets": (
        lambda: func(loops(total(body=Store(Y, (V, ZERO), Load(X, (V, W)))))), "does not read back",
    ),
    "store at a reduce iterator": (
        lambda: func(loops(total(body=Store(Y, (V, W), Load(Y, (V, W)))))), "at a reduce iterator",
    ),
    "init of another element": (
        lambda: func(loops(total(init=Store(Y, (V, Const(1)), _one())))), "does not initialise",
    ),
    "init that reads itself": (
        lambda: func(loops(total(init=Store(Y, (V, ZERO), Load(Y, (V, ZERO)))))), "reads what it",
    ),
    "init that depends on the reduction": (
        lambda: func(loops(total(init=Store(Y, (V, ZERO), Load(X, (V, W)))))),
        "depends on a reduce iterator",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_function_fails(name: str) -> None:
    make, message = WRONG[name]
    with pytest.raises(VerifyError, match=message) as caught:
        verify_tir(make(), finished=True)
    assert caught.value.where == "f" and "def f(" in caught.value.excerpt


@pytest.mark.parametrize(("parts", "right"), [(4, True), (5, False)])
def test_a_remainder_times_a_size(parts: int, right: bool) -> None:
    """Parts of m // 4 elements: the first four lie inside of m."""
    m = Dim("m", 1, None)
    x, y = (Buffer(name, float32, (m,)) for name in "xy")
    at = I % parts * (m // 4) + J
    body = If(m // 4 > J, Store(y, (J,), Load(x, (at,))))
    whole = For(I, Const(32), SERIAL, For(J, m // 4 + 3, SERIAL, body))
    made = PrimFunc("f", (x, y), 1, (m,), (), (whole,))
    if right:
        verify_tir(made)
    else:
        with pytest.raises(VerifyError, match="not known to be below m"):
            verify_tir(made)


def test_registers_may_be_indexed_by_plain_loops_while_scheduling() -> None:
    make, _ = WRONG["register buffer in a plain loop"]
    verify_tir(make())


def test_the_statement_is_marked(golden: Callable[[str, str], None]) -> None:
    with pytest.raises(VerifyError) as caught:
        verify_tir(func(loops(block(value=binary("mul", SHIFTED, _one())))))
    golden("verify/tir_load", f"VerifyError: {caught.value}")
