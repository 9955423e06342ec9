"""What the loop nest of a kernel tells about its speed, before and without running it.

    nest = read_nest(fused, constant, target)     the schedule again, its steps, source nodes
    w = nest.work({"batch": 8})                   operations, bytes, tails, parallel iterations
    w.busy(4)                                     0.75: three parallel iterations for four threads

Counts are exact for the loops as they stand; what depends on data (sorting, scattering) is opaque.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

from minicompiler.codegen.llvm_math import expand
from minicompiler.ir.arith import evaluate_int
from minicompiler.ir.expr import (
    Binary,
    Call,
    Dim,
    Expr,
    Load,
    factors,
    free_vars,
    loads,
    substitute,
    walk,
)
from minicompiler.ir.graph import Function
from minicompiler.ir.tir import (
    PARALLEL,
    VECTOR,
    Block,
    Buffer,
    For,
    PrimFunc,
    Scope,
    Stmt,
    statements,
    sub_statements,
)
from minicompiler.ir.types import Loc
from minicompiler.kernel import one_row_form, plain_loops
from minicompiler.lower.cost import flops, is_number, traffic
from minicompiler.lower.lift_constants import lift_constants
from minicompiler.lower.to_tir import lower_function
from minicompiler.schedules.cpu import schedule
from minicompiler.schedules.schedule import Schedule
from minicompiler.target import Target

_ARITHMETIC = ("add", "sub", "mul", "div", "min", "max")
_SLOW = 8  # a division or square root takes about as long as so many multiplications
_SLOW_CALLS = ("sqrt",)


@dataclasses.dataclass(frozen=True)
class Phase:
    """One part of a kernel between two barriers. iterations: of its parallel loop, 1 without one.
    cost: arithmetic instructions, loads and stores, per element."""

    iterations: int
    cost: float


@dataclasses.dataclass(frozen=True)
class Work:
    """What a kernel does for given dimensions.

    Attributes:
        flops: operations of the operators' definition, of integers too, see lower/cost.py.
        performed: the same for the algorithm that was chosen (Winograd needs fewer).
        instructions: per element and with tails: a multiplication and the addition of its result
            are one (also of a pair), exp and the like are what they expand to.
        same: those of `instructions` that give all lanes of a vector the same; computed anew for
            each vector, though they need not be.
        functions: those of `instructions` that belong to each function (exp, erf, ...).
        read, written: bytes of activations. weights: bytes of constants, as packed.
        workspace: bytes of each buffer that one phase writes for a later one.
        tail: points computed per point needed; more than 1 where tiles reach over the edge.
        vectors: share of the cost that is in vector loops. lanes: how full these vectors are.
        vector_lanes: float32 elements of a full vector.
        strided: bytes between the elements of a vector, for each buffer where they do not lie side
            by side in the most costly blocks.
        opaque: a phase that depends on data and is left out of these numbers.
    """

    flops: int
    performed: int
    instructions: float
    same: float
    functions: Mapping[str, float]
    read: int
    written: int
    weights: int
    workspace: Mapping[str, int]
    phases: tuple[Phase, ...]
    tail: float
    vectors: float
    lanes: float
    vector_lanes: int
    strided: Mapping[str, int]
    opaque: bool

    @property
    def moved(self) -> int:
        """Bytes that pass through memory at least once."""
        return self.read + self.written + self.weights

    @property
    def only_moves(self) -> bool:
        """True for a layout conversion, a transposition and the like."""
        return self.instructions == 0 and not self.opaque

    def busy(self, threads: int) -> float:
        """The share of all threads' time that they can work: 1 where iterations divide evenly."""
        total = sum(p.cost for p in self.phases)
        # Of n iterations on t threads, the busiest thread has ceil(n / t).
        spent = sum(p.cost * math.ceil(p.iterations / threads) / p.iterations for p in self.phases)
        return total / (threads * spent) if spent else 1.0


@dataclasses.dataclass(frozen=True)
class Nest:
    """A kernel's loop nests: as defined, as lowered with the chosen algorithm, as scheduled.

    one_row: the dimension that counts rows and the nests for a single one, if these differ.
    """

    meaning: PrimFunc
    lowered: PrimFunc
    scheduled: PrimFunc
    rule: str
    steps: tuple[str, ...]
    locs: tuple[Loc, ...]
    target: Target
    one_row: tuple[Dim, Nest] | None = None

    def at(self, dims: Mapping[str, int]) -> Nest:
        """The nests that run for these dimensions."""
        if self.one_row is not None and dims[self.one_row[0].name] == 1:
            return self.one_row[1]
        return self

    def work(self, dims: Mapping[str, int]) -> Work:
        """The numbers for these dimensions."""
        return _Reader(self.at(dims), dims).work()


def read_nest(
    fused: Function, constant: tuple[bool, ...], target: Target, max_error: float = 1e-4
) -> Nest:
    """The nests of a fused function. `constant`: which of its arguments are constants. They are
    made again, because what the disk cache holds is machine code."""
    lowered = plain_loops(fused, constant, max_error)
    meaning = lower_function(fused, constant)

    def nest(lowered: PrimFunc, s: Schedule) -> Nest:
        scheduled, _ = lift_constants(s.func)
        steps = tuple(str(step) for step in s.steps)
        return Nest(meaning, lowered, scheduled, s.rule, steps, lowered.locs, target)

    s = schedule(lowered, target)
    form = one_row_form(s, lowered)
    one_row = None if form is None else (form[0], nest(*form[1:]))
    return dataclasses.replace(nest(lowered, s), one_row=one_row)


@dataclasses.dataclass
class _Counted:
    """Instructions of an element: all, those that are the same in all lanes, those of functions."""

    total: float = 0.0
    same: float = 0.0
    functions: dict[str, float] = dataclasses.field(default_factory=dict)


class _Reader:
    """One nest at one set of sizes."""

    def __init__(self, nest: Nest, dims: Mapping[str, int]) -> None:
        self.nest, self.dims = nest, dims

    def work(self) -> Work:
        nest = self.nest
        needed = {
            b.name: math.prod(self._int(i.extent) for i in b.iters)
            for b in _blocks(nest.lowered)
        }  # fmt: skip
        instructions = same = computed = wanted = in_vectors = lanes = total = 0.0
        functions: dict[str, float] = {}
        strided: dict[Buffer, tuple[float, int]] = {}
        phases = []
        opaque = False
        for phase in nest.scheduled.phases:
            cost, iterations, known = 0.0, 1, False
            for block, around in _with_loops(phase):
                known = True
                points = self._points(block, around, needed)
                vector = next((x for x in around if x.kind is VECTOR), None)
                counted = self._instructions(block, vector)
                each = counted.total + len(loads(block.body.value)) + 1
                instructions += points * counted.total
                same += points * counted.same
                for name, n in counted.functions.items():
                    functions[name] = functions.get(name, 0.0) + points * n
                cost += points * each
                if block.name in needed:
                    computed += points * each
                    wanted += min(points, needed[block.name]) * each
                if vector is not None:
                    in_vectors += points * each
                    lanes += points * each * self._full(vector, block)
                    for buffer, stride in self._strides(block, vector).items():
                        before = strided.get(buffer, (0.0, 0))
                        strided[buffer] = (before[0] + points, stride)
                for loop in around:
                    if loop.kind is PARALLEL:
                        iterations = max(iterations, self._int(loop.extent))
            opaque |= not known
            total += cost
            phases.append(Phase(iterations, cost))
        weights = [b for b in nest.scheduled.params if b.constant]
        read, written = traffic(nest.meaning)
        # Of a table that is looked up, only some rows.
        tables = {b.name: self._int(n) for b, n in read.items()}
        most = max((points for points, _ in strided.values()), default=0.0)
        return Work(
            flops=self._int(flops(nest.meaning)),
            performed=self._int(flops(nest.lowered)),
            instructions=instructions,
            same=same,
            functions=functions,
            read=sum(self._int(n) for b, n in read.items() if not b.constant),
            written=sum(self._int(n) for n in written.values()),
            weights=sum(min(self._bytes(b), tables.get(b.name, self._bytes(b))) for b in weights),
            workspace={b.name: self._bytes(b) for b in nest.scheduled.buffers},
            phases=tuple(phases),
            tail=computed / wanted if wanted else 1.0,
            vectors=in_vectors / total if total else 0.0,
            lanes=lanes / in_vectors if in_vectors else 0.0,
            vector_lanes=nest.target.vector_bytes // 4,
            strided={b.name: n for b, (points, n) in strided.items() if 2 * points > most},
            opaque=opaque,
        )

    def _int(self, e: Expr) -> int:
        return evaluate_int(e, self.dims)

    def _bytes(self, b: Buffer) -> int:
        return math.prod(self._int(n) for n in b.physical_shape) * b.dtype.bytes

    def _points(self, block: Block, around: tuple[For, ...], needed: Mapping[str, int]) -> int:
        """How often the body is computed. A condition skips it, except on lanes of a vector."""
        # The extent of a loop in a tail may depend on an outer loop: its first iteration counts.
        env = {**self.dims, **{x.var.name: 0 for x in around}}
        points = math.prod(evaluate_int(x.extent, env) for x in around)
        lanes = {x.var for x in around if x.kind is VECTOR}
        if block.name in needed and lanes.isdisjoint(free_vars(block.where)):
            conditional = bool(free_vars(block.where))
            return min(points, needed[block.name]) if conditional else points
        return points

    def _instructions(self, block: Block, vector: For | None) -> _Counted:
        """Arithmetic of one element. What is the same in all lanes of a vector loop is computed
        once for them, in each iteration of the loops around."""
        once = 1.0
        if vector is not None:
            lanes = self.nest.target.vector_bytes // max(block.body.buffer.dtype.bytes, 1)
            once = min(1.0, lanes / max(self._int(vector.extent), 1))
        found = _Counted()
        for e in walk(block.body.value):
            if not is_number(e) or type(e) not in (Binary, Call):
                continue
            same = vector is not None and not _depends(e, block, vector)
            share = once if same else 1.0
            if type(e) is Call and factors(e) is None:
                count = share * _expanded(e, e.args)
                found.functions[e.fn] = found.functions.get(e.fn, 0.0) + count
            else:
                count = share * _of_operation(e)
            found.total += count
            found.same += count if same else 0.0
        return found

    def _full(self, vector: For, block: Block) -> float:
        """The share of the vector registers' lanes that a vector loop uses."""
        size = self._int(vector.extent) * block.body.buffer.dtype.bytes
        width = self.nest.target.vector_bytes
        return size / (math.ceil(size / width) * width)

    def _strides(self, block: Block, vector: For) -> dict[Buffer, int]:
        """Bytes from one lane's element to the next, for loads where they are not side by side."""
        found = {}
        values: dict[Expr, Expr] = {i.var: i.value for i in block.iters}
        for load in loads(block.body.value):
            if load.buffer.scope is Scope.REGISTER:
                continue
            at = [self._offset(load, values, vector, k) for k in (0, 1)]
            if None in at:
                continue
            assert at[0] is not None and at[1] is not None
            step = at[1] - at[0]
            if step not in (0, 1):
                found[load.buffer] = step * load.buffer.dtype.bytes
        return found

    def _offset(
        self, load: Load, values: Mapping[Expr, Expr], vector: For, lane: int
    ) -> int | None:
        """The element that a lane loads in the first iteration of all other loops; None where an
        index is itself data."""
        indices = [substitute(i, values) for i in load.indices]
        if any(loads(i) for i in indices):
            return None
        b = load.buffer
        physical = indices if b.layout is None else b.layout.apply(indices)
        env = dict(self.dims)
        for i in physical:
            for v in free_vars(i):
                name = str(v)
                env.setdefault(name, lane if v is vector.var else 0)
        offset = 0
        for extent, i in zip(b.physical_shape, physical, strict=True):
            offset = offset * self._int(extent) + evaluate_int(i, env)
        return offset


def _blocks(func: PrimFunc) -> Iterator[Block]:
    return (s for s in statements(func) if isinstance(s, Block))


def _with_loops(phase: Stmt) -> Iterator[tuple[Block, tuple[For, ...]]]:
    """The blocks of a phase with the loops around each, outermost first."""
    stack: list[tuple[Stmt, tuple[For, ...]]] = [(phase, ())]
    while stack:
        s, around = stack.pop()
        if isinstance(s, Block):
            yield s, around
        inner = (*around, s) if isinstance(s, For) else around
        stack.extend((x, inner) for x in reversed(sub_statements(s)))


def _depends(e: Expr, block: Block, vector: For) -> bool:
    """Whether an expression in a block differs from lane to lane."""
    used = free_vars(e)
    lanes = {i.var for i in block.iters if vector.var in free_vars(i.value)}
    return vector.var in used or not used.isdisjoint(lanes)


def _of_operation(e: Expr) -> int:
    """Instructions of one operation; 0 for an addition that is part of a multiplication's."""
    if type(e) is not Binary:
        return 1
    if e.op == "pow":
        return _expanded(e, (e.a, e.b))
    if e.op not in _ARITHMETIC:
        return 0
    if e.op in ("add", "sub") and any(factors(x) is not None for x in (e.a, e.b)):
        return 0
    return _SLOW if e.op == "div" else 1


def _expanded(e: Call | Binary, operands: tuple[Expr, ...]) -> int:
    """Instructions of a function; the arithmetic of its operands is not part of it."""
    body = expand(e)
    if body is None:
        return _SLOW if type(e) is Call and e.fn in _SLOW_CALLS else 1
    outside = {x for operand in operands for x in walk(operand)}
    return sum(
        _SLOW if type(x) is Binary and x.op == "div" else 1
        for x in walk(body)
        if x not in outside and type(x) in (Binary, Call)
    )
