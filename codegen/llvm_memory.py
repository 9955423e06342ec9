"""Addresses, loads and stores.

The offset of an access is a polynomial of the loop variables. Its terms are added to the pointer in
the scopes they belong to, outermost first, so that an inner loop adds only what changes in it. In a
vector loop an access is one vector where neighbouring lanes are neighbours in memory, one element
where all lanes want the same, else lane by lane. Masked lanes touch no memory.
"""

from __future__ import annotations

import math

from minicompiler.errors import CodegenError
from minicompiler.ir.expr import (
    FALSE,
    TRUE,
    ZERO,
    Binary,
    Cast,
    Const,
    Dim,
    Expr,
    Load,
    Var,
    conjuncts,
    eq,
    free_vars,
    minimum,
    substitute,
    walk,
    wrap,
)
from minicompiler.ir.polynomials import Poly, add, plus
from minicompiler.ir.tir import Buffer, Prefetch, PrimFunc, Scope, Store
from minicompiler.ir.types import DType
from minicompiler.target import STREAMED, Target

from .llvm_text import Operand, mangle, memory_type, value_type, vector
from .llvm_values import Values

Indices = tuple[Expr, ...]
NOWHERE = 64  # bytes of zeros, for loads that are not wanted


class Memory(Values):
    """Access to the buffers of one function, whose addresses are in `pointers`."""

    def __init__(self, func: PrimFunc, target: Target | None = None) -> None:
        super().__init__(func, target)
        self.pointers: dict[Buffer, str] = {}
        self.offsets: dict[tuple[Buffer, Indices], Poly] = {}
        self.texts: dict[tuple[Expr, ...], str] = {}  # of the terms of offsets, to sort them by
        # Of numbers of 4 and 8 bytes.
        self.loads_masked = target is not None and "avx" in target.features
        self.turned_tiles: set[Buffer] = set()  # those with columns among the known values

    # ---- addresses ------------------------------------------------------------------------------
    def offset(self, buffer: Buffer, indices: Indices) -> Poly:
        """The element offset as a polynomial of the variables (unrolled ones not yet replaced)."""
        key = (buffer, indices)
        found = self.offsets.get(key)
        if found is None:
            found = self.offsets[key] = self.arith.poly(buffer.offset(indices))
        return found

    def lanes_of(self, buffer: Buffer, indices: Indices) -> tuple[str, Poly]:
        """How an access depends on the vector variable: ("same" | "next" | "any", offset at lane
        0)."""
        poly = self.at_env(self.offset(buffer, indices))
        if self.vector is None:
            return "same", poly
        v = self.vector[0]
        step = poly.get((v,))
        others = poly if step is None else {m: c for m, c in poly.items() if m != (v,)}
        if any(v in free_vars(a) for m in others for a in m):
            return "any", poly
        return "same" if step is None else "next" if step == 1 else "any", others

    def address(self, buffer: Buffer, poly: Poly) -> str:
        """A pointer to the element at an offset without vector or unrolled variables."""
        constant = poly.get((), 0)
        if constant:
            poly = {m: c for m, c in poly.items() if m}
        base = self.variable_part(buffer, poly) if poly else self.pointers[buffer]
        if not constant:
            return base
        key = (base, constant)
        known = self.scopes[-1].values.get(key)
        if known is None:
            text = f"getelementptr {memory_type(buffer.dtype)}, ptr {base}, i64 {constant}"
            known = self.scopes[-1].values[key] = Operand(self.op(text, -1, "at"))
        return known.name

    def prefetch(self, s: Prefetch) -> None:
        """A hint for the second-level cache: what is read next must not push out what is in use."""
        at = self.at_env(self.offset(s.place.buffer, s.place.indices))
        base = self.address(s.place.buffer, at)
        ahead = self.index(s.ahead)
        ty = memory_type(s.place.buffer.dtype)
        p = self.op(f"getelementptr {ty}, ptr {base}, i64 {ahead}", hint="at")
        target = self.declare("llvm.prefetch.p0", "void @llvm.prefetch.p0(ptr, i32, i32, i32)")
        self.put(f"call void {target}(ptr {p}, i32 0, i32 2, i32 1)")

    def variable_part(self, buffer: Buffer, poly: Poly) -> str:
        """The pointer without the constant part of the offset."""
        levels = {m: max([self.home(a) for a in m]) for m in poly}
        whole = (buffer, frozenset(poly.items()))
        inner = self.scopes[max(levels.values())].values
        known = inner.get(whole)
        if known is not None:
            return known.name
        groups: dict[int, list[tuple[tuple[Expr, ...], int]]] = {}
        for m, c in poly.items():
            groups.setdefault(levels[m], []).append((m, c))
        base = self.pointers[buffer]
        key: tuple[object, ...] = (buffer,)
        for level in sorted(groups):
            terms = sorted(groups[level], key=lambda t: self.text_of(t[0]))
            key = (*key, *terms)
            values = self.scopes[level].values
            known = values.get(key)
            if known is None:
                offset = self.index(self.arith.expr(dict(terms)), level)
                text = f"getelementptr {memory_type(buffer.dtype)}, ptr {base}, i64 {offset}"
                known = values[key] = Operand(self.op(text, level, "at"))
            base = known.name
        inner[whole] = Operand(base)
        return base

    def text_of(self, term: tuple[Expr, ...]) -> str:
        found = self.texts.get(term)
        if found is None:
            found = self.texts[term] = "*".join([str(a) for a in term])
        return found

    def lane_index(self, i: Expr) -> Expr:
        """An index for one lane: a data-dependent one (a load inside) becomes a variable."""
        i = self.resolve(i)
        if not self.reads(i):
            return i
        return self.data_index(self.value(i).name, self.level_of(i, self.reads(i)))

    def data_index(self, value: str, level: int = -1) -> Var:
        """A variable for an index that was computed in a scope (by default the innermost)."""
        self.count += 1
        var = Var(f"data{self.count}")
        self.names[var], self.level[var] = value, level % len(self.scopes)
        return var

    def nowhere(self) -> str:
        """Memory that a load not wanted may read: zeros."""
        found = self.scopes[0].values.get("nowhere")
        if found is None:
            name = self.fresh("nowhere")
            self.allocas.append(f"{name} = alloca [{NOWHERE} x i8], align {NOWHERE}")
            self.allocas.append(f"store <{NOWHERE} x i8> zeroinitializer, ptr {name}, align 64")
            found = self.scopes[0].values["nowhere"] = Operand(name)
        return found.name

    # ---- loads ----------------------------------------------------------------------------------
    def load(self, e: Load, mask: Operand | None) -> Operand:
        if self.masks:
            mask = self.both(self.masks[-1], mask)
        if e.mask is not None:
            mask = self.both(mask, self.value(e.mask))
        buffer, indices = e.buffer, e.indices
        if any(self.reads(i) for i in indices):
            if self.vector is not None and any(
                self.vector[0] in free_vars(i) for i in indices if self.reads(i)
            ):
                return self.gather(e, mask)
            if mask is None:
                indices = tuple([self.lane_index(i) for i in indices])
            else:  # the loads of indices are wanted only where this one is
                self.masks.append(mask)
                indices = tuple([self.lane_index(i) for i in indices])
                self.masks.pop()
        kind, poly = self.lanes_of(buffer, indices)
        if buffer.scope is Scope.REGISTER and e.mask is None:
            mask = None  # always there; a masked access would keep it from being a register
        if kind == "any":
            found = None
            if mask is None:
                found = (
                    self.column(buffer, indices)
                    or self.strided(buffer, indices)
                    or self.clamped(buffer, indices)
                )
            return self.gather(e, mask) if found is None else found
        scalar, align = memory_type(buffer.dtype), buffer.dtype.bytes
        lanes = self.vector[1] if kind == "next" and self.vector is not None else 1
        p = self.address(buffer, poly)
        together = mask is not None and mask.lanes == 1 and lanes * align <= NOWHERE
        if mask is not None and (lanes == 1 or together):  # one address for all that is wanted
            p = self.op(f"select i1 {self.any_lane(mask)}, ptr {p}, ptr {self.nowhere()}")
            mask = None
        t = vector(scalar, lanes)
        if mask is None:
            name = self.op(f"load {t}, ptr {p}, align {align}")
        else:
            name = self.masked_load(buffer.dtype, p, self.splat(mask, "i1", lanes))
        return self.from_memory(Operand(name, lanes), buffer.dtype)

    def column(self, buffer: Buffer, indices: Indices) -> Operand | None:
        """A column of a tile in registers whose rows are vectors; None for other accesses. The
        columns beside it come at the same time: each step swaps the off-diagonal quarters of ever
        smaller squares."""
        assert self.vector is not None
        if buffer.scope is not Scope.REGISTER:
            return None
        v, lanes = self.vector
        poly = self.at_env(self.offset(buffer, indices))
        step, first = poly.get((v,), 0), poly.get((), 0)
        if not poly.keys() <= {(v,), ()}:
            return None
        if step < 2 or step & (step - 1) or lanes % step or buffer.dtype.is_bool:
            return None
        for scope in reversed(self.scopes):
            found = scope.values.get(("column", buffer, first, lanes))
            if found is not None:
                return found
        scalar = memory_type(buffer.dtype)
        ty, start = vector(scalar, step), first // step * step
        squares = []
        for top in range(0, lanes, step):
            rows = []
            for k in range(top, top + step):
                p = self.address(buffer, {(): start + k * step} if start + k else {})
                rows.append(self.op(f"load {ty}, ptr {p}, align {buffer.dtype.bytes}"))
            squares.append(self.turned(rows, ty))
        self.turned_tiles.add(buffer)
        for k in range(step):
            parts, size = [square[k] for square in squares], step
            while len(parts) > 1:
                everything = ", ".join([f"i32 {j}" for j in range(2 * size)])
                half = vector(scalar, size)
                parts = [
                    self.op(
                        f"shufflevector {half} {a}, {half} {b}, <{2 * size} x i32> <{everything}>"
                    )
                    for a, b in zip(parts[::2], parts[1::2], strict=True)
                ]
                size *= 2
            key = ("column", buffer, start + k, lanes)
            self.scopes[-1].values[key] = Operand(parts[0], lanes)
        return self.scopes[-1].values["column", buffer, first, lanes]

    def strided(self, buffer: Buffer, indices: Indices) -> Operand | None:
        """Every second, third or fourth element, picked out of whole vectors; the last vector ends
        at the last element. None for other accesses."""
        assert self.vector is not None
        v, lanes = self.vector
        poly = self.at_env(self.offset(buffer, indices))
        step = poly.get((v,), 0)
        first = poly.get((), 0)
        rest = {m: c for m, c in poly.items() if m and m != (v,)}
        width = next((w for w in (8, 4) if lanes % w == 0), 0)
        if step not in (2, 3, 4) or not width or any(v in free_vars(a) for m in rest for a in m):
            return None
        scalar, result = memory_type(buffer.dtype), "poison"
        ty = vector(scalar, width)
        for group in range(0, lanes, width):
            part, there = "poison", 0  # lanes that are picked already
            for k in range(step):
                start = min(k * width, (width - 1) * step + 1 - width)
                at = first + group * step + start
                p = self.address(buffer, {**rest, (): at} if at else rest)
                chunk = self.op(f"load {ty}, ptr {p}, align {buffer.dtype.bytes}")
                reach = (start + width - 1) // step + 1
                order = [
                    width + j * step - start if there <= j < reach else j for j in range(width)
                ]
                part, there = self.shuffled(ty, part, chunk, order), reach
            wide = self.shuffled(ty, part, "poison", [*range(width), *[-1] * (lanes - width)])
            order = [*range(group), *range(lanes, lanes + width), *[-1] * (lanes - group - width)]
            result = self.shuffled(vector(scalar, lanes), result, wide, order)
        return self.from_memory(Operand(result, lanes), buffer.dtype)

    def clamped(self, buffer: Buffer, indices: Indices) -> Operand | None:
        """Neighbours up to a limit, x[min(i + lane, n - 1)]: a masked vector, and in lanes behind
        the limit what the last one wants. None for other accesses, and where masks are dear."""
        assert self.vector is not None
        v, lanes = self.vector
        poly = self.at_env(self.offset(buffer, indices))
        varying = [m for m in poly if any(v in free_vars(a) for a in m)]
        limited = varying[0][0] if len(varying) == 1 and len(varying[0]) == 1 else None
        if type(limited) is not Binary or limited.op != "min" or poly[varying[0]] != 1:
            return None
        if not self.loads_masked or buffer.dtype.bytes not in (4, 8):
            return None
        if buffer.scope is Scope.REGISTER:  # it has no addresses
            return None
        swapped = v in free_vars(limited.b)
        place, limit = (limited.b, limited.a) if swapped else (limited.a, limited.b)
        line = self.at_env(self.arith.poly(place))
        first = {m: c for m, c in line.items() if m != (v,)}
        if line.get((v,)) != 1 or any(v in free_vars(a) for m in (*first, (limit,)) for a in m):
            return None
        rest = {m: c for m, c in poly.items() if m not in varying}
        last = self.arith.poly(minimum(substitute(place, {v: Const(lanes - 1)}), limit))
        p = self.address(buffer, self.at_env(add(rest, last)))
        scalar = memory_type(buffer.dtype)
        behind = Operand(self.op(f"load {scalar}, ptr {p}, align {buffer.dtype.bytes}"))
        flags, t = self.value(place <= limit), vector(scalar, lanes)
        there = self.masked_load(buffer.dtype, self.address(buffer, add(rest, first)), flags)
        which = f"{vector('i1', lanes)} {flags.name}"
        others = self.splat(behind, scalar, lanes).name
        return Operand(self.op(f"select {which}, {t} {there}, {t} {others}"), lanes)

    def masked_load(self, dtype: DType, p: str, flags: Operand) -> str:
        """A vector of which only some lanes are read; the others are 0."""
        t, which = vector(memory_type(dtype), flags.lanes), vector("i1", flags.lanes)
        f = f"llvm.masked.load.{mangle(t)}.p0"
        f = self.declare(f, f"{t} @{f}(ptr, {which}, {t})")
        where = f"ptr align {dtype.bytes} {p}, {which} {flags.name}, {t} zeroinitializer"
        return self.op(f"call {t} {f}({where})")

    def turned(self, rows: list[str], ty: str) -> list[str]:
        """The columns of a square of vectors."""
        n = len(rows)
        rows = list(rows)

        def exchange(distance: int, low: list[int], high: list[int]) -> None:
            for i in range(n):
                j = i + distance
                if not i & distance:
                    rows[i], rows[j] = [
                        self.op(
                            f"shufflevector {ty} {rows[i]}, {ty} {rows[j]}, <{n} x i32> <"
                            + ", ".join([f"i32 {k}" for k in order])
                            + ">"
                        )
                        for order in (low, high)
                    ]

        distance = 1
        if n >= 4 and mangle(ty).endswith("32"):
            # Within 128 bits there are instructions that interleave halves, and none that swap
            # single elements; the columns then come out as 0, 2, 1, 3.
            fours = range(0, n, 4)
            low = [k for f in fours for k in (f, n + f, f + 1, n + f + 1)]
            exchange(1, low, [k + 2 for k in low])
            low = [k for f in fours for k in (f, f + 1, n + f, n + f + 1)]
            exchange(2, low, [k + 2 for k in low])
            rows = [rows[f + k] for f in fours for k in (0, 2, 1, 3)]
            distance = 4
        while distance < n:
            low = [k if not k & distance else n + k - distance for k in range(n)]
            high = [k + distance if not k & distance else n + k for k in range(n)]
            exchange(distance, low, high)
            distance *= 2
        return rows

    def gather(self, e: Load, mask: Operand | None) -> Operand:
        """Lane by lane, for elements that are not neighbours."""
        assert self.vector is not None
        v, lanes = self.vector
        scalar = memory_type(e.buffer.dtype)
        ty, result = vector(scalar, lanes), "poison"
        computed = {i: self.value(i, mask) for i in e.indices if _computed(i, v)}
        saved, self.vector = self.vector, None
        masks, self.masks = self.masks, []
        for lane in range(lanes):
            self.env[v] = Const(lane)
            wanted = self.lane_of(mask, lane)
            # The loads of indices are wanted only where this one is.
            self.masks = [] if wanted is None else [Operand(wanted)]
            places = {
                i: self.data_index(
                    self.op(f"extractelement {vector('i64', lanes)} {x.name}, i64 {lane}")
                )
                for i, x in computed.items()
            }
            indices = tuple([places[i] if i in places else self.lane_index(i) for i in e.indices])
            p = self.address(e.buffer, self.at_env(self.offset(e.buffer, indices)))
            if wanted is not None:
                p = self.op(f"select i1 {wanted}, ptr {p}, ptr {self.nowhere()}")
            x = self.op(f"load {scalar}, ptr {p}, align {e.buffer.dtype.bytes}")
            result = self.op(f"insertelement {ty} {result}, {scalar} {x}, i64 {lane}")
        del self.env[v]
        self.vector, self.masks = saved, masks
        return self.from_memory(Operand(result, lanes), e.buffer.dtype)

    def lane_of(self, mask: Operand | None, lane: int) -> str | None:
        if mask is None or mask.lanes == 1:
            return None if mask is None else mask.name
        return self.op(f"extractelement {vector('i1', mask.lanes)} {mask.name}, i64 {lane}")

    # ---- stores ---------------------------------------------------------------------------------
    def store(self, s: Store) -> None:
        if s.buffer in self.turned_tiles:
            self.turned_tiles.remove(s.buffer)
            for scope in self.scopes:
                for key in [k for k in scope.values if isinstance(k, tuple) and s.buffer in k]:
                    if key[0] == "column":
                        del scope.values[key]
        lanes_of_one = self.combined_lanes(s)
        if lanes_of_one is not None:
            s = s.with_(value=self.combined(s, lanes_of_one))
        buffer, indices = s.buffer, s.indices
        value = self.value(s.value)
        mask = self.masks[-1] if self.masks else None
        if any(self.reads(i) for i in indices):
            if self.vector is not None:
                self.scatter(s, value)
                return
            indices = tuple([self.lane_index(i) for i in indices])
        kind, poly = self.lanes_of(buffer, indices)
        if kind == "any":
            self.scatter(s, value)
            return
        scalar, align = memory_type(buffer.dtype), buffer.dtype.bytes
        value = self.to_memory(value, buffer.dtype)
        if kind == "same":
            if value.lanes > 1 or (mask is not None and mask.lanes > 1):
                message = f"all lanes of {self.vector} store to one element of {buffer.name}"
                raise CodegenError(message, self.func.locs)
            p = self.address(buffer, poly)
            self.put(f"store {scalar} {value.name}, ptr {p}, align {align}")
            return
        assert self.vector is not None
        lanes = self.vector[1]
        value = self.splat(value, scalar, lanes)
        p = self.address(buffer, poly)
        t, flags = vector(scalar, lanes), vector("i1", lanes)
        if mask is not None and buffer.scope is Scope.REGISTER:
            old = self.op(f"load {t}, ptr {p}, align {align}")
            which = self.splat(mask, "i1", lanes).name
            name = self.op(f"select {flags} {which}, {t} {value.name}, {t} {old}")
            value, mask = Operand(name, lanes), None
        if mask is None:
            self.put_vector(s, value, poly, p)
            return
        first = self.first_lanes.get(mask.name, 0)
        if s.stream is not FALSE and first and first * align % STREAMED[0] == 0:
            # A masked store cannot go past the caches, and one line must not be written both ways.
            self.put_first(s, value, first, poly)
            return
        which = self.splat(mask, "i1", lanes).name
        f = f"llvm.masked.store.{mangle(t)}.p0"
        f = self.declare(f, f"void @{f}({t}, ptr, {flags})")
        self.put(f"call void {f}({t} {value.name}, ptr align {align} {p}, {flags} {which})")

    def put_first(self, s: Store, value: Operand, count: int, poly: Poly) -> None:
        """Writes the first lanes of a vector, in pieces that are powers of two."""
        ty = vector(memory_type(s.buffer.dtype), value.lanes)
        done = 0
        while done < count:
            size = 1 << (count - done).bit_length() - 1
            part = self.shuffled(ty, value.name, "poison", range(done, done + size))
            at = plus(poly, done)
            self.put_vector(s, Operand(part, size), at, self.address(s.buffer, at))
            done += size

    def put_vector(self, s: Store, value: Operand, poly: Poly, p: str) -> None:
        """Writes a vector, past the caches if the buffer is large and its address permits: in whole
        registers where these lie so, else in halves."""
        size, (half, whole) = s.buffer.dtype.bytes, STREAMED
        scalar = memory_type(s.buffer.dtype)
        ty = vector(scalar, value.lanes)
        steps = math.gcd(value.lanes * size, *[self.step(s, m, c) for m, c in poly.items()])

        def plain() -> None:
            self.put(f"store {ty} {value.name}, ptr {p}, align {size}")

        def streamed(align: int) -> None:
            self.put(f"store {ty} {value.name}, ptr {p}, align {align}, !nontemporal !0")

        def between() -> None:
            """Half a register, whole ones from there on, and another half."""
            done, n = 0, half // size
            while done < value.lanes:
                first = done == 0 or done + n == value.lanes
                count, align = (n, half) if first else (2 * n, whole)
                part = self.shuffled(ty, value.name, "poison", range(done, done + count))
                at = self.op(f"getelementptr {scalar}, ptr {p}, i64 {done}")
                text = f"store {vector(scalar, count)} {part}, ptr {at}, align {align}"
                self.put(f"{text}, !nontemporal !0")
                done += count

        def aligned(to: int, offset: int = 0) -> str:
            return self.lies_at(s, to, offset, None if steps % half == 0 else p)

        if s.stream is FALSE or value.lanes * size % half:
            plain()
        elif steps % whole:
            self.branch(aligned(half), lambda: streamed(half), plain)
        else:
            self.branch(
                aligned(whole),
                lambda: streamed(whole),
                lambda: self.branch(aligned(whole, half), between, plain),
            )

    def step(self, s: Store, atoms: tuple[Expr, ...], factor: int) -> int:
        """The bytes of which a term of an address is a multiple, where it goes past the caches."""
        size, half = s.buffer.dtype.bytes, STREAMED[0]
        distance = math.prod([a for a in atoms if isinstance(a, Dim)], start=wrap(factor))
        even = self.arith.simplify(eq(distance % (half // size), ZERO))
        asked = any(self.arith.simplify(c) is even for c in conjuncts(s.stream))
        return math.lcm(factor * size, half) if asked else factor * size

    def lies_at(self, s: Store, align: int, offset: int, p: str | None) -> str:
        """Whether a vector is written past the caches and lies so many bytes behind a multiple of
        `align`, an i1. p: its address; None: that is the same for all of the buffer."""
        level = 0 if p is None else len(self.scopes) - 1
        key = ("streamed", s.buffer, s.stream, align, offset, p)
        found = self.scopes[level].values.get(key)
        if found is None:
            number = self.op(f"ptrtoint ptr {p or self.pointers[s.buffer]} to i64", level)
            rest = self.op(f"and i64 {number}, {align - 1}", level)
            flag = self.op(f"icmp eq i64 {rest}, {offset}", level)
            if s.stream is not TRUE:
                flag = self.op(f"and i1 {flag}, {self.condition(s.stream, 0)}", level)
            found = self.scopes[level].values[key] = Operand(flag)
        return found.name

    # ---- all lanes into one element -------------------------------------------------------------
    def combined_lanes(self, s: Store) -> Expr | None:
        """x, where the store is C = combine(C, x) in either order and only x has lanes."""
        if self.vector is None or type(s.value) is not Binary:
            return None
        v = self.vector[0]
        for own, x in ((s.value.a, s.value.b), (s.value.b, s.value.a)):
            if type(own) is Load and own.buffer is s.buffer and own.indices == s.indices:
                return x if v not in free_vars(own) and v in free_vars(x) else None
        return None

    def combined(self, s: Store, x: Expr) -> Expr:
        """The value of such a store with x combined pairwise: halves, then halves of those."""
        assert isinstance(s.value, Binary)
        t = s.value.dtype
        found = self.value(x)
        scalar, lanes = value_type(t), found.lanes
        name = found.name
        while lanes > 1:
            ty, lanes = vector(scalar, lanes), lanes // 2
            low, high = [
                ", ".join([f"i32 {k}" for k in range(start, start + lanes)]) for start in (0, lanes)
            ]
            half = [
                self.op(f"shufflevector {ty} {name}, {ty} poison, <{lanes} x i32> <{part}>")
                for part in (low, high)
            ]
            if lanes == 1:
                half = [self.op(f"extractelement <1 x {scalar}> {h}, i64 0") for h in half]
            ty = vector(scalar, lanes)
            name = self.operation(s.value.op, half[0], half[1], t, lanes, ty)
        self.count += 1
        made = Var(f"lanes{self.count}", t)
        self.names[made], self.level[made] = name, len(self.scopes) - 1
        return Binary(s.value.op, Load(s.buffer, s.indices), made)

    def scatter(self, s: Store, value: Operand) -> None:
        """Lane by lane, in order: of several lanes that store to one element the last one wins."""
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
                indices = tuple([self.lane_index(i) for i in s.indices])
                p = self.address(s.buffer, self.at_env(self.offset(s.buffer, indices)))
                ty = vector(scalar, lanes)
                x = self.op(f"extractelement {ty} {value.name}, i64 {lane}")
                self.put(f"store {scalar} {x}, ptr {p}, align {s.buffer.dtype.bytes}")

            wanted = self.lane_of(mask, lane)
            if wanted is None:
                one()
            else:
                self.branch(wanted, one)
        del self.env[v]
        self.vector, self.masks = saved, masks

    # ---- bools: a byte in memory, a bit in registers --------------------------------------------
    def from_memory(self, v: Operand, t: DType) -> Operand:
        if not t.is_bool:
            return v
        zero = "0" if v.lanes == 1 else "zeroinitializer"
        return Operand(self.op(f"icmp ne {vector('i8', v.lanes)} {v.name}, {zero}"), v.lanes)

    def to_memory(self, v: Operand, t: DType) -> Operand:
        if not t.is_bool:
            return v
        text = f"zext {value_type(t, v.lanes)} {v.name} to {vector('i8', v.lanes)}"
        return Operand(self.op(text), v.lanes)


def _computed(i: Expr, lanes: Expr) -> bool:
    """Whether an index is worked out from floats, which vectors do better than each lane alone."""
    return lanes in free_vars(i) and any(type(x) is Cast and x.a.dtype.is_float for x in walk(i))
