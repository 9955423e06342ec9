"""Conversions between element types, with the rounding of numpy's astype.

    w.convert(Operand("%x", 8), float64, bfloat16)

The 16-bit floats go through float32 and are rounded once. None of it calls the C library, which is
where LLVM's own conversions of bfloat16, and of float64 to float16, end up.
"""

from __future__ import annotations

from minicompiler.ir.types import DType, float32, float64, int32, int64

from .llvm_text import Operand, Writer, everywhere, value_type, vector


class Conversions(Writer):
    """What turns one element type into another."""

    def convert(self, v: Operand, source: DType, target: DType) -> Operand:
        """As numpy's astype on this kind of processor."""
        if source is target:
            return v
        lanes = v.lanes
        a, b = value_type(source, lanes), value_type(target, lanes)
        if target.is_bool:
            zero = everywhere(value_type(source), "0.0" if source.is_float else "0", lanes)
            if source.name == "bfloat16":  # its bits, but for the sign
                v = Operand(self.op(f"shl {a} {v.name}, {everywhere('i16', '1', lanes)}"), lanes)
                zero, source = "zeroinitializer" if lanes > 1 else "0", DType("int16")
            code = "fcmp une" if source.is_float else "icmp ne"
            return Operand(self.op(f"{code} {a} {v.name}, {zero}"), lanes)
        if source.is_float and source.bits == 16:
            if source.name == "float16":
                wide = self.op(f"fpext {a} {v.name} to {vector('float', lanes)}")
            else:
                i32 = vector("i32", lanes)
                raw = self.op(f"zext {a} {v.name} to {i32}")
                raw = self.op(f"shl {i32} {raw}, {everywhere('i32', '16', lanes)}")
                wide = self.op(f"bitcast {i32} {raw} to {vector('float', lanes)}")
            return self.convert(Operand(wide, lanes), float32, target)
        if target.is_float and target.bits == 16:
            if source is float64:
                v = self.rounded_to_odd(v)
            elif source is not float32:
                v = self.convert(v, source, float32)
            if target.name == "bfloat16":
                return self.bfloat(v)
            return Operand(self.op(f"fptrunc {vector('float', lanes)} {v.name} to {b}"), lanes)
        if source.is_bool:
            code = "uitofp" if target.is_float else "zext"
        elif source.is_float and target.is_float:
            code = "fpext" if target.bits > source.bits else "fptrunc"
        elif source.is_float:
            # Narrow types go through a wider one and wrap. What does not fit is whatever the
            # processor makes of it.
            if target.name == "uint64":
                code = "fptoui"
            else:
                code = "fptosi"
                via = int64 if target.name in ("uint32", "int64") else int32
                if via.bits != target.bits:
                    wide = self.op(f"fptosi {a} {v.name} to {value_type(via, lanes)}")
                    return self.convert(Operand(wide, lanes), via, target)
        elif target.is_float:
            code = "sitofp" if source.is_signed else "uitofp"
        elif target.bits == source.bits:
            return v
        else:
            code = "trunc" if target.bits < source.bits else "sext" if source.is_signed else "zext"
        return Operand(self.op(f"{code} {a} {v.name} to {b}"), lanes)

    def rounded_to_odd(self, v: Operand) -> Operand:
        """float64 -> float32 such that rounding the result again to 16 bits gives what rounding
        once would: cut off, with the last bit set if anything was lost."""
        lanes = v.lanes
        f, d, i32, i1 = (vector(s, lanes) for s in ("float", "double", "i32", "i1"))
        near = self.op(f"fptrunc {d} {v.name} to {f}")
        back = self.op(f"fpext {f} {near} to {d}")
        lost = self.op(f"fcmp one {d} {back}, {v.name}")
        above = self.intrinsic("fabs", d, back)
        size = self.intrinsic("fabs", d, v.name)
        up = self.op(f"fcmp ogt {d} {above}, {size}")
        raw = self.op(f"bitcast {f} {near} to {i32}")
        less = self.op(f"sext {i1} {up} to {i32}")
        cut = self.op(f"add {i32} {raw}, {less}")
        odd = self.op(f"or {i32} {cut}, {everywhere('i32', '1', lanes)}")
        kept = self.op(f"select {i1} {lost}, {i32} {odd}, {i32} {raw}")
        return Operand(self.op(f"bitcast {i32} {kept} to {f}"), lanes)

    def bfloat(self, v: Operand) -> Operand:
        """float32 -> the bits of the nearest bfloat16, ties to even."""
        lanes = v.lanes
        f, i32, i1 = vector("float", lanes), vector("i32", lanes), vector("i1", lanes)

        def all_lanes(n: int) -> str:
            return everywhere("i32", str(n), lanes)

        raw = self.op(f"bitcast {f} {v.name} to {i32}")
        top = self.op(f"lshr {i32} {raw}, {all_lanes(16)}")
        odd = self.op(f"and {i32} {top}, {all_lanes(1)}")
        half = self.op(f"add {i32} {odd}, {all_lanes(0x7FFF)}")
        total = self.op(f"add {i32} {raw}, {half}")
        rounded = self.op(f"lshr {i32} {total}, {all_lanes(16)}")
        quiet = self.op(f"or {i32} {top}, {all_lanes(0x40)}")
        nan = self.op(f"fcmp uno {f} {v.name}, {v.name}")
        best = self.op(f"select {i1} {nan}, {i32} {quiet}, {i32} {rounded}")
        return Operand(self.op(f"trunc {i32} {best} to {vector('i16', lanes)}"), lanes)
