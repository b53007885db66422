"""Runs and simulations of tasks, and what admission says of them."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from functools import partial

from narrowboat.quantities import format_bytes, format_seconds
from narrowboat.report import plots
from narrowboat.report.draw.tasks import missed
from narrowboat.report.records.find import Loaded
from narrowboat.report.records.others import SummaryRecord, TaskAnswer, VerdictRecord
from narrowboat.report.sections.section import BAD, GOOD, NOTE, Section, Table, begin, budget_finding, size
from narrowboat.tasks.conform import Conformance, conform
from narrowboat.tasks.record import JobRecord, Record
from narrowboat.tasks.summary import Summary, summarise

_SPAN = 2.0  # seconds of a Gantt chart
_CAUSES = 4
_TASKS = 24  # rows of a Gantt chart
_LISTED = 40  # misses


def record_section(loaded: Loaded) -> Section:
    """``narrowboat tasks run|simulate --trace``, and the trace of ``narrowboat serve``."""
    record: Record = loaded.value
    told, checked = summarise(record), conform(record)
    simulated = not record.premises
    section = begin(loaded, f"{len(told.tasks)} tasks, {'simulated' if simulated else 'run'}")
    late = [job for job in record.jobs if missed(job.outcome, job.due, record.end)]
    _missed_findings(section, record, told, late)
    over = sum(1 for task in told.tasks if task.bound and task.worst and task.worst > task.bound)
    if over:
        section.notice(BAD, f"{over} task{'s' * (over > 1)} took longer than the bound of the analysis.")
    elif any(task.bound and task.worst for task in told.tasks):
        nearest = max((t for t in told.tasks if t.bound and t.worst), key=lambda t: (t.worst or 0) / (t.bound or 1))
        share = (nearest.worst or 0) / (nearest.bound or 1)
        section.notice(GOOD, f"Every response stayed within its bound; {nearest.name} came nearest, at {share:.0%}.")
    budget_finding(section, told.peak_bytes, told.budget_bytes)
    section.notice(GOOD if checked.valid else BAD if checked.admitted else NOTE, f"The guarantee: {checked.wording}.")
    if record.segments:
        start = _busiest(record, late)
        names = _shown(record, start)
        part = f" {len(names)} of {len(told.tasks)} tasks." if len(names) < len(told.tasks) else ""
        section.picture(
            "gantt",
            "Who loads and computes when",
            f"One row of bars per task, from {start:g} s on for {_SPAN:g} s.",
            f"{'Around the first missed deadline.' if late else 'The beginning of the record.'}{part}",
            partial(_gantt, record, start, names),
        )
    if record.responses():
        section.picture(
            "responses",
            "Responses against bounds and deadlines",
            "One row per task: a tick for each job, a thick line for its bound, a dashed one for its deadline.",
            "A tick right of the thick line disproves the analysis; right of the dashed one, a deadline passed.",
            lambda width: plots.responses(record, title="Responses, as shares of the deadline", width=width),
        )
    if record.memory:
        section.picture(
            "memory",
            "Memory over time against the budget",
            f"Steps below the dashed budget of {format_bytes(told.budget_bytes)}; at most {size(told.peak_bytes)}.",
            "As the record counts it: what tasks keep, and what they bring in to run.",
            lambda width: plots.memory(record, title="Memory of the tasks", width=width),
        )
    section.tables += _tables(told, checked, late)
    section.facts |= {
        "time": format_seconds(told.seconds),
        "policy": f"{record.setup.get('policy')}, {record.setup.get('preemption')}",
        "budget": format_bytes(told.budget_bytes),
        "admitted": "yes" if checked.admitted else "no",
        "engines": f"computing {told.compute_share:.0%}, loading {told.load_share:.0%} of the time",
    }
    if record.changes:
        section.facts["changed while it ran"] = f"{len(record.changes)} times"
    return section


def _missed_findings(section: Section, record: Record, told: Summary, late: list[JobRecord]) -> None:
    jobs = sum(task.jobs for task in told.tasks)
    promised = {task.name for task in told.tasks if task.guaranteed}
    if not jobs:
        section.notice(NOTE, "No job was released.")
    elif not late:
        section.notice(GOOD, f"None of {jobs} jobs missed its deadline.")
    if late:
        causes = Counter(_cause(job) for job in late)
        said = "; ".join(f"{count} times {cause}" for cause, count in causes.most_common(_CAUSES))
        tone = BAD if told.missed else NOTE
        section.notice(tone, f"{len(late)} of {jobs} jobs missed their deadline: {said}.")
        of_promised = sum(job.task in promised for job in late)
        if not told.missed:
            why = "was promised nothing" if not of_promised else "came beyond its contract, or was given up"
            section.notice(GOOD, f"No promise was broken: each of them {why}.")
        else:
            section.notice(BAD, f"{told.missed} of them were promised to be in time.")


def _cause(job: JobRecord) -> str:
    told = job.cause.partition(":")[0] or {
        "late": "ended late, for no cause that was recorded",
        "unfinished": "not ended when the run was",
    }.get(job.outcome, job.outcome)
    return told[:120]


def _busiest(record: Record, late: list[JobRecord]) -> float:
    """Where the Gantt chart begins: before the first miss, if there is one, and where something runs."""
    begins = sorted(part.begin for part in record.segments)
    wanted = max(min(job.release for job in late) - 2e5, 0) if late else begins[0]
    place = min(bisect_left(begins, int(wanted)), len(begins) - 1)
    return round(min(int(wanted) if begins[place] - wanted < _SPAN * 5e5 else begins[place], record.end) / 1e6, 3)


def _shown(record: Record, start: float) -> list[str]:
    """Tasks of the picture: all, or of many those that run in it."""
    if len(record.tasks) <= _TASKS:
        return list(record.tasks)
    begin, end = start * 1e6, (start + _SPAN) * 1e6
    seen = {part.task for part in record.segments if part.end > begin and part.begin < end}
    return [name for name in record.tasks if name in seen][:_TASKS]


def _gantt(record: Record, start: float, names: list[str], width: float) -> object:
    span = max(min(_SPAN, record.end / 1e6 - start), 1e-6)
    return plots.gantt(record, start=start, span=span, tasks=names, title="Loads and computing", width=width)


def _tables(told: Summary, checked: Conformance, late: list[JobRecord]) -> list[Table]:
    columns = ["task", "jobs", "missed", "median", "worst", "bound", "deadline", "worst/bound", "preempted", "causes"]
    rows = [
        (
            t.name,
            str(t.jobs),
            str(t.late),
            _us(t.median),
            _us(t.worst),
            _us(t.bound),
            _us(t.deadline),
            f"{t.worst / t.bound:.2f}" if t.bound and t.worst is not None else "",
            str(t.preemptions),
            "; ".join(f"{count} {cause[:80]}" for cause, count in sorted(t.causes.items())[:_CAUSES]),
        )
        for t in told.tasks
    ]
    tables = [Table("Responses by task", columns, rows, frozenset({0, 9}))]
    if late:
        first = sorted(late, key=lambda job: job.due)[:_LISTED]
        tables.append(
            Table(
                f"Missed deadlines, the first {len(first)} of {len(late)}",
                ["task", "job", "released", "due", "ended", "outcome", "cause"],
                [
                    (j.task, str(j.number), _us(j.release), _us(j.due), _us(j.finish), j.outcome, j.cause[:160])
                    for j in first
                ],
                frozenset({0, 5, 6}),
            )
        )
    tables.append(
        Table(
            "Premises of the analysis",
            ["premise", "", "checked", "what was seen"],
            [(p.name, "holds" if p.holds else "BROKEN", str(p.checked), p.said[:400]) for p in checked.premises],
            frozenset({0, 1, 3}),
        )
    )
    return tables


def verdict_section(loaded: Loaded) -> Section:
    """``narrowboat tasks check --json``."""
    told: VerdictRecord = loaded.value
    section = begin(loaded, f"Admission of {len(told.tasks)} tasks")
    answer = "Admitted: every promised deadline holds." if told.admitted else "Refused."
    section.notice(GOOD if told.admitted else BAD, answer)
    for reason in told.reasons:
        section.notice(BAD, f"{reason[:1].upper()}{reason[1:]}.")
    for said in told.suggestions:
        section.notice(NOTE, f"Would help: {said}.")
    needed = told.memory.needed_bytes
    if needed is not None:
        tone = GOOD if needed <= told.memory.budget_bytes else BAD
        section.notice(tone, f"{format_bytes(needed)} of {format_bytes(told.memory.budget_bytes)} are needed.")
    if told.overrun_tolerance_us is not None:
        section.notice(NOTE, f"{_us(told.overrun_tolerance_us)} of work more than assumed are tolerated.")
    columns = ["task", "holds", "bound", "deadline", "cost", "core", "resident", "running"]
    section.tables.append(Table("Tasks", columns, [_verdict_row(task) for task in told.tasks], frozenset({0, 1})))
    section.facts["policy"] = told.policy
    return section


def _verdict_row(task: TaskAnswer) -> tuple[str, ...]:
    best_effort = task.guarantee == "best-effort"
    return (
        task.name,
        "best effort" if best_effort else "yes" if task.admitted else "NO",
        "" if best_effort else _us(task.response_bound_us),
        _us(task.deadline_us),
        _us(task.cost_us),
        "" if task.utilisation is None else f"{task.utilisation:.1%}",
        size(task.pinned_bytes),
        size(task.running_bytes),
    )


def summary_section(loaded: Loaded) -> Section:
    """``narrowboat tasks run|simulate --json``: the figures without the jobs."""
    told: SummaryRecord = loaded.value
    section = begin(loaded, f"{len(told.tasks)} tasks in figures")
    text = f"{told.missed} promised deadlines were missed." if told.missed else "No promised deadline was missed."
    section.notice(BAD if told.missed else GOOD, text)
    if told.memory.peak_bytes is not None:
        budget_finding(section, told.memory.peak_bytes, told.memory.budget_bytes)
    section.notice(NOTE, "There is more to see in the trace of the same run: give --trace FILE.json to it.")
    columns = ["task", "jobs", "missed", "median", "worst", "bound", "deadline", "causes"]
    rows = [
        (
            task.name,
            _number(task.jobs),
            _number(task.late),
            _us(task.median_response_us),
            _us(task.worst_response_us),
            _us(task.response_bound_us),
            _us(task.deadline_us),
            "; ".join(f"{count} {cause[:80]}" for cause, count in sorted(task.causes.items())[:_CAUSES]),
        )
        for task in told.tasks
    ]
    section.tables.append(Table("Responses by task", columns, rows, frozenset({0, 7})))
    section.facts["time"] = format_seconds(told.seconds)
    return section


def _us(time: int | None) -> str:
    return "" if time is None else format_seconds(time / 1e6)


def _number(count: int | None) -> str:
    return "" if count is None else str(count)
