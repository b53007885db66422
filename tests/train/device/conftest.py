"""A device without a GPU, for training: what its kernels read and write is proved to be in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from narrowboat.arena.device.emulated import EmulatedDevice
from narrowboat.arena.device.lanes import ComputeLane
from narrowboat.train.device import spill, under_way
from narrowboat.train.device.spill import DeviceSpillPool
from narrowboat.train.spill import SpillPool
from narrowboat.train.step import TrainStep, train_step
from narrowboat.train.tape.facts import facts_of
from narrowboat.train.tape.leaves import plain, tensors_in, written_tensors
from train_kit import budget_of, cross_entropy
from train_step_kit import adam


class OneStream(EmulatedDevice):
    """All threads give their kernels to one stream, as torch's default stream has it; its memory is the process's."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.lane = ComputeLane(self.order, "compute stream")

    def compute(self) -> ComputeLane:
        return self.lane

    def kernel(self, storage: torch.UntypedStorage, *, writes: bool) -> None:
        """A kernel of the calling thread uses a storage."""
        if storage.nbytes():
            self.lane.submit()
            prove = self.order.write if writes else self.order.read
            prove(self.lane.name, storage.data_ptr(), storage.nbytes(), "a kernel")


class KernelWatch(TorchDispatchMode):
    """Tells the device of every operator's uses of memory. Memory is used again as soon as it is freed, by malloc."""

    def __init__(self, device: OneStream) -> None:
        super().__init__()
        self._device = device
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        facts = facts_of(func)
        if facts.view or facts.name == "aten::set_":  # no kernel: a view over a storage that is there
            return func(*args, **kwargs)
        given = {t.untyped_storage()._cdata: t for t in tensors_in((args, kwargs)) if plain(t)}
        for tensor in given.values():
            self._device.kernel(tensor.untyped_storage(), writes=False)
        for tensor in written_tensors(facts, args, kwargs):
            if plain(tensor):
                self._device.kernel(tensor.untyped_storage(), writes=True)
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and plain(tensor) and tensor.untyped_storage()._cdata not in given:
                self._device.kernel(tensor.untyped_storage(), writes=True)
        self.seen += 1
        return out


@pytest.fixture
def device() -> OneStream:
    return OneStream()


@pytest.fixture
def make_device() -> type[OneStream]:
    return OneStream


@pytest.fixture
def watch() -> type[KernelWatch]:
    return KernelWatch


MakePool = Callable[..., Any]


@pytest.fixture
def make_pool(tmp_path: Path) -> Iterator[MakePool]:
    """A context: a pool over a device, with storage behind it where ``behind`` is so."""

    @contextmanager
    def made(
        device: EmulatedDevice, host_bytes: int, *, behind: bool = False, in_flight: int = 1 << 20
    ) -> Iterator[DeviceSpillPool]:
        storage = SpillPool(tmp_path, in_flight=1 << 20) if behind else None
        with DeviceSpillPool(device, host_bytes, storage, in_flight=in_flight) as pool:
            yield pool

    yield made


@pytest.fixture
def small_things_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for the steps on the host: margins and thresholds are for models of gigabytes."""
    monkeypatch.setattr("narrowboat.train.plan.MARGIN_LEAST", 8 << 10)
    monkeypatch.setattr("narrowboat.train.step._IN_FLIGHT", 1 << 20)
    monkeypatch.setattr("narrowboat.train.step.measure_bandwidth", lambda folder: (1e9, 1e9))
    monkeypatch.setattr("narrowboat.train.measure.chain._SMALLEST_SPILL", 1 << 10)
    monkeypatch.setattr("narrowboat.train.device.offload._LEAST_IN_FLIGHT", 4 << 10)
    monkeypatch.setattr("narrowboat.train.device.offload._MOST_IN_FLIGHT", 4 << 10)


MakeStep = Callable[..., TrainStep]


@pytest.fixture
def on_device(device: OneStream, small_things_count: None) -> Iterator[MakeStep]:
    """A step on an emulated device, whose activations have a share of what the plain step takes."""
    made: list[TrainStep] = []

    def make(model: nn.Module, batch: Any, share: float = 0.0, host: int | str = "64MiB", **options: Any) -> TrainStep:
        options = {"optimizer": adam(model), "micro_batches": 1, "adapt": False, "device": device, **options}
        loss_fn = options.pop("loss_fn", cross_entropy)
        step = train_step(model, loss_fn, budget={"cuda": "900MiB", "cpu": host}, **options)
        made.append(step)
        step.budget = budget_of(step.prepare(*batch), share)
        return step

    yield make
    for step in made:
        step.close()
    assert device.pinned_bytes == 0


def _without(line: str) -> type[DeviceSpillPool]:
    """The pool's class without one line, wherever it is."""
    names: dict[str, Any] = {}
    count = 0
    for module in (under_way, spill):
        lines = Path(module.__file__).read_text().splitlines()
        count += sum(each.strip() == line for each in lines)
        mutated = "\n".join(each.replace(line, "pass") if each.strip() == line else each for each in lines)
        own = {"__name__": module.__name__}
        exec(compile(mutated, "mutated", "exec"), own)
        own |= {name: names[name] for name in ("Departures", "Arrivals") if name in names}
        names = own
    assert count, f"{line} is no line of the pool's any more"
    mutated: Any = names["DeviceSpillPool"]

    class Harmless(mutated):
        def _fresh(self, nbytes: int) -> torch.UntypedStorage:
            # What is to be found out about must not happen in earnest: a copy into memory that was freed.
            _KEPT.append(storage := super()._fresh(nbytes))
            return storage

    return Harmless


_KEPT: list[torch.UntypedStorage] = []


@pytest.fixture
def without() -> Callable[[str], type[DeviceSpillPool]]:
    return _without
