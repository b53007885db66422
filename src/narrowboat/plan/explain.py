"""A plan in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from narrowboat.quantities import format_bytes, format_seconds

if TYPE_CHECKING:
    from narrowboat.plan.make import Plan


def explain(plan: Plan) -> str:
    """Several lines: where the budget goes, what a pass reads, how long it takes and what it waits for."""
    timing = plan.timing
    lines = [
        f"budget        {format_bytes(plan.budget)}  "
        f"(smallest possible {format_bytes(plan.minimum)}, set by {plan.limiter})",
        f"weights       {format_bytes(plan.weight_bytes)} in {len(plan.blocks)} blocks",
        f"  resident    {format_bytes(plan.resident_bytes)} in {len(plan.resident)} blocks",
        f"  window      {format_bytes(plan.window_bytes)} shared by {len(plan.streamed)} streamed blocks",
    ]
    lines += [f"  {name:<12}{format_bytes(nbytes)}" for name, nbytes in plan.fixed_parts if nbytes]
    lines += [
        f"reads         {format_bytes(timing.bytes_read)} per pass at {plan.machine.bandwidth / 1e9:.2f} GB/s",
        f"predicted     {format_seconds(timing.latency)} per pass: {format_seconds(timing.compute)} computing, "
        f"{format_seconds(timing.stall)} waiting (bound {format_seconds(plan.bound)})",
    ]
    worst = sorted(timing.stall_by_block.items(), key=lambda item: -item[1])[:3]
    if timing.stall > 0.01 * timing.latency:
        waits = ", ".join(f"{plan.blocks[i].name} {format_seconds(seconds)}" for i, seconds in worst)
        lines.append(f"waits most    {waits}")
    return "\n".join(lines)
