"""Several networks in one budget: LP-keep, and admission by budget; simulated by the program's own parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from style import Look, save

import narrowboat as nb

MIB = 1 << 20
_SLOW = {"load": "8ms", "compute": "7ms", "bytes": "20MiB"}
_FAST = {"load": "4ms", "compute": "3ms", "bytes": "14MiB"}


def two_tasks(preemption: str) -> nb.TaskSet:
    """A long job that has begun, and a short one that comes into it."""
    return nb.TaskSet.from_dict(
        {
            "budget": "80MiB",
            "preemption": preemption,
            "tasks": [
                {"name": "segmenter", "period": "200ms", "blocks": [_SLOW] * 5},
                {"name": "tracker", "period": "100ms", "deadline": "40ms", "offset": "12ms", "blocks": [_FAST] * 3},
            ],
        }
    )


def draw(folder: Path) -> list[Path]:
    """All of them."""
    return [*save("lp-keep", folder, _lp_keep, (7.6, 4.0)), *save("admission", folder, _admission, (7.6, 3.3))]


def _lp_keep(figure: Figure, look: Look) -> None:
    names = ("segmenter", "tracker")
    rows = (("np", "not preempted: np"), ("lp-keep", "LP-keep"))
    charts = figure.subplots(2, 1, sharex=True)
    for axes, (preemption, title) in zip(charts, rows, strict=True):
        record = two_tasks(preemption).simulate(0.06)
        for s in record.segments:
            begin, end = s.begin / 1e3, s.end / 1e3
            lane = 0.0 if s.engine == "compute" else 1.15
            colour = look.tasks[names.index(s.task)]
            axes.add_patch(
                Rectangle(
                    (begin, lane),
                    end - begin,
                    1,
                    fc=colour,
                    ec=look.text,
                    lw=0.6,
                    alpha=1 if s.engine == "compute" else 0.55,
                )
            )
            axes.text(
                (begin + end) / 2,
                lane + 0.5,
                str(s.block + 1),
                ha="center",
                va="center",
                fontsize=7.5,
                color=look.ink if lane == 0 else look.text,
            )
        job = next(j for j in record.jobs if j.task == "tracker")
        assert job.finish is not None
        axes.axvline(job.release / 1e3, color=look.tasks[1], lw=1.2, ls="--")
        axes.axvline(job.due / 1e3, color=look.waiting, lw=1.2)
        response = (job.finish - job.release) / 1e3
        peak = max(nbytes for _, nbytes in record.memory) / MIB
        axes.set_title(f"{title}: the tracker answers after {response:g} ms; {peak:.0f} MiB at most")
        axes.set(ylim=(-0.1, 2.3), yticks=[0.5, 1.65], yticklabels=["computes", "loads"], xlim=(0, 62))
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    charts[-1].set_xlabel("time, ms")
    handles: list[Any] = [Patch(fc=look.tasks[k], label=name) for k, name in enumerate(names)]
    handles.append(_line(look.tasks[1], "--", "the tracker's job comes"))
    handles.append(_line(look.waiting, "-", "its deadline"))
    figure.legend(handles=handles, loc="outside upper center", ncols=4)


def _line(colour: str, style: str, label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, ls=style, label=label)


def robot(budget: str) -> nb.TaskSet:
    """Three described tasks whose blocks may be kept in memory, as far as the budget goes."""
    return nb.TaskSet.from_dict(
        {
            "budget": budget,
            "allocation": "optimal",
            "tasks": [
                {
                    "name": "detector",
                    "period": "110ms",
                    "deadline": "62ms",
                    "blocks": [{"load": "9ms", "compute": "6ms", "bytes": "18MiB"}] * 4,
                },
                {
                    "name": "segmenter",
                    "period": "200ms",
                    "deadline": "125ms",
                    "blocks": [{"load": "10ms", "compute": "9ms", "bytes": "20MiB"}] * 5,
                },
                {
                    "name": "tracker",
                    "period": "70ms",
                    "deadline": "26ms",
                    "blocks": [{"load": "3ms", "compute": "4ms", "bytes": "6MiB"}] * 3,
                },
            ],
        }
    )


def _admission(figure: Figure, look: Look) -> None:
    sizes = range(56, 197, 4)
    verdicts = [robot(f"{size}MiB").admit() for size in sizes]
    axes = figure.subplots()
    for k, name in enumerate(("detector", "segmenter", "tracker")):
        told = [next(t for t in verdict.tasks if t.name == name) for verdict in verdicts]
        share = [t.bound / t.deadline if t.bound is not None else None for t in told]
        axes.plot(
            sizes,
            [float("nan") if s is None else s for s in share],
            color=look.tasks[k],
            lw=1.8,
            marker="o",
            ms=2.8,
            label=name,
        )
    axes.axhline(1, color=look.waiting, lw=1.2)
    axes.text(sizes[-1], 1.02, "deadline", ha="right", va="bottom", color=look.waiting, fontsize=8.5)
    refused = [s for s, v in zip(sizes, verdicts, strict=True) if not v.admitted]
    if refused:
        axes.axvspan(sizes[0], max(refused) + 2, color=look.fixed, alpha=0.25, lw=0)
        axes.text((sizes[0] + max(refused) + 2) / 2, 0.06, "refused", ha="center", fontsize=9)
        axes.text((max(refused) + 2 + sizes[-1]) / 2, 0.06, "admitted", ha="center", fontsize=9)
    axes.set(
        xlabel="budget for the three, MiB",
        ylabel="response bound / deadline",
        ylim=(0, 1.6),
        xlim=(sizes[0], sizes[-1]),
    )
    axes.legend(loc="upper right", ncols=3)
