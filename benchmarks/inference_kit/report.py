"""The results for people: a table on the screen, Markdown, and a plot."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from inference_kit.campaign import Limits
from inference_kit.subjects import SUBJECTS
from narrowboat.quantities import format_bytes, format_seconds

_PACKAGES = ("torch", "safetensors", "accelerate", "transformers", "diffusers")
_COLUMNS = ("budget", "subject", "ms / pass", "x plain", "x bound", "first answer", "peak", "read / pass", "same bits")
_PLOT_TOP = 8.0  # a slower subject's bar ends here, with its number on top
_COLOURS = {
    "narrowboat": "#0b6e4f",
    "narrowboat_unpacked": "#73c2a4",
    "mmap": "#8d99ae",
    "torch_mmap": "#5c677d",
    "accelerate": "#e07a5f",
    "accelerate_placed": "#f2b5a0",
    "diffusers": "#b392ac",
}


def machine_facts(limits: Limits, results: list[dict[str, Any]], wall_seconds: float) -> dict[str, Any]:
    """Everything the numbers depend on."""
    bandwidths = [b for result in results for b in result["bandwidths"]]
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _PACKAGES},
        "threads": torch.get_num_threads(),
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT"),
        "memory_limit": limits.refusal or "memory cgroup",
        "baseline_charged_bytes": limits.charged,
        "baseline_rss_bytes": limits.rss,
        "slack_bytes": limits.slack,
        "bandwidth_min": min(bandwidths, default=None),
        "bandwidth_max": max(bandwidths, default=None),
        "wall_seconds": wall_seconds,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _values(cell: dict[str, Any], name: str) -> tuple[str, ...]:
    """One table line, without the model."""
    row = cell["rows"][name]
    exact = {True: "yes", False: f"no ({row['difference']:.0e})" if row["difference"] is not None else "no", None: "-"}
    steady = f"{row['steady_s'] * 1e3:.0f}" if row["steady_s"] is not None else "-"
    if row["status"] != "ok":
        steady = {"oom": "killed", "timeout": f"{steady} (stopped)", "error": "failed"}[row["status"]]
        if row["detail"].startswith("BudgetError"):
            steady = "refused"
    peak = row["peak_bytes"]
    read = row["bytes_read"]
    return (
        f"{cell['budget']} ({format_bytes(cell['budget_bytes'])})",
        SUBJECTS[name].label,
        steady,
        f"{row['ratio']:.2f}" if row["ratio"] is not None else "-",
        f"{row['bound_ratio']:.2f}" if row["bound_ratio"] is not None else "-",
        format_seconds(row["first_s"]) if row["first_s"] is not None else "-",
        format_bytes(peak) if peak is not None else "-",
        format_bytes(read) if read is not None else "-",
        exact[row["exact"]],
    )


def _ordered(cell: dict[str, Any]) -> list[str]:
    return [name for name in SUBJECTS if name in cell["rows"]]


def print_table(console: Console, summary: list[dict[str, Any]]) -> None:
    """One table per model."""
    for model, cells in _by_model(summary):
        table = Table(title=_heading(model, cells[0]), title_justify="left", show_lines=False)
        for number, column in enumerate(_COLUMNS):
            table.add_column(column, justify="left" if number < 2 else "right")
        for cell in cells:
            for name in _ordered(cell):
                table.add_row(*_values(cell, name), style="bold" if name == "narrowboat" else None)
            table.add_section()
        console.print(table)


def print_checks(console: Console, verdicts: list[dict[str, Any]]) -> None:
    """One line per verdict, and the score."""
    for verdict in verdicts:
        mark = "[green]pass[/]" if verdict["passed"] else "[red]FAIL[/]"
        console.print(f"{mark}  {verdict['where']}: {verdict['what']}: {verdict['numbers']}")
    console.print(f"{sum(v['passed'] for v in verdicts)} of {len(verdicts)} checks pass")


def _by_model(summary: list[dict[str, Any]]) -> Iterable[tuple[str, list[dict[str, Any]]]]:
    for model in dict.fromkeys(cell["model"] for cell in summary):
        yield model, [cell for cell in summary if cell["model"] == model]


def _heading(model: str, cell: dict[str, Any]) -> str:
    return (
        f"{model}: {format_bytes(cell['weight_bytes'])} of weights, "
        f"smallest feasible budget {format_bytes(cell['min_budget_bytes'])}, "
        f"storage {cell['bandwidth'] / 1e9:.2f} GB/s"
    )


def conditions(facts: dict[str, Any]) -> list[str]:
    """The machine, and how subjects are limited, as lines of Markdown."""
    packages = ", ".join(f"{name} {number}" for name, number in facts["packages"].items())
    return [
        f"Machine: {facts['processor']}, {facts['cores']} cores, {facts['threads']} threads, Linux {facts['kernel']}, "
        f"Python {facts['python']}, {packages}, `GOMP_SPINCOUNT={facts['GOMP_SPINCOUNT']}`.",
        "",
        f"Every subject but plain PyTorch is limited: {facts['memory_limit']}, set to a warm process without a model "
        f"({format_bytes(facts['baseline_charged_bytes'])}) + budget + {format_bytes(facts['slack_bytes'])}; "
        "everything charged counts, page cache included. Each run is a child process, subjects take turns, and "
        "the weights are out of the page cache at the start of each.",
    ]


def write_markdown(
    path: Path,
    facts: dict[str, Any],
    summary: list[dict[str, Any]],
    verdicts: list[dict[str, Any]],
    busy: list[dict[str, Any]],
) -> None:
    """The tables, how they were made, and the verdicts."""
    lines = [
        "# Inference inside a byte budget",
        "",
        "Made by `make bench`; the raw numbers are in `inference.json`.",
        "",
        *conditions(facts),
        "",
        "*ms / pass*: the median over children of their median passes, without the first ones. *x plain*: over plain "
        "PyTorch with everything in memory in the same round (median of the rounds). *x bound*: over max(plain "
        "PyTorch, bytes that cannot be held / storage bandwidth in the same run). *first answer*: from a warm process "
        "to the first output, cold file. *peak*: resident memory over the process baseline, mapped file pages "
        "included.",
        "",
        "diffusers runs over the files of an earlier set-up, which needs all weights in memory. accelerate and "
        "diffusers run under an allocator policy that gives memory back (`narrowboat.machine.malloc`); with glibc's "
        "own, accelerate is killed at small budgets, and diffusers comes to hold all weights.",
        "",
    ]
    for model, cells in _by_model(summary):
        lines += [
            f"## {_heading(model, cells[0])}",
            "",
            markdown_row(_COLUMNS),
            markdown_row(["---"] * len(_COLUMNS)),
        ]
        for cell in cells:
            lines += [markdown_row(_values(cell, name)) for name in _ordered(cell)]
        details = {
            f"- {SUBJECTS[name].label} at {cell['budget']}: {cell['rows'][name]['detail']}"
            for cell in cells
            for name in _ordered(cell)
            if cell["rows"][name]["detail"]
        }
        lines += ["", *sorted(details), ""]
    if busy:
        lines += [
            "## OpenMP's waiting (plain resnet101)",
            "",
            markdown_row(("policy", "alone", "one busy process beside")),
        ]
        lines += [markdown_row(["---"] * 3)]
        for policy in dict.fromkeys(run["policy"] for run in busy):
            times = {run["busy_processes"]: run["median_ms"] for run in busy if run["policy"] == policy}
            lines.append(markdown_row((policy, f"{times[0]:.0f} ms", f"{times[1]:.0f} ms")))
        lines.append("")
    lines += verdict_lines(verdicts)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def verdict_lines(verdicts: list[dict[str, Any]]) -> list[str]:
    """The verdicts as Markdown, under a heading with the score."""
    lines = [f"## Checks: {sum(v['passed'] for v in verdicts)} of {len(verdicts)} pass", ""]
    lines += [markdown_row(("", "where", "what", "numbers")), markdown_row(["---"] * 4)]
    return lines + [
        markdown_row(("pass" if v["passed"] else "**FAIL**", v["where"], v["what"], v["numbers"])) for v in verdicts
    ]


def markdown_row(values: Iterable[str]) -> str:
    """One row of a Markdown table."""
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"


def write_plot(path: Path, summary: list[dict[str, Any]]) -> None:
    """Latency over plain PyTorch's, one panel per divisor; a black line is the physical bound."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    divisors = list(dict.fromkeys(cell["divisor"] for cell in summary))
    names = [n for n in _COLOURS if any(n in cell["rows"] for cell in summary)]
    figure, panels = plt.subplots(len(divisors), 1, figsize=(11, 3.1 * len(divisors) + 0.8), squeeze=False)
    for axes, divisor in zip(panels[:, 0], divisors, strict=True):
        cells = [cell for cell in summary if cell["divisor"] == divisor]
        width = 0.8 / max(len(names), 1)
        for number, name in enumerate(names):
            places = [i - 0.4 + (number + 0.5) * width for i in range(len(cells))]
            ratios = [cell["rows"].get(name, {}).get("ratio") or float("nan") for cell in cells]
            axes.bar(places, ratios, width * 0.92, color=_COLOURS[name], label=SUBJECTS[name].label)
            for place, ratio in zip(places, ratios, strict=True):
                if ratio > _PLOT_TOP:
                    axes.annotate(f"{ratio:.0f}", (place, _PLOT_TOP), ha="center", va="bottom", fontsize=7)
        for i, cell in enumerate(cells):
            if cell["resident_s"]:
                axes.hlines(cell["bound_s"] / cell["resident_s"], i - 0.42, i + 0.42, color="black", linewidth=1.4)
        axes.set_ylim(0, min(axes.get_ylim()[1], _PLOT_TOP))
        axes.axhline(1, color="grey", linewidth=0.8, linestyle=":")
        labels = [f"{c['model']}\n{c['budget']}, {format_bytes(c['budget_bytes'])}" for c in cells]
        axes.set_xticks(range(len(cells)), labels, fontsize=8)
        axes.set_ylabel("latency / plain PyTorch")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.02), frameon=False)
    figure.supxlabel("black line: physical bound, max(computing, reading what cannot be held)", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
