"""What a session tells about its passes."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from narrowboat.machine.openmp import openmp_status
from narrowboat.stream.expert_cells import ExpertCounts

if TYPE_CHECKING:
    from narrowboat.stream.session import Session


def collect(session: Session) -> dict[str, Any]:
    """Measurements of the passes so far.

    ======================== ======= ==========================================================
    key                      unit    meaning
    ======================== ======= ==========================================================
    passes                   count   calls that ended well
    off_trace_passes         count   of those, passes that left the traced order
    latency_ms               ms      per pass, the last 256, oldest first
    stall_ms                 ms      per pass, time spent waiting for weights
    compute_ms               ms      per pass, latency without the stalls
    read_ms                  ms      per pass, time during which storage was being read
    bytes_read               bytes   per pass, what arrived from storage during it
    median_latency_ms        ms      median over the complete passes after the first two
    predicted_latency_ms     ms      of the plan in force, steady state
    predicted_stall_ms       ms      of the plan in force
    bound_ms                 ms      what no plan within the budget can beat, by the same times (``plan.bound``)
    block_stall_ms           ms      by block, in the last pass
    budget_bytes             bytes   the budget
    min_budget_bytes         bytes   the smallest that would do
    weight_bytes             bytes   all weights as laid in the arena
    resident_bytes           bytes   weights that stay in
    window_bytes             bytes   arena shared by the streamed blocks
    fixed_bytes              bytes   what the budget pays besides weights, by name in fixed_parts
    held_bytes               bytes   by name: what the session holds now (see ``arena.Ledger``)
    peak_bytes               bytes   most resident memory of the process over its baseline so far
    baseline_bytes           bytes   resident memory of the process when the session began
    copied_bytes             bytes   read bytes that needed one copy (the file is not packed)
    direct_io                bool    storage is read past the page cache
    direct_io_refusal        text    why not
    tiled_layers             count   by layer too large to be in whole: its pieces (0: a table read by rows)
    bandwidth_bytes_per_s    B/s     storage as measured, processor busy
    misses                   count   operators that met a weight that was out
    jumps                    count   module calls out of the traced order
    allocator_policy         text    how malloc treats freed activations (``machine.malloc``)
    heap_trims               count   times the heap's holes were given back within a pass, which had no room for them
    memory_locked            bool    the arena cannot be swapped out
    map_group                count   inputs per sweep of ``Session.map``, as last decided
    map_inputs               count   inputs that went through in groups of two or more
    map_alone                count   inputs of maps that were passes of their own
    map_alone_reason         text    why inputs go one by one whatever is asked; empty if they do not
    map_sweeps               count   sweeps so far
    map_sweep_ms             ms      per sweep, the last 256, oldest first
    map_stall_ms             ms      per sweep, time spent waiting for weights
    map_bytes_read           bytes   per sweep, what arrived from storage during it
    map_predicted_sweep_ms   ms      of the plan last in force for a map
    expert_cache_bytes       bytes   room for experts that are read on demand; 0 where none are (so all that follows)
    expert_hits              count   uses of an expert's weight that was in, or on its way in because it was foreseen
    expert_misses            count   uses of one that had to be read for it
    expert_bytes_read        bytes   read for experts
    expert_bytes_ahead       bytes   of those, because the next layer was thought to want them
    expert_bytes_foreseen    bytes   of those, that it did want
    expert_policy            text    who leaves first (``plan.experts.Policy``)
    expert_policy_hits       share   by policy, of the bytes used it would have had in; at the last choice
    openmp_policy            text    how OpenMP's threads wait (see ``narrowboat doctor``)
    openmp_risky             bool    a busy neighbour can make a pass many times slower
    device                   text    where the model runs; the rest is 0 on ``cpu``
    host_budget_bytes        bytes   pinned host memory the session may use
    pinned_bytes             bytes   pinned host memory it has: buffers, and the cache of weights
    host_cache_bytes         bytes   of the cache, what the plan in force puts there
    device_copied_bytes      bytes   from host memory to the device so far
    copy_bytes_per_s         B/s     of such copies, as measured when the session began
    device_direct_refusal    text    why storage is not read straight into the device; empty where it is
    ======================== ======= ==========================================================
    """
    session.ground.times(hold=False)
    records = list(session.records)
    settled = [r.latency for r in records if r.complete][min(2, max(len(records) - 1, 0)) :]
    status = openmp_status()
    plan, maps = session.plan, session.maps
    return {
        "passes": session.passes,
        "off_trace_passes": session.passes - session.complete_passes,
        "latency_ms": [r.latency * 1e3 for r in records],
        "stall_ms": [r.stall * 1e3 for r in records],
        "compute_ms": [r.compute * 1e3 for r in records],
        "read_ms": [r.read_busy * 1e3 for r in records],
        "bytes_read": [r.bytes_read for r in records],
        "median_latency_ms": statistics.median(settled) * 1e3 if settled else None,
        "predicted_latency_ms": plan.predicted_latency * 1e3,
        "predicted_stall_ms": plan.timing.stall * 1e3,
        "bound_ms": plan.lower_bound * 1e3,
        "block_stall_ms": {
            name: seconds * 1e3 for name, seconds in (records[-1].stall_by_block if records else {}).items()
        },
        "budget_bytes": session.budget,
        "min_budget_bytes": plan.minimum,
        "weight_bytes": plan.weight_bytes,
        "resident_bytes": plan.resident_bytes,
        "window_bytes": plan.window_bytes,
        "fixed_bytes": plan.fixed_bytes,
        "fixed_parts": dict(plan.fixed_parts),
        "held_bytes": session.ledger.held(),
        "peak_bytes": session.peak_bytes,
        "baseline_bytes": session.baseline,
        "copied_bytes": session.reader.bytes_copied,
        "direct_io": session.direct_io,
        "direct_io_refusal": next((f.refusal for f in session.files if f.refusal), ""),
        "tiled_layers": dict(plan.tiled),
        "bandwidth_bytes_per_s": session.machine.bandwidth,
        "misses": session.engine.misses,
        "jumps": session.engine.jumps,
        "allocator_policy": session.prepared.policy.value,
        "heap_trims": session.guard.trims,
        "memory_locked": bool(session.slab.locked) if session.slab is not None else False,
        "map_group": maps.group,
        "map_inputs": maps.inputs,
        "map_alone": maps.alone,
        "map_alone_reason": maps.why_alone,
        "map_sweeps": maps.swept,
        "map_sweep_ms": [r.latency * 1e3 for r in maps.sweeps],
        "map_stall_ms": [r.stall * 1e3 for r in maps.sweeps],
        "map_bytes_read": [r.bytes_read for r in maps.sweeps],
        "map_predicted_sweep_ms": maps.predicted * 1e3,
        **_experts(session),
        "openmp_policy": status.policy,
        "openmp_risky": status.risky,
        **session.ground.stats(),
    }


def _experts(session: Session) -> dict[str, Any]:
    cache = session.experts
    counts = cache.counts if cache is not None else ExpertCounts()
    return {
        "expert_cache_bytes": cache.capacity if cache is not None else 0,
        "expert_hits": counts.hits,
        "expert_misses": counts.misses,
        "expert_bytes_read": counts.bytes_read,
        "expert_bytes_ahead": counts.bytes_ahead,
        "expert_bytes_foreseen": counts.bytes_foreseen,
        "expert_policy": cache.policy.value if cache is not None else "",
        "expert_policy_hits": {policy.value: share for policy, share in counts.shares.items()},
    }
