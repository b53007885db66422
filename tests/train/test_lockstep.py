"""K micro-batches in lockstep are one batch: gradients, running statistics, and an end without traces."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from narrowboat.errors import TrainingError
from narrowboat.train.lockstep import run_in_lockstep

SPLITS = [[3, 3], [2, 2, 1, 1], [1, 4, 1]]


class Residual(nn.Module):
    """Branches, an in-place operator behind a BatchNorm, and a BatchNorm that is called twice."""

    def __init__(self, width: int = 6, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.first, self.shared, self.skip = norm(width), norm(width), norm(width)
        self.conv, self.side = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)
        self.dropout, self.flat, self.head = nn.Dropout(0.0), nn.BatchNorm1d(width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(self.stem(x)), inplace=True)
        y = self.shared(self.conv(F.relu(self.shared(self.conv(x)))))
        x = self.dropout(F.relu(y + self.skip(self.side(x))))
        return self.head(self.flat(x.mean((2, 3))))


class NormAct(nn.BatchNorm2d):
    """A subclass with a forward of its own, as timm's: it normalises by function call and then does more."""

    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked = self.num_batches_tracked + 1
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum, self.eps)
        return F.gelu(y)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "plain": nn.BatchNorm2d,
    "cumulative": lambda width: nn.BatchNorm2d(width, momentum=None),
    "bare": lambda width: nn.BatchNorm2d(width, affine=False, track_running_stats=False),
    "sync": nn.SyncBatchNorm,
    "subclass": NormAct,
}


def batch(samples: int = 6, dtype: torch.dtype = torch.double) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 3, 7, 5, dtype=dtype), torch.randint(4, (samples,))


def part_calls(model: nn.Module, x: Tensor, y: Tensor, sizes: list[int]) -> list[Callable[[], Tensor]]:
    pieces = zip(x.split(sizes), y.split(sizes), strict=True)
    return [lambda a=a, b=b: F.cross_entropy(model(a), b) * (len(b) / len(y)) for a, b in pieces]


def split_step(model: nn.Module, x: Tensor, y: Tensor, sizes: list[int], contexts: Any = None) -> Tensor:
    losses = run_in_lockstep(model, part_calls(model, x, y, sizes), contexts or (lambda part: nullcontext()))
    loss = torch.stack(losses).sum()
    loss.backward()
    return loss.detach()


def leftovers(model: nn.Module) -> list[str]:
    patched = [name for name, module in model.named_modules() if "forward" in module.__dict__]
    return patched + [t.name for t in threading.enumerate() if t.name.startswith("lockstep")]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_three_steps_in_lockstep_equal_three_steps_of_the_whole_batch(norm: str, sizes: list[int]) -> None:
    torch.manual_seed(0)
    whole = Residual(norm=NORMS[norm]).double()
    split = copy.deepcopy(whole)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (whole, split)]
    for _ in range(3):
        x, y = batch()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = F.cross_entropy(whole(x), y)
        loss.backward()
        torch.testing.assert_close(split_step(split, x, y, sizes), loss.detach(), rtol=1e-12, atol=0)
        for p, q in zip(whole.parameters(), split.parameters(), strict=True):
            # A bias in front of a BatchNorm has a gradient of zero, known to rounding only.
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-11, atol=1e-14)
        for optimizer in optimizers:
            optimizer.step()
    for (name, want), got in zip(whole.state_dict().items(), split.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13, msg=lambda m, name=name: f"{name}: {m}")
    assert not leftovers(split)


def test_micro_batches_of_one_value_per_channel_are_a_batch_together() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).double()
    twin = copy.deepcopy(model)
    x, y = torch.randn(3, 3, dtype=torch.double), torch.randint(4, (3,))
    split_step(model, x, y, [1, 1, 1])
    F.cross_entropy(twin(x), y).backward()
    torch.testing.assert_close(model[0].weight.grad, twin[0].weight.grad, rtol=1e-12, atol=1e-15)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        run_in_lockstep(model, [lambda: model(x[:1]), lambda: model(x[:0])])


def test_frozen_and_eval_mode_norms_are_no_meeting_place() -> None:
    model = Residual().double().eval()
    x, y = batch()
    want = F.cross_entropy(model(x), y)
    torch.testing.assert_close(split_step(model, x, y, [2, 4]), want.detach(), rtol=1e-13, atol=0)


def test_random_numbers_are_drawn_in_a_fixed_order() -> None:
    model = Residual()
    model.dropout.p = 0.5
    x, y = batch(dtype=torch.float)
    losses = []
    for _ in range(2):
        torch.manual_seed(7)
        losses.append(split_step(copy.deepcopy(model), x, y, [2, 2, 2]))
    assert torch.equal(*losses)


def test_one_micro_batch_runs_at_a_time_in_its_own_contexts_and_with_the_callers_state() -> None:
    inside: set[int] = set()
    at_once: list[int] = []
    seen: list[tuple[Any, ...]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            inside.add(threading.get_ident())
            at_once.append(len(inside))
            try:
                return func(*args, **(kwargs or {}))
            finally:
                inside.discard(threading.get_ident())

    packed: dict[int, int] = {}

    @contextmanager
    def contexts(part: int) -> Iterator[None]:
        def pack(tensor: Tensor) -> Tensor:
            packed[part] = packed.get(part, 0) + 1
            return tensor

        seen.append((part, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_grad_enabled()))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Watch():
            yield

    model = Residual()
    x, y = batch(dtype=torch.float)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        split_step(model, x, y, [2, 2, 2], contexts)
    assert seen == [(part, True, torch.bfloat16, True) for part in range(3)]
    assert set(at_once) == {1}
    assert packed[0] == packed[1] == packed[2] > 10
    with torch.no_grad():
        assert not any(r.requires_grad for r in run_in_lockstep(model, part_calls(model, x, y, [3, 3])))


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_in_one_micro_batch_ends_all_and_leaves_nothing(failing: int) -> None:
    model = Residual()
    before = copy.deepcopy(model.state_dict())
    x, y = batch(dtype=torch.float)
    exits: list[int] = []
    alive: list[weakref.ref[Tensor]] = []

    @contextmanager
    def contexts(part: int) -> Iterator[None]:
        try:
            yield
        finally:
            exits.append(part)

    def call(part: int) -> Tensor:
        piece = x[2 * part : 2 * part + 2] + 0
        alive.append(weakref.ref(piece))
        out = model.shared(model.first(model.stem(piece)))
        if part == failing:
            raise KeyError("broken")
        return model.skip(out).sum()

    with pytest.raises(KeyError, match="broken"):
        run_in_lockstep(model, [lambda part=part: call(part) for part in range(3)], contexts)
    gc.collect()
    assert sorted(exits) == [0, 1, 2] and not leftovers(model)
    assert [ref() for ref in alive] == [None] * 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    split_step(model, x, y, [3, 3])


@pytest.mark.parametrize("skips", [{0}, {2}, {0, 1}])
def test_a_skipped_norm_is_an_error_that_names_it_and_no_deadlock(skips: set[int]) -> None:
    model = Residual()
    x, _ = batch(dtype=torch.float)

    def call(part: int) -> Tensor:
        y = model.first(model.stem(x[2 * part : 2 * part + 2]))
        return (y if part in skips else model.skip(y)).sum()

    with pytest.raises(TrainingError, match=r"BatchNorm skip .*micro-batch"):
        run_in_lockstep(model, [lambda part=part: call(part) for part in range(3)])
    assert not leftovers(model)


def test_a_norm_that_cannot_be_met_is_refused_before_anything_moves() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean((0, 2, 3), keepdim=True)

    model = nn.Sequential(nn.Conv2d(3, 2, 1), Own(2))
    x, _ = batch(dtype=torch.float)
    with pytest.raises(TrainingError, match=r"no lockstep at 1: Own"):
        run_in_lockstep(model, [lambda: model(x[:3]).sum(), lambda: model(x[3:]).sum()])
    for reentrant in (True, False):
        norm, again = nn.BatchNorm2d(3), torch.utils.checkpoint.checkpoint
        calls = [lambda: again(norm, x.requires_grad_(), use_reentrant=reentrant).sum()] * 2  # noqa: B023
        with pytest.raises(TrainingError, match="recomputes it by itself"):
            run_in_lockstep(norm, calls)
    observed = nn.Sequential(nn.Conv2d(3, 2, 1), torch.ao.quantization.FakeQuantize())
    with pytest.raises(TrainingError, match="FakeQuantize"):
        run_in_lockstep(observed, [lambda: observed(x[:3]).sum(), lambda: observed(x[3:]).sum()])
    assert not leftovers(model)


def test_backward_finishes_one_micro_batch_of_a_stretch_before_the_next() -> None:
    order: list[int] = []

    class Mark(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, part: int) -> Tensor:
            ctx.part = part
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            order.append(ctx.part)
            return grad, None

    norms = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2)])
    x = torch.randn(9, 2)

    def call(part: int) -> Tensor:
        y = x[3 * part : 3 * part + 3].clone().requires_grad_()
        for norm in norms:
            y = norm(Mark.apply(Mark.apply(y, part), part))
        return Mark.apply(Mark.apply(y, part), part).sum()

    torch.stack(run_in_lockstep(norms, [lambda part=part: call(part) for part in range(3)])).sum().backward()
    assert order == [2, 2, 1, 1, 0, 0] * 3
