"""Many threads, many modules, many processes: results stay right and memory stays bounded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx_models import attention, conv_net, mlp, numbers

import minicompiler as mc
from minicompiler.runtime.module import Module

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def together(work: Callable[[int], None], threads: int = 16) -> None:
    """Runs work(0), work(1), ... at once; the first error is raised."""
    errors: list[BaseException] = []
    ready = threading.Barrier(threads)

    def run(k: int) -> None:
        ready.wait()
        try:
            work(k)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=run, args=(k,)) for k in range(threads)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(120)
        assert not w.is_alive()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("threads", [1, 2])
def test_sixteen_threads_on_one_module(threads: int) -> None:
    m = mc.compile(conv_net("n"), threads=threads)
    inputs = {n: numbers(n, 3, 13, 13, seed=n) for n in range(1, 6)}
    expected = {n: m(x)[0] for n, x in inputs.items()}

    def work(k: int) -> None:
        for step in range(25):
            n = (k + step) % 5 + 1
            np.testing.assert_array_equal(m(inputs[n])[0], expected[n])

    together(work)
    assert 1 <= len(m._free) <= 17


def test_several_modules_at_once() -> None:
    modules = [mc.compile(make("n"), threads=k % 2 + 1)
               for k, make in enumerate((mlp, conv_net, attention) * 2)]  # fmt: skip
    inputs = [
        numbers(*[2 if isinstance(s, str) else s for s in m.inputs[0].shape]) for m in modules
    ]
    expected = [m(x)[0] for m, x in zip(modules, inputs, strict=True)]

    def work(k: int) -> None:
        for step in range(20):
            at = (k + step) % len(modules)
            np.testing.assert_array_equal(modules[at](inputs[at])[0], expected[at])

    together(work)


def test_compiling_in_several_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINICOMPILER_CACHE", str(tmp_path))
    x = numbers(2, 20)
    found: list[np.ndarray] = []
    together(lambda k: found.append(mc.compile(mlp("n"), threads=1)(x)[0]), 4)
    for y in found:
        np.testing.assert_array_equal(y, found[0])


def test_processes_with_one_cold_cache(tmp_path: Path) -> None:
    program = """
        import sys
        import numpy as np, minicompiler as mc
        from onnx_models import conv_net, numbers
        m = mc.compile(conv_net("n"), threads=1)
        np.save(sys.argv[1], m(numbers(2, 3, 13, 13))[0])
    """
    here = str(Path(__file__).parent.parent)
    environment = {**os.environ, "MINICOMPILER_CACHE": str(tmp_path / "c"), "PYTHONPATH": here}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / f"{k}.npy")],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for k in range(3)
    ]  # fmt: skip
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert (process.returncode, errors) == (0, "")
    results = [np.load(tmp_path / f"{k}.npy") for k in range(3)]
    for y in results:
        np.testing.assert_array_equal(y, results[0])
    assert not list((tmp_path / "c").rglob("*.tmp"))


@needs_fork
@pytest.mark.parametrize("ran", [False, True], ids=["after import", "after a run"])
def test_a_forked_child_compiles_and_runs(ran: bool, tmp_path: Path) -> None:
    x = numbers(3, 20)
    expected = mc.compile(mlp("n"), threads=2)(x)[0] if ran else None
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os.environ["MINICOMPILER_CACHE"] = str(tmp_path)
        y = mc.compile(mlp("n"), threads=2)(x)[0]
        os._exit(0 if expected is None or np.array_equal(y, expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_ten_thousand_calls_of_varying_sizes_take_no_memory() -> None:
    m = mc.compile(mlp("n"), dims={"n": (1, 4096)}, threads=2)
    x = numbers(4096, 20)
    m(x)
    for step in range(1000):
        m(x[: step * 37 % 4096 + 1])
    before = resident()
    for step in range(10_000):
        m(x[: step * 37 % 4096 + 1])
    assert resident() - before < 8 << 20
    assert len(m._free) == 1


def test_modules_give_their_memory_back() -> None:
    def once() -> None:
        m = mc.compile(mlp("n"), threads=1, record=False)
        assert isinstance(m, Module)
        m(numbers(64, 20))

    for _ in range(10):
        once()
    before = resident()
    for _ in range(60):
        once()
    assert resident() - before < 24 << 20


def resident() -> int:
    """Bytes of memory this process uses."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        pytest.skip("the system does not tell")


def test_an_idle_module_uses_no_processor() -> None:
    m = mc.compile(mlp("n"), threads=2)
    m(numbers(64, 20))
    start = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - start < 0.1
