"""The operators: importing this package registers all of them in `ir.op.REGISTRY`.

Each is a module-level variable of its family's file, under its own name (with a trailing
underscore where Python uses the name): `ops.elementwise.add`, `ops.conv.conv`, `ops.shape.shape_`.
"""

from . import (
    activations,
    codes,
    conv,
    elementwise,
    evaluate,
    index,
    linalg,
    norm,
    pieces,
    order,
    pool,
    quant,
    reduce,
    resize,
    scatter,
    shape,
)

__all__ = [
    "activations", "codes", "conv", "elementwise", "evaluate", "index", "linalg", "norm", "pieces", "pool",
    "quant", "reduce", "resize", "shape",
]  # fmt: skip
