"""The shape of the source tree: import direction, package list, module names, sizes, docstrings.

Imports are read with `ast`, so those inside functions count; only annotation-only imports
(`if TYPE_CHECKING:`) within one package do not.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The folders at the top level that install as subpackages.
MAPPED = ("frontend", "schedules", "codegen")

# Lowest row first; a module's row is that of its longest prefix here, and it may import lower
# rows and, from its own row, only its own package. Modules of `ir` that are not named may import
# all of `ir`. A new module outside these packages has to be placed here.
ROWS: tuple[tuple[str, ...], ...] = (
    ("errors", "config", "target", "limits", "extensions", "tolerance", "context"),
    ("ir.node",),
    ("ir.types",),
    ("ir.expr", "ir.expr_text", "ir.interning"),
    ("ir.polynomials",),
    ("ir.layout", "ir.arith", "ir.bounds", "ir.proofs", "ir.samples"),
    ("ir.op",),
    ("ir.tir", "ir.graph", "ir.intrinsic"),
    ("ir",),
    ("te", "runtime.plan"),
    ("ops",),
    ("passes", "lower", "runtime"),
    MAPPED,
    ("artifacts",),
    ("pipeline", "checks"),
    ("kernel",),
    ("prepare",),
    ("driver",),
    ("lens",),
    ("",),
    # A doorway for other programs, like the command line: it may use everything below.
    ("inputs", "bench", "demo", "machine", "kernel_facts", "frontend.onnx_backend"),
    ("footprint",),
    ("report", "diagnose"),
    ("commands",),
    ("cli",),
    ("__main__",),
)
RANK = {f"minicompiler.{name}".rstrip("."): row for row, names in enumerate(ROWS) for name in names}
# Rows within which modules of different packages may import one another.
FREE_ROWS = {0}
# A saved module loads without the compiler.
RUNTIME_MAY = ("errors", "config", "target", "runtime")
BANNED_NAMES = {"utils", "util", "common", "base", "helpers", "misc"}
DOCSTRING_LINES = 12
# 600 lines is where to ask whether a file holds two ideas; 900 is where to stop.
MODULE_LINES = 900


def modules() -> dict[str, Path]:
    """Every module of the package by its installed name."""
    found = {}
    for top in ("minicompiler", *MAPPED):
        prefix = () if top == "minicompiler" else ("minicompiler",)
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = (*prefix, *path.relative_to(ROOT).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def package_of(module: str) -> str:
    """`minicompiler.ir` for all of `ir`, the module itself outside a subpackage."""
    return ".".join(module.split(".")[:2])


def rank(module: str) -> int | None:
    if module == "minicompiler":
        return RANK[module]
    parts = module.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 1, -1))
    return next((RANK[prefix] for prefix in prefixes if prefix in RANK), None)


def is_type_checking(node: ast.AST) -> bool:
    if not isinstance(node, ast.If):
        return False
    test = node.test
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")
    return name == "TYPE_CHECKING"


def imports(module: str, tree: ast.AST, is_package: bool, known: set[str]) -> Iterator[str]:
    """Modules of the package that `module` imports, annotation-only ones of its own left out."""

    def walk(node: ast.AST, typing_only: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, typing_only
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                outer = module.split(".")
                outer = outer[: len(outer) - node.level + is_package]
                source = ".".join([*outer, *([node.module] if node.module else [])])
            else:
                source = node.module or ""
            for alias in node.names:
                # `from package import module` imports the module.
                inner = f"{source}.{alias.name}"
                yield (inner if inner in known else source), typing_only
        elif is_type_checking(node):
            assert isinstance(node, ast.If)
            for statement in node.body:
                yield from walk(statement, True)
            for statement in node.orelse:
                yield from walk(statement, typing_only)
        else:
            for child in ast.iter_child_nodes(node):
                yield from walk(child, typing_only)

    for name, typing_only in walk(tree, False):
        if name.split(".")[0] != "minicompiler":
            # From the checkout root these would load second copies.
            if name.split(".")[0] in MAPPED:
                yield name
            continue
        if not (typing_only and package_of(name) == package_of(module)):
            yield name


def violations(sources: dict[str, str], packages: set[str]) -> list[str]:
    """What breaks the import direction, one sentence each."""
    found = []
    known = set(sources)
    for module, text in sources.items():
        own = rank(module)
        if own is None:
            found.append(f"{module} has no row: add it to ROWS")
            continue
        for name in imports(module, ast.parse(text), module in packages, known):
            other = rank(name)
            if name.split(".")[0] in MAPPED:
                found.append(f"{module} imports {name}: write minicompiler.{name}")
            elif other is None:
                found.append(f"{module} imports {name}, which has no row")
            elif module.startswith("minicompiler.runtime") and (
                package_of(name).removeprefix("minicompiler.") not in RUNTIME_MAY
            ):
                found.append(f"{module} imports {name}: the runtime imports no compiler part")
            elif other > own or (
                other == own and own not in FREE_ROWS and package_of(name) != package_of(module)
            ):
                found.append(f"{module} (row {own}) imports {name} (row {other})")
    return found


def test_import_direction() -> None:
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    sources = {name: path.read_text() for name, path in MODULES.items()}
    assert violations(sources, packages) == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("minicompiler.ir.expr", "from minicompiler.ir import graph"),
        ("minicompiler.ir.expr", "from . import graph"),
        ("minicompiler.ir.expr", "from .graph import Apply"),
        ("minicompiler.ir.node", "def f():\n    import minicompiler.ir.expr"),
        ("minicompiler.ir.node", "if TYPE_CHECKING:\n    from minicompiler.ops import linalg"),
        ("minicompiler.ops.linalg", "from minicompiler.passes.fuse import fuse"),
        ("minicompiler.passes.fuse", "from minicompiler import lower"),
        ("minicompiler.schedules.cpu", "from minicompiler.codegen import llvm"),
        ("minicompiler.frontend.onnx", "from minicompiler.schedules.cpu import rules"),
        ("minicompiler.codegen.llvm", "from schedules import cpu"),
        ("minicompiler.runtime.module", "from minicompiler.ir.expr import Expr"),
        ("minicompiler.runtime.plan", "from minicompiler.runtime import module"),
        ("minicompiler.runtime.module", "import minicompiler"),
        ("minicompiler.lower.to_tir", "from minicompiler.driver import compile"),
        ("minicompiler.errors", "from minicompiler.ir.types import Loc"),
        ("minicompiler.novelty", ""),
    ],
)
def test_a_violation_is_detected(module: str, text: str) -> None:
    known = {"minicompiler.ir.graph", "minicompiler.lower", "minicompiler.runtime.module"}
    sources = dict.fromkeys(known, "") | {module: text}
    assert len(violations(sources, set())) == 1


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("minicompiler.ir.graph", "from . import expr, types\nimport numpy"),
        ("minicompiler.ir.types", "if TYPE_CHECKING:\n    from minicompiler.ir.expr import Expr"),
        ("minicompiler.ir.brand_new", "from minicompiler.ir.verify import verify"),
        ("minicompiler.schedules.cpu", "from minicompiler.schedules.loops import split"),
        ("minicompiler.lower.memory", "from minicompiler.runtime.plan import Plan"),
        ("minicompiler.runtime.pool", "from minicompiler.target import usable_cores"),
        ("minicompiler.driver", "from minicompiler import codegen, errors, pipeline"),
        ("minicompiler", "from minicompiler.driver import compile"),
    ],
)
def test_a_proper_import_is_accepted(module: str, text: str) -> None:
    known = [f"minicompiler.{n}" for n in ("codegen", "errors", "pipeline", "ir.expr", "ir.types")]
    sources = dict.fromkeys(known, "") | {module: text}
    assert violations(sources, {"minicompiler"}) == []


def test_the_package_list_equals_the_folders() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = set(setup["packages"])
    assert setup["package-dir"] == {f"minicompiler.{name}": name for name in MAPPED}
    holding_modules = {
        name if path.name == "__init__.py" else name.rpartition(".")[0]
        for name, path in MODULES.items()
    }
    assert holding_modules <= packages
    for name in packages:
        folder = setup["package-dir"].get(name, name.replace(".", "/"))
        assert (ROOT / folder).is_dir(), f"{name} is listed, but there is no folder {folder}"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_a_telling_name_and_a_short_introduction(module: str) -> None:
    assert not BANNED_NAMES & set(module.split("."))
    text = MODULES[module].read_text()
    introduction = ast.get_docstring(ast.parse(text))
    assert introduction, f"{module} has no docstring at its top"
    assert len(introduction.splitlines()) <= DOCSTRING_LINES, f"{module}: long docstring"
    assert len(text.splitlines()) <= MODULE_LINES, f"{module} holds more than one idea"
