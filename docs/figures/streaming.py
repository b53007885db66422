"""Figures of one streamed network: the arena over time, the timing of a pass, time against budget."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from passes import FIXED, MIB, WORKLOAD, events, plan_for
from style import Look, save

from narrowboat.plan.curve import budgets, front, knee
from narrowboat.plan.make import minimum_budget

BUDGET = 70  # MiB, of the first two


def draw(folder: Path) -> list[Path]:
    """All of them."""
    return [
        *save("window", folder, _window, (7.6, 3.9)),
        *save("pipeline", folder, _pipeline, (7.6, 2.7)),
        *save("curve", folder, _curve),
    ]


def _window(figure: Figure, look: Look) -> None:
    """Addresses upwards, time to the right: who has which bytes."""
    plan = plan_for(BUDGET)
    passes = events(plan)
    second, third = passes[2], passes[3]
    start, end = second[0].begin, max(e.end for e in third if e.kind == "compute")
    steps = [e for e in (*second, *third) if e.kind == "compute"]
    start = min(e.begin for e in second if e.kind == "compute")
    axes = figure.subplots()
    for k, block in enumerate(WORKLOAD.blocks):
        low, high = plan.offsets[k] / MIB, block.nbytes / MIB
        if k in plan.resident:
            axes.add_patch(
                Rectangle((0, low), (end - start) * 1e3, high, fc=look.resident, alpha=0.28, ec=look.resident)
            )
            axes.text(-2, low + high / 2, block.name, va="center", ha="right", fontsize=7.5)
    for e in (e for pass_ in passes[1:] for e in pass_ if e.kind == "read"):
        low, high = plan.offsets[e.block] / MIB, WORKLOAD.blocks[e.block].nbytes / MIB
        used = e.until - WORKLOAD.step_seconds[e.block]
        left, mid, right = ((t - start) * 1e3 for t in (e.begin, e.end, e.until))
        if right <= 0 or left >= (end - start) * 1e3:
            continue
        axes.add_patch(Rectangle((left, low), mid - left, high, fc=look.reading, ec="none", clip_on=True))
        axes.add_patch(Rectangle((mid, low), right - mid, high, fc="none", ec=look.window, lw=0.8))
        axes.add_patch(Rectangle(((used - start) * 1e3, low), (e.until - used) * 1e3, high, fc=look.window, ec="none"))
        axes.text(
            (max(left, 0) + right) / 2,
            low + high / 2,
            WORKLOAD.blocks[e.block].name,
            va="center",
            ha="center",
            fontsize=7,
        )
    for e in steps:
        if e.block in plan.resident:
            low, high = plan.offsets[e.block] / MIB, WORKLOAD.blocks[e.block].nbytes / MIB
            axes.add_patch(
                Rectangle(((e.begin - start) * 1e3, low), (e.end - e.begin) * 1e3, high, fc=look.resident, ec="none")
            )
    turn = (max(e.end for e in second if e.kind == "compute") - start) * 1e3
    axes.axvline(turn, color=look.text, lw=0.8, ls=":")
    axes.axhline(plan.window_bytes / MIB, color=look.text, lw=0.8)
    axes.text(turn + 1, plan.arena_bytes / MIB + 0.7, "the next pass begins", fontsize=8)
    axes.text((end - start) * 1e3 + 1.5, plan.window_bytes / MIB / 2, "window", rotation=90, va="center", fontsize=8)
    axes.text(
        (end - start) * 1e3 + 1.5,
        (plan.window_bytes + plan.resident_bytes / 2) / MIB,
        "resident",
        rotation=90,
        va="center",
        fontsize=8,
    )
    axes.set(
        xlim=(0, (end - start) * 1e3),
        ylim=(0, plan.arena_bytes / MIB),
        xlabel="time, ms",
        ylabel="address in the arena, MiB",
    )
    axes.tick_params(axis="y", pad=16)
    handles = [
        Patch(fc=look.resident, label="resident, in use"),
        Patch(fc=look.reading, label="being read"),
        Patch(fc="none", ec=look.window, label="there, waits for its step"),
        Patch(fc=look.window, label="in use"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4)


def _pipeline(figure: Figure, look: Look) -> None:
    """Two lanes: what the storage reads and what the processor computes; and where it waits."""
    plan = plan_for(BUDGET)
    passes = events(plan)
    steps = [e for e in passes[2] if e.kind == "compute"]
    start, end = passes[2][0].begin, steps[-1].end
    start = min(min(e.begin for e in passes[2] if e.kind != "read"), steps[0].begin)
    axes = figure.subplots()
    lanes = {"read": 1.2, "compute": 0.0, "wait": 0.0}
    for e in (e for pass_ in passes[1:] for e in pass_):
        left, right = (max(e.begin, start) - start) * 1e3, (min(e.end, end) - start) * 1e3
        if right <= left:
            continue
        resident = e.block in plan.resident
        colour = {"read": look.reading, "wait": "none", "compute": look.resident if resident else look.window}[e.kind]
        axes.add_patch(
            Rectangle(
                (left, lanes[e.kind]),
                right - left,
                1,
                fc=colour,
                ec=look.waiting if e.kind == "wait" else look.text,
                lw=0.6,
                hatch="////" if e.kind == "wait" else None,
            )
        )
        if right - left > 2.2 and e.kind != "wait":
            axes.text(
                (left + right) / 2,
                lanes[e.kind] + 0.5,
                WORKLOAD.blocks[e.block].name,
                ha="center",
                va="center",
                fontsize=7.5,
                color=look.text if e.kind == "read" else look.ink,
            )
    axes.set(
        xlim=(0, (end - start) * 1e3),
        ylim=(-0.15, 2.35),
        xlabel="time, ms",
        yticks=[0.5, 1.7],
        yticklabels=["computes", "reads"],
    )
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    handles = [
        Patch(fc=look.resident, label="a resident block"),
        Patch(fc=look.window, label="a streamed block"),
        Patch(fc=look.reading, label="its read"),
        Patch(fc="none", ec=look.waiting, hatch="////", label="stall"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4)


def _curve(figure: Figure, look: Look) -> None:
    """Predicted time against budget, and what each budget is spent on."""
    least, _ = minimum_budget(WORKLOAD)
    enough = WORKLOAD.weight_bytes + FIXED
    plans = [plan_for(b / MIB) for b in budgets(least, enough, 40)]
    best = front(plans)
    bend = knee(best)
    x = [p.budget / MIB for p in plans]
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1.25, 1])
    above.step(
        [*(p.budget / MIB for p in best), x[-1]],
        [*(p.predicted_latency * 1e3 for p in best), best[-1].predicted_latency * 1e3],
        where="post",
        color=look.window,
        lw=1.8,
    )
    above.plot(x, [p.lower_bound * 1e3 for p in plans], color=look.text, lw=0.9, ls=":", label="no plan can be faster")
    if bend is not None:
        above.plot(bend.budget / MIB, bend.predicted_latency * 1e3, "o", color=look.window, ms=6)
        above.annotate(
            "knee", (bend.budget / MIB, bend.predicted_latency * 1e3), (6, 6), textcoords="offset points", fontsize=8.5
        )
    above.set(ylabel="a pass, ms", ylim=(0, None))
    above.legend(loc="upper right")
    parts = [
        [FIXED / MIB] * len(plans),
        [p.window_bytes / MIB for p in plans],
        [p.resident_bytes / MIB for p in plans],
    ]
    below.stackplot(
        x, parts, colors=[look.fixed, look.window, look.resident], labels=["activations", "window", "resident"]
    )
    below.set(xlabel="budget, MiB", ylabel="spent, MiB", xlim=(x[0], x[-1]))
    below.legend(loc="upper left", ncols=3)
