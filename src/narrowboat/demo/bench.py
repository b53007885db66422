"""One model at several budgets beside the plain resident model, in child processes, in interleaved rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from narrowboat.demo.child import Outcome, Task, run_child
from narrowboat.errors import BudgetError, ModelError


@dataclass
class Row:
    """One budget (or the plain resident model) over all rounds; times in milliseconds, sizes in bytes.

    Attributes:
        subject: ``"narrowboat"`` or ``"plain"``.
        budget_bytes: None for plain.
        outcomes: one per round.
        refused: why narrowboat refused the budget; empty if it did not.
        minimum: the smallest feasible budget, if it was refused.
    """

    subject: str
    budget_bytes: int | None
    outcomes: list[Outcome] = field(default_factory=list)
    refused: str = ""
    minimum: int | None = None

    @property
    def latency_ms(self) -> float | None:
        """Median over the rounds of each round's steady median."""
        return _median([outcome.steady_ms for outcome in self.outcomes])

    @property
    def first_answer_ms(self) -> float | None:
        """Median over the rounds."""
        return _median([outcome.first_answer_ms for outcome in self.outcomes])

    @property
    def bytes_read(self) -> float | None:
        """Median per steady pass."""
        return _median([outcome.steady_read for outcome in self.outcomes])

    @property
    def peak_bytes(self) -> int | None:
        """The most of any round, over the process baseline."""
        return max((outcome.peak_bytes for outcome in self.outcomes if outcome.peak_bytes is not None), default=None)

    @property
    def predicted_ms(self) -> float | None:
        """Median of what the plans predicted; None for plain."""
        return _median([outcome.details.get("predicted_latency_ms") for outcome in self.outcomes])

    @property
    def digests(self) -> set[str]:
        """Digests of the outputs of all rounds."""
        return {digest for outcome in self.outcomes for digest in outcome.digests}


@dataclass(frozen=True)
class BenchReport:
    """All rows, the plain resident model first."""

    rows: list[Row]

    @property
    def plain(self) -> Row:
        """The plain resident model."""
        return self.rows[0]

    def ratio(self, row: Row) -> float | None:
        """Latency over the plain resident model's; None if either is unknown."""
        if row.latency_ms is None or not self.plain.latency_ms:
            return None
        return row.latency_ms / self.plain.latency_ms

    def exact(self, row: Row) -> bool | None:
        """Whether every output is plain PyTorch's, bit by bit; None without outputs."""
        return row.digests == self.plain.digests if row.digests else None

    def to_json(self) -> list[dict[str, object]]:
        """One object per row."""
        return [
            {
                "subject": row.subject,
                "budget_bytes": row.budget_bytes,
                "latency_ms": row.latency_ms,
                "ratio": self.ratio(row),
                "predicted_latency_ms": row.predicted_ms,
                "first_answer_ms": row.first_answer_ms,
                "bytes_read": row.bytes_read,
                "peak_bytes": row.peak_bytes,
                "bit_identical": self.exact(row),
                "rounds": [outcome.latency_ms for outcome in row.outcomes],
                "refused": row.refused or None,
                "min_budget_bytes": row.minimum,
            }
            for row in self.rows
        ]


def bench(
    model: str,
    weights: Path,
    budgets: Sequence[int],
    *,
    input: Path | None = None,
    passes: int = 6,
    rounds: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> BenchReport:
    """Measure ``model`` at each budget and as plain PyTorch.

    Every measurement is a process of its own that starts with the weights out of the page cache. A round runs them
    all one after the other, so that a machine that grows slower is unfair to nobody.

    Args:
        model: ``package.module:factory``.
        weights: the weights file.
        budgets: bytes.
        input: an image or array; None for the model's example.
        passes: per process.
        rounds: how often everything is run.
        progress: called with (processes done, processes in all).

    Raises:
        ModelError: the plain model cannot be run.
        NarrowboatError: narrowboat failed; a refused budget is no failure but a row that says so.
    """
    rows = [Row("plain", None), *(Row("narrowboat", budget) for budget in budgets)]
    for number in range(rounds):
        for place, row in enumerate(rows):
            if not row.refused:
                _measure(row, Task(row.subject, model, weights, passes=passes, budget=row.budget_bytes, input=input))
            progress(number * len(rows) + place + 1, rounds * len(rows))
    return BenchReport(rows)


def _measure(row: Row, task: Task) -> None:
    try:
        outcome = run_child(task)
    except BudgetError as error:
        row.refused, row.minimum = str(error), error.minimum
        return
    if outcome.failure:
        raise ModelError(f"the plain model cannot be measured: {outcome.failure}")
    row.outcomes.append(outcome)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
