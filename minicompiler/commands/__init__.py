"""One module per command of the command line; each has `command`, which cli.py lists by name.

A command reads its options, calls the compiler, and hands what it found to report.Output. Nothing
heavy is imported at the top of these modules, so that `minicompiler --help` is quick.
"""
