"""What a training step costs: a pass on fake tensors, or on a few real samples, as a ``Tape``."""
