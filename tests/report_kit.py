"""Small records as narrowboat's commands write them, for the tests of reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from narrowboat.machine.about import about
from narrowboat.tasks.task_set import TaskSet

MIB = 1 << 20
PARTS = {
    "budget_bytes": 80 * MIB,
    "min_budget_bytes": 20 * MIB,
    "weight_bytes": 170 * MIB,
    "resident_bytes": 30 * MIB,
    "window_bytes": 25 * MIB,
    "fixed_parts": {"activations": 12 * MIB, "buffers": 0},
}


def run_document(**changes: Any) -> dict[str, Any]:
    """What ``narrowboat run --json`` prints: six passes of a model of four blocks."""
    latency = [120.0, 110.0, 100.0, 101.0, 99.0, 100.0]
    blocks = [
        {
            "name": f"layer.{k}",
            "bytes": 9 * MIB,
            "resident": k == 0,
            "predicted_compute_ms": 20.0,
            "compute_ms": 22.0,
            "predicted_stall_ms": 0.0,
            "stall_ms": 1.0,
        }
        for k in range(4)
    ]
    told = {
        "model": "zoo:tiny",
        "weights": "tiny.safetensors",
        "latency_ms": latency,
        "stall_ms": [10.0, 5.0, 1.0, 1.0, 1.0, 1.0],
        "bytes_read": [9 * MIB] * 6,
        "predicted_latency_ms": 106.0,
        "predicted_ms": [90.0, 106.0, 106.0, 106.0, 106.0, 106.0],
        "peak_bytes": 79 * MIB,
        "bit_identical": True,
        "blocks": blocks,
        "memory": [[0.0, 10 * MIB], [0.1, 78 * MIB], [0.5, 60 * MIB]],
        "about": about(),
        **PARTS,
    }
    return {**told, **changes}


def train_document(**changes: Any) -> dict[str, Any]:
    """What ``narrowboat train --json`` prints: three steps."""
    step = {"loss": 1.5, "seconds": 0.2, "budget": 100 * MIB, "predicted_peak": 90 * MIB, "measured_peak": 95 * MIB}
    told = {
        "model": "zoo:tiny",
        "data": "digits",
        "learned": "images",
        "steps": 3,
        "planned_steps": 3,
        "first_loss": 1.5,
        "last_loss": 0.5,
        "scores": [{"step": 3, "loss": 0.6, "accuracy": 0.9}],
        "samples_per_s": 80.0,
        "seconds_per_step": 0.2,
        "budget_bytes": 100 * MIB,
        "predicted_peak_bytes": 90 * MIB,
        "measured_peak_bytes": 95 * MIB,
        "over_budget": 0,
        "plan": {
            "budget_bytes": 100 * MIB,
            "min_budget_bytes": 50 * MIB,
            "bottleneck": "layer.2",
            "bytes": {"weights": 20 * MIB, "activations": 60 * MIB},
            "predicted_peak_bytes": 90 * MIB,
            "plain_peak_bytes": 200 * MIB,
            "predicted_slowdown": 1.3,
            "predicted_seconds": 0.19,
            "plain_seconds": 0.15,
        },
        "history": [step, step, {**step, "loss": 0.5}],
    }
    return {**told, **changes}


def train_plan_document() -> dict[str, Any]:
    """What ``narrowboat plan --train --json`` prints."""
    curve = [
        {"budget": nbytes * MIB, "predicted_peak": nbytes * MIB, "slowdown": slowdown}
        for nbytes, slowdown in ((50, 2.0), (100, 1.3), (200, 1.0))
    ]
    return {**train_document()["plan"], "model": "zoo:tiny", "learned": "images", "batch": 16, "curve": curve}


def plan_document() -> dict[str, Any]:
    """What ``narrowboat plan --json --curve`` prints."""
    curve = [
        {"budget_bytes": nbytes * MIB, "predicted_latency_ms": ms, "bound_ms": ms * 0.9, "all_resident": nbytes == 170}
        for nbytes, ms in ((20, 300.0), (40, 120.0), (80, 106.0), (170, 100.0))
    ]
    told = {"model": "zoo:tiny", "limiter": "layer.2", "predicted_latency_ms": 106.0, "bound_ms": 104.0, "gap": 0.02}
    return {**told, **PARTS, "curve": curve, "measured": [{"budget_bytes": 80 * MIB, "latency_ms": 110.0}]}


def profile_document() -> dict[str, Any]:
    """What ``narrowboat profile -o`` writes."""
    block = {"name": "layer.0", "bytes": MIB, "uses": 1, "compute_idle_ms": 2.0, "compute_busy_ms": 2.5}
    table = [
        {"budget": nbytes * MIB, "latency_ms": ms, "lower_bound_ms": ms, "streamed": [1] * (nbytes < 100)}
        for nbytes, ms in ((20, 300.0), (50, 120.0), (170, 100.0))
    ]
    return {
        "format": 4,
        "identity": {"weights": "abc"},
        "policy": "default",
        "step_seconds": [0.01, 0.02],
        "contention": 0.1,
        "needs": {"default": MIB},
        "paces": {"default": 0.03},
        "bandwidths": [1e9, 1.1e9],
        "blocks": [block],
        "table": table,
    }


def bench_document() -> dict[str, Any]:
    """What ``narrowboat bench --json`` prints."""
    plain = {"subject": "plain", "budget_bytes": None, "latency_ms": 90.0, "ratio": 1.0}
    ours = {"subject": "narrowboat", "budget_bytes": 80 * MIB, "latency_ms": 110.0, "predicted_latency_ms": 106.0}
    refused = {"subject": "narrowboat", "budget_bytes": MIB, "latency_ms": None, "refused": "x", "min_budget_bytes": 9}
    rows = [plain, {**ours, "peak_bytes": 79 * MIB, "bit_identical": True, "ratio": 1.22}, refused]
    return {"model": "zoo:tiny", "weights": "w", "passes": 4, "rounds": 1, "rows": rows}


def generate_document() -> dict[str, Any]:
    """What ``narrowboat generate --json`` prints."""
    return {
        "folder": "folder",
        "prompt": "The boat",
        "text": " is narrow",
        "token_ids": [1, 2, 3],
        "prompt_tokens": 2,
        "first_token_ms": 50.0,
        "tokens_per_s": 20.0,
        "bytes_per_token": 5.0,
        "bound_tokens_per_s": None,
        "bandwidth_bytes_per_s": 1e9,
        "budget_bytes": 80 * MIB,
        "min_budget_bytes": 10 * MIB,
        "peak_bytes": 70 * MIB,
        "token_ms": [50.0, 50.0],
        "predicted_token_ms": 48.0,
        "pass_ms": [60.0, 50.0, 51.0],
        "stall_ms": [1.0, 1.0, 1.0],
        "bytes_read": [5, 5, 5],
    }


def task_document(seconds: float = 2.0, *, best_effort: str = "words") -> dict[str, Any]:
    """What ``narrowboat tasks simulate --trace`` writes; the best-effort task misses deadlines."""

    def block(load: str, compute: str) -> dict[str, str]:
        return {"load": load, "compute": compute, "bytes": "10MiB"}

    tasks = [
        {"name": "camera", "period": "150ms", "deadline": "140ms", "blocks": [block("9ms", "12ms")] * 2},
        {
            "name": best_effort,
            "period": "400ms",
            "deadline": "60ms",
            "guarantee": "best-effort",
            "blocks": [block("20ms", "60ms")],
        },
    ]
    record = TaskSet.from_dict({"budget": "96MiB", "tasks": tasks}).simulate(seconds)
    return record.as_json()


def rename_task(document: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """The same record with another name for a task, whatever that is: no command would write such a one."""
    return json.loads(json.dumps(document).replace(json.dumps(old), json.dumps(new)))


def write(folder: Path, name: str, document: Any) -> Path:
    """``document`` in a file."""
    path = folder / name
    path.write_text(json.dumps(document), encoding="utf-8")
    return path
