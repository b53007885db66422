"""What would shorten a pass most: more budget, faster storage, a host cache, a larger batch; in words and numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from narrowboat.plan.model import Machine
from narrowboat.plan.result import Plan
from narrowboat.quantities import format_bytes, format_seconds

_WORTH = 0.05  # gains below this share of the latency are not worth a word
_STEPS = (1.1, 1.25, 1.5, 2.0, 3.0)
_SHARES = (0.25, 0.5, 1.0)  # of the bytes read from storage, kept in host memory too


def advise(plan: Plan, enough: int, plan_for: Callable[[int, Machine], Plan]) -> list[str]:
    """Sentences, the one that gains most first.

    Args:
        plan: the plan to improve.
        enough: bytes of the budget that holds everything.
        plan_for: makes the plan for a budget in bytes on a machine.
    """
    now = plan.predicted_latency
    found: list[tuple[float, str]] = []
    for budget in (*(int(plan.budget * step) for step in _STEPS), enough):
        if not plan.budget < budget <= enough:
            continue
        gain = 1 - plan_for(budget, plan.machine).predicted_latency / now
        if gain >= _WORTH:
            more = f"{format_bytes(budget - plan.budget)} more budget ({format_bytes(budget)} in all)"
            found.append((gain, f"{more} would take {_less(now, gain)}"))
            break
    faster = replace(plan.machine, bandwidth=plan.machine.bandwidth * 2)
    gain = 1 - plan_for(plan.budget, faster).predicted_latency / now
    if gain >= _WORTH:
        found.append(
            (gain, f"storage twice as fast ({faster.bandwidth / 1e9:.2f} GB/s) would take {_less(now, gain)}")
        )
    if plan.machine.copy_bandwidth:
        missed = sum(plan.blocks[i].nbytes for i in plan.streamed if i not in plan.cached)
        for share in _SHARES if missed else ():
            larger = replace(plan.machine, host_room=plan.machine.host_room + math.ceil(missed * share))
            gain = 1 - plan_for(plan.budget, larger).predicted_latency / now
            if gain >= _WORTH:
                found.append((gain, f"a host cache of {format_bytes(larger.host_room)} would take {_less(now, gain)}"))
                break
    compute = plan.timing.compute
    if plan.timing.stall >= _WORTH * now and compute > 0:
        # Reading is paid once per pass, computing once per sample.
        batch = max(math.ceil(now / compute), 2)
        gain = 1 - max(now, compute * batch) / (batch * now)
        found.append((gain, f"a batch of {batch} would cost {_less(now, gain)} per sample, if its activations fit"))
    if not found:
        return ["computing sets the pace: neither memory nor storage would shorten a pass by 5 %"]
    return [sentence for _, sentence in sorted(found, key=lambda item: -item[0])]


def _less(now: float, gain: float) -> str:
    return f"{format_seconds(now * (1 - gain))}, {gain:.0%} less"
