"""A kernel cache for each run, and golden texts: `golden(name, text)` compares with
tests/golden/<name>.txt.

Run pytest with --update-golden to write the files anew, and review the difference like code.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/*.txt")


def pytest_configure(config: pytest.Config) -> None:
    """A cache of its own for each run, which its workers share: kernels that an earlier run left
    would not be scheduled again, and tests ask how they were."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="minicompiler-tests-")
        os.environ["MINICOMPILER_CACHE"] = folder.name
        config.add_cleanup(folder.cleanup)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares a text with its golden file."""
    update = request.config.getoption("--update-golden")

    def compare(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        text = text.rstrip("\n") + "\n"
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"{path} is missing; its text would be:\n{text}"
        assert text == path.read_text(), (
            f"differs from {path}; --update-golden accepts the new text"
        )

    return compare
