"""Thread pools that end with their test, and what to run on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from pool_kernels import Kernels

from minicompiler.runtime.pool import Pool


@pytest.fixture
def make_pool() -> Iterator[Callable[[int], Pool]]:
    made: list[Pool] = []

    def make(size: int) -> Pool:
        made.append(Pool(size))
        return made[-1]

    yield make
    for pool in made:
        pool.shutdown()


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels()
