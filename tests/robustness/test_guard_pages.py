"""Compiled code touches no byte outside of its buffers: see tests/guarded.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

GUARDED = Path(__file__).parent.parent / "guarded.py"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="mprotect is not there")


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], cwd=GUARDED.parent, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip


def test_no_access_leaves_a_buffer() -> None:
    """Three networks at odd sizes, and every 60th of ONNX's test models."""
    done = run(str(GUARDED), "7", "60")
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1:]}\n{done.stderr[-3000:]}"
    assert "'fine': " in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("offset", ["size", "-1"])
def test_an_access_outside_ends_the_process(offset: str) -> None:
    text = f"""
    import ctypes, guarded
    size = 100
    buffer = guarded.Guarded(size, at_end={offset == "size"})
    ctypes.c_uint8.from_address(buffer.address + size - 1).value = 1
    ctypes.c_uint8.from_address(buffer.address).value = 1
    print("inside", flush=True)
    ctypes.c_uint8.from_address(buffer.address + {offset}).value = 1
    print("outside")
    """
    done = run("-c", "\n".join(line.strip() for line in text.splitlines()))
    assert done.stdout == "inside\n" and done.returncode < 0
