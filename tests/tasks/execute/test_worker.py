"""The thread that computes a task's blocks."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from narrowboat.tasks.execute import realtime
from narrowboat.tasks.execute.worker import Worker


def test_a_thread_ends_outside_of_the_real_time_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """What libraries do at a thread's end may spin for a lock whose holder never gets the core."""
    seen: list[Any] = []
    leave = realtime.leave

    def left() -> None:
        before = os.sched_getscheduler(0), os.sched_getaffinity(0)
        leave()
        seen.append((before, (os.sched_getscheduler(0), os.sched_getaffinity(0))))

    monkeypatch.setattr(realtime, "leave", left)
    granted, core = realtime.RealTime(), max(os.sched_getaffinity(0))
    model: Any = SimpleNamespace(boundary=None)
    worker = Worker("t", model, lambda: realtime.enter(granted, realtime.COMPUTE, core), None)  # type: ignore[arg-type]
    worker.start()
    worker.stop()
    worker.join(10)
    assert not worker.is_alive()
    [(before, after)] = seen
    assert before == (os.SCHED_FIFO if granted.fifo else os.SCHED_OTHER, {core})
    assert after == (os.SCHED_OTHER, os.sched_getaffinity(0))
