"""What every unit of every network costs on this machine: loads beside computing, computing beside loads."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from narrowboat.errors import AdmissionError, ModelError, UsageError
from narrowboat.machine.cache import cache_folder, write_durably
from narrowboat.tasks.analysis.memory import largest_pair
from narrowboat.tasks.execute.device_model import DeviceTaskModel
from narrowboat.tasks.execute.executor import Executor
from narrowboat.tasks.execute.ground import Ground
from narrowboat.tasks.execute.inputs import Source
from narrowboat.tasks.execute.load_models import Loaded
from narrowboat.tasks.execute.model import TaskModel
from narrowboat.tasks.execute.running import Running
from narrowboat.tasks.execute.space import SwapSpace
from narrowboat.tasks.execute.wire import signature_of
from narrowboat.tasks.job import TaskFacts
from narrowboat.tasks.policy import order
from narrowboat.tasks.policy.boundaries import BlockBoundaries
from narrowboat.tasks.record import JobRecord, Record
from narrowboat.tasks.spec.load import tasks_from

if TYPE_CHECKING:
    from narrowboat.tasks.execute.child import Pipe

FORMAT = 6
_LEAST, _MOST, _WARM = 8, 1000, 2
_ELSEWHERE = 64 << 20  # bytes that are touched between two jobs, more than caches hold


def measure(request: dict[str, Any], pipe: Pipe) -> dict[str, Any]:
    """Costs of all networks, from the cache where it has them.

    Raises:
        AdmissionError: one is not there, and the request says that nothing may be measured now.
    """
    settings, folder = tasks_from(request["settings"]), Path(request["folder"])
    loaded = Loaded(settings, folder, lambda said: pipe.tell("progress", said=said))
    if not request.get("cached_only"):  # else those that run hold it
        loaded.ground.check(settings.budget)
    costs: dict[str, dict[str, Any]] = {}
    for name, model in loaded.of.items():
        digest = loaded.digests[name]
        if digest in costs:
            continue
        path = cache_folder() / "tasks" / f"{digest}.json"
        kept = _kept(path, digest)
        if kept is None and request.get("cached_only"):
            raise AdmissionError(
                f"what {name} costs is not known, and measuring would disturb the tasks that run: "
                "run `narrowboat tasks check` on the new description first, or stop the run"
            )
        if kept is None:
            pipe.tell("progress", said=f"measuring {name}")
            loaded.ground.prepare(model)
            kept = {"format": FORMAT, "digest": digest, **_measure(model, loaded.ground, settings.calibration / 1e6)}
            try:
                write_durably(path, json.dumps(kept))
            except OSError as error:
                pipe.tell("progress", said=f"the profile of {name} cannot be kept: {error.strerror}")
        costs[digest] = kept
    return {
        "digests": loaded.digests,
        "costs": costs,
        "held": {
            name: loaded.ground.costs_of(model, costs[loaded.digests[name]]) for name, model in loaded.of.items()
        },
        "chunk_bytes": {name: loaded.ground.chunk_bytes(model) for name, model in loaded.of.items()},
        "signatures": {name: costs[digest]["signature"] for name, digest in loaded.digests.items()},
        "images": {name: _image(model) for name, model in loaded.of.items() if _takes_image(model)},
        "mirrors": {name: model.mirrored for name, model in loaded.of.items() if isinstance(model, DeviceTaskModel)},
        "host_budget": loaded.host_budget,
    }


def _kept(path: Path, digest: str) -> dict[str, Any] | None:
    try:
        told = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    right = isinstance(told, dict) and told.get("format") == FORMAT and told.get("digest") == digest
    return told if right and told.get("units") else None


def _measure(model: TaskModel, ground: Ground, seconds: float) -> dict[str, Any]:
    sizes = [unit.nbytes for unit in model.units]
    pool = ground.pool(max(largest_pair(sizes), 1 << 20))
    ends = range(1, len(sizes) + 1)
    model.arrange(pool, list(ends), ())
    there = tuple(place.nbytes if place is not None else 0 for place in model.places)
    facts = TaskFacts("calibration", 0, tuple(int(n > 0) for n in there), (1,) * len(sizes), there, 1 << 40, 1 << 40)
    stolen: list[int] = []
    elsewhere = torch.ones(_ELSEWHERE >> 2, device=ground.torch_device)
    ground.clear()
    before = ground.heap_bytes()

    def after_others() -> tuple[Any, ...]:
        """As a job finds the machine when others have run: their data in the caches, no holes of its own."""
        ground.relieve()
        elsewhere.add_(1)
        stolen.append(stolen_ticks())
        return model.inputs

    signature: dict[str, Any] = {}

    def look(job: JobRecord, output: Any) -> None:
        if not signature and job.outcome in ("done", "late"):
            signature.update(_signature(model, output))

    running = Running(facts, model, Source(after_others), closed_loop=True, on_end=look)
    space = SwapSpace(pool, remember=False)
    executor = Executor([running], BlockBoundaries(order.edf), space, budget=1 << 50, ground=ground)
    first = executor.run(None, jobs=_WARM + 1)
    once = max(first.end / (_WARM + 1) / 1e6, 1e-4)
    running.released, running.worker, running.on_end = 0, None, None
    jobs = min(max(math.ceil(seconds / once), _LEAST), _MOST)
    executor = Executor([running], BlockBoundaries(order.edf), space, budget=1 << 50, ground=ground)
    stolen.clear()
    ground.reset_peak()
    record = executor.run(None, jobs=jobs)
    stolen.append(stolen_ticks())
    busy = ground.heap_peak(pool) - before
    space.forget()
    ground.clear()
    left = max(ground.heap_bytes() - before, 0)
    model.dismantle()
    pool.close()
    kept = undisturbed([after - before for before, after in pairwise(stolen)])
    record.segments = [part for part in record.segments if part.job in kept]
    record.jobs = [job for job in record.jobs if job.number in kept]
    memory = {"left_bytes": left, "busy_bytes": max(busy - left, 0)}
    summary = _summary(record, sizes, len(kept), executor.account.overheads)
    about = {"condition": ground.condition, "signature": signature}
    return {"disturbed": jobs - len(kept), **memory, **summary, **about}


def _takes_image(model: TaskModel) -> bool:
    first = model.input_specs[0] if model.input_specs else None
    return first is not None and first.datatype == "FP32" and len(first.shape) == 4 and first.shape[:2] == (1, 3)


def _image(model: TaskModel) -> dict[str, Any]:
    """How an image is made its input."""
    resolved = model.request.resolved
    return {"mean": list(resolved.image_mean), "std": list(resolved.image_std)}


def _signature(model: TaskModel, output: Any) -> dict[str, Any]:
    """What it takes and gives; why that cannot be sent, if it cannot: only tasks with a queue need it."""
    try:
        return signature_of(model.module, model.inputs, output).as_json()
    except UsageError as error:
        return {"error": str(error)}


def undisturbed(stolen: Sequence[int]) -> set[int]:
    """The passes in which no other machine's work took our cores; where those are few, the least disturbed.

    What is taken away is a matter of supply, and not of what a network costs.
    """
    order = sorted(range(len(stolen)), key=lambda k: (stolen[k], k))
    clean = sum(ticks == 0 for ticks in stolen)
    return set(order[: max(clean, min(_LEAST, len(stolen)))])


def stolen_ticks() -> int:
    """Hundredths of a second that the hypervisor has given our cores' time to others, so far."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return int(fields[8]) if len(fields) > 8 else 0


def _summary(record: Record, sizes: list[int], jobs: int, overheads: Sequence[int]) -> dict[str, Any]:
    loads: list[list[int]] = [[] for _ in sizes]
    computes: list[list[int]] = [[] for _ in sizes]
    for segment in record.segments:
        (loads if segment.engine == "load" else computes)[segment.block].append(segment.end - segment.begin)
    failed = next((job.cause for job in record.jobs if job.outcome == "failed"), None)
    if failed is not None or not all(computes):
        raise ModelError(f"it cannot be a task: {failed or 'no job ended'}")
    ordered = sorted(overheads)
    return {
        "n": jobs,
        "overhead_us": ordered[int(len(ordered) * 0.99)] if ordered else 0,
        "overhead_median_us": ordered[len(ordered) // 2] if ordered else 0,
        "real_time": record.premises["real_time"],
        "samples": _by_pass(record, len(sizes)),
        "units": [
            {"bytes": size, "load_us": _spread(load), "compute_us": _spread(compute)}
            for size, load, compute in zip(sizes, loads, computes, strict=True)
        ],
    }


def _by_pass(record: Record, units: int) -> list[list[list[int]]]:
    """Times by (load or compute, pass, unit); of passes that ended."""
    rows: dict[tuple[str, int], list[int]] = {}
    for segment in record.segments:
        row = rows.setdefault((segment.engine, segment.job), [0] * units)
        row[segment.block] = segment.end - segment.begin
    done = [job.number for job in record.jobs if job.finish is not None]
    return [[rows.get((engine, number), [0] * units) for number in done] for engine in ("load", "compute")]


def _spread(times: list[int]) -> dict[str, int]:
    if not times:
        return {"n": 0, "median": 0, "p99.9": 0, "max": 0}
    ordered = sorted(times)
    return {
        "n": len(ordered),
        "median": ordered[len(ordered) // 2],
        "p99.9": ordered[min(math.ceil(len(ordered) * 0.999), len(ordered)) - 1],
        "max": ordered[-1],
    }
