"""``narrowboat plan``: what a budget would give, without running the model or (``--train``) training it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from narrowboat.cli.budget import resolve_budget
from narrowboat.cli.options import (
    BatchNorm,
    BatchNormOption,
    BudgetOption,
    InputOption,
    LengthOption,
    ModelArgument,
    Optimizer,
    OptimizerOption,
    SizeOption,
    SpillOption,
    TechniquesOption,
    WeightsOption,
    technique_names,
)
from narrowboat.cli.output import print_facts, print_json, print_table, progress_bar
from narrowboat.errors import UsageError
from narrowboat.machine.about import about
from narrowboat.quantities import format_bytes, format_seconds, parse_bytes, parse_seconds
from narrowboat.zoo.request import find_request

# Options that say nothing about the other kind of plan.
_OF_RUNNING = ("input", "bandwidth", "target_latency", "measure", "profile", "scheme", "objective", "blocks")
_OF_TRAINING = ("batch", "spill", "batch_norm", "optimizer", "length", "size", "techniques")


def plan(
    context: typer.Context,
    model: ModelArgument,
    weights: WeightsOption = None,
    budget: BudgetOption = None,
    input: InputOption = None,
    bandwidth: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Per second, such as 1.5GB. Without it the storage is measured."),
    ] = None,
    target_latency: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Find the smallest budget for it, such as 120ms, instead of taking one."),
    ] = None,
    curve: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw predicted latency against budget, with the knee.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="With --curve: run some budgets too.")] = False,
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Plan from this profile; else from what is kept.")
    ] = None,
    scheme: Annotated[str, typer.Option(help="best; or swapnet, first-resident or window, for comparison.")] = "best",
    objective: Annotated[
        str, typer.Option(help="throughput: passes back to back; latency: passes with pauses between them.")
    ] = "throughput",
    blocks: Annotated[bool, typer.Option("--blocks", help="List every block and where it lives.")] = False,
    train: Annotated[
        bool, typer.Option("--train", help="Plan a training step instead; the options below are for it.")
    ] = False,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples per step; 32 without it.")] = None,
    spill: SpillOption = None,
    batch_norm: BatchNormOption = BatchNorm.AUTO,
    optimizer: OptimizerOption = Optimizer.ADAMW,
    length: LengthOption = None,
    size: SizeOption = None,
    techniques: TechniquesOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show what would be resident, what streamed, and how long a pass would take.

    With --train: what a training step would keep, recompute and put on storage, and time against memory.

    Exit code 1 if the budget cannot hold the model; the message (with --json the document) has the smallest that can.
    """
    _check_options(context, train)
    if curve is not None:
        from narrowboat.report.picture import check_picture

        check_picture(curve)
    if train:
        from narrowboat.cli.plan_train import plan_train

        plan_train(
            model,
            weights=weights,
            budget=budget,
            batch=batch or 32,
            spill=spill,
            batch_norm=batch_norm.value,
            optimizer=optimizer.value,
            techniques=technique_names(techniques),
            length=length,
            size=size,
            curve=curve,
            json=json,
        )
        return
    target = None if target_latency is None else parse_seconds(target_latency, what="target latency")
    if target == 0:
        raise UsageError("the target latency must be more than zero")
    if target is not None and budget is not None:
        raise UsageError("give --budget or --target-latency, not both")
    if measure and curve is None:
        raise UsageError("--measure puts points on a curve: give --curve FILE.png")
    speed = None if bandwidth is None else float(parse_bytes(bandwidth, what="bandwidth"))
    request = find_request(model, weights, input)
    from narrowboat.plan.result import summary
    from narrowboat.report.curve import curve_as_dict, draw_curve, measure_points, pareto
    from narrowboat.report.foresee import foresee

    example: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    if request.inputs is not None:
        example = (request.inputs, {})
    forecast = foresee(
        request.factory,
        request.source,
        budget=None if target is not None else resolve_budget(budget),
        example=example,
        bandwidth=speed,
        scheme=scheme,
        objective=objective,
        profile=profile,
        target=target,
    )
    told_curve: dict[str, Any] = {}
    if curve is not None:
        with progress_bar("planning", unit="budgets") as progress:
            points = pareto(forecast.prepared, forecast.plan.machine, progress=progress).plans
        measured: list[tuple[int, float]] = []
        if measure:
            with progress_bar("measuring", unit="budgets") as progress:
                measured = measure_points(
                    request.factory, request.source, request.need_inputs(), points, progress=progress
                )
        draw_curve(points, curve, title=model, measured=measured, target=target)
        told_curve = curve_as_dict(points, measured)
    advice = forecast.advice() if scheme == "best" else []
    if json:
        document = {
            "model": model,
            "weights": request.weights,
            **summary(forecast.plan),
            "allocator_policy": forecast.prepared.policy.value,
            "bandwidth_measured": forecast.measured,
            "traced": forecast.prepared.trace is not None,
            "advice": advice,
            **told_curve,
            "about": about(),
        }
        print_json({**document, "block_list": forecast.blocks()} if blocks else document)
        return
    rows = _rows(str(forecast.plan)) + [("would help" if i == 0 else "", said) for i, said in enumerate(advice)]
    print_table(f"{model} in {format_bytes(forecast.plan.budget)}", ["", "plan"], rows)
    if curve is not None:
        print_facts("", {"wrote": curve})
    if forecast.prepared.trace is None:
        print_table(
            "",
            ["", "note"],
            [("untraced", f"the first real pass will show the order: {forecast.prepared.why_untraced}")],
        )
    if blocks:
        print_table(
            "Blocks, in order of first use",
            ["block", "bytes", "lives", "steps", "waits"],
            [
                (
                    block["name"],
                    format_bytes(block["bytes"]),
                    "resident" if block["resident"] else "streamed",
                    ", ".join(f"{first}-{last}" for first, last in block["holds"]),
                    format_seconds(block["predicted_stall_ms"] / 1e3) if block["predicted_stall_ms"] else "",
                )
                for block in forecast.blocks()
            ],
            right=["bytes", "waits"],
        )


def _check_options(context: typer.Context, train: bool) -> None:
    """Refuse options that would do nothing."""
    for name in _OF_RUNNING if train else _OF_TRAINING:
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE":
            told = "does nothing with --train" if train else "is for training steps: give --train with it"
            raise UsageError(f"--{name.replace('_', '-')} {told}")


def _rows(text: str) -> list[tuple[str, str]]:
    """The lines of an explained plan as (name, what it says)."""
    rows = []
    for line in text.splitlines():
        name, _, rest = line.strip().partition(" ")
        if name == "waits":  # "waits most"
            name, rest = "waits most", rest.strip().removeprefix("most")
        rows.append(("  " * line.startswith("  ") + name, rest.strip()))
    return rows
