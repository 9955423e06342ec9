"""ONNX models: from a file, bytes or a ModelProto to a graph Function.

    fn = load("bert.onnx", dims={"batch": (1, 64), "sequence": (8, 512, 8)})

Symbolic dimensions of inputs become `Dim`s with the given bounds (default: 1 and up), or constants
where `dims` holds a number. Weights are views of the file's bytes or memory maps. Operators that
are not supported are reported all at once. Spec: https://onnx.ai/onnx/repo-docs/IR.html
"""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Union

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from minicompiler.errors import ImportModelError, ShapeError, UnsupportedError
from minicompiler.ir.arith import Arith
from minicompiler.ir.expr import Const, Dim, Expr, free_vars, substitute
from minicompiler.ir.graph import (
    Apply,
    Constant,
    Function,
    Input,
    Item,
    Value,
    content_of,
    function_dims,
    may_have_content,
    type_of,
)
from minicompiler.ir.op import assumptions
from minicompiler.ir.types import Loc, TensorType
from minicompiler.limits import Budget

from .onnx_data import element_type, tensor_array
from .onnx_file import map_file, parse
from .onnx_math import Converter
from .onnx_node import Nothing, OnnxNode, Tensors, items
from .onnx_ops import CONVERTERS
from .onnx_protos import (
    all_nodes,
    attributes_of,
    body_of,
    domain_of,
    inlined,
    inlined_nodes,
    key_of,
    loc_of,
    reads,
    schema_with_body,
    without_inputs,
)
from .onnx_schema import check_names, check_node, schema_of
from .onnx_values import KnownValues, Quotients, with_sizes

Source = Union[str, "os.PathLike[str]", bytes, ModelProto]
Bounds = int | tuple[int, int | None] | tuple[int, int | None, int]
OLDEST_OPSET = 6
_NAMED = 3  # nodes named per unsupported operator
_EXPANSION_DEPTH = 8
_SMALL = 4096  # sizes that may turn out to be too small


def load(
    source: Source,
    dims: Mapping[str, Bounds] | None = None,
    budget: Budget | None = None,
    converters: Mapping[str, Converter] | None = None,
) -> Function:
    """Imports a model.

    Args:
        source: a path, the bytes of a file, or a model in memory (which is not changed).
        dims: bounds of symbolic dimensions by name: a number makes the dimension constant,
            otherwise (lo, hi) or (lo, hi, multiple), both ends included; hi may be None.
        budget: limits for models that are not trusted (default: those of `Limits()`).
        converters: more operators, or other meanings of known ones, as in onnx_ops.CONVERTERS.

    Raises:
        LimitError: the model exceeds a limit.
        ImportModelError: unreadable file, unsupported operators (all of them), broken graph.
        ShapeError: operators whose inputs do not fit together, naming the node.
    """
    folder: Path | None = None
    budget = budget or Budget()
    weights: list[memoryview | None] = []
    if isinstance(source, ModelProto):
        # Not counted: its bytes are in memory already.
        model, file = source, source.graph.name or "model"
    else:
        if isinstance(source, bytes | bytearray | memoryview):
            file, data = "model", memoryview(source).cast("B")
        else:
            path = Path(source)
            file, folder, data = path.name, path.parent, map_file(path)
        budget.use("model_bytes", len(data))
        model, weights = parse(data, file)
    if len(model.functions):
        budget.check("nodes", inlined_nodes(model, file))
        model = inlined(model)
    known = {**CONVERTERS, **(converters or {})}
    bounds, used = dict(dims or {}), dict(budget.used)
    while True:
        failure: ShapeError | None = None
        importer = _Importer(model, file, folder, bounds, weights, budget, known)
        with assumptions() as needs:
            try:
                fn = importer.run()
            except ShapeError as e:  # perhaps only for sizes that what came before excludes
                failure = e
        every = (d for n in needs for e in n for d in free_vars(e) if isinstance(d, Dim))
        asked = {d: None for d in every if d.name in importer.dims}  # not what data decides
        known_better = _bounds_from(asked if failure else function_dims(fn), needs)
        if not known_better:
            if failure is not None:
                raise failure
            return fn
        bounds.update(known_better)
        budget.used.update(used)  # paid for once


def _bounds_from(dims: Iterable[Dim], needs: Sequence[tuple[Expr, Expr]]) -> dict[str, Bounds]:
    """Bounds of the dimensions that cannot be as small as they are said to be, or have one size.

    Where windows do not fit the smallest images, every call with such sizes would be refused, while
    many a shape could not be simplified for their sake. And a model that was traced with one token
    may call their number symbolic; as 1 it may be broadcast, where another size would be needed.
    """
    found: dict[str, Bounds] = {}
    for dim in dims:
        only = next((k for k in (_only_size(n, dim) for n in needs) if k is not None), 0)
        if dim.lo <= only <= (dim.hi or only) and only % dim.multiple_of == 0 < only:
            found[dim.name] = (only, only)
            continue
        own = [n for n in needs if free_vars(n[0]) | free_vars(n[1]) == {dim}]
        sizes = range(dim.lo, min(dim.lo + _SMALL, dim.hi or _SMALL) + 1, dim.multiple_of)
        least = next((k for k in sizes if all(_holds(n, dim, k) for n in own)), dim.lo)
        if least > dim.lo:
            found[dim.name] = (least, dim.hi, dim.multiple_of)
    return found


def _only_size(need: tuple[Expr, Expr], dim: Dim) -> int | None:
    """The size of `dim` without which two sizes differ: 3 for b * 768 == b * dim * 256."""
    difference = Arith({}).poly(need[0] - need[1])
    if len(difference) != 2:
        return None
    plain, product = sorted(difference, key=len)
    others = [x for x in product if x is not dim]
    positive = all(type(x) is Dim and x.lo > 0 for x in plain)
    if not positive or product.count(dim) != 1 or tuple(others) != plain:
        return None
    size, rest = divmod(-difference[plain], difference[product])
    return None if rest else size


def _holds(need: tuple[Expr, Expr], dim: Dim, size: int) -> bool:
    a, b = (substitute(e, {dim: Const(size)}) for e in need)
    return a is b


Env = dict[str, Any]  # Values, and Tensors or Nothing of onnx_node


class _Importer:
    """One model on its way in."""

    def __init__(
        self,
        model: ModelProto,
        file: str,
        folder: Path | None,
        dims: Mapping[str, Bounds],
        weights: Sequence[memoryview | None],
        budget: Budget,
        converters: Mapping[str, Converter],
    ) -> None:
        self.converters = converters
        self.model, self.file, self.folder, self.weights = model, file, folder, weights
        self.bounds = dims
        self.dims: dict[str, Expr] = {}
        self.opsets = self._opsets()
        self.depth = 0
        self.budget = budget
        self.values = KnownValues(budget)
        self.quotients = Quotients(self.values)
        self.minted: dict[str, int] = {}

    def run(self) -> Function:
        g = self.model.graph
        check_names(g, self.file)
        env: Env = {}
        for t, raw in itertools.zip_longest(g.initializer, self.weights):
            env[t.name] = self._constant(t, raw)
        for s in g.sparse_initializer:
            raise ImportModelError(
                f"{self.file}: initializer {s.values.name!r} is sparse: not supported"
            )
        params = []
        for value in g.input:
            if value.name not in env:
                p = Input(value.name, self._input_type(value))
                env[value.name] = p
                params.append(p)
        self._check_dims()
        self._check_operators(g.node, self.opsets)
        self._nodes(g.node, env, self.opsets)
        results: list[Value] = []
        names: list[str] = []
        for value in g.output:
            if value.name not in env:
                raise ImportModelError(
                    f"{self.file}: the output {value.name!r} is not computed by any node",
                    hint=_nearest(value.name, env),
                )
            found = env[value.name]
            if isinstance(found, Nothing):
                raise ImportModelError(f"{self.file}: the output {value.name!r} is {found}")
            if isinstance(found, Tensors):  # "seq" of two tensors: "seq.0" and "seq.1"
                results += found.items
                names += [f"{value.name}.{k}" for k in range(len(found.items))]
            else:
                results.append(found)
                names.append(value.name)
        name = Path(self.file).stem or "model"
        return Function(name, tuple(params), tuple(results), False, tuple(names))

    # ---- head of the model ----------------------------------------------------------------------
    def _opsets(self) -> dict[str, int]:
        found = {domain_of(o.domain): o.version for o in self.model.opset_import}
        for domain, known in found.items():
            if not -(2**31) <= known < 2**31:
                raise ImportModelError(f'{self.file} uses version {known} of "{domain}"')
        version = found.get("")
        newest = onnx.defs.onnx_opset_version()
        if version is None:
            if not found:
                raise ImportModelError(
                    f"{self.file} does not say which version of ONNX operators it uses"
                )
        elif version > newest or (version < OLDEST_OPSET and not self._unchanged(version)):
            raise ImportModelError(
                f"{self.file} uses opset {version}; {OLDEST_OPSET} to {newest} are known",
                hint="convert it with onnx.version_converter"
                if version < OLDEST_OPSET
                else "install a newer version of the package onnx",
            )
        return found

    def _unchanged(self, version: int) -> bool:
        """True when the operators of the model mean the same in the oldest opset that is known."""
        if version < 1:
            return False
        for n in all_nodes(self.model.graph.node):
            if domain_of(n.domain) or not onnx.defs.has(n.op_type):
                return False
            old, new = (schema_of(n.op_type, v, "") for v in (version, OLDEST_OPSET))
            if old is None or new is None or old.since_version != new.since_version:
                return False
        return True

    def _constant(self, tensor: TensorProto, raw: memoryview | None = None) -> Constant:
        loc = Loc(tensor.name, self.file)
        self.budget.check("rank", len(tensor.dims), (loc,))
        data = tensor_array(tensor, self.folder, self.file, raw)
        if tensor.data_location == TensorProto.EXTERNAL:
            self.budget.use("model_bytes", data.nbytes, (loc,))
        return Constant(data, tensor.name)

    def _input_type(self, value: Any) -> TensorType:
        kind = value.type.WhichOneof("value")
        if kind != "tensor_type":
            raise ImportModelError(
                f"{self.file}: the input {value.name!r} is a {kind or 'value without type'}, "
                "not a tensor"
            )
        t = value.type.tensor_type
        if not t.HasField("shape"):
            raise ImportModelError(
                f"{self.file}: the input {value.name!r} has no shape",
                hint="run onnx.shape_inference, or export with named dynamic dimensions",
            )
        self.budget.check("rank", len(t.shape.dim), (Loc(value.name, self.file),))
        shape = [self._size(value.name, k, d) for k, d in enumerate(t.shape.dim)]
        return TensorType(
            tuple(shape), element_type(t.elem_type, f"the input {value.name!r}", self.file)
        )

    def _size(self, name: str, axis: int, d: Any) -> Expr:
        if d.HasField("dim_value") and d.dim_value >= 0:
            return Const(d.dim_value)
        label = d.dim_param or f"{name}.{axis}"
        if label not in self.dims:
            self.dims[label] = _dim(label, self.bounds.get(label, (1, None)))
        return self.dims[label]

    def _check_dims(self) -> None:
        unknown = [name for name in self.bounds if name not in self.dims]
        if unknown:
            known = ", ".join(map(repr, self.dims)) or "none"
            raise ImportModelError(
                f"{self.file} has no dimension {', '.join(map(repr, unknown))}; "
                f"its dimensions are: {known}",
                hint=_nearest(unknown[0], self.dims),
            )

    # ---- operators ------------------------------------------------------------------------------
    def _check_operators(self, nodes: Iterable[NodeProto], opsets: Mapping[str, int]) -> None:
        """Raises one error for all operators that cannot be imported."""
        missing: dict[str, list[str]] = {}
        used: dict[str, int] = {}
        for n in all_nodes(nodes):
            used[key_of(n)] = used.get(key_of(n), 0) + 1
            if key_of(n) not in self.converters and schema_with_body(n, opsets) is None:
                missing.setdefault(key_of(n), []).append(n.name or next(iter(n.output), ""))
        if not missing:
            return
        lines = []
        for op, names in sorted(missing.items()):
            shown = ", ".join(f'"{n}"' for n in names[:_NAMED])
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            near = difflib.get_close_matches(op, self.converters, 1)
            alike = f"   (nearest supported: {near[0]})" if near else ""
            lines.append(f"{len(names)} x {op}: {shown}{more}{alike}")
        count = len(missing)
        raise UnsupportedError(
            f"{self.file} uses {count} operator{'s' if count > 1 else ''} that "
            f"{'are' if count > 1 else 'is'} not supported",
            excerpt="\n".join(lines),
            hint="give compile() converters for them: docs/extending.md",
            operators={op: len(names) for op, names in missing.items()},
            used=used,
        )

    # ---- nodes ----------------------------------------------------------------------------------
    def _nodes(
        self,
        nodes: Sequence[NodeProto],
        env: Env,
        opsets: Mapping[str, int],
        at: Loc | None = None,
        given: Mapping[str, AttributeProto] | None = None,
    ) -> None:
        """Converts nodes into `env`.

        at: the location to use for all. given: the attributes of the call whose body the nodes are.
        """
        nodes = list(nodes)  # a repeated field may make a new wrapper each time it is read
        position = {id(n): k for k, n in enumerate(nodes, 1)}
        for n in self._ordered(nodes, env):
            label = n.name or next((o for o in n.output if o), "")
            loc = at or Loc(label, self.file, position[id(n)], n.op_type)
            self.budget.use("nodes", 1, (loc,))
            self.budget.check_time((loc,))
            results = self._convert(n, env, opsets, loc, given or {})
            for made in results:
                if isinstance(made, Apply | Item):
                    self.budget.check("rank", type_of(made).rank, (loc,))
            results = tuple(self._as_numbers(made) for made in results)
            wanted = [k for k, o in enumerate(n.output) if o]
            if any(k >= len(results) or results[k] is None for k in wanted):
                raise ImportModelError(
                    f"{n.op_type} with {len(n.output)} results: only {len(results)} are supported",
                    (loc,),
                )
            env.update((n.output[k], results[k]) for k in wanted)

    def _convert(
        self,
        n: NodeProto,
        env: Env,
        opsets: Mapping[str, int],
        loc: Loc,
        given: Mapping[str, AttributeProto],
    ) -> tuple[Any, ...]:
        inputs = tuple(env[i] if i else None for i in n.input)
        opset = opsets.get(domain_of(n.domain), 1)
        attributes = attributes_of(n, given)
        check_node(n, attributes, inputs, opset, loc)
        convert = self.converters.get(key_of(n))

        def expand() -> tuple[Any, ...]:
            if schema_with_body(n, opsets) is None:
                raise ImportModelError(f"this form of {n.op_type} is not supported", (loc,))
            return self._expand(n, inputs, env, opsets, loc, given)

        if convert is None:
            return expand()

        def graph(name: str, *args: Any) -> tuple[Any, ...]:
            return self._branch(attributes[name].g, env, opsets, args, loc)

        node = OnnxNode(
            n.op_type,
            opset,
            inputs,
            self._values(attributes),
            tuple(n.output),
            loc,
            self.values,
            self.quotients,
            self.minted,
            lambda: [v for v in env.values() if isinstance(v, Value)],
            graph,
            expand,
        )
        try:
            made = convert(node)
        except (ImportModelError, ShapeError) as e:
            e.locs = e.locs or (loc,)
            raise
        if isinstance(made, tuple):
            return made
        return items(made) if isinstance(made, Apply) else (made,)

    def _as_numbers(self, made: Any) -> Any:
        """Sizes that exporters compute by way of floats have no content; as numbers or expressions
        they have one, if they do not depend on data."""
        if not isinstance(made, Apply) or isinstance(made.type, tuple):
            return made
        if not may_have_content(made.type) or content_of(made) is not None:
            return made
        known = self.values.of(made)
        if known is not None:
            return Constant(known, locs=made.locs)
        sizes = self.quotients.sizes(made)
        return made if sizes is None else with_sizes(made, sizes)

    def _values(self, attributes: Mapping[str, AttributeProto]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, a in attributes.items():
            if a.type == AttributeProto.TENSOR:
                found[name] = tensor_array(a.t, self.folder, self.file)
            elif a.type == AttributeProto.STRING:
                found[name] = a.s.decode("utf-8", "replace")
            elif a.type == AttributeProto.STRINGS:
                found[name] = [s.decode("utf-8", "replace") for s in a.strings]
            elif a.type not in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
                found[name] = onnx.helper.get_attribute_value(a)
        return found

    def _ordered(self, nodes: Sequence[NodeProto], env: Env) -> list[NodeProto]:
        """Nodes after what they read (files should be sorted, some are not)."""
        makers: dict[str, int] = {}
        for k, n in enumerate(nodes):
            for o in n.output:
                if o and (o in makers or (o in env and not isinstance(env[o], Constant))):
                    raise ImportModelError(
                        f"{self.file}: the value {o!r} is computed twice",
                        (loc_of(n, self.file, k + 1),),
                    )
                if o:
                    makers[o] = k
        order: list[NodeProto] = []
        state = [0] * len(nodes)  # 1: waits for its inputs, 2: done
        for start in range(len(nodes)):
            stack = [(start, False)]
            while stack:
                k, ready = stack.pop()
                if ready:
                    state[k] = 2
                    order.append(nodes[k])
                    continue
                if state[k]:
                    continue
                state[k] = 1
                stack.append((k, True))
                for name in reads(nodes[k]):
                    source = makers.get(name)
                    if source is None and name not in env:
                        raise ImportModelError(
                            f"{self.file}: {nodes[k].op_type} reads {name!r}, which is neither "
                            "an input, an initializer nor the result of a node",
                            (loc_of(nodes[k], self.file, k + 1),),
                            hint=_nearest(name, [*env, *makers]),
                        )
                    if source is not None and state[source] == 1:
                        raise ImportModelError(
                            f"{self.file}: the graph has a cycle: {nodes[k].op_type} reads "
                            f"{name!r}, which depends on its own result",
                            (
                                loc_of(nodes[k], self.file, k + 1),
                                loc_of(nodes[source], self.file, source + 1),
                            ),
                        )
                    if source is not None and not state[source]:
                        stack.append((source, False))
        return order

    def _branch(
        self, g: GraphProto, outer: Env, opsets: Mapping[str, int], args: Sequence[Any], loc: Loc
    ) -> tuple[Any, ...]:
        """The results of a subgraph for values of its inputs, in the place of its node."""
        env = dict(outer)
        env.update((t.name, self._constant(t)) for t in g.initializer)
        env.update((v.name, a) for v, a in zip(g.input, args, strict=False))
        with assumptions():  # what it needs is needed only when it runs
            self._nodes(g.node, env, opsets)
        missing = [v.name for v in g.output if v.name not in env]
        if missing:
            raise ImportModelError(
                f"the result {missing[0]!r} of the graph {g.name!r} is not computed", (loc,)
            )
        return tuple(env[v.name] for v in g.output)

    # ---- operators defined by other operators ---------------------------------------------------
    def _expand(
        self,
        n: NodeProto,
        inputs: tuple[Any, ...],
        env: Env,
        opsets: Mapping[str, int],
        loc: Loc,
        given: Mapping[str, AttributeProto],
    ) -> tuple[Any, ...]:
        """Imports a node through the function body that the ONNX specification holds for it."""
        schema = schema_with_body(n, opsets)
        assert schema is not None
        if self.depth > _EXPANSION_DEPTH:
            raise ImportModelError(f"{n.op_type} is defined by itself", (loc,))
        attributes = attributes_of(n, given)
        resolved = NodeProto(op_type=n.op_type, domain=n.domain, input=n.input, output=n.output)
        resolved.attribute.extend(attributes.values())
        body = body_of(schema, resolved, inputs, opsets)
        for default in body.attribute_proto:
            attributes.setdefault(default.name, default)
        for name, spec in schema.attributes.items():
            if spec.default_value.name:
                attributes.setdefault(name, spec.default_value)
        inner: Env = {}
        for k, name in enumerate(body.input):
            value = inputs[k] if k < len(inputs) else None
            if value is not None:
                inner[name] = value
        absent = {name for name in body.input if name not in inner}
        nodes = [without_inputs(m, absent) for m in body.node]
        versions = {domain_of(o.domain): o.version for o in body.opset_import}
        versions = versions or dict(opsets)
        # The body of an operator of another domain may leave ONNX's own version unsaid.
        versions.setdefault("", opsets.get("", onnx.defs.onnx_opset_version()))
        self._check_operators(nodes, versions)
        self.depth += 1
        self._nodes(nodes, inner, versions, loc, attributes)
        self.depth -= 1
        # An optional result that this body does not compute is None.
        return tuple(inner.get(o) for o in body.output)


# ---- names and dims -----------------------------------------------------------------------------
def _dim(name: str, bounds: Bounds) -> Expr:
    if isinstance(bounds, int | np.integer) and not isinstance(bounds, bool):
        if bounds < 0:
            raise ImportModelError(f"dims: {name!r} is {bounds}, a size cannot be negative")
        return Const(int(bounds))
    ok = isinstance(bounds, tuple | list) and len(bounds) in (2, 3)
    lo, hi, multiple = (*bounds, 1)[:3] if ok else (1, None, 1)  # type: ignore[misc]
    ok = ok and all(
        isinstance(v, int) and not isinstance(v, bool)
        for v in (lo, multiple, 0 if hi is None else hi)
    )
    if not ok or lo < 0 or multiple < 1 or (hi is not None and hi < lo):
        raise ImportModelError(
            f"dims: {name!r} has the bounds {bounds!r}",
            hint="give a number, (lo, hi) or (lo, hi, multiple), 0 <= lo <= hi, multiple >= 1",
        )
    # Sizes are multiples, so the bounds can be tightened to the multiples they contain.
    lo = -(-lo // multiple) * multiple
    hi = None if hi is None else hi // multiple * multiple
    if hi is not None and hi < lo:
        raise ImportModelError(f"dims: {name!r} has no multiple of {multiple} in {bounds!r}")
    return Const(lo) if lo == hi else Dim(name, lo, hi, multiple)


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, [k for k in known if k], 1)
    return f"did you mean {near[0]!r}?" if near else ""
