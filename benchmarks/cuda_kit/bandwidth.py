"""What can be copied and read per second: between pinned host memory and the device, and from storage."""

from __future__ import annotations

import mmap
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cuda_kit.children import Emit
from cuda_kit.place import Place
from narrowboat.arena.device.slab import DeviceSlab
from narrowboat.arena.slab import Slab

_READS = ((2 << 20, 2), (2 << 20, 4), (2 << 20, 8), (8 << 20, 4))  # bytes of a read, threads
_READ_AT_MOST = 768 << 20

Rates = dict[str, dict[str, float]]


def copies(emit: Emit, *, device: str, sizes: list[int], count: int) -> None:
    """Event ``copies``: bytes per second into the device and out of it, by size, the median of ``count``."""
    emit("copies", **measure(Place(device), sizes, count))


def measure(place: Place, sizes: list[int], count: int) -> Rates:
    """``{"in": {bytes: rate}, "out": {...}}``; the two ways in turn."""
    found: Rates = {"in": {}, "out": {}}
    for size in sizes:
        there, back, release = _on_gpu(place, size) if place.is_cuda else _emulated(place, size)
        rates: dict[str, list[float]] = {"in": [], "out": []}
        for _ in range(count + 1):
            rates["in"].append(size / there())
            rates["out"].append(size / back())
        for way, seen in rates.items():
            found[way][str(size)] = statistics.median(seen[1:])  # the first touches the memory
        release()
    return found


def _on_gpu(place: Place, size: int) -> tuple[Callable[[], float], Callable[[], float], Callable[[], None]]:
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(size, dtype=torch.uint8, device=place.torch_device)

    def copy(target: torch.Tensor, source: torch.Tensor) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return lambda: copy(device, host), lambda: copy(host, device), place.empty


def _emulated(place: Place, size: int) -> tuple[Callable[[], float], Callable[[], float], Callable[[], None]]:
    device = place.open()
    slab, host = DeviceSlab(device, size), Slab(size)
    device.pin(host)
    stream = device.stream("bandwidth")

    def copy(give: Callable[..., None], target: int, source: int) -> float:
        start = time.perf_counter()
        give(target, source, size, stream)
        stream.synchronize()
        return time.perf_counter() - start

    def release() -> None:
        slab.close()
        device.unpin(host)
        host.close()

    return (
        lambda: copy(device.copy_in, slab.address, host.address),
        lambda: copy(device.copy_out, host.address, slab.address),
        release,
    )


def storage(emit: Emit, *, path: str) -> None:
    """Event ``storage``: bytes per second of reading past the page cache, the best of a few ways; or why not."""
    try:
        found = {f"{size >> 20} MiB x {threads}": _read(Path(path), size, threads) for size, threads in _READS}
    except OSError as error:
        emit("storage", rates={}, refusal=str(error))
        return
    emit("storage", rates=found, refusal="")


def _read(path: Path, size: int, threads: int) -> float:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    total = min(os.fstat(descriptor).st_size, _READ_AT_MOST) // size * size
    done: list[int] = []

    def work(number: int) -> None:
        buffer = mmap.mmap(-1, size)
        done.append(sum(os.preadv(descriptor, [buffer], at) for at in range(number * size, total, threads * size)))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - start
    os.close(descriptor)
    return sum(done) / seconds


def facts(emit: Emit, *, device: str) -> None:
    """Event ``facts``: what the device is called, and how large it is."""
    place = Place(device)
    told: dict[str, Any] = {"device": place.open().name, "total_bytes": place.total()}
    if place.is_cuda:
        properties = torch.cuda.get_device_properties(place.torch_device)
        told |= {"name": properties.name, "uuid": str(getattr(properties, "uuid", ""))}
        told |= {"capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda}
        told["integrated"] = bool(getattr(properties, "is_integrated", False))
        told["ones"] = float(torch.ones(8, device=place.torch_device).sum())  # a kernel runs
    emit("facts", **told)
