"""Records of training, as their files say it; sizes in bytes, times in seconds."""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field, field_validator

from narrowboat.report.records.model import About, Bytes, Count, Millis, Number, Told


class StepRow(Told):
    """One step; the attributes are those of ``train.report.StepRecord``."""

    loss: Number | None = None
    seconds: Millis
    budget: Bytes
    predicted_peak: Bytes
    measured_peak: Bytes
    micro_batches: Count = 1
    replays: Count = 0
    spilled: Bytes = 0
    repeated: Count = 0
    departed: str = ""

    @field_validator("loss", mode="before")
    @classmethod
    def _finite(cls, loss: Any) -> Any:
        """A loss that is no number is told as none, as in JSON."""
        return None if isinstance(loss, float) and not math.isfinite(loss) else loss


class TrainPlanFacts(Told):
    """What a ``TrainPlan`` says of itself."""

    budget_bytes: Bytes
    min_budget_bytes: Bytes
    bottleneck: str
    bytes: dict[str, Bytes]
    predicted_peak_bytes: Bytes
    plain_peak_bytes: Bytes
    predicted_slowdown: Number
    predicted_seconds: Millis = 0.0
    plain_seconds: Millis = 0.0
    micro_batches: Count = 1
    micro_batch: Count = 0
    schedule: str = ""
    spilled_bytes: Bytes = 0
    refused: list[str] = Field(default_factory=list)


class TimeRow(Told):
    """One budget of the curve of time against memory."""

    budget: Bytes
    predicted_peak: Bytes
    slowdown: Number
    micro_batches: Count = 1
    spilled: Bytes = 0


class TrainPlanRecord(TrainPlanFacts):
    """``narrowboat plan --train --json``."""

    model: str = ""
    learned: str = ""
    batch: Count = 0
    curve: list[TimeRow]
    about: About = About()


class ScoreRow(Told):
    """One validation."""

    step: Count
    loss: Number | None
    accuracy: Number


class TrainRecord(Told):
    """``narrowboat train --json``, or what a ``TrainStep`` reports."""

    model: str = ""
    data: str = ""
    learned: str = ""
    samples: Count = 0
    steps: Count
    planned_steps: Count = 0
    first_loss: Number | None = None
    last_loss: Number | None = None
    scores: list[ScoreRow] = Field(default_factory=list)
    samples_per_s: Number = 0.0
    seconds_per_step: Millis
    budget_bytes: Bytes
    predicted_peak_bytes: Bytes
    measured_peak_bytes: Bytes
    over_budget: Count
    plan: TrainPlanFacts
    changes: list[tuple[Count, str]] = Field(default_factory=list)
    stopped: bool = False
    batch: Count = 0
    history: list[StepRow] = Field(default_factory=list)
    about: About = About()
