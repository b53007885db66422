"""A task's memory swapped out and in: bytes per second, and whether everything is as it was."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from cuda_kit import bandwidth
from cuda_kit.children import Emit
from cuda_kit.place import Place
from narrowboat.arena.device.interface import Device
from narrowboat.arena.device.mirror import Mirror
from narrowboat.arena.device.slab import DeviceSlab

_LOOK_EVERY = 1e-4  # seconds
_GRAPH_SIDE = 1024  # of a square matrix
_PART = 4  # one of so many parts, for swaps in part


def run(
    emit: Emit, *, device: str, nbytes: int, chunks: list[int], repeats: int, sizes: list[int], copies: int
) -> None:
    """Events ``copies``, then ``chunk`` for each size of chunk, and ``graph`` on a GPU."""
    place = Place(device)
    rates = bandwidth.measure(place, sizes, copies)
    emit("copies", **rates)
    accelerator = place.open()
    for chunk in chunks:
        try:
            emit("chunk", **_chunk(place, accelerator, nbytes, chunk, repeats))
        finally:
            place.empty()
    if place.is_cuda:
        emit("graph", **_graph(place, accelerator, chunks[0]))


def _chunk(place: Place, device: Device, nbytes: int, chunk: int, repeats: int) -> dict[str, Any]:
    """All out and all in, then a part of it, several times; memory and bytes are looked at each time."""
    slab = DeviceSlab(device, nbytes, chunk=chunk)
    mirror = Mirror(slab, nbytes)
    view = slab.tensor(0, torch.int64, (nbytes // 8,))
    view.random_()
    kept = view.clone()
    address = view.data_ptr()
    place.settle()
    _same(view, kept)  # the comparison's own memory is taken now
    times = _Times()
    exact = same = True
    free = device.memory()[0]

    def look(expected_out: int, *, there: bool = True) -> None:
        nonlocal exact, same
        exact = exact and device.memory()[0] == free + expected_out and mirror.out_bytes == expected_out
        if there:
            same = same and _same(view, kept) and view.data_ptr() == address

    for _ in range(repeats):
        times.out("evict", slab, 0, lambda: mirror.evict(save=True))
        look(nbytes, there=False)
        times.back("restore", lambda: mirror.restore().wait())
        look(0)
        times.out("evict_saved", slab, 0, lambda: mirror.evict(save=False))
        look(nbytes, there=False)
        times.back("restore", lambda: mirror.restore().wait())
        look(0)
        part = max(nbytes // _PART // slab.chunk, 1) * slab.chunk
        times.out("evict_part", slab, nbytes - part, lambda p=part: mirror.evict(p, save=True))
        look(part, there=False)
        times.back("restore_part", lambda p=part: mirror.restore(p).wait())
        look(0)
    mirror.evict(nbytes // 2, save=True)
    half = mirror.out_bytes
    mirror.restore(slab.chunk).wait()
    look(half - slab.chunk, there=False)
    mirror.restore().wait()
    look(0)
    start = time.perf_counter()
    mirror.verify()
    verified = time.perf_counter() - start
    mirror.close()
    slab.close()
    moved = {name: part if "part" in name else nbytes for name in times.seen}
    return {
        "chunk": slab.chunk,
        "bytes": nbytes,
        "part_bytes": part,
        "seconds": {name: statistics.median(seen) for name, seen in times.seen.items()},
        "rates": {name: moved[name] / statistics.median(seen) for name, seen in times.seen.items()},
        "free_exact": exact and device.memory()[0] == free + nbytes,
        "bytes_same": same,
        "verify_s": verified,
    }


def _same(view: torch.Tensor, kept: torch.Tensor) -> bool:
    return bool(torch.equal(view, kept))


class _Times:
    """Seconds by name. Of what goes out: until the memory is others', and until the call is back."""

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {}

    def out(self, name: str, slab: DeviceSlab, left: int, call: Callable[[], Any]) -> None:
        """Time an eviction that leaves so many bytes."""
        gone: list[float] = []
        over = threading.Event()

        def watch() -> None:
            while slab.mapped_bytes > left and not over.is_set():
                time.sleep(_LOOK_EVERY)
            gone.append(time.perf_counter())

        watcher = threading.Thread(target=watch)
        start = time.perf_counter()
        watcher.start()
        call()
        back = time.perf_counter()
        over.set()
        watcher.join()
        self._note(name, min(gone[0], back) - start)
        self._note(f"{name}_call", back - start)

    def back(self, name: str, call: Callable[[], Any]) -> None:
        """Time a return, until the bytes are there."""
        start = time.perf_counter()
        call()
        self._note(name, time.perf_counter() - start)

    def _note(self, name: str, seconds: float) -> None:
        self.seen.setdefault(name, []).append(seconds)


def _graph(place: Place, device: Device, chunk: int) -> dict[str, Any]:
    """A CUDA graph captured over the arena, replayed right after a swap, with nobody waiting in between."""
    side = _GRAPH_SIDE
    slab = DeviceSlab(device, side * side * 2, chunk=chunk)
    mirror = Mirror(slab, slab.nbytes)
    weight = slab.tensor(0, torch.bfloat16, (side, side))
    weight.normal_(0.0, side**-0.5)
    x = torch.randn(side, side, device=place.torch_device, dtype=torch.bfloat16)
    stream = torch.cuda.Stream(place.torch_device)
    stream.wait_stream(torch.cuda.current_stream(place.torch_device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            y = x @ weight
    torch.cuda.current_stream(place.torch_device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x @ weight
    graph.replay()
    place.settle()
    want = y.clone()
    results = []
    for _ in range(5):
        y.zero_()
        mirror.evict(save=True)
        mirror.restore()
        graph.replay()
        results.append(bool(torch.equal(y, want)))
    mirror.close()
    return {"replays": len(results), "same": all(results)}
