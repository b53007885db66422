"""``narrowboat plan``: what a budget would give, without running the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from narrowboat.cli.budget import resolve_budget
from narrowboat.cli.output import print_json, print_table
from narrowboat.quantities import format_bytes, format_seconds, parse_bytes
from narrowboat.zoo.request import find_request


def plan(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="package.module:factory, narrowboat.zoo:vgg19 say, or a model folder."),
    ],
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Weights file or folder; the model's own if it brings some.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Such as 300MiB. Without it: 80 % of the available memory.")
    ] = None,
    input: Annotated[Path | None, typer.Option(metavar="FILE", help="An image, or a .npy array.")] = None,
    bandwidth: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Per second, such as 1.5GB. Without it the storage is measured."),
    ] = None,
    scheme: Annotated[str, typer.Option(help="best; or swapnet, first-resident or window, for comparison.")] = "best",
    blocks: Annotated[bool, typer.Option("--blocks", help="List every block and where it lives.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show what would be resident, what streamed, and how long a pass would take.

    Exit code 1 if the budget cannot hold the model; the message (with --json the document) has the smallest that can.
    """
    bytes_allowed = resolve_budget(budget)
    speed = None if bandwidth is None else float(parse_bytes(bandwidth, what="bandwidth"))
    request = find_request(model, weights, input)
    from narrowboat.plan.result import summary
    from narrowboat.report.foresee import foresee

    example: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    if request.inputs is not None:
        example = (request.inputs, {})
    forecast = foresee(
        request.factory, request.source, budget=bytes_allowed, example=example, bandwidth=speed, scheme=scheme
    )
    if json:
        document = {
            "model": model,
            "weights": request.weights,
            **summary(forecast.plan),
            "allocator_policy": forecast.prepared.policy.value,
            "bandwidth_measured": forecast.measured,
            "traced": forecast.prepared.trace is not None,
        }
        print_json({**document, "block_list": forecast.blocks()} if blocks else document)
        return
    print_table(f"{model} in {format_bytes(bytes_allowed)}", ["", "plan"], _rows(str(forecast.plan)))
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


def _rows(text: str) -> list[tuple[str, str]]:
    """The lines of an explained plan as (name, what it says)."""
    rows = []
    for line in text.splitlines():
        name, _, rest = line.strip().partition(" ")
        if name == "waits":  # "waits most"
            name, rest = "waits most", rest.strip().removeprefix("most")
        rows.append(("  " * line.startswith("  ") + name, rest.strip()))
    return rows
