"""A call like the last one, made without Python: native code that reads the arrays themselves.

    enter(frame, inputs, outputs)      an address and two tuples

Every array is compared with what the frame says of it; then the addresses go into the table of the
native main, which runs without the interpreter's lock: DONE. MISSING: the inputs fit, but outputs
are None. REFUSED: anything else (a size, a type, memory that overlaps); Python does the whole call.

What is read of an object lies where every compiled extension module reads it: the type of an object
and the fields of a numpy array are part of the binary interfaces of CPython and numpy.
"""

from __future__ import annotations

import ctypes
import functools
import string
import sys
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numpy as np

from minicompiler.runtime.frame import HEAD, RECORD, RECORD_WORDS
from minicompiler.runtime.loader import Library

REFUSED, DONE, MISSING = range(3)

_WRITEABLE = 0x400  # NPY_ARRAY_WRITEABLE
_METH_FASTCALL = 0x80
_NAME = "mc_enter"
_API = (
    "PyLong_AsVoidPtr", "PyLong_FromLong", "PyTuple_Size", "PyTuple_GetItem", "PyEval_SaveThread",
    "PyEval_RestoreThread",
)  # fmt: skip

_TEXT = """
; A numpy array: reference count, type, data, rank, shape, strides, base, dtype, flags.
%array = type { i64, ptr, ptr, i32, ptr, ptr, ptr, ptr, i32 }
; A dtype: reference count, type, type of a scalar; kind, character, byte order, flags and number.
%dtype = type { i64, ptr, ptr, i64 }

declare ptr @PyLong_AsVoidPtr(ptr)
declare ptr @PyLong_FromLong(i64)
declare i64 @PyTuple_Size(ptr)
declare ptr @PyTuple_GetItem(ptr, i64)
declare ptr @PyEval_SaveThread()
declare void @PyEval_RestoreThread(ptr)
declare i32 @mc_run(ptr, ptr, ptr, i32)

define internal i64 @word(ptr %words, i64 %k) alwaysinline {
  %p = getelementptr i64, ptr %words, i64 %k
  %word = load i64, ptr %p
  ret i64 %word
}

define internal ptr @address(ptr %words, i64 %k) alwaysinline {
  %word = call i64 @word(ptr %words, i64 %k)
  %p = inttoptr i64 %word to ptr
  ret ptr %p
}

; A size in a signature: itself, or the complement of its place among the sizes.
define internal i64 @size(ptr %signature, i64 %k, ptr %sizes) alwaysinline {
  %word = call i64 @word(ptr %signature, i64 %k)
  %fixed = icmp sge i64 %word, 0
  br i1 %fixed, label %itself, label %named
itself:
  ret i64 %word
named:
  %at = xor i64 %word, -1
  %size = call i64 @word(ptr %sizes, i64 %at)
  ret i64 %size
}

; What a signature says of an argument.
define internal ptr @record(ptr %frame, i64 %k) alwaysinline {
  %signature = call ptr @address(ptr %frame, i64 $SIGNATURE)
  %before = add i64 %k, 1
  %at = mul i64 %before, $RECORD_WORDS
  %p = getelementptr i64, ptr %signature, i64 %at
  ret ptr %p
}

; Where the table of the native main holds the address of an argument.
define internal ptr @slot(ptr %frame, i64 %k) alwaysinline {
  %signature = call ptr @address(ptr %frame, i64 $SIGNATURE)
  %count = call i64 @word(ptr %signature, i64 1)
  %first = add i64 %count, $SPANS
  %at = add i64 %first, %k
  %p = getelementptr i64, ptr %frame, i64 %at
  ret ptr %p
}

; Whether two dtypes are alike: one object, or, as what `pickle` reads has a dtype of its own, the
; same scalar type, byte order and number of the type.
define internal i1 @alike(i64 %a, i64 %b) {
  %one = icmp eq i64 %a, %b
  br i1 %one, label %yes, label %look
look:
  %p = inttoptr i64 %a to ptr
  %q = inttoptr i64 %b to ptr
  %p_scalar = getelementptr %dtype, ptr %p, i32 0, i32 2
  %q_scalar = getelementptr %dtype, ptr %q, i32 0, i32 2
  %p_kind = getelementptr %dtype, ptr %p, i32 0, i32 3
  %q_kind = getelementptr %dtype, ptr %q, i32 0, i32 3
  %a_scalar = load i64, ptr %p_scalar
  %b_scalar = load i64, ptr %q_scalar
  %same_scalar = icmp eq i64 %a_scalar, %b_scalar
  %a_kind = load i64, ptr %p_kind
  %b_kind = load i64, ptr %q_kind
  %same_kind = icmp eq i64 %a_kind, %b_kind
  %same = and i1 %same_scalar, %same_kind
  ret i1 %same
yes:
  ret i1 true
}

; Whether an object is an array as the signature says; notes its address and the bytes it covers.
; The elements along an axis lie as in a C-contiguous array whose sizes are the capacities.
define internal i1 @fits(ptr %object, ptr %frame, i64 %k) {
  %p_type = getelementptr %array, ptr %object, i32 0, i32 1
  %type = load i64, ptr %p_type
  %is_array = icmp eq i64 %type, $NDARRAY
  br i1 %is_array, label %look, label %no
look:
  %record = call ptr @record(ptr %frame, i64 %k)
  %p_dtype = getelementptr %array, ptr %object, i32 0, i32 7
  %dtype = load i64, ptr %p_dtype
  %w_dtype = call i64 @word(ptr %record, i64 $DTYPE)
  %same_dtype = call i1 @alike(i64 %dtype, i64 %w_dtype)
  %p_rank = getelementptr %array, ptr %object, i32 0, i32 3
  %rank32 = load i32, ptr %p_rank
  %rank = zext i32 %rank32 to i64
  %w_rank = call i64 @word(ptr %record, i64 $RANK)
  %same_rank = icmp eq i64 %rank, %w_rank
  %p_flags = getelementptr %array, ptr %object, i32 0, i32 8
  %flags = load i32, ptr %p_flags
  %writeable32 = and i32 %flags, $WRITEABLE
  %writeable = icmp ne i32 %writeable32, 0
  %writes = call i64 @word(ptr %record, i64 $WRITES)
  %reads = icmp eq i64 %writes, 0
  %allowed = or i1 %reads, %writeable
  %alike = and i1 %same_dtype, %same_rank
  %usable = and i1 %alike, %allowed
  br i1 %usable, label %walk, label %no
walk:
  %signature = call ptr @address(ptr %frame, i64 $SIGNATURE)
  %sizes = call ptr @address(ptr %frame, i64 $SIZES)
  %axes = call i64 @word(ptr %record, i64 $AXES)
  %itemsize = call i64 @word(ptr %record, i64 $ITEMSIZE)
  %p_shape = getelementptr %array, ptr %object, i32 0, i32 4
  %shape = load ptr, ptr %p_shape
  %p_strides = getelementptr %array, ptr %object, i32 0, i32 5
  %strides = load ptr, ptr %p_strides
  br label %axis
axis:
  %left = phi i64 [ %rank, %walk ], [ %d, %one ]
  %step = phi i64 [ %itemsize, %walk ], [ %next_step, %one ]
  %span = phi i64 [ %itemsize, %walk ], [ %next_span, %one ]
  %more = icmp sgt i64 %left, 0
  br i1 %more, label %one, label %yes
one:
  %d = sub i64 %left, 1
  %n = call i64 @word(ptr %shape, i64 %d)
  %stride = call i64 @word(ptr %strides, i64 %d)
  %two_d = shl i64 %d, 1
  %at = add i64 %axes, %two_d
  %behind = add i64 %at, 1
  %w_n = call i64 @size(ptr %signature, i64 %at, ptr %sizes)
  %capacity = call i64 @size(ptr %signature, i64 %behind, ptr %sizes)
  %same_n = icmp eq i64 %n, %w_n
  %same_stride = icmp eq i64 %stride, %step
  %single = icmp eq i64 %n, 1
  %any_stride = or i1 %same_stride, %single
  %right = and i1 %same_n, %any_stride
  %last = sub i64 %n, 1
  %way = mul i64 %last, %stride
  %next_span = add i64 %span, %way
  %next_step = mul i64 %step, %capacity
  br i1 %right, label %axis, label %no
yes:
  %p_data = getelementptr %array, ptr %object, i32 0, i32 2
  %data = load i64, ptr %p_data
  %p_slot = call ptr @slot(ptr %frame, i64 %k)
  store i64 %data, ptr %p_slot
  %covered = call i64 @word(ptr %record, i64 $COVERED)
  %alone = icmp eq i64 %covered, 0
  %covers = select i1 %alone, i64 %span, i64 0
  %span_at = add i64 %k, $SPANS
  %p_span = getelementptr i64, ptr %frame, i64 %span_at
  store i64 %covers, ptr %p_span
  ret i1 true
no:
  ret i1 false
}

; Whether an argument starts where its twin does, if it has one, and shares no memory with those
; before it. (For empty arrays the answer may be a needless no.)
define internal i1 @apart(ptr %frame, i64 %k) {
entry:
  %spans = getelementptr i64, ptr %frame, i64 $SPANS
  %table = call ptr @slot(ptr %frame, i64 0)
  %start = call i64 @word(ptr %table, i64 %k)
  %bytes = call i64 @word(ptr %spans, i64 %k)
  %record = call ptr @record(ptr %frame, i64 %k)
  %twin = call i64 @word(ptr %record, i64 $TWIN)
  %single = icmp slt i64 %twin, 0
  br i1 %single, label %next, label %look
look:
  %twin_start = call i64 @word(ptr %table, i64 %twin)
  %placed = icmp eq i64 %twin_start, %start
  br i1 %placed, label %next, label %no
next:
  %i = phi i64 [ 0, %entry ], [ 0, %look ], [ %i1, %other ]
  %more = icmp slt i64 %i, %k
  br i1 %more, label %other, label %yes
other:
  %i1 = add i64 %i, 1
  %other_start = call i64 @word(ptr %table, i64 %i)
  %other_bytes = call i64 @word(ptr %spans, i64 %i)
  %behind = sub i64 %other_start, %start
  %before = sub i64 %start, %other_start
  %inside = icmp slt i64 %behind, %bytes
  %around = icmp slt i64 %before, %other_bytes
  %overlap = and i1 %inside, %around
  br i1 %overlap, label %no, label %next
yes:
  ret i1 true
no:
  ret i1 false
}

; CPython may end a daemon thread where it asks for the lock again, by unwinding its stack.
define internal i64 @call(ptr %frame, ptr %inputs, ptr %outputs) uwtable {
  %sizes = call i64 @word(ptr %frame, i64 $SIZES)
  %unknown = icmp eq i64 %sizes, 0
  br i1 %unknown, label %refuse, label %known
known:
  %signature = call ptr @address(ptr %frame, i64 $SIGNATURE)
  %reads = call i64 @word(ptr %signature, i64 0)
  %count = call i64 @word(ptr %signature, i64 1)
  %given_in = call i64 @PyTuple_Size(ptr %inputs)
  %given_out = call i64 @PyTuple_Size(ptr %outputs)
  %given = add i64 %given_in, %given_out
  %all_in = icmp eq i64 %given_in, %reads
  %all = icmp eq i64 %given, %count
  %complete = and i1 %all_in, %all
  br i1 %complete, label %next, label %refuse
next:
  %k = phi i64 [ 0, %known ], [ %k1, %one ], [ %k1, %absent ]
  %missing = phi i1 [ false, %known ], [ %missing, %one ], [ true, %absent ]
  %more = icmp slt i64 %k, %count
  br i1 %more, label %one, label %seen
one:
  %k1 = add i64 %k, 1
  %is_input = icmp slt i64 %k, %reads
  %k_out = sub i64 %k, %reads
  %tuple = select i1 %is_input, ptr %inputs, ptr %outputs
  %at = select i1 %is_input, i64 %k, i64 %k_out
  %object = call ptr @PyTuple_GetItem(ptr %tuple, i64 %at)
  %fits = call i1 @fits(ptr %object, ptr %frame, i64 %k)
  br i1 %fits, label %next, label %absent
absent:
  %record = call ptr @record(ptr %frame, i64 %k)
  %optional = call i64 @word(ptr %record, i64 $OPTIONAL)
  %can_be_new = icmp ne i64 %optional, 0
  %is_none = icmp eq ptr %object, inttoptr (i64 $NONE to ptr)
  %is_new = and i1 %can_be_new, %is_none
  br i1 %is_new, label %next, label %refuse
seen:
  br i1 %missing, label %incomplete, label %compare
compare:
  %j = phi i64 [ %reads, %seen ], [ %j1, %another ]
  %others = icmp slt i64 %j, %count
  br i1 %others, label %another, label %run
another:
  %j1 = add i64 %j, 1
  %apart = call i1 @apart(ptr %frame, i64 %j)
  br i1 %apart, label %compare, label %refuse
run:
  %pool = call ptr @address(ptr %frame, i64 $POOL)
  %main = call ptr @address(ptr %frame, i64 $MAIN)
  %threads = call i64 @word(ptr %frame, i64 $THREADS)
  %threads32 = trunc i64 %threads to i32
  %table = call ptr @slot(ptr %frame, i64 0)
  %state = call ptr @PyEval_SaveThread()
  %used = call i32 @mc_run(ptr %pool, ptr %main, ptr %table, i32 %threads32)
  call void @PyEval_RestoreThread(ptr %state)
  ret i64 $DONE
incomplete:
  ret i64 $MISSING
refuse:
  ret i64 $REFUSED
}

define ptr @mc_enter(ptr %self, ptr %arguments, i64 %count) uwtable {
  %number = call ptr @address(ptr %arguments, i64 0)
  %inputs = call ptr @address(ptr %arguments, i64 1)
  %outputs = call ptr @address(ptr %arguments, i64 2)
  %frame = call ptr @PyLong_AsVoidPtr(ptr %number)
  %end = call i64 @call(ptr %frame, ptr %inputs, ptr %outputs)
  %result = call ptr @PyLong_FromLong(i64 %end)
  ret ptr %result
}
"""


Enter = Callable[[int, tuple[Any, ...], Any], int]


def _refuse(frame: int, inputs: tuple[Any, ...], outputs: Any) -> int:
    del frame, inputs, outputs
    return REFUSED


class _MethodDef(ctypes.Structure):
    """PyMethodDef of CPython."""

    _fields_ = (
        ("name", ctypes.c_char_p), ("function", ctypes.c_void_p), ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )  # fmt: skip


def _layout_is_known() -> bool:
    """Whether arrays lie as %array says: not so where interpreters run without a lock, and in other
    implementations of Python."""
    if sys.implementation.name != "cpython" or object.__basicsize__ != 16:
        return False
    probe = np.zeros((3, 5), np.int16)
    kind = probe.dtype
    number = ord(kind.kind) | ord(kind.char) << 8 | ord(kind.byteorder) << 16 | kind.num << 32
    described = (ctypes.c_int64 * 4).from_address(id(kind))
    words = (ctypes.c_int64 * 9).from_address(id(probe))
    shape = (ctypes.c_int64 * 2).from_address(words[4])
    strides = (ctypes.c_int64 * 2).from_address(words[5])
    return (
        (words[1], words[2], words[3] & 0xFFFFFFFF, words[7])
        == (id(np.ndarray), probe.ctypes.data, 2, id(probe.dtype))
        and (tuple(shape), tuple(strides)) == (probe.shape, probe.strides)
        and words[8] & _WRITEABLE == _WRITEABLE
        and (described[2], described[3] & ~(0xFF << 24)) == (id(np.int16), number)
    )


@functools.cache
def entry(run: int) -> Enter:
    """The function `enter`; run: the address of `mc_run` (see spmd). Where Python's objects have
    another layout it refuses every call."""
    if not _layout_is_known():
        return _refuse
    values = {
        **HEAD, **RECORD, "RECORD_WORDS": RECORD_WORDS, "WRITEABLE": _WRITEABLE,
        "NDARRAY": id(np.ndarray), "NONE": id(None), "REFUSED": REFUSED, "DONE": DONE,
        "MISSING": MISSING,
    }  # fmt: skip
    module = llvm.parse_assembly(string.Template(_TEXT).substitute(values))
    triple = llvm.get_process_triple()
    machine = llvm.Target.from_triple(triple).create_target_machine(codemodel="small", reloc="pic")
    symbols = {name: _address(getattr(ctypes.pythonapi, name)) for name in _API}
    passes = llvm.create_new_module_pass_manager()
    passes.add_always_inliner_pass()
    passes.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options()))
    library = Library(machine.emit_object(module), [_NAME], {"mc_run": run, **symbols})
    definition = _MethodDef(b"enter", library.address(_NAME), _METH_FASTCALL, None)
    new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)(
        _address(ctypes.pythonapi.PyCFunction_NewEx)
    )
    # Its `self` keeps the code for as long as somebody, such as a thread that runs it, has it.
    function: Enter = new(ctypes.addressof(definition), (library, definition), None)
    return function


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0
