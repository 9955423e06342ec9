"""What README.md says is so: files and names exist, links lead somewhere, commands are checked."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx_models import model, node, numbers

from minicompiler import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else ""
DOCUMENTS = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if p.exists()]
ROWS = re.findall(r"^\| ([^|]+) \| `(\w+)` \| (\S+\.py) \|$", README, re.M)

pytestmark = pytest.mark.skipif(not README, reason="runs in a checkout only")


def section(title: str) -> str:
    """The text below a heading of the second level."""
    found = re.search(rf"^## {title}$(.*?)(?=^## |\Z)", README, re.M | re.S)
    assert found, f"README.md has no section {title!r}"
    return found[1]


def test_where_is_x_has_rows() -> None:
    assert len(ROWS) == section("Where is X").count("\n| ") - 1 >= 20


@pytest.mark.parametrize(("feature", "name", "file"), ROWS)
def test_where_is_x_names_what_exists(feature: str, name: str, file: str) -> None:
    path = ROOT / file
    assert path.is_file(), f"{feature}: no file {file}"
    defined = set()
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            defined.add(statement.name)
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        defined |= {t.id for t in targets if isinstance(t, ast.Name)}
    assert name in defined, f"{feature}: {file} defines no {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
    local = [link for link in links if "://" not in link]
    missing = [link for link in local if not (document.parent / link).exists()]
    assert missing == []


def test_the_two_commands_are_what_ci_runs() -> None:
    """The parts of both commands, with the paths that .ci/run puts before them."""
    block = README.split("```sh\n")[1].split("```")[0]
    commands = [line.split("#")[0].strip() for line in block.splitlines()]
    assert commands == ["pip install . && minicompiler demo", 'pip install -e ".[test]" && pytest']
    script = (ROOT / ".ci" / "run").read_text()
    plain = re.sub(r'"\$tmp/\w+/bin/(\w+)"', r"\1", script).replace(" -q", "")
    plain = plain.replace('"$root"', ".").replace('"$root[test]"', '".[test]"')
    for command in commands:
        for part in command.split(" && "):
            assert re.search(rf"(^|&& |\(){re.escape(part)}\)?$", plain, re.M), part


def test_the_commands_and_options_exist() -> None:
    rows = re.findall(r"^\| `minicompiler ([^`]+)` \|(.*)\|$", README, re.M)
    described = {command.split()[0] for command, _ in rows}
    assert described == set(cli.main.commands)
    for command, meaning in rows:
        name = command.split()[0]
        shown = CliRunner().invoke(cli.main, [name, "--help"]).output
        for option in re.findall(r"--\w+|(?<= )-\w\b", command + meaning):
            assert option in shown, f"{name} has no {option}"


def test_the_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    m = model(
        [node("MatMul", "x w", "y")],
        {"x": numbers(1, 784)},
        ["y"],
        {"w": np.ones((784, 10), np.float32)},
        shapes={"x": ("batch", 784)},
    )
    onnx.save(m, tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", section("In Python"), re.S)
    assert len(examples) == 2
    names: dict[str, object] = {}
    for text in examples:
        exec(text, names)
    assert os.listdir(tmp_path)
    assert names["y"].shape == (8, 10)  # type: ignore[attr-defined]
