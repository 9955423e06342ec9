"""`python -m minicompiler` is the command line."""

from __future__ import annotations

from minicompiler.cli import main

main(prog_name="minicompiler")
