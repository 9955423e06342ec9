"""What compiled kernels refer to, how their inner loops look, and that they stay in their buffers.

Kernels are built from graphs by the passes and schedules that `compile` uses.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tolerance import assert_close

import minicompiler.ops  # noqa: F401
from minicompiler.codegen.native import compile_assembly, compile_object
from minicompiler.context import Context, Options
from minicompiler.driver import optimise
from minicompiler.ir.arith import evaluate_int
from minicompiler.ir.expr import Const
from minicompiler.ir.graph import Apply, Constant, Function, Input, Item, Value, apply, topological
from minicompiler.ir.op import REGISTRY
from minicompiler.ir.types import DType, TensorType, float32
from minicompiler.kernel import Kernel, build_kernel
from minicompiler.ops.evaluate import run_reference
from minicompiler.runtime import loader
from minicompiler.runtime.loader import Library
from minicompiler.runtime.plan import Size
from minicompiler.runtime.pool import kernel_symbols
from minicompiler.target import Target

HOST = Target.host()
on_x86 = pytest.mark.skipif(HOST.arch != "x86_64", reason="reads x86 assembly")


def value(name: str, *shape: int, dtype: DType = float32) -> Input:
    return Input(name, TensorType(tuple(map(Const, shape)), dtype))


def node(name: str, *args: Value, **attrs: Any) -> Value:
    op = REGISTRY[name]
    return apply(op, *args, attrs=op.attrs(**attrs))


def weights(*shape: int) -> Constant:
    return Constant(np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32))


def gemm(constant: bool, m: int = 67, k: int = 45, n: int = 83) -> Function:
    x, b, w = value("x", m, k), value("b", n), value("w", k, n)
    y = node("matmul", x, weights(k, n) if constant else w)
    y = node("relu", node("add", y, b))
    return Function("gemm", (x, b) if constant else (x, w, b), (y,))


def convolution(constant: bool, size: int = 13, dilation: int = 1) -> Function:
    x = value("x", 1, 19, size, size)
    w = value("w", 37, 19, 3, 3)
    filters = weights(37, 19, 3, 3) if constant else w
    pads = {"pads_begin": (dilation,), "pads_end": (dilation,), "dilations": (dilation,)}
    y = node("relu", node("conv", x, filters, **pads))
    return Function("convolution", (x,) if constant else (x, w), (y,))


def rows(width: int = 77) -> Function:
    x = value("x", 11, width)
    return Function("rows", (x,), (node("softmax", x, axis=-1),))


def elementwise(count: int = 4099, dtype: str = "float32") -> Function:
    x, y = value("x", count, dtype=DType(dtype)), value("y", count, dtype=DType(dtype))
    return Function("elementwise", (x, y), (node("tanh", node("add", node("exp", x), y)),))


def gathering() -> Function:
    x, i = value("x", 23, 7), value("i", 29, dtype=DType("int64"))
    return Function("gathering", (x, i), (node("gather", x, i),))


def remainders() -> Function:
    x, y = value("x", 45), value("y", 45)
    return Function("remainders", (x, y), (node("fmod", x, y), node("power", x, y)))


def transposed() -> Function:
    x = value("x", 23, 45)
    return Function("transposed", (x,), (node("sin", node("transpose", x, perm=(1, 0))),))


def pooled() -> Function:
    x = value("x", 1, 5, 11, 13)
    y = node("max_pool", x, kernel=(3, 3), strides=(2,), pads_begin=(1,), pads_end=(1,))
    return Function("pooled", (x,), (y,))


GRAPHS = [gemm(False), gemm(True), convolution(False), convolution(True), rows(), elementwise(),
          elementwise(1001, "bfloat16"), elementwise(1001, "float16"), elementwise(1001, "float64"),
          gathering(), remainders(), transposed(), pooled()]  # fmt: skip


def kernels(fn: Function, target: Target) -> Iterator[tuple[Apply, Kernel, list[str]]]:
    """The calls of an optimised graph, their kernels and the LLVM text of these."""
    ctx = Context(target, Options(record=True))
    for v in topological(optimise(fn, ctx).results):
        if isinstance(v, Apply):
            assert isinstance(v.op, Function)
            before = len(ctx.stages)
            kernel = build_kernel(v.op, tuple(isinstance(a, Constant) for a in v.args), ctx)
            yield v, kernel, [s.text for s in ctx.stages[before:] if s.name == "llvm"]


# ---- symbols ------------------------------------------------------------------------------------
def undefined_symbols(image: bytes) -> set[str]:
    """The names a 64-bit little-endian ELF object needs from elsewhere."""
    (table,) = struct.unpack_from("<Q", image, 40)
    size, count = struct.unpack_from("<HH", image, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", image, table + k * size) for k in range(count)]
    found = set()
    for _, kind, _, _, at, length, link, _, _, entry in sections:
        if kind != 2:  # SHT_SYMTAB
            continue
        names = sections[link][4]
        for k in range(at + entry, at + length, entry):
            name, _, _, section = struct.unpack_from("<IBBH", image, k)
            if section == 0:
                found.add(image[names + name : image.index(b"\0", names + name)].decode())
    return found


@pytest.mark.parametrize("level", ["cpu", "cpu:avx2", "cpu:avx512"])
@pytest.mark.parametrize("fn", GRAPHS, ids=lambda f: f.name)
def test_kernels_refer_to_nothing_but_the_allowed(fn: Function, level: str) -> None:
    if HOST.arch != "x86_64" and level != "cpu":
        pytest.skip("cross-compiles to x86")
    for _, kernel, _ in kernels(fn, Target.parse(level)):
        memory = {"memcpy", "memset", "memmove"}
        assert undefined_symbols(kernel.code) <= {"mc_barrier", "mc_claim", *memory}


def test_the_loader_allows_the_same() -> None:
    assert set(loader.C_FUNCTIONS) == {"memcpy", "memset", "memmove"}


def test_undefined_symbols_are_found() -> None:
    body = "  %y = call float @sinf(float %x)\n  ret float %y\n"
    text = f"declare float @sinf(float)\ndefine float @f(float %x) #0 {{\n{body}}}\n"
    assert undefined_symbols(compile_object(text, HOST)) == {"sinf"}


# ---- inner loops --------------------------------------------------------------------------------
def fma_loops(assembly: str) -> list[list[str]]:
    """The innermost loops with several fused multiply-adds: from a label to the jump back to it."""
    found: list[list[str]] = []
    labels: dict[str, int] = {}
    lines = [x.strip() for x in assembly.splitlines()]
    inner = 0  # nothing before this line: an inner loop has ended here
    for k, line in enumerate(lines):
        label = re.match(r"(\.L\w+):", line)
        if label:
            labels[label[1]] = k
        jump = re.match(r"j\w+\s+(\.L\w+)", line)
        if jump and jump[1] in labels and labels[jump[1]] >= inner:
            body = lines[labels[jump[1]] : k + 1]
            inner = k
            if sum(x.startswith("vfmadd") for x in body) >= 4:
                found.append(body)
    return found


@on_x86
@pytest.mark.parametrize("level", ["cpu:avx2", "cpu:avx512"])
@pytest.mark.parametrize(
    "fn", [gemm(True, 256, 300, 256), convolution(True, 28, dilation=2)], ids=["gemm", "conv"]
)
def test_inner_loops_hold_no_stack_access(fn: Function, level: str) -> None:
    target = Target.parse(level)
    register = "%zmm" if level == "cpu:avx512" else "%ymm"
    loops = 0
    for text in (text for _, _, texts in kernels(fn, target) for text in texts):
        assembly = compile_assembly(text, target)
        # Without a frame, rbp is a pointer like any other.
        framed = re.search(r"movq\s+%rsp, %rbp", assembly) is not None
        for body in fma_loops(assembly):
            loops += 1
            fused = [x for x in body if x.startswith("vfmadd")]
            assert all(register in x for x in fused), "\n".join(body)
            stack = [x for x in body if re.search(r"\(%r[sb]p[,)]" if framed else r"\(%rsp[,)]", x)]
            assert not stack, "\n".join(stack)
    assert loops


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
def test_what_is_loaded_already_is_not_loaded_under_a_mask(dtype: str) -> None:
    """The sign of x is x itself where x is neither above nor below 0."""
    x = value("x", 4096, dtype=DType(dtype))
    for _, _, texts in kernels(Function("sign", (x,), (node("sign", x),)), HOST):
        assert not any("masked" in text for text in texts)


@pytest.mark.parametrize("dtype", ["int8", "uint16", "int32", "uint32"])
def test_small_integers_are_divided_side_by_side(dtype: str) -> None:
    x, y = value("x", 4096, dtype=DType(dtype)), value("y", 4096, dtype=DType(dtype))
    for name in ("div", "mod"):
        (texts,) = (t for _, _, t in kernels(Function(name, (x, y), (node(name, x, y),)), HOST))
        assert not re.search(r"[su](div|rem) <", "".join(texts))


def test_places_that_are_worked_out_from_floats_are_vectors() -> None:
    """One channel of an image, read at places that are data: only the loads are one by one."""
    image, grid = value("x", 1, 1, 16, 64), value("g", 1, 16, 64, 2)
    fn = Function("sampled", (image, grid), (node("grid_sample", image, grid),))
    text = "".join(t for _, _, texts in kernels(fn, HOST) for t in texts)
    converted = set(re.findall(r"fptosi (\S+ \S+ \S+) %\S+ to (\S+ \S+ \S+)", text))
    assert converted
    assert all(f.endswith("float>") and i.endswith("i32>") for f, i in converted)


def test_generated_text_is_deterministic() -> None:
    for fn in (gemm(True), convolution(True), rows(), elementwise()):
        first, second = ([t for _, _, texts in kernels(fn, HOST) for t in texts] for _ in range(2))
        assert first == second


# ---- guard pages --------------------------------------------------------------------------------
class Fenced:
    """A buffer that ends (or starts) where memory that may not be touched begins (or ends)."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, at_end: bool) -> None:
        size = int(np.prod(shape)) * dtype.itemsize
        page = mmap.PAGESIZE
        room = -(-max(size, 1) // page) * page
        self.memory = mmap.mmap(-1, room + 2 * page)
        self.keep = ctypes.c_char.from_buffer(self.memory)
        start = ctypes.addressof(self.keep)
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for fence in (start, start + page + room):
            assert protect(fence, page, 0) == 0  # PROT_NONE
        offset = page + (room - size if at_end else 0)
        self.array = np.frombuffer(self.memory, dtype, int(np.prod(shape)), offset).reshape(shape)
        self.address = start + offset


def number(size: Size) -> int:
    """A workspace size without dims."""
    if isinstance(size, tuple):
        a, b = number(size[1]), number(size[2])
        return {"add": a + b, "mul": a * b, "sub": a - b, "floordiv": a // max(b, 1)}[size[0]]
    assert isinstance(size, int)
    return size


def run_fenced(fn: Function, feeds: list[np.ndarray], at_end: bool) -> list[np.ndarray]:
    """The results of a graph, every kernel on fenced buffers."""
    values: dict[int, Fenced] = {}

    def fenced(array: np.ndarray) -> Fenced:
        made = Fenced(array.shape, array.dtype, at_end)
        made.array[...] = array
        return made

    done = optimise(fn, Context(HOST, Options()))
    for p, a in zip(done.params, feeds, strict=True):
        values[id(p)] = fenced(a)
    ctx = Context(HOST, Options())
    for v in topological(done.results):
        if not isinstance(v, Apply):
            continue
        assert isinstance(v.op, Function)
        kernel = build_kernel(v.op, (False,) * len(v.args), ctx)
        types = v.type if isinstance(v.type, tuple) else (v.type,)
        results = []
        for r, t in zip(v.op.results, types, strict=True):
            layout = getattr(r, "layouts", (None,))[0]
            sizes = t.shape if layout is None else layout.physical_shape(t.shape)
            shape = tuple(evaluate_int(s, {}) for s in sizes)
            results.append(Fenced(shape, t.dtype.numpy, at_end))
        args = [values[id(a)] for a in v.args if a is not None]
        buffers = [(args if kind == "arg" else results)[k] for kind, k in kernel.params]
        room = number(kernel.shared) + number(kernel.local) + 64
        work = Fenced((room,), np.dtype(np.uint8), False)
        library = Library(kernel.code, [kernel.name], kernel_symbols())
        kinds = [ctypes.c_int32, ctypes.c_int32, *[ctypes.c_void_p] * (len(buffers) + 2)]
        call = ctypes.CFUNCTYPE(None, *kinds)(library.address(kernel.name))
        call(0, 1, None, *[b.address for b in buffers], work.address)
        if isinstance(v.type, tuple):
            for x in topological(done.results):
                if isinstance(x, Item) and x.tuple is v:
                    values[id(x)] = results[x.index]
        else:
            values[id(v)] = results[0]
    return [values[id(r)].array.copy() for r in done.results]


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("fn", [
    gemm(False), gemm(False, 1, 7, 5), gemm(False, 13, 300, 17), convolution(False),
    convolution(False, 5), rows(), rows(5), rows(1031), elementwise(), elementwise(7),
    elementwise(1001, "bfloat16"), elementwise(1001, "float16"), elementwise(1001, "float64"),
    gathering(), transposed(), pooled(),
], ids=lambda f: f.name)  # fmt: skip
def test_kernels_stay_in_their_buffers(fn: Function, at_end: bool) -> None:
    rng = np.random.default_rng(4)
    feeds = []
    for p in fn.params:
        shape = tuple(evaluate_int(s, {}) for s in p.type.shape)
        low, high = (0, 20) if p.type.dtype.is_int else (-1, 1)
        feeds.append(rng.uniform(low, high, shape).astype(p.type.dtype.numpy))
    for got, want in zip(run_fenced(fn, feeds, at_end), run_reference(fn, feeds), strict=True):
        assert_close(got.reshape(want.shape), np.asarray(want), 300, 3.0)
