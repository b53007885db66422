"""What was run for real, on the page."""

from __future__ import annotations

from typing import Any

from narrowboat.quantities import format_bytes, format_seconds


def robot_lines(told: dict[str, Any]) -> list[str]:
    """The robot, and the same without narrowboat."""
    lines = [
        "## The robot, for real",
        "",
        f"`python benchmarks/tasks.py --parts robot` at {told['commit']}, {told['date']}, {told['cores']} cores of a "
        f"shared server. Four networks that take {format_bytes(told['resident_bytes'])} with everything resident, in "
        f"{format_bytes(told['budget_bytes'])}. narrowboat for {told['seconds']:g} s, the others "
        f"{told['beside_seconds']:g} s each, one after the other. *Whole models*: the same executor, every network "
        "one block, no preemption, and as much budget as that takes. *Plain PyTorch*: a thread per network, weights "
        "mapped from their files, in a memory cgroup of the same budget; nobody decides who goes first.",
        "",
    ]
    for name, subject in told["subjects"].items():
        if "refused" in subject:
            lines += [f"**{name}**: {subject['refused']}", ""]
            continue
        peak = format_bytes(subject["peak_bytes"])
        lines += [
            f"**{name}**, peak {peak} of {format_bytes(subject['budget_bytes'])} (the kernel's high-water mark over "
            "the baseline)",
            "",
            "| task | jobs | missed | median | worst | bound | deadline | worst/bound |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for task, row in subject["tasks"].items():
            share = f"{row['worst_us'] / row['bound_us']:.2f}" if row["bound_us"] and row["worst_us"] else ""
            lines.append(
                f"| {task} | {row['jobs']} | {row['missed']} | {_time(row['median_us'])} | {_time(row['worst_us'])} | "
                f"{_time(row['bound_us'])} | {_time(row['deadline_us'])} | {share} |"
            )
        lines.append("")
        if "wording" in subject:
            overhead = subject["overhead_us"]
            lines += [
                f"Guarantee {subject['wording']}. {subject['overruns']} of {subject['segments']:,} parts took longer "
                f"than they were measured to. A boundary takes {overhead['median']} µs (median; 99 %: "
                f"{overhead['p99']} µs).",
                "",
                *(f"- {premise}: {said}" for premise, said in subject["broken"].items()),
                *([""] if subject["broken"] else []),
            ]
    return lines


def application_lines(told: dict[str, Any]) -> list[str]:
    """The eleven tasks."""
    alone = ", ".join(f"{name.removeprefix('zoo:')} {_time(time)}" for name, time in told["alone_us"].items())
    lines = [
        "## Eleven tasks of three applications, for real",
        "",
        f"`python benchmarks/tasks.py --parts applications` at {told['commit']}, {told['date']}, "
        f"{told['seconds']:g} s each. Alone with everything resident, median: {alone}. *Served*: the time in which "
        "the engines worked for a job, against that; *response*: with waiting for the others. Where the ratio that "
        "was asked for cannot be had, the smallest budget that holds the set is taken.",
        "",
        "| application | demand | budget | ratio | peak | task | missed | served | response |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for name, application in told["applications"].items():
        demand = format_bytes(application["demand_bytes"])
        for asked, figures in application["ratios"].items():
            if "refused" in figures:
                lines.append(f"| {name} | {demand} | | {asked} | | {figures['refused']} | | | |")
                continue
            head = (
                f"| {name} | {demand} | {format_bytes(figures['budget_bytes'])} | {figures['ratio']:.2f} | "
                f"{format_bytes(figures['peak_bytes'])} "
            )
            for task, row in figures["tasks"].items():
                missed = f"{row['missed']} of {row['jobs']}"
                served, response = _ratio(row["service_slowdown"]), _ratio(row["slowdown"])
                lines.append(f"{head}| {task} | {missed} | {served} | {response} |")
                head = "| | | | | "
    return [*lines, ""]


def _time(microseconds: int | None) -> str:
    return "" if microseconds is None else format_seconds(microseconds / 1e6)


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"
