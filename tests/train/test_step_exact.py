"""Training under any budget is the plain loop: losses, parameters, buffers, optimizer state, random streams."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import pytest
import torch

from narrowboat.train.report import StepRecord
from narrowboat.train.step import train_step
from train_kit import CASES, Case, Course, budget_of, cross_entropy

SHARES = (1.0, 0.6, 0.3, 0.0)  # of the plain step's activations, for two steps each; 0 is the minimum
STEPS = 2 * len(SHARES)


def seed() -> None:
    torch.manual_seed(2)
    random.seed(2)


@cache
def plain(name: str) -> Course:
    case = CASES[name]
    model = case.model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    told = Course()
    seed()
    for x, y in case.batches(STEPS):
        optimizer.zero_grad()
        with case.context():
            loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        told.losses.append(loss.item())
    return told.finish(model, optimizer)


def stepped(case: Case, folder: Path | None, techniques: tuple[str, ...]) -> tuple[Course, list[StepRecord]]:
    """Train with a budget that is lowered after every two steps."""
    model = case.model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    told, batches = Course(), case.batches(STEPS)
    seed()
    with (
        case.context(),
        train_step(
            model,
            cross_entropy,
            optimizer,
            budget="8GiB",
            spill=folder,
            techniques=techniques,
            micro_batches=1,
            adapt=False,
            enforce=False,
        ) as step,
    ):
        for number, (x, y) in enumerate(batches):
            step.budget = budget_of(step.prepare(x, y), SHARES[number // 2])
            told.losses.append(step(x, y).item())
        return told.finish(model, optimizer), list(step.report().steps)


@pytest.mark.usefixtures("small_things_count")
@pytest.mark.parametrize("spill", [False, True], ids=["recomputing", "spilling"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_any_budget_trains_as_the_plain_loop_does(case: Case, spill: bool, tmp_path: Path) -> None:
    if spill:
        told, records = stepped(case, tmp_path, ("spill", "compact"))
    else:
        told, records = stepped(case, None, ("recompute", "reduce", "compact"))
    assert told.differences(plain(case.name)) == []
    departed = [record.departed for record in records[1 if case.first_pass_differs else 0 :]]
    assert departed == [""] * len(departed)
    assert {record.repeated for record in records} == {0}
    if case.name == "old spectral norm":
        pass  # saves too little for storage or a replay to be worth the bytes that they take
    elif spill:
        assert sum(record.spilled for record in records[-2:]) > 0
    else:
        assert sum(record.replays for record in records) > 0
