"""How a streamed network is made: blocks, parameters' addresses, who reads, what a change of budget touches."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import narrowboat as nb
from inference_kit.children import Emit
from inference_kit.materials import Material, make_files, material
from inference_kit.measure import digest_of
from narrowboat.profile.warmup import warm_up
from narrowboat.quantities import format_bytes
from narrowboat.trace import Event
from papers_kit.check import Bench, Measurement
from plan_kit import children
from plan_kit.random_changes import changes

_MODEL = "resnet101"
_CHANGED = "efficientnet_lite2"
_DIVISOR = 2.32
_PASSES = 5
_WRITTEN = 1 << 20  # bytes: whatever the interpreter writes, and nothing of the weights
_WEIGHT_AT = {"convolution": 1, "conv2d": 1, "linear": 1, "addmm": 2}  # which argument of the operator is a parameter


class WeightWatch(TorchDispatchMode):
    """Notes the address of the weight of every convolution and matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = _WEIGHT_AT.get(func.overloadpacket.__name__)
        if place is not None and type(args[place]) in (torch.Tensor, torch.nn.Parameter):
            self.seen.append(args[place].data_ptr())
        return func(*args, **(kwargs or {}))


def structure(bench: Bench) -> Measurement:
    """One network in 1/2.32 of its bytes, looked into while it runs."""
    files = material(_MODEL, bench.work)
    bench.apart("structure-files", partial(_files, files), 600)
    return bench.apart("structure", partial(_look, files), 180)


def _files(files: Material, emit: Emit) -> None:
    make_files(files, pth=False, groups=False)


def _look(files: Material, emit: Emit) -> None:
    warm_up()
    plain = files.model()
    shapes = {name: (tuple(p.shape), p.dtype) for name, p in plain.named_parameters()}
    modules = [(name, type(part).__name__) for name, part in plain.named_modules()]
    threads = set(threading.enumerate())
    budget = int(files.weight_bytes / _DIVISOR)
    model = nb.stream(files.model, files.packed, budget=budget)
    with nb.session(model) as session, torch.inference_mode():
        inputs = files.model.example_inputs()
        for _ in range(3):  # the plan made of measurements is in force from here on
            model(*inputs)
        written, passes = _written_bytes(), []
        since = time.perf_counter()
        for _ in range(_PASSES):
            with WeightWatch() as watch:
                model(*inputs)
            passes.append(watch.seen)
        written = _written_bytes() - written
        slab = session.slab
        inside = [slab.address <= at < slab.address + slab.nbytes for at in passes[0]]
        events = session.timeline.events(since)
        plan = session.plan
        starts = [plan.blocks[i].holds[0][0] for i in range(len(plan.blocks)) if plan.blocks[i].holds]
        readers = {t.name for t in set(threading.enumerate()) - threads if t is not threading.current_thread()}
        reading = sum(event.end - event.start for event in events if event.lane == "read")
        emit(
            "measured",
            model=files.model.name,
            blocks=len(plan.blocks),
            weights_in_blocks=len({weight.index for weight in session.prepared.weights}),
            blocks_in_order=starts == sorted(starts) and len(starts) > 1,
            by_reference=all(inside) and bool(inside),
            operators=len(inside),
            same_addresses=all(seen == passes[0] for seen in passes),
            nothing_copied=session.stats()["copied_bytes"] == 0,
            own_readers=bool(readers),
            readers=", ".join(sorted(readers)) or "none",
            overlapped=overlap(events) > 0,
            overlapped_share=overlap(events) / reading if reading else 0.0,
            nothing_written=written < _WRITTEN,
            written=format_bytes(written),
            skeleton=format_bytes(dict(plan.fixed_parts).get("bookkeeping", 0)),
            same_modules=modules == [(name, type(part).__name__) for name, part in model.named_modules()],
            same_parameters=shapes == {n: (tuple(p.shape), p.dtype) for n, p in model.named_parameters()},
        )


def overlap(events: Iterable[Event]) -> float:
    """Seconds of reading during which something computed."""
    told = list(events)
    computing = [(event.start, event.end) for event in told if event.lane == "compute"]
    return sum(_shared((e.start, e.end), computing) for e in told if e.lane == "read")


def _shared(span: tuple[float, float], others: Sequence[tuple[float, float]]) -> float:
    return sum(max(min(span[1], end) - max(span[0], start), 0.0) for start, end in others)


def _written_bytes() -> int:
    """By this process to storage so far (proc(5), ``write_bytes`` of ``/proc/self/io``)."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["write_bytes"])


def changing(bench: Bench) -> Measurement:
    """The budget changes at random while a network runs; what it was divided into stays."""
    effort = bench.effort
    files = material(_CHANGED, bench.work)
    bench.apart("changing-files", partial(_files, files), 600)
    bench.apart("changing-profile", partial(_profile, files), 300)
    before = files.packed.stat()
    body = partial(_change, files, effort.change_passes, effort.changes)
    found = bench.apart("changing", body, 240)
    after = files.packed.stat()
    same = (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)
    return found | {"model": _CHANGED, "file_untouched": same}


def _profile(files: Material, emit: Emit) -> None:
    children.profile(emit, files)


def _change(files: Material, passes: int, count: int, emit: Emit) -> None:
    warm_up()
    inputs = files.model.example_inputs()
    start = time.perf_counter()
    model = nb.stream(files.model, files.packed, budget=1 << 30)
    prepared_s = time.perf_counter() - start
    with nb.session(model) as session, torch.inference_mode():
        reference = digest_of(model(*inputs))
        for _ in range(4):
            model(*inputs)
        plan = session.plan
        lowest = int(session.prepared.check(1 << 62)[0] * 1.2)
        highest = plan.weight_bytes + plan.fixed_bytes
        trace, weights = session.prepared.trace, [w.index for w in session.prepared.weights]
        seconds: list[float] = []
        budgets = changes(lowest, highest, passes, count)
        wrong = 0
        for number in range(passes):
            if number in budgets:
                start = time.perf_counter()
                session.budget = budgets[number]
                seconds.append(time.perf_counter() - start)
            wrong += digest_of(model(*inputs)) != reference
        same = session.prepared.trace is trace and [w.index for w in session.prepared.weights] == weights
    emit(
        "measured",
        changes=len(seconds),
        passes=passes,
        wrong=wrong,
        always_right=wrong == 0,
        switch_ms=statistics.median(seconds) * 1e3,
        worst_switch_ms=max(seconds) * 1e3,
        prepared_ms=prepared_s * 1e3,
        not_divided_again=same,
        least=format_bytes(lowest),
        most=format_bytes(highest),
    )
