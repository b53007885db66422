"""The loop of a recipe: batches through a training step, validation, and an end after a whole step when asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from narrowboat.train.failures import failures_named
from narrowboat.train.micro_batch import batch_size, cut, part_sizes
from narrowboat.train.recipes.course import Course
from narrowboat.train.recipes.goal import Goal
from narrowboat.train.report import StepRecord
from narrowboat.train.step import TrainStep


@dataclass(frozen=True, slots=True)
class Score:
    """A validation.

    Attributes:
        step: after which.
        loss: mean over the answers.
        accuracy: right answers of all, in [0, 1].
    """

    step: int
    loss: float
    accuracy: float


@dataclass(slots=True)
class Outcome:
    """What a loop did.

    Attributes:
        steps: made in all, those of a run that was resumed included.
        losses: of the steps of this loop.
        samples: trained on in this loop.
        seconds: of its steps, with reading the data and without validation.
        scores: validations.
        stopped: it ended early, because it was asked to.
    """

    steps: int
    losses: list[float] = field(default_factory=list)
    samples: int = 0
    seconds: float = 0.0
    scores: list[Score] = field(default_factory=list)
    stopped: bool = False


@dataclass(frozen=True, slots=True)
class Listener:
    """Who is told.

    Attributes:
        step: after each step, with its number and record.
        score: after each validation.
        stop: whether to end now; asked between steps, and between batches of a validation.
        epoch: after each epoch, before its validation: the time to save.
    """

    step: Callable[[int, StepRecord], None] = lambda number, record: None
    score: Callable[[Score], None] = lambda score: None
    stop: Callable[[], bool] = lambda: False
    epoch: Callable[[int], None] = lambda number: None


def load(goal: Goal, data: Any, rows: Sequence[int]) -> tuple[Any, Any]:
    """Inputs and targets of these samples."""
    return goal.collate([data[row] for row in rows])


def train(
    step: TrainStep,
    goal: Goal,
    data: Any,
    course: Course,
    outcome: Outcome,
    *,
    validation: Sequence[int] = (),
    listener: Listener = Listener(),
) -> None:
    """Go through a course; after every epoch and at the end, validate.

    Args:
        step: over a model, which is in train mode except while it is validated.
        goal: makes batches of samples.
        data: samples by number.
        course: which, in which order; begins after ``outcome.steps``.
        outcome: is kept up to date, so that it tells what was done when an error ends the loop.
        validation: numbers of the samples kept back.
        listener: is told, and may end it.

    Raises:
        NarrowboatError: as the step raises, after a whole number of steps; what the model raises itself is named.
    """
    step.model.train()
    for number, rows in course.batches(outcome.steps):
        if listener.stop():
            outcome.stopped = True
            return
        begun = time.perf_counter()
        inputs, targets = load(goal, data, rows)
        with failures_named():
            step(inputs, targets)
        del inputs, targets
        outcome.seconds += time.perf_counter() - begun
        record = step.report().steps[-1]
        outcome.steps = number
        outcome.samples += len(rows)
        outcome.losses.append(record.loss)
        listener.step(number, record)
        if number % course.per_epoch == 0 or number == course.total:
            listener.epoch(number)
            score = evaluate(step, goal, data, validation, course.batch, listener.stop)
            if score is not None:
                outcome.scores.append(replace(score, step=number))
                listener.score(outcome.scores[-1])


def evaluate(
    step: TrainStep, goal: Goal, data: Any, rows: Sequence[int], batch: int, stop: Callable[[], bool] = lambda: False
) -> Score | None:
    """Loss and accuracy over samples that are not trained on; None without samples, or where ``stop`` came between.

    As many samples at a time as a micro-batch has: a forward pass without a graph takes no more than the pass of the
    plan, which fits the budget.
    """
    model: nn.Module = step.model
    model.eval()
    loss, right, answers = 0.0, 0, 0
    try:
        for first in range(0, len(rows), batch):
            if stop():
                return None
            inputs, targets = load(goal, data, rows[first : first + batch])
            samples = batch_size(inputs, targets)
            parts = -(-samples // min(step.plan.micro_batch, samples))
            for some_inputs, some_targets in cut(inputs, targets, part_sizes(samples, parts)):
                told = goal.score(model, some_inputs, some_targets)
                loss, right, answers = loss + told[0], right + told[1], answers + told[2]
    finally:
        model.train()
    return Score(0, loss / answers, right / answers) if answers else None
