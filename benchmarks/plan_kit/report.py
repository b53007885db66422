"""The results of benchmarks/plan.py for people: on the screen, and in Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from narrowboat.quantities import format_bytes
from plan_kit.verdicts import Cell

_COLUMNS = (
    "budget", "scheme", "ms / pass", "x plain", "x bound", "foreseen", "error", "predicted error", "read / pass",
    "malloc", "same bits",
)  # fmt: skip


def _values(cell: Cell) -> tuple[str, ...]:
    label = f"{cell['label']} ({format_bytes(cell['budget'])})"
    name = cell["scheme"] + (f", {cell['ablation']}" if cell["ablation"] else "")
    if "refused" in cell:
        return (label, name, "refused", *["-"] * 8)
    return (
        label,
        name,
        f"{cell['seconds'] * 1e3:.0f}",
        f"{cell['ratio']:.2f}",
        f"{cell['over_bound']:.2f}",
        f"{cell['foreseen'] * 1e3:.0f} ms",
        f"{cell['foreseen_error']:+.0%}",
        f"{cell['predicted_error']:+.0%}",
        format_bytes(cell["bytes_read"]),
        cell["policy"],
        "yes" if cell["exact"] else ("no (tiles)" if cell["tiled"] else "no"),
    )


def print_results(console: Console, cells: list[Cell], verdicts: list[dict[str, Any]]) -> None:
    """A table per model, and a line per verdict."""
    for model in dict.fromkeys(cell["model"] for cell in cells):
        table = Table(title=model, title_justify="left")
        for number, column in enumerate(_COLUMNS):
            table.add_column(column, justify="left" if number < 2 else "right")
        for cell in cells:
            if cell["model"] == model:
                table.add_row(*_values(cell))
        console.print(table)
    for verdict in verdicts:
        mark = "[green]pass[/]" if verdict["passed"] else "[red]FAIL[/]"
        console.print(f"{mark}  {verdict['what']}: {verdict['numbers']}")
    console.print(f"{sum(v['passed'] for v in verdicts)} of {len(verdicts)} checks pass")


def write_markdown(
    path: Path,
    facts: dict[str, Any],
    cells: list[Cell],
    verdicts: list[dict[str, Any]],
    live: dict[str, Any] | None,
) -> None:
    """The same as a document."""
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    lines = [
        "# Plans, predicted and measured",
        "",
        "Made by `python benchmarks/plan.py`; the raw numbers are in `plan.json`.",
        "",
        f"Machine: {facts['processor']}, {facts['cores']} cores, {facts['threads']} threads, Linux {facts['kernel']}, "
        f"Python {facts['python']}, {packages}, `GOMP_SPINCOUNT={facts['GOMP_SPINCOUNT']}`.",
        "",
        "*ms / pass*: median over the rounds of the children's median passes, after three. *x plain*: over plain "
        "PyTorch with everything in memory, run before and after each round. *x bound*: over the larger of plain "
        "PyTorch and the latency that no plan within the budget can beat (`plan/bound.py`). *foreseen*: by "
        "`narrowboat plan` just before, from the profile and what sessions have measured since; *predicted error*: of "
        "the plan in force, made from the session's second pass.",
        "",
    ]
    for model in dict.fromkeys(cell["model"] for cell in cells):
        lines += [f"## {model}", "", f"| {' | '.join(_COLUMNS)} |", "| --- | --- |" + " ---: |" * (len(_COLUMNS) - 2)]
        lines += [f"| {' | '.join(_values(cell))} |" for cell in cells if cell["model"] == model]
        lines.append("")
    if live is not None:
        lines += [
            "## Live changes",
            "",
            f"{live['model']}: {live['changes']} random budgets between {format_bytes(live['lowest'])} and "
            f"{format_bytes(live['highest'])} in {live['passes']} passes: {live['wrong']} wrong answers; the switch "
            "took "
            f"{live['switch_median'] * 1e3:.1f} ms (median), {live['switch_worst'] * 1e3:.1f} ms (worst); the largest "
            f"pass was {live['worst_over'] / 2**20:+.1f} MiB over (below: under) its budget.",
            "",
        ]
    lines += ["## What it had to show", "", "| | | |", "| --- | --- | --- |"]
    lines += [f"| {'met' if v['passed'] else 'not met'} | {v['what'].strip()} | {v['numbers']} |" for v in verdicts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
