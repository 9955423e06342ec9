"""A Plan -> LLVM IR text of the native main, which runs the whole model in one region of the pool.

    void mc_main(i32 tid, i32 nthreads, ptr table, ptr barrier)

`table` is an array of 64-bit words laid out by `Plan.table()`: addresses of inputs, outputs, arena
and workspace, the dimensions, addresses of constants and kernels. Every thread walks the same
calls; between two of them all threads meet at the barrier. A kernel is called as

    kernel(i32 tid, i32 nthreads, ptr barrier, ptr tensors..., i64 dims..., ptr workspace)
"""

from __future__ import annotations

from minicompiler.errors import CodegenError
from minicompiler.runtime.plan import MAIN, Call, Count, Guard, Location, Plan, Region, Size

_FLOOR = """
define internal i64 @mc_floordiv(i64 %a, i64 %b) #0 {
  %q = sdiv i64 %a, %b
  %r = srem i64 %a, %b
  %signs = xor i64 %r, %b
  %differ = icmp slt i64 %signs, 0
  %inexact = icmp ne i64 %r, 0
  %down = and i1 %differ, %inexact
  %one = zext i1 %down to i64
  %f = sub i64 %q, %one
  ret i64 %f
}
define internal i64 @mc_mod(i64 %a, i64 %b) #0 {
  %q = call i64 @mc_floordiv(i64 %a, i64 %b)
  %p = mul i64 %q, %b
  %m = sub i64 %a, %p
  ret i64 %m
}
declare i64 @llvm.smin.i64(i64, i64)
declare i64 @llvm.smax.i64(i64, i64)
declare void @mc_barrier(ptr, i32)
"""

_FORMATS = {
    "add": "add nsw i64 {}, {}",
    "sub": "sub nsw i64 {}, {}",
    "mul": "mul nsw i64 {}, {}",
    "floordiv": "call i64 @mc_floordiv(i64 {}, i64 {})",
    "mod": "call i64 @mc_mod(i64 {}, i64 {})",
    "min": "call i64 @llvm.smin.i64(i64 {}, i64 {})",
    "max": "call i64 @llvm.smax.i64(i64 {}, i64 {})",
}
_COMPARISONS = {"eq": "eq", "ne": "ne", "lt": "slt", "le": "sle"}


def emit_main(plan: Plan) -> str:
    """The text of MAIN with what it declares, for `native.compile_object`."""
    return _Main(plan).run()


class _Main:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.table = plan.table()
        self.lines: list[str] = []
        self.count = 0
        self.blocks = 0
        self.sizes: dict[Size, str] = {}
        # The open regions: each with the name of its blocks and the sizes known before.
        self.regions: list[tuple[Region, str, dict[Size, str]]] = []

    def run(self) -> str:
        # A value is known in every block after its own, up to the end of the region it is in.
        for k, dim in enumerate(self.plan.dims):
            self.sizes[dim.name] = self.load("i64", self.table.dims + k)
        for name, size in self.plan.named:
            self.sizes[name] = self.size(size)
        if self.plan.calls:
            self.put("%several = icmp sgt i32 %nthreads, 1")
        ahead = list(self.plan.regions)
        for k, call in enumerate(self.plan.calls):
            if k:
                self.meet()
            self.counts(k)
            while ahead and ahead[0].start == k:
                self.open(ahead.pop(0))
                self.counts(k)
            self.call(call)
            while self.regions and self.regions[-1][0].end == k + 1:
                self.close()
        if any(c.before == len(self.plan.calls) for c in self.plan.counts):
            self.meet()
            self.counts(len(self.plan.calls))
        self.put("ret void")
        head = f"define void @{MAIN}(i32 %tid, i32 %nthreads, ptr %table, ptr %barrier) #0 {{\n"
        return _FLOOR + head + "\n".join(["entry:", *self.lines, "}", ""])

    def meet(self) -> None:
        """A barrier of all threads."""
        self.blocks += 1
        self.put(f"br i1 %several, label %meet{self.blocks}, label %met{self.blocks}")
        self.lines.append(f"meet{self.blocks}:")
        self.put("call void @mc_barrier(ptr %barrier, i32 %nthreads)")
        self.put(f"br label %met{self.blocks}")
        self.lines.append(f"met{self.blocks}:")

    def open(self, r: Region) -> None:
        """The head of a region. Nobody may write the flag before all threads have read it."""
        self.blocks += 1
        name = str(self.blocks)
        self.put(f"br label %head{name}")
        self.lines.append(f"head{name}:")
        flag = self.op(f"load i8, ptr {self.pointer(r.flag)}, align 1")
        test = self.op(f"icmp {'ne' if r.wanted else 'eq'} i8 {flag}, 0")
        self.put(f"br i1 {test}, label %body{name}, label %done{name}")
        self.lines.append(f"body{name}:")
        self.regions.append((r, name, dict(self.sizes)))
        self.meet()

    def close(self) -> None:
        """The end of a region: the next look at the flag of a loop comes after all calls."""
        r, name, self.sizes = self.regions.pop()
        if r.repeat:
            self.meet()
            self.put(f"br label %head{name}")
        else:
            self.put(f"br label %done{name}")
        self.lines.append(f"done{name}:")

    def counts(self, k: int) -> None:
        """The dimensions that are counted before call k, in the regions that are open now."""
        first = self.table.dims + len(self.plan.dims)
        for at, c in enumerate(self.plan.counts):
            if c.before == k and c.depth == len(self.regions):
                self.counted(c, first + at)

    def counted(self, c: Count, slot: int) -> None:
        """A dimension that an earlier kernel has counted; the caller finds it in the table.

        Every thread stores the same number there.
        """
        size = self.op(f"load i64, ptr {self.pointer(c.place)}, align 8")
        most = self.op(_FORMATS["min"].format(size, self.size(c.most)))
        size = self.sizes[c.dim] = self.op(_FORMATS["max"].format(most, 0))
        at = self.op(f"getelementptr i64, ptr %table, i64 {slot}")
        self.put(f"store i64 {size}, ptr {at}, align 8")
        known = [name for name in self.sizes if isinstance(name, str)]
        for number, g in self.plan.checks_of(c.dim, known):
            self.check(g, number + 1)

    def check(self, g: Guard, number: int) -> None:
        """Leaves, with the number in the table, where a condition does not hold: for every thread
        or for none."""
        self.blocks += 1
        name = str(self.blocks)
        left, right = self.size(g.left), self.size(g.right)
        holds = self.op(f"icmp {_COMPARISONS[g.relation]} i64 {left}, {right}")
        self.put(f"br i1 {holds}, label %holds{name}, label %fails{name}")
        self.lines.append(f"fails{name}:")
        at = self.op(f"getelementptr i64, ptr %table, i64 {self.table.failed}")
        self.put(f"store i64 {number}, ptr {at}, align 8")
        self.put("ret void")
        self.lines.append(f"holds{name}:")

    def call(self, call: Call) -> None:
        args = ["i32 %tid", "i32 %nthreads", "ptr %barrier"]
        args += [f"ptr {self.pointer(a)}" for a in call.args]
        args += [f"i64 {self.size(d)}" for d in call.dims]
        args.append(f"ptr {self.load('ptr', self.table.workspace)}")
        kernel = self.load("ptr", self.table.kernels[call.kernel])
        self.put(f"call void {kernel}({', '.join(args)})")

    def pointer(self, location: Location) -> str:
        place, at = location
        if place == "arena":
            base = self.load("ptr", self.table.arena)
            return self.op(f"getelementptr i8, ptr {base}, i64 {self.size(at)}")
        first = {
            "input": self.table.inputs,
            "output": self.table.outputs,
            "constant": self.table.constants,
        }.get(place)
        if first is None or not isinstance(at, int):
            raise CodegenError(f"a plan names the unknown place {place} {at}")
        return self.load("ptr", first + at)

    def size(self, size: Size) -> str:
        """An i64 operand for a size; each is computed once."""
        if isinstance(size, int):
            return str(size)
        found = self.sizes.get(size)
        if found is None:
            if isinstance(size, str):
                raise CodegenError(f"a plan uses the unknown dimension {size}")
            op, a, b = size
            found = self.sizes[size] = self.op(_FORMATS[op].format(self.size(a), self.size(b)))
        return found

    def load(self, kind: str, slot: int) -> str:
        at = self.op(f"getelementptr i64, ptr %table, i64 {slot}")
        return self.op(f"load {kind}, ptr {at}, align 8")

    def op(self, text: str) -> str:
        self.count += 1
        name = f"%v{self.count}"
        self.put(f"{name} = {text}")
        return name

    def put(self, line: str) -> None:
        self.lines.append("  " + line)
