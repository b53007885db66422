"""Training runs and plans of training steps."""

from __future__ import annotations

import statistics

from narrowboat.quantities import format_bytes, format_seconds
from narrowboat.report import plots
from narrowboat.report.records.find import Loaded
from narrowboat.report.records.training import TrainPlanFacts, TrainPlanRecord, TrainRecord
from narrowboat.report.sections.section import (
    BAD,
    GOOD,
    NOTE,
    Section,
    Table,
    begin,
    budget_finding,
    prediction_finding,
)

_ROWS = 40
_CLOSE = 0.10


def train_section(loaded: Loaded) -> Section:
    """``narrowboat train --json``."""
    told: TrainRecord = loaded.value
    section = begin(loaded, f"Training {told.model or 'a model'}{f' on {told.data}' if told.data else ''}")
    budget_finding(section, told.measured_peak_bytes, told.budget_bytes)
    if told.over_budget:
        section.notice(BAD, f"{told.over_budget} of {told.steps} steps were over the budget.")
    if told.measured_peak_bytes and told.predicted_peak_bytes:
        off = told.predicted_peak_bytes / told.measured_peak_bytes - 1
        # The heap's pages come in steps, and a plan may promise more than a batch takes: more is safe, less is not.
        tone = GOOD if -0.02 <= off <= _CLOSE else NOTE
        side = "more" if off > 0 else "less"
        section.notice(
            tone,
            f"Memory: {format_bytes(told.predicted_peak_bytes)} predicted, "
            f"{format_bytes(told.measured_peak_bytes)} measured ({abs(off):.0%} {side} than was taken).",
        )
    settled = [row.seconds for row in told.history[1:]] or [row.seconds for row in told.history]
    if settled and told.plan.predicted_seconds:
        prediction_finding(section, told.plan.predicted_seconds, statistics.median(settled), "step")
    if told.plan.predicted_slowdown and told.plan.plain_peak_bytes:
        section.notice(
            NOTE,
            f"The plain step would take {format_bytes(told.plan.plain_peak_bytes)}; here a step is predicted "
            f"to take {told.plan.predicted_slowdown:.2f} times its time.",
        )
    if told.first_loss is not None and told.last_loss is not None:
        section.notice(NOTE, f"The loss went from {told.first_loss:.4g} to {told.last_loss:.4g}.")
    if told.stopped:
        section.notice(NOTE, f"It was stopped after {told.steps} of {told.planned_steps} steps.")
    if told.history:
        section.picture(
            "steps",
            "Time and memory per step, predicted and measured",
            f"Two lines over {len(told.history)} steps: seconds above; below, MiB beside prediction and budget.",
            "The first step makes what later ones have already. The prediction of time leaves the optimizer out.",
            lambda width: plots.train_steps(told, title="Time and memory per step", width=width),
        )
    _parts(section, told.plan, told)
    if told.scores:
        rows = [
            (str(score.step), "" if score.loss is None else f"{score.loss:.4g}", f"{score.accuracy:.1%}")
            for score in told.scores
        ]
        section.tables.append(Table("Validation", ["after step", "loss", "right"], rows[-_ROWS:], frozenset()))
    if told.changes:
        changes = [(str(step), what) for step, what in told.changes[-_ROWS:]]
        section.tables.append(Table("Changes of plan", ["after step", "what"], changes, frozenset({1})))
    section.facts |= {
        "budget": f"{format_bytes(told.budget_bytes)} (smallest possible {format_bytes(told.plan.min_budget_bytes)})",
        "steps": f"{told.steps} of {told.planned_steps or told.steps}",
        "speed": f"{told.samples_per_s:.3g} samples/s, {format_seconds(told.seconds_per_step)} per step (median)",
        **_plan_facts(told.plan),
    }
    if told.batch:
        section.facts["batch"] = f"{told.batch} samples"
    return section


def train_plan_section(loaded: Loaded) -> Section:
    """``narrowboat plan --train --json``."""
    told: TrainPlanRecord = loaded.value
    section = begin(loaded, f"Plan of a training step of {told.model or 'a model'}")
    section.notice(
        NOTE,
        f"In {format_bytes(told.budget_bytes)} a step of {told.batch} is predicted to take "
        f"{told.predicted_slowdown:.2f} times the plain one's time; that takes {format_bytes(told.plain_peak_bytes)}.",
    )
    section.notice(NOTE, f"The smallest budget is {format_bytes(told.min_budget_bytes)}, set by {told.bottleneck}.")
    if told.curve:
        last = told.curve[-1]
        section.picture(
            "throughput",
            "Throughput against memory",
            f"A rising line over {len(told.curve)} budgets, up to {format_bytes(last.budget)}.",
            "Where the line is flat, more memory buys nothing.",
            lambda width: plots.throughput_curve(told, title="Throughput against memory", width=width),
        )
        section.picture(
            "time",
            "Time against memory",
            f"A falling line over {len(told.curve)} budgets.",
            "One means as fast as plain training.",
            lambda width: plots.train_curve(told, title="Time against memory", width=width),
        )
        rows = [
            (
                format_bytes(row.budget),
                format_bytes(row.predicted_peak),
                f"{row.slowdown:.2f}x",
                str(row.micro_batches),
                format_bytes(row.spilled) if row.spilled else "",
            )
            for row in told.curve
        ]
        columns = ["budget", "predicted peak", "time to plain", "micro-batches", "to storage"]
        section.tables.append(Table("Time against memory", columns, rows, frozenset()))
    _parts(section, told, told)
    section.facts |= {"batch": f"{told.batch} samples", **_plan_facts(told)}
    return section


def _parts(section: Section, plan: TrainPlanFacts, source: TrainRecord | TrainPlanRecord) -> None:
    if any(plan.bytes.values()):
        section.picture(
            "budget",
            "Where the budget goes",
            ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in plan.bytes.items() if nbytes),
            "As planned, at the worst moment of a step.",
            lambda width: plots.budget(source, title="Where the budget goes", width=width),
        )


def _plan_facts(plan: TrainPlanFacts) -> dict[str, str]:
    facts = {"micro-batches": f"{plan.micro_batches} of {plan.micro_batch}", "units": plan.schedule}
    if plan.spilled_bytes:
        facts["to storage"] = f"{format_bytes(plan.spilled_bytes)} in each step"
    for place, reason in enumerate(plan.refused, start=1):
        facts[f"not used ({place})"] = reason
    return facts
