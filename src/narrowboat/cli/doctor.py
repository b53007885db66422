"""``narrowboat doctor``: what this machine offers, and what each absence means."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from narrowboat.cli.output import console, error_console, print_json
from narrowboat.machine.doctor import Diagnosis, diagnose
from narrowboat.machine.openmp_measure import OpenMPMeasurement
from narrowboat.machine.storage import StorageProbe
from narrowboat.quantities import format_bytes, format_seconds

_MARKS = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "absent": "[dim]absent[/]"}


def _findings_table(diagnosis: Diagnosis) -> Table:
    table = Table(
        title=f"{diagnosis.system}, Python {diagnosis.python}, torch {diagnosis.torch or 'not installed'}", expand=True
    )
    table.add_column("", no_wrap=True)
    table.add_column("what", no_wrap=True)
    table.add_column("what it means", ratio=1)
    for finding in diagnosis.findings:
        advice = f"\n[cyan]{escape(finding.advice)}[/]" if finding.advice else ""
        table.add_row(_MARKS[finding.state], escape(finding.title), escape(finding.meaning) + advice)
    return table


def _storage_table(storage: StorageProbe) -> Table:
    how = "O_DIRECT" if storage.direct else "buffered"
    table = Table(
        title=f"Reading {format_bytes(storage.sample)} from {escape(storage.folder)}, {how}: MiB/s, cores idle / busy"
    )
    table.add_column("chunk", justify="right")
    depths = sorted({row.depth for row in storage.rows})
    for depth in depths:
        table.add_column(f"{depth} in flight", justify="right")
    speeds = {(row.chunk, row.depth, row.busy): row.bandwidth / (1 << 20) for row in storage.rows}
    for chunk in sorted({row.chunk for row in storage.rows}):
        cells = []
        for depth in depths:
            cell = f"{speeds[chunk, depth, False]:,.0f} / {speeds[chunk, depth, True]:,.0f}"
            cells.append(f"[bold green]{cell}[/]" if (chunk, depth) == (storage.chunk, storage.depth) else cell)
        table.add_row(format_bytes(chunk), *cells)
    return table


def _openmp_table(measurement: OpenMPMeasurement) -> Table:
    table = Table(title="OpenMP: median time of a small network's pass")
    for name in ("waiting", "threads", "alone", "beside a busy process"):
        table.add_column(name, justify="left" if name == "waiting" else "right")
    names = {"default": "default (long spin)", "passive": "OMP_WAIT_POLICY=passive"}
    choice = measurement.choice
    for row in measurement.rows:
        threads = choice.threads if choice.threads is not None else choice.cores
        table.add_row(
            names.get(row.policy, f"GOMP_SPINCOUNT={row.policy}"),
            str(row.threads),
            format_seconds(row.alone),
            format_seconds(row.busy),
            style="bold green" if (row.policy, row.threads) == (choice.policy, threads) else None,
        )
    return table


def doctor(
    folder: Annotated[Path, typer.Argument(help="Folder whose storage is probed: where the weights are.")] = Path("."),
    json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON document.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A shorter storage probe, and no OpenMP measurement: a few seconds.")
    ] = False,
) -> None:
    """Say what this machine offers to streaming, what it lacks, and what each absence means.

    Measures the storage under FOLDER and the OpenMP wait policy that serves this machine best, which later
    commands then use.
    """
    with error_console().status("looking at this machine") as spinner:
        diagnosis = diagnose(
            folder, quick=quick, measure_openmp=not quick, progress=lambda what: spinner.update(f"{escape(what)} ...")
        )
    if json:
        print_json(diagnosis.to_json())
        return
    screen = console()
    screen.print(_findings_table(diagnosis))
    screen.print(_storage_table(diagnosis.storage))
    if diagnosis.openmp_measurement is not None:
        screen.print(_openmp_table(diagnosis.openmp_measurement))
