"""What kernels take inside is measured at the size at which they will run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import profile

from narrowboat.train.measure.calls import between, call_of
from narrowboat.train.measure.fake import fake_walk
from narrowboat.train.measure.fit import at_batch
from narrowboat.train.measure.kernels import Kernels, measured
from narrowboat.train.tape.structure import Tape


class Convolutions(nn.Module):
    """Depthwise and pointwise, which oneDNN reorders into blocked memory."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 64, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).mean((2, 3))


def tape_of(samples: int) -> Tape:
    torch.manual_seed(0)
    model = Convolutions()
    x, y = torch.randn(16, 3, 48, 48), torch.randint(64, (16,))
    return fake_walk(model, lambda a, b: F.cross_entropy(model(a), b), x, y, samples)


def test_scratch_of_a_convolution_is_what_its_allocations_tell() -> None:
    x, weight = torch.randn(8, 32, 56, 56), torch.randn(64, 32, 3, 3)
    arguments = (x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    func = torch.ops.aten.convolution.default
    made = func(*arguments).untyped_storage().nbytes()
    call = call_of(func, arguments, {}, made)
    assert call is not None
    taken = measured([call])[call.key]
    assert taken.highest >= made and taken.turnover >= taken.highest
    with profile(profile_memory=True) as told:
        result = func(*arguments)
    blocks = [e.nbytes() for e in told.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert taken.turnover == sum(size for size in blocks if size > 0)
    assert result.untyped_storage().nbytes() == made


def test_calls_of_two_sizes_give_those_of_a_third() -> None:
    small, large, direct = tape_of(4), tape_of(16), tape_of(8)
    fitted = at_batch(small, large, 8)
    for ours, theirs in zip((*fitted.ops, *fitted.backward), (*direct.ops, *direct.backward), strict=True):
        if theirs.call is not None and ours.call is not None:
            assert ours.call.key == theirs.call.key
            assert ours.call.made == theirs.call.made
    assert sum(op.call is not None for op in fitted.ops) >= 3


def test_calls_of_different_operators_have_nothing_between_them() -> None:
    x = torch.randn(512, 512)
    first = call_of(torch.ops.aten.mm.default, (x, x), {}, 0)
    second = call_of(torch.ops.aten.bmm.default, (x[None], x[None]), {}, 0)
    assert first is not None and second is not None
    assert between(first, second, max) is None


def test_a_call_that_fails_on_zeros_takes_nothing_and_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(512, 512)
    call = call_of(torch.ops.aten.mm.default, (x, x), {}, 0)
    assert call is not None
    wrong = type(call)(call.func, (call.args[0],), (), 0)
    tape = tape_of(4)
    tape.ops[0].call = wrong
    kernels = Kernels()
    assert kernels.with_scratch(tape).ops[0].scratch == 0
    monkeypatch.setattr("narrowboat.train.measure.kernels.measured", lambda calls: pytest.fail("asked again"))
    kernels.with_scratch(tape)


def test_measuring_inside_of_somebody_elses_profile_leaves_that_one_whole() -> None:
    tape = tape_of(4)
    with profile(profile_memory=True) as outer:
        told = Kernels().with_scratch(copy.copy(tape))
        torch.randn(100, 100).sum()
    assert told.signature() == tape.signature()
    assert any("sum" in event.key for event in outer.key_averages())


def test_random_streams_are_as_before() -> None:
    tape = tape_of(4)
    before = torch.get_rng_state()
    Kernels().with_scratch(tape)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_recurrent_kernels_which_trust_their_workspace_are_not_called_on_zeros(cell: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    model = cell(64, 128, 2, batch_first=True, bidirectional=True)
    x = torch.randn(64, 40, 64)
    tape = fake_walk(model, lambda a, b: (model(a)[0] - b).square().mean(), x, torch.randn(64, 40, 256), 64)
    told = [*(op.call for op in tape.ops), *(event.call for event in tape.backward)]
    assert not [call for call in told if call is not None and ("rnn" in str(call.func) or "lstm" in str(call.func))]
    Kernels().with_scratch(tape)


def test_calls_larger_than_the_limit_are_not_made_until_it_is_raised() -> None:
    tape, kernels = tape_of(8), Kernels()
    kernels.limit = 1
    assert all(op.scratch == op.turnover == 0 for op in kernels.with_scratch(tape).ops)
    kernels.limit = 1 << 40
    assert any(op.turnover for op in kernels.with_scratch(tape).ops)
