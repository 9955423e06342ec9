"""The operators: importing this package registers all of them in `ir.op.REGISTRY`.

Each is a module-level variable of its family's file, under its own name (with a trailing
underscore where Python uses the name): `ops.elementwise.add`, `ops.conv.conv`, `ops.shape.shape_`.
"""

from . import (
    activations,
    codes,
    contract,
    conv,
    count,
    elementwise,
    evaluate,
    index,
    linalg,
    norm,
    order,
    pieces,
    pool,
    quant,
    recurrent,
    reduce,
    resize,
    sample,
    scatter,
    shape,
)

__all__ = [
    "activations", "codes", "contract", "conv", "count", "elementwise", "evaluate", "index",
    "linalg", "norm", "order", "pieces", "pool", "quant", "recurrent", "reduce", "resize", "sample",
    "scatter", "shape",
]  # fmt: skip
