"""Laws of whole compiled models: saving, dynamic dimensions, threads, batches, other runtimes.

The numbers of the laws are those of the architecture: 9 (a saved model gives the same bits), 10 (a
dynamic model equals the static one), 11 (the same bits for any number of threads and any batch).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, note, settings
from onnx import ModelProto
from onnx_models import attention, conv_net, mlp, numbers, reference_of
from random_graphs import feeds, graphs
from tolerance import assert_close

import minicompiler as mc
from minicompiler.ir.graph import Function
from minicompiler.ir.text import function_text
from minicompiler.ops.evaluate import run_reference
from minicompiler.runtime.module import Module

LONGEST_SUM = 128
DIMS = {"batch": (1, 16), "sequence": (1, 40)}
Shape = Callable[[int, int], tuple[int, ...]]
# name -> (model for some sizes, shape of its input for a batch and a sequence, its dimensions)
MODELS: dict[str, tuple[Callable[..., ModelProto], Shape, tuple[str, ...]]] = {
    "mlp": (mlp, lambda n, s: (n, 20), ("batch",)),
    "conv_net": (conv_net, lambda n, s: (n, 3, 13, 13), ("batch",)),
    "attention": (attention, lambda n, s: (n, s, 24), ("batch", "sequence")),
}
SIZES = [(1, 1), (2, 5), (3, 8), (8, 17), (13, 33)]


@pytest.fixture(scope="module")
def dynamic() -> Callable[..., Module]:
    """Compiled models with dynamic dimensions, by name and number of threads."""
    made: dict[tuple[str, int], Module] = {}

    def get(name: str, threads: int = 1) -> Module:
        if (name, threads) not in made:
            build, _, dims = MODELS[name]
            ranges = {d: DIMS[d] for d in dims}
            made[name, threads] = mc.compile(build(*dims), dims=ranges, threads=threads)
        return made[name, threads]

    return get


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


# ---- against other implementations ---------------------------------------------------------------
@pytest.mark.smoke
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("level", [0, 3])
def test_a_model_computes_what_onnxruntime_computes(name: str, level: int) -> None:
    build, shape, _ = MODELS[name]
    x = numbers(*shape(1, 6))
    (y,) = mc.compile(build(), threads=2, level=level)(x)
    (want,) = reference_of(build(), {"x": x})
    assert_close(y, want, LONGEST_SUM)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(graphs(most=8))
def test_a_random_graph_computes_its_numpy_meaning(fn: Function) -> None:
    check_graph(fn, threads=2, checked=False)


@pytest.mark.nightly
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(graphs(most=12, symbolic=True))
def test_a_random_dynamic_graph_computes_its_numpy_meaning(fn: Function) -> None:
    check_graph(fn, threads=2, checked=True)


def check_graph(fn: Function, **options: Any) -> None:
    note(function_text(fn))
    values = feeds(fn)
    module = mc.compile(fn, **options)
    results = module(*[values[p.name] for p in fn.params])
    for got, want in zip(results, run_reference(fn, values), strict=True):
        # Terms of a long chain may cancel, so the tolerance is relative to a generous magnitude.
        largest = max(1.0, float(np.abs(want[np.isfinite(want)]).max(initial=0)))
        assert_close(got, want, LONGEST_SUM, largest)


# ---- law 9 ---------------------------------------------------------------------------------------
@pytest.mark.smoke
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_gives_the_same_bits(
    name: str, dynamic: Callable[..., Module], tmp_path: Path
) -> None:
    path = tmp_path / "model.mc"
    original = dynamic(name)
    original.save(path)
    loaded = mc.load(path, threads=2)
    for n, s in SIZES[:3]:
        x = numbers(*MODELS[name][1](n, s), seed=n)
        assert same_bits(loaded(x)[0], original(x)[0])


# ---- law 10 --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
def test_a_dynamic_model_equals_the_static_one(name: str, dynamic: Callable[..., Module]) -> None:
    build, shape, dims = MODELS[name]
    for n, s in SIZES[1:4]:
        x = numbers(*shape(n, s), seed=n)
        static = mc.compile(build(*(n, s)[: len(dims)]), threads=1)
        assert_close(dynamic(name)(x)[0], static(x)[0], LONGEST_SUM)


@pytest.mark.parametrize("name", MODELS)
def test_a_dynamic_model_computes_what_onnxruntime_computes(
    name: str, dynamic: Callable[..., Module]
) -> None:
    build, shape, dims = MODELS[name]
    for n, s in SIZES:
        x = numbers(*shape(n, s), seed=n)
        (want,) = reference_of(build(*dims), {"x": x})
        assert_close(dynamic(name, 2)(x)[0], want, LONGEST_SUM)


# ---- law 11 --------------------------------------------------------------------------------------
@pytest.mark.smoke
@pytest.mark.parametrize("name", MODELS)
def test_the_number_of_threads_does_not_change_a_bit(
    name: str, dynamic: Callable[..., Module]
) -> None:
    for n, s in SIZES:
        x = numbers(*MODELS[name][1](n, s), seed=n)
        (alone,) = dynamic(name, 1)(x)
        for threads in (2, 3):
            assert same_bits(dynamic(name, threads)(x)[0], alone), f"{threads} threads, {n} x {s}"


@pytest.mark.parametrize("name", MODELS)
def test_what_else_is_in_a_batch_does_not_change_a_bit(
    name: str, dynamic: Callable[..., Module]
) -> None:
    module = dynamic(name, 2)
    for n, s in SIZES[1:]:
        x = numbers(*MODELS[name][1](n, s), seed=n)
        (together,) = module(x)
        for k in range(n):
            (alone,) = module(x[k : k + 1])
            assert same_bits(together[k : k + 1], alone), f"row {k} of {n}, sequence {s}"
