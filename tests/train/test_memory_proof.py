"""A training budget holds, seen from outside: by the process's high-water mark, and by the kernel's own limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from narrowboat.machine.cgroup import MemoryCgroup, writable_memory_cgroup
from narrowboat.train.step import train_step
from train_kit import budget_of, cross_entropy
from train_memory_kit import sizeable

MIB = 1 << 20
REFUSAL = writable_memory_cgroup()
# A small model is trained first: code pages, threads and caches that any process holds are there then, and what
# follows is what the model takes.
CHILD = """
import json, sys
import torch
torch.set_num_threads(1)
kind, budget, folder = sys.argv[2], int(sys.argv[3]), sys.argv[4] or None
sys.path.insert(0, sys.argv[1])
import train_kit, train_memory_kit
from narrowboat.machine.memory import process_memory
import narrowboat.train.host_memory, narrowboat.train.step as module
narrowboat.train.host_memory.reset_peak = lambda: None  # the mark covers everything from here on, measuring included
options = {"micro_batches": 1, "adapt": False, "spill": folder, "techniques": ["spill"] if folder else None}

def train(model, x, y, budget):
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-3), []
    torch.manual_seed(2)
    if budget:
        step = module.train_step(model, train_kit.cross_entropy, optimizer, budget=budget, **options)
        return [step(x, y).item() for _ in range(2)], step
    for _ in range(2):
        optimizer.zero_grad()
        loss = train_kit.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, None

train(*train_memory_kit.sizeable(kind, small=True), budget and 1 << 40)
model, x, y = train_memory_kit.sizeable(kind)
held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers(), x, y))
baseline = process_memory().rss - held
losses, step = train(model, x, y, budget)
told = {"losses": losses, "taken": process_memory().hwm - baseline, "baseline": baseline}
if step is not None:
    record = step.report().steps[-1]
    told |= {"repeated": record.repeated, "spilled": record.spilled, "replays": record.replays}
print(json.dumps(told))
"""
ENVIRONMENT = {**os.environ, "GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": "1"}


def run(kind: str, budget: int = 0, folder: Path | str = "", group: MemoryCgroup | None = None) -> dict[str, Any]:
    """Two steps in a process of its own; plain ones without a budget."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(Path(__file__).parents[1]), kind, str(budget), str(folder)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        preexec_fn=group.enter if group is not None else None,
    )
    assert child.returncode == 0, f"exit {child.returncode}\n{child.stderr[-2000:]}"
    told: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return told


@cache
def budget_for(kind: str, folder: Path | None = None) -> tuple[int, int]:
    """The bytes that leave activations two fifths of the plain step's (a half, with a folder), and without any."""
    model, x, y = sizeable(kind)
    techniques = ["spill"] if folder else None
    optimizer = torch.optim.AdamW(model.parameters())
    options: dict[str, Any] = {"micro_batches": 1, "adapt": False, "spill": folder, "techniques": techniques}
    with train_step(model, cross_entropy, optimizer, budget="1TiB", **options) as step:
        plan = step.prepare(x, y)
    return budget_of(plan, 0.5 if folder else 0.4), plan.static.total


@pytest.mark.parametrize("kind", ["cnn", "gpt"])
def test_the_high_water_mark_at_two_fifths_of_the_activations_stays_under_the_budget(kind: str) -> None:
    budget, static = budget_for(kind)
    plain, told = run(kind), run(kind, budget)
    assert told["losses"] == plain["losses"]
    assert told["taken"] <= budget
    assert told["replays"] > 0 and told["repeated"] == 0
    assert budget - static < 0.5 * (plain["taken"] - static)


def test_the_high_water_mark_with_activations_on_storage_stays_under_the_budget(tmp_path: Path) -> None:
    budget, _ = budget_for("gpt", tmp_path)
    told = run("gpt", budget, tmp_path)
    assert told["taken"] <= budget
    assert told["spilled"] > 0 and told["repeated"] == 0


@pytest.mark.skipif(REFUSAL is not None, reason=f"no writable memory cgroup: {REFUSAL}")
def test_the_kernel_finds_no_more_than_the_budget() -> None:
    budget, _ = budget_for("cnn")
    free = run("cnn", budget)
    # What a child holds beside its baseline: page tables, and code pages that it touches later.
    limit = free["baseline"] + budget + 16 * MIB
    with MemoryCgroup(limit) as group:
        told = run("cnn", budget, group=group)
        assert group.oom_kills() == 0
        assert (group.peak() or 0) <= limit
    assert told["losses"] == free["losses"]
