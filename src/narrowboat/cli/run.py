"""``narrowboat run``: run a model inside a byte budget."""

from __future__ import annotations

import dataclasses
import statistics
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from narrowboat.cli.budget import device_budget
from narrowboat.cli.options import (
    BudgetOption,
    DeviceOption,
    HostBudgetOption,
    InputOption,
    ModelArgument,
    WeightsOption,
)
from narrowboat.cli.output import print_error, print_facts, print_json, print_table, progress_bar
from narrowboat.machine.about import about
from narrowboat.quantities import format_bytes, format_seconds
from narrowboat.zoo.request import find_request

if TYPE_CHECKING:
    from narrowboat.report.run import RunReport

_SHOWN = 12  # passes listed one by one


class Io(StrEnum):
    """How storage is read."""

    AUTO = "auto"
    DIRECT = "direct"
    BUFFERED = "buffered"


def run(
    model: ModelArgument,
    weights: WeightsOption = None,
    budget: BudgetOption = None,
    device: DeviceOption = "cpu",
    host_budget: HostBudgetOption = None,
    input: InputOption = None,
    passes: Annotated[int, typer.Option(min=1, help="How many passes to run.")] = 5,
    verify: Annotated[bool, typer.Option("--verify", help="Compare with plain PyTorch, bit by bit.")] = False,
    io: Annotated[
        Io, typer.Option(help="Past the page cache (direct), through it (buffered), or what works.")
    ] = Io.AUTO,
    trace: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write a trace for ui.perfetto.dev.")] = None,
    timeline: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw reads, compute and stalls.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE.npy", help="Save the output of the last pass.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Run MODEL from storage inside a byte budget, and report what it took.

    Exit code 1 if the budget is refused, or if --verify finds a different bit.
    """
    bytes_allowed = device_budget(budget, host_budget, device)
    request = find_request(model, weights, input)
    inputs = request.need_inputs()
    from narrowboat.report.run import RunOutputs, run_model

    with progress_bar("running", unit="passes") as progress:
        report = run_model(
            request.factory,
            request.source,
            budget=bytes_allowed,
            device=device,
            inputs=inputs,
            passes=passes,
            io=io.value,
            verify=verify,
            outputs=RunOutputs(trace, timeline, output),
            progress=progress,
        )
    if json:
        print_json({"model": model, "weights": request.weights, **dataclasses.asdict(report), "about": about()})
    else:
        _print_report(model, request.weights, report)
        for path in (trace, timeline, output):
            if path is not None:
                print_facts("", {"wrote": path})
    if report.bit_identical is False:
        print_error(f"the output is not plain PyTorch's: {report.difference}")
        raise typer.Exit(1)


def _print_report(model: str, weights: Path, report: RunReport) -> None:
    rows = list(enumerate(zip(report.latency_ms, report.stall_ms, report.bytes_read, strict=True), start=1))
    left_out = len(rows) - _SHOWN
    shown = [*rows[: _SHOWN // 2], *rows[-(_SHOWN // 2) :]] if left_out > 0 else rows
    print_table(
        f"{model}, {format_bytes(report.weight_bytes)} of weights in {format_bytes(report.budget_bytes)}",
        ["pass", "latency", "waiting", "read"],
        [
            (number, format_seconds(latency / 1e3), format_seconds(stall / 1e3), format_bytes(nbytes))
            for number, (latency, stall, nbytes) in shown
        ],
        right=["pass", "latency", "waiting", "read"],
    )
    steady = report.latency_ms[2:] or report.latency_ms[-1:]
    same = {None: "not compared (--verify)", True: "yes, every bit of the output", False: f"NO: {report.difference}"}
    parts = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in report.fixed_parts.items() if nbytes)
    of_what = "over the process baseline" if report.device == "cpu" else f"of {report.device}"
    facts: dict[str, object] = {
        "latency": f"{format_seconds(statistics.median(steady) / 1e3)} (median of the steady passes), "
        f"{format_seconds(report.predicted_latency_ms / 1e3)} predicted",
        "first answer": f"{format_seconds(report.first_answer_ms / 1e3)} after the start",
        "peak memory": f"{format_bytes(report.peak_bytes)} {of_what}, of {format_bytes(report.budget_bytes)} "
        f"(smallest possible: {format_bytes(report.min_budget_bytes)})",
        "weights held": f"{format_bytes(report.resident_bytes)} resident, {format_bytes(report.window_bytes)} window",
        "besides": parts or "nothing",
        "storage": "direct I/O, the page cache is not used" if report.direct_io else "buffered reads",
        **({"allocator": report.allocator_policy} if report.device == "cpu" else _host_facts(report)),
        "as plain PyTorch": same[report.bit_identical],
    }
    if left_out > 0:
        facts = {"passes": f"{left_out} in the middle are not listed", **facts}
    if report.tiled_layers:
        from narrowboat.plan.result import describe_tiled

        facts["tiled"] = describe_tiled(tuple(report.tiled_layers.items()))
    if report.copied_bytes:
        facts["copied"] = (
            f"{format_bytes(report.copied_bytes)}, because {weights.name} is not packed (narrowboat pack)"
        )
    print_facts("", facts)


def _host_facts(report: RunReport) -> dict[str, object]:
    return {
        "host memory": f"{format_bytes(report.pinned_bytes)} pinned, "
        f"{format_bytes(report.host_cache_bytes)} of it for weights",
        "copies": f"{format_bytes(int(report.copy_bytes_per_s))}/s to the device",
    }
