"""The errors a user sees, each a MinicompilerError; imports nothing else of the package.

In: a message, the places in the user's model (`locs`), an excerpt of the artifact, a hint. Out:
  ScheduleError: split("k", 48, tail="perfect"): 48 is not known to divide the extent 100
    in fused_dense_relu_2, from MatMul "fc1/MatMul" (mlp.onnx) + Relu "fc1/Relu"
        for j in 64:
    >     for k in 100:          # reduce
    hint: use tail="mask", or a factor that divides 100
A user's mistake raises one of the named errors; a mistake of the compiler raises InternalError.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Protocol

# A fused kernel can stem from hundreds of nodes; the first few are enough to find the place.
_MAX_LOCS = 6


class SourceLoc(Protocol):
    """What an error needs of a place in the user's model; `ir.types.Loc` has it."""

    @property
    def name(self) -> str: ...
    @property
    def file(self) -> str: ...
    @property
    def line(self) -> int: ...
    @property
    def op(self) -> str: ...


class MinicompilerError(Exception):
    """Base of every error raised on purpose.

    The text is rendered when it is read, so code further out that knows more may set `locs`,
    `where`, `excerpt` or `hint` on a caught error and raise it again.

    Args:
        message: what is wrong, in one sentence, with the values involved.
        locs: nodes of the source model concerned, first ones first.
        excerpt: lines of the artifact (loop nest, graph), the bad one marked with `>`.
        hint: what the user can do about it.
        where: the function or kernel concerned, as named in stage records.
    """

    def __init__(
        self,
        message: str,
        locs: Sequence[SourceLoc] = (),
        excerpt: str = "",
        hint: str = "",
        where: str = "",
    ) -> None:
        # Only the message goes into `args`: pickle restores the other fields from __dict__.
        super().__init__(message)
        self.message = message
        self.locs = tuple(locs)
        self.excerpt = excerpt
        self.hint = hint
        self.where = where

    def __str__(self) -> str:
        parts = [self.message]
        place = [f"in {self.where}"] if self.where else []
        if self.locs:
            place.append(f"from {format_locs(self.locs)}")
        if place:
            parts.append("  " + ", ".join(place))
        if self.excerpt:
            parts.append(textwrap.indent(self.excerpt.rstrip("\n"), "  "))
        if self.hint:
            parts.append(f"  hint: {self.hint}")
        return "\n".join(parts)


class ImportModelError(MinicompilerError):
    """A model file cannot be read, or uses operators that are not supported."""


class UnsupportedError(ImportModelError):
    """A model uses operators that are not supported.

    operators: the nodes of each such operator, by number; used: of every operator in the model.
    """

    def __init__(
        self,
        message: str,
        locs: Sequence[SourceLoc] = (),
        excerpt: str = "",
        hint: str = "",
        where: str = "",
        *,
        operators: Mapping[str, int] | None = None,
        used: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(message, locs, excerpt, hint, where)
        self.operators = dict(operators or {})
        self.used = dict(used or {})


class LimitError(MinicompilerError):
    """A model needs more nodes, bytes, time, ... to compile than `Limits` allow."""


class ShapeError(MinicompilerError, ValueError):
    """Shapes or dtypes do not fit together, when compiling or when calling a module."""


class VerifyError(MinicompilerError):
    """A graph or loop nest breaks a rule of its IR."""


class ScheduleError(MinicompilerError):
    """A schedule primitive was refused: unknown name, or not shown to be legal."""


class CodegenError(MinicompilerError):
    """A backend has no translation for a node, or the target's compiler refused the text."""


class TuneError(MinicompilerError):
    """Tuning could not measure any candidate, or a tuning record does not fit."""


class RunError(MinicompilerError, RuntimeError):
    """A compiled module cannot be loaded or executed here."""


class InternalError(MinicompilerError):
    """A mistake of the compiler itself; the excerpt holds a reproducer where there is one."""


def format_locs(locs: Sequence[SourceLoc]) -> str:
    """`MatMul "fc1/MatMul" (mlp.onnx) + Relu "fc1/Relu"`: a file is named when it changes."""
    texts: list[str] = []
    shown = ""
    for loc in locs[:_MAX_LOCS]:
        text = " ".join(part for part in (loc.op, f'"{loc.name}"' if loc.name else "") if part)
        file = f"{loc.file}:{loc.line}" if loc.file and loc.line else loc.file
        if file and file != shown:
            text = f"{text} ({file})".lstrip()
            shown = file
        if text:
            texts.append(text)
    if len(locs) > _MAX_LOCS:
        texts.append(f"{len(locs) - _MAX_LOCS} more")
    return " + ".join(texts)
