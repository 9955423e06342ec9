"""All values of an ONNX model as onnxruntime computes them, by name.

    onnxruntime_values("model.onnx", {"x": x})["conv1_output"]

Every intermediate value is marked as an output, and graph optimisations are off: they would not let
the values between operators be seen.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from minicompiler.errors import MinicompilerError


def onnxruntime_values(path: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Raises MinicompilerError where onnxruntime is not installed or cannot run the model."""
    try:
        import onnxruntime as ort
    except ImportError:
        raise MinicompilerError(
            "onnxruntime is not installed", hint="pip install onnxruntime, or --against interpreter"
        ) from None
    model = onnx.load(path)
    outputs = {o.name for o in model.graph.output}
    for node in model.graph.node:
        for name in node.output:
            if name and name not in outputs:
                model.graph.output.append(onnx.ValueInfoProto(name=name))
                outputs.add(name)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        names = [o.name for o in session.get_outputs()]
        found = session.run(names, {i.name: feeds[i.name] for i in session.get_inputs()})
    except Exception as error:  # a foreign package raises what it likes
        raise MinicompilerError(f"onnxruntime cannot run {path}: {error}") from error
    return {n: a for n, a in zip(names, found, strict=True) if isinstance(a, np.ndarray)}
