"""The operators: importing this package registers all of them in `ir.op.REGISTRY`.

Each is a module-level variable of its family's file: `ops.elementwise.add`, `ops.conv.conv`.
"""

from . import activations, conv, elementwise, evaluate, linalg, norm, pool, reduce, shape

__all__ = [
    "activations", "conv", "elementwise", "evaluate", "index", "linalg", "norm", "pool", "reduce",
    "shape",
]  # fmt: skip
