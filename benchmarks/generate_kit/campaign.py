"""The decoder's measurements: which child runs when, under which limit, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from generate_kit.folders import Folders, bytes_per_token, folders, make_folders, weight_bytes
from generate_kit.measure import run_subject
from generate_kit.subjects import SUBJECTS
from inference_kit.campaign import Limits
from inference_kit.children import Emit, Outcome, run_child
from inference_kit.measure import read_directly, steady
from narrowboat.errors import NarrowboatError
from narrowboat.quantities import format_bytes, format_seconds

_CENTRAL_TIMEOUT = 240.0  # of children without whom there is nothing to compare


@dataclass(frozen=True, slots=True)
class Effort:
    """How much of the decoder is measured.

    Attributes:
        rounds: times that plain transformers and packed narrowboat run.
        other_rounds: of these, how many include the other subjects.
        prompt: tokens of the prompt.
        tokens: new tokens.
        other_seconds: a peer begins no token so many seconds after its first.
        timeout: a peer is killed after so many seconds; what it has shown until then is kept.
    """

    rounds: int
    other_rounds: int
    prompt: int
    tokens: int
    other_seconds: float
    timeout: float


class DecoderCampaign:
    """Measures one decoder at one budget; ``records`` has one entry per child."""

    def __init__(
        self,
        name: str,
        work: Path,
        subjects: list[str],
        divisor: float,
        effort: Effort,
        limits: Limits,
        say: Callable[[str], None],
    ) -> None:
        self.made: Folders = folders(name, work)
        self.logs = work / "logs"
        self.subjects = subjects
        self.divisor = divisor
        self.effort = effort
        self.limits = limits
        self.say = say
        self.records: list[dict[str, Any]] = []
        self._prepare()
        self.weights = weight_bytes(self.made)
        self.budget = int(self.weights / divisor)

    def run(self) -> dict[str, Any]:
        """Every round, every subject once, each time in another order."""
        for number in range(self.effort.rounds):
            central = [s for s in self.subjects if s in ("resident", "narrowboat")]
            taking_part = self.subjects if number < self.effort.other_rounds else central
            turn = number % len(taking_part)
            for subject in taking_part[turn:] + taking_part[:turn]:
                self._run_one(subject, number)
        return {
            "model": self.made.name,
            "weight_bytes": self.weights,
            "bytes_per_token": bytes_per_token(self.made),
            "budget_bytes": self.budget,
            "divisor": self.divisor,
            "prompt_tokens": self.effort.prompt,
            "new_tokens": self.effort.tokens,
            "bandwidths": [b for r in self.records for b in r["bandwidths"]],
            "records": self.records,
        }

    def _prepare(self) -> None:
        arrays, layers = "accelerate_disk" in self.subjects, "airllm" in self.subjects
        self.made.scratch.mkdir(parents=True, exist_ok=True)
        outcome = run_child(
            partial(_make, self.made, arrays, layers), log=self.logs / f"{self.made.name}.prepare.jsonl", timeout=900
        )
        if outcome.status != "ok":
            raise NarrowboatError(f"cannot make the folders of {self.made.name}: {outcome.detail}")

    def _run_one(self, name: str, number: int) -> None:
        subject, effort = SUBJECTS[name], self.effort
        central = name == "resident" or subject.ours
        seconds, timeout = (_CENTRAL_TIMEOUT, _CENTRAL_TIMEOUT) if central else (effort.other_seconds, effort.timeout)
        bandwidths = [self._read()] if subject.ours else []
        self.made.drop_caches()
        group = self.limits.group(self.budget) if subject.limited else None
        body = partial(_run, name, self.made, self.budget, effort.prompt, effort.tokens, seconds)
        try:
            outcome = run_child(body, log=self.logs / f"generate.{name}.jsonl", timeout=timeout, group=group)
        finally:
            if group is not None:
                group.remove()
        if subject.ours:
            bandwidths.append(self._read())
        record = _record(name, number, outcome)
        record["bandwidths"] = bandwidths
        record["cgroup_limit"] = group.limit if group is not None else None
        self.records.append(record)
        self.say(_line(record))

    def _read(self) -> float:
        path = self.made.packed_file()
        outcome = run_child(partial(_bandwidth, path), log=self.logs / "generate.bandwidth.jsonl", timeout=60)
        found = outcome.event("bandwidth")
        if found is None:
            raise NarrowboatError(f"cannot measure the bandwidth of {path}: {outcome.detail}")
        return float(found["bytes_per_s"])


# Bodies of children take ``emit`` last, for functools.partial.
def _make(made: Folders, arrays: bool, layers: bool, emit: Emit) -> None:
    make_folders(made, arrays=arrays, layers=layers)


def _run(name: str, made: Folders, budget: int, prompt: int, tokens: int, seconds: float, emit: Emit) -> None:
    run_subject(emit, name, made, budget, prompt, tokens, seconds)


def _bandwidth(path: Path, emit: Emit) -> None:
    read_directly(emit, path)


def _record(name: str, number: int, outcome: Outcome) -> dict[str, Any]:
    told = [e for e in outcome.events if e["event"] == "token"]
    times = [e["seconds"] for e in told]
    each = [b - a for a, b in pairwise(times)]
    whole, end = outcome.event("tokens"), outcome.event("end")
    loaded = outcome.event("loaded")
    peaks = [e["peak"] for e in outcome.events if "peak" in e]
    return {
        "subject": name,
        "round": number,
        "status": outcome.status,
        "detail": outcome.detail,
        "loaded_s": loaded["seconds"] if loaded else None,
        "first_s": times[0] if times else None,
        "token_s": each,
        "steady_s": steady(each),
        # A child that was killed has told each token but its last.
        "ids": whole["ids"] if whole else [e["before"] for e in told if e["before"] is not None],
        "peak_bytes": max(peaks, default=None),
        "charged_peak_bytes": outcome.charged_peak,
        "stats": end["stats"] if end else {},
        "child_seconds": outcome.seconds,
    }


def _line(record: dict[str, Any]) -> str:
    steady_s, first_s, peak = record["steady_s"], record["first_s"], record["peak_bytes"]
    parts = [
        f"r{record['round']} {record['subject']:20s}",
        f"per token {format_seconds(steady_s) if steady_s else '-':>8s}",
        f"first {format_seconds(first_s) if first_s else '-':>7s}",
        f"{len(record['ids']):3d} tokens",
        f"peak {format_bytes(peak) if peak is not None else '-':>8s}",
        f"child {record['child_seconds']:4.1f} s",
    ]
    if record["bandwidths"]:
        parts.append("storage " + ", ".join(f"{b / 1e9:.2f}" for b in record["bandwidths"]) + " GB/s")
    if record["status"] != "ok":
        parts.append(f"[{record['status']}] {record['detail'][:120]}")
    return "  ".join(parts)
