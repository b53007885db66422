"""Time against memory for one training step: the best plan of each budget, as rows and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narrowboat.plan.curve import budgets
from narrowboat.report import plots
from narrowboat.report.picture import save_png
from narrowboat.report.trainee import StepOptions, make_model, make_step
from narrowboat.train.plan import TrainPlan
from narrowboat.train.recipes.goal import find_goal
from narrowboat.train.step import TrainStep
from narrowboat.zoo.resolve import resolve_model

_POINTS = 16
_BEYOND = (1.1, 1.25, 1.5)
_WORTH = 0.005  # less time than that is no reason for more bytes


@dataclass(frozen=True, slots=True)
class TimePoint:
    """The fastest plan within a budget.

    Attributes:
        budget: bytes, everything included.
        predicted_peak: bytes, of them.
        slowdown: predicted seconds over the plain step's.
        micro_batches: how many.
        spilled: bytes to storage in each step.
    """

    budget: int
    predicted_peak: int
    slowdown: float
    micro_batches: int
    spilled: int


@dataclass(frozen=True, slots=True)
class TrainForecast:
    """What a budget would give.

    Attributes:
        learned: what kind of thing, of which the batch is made up.
        plan: for the budget that was asked for.
        curve: from the smallest budget to the plain step's, smallest first.
        batch: samples.
    """

    learned: str
    plan: TrainPlan
    curve: list[TimePoint]
    batch: int = 0


def plan_training(
    spec: str,
    options: StepOptions,
    *,
    batch: int,
    weights: Path | None = None,
    size: int | None = None,
    length: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TrainForecast:
    """Plan training steps of ``spec`` on a made-up batch, without making one.

    Args:
        spec: a model folder or ``package.module:factory``.
        options: of the step; its budget is the one to plan for.
        batch: samples.
        weights: to plan with; they decide nothing but whether a loss is finite.
        size: height and width of images; the model's own without it.
        length: tokens of a text.
        progress: called with (budgets done, budgets in all).

    Raises:
        BudgetError: the budget holds no step, with the smallest that does.
        UsageError, ModelError: as ``find_goal``.
    """
    resolved = resolve_model(spec)
    model = make_model(resolved, weights, seed=0)
    text = None if size is None and length is None else size is None
    goal = find_goal(spec, model, resolved.example, text=text, size=size, length=length)
    inputs, targets = goal.random_batch(batch)
    with make_step(model, goal, options, adapt=False) as step:
        plan = step.prepare(inputs, targets)
        return TrainForecast(goal.kind.value, plan, time_curve(step, inputs, targets, progress=progress), batch)


def time_curve(
    step: TrainStep,
    inputs: Any,
    targets: Any,
    *,
    points: int = _POINTS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[TimePoint]:
    """The budgets between the smallest and the plain step's that no smaller one is as fast as.

    Args:
        step: has a plan for such batches; its budget is afterwards what it was.
        inputs, targets: a batch.
        points: budgets to look at.
        progress: called with (budgets done, budgets in all).
    """
    before, plan = step.budget, step.plan
    tried = budgets(plan.min_budget, max(plan.plain_peak, plan.min_budget), points)
    # Plans round bytes up, so what takes the plain step's bytes exactly may not be planned within them.
    tried += [int(plan.plain_peak * factor) for factor in _BEYOND]
    found: list[TimePoint] = []
    try:
        for done, budget in enumerate(tried, start=1):
            step.budget = budget
            made = step.prepare(inputs, targets)
            point = TimePoint(budget, made.predicted_peak, made.predicted_slowdown, made.parts, made.spilled)
            if not found or point.slowdown < found[-1].slowdown * (1 - _WORTH):
                found.append(point)
            progress(done, len(tried))
            if point.slowdown <= 1:
                break
    finally:
        step.budget = before
    return found


def draw_time_curve(
    points: Sequence[TimePoint], path: str | Path, *, title: str = "", budget: int | None = None
) -> None:
    """Draw predicted time over the plain step's against the budget.

    Args:
        points: a curve.
        path: a PNG file.
        title: above the picture.
        budget: bytes; drawn as a line where the picture has room for it.

    Raises:
        UsageError: matplotlib is not installed.
        StorageError: the file cannot be written.
    """
    save_png(plots.train_curve(points, budget=budget, title=title), Path(path))
