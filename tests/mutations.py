"""Random damage to model files and saved modules, for fuzzing: the same seed, the same damage.

    mutated_model(rng, data, donors)      bytes of a model -> bytes that may be a model
    mutated_module(rng, data)             bytes of a saved module -> (bytes, forged)

Models are damaged as bytes and as protobuf messages: any field of any message is deleted, doubled,
swapped, replaced by an interesting value, or taken from the same place of another model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message
from onnx import ModelProto, helper

Rng = np.random.Generator

NUMBERS = (
    0, 1, -1, 2, 3, 7, 16, 17, 64, 255, 256, 1000, 65536, 2**31 - 1, 2**31, -(2**31), 2**40,
    2**62, 2**63 - 1, -(2**63),
)  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e38, -1e38, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "", "x", "y", "batch", "a" * 300, "\0", "../../../../etc/passwd", "/etc/passwd", ".", "..",
    "com.acme", "NOTSET", "SAME_UPPER", "linear", "i", "ij,jk->ik", "...", "Loop", "If", "Scan",
)  # fmt: skip
NESTING = 60  # levels of graphs within graphs; protobuf itself reads about 30


# ---- bytes --------------------------------------------------------------------------------------
def damaged_bytes(rng: Rng, data: bytes, donors: Sequence[bytes]) -> bytes:
    """One to four changes of bytes: flips, cuts, copies, pieces of other files."""
    found = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        if not found:
            break
        at = int(rng.integers(0, len(found)))
        length = int(min(len(found) - at, 1 << rng.integers(0, 8)))
        kind = rng.integers(0, 7)
        if kind == 0:
            found[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            found[at] = int(rng.integers(0, 256))
        elif kind == 2:
            del found[at : at + length]
        elif kind == 3:
            found[at:at] = found[at : at + length]
        elif kind == 4:
            del found[at:]
        elif kind == 5:
            found[at : at + length] = bytes(length)
        else:
            other = donors[int(rng.integers(0, len(donors)))]
            start = int(rng.integers(0, max(1, len(other))))
            found[at:at] = other[start : start + length]
    return bytes(found)


# ---- protobuf fields ----------------------------------------------------------------------------
def _places(message: Message) -> list[tuple[Message, Any]]:
    """Every (message, descriptor of a field that it has), of nested messages too."""
    found: list[tuple[Message, Any]] = []
    stack = [message]
    while stack:
        m = stack.pop()
        for field, value in m.ListFields():
            found.append((m, field))
            if field.type == field.TYPE_MESSAGE:
                stack.extend(value if field.is_repeated else [value])
    return found


def _value(rng: Rng, field: Any, old: Any, texts: Sequence[str]) -> Any:
    """An interesting value for a scalar field."""
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return FLOATS[int(rng.integers(0, len(FLOATS)))]
    if field.type == field.TYPE_ENUM:
        values = field.enum_type.values
        return values[int(rng.integers(0, len(values)))].number
    if field.type == field.TYPE_STRING:
        return texts[int(rng.integers(0, len(texts)))]
    if field.type == field.TYPE_BYTES:
        kind = rng.integers(0, 3)
        if kind == 0:
            return old[: int(rng.integers(0, len(old) + 1))]
        if kind == 1:
            return bytes(rng.integers(0, 256, len(old), np.uint8))
        return texts[int(rng.integers(0, len(texts)))].encode()
    # Sizes near the old one pass more checks than extreme ones.
    near = rng.random() < 0.5
    value = int(old) + int(rng.integers(-2, 3)) if near else NUMBERS[rng.integers(0, len(NUMBERS))]
    bits = 31 if field.type in (field.TYPE_INT32, field.TYPE_SINT32) else 63
    return max(-(1 << bits), min(value, (1 << bits) - 1))


def _damage_field(rng: Rng, m: Message, field: Any, texts: Sequence[str]) -> None:
    value = getattr(m, field.name)
    if not field.is_repeated:
        if field.type == field.TYPE_MESSAGE or rng.random() < 0.15:
            m.ClearField(field.name)
        else:
            setattr(m, field.name, _value(rng, field, value, texts))
        return
    kind, at = rng.integers(0, 5), int(rng.integers(0, len(value)))
    message = field.type == field.TYPE_MESSAGE
    if kind == 0:
        del value[at]
    elif kind == 1:
        value.append(value[at])
    elif kind == 2 or (kind == 3 and message):
        items = [*value]
        other = int(rng.integers(0, len(items)))
        items[at], items[other] = items[other], items[at]
        if message:
            items = [type(v).FromString(v.SerializeToString()) for v in items]
        del value[:]
        value.extend(items)
    elif kind == 3:
        value[at] = _value(rng, field, value[at], texts)
    else:
        del value[int(rng.integers(0, len(value))) :]


def _transplant(rng: Rng, places: list[tuple[Message, Any]], donor: Message) -> None:
    """A field takes the value that a message of the same type has in another model."""
    m, field = places[int(rng.integers(0, len(places)))]
    others = [
        o
        for o, f in _places(donor)
        if f.number == field.number and o.DESCRIPTOR.full_name == m.DESCRIPTOR.full_name
    ]
    if others:
        other = others[int(rng.integers(0, len(others)))]
        m.ClearField(field.name)
        part = type(m)()
        value = getattr(other, field.name)
        if field.is_repeated:
            getattr(part, field.name).extend(value)
        elif field.type == field.TYPE_MESSAGE:
            getattr(part, field.name).CopyFrom(value)
        else:
            setattr(part, field.name, value)
        m.MergeFrom(part)


def _symbolic(rng: Rng, model: ModelProto) -> None:
    """A size of an input gets a name."""
    dims = [d for v in model.graph.input for d in v.type.tensor_type.shape.dim]
    if dims:
        dims[int(rng.integers(0, len(dims)))].dim_param = "nm"[int(rng.integers(0, 2))]


def _external(rng: Rng, model: ModelProto) -> None:
    """A weight is said to lie in a file somewhere."""
    tensors = model.graph.initializer
    if tensors:
        t = tensors[int(rng.integers(0, len(tensors)))]
        t.data_location = onnx.TensorProto.EXTERNAL
        t.ClearField("raw_data")
        place = TEXTS[int(rng.integers(0, len(TEXTS)))]
        t.external_data.add(key="location", value=place)
        if rng.random() < 0.5:
            t.external_data.add(key="offset", value=str(NUMBERS[rng.integers(0, len(NUMBERS))]))


def _nested(rng: Rng, model: ModelProto) -> None:
    """The graph moves into the branches of a deep If."""
    inner = onnx.GraphProto()
    inner.CopyFrom(model.graph)
    del inner.input[:]
    outputs = [v.name for v in inner.output]
    empty = helper.make_graph([], "empty", [], [onnx.ValueInfoProto(name=o) for o in outputs])
    with contextlib.suppress(DecodeError):  # deeper than protobuf reads
        for _ in range(int(rng.integers(1, NESTING))):
            node = helper.make_node("If", ["yes"], outputs, then_branch=inner, else_branch=empty)
            inner = helper.make_graph([node], "branch", [], empty.output)
    del model.graph.node[:]
    model.graph.node.extend(inner.node)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))


_WHOLE: tuple[Callable[[Rng, ModelProto], None], ...] = (_symbolic, _external, _nested)


def mutated_model(rng: Rng, data: bytes, donors: Sequence[bytes]) -> bytes:
    """A damaged copy of a model file; `donors` are other models to take pieces from."""
    if rng.random() < 0.15:
        return damaged_bytes(rng, data, donors)
    model = ModelProto.FromString(data)
    texts = [*TEXTS, *_names(model)]
    for _ in range(rng.integers(1, 4)):
        places = _places(model)
        kind = rng.random()
        if not places:
            break
        if kind < 0.08:
            _WHOLE[int(rng.integers(0, len(_WHOLE)))](rng, model)
        elif kind < 0.25:
            donor = ModelProto.FromString(donors[int(rng.integers(0, len(donors)))])
            _transplant(rng, places, donor)
        else:
            _damage_field(rng, *places[int(rng.integers(0, len(places)))], texts)
    return model.SerializeToString()


def _names(model: ModelProto) -> list[str]:
    found = [name for n in model.graph.node for name in (*n.input, *n.output, n.op_type)]
    attributes = [a.name for n in model.graph.node for a in n.attribute]
    return list(dict.fromkeys([*found, *attributes]))


# ---- saved modules ------------------------------------------------------------------------------
_PREAMBLE = struct.Struct("<8sIIQQ16s")
_JSON_VALUES: tuple[Any, ...] = (
    None, True, 0, 1, -1, 3, 2**31, 2**63, 2**200, 0.5, "", "x", "float32", "add", [], [1], {},
    {"a": 1}, ["mul", 2, "n"], ["input", 0], ["arena", 64],
)  # fmt: skip


def mutated_module(rng: Rng, data: bytes) -> tuple[bytes, bool]:
    """A damaged copy of a saved module, and whether its checksums were made to fit again."""
    if rng.random() < 0.5:
        damaged = damaged_bytes(rng, data, [data])
        return damaged, damaged == data
    header = _PREAMBLE.unpack(data[: _PREAMBLE.size])[3]
    document = json.loads(data[64 : 64 + header])
    for _ in range(rng.integers(1, 3)):
        _damage_json(rng, document)
    text = json.dumps(document).encode()
    # The text keeps its length where it can, so that the blobs stay in their places.
    text = text.ljust(max(header, -(-len(text) // 64) * 64))
    blobs = data[64 + header :]
    digest = hashlib.blake2b(text, digest_size=16).digest()
    size = 64 + len(text) + len(blobs)
    preamble = _PREAMBLE.pack(data[:8], 1, 0, len(text), size, digest)
    checked = preamble + hashlib.blake2b(preamble, digest_size=16).digest()
    return checked + text + blobs, True


def _damage_json(rng: Rng, document: Any) -> None:
    """One value of a JSON document is deleted or replaced."""
    places: list[tuple[Any, Any]] = []
    stack = [document]
    while stack:
        part = stack.pop()
        keys = list(part) if isinstance(part, dict) else range(len(part))
        for key in keys:
            places.append((part, key))
            if isinstance(part[key], dict | list):
                stack.append(part[key])
    if not places:
        return
    part, key = places[int(rng.integers(0, len(places)))]
    if rng.random() < 0.3:
        del part[key]
    else:
        part[key] = _JSON_VALUES[int(rng.integers(0, len(_JSON_VALUES)))]
