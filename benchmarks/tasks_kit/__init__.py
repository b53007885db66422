"""Parts of ``benchmarks/tasks.py``."""
