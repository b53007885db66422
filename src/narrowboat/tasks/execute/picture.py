"""Now, and what has happened since the last picture: for whoever watches a run."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from narrowboat.tasks.execute.account import NOTHING, Account
from narrowboat.tasks.execute.figures import major_faults
from narrowboat.tasks.execute.running import Running
from narrowboat.tasks.execute.space import SwapSpace
from narrowboat.tasks.policy.action import Engine, View
from narrowboat.tasks.record import JobRecord

_JOB = tuple(field.name for field in fields(JobRecord))


def picture(view: View, tasks: Iterable[Running], account: Account, space: SwapSpace, now: int) -> dict[str, Any]:
    """A picture of now; docs/serve.md, "Events", tells its fields. Times in microseconds of the run.

    Quick: jobs and segments are written out by :func:`plain`, away from the dispatcher.

    Args:
        view: as the policy has it.
        tasks: that there are.
        account: of the run; its news are told once.
        space: of blocks that come and go.
        now: the time.
    """
    told: dict[str, dict[str, int]] = {name: dict(tally) for name, tally in account.tally.items()}
    for job in view.pending:
        if job.started is not None:
            told.setdefault(job.task.name, dict(NOTHING))["held_bytes"] = sum(
                job.task.nbytes[job.computed : job.loaded]
            )
    models = {task.model for task in tasks}
    resident = sum(model.resident_bytes for model in models)
    swap = space.pool.nbytes - space.pool.free_bytes
    news, loading = account.news(), view.doing.get(Engine.LOAD)
    return {
        "now_us": now,
        "time": time.time(),
        "doing": {e.value: f"{a.task.name} block {a.block}" for e, a in view.doing.items()},
        "pending": [f"{job.task.name} #{job.number}" for job in view.pending],
        "held_bytes": account.held_bytes,
        "budget_bytes": account.budget,
        "peak_bytes": account.peak_bytes,
        "pools": {
            "resident": resident,
            "swap": swap,
            "swap_limit": space.pool.nbytes,
            "other": max(account.held_bytes - resident - swap, 0),
        },
        "busy": {engine: spent / max(now, 1) for engine, spent in account.busy.items()},
        "busy_us": dict(account.busy),
        "in": {task.facts.name: task.model.blocks_in() for task in tasks},
        "coming": {} if loading is None else {loading.task.name: loading.block},
        "tasks": told,
        "jobs": news.jobs,
        "jobs_lost": news.jobs_lost,
        "segments": news.segments,
        "segments_lost": news.segments_lost,
        "late_wake_us": news.late_wake,
        "counters": {**account.counters, "blocks_found": space.hits},
    }


def plain(told: dict[str, Any], faults: int = 0) -> dict[str, Any]:
    """A picture as JSON has it; ``faults``: pages that were read back before the tasks ran."""
    jobs = [{name: getattr(job, name) for name in _JOB} for job in told["jobs"]]
    segments = [(p.engine, p.what, p.task, p.job, p.block, p.begin, p.end, p.nbytes) for p in told["segments"]]
    return {**told, "jobs": jobs, "segments": segments, "major_faults": major_faults() - faults}
