"""One model's measurements: what is planned from what was found, which child runs when, and what is recorded."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from inference_kit.children import Outcome, run_child
from narrowboat.errors import NarrowboatError
from narrowboat.quantities import format_bytes
from training_kit.child import Order, check, minimum, timed
from training_kit.frontier import sameness
from training_kit.subjects import SUBJECTS, TECHNIQUES, Setting

PAGE = 4096
ABLATED_AT = 0.25  # of the plain step's activations


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says.

    Attributes:
        subjects: who takes part; plain always does.
        shares: budgets, as shares of the plain step's activations.
        ratios: of torch.compile's budget.
        splits: the batch over the static micro-batches.
        rounds: timed children of every setting.
        steps: timed steps of every child.
        settling: steps between the first and the timed ones.
        threads: of PyTorch.
        timeout: seconds of one child.
        ablation: measure narrowboat without each technique, and with each alone.
        work: folder for logs, gradients and caches.
    """

    subjects: tuple[str, ...]
    shares: tuple[float, ...]
    ratios: tuple[float, ...]
    splits: tuple[int, ...]
    rounds: int
    steps: int
    settling: int
    threads: int
    timeout: float
    ablation: bool
    work: Path


class Campaign:
    """Measures one model; :meth:`run` returns what is written to JSON."""

    def __init__(self, model: str, batch: int, options: Options, say: Callable[[str], None]) -> None:
        self.model, self.batch, self.options, self.say = model, batch, options, say
        self.plain: dict[str, Any] = {}
        self._sums: dict[str, dict[str, Any]] = {}  # what float64 told, of each setting that it was asked for

    def run(self) -> dict[str, Any]:
        """Check every setting once, then time in rounds those that work."""
        try:
            self.plain = self._check(Setting("plain"))
            if self.plain["status"] != "ok":
                raise NarrowboatError(f"the plain step of {self.model} fails: {self.plain['detail']}")
            records = [self.plain, *map(self._check, self._baselines())]
            smallest = self._minimum(Setting("narrowboat")) if "narrowboat" in self.options.subjects else {}
            records += map(self._check, self._ours(records, smallest.get("bytes")))
            self._time(records)
            ablation = self._ablation() if self.options.ablation else []
        finally:
            for folder in self.options.work.glob(f"{self.model}-gradients-*"):
                shutil.rmtree(folder)
        return {
            "model": self.model,
            "batch": self.batch,
            "static": self.plain["static"],
            "activations": self.plain["tensor_activations"],
            "minimum": smallest,
            "records": records,
            "ablation": ablation,
        }

    def budget_at(self, share: float) -> int:
        """Static bytes, and that share of the plain step's activations."""
        return sum(self.plain["static"].values()) + int(share * self.plain["tensor_activations"])

    def _baselines(self) -> list[Setting]:
        micros = sorted({max(1, self.batch // split) for split in self.options.splits}, reverse=True)
        settings = [Setting("recompute"), Setting("save_on_cpu")]
        settings += [Setting(subject, micro=micro) for subject in ("accumulate", "both") for micro in micros]
        settings += [Setting("compile", ratio=ratio) for ratio in self.options.ratios]
        settings += self._at_budgets("finder")
        return [setting for setting in settings if setting.subject in self.options.subjects]

    def _at_budgets(self, subject: str) -> list[Setting]:
        return [
            Setting(subject, budget=self.budget_at(share), asked=f"{share:.0%} of activations")
            for share in self.options.shares
        ]

    def _ours(self, records: list[dict[str, Any]], smallest: int | None) -> list[Setting]:
        """Narrowboat at every budget, at the smallest, and at the peak of each exact static setting."""
        settings: list[Setting] = []
        for subject in (name for name, s in SUBJECTS.items() if s.ours and name in self.options.subjects):
            settings += self._at_budgets(subject)
            if smallest is not None:
                # One more page: the minimum is told by a process that differs in a few bytes.
                settings.append(Setting(subject, budget=smallest + PAGE, asked="minimum"))
        if "narrowboat" in self.options.subjects:
            half = self.plain["tensor_half"]
            settings.append(Setting("narrowboat", budget=half, asked="half of activations at every moment"))
            settings += [
                Setting("narrowboat", budget=record["allocator_peak"], asked=f"peak of {record['key']}")
                for record in records
                if SUBJECTS[record["subject"]].static and record["sameness"] in ("bits", "rounding")
            ]
        return list({setting.key: setting for setting in reversed(settings)}.values())[::-1]

    def _order(self, setting: Setting, exact: bool = False) -> Order:
        return Order(self.model, self.batch, setting, self.options.threads, self.options.work, exact)

    def _run(self, kind: str, body: Callable[..., None], setting: Setting) -> Outcome:
        log = self.options.work / "logs" / f"{self.model}.{setting.key}.{kind}.jsonl"
        return run_child(body, log=log, timeout=self.options.timeout)

    def _check(self, setting: Setting) -> dict[str, Any]:
        """Peaks and gradients of one setting."""
        outcome = self._run("check", partial(check, self._order(setting)), setting)
        record = new_record(setting, outcome)
        if setting.subject == "plain":
            record["sameness"] = "bits"
        elif outcome.event("exact") is not None:
            record["sameness"] = sameness(record, self.plain)
            if record["sameness"] != "bits":
                # Other bits may still be the same sum in another order.
                plain, found = self._in_float64(Setting("plain")), self._in_float64(setting)
                record |= {"sameness": sameness(found, plain), "difference": found["difference"]}
        self.say(
            f"{self.model:12s} check {setting.key:34s} {record['status']:8s} "
            f"peak {told_bytes(record.get('allocator_peak'))} gradients {record['sameness']} {record['detail'][:100]}"
        )
        return record

    def _in_float64(self, setting: Setting) -> dict[str, Any]:
        """The gradients in float64 without dropout, at twice the budget; once for each kind of sum."""
        # A ratio moves what is recomputed and not the sum, and compiling once more takes minutes.
        key = replace(setting, ratio=None).key
        if key not in self._sums:
            if setting.budget is not None:
                setting = replace(setting, budget=2 * setting.budget)
            outcome = self._run("float64", partial(check, self._order(setting, exact=True)), setting)
            self._sums[key] = new_record(setting, outcome)
        return self._sums[key]

    def _minimum(self, setting: Setting) -> dict[str, Any]:
        setting = replace(setting, budget=1)
        outcome = self._run("minimum", partial(minimum, self._order(setting)), setting)
        found = outcome.event("minimum") or {}
        self.say(f"{self.model:12s} minimum {told_bytes(found.get('bytes'))} {outcome.detail[:120]}")
        return {key: found[key] for key in ("bytes", "limiter") if key in found}

    def _time(self, records: list[dict[str, Any]]) -> None:
        """In rounds, each in another order, so that a slow minute of the machine falls on all."""
        working = [record for record in records if record["status"] == "ok"]
        for number in range(self.options.rounds):
            turn = number * len(working) // max(self.options.rounds, 1)
            for record in working[turn:] + working[:turn]:
                self._time_one(record)
        for record in working:
            conclude(record, self.batch)

    def _time_one(self, record: dict[str, Any]) -> None:
        if record["status"] != "ok":
            return
        setting = setting_of(record)
        body = partial(timed, self._order(setting), self.options.steps, self.options.settling)
        outcome = self._run("timed", body, setting)
        seconds = [e["seconds"] for e in outcome.events if e["event"] == "step"]
        if outcome.status != "ok" or not seconds:
            record["status"], record["detail"] = outcome.status, f"timed: {outcome.detail}"
        else:
            first, end = outcome.event("first") or {}, outcome.event("end") or {}
            record["told"] = end["told"]
            cpu = [e["cpu"] for e in outcome.events if e["event"] == "step"]
            record["rounds"].append(
                {
                    "seconds": statistics.median(seconds),
                    "cpu": statistics.median(cpu),
                    "first": first["seconds"],
                    "prepare": first["prepare"],
                    "first_rss_peak": first["rss_peak"],
                    "rss_peak": end["rss_peak"],
                }
            )
        median = f"{statistics.median(seconds):6.2f} s/step" if seconds else "-"
        self.say(f"{self.model:12s} timed {setting.key:34s} {median} {outcome.detail[:100]}")

    def _ablation(self) -> list[dict[str, Any]]:
        """Narrowboat without each technique and with each alone: smallest budget, and speed at one in between."""
        everything = Setting("narrowboat_spill", budget=self.budget_at(ABLATED_AT))
        variants: list[tuple[str, tuple[str, ...] | None]] = [("all", None)]
        variants += [(f"without {name}", tuple(t for t in TECHNIQUES if t != name)) for name in TECHNIQUES]
        variants += [(f"only {name}", (name,)) for name in TECHNIQUES]
        records = []
        for label, techniques in variants:
            setting = replace(everything, techniques=techniques, asked=label)
            smallest = self._minimum(setting)
            record = self._check(setting)
            record["minimum"] = smallest.get("bytes", record.get("minimum"))
            self._time_one(record)
            conclude(record, self.batch)
            records.append(record)
        return records


def told_bytes(nbytes: int | None) -> str:
    """For tables: a dash where there is nothing."""
    return "-" if nbytes is None else format_bytes(nbytes)


def new_record(setting: Setting, outcome: Outcome) -> dict[str, Any]:
    """What a checking child told, flat."""
    exact = outcome.event("exact") or {}
    storages, allocator = outcome.event("storages") or {}, outcome.event("allocator") or {}
    error = outcome.event("error") or {}
    static = {key: value for key, value in (outcome.event("static") or {}).items() if key != "event"}
    refused = error.get("minimum") is not None
    return {
        "subject": setting.subject,
        "key": setting.key,
        "label": setting.label,
        "micro": setting.micro,
        "ratio": setting.ratio,
        "budget": setting.budget,
        "asked": setting.asked,
        "techniques": setting.techniques,
        "status": "refused" if refused else outcome.status,
        "detail": outcome.detail,
        "minimum": error.get("minimum"),
        "gradients": exact.get("gradients"),
        "parameters": exact.get("parameters"),
        "buffers": exact.get("buffers"),
        "random": exact.get("random"),
        "difference": exact.get("difference"),
        "sameness": "unknown",
        "static": static,
        "tensor_peak": storages.get("peak"),
        "tensor_activations": storages.get("activations"),
        "tensor_half": storages.get("half"),
        "tensor_first_peak": storages.get("first"),
        "allocator_peak": allocator.get("peak"),
        "allocator_activations": allocator.get("activations"),
        "told": {key: value for key, value in (outcome.event("told") or {}).items() if key != "event"},
        "rounds": [],
    }


def setting_of(record: dict[str, Any]) -> Setting:
    """The setting a record is of."""
    techniques = record["techniques"]
    return Setting(
        record["subject"],
        micro=record["micro"],
        ratio=record["ratio"],
        budget=record["budget"],
        asked=record["asked"],
        techniques=None if techniques is None else tuple(techniques),
    )


def conclude(record: dict[str, Any], batch: int) -> None:
    """Medians over the rounds, and the rate in samples per second."""
    rounds = record["rounds"]
    if not rounds:
        return
    for key in ("seconds", "cpu", "first", "prepare"):
        record[key] = statistics.median(r[key] for r in rounds)
    for key in ("rss_peak", "first_rss_peak"):
        record[key] = max(r[key] for r in rounds)
    record["rate"] = batch / record["seconds"]
