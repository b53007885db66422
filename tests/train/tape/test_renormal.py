"""BatchNorm run again from its statistics has the bits of the first run, or is not run so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

from narrowboat.plan.recompute import Kept, Segment
from narrowboat.train.measure.meter import walk
from narrowboat.train.tape.facts import facts_of
from narrowboat.train.tape.frames import Treatment, UnitOption, compile_plan
from narrowboat.train.tape.renormal import lasting_results, renormalised
from narrowboat.train.tape.run import TapeRun

BATCH_NORM = torch.ops.aten.native_batch_norm.default


def places(x: torch.Tensor, weight: Any, bias: Any, training: bool = True) -> tuple[int, ...]:
    return lasting_results(facts_of(BATCH_NORM), (x, weight, bias, None, None, training, 0.1, 1e-5))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 6),
    st.integers(1, 70),
    st.integers(1, 23),
    st.integers(1, 23),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1 << 30),
)
def test_the_bits_are_those_of_the_first_run(batch, channels, height, width, dtype, weighted, shifted, last, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, height, width, generator=draw, dtype=dtype)
    x = x * 10 ** float(torch.empty(()).uniform_(-3, 3, generator=draw)) + torch.randn(
        1, channels, 1, 1, generator=draw, dtype=dtype
    )
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, generator=draw, dtype=dtype) if weighted else None
    bias = torch.randn(channels, generator=draw, dtype=dtype) if shifted else None
    assert places(x, weight, bias) == (1, 2)
    first, mean, inverse = BATCH_NORM(x, weight, bias, None, None, True, 0.1, 1e-5)
    again = renormalised(x, weight, bias, mean, inverse)[0]
    assert torch.equal(again, first) and again.stride() == first.stride()


@pytest.mark.parametrize(
    ("x", "weight", "training"),
    [
        (torch.randn(4, 8, 5, 5), torch.ones(8), False),
        (torch.randn(8, 8, 5, 5)[::2], torch.ones(8), True),
        (torch.randn(4, 8, 5, 5).bfloat16(), torch.ones(8).bfloat16(), True),
        (torch.randn(4, 0, 5, 5), torch.ones(0), True),
    ],
    ids=["in evaluation", "rows left out", "other rounding", "nothing"],
)
def test_what_may_have_other_bits_is_run_whole(x: torch.Tensor, weight: torch.Tensor, training: bool) -> None:
    assert places(x, weight, weight, training) == ()


def test_fake_tensors_are_told_the_same_as_real_ones() -> None:
    with FakeTensorMode():
        assert places(torch.randn(4, 8, 5, 5), torch.ones(8), torch.ones(8)) == (1, 2)


def planned(net: nn.Module, x: torch.Tensor) -> tuple[Any, Any]:
    parameters = list(net.parameters())
    tape = walk(net, lambda: net(x).square().sum(), parameters, len(x))
    cuts = (0, len(tape.ops) - 1, len(tape.ops))
    options = [[UnitOption("keep")]] * 2
    return tape, compile_plan(tape, cuts, options, [Segment(0, 1, (Kept(0),)), Kept(1)])


def test_statistics_stay_and_nothing_else_and_running_ones_move_once() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    x = torch.randn(6, 3, 12, 12)
    wanted = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    wanted.load_state_dict(net.state_dict())
    tape, plan = planned(net, x)
    net.load_state_dict(wanted.state_dict())
    assert [len(op.lasting) for op in tape.ops if op.name == "aten::native_batch_norm"] == [2, 2]
    kept = {
        number
        for (number, _), (treatment, unit) in plan.treatments.items()
        if treatment is Treatment.KEEP and not unit
    }
    assert kept == tape.lasting and len(plan.lasting) == 2
    called = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is BATCH_NORM:
                called.append(args[5])
            return func(*args, **(kwargs or {}))

    run = TapeRun(plan)
    with run.forward():
        loss = net(x).square().sum()
    with Seen():
        loss.backward()
    assert run.departed is None and called == [False, False]
    wanted(x).square().sum().backward()
    for ours, theirs in zip(net.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    for ours, theirs in zip(net.buffers(), wanted.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_replay_has_its_own_measured_time() -> None:
    net = nn.BatchNorm2d(64)
    x = torch.randn(32, 64, 56, 56)
    tape = walk(net, lambda: net(x).sum(), list(net.parameters()), len(x))
    (op,) = (op for op in tape.ops if op.lasting)
    assert op.seconds_again is not None and op.replay == op.seconds_again > 0
    assert op.paced(op, 2.0).replay == pytest.approx(2 * op.replay)
