"""The allocator's bytes over a baseline; what keeps a step within them is set for the step and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from narrowboat.machine import malloc
from narrowboat.train.device.allocator import CudaAllocator
from narrowboat.train.device.emulated import CountingAllocator
from narrowboat.train.device.memory import DeviceFollower, DeviceMemory
from narrowboat.train.heap_guard import HeapGuard
from narrowboat.train.host_memory import HostMemory
from narrowboat.train.measure.clock import DeviceClock, HostClock
from narrowboat.train.measure.real import real_walk
from narrowboat.train.static import static_bytes
from train_kit import CASES, cross_entropy, mlp
from train_step_kit import adam, stepped, vectors

MIB = 1 << 20


@dataclass
class Told:
    """An allocator that says what it is told to."""

    slack: int = 0
    now: int = 0
    taken: int = 0
    most: tuple[int, int] = (0, 0)
    calls: list[Any] = field(default_factory=list)

    def allocated(self) -> int:
        return self.now

    def reserved(self) -> int:
        return self.taken

    def peaks(self) -> tuple[int, int]:
        return self.most

    def reset_peaks(self) -> None:
        self.calls.append("reset")

    def give_back(self) -> None:
        self.calls.append("give back")

    def begin(self, batch: Any) -> None:
        self.calls.append(len(list(batch)))

    @contextmanager
    def limited(self, nbytes: int | None) -> Iterator[None]:
        self.calls.append(nbytes)
        yield
        self.calls.append("free")


@dataclass
class Plan:
    budget: int


def test_what_training_holds_is_over_what_others_had(make_device: Any) -> None:
    model = mlp()
    weights = sum(p.numel() * 4 for p in model.parameters())
    ((x, y),) = vectors(16)
    batch = x.nbytes + y.nbytes
    allocator = Told(now=weights + batch + 5 * MIB, taken=weights + batch + 9 * MIB)
    memory = DeviceMemory(make_device(), allocator, model, adam(model), enforce=True)
    memory.begin(x, y)
    assert memory.held() == weights + batch
    allocator.now += MIB
    assert memory.held() == weights + batch + MIB
    memory.begin(x, y)
    assert memory.held() == weights + batch + MIB, "the baseline is taken once"
    allocator.most = (20 * MIB, 30 * MIB)
    assert (memory.peak(), memory.reserved_peak()) == (15 * MIB, 21 * MIB)
    assert allocator.calls == [2, "give back", 2]
    with memory.guarded(Plan(8 * MIB), 7 * MIB) as guard:
        assert not guard.watches
    assert allocator.calls[-2:] == [9 * MIB + 7 * MIB, "free"], "the others' and the budget, and no more"
    loose = DeviceMemory(make_device(), allocator, model, adam(model), enforce=False)
    loose.begin(x, y)
    with loose.guarded(Plan(8 * MIB), 7 * MIB):
        assert allocator.calls[-1] is None


def test_what_measuring_leaves_behind_counts(make_device: Any) -> None:
    allocator = Told(now=MIB)
    memory = DeviceMemory(make_device(workspace=3 * MIB), allocator, mlp(), adam(mlp()), enforce=True)
    memory.before_measuring()
    allocator.now += 8 * MIB
    assert memory.left_behind() == 8 * MIB and memory.workspace == 3 * MIB


def test_what_libraries_may_take_is_set_aside(make_device: Any, on_device: Any) -> None:
    (batch,) = vectors(48)
    least = on_device(mlp(), batch, device=make_device()).plan.min_budget
    assert on_device(mlp(), batch, device=make_device(workspace=3 * MIB)).plan.min_budget == least + 3 * MIB


def test_spare_is_what_is_free_and_what_the_allocator_keeps(make_device: Any) -> None:
    device = make_device(64 * MIB)
    model = mlp()
    memory = DeviceMemory(device, Told(now=2 * MIB, taken=10 * MIB), model, adam(model), enforce=True)
    device.take(4 * MIB)
    static = static_bytes(model, None, torch.empty(0), None)
    assert memory.spare(static) == 60 * MIB + 8 * MIB + static.weights
    memory.check(60 * MIB)


def test_a_budget_goes_down_at_once_and_up_when_there_was_room_for_long() -> None:
    follower = DeviceFollower(100)
    assert follower.wanted(100, 300, 0.0) is None
    assert follower.wanted(100, 99, 0.0) is None
    assert follower.wanted(100, 50, 0.0) == (50, "50 B can be had on the device")
    looks = [follower.wanted(50, spare, 0.0) for spare in [90] * 10 + [80] + [300] * 8]
    assert looks == [None] * 19
    assert follower.wanted(50, 300, 0.0) == (80, "300 B can be had on the device")
    assert [follower.wanted(80, 300, 0.0) for _ in range(5)] == [None] * 5


# -- torch's allocator on CUDA, as far as that goes without it -------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for ``torch.cuda``."""
    known: dict[str, Any] = {"fraction": 1.0, "calls": []}

    def set_fraction(fraction: float, device: torch.device) -> None:
        known["fraction"] = fraction
        known["calls"].append((fraction, device))

    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: known["fraction"])
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", set_fraction)
    return known


def test_the_limit_is_a_fraction_for_the_time_of_the_passes(cuda: dict[str, Any]) -> None:
    place = torch.device("cuda", 1)
    allocator = CudaAllocator(place, 80 << 30)
    with allocator.limited(20 << 30):
        assert cuda["fraction"] == 0.25
        with allocator.limited(40 << 30):
            assert cuda["fraction"] == 0.25, "what is tighter stays"
        with allocator.limited(None), allocator.limited(100 << 30):
            assert cuda["fraction"] == 0.25
    assert cuda["fraction"] == 1.0
    with pytest.raises(KeyboardInterrupt), allocator.limited(20 << 30):
        raise KeyboardInterrupt
    assert cuda["fraction"] == 1.0
    assert {device for _, device in cuda["calls"]} == {place}


def test_a_torch_that_does_not_tell_the_fraction_has_it_set_back_to_all(
    cuda: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction")
    with CudaAllocator(torch.device("cuda", 0), 80 << 30).limited(20 << 30):
        assert cuda["fraction"] == 0.25
    assert cuda["fraction"] == 1.0


# -- the allocator of an emulated device -----------------------------------------------------------------------------


def test_an_emulated_allocator_counts_what_is_made_and_freed() -> None:
    model = nn.Linear(256, 256)
    allocator = CountingAllocator(model, torch.optim.SGD(model.parameters(), 0.1))
    there = 4 * 256 * 257
    allocator.begin([torch.empty(100, dtype=torch.uint8)])
    assert allocator.allocated() == allocator.reserved() == there + 100
    allocator.reset_peaks()
    with allocator.limited(None):
        x = torch.zeros(1000, dtype=torch.uint8)
        y = x[10:].view(-1)
        del x
        z = y + 1
        assert allocator.allocated() == there + 100 + 1990
        del y, z
    assert allocator.allocated() == there + 100
    assert allocator.peaks()[0] == there + 100 + 1990
    with allocator.limited(there + 600):
        torch.zeros(500, dtype=torch.uint8)
        with pytest.raises(torch.OutOfMemoryError, match="emulated device is out of memory"):
            torch.zeros(501, dtype=torch.uint8)


# -- the host's allocator --------------------------------------------------------------------------------------------


def test_on_a_device_the_hosts_allocator_is_left_alone(on_device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[str] = []
    for name in ("set_malloc_policy", "trim", "never_map"):
        monkeypatch.setattr(malloc, name, lambda *_, name=name, **__: touched.append(name) or True)
    import narrowboat.machine.whole_heap as whole_heap
    import narrowboat.train.host_memory as host_memory
    import narrowboat.train.measure.kernels as kernels
    import narrowboat.train.measure.study as study

    for module, names in (
        (whole_heap, ("set_malloc_policy", "trim", "never_map")),
        (host_memory, ("set_malloc_policy", "data_limit", "open_whole_heap", "give_back", "reset_peak", "tidy_heap")),
        (study, ("trim",)),
        (HeapGuard, ("before",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, lambda *_, name=name, **__: touched.append(name))
    # On a GPU no kernel is tried alone. Those of the emulated one are the CPU's; between large ones there is a trim.
    monkeypatch.setattr(kernels, "_LARGE", 1 << 60)
    model, batches = CASES["mlp"].model(), vectors(48, 48)
    step = on_device(model, batches[0], 0.3)
    stepped(step, batches)
    assert touched == []
    assert step.plan.step is not None


def test_the_host_has_what_it_had() -> None:
    assert HostMemory.on_host and isinstance(HostMemory.clock, HostClock) and HeapGuard.watches


# -- the clock -------------------------------------------------------------------------------------------------------


class Ticks:
    """A device whose stream comes to one mark a second, long after the host gave it the work."""

    def __init__(self) -> None:
        self.marks, self.waits = 0, 0

    def compute(self) -> Ticks:
        return self

    def record(self, *, timed: bool = False) -> Tick:
        assert timed
        self.marks += 1
        return Tick(self, self.marks)


@dataclass
class Tick:
    device: Ticks
    at: int

    def wait(self) -> None:
        self.device.waits += 1

    def seconds_since(self, earlier: Tick) -> float:
        return float(self.at - earlier.at)


def test_operators_of_a_device_are_timed_by_its_own_marks_and_nothing_waits_in_between() -> None:
    device, model = Ticks(), mlp()
    ((x, y),) = vectors(16)
    waits: list[int] = []

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        waits.append(device.waits)
        made = cross_entropy(model(a), b)
        waits.append(device.waits)
        return made

    tape = real_walk(model, loss, x, y, 16, clock=DeviceClock(device))
    # Marks come before and after each operator; plain passes have one before, one between and one after.
    assert tape.forward_seconds == tape.backward_seconds == 1.0
    assert {op.seconds for op in tape.ops} == {min(1.0, 1.0 / len(tape.ops))}
    assert tape.backward[-1].seconds <= 1.0
    assert len({event.seconds for event in tape.backward}) > 10
    # Two plain passes are read off, each when it is over; in the passes themselves nobody waited.
    assert all(before == after for before, after in zip(waits[::2], waits[1::2], strict=True))
