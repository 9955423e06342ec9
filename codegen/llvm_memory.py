"""Addresses, loads and stores.

The offset of an access is a polynomial of the loop variables. Its terms are added to the pointer in
the scopes they belong to, outermost first, so that an inner loop adds only what changes in it. In a
vector loop an access is one vector where neighbouring lanes are neighbours in memory, one element
where all lanes want the same, else lane by lane. Masked lanes touch no memory.
"""

from __future__ import annotations

from minicompiler.errors import CodegenError
from minicompiler.ir.arith import Poly
from minicompiler.ir.expr import ZERO, Const, Expr, Load, Var, free_vars
from minicompiler.ir.tir import Buffer, PrimFunc, Scope, Store
from minicompiler.ir.types import DType

from .llvm_text import Operand, mangle, memory_type, value_type, vector
from .llvm_values import Values

Indices = tuple[Expr, ...]


class Memory(Values):
    """Access to the buffers of one function, whose addresses are in `pointers`."""

    def __init__(self, func: PrimFunc) -> None:
        super().__init__(func)
        self.pointers: dict[Buffer, str] = {}
        self.offsets: dict[tuple[Buffer, Indices], Poly] = {}
        self.texts: dict[tuple[Expr, ...], str] = {}  # of the terms of offsets, to sort them by

    # ---- addresses ------------------------------------------------------------------------------
    def offset(self, buffer: Buffer, indices: Indices) -> Poly:
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
        value = self.value(i)
        self.count += 1
        var = Var(f"data{self.count}")
        self.names[var], self.level[var] = value.name, len(self.scopes) - 1
        return var

    def nowhere(self) -> str:
        """Memory that a load not wanted may read: zeros."""
        found = self.scopes[0].values.get("nowhere")
        if found is None:
            name = self.fresh("nowhere")
            self.allocas.append(f"{name} = alloca [64 x i8], align 64")
            self.allocas.append(f"store <64 x i8> zeroinitializer, ptr {name}, align 64")
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
            if self.vector is not None and self.vector[0] in free_vars(e):
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
            return self.gather(e, mask)
        scalar, align = memory_type(buffer.dtype), buffer.dtype.bytes
        lanes = self.vector[1] if kind == "next" and self.vector is not None else 1
        p = self.address(buffer, poly)
        if mask is not None and lanes == 1:
            p = self.op(f"select i1 {self.any_lane(mask)}, ptr {p}, ptr {self.nowhere()}")
            mask = None
        t = vector(scalar, lanes)
        if mask is None:
            name = self.op(f"load {t}, ptr {p}, align {align}")
        else:
            flags = self.splat(mask, "i1", lanes).name
            f = f"llvm.masked.load.{mangle(t)}.p0"
            f = self.declare(f, f"{t} @{f}(ptr, <{lanes} x i1>, {t})")
            where = f"ptr align {align} {p}, <{lanes} x i1> {flags}, {t} zeroinitializer"
            name = self.op(f"call {t} {f}({where})")
        return self.from_memory(Operand(name, lanes), buffer.dtype)

    def any_lane(self, mask: Operand) -> str:
        """Whether any lane is set: one element for all lanes is loaded if one of them wants it."""
        if mask.lanes == 1:
            return mask.name
        ty = vector("i1", mask.lanes)
        f = f"llvm.vector.reduce.or.v{mask.lanes}i1"
        f = self.declare(f, f"i1 @{f}({ty})")
        return self.op(f"call i1 {f}({ty} {mask.name})")

    def gather(self, e: Load, mask: Operand | None) -> Operand:
        """Lane by lane, for elements that are not neighbours."""
        assert self.vector is not None
        v, lanes = self.vector
        scalar = memory_type(e.buffer.dtype)
        ty, result = vector(scalar, lanes), "poison"
        saved, self.vector = self.vector, None
        masks, self.masks = self.masks, []
        for lane in range(lanes):
            self.env[v] = Const(lane)
            wanted = self.lane_of(mask, lane)
            # The loads of indices are wanted only where this one is.
            self.masks = [] if wanted is None else [Operand(wanted)]
            indices = tuple([self.lane_index(i) for i in e.indices])
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
            self.put(f"store {t} {value.name}, ptr {p}, align {align}")
            return
        which = self.splat(mask, "i1", lanes).name
        f = f"llvm.masked.store.{mangle(t)}.p0"
        f = self.declare(f, f"void @{f}({t}, ptr, {flags})")
        self.put(f"call void {f}({t} {value.name}, ptr align {align} {p}, {flags} {which})")

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
