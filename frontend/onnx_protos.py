"""What the protos of an ONNX graph say: names, attributes, values read, function bodies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto

from minicompiler.errors import ImportModelError
from minicompiler.ir.expr import Const
from minicompiler.ir.graph import Value, type_of
from minicompiler.ir.types import Loc

from .onnx_node import Tensors


def domain_of(name: str) -> str:
    """The name of a domain; ONNX's own has two, of which one is empty."""
    return "" if name == "ai.onnx" else name


def key_of(n: NodeProto) -> str:
    domain = domain_of(n.domain)
    return f"{domain}.{n.op_type}" if domain else str(n.op_type)


def loc_of(n: NodeProto, file: str, position: int) -> Loc:
    return Loc(n.name or next((o for o in n.output if o), ""), file, position, n.op_type)


def all_nodes(nodes: Iterable[NodeProto]) -> list[NodeProto]:
    """The nodes, and those of graphs in their attributes."""
    found = []
    stack = list(nodes)[::-1]
    while stack:
        n = stack.pop()
        found.append(n)
        for a in n.attribute:
            for g in (a.g, *a.graphs):
                stack.extend(list(g.node)[::-1])
    return found


def attributes_of(n: NodeProto, given: Mapping[str, AttributeProto]) -> dict[str, AttributeProto]:
    """The attributes of a node by name; those that refer to the caller's take its values."""
    found = {}
    for a in n.attribute:
        if not a.ref_attr_name:
            found[a.name] = a
        elif a.ref_attr_name in given:
            found[a.name] = _renamed(given[a.ref_attr_name], a.name)
    return found


def reads(n: NodeProto) -> list[str]:
    """The values a node needs, those of its subgraphs included."""
    found = [i for i in n.input if i]
    for a in n.attribute:
        for g in (a.g, *a.graphs):
            if g.node or g.output:
                found.extend(_free_names(g))
    return found


def _free_names(g: GraphProto) -> list[str]:
    """The names a subgraph reads from around it, in order of first use."""
    own = {v.name for v in g.input} | {t.name for t in g.initializer}
    own |= {o for n in g.node for o in n.output}
    read = [r for n in g.node for r in reads(n)] + [v.name for v in g.output]
    return [name for name in dict.fromkeys(read) if name not in own]


def _renamed(a: AttributeProto, name: str) -> AttributeProto:
    copy = AttributeProto()
    copy.CopyFrom(a)
    copy.name = name
    return copy


def without_inputs(n: NodeProto, absent: set[str]) -> NodeProto:
    if absent.isdisjoint(n.input):
        return n
    copy = NodeProto()
    copy.CopyFrom(n)
    del copy.input[:]
    copy.input.extend("" if i in absent else i for i in n.input)
    return copy


def schema_with_body(n: NodeProto, opsets: Mapping[str, int]) -> Any:
    """The operator's schema when the specification defines it through other operators."""
    domain = domain_of(n.domain)
    # A name that is not UTF-8 (in a damaged file) is returned as bytes.
    if domain not in opsets or not isinstance(n.op_type, str):
        return None
    if not onnx.defs.has(n.op_type, domain):
        return None
    try:
        schema: Any = onnx.defs.get_schema(n.op_type, opsets[domain], domain)
    except onnx.defs.SchemaError:
        return None
    return schema if schema.has_function or schema.has_context_dependent_function else None


def body_of(
    schema: Any, n: NodeProto, inputs: Sequence[Any], opsets: Mapping[str, int]
) -> onnx.FunctionProto:
    """The newest function body that is not newer than the model's opset."""
    opset = opsets[domain_of(n.domain)]
    if schema.has_function:
        versions = [v for v in schema.function_opset_versions if v <= opset]
        version = max(versions, default=min(schema.function_opset_versions))
        return onnx.FunctionProto.FromString(schema.get_function_with_opset_version(version))
    versions = [v for v in schema.context_dependent_function_opset_versions if v <= opset]
    version = max(versions, default=min(schema.context_dependent_function_opset_versions))
    types = []
    for value in inputs:
        proto = onnx.TypeProto()
        if isinstance(value, Tensors):
            inner = _type_proto(value.items[0]) if value.items else onnx.TypeProto()
            proto = onnx.helper.make_sequence_type_proto(inner)
        elif isinstance(value, Value):
            proto = _type_proto(value)
        types.append(proto.SerializeToString())
    text = schema.get_context_dependent_function_with_opset_version(
        version, n.SerializeToString(), types
    )
    return onnx.FunctionProto.FromString(text)


def _type_proto(value: Value) -> onnx.TypeProto:
    t = type_of(value)
    shape = [s.value if type(s) is Const else str(s) for s in t.shape]
    code = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(t.dtype.numpy))
    return onnx.helper.make_tensor_type_proto(code, shape)


# ---- functions of a model ------------------------------------------------------------------------
def inlined_nodes(model: ModelProto, file: str) -> int:
    """The nodes of a model whose functions are expanded, which can grow exponentially."""
    bodies = {(f.domain, f.name, f.overload): f.node for f in model.functions}
    counts: dict[tuple[str, str, str], int] = {}
    calls = {
        key: [(n.domain, n.op_type, n.overload) for n in all_nodes(nodes)]
        for key, nodes in bodies.items()
    }
    for start in bodies:
        stack, open_ = [start], {start}
        while stack:
            key = stack[-1]
            waiting = [c for c in calls[key] if c in bodies and c not in counts]
            if waiting:
                if waiting[0] in open_:
                    raise ImportModelError(f"{file}: the function {waiting[0][1]!r} calls itself")
                stack.append(waiting[0])
                open_.add(waiting[0])
                continue
            counts[key] = sum(counts.get(c, 1) for c in calls[key])
            open_.discard(stack.pop())
    keys = [(n.domain, n.op_type, n.overload) for n in all_nodes(model.graph.node)]
    return sum(counts.get(key, 1) for key in keys)


def inlined(model: ModelProto) -> ModelProto:
    """The model with its own functions expanded. Weights stay out of it: they may be gigabytes."""
    from onnx import inliner

    slim = ModelProto()
    slim.CopyFrom(ModelProto(ir_version=model.ir_version, opset_import=model.opset_import))
    slim.functions.extend(model.functions)
    g = model.graph
    slim.graph.CopyFrom(GraphProto(name=g.name, node=g.node, input=g.input, output=g.output))
    done = inliner.inline_local_functions(slim)
    done.graph.initializer.extend(g.initializer)
    return done
