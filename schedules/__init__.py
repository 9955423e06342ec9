"""Schedule primitives, the rules that apply them, and the tuner that searches the rules."""

# From the root of the checkout `import schedules` would load a second copy of every class in here.
if __name__ != "minicompiler.schedules":
    raise ImportError('write "import minicompiler.schedules"')
