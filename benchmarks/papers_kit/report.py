"""The table for people: Markdown, JSON, and the part of docs/papers.md between its markers."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from papers_kit.claim import Claim
from papers_kit.claims import SYSTEMS
from papers_kit.sources import SOURCES
from papers_kit.verdicts import Kind, Verdict

BEGIN = "<!-- papers.py: {system} begins -->"
END = "<!-- papers.py: {system} ends -->"
_COLUMNS = ("claim", "source", "here", "verdict", "command")

Row = tuple[Claim, Verdict]


class MarkerError(ValueError):
    """The page lacks a marker between which its table goes; the message names it."""


def table(rows: list[Row]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [_line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
    for claim, verdict in rows:
        sources = "; ".join(_cited(key) for key in claim.sources)
        here = verdict.here if claim.note == "" else f"{verdict.here}. *{claim.note}*"
        told = f"**{verdict.kind}**" + (f": {verdict.why}" if verdict.why else "")
        lines.append(_line((claim.text, sources, here, told, f"`--only {claim.id}`")))
    return lines


def _cited(key: str) -> str:
    source = SOURCES[key]
    return f"[{source.label}]({source.url})" + ("" if source.first_hand else ", second hand")


def _line(cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def counted(rows: list[Row]) -> str:
    """How many of each verdict, in words."""
    found = Counter(verdict.kind for _, verdict in rows)
    return ", ".join(f"{found[kind]} {kind}" for kind in Kind if found[kind])


def conditions(facts: dict[str, Any]) -> str:
    """The machine and the run, in one paragraph."""
    bandwidth = facts["bandwidth_bytes_per_s"]
    storage = f"{bandwidth / 1e9:.2f} GB/s" if bandwidth else "not measured"
    return (
        f"Made by `{facts['command']}` at commit {facts['commit']} on {facts['date']} in {facts['seconds']:.0f} s "
        f"({facts['effort']}: {facts['effort_said']}). {facts['processor']}, {facts['cores']} cores, storage "
        f"{storage} (direct reads), Linux {facts['kernel']}, Python {facts['python']}, torch {facts['torch']}, "
        f"`GOMP_SPINCOUNT={facts['spin']}`, `OMP_NUM_THREADS={facts['omp']}`, {facts['memory_limit']}."
    )


def page(facts: dict[str, Any], rows: list[Row]) -> str:
    """docs/benchmarks/papers.md."""
    lines = ["# The papers' claims, measured", "", conditions(facts), "", f"{len(rows)} claims: {counted(rows)}.", ""]
    lines += ["The same tables with what is to be said about them: [papers.md](../papers.md).", ""]
    for system, name in SYSTEMS.items():
        own = [row for row in rows if row[0].system == system]
        if own:
            lines += [f"## {name}", "", *table(own), ""]
    return "\n".join(lines)


def filled(text: str, facts: dict[str, Any], rows: list[Row]) -> str:
    """docs/papers.md with the tables between their markers made anew.

    Raises:
        MarkerError: a marker is not there, or not once.
    """
    for system in SYSTEMS:
        own = [row for row in rows if row[0].system == system]
        begin, end = BEGIN.format(system=system), END.format(system=system)
        for marker in (begin, end):
            if text.count(marker) != 1:
                raise MarkerError(f"docs/papers.md must have {marker!r} once, and has it {text.count(marker)} times")
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        body = [begin, "", conditions(facts), "", f"{len(own)} claims: {counted(own)}.", "", *table(own), "", end]
        text = head + "\n".join(body) + tail
    return text


def as_json(facts: dict[str, Any], rows: list[Row], measured: dict[str, Any]) -> dict[str, Any]:
    """Everything, for machines."""
    return {
        "machine": facts,
        "claims": [
            {
                "id": claim.id,
                "system": SYSTEMS[claim.system],
                "claim": claim.text,
                "sources": [SOURCES[key].url for key in claim.sources],
                "capabilities": list(claim.rows),
                "check": claim.check,
                "command": claim.command,
                "verdict": str(verdict.kind),
                "here": verdict.here,
                "why": verdict.why,
                "note": claim.note,
            }
            for claim, verdict in rows
        ],
        "checks": measured,
    }


def write(path: Path, text: str) -> None:
    """The whole file or none of it: a temporary name, synced, renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def dumped(told: dict[str, Any]) -> str:
    """JSON with one value a line."""
    return json.dumps(told, indent=1, default=str) + "\n"
