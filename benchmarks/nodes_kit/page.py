"""What was measured of several nodes, as a page."""

from __future__ import annotations

from typing import Any


def markdown(told: dict[str, Any]) -> str:
    """All sections that there are."""
    lines = [
        "# Several machines, measured",
        "",
        "Made by `python benchmarks/cluster.py`: raylets of a local Ray cluster on one machine, that share its cores,",
        "its memory bus and its storage. What grows with nodes grows as far as the cores allow; between machines the",
        "network comes on top.",
        "",
    ]
    for name, make in (("tasks", _tasks), ("pipeline", _pipeline), ("dataset", _dataset)):
        part = told.get(name)
        if part is not None:
            lines += [*make(part), "", _when(name, part), ""]
    return "\n".join(lines).rstrip() + "\n"


def _when(name: str, part: dict[str, Any]) -> str:
    quick = " (`--quick`)" if part["quick"] else ""
    return (
        f"*{part['date']}, commit {part['commit']}, {part['cores']} cores, {part['took_seconds']} s: "
        f"`python benchmarks/cluster.py --only {name}`{quick}*"
    )


def _tasks(part: dict[str, Any]) -> list[str]:
    kill = part["kill"]
    refused = ", ".join(f"{count} {name}" for name, count in kill["refused"].items()) or "none"
    return [
        "## Tasks placed on nodes",
        "",
        f"MobileNet-v2, twelve clients in a closed loop to a best-effort task that runs on every node; medians of "
        f"{part['rounds']} rounds, the numbers of nodes taken in turn.",
        "",
        "| nodes | requests/s | beside one node | median of a request | way and back, median | longest | allowed |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {run['nodes']} | {run['requests_per_second']:.1f} | {run['ratio']:.2f} | {run['median_ms']:.0f} ms "
            f"| {run['way_median_ms']:.1f} ms | {run['way_longest_ms']:.1f} ms | {run['allowed_way_ms']:.1f} ms |"
            for run in part["throughput"]
        ),
        "",
        "The node of a guaranteed task killed (`SIGKILL` to all its processes): answered again by another after "
        f"{kill['away_seconds']:.1f} s; meanwhile refused: {refused}; the longest request took "
        f"{kill['longest_seconds']:.2f} s; wrong answers: {kill['wrong']}.",
    ]


def _pipeline(part: dict[str, Any]) -> list[str]:
    rows = []
    for run in part["runs"]:
        if "refused" in run:
            rows.append(f"| {run['stages']} | refused: {run['refused']} | | | | |")
            continue
        rows.append(
            f"| {run['stages']} | {run['predicted_latency_ms']:.0f} ms | {run['measured_latency_ms']:.0f} ms "
            f"| {run['predicted_throughput']:.2f} | {run['measured_throughput']:.2f} | {run['same_bits']} |"
        )
    return [
        "## One model over several nodes",
        "",
        f"{part['model']}, {part['weights_bytes'] / 2**20:.0f} MiB of weights, "
        f"{part['budget_bytes'] / 2**20:.0f} MiB for each stage, {part['threads']} thread each.",
        "",
        "| stages | latency predicted | measured | inputs/s predicted | measured | same bits |",
        "|---|---|---|---|---|---|",
        *rows,
    ]


def _dataset(part: dict[str, Any]) -> list[str]:
    return [
        "## A data set over several nodes",
        "",
        f"{part['model']}, {part['weight_bytes'] / 2**20:.0f} MiB of weights in a budget of "
        f"{part['budget_bytes'] / 2**20:.0f} MiB a node; {part['rows']} rows of {part['row_bytes'] / 2**10:.0f} KiB.",
        "",
        "| nodes | inputs/s | beside one node |",
        "|---|---|---|",
        *(
            f"| {run['nodes']} | {run['inputs_per_second']:.1f} "
            f"| {run['inputs_per_second'] / part['runs'][0]['inputs_per_second']:.2f} |"
            for run in part["runs"]
        ),
    ]
