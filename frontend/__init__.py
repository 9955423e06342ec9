"""Importers: from a model file or a traced program to a graph Function."""

# From the root of the checkout `import frontend` would load a second copy of every class in here.
if __name__ != "minicompiler.frontend":
    raise ImportError('write "import minicompiler.frontend"')
