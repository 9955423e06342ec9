"""TIR -> LLVM IR text. One PrimFunc becomes one function

    void name(i32 tid, i32 nthreads, ptr barrier, ptr params..., i64 dims..., ptr workspace)

Every index computation is emitted once, at the shallowest loop level where its variables are known:
code motion and common subexpressions come from the way the text is put together, so LLVM's own IR
passes are hardly needed. Vector loops become vector types, unrolled loops repeated code. This file
holds functions, statements and control flow; llvm_values.py expressions, llvm_memory.py accesses.
"""

from __future__ import annotations

import dataclasses

from minicompiler.errors import CodegenError
from minicompiler.ir.expr import (
    FALSE,
    ONE,
    ZERO,
    Binary,
    Const,
    Dim,
    Expr,
    Load,
    Var,
    ceildiv,
    const_int,
    free_vars,
    maximum,
    walk,
    wrap,
)
from minicompiler.ir.tir import (
    PARALLEL,
    SCAN,
    UNROLL,
    VECTOR,
    Alloc,
    Buffer,
    For,
    If,
    Prefetch,
    PrimFunc,
    Scope,
    Seq,
    Stmt,
    Store,
    seq,
    statements,
    written_buffers,
)
from minicompiler.target import WORTH_SHARING, Target

from .llvm_lanes import TABLE_ALIGN
from .llvm_memory import Memory
from .llvm_text import Lines, Operand
from .repeats import Repeated, repeated

STACK_LIMIT = 16384  # bytes; larger thread-local buffers come from the workspace
ALIGN = 64
PAGE = 4096


@dataclasses.dataclass(frozen=True)
class Emitted:
    """The text of a kernel and what its caller must provide.

    shared, local: workspace bytes (expressions in dims): shared + nthreads * local.
    """

    text: str
    shared: Expr
    local: Expr


def emit(func: PrimFunc, target: Target | None = None) -> Emitted:
    """The LLVM IR of a lowered function (no Blocks).

    target: what it will run on, if that is known: code for any processor may be slower.

    Raises CodegenError for what it cannot express.
    """
    return _Emitter(func, target).run()


class _Emitter(Memory):
    def __init__(self, func: PrimFunc, target: Target | None) -> None:
        super().__init__(func, target)
        self.shared: Expr = ZERO
        self.local: Expr = ZERO
        self.kept: dict[For, tuple[Repeated, str]] = {}  # of a parallel loop, and its last step

    # ---- the function ---------------------------------------------------------------------------
    def run(self) -> Emitted:
        f = self.func
        args = ["i32 %tid", "i32 %nthreads", "ptr %barrier"]
        for b in f.params:
            self.pointers[b] = f"%{b.name}"
            args.append(f"ptr noalias %{b.name}")
        # Dimensions keep the names that the model gives them, which LLVM may not be able to read.
        for k, d in enumerate(f.dims):
            self.names[d], self.level[d] = f"%dim.{k}", 0
            args.append(f"i64 %dim.{k}")
        args.append("ptr noalias %workspace")
        for b in f.buffers:
            offset = self.shared
            self.shared = self.arith.simplify(self.shared + self.bytes_of(b))
            at = self.index(offset)
            self.pointers[b] = self.op(f"getelementptr i8, ptr %workspace, i64 {at}", 0, "ws")
        for k, phase in enumerate(f.phases):
            if k:
                self.barrier()
            self.written = written_buffers(phase)
            self.phase(phase)
        self.put("ret void")
        body = "\n".join(["  " + a for a in self.allocas] + self.scopes[0].lines)
        # Else registers that do not fit are kept 16 bytes off, across cache lines or even pages.
        aligned = f" alignstack({ALIGN})" if self.tables else ""
        text = f"define void @{f.name}({', '.join(args)}) #0{aligned} {{\nentry:\n{body}\n}}\n"
        declarations = "".join([f"declare {s}\n" for s in self.declared.values()])
        helpers = "".join(self.helpers.values())
        local = self.arith.simplify(ceildiv(self.local, ALIGN) * ALIGN)
        tables = [
            f"{name} = internal constant {ty} {value}, align {TABLE_ALIGN}\n"
            for (value, ty), name in self.tables.items()
        ]
        text = "".join([declarations, helpers, *tables, text])
        return Emitted(text, self.shared, local)

    def barrier(self) -> None:
        target = self.declare("mc_barrier", "void @mc_barrier(ptr, i32)")
        self.put(f"call void {target}(ptr %barrier, i32 %nthreads)")

    def phase(self, s: Stmt) -> None:
        """A root statement: its parallel loop is divided, what has none is done by thread 0."""
        if isinstance(s, If) and _divided(s):
            then, orelse = s.then, s.orelse
            other = None if orelse is None else lambda: self.phase(orelse)
            self.branch(self.value(s.cond).name, lambda: self.phase(then), other)
            return
        if _divided(s):
            self.stmt(s)
        else:
            first = self.op("icmp eq i32 %tid, 0")
            self.branch(first, lambda: self.stmt(s))
        if any(isinstance(x, Store) and x.stream is not FALSE for x in statements(s)):
            self.put("fence seq_cst")  # streamed stores keep no order with what tells others

    # ---- statements -----------------------------------------------------------------------------
    def stmt(self, s: Stmt) -> None:
        for scope in self.scopes:
            scope.passing.clear()
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
        elif isinstance(s, Prefetch):
            self.prefetch(s)
        else:
            message = f"the LLVM backend does not know the statement {type(s).__name__}"
            raise CodegenError(message, self.func.locs)

    def for_(self, s: For) -> None:
        extent = const_int(s.extent)
        if extent == 0:
            return
        if s.kind is PARALLEL:
            self.parallel(s)
        elif s.kind is UNROLL:
            if extent is None:
                message = f"unrolled loop {s.var} has the extent {s.extent}"
                raise CodegenError(message, self.func.locs)
            self.repeat(s, extent)
        elif extent == 1:
            self.repeat(s, 1)
        elif s.kind is VECTOR:
            if extent is None or self.vector is not None:
                message = f"vector loop {s.var} has the extent {s.extent} or is nested"
                raise CodegenError(message, self.func.locs)
            self.vector = (s.var, extent)
            self.stmt(s.body)
            self.vector = None
        else:
            some = extent is not None or self.arith.prove(s.extent > ZERO) is True
            self.loop(s, "0", self.index(s.extent), certain=some)

    def repeat(self, s: For, count: int) -> None:
        """The body once for each value of the variable."""
        for k in range(count):
            self.env[s.var] = Const(k)
            self.iteration(s)
        del self.env[s.var]

    def parallel(self, s: For) -> None:
        """This thread's part of the iterations. Threads take a few at a time (see `mc_claim`);
        inside other loops, where no barrier separates the rounds, each has a fixed share."""
        extent = self.index(s.extent)
        if any(isinstance(v, Var) for v in self.level):
            count = self.op("sext i32 %nthreads to i64")
            tid = self.op("sext i32 %tid to i64")
            a = self.op(f"mul i64 {tid}, {extent}")
            low = self.op(f"sdiv i64 {a}, {count}")
            b = self.op(f"add i64 {a}, {extent}")
            high = self.op(f"sdiv i64 {b}, {count}")
            self.loop(s, low, high, certain=False)
            return
        threads, extent = self.worth_sharing(s, extent)
        self.keep(s)
        self.count += 1
        head, work, done = (f"{x}{self.count}" for x in ("claim", "work", "claimed"))
        own = self.fresh("own")
        self.allocas.append(f"{own} = alloca i64, align 8")
        self.put(f"store i64 0, ptr {own}, align 8")
        claim = self.declare("mc_claim", "{ i64, i64 } @mc_claim(ptr, i32, i32, i64, ptr)")
        outer = self.scopes[-1]
        self.scopes.append(Lines([]))
        self.label = work
        part, start, end, more = (self.fresh(x) for x in ("part", "start", "end", "more"))
        self.loop(s, start, end, certain=True)
        inner = self.scopes.pop()
        taken = f"ptr %barrier, i32 %tid, i32 {threads}, i64 {extent}, ptr {own}"
        outer.lines += [
            f"  br label %{head}",
            f"{head}:",
            f"  {part} = call {{ i64, i64 }} {claim}({taken})",
            f"  {start} = extractvalue {{ i64, i64 }} {part}, 0",
            f"  {end} = extractvalue {{ i64, i64 }} {part}, 1",
            f"  {more} = icmp slt i64 {start}, {end}",
            f"  br i1 {more}, label %{work}, label %{done}",
            f"{work}:",
            *inner.lines,
            f"  br label %{head}",
            f"{done}:",
        ]
        self.label = done

    def worth_sharing(self, s: For, extent: str) -> tuple[str, str]:
        """The threads among which a parallel loop is divided and its extent for this one: little
        work is done by thread 0, in whose caches its results then are. Where all sizes are numbers
        the schedule has decided."""
        work = self.arith.simplify(_often(s))
        if const_int(work) is not None:
            return "%nthreads", extent
        little = self.op(f"icmp slt i64 {self.index(work)}, {WORTH_SHARING}")
        other = self.op("icmp ne i32 %tid, 0")
        idle = self.op(f"and i1 {little}, {other}")
        threads = self.op(f"select i1 {little}, i32 1, i32 %nthreads")
        return threads, self.op(f"select i1 {idle}, i64 0, i64 {extent}")

    def keep(self, s: For) -> None:
        """Prepares for what iterations of a parallel loop need not do again."""
        found = repeated(s)
        if found is not None:
            last = self.fresh("last")
            self.allocas.append(f"{last} = alloca i64, align 8")
            self.put(f"store i64 -1, ptr {last}, align 8")
            self.kept[s] = found, last

    def keeping(self, x: Repeated, last: str) -> None:
        """An iteration of such a loop; `last` holds the step whose results are there."""
        for b in x.buffers:
            self.alloc(b)
        step = self.index(x.step)
        new = self.op(f"icmp ne i64 {step}, {self.op(f'load i64, ptr {last}, align 8')}")

        def first() -> None:
            self.stmt(seq(x.first))
            self.put(f"store i64 {step}, ptr {last}, align 8")

        self.branch(new, first)
        self.stmt(seq(x.rest))

    def loop(self, s: For, low: str, high: str, certain: bool) -> None:
        """A counted loop. certain: there is at least one iteration."""
        self.count += 1
        head, done = f"loop{self.count}", f"done{self.count}"
        var = f"%{s.var.name.replace('.', '_')}_{self.count}"
        before = self.label
        outer = self.scopes[-1]
        self.scopes.append(Lines([], writes=frozenset(written_buffers(s.body))))
        self.level[s.var], self.names[s.var] = len(self.scopes) - 1, var
        self.label = head
        self.iteration(s)
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

    def iteration(self, s: For) -> None:
        """The body of a loop. That of a recurrence which threads share consists of phases: each
        step needs what all threads did in the one before."""
        if s in self.kept:
            self.keeping(*self.kept[s])
            return
        if s.tag != SCAN or not _divided(s):
            self.stmt(s.body)
            return
        for x in s.body.stmts if isinstance(s.body, Seq) else (s.body,):
            self.phase(x)
            self.barrier()

    def if_(self, s: If) -> None:
        cond = self.value(s.cond)
        orelse = s.orelse
        if cond.name == "true":
            self.stmt(s.then)
        elif cond.name == "false":
            if orelse is not None:
                self.stmt(orelse)
        elif cond.lanes > 1:
            self.masked(cond, s.then)
            if orelse is not None:
                self.masked(self.negated(cond), orelse)
        else:
            other = None if orelse is None else lambda: self.stmt(orelse)
            self.branch(cond.name, lambda: self.stmt(s.then), other)

    def masked(self, cond: Operand, s: Stmt) -> None:
        """The statement in the lanes where `cond` holds."""
        mask = self.both(self.masks[-1] if self.masks else None, cond)
        assert mask is not None
        self.masks.append(mask)
        self.stmt(s)
        self.masks.pop()

    # ---- memory of the kernel -------------------------------------------------------------------
    def bytes_of(self, b: Buffer) -> Expr:
        """Bytes of a buffer, rounded up to whole cache lines."""
        size: Expr = wrap(b.dtype.bytes)
        for n in b.physical_shape:
            size = size * n
        return self.arith.simplify(ceildiv(size, ALIGN) * ALIGN)

    def on_stack(self, b: Buffer) -> bool:
        size = const_int(self.bytes_of(b))
        return b.scope is Scope.REGISTER or (size is not None and size <= STACK_LIMIT)

    def alloc(self, b: Buffer) -> None:
        if b in self.pointers:
            return
        if self.on_stack(b):
            name = self.fresh(b.name + "_")
            size = const_int(self.bytes_of(b))
            assert size is not None
            if size < PAGE:
                self.allocas.append(f"{name} = alloca [{size} x i8], align {ALIGN}")
            else:  # a load waits for an earlier store to the same place of another page
                whole = self.fresh(f"{b.name}_page")
                self.allocas.append(f"{whole} = alloca [{size + PAGE // 2} x i8], align {PAGE}")
                self.allocas.append(f"{name} = getelementptr i8, ptr {whole}, i64 {PAGE // 2}")
            self.pointers[b] = name
            return
        base = self.index(self.shared, 0)
        offset = self.index(self.local, 0)
        self.local = self.arith.simplify(self.local + self.bytes_of(b))
        p = self.op(f"getelementptr i8, ptr %workspace, i64 {base}", 0)
        p = self.op(f"getelementptr i8, ptr {p}, i64 {self.thread_base()}", 0)
        self.pointers[b] = self.op(f"getelementptr i8, ptr {p}, i64 {offset}", 0)

    def thread_base(self) -> str:
        """tid * bytes of one thread's workspace."""
        found = self.scopes[0].values.get("thread base")
        if found is None:
            total: Expr = ZERO
            for s in statements(self.func):
                if isinstance(s, Alloc) and not self.on_stack(s.buffer):
                    total = total + self.bytes_of(s.buffer)
            tid = self.op("sext i32 %tid to i64", 0)
            name = self.op(f"mul i64 {tid}, {self.index(self.arith.simplify(total), 0)}", 0)
            found = self.scopes[0].values["thread base"] = Operand(name)
        return found.name


def _often(s: Stmt) -> Expr:
    """How often the statement that a nest repeats most runs, as far as sizes alone tell."""
    if isinstance(s, For):
        return _often(s.body) * _at_most(s.extent)
    parts = s.stmts if isinstance(s, Seq) else (s.then,) if isinstance(s, If) else ()
    most: Expr = ONE
    for x in (s.body,) if isinstance(s, Alloc) else parts:
        most = maximum(most, _often(x))
    return most


def _at_most(extent: Expr) -> Expr:
    """What an extent is at most, in sizes alone: one side of a minimum; 1 where nothing tells."""
    sides = (extent.a, extent.b) if type(extent) is Binary and extent.op == "min" else ()
    for e in (extent, *sides):
        if all(isinstance(v, Dim) for v in free_vars(e)) and not any(
            type(x) is Load for x in walk(e)
        ):
            return e
    return ONE


def _divided(s: Stmt) -> bool:
    """True when threads share the work of a statement."""
    return any(isinstance(x, For) and x.kind is PARALLEL for x in statements(s))
