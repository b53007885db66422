"""Which engine does what next: one object decides for the simulator and for the run-time alike."""
