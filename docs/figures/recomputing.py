"""Figures of a training step: memory over time kept whole and under a plan, and time against memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from style import Look, save

from narrowboat.plan.recompute import Chain, Kept, Option, Segment, Unit, evaluate, frontier, solve

MIB = 1 << 20
UNITS = 12
_SAVED = (40, 40, 32, 32, 24, 24, 16, 16, 12, 12, 8, 8)  # MiB that autograd saves of each unit
_EDGE = (10, 10, 8, 8, 6, 6, 4, 4, 3, 3, 2, 1)  # MiB that each hands to the next
_FORWARD = (6, 6, 5, 5, 5, 5, 4, 4, 4, 4, 3, 3)  # ms; backward takes twice that
LIMIT = 130 * MIB


def chain() -> Chain:
    """Twelve units as a convolutional network has them: many bytes first, few last."""
    units = []
    for saved, edge, forward, before in zip(_SAVED, _EDGE, _FORWARD, (0, *_EDGE), strict=False):
        keep = Option("keep", held=saved * MIB, forward_peak=saved * MIB, backward_peak=(saved + edge + before) * MIB)
        seconds = forward / 1e3
        units.append(Unit(f"u{len(units)}", seconds, 2 * seconds, seconds, (keep,), edge * MIB, before * MIB))
    carried = np.zeros((UNITS + 1, UNITS + 1), dtype=np.int64)
    for late in range(1, UNITS + 1):
        carried[:late, late] = _EDGE[late - 1] * MIB
    return Chain(tuple(units), carried)


def draw(folder: Path) -> list[Path]:
    """All of them."""
    return save("recompute", folder, _paint, (7.6, 4.4))


def walk(items: tuple[Kept | Segment, ...], of: Chain) -> list[tuple[str, int, float, float, float]]:
    """``(what, unit, begin, end, MiB held)`` in order; what is held counts savings, edges and gradients."""
    told: list[tuple[str, int, float, float, float]] = []
    now = 0.0

    def note(what: str, unit: int, seconds: float, nbytes: int) -> None:
        nonlocal now
        told.append((what, unit, now, now + seconds, nbytes / MIB))
        now += seconds

    def through(parts: tuple[Kept | Segment, ...], held: int, replay: bool) -> None:
        waiting = of.gradient_after(parts[-1].stop - 1)
        before = []
        for item in parts:
            before.append(held)
            for number in range(item.start, item.stop):
                unit = of.units[number]
                if isinstance(item, Kept):
                    at = held + unit.options[0].forward_peak + waiting
                else:
                    at = held + of.carry(item.start, number) + unit.dropped_peak + waiting
                note("again" if replay else "forward", number, unit.replay if replay else unit.forward, at)
            held += of.units[item.start].options[0].held if isinstance(item, Kept) else of.carry(item.start, item.stop)
        for item, then in zip(reversed(parts), reversed(before), strict=True):
            if isinstance(item, Kept):
                unit = of.units[item.unit]
                note("backward", item.unit, unit.backward, then + unit.options[0].backward_peak)
            else:
                through(item.inside, then, True)

    through(items, 0, False)
    seconds, peak = evaluate(of, items)  # the planner's own count
    if abs(seconds - now) > 1e-9 or abs(peak / MIB - max(t[4] for t in told)) > 1e-6:
        raise AssertionError(
            f"drawn {now} s and {max(t[4] for t in told)} MiB, planned {seconds} s and {peak / MIB} MiB"
        )
    return told


def _paint(figure: Figure, look: Look) -> None:
    of = chain()
    whole = tuple(Kept(k) for k in range(UNITS))
    _, most = evaluate(of, whole)
    plan = solve(of, LIMIT).best(LIMIT)
    colours = {"forward": look.resident, "backward": look.fixed, "again": look.window}
    top, bottom = figure.subplots(1, 2, width_ratios=[1.7, 1], squeeze=True)
    for items, y in ((whole, None), (plan.items, LIMIT)):
        told = walk(items, of)
        x = [t[2] * 1e3 for t in told]
        heights, widths = [t[4] for t in told], [(t[3] - t[2]) * 1e3 for t in told]
        if y is None:
            ends = [*x, told[-1][3] * 1e3]
            top.stairs(heights, ends, color=look.text, lw=1.1, ls=":")
        else:
            top.bar(x, heights, widths, align="edge", color=[colours[t[0]] for t in told], ec=look.text, lw=0.3)
            top.axhline(y / MIB, color=look.waiting, lw=1.2)
            top.text(0, y / MIB + 3, f"budget {y // MIB} MiB", color=look.waiting, fontsize=8.5)
    top.set(xlabel="time, ms", ylabel="activations, MiB", xlim=(0, None))
    handles = [
        Patch(fc=colours[k], label=label)
        for k, label in (("forward", "forward"), ("again", "forward again"), ("backward", "backward"))
    ]
    handles.append(Patch(fc="none", ec=look.text, ls=":", label="everything kept"))
    figure.legend(handles=handles, loc="outside upper center", ncols=4)
    points = frontier(solve(of, most))
    plain, _ = evaluate(of, whole)
    bottom.step([b / MIB for b, _ in points], [s / plain for _, s in points], where="post", color=look.window, lw=1.8)
    bottom.plot(LIMIT / MIB, plan.seconds / plain, "o", color=look.window, ms=6)
    bottom.set(xlabel="budget, MiB", ylabel="time, times the plain step", ylim=(1, None))
