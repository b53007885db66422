"""What the way to a node and back costs a promise: deadlines are shorter there, and requests come less evenly.

A request that the ingress lets in at ``t`` is released on its node somewhere in ``[t, t + A]``, and its answer is back
within ``A`` of both ways together. If releases at the ingress keep an arrival curve ``eta(d)``, those on the node keep
``eta(d + A)``: release jitter in the sense of Audsley et al. (1993). A response bound R on the node for the deadline
D - A is therefore a bound R + A for the client's D.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from narrowboat.tasks.contract import Bucket
from narrowboat.tasks.costed import arrival_of
from narrowboat.tasks.spec.schema import TaskSpec, TasksSpec

_MARGIN = 2.0  # over the longest way that was measured
_LEAST = 1000  # microseconds: nothing that crosses processes is promised to be faster


def crosses(spec: TaskSpec) -> bool:
    """Whether the task's inputs come over the network."""
    return spec.input is not None and spec.input.queue is not None


def allowance(measured: Sequence[float]) -> int:
    """Microseconds that the way there and back is allowed, from the seconds that some have taken."""
    return max(math.ceil(max(measured, default=0.0) * 1e6 * _MARGIN), _LEAST)


def on_node(spec: TaskSpec, allowed: int) -> TaskSpec | None:
    """A task as its node has to keep it, so that its client is kept what was promised.

    Args:
        spec: as it was described.
        allowed: microseconds of the way there and back.

    Returns:
        None if the way alone takes the deadline.
    """
    if not crosses(spec):
        return spec
    deadline = spec.relative_deadline - allowed
    if deadline <= 0:
        return None
    if spec.contract is not None:
        # A bucket's curve ceil((d + (b-1)P + A) / P) is that of ceil(A / P) more tokens, or below it.
        burst = min(spec.contract.burst + -(-allowed // spec.contract.period), 10_000)
        contract = spec.contract.model_copy(update={"burst": burst})
        return spec.model_copy(update={"contract": contract, "deadline": deadline})
    return spec.model_copy(update={"jitter": spec.jitter + allowed, "deadline": deadline})


def tasks_on_node(settings: TasksSpec, allowed: int) -> tuple[TasksSpec, dict[str, str]]:
    """All of them, and why some cannot be kept on any node."""
    adapted, late = [], {}
    for spec in settings.tasks:
        made = on_node(spec, allowed)
        if made is None:
            late[spec.name] = (
                f"its deadline of {spec.relative_deadline / 1e3:g} ms is over before a node is reached: the way there "
                f"and back is allowed {allowed / 1e3:g} ms (--ingress says otherwise)"
            )
        else:
            adapted.append(made)
    return settings.model_copy(update={"tasks": tuple(adapted)}), late


def bucket_of(spec: TaskSpec) -> Bucket | None:
    """What holds a task's clients to their contract at the door; None where nothing is promised, or nobody asks."""
    if not crosses(spec) or not spec.guaranteed:
        return None
    arrival = arrival_of(spec)
    return Bucket(arrival.period, arrival.jitter)
