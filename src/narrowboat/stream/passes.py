"""What one pass measured."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class PassRecord:
    """Measurements of one pass.

    Attributes:
        latency: seconds from the outermost entry to the outermost exit.
        stall: seconds of it spent waiting for weights.
        bytes_read: bytes that arrived during it.
        read_busy: seconds during which the reader was reading.
        step_seconds: seconds by step, waiting left out.
        stall_by_block: seconds waited, by block.
        inputs: passes that went through together; 1 but for sweeps (``Session.map``).
        complete: it followed the traced order from first step to last.
    """

    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    read_before: int = 0
    busy_before: float = 0.0
    latency: float = 0.0
    stall: float = 0.0
    bytes_read: int = 0
    read_busy: float = 0.0
    jumped: bool = False
    inputs: int = 1
    complete: bool = False
    step_seconds: list[float] = field(default_factory=list)
    stall_by_block: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.step_seconds = [0.0] * self.steps

    def stalled(self, block: str, seconds: float) -> None:
        """Note a wait for ``block``."""
        self.stall += seconds
        self.stall_by_block[block] = self.stall_by_block.get(block, 0.0) + seconds

    def finish(self, now: float, bytes_read: int, busy: float, complete: bool) -> None:
        """Close the record."""
        self.latency = now - self.started
        self.bytes_read = bytes_read - self.read_before
        self.read_busy = busy - self.busy_before
        self.complete = complete

    def forget_details(self) -> None:
        """Keep the sums only, so that memory does not grow with the passes."""
        self.step_seconds = []
        self.stall_by_block = {}

    @property
    def compute(self) -> float:
        """Seconds not spent waiting."""
        return self.latency - self.stall
