"""Backends: from scheduled loop nests to the text and the binary of a kernel."""

# From the root of the checkout `import codegen` would load a second copy of every class in here.
if __name__ != "minicompiler.codegen":
    raise ImportError('write "import minicompiler.codegen"')
