"""The pictures, each drawn from plain values: see ``narrowboat.report.plots`` for what hands them these."""
