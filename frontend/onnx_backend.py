"""The protocol of ONNX's backend tests, `onnx.backend.base.Backend`, on compiled modules.

    rep = Backend.prepare(model);  y, = rep.run([x])         compiled once
    Backend.run_node(node, [x])                              a model of one node

Inputs that decide shapes (the axes of a ReduceSum) are not known before `run`: such a model is
compiled for their values at the first call with them, and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper
from onnx.backend import base

from minicompiler import driver
from minicompiler.errors import RunError
from minicompiler.runtime.module import Module

from .onnx_known import flattened, needed_inputs, nested_inputs, with_tensors, with_values


class BackendRep(base.BackendRep):
    """A compiled model."""

    def __init__(self, model: ModelProto, options: dict[str, Any]) -> None:
        self.model, self.options = model, options
        fixed = {t.name for t in model.graph.initializer}
        self.inputs = [v.name for v in model.graph.input if v.name not in fixed]
        self.needed = needed_inputs(model)
        self.nested = nested_inputs(model)
        self.modules: dict[tuple[Any, ...], Module] = {}
        if not self.needed and not self.nested:
            self._module({}, {})

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The outputs for inputs in the model's order, or by name."""
        del kwargs
        if isinstance(inputs, np.ndarray):
            inputs = [inputs]
        if not isinstance(inputs, dict):
            if len(inputs) > len(self.inputs):
                raise RunError(f"{len(inputs)} inputs given, the model has {len(self.inputs)}")
            inputs = dict(zip(self.inputs, inputs, strict=False))
        known = {n: np.asarray(inputs[n]) for n in self.needed if n in inputs}
        nested = {n: inputs[n] for n in self.nested}
        module = self._module(known, nested)
        feeds = dict(inputs)
        for name, value in nested.items():
            feeds.update(flattened(name, value))
        names = [t.name for t in module.outputs]
        made = dict(zip(names, module(*[feeds[t.name] for t in module.inputs]), strict=True))
        return tuple(self._result(v, made) for v in self.model.graph.output)

    def _result(self, v: onnx.ValueInfoProto, made: dict[str, Any]) -> Any:
        """An output of the model, of the module's outputs: a sequence was taken apart."""
        if v.name in made:
            return made[v.name]
        count = sum(n.startswith(f"{v.name}.") and n[len(v.name) + 1 :].isdigit() for n in made)
        return [made[f"{v.name}.{k}"] for k in range(count)]

    def _module(self, known: dict[str, np.ndarray], nested: dict[str, Any]) -> Module:
        flat = [(n, flattened(n, value)) for n, value in nested.items()]
        key = (
            *((n, a.dtype.name, a.shape, a.tobytes()) for n, a in known.items()),
            *((n, *((a.dtype.name, a.shape) for a in parts.values())) for n, parts in flat),
        )
        if key not in self.modules:
            model = with_tensors(self.model, nested) if nested else self.model
            model = with_values(model, known) if known else model
            self.modules[key] = driver.compile(model, **self.options)
        return self.modules[key]


class Backend(base.Backend):
    """See the module text; keyword arguments of `prepare` are those of `minicompiler.compile`."""

    @classmethod
    def prepare(cls, model: ModelProto, device: str = "CPU", **kwargs: Any) -> BackendRep:
        """Raises MinicompilerError for a model that cannot be compiled."""
        cls._check(device)
        return BackendRep(model, kwargs)

    @classmethod
    def run_model(
        cls, model: ModelProto, inputs: Any, device: str = "CPU", **kwargs: Any
    ) -> tuple[Any, ...]:
        return cls.prepare(model, device, **kwargs).run(inputs)

    @classmethod
    def run_node(
        cls,
        node: NodeProto,
        inputs: Any,
        device: str = "CPU",
        outputs_info: Sequence[tuple[np.dtype, tuple[int, ...]]] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        del outputs_info
        opset = kwargs.pop("opset_version", onnx.defs.onnx_opset_version())
        arrays = dict(zip([i for i in node.input if i], map(np.asarray, inputs), strict=False))
        params = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in arrays.items()
        ]
        results = [onnx.ValueInfoProto(name=o) for o in node.output if o]
        graph = helper.make_graph([node], node.op_type, params, results)
        versions = [helper.make_opsetid(node.domain, opset if not node.domain else 1)]
        model = helper.make_model(graph, opset_imports=versions)
        return cls.run_model(model, arrays, device, **kwargs)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        return device.split(":")[0] == "CPU"

    @classmethod
    def _check(cls, device: str) -> None:
        if not cls.supports_device(device):
            raise RunError(f"the device {device!r} is not supported", hint='device="CPU"')


prepare = Backend.prepare
run_model = Backend.run_model
run_node = Backend.run_node
supports_device = Backend.supports_device

__all__ = ["Backend", "BackendRep", "prepare", "run_model", "run_node", "supports_device"]
