"""Networks larger than their budget beside plain PyTorch: latency, memory, bits; one operation put back at a time."""

from __future__ import annotations

import gc
import statistics
import time
from functools import partial
from typing import Any

from inference_kit.campaign import Campaign, measure_limits
from inference_kit.children import Emit
from inference_kit.derive import derive
from inference_kit.effort import Effort as Passes
from inference_kit.materials import Material, make_files, material
from narrowboat.machine.malloc import MallocPolicy, set_malloc_policy
from narrowboat.machine.memory import process_memory, reset_peak
from narrowboat.profile.warmup import warm_up
from narrowboat.quantities import format_bytes
from papers_kit.check import Bench, CheckError, Measurement
from papers_kit.energy import energy_joules
from plan_kit import children

_SLACK = 64 << 20  # of the memory limit, as in benchmarks/inference.py
_CACHE = 1 << 20  # bytes by which the page cache may grow: the file's header
_PASSES = 6
_NEAR = 1.10  # of plain PyTorch's latency


def streaming(bench: Bench) -> Measurement:
    """Plain PyTorch and packed narrowboat in turn, each in a child, narrowboat's in a memory cgroup."""
    effort = bench.effort
    limits = measure_limits(bench.work, _SLACK)
    passes = Passes(effort.rounds, effort.rounds, _PASSES, 6.0, 6.0, 60.0)
    joules = energy_joules()
    results = [
        Campaign(name, bench.work, ["resident", "narrowboat"], list(effort.divisors), passes, limits, bench.say).run()
        for name in effort.models
    ]
    after = energy_joules()
    cells = []
    for cell in derive(results):
        ours, plain = cell["rows"]["narrowboat"], cell["rows"]["resident"]
        if ours["status"] != "ok" or plain["status"] != "ok":
            failed = ours if ours["status"] != "ok" else plain
            raise CheckError(f"{cell['model']} at {cell['budget']}: {failed['status']}: {failed['detail']}")
        cells.append(
            {
                "model": cell["model"],
                "ratio": cell["weight_bytes"] / cell["budget_bytes"],
                "asked": cell["divisor"],
                "latency": ours["ratio"],
                "plain_s": plain["steady_s"],
                "over": ours["peak_bytes"] - cell["budget_bytes"],
                "saved": 1 - ours["peak_bytes"] / plain["peak_bytes"],
                "bits": ours["exact"],
                "difference": ours["difference"],
                "cached": ours["page_cache_growth"],
                "direct": ours["direct_io"],
                "copied": ours["copied_bytes"],
                "bandwidth": cell["bandwidth"],
                "tiled": any(bool(r["stats"].get("tiled_layers")) for r in _records(results, cell)),
            }
        )
    return told_of(cells) | {"limited": limits.refusal or "memory cgroup", "energy": _energy(joules, after)}


def _records(results: list[dict[str, Any]], cell: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        record
        for result in results
        if result["model"] == cell["model"]
        for record in result["records"]
        if record["subject"] == "narrowboat" and record["budget_bytes"] == cell["budget_bytes"]
    ]


def _energy(before: float | None, after: float | None) -> bool:
    return before is not None and after is not None and after > before


def told_of(cells: list[dict[str, Any]]) -> Measurement:
    """What the claims need of the measured cells; pure."""
    latencies = [cell["latency"] for cell in cells]
    saved = [cell["saved"] for cell in cells]
    whole = [cell for cell in cells if not cell["tiled"]]
    tiled = [cell for cell in cells if cell["tiled"]]
    worst = max(cells, key=lambda cell: cell["latency"])
    return {
        "cells": cells,
        "count": len(cells),
        "ratios": f"{min(c['ratio'] for c in cells):.2f} to {max(c['ratio'] for c in cells):.2f}",
        "median_latency": statistics.median(latencies),
        "least_latency": min(latencies),
        "worst_latency": max(latencies),
        "overhead": statistics.median(latencies) - 1,
        "worst_where": f"{worst['model']} at 1/{worst['ratio']:.2f}",
        "near": sum(latency <= _NEAR for latency in latencies),
        "saved": statistics.median(saved),
        "least_saved": min(saved),
        "most_saved": max(saved),
        "same_bits": all(cell["bits"] for cell in whole),
        "whole_count": len(whole),
        "tiled_count": len(tiled),
        "tiled_difference": f"{max((c['difference'] or 0.0 for c in tiled), default=0.0):.0e}",
        "tiled_close": all((cell["difference"] or 0.0) < 1e-5 for cell in tiled),
        "cached": format_bytes(max(cell["cached"] for cell in cells)),
        "page_cache_stayed": all(cell["cached"] <= _CACHE for cell in cells),
        "direct_reads": all(cell["direct"] for cell in cells),
        "copied": format_bytes(sum(cell["copied"] for cell in cells)),
        "nothing_copied": not any(cell["copied"] for cell in cells),
        "within_budget": all(cell["over"] <= 0 for cell in cells),
        "most_over": format_bytes(max(0, *(cell["over"] for cell in cells))),
        "bandwidth": statistics.median(cell["bandwidth"] for cell in cells),
    }


def removed(bench: Bench) -> Measurement:
    """The same plan with one of SwapNet's removed operations put back, in turns; and assembly with a dummy model."""
    effort = bench.effort
    files = material(effort.models[0], bench.work)
    bench.apart("removed-files", partial(_files, files), 600)
    bench.apart("removed-profile", partial(_profile, files), 300)
    budget = int(files.weight_bytes / effort.divisors[0])
    seconds: dict[str, list[float]] = {}
    for number in range(effort.ablation_rounds):
        names = ["", "buffered", "copied"]
        for name in names[number % 3 :] + names[: number % 3]:
            body = partial(_plan, files=files, budget=budget, ablation=name)
            found = bench.apart(f"removed-{name or 'none'}", body, 120)
            seconds.setdefault(name or "none", []).append(found["seconds"])
            bench.say(f"removed operations, {name or 'none put back'}: {found['seconds'] * 1e3:.0f} ms")
    files.drop_caches()
    dummy = bench.apart("removed-dummy", partial(_assemble, files, True), 120)
    files.drop_caches()
    skeleton = bench.apart("removed-skeleton", partial(_assemble, files, False), 120)
    each = list(zip(seconds["none"], seconds["buffered"], seconds["copied"], strict=True))
    return {
        "model": files.model.name,
        "weights": format_bytes(files.weight_bytes),
        "buffered_over": statistics.median(b / n for n, b, _ in each),
        "copied_over": statistics.median(c / n for n, _, c in each),
        "dummy_peak": format_bytes(dummy["peak"]),
        "skeleton_peak": format_bytes(skeleton["peak"]),
        "dummy_over_weights": dummy["peak"] / files.weight_bytes,
        "skeleton_over_weights": skeleton["peak"] / files.weight_bytes,
        "dummy_ms": dummy["seconds"] * 1e3,
        "skeleton_ms": skeleton["seconds"] * 1e3,
        "skeleton_is_small": skeleton["peak"] < 0.05 * files.weight_bytes,
        "dummy_is_a_copy": dummy["peak"] > 0.95 * files.weight_bytes,
    }


def _files(files: Material, emit: Emit) -> None:
    make_files(files, pth=False, groups=False)


def _profile(files: Material, emit: Emit) -> None:
    children.profile(emit, files)


def _plan(emit: Emit, files: Material, budget: int, ablation: str) -> None:
    def told(kind: str, **values: Any) -> None:
        emit("measured" if kind == "plan" else kind, **values)

    children.run_plan(told, files, budget, "best", ablation, 5)


def _assemble(files: Material, dummy: bool, emit: Emit) -> None:
    """What exists before a first weight can be used: a model with random parameters, or one without any."""
    from narrowboat.profile.skeleton import build_skeleton

    warm_up()
    set_malloc_policy(MallocPolicy.STRICT)
    gc.collect()
    reset_peak()
    baseline = process_memory().rss
    start = time.perf_counter()
    kept: Any = files.model() if dummy else build_skeleton(files.model)
    seconds = time.perf_counter() - start
    emit("measured", seconds=seconds, peak=process_memory().hwm - baseline, kept=type(kept).__name__)
