"""Ctrl-C at any moment ends the work with KeyboardInterrupt and leaves pool and cache usable."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from onnx_models import conv_net

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are other ones there")

PRELUDE = """
import os, signal, sys, threading
import numpy as np
import minicompiler as mc
from onnx_models import conv_net, numbers

# A background job of a shell ignores the signal, and so would its children.
signal.signal(signal.SIGINT, signal.default_int_handler)

def interrupted(run, seconds):
    timer = threading.Timer(seconds, os.kill, [os.getpid(), signal.SIGINT])
    try:
        timer.start()
        run()
        timer.join()   # the work was done first: the signal is still to come
    except KeyboardInterrupt:
        return True
    finally:
        timer.cancel()
    return False
"""


def script(text: str, folder: Path) -> str:
    """Runs a program with an empty cache; what it printed."""
    here = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(text)],
        env={**os.environ, "MINICOMPILER_CACHE": str(folder), "PYTHONPATH": here},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_in_the_middle_of_compiling(tmp_path: Path) -> None:
    out = script(
        """
        count = 0
        for k in range(6):
            count += interrupted(lambda: mc.compile(conv_net("n"), threads=2), 0.02 + 0.1 * k)
        m = mc.compile(conv_net("n"), threads=2)
        x = numbers(2, 3, 13, 13)
        os.environ["MINICOMPILER_CACHE"] += "-new"
        fresh = mc.compile(conv_net("n"), threads=2)
        print(count > 0, np.array_equal(m(x)[0], fresh(x)[0]), threading.active_count() < 20)
        """,
        tmp_path / "cache",
    )
    assert out.split() == ["True"] * 3
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_in_the_middle_of_calls(tmp_path: Path) -> None:
    out = script(
        """
        m = mc.compile(conv_net("n"), threads=2)
        xs = [numbers(n, 3, 13, 13) for n in (1, 7)]
        expected = [m(x)[0] for x in xs]

        def work():
            while True:
                for x in xs:
                    m(x)

        count = sum(interrupted(work, 0.001 + 0.0037 * k) for k in range(30))
        same = [np.array_equal(m(x)[0], y) for x, y in zip(xs, expected)]
        print(count, all(same), m._pool.size)
        """,
        tmp_path,
    )
    assert out.split() == ["30", "True", "2"]


def test_the_command_line_ends_with_130(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(conv_net("n").SerializeToString())
    environment = {**os.environ, "MINICOMPILER_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "minicompiler.cli", "compile", "net.onnx"]
    codes = set()
    for _ in range(2):
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as above
        )  # fmt: skip
        # From its first kernel in the cache on, the program is in the middle of compiling.
        deadline = time.monotonic() + 60
        while not list((tmp_path / "cache").rglob("*.mck")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        codes.add(process.returncode)
        assert "Traceback" not in errors
        for entry in (tmp_path / "cache").rglob("*.mck"):
            entry.unlink()
    assert codes == {130}
    assert not (tmp_path / "net.mc").exists()


def test_an_interrupt_that_a_destructor_swallows_comes_again(tmp_path: Path) -> None:
    out = script(
        """
        import time
        from minicompiler.cli import main

        class Last:
            def __del__(self):
                signal.raise_signal(signal.SIGINT)

        @main.command("work")
        def work():
            last = Last()
            del last
            time.sleep(60)
            print("to the end")

        try:
            main(["work"])
        except SystemExit as end:
            print(end.code)
        """,
        tmp_path,
    )
    assert out.split() == ["130"]
