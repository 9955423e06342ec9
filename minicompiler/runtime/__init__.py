"""What a compiled model needs to run: threads, saved files, the kernel cache. No compiler part."""
