"""What was predicted and what was measured, step by step."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

from narrowboat.quantities import format_bytes, format_seconds

_KEPT = 10_000  # steps


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step.

    Attributes:
        loss: of the whole batch.
        seconds: of the whole step, optimizer included.
        budget: bytes in force.
        predicted_peak: bytes.
        measured_peak: resident memory of the process at its highest in the step, beyond what it had before the model;
            0 where the system does not tell. On a device, bytes of tensors by its allocator.
        micro_batches: how many.
        replays: stretches that were computed again.
        spilled: bytes written to storage, activations, gradients, weights and optimizer state together.
        offloaded: bytes copied from a device to pinned host memory.
        reserved_peak: the most that a device's allocator took, what it keeps of freed tensors included, beyond what it
            had before the model; 0 on the host, where that is in ``measured_peak``.
        repeated: times that the step was given up for lack of memory and done again in less.
        departed: where the pass left its plan; "" if it did not.
    """

    loss: float
    seconds: float
    budget: int
    predicted_peak: int
    measured_peak: int
    micro_batches: int
    replays: int
    spilled: int
    repeated: int
    departed: str = ""
    offloaded: int = 0
    reserved_peak: int = 0


@dataclass(slots=True)
class Report:
    """The last steps.

    Attributes:
        steps: records, oldest first.
        count: steps in all.
        changes: changes of plan, in words, with the number of the step.
    """

    steps: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=_KEPT))
    count: int = 0
    changes: list[tuple[int, str]] = field(default_factory=list)

    def add(self, record: StepRecord) -> None:
        """Note a step."""
        self.steps.append(record)
        self.count += 1

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "steps": self.count,
            "seconds_per_step": statistics.median(r.seconds for r in self.steps) if self.steps else 0.0,
            "predicted_peak_bytes": max((r.predicted_peak for r in self.steps), default=0),
            "measured_peak_bytes": max((r.measured_peak for r in self.steps), default=0),
            "over_budget": sum(r.measured_peak > r.budget for r in self.steps),
            "repeated": sum(r.repeated for r in self.steps),
            "spilled_bytes_per_step": statistics.median(r.spilled for r in self.steps) if self.steps else 0,
            "offloaded_bytes_per_step": statistics.median(r.offloaded for r in self.steps) if self.steps else 0,
            "reserved_peak_bytes": max((r.reserved_peak for r in self.steps), default=0),
            "changes": self.changes,
            "last": asdict(self.steps[-1]) if self.steps else None,
        }

    def __str__(self) -> str:
        if not self.steps:
            return "no step was made yet"
        told = self.as_dict()
        last = self.steps[-1]
        lines = [
            f"{self.count} steps, {format_seconds(told['seconds_per_step'])} each (median), last loss {last.loss:.6g}",
            f"peak predicted {format_bytes(told['predicted_peak_bytes'])}, measured "
            f"{format_bytes(told['measured_peak_bytes'])}, budget {format_bytes(last.budget)}; "
            f"{told['over_budget']} steps over it",
        ]
        if told["reserved_peak_bytes"]:
            lines.append(f"at most {format_bytes(told['reserved_peak_bytes'])} taken from the device for that")
        if told["offloaded_bytes_per_step"]:
            lines.append(f"{format_bytes(told['offloaded_bytes_per_step'])} to pinned host memory per step")
        if told["spilled_bytes_per_step"]:
            lines.append(f"{format_bytes(told['spilled_bytes_per_step'])} written to storage per step")
        if told["repeated"]:
            lines.append(f"{told['repeated']} times a step was given up for lack of memory and done again in less")
        lines += [f"step {number}: {what}" for number, what in self.changes[-10:]]
        if last.departed:
            lines.append(f"the last step left its plan at {last.departed}")
        return "\n".join(lines)
