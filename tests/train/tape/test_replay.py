"""Any schedule, however odd, gives the bits of the plain pass: gradients, buffers, random streams, attributes."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from narrowboat.plan.recompute import Kept, Segment
from narrowboat.train.measure import chain as chain_module
from narrowboat.train.measure.chain import Rates, TrainingChain, build_chain
from narrowboat.train.measure.fake import fake_walk
from narrowboat.train.measure.study import study
from narrowboat.train.spill import SpillPool
from narrowboat.train.tape.cells import Pool
from narrowboat.train.tape.frames import StepPlan, UnitOption, compile_plan
from narrowboat.train.tape.run import TapeRun
from narrowboat.train.tape.structure import Tape
from train_kit import CASES, Case, Course, cross_entropy, gradients, random_items

STEPS, SCHEDULES = 2, 15


def one_pass(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    torch.clear_autocast_cache()  # casts of weights belong to one pass each
    loss = cross_entropy(model(x), y)
    torch.clear_autocast_cache()
    return loss


def course(case: Case, plan: StepPlan | None = None, pool: Pool | None = None) -> tuple[Course, int]:
    """Train a new model; what came of it, and the number of replays."""
    model = case.model()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    told, replays = Course(), 0
    torch.manual_seed(2)
    for step, (x, y) in enumerate(case.batches(STEPS)):
        optimizer.zero_grad()
        with case.context():
            if plan is None:
                loss = one_pass(model, x, y)
            else:
                run = TapeRun(plan, pool)
                with run.forward():
                    loss = one_pass(model, x, y)
                assert run.departed is None or (case.first_pass_differs and step == 0)
        loss.backward()
        if plan is not None:
            replays += run.replays
            run.close()
        told.losses.append(loss.item())
        told.gradients.append(gradients(model))
        optimizer.step()
    return told.finish(model), replays


def measured(case: Case) -> Tape:
    model = case.model()
    x, y = case.batches(1)[0]
    with case.context():
        return study(model, lambda a, b: one_pass(model, a, b), x, y).tape(case.samples)


@pytest.fixture
def chain_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Case], TrainingChain]:
    """A chain with every option there is, however small the storages."""
    monkeypatch.setattr(chain_module, "_SMALLEST_SPILL", 1024)
    return lambda case: build_chain(measured(case), rates=Rates(write=1e-9, read=1e-9))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_random_schedules_give_the_bits_of_the_plain_pass(
    case: Case, chain_of: Callable[[Case], TrainingChain], tmp_path: Path
) -> None:
    chain = chain_of(case)
    plain, _ = course(case)
    rng = random.Random(case.name)
    replays = 0
    with SpillPool(tmp_path, in_flight=1 << 20) as pool:
        for _ in range(SCHEDULES):
            items = random_items(rng, 0, len(chain.options), chain.options)
            plan = compile_plan(chain.tape, chain.cuts, chain.options, items)
            told, replayed = course(case, plan, pool)
            assert told.differences(plain) == [], items
            replays += replayed
    assert replays > SCHEDULES


class Late(nn.Module):
    """Writes to a tensor of the pass after a dropped stretch has read it, if told to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(32, 32), nn.Linear(32, 10)
        self.late = False

    def forward(self, x: Tensor) -> Tensor:
        held = self.layer(x)  # 0
        y = torch.cos(held * 2.0)  # 1, 2; what is dropped begins with ``held``
        if self.late:
            held += 1.0
        return self.head(y + held)


@pytest.mark.parametrize("spilled", [False, True])
def test_a_write_that_the_plan_does_not_know_of_does_not_reach_what_frames_hold(spilled: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Late()
    x, y = CASES["mlp"].batches(1)[0]
    tape = fake_walk(model, lambda a, b: one_pass(model, a, b), x, y, len(x))
    keep = [(UnitOption("keep"),)] * 3
    items = [Kept(0), Segment(1, 2, (Kept(1),), spilled), Kept(2)]
    plan = compile_plan(tape, (0, 1, 3, len(tape.ops)), keep, items)
    assert plan.frames[0].program.inputs == {0}
    model.late = True
    one_pass(model, x, y).backward()
    want = gradients(model)
    model.zero_grad()
    with SpillPool(tmp_path, in_flight=1 << 20) as pool:
        run = TapeRun(plan, pool)
        with run.forward():
            loss = one_pass(model, x, y)
        assert run.departed is not None and run.departed[1] == "aten::add_"
        loss.backward()
    assert run.replays == 1
    assert all(torch.equal(a, b) for a, b in zip(want, gradients(model), strict=True))


def test_a_pass_that_is_never_sent_back_leaves_nothing_behind() -> None:
    case = CASES["mlp"]
    model, (x, y) = case.model(), case.batches(1)[0]
    chain = build_chain(fake_walk(model, lambda a, b: one_pass(model, a, b), x, y, len(x)))
    plan = compile_plan(chain.tape, chain.cuts, chain.options, [Kept(unit) for unit in range(len(chain.options))])
    gc.disable()
    try:
        run = TapeRun(plan)
        with run.forward():
            hidden = torch.exp(model(x))
            kept = weakref.ref(hidden.untyped_storage())
            hidden.sum()
        del hidden
        run.close()
        assert kept() is None
    finally:
        gc.enable()
