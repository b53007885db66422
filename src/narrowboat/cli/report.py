"""``narrowboat report``: what commands measured, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from narrowboat.cli.output import console, print_facts, print_json, progress_bar


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Files that narrowboat wrote (--json, --trace, -o), or folders."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where to write.")] = Path("narrowboat-report"),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write one self-contained HTML file about RUN, and its pictures as PNG beside it.

    What a file is, is found from its content: run, trace, plan, profile, bench, generate, train, tasks, benchmarks.
    """
    from narrowboat.report.records.find import load_all
    from narrowboat.report.write import write_report

    records = load_all(runs)
    with progress_bar("drawing", unit="pictures") as progress:
        made = write_report(records, out, progress=progress)
    if json:
        print_json(made.as_json())
        return
    screen = console()
    for section in made.sections:
        screen.print(section.title, style="bold", markup=False, highlight=False)
        for finding in section.findings:
            mark = {"good": "ok", "bad": "!!"}.get(finding.tone, "  ")
            screen.print(f"  {mark} {finding.text}", markup=False, highlight=False, soft_wrap=True)
    print_facts("", {"wrote": f"{made.page} and {len(made.pictures)} pictures"})
