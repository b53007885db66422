"""The way of a block's bytes to their place: read straight into host memory; or to a device, ``device_channel``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from narrowboat.stream.blocks import BlockState
from narrowboat.stream.reader import Extent, Job, Reader


class Channel(Protocol):
    """Brings blocks. Every call comes from the thread that runs the pass."""

    def begin(self) -> None:
        """A pass begins in the calling thread."""

    def submit(self, block: BlockState, slab: Any, extents: Sequence[Extent], *, urgent: bool) -> Job:
        """Start to bring a block whose place is free, in the order of what was given to kernels so far."""

    def wait(self, job: Job) -> None:
        """Return when the host has nothing more to do for ``job``; raise its error if it has one."""

    def make_ready(self, block: BlockState) -> None:
        """The block is in: what is computed from now on comes after the arrival of its bytes."""

    def give_up(self, block: BlockState) -> None:
        """The block was brought and goes without having been used."""

    def drained(self) -> None:
        """The reader has nothing under way: the calling thread knows what its threads have done."""


class HostChannel:
    """Kernels run in the calling thread, on the bytes where they were read to: there is nothing to put in order.

    Args:
        reader: brings bytes in.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.wait = reader.wait

    def begin(self) -> None:
        """See ``Channel``."""

    def submit(self, block: BlockState, slab: Any, extents: Sequence[Extent], *, urgent: bool) -> Job:
        """See ``Channel``."""
        return self._reader.submit(block.name, slab, extents, urgent=urgent)

    def make_ready(self, block: BlockState) -> None:
        """See ``Channel``."""

    def give_up(self, block: BlockState) -> None:
        """See ``Channel``."""

    def drained(self) -> None:
        """See ``Channel``."""
