"""Which inputs of an ONNX model have to be known while compiling, because shapes follow from them.

    needed_inputs(model) -> ["shape", "axes"]       Reshape(x, shape), ReduceSum(x, axes)
    with_values(model, {"shape": array})            the model with such inputs as initializers
    with_tensors(model, {"seq": [a, b]})            sequence inputs become tensors "seq.0", "seq.1"

Inputs that only carry data (also those whose shape alone matters) are never among those needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, helper

# Operator -> the positions of inputs that decide shapes or which code runs.
_DECIDING: dict[str, tuple[int, ...]] = {
    "AffineGrid": (1,), "BlackmanWindow": (0,), "CenterCropPad": (1,), "Col2Im": (1, 2),
    "ConstantOfShape": (0,), "CumSum": (1,), "CumProd": (1,), "DFT": (1, 2),
    "Dropout": (1, 2), "Expand": (1,), "HammingWindow": (0,), "HannWindow": (0,), "If": (0,),
    "Loop": (0, 1), "MaxUnpool": (2,), "MelWeightMatrix": (0, 1, 2, 3, 4),
    "NonMaxSuppression": (2, 3, 4), "OneHot": (1,), "Pad": (1, 2, 3), "Range": (0, 1, 2),
    "ReduceL1": (1,), "ReduceL2": (1,), "ReduceLogSum": (1,), "ReduceLogSumExp": (1,),
    "ReduceMax": (1,), "ReduceMean": (1,), "ReduceMin": (1,), "ReduceProd": (1,),
    "ReduceSum": (1,), "ReduceSumSquare": (1,), "Reshape": (1,), "Resize": (1, 2, 3),
    "STFT": (1, 3), "SequenceAt": (1,), "SequenceErase": (1,), "SequenceInsert": (2,),
    "Slice": (1, 2, 3, 4), "Split": (1,), "SplitToSequence": (1,), "Squeeze": (1,), "Tile": (1,),
    "TopK": (1,), "Unsqueeze": (1,), "Upsample": (1,),
}  # fmt: skip
_SHAPE_ONLY = ("Shape", "Size", "SequenceLength")


def needed_inputs(model: ModelProto) -> list[str]:
    """The inputs (without initializers) whose values have to be known, in the model's order."""
    makers: dict[str, NodeProto] = {}
    needed: list[str] = []
    for n in _nodes(model.graph):
        makers.update((o, n) for o in n.output if o)
        needed += [n.input[k] for k in _DECIDING.get(n.op_type, ()) if k < len(n.input)]
    seen: set[str] = set()
    while needed:
        name = needed.pop()
        if name and name not in seen:
            seen.add(name)
            maker = makers.get(name)
            if maker is not None and maker.op_type not in _SHAPE_ONLY:
                needed.extend(maker.input)
                graphs = [g for a in maker.attribute for g in (a.g, *a.graphs)]
                needed.extend(v.name for g in graphs for v in g.output)
    fixed = {t.name for t in model.graph.initializer}
    return [v.name for v in model.graph.input if v.name in seen and v.name not in fixed]


def with_values(model: ModelProto, values: Mapping[str, np.ndarray]) -> ModelProto:
    """A copy of the model in which these inputs are initializers."""
    made = ModelProto()
    made.CopyFrom(model)
    kept = [v for v in made.graph.input if v.name not in values]
    del made.graph.input[:]
    made.graph.input.extend(kept)
    made.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(a), name) for name, a in values.items()
    )
    return made


def nested_inputs(model: ModelProto) -> list[str]:
    """The inputs that are sequences or optionals."""
    return [v.name for v in model.graph.input if not v.type.HasField("tensor_type")]


def with_tensors(model: ModelProto, values: Mapping[str, Any]) -> ModelProto:
    """A copy in which such inputs are made from tensors, for values like these.

    values: a list (a sequence), an array or None (an optional) by name.
    """
    made = ModelProto()
    made.CopyFrom(model)
    inputs, makers = [], []
    for v in model.graph.input:
        if v.name not in values:
            inputs.append(v)
            continue
        value = values[v.name]
        parts = flattened(v.name, value)
        inputs += [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in parts.items()
        ]
        op = "SequenceConstruct" if isinstance(value, list) else "Optional"
        makers.append(helper.make_node(op, list(parts), [v.name]))
    del made.graph.input[:]
    made.graph.input.extend(inputs)
    del made.graph.node[:]
    made.graph.node.extend([*makers, *model.graph.node])
    return made


def flattened(name: str, value: Any) -> dict[str, np.ndarray]:
    """The tensors of a sequence or optional by the names that `with_tensors` gives them."""
    parts = value if isinstance(value, list) else [] if value is None else [value]
    return {f"{name}.{k}": np.asarray(a) for k, a in enumerate(parts)}


def _nodes(graph: GraphProto) -> Iterable[NodeProto]:
    """The nodes of a graph and of the graphs in their attributes."""
    for n in graph.node:
        yield n
        for a in n.attribute:
            for g in (a.g, *a.graphs):
                yield from _nodes(g)
