"""What a check is, and how its parts run: each in a child process of its own, forked from one that never computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference_kit.children import Emit, run_child
from narrowboat.errors import NarrowboatError
from papers_kit.effort import Effort

Measurement = dict[str, Any]
_EVENT = "measured"


class CheckError(NarrowboatError):
    """A check could not be brought to its end; the message says why."""


@dataclass(frozen=True)
class Bench:
    """What a check is given.

    Attributes:
        effort: how much to measure.
        work: folder for files, logs and caches.
        say: takes a line of progress.
    """

    effort: Effort
    work: Path
    say: Callable[[str], None]

    def apart(self, name: str, body: Callable[[Emit], None], timeout: float) -> Measurement:
        """Run ``body(emit)`` in a child process; what it told with ``emit("measured", ...)``, all together.

        Raises:
            CheckError: it failed, was killed or took longer than ``timeout`` seconds.
        """
        outcome = run_child(body, log=self.work / "logs" / f"{name}.jsonl", timeout=timeout)
        if outcome.status != "ok":
            raise CheckError(f"{name}: {outcome.detail}")
        told: Measurement = {}
        for event in outcome.events:
            if event["event"] == _EVENT:
                told |= {key: value for key, value in event.items() if key != "event"}
        return told


Body = Callable[[Bench], Measurement]


@dataclass(frozen=True)
class Check:
    """One run whose figures several claims may rest on.

    Attributes:
        body: does it.
        what: is run, in words.
        timeout: seconds after which it is given up.
    """

    body: Body
    what: str
    timeout: float


def measure_apart(check: Check, name: str, bench: Bench) -> Measurement:
    """The whole check in a child process: what it imports, sets or breaks is not the next one's.

    Raises:
        CheckError: it failed.
    """

    def body(emit: Emit) -> None:
        emit(_EVENT, found=check.body(bench))

    found = bench.apart(f"check-{name}", body, check.timeout).get("found")
    if found is None:
        raise CheckError(f"{name} told nothing")
    return dict(found)
