"""The parts of ``benchmarks/papers.py``, one job each."""
