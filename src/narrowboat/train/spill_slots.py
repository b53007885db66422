"""Which bytes of the spill file are taken: a free list of page-aligned slots."""

from __future__ import annotations

from bisect import bisect_left

PAGE = 4096


def rounded(nbytes: int) -> int:
    """``nbytes`` rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


class Slots:
    """The free list of a file that grows at its end.

    A slot is taken from the smallest hole it fits in (of equals, the first); what is freed joins the holes beside it.
    A step that spills the same sizes in the same order therefore finds the same slots again.

    Attributes:
        end: bytes of the file, a multiple of the page.
    """

    def __init__(self) -> None:
        self.end = 0
        # Holes in the order of the file; none touches another.
        self._starts: list[int] = []
        self._sizes: list[int] = []

    @property
    def free(self) -> int:
        """Bytes in holes."""
        return sum(self._sizes)

    @property
    def taken(self) -> int:
        """Bytes in slots."""
        return self.end - self.free

    def missing(self, size: int) -> int:
        """Bytes by which the file must grow before ``take(size)`` finds a slot; 0 if there is a hole for it."""
        if any(hole >= size for hole in self._sizes):
            return 0
        ends_free = bool(self._starts) and self._starts[-1] + self._sizes[-1] == self.end
        return size - (self._sizes[-1] if ends_free else 0)

    def grow(self, size: int) -> None:
        """Add a hole of ``size`` bytes at the end."""
        start, self.end = self.end, self.end + size
        self.give(start, size)

    def take(self, size: int) -> int:
        """The offset of a slot of ``size`` bytes (whole pages).

        Raises:
            ValueError: no hole is that large; see :meth:`missing`.
        """
        if size == 0:
            return 0
        fitting = [index for index, hole in enumerate(self._sizes) if hole >= size]
        if not fitting:
            raise ValueError(f"no hole of {size} bytes")
        best = min(fitting, key=lambda index: self._sizes[index])
        offset = self._starts[best]
        if self._sizes[best] == size:
            del self._starts[best], self._sizes[best]
        else:
            self._starts[best] += size
            self._sizes[best] -= size
        return offset

    def give(self, offset: int, size: int) -> None:
        """Free the slot of ``size`` bytes at ``offset``."""
        if size == 0:
            return
        at = bisect_left(self._starts, offset)
        if at < len(self._starts) and self._starts[at] == offset + size:
            size += self._sizes[at]
            del self._starts[at], self._sizes[at]
        if at > 0 and self._starts[at - 1] + self._sizes[at - 1] == offset:
            self._sizes[at - 1] += size
        else:
            self._starts.insert(at, offset)
            self._sizes.insert(at, size)
