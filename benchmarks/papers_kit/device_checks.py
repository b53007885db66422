"""RT-Swap's rules and SwapNet's copy-free dispatch on an emulated device, which proves order and bytes, not speed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import narrowboat as nb
from cuda_kit import swap_child
from inference_kit.children import Emit
from narrowboat.arena.device.emulated import EmulatedDevice
from narrowboat.errors import BudgetError
from narrowboat.quantities import format_bytes
from narrowboat.tasks.execute.device_ground import DeviceGround
from narrowboat.tasks.execute.device_model import DeviceTaskModel
from narrowboat.tasks.execute.executor import Executor
from narrowboat.tasks.execute.inputs import Source
from narrowboat.tasks.execute.running import Running
from narrowboat.tasks.execute.space import SwapSpace
from narrowboat.tasks.job import TaskFacts
from narrowboat.tasks.policy.volume import VolumeSwap
from narrowboat.tasks.record import Record
from papers_kit import nets, rules
from papers_kit.check import Bench, Measurement

_GRAIN = 64 << 10
_BANDWIDTH = 1e9  # bytes per second of the emulated bus
_DEMAND = 1.962
_SHARE = 0.9  # of the weights: the smallest budget is not far below
_WHOLE = 24 << 20  # bytes of the slab that is swapped by hand
_CHUNKS = (64 << 10, 2 << 20)


def swapping(bench: Bench) -> Measurement:
    """A slab out and in, whole and in part, at two sizes of chunk."""
    found = bench.apart("swapping", _swap, 120)
    chunks = found["chunks"]
    return {
        "sizes": ", ".join(format_bytes(chunk["chunk"]) for chunk in chunks),
        "bytes": format_bytes(_WHOLE),
        "part": format_bytes(chunks[0]["part_bytes"]),
        "addresses_and_bytes_unchanged": all(chunk["bytes_same"] for chunk in chunks),
        "memory_given_back": all(chunk["free_exact"] for chunk in chunks),
        "chunk_as_asked": [chunk["chunk"] for chunk in chunks] == list(_CHUNKS),
        "parts_move": all(0 < chunk["part_bytes"] < chunk["bytes"] for chunk in chunks),
    }


def _swap(emit: Emit) -> None:
    chunks: list[dict[str, Any]] = []

    def told(kind: str, **values: Any) -> None:
        if kind == "chunk":
            chunks.append(values)

    swap_child.run(
        told, device="emulated:128MiB", nbytes=_WHOLE, chunks=list(_CHUNKS), repeats=2, sizes=[1 << 20], copies=2
    )
    emit("measured", chunks=chunks)


def sharing_memory(bench: Bench) -> Measurement:
    """The same network on a device that shares the host's memory, and on one that does not; and unused weights."""
    return bench.apart("sharing", partial(_share, bench.work), 120)


def _share(work: Path, emit: Emit) -> None:
    told: dict[str, Any] = {}
    path, x, wanted = _saved(nets.first, work / "first.safetensors")
    for unified in (True, False):
        device = EmulatedDevice(64 << 20, unified=unified)
        weights = path.stat().st_size
        budget: Any = int(weights * _SHARE) if unified else {"emulated": int(weights * _SHARE), "cpu": 64 << 20}
        model = nb.stream(nets.first, path, budget=budget, device=device, example=(x,))
        with nb.session(model) as session, torch.inference_mode():
            same = all(torch.equal(model(x), wanted) for _ in range(3))
            copied = session.stats()["device_copied_bytes"]
        told |= {f"bits_{'unified' if unified else 'apart'}": same}
        told |= {f"copied_{'unified' if unified else 'apart'}": int(copied)}
    told |= {"nothing_copied": told["copied_unified"] == 0, "copies_counted": told["copied_apart"] > 0}
    told["copied"] = format_bytes(told["copied_apart"])
    emit("measured", **told, **_unused(work))


def _unused(work: Path) -> dict[str, Any]:
    """A weight that passes do not touch, in a budget that cannot hold it beside the other: is it ever read?"""
    path, x, wanted = _saved(nets.HalfUsed, work / "half.safetensors", torch.ones(2, 1024))
    one = 1024 * 1024 * 4
    try:
        nb.stream(nets.HalfUsed, path, budget=1, example=(x,))
    except BudgetError as error:
        least = error.minimum or 0
    model = nb.stream(nets.HalfUsed, path, budget=least + (1 << 20), example=(x,))
    with nb.session(model) as session, torch.inference_mode():
        same = all(torch.equal(model(x), wanted) for _ in range(4))
        read = max(session.stats()["bytes_read"])
    return {
        "unused": format_bytes(one),
        "least": format_bytes(least),
        "read": format_bytes(read),
        "unused_never_read": read < 1.1 * one,
        "half_close": same,
    }


def _saved(factory: Any, path: Path, x: torch.Tensor | None = None) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """Random weights of a network in a packed file, an input, and plain PyTorch's answer."""
    torch.manual_seed(0)
    module = factory().eval()
    plain = path.with_suffix(".plain.safetensors")
    save_file(module.state_dict(), plain)
    path.unlink(missing_ok=True)
    nb.pack(plain, path)
    (x,) = factory.example_inputs() if x is None else (x,)
    with torch.inference_mode():
        return path, x, module(x)


def volumes(bench: Bench) -> Measurement:
    """Three networks that demand 1.962 times the device's limit, as whole jobs under RT-Swap's rules."""
    return bench.apart("volumes", partial(_volumes, bench.work, bench.effort.device_seconds), 120)


def _volumes(work: Path, seconds: float, emit: Emit) -> None:
    torch.set_num_threads(1)
    wanted: dict[str, torch.Tensor] = {}
    for name in nets.NAMES:
        _, _, wanted[name] = _saved(getattr(nets, name), work / f"{name}.safetensors")
    device = EmulatedDevice(64 << 20, granularity=_GRAIN, bandwidth=_BANDWIDTH)
    outputs: dict[str, list[Any]] = {name: [] for name in nets.NAMES}
    with _opened(work, device) as models:
        demand = sum(unit.nbytes for model in models for unit in model.units)
        limit = int(demand / _DEMAND) // _GRAIN * _GRAIN
        tasks = [_task(model, k, outputs) for k, model in enumerate(models)]
        ground = models[0].ground
        space = SwapSpace(ground.pool(limit))
        policy = VolumeSwap([task.facts for task in tasks], space.pool.nbytes, ground.chunk)
        record = Executor(tasks, policy, space, budget=limit, ground=ground).run(seconds)
    facts = [task.facts for task in tasks]
    bits = all(torch.equal(out, wanted[name]) for name, found in outputs.items() for out in found if out is not None)
    emit("measured", **told_of(record, facts, limit, demand), same_bits=bits, models=len(models))


def told_of(record: Record, facts: list[TaskFacts], limit: int, demand: int) -> Measurement:
    """RT-Swap's rules in the record; pure."""
    swappable = {task.name: task.swap_bytes for task in facts}
    swaps, runs = rules.swaps(record), rules.runs(record)
    earliest, forced, neither = rules.in_order(record)
    right, unclear, wrong = rules.victims(record, swappable)
    outs = [part for part in swaps if part.what == "swap_out"]
    beside = rules.overlapped(record)
    return {
        "demand": format_bytes(demand),
        "limit": format_bytes(limit),
        "ratio": demand / limit,
        "jobs": sum(job.outcome in ("done", "late") for job in record.jobs),
        "late": sum(job.outcome == "late" for job in record.jobs),
        "failed": sum(job.outcome == "failed" for job in record.jobs),
        "none_failed": not any(job.outcome == "failed" for job in record.jobs) and bool(runs),
        "peak": format_bytes(record.premises["peak_bytes"]),
        "within_limit": record.premises["peak_bytes"] <= limit,
        "swaps": len(swaps),
        "one_swap_at_a_time": rules.one_at_a_time(swaps) and bool(swaps),
        "one_job_at_a_time": rules.one_at_a_time(runs),
        "overlapped_ms": beside / 1e3,
        "overlaps": beside > 0,
        "earliest": earliest,
        "forced": forced,
        "neither": neither,
        "earliest_or_forced": neither == 0,
        "some_forced": forced > 0,
        "outs": len(outs),
        "partial": sum(part.nbytes < swappable[part.task] for part in outs),
        "only_what_is_needed": any(part.nbytes < swappable[part.task] for part in outs),
        "in_chunks": all(part.nbytes % _GRAIN == 0 for part in outs),
        "victims_right": right,
        "victims_unclear": unclear,
        "victims_wrong": wrong,
        "latest_is_victim": wrong == 0 and right > 0,
        "released_on_time": rules.on_time(record, {task.name: task.period for task in facts}),
        "every_job_is_told": all(job.outcome != "done" or job.finish is not None for job in record.jobs),
    }


@contextmanager
def _opened(work: Path, device: EmulatedDevice) -> Iterator[list[DeviceTaskModel]]:
    ground = DeviceGround(device)
    made = {n: ground.open(f"papers_kit.nets:{n}", work / f"{n}.safetensors", None) for n in nets.NAMES}
    models = [model for model in made.values() if isinstance(model, DeviceTaskModel)]
    try:
        ground.plan_mirrors(made, None)
        for model in models:
            ground.prepare(model)
            model.arrange(None, [len(model.units)], ())
        yield models
    finally:
        for model in models:
            model.dismantle()
        ground.close()


def _task(model: DeviceTaskModel, index: int, outputs: dict[str, list[Any]]) -> Running:
    """A whole network as one block, all of which may be swapped."""
    name = nets.NAMES[index]
    nbytes = sum(place.nbytes if place else 0 for place in model.places)
    period = 120_000 + 50_000 * index
    facts = TaskFacts(name, index, (100_000,), (100_000,), (nbytes,), period, period)
    keep = outputs[name]
    return Running(
        replace(facts, swap_bytes=nbytes),
        model,
        Source(lambda: model.inputs),
        on_end=lambda told, out: keep.append(out),
    )
