"""``narrowboat profile``: measure what a model costs on this machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from narrowboat.cli.options import InputOption, ModelArgument, WeightsOption
from narrowboat.cli.output import print_facts, print_json, print_table, progress_bar
from narrowboat.errors import StorageError
from narrowboat.quantities import format_bytes, format_seconds
from narrowboat.zoo.request import find_request

_SHOWN = 16  # blocks listed without --blocks


def profile(
    model: ModelArgument,
    weights: WeightsOption = None,
    input: InputOption = None,
    passes: Annotated[int, typer.Option(min=1, help="Passes of each kind; their median counts.")] = 4,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE.json", help="Also write it here.")
    ] = None,
    blocks: Annotated[bool, typer.Option("--blocks", help="List every block.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Run MODEL with as much of it in memory as fits, alone and beside a busy reader, and keep what it took.

    Later plans and sessions of the same model, inputs, weights and machine find it; others do not.
    """
    request = find_request(model, weights, input)
    inputs = request.need_inputs()
    from narrowboat.profile.measured import write_profile
    from narrowboat.report.profile import measure_profile

    with progress_bar("measuring", unit="passes") as progress:
        found = measure_profile(request.factory, request.source, inputs, passes=passes, progress=progress)
    if output is not None:
        try:
            write_profile(found, output)
        except OSError as error:
            raise StorageError(f"cannot write the profile {output}: {error.strerror or error}") from error
    if json:
        print_json({"model": model, **dataclasses.asdict(found)})
        return
    slowest = sorted(found.blocks, key=lambda row: -row["compute_busy_ms"])
    shown = found.blocks if blocks or len(slowest) <= _SHOWN else slowest[:_SHOWN]
    print_table(
        f"{model}: " + ("its blocks" if shown is found.blocks else f"the {_SHOWN} slowest of {len(slowest)} blocks"),
        ["block", "bytes", "uses", "compute", "beside reading", "activations"],
        [
            (
                row["name"],
                format_bytes(row["bytes"]),
                row["uses"],
                format_seconds(row["compute_idle_ms"] / 1e3),
                format_seconds(row["compute_busy_ms"] / 1e3),
                format_bytes(row["activation_bytes"]),
            )
            for row in shown
        ],
        right=["bytes", "uses", "compute", "beside reading", "activations"],
    )
    speeds = found.bandwidths
    storage = "not measured: the file is too small"
    if speeds:
        low, middle, high = (speeds[int(q * (len(speeds) - 1))] / 1e9 for q in (0.1, 0.5, 0.9))
        storage = f"{middle:.2f} GB/s beside computing (one read in ten below {low:.2f}, one above {high:.2f})"
    print_facts(
        "",
        {
            "pass": format_seconds(sum(found.step_seconds)),
            "beside reading": "not measured: too large to be all in memory"
            if found.contention is None
            else f"{found.contention:.0%} longer",
            **{
                f"malloc {policy}": f"{format_bytes(found.needs[policy])} beside the weights, {format_seconds(pace)}"
                for policy, pace in found.paces.items()
                if policy in found.needs
            },
            "storage": storage,
            "table": f"{len(found.table)} plans",
            **({"wrote": output} if output is not None else {}),
        },
    )
