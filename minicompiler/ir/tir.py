"""The loop-nest IR (TIR): what one kernel does, statement by statement.

    for m in 64:
        for k in 100:
            block C(m = m, reduce k = k):
                init C[m] = 0.0
                C[m] = C[m] + A[m, k]

A Block separates meaning from order: its iterators are what the definition ranges over, their
`value`s say which loop indices they take. Schedules change loops and values, never the body.
`PrimFunc.phases` run one after the other with a barrier of all threads between them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from operator import is_not

from .expr import FALSE, TRUE, ZERO, Dim, Expr, Load, Var, rewrite, substitute, walk
from .layout import IndexMap
from .node import Node, node
from .types import DType, Loc


class LoopKind(enum.Enum):
    """How the iterations of a loop are carried out."""

    SERIAL = "for"
    PARALLEL = "parallel"  # distributed over the threads, contiguous ranges; outermost in its phase
    VECTOR = "vector"  # the lanes of one vector operation; constant extent
    UNROLL = "unroll"  # repeated in the code; constant extent
    THREAD = "thread"  # bound to a GPU grid or block axis, named by For.tag


SERIAL, PARALLEL, VECTOR, UNROLL, THREAD = LoopKind
SCAN = "scan"  # For.tag: a recurrence; iterations in order, the statements of its body are phases


class Scope(enum.Enum):
    """Where a buffer lives."""

    PARAM = "param"  # the caller's
    GLOBAL = "global"  # workspace of the kernel, shared by all threads
    LOCAL = "local"  # workspace of one thread
    REGISTER = "register"  # registers of one thread; every access must have constant indices


@node
class Buffer(Node):
    """Typed memory with a logical shape; `layout` maps logical to physical indices (None:
    row-major)."""

    name: str
    dtype: DType
    shape: tuple[Expr, ...]
    scope: Scope = Scope.PARAM
    layout: IndexMap | None = None
    constant: bool = False  # known while compiling (weights)

    @property
    def physical_shape(self) -> tuple[Expr, ...]:
        return self.shape if self.layout is None else self.layout.physical_shape(self.shape)

    @property
    def padded_shape(self) -> tuple[Expr, ...]:
        """Logical indices below this have memory (but no meaning beyond `shape`)."""
        return self.shape if self.layout is None else self.layout.padded_shape(self.shape)

    def offset(self, indices: tuple[Expr, ...]) -> Expr:
        """The place of an element in memory, counted in elements."""
        at = indices if self.layout is None else self.layout.apply(indices)
        flat: Expr = ZERO
        for i, n in zip(at, self.physical_shape, strict=True):
            flat = flat * n + i
        return flat

    def __str__(self) -> str:
        where = f" {self.layout}" if self.layout is not None else ""
        kind = " constant" if self.constant else ""
        scope = "" if self.scope is Scope.PARAM else f" {self.scope.value}"
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]{scope}{kind}{where}"


@node
class Iter(Node):
    """One iterator of a Block: it ranges over [0, extent) and takes `value` here."""

    var: Var
    extent: Expr
    reduce: bool
    value: Expr


@node
class Store(Node):
    """buffer[indices] = value.

    stream: where it holds (it depends on dims only), the value is written past the caches.
    """

    buffer: Buffer
    indices: tuple[Expr, ...]
    value: Expr
    stream: Expr = FALSE


@node
class Block(Node):
    """`body` (and `init` at the first reduction index) at the iterator values, where `where` holds.

    init, body: Stores over the iterator vars. `where` is over loop variables. A block with a reduce
    iterator and an init is a reduction whose body reads back what it stores.
    """

    name: str
    iters: tuple[Iter, ...]
    where: Expr
    init: Store | None
    body: Store
    tag: str = ""  # "" | "init" | "copy_in" | "copy_out": how a primitive made it


@node
class For(Node):
    """`body` for var = 0 .. extent - 1."""

    var: Var
    extent: Expr
    kind: LoopKind
    body: Stmt
    tag: str = ""


@node
class Seq(Node):
    """One statement after another."""

    stmts: tuple[Stmt, ...]


@node
class If(Node):
    """`then` where cond holds, else `orelse`."""

    cond: Expr
    then: Stmt
    orelse: Stmt | None = None


@node
class Alloc(Node):
    """A LOCAL or REGISTER buffer that exists during `body`."""

    buffer: Buffer
    body: Stmt


@node
class Prefetch(Node):
    """A hint, without effect on any value: the cache line that lies `ahead` elements behind `place`
    in memory will be read soon. It may lie outside the buffer."""

    place: Load
    ahead: Expr


Stmt = Block | For | Seq | If | Alloc | Store | Prefetch
STATEMENTS = (Block, For, Seq, If, Alloc, Store, Prefetch)


@node
class PrimFunc(Node):
    """One kernel. `params` in call order (results last, `results` of them), then the `dims`.

    `buffers`: GLOBAL workspace. `phases`: root statements, run in order with a barrier between.
    """

    name: str
    params: tuple[Buffer, ...]
    results: int
    dims: tuple[Dim, ...]
    buffers: tuple[Buffer, ...]
    phases: tuple[Stmt, ...]
    locs: tuple[Loc, ...] = ()

    def __str__(self) -> str:
        return script(self)


# ---- traversal ----------------------------------------------------------------------------------
def seq(stmts: list[Stmt] | tuple[Stmt, ...]) -> Stmt:
    """A Seq, flattened; the statement itself when there is one."""
    flat: list[Stmt] = []
    for s in stmts:
        flat.extend(s.stmts if type(s) is Seq else (s,))
    return flat[0] if len(flat) == 1 else Seq(tuple(flat))


def sub_statements(s: Stmt) -> tuple[Stmt, ...]:
    """The statements directly inside one."""
    kind = type(s)
    if kind is For or kind is Alloc:
        return (s.body,)  # type: ignore[union-attr]
    if kind is Seq:
        return s.stmts  # type: ignore[union-attr]
    if kind is If:
        return (s.then,) if s.orelse is None else (s.then, s.orelse)  # type: ignore[union-attr]
    return ()


def statements(root: Stmt | PrimFunc) -> Iterator[Stmt]:
    """Every statement below `root` (itself included), outer before inner, in program order."""
    stack: list[Stmt] = list(reversed(root.phases)) if isinstance(root, PrimFunc) else [root]
    while stack:
        s = stack.pop()
        yield s
        stack.extend(reversed(sub_statements(s)))


def map_statements(s: Stmt, f: Callable[[Stmt], Stmt | None]) -> Stmt:
    """Bottom-up: f sees each statement after its inner ones; None keeps it, an empty Seq drops
    it."""
    inner = sub_statements(s)
    if inner:
        new = [map_statements(x, f) for x in inner]
        if any(map(is_not, inner, new)):
            s = _with_inner(s, new)
    made = f(s)
    return s if made is None else made


def _with_inner(s: Stmt, inner: list[Stmt]) -> Stmt:
    if isinstance(s, For | Alloc):
        return s.with_(body=inner[0])
    if isinstance(s, Seq):
        return seq([x for x in inner if not is_empty(x)])
    assert isinstance(s, If)
    return s.with_(then=inner[0], orelse=inner[1] if len(inner) > 1 else None)


def is_empty(s: Stmt) -> bool:
    """True for a statement that does nothing (an empty Seq, or loops and conditions around one)."""
    return isinstance(s, Seq | For | Alloc | If) and all(is_empty(x) for x in sub_statements(s))


def map_exprs(s: Stmt, f: Callable[[Expr], Expr]) -> Stmt:
    """Every expression below `s` replaced by f of it (iterator variables stay)."""

    def store(x: Store) -> Store:
        return x.with_(indices=tuple(map(f, x.indices)), value=f(x.value))

    def one(x: Stmt) -> Stmt | None:
        if isinstance(x, Store):
            return store(x)
        if isinstance(x, For):
            return x.with_(extent=f(x.extent))
        if isinstance(x, If):
            return x.with_(cond=f(x.cond))
        if isinstance(x, Prefetch):
            return x.with_(place=f(x.place), ahead=f(x.ahead))
        if isinstance(x, Block):
            return x.with_(
                iters=tuple(i.with_(value=f(i.value), extent=f(i.extent)) for i in x.iters),
                where=f(x.where),
                init=None if x.init is None else store(x.init),
                body=store(x.body),
            )
        return None

    return map_statements(s, one)


def substitute_stmt(s: Stmt, mapping: dict[Expr, Expr]) -> Stmt:
    """`s` with variables replaced everywhere."""
    return map_exprs(s, lambda e: substitute(e, mapping))


def stores(s: Stmt | PrimFunc) -> Iterator[Store]:
    """Every Store below, also those inside blocks."""
    for x in statements(s):
        if isinstance(x, Store):
            yield x
        elif isinstance(x, Block):
            if x.init is not None:
                yield x.init
            yield x.body


def read_buffers(s: Stmt | PrimFunc) -> set[Buffer]:
    """The buffers that are loaded below `s`."""
    found: set[Buffer] = set()
    for x in statements(s):
        exprs: list[Expr] = []
        if isinstance(x, Store):
            exprs = [x.value, *x.indices]
        elif isinstance(x, Block):
            exprs = [x.where, *(i.value for i in x.iters)]
            for st in (x.init, x.body):
                if st is not None:
                    exprs += [st.value, *st.indices]
        elif isinstance(x, If):
            exprs = [x.cond]
        elif isinstance(x, For):
            exprs = [x.extent]
        for e in exprs:
            found.update(y.buffer for y in walk(e) if type(y) is Load)
    return found


def written_buffers(s: Stmt | PrimFunc) -> set[Buffer]:
    """The buffers that are stored to below `s`."""
    return {x.buffer for x in stores(s)}


def with_buffers(s: Stmt, mapping: Mapping[Buffer, Buffer]) -> Stmt:
    """`s` with buffers replaced by others that are indexed alike; itself where it uses none."""
    if mapping.keys().isdisjoint(read_buffers(s) | written_buffers(s)):
        return s

    def load(e: Expr) -> Expr | None:
        if type(e) is Load and e.buffer in mapping:
            return Load(mapping[e.buffer], e.indices, e.mask)
        return None

    def store(x: Store) -> Store:
        return x.with_(buffer=mapping.get(x.buffer, x.buffer))

    def one(x: Stmt) -> Stmt | None:
        if isinstance(x, Block):
            return x.with_(init=None if x.init is None else store(x.init), body=store(x.body))
        return store(x) if isinstance(x, Store) else None

    return map_statements(map_exprs(s, lambda e: rewrite(e, load)), one)


# ---- text ---------------------------------------------------------------------------------------
def script(func: PrimFunc | Stmt, mark: Node | None = None) -> str:
    """The text of a function or statement. The line of `mark` gets a '>' in front (for errors)."""
    lines: list[tuple[str, bool]] = []

    def put(depth: int, text: str, of: Node | None = None) -> None:
        lines.append(("    " * depth + text, of is mark and mark is not None))

    def assign(s: Store) -> str:
        mark = "" if s.stream is FALSE else "  # streamed"
        mark += "" if s.stream in (FALSE, TRUE) else f" if {s.stream}"
        return f"{s.buffer.name}[{', '.join(map(str, s.indices))}] = {s.value}{mark}"

    def go(s: Stmt, d: int) -> None:
        if isinstance(s, For):
            word = "for" if s.kind is SERIAL else s.kind.value
            put(d, f"{word} {s.var} in {s.extent}:{f'  # {s.tag}' if s.tag else ''}", s)
            go(s.body, d + 1)
        elif isinstance(s, Seq):
            if not s.stmts:
                put(d, "pass", s)
            for x in s.stmts:
                go(x, d)
        elif isinstance(s, If):
            put(d, f"if {s.cond}:", s)
            go(s.then, d + 1)
            if s.orelse is not None:
                put(d, "else:")
                go(s.orelse, d + 1)
        elif isinstance(s, Alloc):
            put(d, f"alloc {s.buffer}", s)
            go(s.body, d)
        elif isinstance(s, Block):
            iters = ", ".join(
                f"{'reduce ' if i.reduce else ''}{i.var} = {i.value}" for i in s.iters
            )
            where = "" if s.where is TRUE else f" where {s.where}"
            put(d, f"block {s.name}({iters}){where}:", s)
            if s.init is not None:
                put(d + 1, "init " + assign(s.init))
            put(d + 1, assign(s.body))
        elif isinstance(s, Prefetch):
            put(d, f"prefetch {s.place} + {s.ahead}", s)
        else:
            put(d, assign(s), s)

    if isinstance(func, PrimFunc):
        names = [p.name for p in func.params] + [d.name for d in func.dims]
        put(0, f"def {func.name}({', '.join(names)}):")
        for b in (*func.params, *func.buffers):
            put(1, str(b))
        for k, phase in enumerate(func.phases):
            if k:
                put(1, "---")
            go(phase, 1)
    else:
        go(func, 0)
    if mark is None:
        return "\n".join(t for t, _ in lines) + "\n"
    return "\n".join(("  > " if hit else "    ") + t for t, hit in lines) + "\n"
