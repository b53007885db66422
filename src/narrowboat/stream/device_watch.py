"""What a session holds of its device's memory: the arena, and what PyTorch's allocator took beside it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from narrowboat.arena.device.interface import Device
from narrowboat.stream.memory_watch import NOISE


class DeviceWatch:
    """What ``memory_watch.MemoryWatch`` is for the process's own memory.

    The allocator keeps what it has reserved, so a look after a pass sees the most that it took. On an emulated device
    activations are the process's, and only the arena is counted.

    Args:
        device: whose memory.
        arena: bytes of it that are mapped now.

    Attributes:
        baseline: bytes that the allocator had reserved when the session began.
        answered: as of ``MemoryWatch``.
    """

    def __init__(self, device: Device, arena: Callable[[], int]) -> None:
        self._device, self._arena = device, arena
        self._counts = device.torch_device.type == "cuda"
        self.baseline = self._reserved()
        self.answered = 0
        self._most = self._earlier = 0

    def _reserved(self) -> int:
        return torch.cuda.memory_reserved(self._device.torch_device) if self._counts else 0

    @property
    def beside(self) -> int:
        """Bytes that the allocator has reserved since the session began."""
        return max(self._reserved() - self.baseline, 0)

    @property
    def held(self) -> int:
        """Bytes now."""
        return self._arena() + self.beside

    @property
    def peak(self) -> int:
        """Most bytes so far."""
        return max(self._earlier, self.recent)

    @property
    def recent(self) -> int:
        """The same since ``begin_anew``."""
        self.sample()
        return self._most

    @property
    def certain(self) -> bool:
        """Whether activations are in it."""
        return self._counts

    def begin_anew(self) -> None:
        """As of ``MemoryWatch``."""
        self._earlier = self.peak
        self._most, self.answered = 0, 0

    def blind(self, budget: int) -> bool:
        """As of ``MemoryWatch``."""
        return False

    def sample(self) -> None:
        """Look now."""
        self._most = max(self._most, self.held)

    def rest(self, budget: int, reserved: int) -> None:
        """As of ``MemoryWatch``."""
        self.sample()

    def overrun(self, budget: int, held: int) -> int:
        """As of ``MemoryWatch``."""
        over = self.recent - max(budget, self.answered)
        return over if over > min(budget // 100, NOISE) else 0
