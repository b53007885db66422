"""``narrowboat train``: a ready recipe, inside a byte budget."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from narrowboat.cli.budget import resolve_budget
from narrowboat.cli.main import EXIT_INTERRUPTED
from narrowboat.cli.options import (
    BatchNorm,
    BatchNormOption,
    BudgetOption,
    LengthOption,
    ModelArgument,
    Optimizer,
    OptimizerOption,
    SizeOption,
    SpillOption,
    StartOption,
    TechniquesOption,
    technique_names,
)
from narrowboat.cli.output import print_facts, print_json, print_table
from narrowboat.errors import UsageError
from narrowboat.machine.about import about
from narrowboat.quantities import format_bytes, format_seconds

if TYPE_CHECKING:
    from narrowboat.report.train import TrainReport


def train(
    model: ModelArgument,
    data: Annotated[
        str,
        typer.Option(
            metavar="PATH",
            help="A folder with one subfolder of images per class; a text file (label<TAB>text in each line for a "
            "classifier); or the word digits.",
        ),
    ],
    budget: BudgetOption = None,
    spill: SpillOption = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 32,
    epochs: Annotated[int | None, typer.Option(min=1, help="How often all samples are seen; 1 without it.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="How many steps in all, instead of --epochs.")] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate; 1e-3 without it, or that of the run to go on with.")
    ] = None,
    optimizer: OptimizerOption = Optimizer.ADAMW,
    weights: StartOption = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.safetensors", help="Save the weights there, and FILE.safetensors.state beside."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="FILE.state", help="Go on with a run, as if it had not ended.")
    ] = None,
    batch_norm: BatchNormOption = BatchNorm.AUTO,
    clip: Annotated[float | None, typer.Option(help="Largest 2-norm of all gradients together.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of random weights, order and dropout.")] = 0,
    val: Annotated[float, typer.Option(min=0.0, max=0.9, help="Share of the samples kept back to validate.")] = 0.1,
    length: LengthOption = None,
    size: SizeOption = None,
    techniques: TechniquesOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Train MODEL inside a byte budget, with the gradients of plain training, and report what it took.

    Ctrl-C and SIGTERM end it after the step that is under way, and what was trained is saved to --out; the exit code
    is 130 then. A second Ctrl-C ends it at once. Exit code 1 if the budget holds no step.
    """
    if epochs is not None and steps is not None:
        raise UsageError("give --epochs or --steps, not both")
    for name, value in (("--lr", lr), ("--clip", clip)):
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"{name} must be more than zero, and finite")
    bytes_allowed = resolve_budget(budget)
    from narrowboat.cli.train_live import live_view, stop_asked
    from narrowboat.report.train import Recipe, train_model
    from narrowboat.report.trainee import StepOptions

    recipe = Recipe(
        data=data,
        batch=batch,
        epochs=epochs or 1,
        steps=steps,
        validation=val,
        seed=seed,
        size=size,
        length=length,
        weights=weights,
        out=out,
        resume=resume,
    )
    options = StepOptions(
        budget=bytes_allowed,
        spill=spill,
        batch_norm=batch_norm.value,
        techniques=technique_names(techniques),
        clip=clip,
        optimizer=optimizer.value,
        lr=lr,
    )
    with stop_asked() as stop, live_view(stop, quiet=json) as view:
        report = train_model(model, recipe, options, listener=view.listener, planned=view.planned, tell=view.tell)
    if json:
        print_json({"model": model, "data": data, **dataclasses.asdict(report), "about": about()})
    else:
        _print_report(model, data, report)
    if report.stopped:
        raise typer.Exit(EXIT_INTERRUPTED)


def _print_report(model: str, data: str, report: TrainReport) -> None:
    if report.scores:
        print_table(
            f"{model} on {data}",
            ["after step", "validation loss", "right"],
            [(score.step, f"{score.loss:.4g}", f"{score.accuracy:.1%}") for score in report.scores],
            right=["after step", "validation loss", "right"],
        )
    facts: dict[str, object] = {
        "learned": f"{report.learned}, from {report.samples} samples; {report.validation_samples} kept back",
        "steps": f"{report.steps} of {report.planned_steps}" + (", stopped by a signal" if report.stopped else ""),
        "loss": "no step was made"
        if report.first_loss is None
        else f"{report.first_loss:.4g} at the first step, {report.last_loss:.4g} at the last",
        "speed": f"{report.samples_per_s:.3g} samples/s, {format_seconds(report.seconds_per_step)} per step (median)",
        "peak memory": f"{format_bytes(report.measured_peak_bytes)} over the process baseline, "
        f"{format_bytes(report.predicted_peak_bytes)} predicted, of {format_bytes(report.budget_bytes)} "
        f"(smallest possible: {format_bytes(report.plan['min_budget_bytes'])})",
        "slowdown": f"{report.predicted_slowdown:.2f} times the plain step's time, predicted; "
        f"that takes {format_bytes(report.plan['plain_peak_bytes'])}",
    }
    if report.over_budget:
        facts["over budget"] = f"{report.over_budget} steps"
    for place, (step, what) in enumerate(report.changes[-5:]):
        facts["changed" + " " * place] = f"after step {step}: {what}"
    for place, path in enumerate(report.wrote):
        facts["wrote" + " " * place] = path
    print_facts("" if report.scores else f"{model} on {data}", facts)
