"""Networks of the task tests on an emulated device: what the tests of tasks on devices share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from narrowboat.arena.device.access import AccessWatch
from narrowboat.arena.device.emulated import EmulatedDevice
from narrowboat.tasks.execute.device_ground import DeviceGround
from narrowboat.tasks.execute.device_model import DeviceTaskModel
from narrowboat.tasks.execute.executor import Executor
from narrowboat.tasks.execute.inputs import Source
from narrowboat.tasks.execute.running import Running
from narrowboat.tasks.execute.space import Pool, SwapSpace
from narrowboat.tasks.execute.worker import Worker
from narrowboat.tasks.job import TaskFacts
from narrowboat.tasks.policy import order
from narrowboat.tasks.policy.boundaries import BlockBoundaries
from narrowboat.tasks.record import Record

GRAIN = 16 << 10
LONG = 60_000_000


@contextmanager
def on_device(nets: Path, device: EmulatedDevice, *names: str, **options: Any) -> Iterator[list[DeviceTaskModel]]:
    """The networks, opened on a device, with their weights in host memory; nothing is left behind."""
    ground = DeviceGround(device, **options)
    made = [ground.open(f"tasks_test_nets:{name}", nets / f"{name}.safetensors", None) for name in names]
    models = [model for model in made if isinstance(model, DeviceTaskModel)]
    try:
        ground.plan_mirrors(dict(zip(names, made, strict=True)), None)
        for model in made:
            ground.prepare(model)
        yield models
    finally:
        for model in models:
            model.dismantle()
        ground.close()
    assert device.memory()[0] == device.memory()[1] - device._taken
    assert device.pinned_bytes == 0


def facts_of(model: DeviceTaskModel, name: str, index: int, period: int = LONG, cost: int = 10_000) -> TaskFacts:
    """With every block's worst times the same."""
    sizes = tuple(place.nbytes if place else 0 for place in model.places)
    return TaskFacts(name, index, tuple(cost * bool(n) for n in sizes), (cost,) * len(sizes), sizes, period, period)


def running(
    model: DeviceTaskModel, name: str, index: int = 0, *, pins: tuple[int, ...] = (), period: int = LONG, **more: Any
) -> Running:
    """A task of a block per unit."""
    if model.placement is None:
        model.arrange(None, list(range(1, len(model.units) + 1)), pins)
    facts = facts_of(model, name, index, period, more.pop("cost", 10_000))
    return Running(facts, model, more.pop("source", Source(lambda: model.inputs)), **more)


def window_of(*models: DeviceTaskModel, blocks: int = 2) -> Pool:
    """A pool of so many of the largest blocks."""
    return models[0].ground.pool(blocks * max(unit.nbytes for model in models for unit in model.units))


def run(
    tasks: list[Running], pool: Pool, *, seconds: float = 1.0, jobs: int = 3, prefetch: bool = False, **more: Any
) -> Record:
    """So many jobs of each, one after the other; or by the clock for so long."""
    model = tasks[0].model
    assert isinstance(model, DeviceTaskModel)
    policy = more.pop("policy", None) or BlockBoundaries(order.edf, prefetch=prefetch)
    options = {"budget": 1 << 40, "ground": model.ground, **more}
    executor = Executor(tasks, policy, options.pop("space", None) or SwapSpace(pool), **options)
    closed = all(task.closed_loop for task in tasks)
    return executor.run(20, jobs=jobs) if closed else executor.run(seconds)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[AccessWatch]:
    """Every operator of a job is proved to be ordered; the list holds the watches."""
    made: list[AccessWatch] = []
    plain = Worker._pass

    def proved(self: Worker, inputs: tuple[Any, ...]) -> Any:
        assert isinstance(self.model, DeviceTaskModel)
        device = self.model.ground.device
        assert isinstance(device, EmulatedDevice)
        made.append(AccessWatch(device))
        with made[-1]:
            return plain(self, inputs)

    monkeypatch.setattr(Worker, "_pass", proved)
    return made


def plain(nets: Path, name: str, x: torch.Tensor) -> torch.Tensor:
    """What PyTorch gives."""
    import tasks_test_nets  # type: ignore[import-not-found]
    from safetensors.torch import load_file

    module = getattr(tasks_test_nets, name)()
    module.load_state_dict(load_file(str(nets / f"{name}.safetensors")), strict=False)
    with torch.inference_mode():
        return module(x)  # type: ignore[no-any-return]
