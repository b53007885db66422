"""Steps that fail in the middle, passes that differ from the measured one, and writes that plain torch refuses."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from narrowboat.errors import TrainingError
from train_kit import ResNet, copy_of, cross_entropy, images, mlp
from train_step_kit import narrow, plain, same, stepped, unchanged, vectors

pytestmark = pytest.mark.usefixtures("small_things_count")


# -- in the middle of a step -----------------------------------------------------------------------------------------


class Failing(nn.Module):
    """Passes its input on, and fails when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.forward_error: Exception | None = None
        self.backward_error: Exception | None = None
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.forward_error is not None:
            error, self.forward_error = self.forward_error, None
            raise error
        if self.backward_error is not None and x.requires_grad:
            error, self.backward_error = self.backward_error, None
            x = x * 1.0
            x.register_hook(lambda grad: _throw(error))
        else:
            x = x * 1.0
        return x


def _throw(error: Exception) -> None:
    raise error


ALLOCATOR = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError(ALLOCATOR)], ids=["MemoryError", "allocator"])
@pytest.mark.parametrize("where", ["forward_error", "backward_error"])
def test_an_overrun_repeats_the_batch_on_a_smaller_plan(where: str, error: Exception) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(ResNet(), nn.Linear(10, 32), nn.Dropout(0.3), Failing(), nn.BatchNorm1d(32), mlp())

    here, there = make().train(), make().train()
    generator = torch.Generator().manual_seed(1)
    batches = [images(8, generator) for _ in range(3)]
    step = narrow(here, batches[0], 1.0)
    budget = step.budget

    def sabotage(number: int) -> None:
        if number == 1:
            setattr(here[3], where, error)

    assert stepped(step, batches, sabotage) == plain(there, batches)
    assert same(here, there)
    assert [record.repeated for record in step.report().steps] == [0, 1, 0]
    assert step.budget < budget
    assert "out of memory" in str(step.report().changes)
    assert here[3].calls == there[3].calls == 3


def test_no_memory_on_the_smallest_plan_either_gives_the_step_up_and_changes_nothing() -> None:
    model = nn.Sequential(mlp(), Failing(), nn.Linear(10, 10))
    batches = vectors(16, 16)
    step = narrow(model, batches[0])

    class Always(Failing):
        def forward(self, x: Tensor) -> Tensor:
            raise MemoryError("no room")

    model[1].__class__ = Always
    assert "no room" in unchanged(model, step, batches[0], TrainingError)
    model[1].__class__ = Failing
    step(*batches[0])


def test_other_errors_of_the_model_come_through_and_change_nothing() -> None:
    model = nn.Sequential(mlp(), Failing(), nn.BatchNorm1d(10))
    batches = vectors(16, 16)
    step = narrow(model, batches[0])
    model[1].forward_error = ValueError("mine")
    calls = model[1].calls
    with pytest.raises(ValueError, match="mine"):
        step(*batches[0])
    assert model[1].calls == calls
    assert int(model[2].num_batches_tracked) == 0


# -- passes that differ ----------------------------------------------------------------------------------------------


class LayerDrop(nn.Module):
    """Leaves layers out by Python's random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Dropout(0.1)) for _ in range(6))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if random.random() < 0.7:
                x = x + layer(x)
        return self.head(x)


class Experts(nn.Module):
    """Routes samples by numbers that only the pass knows, and counts where they went."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.head = nn.Linear(32, 4), nn.Linear(32, 10)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)) for _ in range(4))
        self.register_buffer("used", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            weight, choice = self.gate(x).softmax(1).max(1)
            out = torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                chosen = (choice == number).nonzero().flatten()
                if chosen.numel() > 40:
                    self.used[number] += chosen.numel()
                    out = out.index_add(0, chosen, expert(x[chosen]) * weight[chosen, None])
            x = x + out * (1 + self.used.mean() / 100)
        return self.head(x)


class Swapping(nn.Module):
    """The same operators each time, but on other tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            a, b = torch.tanh(self.left(x)), torch.tanh(self.right(x))
            if random.random() < 0.5:
                a, b = b, a
            x = torch.sub(a * 2, b).sin()
        return self.head(x)


class LateWrites(nn.Module):
    """Writes, only sometimes, to what was read before: a buffer, and a tensor of the pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.head = nn.Linear(32, 10)
        self.register_buffer("shift", torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(layer(x) + self.shift)
            x = x + self.shift
            y = x * 2.0
            if random.random() < 0.4:
                x += 1.0
                self.shift += 0.125
            x = torch.cos(y) + x
        return self.head(x)


@pytest.mark.parametrize("make", [LayerDrop, Experts, Swapping, LateWrites])
def test_a_pass_that_leaves_its_plan_is_still_right_and_says_so(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    random.seed(0)
    here = make().train()
    there = copy_of(here)
    batches = vectors(*[192] * 12)
    step = narrow(here, batches[0])
    random.seed(3)
    got = stepped(step, batches)
    after = random.getstate()
    random.seed(3)
    assert got == plain(there, batches)
    assert same(here, there)
    assert random.getstate() == after
    departed = [record.departed for record in step.report().steps]
    assert any(departed)
    assert "instead of" in next(filter(None, departed))


# -- what plain torch refuses ----------------------------------------------------------------------------------------


class Spoiling(nn.Module):
    """Writes to what autograd saved: a result, an argument from the pass, or a buffer."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.net, self.what, self.spoil = mlp(), what, False
        self.register_buffer("scale", torch.ones(10))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.exp(self.net(x).tanh())
        out = hidden * self.scale
        if self.spoil:
            with torch.no_grad():
                (hidden if self.what == "result" else self.scale).add_(1.0)
        return torch.sin(out * 2.0)


@pytest.mark.parametrize("techniques", [("recompute",), ("reduce", "compact")])
@pytest.mark.parametrize("what", ["result", "buffer"])
def test_a_write_to_what_autograd_saved_is_refused_as_plain_torch_does(what: str, techniques: tuple[str, ...]) -> None:
    model = Spoiling(what)
    batches = vectors(256, 256)
    step = narrow(model, batches[0], techniques=techniques)
    step(*batches[0])
    model.spoil = True
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cross_entropy(copy_of(model)(batches[1][0]), batches[1][1]).backward()
    assert "modified by an inplace operation" in unchanged(model, step, batches[1], RuntimeError)
