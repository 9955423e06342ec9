"""docs/extending.md runs as it stands; what it promises about isolation and caching holds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_models import model, node, numbers

import minicompiler as mc
from minicompiler import te
from minicompiler.errors import MinicompilerError, VerifyError
from minicompiler.ir.graph import Apply, Function, rebuild
from minicompiler.ir.op import REGISTRY, Compute, Op
from minicompiler.ir.types import TensorType, float64
from minicompiler.runtime.diskcache import DiskCache

DOCUMENT = Path(__file__).parent.parent / "docs" / "extending.md"


@dataclass(frozen=True)
class NoParameters:
    pass


def scaling(factor: float) -> mc.Extensions:
    """`com.acme.Scale`, whatever that means today: always the same name."""

    def compute(x: te.Tensor, a: Any) -> te.Tensor:
        return te.map_elements(lambda e: e * factor, x, name="scale")

    op = Op("acme_scale", NoParameters, lambda x, a: x.type, (Compute("direct", compute),),
            lambda x, a: x * np.float32(factor), lambda draw: ([], NoParameters()))  # fmt: skip
    return mc.Extensions({"com.acme.Scale": lambda n: n.apply(op, n.arg(0))})


def scaled() -> Any:
    m = model([node("Scale", "x", "y", domain="com.acme")], {"x": numbers(5)}, ["y"])
    m.opset_import.add(domain="com.acme", version=1)
    return m


def test_the_document_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert len(blocks) >= 8
    names: dict[str, Any] = {"__name__": "extending"}
    before = dict(REGISTRY)
    for k, block in enumerate(blocks):
        exec(compile(block, f"{DOCUMENT.name}, block {k + 1}", "exec", dont_inherit=True), names)
    assert before == REGISTRY


def test_a_changed_operator_is_not_taken_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINICOMPILER_CACHE", str(tmp_path))
    x = numbers(5)
    for factor in (2.0, 3.0, 2.0):
        (y,) = mc.compile(scaled(), extensions=scaling(factor))(x)
        assert np.array_equal(y, x * np.float32(factor))
    # Two kernels and the main function, which is the same but for the kernel's name.
    assert DiskCache().info().entries <= 4


def test_rules_and_backends_leave_the_cache_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINICOMPILER_CACHE", str(tmp_path))
    m = model([node("Exp", "x", "y")], {"x": numbers(5)}, ["y"])
    calls: list[str] = []

    def assemble(text: str, target: mc.Target) -> bytes:
        from minicompiler.codegen.native import compile_object

        calls.append(text)
        return compile_object(text, target)

    for _ in range(2):
        mc.compile(m, extensions=mc.Extensions(assemble=assemble))
    assert len(calls) == 2
    mc.compile(m)
    mc.compile(m, extensions=mc.Extensions(assemble=assemble))
    assert len(calls) == 3


def test_extensions_end_with_their_compilation() -> None:
    mc.compile(scaled(), extensions=scaling(2.0))
    with pytest.raises(MinicompilerError, match=r"com\.acme\.Scale"):
        mc.compile(scaled())


def test_a_wrong_pass_is_found_by_checked_mode() -> None:
    def forget(fn: Function, ctx: Any) -> Function:
        def change(v: Any, args: Any) -> Any:
            wrong = isinstance(v, Apply) and v.op.name == "exp"
            return v.with_(type=TensorType(v.type.shape, float64)) if wrong else None

        return rebuild(fn, change)

    m = model([node("Exp", "x", "y")], {"x": numbers(5)}, ["y"])
    ours = mc.Extensions(passes=lambda passes: (forget, *passes))
    with pytest.raises(VerifyError, match='Exp "n_y"'):
        mc.compile(m, extensions=ours, checked=True)


def test_an_operator_can_replace_one_of_onnx() -> None:
    def plain(n: Any) -> Any:
        return n.arg(0)

    m = model([node("Relu", "x", "a"), node("Neg", "a", "y")], {"x": numbers(5)}, ["y"])
    x = numbers(5)
    assert np.array_equal(mc.compile(m, extensions=mc.Extensions({"Relu": plain}))(x)[0], -x)
    assert np.array_equal(mc.compile(m)(x)[0], -np.maximum(x, 0))
