"""``narrowboat plan --train``: what a budget would give a training step."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from narrowboat.cli.budget import resolve_budget
from narrowboat.cli.output import print_facts, print_json, print_table, progress_bar
from narrowboat.machine.about import about
from narrowboat.quantities import format_bytes

if TYPE_CHECKING:
    from narrowboat.train.plan import TrainPlan


def plan_train(
    model: str,
    *,
    weights: Path | None,
    budget: str | None,
    batch: int,
    spill: Path | None,
    batch_norm: str,
    optimizer: str,
    techniques: tuple[str, ...] | None,
    length: int | None,
    size: int | None,
    curve: Path | None,
    json: bool,
) -> None:
    """Print the plan of a training step and the curve of time against memory; see ``plan`` for the arguments."""
    bytes_allowed = resolve_budget(budget)
    from narrowboat.report.train_curve import draw_time_curve, plan_training
    from narrowboat.report.trainee import StepOptions, plan_facts

    options = StepOptions(bytes_allowed, spill, batch_norm, techniques, optimizer=optimizer)
    with progress_bar("planning", unit="budgets") as progress:
        forecast = plan_training(
            model, options, batch=batch, weights=weights, size=size, length=length, progress=progress
        )
    plan, points = forecast.plan, forecast.curve
    if curve is not None:
        draw_time_curve(points, curve, title=f"{model}, batch of {batch}", budget=bytes_allowed)
    if json:
        told = {"model": model, "learned": forecast.learned, "batch": batch, **plan_facts(plan)}
        print_json({**told, "curve": [dataclasses.asdict(point) for point in points], "about": about()})
        return
    print_facts(f"{model}, a training step of {batch} in {format_bytes(bytes_allowed)}", _facts(plan))
    print_table(
        "Time against memory",
        ["budget", "predicted peak", "time to plain", "micro-batches", "to storage"],
        [
            (
                format_bytes(point.budget),
                format_bytes(point.predicted_peak),
                f"{point.slowdown:.2f}x",
                point.micro_batches,
                format_bytes(point.spilled) if point.spilled else "",
            )
            for point in points
        ],
        right=["budget", "predicted peak", "time to plain", "micro-batches", "to storage"],
    )
    if curve is not None:
        print_facts("", {"wrote": curve})


def _facts(plan: TrainPlan) -> dict[str, object]:
    """A plan as names and what it says."""
    parts = {**plan.static.as_dict(), "activations": plan.activations}
    classes = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in parts.items() if nbytes)
    facts: dict[str, object] = {
        "smallest budget": f"{format_bytes(plan.min_budget)}, set by {plan.bottleneck}",
        "predicted peak": f"{format_bytes(plan.predicted_peak)}: {classes}",
        "the plain step": format_bytes(plan.plain_peak),
        "predicted time": f"{plan.predicted_slowdown:.2f} times the plain step's",
        "micro-batches": f"{plan.parts} of {plan.micro_batch}",
        "units": plan.schedule,
    }
    if plan.spilled:
        facts["to storage"] = f"{format_bytes(plan.spilled)} in each step"
    for place, reason in enumerate(plan.refused):
        facts["not used" + " " * place] = reason
    return facts
