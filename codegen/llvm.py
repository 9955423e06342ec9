"""TIR -> LLVM IR text. One PrimFunc becomes one function

    void name(i32 tid, i32 nthreads, ptr barrier, ptr params..., i64 dims..., ptr workspace)

Every index computation is emitted once, at the shallowest loop level where its variables are known:
code motion and common subexpressions come from the way the text is put together, so LLVM's own IR
passes are hardly needed. Vector loops become vector types, unrolled loops repeated code.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Sequence

from minicompiler.errors import CodegenError
from minicompiler.ir.arith import Arith, Poly
from minicompiler.ir.expr import (
    ZERO,
    Binary,
    Call,
    Cast,
    Const,
    Dim,
    Expr,
    Load,
    Select,
    Var,
    ceildiv,
    const_int,
    free_vars,
    maximum,
    minimum,
    substitute,
    walk,
    wrap,
)
from minicompiler.ir.tir import (
    PARALLEL,
    UNROLL,
    VECTOR,
    Alloc,
    Buffer,
    For,
    If,
    PrimFunc,
    Scope,
    Seq,
    Stmt,
    Store,
    statements,
    written_buffers,
)
from minicompiler.ir.types import DType

from . import llvm_math

STACK_LIMIT = 16384  # bytes; larger thread-local buffers come from the workspace
ALIGN = 64


@dataclasses.dataclass(frozen=True)
class Emitted:
    """The text of a kernel and what its caller must provide.

    shared, local: workspace bytes (expressions in dims): shared + nthreads * local.
    """

    text: str
    shared: Expr
    local: Expr


_TYPES = {
    "bool": "i8", "int8": "i8", "uint8": "i8", "int16": "i16", "uint16": "i16", "int32": "i32",
    "uint32": "i32", "int64": "i64", "uint64": "i64", "float16": "half", "bfloat16": "bfloat",
    "float32": "float", "float64": "double",
}  # fmt: skip


def memory_type(t: DType) -> str:
    return _TYPES[t.name]


def value_type(t: DType, lanes: int = 1) -> str:
    """The LLVM type of a value in a register (a bool is i1)."""
    base = "i1" if t.is_bool else _TYPES[t.name]
    return base if lanes == 1 else f"<{lanes} x {base}>"


@dataclasses.dataclass
class _Scope:
    """Code being written for one loop body or branch, and the values known in it."""

    lines: list[str]
    values: dict[object, tuple[str, int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Value:
    """An operand: its LLVM name or literal, and its lane count."""

    name: str
    lanes: int = 1


def emit(func: PrimFunc) -> Emitted:
    """The LLVM IR of a lowered function (no Blocks). Raises CodegenError for what it cannot express."""
    return _Emitter(func).run()


class _Emitter:
    def __init__(self, func: PrimFunc) -> None:
        self.func = func
        self.count = 0
        self.scopes: list[_Scope] = [_Scope([])]
        self.level: dict[Expr, int] = {}  # variable -> index of the scope it belongs to
        self.names: dict[Expr, str] = {}
        self.env: dict[Expr, Expr] = {}  # unrolled variables and their value now
        self.vector: tuple[Expr, int] | None = None
        self.masks: list[_Value] = []
        self.pointers: dict[Buffer, str] = {}
        self.written: set[Buffer] = set()
        self.declared: dict[str, str] = {}
        self.allocas: list[str] = []
        self.label = "entry"
        self.shared: Expr = ZERO
        self.local: Expr = ZERO
        self.arith = Arith(
            {s.var: (ZERO, s.extent - 1) for s in statements(func) if isinstance(s, For)}
        )
        self.offsets: dict[object, Poly] = {}
        self.resolved: dict[object, Expr] = {}
        self.expanded: dict[Expr, Expr | None] = {}

    # ---- names, lines, scopes ---------------------------------------------------------------------
    def fresh(self, hint: str = "t") -> str:
        self.count += 1
        return f"%{hint}{self.count}"

    def put(self, line: str, level: int = -1) -> None:
        self.scopes[level].lines.append("  " + line)

    def op(self, text: str, level: int = -1, hint: str = "t") -> str:
        name = self.fresh(hint)
        self.put(f"{name} = {text}", level)
        return name

    def declare(self, name: str, signature: str) -> str:
        self.declared[name] = signature
        return f"@{name}"

    # ---- the function -------------------------------------------------------------------------------
    def run(self) -> Emitted:
        f = self.func
        args = ["i32 %tid", "i32 %nthreads", "ptr %barrier"]
        for b in f.params:
            self.pointers[b] = f"%{b.name}"
            args.append(f"ptr noalias %{b.name}")
        for d in f.dims:
            self.names[d], self.level[d] = f"%{d.name}", 0
            args.append(f"i64 %{d.name}")
        args.append("ptr noalias %workspace")
        for b in f.buffers:
            offset = self.shared
            self.shared = self.arith.simplify(self.shared + _bytes(b))
            at = self.index(offset)
            self.pointers[b] = self.op(f"getelementptr i8, ptr %workspace, i64 {at}", 0, "ws")
        for k, phase in enumerate(f.phases):
            if k:
                self.barrier()
            self.written = written_buffers(phase)
            self.phase(phase)
        self.put("ret void")
        body = "\n".join(["  " + a for a in self.allocas] + self.scopes[0].lines)
        text = f"define void @{f.name}({', '.join(args)}) #0 {{\nentry:\n{body}\n}}\n"
        declarations = "".join(f"declare {sig}\n" for sig in self.declared.values())
        local = self.arith.simplify(ceildiv(self.local, ALIGN) * ALIGN)
        return Emitted(declarations + text, self.shared, local)

    def barrier(self) -> None:
        target = self.declare("mc_barrier", "void @mc_barrier(ptr, i32)")
        self.put(f"call void {target}(ptr %barrier, i32 %nthreads)")

    def phase(self, s: Stmt) -> None:
        """A root statement: its parallel loop is divided, what has none is done by thread 0."""
        if any(isinstance(x, For) and x.kind is PARALLEL for x in statements(s)):
            self.stmt(s)
            return
        first = self.op("icmp eq i32 %tid, 0")
        self.branch(first, lambda: self.stmt(s), None)

    def parallel(self, s: For) -> None:
        tid = self.op("sext i32 %tid to i64")
        count = self.op("sext i32 %nthreads to i64")
        extent = self.index(s.extent)
        a = self.op(f"mul i64 {tid}, {extent}")
        low = self.op(f"sdiv i64 {a}, {count}")
        b = self.op(f"add i64 {a}, {extent}")
        high = self.op(f"sdiv i64 {b}, {count}")
        self.loop(s, low, high, certain=False)

    # ---- statements ----------------------------------------------------------------------------------
    def stmt(self, s: Stmt) -> None:
        if isinstance(s, Store):
            self.store(s)
        elif isinstance(s, For):
            self.for_(s)
        elif isinstance(s, Seq):
            for x in s.stmts:
                self.stmt(x)
        elif isinstance(s, If):
            self.if_(s)
        elif isinstance(s, Alloc):
            self.alloc(s.buffer)
            self.stmt(s.body)
        else:
            raise CodegenError(f"the LLVM backend does not know the statement {type(s).__name__}", self.func.locs)

    def for_(self, s: For) -> None:
        if s.kind is PARALLEL:
            self.parallel(s)
        elif s.kind is UNROLL:
            extent = const_int(s.extent)
            if extent is None:
                raise CodegenError(f"unrolled loop {s.var} has the extent {s.extent}", self.func.locs)
            for k in range(extent):
                self.env[s.var] = Const(k)
                self.stmt(s.body)
            del self.env[s.var]
        elif s.kind is VECTOR:
            lanes = const_int(s.extent)
            if lanes is None or self.vector is not None:
                raise CodegenError(f"vector loop {s.var} has the extent {s.extent} or is nested", self.func.locs)
            if lanes == 1:
                self.env[s.var] = ZERO
                self.stmt(s.body)
                del self.env[s.var]
                return
            self.vector = (s.var, lanes)
            self.stmt(s.body)
            self.vector = None
        else:
            extent = const_int(s.extent)
            if extent == 1:
                self.env[s.var] = ZERO
                self.stmt(s.body)
                del self.env[s.var]
            elif extent != 0:
                some = self.arith.prove(ZERO < s.extent) is True
                self.loop(s, "0", self.index(s.extent), certain=some)

    def loop(self, s: For, low: str, high: str, certain: bool) -> None:
        self.count += 1
        head, done = f"loop{self.count}", f"done{self.count}"
        var = f"%{s.var.name.replace('.', '_')}_{self.count}"
        before = self.label
        outer = self.scopes[-1]
        self.scopes.append(_Scope([]))
        self.level[s.var], self.names[s.var] = len(self.scopes) - 1, var
        self.label = head
        self.stmt(s.body)
        inner = self.scopes.pop()
        step = self.fresh("next")
        again = self.fresh("again")
        if certain:
            outer.lines.append(f"  br label %{head}")
        else:
            some = self.fresh("some")
            outer.lines.append(f"  {some} = icmp slt i64 {low}, {high}")
            outer.lines.append(f"  br i1 {some}, label %{head}, label %{done}")
        outer.lines.append(f"{head}:")
        outer.lines.append(f"  {var} = phi i64 [ {low}, %{before} ], [ {step}, %{self.label} ]")
        outer.lines += inner.lines
        outer.lines.append(f"  {step} = add nsw i64 {var}, 1")
        outer.lines.append(f"  {again} = icmp slt i64 {step}, {high}")
        outer.lines.append(f"  br i1 {again}, label %{head}, label %{done}")
        outer.lines.append(f"{done}:")
        self.label = done
        del self.level[s.var], self.names[s.var]

    def branch(self, cond: str, then: Callable[[], None], orelse: Callable[[], None] | None) -> None:
        self.count += 1
        yes, no, done = f"then{self.count}", f"else{self.count}", f"end{self.count}"
        outer = self.scopes[-1]
        parts = []
        for label, body in ((yes, then), (no, orelse)):
            if body is None:
                continue
            self.scopes.append(_Scope([]))
            self.label = label
            body()
            parts.append((label, self.scopes.pop().lines))
        outer.lines.append(f"  br i1 {cond}, label %{yes}, label %{no if orelse else done}")
        for label, lines in parts:
            outer.lines.append(f"{label}:")
            outer.lines += lines
            outer.lines.append(f"  br label %{done}")
        outer.lines.append(f"{done}:")
        self.label = done

    def if_(self, s: If) -> None:
        cond = self.value(s.cond)
        if cond.name in ("true", "1"):
            self.stmt(s.then)
        elif cond.name in ("false", "0"):
            if s.orelse is not None:
                self.stmt(s.orelse)
        elif cond.lanes > 1:
            if s.orelse is not None:
                raise CodegenError("a vector condition with an else branch", self.func.locs)
            mask = cond
            if self.masks:
                mask = self.both(self.masks[-1], cond)
            self.masks.append(mask)
            self.stmt(s.then)
            self.masks.pop()
        else:
            orelse = s.orelse
            self.branch(cond.name, lambda: self.stmt(s.then), (lambda: self.stmt(orelse)) if orelse else None)

    def both(self, a: _Value, b: _Value) -> _Value:
        lanes = max(a.lanes, b.lanes)
        a, b = self.splat(a, "i1", lanes), self.splat(b, "i1", lanes)
        return _Value(self.op(f"and {'i1' if lanes == 1 else f'<{lanes} x i1>'} {a.name}, {b.name}"), lanes)

    def alloc(self, b: Buffer) -> None:
        size = const_int(self.arith.simplify(_bytes(b)))
        if b.scope is Scope.REGISTER or (size is not None and size <= STACK_LIMIT):
            if b in self.pointers:
                return
            name = self.fresh(b.name + "_")
            self.allocas.append(f"{name} = alloca [{size} x i8], align {ALIGN}")
            self.pointers[b] = name
            return
        if b in self.pointers:
            return
        base = self.index(self.shared, 0)
        local = self.thread_base()
        offset = self.index(self.local, 0)
        self.local = self.arith.simplify(self.local + _bytes(b))
        p = self.op(f"getelementptr i8, ptr %workspace, i64 {base}", 0)
        p = self.op(f"getelementptr i8, ptr {p}, i64 {local}", 0)
        self.pointers[b] = self.op(f"getelementptr i8, ptr {p}, i64 {offset}", 0)

    def thread_base(self) -> str:
        """tid * bytes of one thread's workspace, which is known only at the end: a named value that
        `local_bytes` in the same function resolves."""
        found = self.scopes[0].values.get("thread base")
        if found is None:
            total = self.index(self.local_total(), 0)
            tid = self.op("sext i32 %tid to i64", 0)
            found = (self.op(f"mul i64 {tid}, {total}", 0), 1)
            self.scopes[0].values["thread base"] = found
        return found[0]

    def local_total(self) -> Expr:
        total: Expr = ZERO
        for s in statements(self.func):
            if isinstance(s, Alloc):
                size = const_int(self.arith.simplify(_bytes(s.buffer)))
                if s.buffer.scope is not Scope.REGISTER and (size is None or size > STACK_LIMIT):
                    total = total + _bytes(s.buffer)
        return self.arith.simplify(ceildiv(total, ALIGN) * ALIGN)

    # ---- integers and addresses -------------------------------------------------------------------------
    def resolve(self, e: Expr) -> Expr:
        """`e` with unrolled variables replaced by their current values, simplified."""
        used = [v for v in self.env if v in free_vars(e)]
        if not used:
            return e
        key = (e, *[(v, self.env[v]) for v in used])
        found = self.resolved.get(key)
        if found is None:
            found = self.arith.simplify(substitute(e, {v: self.env[v] for v in used}))
            self.resolved[key] = found
        return found

    def home(self, e: Expr) -> int:
        """The scope a pure expression belongs to: that of its innermost variable."""
        return max([self.level[v] for v in free_vars(e)], default=0)

    def index(self, e: Expr, at: int | None = None) -> str:
        """An i64 operand for a scalar index expression."""
        e = self.resolve(e)
        if type(e) is Const:
            return str(e.value)
        if e in self.names:
            return self.names[e]
        home = self.home(e) if at is None else at
        found = self.scopes[home].values.get(e)
        if found is not None:
            return found[0]
        if type(e) is Binary:
            a, b = self.index(e.a), self.index(e.b)
            if e.op in ("floordiv", "mod"):
                name = self.floor(e.op, e.a, a, e.b, b, home)
            elif e.op in ("min", "max"):
                name = self.op(f"call i64 {self.intrinsic('smin' if e.op == 'min' else 'smax', 'i64', 2)}(i64 {a}, i64 {b})", home)
            else:
                name = self.op(f"{ {'add': 'add nsw', 'sub': 'sub nsw', 'mul': 'mul nsw'}[e.op]} i64 {a}, {b}", home)
        elif type(e) is Select:
            c = self.value(e.cond)
            name = self.op(f"select i1 {c.name}, i64 {self.index(e.a)}, i64 {self.index(e.b)}", home)
        elif type(e) is Cast or type(e) is Load or type(e) is Call:
            return self.value(e).name
        else:
            raise CodegenError(f"not an index expression: {e}", self.func.locs)
        self.scopes[home].values[e] = (name, 1)
        return name

    def floor(self, op: str, ea: Expr, a: str, eb: Expr, b: str, home: int) -> str:
        """Division rounding down; plain unsigned division where both sides are known to be positive."""
        low = self.arith.interval(ea)[0]
        divisor = self.arith.interval(eb)[0]
        if low is not None and low >= 0 and divisor is not None and divisor > 0:
            return self.op(f"{'udiv' if op == 'floordiv' else 'urem'} i64 {a}, {b}", home)
        q = self.op(f"sdiv i64 {a}, {b}", home)
        r = self.op(f"srem i64 {a}, {b}", home)
        wrong = self.op(f"xor i64 {r}, {b}", home)
        neg = self.op(f"icmp slt i64 {wrong}, 0", home)
        some = self.op(f"icmp ne i64 {r}, 0", home)
        fix = self.op(f"and i1 {neg}, {some}", home)
        if op == "floordiv":
            less = self.op(f"sub i64 {q}, 1", home)
            return self.op(f"select i1 {fix}, i64 {less}, i64 {q}", home)
        more = self.op(f"add i64 {r}, {b}", home)
        return self.op(f"select i1 {fix}, i64 {more}, i64 {r}", home)

    def offset(self, buffer: Buffer, indices: tuple[Expr, ...]) -> Poly:
        """The element offset as a polynomial of the variables (unrolled ones not yet replaced)."""
        key = (buffer, indices)
        found = self.offsets.get(key)
        if found is None:
            physical = indices if buffer.layout is None else buffer.layout.apply(indices)
            flat: Expr = ZERO
            for i, n in zip(physical, buffer.physical_shape, strict=True):
                flat = flat * n + i
            found = self.offsets[key] = self.arith.poly(flat)
        return found

    def at_env(self, poly: Poly) -> Poly:
        """A polynomial with the unrolled variables replaced."""
        if not self.env:
            return poly
        result: Poly = {}
        for m, whole in poly.items():
            c, rest = whole, []
            for a in m:
                value = self.env.get(a)
                if value is not None:
                    c = c * value.value  # type: ignore[attr-defined]
                    continue
                if not free_vars(a).isdisjoint(self.env):
                    rest = None
                    break
                rest.append(a)
            if rest is None:  # an unrolled variable inside // or %: simplify the whole term
                term = self.resolve(self.arith.expr({m: whole}))
                for m2, c2 in self.arith.poly(term).items():
                    result[m2] = result.get(m2, 0) + c2
                continue
            k = tuple(rest)
            result[k] = result.get(k, 0) + c
        return {m: c for m, c in result.items() if c}

    def address(self, buffer: Buffer, poly: Poly) -> str:
        """A pointer to the element at an offset (no vector variable, no unrolled variable left).
        Outer terms first, so that inner loops add only what changes in them."""
        poly = dict(poly)
        constant = poly.pop((), 0)
        base = self.pointers[buffer]
        element = memory_type(buffer.dtype)
        groups: dict[int, list[tuple[tuple[Expr, ...], int]]] = {}
        for m, c in poly.items():
            level = max([self.home(a) for a in m], default=0)
            groups.setdefault(level, []).append((m, c))
        key: tuple[object, ...] = (buffer,)
        for level in sorted(groups):
            terms = sorted(groups[level], key=lambda t: str(self.arith.expr({t[0]: t[1]})))
            key = (*key, *terms)
            known = self.scopes[level].values.get(key)
            if known is None:
                total = self.arith.expr(dict(terms))
                offset = self.index(total, level)
                base = self.op(f"getelementptr {element}, ptr {base}, i64 {offset}", level, "p")
                self.scopes[level].values[key] = (base, 1)
            else:
                base = known[0]
        if constant:
            key = (*key, "+", constant)
            level = max(groups, default=0)
            known = self.scopes[-1].values.get(key)
            if known is not None:
                return known[0]
            base = self.op(f"getelementptr {element}, ptr {base}, i64 {constant}", -1, "p")
            self.scopes[-1].values[key] = (base, 1)
            del level
        return base

    def lanes_of(self, buffer: Buffer, indices: tuple[Expr, ...]) -> tuple[str, Poly]:
        """How an access depends on the vector variable: ("same" | "next" | "any", offset at lane 0)."""
        poly = self.at_env(self.offset(buffer, indices))
        if self.vector is None or not any(self.vector[0] in free_vars(a) for m in poly for a in m):
            return "same", poly
        v = self.vector[0]
        plain = {m: c for m, c in poly.items() if m == (v,)}
        others = {m: c for m, c in poly.items() if m != (v,)}
        if any(v in free_vars(a) for m in others for a in m):
            return "any", poly
        return ("next" if plain[(v,)] == 1 else "any"), others

    # ---- loads and stores --------------------------------------------------------------------------------
    def load(self, e: Load, mask: _Value | None) -> _Value:
        buffer = e.buffer
        kind, poly = self.lanes_of(buffer, e.indices)
        scalar = memory_type(buffer.dtype)
        if mask is None and self.masks:
            mask = self.masks[-1]
        elif mask is not None and self.masks:
            mask = self.both(self.masks[-1], mask)
        if buffer.scope is Scope.REGISTER:
            mask = None  # always there; a masked access would keep it from being a register
        if kind == "any":
            return self.gather(e, mask)
        lanes = 1 if kind == "same" else self.vector[1]  # type: ignore[index]
        p = self.address(buffer, poly)
        if mask is not None and lanes == 1 and mask.lanes > 1:
            # One element for all lanes: it is there if any lane wants it.
            any_lane = self.op(
                f"call i1 {self.declare(f'llvm.vector.reduce.or.v{mask.lanes}i1', f'i1 @llvm.vector.reduce.or.v{mask.lanes}i1(<{mask.lanes} x i1>)')}"
                f"(<{mask.lanes} x i1> {mask.name})"
            )
            mask = _Value(any_lane)
        if mask is not None and lanes == 1:
            p = self.op(f"select i1 {mask.name}, ptr {p}, ptr {self.nowhere()}")
            mask = None
        if mask is None:
            t = scalar if lanes == 1 else f"<{lanes} x {scalar}>"
            align = buffer.dtype.bytes
            name = self.op(f"load {t}, ptr {p}, align {align}")
        else:
            t = f"<{lanes} x {scalar}>"
            suffix = f"v{lanes}{_mangle(scalar)}.p0"
            f = self.declare(f"llvm.masked.load.{suffix}",
                             f"{t} @llvm.masked.load.{suffix}(ptr, <{lanes} x i1>, {t})")  # fmt: skip
            name = self.op(
                f"call {t} {f}(ptr align {buffer.dtype.bytes} {p}, <{lanes} x i1> {self.splat(mask, 'i1', lanes).name}, {t} zeroinitializer)"
            )
        return self.from_memory(_Value(name, lanes), buffer.dtype)

    def nowhere(self) -> str:
        """Memory that a load not wanted may read."""
        found = self.scopes[0].values.get("nowhere")
        if found is None:
            name = self.fresh("nowhere")
            self.allocas.append(f"{name} = alloca [64 x i8], align 64")
            self.allocas.append(f"store <64 x i8> zeroinitializer, ptr {name}, align 64")
            found = self.scopes[0].values["nowhere"] = (name, 1)
        return found[0]

    def gather(self, e: Load, mask: _Value | None) -> _Value:
        """Lane by lane, for accesses that are not contiguous."""
        assert self.vector is not None
        v, lanes = self.vector
        scalar = memory_type(e.buffer.dtype)
        result = "poison"
        saved, self.vector = self.vector, None
        masks, self.masks = self.masks, []
        for lane in range(lanes):
            self.env[v] = Const(lane)
            one = None
            if mask is not None:
                one = mask.name if mask.lanes == 1 else self.op(f"extractelement <{mask.lanes} x i1> {mask.name}, i64 {lane}")
            indices = tuple(self.lane_index(i) for i in e.indices)
            p = self.address(e.buffer, self.at_env(self.offset(e.buffer, indices)))
            if one is not None:
                p = self.op(f"select i1 {one}, ptr {p}, ptr {self.nowhere()}")
            x = self.op(f"load {scalar}, ptr {p}, align {e.buffer.dtype.bytes}")
            result = self.op(f"insertelement <{lanes} x {scalar}> {result}, {scalar} {x}, i64 {lane}")
        del self.env[v]
        self.vector, self.masks = saved, masks
        return self.from_memory(_Value(result, lanes), e.buffer.dtype)

    def lane_index(self, i: Expr) -> Expr:
        """An index in one lane; a data-dependent one (a load inside) gets a name of its own."""
        i = self.resolve(i)
        if not any(type(x) is Load for x in walk(i)):
            return i
        return self.named(i)

    def named(self, i: Expr) -> Expr:
        """A variable that stands for a data-dependent index in the current scope."""
        value = self.value(i)
        assert value.lanes == 1
        self.count += 1
        var = Var(f"data{self.count}")
        self.names[var], self.level[var] = value.name, len(self.scopes) - 1
        return var

    def store(self, s: Store) -> None:
        buffer = s.buffer
        value = self.value(s.value)
        indices = s.indices
        if any(type(x) is Load for i in indices for x in walk(i)):
            if self.vector is not None:
                self.scatter(s, value)
                return
            indices = tuple(self.lane_index(i) for i in indices)
        kind, poly = self.lanes_of(buffer, indices)
        scalar = memory_type(buffer.dtype)
        mask = self.masks[-1] if self.masks else None
        if kind == "any":
            self.scatter(s, value)
            return
        if kind == "same":
            if value.lanes > 1:
                raise CodegenError(f"every lane of {self.vector} stores to the same element of {buffer.name}", self.func.locs)
            value = self.to_memory(value, buffer.dtype)
            p = self.address(buffer, poly)
            if mask is not None:
                self.branch(mask.name, lambda: self.put(f"store {scalar} {value.name}, ptr {p}, align {buffer.dtype.bytes}"), None)
            else:
                self.put(f"store {scalar} {value.name}, ptr {p}, align {buffer.dtype.bytes}")
            return
        lanes = self.vector[1]  # type: ignore[index]
        value = self.splat(self.to_memory(value, buffer.dtype), scalar, lanes)
        p = self.address(buffer, poly)
        t = f"<{lanes} x {scalar}>"
        if mask is not None and buffer.scope is Scope.REGISTER:
            old = self.op(f"load {t}, ptr {p}, align {buffer.dtype.bytes}")
            flags = self.splat(mask, "i1", lanes).name
            value = _Value(self.op(f"select <{lanes} x i1> {flags}, {t} {value.name}, {t} {old}"), lanes)
            mask = None
        if mask is None:
            self.put(f"store {t} {value.name}, ptr {p}, align {buffer.dtype.bytes}")
        else:
            suffix = f"v{lanes}{_mangle(scalar)}.p0"
            f = self.declare(f"llvm.masked.store.{suffix}", f"void @llvm.masked.store.{suffix}({t}, ptr, <{lanes} x i1>)")
            self.put(
                f"call void {f}({t} {value.name}, ptr align {buffer.dtype.bytes} {p}, <{lanes} x i1> {self.splat(mask, 'i1', lanes).name})"
            )

    def scatter(self, s: Store, value: _Value) -> None:
        assert self.vector is not None
        v, lanes = self.vector
        scalar = memory_type(s.buffer.dtype)
        value = self.splat(self.to_memory(value, s.buffer.dtype), scalar, lanes)
        mask = self.masks[-1] if self.masks else None
        saved, self.vector = self.vector, None
        masks, self.masks = self.masks, []
        for lane in range(lanes):
            self.env[v] = Const(lane)

            def one(lane: int = lane) -> None:
                indices = tuple(self.lane_index(i) for i in s.indices)
                p = self.address(s.buffer, self.at_env(self.offset(s.buffer, indices)))
                x = self.op(f"extractelement <{lanes} x {scalar}> {value.name}, i64 {lane}")
                self.put(f"store {scalar} {x}, ptr {p}, align {s.buffer.dtype.bytes}")

            if mask is None:
                one()
            else:
                bit = mask.name if mask.lanes == 1 else self.op(f"extractelement <{mask.lanes} x i1> {mask.name}, i64 {lane}")
                self.branch(bit, one, None)
        del self.env[v]
        self.vector, self.masks = saved, masks

    def from_memory(self, v: _Value, t: DType) -> _Value:
        """A bool is a byte in memory and a bit in registers."""
        if not t.is_bool:
            return v
        m = "i8" if v.lanes == 1 else f"<{v.lanes} x i8>"
        return _Value(self.op(f"icmp ne {m} {v.name}, {'0' if v.lanes == 1 else 'zeroinitializer'}"), v.lanes)

    def to_memory(self, v: _Value, t: DType) -> _Value:
        if not t.is_bool:
            return v
        m = "i8" if v.lanes == 1 else f"<{v.lanes} x i8>"
        return _Value(self.op(f"zext {value_type(t, v.lanes)} {v.name} to {m}"), v.lanes)

    def splat(self, v: _Value, scalar: str, lanes: int) -> _Value:
        if v.lanes == lanes or lanes == 1:
            return v
        key = ("splat", v.name, scalar, lanes)
        for scope in self.scopes:
            if key in scope.values:
                return _Value(*scope.values[key])
        a = self.op(f"insertelement <{lanes} x {scalar}> poison, {scalar} {v.name}, i64 0")
        b = self.op(f"shufflevector <{lanes} x {scalar}> {a}, <{lanes} x {scalar}> poison, <{lanes} x i32> zeroinitializer")
        self.scopes[-1].values[key] = (b, lanes)
        return _Value(b, lanes)

    # ---- values ------------------------------------------------------------------------------------------
    def value(self, e: Expr, mask: _Value | None = None) -> _Value:
        """The operand for any expression. `mask`: lanes in which a load may be done."""
        if type(e) is Const:
            return _Value(_literal(e))
        known = self.names.get(e)
        if known is not None:
            return _Value(known)
        unrolled = self.env.get(e)
        if unrolled is not None:
            return _Value(_literal(unrolled))
        if self.vector is not None and e is self.vector[0]:
            return self.ramp(e)
        free = free_vars(e)
        used = tuple([(v, self.env[v]) for v in self.env if v in free])
        in_vector = self.vector is not None and self.vector[0] in free
        key = (e, used, self.vector if in_vector else None, mask if mask is None else mask.name)
        for scope in reversed(self.scopes):
            found = scope.values.get(key)
            if found is not None:
                return _Value(*found)
        buffers = {x.buffer for x in walk(e) if type(x) is Load}
        result = self._value(e, mask, in_vector)
        keep = not (buffers & self.written) and not any(b.scope is not Scope.PARAM and b.scope is not Scope.GLOBAL for b in buffers)
        if keep and not (buffers and self.masks):
            self.scopes[-1].values[key] = (result.name, result.lanes)
        return result

    def ramp(self, e: Expr) -> _Value:
        assert self.vector is not None
        lanes = self.vector[1]
        return _Value("<" + ", ".join(f"i64 {k}" for k in range(lanes)) + ">", lanes)

    def _value(self, e: Expr, mask: _Value | None, in_vector: bool) -> _Value:
        if isinstance(e, Binary | Select | Cast) and not in_vector and e.dtype.name == "int64":
            pure = not any(type(x) is Load or type(x) is Call or type(x) is Cast for x in walk(e))
            if pure and (type(e) is not Binary or e.op in ("add", "sub", "mul", "floordiv", "mod", "min", "max")):
                return _Value(self.index(e))
        if type(e) is Load:
            if e.mask is not None:
                own = self.value(e.mask)
                mask = own if mask is None else self.both(mask, own)
            if any(type(x) is Load for i in e.indices for x in walk(i)):
                if in_vector:
                    return self.gather(e, mask)
                e = Load(e.buffer, tuple(self.lane_index(i) for i in e.indices))
            return self.load(e, mask)
        if type(e) is Binary:
            return self.binary(e, mask)
        if type(e) is Select:
            return self.select(e, mask)
        if type(e) is Cast:
            return self.cast(e, mask)
        if type(e) is Call:
            return self.call(e, mask)
        raise CodegenError(f"the LLVM backend does not know the expression {type(e).__name__}: {e}", self.func.locs)

    def pair(self, a: _Value, b: _Value, t: DType) -> tuple[_Value, _Value, int, str]:
        lanes = max(a.lanes, b.lanes)
        scalar = value_type(t)
        return self.splat(a, scalar, lanes), self.splat(b, scalar, lanes), lanes, value_type(t, lanes)

    def binary(self, e: Binary, mask: _Value | None) -> _Value:
        t = e.a.dtype
        if e.op == "pow":
            n = e.b.value if type(e.b) is Const else None
            if n is not None and float(n).is_integer() and abs(n) <= 16:
                return self.value(llvm_math.small_power(e.a, int(n)), mask)
            if not t.is_float:
                raise CodegenError("integer power with a variable exponent", self.func.locs)
            if t.bits == 16:
                wide = DType("float32")
                return self.value(Cast(t, llvm_math.power(Cast(wide, e.a), Cast(wide, e.b))), mask)
            return self.value(llvm_math.power(e.a, e.b), mask)
        if e.op in ("lt", "le") and self.vector is not None and t.name == "int64":
            found = self.lane_limit(e)
            if found is not None:
                return found
        a, b, lanes, ty = self.pair(self.value(e.a, mask), self.value(e.b, mask), t)
        if e.op in ("lt", "le", "eq", "ne"):
            if t.is_float:
                code = {"lt": "fcmp olt", "le": "fcmp ole", "eq": "fcmp oeq", "ne": "fcmp une"}[e.op]
            else:
                sign = "s" if t.is_signed else "u"
                code = {"lt": f"icmp {sign}lt", "le": f"icmp {sign}le", "eq": "icmp eq", "ne": "icmp ne"}[e.op]
            return _Value(self.op(f"{code} {ty} {a.name}, {b.name}"), lanes)
        if e.op in ("min", "max"):
            return _Value(self.extreme(e.op, a.name, b.name, t, lanes, ty), lanes)
        if t.is_float:
            code = {"add": "fadd contract", "sub": "fsub contract", "mul": "fmul contract", "div": "fdiv"}.get(e.op)
            if code is None:
                if e.op == "mod":
                    return _Value(self.float_mod(a.name, b.name, t, lanes, ty), lanes)
                if e.op == "floordiv":
                    q = self.op(f"fdiv {ty} {a.name}, {b.name}")
                    return _Value(self.op(f"call {ty} {self.intrinsic('floor', ty, 1)}({ty} {q})"), lanes)
                raise CodegenError(f"{e.op} of {t}", self.func.locs)
            return _Value(self.op(f"{code} {ty} {a.name}, {b.name}"), lanes)
        if e.op in ("floordiv", "mod") and t.is_signed:
            return _Value(self.floor_wide(e.op, a.name, b.name, ty), lanes)
        unsigned = not t.is_signed
        code = {
            "add": "add", "sub": "sub", "mul": "mul", "and": "and", "or": "or", "xor": "xor", "shl": "shl",
            "shr": "lshr" if unsigned else "ashr", "div": "udiv" if unsigned else "sdiv",
            "floordiv": "udiv", "mod": "urem",
        }[e.op]  # fmt: skip
        return _Value(self.op(f"{code} {ty} {a.name}, {b.name}"), lanes)

    def lane_limit(self, e: Binary) -> _Value | None:
        """`base + lane < n` as a comparison of 32-bit lane numbers with n - base, which is half the
        work of 64-bit lanes. None when the condition has another form."""
        assert self.vector is not None
        v, lanes = self.vector
        if v not in free_vars(e) or any(type(x) is Load for x in walk(e)):
            return None
        poly = self.at_env(self.arith.poly(e.b - e.a))
        limit = {m: c for m, c in poly.items() if m != (v,)}
        if poly.get((v,)) != -1 or any(v in free_vars(a) for m in limit for a in m):
            return None
        room = self.arith.expr(limit)
        room = room + 1 if e.op == "le" else room
        count = self.index(minimum(maximum(room, 0), lanes))
        ty = f"<{lanes} x i32>"
        low = count if not count.startswith("%") else self.op(f"trunc i64 {count} to i32")
        bound = self.splat(_Value(low), "i32", lanes)
        ramp = "<" + ", ".join(f"i32 {k}" for k in range(lanes)) + ">"
        return _Value(self.op(f"icmp slt {ty} {ramp}, {bound.name}"), lanes)

    def float_mod(self, a: str, b: str, t: DType, lanes: int, ty: str) -> str:
        """The remainder with the sign of the divisor, from the exact C one."""
        r = self.op(f"frem {ty} {a}, {b}")
        del lanes
        zero = "0.0" if not ty.startswith("<") else "zeroinitializer"
        flag = "i1" if not ty.startswith("<") else f"<{ty[1:].split(' ')[0]} x i1>"
        some = self.op(f"fcmp one {ty} {r}, {zero}")
        p = self.op(f"fmul {ty} {r}, {b}")
        neg = self.op(f"fcmp olt {ty} {p}, {zero}")
        fix = self.op(f"and {flag} {some}, {neg}")
        more = self.op(f"fadd {ty} {r}, {b}")
        return self.op(f"select {flag} {fix}, {ty} {more}, {ty} {r}")

    def floor_wide(self, op: str, a: str, b: str, ty: str) -> str:
        lanes = int(ty[1:].split(" ")[0]) if ty.startswith("<") else 1
        flag = "i1" if lanes == 1 else f"<{lanes} x i1>"
        zero = "0" if lanes == 1 else "zeroinitializer"
        q = self.op(f"sdiv {ty} {a}, {b}")
        r = self.op(f"srem {ty} {a}, {b}")
        x = self.op(f"xor {ty} {r}, {b}")
        neg = self.op(f"icmp slt {ty} {x}, {zero}")
        some = self.op(f"icmp ne {ty} {r}, {zero}")
        fix = self.op(f"and {flag} {neg}, {some}")
        if op == "mod":
            more = self.op(f"add {ty} {r}, {b}")
            return self.op(f"select {flag} {fix}, {ty} {more}, {ty} {r}")
        one = self.op(f"zext {flag} {fix} to {ty}")
        return self.op(f"sub {ty} {q}, {one}")

    def extreme(self, op: str, a: str, b: str, t: DType, lanes: int, ty: str) -> str:
        """min and max. Floats propagate NaN as numpy does: a if a is NaN or a beats b, else b."""
        flag = "i1" if lanes == 1 else f"<{lanes} x i1>"
        if t.is_float:
            # max: `fcmp ogt` + select is one vmaxps and yields b when either is NaN; one more select
            # puts a NaN in `a` through.
            first = self.op(f"fcmp {'ogt' if op == 'max' else 'olt'} {ty} {a}, {b}")
            best = self.op(f"select {flag} {first}, {ty} {a}, {ty} {b}")
            if _constant_operand(b):
                nan = self.op(f"fcmp uno {ty} {a}, {a}")
                return self.op(f"select {flag} {nan}, {ty} {a}, {ty} {best}")
            nan = self.op(f"fcmp uno {ty} {a}, {a}")
            return self.op(f"select {flag} {nan}, {ty} {a}, {ty} {best}")
        if t.is_bool:
            return self.op(f"{'and' if op == 'min' else 'or'} {ty} {a}, {b}")
        name = ("s" if t.is_signed else "u") + op
        return self.op(f"call {ty} {self.intrinsic(name, ty, 2)}({ty} {a}, {ty} {b})")

    def select(self, e: Select, mask: _Value | None) -> _Value:
        cond = self.value(e.cond, mask)
        if cond.name == "true":
            return self.value(e.a, mask)
        if cond.name == "false":
            return self.value(e.b, mask)
        a_mask = b_mask = mask
        if any(type(x) is Load for x in walk(e.a)):
            a_mask = cond if mask is None else self.both(mask, cond)
        if any(type(x) is Load for x in walk(e.b)):
            ty = value_type(e.cond.dtype, cond.lanes)
            ones = "true" if cond.lanes == 1 else "splat (i1 true)"
            other = _Value(self.op(f"xor {ty} {cond.name}, {ones}"), cond.lanes)
            b_mask = other if mask is None else self.both(mask, other)
        a, b = self.value(e.a, a_mask), self.value(e.b, b_mask)
        lanes = max(cond.lanes, a.lanes, b.lanes)
        scalar = value_type(e.dtype)
        a, b = self.splat(a, scalar, lanes), self.splat(b, scalar, lanes)
        flag = "i1" if cond.lanes == 1 else f"<{cond.lanes} x i1>"
        ty = value_type(e.dtype, lanes)
        return _Value(self.op(f"select {flag} {cond.name}, {ty} {a.name}, {ty} {b.name}"), lanes)

    def cast(self, e: Cast, mask: _Value | None) -> _Value:
        v = self.value(e.a, mask)
        source, target = e.a.dtype, e.dtype
        a, b = value_type(source, v.lanes), value_type(target, v.lanes)
        zero = "zeroinitializer" if v.lanes > 1 else ("0.0" if source.is_float else "0")
        if target.is_bool:
            code = f"fcmp une {a} {v.name}, {zero}" if source.is_float else f"icmp ne {a} {v.name}, {zero}"
            return v if source.is_bool else _Value(self.op(code), v.lanes)
        if source.is_bool:
            code = "uitofp" if target.is_float else "zext"
        elif source.is_float and target.is_float:
            if source.bits == target.bits:  # float16 <-> bfloat16
                wide = value_type(DType("float32"), v.lanes)
                v = _Value(self.op(f"fpext {a} {v.name} to {wide}"), v.lanes)
                a, code = wide, "fptrunc"
            else:
                code = "fpext" if target.bits > source.bits else "fptrunc"
        elif source.is_float:
            return _Value(self.float_to_int(v, a, target), v.lanes)
        elif target.is_float:
            code = "sitofp" if source.is_signed else "uitofp"
        elif target.bits == source.bits:
            return v
        else:
            code = "trunc" if target.bits < source.bits else "sext" if source.is_signed else "zext"
        return _Value(self.op(f"{code} {a} {v.name} to {b}"), v.lanes)

    def float_to_int(self, v: _Value, a: str, target: DType) -> str:
        """Saturating, so that no input is undefined behaviour. Narrow types go through 32 bits and wrap."""
        wide = target if target.bits >= 32 else DType("int32")
        b = value_type(wide, v.lanes)
        name = f"llvm.fpto{'s' if wide.is_signed else 'u'}i.sat.{_mangle(b)}.{_mangle(a)}"
        f = self.declare(name, f"{b} @{name}({a})")
        r = self.op(f"call {b} {f}({a} {v.name})")
        return r if wide is target else self.op(f"trunc {b} {r} to {value_type(target, v.lanes)}")

    def call(self, e: Call, mask: _Value | None) -> _Value:
        t = e.dtype
        if e.fn in ("not", "isnan", "isinf", "bitcast"):
            v = self.value(e.args[0], mask)
            ty = value_type(e.args[0].dtype, v.lanes)
            if e.fn == "not":
                return _Value(self.op(f"xor {ty} {v.name}, {'true' if v.lanes == 1 else 'splat (i1 true)'}"), v.lanes)
            if e.fn == "isnan":
                return _Value(self.op(f"fcmp uno {ty} {v.name}, {v.name}"), v.lanes)
            if e.fn == "isinf":
                size = self.op(f"call {ty} {self.intrinsic('fabs', ty, 1)}({ty} {v.name})")
                inf = _literal(Const(float("inf"), e.args[0].dtype))
                ref = inf if v.lanes == 1 else f"splat ({value_type(e.args[0].dtype)} {inf})"
                return _Value(self.op(f"fcmp oeq {ty} {size}, {ref}"), v.lanes)
            return _Value(self.op(f"bitcast {ty} {v.name} to {value_type(t, v.lanes)}"), v.lanes)
        expanded = self.expanded.get(e)
        if expanded is None and e not in self.expanded:
            expanded = self.expanded[e] = llvm_math.expand(e)
        if expanded is not None:
            return self.value(expanded, mask)
        name = _INTRINSICS.get(e.fn)
        if name is None:
            raise CodegenError(f"the LLVM backend does not know the function {e.fn}", self.func.locs)
        if not t.is_float:
            if e.fn == "abs":
                v = self.value(e.args[0], mask)
                ty = value_type(t, v.lanes)
                f = self.declare(f"llvm.abs.{_mangle(ty)}", f"{ty} @llvm.abs.{_mangle(ty)}({ty}, i1)")
                return _Value(self.op(f"call {ty} {f}({ty} {v.name}, i1 false)"), v.lanes)
            return self.value(e.args[0], mask)  # rounding an integer
        args = [self.value(a, mask) for a in e.args]
        lanes = max(a.lanes for a in args)
        ty = value_type(t, lanes)
        args = [self.splat(a, value_type(t), lanes) for a in args]
        shown = ", ".join(f"{ty} {a.name}" for a in args)
        return _Value(self.op(f"call {ty} {self.intrinsic(name, ty, len(args))}({shown})"), lanes)

    def intrinsic(self, name: str, ty: str, count: int) -> str:
        full = f"llvm.{name}.{_mangle(ty)}"
        return self.declare(full, f"{ty} @{full}({', '.join([ty] * count)})")


_INTRINSICS = {
    "sqrt": "sqrt", "floor": "floor", "ceil": "ceil", "round": "roundeven", "trunc": "trunc", "abs": "fabs",
    "fma": "fma", "copysign": "copysign",
}  # fmt: skip


def _constant_operand(name: str) -> bool:
    return not name.startswith("%")


def _mangle(ty: str) -> str:
    """The suffix of an overloaded intrinsic."""
    if ty.startswith("<"):
        lanes, scalar = ty[1:-1].split(" x ")
        return f"v{lanes}{_mangle(scalar)}"
    return {"float": "f32", "double": "f64", "half": "f16", "bfloat": "bf16"}.get(ty, ty)


def _literal(e: Expr) -> str:
    assert isinstance(e, Const)
    t = e.dtype
    if t.is_bool:
        return "true" if e.value else "false"
    if not t.is_float:
        value = e.value
        if not t.is_signed and value >= 1 << (t.bits - 1):
            value -= 1 << t.bits
        return str(value)
    if t.name in ("float16", "bfloat16"):
        import numpy as np

        raw = int(np.asarray(e.value, t.numpy).view(np.uint16))
        return f"0x{'H' if t.name == 'float16' else 'R'}{raw:04X}"
    value = e.value
    if t.name == "float32":
        value = struct.unpack("<f", struct.pack("<f", _fit32(value)))[0]
    return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"


def _fit32(value: float) -> float:
    """Values beyond float32 become infinite, as numpy's conversion does."""
    try:
        struct.pack("<f", value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")
    return value


def _bytes(b: Buffer) -> Expr:
    size: Expr = wrap(b.dtype.bytes)
    for n in b.physical_shape:
        size = size * n
    return ceildiv(size, ALIGN) * ALIGN


def declared_names(emitted: Sequence[Emitted]) -> set[str]:
    """The external names that some kernels refer to (the test of allowed symbols reads this)."""
    found = set()
    for e in emitted:
        for line in e.text.splitlines():
            if line.startswith("declare"):
                found.add(line.split("@")[1].split("(")[0])
    return found


__all__ = ["Dim", "Emitted", "declared_names", "emit", "memory_type", "value_type"]
