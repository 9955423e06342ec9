"""minicompiler: a tiny tensor compiler. Models in, fast native kernels out.

import minicompiler as mc
m = mc.compile("model.onnx", target="cpu", threads=2)
y, = m(x)
"""

from __future__ import annotations

import importlib
from typing import Any

from .config import VERSION

__version__ = VERSION
_WHERE = {
    "compile": "driver",
    "load": "runtime.module",
    "Module": "runtime.module",
    "Dim": "ir.expr",
    "Extensions": "extensions",
    "Limits": "limits",
    "Target": "target",
    "MinicompilerError": "errors",
}


def __getattr__(name: str) -> Any:
    # Names are found on first use, so that `import minicompiler` costs nothing and loading a saved
    # module never imports the compiler.
    if name in _WHERE:
        return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    if name == "errors":
        return importlib.import_module(".errors", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_WHERE, "errors", "__version__"])
