"""The results for people: Markdown tables, and a plot of throughput against peak memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from narrowboat.quantities import format_bytes
from training_kit.frontier import fastest_within, pareto, points
from training_kit.subjects import SUBJECTS
from training_kit.verdicts import judge

_MIB = 1 << 20
_SAMENESS = {"bits": "same bits", "rounding": "same sum", "other": "**others**", "unknown": "-"}
_COLUMNS = (
    "subject",
    "setting",
    "activations",
    "tensor peak",
    "allocator peak",
    "resident peak",
    "samples / s",
    "x plain",
    "first step",
    "gradients",
    "buffers",
)
_COLOURS = {
    "plain": "#222222",
    "recompute": "#5c677d",
    "accumulate": "#8d99ae",
    "both": "#b8a07e",
    "compile": "#e07a5f",
    "save_on_cpu": "#f2b5a0",
    "finder": "#b392ac",
    "narrowboat": "#0b6e4f",
    "narrowboat_spill": "#73c2a4",
}
_EXPLAINED = (
    "Every setting runs in child processes of its own: one that checks it, and in each round one that times it. "
    "A step is forward, backward and `optimizer.step()` over the whole batch.",
    "",
    "*tensor peak*: most bytes of live storages, seen by a dispatch mode from the moment the process begins; "
    "*activations*: the same without parameters, buffers, gradients and optimizer state. *allocator peak*: most bytes "
    "that torch's CPU allocator had given out, kernels' scratch memory and compiled code included, from the profiler: "
    "the one meter that sees every subject, so comparisons at equal peak use it. *resident peak*: VmHWM of the "
    "timed child over its size before there was a model. *samples / s*: from the median step, without the first ones. "
    "*first step*: making the step and taking it once, compilation and planning included. *gradients*: of the first "
    "step, against plain PyTorch's; *same sum*: other bits, but within 1e-9 of their length in float64 without "
    "dropout. *buffers*: bit-equal after one step (running statistics).",
    "",
    "A budget of 50 % holds parameters, buffers, gradients, optimizer state and half of the plain step's activations. "
    "While the activations are at their most there are few gradients yet, so a step within it may hold more than half "
    "of them; *half at every moment* is the peak of the plain step with half of its activations at each moment.",
    "",
)


def write_markdown(path: Path, told: dict[str, Any]) -> None:
    """Tables, ablations and verdicts of ``told`` (what training.json holds)."""
    lines = ["# Training inside a byte budget", "", "Made by `make bench-training`; raw numbers: `training.json`.", ""]
    lines += ["Machine: " + ", ".join(f"{key} {value}" for key, value in told["machine"].items()) + ".", ""]
    lines += _EXPLAINED
    present = {record["subject"] for model in told["models"].values() for record in model["records"]}
    lines += [f"- {SUBJECTS[name].label}: {SUBJECTS[name].note}." for name in SUBJECTS if _noted(name, present)]
    for model in told["models"].values():
        lines += [
            "",
            f"## {heading(model)}",
            "",
            f"Measured {model['measured']}",
            "",
            *budget_table(model),
            "",
            *setting_table(model),
        ]
        lines += failures(model)
        if model["ablation"]:
            lines += ["", f"### {model['model']}: each technique", "", *ablation_table(model)]
    verdicts = [verdict for model in told["models"].values() for verdict in judge(model)]
    if verdicts:
        lines += ["", f"## Checks: {sum(v['passed'] for v in verdicts)} of {len(verdicts)} pass", ""]
        lines += table(
            ("", "where", "what", "numbers"),
            [("pass" if v["passed"] else "**FAIL**", v["where"], v["what"], v["numbers"]) for v in verdicts],
        )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _noted(name: str, present: set[str]) -> bool:
    return name in present and bool(SUBJECTS[name].note)


def heading(model: dict[str, Any]) -> str:
    """What was trained, and what it holds."""
    smallest = model["minimum"].get("bytes")
    text = (
        f"{model['model']}, batch {model['batch']}: {format_bytes(sum(model['static'].values()))} static, "
        f"{format_bytes(model['activations'])} of activations"
    )
    return text + (f", smallest budget {format_bytes(smallest)}" if smallest else "")


def budget_table(model: dict[str, Any]) -> list[str]:
    """For each budget the fastest setting of every subject that peaked within it.

    Only settings with the plain step's gradients count; the peak is the allocator's.
    """
    records = model["records"]
    subjects = [name for name in SUBJECTS if any(record["subject"] == name for record in records)]
    budgets = {
        record["asked"]: record["budget"]
        for record in records
        if record["budget"] is not None and not record["asked"].startswith("peak of")
    }
    rows = []
    for asked, budget in budgets.items():
        row = [f"{asked} ({format_bytes(budget)})"]
        for name in subjects:
            exact = [point for point in points(r for r in records if r["subject"] == name) if point.exact]
            best = fastest_within(exact, budget)
            row.append("-" if best is None else f"{best.rate:.2f}" + (f" ({best.label})" if best.label != "-" else ""))
        rows.append(tuple(row))
    if not rows:
        return []
    title = "Samples per second of the fastest setting that peaked within the budget, with the plain step's gradients:"
    return [title, "", *table(("budget", *(SUBJECTS[name].label for name in subjects)), rows)]


def setting_table(model: dict[str, Any]) -> list[str]:
    """Everything that was measured, one line for each setting."""
    return table(_COLUMNS, [_values(record, model["records"][0]) for record in model["records"]])


def _values(record: dict[str, Any], plain: dict[str, Any]) -> tuple[str, ...]:
    rate = record.get("rate")
    speed = f"{rate:.2f}" if rate else {"refused": "refused", "ok": "-"}.get(record["status"], "failed")
    slower = f"{record['seconds'] / plain['seconds']:.2f}" if rate and plain.get("rate") else "-"
    checked = record["gradients"] is not None or record["parameters"] is not None
    return (
        SUBJECTS[record["subject"]].label,
        record["label"] + (f" (found {found})" if (found := record["told"].get("micro")) else ""),
        told_bytes(record["tensor_activations"]),
        told_bytes(record["tensor_peak"]),
        told_bytes(record["allocator_peak"]),
        told_bytes(record.get("rss_peak")),
        speed,
        slower,
        f"{record['first'] + record['prepare']:.1f} s" if rate else "-",
        _SAMENESS[record["sameness"]],
        ("same bits" if record["buffers"] == plain["buffers"] else "others") if checked else "-",
    )


def failures(model: dict[str, Any]) -> list[str]:
    """What went wrong, one line each."""
    lines = [
        f"- {SUBJECTS[record['subject']].label}, {record['label']}: {record['detail']}"
        for record in model["records"]
        if record["detail"]
    ]
    return ["", *lines] if lines else []


def ablation_table(model: dict[str, Any]) -> list[str]:
    """Narrowboat without each technique and with each alone."""
    plain = model["records"][0]
    rows = []
    for record in model["ablation"]:
        fits = bool(record.get("rate"))
        rows.append(
            (
                record["asked"],
                told_bytes(record["minimum"]),
                told_bytes(record["tensor_activations"]),
                f"{record['rate']:.2f}" if fits else record["status"],
                f"{record['seconds'] / plain['seconds']:.2f}" if fits and plain.get("rate") else "-",
                _SAMENESS[record["sameness"]],
            )
        )
    budget = next((record["budget"] for record in model["ablation"]), None)
    where = f"at {told_bytes(budget)}"
    columns = ("techniques", "smallest budget", f"activations {where}", f"samples / s {where}", "x plain", "gradients")
    return table(columns, rows)


def write_plot(path: Path, told: dict[str, Any]) -> None:
    """Samples per second against the allocator's peak, one panel per model; hollow where gradients are others."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    models = list(told["models"].values())
    rows = (len(models) + 1) // 2
    figure, panels = plt.subplots(rows, 2 if len(models) > 1 else 1, figsize=(12, 3.6 * rows + 0.6), squeeze=False)
    for axes in panels.flat[len(models) :]:
        axes.axis("off")
    for axes, model in zip(panels.flat, models, strict=False):
        for name, colour in _COLOURS.items():
            found = points(record for record in model["records"] if record["subject"] == name)
            if SUBJECTS[name].ours:
                best = pareto(found)
                axes.plot([p.peak / _MIB for p in best], [p.rate for p in best], color=colour, linewidth=1.5)
            for point in found:
                face = colour if point.exact else "none"
                axes.plot(point.peak / _MIB, point.rate, "o", color=colour, markerfacecolor=face, markersize=6)
        axes.axvline(sum(model["static"].values()) / _MIB, color="grey", linewidth=0.8, linestyle=":")
        axes.set_title(f"{model['model']}, batch {model['batch']}", fontsize=10)
        axes.set_xlabel("peak, MiB (dotted: parameters, gradients, optimizer)", fontsize=8)
        axes.set_ylabel("samples / s", fontsize=8)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], marker="o", color=c, label=SUBJECTS[n].label) for n, c in _COLOURS.items()]
    hollow = "hollow: other gradients than plain"
    handles.append(Line2D([], [], marker="o", color="grey", markerfacecolor="none", linestyle="", label=hollow))
    figure.legend(handles=handles, fontsize=8, ncols=5, loc="upper center", frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def told_bytes(nbytes: int | None) -> str:
    """A dash where there is nothing."""
    return "-" if nbytes is None else format_bytes(nbytes)


def table(columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """A Markdown table."""
    columns = tuple(columns)
    return [_row(columns), _row(("---",) * len(columns)), *map(_row, rows)]


def _row(values: Iterable[str]) -> str:
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"
