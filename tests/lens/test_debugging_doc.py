"""docs/debugging.md: its Python runs, its table of levels and its file names are true."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import minicompiler as mc
from minicompiler import artifacts, config
from minicompiler.cli import main
from minicompiler.context import Context
from minicompiler.frontend.builder import Builder
from minicompiler.target import Target

TEXT = (Path(__file__).parents[2] / "docs" / "debugging.md").read_text()


def test_the_python_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINICOMPILER_CACHE", str(tmp_path / "cache"))
    net = Builder("mlp")
    weights = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
    model = net.function(y=net.matmul(net.input("x", (2, 4)), weights))
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    scope = {"mc": mc, "model": model, "x": x, "override": tmp_path / "override",
             "Context": Context, "Target": Target}  # fmt: skip
    examples = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(examples) == 3
    for example in examples:
        exec(example, scope)
    assert 'fused_matmul = matmul "matmul_1"' in capsys.readouterr().out
    plain = scope["plain"]
    np.testing.assert_allclose(plain(x)[0], x @ weights, rtol=1e-5)  # type: ignore[operator]
    assert "parallel" not in "".join(s.text for s in plain.stages)  # type: ignore[attr-defined]


def test_the_ladder_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = [int(n) for n in re.findall(r"^\| (\d) \|", TEXT, re.M)]
    assert levels == list(range(1, artifacts.ASSEMBLY_LEVEL + 1))
    monkeypatch.setenv("MINICOMPILER_DEBUG", str(levels[-1]))
    assert config.debug() == levels[-1]
    monkeypatch.setenv("MINICOMPILER_DEBUG", str(levels[-1] + 1))
    with pytest.raises(mc.MinicompilerError, match="MINICOMPILER_DEBUG"):
        config.debug()


def test_what_can_be_replaced_is_listed() -> None:
    assert tuple(re.findall(r"^\| `KERNEL/([\w.]+)` \|", TEXT, re.M)) == artifacts.REPLACEABLE


def test_the_commands_have_the_options_that_are_shown() -> None:
    shown = re.findall(r"^    minicompiler (\w+) .*$", TEXT, re.M)
    assert set(shown) == {"explain", "verify"}
    for line in re.findall(r"^    minicompiler (?:\w+) .*$", TEXT, re.M):
        command = main.commands[line.split()[1]]
        options = {o for p in command.params for o in p.opts}
        assert set(re.findall(r"--\w+", line)) <= options
