"""The parts of ``benchmarks/generate.py``, one job each."""
