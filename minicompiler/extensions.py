"""What a user adds to one compilation, as plain functions; docs/extending.md has examples.

    mc.compile("net.onnx", extensions=mc.Extensions(
        converters={"com.acme.Swish": convert_swish},          an operator
        passes=lambda passes: (tidy, *passes),                 a graph pass
        rules=lambda rules: (mine, *rules),                    a schedule rule
        emit=emit_c, assemble=run_compiler,                    a backend
    ))

Nothing is registered: another compilation in the same process knows nothing of these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Extensions:
    """See the module text. Kernels made with rules or a backend of the user's are not cached.

    Attributes:
        converters: by ONNX operator (`domain.Name`, `Name` for ONNX's own, which it replaces): from
            a frontend.onnx_node.OnnxNode to graph values.
        passes: gives the graph passes to run for those of the chosen level. A pass takes a graph
            Function and the Context, and returns a Function.
        rules: gives the schedule rules to try, in order, for the usual ones. The last has to apply
            to everything.
        emit: from a lowered PrimFunc to a codegen.llvm.Emitted (its text may be any language).
        assemble: from such text and the Target to the bytes of an object file for this machine that
            defines the functions of the text, called as codegen/launch.py says.
    """

    converters: Mapping[str, Callable[[Any], Any]] = dataclasses.field(default_factory=dict)
    passes: Callable[[tuple[Any, ...]], Sequence[Any]] = lambda passes: passes
    rules: Callable[[tuple[Any, ...]], Sequence[Any]] | None = None
    emit: Callable[[Any], Any] | None = None
    assemble: Callable[[str, Any], bytes] | None = None

    @property
    def changes_kernels(self) -> bool:
        """Whether equal fused functions may become other kernels than usual."""
        return not (self.rules is None and self.emit is None and self.assemble is None)
