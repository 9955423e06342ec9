"""The instruction that multiplies and adds pairs, on every kind of processor."""

from __future__ import annotations

import dataclasses
import re

import pytest

from minicompiler.codegen.native import compile_assembly
from minicompiler.context import Context, Options
from minicompiler.frontend.builder import Builder
from minicompiler.ir.graph import Apply, Function
from minicompiler.kernel import write_kernel
from minicompiler.passes.fuse import fuse
from minicompiler.target import Target

VNNI = dataclasses.replace(
    Target.parse("cpu:avx512"),
    features=tuple(sorted((*Target.parse("cpu:avx512").features, "avx512vnni"))),
)


def llvm(target: Target) -> str:
    """Of a product of 24 x 64 and 64 x 64 pairs, with constant weights."""
    net = Builder("product")
    a, b = net.input("a", (24, 64), "int32"), net.input("b", (64, 64), "int32")
    ctx = Context(target, Options(threads=1))
    (call,) = fuse(net.function(y=net.matmul(a, b, in_pairs=True)), ctx).results
    assert isinstance(call, Apply) and isinstance(call.op, Function)
    _, text = write_kernel(call.op, (False, True), ctx)
    return text


def assembly(target: Target) -> str:
    return compile_assembly(llvm(target), target)


@pytest.mark.parametrize(
    "target, wanted",
    [
        (Target.parse("cpu:sse"), ("pmaddwd", "%xmm")),
        (Target.parse("cpu:avx2"), ("vpmaddwd", "%ymm")),
        (Target.parse("cpu:avx512"), ("vpmaddwd", "%zmm")),
        (VNNI, ("vpdpwssd", "%zmm")),
    ],
    ids=["sse", "avx2", "avx512", "vnni"],
)
def test_the_instruction(target: Target, wanted: tuple[str, str]) -> None:
    lines = [x for x in assembly(target).splitlines() if wanted[0] in x and wanted[1] in x]
    assert len(lines) >= 4
    assert not [x for x in assembly(target).splitlines() if "pmulld" in x]


def test_processors_without_it() -> None:
    """Vectors of products; as LLVM's text, for the tests' processor has no assembly of it."""
    text = llvm(Target.parse("cpu:neon"))
    assert len(re.findall(r" = mul <\d+ x i32> ", text)) >= 4
    assert "pmadd" not in text and "vpdpw" not in text


def test_sums_of_products_stay_in_registers() -> None:
    """LLVM changes the order of sums of integers; many at once would be kept in memory."""
    text = assembly(Target.parse("cpu:avx2"))
    inner = max(text.split(".LBB"), key=lambda part: part.count("vpmaddwd"))
    assert inner.count("vpmaddwd") == 24
    loop = inner[: inner.rindex("vpmaddwd")]
    assert not [x for x in loop.splitlines() if "%rsp" in x and "%ymm" in x]
