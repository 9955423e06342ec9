"""What holds for every command: help, one JSON document, plain text when piped, the reference."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import onnx
import pytest
from click.testing import CliRunner
from onnx_models import conv_net, mlp

from minicompiler import cli
from minicompiler.commands import options
from minicompiler.commands.reference import markdown
from minicompiler.report import Output

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs" / "commands.md"
COMMANDS = [name for name in cli.COMMANDS if name != "cache"]
# Options that make a command quick; MODEL is put in front where it takes one.
QUICK: dict[str, list[str]] = {
    "demo": ["--size", "32", "--threads", "1"],
    "bench": ["--seconds", "0.1"],
    "profile": ["--repeat", "2"],
}


@pytest.fixture
def net(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    onnx.save(mlp("batch"), path)
    return path


def arguments(name: str, net: Path, *more: str) -> list[str]:
    """A whole command line for one command."""
    command = cli.main.commands[name]
    takes_model = any(p.name == "model" for p in command.params)
    return [name, *([str(net)] if takes_model else []), *QUICK.get(name, []), *more]


def program(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "minicompiler", *args]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})


# ---- help ----------------------------------------------------------------------------------------
@pytest.mark.skipif(not REFERENCE.exists(), reason="runs in a checkout only")
def test_the_reference_is_what_the_commands_say() -> None:
    """If this fails: minicompiler --help-all > docs/commands.md"""
    assert REFERENCE.read_text() == markdown(cli.main)


def test_help_all_prints_the_reference() -> None:
    result = CliRunner().invoke(cli.main, ["--help-all"])
    assert result.exit_code == 0 and result.stdout == markdown(cli.main)
    for name in cli.COMMANDS:
        assert f"## minicompiler {name}\n" in result.stdout
    assert "## minicompiler cache clear\n" in result.stdout


def test_the_group_documents_every_exit_code() -> None:
    shown = CliRunner().invoke(cli.main, ["--help"]).stdout
    documented = {int(n) for n in re.findall(r"^    (\d+) ", shown, re.M)}
    codes = {options.CHECK_FAILED, options.USER_ERROR, options.UNSUPPORTED, options.INTERNAL_ERROR}
    assert documented == {0, *codes, options.INTERRUPTED}
    assert "..." not in shown.partition("Commands:")[2], "a first sentence is too long to be shown"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    command = cli.main.commands[name]
    below = list(command.commands.values()) if isinstance(command, click.Group) else [command]
    for c in below:
        assert c.help, f"{name} has no help"
        for p in c.params:
            assert not isinstance(p, click.Option) or p.help, f"{name} {p.name} has no help"
        assert any(p.name == "as_json" for p in c.params), f"{name} has no --json"


def test_examples_in_help_are_commands_that_parse(net: Path) -> None:
    """Every example line names options that exist; models and files are made up."""
    shown = markdown(cli.main)
    lines = [x.split() for x in re.findall(r"^    minicompiler (.*)$", shown, re.M)]
    assert len(lines) >= 6
    for name, *words in lines:
        known = {o for p in cli.main.commands[name].params for o in p.opts}
        used = [w.partition("=")[0] for w in words if w.startswith("-")]
        assert set(used) <= known, f"{name}: {used}"


def test_modules_of_commands_import_nothing_heavy_at_the_top() -> None:
    for name in cli.COMMANDS:
        module = sys.modules[f"minicompiler.commands.{name}"]
        assert module.__file__ is not None
        for s in ast.parse(Path(module.__file__).read_text()).body:
            source = getattr(s, "module", None) or ""
            assert not source.startswith("minicompiler.") or source in (
                "minicompiler.commands", "minicompiler.errors",
            ), f"{name} imports {source}"  # fmt: skip


# ---- output --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", COMMANDS)
def test_json_is_one_document_and_nothing_else(name: str, net: Path) -> None:
    result = CliRunner().invoke(cli.main, arguments(name, net, "--json"))
    assert result.exit_code == 0, result.output
    found: Any = json.loads(result.stdout)
    assert isinstance(found, dict) and found


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["inspect", "profile", "bench"])
def test_piped_output_is_plain(name: str, net: Path) -> None:
    done = program(*arguments(name, net))
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr and "\r" not in done.stdout + done.stderr
    # No progress: what is said on stderr is about the result.
    told = [x for x in done.stderr.splitlines() if "random values" not in x and "runs at" not in x]
    assert told == []


def test_no_color_is_honoured(net: Path) -> None:
    yellow = "\x1b[33m"  # the remark that inputs are random
    assert yellow in program(*arguments("run", net), FORCE_COLOR="1", NO_COLOR="").stderr
    plain = program(*arguments("run", net), FORCE_COLOR="1", NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", plain.stdout + plain.stderr)


def test_progress_is_for_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    with Output(False).busy("working"):
        pass
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_sees_progress_and_a_pipe_beside_it_does_not(net: Path) -> None:
    import pty

    near, far = pty.openpty()
    command = [sys.executable, "-m", "minicompiler", *arguments("inspect", net, "--json")]
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=far, env=environment) as process:
        os.close(far)
        assert process.stdout is not None
        shown = process.stdout.read()
    told = os.read(near, 100_000).decode()
    os.close(near)
    assert json.loads(shown)["supported"] is True
    assert "compiling net.onnx" in told and "0:00:0" in told


def test_exit_codes_of_a_real_process(net: Path, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a model")
    assert program("inspect", str(net)).returncode == 0
    wrong = program("inspect", str(tmp_path / "text.onnx"), "--json")
    assert wrong.returncode == options.USER_ERROR
    assert json.loads(wrong.stdout)["error"] == "ImportModelError"
    assert program("inspect", "missing.onnx").returncode == 2
    failed = program("run", str(net), "--check", "reference", "--tolerance", "-1")
    assert failed.returncode == options.CHECK_FAILED


def test_a_pipe_that_closes_early_is_no_traceback(tmp_path: Path) -> None:
    onnx.save(conv_net("batch"), tmp_path / "net.onnx")
    command = (
        f"{sys.executable} -m minicompiler inspect {tmp_path / 'net.onnx'} --kernels | head -1"
    )
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
