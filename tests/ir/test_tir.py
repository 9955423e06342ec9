"""TIR: traversal, rewriting, printing; and the interpreter, which is strict on purpose."""

from __future__ import annotations

import numpy as np
import pytest
from tir_samples import SAMPLES, matmul_of

from minicompiler.errors import InternalError
from minicompiler.ir import interp
from minicompiler.ir.equal import tir_equal
from minicompiler.ir.expr import TRUE, Const, Expr, Load, Var, const, minimum, substitute
from minicompiler.ir.tir import (
    PARALLEL,
    SERIAL,
    Alloc,
    Block,
    Buffer,
    For,
    If,
    Iter,
    PrimFunc,
    Scope,
    Seq,
    Stmt,
    Store,
    is_empty,
    map_exprs,
    map_statements,
    read_buffers,
    script,
    seq,
    statements,
    stores,
    substitute_stmt,
    written_buffers,
)
from minicompiler.ir.types import float32

I, J = Var("i"), Var("j")
X = Buffer("x", float32, (Const(4),))
Y = Buffer("y", float32, (Const(4),))


def copy_loop(extent: int = 4, shift: int = 0) -> PrimFunc:
    """y = x, element by element, read `shift` further on."""
    body = Store(Y, (I,), Load(X, (I + shift,)))
    return PrimFunc("copy", (X, Y), 1, (), (), (For(I, Const(extent), SERIAL, body),))


def test_statements_come_in_program_order() -> None:
    func = matmul_of(5, 7, 6)
    kinds = [type(s).__name__ for s in statements(func)]
    assert kinds == ["For", "For", "For", "Block", "For", "For", "Block"]


def test_what_is_read_and_written() -> None:
    func = matmul_of(5, 7, 6)
    assert {b.name for b in read_buffers(func)} == {"p0", "p1", "p2", "matmul"}
    assert {b.name for b in written_buffers(func)} == {"matmul", "r0"}
    assert len(list(stores(func))) == 3  # an init, an update, a result


def test_seq_is_flat_and_empty_statements_are_found() -> None:
    a, b = Store(Y, (I,), const(0, float32)), Store(Y, (J,), const(1, float32))
    assert seq([a]) is a
    nested = seq([seq([a, b]), Seq(()), b])
    assert isinstance(nested, Seq) and nested.stmts == (a, b, b)
    assert is_empty(For(I, Const(3), SERIAL, Seq(())))
    assert not is_empty(nested)


def test_mapping_keeps_what_does_not_change() -> None:
    phase = matmul_of(5, 7, 6).phases[0]
    assert map_statements(phase, lambda s: None) is phase

    def drop(s: Stmt) -> Stmt | None:
        return Seq(()) if isinstance(s, Block) else None

    assert is_empty(map_statements(phase, drop))


def test_substitution_reaches_every_expression() -> None:
    inner = If(I < J, Store(Y, (J,), Load(X, (I,))), Store(Y, (I,), Load(X, (J,))))
    nest = For(Var("k"), I + 1, SERIAL, Alloc(X, inner))
    text = script(substitute_stmt(nest, {I: Const(2)}))
    assert text.splitlines() == [
        "for k in 3:",
        "    alloc x: float32[4]",
        "    if 2 < j:",
        "        y[j] = x[2]",
        "    else:",
        "        y[2] = x[j]",
    ]
    assert map_exprs(nest, lambda e: substitute(e, {})) is not None


def test_text_marks_a_statement() -> None:
    func = copy_loop()
    marked = script(func, func.phases[0]).splitlines()
    assert [line for line in marked if line.startswith("  >")] == ["  >     for i in 4:"]
    assert str(func) == script(func)


def test_a_long_text_names_what_it_uses_again() -> None:
    """Written out, this expression is a text of 2**60 parts."""
    e: Expr = I
    for _ in range(60):
        e = e * minimum(e, 3)
    text, _, where = str(e).partition(" where ")
    numbers = {"i": 2, "min": min}
    for meaning in reversed(where.split(", %")):
        name, _, value = meaning.removeprefix("%").partition(" = ")
        numbers[f"n{name}"] = eval(value.replace("%", "n"), {}, numbers)
    # 2 * 2, 4 * 3, 12 * 3, ...
    assert eval(text.replace("%", "n"), {}, numbers) == 4 * 3**59


@pytest.mark.parametrize("name", SAMPLES)
def test_printing_is_deterministic(name: str) -> None:
    assert str(SAMPLES[name]().func) == str(SAMPLES[name]().func)


def test_equality_tells_programs_apart() -> None:
    a, b = matmul_of(5, 7, 6), matmul_of(5, 7, 6)
    assert a is not b and tir_equal(a, b)
    assert not tir_equal(a, matmul_of(5, 7, 5))
    assert not tir_equal(a, b.with_(name="other"))
    parallel = map_statements(
        b.phases[0], lambda s: s.with_(kind=PARALLEL) if isinstance(s, For) else None
    )
    assert not tir_equal(a, b.with_(phases=(parallel, *b.phases[1:])))


def test_equality_follows_buffers_through_their_uses() -> None:
    """Two buffers that look alike are still two buffers."""
    twin = Buffer("x", float32, (Const(4),))
    one = Store(Y, (I,), Load(X, (I,)) + Load(X, (J,)))
    two = Store(Y, (I,), Load(X, (I,)) + Load(twin, (J,)))
    funcs = [PrimFunc("f", (X, Y), 1, (), (), (s,)) for s in (one, two)]
    assert tir_equal(funcs[0], funcs[0]) and not tir_equal(*funcs)


# ---- the interpreter ----------------------------------------------------------------------------
def test_the_interpreter_computes_what_numpy_does() -> None:
    sample = SAMPLES["matmul"]()
    a, b, bias = sample.inputs()
    (got,) = sample.run()
    np.testing.assert_allclose(got, np.maximum(a @ b + bias, 0), rtol=1e-5)


def test_an_index_outside_of_a_buffer_is_an_error() -> None:
    x = np.arange(4, dtype=np.float32)
    np.testing.assert_array_equal(interp.run(copy_loop(), [x])[0], x)
    with pytest.raises(InternalError, match="outside"):
        interp.run(copy_loop(extent=5), [x])
    with pytest.raises(InternalError, match="outside"):
        interp.run(copy_loop(shift=-1), [x])


def test_memory_that_was_never_written_is_noticed() -> None:
    t = Buffer("t", float32, (Const(4),), Scope.GLOBAL)
    body = For(I, Const(4), SERIAL, Store(Y, (I,), Load(t, (I,))))
    func = PrimFunc("f", (X, Y), 1, (), (t,), (body,))
    assert np.isnan(interp.run(func, [np.zeros(4, np.float32)])[0]).all()


def test_an_init_runs_at_the_first_reduction_index_only() -> None:
    k = Iter(Var("vk"), Const(4), True, I)
    y, at = Buffer("y", float32, (Const(1),)), (Const(0),)
    body = Store(y, at, Load(y, at) + Load(X, (k.var,)))
    block = Block("sum", (k,), TRUE, Store(y, at, const(0, float32)), body)
    func = PrimFunc("f", (X, y), 1, (), (), (For(I, Const(4), SERIAL, block),))
    got = interp.run(func, [np.ones(4, np.float32)])
    assert got[0].tolist() == [4.0]
