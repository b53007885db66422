"""What a pass costs before it has been run: rates of this machine, applied to the trace's operations."""

from __future__ import annotations

import mmap
import time
from functools import lru_cache

import torch

from narrowboat.profile.use_trace import UseTrace

MODULE_OVERHEAD = 4e-6  # seconds a module call costs in Python, per step


@lru_cache(maxsize=4)
def compute_rates(threads: int) -> tuple[float, float]:
    """``(flops per second, bytes per second)`` of this process, from two kernels of a few milliseconds each.

    Args:
        threads: ``torch.get_num_threads()``, the key under which the answer is kept.
    """
    with torch.inference_mode():
        a, b = torch.ones(384, 768), torch.ones(768, 768)
        flops = 2.0 * 384 * 768 * 768 / _quickest(lambda: a @ b)
        c = torch.ones(1 << 20)
        moved = 2.0 * c.nbytes / _quickest(lambda: c + 1.0)
    return flops, moved


@lru_cache(maxsize=1)
def fault_rate() -> float:
    """Bytes per second at which fresh memory is faulted in and zeroed by the system."""
    size = 4 << 20

    def touch() -> None:
        with mmap.mmap(-1, size) as fresh:
            for at in range(0, size, mmap.PAGESIZE):
                fresh[at] = 1

    touch()
    loop = _quickest(lambda: [None for _ in range(0, size, mmap.PAGESIZE)])
    return size / max(_quickest(touch) - loop, 1e-6)


def _quickest(call: object, tries: int = 5) -> float:
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        call()  # type: ignore[operator]
        best = min(best, time.perf_counter() - start)
    return best


def estimate_steps(trace: UseTrace) -> tuple[float, ...]:
    """Seconds of computing per step, from its operations and the bytes they move; replaced by measurement later."""
    flops, moved = compute_rates(torch.get_num_threads())
    return tuple(max(f / flops, t / moved) + MODULE_OVERHEAD for f, t in zip(trace.flops, trace.traffic, strict=True))
