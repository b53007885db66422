"""What ``benchmarks/cuda.py`` is made of."""
