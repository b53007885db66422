"""A bounded ring of messages between two processes: fixed slots of shared memory, counted by two eventfds.

One side writes, one reads. Neither looks at the other's position: the kernel's counters say how many messages there
are and how many slots are free, and passing through them orders memory between the two on every processor.
"""

from __future__ import annotations

import os
import select
import struct
import threading

from narrowboat.errors import UsageError

_LENGTH = struct.Struct("=I")


class Ring:
    """One direction.

    Args:
        memory: ``slots * slot_bytes`` bytes that both processes see.
        slots: messages that may be under way.
        slot_bytes: of one message, and four.
        items, room: eventfds that both processes hold; ``room`` begins with 0.
    """

    def __init__(self, memory: memoryview, slots: int, slot_bytes: int, items: int, room: int) -> None:
        self._memory, self._slots, self._slot_bytes = memory, slots, slot_bytes
        self.items, self._room = items, room
        self._free, self._place = slots, 0
        self._lock = threading.Lock()

    # -- the side that writes --------------------------------------------------------------------------

    def put(self, message: bytes, timeout: float = 0.0) -> bool:
        """Write a message; False if there is no free slot within so many seconds.

        Raises:
            UsageError: it is longer than a slot.
        """
        if len(message) > self._slot_bytes - _LENGTH.size:
            raise UsageError(f"a message of {len(message)} bytes is longer than the {self._slot_bytes} of a slot")
        with self._lock:
            if not self._free and not self._wait_for_room(timeout):
                return False
            start = self._place * self._slot_bytes
            body = start + _LENGTH.size
            self._memory[body : body + len(message)] = message
            _LENGTH.pack_into(self._memory, start, len(message))
            self._place, self._free = (self._place + 1) % self._slots, self._free - 1
            os.eventfd_write(self.items, 1)
        return True

    def _wait_for_room(self, timeout: float) -> bool:
        if timeout and not select.select([self._room], [], [], timeout)[0]:
            return False
        try:
            self._free += os.eventfd_read(self._room)
        except BlockingIOError:
            return False
        return True

    @property
    def most(self) -> int:
        """Bytes of the longest message."""
        return self._slot_bytes - _LENGTH.size

    # -- the side that reads ---------------------------------------------------------------------------

    def take(self) -> list[bytes]:
        """All messages there are; where there are none, none, or it waits if ``items`` was made to wait."""
        try:
            count = os.eventfd_read(self.items)
        except BlockingIOError:
            return []
        found = []
        for _ in range(count):
            start = self._place * self._slot_bytes
            (length,) = _LENGTH.unpack_from(self._memory, start)
            body = start + _LENGTH.size
            found.append(bytes(self._memory[body : body + length]))
            self._place = (self._place + 1) % self._slots
        os.eventfd_write(self._room, count)
        return found

    def wait(self, *others: int, timeout: float | None = None) -> bool:
        """Wait for messages, or until one of other descriptors can be read; whether messages are there."""
        return self.items in select.select([self.items, *others], [], [], timeout)[0]

    def close(self) -> None:
        """Let go of the memory."""
        self._memory.release()
