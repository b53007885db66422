"""The second half of the demo: a 1.2 GB vision transformer at a fifth of its bytes, beside what people use today."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from narrowboat.checkpoint import open_index
from narrowboat.demo.child import SLACK, Outcome, Task, run_child, why_unlimited
from narrowboat.demo.subjects import SUBJECTS
from narrowboat.errors import UsageError
from narrowboat.machine.cpu import usable_cores
from narrowboat.quantities import format_bytes
from narrowboat.report.timeline import draw_timeline, read_chrome

MODEL = "vit_large"
PART = 5  # the budget is the weights over this
PASSES = {"plain": 7, "narrowboat": 8, "mmap": 6, "accelerate": 4}
SECONDS = {"plain": 30.0, "narrowboat": 30.0, "mmap": 25.0, "accelerate": 22.0}
GRACE = {"plain": 12.0, "narrowboat": 12.0, "mmap": 6.0, "accelerate": 3.0}
TITLES = {
    "plain": "plain PyTorch, everything in memory",
    "narrowboat": "narrowboat",
    "mmap": "safetensors mmap",
    "accelerate": "accelerate disk offload",
}


@dataclass(frozen=True)
class Comparison:
    """The second half's result.

    Attributes:
        weight_bytes: bytes of all weights.
        budget: bytes that the limited subjects have over their baselines.
        slack: bytes that the kernel's limit grants on top.
        unlimited: why no limit could be enforced; None where it was.
        outcomes: by subject, in the order they ran.
        load: processes that wanted to run per core when it began, by the kernel's load average.
        timeline: the picture of narrowboat's last two passes; None if there is none.
        no_timeline: why there is none; empty if there is one.
    """

    weight_bytes: int
    budget: int
    slack: int
    unlimited: str | None
    load: float
    outcomes: dict[str, Outcome]
    timeline: Path | None
    no_timeline: str

    def exact(self, subject: str) -> bool | None:
        """Whether the output is plain PyTorch's, bit by bit; None if either is missing."""
        mine, plain = self.outcomes[subject].digests, self.outcomes["plain"].digests
        return mine == plain if mine and plain else None


def compare(
    weights: Path,
    folder: Path,
    on_start: Callable[[str], Callable[[int, float], None]],
    *,
    subjects: tuple[str, ...] = ("plain", "narrowboat", "mmap", "accelerate"),
) -> Comparison:
    """Run the subjects one after the other, each in a child process with a cold page cache.

    Args:
        weights: packed ViT-L weights.
        folder: where the trace and the picture go.
        on_start: ``on_start(subject)`` is called before each; what it returns is called after each pass with its
            number and milliseconds.
        subjects: which, the first being the one that the others are compared with.

    Raises:
        BudgetError, NarrowboatError: narrowboat refused or failed.
    """
    assert set(subjects) <= set(SUBJECTS)
    total = open_index(weights).total_bytes
    budget = total // PART
    trace = folder / "timeline.json"
    load = os.getloadavg()[0] / max(usable_cores(), 1)
    outcomes: dict[str, Outcome] = {}
    for subject in subjects:
        task = Task(
            subject,
            f"narrowboat.zoo:{MODEL}",
            weights,
            passes=PASSES[subject],
            budget=budget if subject == "narrowboat" else None,
            limit=None if subject == "plain" else budget,
            seconds=SECONDS[subject],
            grace=GRACE[subject],
            trace=trace if subject == "narrowboat" else None,
        )
        outcomes[subject] = run_child(task, on_pass=on_start(subject))
    picture, why = _draw(trace, folder / "timeline.png", budget)
    return Comparison(total, budget, SLACK, why_unlimited(), load, outcomes, picture, why)


def _draw(trace: Path, picture: Path, budget: int) -> tuple[Path | None, str]:
    try:
        draw_timeline(read_chrome(trace), picture, title=f"ViT-L in {format_bytes(budget)}: the last two passes")
    except UsageError as error:
        return None, str(error)
    return picture, ""
