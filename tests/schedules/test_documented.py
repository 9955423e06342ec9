"""docs/schedules.md shows what the rules really make: each generated block is built and
compared."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from documented_kernels import KERNELS

from minicompiler.schedules.cpu import schedule
from minicompiler.target import Target

WIDEST = 240  # a transform matrix written out makes longer lines than anyone reads
PAGE = Path(__file__).parents[2] / "docs" / "schedules.md"


def _generated(name: str) -> str:
    s = schedule(KERNELS[name](), Target.parse("cpu:avx2"))
    steps = "\n".join(str(step) for step in s.steps)
    lines = [x if len(x) <= WIDEST else x[: WIDEST - 4] + " ..." for x in str(s.func).splitlines()]
    nest = "\n".join(lines)
    return f"<!-- generated {name} -->\n```\n{steps}\n\n{nest}\n```\n<!-- end -->\n"


@pytest.mark.parametrize("name", KERNELS)
def test_page_shows_the_schedule(name: str, request: pytest.FixtureRequest) -> None:
    text = PAGE.read_text()
    pattern = re.compile(rf"<!-- generated {name} -->\n(```.*?<!-- end -->\n)?", re.S)
    found = pattern.search(text)
    assert found, f"docs/schedules.md has no block for {name}"
    made = _generated(name)
    if request.config.getoption("--update-golden"):
        PAGE.write_text(text[: found.start()] + made + text[found.end() :])
        return
    assert found.group(0) == made, "run pytest --update-golden after checking the change"
