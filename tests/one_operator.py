"""One operator of the builder, compiled alone."""

from __future__ import annotations

from typing import Any

import numpy as np

import minicompiler as mc
from minicompiler.frontend.builder import Builder


def run(op: str, x: np.ndarray, dynamic: bool = False, **attrs: Any) -> np.ndarray:
    """One operator, compiled in checked mode; asserts equal bits for one and two threads."""
    net = Builder("one", {"N": (1, 100_000)})
    shape = ("N", *x.shape[1:]) if dynamic else x.shape
    v = net.input("x", shape, x.dtype.name)
    fn = net.function(y=getattr(net, op)(v, **attrs))
    found = [mc.compile(fn, threads=t, checked=True)(x)[0] for t in (1, 2)]
    np.testing.assert_array_equal(*found)
    return np.asarray(found[0])
