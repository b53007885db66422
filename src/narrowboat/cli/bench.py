"""``narrowboat bench``: one model at several budgets, beside plain PyTorch with everything in memory."""

from __future__ import annotations

from typing import Annotated

import typer

from narrowboat.cli.options import InputOption, WeightsOption
from narrowboat.cli.output import print_json, print_table, progress_bar
from narrowboat.errors import UsageError
from narrowboat.machine.about import about
from narrowboat.quantities import format_bytes, format_seconds, parse_bytes
from narrowboat.zoo.folder import FolderModel
from narrowboat.zoo.request import find_request


def bench(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="package.module:factory, such as narrowboat.zoo:vgg19.")
    ],
    budgets: Annotated[str, typer.Option(metavar="BYTES,BYTES", help="Budgets, such as 100MiB,200MiB.")],
    weights: WeightsOption = None,
    input: InputOption = None,
    passes: Annotated[int, typer.Option(min=1, help="Passes per process.")] = 6,
    rounds: Annotated[int, typer.Option(min=1, help="How often everything is run.")] = 2,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure MODEL at each budget and as plain PyTorch, each in a process of its own, in interleaved rounds.

    Every process starts with the weights out of the page cache.
    """
    sizes = [parse_bytes(text, what="budget") for text in budgets.split(",")]
    request = find_request(model, weights, input)
    if isinstance(request.resolved.factory, FolderModel):
        raise UsageError("bench takes package.module:factory, not a folder: its other subjects load one weights file")
    request.need_inputs()
    from narrowboat.demo.bench import bench as measure

    with progress_bar("measuring", unit="processes") as progress:
        report = measure(model, request.weights, sizes, input=input, passes=passes, rounds=rounds, progress=progress)
    if json:
        print_json(
            {
                "model": model,
                "weights": request.weights,
                "passes": passes,
                "rounds": rounds,
                "rows": report.to_json(),
                "about": about(),
            }
        )
        return
    print_table(
        f"{model}, medians of {rounds} rounds of {passes} passes",
        ["", "budget", "latency", "to plain", "predicted", "first answer", "read per pass", "peak", "exact"],
        [
            (
                row.subject,
                "all" if row.budget_bytes is None else format_bytes(row.budget_bytes),
                *(
                    [f"refused: the smallest is {format_bytes(row.minimum or 0)}", "", "", "", "", "", ""]
                    if row.refused
                    else [
                        _time(row.latency_ms),
                        f"{report.ratio(row):.2f}x" if report.ratio(row) is not None else "",
                        _time(row.predicted_ms),
                        _time(row.first_answer_ms),
                        "" if row.bytes_read is None else format_bytes(row.bytes_read),
                        "" if row.peak_bytes is None else format_bytes(row.peak_bytes),
                        {None: "", True: "yes", False: "NO"}[report.exact(row)],
                    ]
                ),
            )
            for row in report.rows
        ],
        right=["budget", "latency", "to plain", "predicted", "first answer", "read per pass", "peak"],
    )


def _time(milliseconds: float | None) -> str:
    return "" if milliseconds is None else format_seconds(milliseconds / 1e3)
