"""Object files -> callable addresses in this process.

    lib = Library(object_bytes, ["fused_dense_1"])
    lib.address("fused_dense_1")

Nothing is looked up outside of the given symbols: a kernel that refers to anything but those of the
thread pool and the memory functions of the C library fails to load.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterable, Mapping

import llvmlite.binding as llvm

from ..errors import RunError

# What LLVM makes of copies and zeroing. There is no mathematics and no BLAS among it.
C_FUNCTIONS = ("memcpy", "memset", "memmove")
_counter = itertools.count()
_jits: list[llvm.LLJIT] = []


def _jit() -> llvm.LLJIT:
    """One JIT per process; LLVM frees its memory with the last tracker."""
    if not _jits:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
            codemodel="small", reloc="pic"
        )
        _jits.append(llvm.create_lljit_compiler(machine, use_jit_link=False, suppress_errors=False))
    return _jits[0]


class Library:
    """One or several loaded object files. Their code lives as long as this object."""

    def __init__(
        self,
        data: bytes | Iterable[bytes],
        exports: Iterable[str],
        symbols: Mapping[str, int] | None = None,
    ) -> None:
        """symbols: addresses the code may refer to by name. Raises RunError when loading fails."""
        builder = llvm.JITLibraryBuilder()
        for image in [data] if isinstance(data, bytes) else data:
            builder.add_object_img(image)
        for name, address in (symbols or {}).items():
            builder.import_symbol(name, address)
        for name in C_FUNCTIONS:
            builder.import_symbol(name, _libc(name))
        for name in exports:
            builder.export_symbol(name)
        try:
            self._tracker = builder.link(_jit(), f"mc{next(_counter)}")
        except RuntimeError as e:
            raise RunError(f"compiled code could not be loaded: {e}") from None

    def address(self, name: str) -> int:
        """The address of an exported function."""
        return int(self._tracker[name])


def _libc(name: str) -> int:
    return ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value or 0
