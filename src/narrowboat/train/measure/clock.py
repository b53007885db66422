"""When something happened: on the host at once, on a device as its stream came to a mark."""

from __future__ import annotations

import time
from typing import Any, Protocol

from narrowboat.arena.device.interface import Device


class Clock(Protocol):
    """Marks, and the seconds between them."""

    def mark(self) -> Any:
        """Now; on a device, when the kernels that the calling thread has given so far have run."""
        ...

    def seconds(self, earlier: Any, later: Any) -> float:
        """Seconds between two marks; the host waits for the later one to have come."""
        ...


class HostClock:
    """For what runs on the host."""

    def mark(self) -> float:
        """See ``Clock``."""
        return time.perf_counter()

    def seconds(self, earlier: float, later: float) -> float:
        """See ``Clock``."""
        return later - earlier


class DeviceClock:
    """For kernels, which run some time after they were called: by timed events, so that nothing waits in between.

    Args:
        device: on which they run.
    """

    def __init__(self, device: Device) -> None:
        self._device = device

    def mark(self) -> Any:
        """See ``Clock``."""
        return self._device.compute().record(timed=True)

    def seconds(self, earlier: Any, later: Any) -> float:
        """See ``Clock``."""
        later.wait()
        return max(0.0, float(later.seconds_since(earlier)))


HOST = HostClock()
