"""explain: golden texts of what the stable stages did, and that schedules are told as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from lens.networks import network
from onnx_models import mlp

import minicompiler as mc
from minicompiler import cli
from minicompiler.context import Context, Stage
from minicompiler.errors import MinicompilerError
from minicompiler.ir.tir import script
from minicompiler.lens.explain import Line, changes, compile_stages, explain, kernel_names
from minicompiler.lower.to_tir import lower_function
from minicompiler.passes.fuse import fused_functions
from minicompiler.schedules.schedule import replay
from minicompiler.target import Target

TARGET = Target.parse("cpu:avx2")


def stages_of(kernel: str | None = None, stage: str | None = None) -> list[Stage]:
    return compile_stages(network()[0], Context(TARGET), kernel, stage)


def text_of(lines: list[Line]) -> str:
    return "\n".join(f"{x.mark} {x.text}".rstrip() for x in lines)


@pytest.mark.parametrize("stage", ["graph", "fuse"])
def test_what_graph_passes_did(stage: str, golden: Callable[[str, str], None]) -> None:
    golden(f"explain/{stage}", text_of(explain(stages_of(stage=stage), stage=stage)))


def test_a_kernel_with_its_nodes_refusals_and_loops() -> None:
    stages = stages_of()
    name = next(n for n in kernel_names(stages) if "add" in n)
    lines = explain(stages, kernel=name)
    shown = text_of(lines)
    assert [x.text for x in lines if x.mark == "#"][:3] == [
        "net: fuse", f"{name}: to_tir", f"{name}: schedule",
    ]  # fmt: skip
    assert '  from conv "conv_2" (networks.py:' in shown and '  from add "add_2"' in shown
    # Of the fusions that were refused, those that concern this kernel.
    assert 'not fused: add "add_2" with reduce_mean "reduce_mean_1": ' in shown
    assert 'matmul "matmul_1" with softmax' not in shown
    assert "rule: contraction" in shown and "split(loop=" in shown
    assert "+" in {x.mark for x in lines} and "-" in {x.mark for x in lines}


def test_the_steps_of_a_schedule_make_the_loop_nest_that_is_shown() -> None:
    ctx = Context(TARGET)
    stages = compile_stages(network()[0], ctx)
    graph_fn = mc.driver.optimise(network()[0], Context(TARGET))
    for fn in fused_functions(graph_fn):
        (made,) = [s for s in stages if s.subject == fn.name and s.name == "schedule"]
        call = next(v for v in mc.driver.applies(graph_fn) if v.op is fn)
        constant = tuple(isinstance(a, mc.driver.Constant) for a in call.args)
        steps = json.loads(json.dumps(made.details["steps"]))
        lowered = lower_function(fn, constant, ctx.options.max_error)
        assert script(replay(lowered, steps, TARGET).func) == made.text


@pytest.mark.parametrize(("stage", "text"), [("llvm", "define void @"), ("asm", ".globl")])
def test_code_on_demand(stage: str, text: str) -> None:
    name = kernel_names(stages_of())[0]
    lines = explain(stages_of(name, stage), name, stage)
    assert lines[0] == Line("#", f"{name}: {stage}")
    assert any(text in x.text for x in lines)


def test_a_module_tells_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINICOMPILER_CACHE", str(tmp_path))
    fn = network()[0]
    module = mc.compile(fn, threads=1)
    fresh = compile_stages(fn, Context(module.target))
    assert explain(module.stages) == explain(fresh)
    # From the cache there is nothing to see inside kernels, and only there.
    again = mc.compile(fn, threads=1)
    assert kernel_names(again.stages) == []
    assert explain(again.stages, stage="graph") == explain(fresh, stage="graph")


def test_an_unknown_kernel_is_refused_with_the_names_of_all() -> None:
    with pytest.raises(MinicompilerError, match='no kernel "fused_foo"') as e:
        stages_of("fused_foo")
    assert "fused_softmax" in e.value.hint


# ---- differences --------------------------------------------------------------------------------
def test_changes_are_marked_with_what_stands_around_them() -> None:
    before = "".join(f"line {k}\n" for k in range(12))
    after = before.replace("line 6\n", "line six\nline 6b\n")
    assert [(x.mark, x.text) for x in changes(before, after)] == [
        (" ", "..."), (" ", "line 4"), (" ", "line 5"), ("-", "line 6"), ("+", "line six"),
        ("+", "line 6b"), (" ", "line 7"), (" ", "line 8"), (" ", "..."),
    ]  # fmt: skip
    assert changes(before, before) == [Line(" ", "...")]


def test_a_new_number_is_no_change() -> None:
    before = (
        '  %0 = exp(%x)  # exp "a"\n  %1 = identity(%0)  # identity "b"\n'
        '  %2 = neg(%1)  # neg "c"\n  return y=%2\n'
    )
    after = '  %0 = exp(%x)  # exp "a"\n  %1 = neg(%0)  # neg "c"\n  return y=%1\n'
    marked = [x for x in changes(before, after) if x.mark in "+-"]
    # The operand of neg did change; the value that neg defines only got another number.
    assert [x.mark for x in marked] == ["-", "-", "+"]
    assert marked[-1].text == '  %1 = neg(%0)  # neg "c"'


# ---- the command --------------------------------------------------------------------------------
@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "mlp.onnx"
    onnx.save(mlp("batch"), path)
    return str(path)


def run(*args: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli.main, ["explain", *args])
    assert result.exit_code == code, result.output
    return result.output


def test_the_command_prints_plain_text_when_piped(model: str) -> None:
    output = run(model)
    assert output.startswith("# mlp: import\n")
    assert 'fused_matmul_add_relu = MatMul "n_a" + Add "n_b" + Relu "n_h"' in output
    assert "not fused: " in output and "mark(loop=" in output
    assert "\x1b" not in output


def test_the_command_as_json(model: str) -> None:
    stages = json.loads(run(model, "--kernel", "fused_matmul_add_relu", "--json"))["stages"]
    assert {s["subject"].partition("_prepare")[0] for s in stages} == {"fused_matmul_add_relu"}
    (schedule,) = [s for s in stages if s["name"] == "schedule"]
    assert schedule["details"]["rule"] == "contraction"
    assert {"primitive", "args", "made"} == schedule["details"]["steps"][0].keys()


def test_what_cannot_be_explained(model: str, tmp_path: Path) -> None:
    assert 'no kernel "foo"' in run(model, "--kernel", "foo", code=2)
    saved = tmp_path / "net.mc"
    saved.write_bytes(b"")
    assert "explain the model that it was compiled from" in run(str(saved), code=2)
