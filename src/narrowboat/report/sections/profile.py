"""What a model was measured to cost."""

from __future__ import annotations

from narrowboat.quantities import format_bytes, format_seconds
from narrowboat.report import plots
from narrowboat.report.records.find import Loaded
from narrowboat.report.records.model import ProfileRecord
from narrowboat.report.sections.section import NOTE, Section, Table, begin, seconds, size

_ROWS = 40


def profile_section(loaded: Loaded) -> Section:
    """``narrowboat profile``."""
    profile: ProfileRecord = loaded.value
    section = begin(loaded, f"What {profile.model or 'a model'} costs")
    section.notice(NOTE, f"A pass computes for {format_seconds(sum(profile.step_seconds))} with everything in memory.")
    if profile.contention is not None:
        section.notice(NOTE, f"It takes {profile.contention:.0%} longer while storage is read all along.")
    if profile.bandwidths:
        speeds = sorted(profile.bandwidths)
        middle, low = speeds[len(speeds) // 2], speeds[len(speeds) // 10]
        section.notice(
            NOTE, f"Storage gives {middle / 1e9:.2f} GB/s beside computing, one read in ten less than {low / 1e9:.2f}."
        )
    if profile.table:
        section.picture(
            "curve",
            "Latency against budget",
            f"A falling line over {len(profile.table)} budgets, in milliseconds per pass.",
            "What plans from these measurements predict. Left of the knee every MiB buys much; right of it little.",
            lambda width: plots.latency_curve(profile, title="Latency against budget", width=width),
        )
    if profile.blocks:
        section.picture(
            "blocks",
            "Computing, block by block",
            f"Bars: {len(profile.blocks)} blocks, of many those of a module together.",
            "Blocks that share steps each count them, so the bars add up to more than a pass.",
            lambda width: plots.blocks(profile, title="Computing per block", width=width),
        )
        slowest = sorted(profile.blocks, key=lambda row: -row.compute_busy_ms)[:_ROWS]
        section.tables.append(
            Table(
                f"The slowest blocks ({len(slowest)} of {len(profile.blocks)})",
                ["block", "bytes", "uses", "compute", "beside reading", "activations"],
                [
                    (
                        row.name,
                        size(row.bytes),
                        str(row.uses),
                        seconds(row.compute_idle_ms),
                        seconds(row.compute_busy_ms),
                        size(row.activation_bytes),
                    )
                    for row in slowest
                ],
            )
        )
    section.facts |= {
        f"malloc {policy}": f"{format_bytes(profile.needs[policy])} beside the weights, {format_seconds(pace)}"
        for policy, pace in profile.paces.items()
        if policy in profile.needs
    }
    section.facts |= {f"measured with, {name}": value for name, value in profile.identity.items()}
    return section
