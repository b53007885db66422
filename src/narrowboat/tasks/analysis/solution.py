"""What a response-time analysis found for one task, and the search it is found by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from narrowboat.tasks.analysis.busy import HORIZON
from narrowboat.tasks.analysis.model import Supply, Task, Times

_ROUNDS = 10_000


@dataclass(frozen=True)
class Response:
    """A bound on the time from a job's arrival to its end.

    Attributes:
        task: its name.
        bound: None if there is none: more work arrives than is served.
        offset: after the start of the busy interval at which the worst job arrives.
        blocking: work of a less important job that cannot be preempted in time.
        blocker: whose; empty if nobody's.
        interference: work of each other task that goes first.
    """

    task: str
    bound: int | None
    offset: int = 0
    blocking: int = 0
    blocker: str = ""
    interference: Mapping[str, int] = field(default_factory=dict)


def worst_offset(
    task: Task, offsets: Times, blocking: Times, interference: Callable[[Times], Times], supply: Supply
) -> tuple[int, int] | None:
    """The bound over all offsets, and the offset that has it (PROSA's limited-preemptive analysis).

    For every offset A the least F with ``blocking + rbf(A + 1) - (last - 1) + interference(F) <= sbf(F)`` is when
    the last segment has begun at the latest; the rest of it is not preempted.

    Args:
        task: under analysis.
        offsets: to look at.
        blocking: at each of them.
        interference: of others, in intervals of these lengths, for each offset.
        supply: of the processor.
    """
    own = blocking + task.request(offsets + 1) - (task.last - 1)
    ends = np.maximum(supply.times_for(own), 1)
    for _ in range(_ROUNDS):
        further = np.maximum(supply.times_for(own + interference(ends)), ends)
        if (further == ends).all():
            break
        ends = further
        if int(ends.max()) > HORIZON:
            return None
    else:
        return None
    done = supply.times_for(supply.bounds(ends) + task.last - 1)
    responses = np.maximum(np.maximum(done, ends) - offsets, 0)
    worst = int(responses.argmax())
    return int(responses[worst]), int(offsets[worst])
