"""Runs, plans, profiles, benches and generations of one model."""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path

from narrowboat.quantities import format_bytes, format_seconds
from narrowboat.report import plots
from narrowboat.report.draw.timeline import covered
from narrowboat.report.records.find import Loaded
from narrowboat.report.records.model import (
    BenchRecord,
    Budgeted,
    GenerateRecord,
    PlanRecord,
    RunRecord,
)
from narrowboat.report.sections.section import (
    BAD,
    GOOD,
    NOTE,
    Section,
    Table,
    begin,
    budget_finding,
    prediction_finding,
    seconds,
    size,
)
from narrowboat.trace import Trace

_ROWS = 40  # of a table


def run_section(loaded: Loaded) -> Section:
    """``narrowboat run --json``."""
    run: RunRecord = loaded.value
    section = begin(loaded, f"A run of {_name(run.model, run.weights)}")
    budget_finding(section, run.peak_bytes, run.budget_bytes)
    if run.latency_ms:
        measured = statistics.median(run.steady_ms)
        told = run.predicted_ms[2:] or [run.predicted_latency_ms]
        prediction_finding(section, statistics.median(told) / 1e3, measured / 1e3, "pass")
        waiting = sum(run.stall_ms[2:] or run.stall_ms[-1:]) / max(sum(run.steady_ms), 1e-9)
        said = "reading is hidden behind computing" if waiting < 0.02 else "reading sets the pace there"
        section.notice(GOOD if waiting < 0.02 else NOTE, f"Passes wait {waiting:.1%} of their time: {said}.")
    if run.bit_identical is not None:
        said = "The outputs are plain PyTorch's, every bit." if run.bit_identical else f"Wrong: {run.difference}."
        section.notice(GOOD if run.bit_identical else BAD, said)
    if run.copied_bytes:
        section.notice(NOTE, f"{format_bytes(run.copied_bytes)} were copied: the file is not packed.")
    section.picture(
        "passes",
        "Predicted and measured, pass by pass",
        f"Bars: {len(run.latency_ms)} passes, {_range(run.latency_ms)} each; a line: the prediction.",
        "The first passes fill memory, and teach the plan. From then on bars should end at the line.",
        lambda width: plots.passes(run, title="Time per pass", width=width),
    ) if run.latency_ms else None
    if run.memory:
        section.picture(
            "memory",
            "Memory over time against the budget",
            f"A line below the dashed budget of {format_bytes(run.budget_bytes)}.",
            "Looked at every 20 ms; the dotted line is the kernel's own high-water mark, which misses nothing.",
            lambda width: plots.memory(run, title="Resident memory over the process baseline", width=width),
        )
    if any(row.compute_ms is not None for row in run.blocks):
        section.picture(
            "blocks",
            "Predicted and measured, block by block",
            f"Bars: {len(run.blocks)} blocks, of many those of a module together; a mark at each: the prediction.",
            "A bar that ends far from its mark is where the prediction went wrong.",
            lambda width: plots.blocks(run, title="Time per block", width=width),
        )
    _budget_picture(section, run)
    section.tables.append(_pass_table(run))
    section.facts |= _budget_facts(run) | {
        "device": run.device,
        "storage": "direct I/O: the page cache is not used" if run.direct_io else "buffered reads",
        "allocator": run.allocator_policy,
        "first answer": seconds(run.first_answer_ms),
    }
    return section


def _pass_table(run: RunRecord) -> Table:
    told = run.predicted_ms or [run.predicted_latency_ms] * len(run.latency_ms)
    rows = [
        (str(number), seconds(latency), seconds(predicted), seconds(stall), size(nbytes))
        for number, (latency, stall, nbytes, predicted) in enumerate(
            zip(run.latency_ms, run.stall_ms, run.bytes_read, told, strict=False), start=1
        )
    ]
    shown = rows if len(rows) <= _ROWS else [*rows[:10], *rows[10 - _ROWS :]]
    left_out = f"; {len(rows) - len(shown)} after the tenth are left out" if len(shown) < len(rows) else ""
    return Table(f"Passes{left_out}", ["pass", "measured", "predicted", "waiting", "read"], shown, frozenset())


def trace_section(loaded: Loaded) -> Section:
    """``narrowboat run --trace``."""
    trace: Trace = loaded.value
    section = begin(loaded, "What happened when")
    events = trace.events()
    if not events:
        section.notice(NOTE, "The trace has no events.")
        return section
    start, end = min(e.start for e in events), max(e.end for e in events)
    busy = {
        lane: covered([(e.start, e.end) for e in events if e.lane == lane]) for lane in ("read", "compute", "stall")
    }
    whole, nbytes = end - start, sum(e.nbytes for e in events if e.lane == "read")
    waiting = busy["stall"] / whole if whole else 0.0
    section.notice(
        GOOD if waiting < 0.02 else NOTE,
        f"In {format_seconds(whole)} it computed for {format_seconds(busy['compute'])}, read "
        f"{format_bytes(nbytes)} within {format_seconds(busy['read'])}, and waited for "
        f"{format_seconds(busy['stall'])} ({waiting:.1%}).",
    )
    section.picture(
        "timeline",
        "Reads, computing and stalls",
        f"Rows of bars over {format_seconds(whole)}: reads, computing, stalls.",
        "Reads run ahead of computing; a stall is a block that came too late.",
        lambda width: plots.timeline(trace, title="The last passes", width=width),
    )
    return section


def plan_section(loaded: Loaded) -> Section:
    """``narrowboat plan --json``."""
    plan: PlanRecord = loaded.value
    section = begin(loaded, f"A plan for {_name(plan.model, plan.weights)}")
    section.notice(
        NOTE,
        f"{format_bytes(plan.weight_bytes)} of weights in {format_bytes(plan.budget_bytes)}: "
        f"{seconds(plan.predicted_latency_ms)} per pass predicted, {seconds(plan.predicted_stall_ms)} of it waiting.",
    )
    if plan.bound_ms:
        section.notice(
            GOOD if plan.gap <= 0.05 else NOTE,
            f"No plan in this budget can take less than {seconds(plan.bound_ms)}: this one is {plan.gap:.1%} above.",
        )
    for advice in plan.advice:
        section.notice(NOTE, f"{advice[:1].upper()}{advice[1:]}.")
    if plan.curve:
        _curve_picture(section, partial(plots.latency_curve, plan), len(plan.curve))
    _budget_picture(section, plan)
    if plan.block_list:
        waited = sorted(plan.block_list, key=lambda row: -(row.predicted_stall_ms or 0.0))
        rows = [
            (row.name, size(row.bytes), "resident" if row.resident else "streamed", seconds(row.predicted_stall_ms))
            for row in waited[:_ROWS]
        ]
        caption = f"Blocks, those first that are waited for longest ({len(rows)} of {len(plan.block_list)})"
        columns = ["block", "bytes", "lives", "predicted wait"]
        section.tables.append(Table(caption, columns, rows, frozenset({0, 2})))
    speed = f"{plan.bandwidth_bytes_per_s / 1e9:.2f} GB/s"
    section.facts |= _budget_facts(plan) | {"set by": plan.limiter, "storage": speed, "scheme": plan.scheme}
    return section


def bench_section(loaded: Loaded) -> Section:
    """``narrowboat bench --json``."""
    bench: BenchRecord = loaded.value
    section = begin(loaded, f"{_name(bench.model, bench.weights)} at several budgets")
    for row in bench.rows:
        at = format_bytes(row.budget_bytes) if row.budget_bytes is not None else "everything in memory"
        if row.refused:
            section.notice(NOTE, f"{at} was refused; the smallest budget is {size(row.min_budget_bytes)}.")
        elif row.bit_identical is False:
            section.notice(BAD, f"At {at} the outputs are not plain PyTorch's.")
        elif row.budget_bytes is not None and row.peak_bytes is not None and row.latency_ms:
            ratio = "" if row.ratio is None else f", {row.ratio:.2f} times plain PyTorch's"
            held = row.peak_bytes <= row.budget_bytes
            said = f"the budget {'held' if held else 'was passed'}, {format_bytes(row.peak_bytes)} at the highest"
            section.notice(GOOD if held else BAD, f"At {at}: {seconds(row.latency_ms)} per pass{ratio}; {said}.")
    if any(row.budget_bytes is not None and row.latency_ms for row in bench.rows):
        _curve_picture(section, partial(plots.latency_curve, bench), len(bench.rows))
    columns = ["", "budget", "latency", "to plain", "predicted", "first answer", "read per pass", "peak", "exact"]
    exact = {None: "", True: "yes", False: "NO"}
    rows = [
        (
            r.subject,
            "all" if r.budget_bytes is None else size(r.budget_bytes),
            "refused" if r.refused else seconds(r.latency_ms),
            "" if r.ratio is None else f"{r.ratio:.2f}x",
            seconds(r.predicted_latency_ms),
            seconds(r.first_answer_ms),
            size(r.bytes_read),
            size(r.peak_bytes),
            exact[r.bit_identical],
        )
        for r in bench.rows
    ]
    section.tables.append(Table(f"Medians of {bench.rounds} rounds of {bench.passes} passes", columns, rows))
    return section


def generate_section(loaded: Loaded) -> Section:
    """``narrowboat generate --json``."""
    told: GenerateRecord = loaded.value
    section = begin(loaded, f"Text from {_name(told.folder, '')}")
    budget_finding(section, told.peak_bytes, told.budget_bytes)
    if told.tokens_per_s:
        bound = f"; storage allows {told.bound_tokens_per_s:.3g}" if told.bound_tokens_per_s else ""
        section.notice(NOTE, f"{told.tokens_per_s:.3g} tokens/s after the first{bound}.")
    if told.pass_ms[1:]:
        prediction_finding(section, told.predicted_token_ms / 1e3, statistics.median(told.pass_ms[1:]) / 1e3, "token")
    if told.token_ms or told.pass_ms[1:]:
        section.picture(
            "tokens",
            "Predicted and measured, token by token",
            f"Bars: {len(told.pass_ms[1:]) or len(told.token_ms)} tokens; a line: the prediction.",
            "The prompt's own pass is left out: it computes many tokens at once.",
            lambda width: plots.passes(told, title="Time per token", width=width),
        )
    section.facts |= {
        "budget": f"{format_bytes(told.budget_bytes)} (smallest possible {format_bytes(told.min_budget_bytes)})",
        "prompt": f"{told.prompt_tokens} tokens: {told.prompt[:300]}",
        "answer": f"{len(told.token_ids)} tokens: {told.text[:600]}",
        "first token": seconds(told.first_token_ms),
        "read per token": f"{format_bytes(told.bytes_per_token)} at {told.bandwidth_bytes_per_s / 1e9:.2f} GB/s",
        "key-value cache": format_bytes(told.cache_bytes),
    }
    return section


def _name(model: str, weights: str) -> str:
    return model or Path(weights).name or "a model"


def _range(values: list[float]) -> str:
    return f"{seconds(min(values))} to {seconds(max(values))}"


def _curve_picture(section: Section, draw: partial[object], count: int) -> None:
    section.picture(
        "curve",
        "Latency against budget",
        f"A falling line over {count} budgets, in milliseconds per pass.",
        "Left of the knee every MiB buys much; right of it little.",
        lambda width: draw(title="Latency against budget", width=width),
    )


def _budget_picture(section: Section, told: Budgeted) -> None:
    if any(nbytes for _, nbytes in told.parts):
        section.picture(
            "budget",
            "Where the budget goes",
            "Bars end to end: " + ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in told.parts if nbytes),
            "Resident weights are never read again; the window is shared by all others, one after the other.",
            lambda width: plots.budget(told, title="Where the budget goes", width=width),
        )


def _budget_facts(told: Budgeted) -> dict[str, str]:
    return {
        "budget": f"{format_bytes(told.budget_bytes)} (smallest possible {format_bytes(told.min_budget_bytes)})",
        "weights": f"{format_bytes(told.weight_bytes)}, {format_bytes(told.resident_bytes)} of them resident",
    }
