"""The figures as a page and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks_kit.report_real import application_lines, robot_lines

_COLOURS = ("#1d6996", "#5fad56", "#d1495b", "#8a6d3b", "#8d99ae")


def write_markdown(told: dict[str, Any], path: Path) -> None:
    """Write the page."""
    shape = told["shape"]
    lines = [
        "# Task sets: admitted, sound, quick",
        "",
        f"Made by `python benchmarks/tasks.py --sets {told['sets']}` in {told['seconds']} s; raw numbers in "
        f"`tasks.json`. Seeds from {told['seed']} on, {told['sets']} sets per point, {shape['tasks']} tasks of "
        f"{shape['units']} units; what a curve does not vary is: utilisation by computing {shape['utilisation']}, "
        f"demand {shape['demand']} times the budget, loads {shape['load']} of computing (times 0.5 to 1.5 by task). "
        "Deadlines are the periods; boundaries and preemptions cost nothing, for anybody. RT-Swap's own test is "
        "not public: its rules are judged by a safe test of ours "
        "(`tasks_kit/admitted.py`).",
        "",
        "![shares](tasks.png)",
        "",
    ]
    for name, curve in told["curves"].items():
        lines += [f"## Share admitted, by {name}", "", "| | " + " | ".join(map(str, curve["x"])) + " |"]
        lines.append("| --- |" + " ---: |" * len(curve["x"]))
        for method, shares in curve["share"].items():
            lines.append(f"| {method} | " + " | ".join(f"{share:.0%}" for share in shares) + " |")
        lines.append("")
    sound, admission = told["soundness"], told["admission"]
    nearest = sound["largest_response_over_bound"]
    demand = told["curves"]["demand over capacity"]
    at = demand["x"].index(1.96)
    ours, theirs = demand["share"]["narrowboat"][at], demand["share"]["RT-Swap's rules"][at]
    ratio = f"{ours / theirs:.1f} times" if theirs else "against none"
    lines += [
        "## What it had to show",
        "",
        "| | | |",
        "| --- | --- | --- |",
        f"| {_met(ours >= 2 * theirs)} | at least twice RT-Swap's share at 1.96 times the capacity | "
        f"{ours:.0%} and {theirs:.0%}: {ratio} |",
        f"| {_met(not sound['over_bound'] and sound['jobs'] >= 100_000)} | no response over its bound in 100,000 jobs "
        f"of admitted sets | {sound['over_bound']} of {sound['jobs']:,} jobs of {sound['sets']} sets; "
        f"{sound['missed']} deadlines missed; largest response {nearest:.3f} of its bound |",
        f"| {_met(not sound['sets_beyond_memory'])} | no more memory than was said | "
        f"{sound['sets_beyond_memory']} of {sound['sets']} sets |",
        f"| {_met(admission['median_ms'] < 50)} | 20 tasks are judged in under 50 ms | median "
        f"{admission['median_ms']} ms, worst {admission['worst_ms']} ms of {admission['sets']} sets |",
        "",
    ]
    if "robot" in told:
        lines += robot_lines(told["robot"])
    if "applications" in told:
        lines += application_lines(told["applications"])
    path.write_text("\n".join(lines))


def _met(yes: bool) -> str:
    return "met" if yes else "not met"


def draw(told: dict[str, Any], path: Path) -> None:
    """Schedulability ratio over each varied parameter."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    for axes, (name, curve) in zip(figure.subplots(1, len(told["curves"])), told["curves"].items(), strict=True):
        for colour, (method, shares) in zip(_COLOURS, curve["share"].items(), strict=False):
            axes.plot(curve["x"], shares, marker="o", markersize=4, color=colour, label=method)
        axes.set_xlabel(name)
        axes.set_ylim(-0.03, 1.03)
    figure.axes[0].set_ylabel("share of sets admitted")
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
