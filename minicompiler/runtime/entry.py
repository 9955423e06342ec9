"""A call like the last one, made without Python: native code that reads the arrays themselves.

    enter(frame, inputs, outputs)      frame: an address; inputs: a tuple; outputs: a tuple or None

`enter` compares every array with what the signature in the frame expects, puts the addresses into
the table of the native main and runs it without the interpreter's lock: DONE. MISSING: the inputs
fit, but outputs are None. REFUSED: anything else (another shape or type, memory that overlaps);
nothing has happened, and Python does the call with all its errors.

Its fields lie where every compiled extension module reads them: those of a numpy array
and of an object's type are part of the binary interfaces of numpy and CPython.
"""

from __future__ import annotations

import ctypes
import functools
import string
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numpy as np

from minicompiler.runtime.loader import Library

REFUSED, DONE, MISSING = range(3)

FRAME_WORDS = 4
"""A frame is these words, and the table of the native main: the address of a signature (0: every
call is refused), of a pool's block and of the native main, and the number of threads."""

_RECORD_WORDS = 8
_CONTIGUOUS, _WRITEABLE = 0x1, 0x400  # NPY_ARRAY_C_CONTIGUOUS and NPY_ARRAY_WRITEABLE
_METH_FASTCALL = 0x80
_NAME = "mc_enter"
_API = (
    "PyLong_AsVoidPtr", "PyLong_FromLong", "PyTuple_Size", "PyTuple_GetItem", "PyEval_SaveThread",
    "PyEval_RestoreThread",
)  # fmt: skip

_TEXT = """
; What is read of a numpy array: reference count, type, data, rank, shape, strides, base, dtype and
; flags. Of an argument of a signature: dtype, flags, rank, bytes, twin, and where in the signature
; its shape and its strides are (0: the flags say enough).
%array = type { i64, ptr, ptr, i32, ptr, ptr, ptr, ptr, i32 }
%argument = type { i64, i64, i64, i64, i64, i64, i64, i64 }

declare ptr @PyLong_AsVoidPtr(ptr)
declare ptr @PyLong_FromLong(i64)
declare i64 @PyTuple_Size(ptr)
declare ptr @PyTuple_GetItem(ptr, i64)
declare ptr @PyEval_SaveThread()
declare void @PyEval_RestoreThread(ptr)
declare i32 @mc_run(ptr, ptr, ptr, i32)

define internal i1 @is_a(ptr %object, i64 %type) {
  %p_type = getelementptr %array, ptr %object, i32 0, i32 1
  %found = load i64, ptr %p_type
  %same = icmp eq i64 %found, %type
  ret i1 %same
}

define internal i1 @equal(ptr %a, ptr %b, i64 %count) {
entry:
  br label %test
test:
  %i = phi i64 [ 0, %entry ], [ %i1, %compare ]
  %more = icmp slt i64 %i, %count
  br i1 %more, label %compare, label %yes
compare:
  %p_a = getelementptr i64, ptr %a, i64 %i
  %p_b = getelementptr i64, ptr %b, i64 %i
  %x = load i64, ptr %p_a
  %y = load i64, ptr %p_b
  %i1 = add i64 %i, 1
  %same = icmp eq i64 %x, %y
  br i1 %same, label %test, label %no
yes:
  ret i1 true
no:
  ret i1 false
}

define internal ptr @argument(ptr %signature, i64 %k) {
  %at = add i64 %k, 1
  %p = getelementptr %argument, ptr %signature, i64 %at
  ret ptr %p
}

; Whether an object is an array like argument k, whose address then goes into the table.
define internal i1 @fits(ptr %object, ptr %signature, i64 %k, ptr %table) {
  %is_array = call i1 @is_a(ptr %object, i64 $NDARRAY)
  br i1 %is_array, label %array, label %no
array:
  %wanted = call ptr @argument(ptr %signature, i64 %k)
  %p_dtype = getelementptr %array, ptr %object, i32 0, i32 7
  %dtype = load i64, ptr %p_dtype
  %w_dtype = load i64, ptr %wanted
  %same_dtype = icmp eq i64 %dtype, %w_dtype
  %p_flags = getelementptr %array, ptr %object, i32 0, i32 8
  %flags32 = load i32, ptr %p_flags
  %flags = zext i32 %flags32 to i64
  %pw_flags = getelementptr %argument, ptr %wanted, i32 0, i32 1
  %w_flags = load i64, ptr %pw_flags
  %common = and i64 %flags, %w_flags
  %has_flags = icmp eq i64 %common, %w_flags
  %p_rank = getelementptr %array, ptr %object, i32 0, i32 3
  %rank32 = load i32, ptr %p_rank
  %rank = zext i32 %rank32 to i64
  %pw_rank = getelementptr %argument, ptr %wanted, i32 0, i32 2
  %w_rank = load i64, ptr %pw_rank
  %same_rank = icmp eq i64 %rank, %w_rank
  %alike0 = and i1 %same_dtype, %has_flags
  %alike = and i1 %alike0, %same_rank
  br i1 %alike, label %see_shape, label %no
see_shape:
  %p_shape = getelementptr %array, ptr %object, i32 0, i32 4
  %shape = load ptr, ptr %p_shape
  %pw_shape = getelementptr %argument, ptr %wanted, i32 0, i32 5
  %shape_at = load i64, ptr %pw_shape
  %w_shape = getelementptr i64, ptr %signature, i64 %shape_at
  %same_shape = call i1 @equal(ptr %shape, ptr %w_shape, i64 %rank)
  br i1 %same_shape, label %see_strides, label %no
see_strides:
  %pw_strides = getelementptr %argument, ptr %wanted, i32 0, i32 6
  %strides_at = load i64, ptr %pw_strides
  %contiguous = icmp eq i64 %strides_at, 0
  br i1 %contiguous, label %yes, label %compare
compare:
  %p_strides = getelementptr %array, ptr %object, i32 0, i32 5
  %strides = load ptr, ptr %p_strides
  %w_strides = getelementptr i64, ptr %signature, i64 %strides_at
  %same_strides = call i1 @equal(ptr %strides, ptr %w_strides, i64 %rank)
  br i1 %same_strides, label %yes, label %no
yes:
  %p_data = getelementptr %array, ptr %object, i32 0, i32 2
  %data = load i64, ptr %p_data
  %slot = getelementptr i64, ptr %table, i64 %k
  store i64 %data, ptr %slot
  ret i1 true
no:
  ret i1 false
}

; Whether argument k, whose address is known, starts where its twin does, if it has one, and shares
; no memory with an earlier argument.
define internal i1 @apart(ptr %signature, i64 %k, ptr %table) {
entry:
  %wanted = call ptr @argument(ptr %signature, i64 %k)
  %slot = getelementptr i64, ptr %table, i64 %k
  %start = load i64, ptr %slot
  %p_bytes = getelementptr %argument, ptr %wanted, i32 0, i32 3
  %bytes = load i64, ptr %p_bytes
  %p_twin = getelementptr %argument, ptr %wanted, i32 0, i32 4
  %twin = load i64, ptr %p_twin
  %single = icmp slt i64 %twin, 0
  br i1 %single, label %test, label %look
look:
  %p_first = getelementptr i64, ptr %table, i64 %twin
  %first = load i64, ptr %p_first
  %placed = icmp eq i64 %first, %start
  br i1 %placed, label %test, label %no
test:
  %i = phi i64 [ 0, %entry ], [ 0, %look ], [ %i1, %compare ]
  %more = icmp slt i64 %i, %k
  br i1 %more, label %compare, label %yes
compare:
  %other = call ptr @argument(ptr %signature, i64 %i)
  %p_other_bytes = getelementptr %argument, ptr %other, i32 0, i32 3
  %other_bytes = load i64, ptr %p_other_bytes
  %p_other = getelementptr i64, ptr %table, i64 %i
  %other_start = load i64, ptr %p_other
  %behind = sub i64 %other_start, %start
  %before = sub i64 %start, %other_start
  %inside = icmp slt i64 %behind, %bytes
  %around = icmp slt i64 %before, %other_bytes
  %overlap = and i1 %inside, %around
  %i1 = add i64 %i, 1
  br i1 %overlap, label %no, label %test
yes:
  ret i1 true
no:
  ret i1 false
}

; Argument k of a call: None where there is no tuple of outputs.
define internal ptr @item(ptr %inputs, ptr %outputs, i64 %count, i64 %k) {
  %is_input = icmp slt i64 %k, %count
  br i1 %is_input, label %input, label %output
input:
  %x = call ptr @PyTuple_GetItem(ptr %inputs, i64 %k)
  ret ptr %x
output:
  %none = icmp eq ptr %outputs, inttoptr (i64 $NONE to ptr)
  br i1 %none, label %new, label %given
new:
  ret ptr %outputs
given:
  %at = sub i64 %k, %count
  %y = call ptr @PyTuple_GetItem(ptr %outputs, i64 %at)
  ret ptr %y
}

; Whether an object is a tuple of some length.
define internal i1 @is_tuple(ptr %object, i64 %count) {
  %right = call i1 @is_a(ptr %object, i64 $TUPLE)
  br i1 %right, label %measure, label %no
measure:
  %size = call i64 @PyTuple_Size(ptr %object)
  %same = icmp eq i64 %size, %count
  ret i1 %same
no:
  ret i1 false
}

; How a call ends: REFUSED, DONE or MISSING.
define internal i64 @call(ptr %frame, ptr %inputs, ptr %outputs) {
  %signature = load ptr, ptr %frame
  %unknown = icmp eq ptr %signature, null
  br i1 %unknown, label %refuse, label %known
known:
  %table = getelementptr i64, ptr %frame, i64 $FRAME_WORDS
  %reads = load i64, ptr %signature
  %p_count = getelementptr i64, ptr %signature, i64 1
  %count = load i64, ptr %p_count
  %writes = sub i64 %count, %reads
  %right_inputs = call i1 @is_tuple(ptr %inputs, i64 %reads)
  %none = icmp eq ptr %outputs, inttoptr (i64 $NONE to ptr)
  br i1 %right_inputs, label %check, label %refuse
check:
  br i1 %none, label %next, label %measure
measure:
  %right_outputs = call i1 @is_tuple(ptr %outputs, i64 %writes)
  br i1 %right_outputs, label %next, label %refuse
next:
  %k = phi i64 [ 0, %check ], [ 0, %measure ], [ %k1, %one ], [ %k1, %absent ]
  %missing = phi i1 [ false, %check ], [ false, %measure ], [ %missing, %one ], [ true, %absent ]
  %more = icmp slt i64 %k, %count
  br i1 %more, label %one, label %all
one:
  %k1 = add i64 %k, 1
  %object = call ptr @item(ptr %inputs, ptr %outputs, i64 %reads, i64 %k)
  %fits = call i1 @fits(ptr %object, ptr %signature, i64 %k, ptr %table)
  br i1 %fits, label %next, label %absent
absent:
  %record = call ptr @argument(ptr %signature, i64 %k)
  %p_optional = getelementptr %argument, ptr %record, i32 0, i32 7
  %optional = load i64, ptr %p_optional
  %can_be_new = icmp ne i64 %optional, 0
  %is_none = icmp eq ptr %object, inttoptr (i64 $NONE to ptr)
  %is_new = and i1 %can_be_new, %is_none
  br i1 %is_new, label %next, label %refuse
all:
  br i1 %missing, label %incomplete, label %compare
compare:
  %j = phi i64 [ %reads, %all ], [ %j1, %another ]
  %others = icmp slt i64 %j, %count
  br i1 %others, label %another, label %run
another:
  %j1 = add i64 %j, 1
  %apart = call i1 @apart(ptr %signature, i64 %j, ptr %table)
  br i1 %apart, label %compare, label %refuse
run:
  %p_pool = getelementptr i64, ptr %frame, i64 1
  %pool = load ptr, ptr %p_pool
  %p_main = getelementptr i64, ptr %frame, i64 2
  %main = load ptr, ptr %p_main
  %p_threads = getelementptr i64, ptr %frame, i64 3
  %threads = load i32, ptr %p_threads
  %state = call ptr @PyEval_SaveThread()
  %used = call i32 @mc_run(ptr %pool, ptr %main, ptr %table, i32 %threads)
  call void @PyEval_RestoreThread(ptr %state)
  ret i64 $DONE
incomplete:
  ret i64 $MISSING
refuse:
  ret i64 $REFUSED
}

define ptr @mc_enter(ptr %self, ptr %arguments, i64 %count) {
  %number = load ptr, ptr %arguments
  %p_inputs = getelementptr ptr, ptr %arguments, i64 1
  %inputs = load ptr, ptr %p_inputs
  %p_outputs = getelementptr ptr, ptr %arguments, i64 2
  %outputs = load ptr, ptr %p_outputs
  %frame = call ptr @PyLong_AsVoidPtr(ptr %number)
  %end = call i64 @call(ptr %frame, ptr %inputs, ptr %outputs)
  %result = call ptr @PyLong_FromLong(i64 %end)
  ret ptr %result
}
"""


Signature = ctypes.Array[ctypes.c_int64]


class Argument(NamedTuple):
    """What a call expects of an array.

    strides: None for a C-contiguous one. twin: the input that has to start at the same address,
    -1 for none. nbytes: from its first to its last element; 0 for an input that has a twin, which
    may overlap it. writes: an output; optional: it may be a new array.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    nbytes: int
    strides: tuple[int, ...] | None = None
    twin: int = -1
    writes: bool = False
    optional: bool = False


def signature(arguments: Sequence[Argument], inputs: int) -> Signature:
    """What `enter` compares calls with: the inputs, then the outputs. The caller keeps the dtypes,
    and the result for as long as a frame has its address."""
    words = [inputs, len(arguments)] + [0] * (_RECORD_WORDS - 2)
    sizes: list[int] = []
    first = _RECORD_WORDS * (len(arguments) + 1)
    for a in arguments:
        flags = (0 if a.strides else _CONTIGUOUS) | (_WRITEABLE if a.writes else 0)
        shape = first + len(sizes)
        sizes += a.shape
        strides = first + len(sizes) if a.strides else 0
        sizes += a.strides or ()
        words += [id(a.dtype), flags, len(a.shape), a.nbytes, a.twin, shape, strides, a.optional]
    return (ctypes.c_int64 * (len(words) + len(sizes)))(*words, *sizes)


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


_kept: list[object] = []  # code and the description of a function that lives as long as the process


def _layout_is_known() -> bool:
    """Whether arrays lie as %array says: not so where interpreters run without a lock, and in other
    implementations of Python."""
    if sys.implementation.name != "cpython" or object.__basicsize__ != 16:
        return False
    probe = np.zeros((3, 5), np.int16)
    words = (ctypes.c_int64 * 9).from_address(id(probe))
    shape = (ctypes.c_int64 * 2).from_address(words[4])
    strides = (ctypes.c_int64 * 2).from_address(words[5])
    return (
        (words[1], words[2], words[3] & 0xFFFFFFFF, words[7])
        == (id(np.ndarray), probe.ctypes.data, 2, id(probe.dtype))
        and (tuple(shape), tuple(strides)) == (probe.shape, probe.strides)
        and words[8] & (_CONTIGUOUS | _WRITEABLE) == _CONTIGUOUS | _WRITEABLE
    )


@functools.cache
def entry(run: int) -> Enter:
    """The function `enter`; run: the address of `mc_run` (see spmd). Where Python's objects have
    another layout it refuses every call."""
    if not _layout_is_known():
        return _refuse
    values = {
        "NDARRAY": id(np.ndarray), "TUPLE": id(tuple), "NONE": id(None), "FRAME_WORDS": FRAME_WORDS,
        "REFUSED": REFUSED, "DONE": DONE, "MISSING": MISSING,
    }  # fmt: skip
    module = llvm.parse_assembly(string.Template(_TEXT).substitute(values))
    triple = llvm.get_process_triple()
    machine = llvm.Target.from_triple(triple).create_target_machine(codemodel="small", reloc="pic")
    symbols = {name: _address(getattr(ctypes.pythonapi, name)) for name in _API}
    library = Library(machine.emit_object(module), [_NAME], {"mc_run": run, **symbols})
    definition = _MethodDef(b"enter", library.address(_NAME), _METH_FASTCALL, None)
    _kept.extend((library, definition))
    new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(
        _address(ctypes.pythonapi.PyCFunction_NewEx)
    )
    function: Enter = new(ctypes.addressof(definition), None, None)
    return function


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0
