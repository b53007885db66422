"""Training on an accelerator: its allocator's bytes as the measure, activations to pinned host memory and storage."""
