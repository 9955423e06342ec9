"""Small functions as lowering makes them, with inputs: what tests of TIR and of schedules work on.

for name in SAMPLES: sample = SAMPLES[name]()
sample.func                        the PrimFunc
sample.inputs(seed)                numpy inputs, and sample.dims its symbolic sizes
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from minicompiler import te
from minicompiler.ir import interp
from minicompiler.ir.arith import sizes
from minicompiler.ir.expr import Const, Dim, Expr, binary, cast, const, maximum, minimum, select
from minicompiler.ir.tir import PrimFunc
from minicompiler.ir.types import DType, float32, int64
from minicompiler.lower.to_tir import from_tensors


@dataclasses.dataclass(frozen=True)
class Sample:
    """A function, the sizes of its dims, and how many terms its longest sum has."""

    func: PrimFunc
    dims: Mapping[str, int] = dataclasses.field(default_factory=dict)
    length: int = 16

    def inputs(self, seed: int = 0) -> list[np.ndarray]:
        """Random inputs; integers are indices in 0..2."""
        rng = np.random.default_rng(seed)
        made = []
        for p in self.func.params[: len(self.func.params) - self.func.results]:
            shape = sizes(p.shape, self.dims)
            if p.dtype.is_float:
                made.append(rng.uniform(-1, 1, shape).astype(p.dtype.numpy))
            else:
                made.append(rng.integers(0, 3, shape).astype(p.dtype.numpy))
        return made

    def run(self, func: PrimFunc | None = None, seed: int = 0) -> list[np.ndarray]:
        """The results by the interpreter, of this function or of a scheduled one."""
        return interp.run(func or self.func, self.inputs(seed), self.dims)


def tensor(name: str, *shape: int | Expr, dtype: DType = float32) -> te.Tensor:
    return te.placeholder(name, shape, dtype)


def relu(x: te.Tensor) -> te.Tensor:
    return te.map_elements(lambda e: binary("max", e, const(0, e.dtype)), x, name="relu")


def product(a: te.Tensor, b: te.Tensor) -> te.Tensor:
    (k,) = te.reduce_vars(1)
    shape = (a.shape[0], b.shape[1])
    return te.compute(shape, lambda i, j: a[i, k] * b[k, j], "matmul", ("sum", {k: b.shape[0]}))


def matmul_of(m: int | Expr, k: int, n: int) -> PrimFunc:
    """relu(A @ B + bias), B constant."""
    a, b, bias = tensor("a", m, k), tensor("b", k, n), tensor("bias", n)
    return from_tensors("matmul", [a, b, bias], [relu(product(a, b) + bias)], [b, bias])


def matmul() -> Sample:
    return Sample(matmul_of(5, 7, 6), length=7)


def matmul_dynamic() -> Sample:
    return Sample(matmul_of(Dim("n", 1, 12), 4, 6), {"n": 5}, 4)


def plain_matmul() -> Sample:
    a, b = tensor("a", 4, 8), tensor("b", 8, 4)
    return Sample(from_tensors("plain_matmul", [a, b], [product(a, b)]), length=8)


def conv() -> Sample:
    """A 3x3 convolution with padding, a stage of its own for the padding, bias."""
    x, w, bias = tensor("x", 1, 2, 5, 4), tensor("w", 3, 2, 3, 3), tensor("bias", 3)
    r, s, c = te.reduce_vars(3)

    def padded(n: Expr, ch: Expr, i: Expr, j: Expr) -> Expr:
        inside = (Const(1) <= i) & (i <= 5) & (Const(1) <= j) & (j <= 4)
        return select(inside, x[n, ch, i - 1, j - 1], const(0, float32))

    p = te.compute((1, 2, 7, 6), padded, "pad")
    over = ("sum", {c: Const(2), r: Const(3), s: Const(3)})
    y = te.compute(
        (1, 3, 5, 4), lambda n, o, i, j: p[n, c, i + r, j + s] * w[o, c, r, s], "conv", over
    )
    z = te.compute((1, 3, 5, 4), lambda n, o, i, j: y[n, o, i, j] + bias[o], "add")
    return Sample(from_tensors("conv", [x, w, bias], [z], [w, bias]), length=18)


def softmax() -> Sample:
    return Sample(softmax_of(3, 10), length=10)


def softmax_dynamic() -> Sample:
    return Sample(softmax_of(3, Dim("n", 1, 20)), {"n": 9}, 9)


def softmax_of(m: int | Expr, n: int | Expr) -> PrimFunc:
    x = tensor("x", m, n)
    e = te.exp(x - te.max(x, -1))
    return from_tensors("softmax", [x], [e / te.sum(e, -1)])


def layer_norm() -> Sample:
    x, scale = tensor("x", 4, 6), tensor("scale", 6)
    mean = te.sum(x, -1) * (1 / 6)
    d = x - mean
    var = te.sum(d * d, -1) * (1 / 6)
    y = d / te.sqrt(var + 1e-5) * scale
    return Sample(from_tensors("layer_norm", [x, scale], [y]), length=6)


def transpose() -> Sample:
    x = tensor("x", 4, 6, 5)
    y = te.compute((5, 4, 6), lambda i, j, k: x[j, k, i] * 2.0, "transpose")
    return Sample(from_tensors("transpose", [x], [y]))


def gather() -> Sample:
    """Rows chosen by data: indices are clamped, as the operators do it."""
    x, at = tensor("x", 3, 6), tensor("at", 5, dtype=int64)

    def element(i: Expr, j: Expr) -> Expr:
        row = cast(at[i], int64)
        return x[maximum(minimum(row, Const(2)), Const(0)), j] + 1.0

    return Sample(from_tensors("gather", [x, at], [te.compute((5, 6), element, "gather")]))


def pooling() -> Sample:
    """The maximum over 2x2 windows."""
    x = tensor("x", 2, 6, 8)
    r, s = te.reduce_vars(2)
    over = ("max", {r: Const(2), s: Const(2)})
    y = te.compute((2, 3, 4), lambda c, i, j: x[c, i * 2 + r, j * 2 + s], "pool", over)
    return Sample(from_tensors("pooling", [x], [y]))


def chain_dynamic() -> Sample:
    """Elementwise stages over a symbolic matrix, the first used twice."""
    n = Dim("n", 1, 16)
    x = tensor("x", n, 4)
    a = te.exp(te.exp(x))
    return Sample(from_tensors("chain", [x], [relu(a * 2.0), a + x]), {"n": 7})


def repeated() -> Sample:
    n = Dim("n", 1, 64)
    x = tensor("x", n, 3)
    y = te.compute((n * 2, 9), lambda i, j: x[i % n, j % 3], "repeated")
    return Sample(from_tensors("repeated", [x], [y]), {"n": 5})


SAMPLES: dict[str, Callable[[], Sample]] = {
    f.__name__: f
    for f in (
        matmul, matmul_dynamic, plain_matmul, conv, softmax, softmax_dynamic, layer_norm,
        transpose, gather, pooling, chain_dynamic, repeated,
    )
}  # fmt: skip

__all__: Sequence[str] = ["SAMPLES", "Sample", "matmul_of", "product", "relu", "tensor"]
