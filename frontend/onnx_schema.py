"""What the ONNX specification says of a node, checked before the node is converted.

    check_node(node, attributes, inputs, opset, loc)
    check_names(graph, "net.onnx")                     every name is text, no value comes in twice

    ImportModelError: Conv has no attribute 'pad' in opset 20
      from Conv "conv1" (net.onnx:3)
      hint: did you mean 'pads'?

Checked are the numbers of inputs and results, the names and types of attributes, and the element
types. Converters then find what they ask for; operators of unknown domains are not checked.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import onnx
from onnx import AttributeProto, GraphProto, NodeProto

from minicompiler.errors import ImportModelError
from minicompiler.ir.graph import Apply, Value, type_of
from minicompiler.ir.types import DType, Loc

# Where ONNX names an element type otherwise.
_NAMES = {
    "float32": "float", "float64": "double", "float8_e4m3fn": "float8e4m3fn",
    "float8_e4m3fnuz": "float8e4m3fnuz", "float8_e5m2": "float8e5m2",
    "float8_e5m2fnuz": "float8e5m2fnuz", "float8_e8m0fnu": "float8e8m0",
    "float4_e2m1fn": "float4e2m1",
}  # fmt: skip

# onnxruntime had these before ONNX: its optimiser writes them into files of any opset.
_EARLIER = {"LayerNormalization": 17}


@lru_cache(maxsize=4096)
def schema_of(op_type: str, opset: int, domain: str) -> Any:
    """The operator in this version of its domain, or None."""
    if not 0 < opset < 2**31:
        return None
    try:
        return onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return None


def check_node(
    n: NodeProto,
    attributes: Mapping[str, AttributeProto],
    inputs: Sequence[Any],
    opset: int,
    loc: Loc,
) -> None:
    """Raises ImportModelError where a node is not what the specification allows.

    attributes: by name, references resolved. inputs: graph values, None where one is left out.
    opset: the version of the node's domain.
    """
    domain = "" if n.domain == "ai.onnx" else n.domain
    schema = schema_of(n.op_type, opset, domain)
    if schema is None and not domain and n.op_type in _EARLIER:
        schema = schema_of(n.op_type, _EARLIER[n.op_type], domain)
    if schema is None:
        if onnx.defs.has(n.op_type, domain):
            since = schema_of(n.op_type, onnx.defs.onnx_opset_version(), domain)
            hint = f"it exists since opset {since.since_version}" if since is not None else ""
            _fail(f"{n.op_type} is not an operator of opset {opset}", loc, hint)
        return
    if schema.deprecated:
        return
    _check_counts(n, schema, inputs, loc)
    _check_attributes(n, schema, attributes, opset, loc)
    _check_types(n, schema, inputs, loc)


def check_names(graph: GraphProto, file: str) -> None:
    """Raises ImportModelError for names that are no UTF-8 text, in graphs inside nodes as well, and
    for inputs, outputs or initializers that share a name."""
    for what, values in (
        ("input", graph.input),
        ("output", graph.output),
        ("initializer", graph.initializer),
    ):
        counts = Counter(v.name for v in values)
        for name, count in counts.items():
            if count > 1:
                raise ImportModelError(f"{file}: {count} {what}s are called {name!r}")
    stack = [graph]
    while stack:
        g = stack.pop()
        texts = [v.name for v in (*g.input, *g.output, *g.initializer)]
        texts += [d.dim_param for v in g.input for d in v.type.tensor_type.shape.dim]
        for n in g.node:
            texts += [n.op_type, n.domain, n.name, *n.input, *n.output]
            for a in n.attribute:
                texts += [a.name, a.ref_attr_name]
                stack += [a.g, *a.graphs]
        # protobuf returns bytes for what it cannot decode.
        wrong = next((t for t in texts if not isinstance(t, str)), None)
        if wrong is not None:
            raise ImportModelError(
                f"{file}: the name {wrong!r} is not UTF-8 text", hint="the file may be damaged"
            )


def _fail(message: str, loc: Loc, hint: str = "") -> NoReturn:
    raise ImportModelError(message, (loc,), hint=hint)


# Operators that ONNX's own models use without inputs, though the specification wants at least 1.
_EMPTY = frozenset({"SequenceConstruct"})


def _check_counts(n: NodeProto, schema: Any, inputs: Sequence[Any], loc: Loc) -> None:
    fewest = 0 if n.op_type in _EMPTY else schema.min_input
    for what, got, least, most in (
        ("inputs", len(inputs), fewest, schema.max_input),
        ("results", len(n.output), schema.min_output, schema.max_output),
    ):
        if not least <= got <= most:
            wanted = str(least) if least == most else f"{least} to {most}"
            if most > 1000:
                wanted = f"at least {least}"
            _fail(f"{n.op_type} has {got} {what}, the specification says {wanted}", loc)
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    for k, (formal, value) in enumerate(zip(schema.inputs, inputs, strict=False)):
        if value is None and formal.option == single:
            _fail(f"{n.op_type} needs its input number {k}, {formal.name!r}", loc)


def _check_attributes(
    n: NodeProto, schema: Any, attributes: Mapping[str, AttributeProto], opset: int, loc: Loc
) -> None:
    known = schema.attributes
    for name, a in attributes.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            _fail(
                f"{n.op_type} has no attribute {name!r} in opset {opset}",
                loc,
                f"did you mean {near[0]!r}?" if near else "",
            )
        wanted = known[name].type
        if a.type != int(wanted):
            got = AttributeProto.AttributeType.Name(a.type)
            _fail(f"the attribute {name!r} of {n.op_type} is {got}, not {wanted.name}", loc)
    for name, spec in known.items():
        if spec.required and name not in attributes:
            _fail(f"{n.op_type} needs the attribute {name!r}", loc)


def _check_types(n: NodeProto, schema: Any, inputs: Sequence[Any], loc: Loc) -> None:
    """Element types are among those allowed, and equal where the specification says so."""
    formals = schema.inputs
    seen: dict[str, tuple[int, DType]] = {}
    for k, value in enumerate(inputs):
        if not isinstance(value, Value) or (isinstance(value, Apply) and _several(value)):
            continue
        formal = formals[min(k, len(formals) - 1)]
        dtype = type_of(value).dtype
        if f"tensor({_NAMES.get(dtype.name, dtype.name)})" not in formal.types:
            names = sorted(t[7:-1] for t in formal.types if t.startswith("tensor("))
            wanted = ", ".join(names) or ", ".join(sorted(formal.types))
            _fail(
                f"input {k} of {n.op_type}, {formal.name!r}, has elements of type {dtype}",
                loc,
                f"{n.op_type} takes {wanted}; insert a Cast",
            )
        first, other = seen.setdefault(formal.type_str, (k, dtype))
        if other is not dtype and formal.is_homogeneous:
            _fail(
                f"{n.op_type} takes the same element type for its inputs {first} and {k}, "
                f"got {other} and {dtype}",
                loc,
                "insert a Cast",
            )


def _several(value: Apply) -> bool:
    return isinstance(value.type, tuple)
