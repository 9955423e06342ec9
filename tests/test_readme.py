"""What README.md says is so: files and names exist, links lead somewhere, commands are checked."""

from __future__ import annotations

import ast
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx_models import model, node, numbers

from minicompiler import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else ""
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
ROWS = re.findall(r"^\| ([^|]+) \| `(\w+)` \| (\S+\.py) \|$", README, re.M)

pytestmark = pytest.mark.skipif(not README, reason="runs in a checkout only")


def section(title: str) -> str:
    """The text below a heading of the second level."""
    found = re.search(rf"^## {title}$(.*?)(?=^## |\Z)", README, re.M | re.S)
    assert found, f"README.md has no section {title!r}"
    return found[1]


def test_where_is_x_has_rows() -> None:
    assert len(ROWS) == section("Where is X").count("\n| ") - 1 >= 20


def defined_in(body: Sequence[ast.stmt]) -> set[str]:
    """The names that statements define: `function`, `Class`, `Class.method`, `VARIABLE`."""
    found = set()
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            found.add(statement.name)
        if isinstance(statement, ast.ClassDef):
            found |= {f"{statement.name}.{name}" for name in defined_in(statement.body)}
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        found |= {t.id for t in targets if isinstance(t, ast.Name)}
    return found


@pytest.mark.parametrize(("feature", "name", "file"), ROWS)
def test_where_is_x_names_what_exists(feature: str, name: str, file: str) -> None:
    path = ROOT / file
    assert path.is_file(), f"{feature}: no file {file}"
    assert name in defined_in(ast.parse(path.read_text()).body), f"{feature}: {file}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
    local = [link for link in links if "://" not in link]
    missing = [link for link in local if not (document.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_a_linked_name_is_defined_there(document: Path) -> None:
    """[`name`](file.py), in any document."""
    links = re.findall(r"\[`([\w.]+)`\]\(([^)#]+\.py)\)", document.read_text())
    assert links or document.name != "CONTRIBUTING.md"
    for name, file in links:
        body = ast.parse((document.parent / file).read_text()).body
        assert name in defined_in(body), f"{file} defines no {name}"


def test_the_commands_for_contributors_exist() -> None:
    """The files and markers that the first block of CONTRIBUTING.md names."""
    block = (ROOT / "CONTRIBUTING.md").read_text().split("```sh\n")[1].split("```")[0]
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = re.search(r"\.\[([\w,]+)\]", block)
    assert extras
    assert set(extras[1].split(",")) <= set(setup["project"]["optional-dependencies"])
    markers = {m.split(":")[0] for m in setup["tool"]["pytest"]["ini_options"]["markers"]}
    assert set(re.findall(r"-m (?!venv)(\w+)", block)) <= markers
    paths = re.findall(r"tests/\S+", block)
    assert paths and all((ROOT / p).exists() for p in paths)


def test_the_two_commands_are_what_ci_runs() -> None:
    """The parts of both commands, with the paths that .ci/run puts before them."""
    block = README.split("```sh\n")[1].split("```")[0]
    commands = [line.split("#")[0].strip() for line in block.splitlines()]
    assert commands == [
        "pip install . && minicompiler demo",
        'pip install -e ".[test]" && pytest -n 2',
    ]
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


def decoder() -> onnx.ModelProto:
    """Appends one position to those before."""
    return model(
        [node("Concat", "past x", "present", axis=2), node("ReduceSum", "present", "y")],
        {"x": numbers(1, 12, 1, 64), "past": numbers(1, 12, 3, 64)},
        ["present", "y"],
        shapes={"past": (1, 12, "positions", 64)},
    )


def test_the_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    m = model(
        [node("MatMul", "x w", "y")],
        {"x": numbers(1, 784)},
        ["y"],
        {"w": np.ones((784, 10), np.float32)},
        shapes={"x": ("batch", 784)},
    )
    onnx.save(m, tmp_path / "model.onnx")
    onnx.save(decoder(), tmp_path / "decoder.onnx")
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", section("In Python"), re.S)
    assert len(examples) == 3
    names: dict[str, object] = {"new": numbers(1, 12, 1, 64), "n": 3}
    for text in examples:
        exec(text, names)
    assert os.listdir(tmp_path)
    assert names["y"].shape == (8, 10)  # type: ignore[attr-defined]
    assert names["cache"][0, 0, 3].any()  # type: ignore[index]
