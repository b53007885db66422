"""Runs the checks that the chosen claims rest on, keeps what they told, and judges."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from narrowboat.errors import NarrowboatError
from papers_kit.check import Bench, Check, measure_apart
from papers_kit.claim import Claim
from papers_kit.report import Row, dumped, write
from papers_kit.verdicts import judged


def run_checks(
    claims: list[Claim], checks: Mapping[str, Check], bench: Bench, kept: Path, *, resume: bool, commit: str
) -> dict[str, dict[str, Any]]:
    """What every needed check told, or why it failed; each is kept as soon as it has ended.

    Args:
        claims: to be judged.
        checks: by name.
        bench: for the checks.
        kept: file of what checks have told.
        resume: take from it what was measured at this commit and did not fail.
        commit: of the code.

    Returns:
        By name: ``measured`` (or None), ``error``, ``seconds``, ``commit``.
    """
    needed = [name for name in checks if any(claim.check == name for claim in claims)]
    before = read_kept(kept) if resume else {}
    told: dict[str, dict[str, Any]] = {
        name: found
        for name, found in before.items()
        if name in needed and found.get("measured") is not None and found.get("commit") == commit
    }
    for number, name in enumerate(needed, 1):
        if name in told:
            bench.say(f"[{number}/{len(needed)}] {name}: kept from before")
            continue
        bench.say(f"[{number}/{len(needed)}] {name}: {checks[name].what}")
        start = time.perf_counter()
        measured, error = None, ""
        try:
            measured = measure_apart(checks[name], name, bench)
        except NarrowboatError as failed:
            error = str(failed)
            bench.say(f"{name} FAILED: {error}")
        seconds = time.perf_counter() - start
        told[name] = {"measured": measured, "error": error, "seconds": seconds, "commit": commit}
        bench.say(f"[{number}/{len(needed)}] {name}: {seconds:.0f} s")
        write(kept, dumped({**before, **told}))
    return told


def read_kept(path: Path) -> dict[str, dict[str, Any]]:
    """What was kept; nothing if there is no such file or it is cut off."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def judge(claims: list[Claim], told: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """A verdict for every claim."""
    rows = []
    for claim in claims:
        found = told.get(claim.check)
        if found is None:
            rows.append((claim, judged(claim.rule, None, allowed=False)))
        else:
            rows.append((claim, judged(claim.rule, found["measured"], found["error"])))
    return rows
