"""Memory of results is used again once nobody holds them, and never before."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import minicompiler as mc
from minicompiler.frontend.builder import Builder
from minicompiler.runtime.arrays import address


@pytest.fixture(scope="module")
def module() -> mc.Module:
    net = Builder("two")
    x = net.input("x", ("n",))
    return mc.compile(net.function(y=net.add(x, x), z=net.neg(x)), threads=1)


def numbers(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(n, np.float32)


def test_calls_whose_results_are_dropped_take_no_new_memory(module: mc.Module) -> None:
    places = set()
    x = numbers(100_000)
    for _ in range(20):
        y, z = module(x)  # while the last results are still there
        places |= {address(y), address(z)}
    assert len(places) <= 6


def test_results_that_are_held_stay(module: mc.Module) -> None:
    held = []
    for seed in range(12):
        n = 50_000 + 10_000 * (seed % 3)
        x = numbers(n, seed)
        y, z = module(x)
        held.append((x, y[10:].reshape(-1, 2)[:, 1], memoryview(z)))
        del y, z
    for x, part, z in held:
        np.testing.assert_array_equal(part, (x + x)[11::2])
        np.testing.assert_array_equal(np.asarray(z), -x)


def test_a_result_may_be_the_next_input(module: mc.Module) -> None:
    x = numbers(60_000)
    y = x
    for _ in range(6):
        y = module(y)[0]
    np.testing.assert_array_equal(y, x * 64)


def test_calls_at_once_share_no_results(module: mc.Module) -> None:
    wrong = []

    def work(seed: int) -> None:
        x = numbers(70_000, seed)
        for _ in range(30):
            y, z = module(x)
            if not ((y == x + x).all() and (z == -x).all()):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
