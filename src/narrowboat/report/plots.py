"""The report's pictures, for notebooks: each takes a live object or what was loaded, and returns a matplotlib Figure.

    from narrowboat.report import plots

    plots.passes(nb.session(model))          # a Session
    plots.gantt(tasks.simulate(10))          # a Record
    plots.train_steps(step)                  # a TrainStep
    plots.passes("run.json")                 # a file that `narrowboat run --json` wrote

A source is one of the objects that a function names, a record from ``narrowboat.report.load``, or the name of a file
that one of narrowboat's commands wrote. Every function takes ``title`` and ``width`` (inches), and raises
``UsageError`` where the source is something else, holds nothing to draw, or matplotlib is not installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from narrowboat.errors import UsageError
from narrowboat.report.curves import latency_curve_of, time_curve_of
from narrowboat.report.draw.blocks import Bar, draw_blocks, draw_parts
from narrowboat.report.draw.curve import draw_cost
from narrowboat.report.draw.memory import draw_memory
from narrowboat.report.draw.passes import draw_passes
from narrowboat.report.draw.tasks import draw_gantt, draw_responses
from narrowboat.report.draw.theme import WIDE, new_figure, themed
from narrowboat.report.draw.timeline import draw_events
from narrowboat.report.draw.train import draw_train_steps
from narrowboat.report.records.model import Budgeted, GenerateRecord, ProfileRecord, RunRecord
from narrowboat.report.records.training import TrainPlanFacts, TrainRecord
from narrowboat.report.sources import is_a, need, record_of
from narrowboat.tasks.record import Record
from narrowboat.trace import Trace

__all__ = [
    "blocks",
    "budget",
    "gantt",
    "latency_curve",
    "memory",
    "passes",
    "responses",
    "tasks",
    "throughput_curve",
    "timeline",
    "train_curve",
    "train_steps",
]


def passes(source: Any, *, title: str = "", width: float = WIDE) -> Any:
    """Time of every pass, computing and waiting, and its prediction; in milliseconds.

    Args:
        source: a Session, a RunReport, a record of ``run``; or of ``generate``: there a pass is a token.
        title: above the picture.
        width: inches.
    """
    found = need(source, RunRecord, GenerateRecord, what="passes() takes a session or a record of run or generate")
    if isinstance(found, GenerateRecord):
        told, unit = [found.predicted_token_ms] if found.predicted_token_ms else [], "token"
        latency = found.pass_ms[1:] or found.token_ms
        stalls = found.stall_ms[1:] if found.pass_ms[1:] else [0.0] * len(latency)
    else:
        latency, stalls, unit = found.latency_ms, found.stall_ms, "pass"
        told = found.predicted_ms or [found.predicted_latency_ms]
    if not latency or len(latency) != len(stalls):
        raise UsageError("there is nothing to draw: no passes, or not as many waits as passes")
    return draw_passes(latency, stalls, told, unit=unit, title=title, width=width)


def blocks(source: Any, *, shown: int = 40, title: str = "", width: float = WIDE) -> Any:
    """Time of every block: predicted beside measured, or (of a profile) alone beside computing while storage is read.

    Args:
        source: a Session (its last pass), a RunReport, a MeasuredProfile, a record of ``run`` or ``profile``.
        shown: rows at most; of more blocks, those of one module are taken together.
        title: above the picture.
        width: inches.
    """
    found = need(source, RunRecord, ProfileRecord, what="blocks() takes a session, a profile, or a record of one")
    if isinstance(found, ProfileRecord):
        bars = [
            Bar(
                row.name,
                (row.compute_idle_ms, max(row.compute_busy_ms - row.compute_idle_ms, 0.0)),
                nbytes=row.bytes,
            )
            for row in found.blocks
        ]
        labels = ["computing", "more of it while storage is read"]
    else:
        bars = [
            Bar(
                row.name,
                (row.compute_ms or 0.0, row.stall_ms or 0.0),
                (row.predicted_compute_ms or 0.0) + (row.predicted_stall_ms or 0.0),
                row.bytes,
                row.resident,
            )
            for row in found.blocks
            if row.compute_ms is not None
        ]
        labels = ["computing, measured", "waiting, measured"]
    if not bars:
        raise UsageError("there is nothing to draw: this record has no times of blocks")
    return draw_blocks(bars, labels, title=title, width=width, shown=shown, predicted_label="both, predicted")


def budget(source: Any, *, title: str = "", width: float = WIDE) -> Any:
    """Where the budget goes, part by part, beside the measured peak where something ran; in MiB.

    Args:
        source: a Plan, a Session, a TrainPlan, a TrainStep, a record of ``run``, ``plan`` or ``train``.
        title: above the picture.
        width: inches.
    """
    if is_a(source, "train.plan:TrainPlan"):
        source = TrainPlanFacts.model_validate(source.as_dict())
    found = need(source, Budgeted, TrainRecord, TrainPlanFacts, what="budget() takes a plan, or what ran by one")
    if isinstance(found, Budgeted):
        peak = found.peak_bytes if isinstance(found, RunRecord) else None
        return draw_parts(found.parts, found.budget_bytes, peak=peak, title=title, width=width)
    peak = found.measured_peak_bytes if isinstance(found, TrainRecord) else None
    facts = found.plan if isinstance(found, TrainRecord) else found
    return draw_parts(list(facts.bytes.items()), found.budget_bytes, peak=peak, title=title, width=width)


def memory(source: Any, *, title: str = "", width: float = WIDE) -> Any:
    """Memory over time against the budget; in MiB and seconds.

    Args:
        source: MemorySamples, a RunReport or record of ``run`` (resident memory over the process baseline), or the
            Record of a run of tasks (what the executor counts).
        title: above the picture.
        width: inches.
    """
    if is_a(source, "report.memory_samples:MemorySamples"):
        if not source.points:
            raise UsageError("there is nothing to draw: no memory was sampled yet")
        return draw_memory(source.points, source.budgets, title=title, width=width)
    found = need(source, RunRecord, Record, what="memory() takes MemorySamples, a record of run, or one of tasks")
    if isinstance(found, RunRecord):
        if not found.memory:
            raise UsageError("there is nothing to draw: this record has no memory over time")
        line = [(0.0, found.budget_bytes)]
        return draw_memory(found.memory, line, peak=found.peak_bytes, title=title, width=width)
    return _task_memory(found, title=title, width=width)


def _task_memory(record: Record, **how: Any) -> Any:
    budgets = [stretch.setup["budget_bytes"] for stretch in record.stretches()]
    starts = [0.0, *(change.end / 1e6 for change in record.changes)]
    points = [(when / 1e6, held) for when, held in record.memory] or [(0.0, 0)]
    points.append((max(record.end / 1e6, points[-1][0]), points[-1][1]))
    return draw_memory(points, list(zip(starts, budgets, strict=True)), steps=True, **how)


def timeline(source: Any, *, since: float = float("-inf"), title: str = "", width: float = WIDE) -> Any:
    """What was read, computed and waited for, when; in milliseconds.

    Args:
        source: a Session, its ``trace()``, or a file of ``run --trace``.
        since: seconds on the ``time.perf_counter`` clock; what ended before is left out.
        title: above the picture.
        width: inches.
    """
    if is_a(source, "stream.session:Session"):
        source = source.trace()
    events = need(source, Trace, what="timeline() takes a session, its trace, or a file of run --trace").events(since)
    if not events:
        raise UsageError("there is nothing to draw: no pass has run since the given moment")
    return draw_events(events, max(since, min(event.start for event in events)), title=title, width=width)


def latency_curve(
    source: Any,
    *,
    measured: Sequence[tuple[int, float]] = (),
    target: float | None = None,
    title: str = "",
    width: float = WIDE,
) -> Any:
    """Predicted latency against budget, with the smallest budget, the knee, and what was measured; MiB and ms.

    Args:
        source: Plans of several budgets, smallest first; a MeasuredProfile; a record of ``plan --curve``,
            ``profile`` or ``bench``.
        measured: (bytes, seconds) to put on top.
        target: seconds; drawn as a line.
        title: above the picture.
        width: inches.
    """
    return draw_cost(latency_curve_of(record_of(source), measured, target), title=title, width=width)


def train_curve(source: Any, *, budget: int | None = None, title: str = "", width: float = WIDE) -> Any:
    """Predicted time of a training step over the plain one's, against the budget in MiB.

    Args:
        source: TimePoints, a TrainForecast, or a record of ``plan --train``.
        budget: bytes; drawn as a line where the picture has room for it.
        title: above the picture.
        width: inches.
    """
    return draw_cost(time_curve_of(record_of(source), budget, throughput=False), title=title, width=width)


def throughput_curve(source: Any, *, budget: int | None = None, title: str = "", width: float = WIDE) -> Any:
    """Predicted samples per second against the budget in MiB; as a share of the plain step's if seconds are unknown.

    Args:
        source: as for ``train_curve``.
        budget: bytes; drawn as a line.
        title: above the picture.
        width: inches.
    """
    return draw_cost(time_curve_of(record_of(source), budget, throughput=True), title=title, width=width)


def train_steps(source: Any, *, title: str = "", width: float = WIDE) -> Any:
    """Time and memory of every training step, measured beside predicted; seconds and MiB.

    Args:
        source: a TrainStep, its ``report()``, a TrainReport, or a record of ``train``.
        title: above the picture.
        width: inches.
    """
    found = need(source, TrainRecord, what="train_steps() takes a training step or a record of train")
    rows = found.history
    if not rows:
        raise UsageError("there is nothing to draw: this record has no steps")
    return draw_train_steps(
        [row.seconds for row in rows],
        [row.measured_peak for row in rows],
        [row.predicted_peak for row in rows],
        [row.budget for row in rows],
        predicted_seconds=found.plan.predicted_seconds,
        first=max(found.steps - len(rows), 0) + 1,
        title=title,
        width=width,
    )


def gantt(
    source: Any,
    *,
    start: float = 0.0,
    span: float = 2.0,
    tasks: Sequence[str] | None = None,
    title: str = "",
    width: float = WIDE,
    figure: Any = None,
) -> Any:
    """Which task loads and computes when, its releases, and the deadlines it missed; in milliseconds.

    Args:
        source: a Record of tasks, or a file of ``tasks run --trace``.
        start: seconds at which the picture begins.
        span: seconds of it.
        tasks: names, from top to bottom; all without it.
        title: above the picture.
        width: inches.
        figure: to draw in, a part of a larger one say.
    """
    record = _of_tasks(source, "gantt")
    begin, end = round(start * 1e6), round((start + span) * 1e6)
    if not any(part.end > begin and part.begin < end for part in record.segments):
        raise UsageError(
            f"nothing ran between {start:g} s and {start + span:g} s; the run took {record.end / 1e6:g} s"
        )
    names = list(record.tasks) if tasks is None else list(tasks)
    unknown = [name for name in names if name not in record.tasks]
    if unknown or not names:
        raise UsageError(f"there is no task {unknown[:1]}; there are {', '.join(record.tasks)}")
    return draw_gantt(record, begin, end, names, title=title, width=width, figure=figure)


def responses(source: Any, *, title: str = "", width: float = WIDE) -> Any:
    """Every response beside its bound and its deadline, as shares of the deadline.

    Args:
        source: a Record of tasks, or a file of ``tasks run --trace``.
        title: above the picture.
        width: inches.
    """
    return draw_responses(_of_tasks(source, "responses"), title=title, width=width)


def tasks(source: Any, *, start: float = 0.0, span: float = 2.0, title: str = "", width: float = 12.0) -> Any:
    """The Gantt chart, memory over time, and responses against bounds, above one another.

    Args:
        source: a Record of tasks, or a file of ``tasks run --trace``.
        start: of the Gantt chart, seconds.
        span: of the Gantt chart, seconds.
        title: above the picture.
        width: inches.
    """
    record = _of_tasks(source, "tasks")
    rows = len(record.tasks)
    heights = [1.5 + 0.5 * rows, 2.9, 1.35 + 0.36 * rows]
    with themed():
        whole = new_figure(width, sum(heights))
        above, middle, below = whole.subfigures(3, 1, height_ratios=heights)
        gantt(record, start=start, span=span, title=title, width=width, figure=above)
        _task_memory(record, width=width, figure=middle)
        draw_responses(record, width=width, figure=below)
    return whole


def _of_tasks(source: Any, name: str) -> Record:
    return need(source, Record, what=f"{name}() takes a record of tasks, or a file of tasks run --trace")
