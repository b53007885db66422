"""What an accelerator is to the rest of the program: streams, events, chunks of memory, addresses, copies.

Two things answer to this: ``cuda.CudaDevice``, and ``emulated.EmulatedDevice``, which has a second host slab for its
memory, threads for its copy streams, and proves the order of everything that touches bytes. Whatever is above runs on
either without knowing which.

The rules, which are CUDA's: work given to one stream runs in the order given. Work on two streams is ordered only by
an event that one records and the other waits for, or that the host waits for before giving the second. The host never
waits unless it says so. Addresses and physical memory are apart: a range of addresses is reserved, and chunks of
memory are mapped into it and unmapped, while the addresses, and every tensor over them, stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from narrowboat.arena.slab import Slab


class Event(Protocol):
    """A mark in a stream."""

    def done(self) -> bool:
        """Whether everything before the mark has run."""

    def wait(self) -> None:
        """Hold the calling thread until it has."""

    def seconds_since(self, earlier: Event) -> float:
        """Seconds of the device's time between two marks that were recorded with ``timed`` and are done."""


class Stream(Protocol):
    """A queue of work."""

    def record(self, *, timed: bool = False) -> Event:
        """A mark after everything given so far."""

    def wait(self, event: Event) -> None:
        """What is given from now on runs after the mark; the host goes on."""

    def synchronize(self) -> None:
        """Hold the calling thread until everything given has run."""


class Device(Protocol):
    """One accelerator.

    Attributes:
        name: as a person knows it.
        torch_device: of the tensors that lie in its memory.
        unified: host and device share one memory: pinned host memory is used in place and nothing is copied.
        granularity: bytes; what is mapped is a multiple of it, at addresses that are.
        workspace: bytes that its libraries take beside tensors (cuBLAS, cuDNN), as far as known in advance.
    """

    name: str
    torch_device: torch.device
    unified: bool
    granularity: int
    workspace: int

    def memory(self) -> tuple[int, int]:
        """``(free, total)`` bytes as the driver reports them."""

    def compute(self) -> Stream:
        """The stream on which the calling thread's kernels run."""

    def stream(self, name: str) -> Stream:
        """A stream of its own, for copies."""

    def synchronize(self) -> None:
        """Hold the calling thread until the device has nothing left to do."""

    def reserve(self, nbytes: int) -> int:
        """Addresses without memory, a multiple of the granularity long; returns the first."""

    def unreserve(self, address: int, nbytes: int) -> None:
        """Give addresses back; nothing is mapped there any more."""

    def map(self, address: int, nbytes: int) -> object:
        """Create a chunk of physical memory and map it at ``address``; returns its handle.

        Raises:
            DeviceMemoryError: the device has no such memory free; nothing is mapped.
        """

    def unmap(self, address: int, nbytes: int, handle: object) -> None:
        """Unmap a chunk and release it. The caller has seen to it that nothing still uses it."""

    def reclaim(self, close: Callable[[], None]) -> None:
        """From a finalizer, which may come in the middle of anything: have it run as soon as that is safe."""

    def pin(self, slab: Slab) -> None:
        """Let the device copy from and to a host slab on its own.

        Raises:
            PinnedMemoryError: refused.
        """

    def unpin(self, slab: Slab) -> None:
        """The slab is about to go."""

    def in_place(self, slab: Slab) -> int:
        """The address at which the device itself sees a pinned slab."""

    def copy_in(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """Give ``stream`` a copy from pinned host memory."""

    def copy_out(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """Give ``stream`` a copy to pinned host memory."""

    def copy_within(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """Give ``stream`` a copy between two places of the device that do not overlap."""

    def tensor(self, address: int, dtype: torch.dtype, shape: tuple[int, ...], owner: object) -> torch.Tensor:
        """A contiguous tensor over the device's bytes at ``address``, by reference, keeping ``owner`` alive."""

    def kernel_reads(self, address: int, nbytes: int) -> None:
        """Kernels given to the calling thread's stream about now read these bytes. For proving order; else nothing."""

    def host_writes(self, address: int, nbytes: int) -> None:
        """The calling thread is about to write these bytes of pinned memory. For proving order; else nothing."""

    def hand_over(self) -> object:
        """A token of what the calling thread knows to have happened, for ``take_over`` in another thread."""

    def take_over(self, token: object) -> None:
        """The calling thread has synchronised with the one that made the token."""
