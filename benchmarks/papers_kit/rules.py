"""RT-Swap's published rules, looked for in the record of a run: pure functions over what happened and when."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from narrowboat.tasks.record import JobRecord, Record, Segment

SLACK = 2_000  # microseconds between a decision and its beginning, in which releases are not yet seen


def swaps(record: Record) -> list[Segment]:
    """Everything that moved by volume, in order."""
    found = [part for part in record.segments if part.what in ("swap_in", "swap_out")]
    return sorted(found, key=lambda part: part.begin)


def runs(record: Record) -> list[Segment]:
    """Every job's computing, in order."""
    return sorted((part for part in record.segments if part.what == "run"), key=lambda part: part.begin)


def one_at_a_time(parts: Sequence[Segment]) -> bool:
    """No two of them overlap."""
    return all(a.end <= b.begin for a, b in itertools.pairwise(parts))


def overlapped(record: Record) -> int:
    """Microseconds of swapping beside another task's computing."""
    return sum(
        max(min(swap.end, run.end) - max(swap.begin, run.begin), 0)
        for swap in swaps(record)
        for run in runs(record)
        if swap.task != run.task
    )


def in_order(record: Record) -> tuple[int, int, int]:
    """Of all runs, how many were the earliest deadline's, how many those of a swap-in just ended, how many neither."""
    jobs = {(job.task, job.number): job for job in record.jobs}
    earliest = forced = neither = 0
    last_run = -1
    for run in runs(record):
        ended = [s for s in swaps(record) if s.what == "swap_in" and last_run <= s.end <= run.begin]
        job = jobs[run.task, run.job]
        if all(_order(job) <= _order(other) for other in _waiting(record, run)):
            earliest += 1
        elif any(swap.task == run.task for swap in ended):
            forced += 1
        else:
            neither += 1
        last_run = run.begin
    return earliest, forced, neither


def _order(job: JobRecord) -> tuple[int, int]:
    return job.due, job.release


def _waiting(record: Record, run: Segment) -> list[JobRecord]:
    return [
        job
        for job in record.jobs
        if job.release <= run.begin - SLACK and (job.finish is None or job.finish > run.begin)
    ]


def victims(record: Record, swappable: Mapping[str, int]) -> tuple[int, int, int]:
    """Of all swap-outs, how many took the task scheduled last of those with bytes in; unclear; another.

    The task for which room is made, the one that runs, and the one about to run are no victims. A record does not say
    for whom room was made, only who came in next: where the choice is right for another task that waited, it is
    unclear.
    """
    out = dict(swappable)
    scheduled: dict[str, int] = {}
    about_to_run = ""
    found = {"right": 0, "unclear": 0, "wrong": 0}
    events = sorted([*swaps(record), *runs(record)], key=lambda part: (part.begin, part.what != "run"))
    for number, part in enumerate(events):
        if part.what == "run":
            scheduled[part.task] = part.begin
            about_to_run = "" if about_to_run == part.task else about_to_run
        elif part.what == "swap_in":
            out[part.task] = 0
            about_to_run = part.task
        else:
            spared = {run.task for run in runs(record) if run.begin <= part.begin < run.end} | {about_to_run}
            following = next((later.task for later in events[number + 1 :] if later.what == "swap_in"), "")
            among = [task for task in swappable if task not in spared and out[task] < swappable[task]]
            later = {t for t in among if scheduled.get(t, -1) > scheduled.get(part.task, -1)}
            if part.task in among and later <= {following}:
                found["right"] += 1
            elif part.task in among and len(later) == 1 and out[min(later)]:
                found["unclear"] += 1
            else:
                found["wrong"] += 1
            out[part.task] += part.nbytes
    return found["right"], found["unclear"], found["wrong"]


def on_time(record: Record, periods: Mapping[str, int]) -> bool:
    """Every release is a whole number of periods after the common start: there is no drift."""
    return all(job.release == job.number * periods[job.task] for job in record.jobs)
