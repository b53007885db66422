"""What only a GPU can show. Skipped, with the reason, where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrowboat.arena.device.find import open_device
from narrowboat.errors import DeviceError, DeviceMemoryError
from narrowboat.train.device.allocator import CudaAllocator
from narrowboat.train.device.bandwidth import measure_copies
from narrowboat.train.device.spill import DeviceSpillPool
from narrowboat.train.recompute import checkpoint_plan
from narrowboat.train.step import train_step
from train_kit import GPT, budget_of, copy_of, cross_entropy, largest_difference
from train_step_kit import adam, plain, stepped

pytestmark = pytest.mark.cuda
MIB = 1 << 20


@pytest.fixture
def gpu() -> Iterator[Any]:
    try:
        device = open_device("cuda")
    except DeviceError as error:
        pytest.skip(f"needs an NVIDIA GPU: {error}")
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield device
    torch.use_deterministic_algorithms(deterministic)


def model() -> nn.Module:
    torch.manual_seed(0)
    return GPT(depth=6, width=256, words=512, dropout=0.1).train().cuda()


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, 512, (64, 129), generator=generator).cuda() for _ in range(count)]
    return [(text[:, :-1].clone(), text[:, 1:].clone()) for text in texts]


class Causal(nn.Module):
    """The mask of ``GPT`` is made on the CPU; here it is moved."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()
        mask = nn.Transformer.generate_square_subsequent_mask
        self.mask = lambda size: mask(size, device="cuda")

    def forward(self, x: Tensor) -> Tensor:
        mask, y = self.mask(x.shape[1]), self.inner.words(x)
        for layer in self.inner.layers:
            y = layer(y, src_mask=mask, is_causal=True)
        return self.inner.head(y)


def test_the_allocator_counts_refuses_and_is_put_back(gpu: Any) -> None:
    allocator = CudaAllocator(gpu.torch_device, gpu.memory()[1])
    allocator.give_back()
    before, taken = allocator.allocated(), allocator.reserved()
    allocator.reset_peaks()
    tensor = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    assert allocator.allocated() - before == 64 * MIB
    assert allocator.reserved() - taken <= 64 * MIB + CudaAllocator.slack
    del tensor
    assert allocator.peaks()[0] - before == 64 * MIB and allocator.reserved() > taken
    with allocator.limited(taken + 128 * MIB):
        kept = torch.empty(96 * MIB, dtype=torch.uint8, device="cuda")  # what was kept is given back for it
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    torch.empty(256 * MIB, dtype=torch.uint8, device="cuda")
    del kept
    allocator.give_back()
    assert allocator.reserved() <= taken


def test_storages_come_back_from_pinned_memory_while_kernels_run(gpu: Any) -> None:
    with DeviceSpillPool(gpu, 256 * MIB, in_flight=32 * MIB) as pool:
        pool.ensure(200 * MIB)
        x, tickets, sums = torch.ones(4 * MIB, device="cuda"), [], []
        for layer in range(12):
            x = torch.sin(x + layer)
            tickets.append(pool.write(x.untyped_storage()))
            sums.append(x.double().sum())
        del x
        while tickets:
            for ticket in tickets[-2:]:
                pool.prefetch(ticket)
            back = torch.empty(0, device="cuda").set_(pool.read(tickets.pop()))
            assert torch.equal(back.double().sum(), sums.pop())
        pool.rest()
        assert (pool.bytes_in_slots, pool.bytes_in_flight) == (0, 0)


def test_the_bus_is_measured(gpu: Any) -> None:
    assert all(1e9 < rate < 1e12 for rate in measure_copies(gpu))


@pytest.mark.parametrize("techniques", [("spill",), ("recompute", "reduce"), None])
def test_steps_within_a_budget_are_the_plain_ones(gpu: Any, techniques: tuple[str, ...] | None) -> None:
    here, data = Causal(), batches()
    there = copy_of(here)
    options: dict[str, Any] = {"techniques": techniques, "micro_batches": 1, "adapt": False}
    with train_step(here, cross_entropy, adam(here), budget={"cuda": "8GiB", "cpu": "2GiB"}, **options) as step:
        step.budget = budget_of(step.prepare(*data[0]), 0.4)
        got = stepped(step, data)
        records = list(step.report().steps)
    assert got == pytest.approx(plain(there, data), rel=1e-5)
    assert largest_difference(here, there) < 1e-4
    assert all(record.measured_peak <= record.budget for record in records[1:])
    assert all(record.reserved_peak <= record.budget + 64 * MIB for record in records[1:])
    assert all(record.seconds > 0 for record in records)
    if techniques == ("spill",):
        assert all(record.offloaded > 0 for record in records)


def test_errors_of_budget_and_device(gpu: Any) -> None:
    here = Causal()
    with pytest.raises(DeviceMemoryError, match="lower the budget for cuda"):
        train_step(here, cross_entropy, adam(here), budget="4TiB")


def test_a_recompute_plan_on_a_gpu(gpu: Any) -> None:
    here, ((x, y),) = Causal(), batches(1)
    there = copy_of(here)
    checkpoint_plan(here, (x,), "8GiB")
    here.narrowboat.budget = here.narrowboat.plan.min_budget
    torch.manual_seed(2)
    cross_entropy(here(x), y).backward()
    torch.manual_seed(2)
    cross_entropy(there(x), y).backward()
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6)
