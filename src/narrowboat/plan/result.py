"""The plan as a value: the decisions for one budget, the prediction, and both in words and in JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from narrowboat.plan.model import Block, Machine
from narrowboat.plan.timing import Timing
from narrowboat.quantities import format_bytes, format_seconds


@dataclass(frozen=True, slots=True)
class Plan:
    """Decisions for one budget, and what they are predicted to give.

    Attributes:
        budget: bytes the whole session may use over the process baseline.
        minimum: the smallest budget for which a plan exists, bytes.
        limiter: the part that sets the minimum.
        fixed_bytes: buffers, activations, workspaces and staging (``fixed_parts`` names them).
        resident: indices of the blocks that stay in.
        streamed: indices of the others, in order of first use.
        offsets: arena offset of every block, by block index.
        resident_bytes, window_bytes: the two zones of the arena.
        timing: predicted steady pass.
        blocks: the blocks the indices mean.
        machine: the storage, and the way to the device, that the prediction rests on.
        lower_bound: seconds that no plan within the budget can beat (``plan.bound``).
        scheme: how it was made: ``"best"``, or one of ``plan.schemes``.
        tiled: layers too large to be in as a whole, each with its number of tiles or strips; 0 for a table whose
            rows are read on demand.
        expert_bytes: of the fixed bytes, the cache of experts that are read on demand.
        cached: indices of the streamed blocks with a copy in host memory; empty without a device stage.
    """

    budget: int
    minimum: int
    limiter: str
    fixed_bytes: int
    fixed_parts: tuple[tuple[str, int], ...]
    blocks: tuple[Block, ...]
    resident: frozenset[int]
    streamed: tuple[int, ...]
    offsets: tuple[int, ...]
    resident_bytes: int
    window_bytes: int
    timing: Timing
    machine: Machine
    lower_bound: float = 0.0
    scheme: str = "best"
    tiled: tuple[tuple[str, int], ...] = ()
    expert_bytes: int = 0
    cached: frozenset[int] = frozenset()

    @property
    def arena_bytes(self) -> int:
        """Bytes of the slab."""
        return self.resident_bytes + self.window_bytes

    @property
    def cached_bytes(self) -> int:
        """Bytes of pinned host memory that the copies of ``cached`` take, beside the budget."""
        return sum(self.blocks[i].nbytes for i in self.cached)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as laid in the arena."""
        return sum(block.nbytes for block in self.blocks)

    @property
    def predicted_latency(self) -> float:
        """Seconds per pass in the steady state."""
        return self.timing.latency

    @property
    def gap(self) -> float:
        """By what share the prediction lies above ``lower_bound``: at most this much could another plan gain."""
        return max(self.timing.latency / self.lower_bound - 1, 0.0) if self.lower_bound else 0.0

    def __str__(self) -> str:
        return explain(self)


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
    if plan.tiled:
        lines.append(f"tiled         {describe_tiled(plan.tiled)}")
    lines += [f"  {name:<12}{format_bytes(nbytes)}" for name, nbytes in plan.fixed_parts if nbytes]
    if plan.expert_bytes:
        lines.append("  (experts are read on demand, on top of what follows)")
    if plan.cached:
        lines.append(f"host cache    {format_bytes(plan.cached_bytes)} in {len(plan.cached)} blocks")
    lines.append(f"reads         {_per_pass(timing.bytes_read, plan.machine.bandwidth)}")
    if plan.machine.copy_bandwidth:
        lines.append(f"copies        {_per_pass(timing.bytes_copied, plan.machine.copy_bandwidth)} to the device")
    lines += [
        f"predicted     {format_seconds(timing.latency)} per pass: {format_seconds(timing.compute)} computing, "
        f"{format_seconds(timing.stall)} waiting (no plan can do it in less than {format_seconds(plan.lower_bound)}: "
        f"gap {plan.gap:.1%})",
    ]
    worst = sorted(timing.stall_by_block.items(), key=lambda item: -item[1])[:3]
    if timing.stall > 0.01 * timing.latency:
        waits = ", ".join(f"{plan.blocks[i].name} {format_seconds(seconds)}" for i, seconds in worst)
        lines.append(f"waits most    {waits}")
    return "\n".join(lines)


def _per_pass(nbytes: int, bandwidth: float) -> str:
    return f"{format_bytes(nbytes)} per pass at {bandwidth / 1e9:.2f} GB/s"


def describe_tiled(tiled: Sequence[tuple[str, int]]) -> str:
    """How many layers are computed in tiles, and into how many; how many tables are read by rows."""
    cut = [count for _, count in tiled if count]
    tables = len(tiled) - len(cut)
    said = []
    if cut:
        said.append(f"{len(cut)} layer{'s' * (len(cut) > 1)} in {sum(cut)} tiles")
    if tables:
        said.append(f"{tables} table{'s' * (tables > 1)} by the rows asked for")
    return ", ".join(said)


def summary(plan: Plan) -> dict[str, object]:
    """The plan as JSON values; sizes in bytes, times in milliseconds."""
    return {
        "budget_bytes": plan.budget,
        "min_budget_bytes": plan.minimum,
        "limiter": plan.limiter,
        "fixed_bytes": plan.fixed_bytes,
        "fixed_parts": dict(plan.fixed_parts),
        "weight_bytes": plan.weight_bytes,
        "resident_bytes": plan.resident_bytes,
        "window_bytes": plan.window_bytes,
        "tiled_layers": dict(plan.tiled),
        "blocks": len(plan.blocks),
        "resident_blocks": len(plan.resident),
        "host_cache_bytes": plan.cached_bytes,
        "host_cached_blocks": len(plan.cached),
        "bytes_read_per_pass": plan.timing.bytes_read,
        "bytes_copied_per_pass": plan.timing.bytes_copied,
        "predicted_latency_ms": plan.timing.latency * 1e3,
        "predicted_stall_ms": plan.timing.stall * 1e3,
        "compute_ms": plan.timing.compute * 1e3,
        "bound_ms": plan.lower_bound * 1e3,
        "gap": plan.gap,
        "scheme": plan.scheme,
        "bandwidth_bytes_per_s": plan.machine.bandwidth,
        "copy_bandwidth_bytes_per_s": plan.machine.copy_bandwidth,
        "text": f"{format_bytes(plan.resident_bytes)} resident, {format_bytes(plan.window_bytes)} window, "
        f"{format_seconds(plan.timing.latency)} per pass",
    }
