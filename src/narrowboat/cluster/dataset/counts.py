"""What one worker did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class WorkerCounts:
    """What one worker did so far.

    Attributes:
        node: identity of its node.
        name: of the node.
        budget: bytes that it has.
        inputs: rows that went through the model.
        seconds: it was busy with them, waiting for weights included.
        bytes_read: of weights, from storage.
        peak_bytes: most resident memory of its process over the baseline.
        inputs_per_sweep: as last decided.
        closed: whether its session was closed in good order.
    """

    node: str
    name: str
    budget: int
    inputs: int = 0
    seconds: float = 0.0
    bytes_read: int = 0
    peak_bytes: int = 0
    inputs_per_sweep: int = 1
    closed: bool = False
