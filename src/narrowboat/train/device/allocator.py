"""torch's caching allocator on a CUDA device: what it gave to tensors, what it took for that, and a bound on it.

Facts this rests on, each of which a test that needs a GPU looks at: ``memory_stats`` counts bytes given to tensors
(``allocated_bytes``, 512 at a time) and taken from the device (``reserved_bytes``); both have peaks, which
``reset_peak_memory_stats`` sets back. ``set_per_process_memory_fraction`` bounds what is taken: at the bound the
allocator first gives back what it keeps of freed tensors, then refuses with ``torch.OutOfMemoryError``. Below 1 MiB it
takes 2 MiB at a time, up to 10 MiB 20 MiB, beyond whole multiples of 2 MiB.

Sources: torch.cuda.memory (documentation of those functions), "Memory management" in PyTorch's notes on CUDA
semantics, ``alloc_block`` and ``setMemoryFraction`` in c10/cuda/CUDACachingAllocator.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch


class Allocator(Protocol):
    """Gives a device's memory to tensors.

    Attributes:
        slack: bytes that it takes beside tensors, however they fall.
    """

    slack: int

    def allocated(self) -> int:
        """Bytes that tensors have now."""
        ...

    def reserved(self) -> int:
        """Bytes taken from the device, what is kept of freed tensors included."""
        ...

    def peaks(self) -> tuple[int, int]:
        """The most of both since ``reset_peaks``."""
        ...

    def reset_peaks(self) -> None:
        """Forget what was before."""
        ...

    def give_back(self) -> None:
        """Return what is kept of freed tensors to the device."""
        ...

    def begin(self, batch: Iterable[torch.Tensor]) -> None:
        """A step with such a batch follows; for an allocator that has to be told what is there."""
        ...

    def limited(self, nbytes: int | None) -> AbstractContextManager[None]:
        """Inside, no more than ``nbytes`` are taken from the device in all; None for no limit.

        What would go beyond raises ``torch.OutOfMemoryError``. A limit that was there and is tighter stays.
        """
        ...


class CudaAllocator:
    """See ``Allocator``.

    Args:
        device: a CUDA device of torch's.
        total: bytes of memory that it has.
    """

    # One segment of each kind that is not full: 2 MiB of small tensors, 20 MiB of larger ones.
    slack = 22 << 20

    def __init__(self, device: torch.device, total: int) -> None:
        self._device, self._total = device, total

    def allocated(self) -> int:
        """See ``Allocator``."""
        return torch.cuda.memory_allocated(self._device)

    def reserved(self) -> int:
        """See ``Allocator``."""
        return torch.cuda.memory_reserved(self._device)

    def peaks(self) -> tuple[int, int]:
        """See ``Allocator``."""
        return torch.cuda.max_memory_allocated(self._device), torch.cuda.max_memory_reserved(self._device)

    def reset_peaks(self) -> None:
        """See ``Allocator``."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def give_back(self) -> None:
        """See ``Allocator``. Frees memory of the device, which waits for all of its work."""
        torch.cuda.empty_cache()

    def begin(self, batch: Iterable[torch.Tensor]) -> None:
        """See ``Allocator``."""

    @contextmanager
    def limited(self, nbytes: int | None) -> Iterator[None]:
        """See ``Allocator``."""
        if nbytes is None or nbytes >= self._total:
            yield
            return
        # Older versions of torch do not tell what was set; next to nobody has set anything.
        told = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
        before = float(told(self._device))
        torch.cuda.set_per_process_memory_fraction(min(before, nbytes / self._total), self._device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(before, self._device)
