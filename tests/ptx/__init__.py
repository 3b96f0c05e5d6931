"""Execution of the PTX that Triton compiles, thread by thread, on a CPU: ``docs/ptx.md``."""
