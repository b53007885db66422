"""What is foreseen of a step's memory is what its tensors take."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from narrowboat.plan.recompute import Kept, Segment, evaluate, solve
from narrowboat.train.measure.chain import Techniques, TrainingChain, build_chain
from narrowboat.train.measure.fake import fake_walk
from narrowboat.train.measure.simulate import foresee
from narrowboat.train.tape.frames import StepPlan, UnitOption, compile_plan
from narrowboat.train.tape.run import TapeRun
from tape_kit import Hand, layers
from train_kit import GPT, ResNet, cross_entropy, random_items
from train_memory_kit import LiveTensors


class Subject:
    """A model, a batch, and the chain of its pass."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = model.train(), x, y
        self.tape = fake_walk(model, self.loss, x, y, len(x))
        self.chains = {compact: build_chain(self.tape, Techniques(compact=compact)) for compact in (False, True)}

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(self.model(x), y)

    def peak(self, plan: StepPlan | None) -> int:
        """Bytes of tensors at the worst moment of a real step, gradients of parameters not counted."""
        for parameter in self.model.parameters():
            parameter.grad = None
        live = LiveTensors(self.x, self.y, list(self.model.parameters()), list(self.model.buffers()))
        torch.manual_seed(0)
        with live:
            if plan is None:
                self.loss(self.x, self.y).backward()
            else:
                run = TapeRun(plan)
                with run.forward():
                    loss = self.loss(self.x, self.y)
                assert run.departed is None
                loss.backward()
                del loss
        return live.peak(*(p.grad for p in self.model.parameters() if p.grad is not None))


def cnn() -> Subject:
    model = ResNet(depth=4, width=16)
    for block in model.blocks:
        block[-1].momentum = 0.1  # a cumulative average reads a number, which fake tensors do not have
    return Subject(model, torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,)))


def gpt() -> Subject:
    text = torch.randint(0, 50, (8, 33))
    return Subject(GPT(depth=4, width=64), text[:, :-1].clone(), text[:, 1:].clone())


@pytest.fixture(scope="module", params=[cnn, gpt], ids=["cnn", "gpt"])
def subject(request: pytest.FixtureRequest) -> Subject:
    torch.manual_seed(0)
    make: Callable[[], Subject] = request.param
    return make()


def compiled(chain: TrainingChain, items: tuple[Kept | Segment, ...]) -> StepPlan:
    return compile_plan(chain.tape, chain.cuts, chain.options, items)


def plain_items(chain: TrainingChain) -> tuple[Kept, ...]:
    return tuple(Kept(unit) for unit in range(len(chain.options)))


def test_the_plain_step_is_foreseen(subject: Subject) -> None:
    chain = subject.chains[False]
    plan = compiled(chain, plain_items(chain))
    assert foresee(chain.tape, plan).peak == pytest.approx(subject.peak(None), rel=0.01)


@pytest.mark.parametrize("share", [0.7, 0.45, 0.25, 0.0])
def test_planned_steps_are_foreseen_and_the_chain_bounds_them(subject: Subject, share: float) -> None:
    chain = subject.chains[False]
    _, most = evaluate(chain.chain, plain_items(chain))
    table = solve(chain.chain, most)
    schedule = table.best(max(int(most * share), table.minimum))
    plan = compiled(chain, schedule.items)
    foreseen = foresee(chain.tape, plan)
    assert foreseen.peak == pytest.approx(subject.peak(plan), rel=0.01)
    apart = 4 + chain.lasting  # the loss, and BatchNorm's statistics: there all the time, but no unit's
    assert foreseen.peak <= schedule.peak_bound + apart <= max(int(most * share), table.minimum) + apart
    assert foreseen.replayed_seconds > 0 or share == 0.7


def test_random_schedules_are_foreseen(subject: Subject) -> None:
    rng = random.Random(0)
    chain = subject.chains[False]
    for _ in range(6):
        items = random_items(rng, 0, len(chain.options), chain.options)
        items = tuple(Segment(i.start, i.stop, i.inside) if isinstance(i, Segment) else i for i in items)
        plan = compiled(chain, items)
        assert foresee(chain.tape, plan).peak == pytest.approx(subject.peak(plan), rel=0.01), items


def test_compacted_bytes_count(subject: Subject) -> None:
    # They are held outside of tensors, so the count of tensors must lie below, but not by more than they are.
    chain = subject.chains[True]
    names = [
        [option.name for option in options].index("compact") if len(options) > 1 and options[1].compact else 0
        for options in chain.options
    ]
    assert any(names)
    plan = compiled(chain, tuple(Kept(unit, option) for unit, option in enumerate(names)))
    shrunk = sum(
        chain.tape.storages[number].shrinks
        for options, option in zip(chain.options, names, strict=True)
        for number in options[option].compact
    )
    foreseen, measured = foresee(chain.tape, plan).peak, subject.peak(plan)
    assert foreseen - shrunk - foreseen // 100 <= measured <= foreseen + foreseen // 100
    assert foreseen < foresee(chain.tape, compiled(chain, plain_items(chain))).peak


KEEP = (UnitOption("keep"),)


def test_a_pass_counted_by_hand() -> None:
    tape = layers(4)  # five storages of 1000 bytes, of which four are saved, and no gradients
    kept = compile_plan(tape, (0, 2, 4, 5), [KEEP] * 3, [Kept(0), Kept(1), Kept(2)])
    foreseen = foresee(tape, kept)
    assert (foreseen.forward_peak, foreseen.replayed_seconds) == (5000, 0.0)
    # The first two units run again: storage 3 and the output are all there is after the forward pass.
    dropped = compile_plan(tape, (0, 2, 4, 5), [KEEP] * 3, [Segment(0, 2, (Kept(0), Kept(1))), Kept(2)])
    foreseen = foresee(tape, dropped)
    assert foreseen.forward_peak == 2000
    assert foreseen.backward_peak == 1000 + 3000  # the output; storages 0 to 2, when 3 is done with
    assert foreseen.replayed_seconds == 3


def test_spilled_bytes_leave_memory_and_come_back() -> None:
    tape = layers(4)
    spill = (UnitOption("keep"), UnitOption("spill", spilled=frozenset({0, 1, 2})))
    plan = compile_plan(tape, (0, 4, 5), [spill, KEEP], [Kept(0, 1), Kept(1)])
    foreseen = foresee(tape, plan, in_flight=500)
    assert foreseen.spilled == 3000
    assert foreseen.forward_peak == 2000 + 500
    assert foreseen.backward_peak == 1000 + 1000 + 500  # the output and one of them at a time


def test_one_storage_replayed_for_two_units_is_there_once() -> None:
    hand = Hand()
    x = hand.op(makes=1000)
    for _ in range(2):
        hand.save(x)
        hand.op(x, makes=10)
    hand.op(makes=10)
    tape = hand.tape()
    plan = compile_plan(tape, (0, 2, 3, 4), [KEEP] * 3, [Segment(0, 2, (Kept(0), Kept(1))), Kept(2)])
    assert foresee(tape, plan).backward_peak < 2000
