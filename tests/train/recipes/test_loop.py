"""The loop, over a step that only writes down what it gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from narrowboat.errors import LossError, TrainingError
from narrowboat.train.recipes.course import Course
from narrowboat.train.recipes.goal import Goal, Kind
from narrowboat.train.recipes.loop import Listener, Outcome, Score, evaluate, train
from narrowboat.train.report import Report, StepRecord

GOAL = Goal(Kind.IMAGES, (1, 2, 2), 4)
# Sample i is class i % 4, and says so in its pixels.
DATA = [(F.one_hot(torch.tensor(i % 4), 4).float().reshape(1, 2, 2), i % 4) for i in range(30)]


class Reads(nn.Module):
    """Finds the class in the pixels; notes how many samples it got and in which mode."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, bool]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((len(x), self.training))
        return x.flatten(1) * 20


@dataclass
class Writes:
    """In place of a ``TrainStep``."""

    model: Reads = field(default_factory=Reads)
    micro_batch: int = 3
    fails_at: int = -1
    batches: list[list[int]] = field(default_factory=list)
    told: Report = field(default_factory=Report)

    @property
    def plan(self) -> Any:
        return SimpleNamespace(micro_batch=self.micro_batch)

    def report(self) -> Report:
        return self.told

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        assert self.model.training
        assert not inputs.requires_grad
        if len(self.batches) == self.fails_at:
            raise LossError("not finite")
        self.batches.append(targets.tolist())
        self.told.add(StepRecord(float(len(self.batches)), 0.5, 9, 8, 7, 1, 0, 0, 0))


def _run(step: Writes, course: Course, outcome: Outcome, **options: Any) -> list[Any]:
    events: list[Any] = []
    train(
        step,  # type: ignore[arg-type]
        GOAL,
        DATA,
        course,
        outcome,
        validation=options.pop("validation", ()),
        listener=Listener(
            step=lambda number, record: events.append(number),
            score=events.append,
            epoch=lambda number: events.append(f"epoch {number}"),
            **options,
        ),
    )
    return events


def test_steps_epochs_and_validations_come_in_order() -> None:
    step, outcome = Writes(), Outcome(0)
    events = _run(step, Course(tuple(range(8)), 4, epochs=2), outcome, validation=[20, 21, 22, 23])
    score = Score(2, pytest.approx(0, abs=1e-6), 1.0)  # type: ignore[arg-type]
    assert events == [1, 2, "epoch 2", score, 3, 4, "epoch 4", Score(4, score.loss, 1.0)]
    assert sorted(step.batches[0] + step.batches[1]) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert (outcome.steps, outcome.samples, outcome.losses, outcome.stopped) == (4, 16, [1.0, 2.0, 3.0, 4.0], False)
    assert len(outcome.scores) == 2


def test_a_course_that_ends_within_an_epoch_is_validated_and_saved_too() -> None:
    events = _run(Writes(), Course(tuple(range(8)), 4, steps=3), Outcome(0), validation=[1])
    assert [event for event in events if isinstance(event, str)] == ["epoch 2", "epoch 3"]
    assert events[-1].step == 3


def test_validation_takes_no_more_than_a_micro_batch_at_a_time_in_eval_mode() -> None:
    step = Writes(micro_batch=3)
    step.model.train()
    score = evaluate(step, GOAL, DATA, range(11), 8)  # type: ignore[arg-type]
    assert score is not None
    assert score.accuracy == 1.0
    assert sum(count for count, _ in step.model.seen) == 11
    assert all(count <= 3 and not training for count, training in step.model.seen)
    assert step.model.training


def test_accuracy_is_over_all_samples() -> None:
    wrong = [(image, (label + (number < 5)) % 4) for number, (image, label) in enumerate(DATA)]
    score = evaluate(Writes(), GOAL, wrong, range(20), 8)  # type: ignore[arg-type]
    assert score is not None
    assert score.accuracy == 0.75
    assert score.loss == pytest.approx(20 * 0.25, rel=1e-4)


def test_a_stop_between_steps_leaves_whole_steps() -> None:
    step, outcome = Writes(), Outcome(0)
    events = _run(step, Course(tuple(range(8)), 4, epochs=9), outcome, stop=lambda: len(step.batches) == 3)
    assert events == [1, 2, "epoch 2", 3]
    assert (outcome.steps, outcome.stopped) == (3, True)


def test_a_stop_during_validation_gives_no_score() -> None:
    step, outcome = Writes(), Outcome(0)
    _run(
        step,
        Course(tuple(range(4)), 2, epochs=2),
        outcome,
        validation=range(20),
        stop=lambda: len(step.model.seen) > 1,
    )
    assert (outcome.steps, outcome.scores, outcome.stopped) == (2, [], True)
    assert step.model.training


def test_a_stop_after_the_last_step_is_no_early_end() -> None:
    step, outcome = Writes(), Outcome(0)
    _run(step, Course(tuple(range(4)), 4), outcome, stop=lambda: bool(step.batches))
    assert (outcome.steps, outcome.stopped) == (1, False)


def test_an_error_leaves_the_count_of_whole_steps() -> None:
    step, outcome = Writes(fails_at=2), Outcome(5)
    with pytest.raises(LossError):
        _run(step, Course(tuple(range(30)), 2, steps=20), outcome)
    assert (outcome.steps, len(outcome.losses)) == (7, 2)


def test_an_error_of_the_model_itself_has_a_name() -> None:
    class Fails(Writes):
        def __call__(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
            raise ValueError("mine")

    with pytest.raises(TrainingError, match=r"the model .* fails on this batch: ValueError: mine"):
        _run(Fails(), Course(tuple(range(4)), 4), Outcome(0))
