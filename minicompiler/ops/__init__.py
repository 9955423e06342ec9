"""The operators: importing this package registers all of them in `ir.op.REGISTRY`.

Each is a module-level variable of its family's file, under its own name (with a trailing
underscore where Python uses the name): `ops.elementwise.add`, `ops.conv.conv`, `ops.shape.shape_`.
"""

from ..ir.op import REGISTRY
from . import (
    activations,
    affine,
    append,
    codes,
    contract,
    control,
    conv,
    count,
    cumulative,
    elementwise,
    evaluate,
    index,
    linalg,
    max_roi,
    norm,
    order,
    padding,
    pairs,
    pieces,
    pool,
    quant,
    recurrent,
    reduce,
    resize,
    roi,
    sample,
    scatter,
    shape,
    trees,
)

OWN = frozenset(REGISTRY.values())
"""The operators of the package, as opposed to those of its users."""

__all__ = [
    "OWN",
    "activations", "affine", "append", "codes", "contract", "control", "conv", "count",
    "cumulative", "elementwise", "evaluate", "index", "linalg", "max_roi", "norm", "order",
    "padding", "pairs", "pieces", "pool", "quant", "recurrent", "reduce", "resize", "roi",
    "sample", "scatter", "shape", "trees",
]  # fmt: skip
