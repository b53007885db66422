"""A plan as the gateway tells it: docs/serve.md, "The plan"."""

from __future__ import annotations

from typing import Any

from narrowboat.tasks.costed import CostedTask, always_bytes, burst_of
from narrowboat.tasks.spec.schema import TaskSpec
from narrowboat.tasks.task_set import TaskSet


def plan_of(task_set: TaskSet) -> dict[str, Any]:
    """Of a set of tasks, admitted or not. Times in microseconds."""
    verdict = task_set.admit()
    settings = task_set.settings
    told = verdict.as_json()
    judged = {task["name"]: task for task in told["tasks"]}
    return {
        "budget_bytes": verdict.budget,
        "needed_bytes": verdict.needed_bytes,
        "pinned_bytes": verdict.memory.pinned,
        "always_bytes": always_bytes(task_set.costed, keep=settings.preemption == "lp-keep"),
        "pool_bytes": task_set.pool_bytes,
        **{key: told[key] for key in ("policy", "preemption", "supply", "admitted", "overrun_tolerance_us")},
        **{key: told[key] for key in ("utilisation", "reasons", "suggestions")},
        "tasks": [_task(task, judged[task.name]) for task in task_set.allocation.tasks],
    }


def takes_requests(spec: TaskSpec) -> bool:
    """Whether its inputs come from a queue."""
    return spec.input is not None and spec.input.queue is not None


def _task(task: CostedTask, judged: dict[str, Any]) -> dict[str, Any]:
    spec = task.spec
    shown = ("admitted", "response_bound_us", "deadline_us", "cost_us", "longest_segment_us", "utilisation")
    return {
        "name": spec.name,
        "model": spec.model or "",
        "guarantee": spec.guarantee,
        "takes_requests": takes_requests(spec),
        **{key: judged[key] for key in (*shown, "pinned_bytes", "running_bytes")},
        "period_us": spec.step,
        "burst": burst_of(spec),
        "blocks": _blocks(task),
    }


def _blocks(task: CostedTask) -> list[dict[str, int]]:
    ends = task.ends if task.ends is not None else tuple(range(1, len(task.units) + 1))
    starts = (0, *ends[:-1])
    return [
        {
            "bytes": block.nbytes,
            "resident_bytes": sum(task.units[unit].nbytes for unit in range(start, end) if unit in task.pins),
            "load_us": block.load,
            "compute_us": block.compute,
        }
        for block, start, end in zip(task.blocks(), starts, ends, strict=True)
    ]
