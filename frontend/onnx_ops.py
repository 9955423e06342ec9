"""The table of ONNX operators: name -> converter (operators of other domains: `domain.Name`).

    CONVERTERS["Relu"](node) -> the graph value of its result

To support one more operator, write a converter in the file of its family and add a row there.
Operators without a row are expanded where the ONNX specification defines them through others.
"""

from __future__ import annotations

from .onnx_contrib import CONTRIB
from .onnx_contrib_attention import ATTENTION
from .onnx_control import CONTROL
from .onnx_count import COUNT
from .onnx_image import IMAGE
from .onnx_index import INDEX
from .onnx_math import MATH, Converter
from .onnx_ml import ML
from .onnx_nn import NN
from .onnx_quant import QUANT
from .onnx_recurrent import RECURRENT
from .onnx_shape import SHAPE
from .onnx_train import TRAIN
from .onnx_trees import TREES

CONVERTERS: dict[str, Converter] = {
    **MATH, **NN, **SHAPE, **INDEX, **IMAGE, **QUANT, **RECURRENT, **CONTROL, **TRAIN, **COUNT,
    **TREES, **ML, **CONTRIB, **ATTENTION,
}  # fmt: skip
