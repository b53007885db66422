"""Tasks on an emulated device: the same bits, every use in order, and never a byte over the limit."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from narrowboat.arena.device.access import AccessWatch
from narrowboat.arena.device.emulated import EmulatedDevice
from narrowboat.arena.device.find import open_device
from narrowboat.arena.device.lanes import LaneEvent
from narrowboat.errors import (
    BudgetError,
    DeviceLostError,
    DeviceOrderError,
    PinnedMemoryError,
    StorageError,
    UsageError,
)
from narrowboat.stream.staging import Staging
from narrowboat.tasks.execute.account import Account
from narrowboat.tasks.execute.device_ground import DeviceGround
from narrowboat.tasks.execute.device_load import Passage, _Landing
from narrowboat.tasks.execute.device_model import DeviceTaskModel
from narrowboat.tasks.execute.inputs import Source
from narrowboat.tasks.execute.loader import _Release
from narrowboat.tasks.execute.mirrors import choose_mirrored
from narrowboat.tasks.execute.space import SwapSpace
from task_device_kit import GRAIN, on_device, plain, run, running, watched, window_of

__all__ = ["watched"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("pins", [(), (0,), (1, 4)])
def test_outputs_have_plain_pytorchs_bits_and_every_use_is_in_order(
    nets: Path, watched: list[AccessWatch], pins: tuple[int, ...], prefetch: bool
) -> None:
    device = EmulatedDevice(8 << 20, granularity=GRAIN, jitter=3)
    outputs: list[Any] = []
    with on_device(nets, device, "deep") as (model,):
        assert len(model.units) == 6
        task = running(model, "deep", pins=pins, closed_loop=True, on_end=lambda told, out: outputs.append(out))
        record = run([task], window_of(model), prefetch=prefetch)
    assert [(job.outcome, job.cause) for job in record.jobs] == [("done", "")] * 3
    wanted = plain(nets, "deep", torch.ones(1, 256))
    assert len(outputs) == 3 and all(torch.equal(output, wanted) for output in outputs)
    assert sum(watch.reads for watch in watched) >= 3 * 6
    assert sum(s.what == "compute" for s in record.segments) == 18


def within(device: EmulatedDevice, limit: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the driver says is held, looked at whenever a segment ends and whenever a chunk is mapped."""
    seen: list[int] = []
    segment, mapped = Account.segment, EmulatedDevice.map

    def look() -> None:
        free, total = device.memory()
        seen.append(total - free)
        assert total - free <= limit

    def ended(self: Account, *arguments: Any) -> None:
        look()
        segment(self, *arguments)

    def more(self: EmulatedDevice, address: int, nbytes: int) -> object:
        handle = mapped(self, address, nbytes)
        look()
        return handle

    monkeypatch.setattr(Account, "segment", ended)
    monkeypatch.setattr(EmulatedDevice, "map", more)
    return seen


@pytest.mark.parametrize("host", [None, 3 << 20], ids=["all mirrored", "some mirrored"])
@pytest.mark.parametrize("seed", [1, 2])
def test_tasks_that_preempt_each_other_keep_the_order_and_the_limit(
    nets: Path, watched: list[AccessWatch], monkeypatch: pytest.MonkeyPatch, host: int | None, seed: int
) -> None:
    device = EmulatedDevice(16 << 20, granularity=4 * GRAIN, bandwidth=150e6, jitter=seed)
    outputs: dict[str, list[Any]] = {"deep": [], "other": [], "wide": []}
    periods = {"deep": 170_000, "other": 70_000, "wide": 400_000}
    with on_device(nets, device, *outputs, host_budget=host) as models:
        mirrored = [len(model.mirror.offsets) for model in models]
        assert (mirrored == [len(model.units) for model in models]) == (host is None)
        if host is not None:
            assert device.pinned_bytes <= host
        pool = window_of(*models, blocks=3)
        seen = within(device, pool.nbytes, monkeypatch)
        tasks = [
            running(
                model,
                name,
                index,
                period=periods[name],
                cost=300_000,
                on_end=lambda told, out, name=name: outputs[name].append(out),
            )
            for index, (model, name) in enumerate(zip(models, outputs, strict=True))
        ]
        record = run(tasks, pool, seconds=1.7, prefetch=seed == 1, budget=pool.nbytes)
    causes = {job.cause for job in record.jobs if job.outcome == "failed"}
    assert not causes
    assert max(seen) > 0 and (seed == 1 or sum(job.preemptions for job in record.jobs) > 0)
    for name, x in (("deep", torch.ones(1, 256)), ("other", torch.ones(1, 128)), ("wide", torch.ones(1, 1024))):
        wanted = plain(nets, name, x)
        found = [output for output in outputs[name] if output is not None]
        assert found and all(torch.equal(output, wanted) for output in found)
    assert all(held <= pool.nbytes for _, held in record.memory)
    assert record.premises["peak_bytes"] == max(seen)


def test_two_tasks_share_one_network(nets: Path, watched: list[AccessWatch]) -> None:
    device = EmulatedDevice(16 << 20, granularity=GRAIN, jitter=7)
    outputs: list[Any] = []
    with on_device(nets, device, "deep") as (model,):
        tasks = [
            running(model, name, k, period=p, cost=500_000, on_end=lambda told, out: outputs.append(out))
            for k, (name, p) in enumerate((("often", 50_000), ("seldom", 130_000)))
        ]
        record = run(tasks, window_of(model, blocks=4))
    assert not [job.cause for job in record.jobs if job.outcome == "failed"]
    wanted = plain(nets, "deep", torch.ones(1, 256))
    assert all(torch.equal(output, wanted) for output in outputs if output is not None)


# -- the proof can fail --------------------------------------------------------------------------------------------


def without(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Take one of the waits out."""
    if what == "the worker waits for its kernels at a boundary":
        monkeypatch.setattr(DeviceTaskModel, "settle", lambda self: None)
    elif what == "the loader waits for its copies":
        run = Passage.run

        def hasty(self: Passage) -> object:
            wait, LaneEvent.wait = LaneEvent.wait, lambda event: event.hold()  # type: ignore[method-assign]
            try:
                return run(self)
            finally:
                LaneEvent.wait = wait  # type: ignore[method-assign]

        monkeypatch.setattr(Passage, "run", hasty)
    elif what == "the worker takes over what the loader knew":
        monkeypatch.setattr(DeviceTaskModel, "ready", lambda self, block: None)
    elif what == "the loader takes over what the worker knew":
        monkeypatch.setattr(
            "narrowboat.tasks.execute.loader.Loader.let_go",
            lambda self, place: self._orders.put(_Release(place, {})),
        )
    elif what == "readers wait for copies from their buffers":
        monkeypatch.setattr(Staging, "give", lambda self, number, copied: None)
    elif what == "the loader takes over what the readers knew":
        monkeypatch.setattr(_Landing, "learn", lambda self: None)
        monkeypatch.setattr(LaneEvent, "wait", lambda self: self.hold())


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("the worker waits for its kernels at a boundary", "unmapped while in use"),
        ("the loader waits for its copies", "used before ready|unmapped while in use"),
        ("the worker takes over what the loader knew", "used before ready"),
        ("the loader takes over what the worker knew", "unmapped while in use"),
        ("readers wait for copies from their buffers", "overwritten while in use"),
        ("the loader takes over what the readers knew", "used before ready|while in use"),
    ],
)
def test_every_wait_is_needed_and_missed(
    nets: Path, watched: list[AccessWatch], monkeypatch: pytest.MonkeyPatch, what: str, said: str
) -> None:
    device = EmulatedDevice(16 << 20, granularity=GRAIN)
    ground = DeviceGround(device, host_budget=1 << 20 if "readers" in what else None)
    model = ground.open("tasks_test_nets:deep", nets / "deep.safetensors", None)
    assert isinstance(model, DeviceTaskModel)
    ground.plan_mirrors({"deep": model}, None)
    ground.prepare(model)
    task = running(model, "deep", closed_loop=True)
    without(monkeypatch, what)
    try:
        record = run([task], window_of(model))
        caught = "; ".join(job.cause for job in record.jobs)
    except DeviceOrderError as error:  # where a block is let go, nobody's job fails of it
        caught = str(error)
    assert re.search(said, caught), caught
    monkeypatch.undo()


# -- loads that do not come to their end ---------------------------------------------------------------------------


def cancel_after(way: Any, ground: Any, copied: int) -> None:
    """Give a load up when its first bytes are on the device."""
    while ground.copied <= copied:
        time.sleep(1e-3)
    way.cancel()


def test_a_load_that_is_given_up_ends_between_chunks_and_leaves_nothing(nets: Path) -> None:
    device = EmulatedDevice(16 << 20, granularity=GRAIN, bandwidth=4e6)  # a block takes 65 ms
    for host in (None, 3 << 20):
        with on_device(nets, device, "wide", host_budget=host) as (model,):
            model.arrange(None, list(range(1, len(model.units) + 1)), ())
            block = max(range(len(model.units)), key=lambda k: model.units[k].nbytes)
            assert (block in model.mirror.offsets) == (host is None)
            way = model.way(block)
            copied = model.ground.copied
            threading.Thread(target=cancel_after, args=(way, model.ground, copied)).start()
            begin = time.monotonic()
            with pytest.raises(StorageError, match="given up"):
                way.run()
            took = time.monotonic() - begin
            assert took < 0.6 and took < model.units[block].nbytes / 4e6 / 2
            assert 0 < model.ground.copied - copied < model.units[block].nbytes
            assert device.memory()[0] == device.memory()[1]
            assert model.ground.tally.nbytes == 0


def test_a_prefetch_that_is_given_up_is_an_abort_and_its_block_comes_later(
    nets: Path, watched: list[AccessWatch]
) -> None:
    device = EmulatedDevice(16 << 20, granularity=GRAIN, bandwidth=60e6)
    with on_device(nets, device, "wide", "other") as (wide, other):
        tasks = [
            running(wide, "wide", 0, period=250_000, cost=200_000),
            running(other, "other", 1, period=61_000, cost=100_000),
        ]
        record = run(tasks, window_of(wide, other, blocks=3), seconds=1.5, prefetch=True)
    assert not [job.cause for job in record.jobs if job.outcome == "failed"]
    assert {job.task for job in record.jobs if job.finish is not None} == {"wide", "other"}
    kinds = {part.what for part in record.segments}
    assert "prefetch" in kinds


def test_another_process_takes_the_memory_and_gives_it_back(nets: Path) -> None:
    device = EmulatedDevice(8 << 20, granularity=GRAIN)
    with on_device(nets, device, "deep") as (model,):
        count = 0

        def take() -> Any:
            nonlocal count
            count += 1
            if count == 3:
                device.take(8 << 20)
            elif count == 5:
                device.take(-(8 << 20))
            return model.inputs

        outputs: list[Any] = []
        task = running(
            model, "deep", period=100_000, source=Source(take), on_end=lambda told, out: outputs.append(out)
        )
        space = SwapSpace(window_of(model), remember=False)
        record = run([task], space.pool, seconds=0.8, prefetch=True, space=space)
    outcomes = [job.outcome for job in record.jobs]
    assert outcomes == ["done", "done", "failed", "failed", "done", "done", "done", "done"]
    assert all("DeviceMemoryError" in job.cause for job in record.jobs if job.outcome == "failed")
    wanted = plain(nets, "deep", torch.ones(1, 256))
    assert all(torch.equal(output, wanted) for output in outputs if output is not None)


def test_a_lost_device_ends_the_run_with_its_name(nets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = EmulatedDevice(8 << 20, granularity=GRAIN)
    with on_device(nets, device, "deep") as (model,):
        task = running(model, "deep", closed_loop=True)
        copies = 0

        def lost(*_: object) -> None:
            nonlocal copies
            copies += 1
            if copies > 12:
                raise DeviceLostError("the device stopped answering")
            plainly(device, *_)  # type: ignore[arg-type]

        plainly = EmulatedDevice.copy_in
        monkeypatch.setattr(device, "copy_in", lost)
        with pytest.raises(DeviceLostError, match="stopped answering"):
            run([task], window_of(model))
        monkeypatch.undo()
    x = torch.ones(3)
    assert float(x.sum()) == 3  # the host goes on


def test_a_pool_that_holds_no_block_fails_the_job_and_says_so(nets: Path) -> None:
    device = EmulatedDevice(8 << 20, granularity=GRAIN)
    with on_device(nets, device, "deep") as (model,):
        record = run([running(model, "deep", closed_loop=True)], model.ground.pool(GRAIN))
    assert {job.outcome for job in record.jobs} == {"failed"}
    assert "does not fit beside" in record.jobs[0].cause


# -- host memory ---------------------------------------------------------------------------------------------------


def test_the_longest_loads_are_kept_in_host_memory_first() -> None:
    sizes = {"a": [400, 0, 100], "b": [300, 200]}
    assert choose_mirrored(sizes, 1000, 50) == {"a": [0, 2], "b": [0, 1]}
    assert choose_mirrored(sizes, 999, 50) == {"a": [0], "b": [0, 1]}
    assert choose_mirrored(sizes, 780, 50) == {"a": [0], "b": [0]}
    assert choose_mirrored(sizes, 50, 50) == {"a": [], "b": []}
    with pytest.raises(BudgetError, match="smallest that does"):
        choose_mirrored(sizes, 49, 50)


def test_pinned_memory_that_is_refused_is_named_and_nothing_is_left(nets: Path) -> None:
    device = EmulatedDevice(8 << 20, granularity=GRAIN, pinnable=1 << 20)
    with pytest.raises(PinnedMemoryError, match="cannot pin"), on_device(nets, device, "deep"):
        pass
    assert device.pinned_bytes == 0 and device.memory()[0] == 8 << 20


def test_a_device_that_shares_the_hosts_memory_is_refused() -> None:
    with pytest.raises(UsageError, match="shares the host's memory"):
        DeviceGround(EmulatedDevice(unified=True))


@pytest.mark.cuda
def test_a_gpu_gives_plain_pytorchs_results(nets: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    outputs: list[Any] = []
    ground = DeviceGround(open_device("cuda"))
    model = ground.open("tasks_test_nets:wide", nets / "wide.safetensors", None)
    assert isinstance(model, DeviceTaskModel)
    ground.plan_mirrors({"wide": model}, None)
    ground.prepare(model)
    task = running(model, "wide", closed_loop=True, on_end=lambda told, out: outputs.append(out))
    record = run([task], window_of(model))
    ground.close()
    assert [(job.outcome, job.cause) for job in record.jobs] == [("done", "")] * 3
    wanted = plain(nets, "wide", torch.ones(1, 1024))
    assert len(outputs) == 3 and all(torch.allclose(output, wanted, atol=1e-5) for output in outputs)
