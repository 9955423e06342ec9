"""One operator of the builder, compiled alone, or one tensor, scheduled."""

from __future__ import annotations

from typing import Any

import numpy as np

import minicompiler as mc
from minicompiler import te
from minicompiler.frontend.builder import Builder
from minicompiler.ir.tir import PrimFunc
from minicompiler.ir.verify_tir import verify_tir
from minicompiler.lower.to_tir import from_tensors
from minicompiler.schedules.cpu import schedule
from minicompiler.target import Target

AVX2 = Target.parse("cpu:avx2")


def run(op: str, x: np.ndarray, dynamic: bool = False, **attrs: Any) -> np.ndarray:
    """One operator, compiled in checked mode; asserts equal bits for one and two threads."""
    net = Builder("one", {"N": (1, 100_000)})
    shape = ("N", *x.shape[1:]) if dynamic else x.shape
    v = net.input("x", shape, x.dtype.name)
    fn = net.function(y=getattr(net, op)(v, **attrs))
    found = [mc.compile(fn, threads=t, checked=True)(x)[0] for t in (1, 2)]
    np.testing.assert_array_equal(*found)
    return np.asarray(found[0])


def scheduled(y: te.Tensor, x: te.Tensor) -> PrimFunc:
    """The loop nest that the rules make of y for AVX2, verified after each step."""
    return schedule(from_tensors("f", [x], [y]), AVX2, after_step=verify_tir).func
