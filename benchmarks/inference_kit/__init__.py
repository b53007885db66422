"""The parts of ``benchmarks/inference.py``, one job each."""
