"""One model's measurements: which child runs when, under which limit, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from inference_kit.children import Outcome, run_child
from inference_kit.effort import Effort
from inference_kit.materials import Material, make_files, material
from inference_kit.measure import (
    difference,
    find_baseline,
    find_minimum,
    kept_output,
    read_directly,
    run_subject,
    steady,
)
from inference_kit.subjects import SUBJECTS
from narrowboat.errors import NarrowboatError
from narrowboat.machine.cgroup import MemoryCgroup, writable_memory_cgroup
from narrowboat.machine.pagecache import cached_bytes
from narrowboat.quantities import format_bytes, format_seconds
from narrowboat.report.profile import measure_profile

_CENTRAL_TIMEOUT = 120.0  # of children without whom there is nothing to compare
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Limits:
    """How the limited children are limited.

    Attributes:
        charged: bytes a cgroup is charged for a warm process without a model.
        rss: resident memory of that process.
        slack: bytes given on top of charge and budget.
        refusal: why there are no cgroups; empty where there are.
    """

    charged: int
    rss: int
    slack: int
    refusal: str

    def group(self, budget: int) -> MemoryCgroup | None:
        """A cgroup for one child; None where none can be had."""
        return None if self.refusal else MemoryCgroup(self.charged + budget + self.slack)


@dataclass(frozen=True, slots=True)
class Budget:
    """One budget of one model.

    Attributes:
        label: its name in tables.
        nbytes: the budget.
        divisor: weights over budget that was asked for.
        smallest: what was asked for is infeasible, and this is the smallest feasible.
    """

    label: str
    nbytes: int
    divisor: float
    smallest: bool


def measure_limits(work: Path, slack: int) -> Limits:
    """Measure what a warm process holds; the larger of two."""
    refusal = writable_memory_cgroup() or ""
    charged = rss = 0
    for _ in range(2):
        group = None if refusal else MemoryCgroup(1 << 40)
        outcome = run_child(partial(_baseline, group), log=work / "logs" / "baseline.jsonl", timeout=60, group=group)
        if group is not None:
            group.remove()
        found = outcome.event("baseline")
        if found is None:
            raise NarrowboatError(f"the baseline child failed: {outcome.detail}")
        charged, rss = max(charged, found["charged"]), max(rss, found["rss"])
    return Limits(charged, rss, slack, refusal)


def _profile(files: Material, emit: Any) -> None:
    measure_profile(files.model, files.packed, files.model.example_inputs())


def _baseline(group: MemoryCgroup | None, emit: Any) -> None:
    find_baseline(emit, group)


class Campaign:
    """Measures one model; ``records`` has one entry per child."""

    def __init__(
        self,
        name: str,
        work: Path,
        subjects: list[str],
        divisors: list[float],
        effort: Effort,
        limits: Limits,
        say: Say,
    ) -> None:
        self.name = name
        self.work = work
        self.files: Material = material(name, work)
        self.subjects = subjects
        self.effort = effort
        self.limits = limits
        self.say = say
        self.records: list[dict[str, Any]] = []
        self.bandwidths: list[float] = []
        self._prepare()
        self.weight_bytes = self.files.weight_bytes
        self.minimum = self._find_minimum()
        self.budgets = self._choose_budgets(divisors)

    def add_budget(self, nbytes: int) -> None:
        """One more budget, in bytes, whether it is feasible or not."""
        self.budgets.append(Budget(format_bytes(nbytes), nbytes, self.weight_bytes / nbytes, False))

    def run(self) -> dict[str, Any]:
        """Every round, every budget, every subject once, each time in another order."""
        self.files.drop_caches()
        for round_number in range(self.effort.rounds):
            for number, budget in enumerate(self.budgets):
                subjects = [s for s in self.subjects if self._takes_part(s, round_number, number)]
                turn = (round_number + number) % len(subjects)
                for subject in subjects[turn:] + subjects[:turn]:
                    self._run_one(subject, budget, round_number)
                self._read_once()
        return {
            "model": self.name,
            "description": self.files.model.description,
            "weight_bytes": self.weight_bytes,
            "min_budget_bytes": self.minimum,
            "bandwidths": self.bandwidths,
            "budgets": [
                {"label": b.label, "bytes": b.nbytes, "divisor": b.divisor, "smallest": b.smallest}
                for b in self.budgets
            ],
            "records": self.records,
        }

    def _takes_part(self, subject: str, round_number: int, budget_number: int) -> bool:
        if subject in ("resident", "narrowboat"):
            return True
        if SUBJECTS[subject].one_budget and budget_number:
            return False
        return round_number < self.effort.other_rounds

    def _log(self, kind: str) -> Path:
        return self.work / "logs" / f"{self.name}.{kind}.jsonl"

    def _output(self, name: str) -> Path:
        return kept_output(self.files, name)

    def _prepare(self) -> None:
        body = partial(_make_files, self.files, "torch_mmap" in self.subjects, "diffusers" in self.subjects)
        outcome = run_child(body, log=self._log("prepare"), timeout=900)
        if outcome.status != "ok":
            raise NarrowboatError(f"cannot make the files of {self.name}: {outcome.detail}")
        # What a user does once for a model on a machine, like packing.
        outcome = run_child(partial(_profile, self.files), log=self._log("profile"), timeout=300)
        if outcome.status != "ok":
            raise NarrowboatError(f"cannot profile {self.name}: {outcome.detail}")

    def _find_minimum(self) -> int:
        outcome = run_child(partial(_minimum, self.files), log=self._log("minimum"), timeout=120)
        found = outcome.event("minimum")
        if found is None:
            raise NarrowboatError(f"cannot find the smallest budget of {self.name}: {outcome.detail}")
        return int(found["bytes"])

    def _choose_budgets(self, divisors: list[float]) -> list[Budget]:
        budgets: list[Budget] = []
        for divisor in divisors:
            wanted = int(self.weight_bytes / divisor)
            smallest = wanted < self.minimum
            # One more page than the minimum: the minimum is told by a process that differs in a few bytes.
            nbytes = self.minimum + 4096 if smallest else wanted
            label = "1.0 x" if divisor == 1 else f"1/{divisor:g}"
            if smallest:
                label = "smallest"
                self.say(
                    f"{self.name}: 1/{divisor:g} is {format_bytes(wanted)}, infeasible; "
                    f"at the smallest feasible, {format_bytes(nbytes)}, instead"
                )
            if all(nbytes != b.nbytes for b in budgets):
                budgets.append(Budget(label, nbytes, divisor, smallest))
        return budgets

    def _run_one(self, name: str, budget: Budget, round_number: int) -> None:
        subject = SUBJECTS[name]
        effort = self.effort
        central = name == "resident" or subject.ours
        seconds = effort.seconds if central else effort.other_seconds
        timeout = _CENTRAL_TIMEOUT if central else effort.timeout
        self._output(name).unlink(missing_ok=True)
        self.files.drop_caches()
        path = subject.reads(self.files)
        before = cached_bytes(path)
        group = self.limits.group(budget.nbytes) if subject.limited else None
        body = partial(_run, name, self.files, budget.nbytes, effort.passes, seconds)
        try:
            outcome = run_child(body, log=self._log(name), timeout=timeout, group=group)
            growth = cached_bytes(path) - before
        finally:
            if group is not None:
                group.remove()
        record = self._record(name, budget, round_number, outcome)
        record["page_cache_growth"] = growth
        record["cgroup_limit"] = group.limit if group is not None else None
        self.records.append(record)
        self.say(_line(self.name, record))

    def _record(self, name: str, budget: Budget, round_number: int, outcome: Outcome) -> dict[str, Any]:
        first, end = outcome.event("first"), outcome.event("end")
        passes = [e["seconds"] for e in outcome.events if e["event"] == "pass"]
        peaks = [e["peak"] for e in outcome.events if "peak" in e]
        return {
            "model": self.name,
            "budget": budget.label,
            "budget_bytes": budget.nbytes,
            "round": round_number,
            "subject": name,
            "status": outcome.status,
            "detail": outcome.detail,
            "first_s": first["seconds"] if first else None,
            "pass_s": passes,
            "steady_s": steady(passes),
            "peak_bytes": end["peak"] if end else max(peaks, default=None),
            "charged_peak_bytes": outcome.charged_peak,
            "outputs": [e["digest"] for e in outcome.events if e["event"] == "output"],
            "difference": difference(self._output(name), self.files.reference)
            if name != "resident" and first
            else None,
            "stats": end["stats"] if end else {},
            "child_seconds": outcome.seconds,
        }

    def _read_once(self) -> None:
        outcome = run_child(partial(_read, self.files.packed), log=self._log("bandwidth"), timeout=60)
        found = outcome.event("bandwidth")
        if found is None:
            raise NarrowboatError(f"cannot measure the bandwidth of {self.files.packed}: {outcome.detail}")
        self.bandwidths.append(found["bytes_per_s"])


# Bodies of children take ``emit`` last, for functools.partial.
def _make_files(files: Material, pth: bool, groups: bool, emit: Any) -> None:
    make_files(files, pth=pth, groups=groups)


def _minimum(files: Material, emit: Any) -> None:
    find_minimum(emit, files)


def _run(name: str, files: Material, budget: int, passes: int, seconds: float, emit: Any) -> None:
    run_subject(emit, name, files, budget, passes, seconds)


def _read(path: Path, emit: Any) -> None:
    read_directly(emit, path)


def _line(model: str, record: dict[str, Any]) -> str:
    steady_s = record["steady_s"]
    parts = [
        f"{model:10s} {record['budget']:9s} r{record['round']} {record['subject']:20s}",
        f"steady {format_seconds(steady_s) if steady_s else '-':>8s}",
        f"first {format_seconds(record['first_s']) if record['first_s'] else '-':>7s}",
        f"peak {format_bytes(record['peak_bytes']) if record['peak_bytes'] is not None else '-':>8s}",
        f"child {record['child_seconds']:4.1f} s",
    ]
    if record["status"] != "ok":
        parts.append(f"[{record['status']}] {len(record['pass_s'])} passes; {record['detail'][:90]}")
    return "  ".join(parts)
