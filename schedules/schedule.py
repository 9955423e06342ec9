"""A schedule: an immutable PrimFunc, and the list of steps that made it what it is.

    s = Schedule(func, target)
    o, i = s.split("i0", 8)          every primitive is a method here; steps refer to loops by name
    s.mark(i, VECTOR)
    s.func                           the scheduled function
    json.dumps(s.trace())            the steps, readable; replay(func, trace) gives the same
    function

A primitive that cannot show it is legal raises ScheduleError and leaves the schedule unchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from minicompiler.errors import ScheduleError
from minicompiler.ir.expr import Dim, Var
from minicompiler.ir.layout import IndexMap, axes
from minicompiler.ir.node import Node
from minicompiler.ir.tir import (
    Alloc,
    Block,
    Buffer,
    For,
    LoopKind,
    PrimFunc,
    Scope,
    Stmt,
    is_empty,
    map_statements,
    script,
    statements,
)
from minicompiler.target import Target

from . import (
    analysis,
    blocks,
    cutting,
    hints,
    loops,
    pipelining,
    reductions,
    rolling,
    sliding,
    staging,
    streaming,
    truncate,
)


@dataclasses.dataclass(frozen=True)
class Step:
    """One applied primitive: its name, its JSON-able arguments, the names it made."""

    primitive: str
    args: dict[str, Any]
    made: tuple[str, ...] = ()

    def __str__(self) -> str:
        made = f"{', '.join(self.made)} = " if self.made else ""
        return f"{made}{self.primitive}({', '.join(f'{k}={v!r}' for k, v in self.args.items())})"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A decision a rule asked for: what could be chosen and what was."""

    name: str
    options: tuple[Any, ...]
    chosen: Any


class Schedule:
    """See the module text. `decisions` answers `choose` calls by name (a record being replayed, or
    a draw of the tuner); what it does not name takes its default."""

    def __init__(
        self,
        func: PrimFunc,
        target: Target,
        decisions: Mapping[str, Any] | None = None,
        after_step: Callable[[PrimFunc], None] | None = None,
    ) -> None:
        self.func, self.target = func, target
        self.decisions = dict(decisions or {})
        self.steps: list[Step] = []
        self.choices: list[Choice] = []
        self.rule = ""  # the rule that made this schedule
        self.rows: Dim | None = None  # where these are a single one, another schedule is better
        self._after = after_step
        self._names: set[str] | None = None

    # ---- reading --------------------------------------------------------------------------------
    def loop(self, name: str) -> tuple[For, analysis.Path]:
        """The loop of that name and the statements above it. Raises ScheduleError."""
        found = analysis.find_loop(self.func, name)
        if found is None:
            names = [x.var.name for x in analysis.loops(self.func)]
            self.refuse(f"there is no loop {name!r}", hint=f"loops: {', '.join(names)}")
        return found

    def block(self, name: str) -> tuple[Block, analysis.Path]:
        """The block of that name and the statements above it. Raises ScheduleError."""
        found = analysis.find_block(self.func, name)
        if found is None:
            names = [b.name for b in analysis.blocks(self.func)]
            self.refuse(f"there is no block {name!r}", hint=f"blocks: {', '.join(names)}")
        return found

    def buffer(self, name: str) -> Buffer:
        """The buffer of that name. Raises ScheduleError."""
        allocated = [s.buffer for s in statements(self.func) if isinstance(s, Alloc)]
        every = (*self.func.params, *self.func.buffers, *allocated)
        for b in every:
            if b.name == name:
                return b
        self.refuse(
            f"there is no buffer {name!r}", hint=f"buffers: {', '.join(b.name for b in every)}"
        )
        raise AssertionError

    def loops_of(self, block: str, inside: str | None = None) -> list[str]:
        """Names of the loops around a block, or of those inside of one, outermost first."""
        names = [x.var.name for x in analysis.loops_in(self.block(block)[1])]
        return names if inside is None else names[names.index(inside) + 1 :]

    def trace(self) -> list[dict[str, Any]]:
        """The steps as JSON-able records."""
        return [dataclasses.asdict(s) for s in self.steps]

    def choose(self, name: str, options: Sequence[Any], default: Any) -> Any:
        """A decision of a rule. The default compiles; the tuner and a database give `decisions`."""
        chosen = self.decisions.get(name, default)
        if chosen not in options:
            self.refuse(f"choice {name} = {chosen!r} is not one of {list(options)}")
        self.choices.append(Choice(name, tuple(options), chosen))
        return chosen

    # ---- for the primitives ---------------------------------------------------------------------
    def refuse(self, message: str, at: Node | None = None, hint: str = "") -> NoReturn:
        """Raises ScheduleError showing the loop nest with `at` marked."""
        raise ScheduleError(
            message, self.func.locs, f"in {self.func.name}\n" + script(self.func, at), hint
        )

    def fresh(self, name: str) -> str:
        """`name`, or it with a number, unused in this function."""
        if self._names is None:
            self._names = set()
            for s in statements(self.func):
                if isinstance(s, For):
                    self._names.add(s.var.name)
                elif isinstance(s, Block):
                    self._names.update([s.name, *(i.var.name for i in s.iters)])
                elif isinstance(s, Alloc):
                    self._names.add(s.buffer.name)
            self._names.update(b.name for b in (*self.func.params, *self.func.buffers))
            self._names.update(d.name for d in self.func.dims)
        unique, k = name, 2
        while unique in self._names:
            unique, k = f"{name}_{k}", k + 1
        self._names.add(unique)
        return unique

    def fresh_var(self, name: str) -> Var:
        return Var(self.fresh(name))

    def edit(self, f: Callable[[Stmt], Stmt | None]) -> None:
        """Applies f bottom-up to every statement and drops what became empty."""
        phases = [map_statements(p, f) for p in self.func.phases]
        self.func = self.func.with_(phases=tuple(p for p in phases if not is_empty(p)))

    def swap(self, old: Stmt, new: Stmt) -> None:
        """Replaces one statement."""
        self.edit(lambda s: new if s is old else None)

    def _apply(self, primitive: str, run: Callable[[], Any], **args: Any) -> Any:
        before, names = self.func, self._names
        self._names = None
        try:
            made = run()
        except ScheduleError as e:
            self.func, self._names = before, names
            shown = ", ".join(f"{k}={v!r}" for k, v in args.items())
            raise ScheduleError(
                f"{primitive}({shown}): {e.message}", e.locs, e.excerpt, e.hint
            ) from None
        self._names = None
        if primitive != "mark" and any(x.primitive.startswith("prefetch") for x in self.steps):
            hints.mend(self, before)
        names_made = made if isinstance(made, tuple) else (made,) if isinstance(made, str) else ()
        self.steps.append(Step(primitive, args, names_made))
        if self._after is not None:
            self._after(self.func)
        return made

    # ---- loop primitives (loops.py) -------------------------------------------------------------
    def split(
        self, loop: str, factor: int, tail: str = "perfect", multiple: int = 1
    ) -> tuple[str, str]:
        """Loop i becomes i_o around i_i, i = i_o * factor + i_i. See loops.split for the tails.
        multiple: of the extent of i_o, with the tail `even`."""
        return self._apply(
            "split",
            lambda: loops.split(self, loop, factor, tail, multiple),
            loop=loop,
            factor=factor,
            tail=tail,
            **({} if multiple == 1 else {"multiple": multiple}),
        )

    def split_at_lines(self, loop: str, factor: int, block: str, line: int) -> tuple[str, str]:
        """As split with the tail `mask`, but the first iteration begins where a `line` of so many
        elements does in what a block writes, so that all iterations do."""
        return self._apply(
            "split_at_lines",
            lambda: loops.split_at_lines(self, loop, factor, block, line),
            loop=loop,
            factor=factor,
            block=block,
            line=line,
        )

    def split_by_period(self, loop: str, block: str) -> tuple[str, str]:
        """Loop i becomes i_o around i_i, whose n iterations read x[i % n] of a block once."""
        return self._apply(
            "split_by_period",
            lambda: loops.split_by_period(self, loop, block),
            loop=loop,
            block=block,
        )

    def cut(self, loop: str, at: int, multiple: bool = False) -> tuple[str, str]:
        """The first `at` iterations of a loop (for at < 0, all but the last), then the others in a
        nest of their own; the two loops. multiple: the first ones are a multiple of `at`, the
        others fewer."""
        return self._apply(
            "cut",
            lambda: cutting.cut(self, loop, at, multiple),
            loop=loop,
            at=at,
            **({"multiple": True} if multiple else {}),
        )

    def fuse(self, *names: str) -> str:
        """Directly nested loops become one, outermost named first."""
        return self._apply("fuse", lambda: loops.fuse(self, list(names)), names=list(names))

    def reorder(self, *names: str) -> None:
        """The named loops of one nest take the given order, outermost first."""
        self._apply("reorder", lambda: loops.reorder(self, list(names)), names=list(names))

    def mark(self, loop: str, kind: LoopKind | str) -> None:
        """How a loop runs: PARALLEL, VECTOR, UNROLL, SERIAL."""
        k = LoopKind(kind)
        self._apply("mark", lambda: loops.mark(self, loop, k), loop=loop, kind=k.value)

    def separate(self, block: str) -> None:
        """The root statement that holds a block begins a phase of its own."""
        self._apply("separate", lambda: loops.separate(self, block), block=block)

    def compute_with(self, loop: str, other: str) -> None:
        """Each iteration of `loop` runs right after the same one of `other`, a loop before it."""
        self._apply(
            "compute_with", lambda: loops.compute_with(self, loop, other), loop=loop, other=other
        )

    def delay(self, block: str, loop: str, before: str) -> None:
        """The statement with a block, the last one in `loop`, runs in the next iteration, just
        before the loop `before`."""
        self._apply(
            "delay",
            lambda: pipelining.delay(self, block, loop, before),
            block=block,
            loop=loop,
            before=before,
        )

    def relayout(self, buffer: str, layout: IndexMap | Sequence[Sequence[int]]) -> None:
        """A workspace buffer is kept in memory in another order."""
        imap = layout if isinstance(layout, IndexMap) else layout_from(layout)
        self._apply(
            "relayout",
            lambda: loops.relayout(self, buffer, imap),
            buffer=buffer,
            layout=layout_to(imap),
        )

    # ---- block primitives (blocks.py, staging.py, reductions.py) --------------------------------
    def inline(self, block: str) -> None:
        """An elementwise block disappears into its readers."""
        self._apply("inline", lambda: blocks.inline(self, block), block=block)

    def compute_at(self, block: str, loop: str, once: str | None = None) -> None:
        """A producer is computed just before, a consumer just after, its partner inside `loop`.
        once: only in the first iteration of this loop around, whose iterations need the same."""
        self._apply(
            "compute_at",
            lambda: blocks.compute_at(self, block, loop, once),
            block=block,
            loop=loop,
            **({} if once is None else {"once": once}),
        )

    def decompose_reduction(self, block: str, loop: str) -> str:
        """The init of a reduction becomes a block of its own just before `loop`; its name."""
        return self._apply(
            "decompose_reduction",
            lambda: reductions.decompose_reduction(self, block, loop),
            block=block,
            loop=loop,
        )

    def skip(self, block: str, keep: str | None = None) -> None:
        """The terms of a reduction that change nothing (padding) are not added; but conditions that
        change with the loop `keep` stay choices of what to add."""
        self._apply("skip", lambda: reductions.skip(self, block, keep), block=block, keep=keep)

    def truncate(self, loop: str, width: int) -> None:
        """Loops inside one iteration of `loop` end where a mask's diagonal is reached, at a
        multiple of `width` columns: what lies beyond changes nothing."""
        self._apply(
            "truncate", lambda: truncate.truncate(self, loop, width), loop=loop, width=width
        )

    def stage(
        self,
        buffer: str,
        at: str | None,
        scope: Scope | str = Scope.REGISTER,
        layout: IndexMap | Sequence[Sequence[int]] | None = None,
    ) -> str:
        """What `at` (a loop; None: all of a function or phase) touches of a buffer is held in a new
        buffer: loaded if read before written, written back if used later. The new buffer's name."""
        sc = Scope(scope)
        imap = layout if isinstance(layout, IndexMap) or layout is None else layout_from(layout)
        return self._apply(
            "stage",
            lambda: staging.stage(self, buffer, at, sc, imap),
            buffer=buffer,
            at=at,
            scope=sc.value,
            layout=None if imap is None else layout_to(imap),
        )

    def prefetch(
        self,
        buffer: str,
        loop: str,
        ahead: int,
        turns: str | None = None,
        lines: int | None = None,
    ) -> None:
        """Each iteration of `loop` asks for the memory `ahead` elements behind what it reads of a
        buffer (so many cache lines); if a loop around it, `turns`, reads the same again, each time
        for a part of it."""
        self._apply(
            "prefetch",
            lambda: hints.prefetch(self, buffer, loop, ahead, turns, lines),
            buffer=buffer,
            loop=loop,
            ahead=ahead,
            turns=turns,
            lines=lines,
        )

    def prefetch_next(self, buffer: str, loop: str, around: str) -> None:
        """The iterations of `loop` ask, line by line, for what the next iteration of `around` reads
        of a buffer."""
        self._apply(
            "prefetch_next",
            lambda: hints.prefetch_next(self, buffer, loop, around),
            buffer=buffer,
            loop=loop,
            around=around,
        )

    def rolling(self, block: str, loop: str) -> str:
        """What depends on a running maximum advances with it over `loop`, repaired by a factor when
        it grows; the buffer of the factors. Changes the order of summation."""
        return self._apply(
            "rolling", lambda: rolling.rolling(self, block, loop), block=block, loop=loop
        )

    def rfactor(self, block: str, loop: str, first: bool = False) -> tuple[str, str]:
        """A reduction loop becomes an axis of partial results, the last one or the first, combined
        afterwards: (block of the partial results, their buffer). Changes the order of summation."""
        return self._apply(
            "rfactor",
            lambda: reductions.rfactor(self, block, loop, first),
            block=block,
            loop=loop,
            **({"first": True} if first else {}),
        )

    def slide(self, block: str, loop: str) -> tuple[str, str]:
        """Windows that slide along `loop` share what is combined across it, place by place:
        (block that does so, its buffer). Changes the order of summation."""
        return self._apply(
            "slide", lambda: sliding.slide(self, block, loop), block=block, loop=loop
        )

    def stream(self, block: str, above: int) -> None:
        """What a block stores bypasses the caches if its buffer has at least `above` bytes."""
        self._apply(
            "stream", lambda: streaming.stream(self, block, above), block=block, above=above
        )


def replay(func: PrimFunc, trace: Sequence[Mapping[str, Any]], target: Target) -> Schedule:
    """Applies a trace to a function: the same steps give a structurally equal result."""
    s = Schedule(func, target)
    for step in trace:
        args = dict(step["args"])
        names = args.pop("names", [])
        getattr(s, step["primitive"])(*names, **args)
    return s


def layout_to(layout: IndexMap) -> list[list[int]]:
    """A layout as JSON: (logical axis, divisor, modulus or 0) per physical dimension."""
    return [list(t) for t in layout.splits()]


def layout_from(parts: Sequence[Sequence[int]]) -> IndexMap:
    """The inverse of `layout_to`."""
    rank = 1 + max(p[0] for p in parts)
    d = axes(rank)
    exprs = []
    for axis, divisor, modulus in parts:
        e = d[axis] // divisor
        exprs.append(e % modulus if modulus else e)
    return IndexMap(rank, tuple(exprs))
